package native

import (
	"context"
	"os"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/sys"
	"github.com/naru-project/naru/runtime"
	"github.com/naru-project/naru/runtime/monitor"
)

// Keep has the monitor keep a container whose first process an OCI runtime has
// made: the process must be a child of the keeper by now.
func (x *Executor) Keep(ctx context.Context, c *runtime.Container, pid int, kept monitor.Kept) (_ runtime.Process, err error) {
	info, err := x.cfg.Monitor.Info(ctx)
	if err != nil {
		return runtime.Process{}, err
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return runtime.Process{}, errs.New(errs.Internal, "open process %d: %w", pid, err)
	}
	pidfd := os.NewFile(uintptr(fd), "pidfd")
	defer func() { _ = pidfd.Close() }()
	dir, err := x.procDir(pid, pidfd)
	if err != nil {
		return runtime.Process{}, err
	}
	defer func() { _ = dir.Close() }()
	s, err := readStat(dir)
	if err != nil {
		return runtime.Process{}, err
	}
	if s.parent != info.KeeperPID {
		return runtime.Process{}, errs.New(errs.Internal, "process %d is a child of %d, not of naru-monitor (%d)", pid, s.parent, info.KeeperPID)
	}
	if err := x.cfg.Monitor.Take(ctx, monitor.TakeRequest{ID: c.ID, PID: pid, PIDFD: pidfd, Kept: kept, TTY: c.TTY}); err != nil {
		return runtime.Process{}, err
	}
	if err := x.sendToJournal(ctx, c); err != nil {
		return runtime.Process{}, err
	}
	// Still there: the keeper did not reap it before it knew it.
	if err := unix.PidfdSendSignal(sys.FD(pidfd), 0, nil, 0); err != nil {
		return runtime.Process{}, errs.New(errs.Internal, "the first process died before it was started: %w", err)
	}
	own, err := dup(pidfd)
	if err != nil {
		return runtime.Process{}, err
	}
	x.remember(c.ID, pid, own, "")
	return runtime.Process{PID: pid, StartTime: s.start}, nil
}

// Started tells the monitor that the runtime has started the container.
func (x *Executor) Started(ctx context.Context, id string) error { return x.cfg.Monitor.Start(ctx, id) }

// MonitorBinary is the program of the monitor, open.
func (x *Executor) MonitorBinary(ctx context.Context) (*os.File, error) {
	return x.cfg.Monitor.Binary(ctx)
}

// HostIDs are the host's ids of the user that a container's processes have.
func HostIDs(c *runtime.Container) (uid, gid int) {
	return hostID(c.UIDMap, c.Spec.Process.User.UID), hostID(c.GIDMap, c.Spec.Process.User.GID)
}
