package pod

import (
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/pod/store"
	"github.com/naru-project/naru/runtime"
)

// podEntry is what the manager has of one pod.
type podEntry struct {
	id    string
	key   podKey
	op    opLock       // serialises what changes the pod or the set of its containers
	stops atomic.Int32 // stops and removals that wait for op: no new container may slip in before them
	snap  atomic.Pointer[Pod]

	// Guarded by op.
	extras   *store.Extras
	released bool // nothing of the host is held any more
	unsure   bool // Adopt could not tell whether it is whole; the reaper asks again
	dirty    bool // memory is ahead of the record
}

// containerEntry is what the manager has of one container.
//
// Lock order: podEntry.op, containerEntry.op, containerEntry.state.
type containerEntry struct {
	id     string
	podID  string
	key    containerKey
	cgroup string
	op     opLock // serialises Start, Stop, Remove, Update
	state  opLock // held for one change of snapshot and record
	snap   atomic.Pointer[Container]
	ended  chan struct{} // closed once the container is Exited

	// Guarded by state.
	extras  *store.Extras
	proc    runtime.Process
	pending *exitFact // an exit that came while the start, or the create, was not through
	stopBy  time.Time
	dirty   bool // memory is ahead of the record: an exit that could not be written
	closed  bool // ended is closed

	stopMu   sync.Mutex
	stopping *stopper // guarded by stopMu
}

// table holds the entries. All reads are from memory.
type table struct {
	mu         sync.RWMutex
	pods       map[string]*podEntry              // guarded by mu
	containers map[string]*containerEntry        // guarded by mu
	podKeys    map[podKey]*podEntry              // guarded by mu; the newest of each key
	ctrKeys    map[containerKey]*containerEntry  // guarded by mu; the newest of each key
	members    map[string][]*containerEntry      // guarded by mu; by pod, never changed in place
	allPods    atomic.Pointer[[]*podEntry]       // in order of creation, never changed in place
	allCtrs    atomic.Pointer[[]*containerEntry] // the same
}

func newTable() *table {
	t := &table{
		pods:       make(map[string]*podEntry),
		containers: make(map[string]*containerEntry),
		podKeys:    make(map[podKey]*podEntry),
		ctrKeys:    make(map[containerKey]*containerEntry),
		members:    make(map[string][]*containerEntry),
	}
	t.allPods.Store(new([]*podEntry))
	t.allCtrs.Store(new([]*containerEntry))
	return t
}

func newPodEntry(s *Pod) *podEntry {
	p := &podEntry{id: s.ID, key: keyOf(s.Config.Metadata), op: newOpLock()}
	p.snap.Store(s)
	return p
}

func newContainerEntry(s *Container) *containerEntry {
	c := &containerEntry{
		id: s.ID, podID: s.PodID, key: containerKey{s.PodID, s.Config.Metadata.Name, s.Config.Metadata.Attempt},
		op: newOpLock(), state: newOpLock(), ended: make(chan struct{}),
	}
	c.snap.Store(s)
	return c
}

func (t *table) addPod(p *podEntry) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.pods[p.id] = p
	t.podKeys[p.key] = p
	t.allPods.Store(appended(*t.allPods.Load(), p))
}

func (t *table) removePod(p *podEntry) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.pods, p.id)
	if t.podKeys[p.key] == p {
		delete(t.podKeys, p.key)
	}
	t.allPods.Store(without(*t.allPods.Load(), p))
}

func (t *table) addContainer(c *containerEntry) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.containers[c.id] = c
	t.ctrKeys[c.key] = c
	t.members[c.podID] = *appended(t.members[c.podID], c)
	t.allCtrs.Store(appended(*t.allCtrs.Load(), c))
}

func (t *table) removeContainer(c *containerEntry) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.containers, c.id)
	if t.ctrKeys[c.key] == c {
		delete(t.ctrKeys, c.key)
	}
	if rest := *without(t.members[c.podID], c); len(rest) > 0 {
		t.members[c.podID] = rest
	} else {
		delete(t.members, c.podID)
	}
	t.allCtrs.Store(without(*t.allCtrs.Load(), c))
}

func appended[T any](s []T, v T) *[]T {
	n := make([]T, len(s)+1)
	copy(n, s)
	n[len(s)] = v
	return &n
}

func without[T comparable](s []T, v T) *[]T {
	n := make([]T, 0, len(s))
	for _, x := range s {
		if x != v {
			n = append(n, x)
		}
	}
	return &n
}

func (t *table) pod(id string) *podEntry {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.pods[id]
}

func (t *table) container(id string) *containerEntry {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.containers[id]
}

func (t *table) podOfKey(k podKey) *podEntry {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.podKeys[k]
}

func (t *table) containerOfKey(k containerKey) *containerEntry {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.ctrKeys[k]
}

func (t *table) containersOf(podID string) []*containerEntry {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.members[podID]
}

// findPod finds by full id or unique prefix.
func (t *table) findPod(id string) (*podEntry, error) {
	if p := t.pod(id); p != nil {
		return p, nil
	}
	return findPrefix("pod", id, *t.allPods.Load(), func(p *podEntry) string { return p.id })
}

func (t *table) findContainer(id string) (*containerEntry, error) {
	if c := t.container(id); c != nil {
		return c, nil
	}
	return findPrefix("container", id, *t.allCtrs.Load(), func(c *containerEntry) string { return c.id })
}

func findPrefix[T any](noun, prefix string, all []*T, id func(*T) string) (*T, error) {
	if prefix == "" {
		return nil, errs.New(errs.NotFound, "find %s: the id is empty", noun)
	}
	var found *T
	if len(prefix) < 64 {
		for _, x := range all {
			if !strings.HasPrefix(id(x), prefix) {
				continue
			}
			if found != nil {
				return nil, errs.New(errs.InvalidArgument, "find %s %q: several ids begin like this, give more digits", noun, prefix)
			}
			found = x
		}
	}
	if found == nil {
		return nil, errs.New(errs.NotFound, "find %s %q: there is none", noun, clip(prefix))
	}
	return found, nil
}

// clip bounds what a caller sent before it goes into a message.
func clip(s string) string {
	if len(s) > 80 {
		return s[:80] + "…"
	}
	return s
}

func (t *table) listPods(f Filter) []*Pod {
	all := *t.allPods.Load()
	if id := cmpOr(f.ID, f.PodID); id != "" {
		p, err := t.findPod(id)
		if err != nil || f.ID != "" && f.PodID != "" && !strings.HasPrefix(p.id, f.PodID) {
			return nil
		}
		all = []*podEntry{p}
	}
	out := make([]*Pod, 0, len(all))
	for _, p := range all {
		s := p.snap.Load()
		if s.Phase == PhaseCreating || !matchPodState(f.State, s) || !matchLabels(f.Labels, s.Config.Labels) {
			continue
		}
		out = append(out, s)
	}
	return out
}

func (t *table) listContainers(f Filter) []*Container {
	all := *t.allCtrs.Load()
	if f.PodID != "" {
		p, err := t.findPod(f.PodID)
		if err != nil {
			return nil
		}
		all, f.PodID = t.containersOf(p.id), p.id
	}
	if f.ID != "" {
		c, err := t.findContainer(f.ID)
		if err != nil || f.PodID != "" && c.podID != f.PodID {
			return nil
		}
		all = []*containerEntry{c}
	}
	out := make([]*Container, 0, len(all))
	for _, c := range all {
		s := c.snap.Load()
		if s.Phase == PhaseCreating || f.State != "" && f.State != string(s.State) || !matchLabels(f.Labels, s.Config.Labels) {
			continue
		}
		out = append(out, s)
	}
	return out
}

func cmpOr(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

func matchPodState(want string, p *Pod) bool {
	switch want {
	case "":
		return true
	case "ready":
		return p.Ready()
	case "notready":
		return !p.Ready()
	}
	return false
}

func matchLabels(want, have map[string]string) bool {
	for k, v := range want {
		if got, ok := have[k]; !ok || got != v {
			return false
		}
	}
	return true
}
