package pod_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/pod"
	"github.com/naru-project/naru/pod/podtest"
	"github.com/naru-project/naru/runtime"
)

func TestStopWaitsForGrace(t *testing.T) {
	inBubble(t, func(r *rig) {
		p := r.pod("web")
		for _, tc := range []struct {
			name  string
			env   []string
			grace time.Duration
			took  time.Duration
			code  int32
		}{
			{"polite", nil, 30 * time.Second, time.Millisecond, 143},
			{"deaf", []string{podtest.EnvIgnoreTERM}, 30 * time.Second, 30*time.Second + time.Millisecond, 137},
			{"at once", nil, 0, time.Millisecond, 137},
			{"negative", nil, -5, time.Millisecond, 137},
			{"for ever", nil, 1<<63 - 1, time.Millisecond, 143},
		} {
			c := r.running(p, tc.name, tc.env...)
			began := time.Now()
			r.ok(r.m.StopContainer(r.ctx(), c, tc.grace))
			if took := time.Since(began); took != tc.took {
				t.Errorf("%s: took %s, want %s", tc.name, took, tc.took)
			}
			r.exited(c, tc.code, "Error")
		}
	})
}

func TestStopSignals(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.w.AddImage("sha256:b", "quit", ocispec.ImageConfig{Entrypoint: []string{"/x"}, StopSignal: "SIGQUIT"})
		p := r.pod("web")
		for _, tc := range []struct {
			image, signal, effective string
			number                   int
		}{{podtest.ImageID, "", "SIGTERM", 15}, {"quit", "", "SIGQUIT", 3}, {"quit", "SIGUSR1", "SIGUSR1", 10}} {
			cfg := podtest.ContainerConfig("c" + tc.effective)
			cfg.Image, cfg.StopSignal = tc.image, tc.signal
			c, err := r.m.CreateContainer(r.ctx(), p, cfg)
			r.ok(err)
			r.ok(r.m.StartContainer(r.ctx(), c))
			r.ok(r.m.StopContainer(r.ctx(), c, time.Second))
			if s := r.container(c); s.StopSignal != tc.effective {
				t.Errorf("status says %s, want %s", s.StopSignal, tc.effective)
			}
			if got := r.w.Process(c).Signals; len(got) == 0 || got[0] != tc.number {
				t.Errorf("%s: signals %v", tc.effective, got)
			}
		}
	})
}

func TestASecondStopShortensTheFirst(t *testing.T) {
	inBubble(t, func(r *rig) {
		p := r.pod("web")
		c := r.running(p, "deaf", podtest.EnvIgnoreTERM)
		began := time.Now()
		ended := make(chan time.Duration, 3)
		stop := func(grace time.Duration) {
			if err := r.m.StopContainer(r.ctx(), c, grace); err != nil {
				t.Error(err)
			}
			ended <- time.Since(began)
		}
		go stop(10 * time.Minute)
		time.Sleep(time.Second)
		go stop(time.Hour) // lengthens nothing
		time.Sleep(time.Second)
		stop(3 * time.Second)
		for range 3 {
			if took := <-ended; took != 5*time.Second+time.Millisecond {
				t.Errorf("stopped after %s", took)
			}
		}
		if got := r.w.Process(c).Signals; !slices.Equal(got, []int{15, 9}) {
			t.Errorf("signals %v", got)
		}
	})
}

// Log rotation, probes and status go on while a container is being stopped,
// and other containers of the pod stop beside it.
func TestStopBlocksNobody(t *testing.T) {
	inBubble(t, func(r *rig) {
		p := r.pod("web")
		deaf := r.running(p, "deaf", podtest.EnvIgnoreTERM)
		other := r.running(p, "other")
		done := make(chan error, 1)
		go func() { done <- r.m.StopContainer(r.ctx(), deaf, time.Hour) }()
		synctest.Wait()
		ctx, cancel := within(time.Second)
		defer cancel()
		r.fails(r.m.ReopenLog(ctx, deaf), errs.FailedPrecondition, "it has none")
		_, err := r.m.ExecSync(ctx, deaf, []string{"true"}, time.Second)
		r.ok(err)
		r.ok(r.m.StopContainer(ctx, other, time.Minute))
		r.create(p, "third")
		if s := r.container(deaf); s.State != pod.StateRunning || s.Phase != pod.PhaseStopping {
			t.Errorf("stopping container is %s, %s", s.State, s.Phase)
		}
		began := time.Now()
		r.ok(r.m.RemoveContainer(r.ctx(), deaf)) // by force
		if time.Since(began) > time.Second {
			t.Errorf("removal waited for the grace")
		}
		r.ok(<-done)
	})
}

func TestStopOfACreatedContainer(t *testing.T) {
	inBubble(t, func(r *rig) {
		p := r.pod("web")
		c := r.create(p, "app")
		r.ok(r.m.StopContainer(r.ctx(), c, time.Hour))
		if s := r.exited(c, 137, "Error"); !s.StartedAt.IsZero() || s.Message == "" {
			t.Errorf("%+v", s)
		}
		r.fails(r.m.StartContainer(r.ctx(), c), errs.FailedPrecondition, "is exited (code 137)")
	})
}

func TestStopOfAProcessThatDoesNotDie(t *testing.T) {
	inBubble(t, func(r *rig) {
		p := r.pod("web")
		c := r.running(p, "stuck", podtest.EnvStuck)
		pid := r.container(c).PID
		r.l.States = map[int]pod.ProcessState{pid: {State: "D", Wchan: "nfs_wait_on_request"}}
		began := time.Now()
		err := r.m.StopContainer(r.ctx(), c, time.Second)
		r.fails(err, errs.DeadlineExceeded, "is still there 10s after SIGKILL", "in state D in nfs_wait_on_request")
		if took := time.Since(began); took != 11*time.Second {
			t.Errorf("took %s", took)
		}
		if n := len(r.w.Process(c).Signals); n < 10 {
			t.Errorf("killed %d times", n)
		}
		r.fails(r.m.StopSandbox(r.ctx(), p), errs.DeadlineExceeded, "state D")
		if r.w.Places() != 1 {
			t.Error("the address was given back under a living process")
		}
		r.fails(r.m.RemoveContainer(r.ctx(), c), errs.DeadlineExceeded)
		// It dies at last, while the monitor is not able to tell.
		r.w.GoneSilently(c)
		r.ok(r.m.StopContainer(r.ctx(), c, 0))
		r.exited(c, 255, "ContainerStatusUnknown")
		r.removePod(p)
		r.empty()
	})
}

func TestExits(t *testing.T) {
	inBubble(t, func(r *rig) {
		p := r.pod("web")
		for _, tc := range []struct {
			name   string
			env    []string
			code   int
			want   int32
			reason string
		}{
			{"fine", nil, 0, 0, "Completed"},
			{"bad", nil, 7, 7, "Error"},
			{"oom", []string{podtest.EnvOOM}, 137, 137, "OOMKilled"},
			{"oom of a child", []string{podtest.EnvOOM}, 0, 0, "Completed"},
		} {
			c := r.running(p, tc.name, tc.env...)
			time.Sleep(time.Minute)
			at := time.Now()
			r.w.Exit(c, tc.code)
			synctest.Wait()
			s := r.exited(c, tc.want, tc.reason)
			if !s.FinishedAt.Equal(at) {
				t.Errorf("%s: finished %s, want %s", tc.name, s.FinishedAt, at)
			}
		}
	})
}

func TestExitWhileStartRuns(t *testing.T) {
	inBubble(t, func(r *rig) {
		p := r.pod("web")
		events := r.m.Subscribe(r.ctx())
		for _, tc := range []struct {
			env    string
			code   int32
			reason string
		}{{podtest.EnvExitZero, 0, "Completed"}, {podtest.EnvExitThree, 3, "Error"}} {
			c := r.create(p, "quick"+tc.reason, tc.env)
			r.l.SetHook(func(point string) {
				if point == "after Executor.Start" {
					time.Sleep(time.Second) // the exit is announced long before Start returns
				}
			})
			r.ok(r.m.StartContainer(r.ctx(), c))
			r.l.SetHook(nil)
			s := r.exited(c, tc.code, tc.reason)
			if s.StartedAt.IsZero() {
				t.Error("no start time")
			}
			got := eventNames(drain(events), map[string]string{c: "c"})
			if !slices.Equal(got, []string{"c created", "c started", "c stopped"}) {
				t.Errorf("events %v", got)
			}
		}
	})
}

// A process that is gone before its create is through.
func TestExitWhileCreateRuns(t *testing.T) {
	inBubble(t, func(r *rig) {
		p := r.pod("web")
		r.l.SetHook(func(point string) {
			if point == "after Executor.Create" {
				time.Sleep(time.Second)
				for _, o := range r.m.Operations() {
					r.w.Exit(o.ID, 137)
				}
				time.Sleep(time.Second)
			}
		})
		c := r.create(p, "app")
		r.l.SetHook(nil)
		r.exited(c, 137, "Error")
		r.fails(r.m.StartContainer(r.ctx(), c), errs.FailedPrecondition, "is exited (code 137)")
		r.removePod(p)
		r.empty()
	})
}

func TestStartError(t *testing.T) {
	inBubble(t, func(r *rig) {
		p := r.pod("web")
		c := r.create(p, "broken", podtest.EnvStartError)
		err := r.m.StartContainer(r.ctx(), c)
		r.fails(err, errs.FailedPrecondition, "run /bin/app: no such file or directory")
		time.Sleep(time.Second) // the killed process's exit changes nothing
		s := r.exited(c, 128, "StartError")
		if !strings.Contains(s.Message, "/bin/app") || !s.StartedAt.IsZero() {
			t.Errorf("%+v", s)
		}
		if got := r.w.Process(c); got.Exit == nil {
			t.Error("the waiting process was not ended")
		}
		r.removePod(p)
		r.empty()
	})
}

// A panic in the middle of a start is caught by whoever called it: the
// container does not stay on its way for ever.
func TestPanicInStart(t *testing.T) {
	for _, step := range []string{"record starting", "start process", "record"} {
		t.Run(step, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, func(c *pod.Config) {
					observe := c.Observe
					c.Observe = func(kind, s string) {
						observe(kind, s)
						if kind == "StartContainer" && s == step {
							panic("planted")
						}
					}
				})
				defer func() { r.stop() }()
				p := r.pod("web")
				c := r.create(p, "app")
				func() {
					defer func() { _ = recover() }()
					_ = r.m.StartContainer(r.ctx(), c)
					t.Error("no panic")
				}()
				if step == "record starting" {
					if s := r.container(c); s.Phase != pod.PhaseCreated {
						t.Errorf("nothing was done yet, and it is %s", s.Phase)
					}
				} else if s := r.exited(c, 128, "StartError"); !strings.Contains(s.Message, `"`+step+`"`) {
					t.Errorf("the message does not say where: %q", s.Message)
				}
				r.removePod(p)
				r.empty()
			})
		})
	}
}

func TestWhatIsMissingIsNamed(t *testing.T) {
	inBubble(t, func(r *rig) {
		p := r.pod("web")
		try := func(f func(*pod.ContainerConfig)) error {
			c := podtest.ContainerConfig("app")
			f(c)
			_, err := r.m.CreateContainer(r.ctx(), p, c)
			return err
		}
		r.fails(try(func(c *pod.ContainerConfig) { c.Image = "nginx" }), errs.NotFound, `image "nginx" is not on this node; pull it first`)
		r.fails(try(func(c *pod.ContainerConfig) {
			c.Mounts = []pod.Mount{{ContainerPath: "/data", HostPath: "/no/such/path"}}
		}), errs.FailedPrecondition, "mount 0 on /data", "host path /no/such/path does not exist")
		err := try(func(c *pod.ContainerConfig) { c.Mounts = []pod.Mount{{ContainerPath: "/img", Image: "nothere"}} })
		r.fails(err, errs.NotFound, "mount 0 on /img")
		if !strings.HasPrefix(err.Error(), "ImageVolumeMountFailed") {
			t.Errorf("kubelet does not know %q", err)
		}
		r.fails(try(func(c *pod.ContainerConfig) { c.Security.PIDMode = runtime.PIDPod }), errs.FailedPrecondition, "PID namespace")
		r.owned()
		if n := len(r.m.Containers(pod.Filter{})); n != 0 {
			t.Errorf("%d containers are left", n)
		}
	})
}

func TestImageVolumes(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.w.AddImage("sha256:vol", "models:1", ocispec.ImageConfig{})
		p := r.pod("web")
		cfg := podtest.ContainerConfig("app")
		cfg.Mounts = []pod.Mount{{ContainerPath: "/tmp", HostPath: "/tmp"}, {ContainerPath: "/m", Image: "models:1", ImageSubPath: "a"}}
		r.w.AddArtifact("sha256:art", "weights:1", "application/x-model")
		cfg.Image = "weights:1"
		_, err := r.m.CreateContainer(r.ctx(), p, cfg)
		r.fails(err, errs.InvalidArgument, `image "weights:1" is an artifact of type "application/x-model"`, "volume")
		cfg = podtest.ContainerConfig("app")
		cfg.Mounts = []pod.Mount{{ContainerPath: "/tmp", HostPath: "/tmp"}, {ContainerPath: "/m", Image: "models:1", ImageSubPath: "a"}, {ContainerPath: "/w", Image: "weights:1"}}
		c, err := r.m.CreateContainer(r.ctx(), p, cfg)
		r.ok(err)
		if s := r.container(c); s.Mounts[1].ImageRef != "sha256:vol" || s.Config.Mounts[1].ImageRef != "" {
			t.Errorf("mounts %+v, config %+v", s.Mounts, s.Config.Mounts)
		}
		check := func() {
			t.Helper()
			if got := r.w.Holds(c); !slices.Equal(got, []string{podtest.ImageID, "sha256:art", "sha256:vol"}) {
				t.Errorf("holds %v", got)
			}
		}
		check()
		r.restart()
		check()
		if s := r.container(c); s.Mounts[1].ImageRef != "sha256:vol" {
			t.Errorf("after a restart: %+v", s.Mounts)
		}
		r.removePod(p)
		r.empty()
	})
}

func TestPIDModes(t *testing.T) {
	inBubble(t, func(r *rig) {
		shared := podtest.SandboxConfig("shared")
		shared.PID = runtime.PIDPod
		p, err := r.m.RunSandbox(r.ctx(), shared)
		r.ok(err)
		p2 := r.pod("other")
		node := podtest.SandboxConfig("node")
		node.PID = runtime.PIDNode
		p3, err := r.m.RunSandbox(r.ctx(), node)
		r.ok(err)
		create := func(p, name string, mode runtime.PIDMode, target string) (string, error) {
			c := podtest.ContainerConfig(name)
			c.Security.PIDMode, c.Security.PIDTarget = mode, target
			return r.m.CreateContainer(r.ctx(), p, c)
		}
		c, err := create(p, "c", runtime.PIDPod, "")
		r.ok(err)
		_, err = create(p3, "c", runtime.PIDPod, "") // the pod's is the node's
		r.ok(err)
		_, err = create(p, "debug", runtime.PIDTarget, c)
		r.fails(err, errs.FailedPrecondition, "is created, not running")
		r.ok(r.m.StartContainer(r.ctx(), c))
		_, err = create(p2, "debug", runtime.PIDTarget, c)
		r.fails(err, errs.InvalidArgument, "in another pod")
		_, err = create(p, "debug", runtime.PIDTarget, strings.Repeat("f", 64))
		r.fails(err, errs.InvalidArgument, "there is none")
		d, err := create(p, "debug", runtime.PIDTarget, c)
		r.ok(err)
		// A container without a PID namespace of its own leaves processes behind
		// when its first one ends: they are killed by cgroup.
		r.ok(r.m.StartContainer(r.ctx(), d))
		r.w.Exit(d, 0)
		synctest.Wait()
		if got := r.w.Process(d).Signals; !slices.Contains(got, 9) {
			t.Errorf("what the first process left was not killed: %v", got)
		}
	})
}

func TestExecAttachAndLogs(t *testing.T) {
	inBubble(t, func(r *rig) {
		p, err := r.m.RunSandbox(r.ctx(), func() *pod.SandboxConfig {
			c := podtest.SandboxConfig("web")
			c.LogDirectory = filepath.Join(r.dir, "logs", "pod")
			return c
		}())
		r.ok(err)
		cfg := podtest.ContainerConfig("app", "SECRET=\xff\xfe")
		cfg.LogPath = "app/0.log"
		c, err := r.m.CreateContainer(r.ctx(), p, cfg)
		r.ok(err)
		if s := r.container(c); s.LogPath != filepath.Join(r.dir, "logs", "pod", "app", "0.log") {
			t.Errorf("log path %s", s.LogPath)
		}
		if st, err := os.Stat(filepath.Join(r.dir, "logs", "pod", "app")); err != nil || !st.IsDir() {
			t.Errorf("log folder: %v", err)
		}
		ctx := r.ctx()
		sync := func(cmd ...string) error { _, err := r.m.ExecSync(ctx, c, cmd, time.Second); return err }
		r.fails(sync("true"), errs.FailedPrecondition, "is created; exec needs a running one")
		r.ok(r.m.StartContainer(ctx, c))
		r.ok(sync("true"))
		r.fails(sync(), errs.InvalidArgument)
		r.fails(sync("a\x00b"), errs.InvalidArgument)
		r.fails(sync("sleep", "9"), errs.DeadlineExceeded, "not done after 1s")
		var out strings.Builder
		_, err = r.m.Exec(ctx, c, []string{"hello"}, false, pod.Streams{Stdout: &out})
		r.ok(err)
		if !strings.Contains(out.String(), "hello") {
			t.Errorf("output %q", out.String())
		}
		r.ok(r.m.Attach(ctx, c, pod.Streams{}))
		r.ok(r.m.ReopenLog(ctx, c))
		r.restart() // the spec, bytes and all, comes back from its file
		res, err := r.m.ExecSync(ctx, c, []string{"env"}, 0)
		if err != nil || !strings.Contains(string(res.Stdout), "SECRET=\xff\xfe") {
			t.Errorf("after a restart: %q, %v", res.Stdout, err)
		}
		r.w.Exit(c, 3)
		synctest.Wait()
		r.fails(sync("true"), errs.FailedPrecondition, "is exited (code 3); exec needs a running one")
		r.fails(r.m.Attach(ctx, c, pod.Streams{}), errs.FailedPrecondition, "attach needs a running one")
		r.fails(r.m.ReopenLog(ctx, c), errs.FailedPrecondition)
		r.ok(r.m.RemoveContainer(ctx, c))
		if _, err := os.Stat(filepath.Join(r.dir, "logs", "pod", "app")); err != nil {
			t.Errorf("logs are kubelet's to remove: %v", err)
		}
	})
}

func TestUpdate(t *testing.T) {
	inBubble(t, func(r *rig) {
		ctx := r.ctx()
		p := r.pod("web")
		cfg := podtest.ContainerConfig("app")
		cfg.Resources = pod.Resources{CPUShares: 10, Memory: 100 << 20}
		c, err := r.m.CreateContainer(ctx, p, cfg)
		r.ok(err)
		r.ok(r.m.UpdateContainer(ctx, c, pod.Resources{Memory: 200 << 20}, nil))
		want := func() {
			t.Helper()
			if s := r.container(c).Resources; s.Memory != 200<<20 || s.CPUShares != 10 {
				t.Errorf("resources %+v", s)
			}
		}
		want()
		r.fails(r.m.UpdateContainer(ctx, c, pod.Resources{Memory: -7}, nil), errs.InvalidArgument)
		r.fails(r.m.UpdateContainer(ctx, c, pod.Resources{MemorySwap: 150 << 20}, nil), errs.InvalidArgument, "present limits")
		r.w.FailOn("Executor.Update", 1, errs.New(errs.FailedPrecondition, "below usage"))
		r.fails(r.m.UpdateContainer(ctx, c, pod.Resources{Memory: 5}, nil), errs.FailedPrecondition, "below usage")
		want()
		r.ok(r.m.UpdateSandbox(ctx, p, &pod.Resources{Memory: 1}, &pod.Resources{Memory: 2}))
		r.restart()
		want()
		if s := r.sandbox(p).Config; s.Overhead.Memory != 1 || s.Resources.Memory != 2 {
			t.Errorf("pod resources %+v %+v", s.Overhead, s.Resources)
		}
		r.ok(r.m.StopContainer(ctx, c, 0))
		r.fails(r.m.UpdateContainer(ctx, c, pod.Resources{Memory: 5}, nil), errs.FailedPrecondition, "is exited")
	})
}
