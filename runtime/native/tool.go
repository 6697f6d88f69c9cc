package native

import (
	"context"
	"encoding/binary"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/sys"
	"github.com/naru-project/naru/runtime/monitor"
	"github.com/naru-project/naru/runtime/plan"
)

// Tool is a program of the host that works on containers: criu, an OCI runtime.
type Tool struct {
	Args  []string
	Stdio [3]*os.File // nil = the null device
	Umask uint32
	// Binary is executed in place of what Args[0] names, with Report as its
	// descriptor 3; nil = neither. It takes what it has started with it when it
	// gets SIGTERM, as the worker sends it when the daemon dies.
	Binary, Report *os.File
	// Mounts are attached in a mount namespace that is the program's own, and
	// ends with it and what it clones.
	Mounts []Attachment
}

// Attachment is a detached mount and the place of the host where a tool sees
// it. With Of, it is a second mount of the directory Of below Tree, which is
// looked up as if Tree was the root of everything.
type Attachment struct {
	Tree   *os.File
	At, Of string
}

// StartTool starts a tool; it is running when this returns. The caller closes
// what is returned. A program that is not there is os.ErrNotExist.
func (x *Executor) StartTool(ctx context.Context, t Tool) (*monitor.ExecProcess, error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0) //nolint:forbidigo // a path of the host
	if err != nil {
		return nil, errs.New(errs.Internal, "open the null device: %w", err)
	}
	defer func() { _ = null.Close() }()
	for i := range t.Stdio {
		if t.Stdio[i] == nil {
			t.Stdio[i] = null
		}
	}
	return x.startProgram(ctx, programFiles{stdio: t.Stdio, mounts: t.Mounts, binary: t.Binary, report: t.Report},
		&process{args: t.Args, env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, umask: t.Umask})
}

// RunTool runs a tool to its end. When ctx ends it gets SIGTERM and then grace
// to end. Any ending other than with status 0 is an error.
func (x *Executor) RunTool(ctx context.Context, grace time.Duration, t Tool) error {
	proc, err := x.StartTool(ctx, t)
	if err != nil {
		return err
	}
	defer proc.Close()
	exit, err := proc.Wait(ctx)
	if err != nil {
		EndTool(proc, grace) // also where the worker was lost, and it goes on
	}
	switch {
	case ctx.Err() != nil:
		return errs.New(errs.Of(context.Cause(ctx)), "%w", context.Cause(ctx))
	case err != nil:
		return err
	case exit.Signal != 0:
		return errs.New(errs.Internal, "%s was ended by signal %d", t.Args[0], exit.Signal)
	case exit.Status != 0:
		return errs.New(errs.Internal, "%s ended with status %d", t.Args[0], exit.Status)
	}
	return nil
}

// EndTool asks a tool and its process group to end, kills after grace who has
// not, and waits for the tool's end.
func EndTool(proc *monitor.ExecProcess, grace time.Duration) {
	for _, s := range []struct {
		sig  unix.Signal
		wait time.Duration
	}{{unix.SIGTERM, grace}, {unix.SIGKILL, killTime}} {
		signalGroup(proc, s.sig)
		p := []unix.PollFd{{Fd: int32(sys.FD(proc.PIDFD)), Events: unix.POLLIN}}
		if n, _ := unix.Poll(p, int(s.wait.Milliseconds())); n > 0 {
			break
		}
	}
	signalGroup(proc, unix.SIGKILL) // who was left behind
}

// attach puts mounts at places in a mount namespace of the child's own.
func (l *launch) attach(mounts []Attachment) {
	if len(mounts) == 0 {
		return
	}
	none, here := l.Str(""), plan.Int(unix.AT_FDCWD)
	l.Sys(plan.StageMounts, unix.SYS_UNSHARE, plan.Int(unix.CLONE_NEWNS))
	l.Sys(plan.StageMounts, unix.SYS_MOUNT, plan.Ptr(none), plan.Ptr(l.Str("/")), plan.Ptr(none), plan.Int(unix.MS_REC|unix.MS_PRIVATE), plan.Ptr(0))
	how := make([]byte, unix.SizeofOpenHow)
	binary.LittleEndian.PutUint64(how, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC)
	binary.LittleEndian.PutUint64(how[16:], unix.RESOLVE_IN_ROOT|unix.RESOLVE_NO_MAGICLINKS)
	inRoot := l.Data(how)
	slots := map[*os.File]plan.Arg{}
	for _, m := range mounts {
		tree, ok := slots[m.Tree]
		if !ok {
			tree = l.slot(m.At, m.Tree)
			slots[m.Tree] = tree
		}
		if m.Of != "" {
			dir := l.Sys(plan.StageMounts, unix.SYS_OPENAT2, tree, plan.Ptr(l.Str(m.Of)), plan.Ptr(inRoot), plan.Int(unix.SizeofOpenHow))
			tree = l.Sys(plan.StageMounts, unix.SYS_OPEN_TREE, dir.Result(), plan.Ptr(none), plan.Int(unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)).Result()
		}
		l.Sys(plan.StageMounts, unix.SYS_MOVE_MOUNT, tree, plan.Ptr(none), here, plan.Ptr(l.Str(m.At)), plan.Int(unix.MOVE_MOUNT_F_EMPTY_PATH))
	}
}

// executeFile executes an open file, with descriptor 3 for its report.
func (l *launch) executeFile(p *process, file, report plan.Arg) {
	l.Sys(plan.StageSignals, unix.SYS_RT_SIGPROCMASK, plan.Int(unix.SIG_SETMASK), plan.Ptr(l.Data(make([]byte, 8))), plan.Int(0), plan.Int(8))
	// The status pipe, which is there, moves on: it is closed by execve.
	moved := l.Sys(plan.StageFDs, unix.SYS_FCNTL, plan.Slot(0), plan.Int(unix.F_DUPFD_CLOEXEC), plan.Int(8))
	moved.Reslot(0)
	l.Sys(plan.StageFDs, unix.SYS_DUP3, report, plan.Int(3), plan.Int(0))
	l.Sys(plan.StageExec, unix.SYS_EXECVEAT, file, plan.Ptr(l.Str("")), plan.Ptr(l.Strs(p.args)), plan.Ptr(l.Strs(p.env)), plan.Int(unix.AT_EMPTY_PATH))
}
