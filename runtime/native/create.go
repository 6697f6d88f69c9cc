package native

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/failpoint"
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
		err := failpoint.Hit("native", "create", s.name)
		if err == nil {
			err = s.do(ctx)
		}
		if err != nil {
			err = k.explain(err)
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
	if k.place.volumes, err = k.x.Volumes(ctx, k.c); err != nil {
		return err
	}
	return k.x.openHooks(ctx, k.c, &k.place)
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

// pipe makes a pipe whose ends are closed when the creation ends.
func (k *creation) pipe(oursReads bool) (ours, theirs *os.File, err error) {
	if ours, theirs, err = sys.Pipe(oursReads); err != nil {
		return nil, nil, errs.Wrap(errs.Internal, err)
	}
	return k.later(ours), k.later(theirs), nil
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
	if h := k.place.hooks; h != nil {
		if h.pid = k.pid; k.builder != nil { // the first process comes later
			h.pid = k.builder.PID
		}
	}
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
