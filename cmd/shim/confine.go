package main

import (
	"context"
	"errors"
	"os"
	goruntime "runtime"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/sys"
	"github.com/naru-project/naru/runtime/seccomp"
)

// droppedCapabilities are those that the daemon never needs. What it keeps
// beside the obvious: everything about files, because an overlay acts with the
// credentials of who mounted it (a privileged container's chattr needs the
// daemon's CAP_LINUX_IMMUTABLE), and CAP_SYS_NICE, without which the kernel lets
// nobody move a process with more capabilities than its own between cpusets.
const droppedCapabilities uint64 = 1<<unix.CAP_SYS_MODULE | 1<<unix.CAP_SYS_RAWIO | 1<<unix.CAP_SYS_BOOT | 1<<unix.CAP_SYS_TIME |
	1<<unix.CAP_SYS_PACCT | 1<<unix.CAP_SYS_TTY_CONFIG | 1<<unix.CAP_SYSLOG | 1<<unix.CAP_WAKE_ALARM | 1<<unix.CAP_BLOCK_SUSPEND |
	1<<unix.CAP_AUDIT_CONTROL | 1<<unix.CAP_AUDIT_READ | 1<<unix.CAP_AUDIT_WRITE | 1<<unix.CAP_NET_BROADCAST |
	1<<unix.CAP_IPC_LOCK | 1<<unix.CAP_IPC_OWNER | 1<<unix.CAP_PERFMON | 1<<unix.CAP_CHECKPOINT_RESTORE

// deniedCalls are what no daemon of a node needs. It executes no program: all
// processes come from the monitor's worker.
var deniedCalls = []string{
	"execve", "execveat", "ptrace", "process_vm_readv", "process_vm_writev", "kcmp",
	"init_module", "finit_module", "delete_module", "create_module", "query_module", "get_kernel_syms",
	"kexec_load", "kexec_file_load", "reboot",
	"settimeofday", "stime", "clock_settime", "clock_settime64", "adjtimex", "clock_adjtime", "clock_adjtime64",
	"iopl", "ioperm", "modify_ldt", "vm86", "vm86old",
	"swapon", "swapoff", "acct", "quotactl", "quotactl_fd", "syslog", "vhangup",
	"perf_event_open", "userfaultfd", "io_uring_setup", "io_uring_enter", "io_uring_register",
	"add_key", "request_key", "keyctl", "lookup_dcookie", "fanotify_init",
	"uselib", "ustat", "sysfs", "_sysctl", "nfsservctl", "personality", "move_pages", "migrate_pages", "mbind", "set_mempolicy",
}

// ownFilter is the daemon's own seccomp profile: a list of what is refused. A
// list of what is allowed would be narrower, and end the node's runtime the day
// the Go runtime makes a call that is not on it.
func ownFilter() *specs.LinuxSeccomp {
	p := &specs.LinuxSeccomp{
		DefaultAction: specs.ActAllow,
		// Without it, kernels before 5.16 slow down every branch of a filtered
		// process. The daemon runs nobody else's code.
		Flags: []specs.LinuxSeccompFlag{specs.LinuxSeccompFlagSpecAllow},
	}
	p.Syscalls = append(p.Syscalls, specs.LinuxSyscall{Names: deniedCalls, Action: specs.ActErrno})
	// bpf(2) is there for the device filters of cgroup v2, and for nothing else.
	p.Syscalls = append(p.Syscalls, specs.LinuxSyscall{Names: []string{"bpf"}, Action: specs.ActErrno, Args: []specs.LinuxSeccompArg{
		{Index: 0, Op: specs.OpNotEqual, Value: unix.BPF_PROG_LOAD}, {Index: 0, Op: specs.OpNotEqual, Value: unix.BPF_PROG_ATTACH},
	}})
	return p
}

// confine gives up for good what the daemon does not need. The monitor is
// reached, or started with everything, before; from here on nothing that comes
// from this process can have more.
func confine(context.Context) error {
	if err := sys.DropCapabilities(droppedCapabilities); err != nil {
		return errs.New(errs.Internal, "%w", err)
	}
	filter, flags, err := seccomp.Compile(ownFilter(), goruntime.GOARCH, seccomp.Options{})
	if err != nil {
		return err
	}
	err = sys.LoadFilter(filter, flags)
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EINVAL) {
		klog.InfoS("The kernel takes no seccomp filter; the daemon runs without one of its own", "err", err)
		return nil
	}
	return errs.Wrap(errs.Internal, err)
}

// shield makes the daemon one of the last to be killed for memory, and with it
// the monitor that it may start.
func shield(context.Context) error {
	// Without CAP_SYS_RESOURCE a value below the inherited one is refused.
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-999"), 0); err != nil && !errors.Is(err, os.ErrPermission) {
		return errs.New(errs.Internal, "set the own oom_score_adj: %w", err)
	}
	return nil
}
