package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/sys"
	"github.com/naru-project/naru/runtime/seccomp"
)

// confinedEnv makes the test binary confine itself and report.
const confinedEnv = "NARU_TEST_CONFINED"

func TestMain(m *testing.M) {
	if os.Getenv(confinedEnv) != "" {
		if err := confinedProcess(); err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// calls fail in another way, or not at all, without the filter.
var calls = []struct {
	name string
	nr   uintptr
	args [3]uintptr
	want unix.Errno // 0: goes through, and fails as the kernel likes
}{
	{"reboot", unix.SYS_REBOOT, [3]uintptr{1, 2, 3}, unix.EPERM},                 // EINVAL
	{"init_module", unix.SYS_INIT_MODULE, [3]uintptr{}, unix.EPERM},              // EFAULT
	{"finit_module", unix.SYS_FINIT_MODULE, [3]uintptr{^uintptr(0)}, unix.EPERM}, // EBADF
	{"kexec_load", unix.SYS_KEXEC_LOAD, [3]uintptr{0, 99}, unix.EPERM},           // EINVAL
	{"settimeofday", unix.SYS_SETTIMEOFDAY, [3]uintptr{8}, unix.EPERM},           // EFAULT
	{"clock_settime", unix.SYS_CLOCK_SETTIME, [3]uintptr{99}, unix.EPERM},        // EINVAL
	{"ptrace", unix.SYS_PTRACE, [3]uintptr{99, 1}, unix.EPERM},                   // ESRCH, EIO
	{"execve", unix.SYS_EXECVE, [3]uintptr{8}, unix.EPERM},                       // EFAULT
	{"execveat", unix.SYS_EXECVEAT, [3]uintptr{^uintptr(0), 8}, unix.EPERM},      // EFAULT
	{"bpf-map", unix.SYS_BPF, [3]uintptr{unix.BPF_MAP_CREATE}, unix.EPERM},       // EINVAL
	{"bpf-unknown", unix.SYS_BPF, [3]uintptr{9999}, unix.EPERM},                  // EINVAL
	{"bpf-prog-load", unix.SYS_BPF, [3]uintptr{unix.BPF_PROG_LOAD}, 0},           // goes through
	{"bpf-attach", unix.SYS_BPF, [3]uintptr{unix.BPF_PROG_ATTACH}, 0},            // goes through
	{"setns", unix.SYS_SETNS, [3]uintptr{^uintptr(0)}, unix.EBADF},               // goes through
	{"pidfd_getfd", unix.SYS_PIDFD_GETFD, [3]uintptr{^uintptr(0)}, unix.EBADF},   // goes through
	{"io_uring_setup", unix.SYS_IO_URING_SETUP, [3]uintptr{1, 8, 0}, unix.EPERM}, // EFAULT
	{"keyctl", unix.SYS_KEYCTL, [3]uintptr{999}, unix.EPERM},                     // EOPNOTSUPP
	{"swapoff", unix.SYS_SWAPOFF, [3]uintptr{8}, unix.EPERM},                     // EFAULT
	{"unknown", 600, [3]uintptr{}, unix.ENOSYS},                                  // as without
}

// confinedProcess confines itself with threads before and after, and prints
// what each call answers and what each thread has.
func confinedProcess() error {
	hold := make(chan struct{})
	thread := func() {
		ready := make(chan struct{})
		go func() {
			goruntime.LockOSThread()
			close(ready)
			<-hold
		}()
		<-ready
	}
	for range 4 {
		thread()
	}
	if os.Getenv(confinedEnv) == "filter" {
		filter, flags, err := seccomp.Compile(ownFilter(), goruntime.GOARCH, seccomp.Options{})
		if err != nil {
			return err
		}
		if err := sys.LoadFilter(filter, flags); err != nil {
			return err
		}
	} else if err := confine(context.Background()); err != nil {
		return err
	}
	for range 4 {
		thread()
	}
	for _, c := range calls {
		_, _, e := unix.RawSyscall(c.nr, c.args[0], c.args[1], c.args[2])
		fmt.Println("call", c.name, int(e))
	}
	tasks, err := filepath.Glob("/proc/self/task/*/status")
	if err != nil {
		return err
	}
	for _, p := range tasks {
		b, err := os.ReadFile(p)
		if err != nil {
			return err
		}
		f := map[string]string{}
		for line := range strings.Lines(string(b)) {
			k, v, _ := strings.Cut(line, ":")
			f[k] = strings.TrimSpace(v)
		}
		fmt.Println("thread", f["CapInh"], f["CapPrm"], f["CapEff"], f["CapBnd"], f["Seccomp"])
	}
	close(hold)
	return nil
}

func runConfined(t *testing.T, what string) (lines [][]string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: a filter without no_new_privs")
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), confinedEnv+"="+what)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for line := range strings.Lines(string(out)) {
		lines = append(lines, strings.Fields(line))
	}
	return lines
}

// The daemon's own filter: what it refuses, on every thread, and what it lets
// through.
func TestOwnFilter(t *testing.T) {
	got := map[string]unix.Errno{}
	threads := 0
	for _, f := range runConfined(t, "filter") {
		switch f[0] {
		case "call":
			n, _ := strconv.Atoi(f[2])
			got[f[1]] = unix.Errno(n)
		case "thread":
			threads++
			if f[len(f)-1] != "2" {
				t.Errorf("a thread without a filter: %q", f)
			}
		}
	}
	for _, c := range calls {
		if got[c.name] != c.want && (c.want != 0 || got[c.name] == unix.EPERM) {
			t.Errorf("%s answers %v, want %v", c.name, got[c.name], c.want)
		}
	}
	if threads < 9 {
		t.Errorf("%d threads", threads)
	}
}

// What is refused must be known to the compiler: a name that it does not know
// has no effect. Some exist on other machines only.
func TestDeniedCallsAreKnown(t *testing.T) {
	for _, arch := range []string{"amd64", "arm64"} {
		// On arm64 the compiler knows the 32-bit table of ARM too.
		want := map[string][]string{
			"amd64": {},
			"arm64": {"create_module", "get_kernel_syms", "ioperm", "iopl", "modify_ldt", "query_module", "stime", "vm86", "vm86old"},
		}[arch]
		var unknown []string
		_, _, err := seccomp.Compile(ownFilter(), arch, seccomp.Options{Unknown: func(name string) { unknown = append(unknown, name) }})
		if slices.Sort(unknown); !slices.Equal(unknown, want) {
			t.Errorf("%s: no system calls are %q, want %q", arch, unknown, want)
		}
		if err != nil {
			t.Errorf("%s: %v", arch, err)
		}
	}
}
