package pod_test

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"k8s.io/klog/v2"

	"github.com/naru-project/naru/internal/atomicfile"
	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/pod"
	"github.com/naru-project/naru/pod/podtest"
	"github.com/naru-project/naru/runtime/spec"
)

func TestMain(m *testing.M) {
	klog.SetSlogLogger(slog.New(slog.DiscardHandler))
	before := openFDs()
	code := m.Run()
	if after := openFDs(); code == 0 && after > before+2 { // the runtime's own epoll
		fmt.Fprintf(os.Stderr, "file descriptors: %d before, %d after\n", before, after)
		code = 1
	}
	os.Exit(code)
}

func openFDs() int {
	names, _ := os.ReadDir("/proc/self/fd")
	return len(names)
}

var specHost = spec.Host{Arch: "amd64", Bounding: []string{"CAP_CHOWN", "CAP_KILL"}, MinOOMScoreAdj: -1000}

// rig is one machine with a daemon on it that can be restarted.
type rig struct {
	testing.TB
	dir  string
	w    *podtest.World
	l    *podtest.Life
	m    *pod.Manager
	mod  func(*pod.Config)
	last *pod.Report
	stop func()
}

func newRig(t testing.TB, mods ...func(*pod.Config)) *rig {
	t.Helper()
	w, err := podtest.NewWorld(memDir(t))
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{TB: t, dir: memDir(t), w: w, mod: func(c *pod.Config) {
		for _, f := range mods {
			f(c)
		}
	}}
	r.boot()
	return r
}

// memDir is a temporary folder in memory, where there is one: thousands of
// small files on a busy disk would make these tests minutes long.
func memDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "naru-pod-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// boot starts a daemon: a new life on the same machine and the same disk.
func (r *rig) boot() {
	r.Helper()
	r.start(r.w.NewLife())
}

func (r *rig) start(l *podtest.Life) {
	r.Helper()
	r.l = l
	cfg := pod.Config{StateDir: r.dir, RunDir: r.dir, SpecHost: specHost, Observe: func(kind, step string) { l.Pass("step " + kind + " " + step) }, WritableMountpoint: "/var/lib/naru"}
	r.mod(&cfg)
	m, err := pod.New(cfg, l.Deps())
	if err != nil {
		r.Fatal(err)
	}
	r.m = m
	ctx, cancel := context.WithCancel(context.Background())
	recovered := make(chan struct{})
	go func() { // a killed life ends its goroutines
		defer close(recovered)
		r.last = m.Recover(ctx)
	}()
	<-recovered
	done := make(chan struct{})
	go func() { defer close(done); m.Run(ctx) }()
	r.stop = func() {
		cancel()
		<-done
		r.stop = func() {}
	}
}

// restart ends the daemon as SIGKILL would and starts another.
func (r *rig) restart() {
	r.Helper()
	r.l.Kill()
	r.stop()
	r.boot()
}

// inBubble runs a test with virtual time.
func inBubble(t *testing.T, f func(r *rig), mods ...func(*pod.Config)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, mods...)
		defer func() { r.stop() }()
		f(r)
	})
}

func (r *rig) pod(name string) string {
	r.Helper()
	id, err := r.m.RunSandbox(r.ctx(), podtest.SandboxConfig(name))
	if err != nil {
		r.Fatalf("run pod %s: %v", name, err)
	}
	return id
}

func (r *rig) create(podID, name string, env ...string) string {
	r.Helper()
	id, err := r.m.CreateContainer(r.ctx(), podID, podtest.ContainerConfig(name, env...))
	if err != nil {
		r.Fatalf("create %s: %v", name, err)
	}
	return id
}

func (r *rig) running(podID, name string, env ...string) string {
	r.Helper()
	id := r.create(podID, name, env...)
	if err := r.m.StartContainer(r.ctx(), id); err != nil {
		r.Fatalf("start %s: %v", name, err)
	}
	return id
}

func (r *rig) ctx() context.Context {
	if t, ok := r.TB.(*testing.T); ok {
		return t.Context()
	}
	return context.Background()
}

func (r *rig) container(id string) *pod.Container {
	r.Helper()
	c, err := r.m.Container(id)
	if err != nil {
		r.Fatalf("container %s: %v", id, err)
	}
	return c
}

func (r *rig) sandbox(id string) *pod.Pod {
	r.Helper()
	p, err := r.m.Sandbox(id)
	if err != nil {
		r.Fatalf("pod %s: %v", id, err)
	}
	return p
}

func (r *rig) ok(err error) {
	r.Helper()
	if err != nil {
		r.Fatal(err)
	}
}

// fails checks class and text of an error.
func (r *rig) fails(err error, class errs.Class, parts ...string) {
	r.Helper()
	if !errs.Is(err, class) {
		r.Errorf("got %v (%v), want class %v", err, errs.Of(err), class)
		return
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			r.Errorf("error %q lacks %q", err, p)
		}
	}
}

func (r *rig) exited(id string, code int32, reason string) *pod.Container {
	r.Helper()
	c := r.container(id)
	if c.State != pod.StateExited || c.ExitCode != code || c.Reason != reason || c.FinishedAt.IsZero() || c.PID != 0 {
		r.Errorf("container is %s, code %d, reason %s (%s), finished %s, pid %d; want exited, %d, %s",
			c.State, c.ExitCode, c.Reason, c.Message, c.FinishedAt, c.PID, code, reason)
	}
	return c
}

// owned checks that nothing exists without an owner in memory, and that memory
// and disk agree.
func (r *rig) owned() {
	r.Helper()
	pods, ctrs := map[string]bool{}, map[string]bool{}
	for _, p := range r.m.Sandboxes(pod.Filter{}) {
		pods[p.ID] = true
	}
	for _, c := range r.m.Containers(pod.Filter{}) {
		ctrs[c.ID] = true
		if !pods[c.PodID] {
			r.Errorf("container %s has no pod", c.ID)
		}
	}
	if left := r.w.Left(pods, ctrs); len(left) > 0 {
		r.Errorf("ownerless: %v", left)
	}
	r.onDisk("pods", pods)
	r.onDisk("containers", ctrs)
	r.onDisk("specs", ctrs)
}

func (r *rig) onDisk(kind string, want map[string]bool) {
	r.Helper()
	names, err := os.ReadDir(r.dir + "/" + kind)
	if err != nil {
		r.Fatal(err)
	}
	names = slices.DeleteFunc(names, func(n os.DirEntry) bool { return strings.HasPrefix(n.Name(), atomicfile.TempPrefix) }) // being written
	for _, n := range names {
		if id := strings.TrimSuffix(n.Name(), ".json"); !want[id] {
			r.Errorf("%s has %s, which is not in memory", kind, n.Name())
		}
	}
	if kind != "specs" && len(names) != len(want) {
		r.Errorf("%s: %d on disk, %d in memory", kind, len(names), len(want))
	}
}

// empty checks that nothing is left of anything.
func (r *rig) empty() {
	r.Helper()
	r.owned()
	if n := len(r.m.Sandboxes(pod.Filter{})) + len(r.m.Containers(pod.Filter{})); n != 0 {
		r.Errorf("%d pods and containers are left", n)
	}
}

func (r *rig) removePod(id string) {
	r.Helper()
	r.ok(r.m.StopSandbox(r.ctx(), id))
	r.ok(r.m.RemoveSandbox(r.ctx(), id))
}

// drain takes the events that are there.
func drain(ch <-chan pod.Event) (out []pod.Event) {
	for {
		select {
		case e, ok := <-ch:
			if !ok {
				return out
			}
			out = append(out, e)
		default:
			return out
		}
	}
}

func eventNames(events []pod.Event, names map[string]string) []string {
	var out []string
	for _, e := range events {
		out = append(out, names[e.ContainerID]+" "+string(e.Type))
	}
	return out
}

func within(d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), d)
}
