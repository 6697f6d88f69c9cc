package native

import (
	"context"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/sys"
	"github.com/naru-project/naru/runtime/monitor"
	"github.com/naru-project/naru/runtime/plan"
)

// runProgram runs a program of the host to its end, in the daemon's mount
// namespace, without input and output, and with an environment of its own. It
// is a child of the worker: the daemon executes nothing, and has given up some
// privileges that programs may need. When ctx ends it gets SIGTERM and then
// grace to end; it is killed when the daemon dies meanwhile. A program that is
// not there is os.ErrNotExist.
func (x *Executor) runProgram(ctx context.Context, grace time.Duration, args []string) error {
	sr, sw, err := sys.Pipe(true)
	if err != nil {
		return errs.Wrap(errs.Internal, err)
	}
	defer func() { _, _ = sr.Close(), sw.Close() }()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0) //nolint:forbidigo // a path of the host
	if err != nil {
		return errs.New(errs.Internal, "open the null device: %w", err)
	}
	defer func() { _ = null.Close() }()
	mounts, err := sys.OpenNamespace("/proc/self/ns/mnt", unix.CLONE_NEWNS)
	if err != nil {
		return errs.Wrap(errs.Internal, err)
	}
	defer func() { _ = mounts.Close() }()
	l := programPlan(sw, null, mounts, args)
	f, err := l.memfd()
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	p, err := x.cfg.Monitor.Exec(ctx, monitor.ExecRequest{Plan: f, FDs: l.files, Clone: l.clone, StatusR: sr})
	if err != nil {
		return planError(err)
	}
	defer p.Close()
	exit, err := p.Wait(ctx)
	if ctx.Err() != nil {
		wctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
		defer cancel()
		_ = unix.PidfdSendSignal(sys.FD(p.PIDFD), unix.SIGTERM, nil, 0)
		if _, werr := p.Wait(wctx); wctx.Err() != nil && werr != nil {
			_ = unix.PidfdSendSignal(sys.FD(p.PIDFD), unix.SIGKILL, nil, 0)
		}
		return errs.New(errs.Of(ctx.Err()), "%w", context.Cause(ctx))
	}
	switch {
	case err != nil:
		return err
	case exit.Signal != 0:
		return errs.New(errs.Internal, "%s was ended by signal %d", args[0], exit.Signal)
	case exit.Status != 0:
		return errs.New(errs.Internal, "%s ended with status %d", args[0], exit.Status)
	}
	return nil
}

// programPlan: the daemon's mounts, the null device three times, execve.
func programPlan(status, null, mounts *os.File, args []string) *launch {
	l := newLaunch(status)
	n := l.slot("null", null)
	l.Sys(plan.StageNamespaces, unix.SYS_SETNS, l.slot("mounts", mounts), plan.Int(unix.CLONE_NEWNS))
	p := &process{args: args, env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}, umask: 0o077}
	l.schedule()
	l.stdio(n, n, n)
	l.closeFiles()
	l.inheritance(p)
	l.session(p)
	l.execute(p)
	return l
}
