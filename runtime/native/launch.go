package native

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"os"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/failpoint"
	"github.com/naru-project/naru/internal/sys"
	"github.com/naru-project/naru/runtime/plan"
)

// launch is a plan under construction with the files of its slots.
type launch struct {
	*plan.Builder
	files []*os.File
	clone plan.Clone
	// twoStage: the plan clones again; the process is that second child.
	twoStage bool
	// made are the file systems whose descriptors the ready record tells, in order.
	made []string
}

func newLaunch(status *os.File) *launch {
	return &launch{Builder: plan.New("status"), files: []*os.File{status}, clone: plan.Clone{Cgroup: -1}}
}

// slot gives f the next slot.
func (l *launch) slot(name string, f *os.File) plan.Arg {
	l.files = append(l.files, f)
	return plan.Slot(l.AddSlot(name))
}

// process is what the last part of every plan needs, start and exec alike. It
// is pure data, taken from an OCI spec.
type process struct {
	path        string // of the program; empty = what its first argument means
	args, env   []string
	cwd         string
	user        specs.User
	caps        capabilities
	noNewPrivs  bool
	rlimits     []specs.POSIXRlimit
	oomScoreAdj *int
	umask       uint32
	filter      []byte // sock_filter array, nil = none
	filterFlags uint32
	apparmor    string
	selinux     string
	terminal    bool
	keyring     string // name of the session keyring
}

// capabilities as bit masks.
type capabilities struct{ bounding, permitted, effective, ambient uint64 }

const lastCapWord = 63

// joinCgroups adds the writes by which the child puts itself into the v1
// hierarchies: "0" into each opened tasks file, never a pid into cgroup.procs
// (that waits for an RCU grace period).
func (l *launch) joinCgroups(tasks []*os.File) {
	if len(tasks) == 0 {
		return
	}
	zero := l.Data([]byte("0"))
	for _, f := range tasks {
		l.Sys(plan.StageCgroup, unix.SYS_WRITE, l.slot("tasks", f), plan.Ptr(zero), plan.Int(1)).Expect(1)
	}
}

// setOOMScoreAdj writes the child's own oom_score_adj through the host's
// procfs, while it may still be lowered.
func (l *launch) setOOMScoreAdj(proc plan.Arg, v *int) {
	if v == nil {
		return
	}
	s := itoa(*v)
	fd := l.Sys(plan.StageOOMScore, unix.SYS_OPENAT, proc, plan.Ptr(l.Str("self/oom_score_adj")), plan.Int(unix.O_WRONLY|unix.O_CLOEXEC))
	// EACCES: lower than what it inherited, without CAP_SYS_RESOURCE. The
	// caller has clamped the value; what is left is a race that costs nothing.
	l.Sys(plan.StageOOMScore, unix.SYS_WRITE, fd.Result(), plan.Ptr(l.Str(s)), plan.Int(len(s))).MayFail(unix.EACCES)
	l.Sys(plan.StageOOMScore, unix.SYS_CLOSE, fd.Result())
}

// becomeRoot makes the child uid and gid 0 of the user namespace it has joined.
func (l *launch) becomeRoot() {
	l.Sys(plan.StageUserNamespace, unix.SYS_SETGROUPS, plan.Int(0), plan.Ptr(0)).MayFail(unix.EPERM)
	l.Sys(plan.StageUserNamespace, unix.SYS_SETRESGID, plan.Int(0), plan.Int(0), plan.Int(0))
	l.Sys(plan.StageUserNamespace, unix.SYS_SETRESUID, plan.Int(0), plan.Int(0), plan.Int(0))
}

// stdio puts the three files on 0, 1 and 2.
func (l *launch) stdio(in, out, err plan.Arg) {
	for i, a := range []plan.Arg{in, out, err} {
		l.Sys(plan.StageStdio, unix.SYS_DUP3, a, plan.Int(i), plan.Int(0))
	}
}

// schedule makes the child an ordinary process for the scheduler: policy, nice
// value, time slice, reset-on-fork. It comes first of all: within a user
// namespace a priority cannot be raised any more, and a real-time process is
// not let into a v1 cpu cgroup without a real-time budget.
func (l *launch) schedule() {
	attr := make([]byte, 48) // struct sched_attr, SCHED_ATTR_SIZE_VER0; SCHED_OTHER and nice 0 are zero
	binary.LittleEndian.PutUint32(attr, uint32(len(attr)))
	// EPERM: a priority to be raised, without CAP_SYS_NICE.
	l.Sys(plan.StageAttributes, unix.SYS_SCHED_SETATTR, plan.Int(0), plan.Ptr(l.Data(attr)), plan.Int(0)).MayFail(unix.EPERM)
}

// maxCPUs is the largest CONFIG_NR_CPUS.
const maxCPUs = 8192

// inheritance resets everything that a process hands down without being asked:
// limits, signal dispositions, umask, CPUs, IO priority, timer slack, memory
// policies, personality, securebits, keyring; dumpability stays off until
// execve. schedule has done the rest.
func (l *launch) inheritance(p *process) {
	for _, r := range p.rlimits {
		b := make([]byte, 16)
		binary.LittleEndian.PutUint64(b, r.Soft)
		binary.LittleEndian.PutUint64(b[8:], r.Hard)
		res, ok := rlimitNumbers[r.Type]
		if !ok {
			continue // the spec builder knows the names
		}
		// EPERM: raising a hard limit without CAP_SYS_RESOURCE; the limit stays lower.
		l.Sys(plan.StageRlimits, unix.SYS_PRLIMIT64, plan.Int(0), plan.Int(res), plan.Ptr(l.Data(b)), plan.Int(0)).MayFail(unix.EPERM)
	}
	// SIG_DFL for all: CLONE_CLEAR_SIGHAND leaves ignored signals ignored.
	dfl := l.Data(make([]byte, 32)) // struct kernel_sigaction, all zero
	for sig := 1; sig <= 64; sig++ {
		if sig != int(unix.SIGKILL) && sig != int(unix.SIGSTOP) {
			l.Sys(plan.StageSignals, unix.SYS_RT_SIGACTION, plan.Int(sig), plan.Ptr(dfl), plan.Int(0), plan.Int(8))
		}
	}
	l.Sys(plan.StageAttributes, unix.SYS_UMASK, plan.Int(p.umask))
	// All CPUs: the kernel takes those of them that the cgroup allows, now and
	// when that changes.
	l.Sys(plan.StageAttributes, unix.SYS_SCHED_SETAFFINITY, plan.Int(0), plan.Int(maxCPUs/8), plan.Ptr(l.Data(bytes.Repeat([]byte{0xff}, maxCPUs/8))))
	l.Sys(plan.StageAttributes, unix.SYS_IOPRIO_SET, plan.Int(1), plan.Int(0), plan.Int(0)).MayFail()
	l.Sys(plan.StageAttributes, unix.SYS_PRCTL, plan.Int(unix.PR_SET_TIMERSLACK), plan.Int(sys.DefaultTimerSlack), plan.Int(0), plan.Int(0), plan.Int(0))
	// NUMA policy, huge pages and samepage merging; a kernel may lack each.
	l.Sys(plan.StageAttributes, unix.SYS_SET_MEMPOLICY, plan.Int(unix.MPOL_DEFAULT), plan.Int(0), plan.Int(0)).MayFail()
	l.Sys(plan.StageAttributes, unix.SYS_PRCTL, plan.Int(unix.PR_SET_THP_DISABLE), plan.Int(0), plan.Int(0), plan.Int(0), plan.Int(0)).MayFail()
	l.Sys(plan.StageAttributes, unix.SYS_PRCTL, plan.Int(unix.PR_SET_MEMORY_MERGE), plan.Int(0), plan.Int(0), plan.Int(0), plan.Int(0)).MayFail()
	l.Sys(plan.StageAttributes, unix.SYS_PERSONALITY, plan.Int(0))
	l.Sys(plan.StageAttributes, unix.SYS_PRCTL, plan.Int(unix.PR_SET_SECUREBITS), plan.Int(0), plan.Int(0), plan.Int(0), plan.Int(0)).MayFail(unix.EPERM)
	if p.keyring != "" {
		// A session keyring of its own; a kernel without keyrings says ENOSYS,
		// a user over its quota EDQUOT.
		l.Sys(plan.StageKeyring, unix.SYS_KEYCTL, plan.Int(unix.KEYCTL_JOIN_SESSION_KEYRING), plan.Ptr(l.Str(p.keyring))).MayFail(unix.ENOSYS, unix.EDQUOT, unix.EPERM)
	}
}

// workdir enters the working directory and checks that it lies inside: getcwd
// says "(unreachable)…" otherwise.
func (l *launch) workdir(p *process) {
	l.Sys(plan.StageWorkdir, unix.SYS_CHDIR, plan.Ptr(l.Str(p.cwd)))
	buf := l.Data(make([]byte, 4096))
	l.Sys(plan.StageWorkdir, unix.SYS_GETCWD, plan.Ptr(buf), plan.Int(4096))
	// chdir(getcwd()) fails with ENOENT when getcwd was not absolute, for then
	// it names nothing below the directory.
	l.Sys(plan.StageWorkdir, unix.SYS_CHDIR, plan.Ptr(buf))
}

// identity drops privileges to those of the container, but for CAP_SYS_ADMIN
// where the seccomp filter needs it (no_new_privs off); execve drops that one
// for any uid but 0, and the bounding set for uid 0.
func (l *launch) identity(p *process) {
	for c := 0; c <= lastCapWord; c++ {
		if p.caps.bounding&(1<<c) == 0 {
			// EINVAL: past the kernel's last capability.
			l.Sys(plan.StageCapabilities, unix.SYS_PRCTL, plan.Int(unix.PR_CAPBSET_DROP), plan.Int(c), plan.Int(0), plan.Int(0), plan.Int(0)).MayFail(unix.EINVAL)
		}
	}
	groups := make([]byte, 4*len(p.user.AdditionalGids))
	for i, g := range p.user.AdditionalGids {
		binary.LittleEndian.PutUint32(groups[4*i:], g)
	}
	var ref plan.Ref
	if len(groups) > 0 {
		ref = l.Data(groups)
	}
	uid, gid := plan.Int(p.user.UID), plan.Int(p.user.GID)
	l.Sys(plan.StageUser, unix.SYS_SETGROUPS, plan.Int(len(p.user.AdditionalGids)), plan.Ptr(ref))
	l.Sys(plan.StageUser, unix.SYS_SETRESGID, gid, gid, gid)
	l.Sys(plan.StageUser, unix.SYS_PRCTL, plan.Int(unix.PR_SET_KEEPCAPS), plan.Int(1), plan.Int(0), plan.Int(0), plan.Int(0))
	l.Sys(plan.StageUser, unix.SYS_SETRESUID, uid, uid, uid)
	l.Sys(plan.StageUser, unix.SYS_PRCTL, plan.Int(unix.PR_SET_KEEPCAPS), plan.Int(0), plan.Int(0), plan.Int(0), plan.Int(0))
	// A uid of 2^32-1 would have made setresuid do nothing: look what it is now.
	l.Sys(plan.StageUser, unix.SYS_GETEUID).Expect(int64(p.user.UID))
	l.Sys(plan.StageUser, unix.SYS_GETGID).Expect(int64(p.user.GID))

	caps := p.caps
	if p.filter != nil && !p.noNewPrivs {
		caps.permitted |= 1 << unix.CAP_SYS_ADMIN
		caps.effective |= 1 << unix.CAP_SYS_ADMIN
	}
	hdr := make([]byte, 8)
	binary.LittleEndian.PutUint32(hdr, unix.LINUX_CAPABILITY_VERSION_3)
	data := make([]byte, 24)
	for w := 0; w < 2; w++ {
		binary.LittleEndian.PutUint32(data[12*w:], uint32(caps.effective>>(32*w)))
		binary.LittleEndian.PutUint32(data[12*w+4:], uint32(caps.permitted>>(32*w)))
		binary.LittleEndian.PutUint32(data[12*w+8:], uint32(caps.ambient>>(32*w))) // inheritable: what ambient needs, else none
	}
	l.Sys(plan.StageCapabilities, unix.SYS_CAPSET, plan.Ptr(l.Data(hdr)), plan.Ptr(l.Data(data)))
	l.Sys(plan.StageCapabilities, unix.SYS_PRCTL, plan.Int(unix.PR_CAP_AMBIENT), plan.Int(unix.PR_CAP_AMBIENT_CLEAR_ALL), plan.Int(0), plan.Int(0), plan.Int(0))
	for c := 0; c <= lastCapWord; c++ {
		if caps.ambient&(1<<c) != 0 {
			l.Sys(plan.StageCapabilities, unix.SYS_PRCTL, plan.Int(unix.PR_CAP_AMBIENT), plan.Int(unix.PR_CAP_AMBIENT_RAISE), plan.Int(c), plan.Int(0), plan.Int(0))
		}
	}
	if p.noNewPrivs {
		l.Sys(plan.StageNoNewPrivs, unix.SYS_PRCTL, plan.Int(unix.PR_SET_NO_NEW_PRIVS), plan.Int(1), plan.Int(0), plan.Int(0), plan.Int(0))
	}
}

// closeFiles leaves the child nothing but its standard streams, the status pipe
// and, where one is given, its start gate: those two move to 3 and 4.
func (l *launch) closeFiles(gate ...int) {
	slots := append([]int{0}, gate...)
	moved := make([]*plan.Op, len(slots))
	for i, s := range slots {
		// Out of the way first: the target numbers may be taken by each other.
		moved[i] = l.Sys(plan.StageFDs, unix.SYS_FCNTL, plan.Slot(s), plan.Int(unix.F_DUPFD_CLOEXEC), plan.Int(3+len(slots)))
	}
	for i, s := range slots {
		l.Sys(plan.StageFDs, unix.SYS_DUP3, moved[i].Result(), plan.Int(3+i), plan.Int(unix.O_CLOEXEC)).Reslot(s)
	}
	l.Sys(plan.StageFDs, unix.SYS_CLOSE_RANGE, plan.Int(3+len(slots)), plan.Int(^uint32(0)), plan.Int(0))
}

// session makes the child the leader of a session and, with a terminal, of the
// terminal on its standard input.
func (l *launch) session(p *process) {
	l.Sys(plan.StageSession, unix.SYS_SETSID)
	if p.terminal {
		l.Sys(plan.StageTerminal, unix.SYS_IOCTL, plan.Int(0), plan.Int(unix.TIOCSCTTY), plan.Int(0))
	}
}

// label asks the kernel for the LSM label that execve shall set.
func (l *launch) label(proc plan.Arg, p *process) {
	write := func(file, value string) {
		fd := l.Sys(plan.StageLSM, unix.SYS_OPENAT, proc, plan.Ptr(l.Str(file)), plan.Int(unix.O_WRONLY|unix.O_CLOEXEC))
		l.Sys(plan.StageLSM, unix.SYS_WRITE, fd.Result(), plan.Ptr(l.Str(value)), plan.Int(len(value))).Expect(int64(len(value)))
		l.Sys(plan.StageLSM, unix.SYS_CLOSE, fd.Result())
	}
	if p.apparmor != "" {
		write("thread-self/attr/apparmor/exec", "exec "+p.apparmor)
	}
	if p.selinux != "" {
		write("thread-self/attr/exec", p.selinux)
	}
}

// execute adds the last steps. Between the filter and execve nothing but the
// execve attempts, and on failure write and exit_group, is called: a profile
// may forbid anything else.
func (l *launch) execute(p *process) {
	l.Sys(plan.StageSignals, unix.SYS_RT_SIGPROCMASK, plan.Int(unix.SIG_SETMASK), plan.Ptr(l.Data(make([]byte, 8))), plan.Int(0), plan.Int(8))
	argv, envp := l.Strs(p.args), l.Strs(p.env)
	var paths []plan.Ref
	for _, c := range candidates(cmp.Or(p.path, p.args[0]), p.env) {
		paths = append(paths, l.Str(c))
	}
	if p.filter != nil {
		prog := l.Data(make([]byte, 16)) // struct sock_fprog
		l.PutUint16(prog, uint16(len(p.filter)/8))
		l.SetPtr(prog, 8, l.Data(p.filter))
		l.Sys(plan.StageSeccomp, unix.SYS_SECCOMP, plan.Int(unix.SECCOMP_SET_MODE_FILTER), plan.Int(p.filterFlags), plan.Ptr(prog))
	}
	for i, c := range paths {
		o := l.Sys(plan.StageExec, unix.SYS_EXECVE, plan.Ptr(c), plan.Ptr(argv), plan.Ptr(envp))
		if i+1 < len(paths) {
			o.MayFail(unix.ENOENT, unix.ENOTDIR, unix.EACCES, unix.ELOOP)
		}
	}
}

// candidates lists the files that a command may mean, in the order of PATH,
// as execvp(3) does: only a name without a slash is searched for.
func candidates(name string, env []string) []string {
	if strings.Contains(name, "/") {
		return []string{name}
	}
	search := "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	for _, e := range env {
		if v, ok := strings.CutPrefix(e, "PATH="); ok {
			search = v
		}
	}
	var out []string
	for d := range strings.SplitSeq(search, ":") {
		if strings.HasPrefix(d, "/") { // relative entries would depend on the working directory
			out = append(out, strings.TrimSuffix(d, "/")+"/"+name)
		}
	}
	if len(out) == 0 {
		out = []string{"/" + name}
	}
	return out
}

// memfd seals the plan, checking what the kernel would only say as E2BIG. Each
// of its operations is a failpoint.
func (l *launch) memfd(kind string) (*os.File, error) {
	if failpoint.Built {
		l.Sabotage(func(op string) bool { return failpoint.Hit("plan", kind, op) != nil })
	}
	f, err := l.Memfd()
	if err != nil {
		return nil, errs.New(errs.Of(err), "write the plan: %w", err)
	}
	return f, nil
}

var rlimitNumbers = map[string]int{
	"RLIMIT_CPU": unix.RLIMIT_CPU, "RLIMIT_FSIZE": unix.RLIMIT_FSIZE, "RLIMIT_DATA": unix.RLIMIT_DATA,
	"RLIMIT_STACK": unix.RLIMIT_STACK, "RLIMIT_CORE": unix.RLIMIT_CORE, "RLIMIT_RSS": unix.RLIMIT_RSS,
	"RLIMIT_NPROC": unix.RLIMIT_NPROC, "RLIMIT_NOFILE": unix.RLIMIT_NOFILE, "RLIMIT_MEMLOCK": unix.RLIMIT_MEMLOCK,
	"RLIMIT_AS": unix.RLIMIT_AS, "RLIMIT_LOCKS": unix.RLIMIT_LOCKS, "RLIMIT_SIGPENDING": unix.RLIMIT_SIGPENDING,
	"RLIMIT_MSGQUEUE": unix.RLIMIT_MSGQUEUE, "RLIMIT_NICE": unix.RLIMIT_NICE, "RLIMIT_RTPRIO": unix.RLIMIT_RTPRIO,
	"RLIMIT_RTTIME": unix.RLIMIT_RTTIME,
}
