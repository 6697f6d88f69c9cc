package native

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/sys"
	"github.com/naru-project/naru/runtime"
	"github.com/naru-project/naru/runtime/monitor"
	"github.com/naru-project/naru/runtime/plan"
	"github.com/naru-project/naru/runtime/stdio"
)

const (
	// hookTime is how long a hook may take that does not say so itself. What it
	// says is believed, within the time that a create has.
	hookTime = 10 * time.Second
	// hookOutput is how much of what a hook says is kept, for the error.
	hookOutput = 1 << 10
)

// hooks are those hooks of a container that are part of its create (config.md of
// the OCI runtime specification). They run one after the other when the
// container's tree is complete and still writable, before pivot_root: prestart
// and createRuntime in the runtime's namespaces, which are the daemon's, then
// createContainer in the container's.
//
// For the time of the hooks the host's tree stands in the container's mount
// namespace, on the /sys of the empty root that nobody needs any more; the
// container's tree is moved into it. A createContainer hook's root is the host's
// tree, and what it mounts in the container's stays there. On our own run folder
// it sees a tmpfs instead: the bundle, with config.json and rootfs.
//
// A hook is not in the container's PID namespace: others may live in that, and
// it has privileges that they do not have. Nothing of what it is given comes
// from the image: its program, arguments and environment are the
// specification's, its working directory is the host's root (CVE-2025-23266).
//
// startContainer hooks are execs in the container that waits for its start,
// with its privileges. poststart and poststop hooks are programs like
// createRuntime's. All but createContainer's find the bundle in a folder of the
// host, which is there from before the first hook until the last has ended: a
// daemon that was killed knows by it that there are poststop hooks to be run.
type hooks struct {
	x      *Executor
	ctx    context.Context //nolint:containedctx // of the create that the hooks belong to
	host   *os.File        // the host's tree, detached
	bundle *os.File        // tmpfs, detached
	pid    int             // of a process in the container's namespaces
}

func (h *hooks) close() {
	for _, f := range []*os.File{h.host, h.bundle} {
		if f != nil {
			_ = f.Close()
		}
	}
}

// openHooks opens what the container's hooks need. Most have none.
func (x *Executor) openHooks(ctx context.Context, c *runtime.Container, p *place) (err error) {
	s := c.Spec.Hooks
	if s == nil {
		return nil
	}
	if len(s.Prestart)+len(s.CreateRuntime)+len(s.StartContainer)+len(s.Poststart)+len(s.Poststop) > 0 { //nolint:staticcheck // prestart is deprecated, not gone
		if err := os.MkdirAll(x.hookDir(c.ID), 0o700); err != nil { //nolint:forbidigo // below our own run folder
			return errs.New(errs.Internal, "hooks: make the bundle: %w", err)
		}
	}
	if len(s.Prestart)+len(s.CreateRuntime)+len(s.CreateContainer) == 0 { //nolint:staticcheck // as above
		return nil
	}
	h := &hooks{x: x, ctx: ctx}
	p.hooks = h // closed with it
	if h.host, err = sys.CloneTree(unix.AT_FDCWD, "/", true); err != nil {
		return errs.New(errs.Internal, "hooks: %w", err)
	}
	if err := sys.SetAttr(h.host, true, unix.MountAttr{Propagation: unix.MS_PRIVATE}); err != nil {
		return errs.New(errs.Internal, "hooks: %w", err)
	}
	if err := h.makeBundle(c); err != nil {
		return errs.New(errs.Internal, "hooks: make the bundle: %w", err)
	}
	return nil
}

// hookDir is the bundle in the runtime's namespaces.
func (x *Executor) hookDir(id string) string { return filepath.Join(x.cfg.RunDir, "hooks", id) }

// makeBundle makes the bundle of createContainer hooks, for the container's root
// only.
func (h *hooks) makeBundle(c *runtime.Container) (err error) {
	uid, gid := hostID(c.UIDMap, 0), hostID(c.GIDMap, 0)
	h.bundle, err = sys.NewFs("tmpfs", unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC,
		sys.FsOption{Key: "mode", Value: "0755"}, sys.FsOption{Key: "size", Value: "64m"},
		sys.FsOption{Key: "uid", Value: itoa(uid)}, sys.FsOption{Key: "gid", Value: itoa(gid)})
	if err != nil {
		return err
	}
	dir := sys.FD(h.bundle)
	if err := unix.Mkdirat(dir, "rootfs", 0o755); err != nil {
		return err
	}
	return writeConfig(dir, c, h.x.cfg.RunDir+"/rootfs", uid, gid)
}

// writeConfig writes a bundle's config.json. It holds the container's
// environment, and belongs where no disk is.
func writeConfig(dir int, c *runtime.Container, rootfs string, uid, gid int) error {
	spec := *c.Spec
	root := specs.Root{Path: rootfs}
	if c.Spec.Root != nil {
		root.Readonly = c.Spec.Root.Readonly
	}
	spec.Root = &root
	data, err := json.Marshal(&spec)
	if err != nil {
		return err
	}
	fd, err := unix.Openat(dir, "config.json", unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), "config.json")
	_, err = f.Write(data)
	return errors.Join(err, f.Chown(uid, gid), f.Close())
}

// writeHookDir writes the bundle in the runtime's namespaces. Its root file
// system can be seen through the process in the container's namespaces: below
// its /sys as long as hooks of the create run, and then as its root.
func (x *Executor) writeHookDir(c *runtime.Container, pid int) error {
	dir, err := os.OpenFile(x.hookDir(c.ID), unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0) //nolint:forbidigo // below our own run folder
	if errors.Is(err, os.ErrNotExist) {
		return nil // there are createContainer hooks only
	}
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }()
	return writeConfig(sys.FD(dir), c, fmt.Sprintf("/proc/%d/root/sys%s/rootfs", pid, x.cfg.RunDir), 0, 0)
}

// runHooks runs the hooks. It is called on a thread in the container's mount
// namespace, when its tree is complete and still writable.
func (p *place) runHooks(c *runtime.Container) error {
	if p.hooks == nil {
		return nil
	}
	h := p.hooks
	if err := attachAt("/sys", h.host); err != nil {
		return err
	}
	dir, err := sys.OpenInRoot(h.host, h.x.cfg.RunDir, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer func() { _ = dir.Close() }()
	if err := sys.Attach(h.bundle, dir); err != nil {
		return err
	}
	at, err := sys.OpenBeneath(h.bundle, "rootfs", unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer func() { _ = at.Close() }()
	if err := sys.Attach(p.root, at); err != nil { // moves it
		return err
	}
	ns, err := unix.Openat(sys.FD(h.x.proc), "thread-self/ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open the container's mount namespace: %w", err)
	}
	mnt := os.NewFile(uintptr(ns), "mnt")
	defer func() { _ = mnt.Close() }()
	done := make(chan error, 1)
	go func() { done <- h.run(c, mnt) }() // not on this thread
	if err := <-done; err != nil {
		return err
	}
	if err := attachAt("/rootfs", p.root); err != nil {
		return err
	}
	if err := unix.Unmount("/sys", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("detach the host's tree: %w", err)
	}
	return nil
}

// attachAt puts a mount on a folder of the empty root.
func attachAt(path string, m *os.File) error {
	at, err := os.OpenFile(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0) //nolint:forbidigo // a path of ours, not of the image
	if err != nil {
		return err
	}
	defer func() { _ = at.Close() }()
	return sys.Attach(m, at)
}

// run runs the hooks one after the other, in their order.
func (h *hooks) run(c *runtime.Container, mnt *os.File) error {
	if err := h.x.writeHookDir(c, h.pid); err != nil {
		return errs.New(errs.Internal, "hooks: write the bundle: %w", err)
	}
	s := c.Spec.Hooks
	if err := h.x.programHooks(h.ctx, c, "prestart", s.Prestart, specs.StateCreating, h.pid); err != nil { //nolint:staticcheck // deprecated, not gone
		return err
	}
	if err := h.x.programHooks(h.ctx, c, "createRuntime", s.CreateRuntime, specs.StateCreating, h.pid); err != nil {
		return err
	}
	if len(s.CreateContainer) == 0 {
		return nil
	}
	spaces, err := h.namespaces(c, mnt)
	if err != nil {
		return err
	}
	defer func() {
		for _, n := range spaces[1:] {
			_ = n.Close()
		}
	}()
	state := &specs.State{Status: specs.StateCreating, Pid: h.pid, Bundle: h.x.cfg.RunDir}
	return runHooks(h.ctx, c, "createContainer", s.CreateContainer, state, func(ctx context.Context, hook *specs.Hook, in, out *os.File) (*hookProcess, error) {
		e, err := h.start(ctx, c, hook, hookFiles{
			mnt: spaces[0], user: spaces[1], net: spaces[2], ipc: spaces[3], uts: spaces[4], host: h.host, stdin: in, output: out,
		})
		return execHook(e), err
	})
}

// programHooks runs hooks in the runtime's namespaces.
func (x *Executor) programHooks(ctx context.Context, c *runtime.Container, stage string, list []specs.Hook, status specs.ContainerState, pid int) error {
	state := &specs.State{Status: status, Pid: pid, Bundle: x.hookDir(c.ID)}
	return runHooks(ctx, c, stage, list, state, func(ctx context.Context, hook *specs.Hook, in, out *os.File) (*hookProcess, error) {
		p, err := x.startProgram(ctx, programFiles{stdio: [3]*os.File{in, out, out}}, &process{
			path: hook.Path, args: hookArgs(hook), env: hook.Env, umask: 0o022, oomScoreAdj: new(0), rlimits: hookLimits(),
		})
		if err != nil {
			return nil, err
		}
		return &hookProcess{proc: p, kill: func(ctx context.Context) { killGroup(ctx, p) }, close: func(context.Context) { p.Close() }, mayLeave: true}, nil
	})
}

// startContainerHooks runs these hooks in a container that waits for its start.
func (x *Executor) startContainerHooks(ctx context.Context, c *runtime.Container) error {
	list := c.Spec.Hooks.StartContainer
	if len(list) == 0 {
		return nil
	}
	pid, err := x.innerPID(ctx, c.ID)
	if err != nil {
		return err
	}
	state := &specs.State{Status: specs.StateCreated, Pid: pid, Bundle: x.hookDir(c.ID)}
	return runHooks(ctx, c, "startContainer", list, state, func(ctx context.Context, hook *specs.Hook, in, out *os.File) (*hookProcess, error) {
		p, err := x.process(c, hookArgs(hook), false)
		if err != nil {
			return nil, err
		}
		p.path, p.env, p.cwd = hook.Path, hook.Env, "/"
		e, err := x.startProcess(ctx, c, p, [3]*os.File{in, out, out})
		return execHook(e), err
	})
}

// innerPID is the number of a container's first process in its own namespace.
func (x *Executor) innerPID(ctx context.Context, id string) (int, error) {
	h, err := x.lookup(ctx, id)
	if err != nil {
		return 0, err
	}
	defer func() { _ = h.pidfd.Close() }()
	dir, err := x.procDir(h.pid, h.pidfd)
	if err != nil {
		return 0, err
	}
	defer func() { _ = dir.Close() }()
	f, err := sys.OpenBeneath(dir, "status", unix.O_RDONLY)
	if err != nil {
		return 0, errs.New(errs.FailedPrecondition, "process %d is gone: %w", h.pid, err)
	}
	defer func() { _ = f.Close() }()
	text, err := io.ReadAll(io.LimitReader(f, 64<<10))
	if err != nil {
		return 0, errs.New(errs.FailedPrecondition, "process %d is gone: %w", h.pid, err)
	}
	_, line, _ := strings.Cut(string(text), "\nNSpid:")
	line, _, _ = strings.Cut(line, "\n")
	all := strings.Fields(line)
	if len(all) == 0 {
		return 0, errs.New(errs.Internal, "the kernel does not tell the number of process %d in its namespace", h.pid)
	}
	return strconv.Atoi(all[len(all)-1])
}

// poststop runs what is to be run when nothing of a container is left. It is
// repeated when the daemon was killed meanwhile.
func (x *Executor) poststop(ctx context.Context, c *runtime.Container) error {
	dir := x.hookDir(c.ID)
	if _, err := os.Lstat(dir); errors.Is(err, os.ErrNotExist) { //nolint:forbidigo // below our own run folder
		return nil
	}
	if c.Spec != nil && c.Spec.Hooks != nil {
		for i := range c.Spec.Hooks.Poststop { // each whatever became of the others
			if err := x.programHooks(ctx, c, "poststop", c.Spec.Hooks.Poststop[i:i+1], specs.StateStopped, 0); err != nil {
				klog.FromContext(ctx).Error(err, "a container is gone; what its poststop hook had to do may be left undone", "id", c.ID)
			}
		}
	}
	if err := os.RemoveAll(dir); err != nil { //nolint:forbidigo // below our own run folder
		return errs.New(errs.Internal, "remove the bundle of container %s: %w", short(c.ID), err)
	}
	return nil
}

// namespaces opens those that a hook joins; mnt is the first of them.
func (h *hooks) namespaces(c *runtime.Container, mnt *os.File) (all [5]*os.File, err error) {
	all[0] = mnt
	for i, n := range []struct {
		path string
		kind int
	}{{c.Namespaces.User, unix.CLONE_NEWUSER}, {c.Namespaces.Net, unix.CLONE_NEWNET}, {c.Namespaces.IPC, unix.CLONE_NEWIPC}, {c.Namespaces.UTS, unix.CLONE_NEWUTS}} {
		if n.path == "" {
			continue
		}
		if all[i+1], err = sys.OpenNamespace(n.path, n.kind); err != nil {
			return all, errs.New(errs.FailedPrecondition, "the pod's namespaces are gone: %w", err)
		}
	}
	return all, nil
}

// hookProcess is a hook that runs.
type hookProcess struct {
	proc     *monitor.ExecProcess
	kill     func(context.Context) // with all that it has started
	close    func(context.Context)
	mayLeave bool // what it leaves behind may live on
}

// execHook is a hook that runs in the container's cgroup. What it leaves behind
// must not live beside the container.
func execHook(e *exec) *hookProcess {
	if e == nil {
		return nil
	}
	return &hookProcess{proc: e.proc, kill: e.kill, close: e.close}
}

type startHook func(ctx context.Context, hook *specs.Hook, in, out *os.File) (*hookProcess, error)

// runHooks runs the hooks of a stage until one fails. Each reads the state from
// its standard input (runtime.md, State).
func runHooks(ctx context.Context, c *runtime.Container, stage string, list []specs.Hook, state *specs.State, start startHook) error {
	for i := range list {
		state.Version, state.ID, state.Annotations = specs.Version, c.ID, c.Spec.Annotations
		if err := runHook(ctx, &list[i], state, start); err != nil {
			return errs.New(errs.Of(err), "%s hook %s: %w", stage, list[i].Path, err)
		}
	}
	return nil
}

// runHook runs a hook to its end.
func runHook(ctx context.Context, hook *specs.Hook, state *specs.State, start startHook) error {
	limit := hookTime
	if hook.Timeout != nil {
		limit = time.Duration(*hook.Timeout) * time.Second
	}
	ctx, cancel := context.WithTimeoutCause(ctx, limit, errs.New(errs.DeadlineExceeded, "it did not end within %s", limit))
	defer cancel()
	data, err := json.Marshal(state)
	if err != nil {
		return errs.New(errs.Internal, "encode the state: %w", err)
	}
	in, err := memoryFile("state", data)
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }()
	r, w, err := sys.Pipe(true)
	if err != nil {
		return errs.Wrap(errs.Internal, err)
	}
	defer func() { _, _ = r.Close(), w.Close() }()
	p, err := start(ctx, hook, in, w)
	if err != nil {
		return err
	}
	defer p.close(ctx)
	_ = w.Close()
	var said head
	var end stdio.Ending
	copied := make(chan struct{})
	go func() { defer close(copied); end.Copy(&said, r) }()
	exit, err := p.proc.Wait(ctx)
	if err != nil || !p.mayLeave {
		p.kill(ctx)
	}
	end.Set(r)
	<-copied
	switch {
	case err != nil && ctx.Err() != nil:
		return errs.New(errs.DeadlineExceeded, "%w%s", context.Cause(ctx), said.text())
	case err != nil:
		return err
	case exitCode(exit) != 0:
		return errs.New(errs.FailedPrecondition, "it ended with code %d%s", exitCode(exit), said.text())
	}
	return nil
}

func hookArgs(hook *specs.Hook) []string {
	if len(hook.Args) == 0 {
		return []string{hook.Path}
	}
	return hook.Args
}

func hookLimits() []specs.POSIXRlimit {
	return []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 1024, Hard: 4096}, {Type: "RLIMIT_CORE"}}
}

// start clones the hook's process, in a cgroup of its own below the container's.
func (h *hooks) start(ctx context.Context, c *runtime.Container, hook *specs.Hook, f hookFiles) (_ *exec, err error) {
	g, err := h.x.cfg.Cgroups.Open(c.Cgroup)
	if err != nil {
		return nil, err
	}
	e := &exec{x: h.x}
	if e.group, err = g.NewExec(ctx); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			e.close(ctx)
		}
	}()
	sr, sw, err := sys.Pipe(true)
	if err != nil {
		return nil, errs.Wrap(errs.Internal, err)
	}
	defer func() { _, _ = sr.Close(), sw.Close() }()
	f.status, f.proc, f.tasks, f.cgroup = sw, h.x.proc, e.group.TaskFDs(), e.group.CloneFD()
	l := hookPlan(hook, f)
	m, err := l.memfd("hook")
	if err != nil {
		return nil, err
	}
	defer func() { _ = m.Close() }()
	if e.proc, err = h.x.cfg.Monitor.Exec(ctx, monitor.ExecRequest{ContainerID: c.ID, Plan: m, FDs: l.files, Clone: l.clone, StatusR: sr}); err != nil {
		return nil, planError(err)
	}
	e.group.Close()
	return e, nil
}

// hookFiles are the files of a hook's plan.
type hookFiles struct {
	status, proc             *os.File
	mnt, user, net, ipc, uts *os.File // namespaces to join; all but mnt may be nil
	host                     *os.File // what becomes its root
	tasks                    []*os.File
	cgroup                   *os.File
	stdin, output            *os.File
}

// hookPlan makes the plan of a hook: it keeps the privileges of the worker, or
// those of root in the container's user namespace, and sees the host's files.
func hookPlan(hook *specs.Hook, f hookFiles) *launch {
	l := newLaunch(f.status)
	proc := l.slot("proc", f.proc)
	in, out := l.slot("stdin", f.stdin), l.slot("output", f.output)
	if f.cgroup != nil {
		l.slot("cgroup", f.cgroup)
		l.clone.Cgroup = l.Slots() - 1
	}
	l.joinCgroups(f.tasks)
	l.setOOMScoreAdj(proc, new(0))
	if f.user != nil {
		l.Sys(plan.StageUserNamespace, unix.SYS_SETNS, l.slot("user", f.user), plan.Int(unix.CLONE_NEWUSER))
		l.becomeRoot()
	}
	for _, n := range []struct {
		name string
		f    *os.File
		flag int
	}{{"net", f.net, unix.CLONE_NEWNET}, {"ipc", f.ipc, unix.CLONE_NEWIPC}, {"uts", f.uts, unix.CLONE_NEWUTS}, {"mnt", f.mnt, unix.CLONE_NEWNS}} {
		if n.f != nil {
			l.Sys(plan.StageNamespaces, unix.SYS_SETNS, l.slot(n.name, n.f), plan.Int(n.flag))
		}
	}
	l.Sys(plan.StageMounts, unix.SYS_FCHDIR, l.slot("host", f.host))
	l.Sys(plan.StageMounts, unix.SYS_CHROOT, plan.Ptr(l.Str(".")))
	l.stdio(in, out, out)
	l.closeFiles()
	l.inheritance(&process{umask: 0o022, rlimits: hookLimits()})
	l.session(&process{})
	l.Sys(plan.StageSignals, unix.SYS_RT_SIGPROCMASK, plan.Int(unix.SIG_SETMASK), plan.Ptr(l.Data(make([]byte, 8))), plan.Int(0), plan.Int(8))
	l.Sys(plan.StageExec, unix.SYS_EXECVE, plan.Ptr(l.Str(hook.Path)), plan.Ptr(l.Strs(hookArgs(hook))), plan.Ptr(l.Strs(hook.Env)))
	return l
}

// head keeps the first bytes of an output and swallows the rest.
type head struct{ b []byte }

func (h *head) Write(p []byte) (int, error) {
	if n := hookOutput - len(h.b); n > 0 {
		h.b = append(h.b, p[:min(n, len(p))]...)
	}
	return len(p), nil
}

// text is the output as the end of a sentence. It may quote the container's
// own files: no control character of theirs gets through.
func (h *head) text() string {
	s := strings.TrimSpace(string(h.b))
	if s == "" {
		return ""
	}
	return fmt.Sprintf(", it says %q", s)
}
