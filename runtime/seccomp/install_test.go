package seccomp

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// helper names the environment variable that makes the test binary load the
// default filter: "probe" makes system calls, a path is executed.
const helper = "NARU_SECCOMP_TEST_HELPER"

func TestMain(m *testing.M) {
	if what := os.Getenv(helper); what != "" {
		runHelper(what)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func runHelper(what string) {
	goruntime.LockOSThread()
	start := time.Now()
	filter, flags, err := Compile(Default(dockerCaps, goruntime.GOARCH), goruntime.GOARCH, Options{})
	compiled := time.Since(start)
	if err == nil {
		err = install(filter, flags)
	}
	if err != nil {
		fmt.Println("install:", err)
		os.Exit(1)
	}
	if what != "probe" {
		fmt.Println("exec:", syscall.Exec(what, []string{what}, nil))
		os.Exit(1)
	}
	fmt.Fprintln(os.Stderr, "compiled in", compiled, "loaded in", time.Since(start)-compiled)
	for _, p := range probes {
		r, _, errno := unix.RawSyscall6(p.nr, p.args[0], p.args[1], p.args[2], p.args[3], p.args[4], p.args[5])
		_ = r
		fmt.Printf("%s %d\n", p.name, int(errno))
	}
}

// install loads a filter for the calling thread, as the container's first
// process does.
func install(filter []byte, flags uint32) error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	prog := struct {
		n    uint16
		code unsafe.Pointer
	}{uint16(len(filter) / 8), unsafe.Pointer(&filter[0])}
	if _, _, e := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, uintptr(flags), uintptr(unsafe.Pointer(&prog))); e != 0 {
		return e
	}
	return nil
}

type probe struct {
	name string
	nr   uintptr
	args [6]uintptr
	want syscall.Errno
}

func socket(name string, want syscall.Errno, args ...uintptr) probe {
	p := probe{name: "socket-" + name, nr: unix.SYS_SOCKET, want: want}
	copy(p.args[:], args)
	return p
}

// probes are system calls that fail for another reason, or not at all, without
// the filter: an answer of EPERM or ENOSYS is the filter's.
var probes = []probe{
	socket("inet", 0, unix.AF_INET, unix.SOCK_STREAM),
	socket("unix", 0, unix.AF_UNIX, unix.SOCK_STREAM),
	socket("netlink-route", 0, unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_ROUTE),
	socket("netlink-xfrm", unix.EPERM, unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_XFRM),
	socket("alg", unix.EPERM, unix.AF_ALG, unix.SOCK_SEQPACKET),
	socket("vsock", unix.EPERM, unix.AF_VSOCK, unix.SOCK_STREAM),
	socket("rxrpc", unix.EPERM, unix.AF_RXRPC, unix.SOCK_DGRAM),
	socket("key", unix.EPERM, unix.AF_KEY, unix.SOCK_RAW, 2),
	socket("xdp", unix.EPERM, unix.AF_XDP, unix.SOCK_RAW),
	{"clone-newuser", unix.SYS_CLONE, [6]uintptr{unix.CLONE_NEWUSER | unix.CLONE_FS}, unix.EPERM}, // EINVAL unfiltered
	{"clone3", unix.SYS_CLONE3, [6]uintptr{}, unix.ENOSYS},
	{"unshare-newuser", unix.SYS_UNSHARE, [6]uintptr{unix.CLONE_NEWUSER}, unix.EPERM},
	{"setns", unix.SYS_SETNS, [6]uintptr{^uintptr(0)}, unix.EPERM},
	{"bpf", unix.SYS_BPF, [6]uintptr{99}, unix.EPERM},
	{"perf_event_open", unix.SYS_PERF_EVENT_OPEN, [6]uintptr{}, unix.EPERM},
	{"userfaultfd", unix.SYS_USERFAULTFD, [6]uintptr{^uintptr(0)}, unix.EPERM},
	{"io_uring_setup", unix.SYS_IO_URING_SETUP, [6]uintptr{1}, unix.EPERM},
	{"io_uring_enter", unix.SYS_IO_URING_ENTER, [6]uintptr{^uintptr(0)}, unix.EPERM},
	{"keyctl", unix.SYS_KEYCTL, [6]uintptr{999}, unix.EPERM},
	{"add_key", unix.SYS_ADD_KEY, [6]uintptr{}, unix.EPERM},
	{"request_key", unix.SYS_REQUEST_KEY, [6]uintptr{}, unix.EPERM},
	{"open_by_handle_at", unix.SYS_OPEN_BY_HANDLE_AT, [6]uintptr{^uintptr(0)}, unix.EPERM},
	{"mount", unix.SYS_MOUNT, [6]uintptr{}, unix.EPERM},
	{"umount2", unix.SYS_UMOUNT2, [6]uintptr{}, unix.EPERM},
	{"fsopen", unix.SYS_FSOPEN, [6]uintptr{}, unix.EPERM},
	{"open_tree", unix.SYS_OPEN_TREE, [6]uintptr{^uintptr(0)}, unix.EPERM},
	{"move_mount", unix.SYS_MOVE_MOUNT, [6]uintptr{^uintptr(0)}, unix.EPERM},
	{"mount_setattr", unix.SYS_MOUNT_SETATTR, [6]uintptr{^uintptr(0)}, unix.EPERM},
	{"kexec_load", unix.SYS_KEXEC_LOAD, [6]uintptr{0, 99}, unix.EPERM},
	{"init_module", unix.SYS_INIT_MODULE, [6]uintptr{}, unix.EPERM},
	{"pidfd_getfd", unix.SYS_PIDFD_GETFD, [6]uintptr{^uintptr(0)}, unix.EPERM},
	{"nr-467", 467, [6]uintptr{^uintptr(0)}, unix.ENOSYS},
	{"nr-600", 600, [6]uintptr{}, unix.ENOSYS},
	{"x32-getpid", 0x40000000 | unix.SYS_GETPID, [6]uintptr{}, unix.ENOSYS},
	{"getpid", unix.SYS_GETPID, [6]uintptr{}, 0},
	{"personality", unix.SYS_PERSONALITY, [6]uintptr{0xffffffff}, 0},
	{"personality-randomize", unix.SYS_PERSONALITY, [6]uintptr{0x0040000}, unix.EPERM},
}

// startHelper runs this binary under the default filter.
func startHelper(t *testing.T, what string) map[string]int {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), helper+"="+what)
	var out, errb bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errb
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v: %s %s", err, out.String(), errb.String())
	}
	if errb.Len() > 0 {
		t.Log(strings.TrimSpace(errb.String()))
	}
	return answers(t, out.String())
}

func answers(t *testing.T, s string) map[string]int {
	t.Helper()
	got := map[string]int{}
	for line := range strings.Lines(s) {
		var name string
		var errno int
		if _, err := fmt.Sscan(line, &name, &errno); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		got[name] = errno
	}
	return got
}

// The kernel itself, with the default profile: rows that matter for the
// kernel's attack surface, and that ordinary programs still work.
func TestInstallDefault(t *testing.T) {
	got := startHelper(t, "probe")
	for _, p := range probes {
		if e, ok := got[p.name]; !ok || syscall.Errno(e) != p.want {
			t.Errorf("%s: %v, want %v", p.name, syscall.Errno(e), p.want)
		}
	}
}

// A 32-bit program under the default profile of amd64: it runs, and the
// multiplexer does not open what socket(2) denies.
func TestInstallDefaultI386(t *testing.T) {
	if goruntime.GOARCH != "amd64" {
		t.Skip("the machine is not amd64")
	}
	bin := filepath.Join(t.TempDir(), "i386")
	build := exec.Command("go", "build", "-o", bin, "./testdata/i386")
	build.Env = append(os.Environ(), "GOARCH=386", "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v: %s", err, out)
	}
	out, err := exec.Command(bin).Output()
	if errors.Is(err, unix.ENOEXEC) {
		t.Skip("the kernel lacks IA32_EMULATION")
	} else if err != nil {
		t.Fatal(err)
	}
	free := answers(t, string(out))
	if free["socketcall-inet"] != 0 || free["socket-inet"] != 0 {
		t.Fatalf("without a filter: %v", free)
	}
	got := startHelper(t, bin)
	for name, want := range map[string]syscall.Errno{
		"socket-inet": 0, "socket-vsock": unix.EPERM, "socketcall-inet": unix.EPERM, "socketcall-vsock": unix.EPERM,
		"nr-600": unix.ENOSYS, "keyctl": unix.EPERM,
	} {
		if e, ok := got[name]; !ok || syscall.Errno(e) != want {
			t.Errorf("%s: %v, want %v", name, syscall.Errno(e), want)
		}
	}
}
