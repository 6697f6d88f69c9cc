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
	return m.readContainer(ctx, s, m.deps.Executor.Stats)
}

// readContainer reads a container's cgroup, while it runs, and its writable layer.
func (m *Manager) readContainer(ctx context.Context, s *Container, read func(ctx context.Context, cgroup string) (*runtime.Stats, error)) (*ContainerStats, error) {
	out := &ContainerStats{Container: s, WritableMountpoint: m.cfg.WritableMountpoint}
	var err error
	if s.State == StateRunning {
		c := m.table.container(s.ID)
		if c == nil {
			return nil, errs.New(errs.NotFound, "read stats of container %s: it is removed", short(s.ID))
		}
		if out.Stats, err = read(ctx, c.cgroup); err != nil {
			return nil, fmt.Errorf("read stats of container %s: %w", short(s.ID), err)
		}
	}
	if out.Writable, err = m.deps.Images.WritableUsage(ctx, s.ID); err != nil {
		m.log(ctx).V(3).Info("usage of a writable layer is not known", "id", s.ID, "err", err)
	}
	return out, nil
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
	out.Interfaces = m.interfaces(ctx, s)
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

func (m *Manager) interfaces(ctx context.Context, p *Pod) []Interface {
	if !p.Ready() || p.Handle == nil {
		return nil
	}
	list, err := m.deps.Sandboxes.Stats(ctx, p.Handle)
	if err != nil {
		m.log(ctx).V(3).Info("network stats are left out", "id", p.ID, "err", err)
	}
	return list
}

// ListSandboxMetrics reads the ready pods as metrics show them: interfaces, and
// the running containers with details. It is the samples of the statistics that
// are read, and what they lack. Whatever ends meanwhile is left out.
func (m *Manager) ListSandboxMetrics(ctx context.Context) []*SandboxStats {
	disk, err := m.deps.Images.Disk()
	if err != nil {
		m.log(ctx).Error(err, "Metrics lack the size of the disk")
	}
	var out []*SandboxStats
	for _, p := range m.table.listPods(Filter{}) {
		if ctx.Err() != nil {
			break
		}
		if !p.Ready() {
			continue
		}
		s := &SandboxStats{Pod: p, Interfaces: m.interfaces(ctx, p)}
		for _, c := range m.table.listContainers(Filter{PodID: p.ID, State: string(StateRunning)}) {
			cs, err := m.readContainer(ctx, c, func(ctx context.Context, cgroup string) (*runtime.Stats, error) {
				return m.deps.Executor.DetailedStats(ctx, cgroup, c.PID)
			})
			if err != nil {
				m.log(ctx).V(3).Info("metrics are left out", "id", c.ID, "err", err)
				continue
			}
			cs.Disk = disk
			s.Containers = append(s.Containers, cs)
		}
		out = append(out, s)
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
