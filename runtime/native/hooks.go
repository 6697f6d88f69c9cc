package native

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

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

// hooks are a container's createContainer hooks (config.md of the OCI runtime
// specification): programs of the host that are run before pivot_root, in the
// container's namespaces, with the container's whole tree in sight.
//
// For the time of the hooks the host's tree stands in the container's mount
// namespace, on the /sys of the empty root that nobody needs any more; the
// container's tree is moved into it. A hook's root is the host's tree, and what
// it mounts in the container's stays there. On our own run folder it sees a
// tmpfs instead: the bundle, with config.json and rootfs.
//
// A hook is not in the container's PID namespace: others may live in that, and
// it has privileges that they do not have. Nothing of what it is given comes
// from the image: its program, arguments and environment are the
// specification's, its working directory is the host's root (CVE-2025-23266).
type hooks struct {
	x      *Executor
	ctx    context.Context //nolint:containedctx // of the create that the hooks belong to
	host   *os.File        // the host's tree, detached
	bundle *os.File        // tmpfs, detached
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
	if n := len(s.Prestart) + len(s.CreateRuntime) + len(s.StartContainer) + len(s.Poststart) + len(s.Poststop); n > 0 { //nolint:staticcheck // prestart is deprecated, not gone
		return errs.New(errs.Unimplemented, "hooks: of all kinds Naru runs createContainer only")
	}
	if len(s.CreateContainer) == 0 {
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

// makeBundle makes the bundle's folder. config.json holds the container's
// environment: it is for its root only, and never on a disk.
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
	spec := *c.Spec
	root := specs.Root{Path: h.x.cfg.RunDir + "/rootfs"}
	if c.Spec.Root != nil {
		root.Readonly = c.Spec.Root.Readonly
	}
	spec.Root = &root
	data, err := json.Marshal(&spec)
	if err != nil {
		return err
	}
	fd, err := unix.Openat(dir, "config.json", unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), "config.json")
	_, err = f.Write(data)
	return errors.Join(err, f.Chown(uid, gid), f.Close())
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
	spaces, err := h.namespaces(c, mnt)
	if err != nil {
		return err
	}
	defer func() {
		for _, n := range spaces[1:] {
			_ = n.Close()
		}
	}()
	list := c.Spec.Hooks.CreateContainer
	for i := range list {
		if err := h.one(c, &list[i], spaces); err != nil {
			return errs.New(errs.Of(err), "createContainer hook %s: %w", list[i].Path, err)
		}
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

// one runs a hook to its end, with all that it started.
func (h *hooks) one(c *runtime.Container, hook *specs.Hook, spaces [5]*os.File) (err error) {
	limit := hookTime
	if hook.Timeout != nil {
		limit = time.Duration(*hook.Timeout) * time.Second
	}
	ctx, cancel := context.WithTimeoutCause(h.ctx, limit, errs.New(errs.DeadlineExceeded, "it did not end within %s", limit))
	defer cancel()
	state, err := h.state(ctx, c)
	if err != nil {
		return err
	}
	defer func() { _ = state.Close() }()
	r, w, err := sys.Pipe(true)
	if err != nil {
		return errs.Wrap(errs.Internal, err)
	}
	defer func() { _, _ = r.Close(), w.Close() }()
	e, err := h.start(ctx, c, hook, hookFiles{
		mnt: spaces[0], user: spaces[1], net: spaces[2], ipc: spaces[3], uts: spaces[4], host: h.host, stdin: state, output: w,
	})
	if err != nil {
		return err
	}
	defer e.close(ctx)
	_ = w.Close()
	var said head
	var end stdio.Ending
	copied := make(chan struct{})
	go func() { defer close(copied); end.Copy(&said, r) }()
	exit, err := e.proc.Wait(ctx)
	e.kill(ctx) // also what it left behind: it must not live beside the container
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

// state is what a hook reads from its standard input (runtime.md, State).
func (h *hooks) state(ctx context.Context, c *runtime.Container) (*os.File, error) {
	s := specs.State{Version: specs.Version, ID: c.ID, Status: specs.StateCreating, Bundle: h.x.cfg.RunDir, Annotations: c.Spec.Annotations}
	// As the host sees it, for so does the hook. In a shared PID namespace the
	// first process comes later.
	if files, err := h.x.cfg.Monitor.Files(ctx, c.ID); err == nil {
		s.Pid = files.PID
		files.Close()
	}
	data, err := json.Marshal(&s)
	if err != nil {
		return nil, errs.New(errs.Internal, "encode the state: %w", err)
	}
	return memoryFile("state", data)
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
	m, err := l.memfd()
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
	l.inheritance(&process{umask: 0o022, rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 1024, Hard: 4096}, {Type: "RLIMIT_CORE"}}})
	l.session(&process{})
	l.Sys(plan.StageSignals, unix.SYS_RT_SIGPROCMASK, plan.Int(unix.SIG_SETMASK), plan.Ptr(l.Data(make([]byte, 8))), plan.Int(0), plan.Int(8))
	args := hook.Args
	if len(args) == 0 {
		args = []string{hook.Path}
	}
	l.Sys(plan.StageExec, unix.SYS_EXECVE, plan.Ptr(l.Str(hook.Path)), plan.Ptr(l.Strs(args)), plan.Ptr(l.Strs(hook.Env)))
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
