package ring

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/internal/testhost"
)

// ready waits until the container has said so.
func (n *Node) ready(t testing.TB, id string) {
	t.Helper()
	eventually(t, 10*time.Second, "the container's first line", func() bool { return strings.HasPrefix(n.LogText(t, id), "ready\n") })
}

func TestPodStop(t *testing.T) {
	n := StartNode(t)
	pod := n.Pod(t, nil)
	idle := "echo ready; while :; do usleep 10000; done"
	t.Run("a handler for TERM", func(t *testing.T) {
		id := n.Run(t, pod, shell("trap 'echo bye; exit 5' TERM; "+idle))
		n.ready(t, id)
		if took := n.stop(t, id, 30); took > testhost.Limit(5*time.Second) {
			t.Errorf("it took %v", took)
		}
		if s := n.Status(t, id); s.ExitCode != 5 || s.Reason != "Error" || n.LogText(t, id) != "ready\nbye\n" || s.FinishedAt < s.StartedAt {
			t.Errorf("exit code %d, reason %q, log %q", s.ExitCode, s.Reason, n.LogText(t, id))
		}
		n.stop(t, id, 30) // again: no error
	})
	t.Run("TERM is ignored", func(t *testing.T) {
		id := n.Run(t, pod, shell("trap '' TERM; "+idle))
		n.ready(t, id)
		if took := n.stop(t, id, 1); took < time.Second || took > testhost.Limit(5*time.Second) {
			t.Errorf("with a grace of 1 s it took %v", took)
		}
		if s := n.Status(t, id); s.ExitCode != 137 {
			t.Errorf("exit code %d", s.ExitCode)
		}
	})
	t.Run("no grace", func(t *testing.T) {
		id := n.Run(t, pod, shell("trap 'echo bye; exit 5' TERM; "+idle))
		n.ready(t, id)
		n.stop(t, id, 0)
		if s := n.Status(t, id); s.ExitCode != 137 || strings.Contains(n.LogText(t, id), "bye") {
			t.Errorf("exit code %d, log %q", s.ExitCode, n.LogText(t, id))
		}
	})
	t.Run("stop_signal of the container", func(t *testing.T) {
		id := n.Run(t, pod, each(shell("trap 'exit 6' USR1; trap 'exit 5' TERM; "+idle), func(c *criv1.ContainerConfig) { c.StopSignal = criv1.Signal_SIGNAL_SIGUSR1 }))
		n.ready(t, id)
		if s := n.Status(t, id).StopSignal; s != criv1.Signal_SIGNAL_SIGUSR1 {
			t.Errorf("status says %v", s)
		}
		n.stop(t, id, 30)
		if s := n.Status(t, id); s.ExitCode != 6 {
			t.Errorf("exit code %d", s.ExitCode)
		}
	})
	t.Run("STOPSIGNAL of the image", func(t *testing.T) {
		image := n.Image(t, ImageConfig{StopSignal: "SIGINT"})
		id := n.Run(t, pod, each(shell("trap 'exit 7' INT; "+idle), func(c *criv1.ContainerConfig) { c.Image.Image = image }))
		n.ready(t, id)
		n.stop(t, id, 30)
		if s := n.Status(t, id); s.ExitCode != 7 || s.StopSignal != criv1.Signal_SIGNAL_SIGINT {
			t.Errorf("exit code %d, stop signal %v", s.ExitCode, s.StopSignal)
		}
	})
	t.Run("a second call is in more of a hurry", func(t *testing.T) {
		id := n.Run(t, pod, shell("trap '' TERM; "+idle))
		n.ready(t, id)
		first := make(chan error, 1)
		go func() {
			_, err := n.Runtime.StopContainer(within(t, callTime), &criv1.StopContainerRequest{ContainerId: id, Timeout: 500})
			first <- err
		}()
		time.Sleep(200 * time.Millisecond)
		if took := n.stop(t, id, 0); took > testhost.Limit(5*time.Second) {
			t.Errorf("it took %v", took)
		}
		if err := <-first; err != nil {
			t.Errorf("the first call: %v", err)
		}
	})
	t.Run("children of the first process", func(t *testing.T) {
		id := n.Run(t, pod, shell("(trap '' TERM HUP; while :; do usleep 10000; done) & trap 'exit 0' TERM; "+idle))
		n.ready(t, id)
		pids := cgroupProcs(t, n.PID(t, id))
		if len(pids) < 2 {
			t.Fatalf("processes %v", pids)
		}
		n.stop(t, id, 30)
		for _, pid := range pids {
			eventually(t, 5*time.Second, fmt.Sprintf("the end of process %d", pid), func() bool { return !running(pid) })
		}
	})
	t.Run("created, not started", func(t *testing.T) {
		id := n.Container(t, pod, nil)
		n.stop(t, id, 30)
		if s := n.Status(t, id); s.State != criv1.ContainerState_CONTAINER_EXITED {
			t.Errorf("it is %v", s.State)
		}
		wantError(t, n.TryStart(t, id), codes.FailedPrecondition)
	})
	t.Run("the whole pod", func(t *testing.T) {
		id := n.Run(t, pod, nil)
		if _, err := n.Runtime.StopPodSandbox(within(t, callTime), &criv1.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
			t.Fatal(err)
		}
		if s, p := n.Status(t, id), n.PodStatus(t, pod); s.ExitCode != 137 || p.State != criv1.PodSandboxState_SANDBOX_NOTREADY || p.Network.GetIp() != "" {
			t.Errorf("container %d, pod %v, address %q", s.ExitCode, p.State, p.Network.GetIp())
		}
		if _, err := n.TryContainer(t, pod, nil); codeOf(err) != codes.FailedPrecondition {
			t.Errorf("a container in a stopped pod: %v", err)
		}
		n.RemovePod(t, pod)
		n.RemovePod(t, pod)
		if _, err := n.Runtime.ContainerStatus(within(t, callTime), &criv1.ContainerStatusRequest{ContainerId: id}); codeOf(err) != codes.NotFound {
			t.Errorf("a container of a removed pod: %v", err)
		}
	})
}

// cgroupProcs are the processes beside pid in its cgroup and below.
func cgroupProcs(t testing.TB, pid int) (pids []int) {
	t.Helper()
	dir := cgroupOf(t, pid, "memory")
	for _, p := range allPIDs() {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", p))
		if strings.Contains(string(b), strings.TrimPrefix(dir, cgroupTop("memory"))) {
			pids = append(pids, p)
		}
	}
	return pids
}

// Rotation while the container writes loses no line, not even when the daemon
// is killed between the rename and the reopening.
func TestPodLogRotation(t *testing.T) {
	n := StartNode(t)
	ctl := n.HostDir(t)
	pod := n.Pod(t, nil)
	id := n.Run(t, pod, each(mounts(Volume(ctl, "/ctl")), shell(bothScript)))
	path := n.Status(t, id).LogPath
	var files []string
	rounds := scaled(15, 100)
	for i := range rounds {
		time.Sleep(20 * time.Millisecond)
		old := fmt.Sprintf("%s.%d", path, i)
		if err := os.Rename(path, old); err != nil {
			t.Fatal(err)
		}
		files = append(files, old)
		switch i % 5 {
		case 3:
			n.RestartDaemon()
		case 4:
			n.KillWorker()
		}
		if _, err := n.Runtime.ReopenContainerLog(within(t, callTime), &criv1.ReopenContainerLogRequest{ContainerId: id}); err != nil {
			t.Fatalf("reopen: %v", err)
		}
		if _, err := os.Stat(path); err != nil {
			t.Fatalf("after ReopenContainerLog: %v", err)
		}
	}
	if err := os.WriteFile(ctl+"/stop", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	st := n.WaitExit(t, id)
	got := numbers(t, append(files, path)...)
	b, _ := os.ReadFile(ctl + "/both")
	if want := strings.TrimSpace(string(b)); fmt.Sprint(got["stdout"]) != want || fmt.Sprint(got["stderr"]) != want {
		t.Errorf("lines %v, written %s", got, want)
	}
	if st.ExitCode != 7 || got["stdout"] < 10*rounds {
		t.Errorf("exit code %d, lines %v: too little to tell anything", st.ExitCode, got)
	}
	_, err := n.Runtime.ReopenContainerLog(within(t, callTime), &criv1.ReopenContainerLogRequest{ContainerId: id})
	wantError(t, err, codes.FailedPrecondition)
}

func TestPodLogFormat(t *testing.T) {
	n := StartNode(t)
	pod := n.Pod(t, nil)
	id := n.Run(t, pod, shell(`printf 'no newline'; printf 'err\n' >&2; sleep 0.2; printf ' at all\n\n\ttab\r\n'; head -c 40000 /dev/zero | tr '\0' x; echo; printf 'last'`))
	n.WaitExit(t, id)
	var out strings.Builder
	parts := 0
	for _, l := range n.Log(t, id) {
		if time.Since(l.Time) > time.Minute || len(l.Text) > 32<<10 {
			t.Errorf("record of %v, %d bytes", l.Time, len(l.Text))
		}
		if l.Stream == "stderr" {
			if l.Text != "err" || l.Part {
				t.Errorf("stderr: %+v", l)
			}
			continue
		}
		out.WriteString(l.Text)
		if !l.Part {
			out.WriteByte('\n')
		} else {
			parts++
		}
	}
	want := "no newline at all\n\n\ttab\r\n" + strings.Repeat("x", 40000) + "\nlast"
	if got := strings.TrimSuffix(out.String(), "\n"); got != want || parts < 2 {
		t.Errorf("%d parts, %d bytes, want %d; begins with %.100q", parts, len(got), len(want), got)
	}
}

func TestPodExecSync(t *testing.T) {
	n := StartNode(t)
	pod := n.Pod(t, nil)
	id := n.Run(t, pod, nil)
	t.Run("streams and exit code", func(t *testing.T) {
		out, errOut, code := n.Exec(t, id, "/bin/sh", "-c", "echo out; echo err >&2; exit 23")
		if out != "out\n" || errOut != "err\n" || code != 23 {
			t.Errorf("got %q, %q, %d", out, errOut, code)
		}
		_, _, code = n.Exec(t, id, "/bin/sh", "-c", "kill -9 $$")
		if code != 137 {
			t.Errorf("a killed command has exit code %d", code)
		}
	})
	t.Run("timeout", func(t *testing.T) {
		began := time.Now()
		_, err := n.ExecTimeout(t, id, 1, "/bin/sh", "-c", "sleep 7654 & sleep 7654")
		wantError(t, err, codes.DeadlineExceeded, "1s")
		if took := time.Since(began); took < time.Second || took > testhost.Limit(4*time.Second) {
			t.Errorf("it took %v", took)
		}
		if out := n.Sh(t, id, "ps | grep 765[4] | wc -l"); strings.TrimSpace(out) != "0" {
			t.Errorf("%s processes of the command are left", out)
		}
	})
	t.Run("a great deal of output", func(t *testing.T) {
		// 16 MiB is the cap of a stream and of a message, which has a header.
		const most, least = 16 << 20, 16<<20 - 8192
		for _, c := range []struct{ out, err int }{{20_000_000, 0}, {1000, 20_000_000}, {20_000_000, 20_000_000}} {
			out, errOut, code := n.Exec(t, id, "/bin/sh", "-c", fmt.Sprintf("head -c %d /dev/zero; head -c %d /dev/zero >&2; exit 3", c.out, c.err))
			sum := len(out) + len(errOut)
			if sum > most || sum < least || code != 3 || (c.out == 1000) != (len(out) == 1000) || (c.err == 0) != (len(errOut) == 0) {
				t.Errorf("of %d and %d bytes came %d and %d, exit code %d", c.out, c.err, len(out), len(errOut), code)
			}
		}
	})
	t.Run("a child holds the pipe", func(t *testing.T) {
		began := time.Now()
		out, _, code := n.Exec(t, id, "/bin/sh", "-c", "sleep 3000 & echo started; exit 4")
		if took := time.Since(began); out != "started\n" || code != 4 || took > testhost.Limit(5*time.Second) {
			t.Errorf("got %q, %d after %v", out, code, took)
		}
	})
	t.Run("no such command", func(t *testing.T) {
		_, err := n.ExecErr(t, id, "/no/such/command")
		wantError(t, err, codeOf(err), "/no/such/command")
		if c := codeOf(err); c == codes.OK || c == codes.Internal || c == codes.Unknown {
			t.Errorf("got %v", err)
		}
	})
	t.Run("not running", func(t *testing.T) {
		created := n.Container(t, pod, nil)
		_, err := n.ExecErr(t, created, "/bin/true")
		wantError(t, err, codes.FailedPrecondition)
		n.stop(t, created, 0)
		_, err = n.ExecErr(t, created, "/bin/true")
		wantError(t, err, codes.FailedPrecondition)
	})
	t.Run("as the container's user, in its folder", func(t *testing.T) {
		user := n.Run(t, pod, each(func(c *criv1.ContainerConfig) {
			c.WorkingDir, c.Envs = "/tmp/deep", []*criv1.KeyValue{{Key: "BYTES", Value: []byte("a\xffb")}}
		}, security(func(s *criv1.LinuxContainerSecurityContext) {
			s.RunAsUsername, s.SupplementalGroups = "app", []int64{4711}
		})))
		if out := n.Sh(t, user, "id -u; id -g; id -G; pwd; printf %s \"$BYTES\" | od -An -tx1"); out != "1000\n1000\n1000 2000 4711\n/tmp/deep\n 61 ff 62" {
			t.Errorf("got %q", out)
		}
	})
}

func TestPodEvents(t *testing.T) {
	n := StartNode(t)
	ctx := within(t, callTime)
	events, err := n.Runtime.GetContainerEvents(ctx, &criv1.GetEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := events.Header(); err != nil { // from here on nothing is missed
		t.Fatal(err)
	}
	pod := n.Pod(t, nil)
	id := n.Run(t, pod, shell("exit 3"))
	n.WaitExit(t, id)
	n.Remove(t, id)
	n.RemovePod(t, pod)
	const (
		created = criv1.ContainerEventType_CONTAINER_CREATED_EVENT
		started = criv1.ContainerEventType_CONTAINER_STARTED_EVENT
		stopped = criv1.ContainerEventType_CONTAINER_STOPPED_EVENT
		deleted = criv1.ContainerEventType_CONTAINER_DELETED_EVENT
	)
	for i, want := range []struct {
		id   string
		kind criv1.ContainerEventType
	}{{pod, created}, {pod, started}, {id, created}, {id, started}, {id, stopped}, {id, deleted}, {pod, stopped}, {pod, deleted}} {
		e, err := events.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if e.ContainerId != want.id || e.ContainerEventType != want.kind {
			t.Fatalf("event %d is %v of %s, want %v of %s", i, e.ContainerEventType, e.ContainerId, want.kind, want.id)
		}
		if e.PodSandboxStatus.GetMetadata().GetName() == "" || e.CreatedAt == 0 {
			t.Errorf("event %d lacks the pod or the time: %v", i, e)
		}
		if want.id == id && want.kind == stopped && (len(e.ContainersStatuses) != 1 || e.ContainersStatuses[0].ExitCode != 3) {
			t.Errorf("the end of the container comes with %v", e.ContainersStatuses)
		}
	}
}
