package pod

import (
	"context"
	"errors"
	"io/fs"
	"time"

	"github.com/naru-project/naru/internal/errs"
)

// maxStuckStats bounds the goroutines that hang in the kernel on dead mounts.
const maxStuckStats = 128

// statter looks at host paths with a deadline. stat(2) on a dead NFS or CSI
// mount cannot be interrupted: it is left behind in its goroutine.
type statter struct {
	host  Host
	limit time.Duration
	slots chan struct{}
}

func newStatter(h Host, limit time.Duration) *statter {
	return &statter{host: h, limit: limit, slots: make(chan struct{}, maxStuckStats)}
}

// check reports a path that is not there. CRI (Mount.host_path) wants an
// error then, not a new folder. Its class is FailedPrecondition: the same
// request works as soon as the path exists.
func (s *statter) check(ctx context.Context, path string) error {
	select {
	case s.slots <- struct{}{}:
	default:
		return errs.New(errs.ResourceExhausted,
			"look at host path %s: %d earlier look-ups hang in the kernel; find the dead mount on this node", path, maxStuckStats)
	}
	done := make(chan error, 1)
	go func() { // ends when the kernel answers, which may be never
		defer func() { <-s.slots }()
		done <- s.host.Stat(path)
	}()
	timer := time.NewTimer(s.limit)
	defer timer.Stop()
	select {
	case err := <-done:
		return statError(path, err)
	case <-timer.C:
		return errs.New(errs.Unavailable, "look at host path %s: no answer within %s: its file system does not respond", path, s.limit)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func statError(path string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, fs.ErrNotExist):
		return errs.New(errs.FailedPrecondition, "host path %s does not exist", path)
	}
	return errs.New(errs.FailedPrecondition, "look at host path %s: %w", path, err)
}
