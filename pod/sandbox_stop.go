package pod

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/naru-project/naru/internal/errs"
)

var errStopped = errs.New(errs.Canceled, "stopped while it was being created")

// StopSandbox ends what is being created in the pod, kills its containers and
// gives back its place on the host. Unknown ids are no error (CRI: idempotent).
func (m *Manager) StopSandbox(ctx context.Context, id string) error {
	p, err := m.lockPodToEnd(ctx, id, "stop")
	if p == nil {
		return err
	}
	defer p.op.unlock()
	op := m.ops.begin("StopPodSandbox", p.id, podName(p.snap.Load().Config))
	defer op.end()
	ctx, cancel := detach(ctx, m.cfg.StopTimeout, "stop pod "+short(p.id))
	defer cancel()
	return m.stopPod(ctx, p, op)
}

// lockPodToEnd finds a pod, ends the creates in it and takes its op lock. It
// returns nil when there is no such pod (any more).
func (m *Manager) lockPodToEnd(ctx context.Context, id, verb string) (*podEntry, error) {
	p, err := m.table.findPod(id)
	if err != nil {
		return nil, ignoreNotFound(err)
	}
	p.stops.Add(1) // from here on no new container is begun
	defer p.stops.Add(-1)
	m.joins.cancel(func(c *call) bool { return c.podID == p.id }, errStopped)
	if err := p.op.lock(ctx); err != nil {
		return nil, waitError(ctx, verb+" pod "+short(p.id)+": wait for its running operation", m.runningIn(p))
	}
	if m.table.pod(p.id) != p {
		p.op.unlock()
		return nil, nil
	}
	return p, nil
}

// runningIn finds the operation that holds a pod's lock: its own or that of a
// container that is being created.
func (m *Manager) runningIn(p *podEntry) *operation {
	if o := m.ops.of(p.id); o != nil {
		return o
	}
	for _, c := range m.table.containersOf(p.id) {
		if c.snap.Load().Phase == PhaseCreating {
			return m.ops.of(c.id)
		}
	}
	return nil
}

func ignoreNotFound(err error) error {
	if errs.Is(err, errs.NotFound) {
		return nil
	}
	return err
}

// stopPod is StopSandbox with p.op held. It can be repeated from any phase.
func (m *Manager) stopPod(ctx context.Context, p *podEntry, op *operation) error {
	s := p.snap.Load()
	switch s.Phase {
	case PhaseRemoving:
		return nil
	case PhaseStopped:
		if p.released && !m.anyAlive(p.id) {
			return nil
		}
	}
	wasReady := s.Ready()
	if err := op.do(ctx, "record stopping", func(context.Context) error { return m.showPod(p, hapStop, false, nil) }); err != nil {
		return fmt.Errorf("stop pod %s: %w", short(p.id), err)
	}
	if err := op.do(ctx, "kill containers", func(ctx context.Context) error { return m.stopMembers(ctx, p.id) }); err != nil {
		return fmt.Errorf("stop pod %s: %w", short(p.id), err)
	}
	if err := op.do(ctx, "release sandbox", func(ctx context.Context) error { return m.deps.Sandboxes.Release(ctx, p.id, s.Handle) }); err != nil {
		err = fmt.Errorf("stop pod %s: release its place: %w", short(p.id), err)
		m.log(ctx).Error(err, "pod keeps its place for now, it will be tried again", "id", p.id)
		return err
	}
	p.released, p.unsure = true, false
	if err := op.do(ctx, "record stopped", func(context.Context) error { return m.showPod(p, hapStopped, true, nil) }); err != nil {
		return fmt.Errorf("stop pod %s: %w", short(p.id), err)
	}
	if wasReady {
		m.tell(EventStopped, p.id, p.id)
	}
	return nil
}

func (m *Manager) anyAlive(podID string) bool {
	for _, c := range m.table.containersOf(podID) {
		if alive(c.snap.Load().Phase) {
			return true
		}
	}
	return false
}

// alive reports whether a container in this phase may have a process.
func alive(p Phase) bool {
	switch p {
	case PhaseCreated, PhaseStarting, PhaseRunning, PhaseStopping:
		return true
	}
	return false
}

// stopMembers kills all containers of a pod side by side.
func (m *Manager) stopMembers(ctx context.Context, podID string) error {
	return m.forMembers(podID, func(c *containerEntry) error {
		if !alive(c.snap.Load().Phase) {
			return nil
		}
		return m.stopEntry(ctx, c, 0)
	})
}

func (m *Manager) forMembers(podID string, f func(*containerEntry) error) error {
	members := m.table.containersOf(podID)
	all := make([]error, len(members))
	var wg sync.WaitGroup
	for i, c := range members {
		wg.Go(func() { all[i] = f(c) })
	}
	wg.Wait()
	return errors.Join(all...)
}

// RemoveSandbox stops the pod if needed and removes it with all its
// containers. Unknown ids are no error (CRI: idempotent).
func (m *Manager) RemoveSandbox(ctx context.Context, id string) error {
	p, err := m.lockPodToEnd(ctx, id, "remove")
	if p == nil {
		return err
	}
	defer p.op.unlock()
	op := m.ops.begin("RemovePodSandbox", p.id, podName(p.snap.Load().Config))
	defer op.end()
	ctx, cancel := detach(ctx, m.cfg.StopTimeout, "remove pod "+short(p.id))
	defer cancel()
	return m.removePod(ctx, p, op)
}

// removePod is RemoveSandbox with p.op held. It can be repeated from any phase.
func (m *Manager) removePod(ctx context.Context, p *podEntry, op *operation) error {
	phase := p.snap.Load().Phase
	if phase == PhaseReady || phase == PhaseStopping || phase == PhaseStopped {
		if err := m.stopPod(ctx, p, op); err != nil {
			return fmt.Errorf("remove pod %s: %w", short(p.id), err)
		}
	}
	err := op.do(ctx, "remove containers", func(ctx context.Context) error {
		return m.forMembers(p.id, func(c *containerEntry) error { return m.removeEntry(ctx, c) })
	})
	if err != nil {
		return fmt.Errorf("remove pod %s: %w", short(p.id), err)
	}
	if phase != PhaseCreating { // recovery undoes those without a phase of its own
		if err := op.do(ctx, "record removing", func(context.Context) error { return m.showPod(p, hapRemove, false, nil) }); err != nil {
			return fmt.Errorf("remove pod %s: %w", short(p.id), err)
		}
	}
	w := &sandboxWork{p: p, handle: p.snap.Load().Handle, op: op}
	last := p.snap.Load()
	if err := m.undoPod(ctx, p, undoAll(m.sandboxSteps(w)), op, nil); err != nil {
		return fmt.Errorf("remove pod %s: %w", short(p.id), err)
	}
	if phase != PhaseCreating && phase != PhaseBroken {
		m.hub.publish(Event{Type: EventDeleted, PodID: p.id, ContainerID: p.id, Time: time.Now(), Pod: last})
	}
	return nil
}

// UpdateSandbox stores the pod's new totals. CRI leaves it to the runtime what
// to do with them; kubelet writes the pod's cgroup itself.
func (m *Manager) UpdateSandbox(ctx context.Context, id string, overhead, resources *Resources) error {
	for _, r := range []*Resources{overhead, resources} {
		if err := validResources(r); err != nil {
			return fmt.Errorf("update pod: %w", err)
		}
	}
	p, err := m.table.findPod(id)
	if err != nil {
		return err
	}
	if err := p.op.lock(ctx); err != nil {
		return waitError(ctx, "update pod "+short(p.id), m.runningIn(p))
	}
	defer p.op.unlock()
	op := m.ops.begin("UpdatePodSandboxResources", p.id, podName(p.snap.Load().Config))
	defer op.end()
	n := *p.snap.Load()
	if m.table.pod(p.id) != p || !n.Ready() {
		return errs.New(errs.FailedPrecondition, "update pod %s: it is %s", short(p.id), n.Phase)
	}
	c := *n.Config
	if overhead != nil {
		c.Overhead = overhead
	}
	if resources != nil {
		c.Resources = resources
	}
	n.Config = &c
	return op.do(ctx, "record", func(context.Context) error { return m.putPod(p, &n, true) })
}
