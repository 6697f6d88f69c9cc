package ring

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/internal/testhost"
)

// runc finds the OCI runtime that these tests are run with.
func runc(t testing.TB) string {
	t.Helper()
	p, err := exec.LookPath("runc")
	if err != nil {
		t.Skip("the package runc is not installed")
	}
	return p
}

// TestOCI runs tests of pods once more by an OCI runtime: what they ask for
// does not depend on who makes the containers.
func TestOCI(t *testing.T) {
	t.Setenv("NARU_OCI", runc(t))
	for _, x := range []struct {
		name string
		test func(*testing.T)
	}{
		{"exec streams", TestPodExecStream}, {"attach", TestPodAttach}, {"log format", TestPodLogFormat}, {"log rotation", TestPodLogRotation},
		{"OOM", TestPodOOM}, {"mounts", TestPodMounts}, {"image volumes", TestPodImageVolumes},
		{"a link as dev", TestM05_DevIsALink},
	} {
		t.Run(x.name, x.test)
	}
}

func TestOCIContainers(t *testing.T) {
	n := StartNode(t, WithRuntime(runc(t)))
	pod := n.Pod(t, nil)
	id := n.Run(t, pod, each(shell("echo out; echo err >&2; exec sleep 1000"), func(c *criv1.ContainerConfig) {
		c.Envs = []*criv1.KeyValue{{Key: "SECRET", Value: []byte("not for the command line")}}
		c.Linux.Resources = &criv1.LinuxContainerResources{CpuShares: 512, MemoryLimitInBytes: 64 << 20}
	}))
	t.Run("its parent is the keeper", func(t *testing.T) {
		if _, parent := procState(n.PID(t, id)); parent != n.KeeperPID() {
			t.Errorf("the parent is %d, the keeper %d", parent, n.KeeperPID())
		}
	})
	t.Run("log", func(t *testing.T) {
		n.awaitLog(t, id, "err")
		for _, l := range n.Log(t, id) {
			if l.Stream != "std"+l.Text {
				t.Errorf("record %+v", l)
			}
		}
	})
	t.Run("exec", func(t *testing.T) {
		if out, errOut, code := n.Exec(t, id, "/bin/sh", "-c", "echo $SECRET; echo e >&2; exit 7"); out != "not for the command line\n" || errOut != "e\n" || code != 7 {
			t.Errorf("exec: %q %q %d", out, errOut, code)
		}
		_, err := n.ExecErr(t, id, "/no/such")
		wantError(t, err, codes.FailedPrecondition, "/no/such")
		if l, _ := filepath.Glob(n.RunDir + "/oci/" + id + "/exec-*"); len(l) > 0 {
			t.Errorf("left of execs: %v", l)
		}
		began := time.Now() // a process that is left behind holds nobody up
		if out, _, code := n.Exec(t, id, "/bin/sh", "-c", "sleep 5432 & echo on; exit 0"); out != "on\n" || code != 0 || time.Since(began) > testhost.Limit(5*time.Second) {
			t.Errorf("exec: %q %d after %s", out, code, time.Since(began))
		}
	})
	t.Run("exec with a timeout", func(t *testing.T) {
		_, err := n.ExecTimeout(t, id, 1, "/bin/sh", "-c", "sleep 4321; true")
		wantError(t, err, codes.DeadlineExceeded)
		if out := n.Sh(t, id, "ps | grep -c '[4]321' || true"); strings.TrimSpace(out) != "0" {
			t.Errorf("%s processes of it are left", out)
		}
	})
	t.Run("limits and statistics", func(t *testing.T) {
		if got := n.cgroupFile(t, id, "memory/memory.limit_in_bytes", "memory.max"); got != fmt.Sprint(64<<20) {
			t.Errorf("memory limit %s", got)
		}
		_, err := n.Runtime.UpdateContainerResources(within(t, callTime), &criv1.UpdateContainerResourcesRequest{ContainerId: id, Linux: &criv1.LinuxContainerResources{MemoryLimitInBytes: 96 << 20}})
		if err != nil {
			t.Fatal(err)
		}
		if got := n.cgroupFile(t, id, "memory/memory.limit_in_bytes", "memory.max"); got != fmt.Sprint(96<<20) {
			t.Errorf("memory limit %s after the update", got)
		}
		r, err := n.Runtime.ContainerStats(within(t, callTime), &criv1.ContainerStatsRequest{ContainerId: id})
		if err != nil || r.Stats.Memory.GetWorkingSetBytes().GetValue() == 0 || r.Stats.Cpu.GetUsageCoreNanoSeconds().GetValue() == 0 {
			t.Errorf("stats %v, %v", r, err)
		}
	})
	t.Run("how it ends", func(t *testing.T) {
		n.stop(t, id, 0)
		if s := n.Status(t, id); s.ExitCode != 137 {
			t.Errorf("killed: exit code %d", s.ExitCode)
		}
		if out, code := n.Output(t, pod, shell("echo bye; exit 42")); out != "bye\n" || code != 42 {
			t.Errorf("%q %d", out, code)
		}
		_, err := n.TryContainer(t, pod, func(c *criv1.ContainerConfig) { c.Command = []string{"/no/such"} })
		wantError(t, err, codes.FailedPrecondition, "/no/such", "runc create")
	})
	t.Run("VOLUME under a read-only root", func(t *testing.T) {
		image := n.Image(t, ImageConfig{Volumes: map[string]struct{}{"/data": {}}}, Entry{Name: "data/of-image", Mode: 0o644, Data: []byte("x")})
		out, code := n.Output(t, pod, each(shell("cat /data/of-image; echo; touch /data/new && ! touch /new"),
			func(c *criv1.ContainerConfig) { c.Image.Image = image },
			security(func(s *criv1.LinuxContainerSecurityContext) { s.ReadonlyRootfs = true })))
		if code != 0 || !strings.HasPrefix(out, "x\n") {
			t.Errorf("%q %d", out, code)
		}
	})
	t.Run("checkpoint", func(t *testing.T) {
		_, err := n.Runtime.CheckpointContainer(within(t, callTime), &criv1.CheckpointContainerRequest{ContainerId: n.Run(t, pod, nil), Location: n.Dir + "/x.tar"})
		wantError(t, err, codes.Unimplemented, "handler")
	})
}

// TestOCISurvives kills each of Naru's processes beside a container that an OCI
// runtime has made.
func TestOCISurvives(t *testing.T) {
	n := StartNode(t, WithRuntime(runc(t)))
	pod := n.Pod(t, nil)
	count := shell("i=0; while :; do i=$((i+1)); echo $i; sleep 0.01; done")
	id := n.Run(t, pod, count)
	exits := n.Run(t, pod, shell("while [ ! -e /tmp/go ]; do sleep 0.05; done; exit 23"))
	created := n.Container(t, pod, shell("exit 5"))
	for _, k := range []struct {
		name string
		kill func()
	}{
		{"daemon", n.RestartDaemon},
		{"worker", n.KillWorker},
		{"daemon and worker", func() { n.KillDaemon(); n.KillWorker(); n.StartDaemon() }},
		{"keeper", func() { n.KillKeeper(); n.StartKeeper() }},
	} {
		t.Run(k.name, func(t *testing.T) {
			before := n.remember(t)
			who := identityOf(n.PID(t, id))
			k.kill()
			before.compare(t, n.remember(t))
			if now := identityOf(n.PID(t, id)); now != who {
				t.Errorf("process %+v before, %+v after", who, now)
			}
			if out := n.Sh(t, id, "echo on"); strings.TrimSpace(out) != "on" {
				t.Errorf("exec: %q", out)
			}
		})
	}
	t.Run("execs end with the daemon", func(t *testing.T) {
		lives := func() bool {
			return slices.ContainsFunc(allPIDs(), func(pid int) bool { return running(pid) && cmdline(pid) == "sleep 6543" })
		}
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			_, _ = n.ExecErr(t, id, "/bin/sh", "-c", "trap '' TERM; sleep 6543; true")
		}()
		eventually(t, 10*time.Second, "the exec to run", lives)
		n.KillDaemon()
		<-ended
		eventually(t, 10*time.Second, "the processes of an exec to end with the daemon", func() bool { return !lives() })
		n.StartDaemon()
		if l, _ := filepath.Glob(n.RunDir + "/oci/" + id + "/exec-*"); len(l) > 0 { // one holds the environment
			t.Errorf("left of execs: %v", l)
		}
	})
	_, _ = n.ExecErr(t, exits, "/bin/touch", "/tmp/go")                   // may end with the container
	if s := n.WaitExit(t, exits); s.ExitCode != 23 && s.ExitCode != 255 { // of a killed keeper's child, older kernels do not tell
		t.Errorf("exit code %d", s.ExitCode)
	}
	n.Start(t, created)
	n.WaitExit(t, created)
	n.stop(t, id, 0)
	numbers(t, n.Status(t, id).LogPath)
}

// fakeRuntime writes a runtime that runs script for command, and else is runc.
func (n *Node) fakeRuntime(t testing.TB, command, script string) string {
	t.Helper()
	p := filepath.Join(n.HostDir(t), "fake")
	text := fmt.Sprintf("#!/bin/sh\nfor a in \"$@\"; do case $a in %s)\n%s\n;; esac; done\nexec %s \"$@\"\n", command, script, runc(t))
	if err := os.WriteFile(p, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	return p
}

// configure replaces the runtime of the node's handler.
func (n *Node) configure(t testing.TB, program string) {
	t.Helper()
	n.StopDaemon()
	b, err := os.ReadFile(n.Config)
	if err != nil {
		t.Fatal(err)
	}
	text, _, _ := strings.Cut(string(b), "[handlers.oci]")
	text += fmt.Sprintf("[handlers.oci]\nkind = \"oci\"\npath = %q\n", program)
	if err := os.WriteFile(n.Config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	n.StartDaemon()
}

// TestOCIBadRuntime: whatever a runtime's program does, the daemon goes on, says
// what is wrong, and takes away what was made.
func TestOCIBadRuntime(t *testing.T) {
	n := StartNode(t, WithRuntime(runc(t)))
	for _, x := range []struct {
		name, command, script string
		pod, container        string // what the error of each must say; empty = it works
	}{
		{name: "garbage as features", command: "features", script: "echo '<html>'; exit 0", pod: "no JSON"},
		{name: "features of nothing", command: "features", script: "echo '{}'; exit 0", pod: "do not say which version"},
		{name: "no command features", command: "features", script: "echo unknown command >&2; exit 1"},
		{name: "features hang", command: "features", script: "exec sleep 1000", pod: "did not end within"},
		{name: "create says why not", command: "create", script: `while [ "$1" != --log ]; do shift; done; echo '{"level":"error","msg":"the moon is full"}' >"$2"; exit 1`, container: "the moon is full"},
		{name: "create says nothing", command: "create", script: "exit 3", container: "status 3"},
		{name: "create dies", command: "create", script: "kill -9 $$", container: "signal 9"},
		{name: "create makes no pid", command: "create", script: "exit 0", container: "set limits"},
		{name: "garbage as pid", command: "create", script: runc(t) + ` "$@"; while [ "$1" != --pid-file ]; do shift; done; echo nonsense >"$2"; exit 0`, container: "is no pid"},
		{name: "the pid of another", command: "create", script: runc(t) + ` "$@"; while [ "$1" != --pid-file ]; do shift; done; echo ` + fmt.Sprint(n.KeeperPID()) + ` >"$2"; exit 0`, container: "not of naru-monitor"},
		{name: "delete fails", command: "delete", script: "exit 1"},
	} {
		t.Run(x.name, func(t *testing.T) {
			n.configure(t, n.fakeRuntime(t, x.command, x.script))
			pod, err := n.TryPod(t, nil)
			if x.pod != "" {
				wantError(t, err, codeOf(err), x.pod)
				if err == nil {
					t.Error("the pod runs")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			id, err := n.TryRun(t, pod, nil)
			switch {
			case x.container == "" && err != nil:
				t.Error(err)
			case x.container == "":
				n.Remove(t, id)
			default:
				wantError(t, err, codeOf(err), x.container)
			}
			n.RemovePod(t, pod)
			if left := n.leftovers(); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
	t.Run("missing", func(t *testing.T) {
		n.configure(t, "/no/such/runtime")
		_, err := n.TryPod(t, nil)
		wantError(t, err, codes.FailedPrecondition, "/no/such/runtime", "cannot be executed")
		n.configure(t, runc(t)) // comes back without ado
		n.Pod(t, nil)
	})
	t.Run("exec hangs", func(t *testing.T) {
		n.configure(t, n.fakeRuntime(t, "exec", "exec sleep 1000"))
		id := n.Run(t, n.Pod(t, nil), nil)
		_, err := n.ExecTimeout(t, id, 1, "/bin/true")
		wantError(t, err, codes.DeadlineExceeded)
	})
	t.Run("the handler is gone", func(t *testing.T) {
		n.configure(t, runc(t))
		pod := n.Pod(t, nil)
		id := n.Run(t, pod, nil)
		n.StopDaemon()
		b, _ := os.ReadFile(n.Config)
		text, rest, _ := strings.Cut(string(b), "[handlers.oci]")
		if err := os.WriteFile(n.Config, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		n.StartDaemon()
		_, err := n.ExecErr(t, id, "/bin/true")
		wantError(t, err, codes.FailedPrecondition, "not configured any more")
		n.RemovePod(t, pod)
		n.StopDaemon()
		if err := os.WriteFile(n.Config, []byte(text+"[handlers.oci]"+rest), 0o600); err != nil {
			t.Fatal(err)
		}
		n.StartDaemon()
	})
}

// TestOCIKilledDuringCreate kills the daemon, or the worker, at several points
// of a create: nothing of the container is left.
func TestOCIKilledDuringCreate(t *testing.T) {
	n := StartNode(t, WithRuntime(runc(t)))
	for _, when := range []string{"before", "after"} {
		for _, who := range []string{"daemon", "worker"} {
			t.Run(who+" "+when, func(t *testing.T) {
				flag := filepath.Join(n.HostDir(t), "flag")
				script := fmt.Sprintf("touch %s; exec sleep 1000", flag)
				if when == "after" {
					script = fmt.Sprintf("%s \"$@\"; touch %s; exec sleep 1000", runc(t), flag)
				}
				n.configure(t, n.fakeRuntime(t, "create", script))
				pod := n.Pod(t, nil)
				done := make(chan error, 1)
				ctx, cancel := context.WithCancel(context.Background())
				defer cancel()
				go func() {
					_, err := n.Runtime.CreateContainer(ctx, &criv1.CreateContainerRequest{PodSandboxId: pod, Config: n.ContainerConfig(), SandboxConfig: n.pods[pod]})
					done <- err
				}()
				eventually(t, 20*time.Second, "the runtime's program", func() bool { _, err := os.Stat(flag); return err == nil })
				if who == "daemon" {
					n.RestartDaemon()
					cancel()
				} else {
					n.KillWorker()
				}
				if err := <-done; err == nil {
					t.Error("the create worked")
				}
				list, err := n.Runtime.ListContainers(within(t, callTime), &criv1.ListContainersRequest{})
				if err != nil || len(list.Containers) > 0 {
					t.Errorf("containers %v, %v", list, err)
				}
				n.RemovePod(t, pod)
				if left := n.leftovers(); len(left) > 0 {
					t.Errorf("left: %v", left)
				}
			})
		}
	}
}
