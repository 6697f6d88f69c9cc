package native

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/namespaces"
	"github.com/naru-project/naru/runtime"
)

// attributes are those that a process hands down and that can be seen from
// outside.
type attributes struct {
	cpus     int
	policy   uint32
	flags    uint64
	nice     int32
	priority uint32
	io       uintptr
	slack    string
}

func attributesOf(t *testing.T, pid int) (a attributes) {
	t.Helper()
	var cpus unix.CPUSet
	if err := unix.SchedGetaffinity(pid, &cpus); err != nil {
		t.Fatalf("affinity of %d: %v", pid, err)
	}
	attr, err := unix.SchedGetAttr(pid, 0)
	if err != nil {
		t.Fatalf("scheduling of %d: %v", pid, err)
	}
	a.cpus, a.policy, a.flags, a.nice, a.priority = cpus.Count(), attr.Policy, attr.Flags, attr.Nice, attr.Priority
	io, _, e := unix.RawSyscall(unix.SYS_IOPRIO_GET, 1, uintptr(pid), 0)
	if e != 0 {
		t.Fatalf("IO priority of %d: %v", pid, e)
	}
	a.io = io
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/timerslack_ns", pid))
	if err != nil {
		t.Fatal(err)
	}
	a.slack = strings.TrimSpace(string(b))
	return a
}

// spoil gives all threads of a process other attributes, and returns them.
func spoil(t *testing.T, pid int, policy uint32) attributes {
	t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	if err != nil || len(tasks) == 0 {
		t.Fatal(tasks, err)
	}
	for _, task := range tasks {
		tid, _ := strconv.Atoi(filepath.Base(task))
		var one unix.CPUSet
		one.Set(0)
		if err := unix.SchedSetaffinity(tid, &one); err != nil {
			t.Fatal(err)
		}
		if _, _, e := unix.RawSyscall(unix.SYS_IOPRIO_SET, 1, uintptr(tid), 2<<13|7); e != 0 {
			t.Fatal(e)
		}
		if err := os.WriteFile(fmt.Sprintf("/proc/%d/timerslack_ns", tid), []byte("777777"), 0); err != nil {
			t.Fatal(err)
		}
		attr := unix.SchedAttr{Size: uint32(unsafe.Sizeof(unix.SchedAttr{})), Policy: policy, Nice: 11}
		if policy == unix.SCHED_RR {
			attr.Priority, attr.Nice = 5, 0
		}
		if err := unix.SchedSetAttr(tid, &attr, 0); err != nil {
			t.Fatalf("policy %d: %v", policy, err)
		}
	}
	return attributesOf(t, pid)
}

// Nothing of what the worker was given for itself reaches a container: not its
// CPUs, scheduling policy, nice value, IO priority or timer slack. In a user
// namespace, a PID namespace of others, and an exec neither.
func TestNothingIsInherited(t *testing.T) {
	var all unix.CPUSet
	if err := unix.SchedGetaffinity(1, &all); err != nil {
		t.Fatal(err)
	}
	// What the kernel gives to the first process of a machine. The IO priority
	// follows the nice value where none is set.
	want := attributes{cpus: all.Count(), slack: "50000", io: 2<<13 | 4}
	for name, policy := range map[string]uint32{"batch": unix.SCHED_BATCH, "idle": unix.SCHED_IDLE, "real-time": unix.SCHED_RR} {
		t.Run(name, func(t *testing.T) {
			r := newRing(t)
			info, err := r.cfg.Monitor.Info(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if got := spoil(t, info.WorkerPID, policy); got == want || got.policy != policy || all.Count() > 1 && got.cpus != 1 {
				t.Fatalf("the worker has %+v", got)
			}
			check := func(what string, pid int) {
				t.Helper()
				got := attributesOf(t, pid)
				if got.io == 0 { // "none": as want, told in another way by old kernels
					got.io = want.io
				}
				if got != want {
					t.Errorf("%s has %+v, want %+v", what, got, want)
				}
			}
			maps := []runtime.IDMap{{ContainerID: 0, HostID: 200000, Size: 65536}}
			for _, kind := range []string{"plain", "userns", "shared"} {
				c := r.container("sleep", "1000")
				switch kind {
				case "userns":
					f, err := Maker{r.Executor}.Make(t.Context(), namespaces.Request{ID: newID(), User: true, UIDMap: maps, GIDMap: maps})
					if err != nil {
						t.Fatal(err)
					}
					defer f.Close()
					c.UIDMap, c.GIDMap, c.Namespaces.User = maps, maps, "/proc/self/fd/"+itoa(int(f.User.Fd()))
				case "shared":
					f, err := Maker{r.Executor}.Make(t.Context(), namespaces.Request{ID: c.SandboxID, PID: true})
					if err != nil {
						t.Fatal(err)
					}
					defer f.Close()
					t.Cleanup(func() { _ = Maker{r.Executor}.Release(context.Background(), c.SandboxID) })
					c.PIDMode, c.Namespaces.PID = runtime.PIDPod, "/proc/self/fd/"+itoa(int(f.PID.Fd()))
					h, err := r.lookup(t.Context(), initID(c))
					if err != nil {
						t.Fatal(err)
					}
					check("the pod's init", h.pid)
					_ = h.pidfd.Close()
				}
				r.run(c)
				h, err := r.lookup(t.Context(), c.ID)
				if err != nil {
					t.Fatal(err)
				}
				check(kind, h.pid)
				// A container that asks for the default gets the kernel's, too.
				if policy != unix.SCHED_RR { // of which the kernel keeps none
					if err := os.WriteFile(fmt.Sprintf("/proc/%d/timerslack_ns", h.pid), []byte("0"), 0); err != nil {
						t.Fatal(err)
					}
					check(kind+", slack reset", h.pid)
				}
				res, err := r.ExecSync(t.Context(), c, runtime.ExecSpec{Args: []string{"sh", "-c", "cat /proc/self/stat; grep Cpus_allowed: /proc/self/status; cat /proc/self/timerslack_ns"}})
				if err != nil {
					t.Fatal(err)
				}
				f := strings.Fields(string(res.Stdout))
				// proc_pid_stat(5): priority, nice, … rt_priority, policy
				if f[17] != "20" || f[18] != "0" || f[39] != "0" || f[40] != "0" || f[len(f)-1] != want.slack {
					t.Errorf("an exec in %s says %q", kind, f)
				}
				_ = h.pidfd.Close()
			}
		})
	}
}
