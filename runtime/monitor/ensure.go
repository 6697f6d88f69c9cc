package monitor

import (
	"context"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
)

// Socket is where the keeper of dir listens.
func Socket(dir string) string { return filepath.Join(dir, "monitor.sock") }

// Times of Ensure.
const (
	ensureTime = 60 * time.Second // for all of it: a new keeper gives a hung worker 20 s
	askTime    = 5 * time.Second  // for one answer
	// successorTime is how long somebody else gets to start a keeper: an init
	// system (its unit has RestartSec=1) or the guard of one that was killed.
	successorTime = 3 * time.Second
)

// EnsureOptions say who starts a keeper, and how.
type EnsureOptions struct {
	Binary string // naru-monitor
	Dir    string // the keeper's folder
	// Managed: an init system is there, whose business it is. It gets a while to
	// do so before a keeper is started here.
	Managed bool
}

// Ensure connects to the keeper of o.Dir, and starts one, detached, with a
// guard and its own log file DIR/monitor.log, when none answers and none is
// about to: while a keeper holds the lock it is waited for, and where somebody
// else is likely to start one, because an init system is there or the worker of
// a killed keeper still answers, that one gets the first chance.
//
// It is to be called before this process gives up privileges that containers
// may need: a keeper has what its starter had.
func Ensure(ctx context.Context, o EnsureOptions) (*Client, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, ensureTime, errs.New(errs.Unavailable, "no keeper answers in %s; see %s", o.Dir, filepath.Join(o.Dir, "monitor.log")))
	defer cancel()
	begin := time.Now()
	var ended <-chan struct{}
	var giveUp <-chan time.Time
	for started := false; ; {
		c, orphan, err := reach(ctx, o.Dir)
		if err == nil || !errs.Is(err, errs.Unavailable) && !errs.Is(err, errs.DeadlineExceeded) {
			return c, err // or it answers, but in another language
		}
		patience := successorTime
		if !orphan && !o.Managed {
			patience = 0
		}
		if !started && time.Since(begin) >= patience && !locked(o.Dir) {
			var serr error
			if ended, serr = startKeeper(o.Binary, o.Dir); serr != nil {
				return nil, serr
			}
			started = true
		}
		select {
		case <-ctx.Done():
			return nil, errs.New(errs.Unavailable, "%w (last: %w)", context.Cause(ctx), err)
		case <-giveUp:
			return nil, errs.New(errs.Unavailable, "the keeper that was started in %s has ended; see %s (%w)", o.Dir, filepath.Join(o.Dir, "monitor.log"), err)
		case <-ended:
			// Another one may have been faster; then it answers soon.
			ended, giveUp = nil, time.After(successorTime)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// reach connects once. orphan: a worker answers whose keeper is dead, or
// something hangs.
func reach(ctx context.Context, dir string) (c *Client, orphan bool, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, askTime, errs.New(errs.Unavailable, "the monitor does not answer within %v", askTime))
	defer cancel()
	if c, err = Connect(ctx, Socket(dir)); err != nil {
		return nil, ctx.Err() != nil, err
	}
	info, err := c.Info(ctx)
	if err == nil && !info.Orphan {
		return c, false, nil
	}
	_ = c.Close()
	if err == nil {
		err = errs.New(errs.Unavailable, "the keeper of %s is gone", dir)
	}
	return nil, true, err
}

// locked reports whether a keeper holds dir's lock, without taking it.
func locked(dir string) bool {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return false
	}
	defer func() { _ = f.Close() }()
	l := unix.Flock_t{Type: unix.F_WRLCK}
	err = unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &l)
	return err == nil && l.Type != unix.F_UNLCK
}

// startKeeper starts a keeper and its guard in a session of their own. The
// guard is a child of this process while that lives, and reaped by it.
func startKeeper(binary, dir string) (<-chan struct{}, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, errs.New(errs.Internal, "make the monitor's folder: %w", err)
	}
	log, err := os.OpenFile(filepath.Join(dir, "monitor.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, errs.New(errs.Internal, "open the monitor's log: %w", err)
	}
	defer func() { _ = log.Close() }()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, errs.New(errs.Internal, "open %s: %w", os.DevNull, err)
	}
	defer func() { _ = null.Close() }()
	p, err := os.StartProcess(binary, []string{"naru-monitor", "keeper", "--dir", dir, "--guard"}, &os.ProcAttr{
		Dir: "/", Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}, Files: []*os.File{null, log, log},
		Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return nil, errs.New(errs.FailedPrecondition, "start %s: %w", binary, err)
	}
	ended := make(chan struct{})
	go func() {
		_, _ = p.Wait()
		close(ended)
	}()
	return ended, nil
}
