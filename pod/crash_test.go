package pod_test

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/naru-project/naru/pod"
	"github.com/naru-project/naru/pod/podtest"
)

// acks are what the daemon promised before it died, and what was asked of it
// since.
type acks struct {
	mu     sync.Mutex
	pod    string
	app    string
	ready  bool // RunSandbox answered, and no stop was asked for
	runs   bool // StartContainer answered, and no stop was asked for
	exists bool // CreateContainer answered, and no removal was asked for
}

func (a *acks) set(f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f()
}

// story is the life of a pod with two containers. It breaks off where the
// daemon dies.
func story(r *rig, a *acks) {
	ctx := r.ctx()
	id, err := r.m.RunSandbox(ctx, podtest.SandboxConfig("web"))
	if err != nil {
		return
	}
	a.set(func() { a.pod, a.ready = id, true })
	app, err := r.m.CreateContainer(ctx, id, podtest.ContainerConfig("app", podtest.EnvIgnoreTERM))
	if err != nil {
		return
	}
	a.set(func() { a.app, a.exists = app, true })
	side, err := r.m.CreateContainer(ctx, id, podtest.ContainerConfig("side"))
	if err != nil {
		return
	}
	if r.m.StartContainer(ctx, app) != nil {
		return
	}
	a.set(func() { a.runs = true })
	_ = r.m.StartContainer(ctx, side)
	_ = r.m.UpdateContainer(ctx, app, pod.Resources{CPUShares: 5}, nil)
	_ = r.m.StopContainer(ctx, side, time.Second)
	_ = r.m.RemoveContainer(ctx, side)
	a.set(func() { a.runs = false })
	_ = r.m.StopContainer(ctx, app, time.Second)
	a.set(func() { a.ready = false })
	_ = r.m.StopSandbox(ctx, id)
	a.set(func() { a.exists = false })
	_ = r.m.RemoveSandbox(ctx, id)
}

// counter counts the points that a life passes and kills it at one of them.
type counter struct {
	mu   sync.Mutex
	seen int
	at   int // 0: never
	name string
}

func (c *counter) pass(l *podtest.Life, point string) {
	c.mu.Lock()
	c.seen++
	hit := c.seen == c.at
	if hit {
		c.name = point
	}
	c.mu.Unlock()
	if hit {
		l.Kill()
	}
	l.Check()
}

func (c *counter) passed() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.seen
}

// crashRig is a machine whose current life passes c.
func crashRig(t *testing.T, c *counter) *rig {
	r := newRig(t)
	l := r.l
	l.SetHook(func(point string) { c.pass(l, point) })
	return r
}

func (r *rig) tell(a *acks) {
	done := make(chan struct{})
	go func() { defer close(done); story(r, a) }()
	select {
	case <-done:
	case <-time.After(time.Hour): // a waiter whose worker died
	}
}

// keeps checks that a crash took back nothing that had been answered.
func (r *rig) keeps(a *acks) {
	r.Helper()
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.ready && !r.sandbox(a.pod).Ready() {
		r.Errorf("pod was ready and is %s", r.sandbox(a.pod).Phase)
	}
	if a.exists {
		if c := r.container(a.app); a.runs && c.State != pod.StateRunning {
			r.Errorf("container ran and is %s", c.Phase)
		}
	}
}

// converge does what kubelet would do next: run the pod again, and clean up.
func (r *rig) converge() {
	r.Helper()
	again := r.pod("web")
	r.running(again, "new")
	for _, p := range r.m.Sandboxes(pod.Filter{}) {
		r.removePod(p.ID)
	}
	r.empty()
}

// TestCrashAtEveryPoint kills the daemon before and after every call it makes
// and at the beginning of every step, and starts it again.
func TestCrashAtEveryPoint(t *testing.T) {
	dry := &counter{}
	synctest.Test(t, func(t *testing.T) {
		r := crashRig(t, dry)
		defer func() { r.stop() }()
		r.tell(&acks{})
		r.empty()
	})
	if dry.seen < 80 {
		t.Fatalf("only %d points were passed", dry.seen)
	}
	step := 1
	if testing.Short() {
		step = 7
	}
	for at := 1; at <= dry.seen; at += step {
		synctest.Test(t, func(t *testing.T) {
			c, a := &counter{at: at}, &acks{}
			r := crashRig(t, c)
			defer func() { r.stop() }()
			r.tell(a)
			r.restart()
			r.keeps(a)
			time.Sleep(2 * time.Minute) // the reaper and running stops
			r.owned()
			r.keeps(a)
			r.converge()
			if t.Failed() {
				t.Fatalf("after a crash at point %d, %q; report %+v", at, c.name, r.last)
			}
		})
	}
}

// TestCrashInRecovery kills the daemon, and then the one that recovers.
func TestCrashInRecovery(t *testing.T) {
	first := 3
	if testing.Short() {
		first = 23
	}
	for at := 1; at <= 120; at += first {
		for second := 1; second <= 40; second += 2 {
			passed := 0
			synctest.Test(t, func(t *testing.T) {
				a, c2 := &acks{}, &counter{at: second}
				r := crashRig(t, &counter{at: at})
				defer func() { r.stop() }()
				r.tell(a)
				r.l.Kill()
				r.stop()
				l := r.w.NewLife()
				l.SetHook(func(point string) { c2.pass(l, point) })
				r.start(l)
				time.Sleep(time.Second)
				passed = c2.passed()
				r.restart()
				r.keeps(a)
				time.Sleep(2 * time.Minute)
				r.owned()
				r.converge()
				if t.Failed() {
					t.Fatalf("after crashes at %d and in recovery at %d, %q", at, second, c2.name)
				}
			})
			if passed < second {
				break
			}
		}
	}
}
