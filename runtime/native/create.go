package native

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/sys"
	"github.com/naru-project/naru/internal/undo"
	"github.com/naru-project/naru/runtime"
	"github.com/naru-project/naru/runtime/cgroup"
	"github.com/naru-project/naru/runtime/monitor"
	"github.com/naru-project/naru/runtime/plan"
)

// setupTimeout bounds how long a child may take to answer during create. It
// does nothing that waits for anybody but the kernel.
const setupTimeout = 30 * time.Second

// creation is one Create on its way.
type creation struct {
	x     *Executor
	c     *runtime.Container
	undo  undo.List
	open  []*os.File // closed at the end, whatever comes
	place place

	process *process
	cgroup  func() (*cgroup.Group, error) // waits for it
	group   *cgroup.Group
	files   startFiles
	kept    monitor.Kept
	status  *os.File // read end
	mounts  *os.File // write end of the mounts gate
	plan    *launch
	builder *monitor.ExecProcess
	pid     int
	start   uint64
	pidfd   *os.File
}

func (k *creation) later(f *os.File) *os.File {
	if f != nil {
		k.open = append(k.open, f)
	}
	return f
}

// Create makes the container up to its start gate.
func (x *Executor) Create(ctx context.Context, c *runtime.Container, root *os.File) (_ runtime.Process, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, setupTimeout, errs.New(errs.DeadlineExceeded, "the container's first process did not get ready within %s", setupTimeout))
	defer cancel()
	k := &creation{x: x, c: c, place: place{root: root, fs: map[string]*os.File{}}}
	// The cgroup takes the kernel as long as all that is done before it is needed.
	k.cgroup = begin(func() (*cgroup.Group, error) { return x.createCgroup(ctx, c) })
	defer func() {
		k.place.close()
		if k.builder != nil {
			// It has ended by itself, unless the creation failed.
			_ = unix.PidfdSendSignal(sys.FD(k.builder.PIDFD), unix.SIGKILL, nil, 0)
			k.builder.Close()
		}
		if k.group != nil {
			k.group.Close()
		}
		for _, f := range k.open {
			_ = f.Close()
		}
	}()
	for _, s := range []struct {
		name string
		do   func(context.Context) error
	}{
		{"read the spec", k.readSpec}, {"open volumes", k.openPlace}, {"open namespaces", k.openNamespaces}, {"make stdio", k.makeStdio},
		{"make the cgroup", k.makeCgroup}, {"clone", k.cloneChild},
		{"wait for file systems", k.awaitReady}, {"assemble the root file system", k.assemble}, {"wait for the first process", k.awaitCreated},
		{"read its start time", k.readStart},
	} {
		if err := s.do(ctx); err != nil {
			err = errs.New(errs.Of(err), "create container %s: %s: %w", short(c.ID), s.name, err)
			// The undo has a deadline of its own: the caller's may be what failed.
			uctx, ucancel := context.WithTimeout(context.WithoutCancel(ctx), setupTimeout)
			defer ucancel()
			_ = k.takeCgroup()
			return runtime.Process{}, errors.Join(err, k.undo.Run(uctx))
		}
	}
	x.remember(c.ID, k.pid, k.pidfd, k.process.args[0])
	return runtime.Process{PID: k.pid, StartTime: k.start}, nil
}

func (k *creation) readSpec(context.Context) (err error) {
	k.process, err = k.x.process(k.c, k.c.Spec.Process.Args, k.c.TTY)
	return err
}

func (k *creation) openPlace(ctx context.Context) (err error) {
	if k.place.devices, err = makeDevices(k.c); err != nil {
		return err
	}
	if len(k.c.UIDMap) > 0 && k.c.Namespaces.Net == "" {
		// A sysfs belongs to the network namespace's owner; the host's can
		// only be shown, not made anew, inside a user namespace.
		if k.place.sys, err = sys.CloneTree(unix.AT_FDCWD, "/sys", true); err != nil {
			return err
		}
		if err := sys.SetAttr(k.place.sys, true, unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY, Propagation: unix.MS_PRIVATE}); err != nil {
			return err
		}
	}
	return k.x.openVolumes(ctx, k.c, &k.place)
}

// begin starts f and returns a function that waits for its result.
func begin[T any](f func() (T, error)) func() (T, error) {
	var v T
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		v, err = f()
	}()
	return func() (T, error) {
		<-done
		return v, err
	}
}

// takeCgroup waits for the cgroup and puts it on the list of what is undone.
func (k *creation) takeCgroup() error {
	if k.group != nil {
		return nil
	}
	g, err := k.cgroup()
	if err != nil {
		return err
	}
	k.group = g
	k.undo.Add("remove the cgroup", func(ctx context.Context) error {
		k.x.releaseHolder(k.c.ID)
		return errors.Join(g.Kill(ctx), g.Remove(ctx))
	})
	return nil
}

func (k *creation) makeCgroup(context.Context) (err error) {
	if err := k.takeCgroup(); err != nil {
		return err
	}
	k.files.tasks, k.files.cgroup = k.group.TaskFDs(), k.group.CloneFD()
	k.place.cgroups, err = k.x.cgroupViews(k.c)
	return err
}

func (k *creation) openNamespaces(ctx context.Context) error {
	ns := k.c.Namespaces
	pid := ""
	switch k.c.PIDMode {
	case runtime.PIDPod:
		if pid = ns.PID; pid == "" {
			return errs.New(errs.InvalidArgument, "the pod has no shared PID namespace")
		}
	case runtime.PIDTarget:
		if k.c.TargetID == "" {
			return errs.New(errs.InvalidArgument, "no container is named whose PID namespace is to be joined")
		}
	}
	for _, o := range []struct {
		path string
		to   **os.File
		kind int
	}{
		{ns.User, &k.files.user, unix.CLONE_NEWUSER}, {ns.Net, &k.files.net, unix.CLONE_NEWNET}, {ns.IPC, &k.files.ipc, unix.CLONE_NEWIPC},
		{ns.UTS, &k.files.uts, unix.CLONE_NEWUTS}, {pid, &k.files.pid, unix.CLONE_NEWPID},
	} {
		if o.path == "" {
			continue
		}
		f, err := sys.OpenNamespace(o.path, o.kind)
		if err != nil {
			return errs.New(errs.FailedPrecondition, "the pod's namespaces are gone: %w", err)
		}
		*o.to = k.later(f)
	}
	if k.c.PIDMode == runtime.PIDPod || k.c.PIDMode == runtime.PIDTarget {
		return k.openJoined(ctx)
	}
	return nil
}

// openJoined finds a process of the PID namespace that is joined: the pod's
// init, or the target's first one.
func (k *creation) openJoined(ctx context.Context) error {
	id, what := initID(k.c), "the pod's init"
	if k.c.PIDMode == runtime.PIDTarget {
		id, what = k.c.TargetID, "target container "+short(k.c.TargetID)
	}
	h, err := k.x.lookup(ctx, id)
	if err != nil {
		if errs.Is(err, errs.NotFound) {
			return errs.New(errs.FailedPrecondition, "%s is gone: %w", what, err)
		}
		return errs.New(errs.Of(err), "find %s: %w", what, err)
	}
	defer func() { _ = h.pidfd.Close() }()
	dir, err := k.x.procDir(h.pid, h.pidfd)
	if err != nil {
		return errs.New(errs.FailedPrecondition, "%s: %w", what, err)
	}
	defer func() { _ = dir.Close() }()
	if k.c.PIDMode == runtime.PIDTarget {
		fd, err := unix.Openat(int(dir.Fd()), "ns/pid", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return errs.New(errs.FailedPrecondition, "open the PID namespace of %s: %w", what, err)
		}
		k.files.pid = k.later(os.NewFile(uintptr(fd), "pid"))
	}
	return k.joinedProc(h.pid, dir)
}

// joinedProc takes a procfs for a PID namespace that exists already, from the
// mount namespace of a process that lives there: to make one, a process with
// the host's privileges would have to show itself in it. dir is its folder in
// our procfs.
func (k *creation) joinedProc(pid int, dir *os.File) error {
	nsfd, err := unix.Openat(int(dir.Fd()), "ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return errs.New(errs.FailedPrecondition, "open the mount namespace of process %d: %w", pid, err)
	}
	defer func() { _ = unix.Close(nsfd) }()
	return sys.OnThread(func() error {
		if err := unix.Setns(nsfd, unix.CLONE_NEWNS); err != nil { //nolint:forbidigo // on a thread of its own (sys.OnThread)
			return fmt.Errorf("join the mount namespace of process %d: %w", pid, err)
		}
		fd, err := sys.Openat2(unix.AT_FDCWD, "/proc", unix.O_PATH|unix.O_DIRECTORY, 0, unix.RESOLVE_NO_SYMLINKS)
		if err != nil {
			return fmt.Errorf("open its /proc: %w", err)
		}
		f := os.NewFile(uintptr(fd), "/proc")
		defer func() { _ = f.Close() }()
		if err := sys.CheckProc(f); err != nil {
			return err
		}
		t, err := sys.CloneTree(fd, "", false)
		if err != nil {
			return err
		}
		k.place.fs["proc"] = t
		return sys.SetAttr(t, false, unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC, Attr_clr: unix.MOUNT_ATTR_RDONLY, Propagation: unix.MS_PRIVATE})
	})
}

// makeStdio makes the container's standard streams and their other ends.
func (k *creation) makeStdio(context.Context) (err error) {
	dir := k.x.ioDir(k.c.ID)
	if err := os.MkdirAll(dir, 0o700); err != nil { //nolint:forbidigo // below our own run folder
		return errs.New(errs.Internal, "make %s: %w", dir, err)
	}
	k.undo.Add("remove the FIFOs", func(context.Context) error { return os.RemoveAll(dir) }) //nolint:forbidigo // below our own run folder
	if k.kept.Log, err = openLog(k.c.LogPath); err != nil {
		return err
	}
	k.later(k.kept.Log)
	uid, gid := hostID(k.c.UIDMap, k.process.user.UID), hostID(k.c.GIDMap, k.process.user.GID)
	if k.c.TTY {
		d := k.place.devices
		if err := d.slave.Chown(uid, hostID(k.c.GIDMap, 5)); err != nil {
			return errs.New(errs.Internal, "chown the terminal: %w", err)
		}
		k.kept.Pty, k.kept.Devpts = d.master, d.pts
		k.files.stdin, k.files.stdout, k.files.stderr = d.slave, d.slave, d.slave
		return nil
	}
	k.kept.Devpts = k.place.devices.pts
	if k.c.Stdin {
		var w, r *os.File
		if r, w, err = openStdinFIFO(filepath.Join(dir, "0")); err != nil {
			return err
		}
		k.files.stdin, k.kept.Stdin = k.later(r), k.later(w)
		if err := r.Chown(uid, gid); err != nil {
			return errs.New(errs.Internal, "chown the stdin FIFO: %w", err)
		}
	} else {
		if k.files.stdin, err = k.place.devices.null(unix.O_RDONLY); err != nil {
			return err
		}
		k.later(k.files.stdin)
	}
	for _, o := range []struct {
		name     string
		in, kept **os.File
	}{{"1", &k.files.stdout, &k.kept.Stdout}, {"2", &k.files.stderr, &k.kept.Stderr}} {
		r, w, err := openOutputFIFO(filepath.Join(dir, o.name))
		if err != nil {
			return err
		}
		*o.kept, *o.in = k.later(r), k.later(w)
		// A program that opens /dev/stdout anew, as nginx does, needs the right.
		if err := w.Chown(uid, gid); err != nil {
			return errs.New(errs.Internal, "chown the output FIFO: %w", err)
		}
	}
	return nil
}

// openOutputFIFO makes a FIFO that the container holds open for reading and
// writing: when every reader dies there is no SIGPIPE, bytes wait in the pipe.
func openOutputFIFO(path string) (r, w *os.File, err error) {
	if err := unix.Mkfifo(path, 0o600); err != nil {
		return nil, nil, errs.New(errs.Internal, "make FIFO %s: %w", path, err)
	}
	if w, err = openFIFO(path, unix.O_RDWR); err != nil {
		return nil, nil, err
	}
	if r, err = openFIFO(path, unix.O_RDONLY|unix.O_NONBLOCK); err != nil {
		_ = w.Close()
		return nil, nil, err
	}
	return r, w, nil
}

// openStdinFIFO makes a FIFO whose reading end the container gets without the
// right to write: it would never see the end of file otherwise.
func openStdinFIFO(path string) (r, w *os.File, err error) {
	if err := unix.Mkfifo(path, 0o600); err != nil {
		return nil, nil, errs.New(errs.Internal, "make FIFO %s: %w", path, err)
	}
	both, err := openFIFO(path, unix.O_RDWR)
	if err != nil {
		return nil, nil, err
	}
	defer func() { _ = both.Close() }()
	if r, err = openFIFO(path, unix.O_RDONLY); err != nil {
		return nil, nil, err
	}
	// Non-blocking: who attaches and writes more than is read must be able to go.
	if w, err = openFIFO(path, unix.O_WRONLY|unix.O_NONBLOCK); err != nil {
		_ = r.Close()
		return nil, nil, err
	}
	return r, w, nil
}

func openFIFO(path string, flags int) (*os.File, error) {
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0) //nolint:forbidigo // a path of ours; the last component is not followed
	if err != nil {
		return nil, errs.New(errs.Internal, "open FIFO %s: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// openLog opens a log file for writing at its end, refusing anything but a
// regular file: a link would lead out of the pod's folder, a FIFO would block.
func openLog(path string) (*os.File, error) {
	if path == "" {
		return nil, nil
	}
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CREAT|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY, 0o640) //nolint:forbidigo // a path of ours; the last component is not followed
	if err != nil {
		return nil, errs.New(errs.FailedPrecondition, "open log file %s: %w", path, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		_ = unix.Close(fd)
		return nil, errs.New(errs.FailedPrecondition, "log file %s is not a regular file", path)
	}
	if err := unix.SetNonblock(fd, false); err != nil {
		_ = unix.Close(fd)
		return nil, errs.New(errs.Internal, "log file %s: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// pipe makes a pipe whose ends are closed when the creation ends.
func (k *creation) pipe(oursReads bool) (ours, theirs *os.File, err error) {
	if ours, theirs, err = sys.Pipe(oursReads); err != nil {
		return nil, nil, errs.Wrap(errs.Internal, err)
	}
	return k.later(ours), k.later(theirs), nil
}

// shape says what the child has to make.
func (k *creation) shape() startShape {
	s := startShape{newPID: k.c.PIDMode == runtime.PIDContainer || k.c.PIDMode == "", cgroupNS: k.x.cfg.Cgroups.Mode() == cgroup.ModeV2}
	for _, fs := range childFilesystems {
		switch {
		case fs.name == "proc" && k.place.fs["proc"] != nil, fs.name == "sysfs" && k.place.sys != nil, fs.name == "cgroup2" && !s.cgroupNS,
			fs.name == "mqueue" && len(k.c.UIDMap) > 0 && k.c.Namespaces.IPC == "":
		default:
			s.filesystems = append(s.filesystems, fs)
		}
	}
	return s
}

// cloneChild makes the plan and lets the worker run it.
func (k *creation) cloneChild(ctx context.Context) (err error) {
	var statusW, mountsR *os.File
	if k.status, statusW, err = k.pipe(true); err != nil {
		return err
	}
	if k.mounts, mountsR, err = k.pipe(false); err != nil {
		return err
	}
	k.files.status, k.files.mounts, k.files.proc = statusW, mountsR, k.x.proc
	if k.files.pid != nil {
		return k.cloneBuilder(ctx)
	}
	if k.kept.Gate, k.files.gate, err = k.pipe(false); err != nil {
		return err
	}
	k.kept.Status = k.status
	k.plan = startPlan(k.process, k.shape(), k.files)
	k.pid, k.pidfd, err = k.create(ctx, k.plan)
	_ = statusW.Close() // so that the status pipe ends with the child
	return err
}

// create sends a plan to the worker as that of the container's first process.
func (k *creation) create(ctx context.Context, l *launch) (pid int, pidfd *os.File, err error) {
	f, err := l.memfd()
	if err != nil {
		return 0, nil, err
	}
	k.later(f)
	// Undone before the request: an answer lost on the way leaves a child too.
	k.undo.Add("end the first process", func(ctx context.Context) error { return k.x.cfg.Monitor.Delete(ctx, k.c.ID) })
	created, err := k.x.cfg.Monitor.Create(ctx, monitor.CreateRequest{
		ID: k.c.ID, Plan: f, FDs: l.files, Clone: l.clone, TwoStage: l.twoStage, Kept: k.kept, TTY: k.c.TTY,
	})
	if err != nil {
		return 0, nil, planError(err)
	}
	k.undo.Add("kill the first process", func(context.Context) error {
		_ = unix.PidfdSendSignal(int(created.PIDFD.Fd()), unix.SIGKILL, nil, 0)
		return created.PIDFD.Close()
	})
	return created.PID, created.PIDFD, nil
}

// cloneBuilder starts the helper that makes namespaces and file systems for a
// container in a PID namespace that exists already.
func (k *creation) cloneBuilder(ctx context.Context) error {
	l := builderPlan(k.process, k.shape(), k.files)
	f, err := l.memfd()
	if err != nil {
		return err
	}
	k.later(f)
	h, err := k.x.cfg.Monitor.Exec(ctx, monitor.ExecRequest{ContainerID: k.c.ID, Plan: f, FDs: l.files, Clone: l.clone, TwoStage: l.twoStage, StatusR: k.status, Hold: true})
	_ = k.files.status.Close()
	if err != nil {
		return planError(err)
	}
	k.plan, k.builder, k.pidfd = l, h, h.PIDFD
	return nil
}

// createJoined makes the first process join what the builder made.
func (k *creation) createJoined(ctx context.Context) (err error) {
	defer func() {
		_ = k.mounts.Close() // the builder ends
		k.builder.Close()
	}()
	var statusW *os.File
	if k.status, statusW, err = k.pipe(true); err != nil {
		return err
	}
	if k.kept.Gate, k.files.gate, err = k.pipe(false); err != nil {
		return err
	}
	k.kept.Status = k.status
	// The builder has these; it is alive, waiting on its gate.
	spaces := unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWCGROUP
	if k.files.user != nil {
		spaces |= unix.CLONE_NEWUSER
	}
	l := joinPlan(k.process, spaces, joinFiles{
		status: statusW, proc: k.x.proc, target: k.pidfd, pid: k.files.pid, tasks: k.files.tasks, cgroup: k.files.cgroup,
		stdin: k.files.stdin, stdout: k.files.stdout, stderr: k.files.stderr, gate: k.files.gate,
	})
	k.pid, k.pidfd, err = k.create(ctx, l)
	_ = statusW.Close()
	return err
}

// readRecord reads one status record, or the child's failure.
func readRecord(ctx context.Context, status *os.File, want plan.Kind) (plan.Record, error) {
	if d, ok := ctx.Deadline(); ok {
		_ = status.SetReadDeadline(d)
	}
	stop := context.AfterFunc(ctx, func() { _ = status.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	buf := make([]byte, plan.RecordSize)
	if _, err := io.ReadFull(status, buf); err != nil {
		if ctx.Err() != nil {
			return plan.Record{}, context.Cause(ctx)
		}
		return plan.Record{}, errs.New(errs.Internal, "the first process died before it was ready: %w", err)
	}
	r, err := plan.ParseRecord(buf)
	if err != nil {
		return r, err
	}
	if err := r.Err(); err != nil {
		return r, planError(err)
	}
	if r.Kind != want {
		return r, errs.New(errs.Internal, "status record %d where %d was expected", r.Kind, want)
	}
	return r, nil
}

// planError gives a plan's failure the class that its stage means.
func planError(err error) error {
	var pe *plan.Error
	if errors.As(err, &pe) {
		switch pe.Stage {
		case plan.StageNamespaces:
			if errors.Is(err, unix.ESRCH) { // the process whose namespaces they are has ended
				return errs.Wrap(errs.FailedPrecondition, err)
			}
		case plan.StageWorkdir, plan.StageUser, plan.StageLSM, plan.StageSeccomp, plan.StageExec:
			return errs.Wrap(errs.FailedPrecondition, err)
		}
	}
	return errs.Wrap(errs.Internal, err)
}

func (k *creation) awaitReady(ctx context.Context) error {
	r, err := readRecord(ctx, k.status, plan.KindReady)
	if err != nil {
		return err
	}
	for i, name := range k.plan.made {
		f, err := sys.Getfd(k.pidfd, int(r.FDs[i]), name)
		if err != nil {
			return errs.New(errs.Internal, "take the %s: %w", name, err)
		}
		k.place.fs[name] = f
	}
	return nil
}

// assemble enters the child's mount namespace with a thread and builds the
// tree there, then lets the child go on.
func (k *creation) assemble(ctx context.Context) error {
	uid, gid := hostID(k.c.UIDMap, 0), hostID(k.c.GIDMap, 0)
	err := sys.OnThread(func() error {
		if err := unix.Setns(int(k.pidfd.Fd()), unix.CLONE_NEWNS); err != nil { //nolint:forbidigo // on a thread of its own (sys.OnThread)
			return fmt.Errorf("join the container's mount namespace: %w", err)
		}
		unix.Umask(0o022) //nolint:forbidigo // on a thread of its own (sys.OnThread)
		if uid != 0 || gid != 0 {
			// What is made in the root file system belongs to the container's root.
			if err := sys.ActAs(uid, gid); err != nil {
				return err
			}
		}
		return k.place.assemble(k.c)
	})
	if err != nil {
		return err
	}
	if k.builder != nil {
		return k.createJoined(ctx)
	}
	_, err = k.mounts.Write([]byte{1})
	_ = k.mounts.Close()
	if err != nil {
		return errs.New(errs.Internal, "let the first process go on: %w", err)
	}
	return nil
}

func (k *creation) awaitCreated(ctx context.Context) error {
	_, err := readRecord(ctx, k.status, plan.KindCreated)
	return err
}

func (k *creation) readStart(context.Context) (err error) {
	if k.start, err = startTime(k.x.proc, k.pid); err != nil {
		return errs.New(errs.Internal, "the first process died before it was started: %w", err)
	}
	return nil
}
