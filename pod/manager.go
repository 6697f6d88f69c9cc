package pod

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/klog/v2"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/pod/store"
	"github.com/naru-project/naru/runtime/cdi"
	"github.com/naru-project/naru/runtime/spec"
)

// Config of a Manager. Zero durations and counts have sane defaults.
type Config struct {
	StateDir string // lasting folder: pods/, containers/, quarantine/, checkpoints/
	RunDir   string // folder of this boot: specs/, profiles/
	// CheckHandler tells why no pod can be run by a handler, with a user
	// namespace or without; nil: any can.
	CheckHandler func(ctx context.Context, handler string, userns bool) error
	// WritableMountpoint is the mount point of the file system that writable
	// layers are on, for statistics.
	WritableMountpoint string

	CreateTimeout time.Duration // of a whole create, joined retries included; longer than kubelet's own
	StartTimeout  time.Duration // of Start and Update
	StopTimeout   time.Duration // of StopSandbox and of removals
	UndoTimeout   time.Duration // of undoing a failed create
	KillWait      time.Duration // from SIGKILL to an error about a process that does not die
	StatTimeout   time.Duration // of looking at a volume's host path
	ReapInterval  time.Duration // between tries to finish what could not be finished
	EventBuffer   int           // events a subscriber may be behind

	SpecHost spec.Host // what containers may be given; the zero value: ask this machine

	// Observe is called as each step of an operation begins: failpoints.
	Observe func(kind, step string)
	// Watch is told what happens. Nil = nobody.
	Watch Watcher

	Live
}

// Live is what Reconfigure changes while the manager runs.
type Live struct {
	Sync     bool     // fsync the record that ends an RPC
	Handlers []string // names of the runtime handlers that pods to come may ask for
	// CDIDirs are the folders of CDI specification files; none: no CDI devices.
	CDIDirs []string
	// SpecDefaults are what containers get that is not asked for.
	SpecDefaults spec.Defaults
	PidsLimit    int64 // of a container; 0 = none
	// CDIAnnotations lets containers name CDI devices in cdi.k8s.io annotations.
	CDIAnnotations bool
	// HookDirs are the folders of OCI hooks; none: no hooks but those of devices.
	HookDirs []string
	// LogToJournald sends the output of containers to the journal, too.
	LogToJournald bool
}

// Cgroups names cgroups (runtime/cgroup.Driver).
type Cgroups interface {
	ContainerPath(parent, id string) (string, error)
	ParentPath(parent string) (string, error)
}

// Deps are what the manager works with. Host nil is the machine itself.
type Deps struct {
	Executor  Executor
	Sandboxes Sandboxes
	Images    Images
	Cgroups   Cgroups
	Host      Host
}

// Manager owns the records of pods and containers.
//
// Concurrency: all methods may be called at the same time. Reads are answered
// from memory. A pod's op lock serialises what changes the pod or the set of
// its containers; a container's op lock serialises its start, stop, update and
// removal, so that the containers of a pod stop side by side; a container's
// state lock is held for one change of snapshot and record, by operations and
// by exits alike. Order: podEntry.op, containerEntry.op, containerEntry.state.
type Manager struct {
	cfg        Config
	live       atomic.Pointer[Live]
	deps       Deps
	boot       string
	pods       *store.Dir
	containers *store.Dir
	specs      *specFiles
	cdi        *cdi.Registry
	table      *table
	joins      *joins
	ops        *operations
	hub        *hub
	statter    *statter
	began      time.Time     // of Recover
	unlisted   atomic.Bool   // the monitor could not be asked at start-up; the reaper asks again
	wake       chan struct{} // makes the reaper look at once
	work       workers
}

// New opens the state folder. Nothing is read before Recover.
func New(cfg Config, deps Deps) (*Manager, error) {
	cfg.defaults()
	if deps.Host == nil {
		deps.Host = osHost{}
	}
	if deps.Executor == nil || deps.Sandboxes == nil || deps.Images == nil || deps.Cgroups == nil {
		return nil, errors.New("pod manager lacks a part it works with")
	}
	boot, err := deps.Host.BootID()
	if err != nil {
		return nil, err
	}
	if cfg.SpecHost.Arch == "" {
		if cfg.SpecHost, err = spec.ProbeHost(0); err != nil {
			return nil, err
		}
	}
	m := &Manager{
		cfg: cfg, deps: deps, boot: boot, cdi: cdi.New(cfg.CDIDirs),
		table:   newTable(),
		joins:   &joins{calls: make(map[any]*call)},
		ops:     &operations{observe: cfg.Observe, watch: cfg.Watch, running: make(map[*operation]struct{})},
		hub:     &hub{bound: cfg.EventBuffer, subs: make(map[*subscriber]struct{})},
		statter: newStatter(deps.Host, cfg.StatTimeout),
		wake:    make(chan struct{}, 1),
	}
	m.live.Store(&cfg.Live)
	m.cfg.Live = Live{} // read by m.live alone
	m.work.base, m.work.end = context.WithCancel(context.Background())
	if err = os.RemoveAll(filepath.Join(cfg.StateDir, checkpointsDir)); err != nil {
		return nil, err
	}
	if err = store.Claim(cfg.StateDir, recordSchema); err != nil {
		return nil, err
	}
	if m.pods, err = store.Open(filepath.Join(cfg.StateDir, "pods"), recordSchema); err != nil {
		return nil, err
	}
	if m.containers, err = store.Open(filepath.Join(cfg.StateDir, "containers"), recordSchema); err != nil {
		return nil, err
	}
	if m.specs, err = openSpecFiles(cfg.RunDir); err != nil {
		return nil, err
	}
	return m, nil
}

func (c *Config) defaults() {
	for _, d := range []struct {
		p *time.Duration
		v time.Duration
	}{
		{&c.CreateTimeout, 10 * time.Minute},
		{&c.StartTimeout, time.Minute},
		{&c.StopTimeout, 2 * time.Minute},
		{&c.UndoTimeout, time.Minute},
		{&c.KillWait, 10 * time.Second},
		{&c.StatTimeout, 10 * time.Second},
		{&c.ReapInterval, 30 * time.Second},
	} {
		if *d.p <= 0 {
			*d.p = d.v
		}
	}
	if c.EventBuffer <= 0 {
		c.EventBuffer = 1000
	}
	if c.Handlers == nil {
		c.Handlers = builtinHandlers()
	}
}

// Reconfigure takes new settings for what begins from now on.
func (m *Manager) Reconfigure(l Live) {
	if l.Handlers == nil {
		l.Handlers = builtinHandlers()
	}
	m.cdi.SetDirs(l.CDIDirs)
	m.live.Store(&l)
}

// builtinHandlers are there without being configured.
func builtinHandlers() []string { return []string{"", "naru"} }

// Run takes exits and finishes unfinished things until ctx ends. Then it ends
// running creates (they undo what they did) and stops waiting for running
// stops (the next start goes on with them), and returns when all are through.
func (m *Manager) Run(ctx context.Context) {
	var own sync.WaitGroup
	own.Go(func() { m.takeExits(ctx) })
	own.Go(func() { m.reap(ctx) })
	<-ctx.Done()
	m.work.close()
	m.joins.cancel(func(*call) bool { return true }, errs.New(errs.Unavailable, "naru is shutting down"))
	own.Wait()
	m.work.wg.Wait()
}

// workers are the goroutines that outlive the call that started them.
type workers struct {
	base   context.Context // ends when the manager shuts down
	end    context.CancelFunc
	mu     sync.Mutex
	closed bool // guarded by mu
	wg     sync.WaitGroup
}

func (w *workers) close() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	w.end()
}

// spawn runs f in a goroutine that Run waits for. It reports false when the
// manager is shutting down.
func (w *workers) spawn(f func()) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return false
	}
	w.wg.Go(f)
	return true
}

func errClosing(what string) error {
	return errs.New(errs.Unavailable, "%s: naru is shutting down", what)
}

// newID returns 64 random hex digits. They do not begin with eight zeros: the
// native executor names the inits of pods like that.
func newID() string {
	var b [32]byte
	for b[0]|b[1]|b[2]|b[3] == 0 {
		_, _ = rand.Read(b[:]) // never fails: crypto/rand
	}
	return hex.EncodeToString(b[:])
}

// Sandbox finds a pod by full id or unique prefix.
func (m *Manager) Sandbox(id string) (*Pod, error) {
	p, err := m.table.findPod(id)
	if err != nil {
		return nil, err
	}
	if s := p.snap.Load(); s.Phase != PhaseCreating {
		return s, nil
	}
	return nil, errs.New(errs.NotFound, "find pod %q: it is still being created", short(id))
}

// Sandboxes lists pods in order of creation.
func (m *Manager) Sandboxes(f Filter) []*Pod { return m.table.listPods(f) }

// Container finds a container by full id or unique prefix.
func (m *Manager) Container(id string) (*Container, error) {
	c, err := m.table.findContainer(id)
	if err != nil {
		return nil, err
	}
	if s := c.snap.Load(); s.Phase != PhaseCreating {
		return s, nil
	}
	return nil, errs.New(errs.NotFound, "find container %q: it is still being created", short(id))
}

// Containers lists containers in order of creation.
func (m *Manager) Containers(f Filter) []*Container { return m.table.listContainers(f) }

// Phases counts pods and containers by phase.
func (m *Manager) Phases() (pods, containers map[Phase]int) {
	pods, containers = map[Phase]int{}, map[Phase]int{}
	for _, p := range *m.table.allPods.Load() {
		pods[p.snap.Load().Phase]++
	}
	for _, c := range *m.table.allCtrs.Load() {
		containers[c.snap.Load().Phase]++
	}
	return pods, containers
}

// Operations lists the running mutations, oldest first.
func (m *Manager) Operations() []Operation { return m.ops.list() }

// Subscribe delivers events until ctx ends; a subscriber that falls behind is
// dropped: the channel is closed.
func (m *Manager) Subscribe(ctx context.Context) <-chan Event { return m.hub.subscribe(ctx) }

// NetworkStatus is answered from memory.
func (m *Manager) NetworkStatus() (ready bool, reason, message string) {
	s := m.deps.Sandboxes.NetworkStatus()
	return s.Ready, s.Reason, s.Message
}

// NetworkInfo is what a verbose status shows of the network.
func (m *Manager) NetworkInfo() map[string]any { return m.deps.Sandboxes.NetworkInfo() }

// SetPodCIDRs takes the address ranges that kubelet was given for this node.
func (m *Manager) SetPodCIDRs(ctx context.Context, cidrs []netip.Prefix) error {
	return m.deps.Sandboxes.SetPodCIDRs(ctx, cidrs)
}

// Dial connects to a TCP port inside a ready sandbox.
func (m *Manager) Dial(ctx context.Context, podID string, port uint16) (io.ReadWriteCloser, error) {
	p, err := m.Sandbox(podID)
	if err != nil {
		return nil, err
	}
	if !p.Ready() || p.Handle == nil {
		return nil, errs.New(errs.FailedPrecondition, "dial port %d: pod %s is %s; port forwarding needs a ready one", port, short(p.ID), p.Phase)
	}
	f, err := m.deps.Sandboxes.Dial(ctx, p.Handle, port)
	if err != nil {
		return nil, fmt.Errorf("dial port %d of pod %s: %w", port, short(p.ID), err)
	}
	defer f.Close() // FileConn has its own descriptor
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, errs.New(errs.Internal, "dial port %d of pod %s: %w", port, short(p.ID), err)
	}
	return conn, nil
}

// poke makes the reaper look at once.
func (m *Manager) poke() {
	select {
	case m.wake <- struct{}{}:
	default:
	}
}

// changePod makes the next snapshot of p: on disk first, then in memory. The
// caller holds p.op.
func (m *Manager) changePod(p *podEntry, h happening, sync bool, f func(*Pod)) error {
	n, err := p.after(h, f)
	if err != nil {
		return err
	}
	return m.putPod(p, n, sync)
}

// showPod is for what is true whether or not the disk takes it, and for what a
// full disk must not stop: memory goes on, and the reaper writes it later.
func (m *Manager) showPod(p *podEntry, h happening, sync bool, f func(*Pod)) error {
	n, err := p.after(h, f)
	if err != nil {
		return err
	}
	if err := m.putPod(p, n, sync); err != nil {
		klog.Background().Error(err, "pod's record is behind, it will be written again", "id", p.id, "phase", n.Phase)
		p.dirty = true
		p.snap.Store(n)
	}
	return nil
}

// after is the snapshot that follows the present one when h happens.
func (p *podEntry) after(h happening, f func(*Pod)) (*Pod, error) {
	n := *p.snap.Load()
	next, err := nextPod(n.Phase, h)
	if err != nil {
		return nil, err
	}
	n.Phase = next
	if f != nil {
		f(&n)
	}
	return &n, nil
}

func (m *Manager) putPod(p *podEntry, n *Pod, sync bool) error {
	if err := store.Write(m.pods, p.id, newPodRecord(n, m.boot, p.released), p.extras, sync && m.live.Load().Sync); err != nil {
		return errs.Wrap(errs.Internal, err)
	}
	p.dirty = false
	p.snap.Store(n)
	return nil
}

// change makes the next snapshot of c: on disk first, then in memory. The
// caller holds c.state.
func (m *Manager) change(c *containerEntry, h happening, sync bool, f func(*Container)) error {
	n, err := c.after(h, f)
	if err != nil {
		return err
	}
	return m.put(c, n, sync)
}

// show is to change what showPod is to changePod.
func (m *Manager) show(c *containerEntry, h happening, sync bool, f func(*Container)) error {
	n, err := c.after(h, f)
	if err != nil {
		return err
	}
	m.putOrShow(c, n, sync)
	return nil
}

func (m *Manager) putOrShow(c *containerEntry, n *Container, sync bool) {
	if err := m.put(c, n, sync); err != nil {
		klog.Background().Error(err, "container's record is behind, it will be written again", "id", c.id, "phase", n.Phase)
		c.dirty = true
		c.snap.Store(n)
	}
}

func (c *containerEntry) after(h happening, f func(*Container)) (*Container, error) {
	n := *c.snap.Load()
	next, err := nextContainer(n.Phase, h)
	if err != nil {
		return nil, err
	}
	n.Phase, n.State = next, stateOf(next)
	if f != nil {
		f(&n)
	}
	return &n, nil
}

func (m *Manager) put(c *containerEntry, n *Container, sync bool) error {
	err := store.Write(m.containers, c.id, newContainerRecord(c, n, m.boot), c.extras, sync && m.live.Load().Sync)
	if err != nil {
		return errs.Wrap(errs.Internal, err)
	}
	c.dirty = false
	c.snap.Store(n)
	return nil
}

// tell publishes an event with the snapshots as they are now.
func (m *Manager) tell(t EventType, podID, containerID string) {
	if m.hub.idle() {
		return
	}
	e := Event{Type: t, PodID: podID, ContainerID: containerID, Time: time.Now()}
	if p := m.table.pod(podID); p != nil {
		e.Pod = p.snap.Load()
	}
	for _, c := range m.table.containersOf(podID) {
		if s := c.snap.Load(); s.Phase != PhaseCreating {
			e.Containers = append(e.Containers, s)
		}
	}
	m.hub.publish(e)
}

func (m *Manager) log(ctx context.Context) klog.Logger { return klog.FromContext(ctx) }
