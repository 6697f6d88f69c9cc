package doctor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// release reads "6.1.0-18-amd64" as 6, 1.
func release(s string) (major, minor int, ok bool) {
	a, rest, _ := strings.Cut(s, ".")
	b := rest
	if i := strings.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' }); i >= 0 {
		b = rest[:i]
	}
	major, err1 := strconv.Atoi(a)
	minor, err2 := strconv.Atoi(b)
	return major, minor, err1 == nil && err2 == nil
}

func uname() (string, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", err
	}
	return unix.ByteSliceToString(u.Release[:]), nil
}

func checkKernel(context.Context, *Config) []Result {
	text, err := uname()
	if err != nil {
		return result("kernel", Warn, "uname: "+err.Error(), "")
	}
	return judgeKernel(text)
}

func judgeKernel(text string) []Result {
	major, minor, good := release(text)
	at := func(a, b int) bool { return major > a || (major == a && minor >= b) }
	switch {
	case !good:
		return result("kernel", Warn, text+": cannot be read as a version", "")
	case !at(5, 14):
		return result("kernel", Fail, text, "5.14 is the oldest kernel that has all that Naru needs; 6.1 and newer are supported")
	case !at(6, 1):
		return result("kernel", Warn, text, "kernels before 6.1 are not tested: expect clear errors at best")
	}
	return ok("kernel", "%s", text)
}

// call is one system call, made so that it must fail, and the errors that prove
// that the kernel knows it.
type call struct {
	name string
	want []unix.Errno
	try  func() unix.Errno
}

// cloneArgs is struct clone_args (linux/sched.h).
type cloneArgs struct {
	flags, pidfd, childTID, parentTID, exitSignal, stack, stackSize, tls, setTID, setTIDSize, cgroup uint64
}

const badFd = 1 << 30 // no process has so many

func calls() []call {
	return []call{
		{"openat2", []unix.Errno{unix.EBADF}, func() unix.Errno {
			_, err := unix.Openat2(badFd, "x", &unix.OpenHow{Flags: unix.O_PATH, Resolve: unix.RESOLVE_IN_ROOT})
			return errno(err)
		}},
		{"clone3", []unix.Errno{unix.EINVAL}, func() unix.Errno {
			_, _, e := unix.RawSyscall(unix.SYS_CLONE3, 0, 0, 0)
			return e
		}},
		{"clone3 into a cgroup", []unix.Errno{unix.EBADF}, func() unix.Errno {
			// The descriptor is not open, so that no child is ever made.
			a := cloneArgs{flags: unix.CLONE_INTO_CGROUP, cgroup: badFd}
			_, _, e := unix.RawSyscall(unix.SYS_CLONE3, uintptr(unsafe.Pointer(&a)), unsafe.Sizeof(a), 0)
			return e
		}},
		{"pidfd_open", []unix.Errno{unix.EINVAL}, func() unix.Errno { _, err := unix.PidfdOpen(-1, 0); return errno(err) }},
		{"pidfd_getfd", []unix.Errno{unix.EBADF}, func() unix.Errno { _, err := unix.PidfdGetfd(badFd, 0, 0); return errno(err) }},
		{"mount_setattr", []unix.Errno{unix.EBADF, unix.EINVAL, unix.ENOENT}, func() unix.Errno {
			return errno(unix.MountSetattr(badFd, "x", 0, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}))
		}},
		{"open_tree", []unix.Errno{unix.EBADF}, func() unix.Errno { _, err := unix.OpenTree(badFd, "x", 0); return errno(err) }},
		{"move_mount", []unix.Errno{unix.EBADF}, func() unix.Errno { return errno(unix.MoveMount(badFd, "x", badFd, "y", 0)) }},
		{"close_range", []unix.Errno{unix.EINVAL}, func() unix.Errno { return errno(unix.CloseRange(2, 1, 0)) }},
	}
}

func errno(err error) unix.Errno {
	var e unix.Errno
	if errors.As(err, &e) {
		return e
	}
	return 0
}

func checkCalls(context.Context, *Config) []Result {
	var missing, known []string
	for _, c := range calls() {
		e := c.try()
		found := false
		for _, w := range c.want {
			found = found || e == w
		}
		switch {
		case found:
			known = append(known, c.name)
		case errors.Is(e, unix.EPERM) || errors.Is(e, unix.EACCES):
			missing = append(missing, c.name+" (forbidden: "+e.Error()+")")
		default:
			missing = append(missing, fmt.Sprintf("%s (%v)", c.name, e))
		}
	}
	var out []Result
	if len(missing) > 0 {
		out = result("system calls", Fail, "missing: "+strings.Join(missing, ", "),
			"no container can be started without them; does a seccomp filter of the place where naru runs forbid them?")
	} else {
		out = ok("system calls", "%s", strings.Join(known, ", "))
	}
	return append(out, checkPidfdInfo())
}

// checkPidfdInfo tells from the mask of a living process whether the kernel can
// tell a dead one's exit code (PIDFD_GET_INFO, kernel 6.13; exit codes, 6.15).
func checkPidfdInfo() Result {
	r := Result{Name: "pidfd info", Status: OK, Detail: "exit codes survive the death of naru-monitor's keeper"}
	fd, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		return Result{Name: "pidfd info", Status: Warn, Detail: "pidfd_open: " + err.Error()}
	}
	defer func() { _ = unix.Close(fd) }()
	info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_EXIT}
	if err := unix.IoctlPidfdInfo(fd, &info); err != nil && !errors.Is(err, unix.ESRCH) {
		r.Detail = "not there (kernel 6.15): the exit code of a container that ends while naru-monitor's keeper is dead is reported as unknown"
	}
	return r
}

// needed capabilities, and what is lost without each.
var needed = []struct {
	bit    int
	name   string
	status Status
	why    string
}{
	{unix.CAP_SYS_ADMIN, "CAP_SYS_ADMIN", Fail, "namespaces and mounts"},
	{unix.CAP_NET_ADMIN, "CAP_NET_ADMIN", Fail, "the pod network"},
	{unix.CAP_SYS_PTRACE, "CAP_SYS_PTRACE", Fail, "fetching descriptors of starting containers"},
	{unix.CAP_SYS_CHROOT, "CAP_SYS_CHROOT", Fail, "entering mount namespaces"},
	{unix.CAP_SETUID, "CAP_SETUID", Fail, "users of containers"},
	{unix.CAP_SETGID, "CAP_SETGID", Fail, "groups of containers"},
	{unix.CAP_SETPCAP, "CAP_SETPCAP", Fail, "dropping capabilities"},
	{unix.CAP_CHOWN, "CAP_CHOWN", Fail, "unpacking images"},
	{unix.CAP_DAC_OVERRIDE, "CAP_DAC_OVERRIDE", Fail, "unpacking images"},
	{unix.CAP_FOWNER, "CAP_FOWNER", Fail, "unpacking images"},
	{unix.CAP_FSETID, "CAP_FSETID", Fail, "unpacking images"},
	{unix.CAP_MKNOD, "CAP_MKNOD", Fail, "devices and whiteouts"},
	{unix.CAP_SETFCAP, "CAP_SETFCAP", Fail, "file capabilities in images, user namespaces"},
	{unix.CAP_KILL, "CAP_KILL", Fail, "stopping containers"},
	{unix.CAP_SYS_RESOURCE, "CAP_SYS_RESOURCE", Warn, "oom_score_adj of a container cannot be set below naru's own, nor a hard limit above it"},
	{unix.CAP_NET_RAW, "CAP_NET_RAW", Warn, "containers lose ping"},
	{unix.CAP_AUDIT_WRITE, "CAP_AUDIT_WRITE", Warn, "containers lose a default capability"},
	{unix.CAP_SYS_NICE, "CAP_SYS_NICE", Warn, "priorities cannot be reset"},
}

func checkPrivileges(context.Context, *Config) []Result {
	if os.Geteuid() != 0 {
		return result("privileges", Fail, fmt.Sprintf("uid %d", os.Geteuid()), "naru needs root; several checks here do too")
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return result("privileges", Warn, "capget: "+err.Error(), "")
	}
	return judgeCaps(uint64(data[1].Effective)<<32 | uint64(data[0].Effective))
}

func judgeCaps(have uint64) []Result {
	var out []Result
	for _, c := range needed {
		if have&(1<<c.bit) == 0 {
			out = append(out, Result{Name: "privileges", Status: c.status, Detail: "without " + c.name, Follows: c.why})
		}
	}
	if out == nil {
		out = ok("privileges", "root with all needed capabilities")
	}
	return out
}

func checkSeccomp(context.Context, *Config) []Result {
	action := uint32(unix.SECCOMP_RET_ERRNO)
	_, _, e := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_GET_ACTION_AVAIL, 0, uintptr(unsafe.Pointer(&action)))
	if e != 0 {
		return result("seccomp", Fail, "filters: "+e.Error(), "the kernel lacks CONFIG_SECCOMP_FILTER; every container has a filter unless it asks for none")
	}
	return ok("seccomp", "filters are there")
}

// checkClock: certificates and tokens need the right time.
func checkClock(context.Context, *Config) []Result {
	var tx unix.Timex
	state, err := unix.Adjtimex(&tx)
	if err != nil {
		return result("clock", Warn, "adjtimex: "+err.Error(), "")
	}
	if tx.Time.Sec < 1735689600 { // 2025
		return result("clock", Fail, "the clock is before 2025", "registries' certificates are not valid yet: set the time")
	}
	if state == unix.TIME_ERROR || tx.Status&unix.STA_UNSYNC != 0 {
		return result("clock", Warn, "no time source keeps the clock", "certificates and logs depend on it: run an NTP client (chrony, systemd-timesyncd)")
	}
	return ok("clock", "synchronised")
}
