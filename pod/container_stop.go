package pod

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
	"syscall"
	"time"

	"github.com/naru-project/naru/internal/errs"
)

const (
	// maxGrace keeps now+grace a time. A longer one means "for ever" as well.
	maxGrace    = 10 * 365 * 24 * time.Hour
	killAgain   = time.Second     // between SIGKILLs: a fork may slip past one
	signalLimit = 5 * time.Second // of one Signal or Kill call
)

// stopper is one running stop of a container. Later callers join it; one with
// less patience shortens it.
type stopper struct {
	done    chan struct{}
	err     error // valid after done
	changed chan struct{}
	mu      sync.Mutex
	by      time.Time // guarded by mu: the end of the grace
}

func (s *stopper) shorten(by time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if by.Before(s.by) {
		s.by = by
		select {
		case s.changed <- struct{}{}:
		default:
		}
	}
}

func (s *stopper) deadline() time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.by
}

// StopContainer sends the stop signal, waits for grace, then kills. It returns
// when the exit was seen. Unknown and exited containers are no error (CRI:
// idempotent). A second call with a shorter grace shortens the first.
func (m *Manager) StopContainer(ctx context.Context, id string, grace time.Duration) error {
	c, err := m.table.findContainer(id)
	if err != nil {
		return ignoreNotFound(err)
	}
	if m.cancelCreate(ctx, c) {
		return nil
	}
	return m.stopEntry(ctx, c, grace)
}

// cancelCreate ends the create of a container and waits until it is undone. It
// reports false when there is no such create, or it came through after all.
func (m *Manager) cancelCreate(ctx context.Context, c *containerEntry) bool {
	k := m.joins.find(c.id)
	if k == nil {
		return false
	}
	k.cancel(errStopped)
	_, err := k.wait(ctx)
	return err != nil && m.table.container(c.id) != c
}

func (m *Manager) stopEntry(ctx context.Context, c *containerEntry, grace time.Duration) error {
	if !alive(c.snap.Load().Phase) {
		return nil
	}
	s, err := m.joinStop(ctx, c, time.Now().Add(min(max(grace, 0), maxGrace)))
	if err != nil {
		return err
	}
	select {
	case <-s.done:
		return s.err
	default:
	}
	select {
	case <-s.done:
		return s.err
	case <-ctx.Done():
		return waitError(ctx, "stop container "+short(c.id), m.ops.of(c.id))
	}
}

// joinStop joins the running stop of c, or starts one.
func (m *Manager) joinStop(ctx context.Context, c *containerEntry, by time.Time) (*stopper, error) {
	c.stopMu.Lock()
	defer c.stopMu.Unlock()
	if s := c.stopping; s != nil {
		s.shorten(by)
		return s, nil
	}
	s := &stopper{done: make(chan struct{}), changed: make(chan struct{}, 1), by: by}
	started := m.work.spawn(func() {
		op := m.ops.begin("StopContainer", c.id, m.nameOf(c))
		s.err = errs.New(errs.Internal, "stop container %s: ended without a result", short(c.id)) // stays so after Goexit
		defer func() {
			if p := recover(); p != nil {
				s.err = errs.New(errs.Internal, "stop container %s: panic: %v", short(c.id), p)
				m.log(ctx).Error(s.err, "panic in a stop", "id", c.id, "stack", string(debug.Stack()))
			}
			op.end()
			c.stopMu.Lock()
			c.stopping = nil
			c.stopMu.Unlock()
			close(s.done)
		}()
		s.err = m.stop(context.WithoutCancel(ctx), c, s, op)
	})
	if !started {
		return nil, errClosing("stop container " + short(c.id))
	}
	c.stopping = s
	return s, nil
}

// stop is the whole of one stop, in its own goroutine.
func (m *Manager) stop(ctx context.Context, c *containerEntry, s *stopper, op *operation) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(m.work.base, func() { cancel(errClosing("stop container " + short(c.id))) })()
	op.enter(ctx, "wait for its running operation")
	if err := c.op.lock(ctx); err != nil {
		return err
	}
	defer c.op.unlock()
	started, err := m.beginStop(ctx, c, s, op)
	if err != nil {
		return fmt.Errorf("stop container %s: %w", short(c.id), err)
	}
	if !started.alive {
		return nil
	}
	if started.graceful {
		op.enter(ctx, "grace")
		if ended, err := m.waitGrace(ctx, c, s); ended || err != nil {
			return err
		}
	}
	return op.do(ctx, "kill", func(ctx context.Context) error { return m.killAndWait(ctx, c) })
}

type stopBegun struct{ alive, graceful bool }

// beginStop records the stop and sends the signal. A container that was not
// started yet has nobody to get it.
func (m *Manager) beginStop(ctx context.Context, c *containerEntry, s *stopper, op *operation) (stopBegun, error) {
	if err := c.state.lock(ctx); err != nil {
		return stopBegun{}, err
	}
	defer c.state.unlock()
	snap := c.snap.Load()
	if !alive(snap.Phase) || m.table.container(c.id) != c {
		return stopBegun{}, nil
	}
	by := s.deadline()
	b := stopBegun{alive: true, graceful: !snap.StartedAt.IsZero() && time.Until(by) > 0}
	c.stopBy = by
	if err := op.do(ctx, "record stopping", func(context.Context) error { return m.show(c, hapStop, false, nil) }); err != nil {
		return stopBegun{}, err
	}
	if b.graceful {
		if err := op.do(ctx, "signal", func(ctx context.Context) error { return m.signal(ctx, c, snap.StopSignal) }); err != nil {
			m.log(ctx).Error(err, "stop signal did not arrive, killing at once", "id", c.id, "signal", snap.StopSignal)
			b.graceful = false
		}
	}
	return b, nil
}

func (m *Manager) signal(ctx context.Context, c *containerEntry, name string) error {
	sig, err := parseSignal(name)
	if err != nil {
		m.log(ctx).Error(err, "unknown stop signal, using SIGTERM", "id", c.id)
		sig = syscall.SIGTERM
	}
	ctx, cancel := detach(ctx, signalLimit, "signal container "+short(c.id))
	defer cancel()
	return m.deps.Executor.Signal(ctx, c.id, sig)
}

// waitGrace reports whether the container ended within the grace.
func (m *Manager) waitGrace(ctx context.Context, c *containerEntry, s *stopper) (ended bool, err error) {
	for {
		timer := time.NewTimer(time.Until(s.deadline()))
		select {
		case <-c.ended:
			timer.Stop()
			return true, nil
		case <-timer.C:
			return false, nil
		case <-s.changed:
			timer.Stop()
		case <-ctx.Done():
			timer.Stop()
			return false, context.Cause(ctx)
		}
	}
}

// killAndWait kills by cgroup, again and again: neither a fork race nor a lost
// answer of the monitor may keep a container alive.
func (m *Manager) killAndWait(ctx context.Context, c *containerEntry) error {
	limit := time.NewTimer(m.cfg.KillWait)
	defer limit.Stop()
	again := time.NewTicker(killAgain)
	defer again.Stop()
	var last error
	for {
		last = m.kill(ctx, c)
		select {
		case <-c.ended:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-limit.C:
			return m.notDead(ctx, c, last)
		case <-again.C:
		}
	}
}

func (m *Manager) kill(ctx context.Context, c *containerEntry) error {
	ctx, cancel := detach(ctx, signalLimit, "kill container "+short(c.id))
	defer cancel()
	return m.deps.Executor.Kill(ctx, c.view())
}

// notDead asks the kernel about a container whose exit nobody announced. A
// process that is gone is an exit with an unknown status; one that is there is
// named, with what it hangs in.
func (m *Manager) notDead(ctx context.Context, c *containerEntry, killErr error) error {
	if err := c.state.lock(ctx); err != nil {
		return err
	}
	defer c.state.unlock()
	if !alive(c.snap.Load().Phase) {
		return nil
	}
	proc := c.proc
	st, ok := m.deps.Host.Process(proc.PID)
	if !ok || proc.PID == 0 || proc.StartTime != 0 && st.StartTime != proc.StartTime || st.State == "Z" || st.State == "X" {
		m.log(ctx).Info("container's process is gone, but its exit was not announced", "id", c.id, "pid", proc.PID)
		m.takeFact(ctx, c, exitFact{Exit: unknownExit(c.id)})
		return nil
	}
	where := ""
	if st.Wchan != "" {
		where = " in " + st.Wchan
	}
	err := errs.New(errs.DeadlineExceeded, "stop container %s: process %d is still there %s after SIGKILL, in state %s%s",
		short(c.id), proc.PID, m.cfg.KillWait, st.State, where)
	if killErr != nil {
		err = errs.New(errs.DeadlineExceeded, "%w", errors.Join(err, killErr))
	}
	return err
}
