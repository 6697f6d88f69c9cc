package native

import (
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/runtime/plan"
)

func itoa(v int) string { return strconv.Itoa(v) }

// startFiles are the files that a container's plan refers to. nil = not there.
type startFiles struct {
	status              *os.File
	proc                *os.File   // the host's procfs (our own mount)
	user, net, ipc, uts *os.File   // namespaces to join
	pid                 *os.File   // a PID namespace to join (shared or target)
	tasks               []*os.File // cgroup v1
	cgroup              *os.File   // cgroup v2 folder for CLONE_INTO_CGROUP
	stdin, stdout       *os.File
	stderr              *os.File
	mounts, gate        *os.File // read ends: "mounts are ready", "start"
}

// filesystems that the child makes because only a task inside the namespaces
// can: each is bound to a namespace of its maker.
type filesystem struct {
	name  string
	attrs int
}

var childFilesystems = []filesystem{
	{"proc", unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC},
	{"sysfs", unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC},
	{"mqueue", unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC},
	{"cgroup2", unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC},
}

// startShape says which parts a container's plan has. Pure data.
type startShape struct {
	newPID      bool // a PID namespace of its own
	cgroupNS    bool // a cgroup namespace of its own (cgroup v2)
	filesystems []filesystem
}

// startPlan makes the plan of a container's first process. The order is that
// of the stages in package plan; the reasons stand beside each.
func startPlan(p *process, s startShape, f startFiles) *launch {
	l := newLaunch(f.status)
	proc := l.slot("proc", f.proc)
	in, out, errf := l.slot("stdin", f.stdin), l.slot("stdout", f.stdout), l.slot("stderr", f.stderr)
	gate := l.slot("start gate", f.gate)
	gateSlot := l.Slots() - 1
	l.clone.Parent = true
	l.place(p, s, f, proc)
	l.stdio(in, out, errf)
	l.closeFiles(gateSlot)
	l.inheritance(p)
	l.workdir(p)
	l.identity(p)
	l.session(p)
	l.finish(p, gate)
	return l
}

// builderPlan makes the plan of a helper that makes the namespaces and file
// systems of a container whose first process joins a PID namespace in which
// others live already. It stays outside of that and ends when its mounts gate
// is closed; the first process joins what it made (joinPlan).
func builderPlan(p *process, s startShape, f startFiles) *launch {
	l := newLaunch(f.status)
	proc := l.slot("proc", f.proc)
	l.place(p, s, f, proc)
	l.Sys(plan.StageMounts, unix.SYS_EXIT_GROUP, plan.Int(0))
	return l
}

// place joins cgroups and namespaces, makes the file systems that are bound to
// them, and waits until the daemon has attached all mounts.
func (l *launch) place(p *process, s startShape, f startFiles, proc plan.Arg) {
	mounts := l.slot("mounts gate", f.mounts)
	if f.cgroup != nil {
		l.slot("cgroup", f.cgroup)
		l.clone.Cgroup = l.Slots() - 1
	}
	flags := uint64(unix.CLONE_NEWNS)
	if s.newPID {
		flags |= unix.CLONE_NEWPID
	}
	l.schedule()
	l.joinCgroups(f.tasks)
	l.setOOMScoreAdj(proc, p.oomScoreAdj)
	l.label(proc, p)
	if f.user == nil {
		l.clone.Flags = flags
	} else {
		// A process with threads cannot join a user namespace, this child can.
		// Namespaces made from here on belong to it, so they are made by a
		// second clone.
		l.Sys(plan.StageUserNamespace, unix.SYS_SETNS, l.slot("user", f.user), plan.Int(unix.CLONE_NEWUSER))
		l.becomeRoot()
		l.Clone(flags|unix.CLONE_PARENT, 0)
		l.twoStage = true
	}
	for _, n := range []struct {
		name string
		f    *os.File
		flag int
	}{{"net", f.net, unix.CLONE_NEWNET}, {"ipc", f.ipc, unix.CLONE_NEWIPC}, {"uts", f.uts, unix.CLONE_NEWUTS}} {
		if n.f != nil {
			l.Sys(plan.StageNamespaces, unix.SYS_SETNS, l.slot(n.name, n.f), plan.Int(n.flag))
		}
	}
	if s.cgroupNS {
		// After the cgroup was joined: it becomes the root of the namespace.
		l.Sys(plan.StageNamespaces, unix.SYS_UNSHARE, plan.Int(unix.CLONE_NEWCGROUP))
	}
	l.makeFilesystems(s.filesystems)
	l.await(plan.StageMounts, mounts)
	// The mounts are there and the root has been pivoted under this child.
	l.Sys(plan.StageMounts, unix.SYS_CHDIR, plan.Ptr(l.Str("/")))
}

// finish reports "created", waits for the start and executes.
func (l *launch) finish(p *process, gate plan.Arg) {
	l.Send(plan.StageCreated, l.Record(plan.Record{Kind: plan.KindCreated}))
	l.await(plan.StageGate, gate)
	l.execute(p)
}

// makeFilesystems makes detached mounts and tells their descriptors.
func (l *launch) makeFilesystems(fs []filesystem) {
	rec := l.Record(plan.Record{Kind: plan.KindReady, Value: int64(len(fs))})
	for i, x := range fs {
		fd := l.Sys(plan.StageFilesystems, unix.SYS_FSOPEN, plan.Ptr(l.Str(x.name)), plan.Int(unix.FSOPEN_CLOEXEC))
		l.Sys(plan.StageFilesystems, unix.SYS_FSCONFIG, fd.Result(), plan.Int(unix.FSCONFIG_CMD_CREATE), plan.Int(0), plan.Int(0), plan.Int(0))
		l.Sys(plan.StageFilesystems, unix.SYS_FSMOUNT, fd.Result(), plan.Int(unix.FSMOUNT_CLOEXEC), plan.Int(x.attrs)).Store(rec+plan.FDOffset(i), 4)
		l.Sys(plan.StageFilesystems, unix.SYS_CLOSE, fd.Result())
		l.made = append(l.made, x.name)
	}
	l.Send(plan.StageFilesystems, rec)
}

// await reads one byte from a gate. End of file means that its holder died.
func (l *launch) await(s plan.Stage, gate plan.Arg) {
	l.Sys(s, unix.SYS_READ, gate, plan.Ptr(l.Data(make([]byte, 8))), plan.Int(1)).Expect(1)
	l.Sys(s, unix.SYS_CLOSE, gate)
}

// joinFiles are the files of a plan whose process joins the namespaces of
// another one.
type joinFiles struct {
	status, proc          *os.File
	target                *os.File // pidfd of the process whose namespaces are joined
	pid                   *os.File // a PID namespace other than the target's
	tasks                 []*os.File
	cgroup                *os.File
	stdin, stdout, stderr *os.File
	gate                  *os.File // start gate; nil = go on at once (exec)
}

// joinPlan makes the plan of a process that joins existing namespaces: an exec
// in a running container, or the first process of a container in a shared PID
// namespace. All privileges are dropped before the second clone puts it into
// the PID namespace, where others can see it.
func joinPlan(p *process, namespaces int, f joinFiles) *launch {
	l := newLaunch(f.status)
	proc := l.slot("proc", f.proc)
	in, out, errf := l.slot("stdin", f.stdin), l.slot("stdout", f.stdout), l.slot("stderr", f.stderr)
	if f.cgroup != nil {
		l.slot("cgroup", f.cgroup)
		l.clone.Cgroup = l.Slots() - 1
	}
	l.schedule()
	l.joinCgroups(f.tasks)
	l.setOOMScoreAdj(proc, p.oomScoreAdj)
	l.label(proc, p)
	var gate plan.Arg
	var keep []int
	if f.gate != nil {
		l.clone.Parent = true
		gate = l.slot("start gate", f.gate)
		keep = []int{l.Slots() - 1}
	}
	l.Sys(plan.StageNamespaces, unix.SYS_SETNS, l.slot("target", f.target), plan.Int(namespaces))
	if f.pid != nil {
		l.Sys(plan.StageNamespaces, unix.SYS_SETNS, l.slot("pid", f.pid), plan.Int(unix.CLONE_NEWPID))
	}
	if namespaces&unix.CLONE_NEWUSER != 0 {
		l.becomeRoot()
	}
	l.stdio(in, out, errf)
	l.closeFiles(keep...)
	l.inheritance(p)
	l.workdir(p)
	l.identity(p)
	l.Clone(unix.CLONE_PARENT, 0)
	l.twoStage = true
	l.session(p)
	if f.gate != nil {
		l.finish(p, gate)
		return l
	}
	l.execute(p)
	return l
}
