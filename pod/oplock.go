package pod

import "context"

// opLock is a lock that honours a context: a channel with one slot. It is
// waited for in the order of arrival.
type opLock chan struct{}

func newOpLock() opLock { return make(opLock, 1) }

// lock returns the cause of ctx's end if the lock was not to be had before.
func (l opLock) lock(ctx context.Context) error {
	select {
	case l <- struct{}{}:
		return nil
	default:
	}
	select {
	case l <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (l opLock) tryLock() bool {
	select {
	case l <- struct{}{}:
		return true
	default:
		return false
	}
}

func (l opLock) unlock() { <-l }
