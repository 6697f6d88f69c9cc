package native

import (
	"context"
	"errors"
	"path/filepath"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/sys"
	"github.com/naru-project/naru/runtime"
	"github.com/naru-project/naru/runtime/cgroup"
	"github.com/naru-project/naru/runtime/monitor"
	"github.com/naru-project/naru/runtime/plan"
	"github.com/naru-project/naru/runtime/stats"
)

// createCgroup makes the container's cgroup with its limits and device rules.
// With the systemd driver a scope cannot exist without a process: a helper
// that does nothing holds it until the container's own is there.
func (x *Executor) createCgroup(ctx context.Context, c *runtime.Container) (*cgroup.Group, error) {
	var devices []specs.LinuxDeviceCgroup
	if c.Spec.Linux != nil && c.Spec.Linux.Resources != nil {
		devices = c.Spec.Linux.Resources.Devices
	}
	g, err := x.cfg.Cgroups.Create(ctx, c.Cgroup, c.Resources, devices, cgroup.Options{})
	if err != nil {
		return nil, err
	}
	if !x.cfg.Cgroups.Systemd() {
		return g, nil
	}
	h, err := x.startHelper(ctx, plan.Clone{Cgroup: -1})
	if err != nil {
		return nil, err
	}
	k := &scopeHolder{helper: h}
	if err = g.AddPID(ctx, h.proc.PID); err == nil {
		err = g.OpenFDs()
	}
	if err != nil {
		k.close()
		uctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), setupTimeout)
		defer cancel()
		return nil, errors.Join(err, g.Remove(uctx))
	}
	x.holders.Store(c.ID, k)
	return g, nil
}

// scopeHolder keeps a systemd scope alive until the container is in it.
type scopeHolder struct{ helper *helper }

func (k *scopeHolder) close() { k.helper.close() }

func (x *Executor) releaseHolder(id string) {
	if k, ok := x.holders.LoadAndDelete(id); ok {
		k.(*scopeHolder).close()
	}
}

// cgroupViews opens what a container sees below /sys/fs/cgroup on cgroup v1:
// its own folder of each hierarchy, read-only unless it is privileged.
func (x *Executor) cgroupViews(c *runtime.Container) ([]Volume, error) {
	if x.cfg.Cgroups.Mode() == cgroup.ModeV2 {
		return nil, nil
	}
	var out []Volume
	for _, name := range x.cfg.Cgroups.Controllers() {
		fd, ok := x.cfg.Cgroups.Dir(name)
		if !ok {
			continue
		}
		t, err := sys.CloneTree(fd, c.Cgroup[1:], false)
		if err != nil {
			CloseVolumes(out)
			return nil, errs.New(errs.Internal, "open the %s cgroup: %w", name, err)
		}
		out = append(out, Volume{Path: filepath.Base(name), Tree: t, Dir: true})
		a := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC | readonlyIf(!c.Privileged), Propagation: unix.MS_PRIVATE}
		if err := sys.SetAttr(t, false, a); err != nil {
			CloseVolumes(out)
			return nil, errs.New(errs.Internal, "prepare the %s cgroup: %w", name, err)
		}
	}
	return out, nil
}

// CloseVolumes closes what Volumes opened.
func CloseVolumes(vs []Volume) {
	for _, v := range vs {
		_ = v.Tree.Close()
	}
}

// Update changes the container's limits, all or nothing.
func (x *Executor) Update(ctx context.Context, c *runtime.Container, r runtime.Resources) error {
	g, err := x.cfg.Cgroups.Open(c.Cgroup)
	if err != nil {
		return err
	}
	return g.Update(ctx, r)
}

// OOMKilled reports whether the OOM killer ended a process of the container.
func (x *Executor) OOMKilled(_ context.Context, c *runtime.Container) (bool, error) {
	n, err := x.cfg.Cgroups.OOMKills(c.Cgroup)
	return n > 0, err
}

// EnsurePodCgroup makes the pod's cgroup parent where kubelet has not.
func (x *Executor) EnsurePodCgroup(ctx context.Context, parent string) error {
	return x.cfg.Cgroups.EnsurePod(ctx, parent)
}

// RemovePodCgroup removes what EnsurePodCgroup made.
func (x *Executor) RemovePodCgroup(ctx context.Context, parent string) error {
	return x.cfg.Cgroups.RemovePod(ctx, parent)
}

// SweepPodCgroups removes what EnsurePodCgroup made for pods that are not known
// any more.
func (x *Executor) SweepPodCgroups(ctx context.Context, known []string) error {
	return x.cfg.Cgroups.Sweep(ctx, known)
}

// Stats answers from the shared sampler.
func (x *Executor) Stats(ctx context.Context, path string) (*runtime.Stats, error) {
	return x.cfg.Stats.Get(ctx, path)
}

// DetailedStats answers from the same sample, with the details that metrics tell.
func (x *Executor) DetailedStats(ctx context.Context, path string, first int) (*runtime.Stats, error) {
	return x.cfg.Stats.Detailed(ctx, stats.Subject{Cgroup: path, First: first, Proc: x.proc})
}

// helper is a child of the worker that waits on a gate.
type helper struct {
	proc *monitor.ExecProcess
	gate closer
}

type closer interface{ Close() error }

func (h *helper) close() {
	_ = h.gate.Close()
	h.proc.Close()
}
