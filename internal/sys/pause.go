package sys

import (
	"context"
	"time"
)

// Pause waits, and reports whether it did so to the end: ctx may end first.
func Pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
