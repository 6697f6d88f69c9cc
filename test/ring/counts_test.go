package ring

import (
	"encoding/binary"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

var updateCounts = flag.Bool("update-counts", false, "write testdata/counts.golden anew")

// countsFile holds what each operation costs. Times change with the machine;
// how many system calls, new processes, executed programs and fsyncs an operation
// takes changes only with the code.
const countsFile = "testdata/counts.golden"

// tolerance of system calls: a read more or less when a pipe fills in parts, a
// goroutine that was not there yet. The others must be exact.
const (
	tolerance = 0.15
	few       = 5
)

// events are what is counted, by tracepoint. What the Go runtime does by the
// clock and by load (futexes, polling, its own signals and threads) is left out.
var events = []struct{ name, tracepoint, filter string }{
	{"syscalls", "raw_syscalls/sys_enter", notRuntime()},
	{"processes", "task/task_newtask", fmt.Sprintf("!(clone_flags & %d)", unix.CLONE_THREAD)},
	{"execs", "sched/sched_process_exec", ""},
	{"fsyncs", "raw_syscalls/sys_enter", anyOf(unix.SYS_FSYNC, unix.SYS_FDATASYNC, unix.SYS_SYNCFS, unix.SYS_SYNC)},
}

func notRuntime() string {
	var out []string
	for _, nr := range []int{unix.SYS_FUTEX, unix.SYS_EPOLL_PWAIT, unix.SYS_EPOLL_CTL, unix.SYS_NANOSLEEP, unix.SYS_SCHED_YIELD, unix.SYS_TGKILL, unix.SYS_GETPID, unix.SYS_RT_SIGRETURN, unix.SYS_MADVISE, unix.SYS_MMAP, unix.SYS_MUNMAP, unix.SYS_RT_SIGPROCMASK, unix.SYS_SIGALTSTACK, unix.SYS_GETTID} {
		out = append(out, "id != "+strconv.Itoa(nr))
	}
	return strings.Join(out, " && ")
}

func anyOf(nrs ...int) string {
	out := make([]string, len(nrs))
	for i, nr := range nrs {
		out[i] = "id == " + strconv.Itoa(nr)
	}
	return strings.Join(out, " || ")
}

// counter counts one event in all threads of some processes, and in all that
// come from them.
type counter struct{ fds []int }

func newCounter(t *testing.T, tracing, tracepoint, filter string, pids []int) *counter {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(tracing, "events", tracepoint, "id"))
	if err != nil {
		t.Skipf("the kernel has no tracepoint %s: %v", tracepoint, err)
	}
	id, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	c := &counter{}
	t.Cleanup(func() {
		for _, fd := range c.fds {
			_ = unix.Close(fd)
		}
	})
	for _, pid := range pids {
		tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		if err != nil {
			t.Fatal(err)
		}
		for _, task := range tasks {
			tid, _ := strconv.Atoi(task.Name())
			attr := &unix.PerfEventAttr{Type: unix.PERF_TYPE_TRACEPOINT, Size: uint32(unsafe.Sizeof(unix.PerfEventAttr{})), Config: id, Bits: unix.PerfBitInherit}
			fd, err := unix.PerfEventOpen(attr, tid, -1, -1, unix.PERF_FLAG_FD_CLOEXEC)
			if err == unix.ESRCH {
				continue // the thread has ended
			}
			if err != nil {
				t.Skipf("the kernel counts no tracepoints (perf_event_open): %v", err)
			}
			c.fds = append(c.fds, fd)
			if filter == "" {
				continue
			}
			p, err := unix.BytePtrFromString(filter)
			if err != nil {
				t.Fatal(err)
			}
			if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.PERF_EVENT_IOC_SET_FILTER, uintptr(unsafe.Pointer(p))); errno != 0 {
				t.Fatalf("filter %q: %v", filter, errno)
			}
		}
	}
	return c
}

func (c *counter) read(t *testing.T) (sum uint64) {
	t.Helper()
	var b [8]byte
	for _, fd := range c.fds {
		if n, err := unix.Read(fd, b[:]); n != 8 || err != nil {
			t.Fatalf("read a counter: %d bytes, %v", n, err)
		}
		sum += binary.NativeEndian.Uint64(b[:])
	}
	return sum
}

// TestCounts holds what each operation costs to a file.
func TestCounts(t *testing.T) {
	n := StartNode(t)
	tracing := filepath.Join(n.Dir, "tracing")
	if err := os.Mkdir(tracing, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tracefs", tracing, "tracefs", 0, ""); err != nil {
		t.Skipf("the kernel has no tracefs: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(tracing, unix.MNT_DETACH) })

	const warm, rounds = 4, 15
	cycle(t, n, warm, func(_ string, f func()) { f() })
	counters := make([]*counter, len(events))
	for i, e := range events {
		counters[i] = newCounter(t, tracing, e.tracepoint, e.filter, []int{n.DaemonPID(), n.KeeperPID(), n.WorkerPID()})
	}
	var order []string
	got := map[string][][]uint64{} // by operation: of each round, by event
	cycle(t, n, rounds, func(op string, f func()) {
		before := make([]uint64, len(events))
		for i, c := range counters {
			before[i] = c.read(t)
		}
		f()
		took := make([]uint64, len(events))
		for i, c := range counters {
			took[i] = c.read(t) - before[i]
		}
		if got[op] == nil {
			order = append(order, op)
		}
		got[op] = append(got[op], took)
	})
	medians := map[string][]uint64{}
	for op, all := range got {
		for i := range events {
			var v []uint64
			for _, took := range all {
				v = append(v, took[i])
			}
			slices.Sort(v)
			medians[op] = append(medians[op], v[len(v)/2])
		}
	}
	compareCounts(t, order, medians)
}

// cycle runs pods from start to end; each call goes through measure.
func cycle(t *testing.T, n *Node, rounds int, measure func(op string, f func())) {
	t.Helper()
	must := func(err error) {
		if err != nil {
			t.Helper()
			t.Fatal(err)
		}
	}
	for range rounds {
		c := n.PodConfig()
		must(os.MkdirAll(c.LogDirectory, 0o755))
		ctx := within(t, callTime)
		var pod, id string
		rt := n.Runtime
		measure("RunPodSandbox", func() {
			r, err := rt.RunPodSandbox(ctx, &criv1.RunPodSandboxRequest{Config: c})
			must(err)
			pod = r.PodSandboxId
		})
		measure("CreateContainer", func() {
			r, err := rt.CreateContainer(ctx, &criv1.CreateContainerRequest{PodSandboxId: pod, Config: n.ContainerConfig(), SandboxConfig: c})
			must(err)
			id = r.ContainerId
		})
		measure("StartContainer", func() {
			_, err := rt.StartContainer(ctx, &criv1.StartContainerRequest{ContainerId: id})
			must(err)
		})
		time.Sleep(20 * time.Millisecond) // what was made ready for the next is ready
		measure("ExecSync", func() {
			_, err := rt.ExecSync(ctx, &criv1.ExecSyncRequest{ContainerId: id, Cmd: []string{"/bin/true"}})
			must(err)
		})
		measure("ListContainers", func() {
			_, err := rt.ListContainers(ctx, &criv1.ListContainersRequest{})
			must(err)
		})
		measure("ContainerStatus", func() {
			_, err := rt.ContainerStatus(ctx, &criv1.ContainerStatusRequest{ContainerId: id})
			must(err)
		})
		measure("StopContainer", func() {
			_, err := rt.StopContainer(ctx, &criv1.StopContainerRequest{ContainerId: id})
			must(err)
		})
		measure("removal", func() { // of all; a part goes on after the answers
			_, err := rt.RemoveContainer(ctx, &criv1.RemoveContainerRequest{ContainerId: id})
			must(err)
			_, err = rt.StopPodSandbox(ctx, &criv1.StopPodSandboxRequest{PodSandboxId: pod})
			must(err)
			_, err = rt.RemovePodSandbox(ctx, &criv1.RemovePodSandboxRequest{PodSandboxId: pod})
			must(err)
			time.Sleep(30 * time.Millisecond)
		})
	}
}

// hostKind names what changes the counts: the cgroup version and the driver.
// What systemd does for its driver is not counted, only what it is asked.
func hostKind() string {
	if cgroupV2() {
		return "cgroup-v2-" + cgroupDriver()
	}
	return "cgroup-v1"
}

func compareCounts(t *testing.T, order []string, got map[string][]uint64) {
	t.Helper()
	want := map[string][]uint64{}
	var others []string
	b, err := os.ReadFile(countsFile)
	if err != nil && !*updateCounts {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) != 2+len(events) || f[0] != hostKind() {
			if strings.HasPrefix(line, "cgroup-") && f[0] != hostKind() {
				others = append(others, line)
			}
			continue
		}
		for _, v := range f[2:] {
			x, err := strconv.ParseUint(v, 10, 64)
			if err != nil {
				t.Fatalf("%s: %q", countsFile, line)
			}
			want[f[1]] = append(want[f[1]], x)
		}
	}
	var text strings.Builder
	fmt.Fprintf(&text, "# What one operation costs daemon, monitor and their children, median of many.\n# host operation")
	for _, e := range events {
		fmt.Fprintf(&text, " %s", e.name)
	}
	text.WriteByte('\n')
	for _, op := range order {
		fmt.Fprintf(&text, "%s %s", hostKind(), op)
		for i := range events {
			fmt.Fprintf(&text, " %d", got[op][i])
		}
		text.WriteByte('\n')
	}
	t.Logf("\n%s", text.String())
	if *updateCounts {
		for _, o := range others {
			text.WriteString(o)
		}
		if err := os.WriteFile(countsFile, []byte(text.String()), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if len(want) == 0 {
		t.Fatalf("%s has no counts for %s: run with -update-counts on such a machine, or put there what is above", countsFile, hostKind())
	}
	for _, op := range order {
		for i, e := range events {
			w, g := want[op][i], got[op][i]
			if e.name == "syscalls" {
				if off := float64(g) - float64(w); off > tolerance*float64(w)+few || off < -tolerance*float64(w)-few {
					t.Errorf("%s: %d system calls, %d are usual: if that is meant, run with -update-counts", op, g, w)
				}
			} else if g != w {
				t.Errorf("%s: %d %s, not %d", op, g, e.name, w)
			}
		}
	}
}
