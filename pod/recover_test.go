package pod_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/pod"
	"github.com/naru-project/naru/pod/podtest"
)

func TestRestartKeepsEverything(t *testing.T) {
	inBubble(t, func(r *rig) {
		p := r.pod("web")
		running, created, gone := r.running(p, "running"), r.create(p, "created"), r.running(p, "gone")
		ends := r.running(p, "ends", podtest.EnvOOM)
		r.w.Exit(gone, 2)
		synctest.Wait()
		before := r.container(running)
		r.l.Kill()
		time.Sleep(time.Minute)
		at := time.Now()
		r.w.Exit(ends, 137) // while nobody looks
		time.Sleep(time.Minute)
		r.restart()
		synctest.Wait()
		if rep := r.last; rep.Pods != 1 || rep.Containers != 4 || rep.Ended != 1 || rep.Undone+rep.Orphans+rep.Lost+rep.Quarantined+len(rep.Problems) != 0 {
			t.Errorf("report %+v", rep)
		}
		if !r.sandbox(p).Ready() {
			t.Error("pod is not ready")
		}
		if s := r.container(running); s.State != pod.StateRunning || s.PID != before.PID || !s.StartedAt.Equal(before.StartedAt) {
			t.Errorf("%+v", s)
		}
		if s := r.exited(ends, 137, "OOMKilled"); !s.FinishedAt.Equal(at) {
			t.Errorf("finished %s, want %s", s.FinishedAt, at)
		}
		r.exited(gone, 2, "Error")
		r.ok(r.m.StartContainer(r.ctx(), created))
		r.ok(r.m.StopContainer(r.ctx(), running, time.Second))
		again, err := r.m.RunSandbox(r.ctx(), podtest.SandboxConfig("web"))
		if err != nil || again != p {
			t.Errorf("the same create after a restart: %s, %v", again, err)
		}
		r.owned()
		r.removePod(p)
		r.empty()
	})
}

func TestReboot(t *testing.T) {
	inBubble(t, func(r *rig) {
		p := r.pod("web")
		c, idle := r.running(p, "app"), r.create(p, "idle")
		r.l.Kill()
		r.w.Reboot()
		r.restart()
		if s := r.sandbox(p); s.Ready() || !strings.Contains(s.Message, "rebooted") {
			t.Errorf("pod %+v", s)
		}
		if r.w.Places() != 0 {
			t.Error("the address is still held")
		}
		for _, id := range []string{c, idle} {
			if s := r.exited(id, 255, "ContainerStatusUnknown"); !strings.Contains(s.Message, "rebooted") {
				t.Errorf("message %q", s.Message)
			}
		}
		if r.last.Rebooted != 1 || r.last.Ended != 2 {
			t.Errorf("report %+v", r.last)
		}
		next := r.pod("web") // the name is free
		if next == p {
			t.Error("the old pod was handed out")
		}
		r.owned()
		r.removePod(p)
		r.removePod(next)
		r.empty()
	})
}

func TestWhatIsLostIsSaid(t *testing.T) {
	inBubble(t, func(r *rig) {
		p, broken := r.pod("web"), r.pod("broken")
		c := r.running(p, "app")
		inBroken, idle := r.running(broken, "app"), r.create(broken, "idle")
		r.l.Kill()
		r.w.ForgetProcess(c)
		r.w.BreakSandbox(broken)
		r.restart()
		if s := r.exited(c, 255, "ContainerStatusUnknown"); !strings.Contains(s.Message, "monitor") {
			t.Errorf("message %q", s.Message)
		}
		if s := r.sandbox(broken); s.Ready() || s.Message == "" {
			t.Errorf("%+v", s)
		}
		if r.container(inBroken).State != pod.StateRunning {
			t.Error("a container was ended that runs")
		}
		r.fails(r.m.StartContainer(r.ctx(), idle), errs.FailedPrecondition, "its pod is not ready")
		if r.last.Lost != 1 || r.last.Ended != 1 {
			t.Errorf("report %+v", r.last)
		}
		r.removePod(broken) // with its container
		r.removePod(p)
		r.empty()
	})
}

// A start that was cut short is settled by what came of it.
func TestStartCutShort(t *testing.T) {
	for point, want := range map[string]pod.ContainerState{
		"before Executor.Start": pod.StateCreated,
		"after Executor.Start":  pod.StateRunning,
	} {
		t.Run(point, func(t *testing.T) {
			inBubble(t, func(r *rig) {
				p := r.pod("web")
				c := r.create(p, "app")
				r.crashAt(point, func() { _ = r.m.StartContainer(r.ctx(), c) })
				r.restart()
				if s := r.container(c); s.State != want || (want == pod.StateCreated) != s.StartedAt.IsZero() {
					t.Errorf("%s, started %s", s.State, s.StartedAt)
				}
				if want == pod.StateCreated {
					r.ok(r.m.StartContainer(r.ctx(), c))
				}
				r.ok(r.m.StopContainer(r.ctx(), c, time.Second))
				r.removePod(p)
				r.empty()
			})
		})
	}
}

// crashAt kills the daemon at a point of f.
func (r *rig) crashAt(point string, f func()) {
	r.Helper()
	l, hit := r.l, false
	l.SetHook(func(at string) {
		if at == point {
			hit = true
			l.Kill()
		}
	})
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	<-done
	if !hit {
		r.Fatalf("never came to %q", point)
	}
}

func TestMonitorThatDoesNotAnswerAtStart(t *testing.T) {
	inBubble(t, func(r *rig) {
		p := r.pod("web")
		c, lost := r.running(p, "app"), r.running(p, "lost")
		r.w.FailOn("Executor.List", 2, errs.New(errs.Unavailable, "monitor is away"))
		r.l.Kill()
		r.w.ForgetProcess(lost)
		r.restart()
		if r.container(c).State != pod.StateRunning || len(r.last.Problems) != 1 {
			t.Errorf("%+v, report %+v", r.container(c), r.last)
		}
		fresh := r.create(p, "fresh")
		time.Sleep(2 * time.Minute)
		r.exited(lost, 255, "ContainerStatusUnknown")
		if r.container(c).State != pod.StateRunning || r.container(fresh).State != pod.StateCreated {
			t.Error("the others are touched")
		}
		r.removePod(p)
		r.empty()
	})
}

func TestAdoptThatCannotTell(t *testing.T) {
	inBubble(t, func(r *rig) {
		p := r.pod("web")
		r.w.FailOn("Sandboxes.Adopt", 2, errors.New("netlink is busy"))
		r.restart()
		if !r.sandbox(p).Ready() || len(r.last.Problems) != 1 {
			t.Errorf("pod %+v, report %+v", r.sandbox(p), r.last)
		}
		r.w.BreakSandbox(p)
		events := r.m.Subscribe(r.ctx())
		time.Sleep(2 * time.Minute)
		if r.sandbox(p).Ready() {
			t.Error("nobody asked again")
		}
		if got := eventNames(drain(events), map[string]string{p: "p"}); !slices.Equal(got, []string{"p stopped"}) {
			t.Errorf("events %v", got)
		}
	})
}

func TestStopIsFinishedAfterACrash(t *testing.T) {
	inBubble(t, func(r *rig) {
		p := r.pod("web")
		c := r.running(p, "app")
		r.crashAt("before Sandboxes.Release", func() { _ = r.m.StopSandbox(r.ctx(), p) })
		r.restart()
		synctest.Wait()
		if s := r.sandbox(p); s.Phase != pod.PhaseStopped || r.w.Places() != 0 {
			t.Errorf("pod is %s, %d places", s.Phase, r.w.Places())
		}
		if r.container(c).State != pod.StateExited {
			t.Error("container runs")
		}
		r.removePod(p)
		r.empty()
	})
}

func TestDamagedRecords(t *testing.T) {
	inBubble(t, func(r *rig) {
		p, bad := r.pod("web"), r.pod("bad")
		c, lost := r.running(p, "app"), r.running(p, "lost")
		inBad := r.running(bad, "app")
		r.stop()
		damage := func(kind, id string) {
			t.Helper()
			f := filepath.Join(r.dir, kind, id+".json")
			b, err := os.ReadFile(f)
			r.ok(err)
			b[len(b)/2] ^= 1
			r.ok(os.WriteFile(f, b, 0o600))
		}
		damage("containers", lost)
		damage("pods", bad)
		r.ok(os.WriteFile(filepath.Join(r.dir, "pods", "README"), []byte("x"), 0o600))
		r.boot()
		if r.last.Quarantined != 3 || r.last.Orphans != 2 || r.last.Pods != 1 || r.last.Containers != 1 {
			t.Errorf("report %+v", r.last)
		}
		if r.container(c).State != pod.StateRunning {
			t.Error("the good one suffered")
		}
		for _, id := range []string{lost, inBad} {
			if r.w.Process(id) != nil {
				t.Errorf("%s runs without a record", id)
			}
		}
		r.owned()
		if names, _ := os.ReadDir(filepath.Join(r.dir, "quarantine")); len(names) != 3 {
			t.Errorf("quarantine holds %v", names)
		}
		r.removePod(p)
		r.empty()
	})
}

// When the records cannot be read at all, nobody knows what may be removed.
func TestNoSweepWithoutRecords(t *testing.T) {
	inBubble(t, func(r *rig) {
		p := r.pod("web")
		r.create(p, "app")
		r.stop()
		r.ok(os.Rename(filepath.Join(r.dir, "pods"), filepath.Join(r.dir, "away")))
		l := r.w.NewLife()
		m, err := pod.New(pod.Config{StateDir: r.dir, RunDir: r.dir, SpecHost: specHost}, l.Deps())
		r.ok(err)
		r.ok(os.Remove(filepath.Join(r.dir, "pods"))) // what New made
		if rep := m.Recover(r.ctx()); len(rep.Problems) == 0 {
			t.Error("no word about it")
		}
		if r.w.Places() != 1 {
			t.Error("a sandbox was swept")
		}
		l.Kill()
		r.ok(os.Rename(filepath.Join(r.dir, "away"), filepath.Join(r.dir, "pods")))
		r.boot()
		r.removePod(p)
		r.empty()
	})
}

func TestDeadStateFolderStillServes(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.stop()
		r.ok(os.RemoveAll(r.dir))
		r.ok(os.MkdirAll(r.dir, 0o700))
		r.boot()
		r.removePod(r.pod("web"))
		r.empty()
	})
}
