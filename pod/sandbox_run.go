package pod

import (
	"context"
	"fmt"
	"runtime/debug"
	"time"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/undo"
	"github.com/naru-project/naru/runtime"
	"github.com/naru-project/naru/sandbox"
)

// RunSandbox makes a pod. A call whose caller went away goes on; the same call
// again joins it, or gets the pod that it made. c belongs to the manager then.
func (m *Manager) RunSandbox(ctx context.Context, c *SandboxConfig) (string, error) {
	if err := m.validateSandbox(c); err != nil {
		return "", err
	}
	fresh := &call{id: newID(), name: "pod " + podName(c), config: c, done: make(chan struct{})}
	fresh.podID = fresh.id
	key := keyOf(c.Metadata)
	return m.create(ctx, key, fresh, m.alivePod(key), "RunPodSandbox", m.runSandbox)
}

// alivePod finds the pod that an earlier call of this key made.
func (m *Manager) alivePod(key podKey) func() (string, any, error) {
	return func() (string, any, error) {
		if p := m.table.podOfKey(key); p != nil {
			if s := p.snap.Load(); s.Ready() {
				return p.id, s.Config, nil
			}
		}
		return "", nil, nil
	}
}

// create starts or joins a create.
func (m *Manager) create(ctx context.Context, key any, fresh *call, alive func() (string, any, error),
	kind string, do func(context.Context, *call) error,
) (string, error) {
	opCtx, cancelTimeout := detach(ctx, m.cfg.CreateTimeout, "create "+fresh.name)
	opCtx, fresh.cancel = context.WithCancelCause(opCtx)
	drop := func() { fresh.cancel(nil); cancelTimeout() }
	fresh.op = m.ops.prepare(kind, fresh.id, fresh.name) // complete before others see it

	running, id, config, err := m.joins.begin(key, alive, fresh)
	switch {
	case err != nil:
		drop()
		return "", err
	case running != nil:
		drop()
		if err := sameConfig(fresh.name, running.id, running.config, fresh.config); err != nil {
			return "", err
		}
		return running.wait(ctx)
	case id != "":
		drop()
		return id, sameConfig(fresh.name, id, config, fresh.config)
	}
	m.ops.add(fresh.op)
	started := m.work.spawn(func() {
		err := errs.New(errs.Internal, "create %s: ended without a result", fresh.name) // stays so after Goexit
		defer func() {
			if p := recover(); p != nil {
				err = errs.New(errs.Internal, "create %s: panic: %v", fresh.name, p)
				m.log(ctx).Error(err, "panic in a create", "id", fresh.id, "stack", string(debug.Stack()))
				m.abandon(fresh.id, err)
			}
			fresh.op.end()
			m.joins.end(key, fresh, err)
			drop()
		}()
		if err = do(opCtx, fresh); err != nil && ctx.Err() != nil { // nobody may be there to be told
			m.log(ctx).Error(err, "create ended after its caller had left", "id", fresh.id, "name", fresh.name)
		}
	})
	if !started {
		fresh.op.end()
		m.joins.end(key, fresh, errClosing("create "+fresh.name))
		drop()
	}
	return fresh.wait(ctx)
}

// abandon leaves what a create made before it broke off to the reaper.
func (m *Manager) abandon(id string, why error) {
	broken := brokenMessage(nil, why)
	if p := m.table.pod(id); p != nil && p.op.tryLock() {
		_ = m.showPod(p, hapBroken, false, func(n *Pod) { n.Message = broken }) // only Creating ones get here
		p.op.unlock()
	}
	if c := m.table.container(id); c != nil && c.state.tryLock() {
		_ = m.show(c, hapBroken, false, func(n *Container) { n.Message = broken })
		c.state.unlock()
	}
	m.poke()
}

// sandboxWork is what the steps of RunSandbox hand on.
type sandboxWork struct {
	p      *podEntry
	handle *sandbox.Handle
	op     *operation
}

// sandboxSteps are all that a pod has on the host, in order. RunSandbox does
// them; a failed create, RemoveSandbox and recovery undo them.
func (m *Manager) sandboxSteps(w *sandboxWork) []step {
	s := w.p.snap.Load()
	return []step{
		{
			name: "pod cgroup",
			do:   func(ctx context.Context) error { return m.deps.Executor.EnsurePodCgroup(ctx, s.Config.CgroupParent) },
			undo: func(ctx context.Context) error { return m.leavePodCgroup(ctx, s.Config.CgroupParent) },
		},
		{
			name: "sandbox",
			do: func(ctx context.Context) (err error) {
				w.handle, err = m.deps.Sandboxes.Create(ctx, sandboxSpec(s.ID, s.Config), func(sub string) {
					w.op.enter(ctx, "sandbox: "+sub)
				})
				return err
			},
			undo: func(ctx context.Context) error { return m.deps.Sandboxes.Release(ctx, s.ID, w.handle) },
		},
	}
}

// leavePodCgroup removes a pod's cgroup parent. One that others live in stays:
// another attempt of the pod, or pods that name no parent and share one. What
// this pod had in it is gone, or its removal would not have come so far.
func (m *Manager) leavePodCgroup(ctx context.Context, parent string) error {
	err := m.deps.Executor.RemovePodCgroup(ctx, parent)
	if errs.Is(err, errs.FailedPrecondition) {
		m.log(ctx).V(2).Info("pod's cgroup parent stays", "parent", parent, "why", err)
		return nil
	}
	return err
}

func sandboxSpec(id string, c *SandboxConfig) sandbox.Spec {
	uts := sandbox.ModePod
	if c.Network == sandbox.ModeNode {
		uts = sandbox.ModeNode
	}
	return sandbox.Spec{
		ID: id, Name: podName(c), Hostname: c.Hostname, Handler: c.Handler, Annotations: c.Annotations,
		Pod:     sandbox.PodName{Namespace: c.Metadata.Namespace, Name: c.Metadata.Name, UID: c.Metadata.UID},
		Network: c.Network, IPC: c.IPC, UTS: uts, SharePID: c.PID == runtime.PIDPod,
		UIDMap: c.UIDMap, GIDMap: c.GIDMap, DNS: c.DNS, Ports: c.Ports, Sysctls: c.Sysctls,
	}
}

func (m *Manager) runSandbox(ctx context.Context, k *call) error {
	c := k.config.(*SandboxConfig)
	p := newPodEntry(&Pod{ID: k.id, Config: c, Phase: PhaseCreating, CreatedAt: time.Now()})
	if err := p.op.lock(ctx); err != nil {
		return err
	}
	defer p.op.unlock()

	if m.cfg.CheckHandler != nil {
		err := k.op.do(ctx, "runtime handler", func(ctx context.Context) error { return m.cfg.CheckHandler(ctx, c.Handler, len(c.UIDMap) > 0) })
		if err != nil {
			return fmt.Errorf("run sandbox %s: %w", podName(c), err)
		}
	}
	m.table.addPod(p)
	if err := k.op.do(ctx, "record", func(context.Context) error { return m.putPod(p, p.snap.Load(), false) }); err != nil {
		m.table.removePod(p)
		return fmt.Errorf("run sandbox %s: %w", podName(c), err)
	}
	w := &sandboxWork{p: p, op: k.op}
	var u undo.List
	err := k.op.run(ctx, m.sandboxSteps(w), &u)
	if err == nil {
		err = k.op.run(ctx, []step{{name: "record ready", do: func(context.Context) error {
			return m.changePod(p, hapMade, true, func(n *Pod) { n.Handle = w.handle })
		}}}, &u)
	}
	if err != nil {
		err = fmt.Errorf("run sandbox %s: %w", podName(c), err)
		_ = m.undoPod(ctx, p, &u, w.op, err) // what could not be undone is in the record, for the reaper
		return err
	}
	m.log(ctx).V(2).Info("pod is ready", "pod", podName(c), "id", p.id, "took", time.Since(p.snap.Load().CreatedAt))
	m.tell(EventCreated, p.id, p.id)
	m.tell(EventStarted, p.id, p.id)
	return nil
}

// undoPod takes a pod down that was not made, or that is removed, and forgets
// it. What cannot be undone makes it Broken: it is kept for the reaper, and its
// name is free. The caller holds p.op.
func (m *Manager) undoPod(ctx context.Context, p *podEntry, u *undo.List, op *operation, why error) error {
	op.enter(ctx, "undo")
	ctx, cancel := detach(ctx, m.cfg.UndoTimeout, "undo pod "+short(p.id))
	defer cancel()
	err := u.Run(ctx)
	if err == nil {
		err = m.pods.Remove(p.id)
	}
	if err == nil {
		m.table.removePod(p)
		return nil
	}
	m.log(ctx).Error(err, "pod could not be taken down, it will be tried again", "id", p.id, "why", why)
	broken := func(n *Pod) { n.Message = brokenMessage(why, err) }
	if perr := m.changePod(p, hapBroken, false, broken); perr != nil {
		n := *p.snap.Load()
		n.Phase = PhaseBroken
		broken(&n)
		p.snap.Store(&n) // the record says Creating or Removing: recovery undoes that too
	}
	return err
}

func brokenMessage(why, err error) string {
	if why == nil {
		return fmt.Sprintf("it cannot be taken down: %v", err)
	}
	return fmt.Sprintf("%v; and what was made cannot be taken down: %v", why, err)
}
