package pod

import (
	"context"
	"fmt"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime"
)

// ContainerStats reads one container. One that does not run has the usage of
// its writable layer only.
func (m *Manager) ContainerStats(ctx context.Context, id string) (*ContainerStats, error) {
	s, err := m.Container(id)
	if err != nil {
		return nil, err
	}
	out := &ContainerStats{Container: s, WritableMountpoint: m.cfg.WritableMountpoint}
	if s.State == StateRunning {
		if out.Stats, err = m.cgroupStats(ctx, s); err != nil {
			return nil, fmt.Errorf("read stats of container %s: %w", short(s.ID), err)
		}
	}
	if out.Writable, err = m.deps.Images.WritableUsage(ctx, s.ID); err != nil {
		m.log(ctx).V(3).Info("usage of a writable layer is not known", "id", s.ID, "err", err)
	}
	return out, nil
}

func (m *Manager) cgroupStats(ctx context.Context, s *Container) (*runtime.Stats, error) {
	c := m.table.container(s.ID)
	if c == nil {
		return nil, errs.New(errs.NotFound, "it is removed")
	}
	return m.deps.Executor.Stats(ctx, c.cgroup)
}

// ListContainerStats reads the running containers that match. One that ends
// meanwhile is left out.
func (m *Manager) ListContainerStats(ctx context.Context, f Filter) []*ContainerStats {
	if f.State == "" {
		f.State = string(StateRunning)
	}
	var out []*ContainerStats
	for _, s := range m.table.listContainers(f) {
		if ctx.Err() != nil {
			break
		}
		if s.State != StateRunning {
			continue
		}
		if cs, err := m.ContainerStats(ctx, s.ID); err == nil {
			out = append(out, cs)
		} else {
			m.log(ctx).V(3).Info("stats are left out", "id", s.ID, "err", err)
		}
	}
	return out
}

// SandboxStats reads a pod's cgroup, its interfaces and its running containers.
func (m *Manager) SandboxStats(ctx context.Context, id string) (*SandboxStats, error) {
	s, err := m.Sandbox(id)
	if err != nil {
		return nil, err
	}
	out := &SandboxStats{Pod: s, Containers: m.ListContainerStats(ctx, Filter{PodID: s.ID})}
	// Pods without a parent of their own share one: its numbers are nobody's.
	if s.Config.CgroupParent != "" && s.Ready() {
		path, err := m.deps.Cgroups.ParentPath(s.Config.CgroupParent)
		if err != nil {
			return nil, err
		}
		if out.Stats, err = m.deps.Executor.Stats(ctx, path); err != nil {
			return nil, fmt.Errorf("read stats of pod %s: %w", short(s.ID), err)
		}
	}
	if s.Ready() && s.Handle != nil {
		if out.Interfaces, err = m.deps.Sandboxes.Stats(ctx, s.Handle); err != nil {
			m.log(ctx).V(3).Info("network stats are left out", "id", s.ID, "err", err)
		}
	}
	if out.Stats != nil && out.Stats.Pids != nil {
		out.Processes = out.Stats.Pids.Current
		return out, nil
	}
	for _, c := range out.Containers {
		if c.Stats != nil && c.Stats.Pids != nil {
			out.Processes += c.Stats.Pids.Current
		}
	}
	return out, nil
}

// ListSandboxStats reads the ready pods that match.
func (m *Manager) ListSandboxStats(ctx context.Context, f Filter) []*SandboxStats {
	var out []*SandboxStats
	for _, p := range m.table.listPods(f) {
		if ctx.Err() != nil {
			break
		}
		if !p.Ready() {
			continue
		}
		if s, err := m.SandboxStats(ctx, p.ID); err == nil {
			out = append(out, s)
		} else {
			m.log(ctx).V(3).Info("stats are left out", "id", p.ID, "err", err)
		}
	}
	return out
}

// Info is what verbose Status calls show of a pod or container, as JSON values.
// Tools look for pid, runtimeSpec, sandboxID and the netns path.
func (m *Manager) Info(id string) map[string]any {
	if c, err := m.Container(id); err == nil {
		return m.containerInfo(c)
	}
	p, err := m.Sandbox(id)
	if err != nil {
		return nil
	}
	info := map[string]any{"phase": p.Phase, "config": p.Config, "runtimeHandler": p.Config.Handler, "pid": 0}
	if p.Message != "" {
		info["message"] = p.Message
	}
	if path, err := m.deps.Cgroups.ParentPath(p.Config.CgroupParent); err == nil {
		info["cgroup"] = path
	}
	if h := p.Handle; h != nil {
		info["handle"], info["netns"], info["namespaces"] = h, h.Namespaces.Net, h.Namespaces
	}
	return info
}

func (m *Manager) containerInfo(c *Container) map[string]any {
	info := map[string]any{
		"phase": c.Phase, "config": c.Config, "sandboxID": c.PodID, "pid": c.PID,
		"imageID": c.ImageID, "imageRef": c.ImageRef,
	}
	if p := m.table.pod(c.PodID); p != nil {
		if h := p.snap.Load().Handle; h != nil {
			info["netns"] = h.Namespaces.Net
		}
	}
	if rc, err := m.specs.get(c.ID); err == nil {
		info["runtimeSpec"], info["cgroup"], info["rootfs"] = rc.Spec, rc.Cgroup, rc.Rootfs
	} else {
		info["error"] = err.Error()
	}
	return info
}
