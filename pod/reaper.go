package pod

import (
	"context"
	"time"
)

// reap finishes what could not be finished when it was asked for, until ctx
// ends. It never waits for a lock: whoever holds one is at it.
func (m *Manager) reap(ctx context.Context) {
	tick := time.NewTicker(m.cfg.ReapInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-m.wake:
		}
		m.reapOnce(ctx)
	}
}

func (m *Manager) reapOnce(ctx context.Context) {
	if m.unlisted.Load() {
		m.settleLate(ctx)
	}
	for _, c := range *m.table.allCtrs.Load() {
		if ctx.Err() != nil {
			return
		}
		m.reapContainer(ctx, c)
	}
	each(*m.table.allPods.Load(), func(p *podEntry) { // one whose network plugin hangs keeps no other waiting
		if ctx.Err() == nil {
			m.reapPod(ctx, p)
		}
	})
}

// settleLate does what Recover could not while the monitor did not answer.
func (m *Manager) settleLate(ctx context.Context) {
	states, err := m.listed(ctx)
	if err != nil {
		m.log(ctx).Error(err, "the monitor still does not tell what it keeps")
		return
	}
	m.unlisted.Store(false)
	for _, c := range *m.table.allCtrs.Load() {
		if c.snap.Load().CreatedAt.After(m.began) { // this life made it, and maybe after it asked
			continue
		}
		if !alive(c.snap.Load().Phase) || !c.op.tryLock() {
			continue
		}
		m.settleAlive(ctx, c, states)
		c.op.unlock()
	}
	m.endOrphans(ctx, &Report{}, states)
}

func (m *Manager) reapContainer(ctx context.Context, c *containerEntry) {
	switch s := c.snap.Load(); s.Phase {
	case PhaseBroken:
		if err := m.takeDownUnowned(ctx, c); err != nil {
			m.log(ctx).Error(err, "container is still not taken down", "id", c.id)
		}
		return
	case PhaseStopping:
		c.stopMu.Lock()
		idle := c.stopping == nil
		c.stopMu.Unlock()
		if idle { // its stopper gave up: the process did not die
			_, _ = m.joinStop(ctx, c, time.Now())
		}
	}
	if c.state.tryLock() {
		if c.dirty && m.table.container(c.id) == c {
			if err := m.put(c, c.snap.Load(), false); err != nil {
				m.log(ctx).Error(err, "container's record is still behind", "id", c.id)
			}
		}
		c.state.unlock()
	}
}

func (m *Manager) reapPod(ctx context.Context, p *podEntry) {
	phase := p.snap.Load().Phase
	if !p.op.tryLock() {
		return
	}
	defer p.op.unlock()
	if m.table.pod(p.id) != p || p.snap.Load().Phase != phase {
		return
	}
	ctx, cancel := detach(ctx, m.cfg.StopTimeout, "finish pod "+short(p.id))
	defer cancel()
	if err := m.finishPod(ctx, p, phase); err != nil {
		m.log(ctx).Error(err, "pod is still not settled", "id", p.id, "phase", phase)
	}
	if p.dirty && m.table.pod(p.id) == p {
		if err := m.putPod(p, p.snap.Load(), false); err != nil {
			m.log(ctx).Error(err, "pod's record is still behind", "id", p.id)
		}
	}
}

// finishPod goes on where an operation of the pod stopped. The caller holds p.op.
func (m *Manager) finishPod(ctx context.Context, p *podEntry, phase Phase) error {
	op := func() *operation { return m.ops.begin("Reap", p.id, podName(p.snap.Load().Config)) }
	switch {
	case phase == PhaseBroken:
		o := op()
		defer o.end()
		return m.removePod(ctx, p, o)
	case phase == PhaseStopping:
		o := op()
		defer o.end()
		return m.stopPod(ctx, p, o)
	case phase == PhaseStopped && !p.released && !m.anyAlive(p.id):
		return m.release(ctx, p)
	case p.unsure:
		_, err := m.adopt(ctx, p)
		return err
	}
	return nil
}
