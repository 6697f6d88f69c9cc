package pod

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/pod/store"
	"github.com/naru-project/naru/runtime"
)

const recoverAtATime = 8

// Report tells what a start-up found.
type Report struct {
	Pods, Containers int // that are there now
	Quarantined      int // damaged records
	Orphans          int // containers without a record or without a pod, ended
	Undone           int // half-done creates and removals, taken down
	Ended            int // containers that ended while nobody looked
	Lost             int // ready pods that are not whole any more
	Rebooted         int // pods of an earlier boot
	Problems         []string
	Took             time.Duration

	mu sync.Mutex
}

func (r *Report) count(p *int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	*p++
}

func (r *Report) problem(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.Problems) < 100 {
		r.Problems = append(r.Problems, fmt.Sprintf(format, args...))
	}
}

// Recover makes memory out of the records, the monitor and the kernel, and
// finishes or undoes what was under way. It is called once, before the first
// request, and never fails: what it cannot settle it reports, and the reaper
// goes on with it.
func (m *Manager) Recover(ctx context.Context) *Report {
	m.began = time.Now()
	r := &Report{}
	pods, podsOK := loadRecords[podRecord](m, m.pods, r)
	ctrs, ctrsOK := loadRecords[containerRecord](m, m.containers, r)
	old := m.fill(pods, ctrs)

	m.settleContainers(ctx, r, old)
	m.settlePods(ctx, r, old)
	if podsOK && ctrsOK { // else nobody knows what is known
		m.sweep(ctx, r)
	}
	r.Pods, r.Containers = len(*m.table.allPods.Load()), len(*m.table.allCtrs.Load())
	r.Took = time.Since(m.began)
	klog.FromContext(ctx).Info("recovered", "pods", r.Pods, "containers", r.Containers,
		"quarantined", r.Quarantined, "orphans", r.Orphans, "undone", r.Undone, "ended", r.Ended,
		"lost", r.Lost, "rebooted", r.Rebooted, "problems", r.Problems, "took", r.Took)
	return r
}

// checked is what a record type says about its own content.
type checked[T any] interface {
	*T
	check(id string) error
}

// loadRecords reads a folder; what is damaged goes to quarantine. ok is false
// when the folder itself could not be read.
func loadRecords[T any, P checked[T]](m *Manager, d *store.Dir, r *Report) (good []store.Record[T], ok bool) {
	all, bad, err := store.Load[T](d)
	if err != nil {
		r.problem("%v", err)
		return nil, false
	}
	for _, rec := range all {
		if err := P(rec.Value).check(rec.ID); err != nil {
			bad = append(bad, store.Damaged{Name: rec.ID + ".json", Err: err})
			continue
		}
		if rec.Extras != nil {
			klog.Background().Info("record of a newer release, its fields are kept", "id", rec.ID, "fields", rec.Extras.String())
		}
		good = append(good, rec)
	}
	for _, b := range bad {
		r.Quarantined++
		moved, err := d.Quarantine(b.Name, filepath.Join(m.cfg.StateDir, "quarantine"))
		klog.Background().Error(b.Err, "damaged record", "file", filepath.Join(d.Path(), b.Name), "movedTo", moved, "moveError", err)
		if err != nil {
			r.problem("quarantine %s: %v", b.Name, err)
		}
	}
	return good, true
}

// fill makes the entries, oldest first, and returns the ids of those whose
// record is of another boot.
func (m *Manager) fill(pods []store.Record[podRecord], ctrs []store.Record[containerRecord]) (old map[string]bool) {
	old = make(map[string]bool)
	slices.SortFunc(pods, func(a, b store.Record[podRecord]) int {
		return cmp.Or(a.Value.CreatedAt.Compare(b.Value.CreatedAt), cmp.Compare(a.ID, b.ID))
	})
	slices.SortFunc(ctrs, func(a, b store.Record[containerRecord]) int {
		return cmp.Or(a.Value.CreatedAt.Compare(b.Value.CreatedAt), cmp.Compare(a.ID, b.ID))
	})
	for _, rec := range pods {
		p := newPodEntry(rec.Value.snapshot())
		p.extras, p.released = rec.Extras, rec.Value.Released
		old[p.id] = rec.Value.BootID != m.boot
		m.table.addPod(p)
	}
	for _, rec := range ctrs {
		c := newContainerEntry(rec.Value.snapshot())
		c.extras, c.cgroup, c.proc, c.stopBy = rec.Extras, rec.Value.Cgroup, rec.Value.Process, rec.Value.StopBy
		if rec.Value.Phase == PhaseExited || rec.Value.Phase == PhaseRemoving {
			c.closed = true
			close(c.ended)
		}
		old[c.id] = rec.Value.BootID != m.boot
		m.table.addContainer(c)
	}
	return old
}

// each runs f for all items, some at a time.
func each[T any](items []T, f func(T)) {
	var wg sync.WaitGroup
	slots := make(chan struct{}, recoverAtATime)
	for _, x := range items {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			f(x)
		})
	}
	wg.Wait()
}

// listed is what the monitor keeps, by id; ok is false when it cannot be asked.
func (m *Manager) listed(ctx context.Context) (map[string]runtime.State, error) {
	ctx, cancel := detach(ctx, m.cfg.UndoTimeout, "ask the monitor for its containers")
	defer cancel()
	states, err := m.deps.Executor.List(ctx)
	if err != nil {
		return nil, err
	}
	byID := make(map[string]runtime.State, len(states))
	for _, s := range states {
		byID[s.ID] = s
	}
	return byID, nil
}

// settleContainers holds the records against the monitor.
func (m *Manager) settleContainers(ctx context.Context, r *Report, old map[string]bool) {
	states, err := m.listed(ctx)
	if err != nil {
		// Containers go on without it. They are shown as they were.
		m.unlisted.Store(true)
		r.problem("ask the monitor for its containers: %v", err)
	}
	recorded := *m.table.allCtrs.Load()
	each(recorded, func(c *containerEntry) {
		ctx, cancel := detach(ctx, m.cfg.StopTimeout, "recover container "+short(c.id))
		defer cancel()
		if err := m.settleContainer(ctx, r, c, states, old[c.id]); err != nil {
			r.problem("container %s: %v", short(c.id), err)
		}
	})
	for _, c := range recorded {
		delete(states, c.id) // taken down just now, maybe
	}
	m.endOrphans(ctx, r, states)
}

// endOrphans ends containers that run without a record: their record was
// damaged, or a create was killed before it wrote one.
func (m *Manager) endOrphans(ctx context.Context, r *Report, states map[string]runtime.State) {
	for id, st := range states {
		if m.table.container(id) != nil {
			continue
		}
		r.Orphans++
		klog.FromContext(ctx).Info("ending a container that has no record", "id", id)
		ctx, cancel := detach(ctx, m.cfg.StopTimeout, "end orphan "+short(id))
		view := &runtime.Container{ID: id, Cgroup: st.Cgroup} // its spec may be lost, too
		if rc, err := m.specs.get(id); err == nil {
			view = rc
		}
		err := m.deps.Executor.Delete(ctx, view)
		if err == nil && view.Cgroup != "" { // as for one without a pod; its pod's may be gone too
			err = m.leavePodCgroup(ctx, path.Dir(view.Cgroup))
		}
		if err != nil {
			r.problem("orphan %s: %v", short(id), err)
		}
		cancel()
	}
}

func (m *Manager) settleContainer(ctx context.Context, r *Report, c *containerEntry, states map[string]runtime.State, old bool) error {
	phase := c.snap.Load().Phase
	orphan := m.table.pod(c.podID) == nil
	if orphan || phase == PhaseCreating || phase == PhaseRemoving || phase == PhaseBroken {
		r.count(pick(orphan, &r.Orphans, &r.Undone))
		err := m.takeDownUnowned(ctx, c)
		if orphan && c.cgroup != "" { // there is no pod that would do it
			err = errors.Join(err, m.leavePodCgroup(ctx, path.Dir(c.cgroup)))
		}
		return err
	}
	switch {
	case old && alive(phase):
		r.count(&r.Ended)
		m.lost(ctx, c, "the node was rebooted while the container was "+string(phase))
	case states == nil: // nobody to ask
	case alive(phase):
		if m.settleAlive(ctx, c, states) {
			r.count(&r.Ended)
		}
	default:
		if st, there := states[c.id]; there && st.Exit == nil { // said to have exited, and has not
			if err := m.kill(ctx, c); err != nil {
				r.problem("kill container %s: %v", short(c.id), err)
			}
		}
	}
	return m.hold(ctx, c.snap.Load())
}

func pick[T any](cond bool, a, b T) T {
	if cond {
		return a
	}
	return b
}

// takeDownUnowned removes a container that nobody is entitled to.
func (m *Manager) takeDownUnowned(ctx context.Context, c *containerEntry) error {
	op := m.ops.begin("Recover", c.id, m.nameOf(c))
	defer op.end()
	if !c.op.tryLock() {
		return nil // somebody is at it
	}
	defer c.op.unlock()
	if alive(c.snap.Load().Phase) {
		m.lost(ctx, c, "its pod is not known any more")
	}
	return m.takeDown(ctx, c, op)
}

// lost makes a container Exited whose end nobody saw. What may be left of it
// is killed.
func (m *Manager) lost(ctx context.Context, c *containerEntry, why string) {
	if err := m.kill(ctx, c); err != nil {
		m.log(ctx).V(2).Info("kill what may be left of a lost container", "id", c.id, "err", err)
	}
	if err := c.state.lock(ctx); err != nil {
		return
	}
	defer c.state.unlock()
	if !alive(c.snap.Load().Phase) {
		return // its exit came after all
	}
	if c.snap.Load().Phase == PhaseStarting {
		if err := m.show(c, hapReset, false, nil); err != nil {
			return
		}
	}
	f := exitFact{Exit: unknownExit(c.id)}
	m.settleExit(ctx, c, func(n *Container) {
		f.fill(n)
		n.Message = why
	})
}

// unknownExit is the end of a process that nobody saw.
func unknownExit(id string) runtime.Exit {
	return runtime.Exit{ID: id, Unknown: true, Code: unknownExitCode, Time: time.Now()}
}

// settleAlive holds a container that should have a process against what the
// monitor says. It reports whether the container turned out to have ended.
func (m *Manager) settleAlive(ctx context.Context, c *containerEntry, states map[string]runtime.State) (ended bool) {
	st, there := states[c.id]
	if !there {
		m.lost(ctx, c, "the monitor does not know the container any more")
		return true
	}
	if err := m.settleStart(ctx, c, st); err != nil {
		m.log(ctx).Error(err, "container's start is not settled", "id", c.id)
	}
	if st.Exit != nil {
		m.exited(ctx, *st.Exit)
		return true
	}
	if c.snap.Load().Phase == PhaseStopping {
		by := c.stopBy // recovery is alone, or the reaper holds no stop of it
		if _, err := m.joinStop(ctx, c, by); err != nil {
			m.log(ctx).Error(err, "stop is not taken up again", "id", c.id)
		}
	}
	return false
}

// settleStart ends a start that was cut short, by what came of it.
func (m *Manager) settleStart(ctx context.Context, c *containerEntry, st runtime.State) error {
	if err := c.state.lock(ctx); err != nil {
		return err
	}
	defer c.state.unlock()
	if st.Process.PID != 0 {
		c.proc = st.Process
	}
	if c.snap.Load().Phase != PhaseStarting {
		return nil
	}
	if st.Started {
		return m.show(c, hapStarted, false, func(n *Container) { n.PID = c.proc.PID })
	}
	return m.show(c, hapReset, false, func(n *Container) { n.StartedAt = time.Time{} })
}

// hold takes the container's images into use again.
func (m *Manager) hold(ctx context.Context, s *Container) error {
	ids := []string{s.ImageID}
	for _, mt := range s.Mounts {
		if mt.ImageRef != "" {
			ids = append(ids, mt.ImageRef)
		}
	}
	for _, id := range ids {
		if id == "" {
			continue
		}
		if _, err := m.deps.Images.Layers(ctx, id, s.ID); err != nil {
			return fmt.Errorf("hold image %s: %w", id, err)
		}
	}
	return nil
}

// settlePods asks the sandboxes what is left of each pod's place. All leases
// are known again before the first request.
func (m *Manager) settlePods(ctx context.Context, r *Report, old map[string]bool) {
	each(*m.table.allPods.Load(), func(p *podEntry) {
		ctx, cancel := detach(ctx, m.cfg.StopTimeout, "recover pod "+short(p.id))
		defer cancel()
		if err := m.settlePod(ctx, r, p, old[p.id]); err != nil {
			r.problem("pod %s: %v", short(p.id), err)
			m.poke() // the reaper goes on with it, once requests are served
		}
	})
}

func (m *Manager) settlePod(ctx context.Context, r *Report, p *podEntry, old bool) error {
	if err := p.op.lock(ctx); err != nil {
		return err
	}
	defer p.op.unlock()
	op := m.ops.begin("Recover", p.id, podName(p.snap.Load().Config))
	defer op.end()
	s := p.snap.Load()
	switch s.Phase {
	case PhaseCreating, PhaseRemoving, PhaseBroken:
		r.count(&r.Undone)
		return m.removePod(ctx, p, op)
	case PhaseStopped:
		if p.released {
			return nil
		}
		return m.release(ctx, p)
	}
	if old {
		r.count(&r.Rebooted)
		err := m.showPod(p, hapLost, false, func(n *Pod) { n.Message = "the node was rebooted" })
		if err != nil {
			return err
		}
		return m.release(ctx, p)
	}
	alive, err := m.adopt(ctx, p)
	if err != nil || s.Phase == PhaseStopping { // the reaper stops it, in its own time
		m.poke()
		return err
	}
	if !alive {
		r.count(&r.Lost)
	}
	return nil
}

// adopt asks whether a pod's place is whole. The caller holds p.op.
func (m *Manager) adopt(ctx context.Context, p *podEntry) (alive bool, err error) {
	s := p.snap.Load()
	if s.Handle == nil {
		err = errs.New(errs.Internal, "the record has no handle")
	} else if alive, err = m.deps.Sandboxes.Adopt(ctx, sandboxSpec(s.ID, s.Config), s.Handle); err != nil {
		p.unsure = true // and shown as it was
		return false, fmt.Errorf("adopt: %w", err)
	}
	p.unsure = false
	if alive || s.Phase != PhaseReady {
		return alive, nil
	}
	m.log(ctx).Info("pod is not whole any more", "pod", podName(s.Config), "id", p.id, "err", err)
	if err := m.showPod(p, hapLost, false, func(n *Pod) { n.Message = "its namespaces or its network are gone" }); err != nil {
		return false, err
	}
	m.tell(EventStopped, p.id, p.id)
	return false, nil
}

// release gives back the place of a pod that is Stopped already. The caller
// holds p.op.
func (m *Manager) release(ctx context.Context, p *podEntry) error {
	if err := m.deps.Sandboxes.Release(ctx, p.id, p.snap.Load().Handle); err != nil {
		return fmt.Errorf("release its place: %w", err)
	}
	p.released = true
	return m.showPod(p, hapStopped, false, nil)
}

// sweep removes what belongs to nobody.
func (m *Manager) sweep(ctx context.Context, r *Report) {
	pods, ctrs := make(map[string]bool), make(map[string]bool)
	var parents []string
	for _, p := range *m.table.allPods.Load() {
		pods[p.id] = true
		parents = append(parents, p.snap.Load().Config.CgroupParent)
	}
	for _, c := range *m.table.allCtrs.Load() {
		ctrs[c.id] = true
	}
	for _, s := range []struct {
		what string
		do   func(context.Context) error
	}{
		{"sandboxes", func(ctx context.Context) error { return m.deps.Sandboxes.Sweep(ctx, pods) }},
		{"writable layers", func(ctx context.Context) error { return m.deps.Images.Sweep(ctx, ctrs) }},
		{"specs", func(context.Context) error { return m.specs.sweep(ctrs) }},
		{"cgroups of pods", func(ctx context.Context) error { return m.deps.Executor.SweepPodCgroups(ctx, parents) }},
	} {
		ctx, cancel := detach(ctx, m.cfg.UndoTimeout, "sweep "+s.what)
		if err := s.do(ctx); err != nil {
			r.problem("sweep %s: %v", s.what, err)
		}
		cancel()
	}
}
