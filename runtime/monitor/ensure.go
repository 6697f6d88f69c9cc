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

// Ensure connects to the keeper of dir, and starts one, detached, with its own
// log file DIR/monitor.log, when none answers. Where the init system runs the
// keeper (its own unit is the better place: what this process has dropped,
// containers would lack), it only connects.
func Ensure(ctx context.Context, binary, dir string) (*Client, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, 30*time.Second, errs.New(errs.Unavailable, "no keeper answers in %s; see %s", dir, filepath.Join(dir, "monitor.log")))
	defer cancel()
	c, err := Connect(ctx, Socket(dir))
	if err == nil {
		info, ierr := c.Info(ctx)
		if ierr == nil && !info.Orphan {
			return c, nil
		}
		_ = c.Close()
		err = errs.New(errs.Unavailable, "the keeper of %s is gone", dir)
	} else if !errs.Is(err, errs.Unavailable) {
		return nil, err // it answers, but in another language
	}
	ended, serr := startKeeper(binary, dir)
	if serr != nil {
		return nil, serr
	}
	for {
		select {
		case <-ctx.Done():
			return nil, errs.New(errs.Unavailable, "%w (last: %w)", context.Cause(ctx), err)
		case <-ended:
			// Another one may have been faster; then it answers soon.
			ended = nil
		case <-time.After(10 * time.Millisecond):
		}
		if c, err = Connect(ctx, Socket(dir)); err != nil {
			continue
		}
		if info, ierr := c.Info(ctx); ierr == nil && !info.Orphan {
			return c, nil
		}
		_ = c.Close()
	}
}

// startKeeper starts a keeper in a session of its own. It is a child of this
// process while that lives, and reaped by it.
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
	p, err := os.StartProcess(binary, []string{"naru-monitor", "keeper", "--dir", dir}, &os.ProcAttr{
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
