package pod

import (
	"context"
	"fmt"
	"time"

	"github.com/naru-project/naru/internal/errs"
)

// startErrorCode is the exit code of a container whose entrypoint could not be
// started, as kubelet and people know it.
const startErrorCode = 128

// StartContainer lets a created container run. When that fails, the container
// is Exited with reason StartError.
func (m *Manager) StartContainer(ctx context.Context, id string) error {
	c, err := m.table.findContainer(id)
	if err != nil {
		return err
	}
	op := m.ops.begin("StartContainer", c.id, m.nameOf(c))
	defer op.end()
	if err := c.op.lock(ctx); err != nil {
		return waitError(ctx, "start container "+short(c.id)+": wait for its running operation", op)
	}
	defer c.op.unlock()
	ctx, cancel := detach(ctx, m.cfg.StartTimeout, "start container "+short(c.id))
	defer cancel()
	defer func() {
		// A panic: who catches it answers with an error, and nobody else would
		// ever move the container from here.
		if c.snap.Load().Phase == PhaseStarting {
			m.startFailed(ctx, c, errs.New(errs.Internal, "start container %s: broke off at %s", short(c.id), op.where()))
		}
	}()
	began := time.Now()
	if err := op.do(ctx, "record starting", func(ctx context.Context) error { return m.beginStart(ctx, c, began) }); err != nil {
		return fmt.Errorf("start container %s: %w", short(c.id), err)
	}
	err = op.do(ctx, "start process", func(ctx context.Context) error {
		rc, err := m.specs.get(c.id)
		if err != nil {
			return err
		}
		return m.deps.Executor.Start(ctx, rc)
	})
	op.enter(ctx, "record") // whatever came of it
	if err != nil {
		err = fmt.Errorf("start container %s: %w", short(c.id), err)
		m.startFailed(ctx, c, err)
		return err
	}
	return m.started(ctx, c)
}

func (m *Manager) beginStart(ctx context.Context, c *containerEntry, began time.Time) error {
	p := m.table.pod(c.podID)
	if p == nil || !p.snap.Load().Ready() || p.stops.Load() > 0 {
		return errs.New(errs.FailedPrecondition, "its pod is not ready")
	}
	if err := c.state.lock(ctx); err != nil {
		return err
	}
	defer c.state.unlock()
	if s := c.snap.Load(); s.Phase != PhaseCreated {
		return errs.New(errs.FailedPrecondition, "it is %s; start needs a created one", describe(s))
	}
	return m.change(c, hapStart, false, func(n *Container) { n.StartedAt = began })
}

func (m *Manager) started(ctx context.Context, c *containerEntry) error {
	if err := c.state.lock(ctx); err != nil {
		return err
	}
	defer c.state.unlock()
	// It runs, whatever the disk says: where the record stays at Starting,
	// recovery settles that with the monitor.
	if err := m.show(c, hapStarted, false, func(n *Container) { n.PID = c.proc.PID }); err != nil {
		return err
	}
	m.tell(EventStarted, c.podID, c.id)
	m.applyPending(ctx, c)
	return nil
}

// startFailed makes the container Exited; nothing of it may go on running.
func (m *Manager) startFailed(ctx context.Context, c *containerEntry, why error) {
	ctx, cancel := detach(ctx, m.cfg.StartTimeout, "end container "+short(c.id))
	defer cancel()
	if err := m.kill(ctx, c); err != nil {
		m.log(ctx).Error(err, "process of a failed start may be left until the container is removed", "id", c.id)
	}
	if err := c.state.lock(ctx); err != nil {
		m.log(ctx).Error(err, "failed start waits for a stuck change", "id", c.id)
		return
	}
	defer c.state.unlock()
	c.pending = nil // how the waiting process ended tells nobody anything
	m.settleExit(ctx, c, func(n *Container) {
		n.StartedAt = time.Time{}
		n.FinishedAt, n.ExitCode = time.Now(), startErrorCode
		n.Reason, n.Message = "StartError", why.Error()
	})
}

// describe is a container's state in a sentence.
func describe(s *Container) string {
	if s.Phase == PhaseExited {
		return fmt.Sprintf("exited (code %d)", s.ExitCode)
	}
	return string(s.Phase)
}

func (m *Manager) nameOf(c *containerEntry) string {
	s := c.snap.Load()
	if p := m.table.pod(c.podID); p != nil {
		return containerName(p.snap.Load().Config, s.Config.Metadata)
	}
	return s.Config.Metadata.Name
}
