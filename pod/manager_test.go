package pod_test

import (
	"context"
	"errors"
	"io"
	"net/netip"
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

func TestLifeOfAPod(t *testing.T) {
	inBubble(t, func(r *rig) {
		ctx, cancel := context.WithCancel(r.ctx())
		events := r.m.Subscribe(ctx)
		p := r.pod("web")
		if s := r.sandbox(p); !s.Ready() || len(s.Handle.IPs) != 1 {
			t.Errorf("pod %+v", s)
		}
		c := r.create(p, "app")
		if s := r.container(c); s.State != pod.StateCreated || s.ImageID != podtest.ImageID || !strings.Contains(s.ImageRef, "@sha256:") || s.PID == 0 || s.User == nil || s.StopSignal != "SIGTERM" {
			t.Errorf("created: %+v", s)
		}
		r.ok(r.m.StartContainer(ctx, c))
		if s := r.container(c); s.State != pod.StateRunning || s.StartedAt.IsZero() {
			t.Errorf("started: %+v", s)
		}
		r.fails(r.m.StartContainer(ctx, c), errs.FailedPrecondition, "is running; start needs a created one")
		r.owned()
		r.ok(r.m.StopContainer(ctx, c, 30*time.Second))
		r.exited(c, 143, "Error")
		r.ok(r.m.StopContainer(ctx, c, 0))
		r.ok(r.m.StopSandbox(ctx, p))
		r.ok(r.m.StopSandbox(ctx, p))
		if s := r.sandbox(p); s.Ready() || r.w.Places() != 0 {
			t.Errorf("stopped pod %+v holds its place", s)
		}
		r.ok(r.m.RemoveContainer(ctx, c))
		r.ok(r.m.RemoveContainer(ctx, c))
		r.ok(r.m.RemoveSandbox(ctx, p))
		r.ok(r.m.RemoveSandbox(ctx, p))
		r.empty()
		all := drain(events)
		want := []string{
			"p created", "p started", "c created", "c started", "c stopped", "p stopped", "c deleted", "p deleted",
		}
		if got := eventNames(all, map[string]string{p: "p", c: "c"}); !slices.Equal(got, want) {
			t.Errorf("events %v", got)
		}
		for _, e := range all {
			if e.Pod == nil || e.PodID != p || e.Time.IsZero() {
				t.Errorf("event without its pod: %+v", e)
			}
		}
		if e := all[4]; len(e.Containers) != 1 || e.Containers[0].ExitCode != 143 {
			t.Errorf("stopped event shows %+v", e.Containers)
		}
		cancel()
		synctest.Wait()
		if _, open := <-events; open {
			t.Error("subscription outlives its context")
		}
	})
}

func TestUnknownIDs(t *testing.T) {
	inBubble(t, func(r *rig) {
		ctx, none := r.ctx(), strings.Repeat("0", 64)
		for _, id := range []string{none, "abc", ""} {
			r.ok(r.m.StopSandbox(ctx, id))
			r.ok(r.m.RemoveSandbox(ctx, id))
			r.ok(r.m.StopContainer(ctx, id, 0))
			r.ok(r.m.RemoveContainer(ctx, id))
			_, err := r.m.Sandbox(id)
			r.fails(err, errs.NotFound)
			_, err = r.m.Container(id)
			r.fails(err, errs.NotFound)
			_, err = r.m.CreateContainer(ctx, id, podtest.ContainerConfig("x"))
			r.fails(err, errs.NotFound)
			r.fails(r.m.StartContainer(ctx, id), errs.NotFound)
			r.fails(r.m.ReopenLog(ctx, id), errs.NotFound)
			r.fails(r.m.UpdateContainer(ctx, id, pod.Resources{}, nil), errs.NotFound)
			r.fails(r.m.UpdateSandbox(ctx, id, nil, nil), errs.NotFound)
			_, err = r.m.ContainerStats(ctx, id)
			r.fails(err, errs.NotFound)
			_, err = r.m.SandboxStats(ctx, id)
			r.fails(err, errs.NotFound)
			if r.m.Info(id) != nil {
				t.Error("info about nothing")
			}
		}
	})
}

func TestRetriesJoin(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.w.DelayOn("Sandboxes.Create", time.Minute)
		type result struct {
			id  string
			err error
		}
		results := make(chan result, 3)
		for range 3 {
			go func() {
				id, err := r.m.RunSandbox(r.ctx(), podtest.SandboxConfig("web"))
				results <- result{id, err}
			}()
		}
		synctest.Wait()
		if n := len(r.m.Sandboxes(pod.Filter{})); n != 0 {
			t.Errorf("%d half-made pods are listed", n)
		}
		ops := r.m.Operations()
		if len(ops) != 1 || ops[0].Kind != "RunPodSandbox" || ops[0].Step != "sandbox: namespaces" {
			t.Fatalf("operations %+v", ops)
		}
		_, err := r.m.Sandbox(ops[0].ID)
		r.fails(err, errs.NotFound, "still being created")
		other := podtest.SandboxConfig("web")
		other.Hostname = "else"
		_, err = r.m.RunSandbox(r.ctx(), other)
		r.fails(err, errs.AlreadyExists, "hostname differs")
		next := podtest.SandboxConfig("web")
		next.Metadata.Attempt = 1
		id2, err := r.m.RunSandbox(r.ctx(), next)
		r.ok(err)
		first := <-results
		for range 2 {
			if x := <-results; x != first || x.err != nil || x.id == id2 {
				t.Errorf("%+v, %+v, second attempt %s", x, first, id2)
			}
		}
		if n := r.w.Places(); n != 2 {
			t.Errorf("%d sandboxes for two attempts", n)
		}
		// Done, and asked again: nobody may have got the answer.
		again, err := r.m.RunSandbox(r.ctx(), podtest.SandboxConfig("web"))
		if err != nil || again != first.id {
			t.Errorf("again: %s, %v", again, err)
		}
		_, err = r.m.RunSandbox(r.ctx(), other)
		r.fails(err, errs.AlreadyExists, "hostname differs")
	})
}

func TestRetryAfterTheCallersDeadline(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.w.DelayOn("Sandboxes.Create", 5*time.Minute)
		ctx, cancel := within(4 * time.Minute)
		_, err := r.m.RunSandbox(ctx, podtest.SandboxConfig("web"))
		cancel()
		r.fails(err, errs.DeadlineExceeded, `step "sandbox: namespaces" has been running for 4m0s`)
		id, err := r.m.RunSandbox(r.ctx(), podtest.SandboxConfig("web"))
		r.ok(err)

		r.w.DelayOn("Executor.MountRootfs", 3*time.Minute)
		ctx, cancel = within(2 * time.Minute)
		_, err = r.m.CreateContainer(ctx, id, podtest.ContainerConfig("app"))
		cancel()
		r.fails(err, errs.DeadlineExceeded, `step "root file system" has been running for 2m0s`)
		time.Sleep(5 * time.Minute) // it is done meanwhile, and nobody has its id
		c, err := r.m.CreateContainer(r.ctx(), id, podtest.ContainerConfig("app"))
		r.ok(err)
		if all := r.m.Containers(pod.Filter{}); len(all) != 1 || all[0].ID != c {
			t.Errorf("containers %v", all)
		}
		_, err = r.m.CreateContainer(r.ctx(), id, podtest.ContainerConfig("app", "A=b"))
		r.fails(err, errs.AlreadyExists, "env differs")
		r.ok(r.m.StartContainer(r.ctx(), c))
		_, err = r.m.CreateContainer(r.ctx(), id, podtest.ContainerConfig("app"))
		r.fails(err, errs.AlreadyExists, "running already")
		r.ok(r.m.StopContainer(r.ctx(), c, time.Second))
		c2, err := r.m.CreateContainer(r.ctx(), id, podtest.ContainerConfig("app"))
		if err != nil || c2 == c {
			t.Errorf("after its end the name is not free: %s, %v", c2, err)
		}
		ctx, cancelCause := context.WithCancelCause(r.ctx())
		cancelCause(nil)
		_, err = r.m.CreateContainer(ctx, id, podtest.ContainerConfig("late"))
		r.fails(err, errs.Canceled)
		synctest.Wait()
	})
}

func TestACreateHasItsOwnDeadline(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.w.DelayOn("Sandboxes.Create", time.Hour)
		began := time.Now()
		_, err := r.m.RunSandbox(r.ctx(), podtest.SandboxConfig("web"))
		r.fails(err, errs.DeadlineExceeded, "not done after 10m0s", `"sandbox"`)
		if took := time.Since(began); took != 10*time.Minute {
			t.Errorf("took %s", took)
		}
		r.empty()
		r.w.DelayOn("Sandboxes.Create", 0)
		r.removePod(r.pod("web")) // the name is free
		r.empty()
	})
}

func TestStopCancelsCreates(t *testing.T) {
	inBubble(t, func(r *rig) {
		p := r.pod("web")
		r.w.DelayOn("Executor.Create", time.Hour)
		failed := make(chan error, 1)
		go func() {
			_, err := r.m.CreateContainer(r.ctx(), p, podtest.ContainerConfig("app"))
			failed <- err
		}()
		synctest.Wait()
		r.ok(r.m.StopSandbox(r.ctx(), p))
		r.fails(<-failed, errs.Canceled, "stopped while it was being created")
		_, err := r.m.CreateContainer(r.ctx(), p, podtest.ContainerConfig("app"))
		r.fails(err, errs.FailedPrecondition, "is stopped, not ready")
		r.removePod(p)
		r.empty()

		r.w.DelayOn("Sandboxes.Create", time.Hour)
		go func() {
			_, err := r.m.RunSandbox(r.ctx(), podtest.SandboxConfig("other"))
			failed <- err
		}()
		synctest.Wait()
		r.ok(r.m.StopSandbox(r.ctx(), r.m.Operations()[0].ID))
		r.fails(<-failed, errs.Canceled, "stopped while it was being created")
		r.empty()
	})
}

func TestRemoveCancelsItsCreate(t *testing.T) {
	inBubble(t, func(r *rig) {
		p := r.pod("web")
		r.w.DelayOn("Images.NewWritable", time.Hour)
		failed := make(chan error, 1)
		go func() {
			_, err := r.m.CreateContainer(r.ctx(), p, podtest.ContainerConfig("app"))
			failed <- err
		}()
		synctest.Wait()
		r.ok(r.m.RemoveContainer(r.ctx(), r.m.Operations()[0].ID))
		r.fails(<-failed, errs.Canceled)
		r.owned()
	})
}

// A call that fails after it had its effect is undone as well.
func TestHalfDoneStepsAreUndone(t *testing.T) {
	inBubble(t, func(r *rig) {
		p := r.pod("web")
		for _, call := range []string{
			"Images.Layers", "Images.NewWritable", "Executor.Create", "Executor.EnsurePodCgroup", "Sandboxes.Create",
		} {
			r.w.FailAfter(call, 1, errs.New(errs.Unavailable, "half done"))
			var err error
			if call == "Executor.EnsurePodCgroup" || call == "Sandboxes.Create" {
				_, err = r.m.RunSandbox(r.ctx(), podtest.SandboxConfig("other"))
			} else {
				_, err = r.m.CreateContainer(r.ctx(), p, podtest.ContainerConfig("app"))
			}
			r.fails(err, errs.Unavailable, "half done")
			r.owned()
			r.w.FailAfter(call, 0, nil)
		}
		r.removePod(p)
		r.empty()
	})
}

func TestDial(t *testing.T) {
	r := newRig(t) // real sockets: no bubble
	defer func() { r.stop() }()
	p := r.pod("web")
	conn, err := r.m.Dial(r.ctx(), p, 80)
	r.ok(err)
	if b, err := io.ReadAll(conn); err != nil || string(b) != "hello" {
		t.Errorf("read %q, %v", b, err)
	}
	r.ok(conn.Close())
	r.ok(r.m.StopSandbox(r.ctx(), p))
	_, err = r.m.Dial(r.ctx(), p, 80)
	r.fails(err, errs.FailedPrecondition, "port forwarding needs a ready one")
	if ready, _, _ := r.m.NetworkStatus(); !ready {
		t.Error("network is not ready")
	}
	r.ok(r.m.SetPodCIDRs(r.ctx(), []netip.Prefix{netip.MustParsePrefix("10.1.0.0/24")}))
}

func TestStatsAndInfo(t *testing.T) {
	inBubble(t, func(r *rig) {
		ctx := r.ctx()
		p := r.pod("web")
		c := r.running(p, "app")
		idle := r.create(p, "idle")
		s, err := r.m.ContainerStats(ctx, c)
		if err != nil || s.Stats == nil || s.Writable.Bytes != 4096 || s.WritableMountpoint != "/var/lib/naru" {
			t.Errorf("%+v, %v", s, err)
		}
		if s, err := r.m.ContainerStats(ctx, idle); err != nil || s.Stats != nil || s.Writable.Bytes == 0 {
			t.Errorf("not running: %+v, %v", s, err)
		}
		if l := r.m.ListContainerStats(ctx, pod.Filter{}); len(l) != 1 || l[0].Container.ID != c {
			t.Errorf("list %v", l)
		}
		ps, err := r.m.SandboxStats(ctx, p[:12])
		if err != nil || ps.Stats == nil || ps.Processes != 3 || len(ps.Interfaces) != 1 || len(ps.Containers) != 1 {
			t.Errorf("%+v, %v", ps, err)
		}
		if l := r.m.ListSandboxStats(ctx, pod.Filter{}); len(l) != 1 {
			t.Errorf("list %v", l)
		}
		metrics := r.m.ListSandboxMetrics(ctx)
		if len(metrics) != 1 || metrics[0].Pod.ID != p || len(metrics[0].Interfaces) != 1 || len(metrics[0].Containers) != 1 {
			t.Fatalf("metrics %+v", metrics)
		}
		if m := metrics[0].Containers[0]; m.Container.ID != c || m.Stats.Details == nil || m.Writable.Bytes != 4096 || m.Disk.Device == "" {
			t.Errorf("metrics of the container %+v", m)
		}
		info := r.m.Info(c)
		for _, k := range []string{"pid", "runtimeSpec", "netns", "cgroup", "config", "sandboxID", "rootfs"} {
			if info[k] == nil {
				t.Errorf("info of a container lacks %s: %v", k, info)
			}
		}
		if info := r.m.Info(p); info["netns"] == "" || info["config"] == nil || info["cgroup"] != "/kubepods/web" {
			t.Errorf("info of a pod: %v", info)
		}
		r.w.FailOn("Executor.Stats", -1, errors.New("gone"))
		if l := r.m.ListContainerStats(ctx, pod.Filter{}); len(l) != 0 {
			t.Errorf("list %v", l)
		}
		r.w.FailOn("Executor.DetailedStats", -1, errors.New("gone"))
		r.w.FailOn("Sandboxes.Stats", -1, errors.New("gone"))
		if l := r.m.ListSandboxMetrics(ctx); len(l) != 1 || len(l[0].Containers) != 0 || len(l[0].Interfaces) != 0 {
			t.Errorf("metrics %v", l)
		}
		r.ok(r.m.StopSandbox(ctx, p))
		if l := r.m.ListSandboxMetrics(ctx); len(l) != 0 {
			t.Errorf("metrics of a stopped pod: %v", l)
		}
		if l := r.m.ListSandboxStats(ctx, pod.Filter{}); len(l) != 0 {
			t.Errorf("stats of a stopped pod: %v", l)
		}
	})
}

func TestFilters(t *testing.T) {
	inBubble(t, func(r *rig) {
		a, b := r.pod("a"), r.pod("b")
		ca, cb := r.running(a, "x"), r.create(b, "y")
		r.ok(r.m.StopSandbox(r.ctx(), b))
		pods := func(f pod.Filter) (out []string) {
			for _, p := range r.m.Sandboxes(f) {
				out = append(out, p.ID)
			}
			return out
		}
		ctrs := func(f pod.Filter) (out []string) {
			for _, c := range r.m.Containers(f) {
				out = append(out, c.ID)
			}
			return out
		}
		for i, tc := range []struct{ got, want []string }{
			{pods(pod.Filter{}), []string{a, b}},
			{pods(pod.Filter{ID: a[:10]}), []string{a}},
			{pods(pod.Filter{ID: b, State: "ready"}), nil},
			{pods(pod.Filter{State: "notready"}), []string{b}},
			{pods(pod.Filter{State: "ready", Labels: map[string]string{"pod": "a"}}), []string{a}},
			{pods(pod.Filter{Labels: map[string]string{"pod": "a", "x": ""}}), nil},
			{pods(pod.Filter{State: "nonsense"}), nil},
			{ctrs(pod.Filter{}), []string{ca, cb}},
			{ctrs(pod.Filter{PodID: a[:12]}), []string{ca}},
			{ctrs(pod.Filter{PodID: a, ID: cb}), nil},
			{ctrs(pod.Filter{ID: cb[:12]}), []string{cb}},
			{ctrs(pod.Filter{State: "exited"}), []string{cb}},
			{ctrs(pod.Filter{State: "running", Labels: map[string]string{"name": "x"}}), []string{ca}},
			{ctrs(pod.Filter{PodID: "zz"}), nil},
		} {
			if !slices.Equal(tc.got, tc.want) {
				t.Errorf("%d: %v, want %v", i, tc.got, tc.want)
			}
		}
		ids := map[string]int{}
		for i := range 40 { // some two share a first digit
			cfg := podtest.ContainerConfig("z")
			cfg.Metadata.Attempt = uint32(i)
			id, err := r.m.CreateContainer(r.ctx(), a, cfg)
			r.ok(err)
			ids[id[:1]]++
		}
		for d, n := range ids {
			if n > 1 {
				_, err := r.m.Container(d)
				r.fails(err, errs.InvalidArgument, "give more digits")
				r.fails(r.m.RemoveContainer(r.ctx(), d), errs.InvalidArgument)
				return
			}
		}
		t.Error("no shared first digit among 40 ids")
	})
}

func TestSlowSubscriberIsDropped(t *testing.T) {
	inBubble(t, func(r *rig) {
		slow, quick := r.m.Subscribe(r.ctx()), r.m.Subscribe(r.ctx())
		n := 0
		p := r.pod("web")
		for i := range 20 {
			cfg := podtest.ContainerConfig("c")
			cfg.Metadata.Attempt = uint32(i)
			c, err := r.m.CreateContainer(r.ctx(), p, cfg)
			r.ok(err)
			r.ok(r.m.RemoveContainer(r.ctx(), c))
			n += len(drain(quick))
		}
		if n != 62 { // 2 of the pod, 3 of each container
			t.Errorf("the quick one got %d events", n)
		}
		if got := len(drain(slow)); got != 10 {
			t.Errorf("the slow one got %d events", got)
		}
		if _, open := <-slow; open {
			t.Error("the slow one was not dropped")
		}
	}, func(c *pod.Config) { c.EventBuffer = 10 })
}

func TestWhatCannotBeUndoneIsKeptAndRetried(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.w.FailOn("Sandboxes.Create", 1, errs.New(errs.Unavailable, "no address is free"))
		r.w.FailOn("Sandboxes.Release", 3, errors.New("netlink is busy"))
		_, err := r.m.RunSandbox(r.ctx(), podtest.SandboxConfig("web"))
		r.fails(err, errs.Unavailable, "run sandbox default/web: sandbox: no address is free")
		all := r.m.Sandboxes(pod.Filter{})
		if len(all) != 1 || all[0].Phase != pod.PhaseBroken || all[0].Ready() || !strings.Contains(all[0].Message, "netlink is busy") {
			t.Fatalf("pods %+v", all)
		}
		p := r.pod("web") // the name is free
		if p == all[0].ID {
			t.Fatal("the broken pod was handed out")
		}
		r.fails(r.m.StopSandbox(r.ctx(), all[0].ID), errs.Internal, "netlink is busy")
		time.Sleep(2 * time.Minute)
		if n := len(r.m.Sandboxes(pod.Filter{})); n != 1 {
			t.Errorf("%d pods after the reaper came by", n)
		}
		r.owned()

		r.w.FailOn("Executor.Create", 1, errors.New("no pids left"))
		r.w.FailOn("Executor.Delete", 2, errors.New("cgroup is busy"))
		_, err = r.m.CreateContainer(r.ctx(), p, podtest.ContainerConfig("app"))
		r.fails(err, errs.Internal, "create container default/web/app: process: no pids left")
		list := r.m.Containers(pod.Filter{})
		if len(list) != 1 || list[0].State != pod.StateUnknown || !strings.Contains(list[0].Message, "cgroup is busy") {
			t.Fatalf("containers %+v", list)
		}
		c := r.running(p, "app")
		time.Sleep(2 * time.Minute)
		if l := r.m.Containers(pod.Filter{}); len(l) != 1 || l[0].ID != c {
			t.Errorf("containers after the reaper came by: %v", l)
		}
		r.w.FailOn("Images.RemoveWritable", 2, errors.New("disk error"))
		r.fails(r.m.RemoveSandbox(r.ctx(), p), errs.Internal, "disk error")
		r.fails(r.m.RemoveContainer(r.ctx(), c), errs.Internal, "disk error")
		r.ok(r.m.RemoveSandbox(r.ctx(), p))
		r.empty()
	})
}

func TestAPanicInACreateIsAnError(t *testing.T) {
	inBubble(t, func(r *rig) {
		r.l.SetHook(func(point string) {
			if point == "before Executor.EnsurePodCgroup" {
				panic("bug")
			}
		})
		_, err := r.m.RunSandbox(r.ctx(), podtest.SandboxConfig("web"))
		r.fails(err, errs.Internal, "panic: bug")
		r.l.SetHook(nil)
		synctest.Wait() // the reaper takes its half down
		if len(r.m.Operations()) != 0 {
			t.Error("operation is left")
		}
		r.empty()
		p := r.pod("web")
		r.l.SetHook(func(point string) {
			if point == "after Executor.Create" {
				panic("bug")
			}
		})
		_, err = r.m.CreateContainer(r.ctx(), p, podtest.ContainerConfig("app"))
		r.fails(err, errs.Internal, "panic: bug")
		r.l.SetHook(nil)
		synctest.Wait()
		if n := len(r.m.Containers(pod.Filter{})); n != 0 {
			t.Errorf("%d containers", n)
		}
		r.owned()
		r.removePod(p)
	})
}

func TestDiskThatTakesNothing(t *testing.T) {
	inBubble(t, func(r *rig) {
		p := r.pod("web")
		c := r.running(p, "app")
		away := func(from, to string) {
			t.Helper()
			r.ok(os.Rename(filepath.Join(r.dir, from), filepath.Join(r.dir, to)))
		}
		away("containers", "gone")
		_, err := r.m.CreateContainer(r.ctx(), p, podtest.ContainerConfig("other"))
		r.fails(err, errs.Internal, "record:")
		r.w.Exit(c, 4) // a fact does not wait for the disk
		synctest.Wait()
		r.exited(c, 4, "Error")
		away("gone", "containers")
		time.Sleep(time.Minute) // the reaper writes it
		r.w.ForgetProcess(c)    // nobody could tell it again
		r.restart()
		r.exited(c, 4, "Error")
		away("pods", "gone")
		_, err = r.m.RunSandbox(r.ctx(), podtest.SandboxConfig("more"))
		r.fails(err, errs.Internal, "write")
		r.ok(r.m.StopSandbox(r.ctx(), p)) // and a full one keeps nothing alive
		away("gone", "pods")
		r.removePod(p)
		r.empty()
	})
}

func TestShutdownEndsCreatesAndKeepsStops(t *testing.T) {
	inBubble(t, func(r *rig) {
		p := r.pod("web")
		c := r.running(p, "deaf", podtest.EnvIgnoreTERM)
		r.w.DelayOn("Images.NewWritable", time.Hour)
		failed := make(chan error, 2)
		go func() {
			_, err := r.m.CreateContainer(r.ctx(), p, podtest.ContainerConfig("late"))
			failed <- err
		}()
		go func() { failed <- r.m.StopContainer(r.ctx(), c, time.Minute) }()
		synctest.Wait()
		began := time.Now()
		r.stop()
		for range 2 {
			r.fails(<-failed, errs.Unavailable, "shutting down")
		}
		if time.Since(began) > time.Second {
			t.Errorf("shutdown took %s", time.Since(began))
		}
		_, err := r.m.RunSandbox(r.ctx(), podtest.SandboxConfig("no"))
		r.fails(err, errs.Unavailable)
		if r.w.Process(c).Exit != nil {
			t.Error("the container was killed before its time")
		}
		r.w.DelayOn("Images.NewWritable", 0)
		r.boot() // the stop goes on, with the grace it had
		r.owned()
		time.Sleep(time.Until(began.Add(59 * time.Second)))
		if r.w.Process(c).Exit != nil {
			t.Error("killed before the grace was over")
		}
		time.Sleep(2 * time.Second)
		r.exited(c, 137, "Error")
	})
}
