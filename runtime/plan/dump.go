package plan

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// names of the system calls that plans make, the same on every architecture.
var names = map[uint32]string{
	unix.SYS_CAPSET: "capset", unix.SYS_CHDIR: "chdir", unix.SYS_CLONE3: "clone3", unix.SYS_CLOSE: "close",
	unix.SYS_CLOSE_RANGE: "close_range", unix.SYS_DUP3: "dup3", unix.SYS_EXECVE: "execve", unix.SYS_EXECVEAT: "execveat",
	unix.SYS_EXIT_GROUP: "exit_group", unix.SYS_FCHDIR: "fchdir", unix.SYS_FCNTL: "fcntl", unix.SYS_FSCONFIG: "fsconfig", unix.SYS_FSMOUNT: "fsmount",
	unix.SYS_FSOPEN: "fsopen", unix.SYS_GETCWD: "getcwd", unix.SYS_GETPID: "getpid", unix.SYS_IOCTL: "ioctl",
	unix.SYS_IOPRIO_SET: "ioprio_set", unix.SYS_KEYCTL: "keyctl", unix.SYS_MOUNT: "mount", unix.SYS_OPENAT: "openat",
	unix.SYS_PERSONALITY: "personality", unix.SYS_PRCTL: "prctl", unix.SYS_PRLIMIT64: "prlimit64", unix.SYS_READ: "read",
	unix.SYS_RT_SIGACTION: "rt_sigaction", unix.SYS_RT_SIGPROCMASK: "rt_sigprocmask", unix.SYS_SCHED_SETAFFINITY: "sched_setaffinity",
	unix.SYS_SCHED_SETATTR: "sched_setattr", unix.SYS_SET_MEMPOLICY: "set_mempolicy", unix.SYS_SECCOMP: "seccomp", unix.SYS_SETDOMAINNAME: "setdomainname",
	unix.SYS_SETGROUPS: "setgroups", unix.SYS_SETHOSTNAME: "sethostname", unix.SYS_SETNS: "setns",
	unix.SYS_SETRESGID: "setresgid", unix.SYS_SETRESUID: "setresuid", unix.SYS_SETSID: "setsid", unix.SYS_SETPGID: "setpgid", unix.SYS_UMASK: "umask",
	unix.SYS_UNSHARE: "unshare", unix.SYS_WRITE: "write", unix.SYS_GETRESUID: "getresuid", unix.SYS_OPENAT2: "openat2", unix.SYS_PIPE2: "pipe2",
	unix.SYS_GETUID: "getuid", unix.SYS_GETGID: "getgid", unix.SYS_GETEUID: "geteuid",
}

// Dump prints the plan, one operation a line, for golden tests and people.
// Strings of the environment are not shown.
func (b *Builder) Dump() string {
	var s strings.Builder
	for i, n := range b.slots {
		fmt.Fprintf(&s, "slot %d: %s\n", i, n)
	}
	for i, o := range b.ops {
		fmt.Fprintf(&s, "%3d %-24s %s(%s)%s\n", i, Stage(o.o.stage), callName(o.o.nr), b.dumpArgs(o), o.suffix())
	}
	return s.String()
}

func callName(nr uint32) string {
	if n, ok := names[nr]; ok {
		return n
	}
	return fmt.Sprintf("syscall_%d", nr)
}

func (b *Builder) dumpArgs(o *Op) string {
	last := 5
	for last >= 0 && o.o.kind[last] == argImm && o.o.args[last] == 0 {
		last--
	}
	var parts []string
	for j := 0; j <= last; j++ {
		v := o.o.args[j]
		switch o.o.kind[j] {
		case argImm:
			if int64(v) < 0 {
				parts = append(parts, fmt.Sprint(int64(v)))
			} else {
				parts = append(parts, fmt.Sprintf("%#x", v))
			}
		case argPtr:
			if str, ok := b.strs[Ref(v)]; ok {
				parts = append(parts, fmt.Sprintf("%q", str))
			} else {
				parts = append(parts, "data")
			}
		case argLoad:
			parts = append(parts, "*data")
		case argSlot:
			parts = append(parts, fmt.Sprintf("<%s>", b.slots[v]))
		case argResult:
			parts = append(parts, fmt.Sprintf("result(%d)", v))
		}
	}
	return strings.Join(parts, ", ")
}

func (o *Op) suffix() string {
	var s string
	if o.o.flags&flagMayFail != 0 {
		s += " may fail"
		for _, e := range o.o.allow {
			if e != 0 {
				s += " " + unix.ErrnoName(unix.Errno(e))
			}
		}
	}
	if o.o.flags&flagExpect != 0 {
		s += fmt.Sprintf(" = %d", o.o.expect)
	}
	if o.o.flags&(flagStore4|flagStore8) != 0 {
		s += " stored"
	}
	if o.o.flags&flagJumpPos != 0 {
		s += fmt.Sprintf(" if > 0 goto %d", o.o.jump)
	}
	if o.o.flags&flagReslot != 0 {
		s += fmt.Sprintf(" becomes slot %d", o.o.jump)
	}
	return s
}

// Calls lists the system calls in order.
func (b *Builder) Calls() []string {
	out := make([]string, len(b.ops))
	for i, o := range b.ops {
		out[i] = callName(o.o.nr)
	}
	return out
}
