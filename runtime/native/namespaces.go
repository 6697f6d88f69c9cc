package native

import (
	"context"
	"errors"
	"fmt"
	"os"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/namespaces"
	"github.com/naru-project/naru/internal/sys"
	"github.com/naru-project/naru/runtime"
	"github.com/naru-project/naru/runtime/monitor"
	"github.com/naru-project/naru/runtime/plan"
)

// startHelper clones a child of the worker that reports ready and waits until
// its gate is closed.
func (x *Executor) startHelper(ctx context.Context, c plan.Clone) (*helper, error) {
	sr, sw, err := sys.Pipe(true)
	if err != nil {
		return nil, errs.Wrap(errs.Internal, err)
	}
	defer func() { _, _ = sr.Close(), sw.Close() }()
	gw, gr, err := sys.Pipe(false)
	if err != nil {
		return nil, errs.Wrap(errs.Internal, err)
	}
	defer func() { _ = gr.Close() }()
	l := newLaunch(sw)
	gate := l.slot("gate", gr)
	l.makeFilesystems(nil)
	l.Sys(plan.StageGate, unix.SYS_READ, gate, plan.Ptr(l.Data(make([]byte, 8))), plan.Int(1)).MayFail()
	l.Sys(plan.StageGate, unix.SYS_EXIT_GROUP, plan.Int(0))
	f, err := l.memfd("user namespace")
	if err != nil {
		_ = gw.Close()
		return nil, err
	}
	defer func() { _ = f.Close() }()
	p, err := x.cfg.Monitor.Exec(ctx, monitor.ExecRequest{Plan: f, FDs: l.files, Clone: c, StatusR: sr, Hold: true})
	if err != nil {
		_ = gw.Close()
		return nil, planError(err)
	}
	h := &helper{proc: p, gate: gw}
	_ = sw.Close()
	if _, err := readRecord(ctx, sr, plan.KindReady); err != nil {
		h.close()
		return nil, err
	}
	return h, nil
}

// makeNamespaces makes namespaces in a helper child and returns them open.
func (x *Executor) makeNamespaces(ctx context.Context, r namespaces.Request) (_ *namespaces.Files, err error) {
	var flags uint64
	for _, n := range []struct {
		want bool
		flag uint64
	}{{r.User, unix.CLONE_NEWUSER}, {r.Net, unix.CLONE_NEWNET}, {r.IPC, unix.CLONE_NEWIPC}, {r.UTS, unix.CLONE_NEWUTS}} {
		if n.want {
			flags |= n.flag
		}
	}
	h, err := x.startHelper(ctx, plan.Clone{Flags: flags, Cgroup: -1})
	if err != nil {
		return nil, errs.New(errs.Of(err), "make namespaces: %w", err)
	}
	defer h.close()
	dir, err := x.procDir(h.proc.PID, h.proc.PIDFD)
	if err != nil {
		return nil, errs.New(errs.Internal, "make namespaces: %w", err)
	}
	defer func() { _ = dir.Close() }()
	if r.User {
		if err := errors.Join(sys.WriteBeneath(dir, "uid_map", mapLines(r.UIDMap)), sys.WriteBeneath(dir, "gid_map", mapLines(r.GIDMap))); err != nil {
			return nil, errs.New(errs.InvalidArgument, "map the ids of a user namespace: %w", err)
		}
	}
	out := &namespaces.Files{}
	defer func() {
		if err != nil {
			out.Close()
		}
	}()
	for _, n := range []struct {
		want bool
		name string
		to   **os.File
	}{{r.User, "user", &out.User}, {r.Net, "net", &out.Net}, {r.IPC, "ipc", &out.IPC}, {r.UTS, "uts", &out.UTS}} {
		if n.want {
			if *n.to, err = openNS(dir, n.name); err != nil {
				return nil, err
			}
		}
	}
	return out, nil
}

func openNS(dir *os.File, name string) (*os.File, error) {
	// ns/* are magic links: opened through the procfs that is our own.
	fd, err := unix.Openat(int(dir.Fd()), "ns/"+name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, errs.New(errs.Internal, "open the new %s namespace: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// Maker makes namespaces for sandboxes: sandbox.NamespaceMaker.
type Maker struct{ X *Executor }

// Make makes what r asks for.
func (m Maker) Make(ctx context.Context, r namespaces.Request) (_ *namespaces.Files, err error) {
	out := &namespaces.Files{}
	if r.User || r.Net || r.IPC || r.UTS {
		if out, err = m.X.makeNamespaces(ctx, r); err != nil {
			return nil, err
		}
	}
	defer func() {
		if err != nil {
			out.Close()
		}
	}()
	if r.ShmSize > 0 {
		uid, gid := hostID(r.UIDMap, 0), hostID(r.GIDMap, 0)
		out.Shm, err = sys.NewFs("tmpfs", unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC,
			sys.FsOption{Key: "size", Value: fmt.Sprint(r.ShmSize)}, sys.FsOption{Key: "mode", Value: "1777"},
			sys.FsOption{Key: "uid", Value: itoa(uid)}, sys.FsOption{Key: "gid", Value: itoa(gid)})
		if err != nil {
			return nil, errs.New(errs.Internal, "make /dev/shm of the pod: %w", err)
		}
	}
	if r.PID {
		if out.PID, err = m.X.startInit(ctx, r, out); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// Release ends the pod's init.
func (m Maker) Release(ctx context.Context, id string) error { return m.X.releaseInit(ctx, id) }

func (x *Executor) releaseInit(ctx context.Context, id string) error {
	name := initPrefix + id[len(initPrefix):]
	if h, err := x.lookup(ctx, name); err == nil {
		_ = unix.PidfdSendSignal(int(h.pidfd.Fd()), unix.SIGKILL, nil, 0)
		_ = h.pidfd.Close()
	}
	x.forget(name)
	return x.cfg.Monitor.Delete(ctx, name)
}

// initPrefix replaces the beginning of a sandbox's id in the name of its init,
// so that the monitor's ids stay of one form.
const initPrefix = "00000000"

// initID is the monitor's name of the init of c's pod.
func initID(c *runtime.Container) string { return initPrefix + c.SandboxID[len(initPrefix):] }

// startInit starts the tiny first process of a shared PID namespace: it only
// waits; the kernel reaps for it. Its privileges are dropped before it runs.
func (x *Executor) startInit(ctx context.Context, r namespaces.Request, ns *namespaces.Files) (_ *os.File, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, setupTimeout, errs.New(errs.DeadlineExceeded, "the pod's init did not get ready within %s", setupTimeout))
	defer cancel()
	sr, sw, err := sys.Pipe(true)
	if err != nil {
		return nil, errs.Wrap(errs.Internal, err)
	}
	defer func() { _, _ = sr.Close(), sw.Close() }()
	gw, gr, err := sys.Pipe(false)
	if err != nil {
		return nil, errs.Wrap(errs.Internal, err)
	}
	defer func() { _, _ = gr.Close(), gw.Close() }()
	bin, err := x.cfg.Monitor.Binary(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { _ = bin.Close() }()
	l := initPlan(sw, gr, bin, ns.User)
	f, err := l.memfd("init")
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	name := initPrefix + r.ID[len(initPrefix):]
	defer func() {
		if err != nil { // an answer lost on the way leaves an init too
			uctx, ucancel := context.WithTimeout(context.WithoutCancel(ctx), setupTimeout)
			defer ucancel()
			err = errors.Join(err, x.releaseInit(uctx, r.ID))
		}
	}()
	created, err := x.cfg.Monitor.Create(ctx, monitor.CreateRequest{ID: name, Plan: f, FDs: l.files, Clone: l.clone, TwoStage: l.twoStage, Kept: monitor.Kept{Status: sr, Gate: gw}})
	if err != nil {
		return nil, planError(err)
	}
	x.remember(name, created.PID, created.PIDFD, "pause")
	_ = sw.Close()
	if _, err := readRecord(ctx, sr, plan.KindCreated); err != nil {
		return nil, err
	}
	if err := x.cfg.Monitor.Start(ctx, name); err != nil {
		return nil, planError(err)
	}
	h, err := x.lookup(ctx, name)
	if err != nil {
		return nil, errs.New(errs.Internal, "the pod's init is gone: %w", err)
	}
	defer func() { _ = h.pidfd.Close() }()
	dir, err := x.procDir(h.pid, h.pidfd)
	if err != nil {
		return nil, errs.New(errs.Internal, "the pod's init is gone: %w", err)
	}
	defer func() { _ = dir.Close() }()
	return openNS(dir, "pid")
}

// initPlan: a PID and a mount namespace whose /proc is that of the PID
// namespace (containers of the pod take theirs from it), no privileges, and
// `naru-monitor pause` from its sealed memfd.
func initPlan(status, gate, bin, user *os.File) *launch {
	l := newLaunch(status)
	g, b := l.slot("start gate", gate), l.slot("naru-monitor", bin)
	l.clone.Parent = true
	l.schedule()
	flags := uint64(unix.CLONE_NEWNS | unix.CLONE_NEWPID)
	if user == nil {
		l.clone.Flags = flags
	} else {
		l.Sys(plan.StageUserNamespace, unix.SYS_SETNS, l.slot("user", user), plan.Int(unix.CLONE_NEWUSER))
		l.becomeRoot()
		l.Clone(flags|unix.CLONE_PARENT, 0)
		l.twoStage = true
	}
	const flagsProc = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	l.Sys(plan.StageFilesystems, unix.SYS_MOUNT, plan.Ptr(l.Str("proc")), plan.Ptr(l.Str("/proc")), plan.Ptr(l.Str("proc")), plan.Int(flagsProc), plan.Ptr(0))
	null := l.Sys(plan.StageStdio, unix.SYS_DUP3, g, plan.Int(0), plan.Int(0)) // nothing is ever read or written
	_ = null
	l.Sys(plan.StageStdio, unix.SYS_DUP3, g, plan.Int(1), plan.Int(0))
	l.Sys(plan.StageStdio, unix.SYS_DUP3, g, plan.Int(2), plan.Int(0))
	p := &process{
		args: []string{"/pause", "pause"}, cwd: "/", noNewPrivs: true, umask: 0o077,
		rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_CORE"}},
	}
	l.inheritance(p)
	l.identity(p)
	l.session(p)
	l.Sys(plan.StageFDs, unix.SYS_CLOSE_RANGE, plan.Int(3), plan.Int(^uint32(0)), plan.Int(unix.CLOSE_RANGE_CLOEXEC))
	l.Send(plan.StageCreated, l.Record(plan.Record{Kind: plan.KindCreated}))
	l.Sys(plan.StageGate, unix.SYS_READ, g, plan.Ptr(l.Data(make([]byte, 8))), plan.Int(1)).Expect(1)
	l.Sys(plan.StageSignals, unix.SYS_RT_SIGPROCMASK, plan.Int(unix.SIG_SETMASK), plan.Ptr(l.Data(make([]byte, 8))), plan.Int(0), plan.Int(8))
	l.Sys(plan.StageExec, unix.SYS_EXECVEAT, b, plan.Ptr(l.Str("")), plan.Ptr(l.Strs(p.args)), plan.Ptr(l.Strs(nil)), plan.Int(unix.AT_EMPTY_PATH))
	return l
}
