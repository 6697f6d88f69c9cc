package ring

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// given are the capabilities that the daemon must have given up.
const given uint64 = 1<<unix.CAP_SYS_MODULE | 1<<unix.CAP_SYS_RAWIO | 1<<unix.CAP_SYS_BOOT | 1<<unix.CAP_SYS_TIME | 1<<unix.CAP_SYS_PACCT |
	1<<unix.CAP_SYS_TTY_CONFIG | 1<<unix.CAP_SYSLOG | 1<<unix.CAP_WAKE_ALARM | 1<<unix.CAP_BLOCK_SUSPEND | 1<<unix.CAP_AUDIT_CONTROL |
	1<<unix.CAP_AUDIT_READ | 1<<unix.CAP_AUDIT_WRITE | 1<<unix.CAP_NET_BROADCAST | 1<<unix.CAP_IPC_LOCK | 1<<unix.CAP_IPC_OWNER |
	1<<unix.CAP_PERFMON | 1<<unix.CAP_CHECKPOINT_RESTORE

// threadFacts are the status files of all threads of a process.
func threadFacts(t testing.TB, pid int) (all []map[string]string) {
	t.Helper()
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(files) == 0 {
		t.Fatalf("threads of %d: %v, %v", pid, files, err)
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil { // it ended meanwhile
			continue
		}
		m := map[string]string{}
		for line := range strings.Lines(string(b)) {
			k, v, _ := strings.Cut(line, ":")
			m[k] = strings.TrimSpace(v)
		}
		all = append(all, m)
	}
	return all
}

// checkPosture checks what the threads of a process may do.
func checkPosture(t testing.TB, what string, pid int, caps uint64, seccomp string) {
	t.Helper()
	for _, m := range threadFacts(t, pid) {
		for name, want := range map[string]uint64{"CapInh": 0, "CapPrm": caps, "CapEff": caps, "CapBnd": caps, "CapAmb": 0} {
			if got := capSet(t, m, name); got != want {
				t.Errorf("%s, thread %s: %s is %#x, want %#x", what, m["Pid"], name, got, want)
			}
		}
		if m["Seccomp"] != seccomp {
			t.Errorf("%s, thread %s: Seccomp is %s, want %s", what, m["Pid"], m["Seccomp"], seccomp)
		}
		if m["Umask"] != "0077" {
			t.Errorf("%s, thread %s: the umask is %s", what, m["Pid"], m["Umask"])
		}
	}
	// Lowered where that may be done, else as it was inherited.
	want := strings.TrimSpace(string(mustRead(t, "/proc/self/oom_score_adj")))
	if caps&(1<<unix.CAP_SYS_RESOURCE) != 0 {
		want = "-999"
	}
	if got := strings.TrimSpace(string(mustRead(t, fmt.Sprintf("/proc/%d/oom_score_adj", pid)))); got != want {
		t.Errorf("%s: oom_score_adj is %s, want %s", what, got, want)
	}
}

// keepersOf lists the processes of the node's keeper: itself and its guard.
func (n *Node) keepersOf() (pids []int) {
	for _, pid := range allPIDs() {
		if c := cmdline(pid); strings.HasPrefix(c, "naru-monitor keeper ") && strings.Contains(c, n.RunDir+"/monitor") && running(pid) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// The daemon gives up for itself what no daemon of a node needs, on every
// thread; what it starts has everything, or a privileged container would not.
// That holds after each restart, whoever started the keeper.
func TestDaemonIsConfined(t *testing.T) {
	self := threadFacts(t, os.Getpid())[0]
	full := capSet(t, self, "CapBnd")
	if full&given == 0 {
		t.Skip("this process has nothing that could be given up")
	}
	n := StartNode(t)
	check := func(when string) {
		t.Helper()
		pod := n.Pod(t, privilegedPod)
		list := []string{n.Run(t, pod, func(c *criv1.ContainerConfig) { c.Linux.SecurityContext.Privileged = true })}
		list = append(list, n.Run(t, pod, nil))
		m := threadFacts(t, n.PID(t, list[0]))[0]
		for _, name := range []string{"CapPrm", "CapEff", "CapBnd"} {
			if got := capSet(t, m, name); got != full {
				t.Errorf("%s: %s of a privileged container is %#x, want %#x", when, name, got, full)
			}
		}
		if m["Seccomp"] != "0" {
			t.Errorf("%s: a privileged container has Seccomp %s", when, m["Seccomp"])
		}
		if out := n.Sh(t, list[0], "grep -E 'CapBnd|Seccomp:' /proc/self/status"); !strings.Contains(out, fmt.Sprintf("%016x", full)) || !strings.Contains(out, "Seccomp:\t0") {
			t.Errorf("%s: an exec in a privileged container has %q", when, out)
		}
		checkPosture(t, when+": daemon", n.DaemonPID(), full&^given, "2")
		checkPosture(t, when+": keeper", n.KeeperPID(), full, "0")
		checkPosture(t, when+": worker", n.WorkerPID(), full, "0")
		n.RemovePod(t, pod)
	}
	check("with a keeper of its own")
	n.RestartDaemon()
	check("after a restart of the daemon")
	n.KillKeeper()
	n.StartKeeper()
	check("after the keeper was killed")

	// Without an init system: the daemon starts the keeper, before it gives
	// anything up, and a guard that starts it again.
	n.StopDaemon()
	if !n.keeper.end(syscall.SIGTERM, 10*time.Second) {
		t.Fatal("the keeper did not end")
	}
	n.StartDaemon()
	check("with the daemon's own keeper")
	if l := n.keepersOf(); len(l) != 2 {
		t.Fatalf("a keeper and its guard run as %v", l)
	}
	for _, when := range []string{"killed once", "killed twice"} {
		old := n.KeeperPID()
		id := n.Run(t, n.Pod(t, nil), nil)
		pid := n.PID(t, id)
		if err := unix.Kill(old, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		eventually(t, 10*time.Second, "the guard's next keeper", func() bool {
			i, err := n.info()
			return err == nil && i.KeeperPID != old && !i.Orphan
		})
		check("after the daemon's keeper was " + when)
		if !running(pid) || n.Sh(t, id, "echo here") != "here" {
			t.Errorf("a container did not survive that the keeper was %s", when)
		}
	}
	n.RestartDaemon()
	check("after a restart of the daemon that started the keeper")
	if l := n.keepersOf(); len(l) != 2 {
		t.Errorf("a keeper and its guard run as %v", l)
	}
	for _, pid := range n.keepersOf() {
		if got := strings.TrimSpace(string(mustRead(t, fmt.Sprintf("/proc/%d/comm", pid)))); !slices.Contains([]string{"naru-monitor", "naru-guard"}, got) {
			t.Errorf("process %d is called %q", pid, got)
		}
	}
}
