package pod

import (
	"context"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/naru-project/naru/runtime"
)

const (
	reasonCompleted = "Completed"
	reasonError     = "Error"
	reasonOOM       = "OOMKilled"
	// reasonUnknown and its exit code are what kubelet itself says of a
	// container whose end nobody saw.
	reasonUnknown   = "ContainerStatusUnknown"
	unknownExitCode = 255

	exitTimeout  = 30 * time.Second
	exitsAtATime = 64
)

// exitFact is an exit and what the kernel said of the cgroup.
type exitFact struct {
	runtime.Exit
	oom bool
}

// takeExits takes the executor's announcements until ctx ends. They are worked
// on side by side: one slow disk write must not keep the others waiting.
func (m *Manager) takeExits(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	slots := make(chan struct{}, exitsAtATime)
	exits := m.deps.Executor.Exits()
	for {
		select {
		case <-ctx.Done():
			return
		case e, ok := <-exits:
			if !ok {
				return
			}
			slots <- struct{}{}
			wg.Go(func() {
				defer func() { <-slots }()
				// Told once: nobody asks again while the monitor is there.
				for ctx.Err() == nil {
					if m.takeExit(ctx, e) {
						return
					}
				}
			})
		}
	}
}

func (m *Manager) takeExit(ctx context.Context, e runtime.Exit) (taken bool) {
	ctx, cancel := detach(ctx, exitTimeout, "take exit of container "+short(e.ID))
	defer cancel()
	return m.exited(ctx, e)
}

// exited takes one exit. It may come late, more than once, and while a start
// or a create is not through; it is the kernel's word and always wins. It is not
// taken when a change of the container is stuck until ctx ends.
func (m *Manager) exited(ctx context.Context, e runtime.Exit) (taken bool) {
	c := m.table.container(e.ID)
	if c == nil {
		klog.FromContext(ctx).V(4).Info("exit of a container that is not known", "id", e.ID)
		return true
	}
	f := exitFact{Exit: e}
	s := c.snap.Load()
	if alive(s.Phase) {
		f.oom = m.oomKilled(ctx, c)
		if mode := s.Config.Security.PIDMode; mode != runtime.PIDContainer && mode != "" {
			// No PID namespace of its own: what it left behind is still there.
			if err := m.kill(ctx, c); err != nil {
				m.log(ctx).Error(err, "processes of an exited container may be left", "id", c.id)
			}
		}
	}
	if err := c.state.lock(ctx); err != nil {
		m.log(ctx).Error(err, "exit waits for a stuck change", "id", c.id)
		return false
	}
	defer c.state.unlock()
	m.takeFact(ctx, c, f)
	return true
}

func (m *Manager) oomKilled(ctx context.Context, c *containerEntry) bool {
	oom, err := m.deps.Executor.OOMKilled(ctx, c.view())
	if err != nil {
		m.log(ctx).Error(err, "cannot tell whether the container ran out of memory", "id", c.id)
	}
	return oom
}

// takeFact is called with c.state held.
func (m *Manager) takeFact(ctx context.Context, c *containerEntry, f exitFact) {
	s := c.snap.Load()
	switch s.Phase {
	case PhaseCreating, PhaseStarting: // whoever is at it applies it
		c.pending = &f
	case PhaseCreated, PhaseRunning, PhaseStopping:
		m.settleExit(ctx, c, func(n *Container) { f.fill(n) })
	case PhaseExited:
		if s.Reason == reasonUnknown && !f.Unknown { // better known now
			m.settleExit(ctx, c, func(n *Container) { f.fill(n) })
		}
	}
}

// applyPending is called with c.state held, at the end of a create or start.
func (m *Manager) applyPending(ctx context.Context, c *containerEntry) {
	if f := c.pending; f != nil {
		c.pending = nil
		m.takeFact(ctx, c, *f)
	}
}

func (f *exitFact) fill(n *Container) {
	n.FinishedAt, n.Message = f.Time, ""
	if n.FinishedAt.IsZero() {
		n.FinishedAt = time.Now()
	}
	n.ExitCode = int32(f.Code)
	switch {
	case f.Unknown:
		n.ExitCode, n.Reason = unknownExitCode, reasonUnknown
		n.Message = "the process is gone and nobody saw its exit status"
	case f.oom && f.Code != 0:
		n.Reason = reasonOOM
	case f.Code == 0:
		n.Reason = reasonCompleted
	default:
		n.Reason = reasonError
	}
	if n.StartedAt.IsZero() && n.Message == "" {
		n.Message = "stopped before it was started"
	}
}

// settleExit makes the container Exited. A record that cannot be written does
// not hold it up: the executor tells the exit again after a restart. It is
// called with c.state held.
func (m *Manager) settleExit(ctx context.Context, c *containerEntry, f func(*Container)) {
	c.stopBy = time.Time{}
	settle := func(n *Container) {
		n.PID = 0
		f(n)
	}
	if err := m.show(c, hapExit, true, settle); err != nil {
		m.log(ctx).Error(err, "exit does not fit the container's phase", "id", c.id) // a bug of ours
		return
	}
	s := c.snap.Load()
	m.log(ctx).V(2).Info("container exited", "container", m.nameOf(c), "id", c.id, "code", s.ExitCode, "reason", s.Reason)
	if w := m.cfg.Watch; w != nil {
		w.ContainerExited(s.Reason)
	}
	m.tell(EventStopped, c.podID, c.id)
	if !c.closed { // after the event: who waits for the end may go on to stop the pod
		c.closed = true
		close(c.ended)
	}
}
