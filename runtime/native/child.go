package native

import (
	"context"
	"errors"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime"
	"github.com/naru-project/naru/runtime/cgroup"
	"github.com/naru-project/naru/runtime/monitor"
	"github.com/naru-project/naru/runtime/plan"
)

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
	f, err := l.memfd("first process")
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
	if err := k.x.sendToJournal(ctx, k.c); err != nil {
		return 0, nil, err
	}
	return created.PID, created.PIDFD, nil
}

// cloneBuilder starts the helper that makes namespaces and file systems for a
// container in a PID namespace that exists already.
func (k *creation) cloneBuilder(ctx context.Context) error {
	l := builderPlan(k.process, k.shape(), k.files)
	f, err := l.memfd("builder")
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
		return errs.Wrap(errs.Internal, err)
	}
	switch c := errs.Of(err); c {
	case errs.Unavailable, errs.ResourceExhausted, errs.DeadlineExceeded, errs.Canceled: // of the way to the worker
		return errs.Wrap(c, err)
	}
	return errs.Wrap(errs.Internal, err)
}
