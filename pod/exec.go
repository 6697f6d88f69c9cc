package pod

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime"
)

// None of these takes a lock: a probe, a log rotation or a person's shell
// neither waits for an operation of the container nor holds one up.

// running finds a container that runs, a stopping one included, and what the
// executor was given for it.
func (m *Manager) running(id, what string) (*Container, *runtime.Container, error) {
	s, err := m.Container(id)
	if err != nil {
		return nil, nil, err
	}
	if s.State != StateRunning {
		return nil, nil, errs.New(errs.FailedPrecondition, "container %s is %s; %s needs a running one", short(s.ID), describe(s), what)
	}
	rc, err := m.specs.get(s.ID)
	return s, rc, err
}

// ExecSync runs a command in a container and collects its output. timeout 0 is none.
func (m *Manager) ExecSync(ctx context.Context, id string, cmd []string, timeout time.Duration) (ExecResult, error) {
	if err := validCommand(cmd); err != nil {
		return ExecResult{}, err
	}
	s, rc, err := m.running(id, "exec")
	if err != nil {
		return ExecResult{}, err
	}
	r, err := m.deps.Executor.ExecSync(ctx, rc, runtime.ExecSpec{Args: cmd, Timeout: max(timeout, 0)})
	switch {
	case err == nil:
		return r, nil
	case timeout > 0 && ctx.Err() == nil && (errs.Is(err, errs.DeadlineExceeded) || errors.Is(err, context.DeadlineExceeded)):
		// kubelet knows a probe's timeout by this class alone.
		return r, errs.New(errs.DeadlineExceeded, "exec in container %s: not done after %s: %w", short(s.ID), timeout, err)
	}
	return r, fmt.Errorf("exec in container %s: %w", short(s.ID), err)
}

func validCommand(cmd []string) error {
	if len(cmd) == 0 || cmd[0] == "" {
		return errs.New(errs.InvalidArgument, "exec: the command is empty")
	}
	if err := noNUL(cmd); err != nil {
		return errs.New(errs.InvalidArgument, "exec: command: %w", err)
	}
	return nil
}

// Exec runs a command in a container, connected to s, and returns its exit code.
func (m *Manager) Exec(ctx context.Context, id string, cmd []string, tty bool, s Streams) (exitCode int, err error) {
	if err := validCommand(cmd); err != nil {
		return 0, err
	}
	c, rc, err := m.running(id, "exec")
	if err != nil {
		return 0, err
	}
	exitCode, err = m.deps.Executor.Exec(ctx, rc, runtime.ExecSpec{Args: cmd, TTY: tty, Stdin: s.Stdin != nil}, s)
	if err != nil {
		return exitCode, fmt.Errorf("exec in container %s: %w", short(c.ID), err)
	}
	return exitCode, nil
}

// Attach connects s to the streams of a container's first process.
func (m *Manager) Attach(ctx context.Context, id string, s Streams) error {
	c, rc, err := m.running(id, "attach")
	if err != nil {
		return err
	}
	if err := m.deps.Executor.Attach(ctx, rc, s); err != nil {
		return fmt.Errorf("attach to container %s: %w", short(c.ID), err)
	}
	return nil
}

// ReopenLog closes and opens the log file, after kubelet renamed it. It works
// while the container is being stopped: a chatty one would fill the disk.
func (m *Manager) ReopenLog(ctx context.Context, id string) error {
	c, rc, err := m.running(id, "reopening its log")
	if err != nil {
		return err
	}
	if c.LogPath == "" {
		return errs.New(errs.FailedPrecondition, "reopen log of container %s: it has none", short(c.ID))
	}
	if err := m.deps.Executor.ReopenLog(ctx, rc); err != nil {
		return fmt.Errorf("reopen log of container %s: %w", short(c.ID), err)
	}
	return nil
}

// UpdateContainer changes the limits of a container. What r does not mention
// (zero) stays. annotations are for extensions, of which there are none.
func (m *Manager) UpdateContainer(ctx context.Context, id string, r Resources, _ map[string]string) error {
	if err := validResources(&r); err != nil {
		return fmt.Errorf("update container: %w", err)
	}
	c, err := m.table.findContainer(id)
	if err != nil {
		return err
	}
	op := m.ops.begin("UpdateContainerResources", c.id, m.nameOf(c))
	defer op.end()
	if err := c.op.lock(ctx); err != nil {
		return waitError(ctx, "update container "+short(c.id)+": wait for its running operation", op)
	}
	defer c.op.unlock()
	s := c.snap.Load()
	if s.Phase != PhaseCreated && s.Phase != PhaseRunning {
		return errs.New(errs.FailedPrecondition, "update container %s: it is %s", short(c.id), describe(s))
	}
	after := merged(s.Resources, r)
	if err := validResources(&after); err != nil {
		return fmt.Errorf("update container %s: together with its present limits: %w", short(c.id), err)
	}
	rc, err := m.specs.get(c.id)
	if err != nil {
		return err
	}
	ctx, cancel := detach(ctx, m.cfg.StartTimeout, "update container "+short(c.id))
	defer cancel()
	if err := op.do(ctx, "cgroup", func(ctx context.Context) error { return m.deps.Executor.Update(ctx, rc, r) }); err != nil {
		return fmt.Errorf("update container %s: %w", short(c.id), err)
	}
	op.enter(ctx, "record")
	return m.recordResources(ctx, c, after)
}

func (m *Manager) recordResources(ctx context.Context, c *containerEntry, r Resources) error {
	if err := c.state.lock(ctx); err != nil {
		return err
	}
	defer c.state.unlock()
	n := *c.snap.Load()
	n.Resources = r
	m.putOrShow(c, &n, true) // the kernel has them already
	return nil
}
