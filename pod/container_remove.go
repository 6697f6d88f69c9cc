package pod

import (
	"context"
	"fmt"
	"time"
)

// RemoveContainer removes a container, by force if it runs. Its log stays:
// kubelet removes logs. Unknown ids are no error (CRI: idempotent).
func (m *Manager) RemoveContainer(ctx context.Context, id string) error {
	c, err := m.table.findContainer(id)
	if err != nil {
		return ignoreNotFound(err)
	}
	return m.removeEntry(ctx, c)
}

func (m *Manager) removeEntry(ctx context.Context, c *containerEntry) error {
	if m.cancelCreate(ctx, c) {
		return nil
	}
	if err := m.stopEntry(ctx, c, 0); err != nil {
		return fmt.Errorf("remove container %s: %w", short(c.id), err)
	}
	op := m.ops.begin("RemoveContainer", c.id, m.nameOf(c))
	defer op.end()
	if err := c.op.lock(ctx); err != nil {
		return waitError(ctx, "remove container "+short(c.id)+": wait for its running operation", op)
	}
	defer c.op.unlock()
	if m.table.container(c.id) != c {
		return nil
	}
	ctx, cancel := detach(ctx, m.cfg.StopTimeout, "remove container "+short(c.id))
	defer cancel()
	return m.takeDown(ctx, c, op)
}

// takeDown removes an exited, broken or half-made container. The caller holds
// c.op, or is alone (recovery).
func (m *Manager) takeDown(ctx context.Context, c *containerEntry, op *operation) error {
	s := c.snap.Load()
	if s.Phase != PhaseCreating {
		if err := op.do(ctx, "record removing", func(ctx context.Context) error { return m.beginRemove(ctx, c) }); err != nil {
			return fmt.Errorf("remove container %s: %w", short(c.id), err)
		}
	}
	steps := m.containerSteps(&containerWork{c: c})
	if err := m.undoContainer(ctx, c, undoAll(steps), op, nil); err != nil {
		return fmt.Errorf("remove container %s: %w", short(c.id), err)
	}
	if s.Phase != PhaseCreating && s.Phase != PhaseBroken {
		m.tell(EventDeleted, c.podID, c.id)
	}
	m.log(ctx).V(2).Info("container is removed", "id", c.id, "age", time.Since(s.CreatedAt).Round(time.Millisecond))
	return nil
}

func (m *Manager) beginRemove(ctx context.Context, c *containerEntry) error {
	if err := c.state.lock(ctx); err != nil {
		return err
	}
	defer c.state.unlock()
	return m.show(c, hapRemove, false, func(n *Container) {
		if n.FinishedAt.IsZero() { // a create that could not be undone: it never ran
			n.FinishedAt, n.ExitCode, n.Reason = time.Now(), unknownExitCode, reasonUnknown
		}
	})
}
