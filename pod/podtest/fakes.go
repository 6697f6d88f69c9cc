package podtest

import (
	"archive/tar"
	"context"
	"errors"
	"io"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/naru-project/naru/images"
	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/namespaces"
	"github.com/naru-project/naru/runtime"
	"github.com/naru-project/naru/sandbox"
)

type executor struct{ l *Life }

func (x executor) MountRootfs(ctx context.Context, id string, r runtime.Rootfs, _, _ []runtime.IDMap) (f *os.File, err error) {
	err = x.l.call(ctx, "Executor.MountRootfs", func() error {
		if len(r.Lower) == 0 || r.Upper == "" {
			return mustErr("root file system of %s lacks folders", id)
		}
		f, err = os.Open(filepath.Join(x.l.w.Dir, "rootfs"))
		return err
	})
	return f, err
}

func (x executor) Create(ctx context.Context, c *runtime.Container, root *os.File) (p runtime.Process, err error) {
	if root == nil || c.Spec == nil || c.Cgroup == "" {
		return p, mustErr("container %s lacks root, spec or cgroup", c.ID)
	}
	defer root.Close()
	err = x.l.call(ctx, "Executor.Create", func() error {
		w := x.l.w
		if w.processes[c.ID] != nil {
			return mustErr("container %s exists", c.ID)
		}
		if !w.writables[c.ID] || w.holds[c.ID] == nil {
			return mustErr("container %s has no layers", c.ID)
		}
		w.nextPID++
		p = runtime.Process{PID: w.nextPID, StartTime: startTime(w.nextPID)}
		w.processes[c.ID] = &Process{PID: w.nextPID, Cgroup: c.Cgroup, Env: c.Spec.Process.Env}
		return nil
	})
	return p, err
}

func (x executor) Start(ctx context.Context, c *runtime.Container) error {
	id := c.ID
	return x.l.call(ctx, "Executor.Start", func() error {
		p := x.l.w.processes[id]
		if p == nil || p.Exit != nil {
			return unknown("container", id)
		}
		if slices.Contains(p.Env, EnvStartError) {
			return errs.New(errs.FailedPrecondition, "run /bin/app: no such file or directory")
		}
		p.Started = true
		switch {
		case slices.Contains(p.Env, EnvExitZero):
			x.l.w.exit(id, 0, 0)
		case slices.Contains(p.Env, EnvExitThree):
			x.l.w.exit(id, 3, 0)
		}
		return nil
	})
}

func (x executor) Signal(ctx context.Context, id string, sig syscall.Signal) error {
	return x.l.call(ctx, "Executor.Signal", func() error {
		p := x.l.w.processes[id]
		if p == nil {
			return nil
		}
		p.Signals = append(p.Signals, int(sig))
		if sig == syscall.SIGKILL || !slices.Contains(p.Env, EnvIgnoreTERM) {
			x.end(id, sig)
		}
		return nil
	})
}

func (x executor) Kill(ctx context.Context, c *runtime.Container) error {
	return x.l.call(ctx, "Executor.Kill", func() error {
		if c.Cgroup == "" {
			return mustErr("kill of %s without its cgroup", c.ID)
		}
		if p := x.l.w.processes[c.ID]; p != nil {
			p.Signals = append(p.Signals, int(syscall.SIGKILL))
			x.end(c.ID, syscall.SIGKILL)
		}
		return nil
	})
}

// end makes a process die a moment later. It is called with the lock held.
func (x executor) end(id string, sig syscall.Signal) {
	p := x.l.w.processes[id]
	if p.Exit != nil || slices.Contains(p.Env, EnvStuck) {
		return
	}
	w := x.l.w
	time.AfterFunc(time.Millisecond, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.exit(id, 128+int(sig), int(sig))
	})
}

func (x executor) Delete(ctx context.Context, c *runtime.Container) error {
	return x.l.call(ctx, "Executor.Delete", func() error {
		if p := x.l.w.processes[c.ID]; p != nil && p.Exit == nil && slices.Contains(p.Env, EnvStuck) && !p.Silent {
			return errs.New(errs.Internal, "cgroup of %s is busy", c.ID)
		}
		delete(x.l.w.processes, c.ID)
		return nil
	})
}

func (x executor) Update(ctx context.Context, c *runtime.Container, _ runtime.Resources) error {
	return x.l.call(ctx, "Executor.Update", func() error {
		if p := x.l.w.processes[c.ID]; p == nil || p.Exit != nil {
			return unknown("container", c.ID)
		}
		return nil
	})
}

func (x executor) OOMKilled(ctx context.Context, c *runtime.Container) (oom bool, err error) {
	err = x.l.call(ctx, "Executor.OOMKilled", func() error {
		p := x.l.w.processes[c.ID]
		oom = p != nil && slices.Contains(p.Env, EnvOOM)
		return nil
	})
	return oom, err
}

func (x executor) List(ctx context.Context) (out []runtime.State, err error) {
	err = x.l.call(ctx, "Executor.List", func() error {
		for id, p := range x.l.w.processes {
			out = append(out, runtime.State{
				ID: id, Process: runtime.Process{PID: p.PID, StartTime: startTime(p.PID)}, Started: p.Started, Exit: p.Exit,
			})
		}
		return nil
	})
	return out, err
}

func (x executor) Exits() <-chan runtime.Exit { return x.l.exits }

func (x executor) ExecSync(ctx context.Context, c *runtime.Container, e runtime.ExecSpec) (r runtime.ExecResult, err error) {
	err = x.l.call(ctx, "Executor.ExecSync", func() error {
		if p := x.l.w.processes[c.ID]; p == nil || p.Exit != nil || !p.Started {
			return unknown("container", c.ID)
		}
		r.Stdout = []byte(strings.Join(e.Args, " ") + "\n")
		if c.Spec.Process != nil {
			r.Stdout = append(r.Stdout, strings.Join(c.Spec.Process.Env, "\n")...)
		}
		if e.Args[0] == "sleep" && e.Timeout > 0 {
			return errs.New(errs.DeadlineExceeded, "timeout")
		}
		return nil
	})
	return r, err
}

func (x executor) Exec(ctx context.Context, c *runtime.Container, e runtime.ExecSpec, s runtime.Streams) (int, error) {
	r, err := x.ExecSync(ctx, c, e)
	if err == nil && s.Stdout != nil {
		_, err = s.Stdout.Write(r.Stdout)
	}
	return 0, err
}

func (x executor) Attach(ctx context.Context, _ *runtime.Container, _ runtime.Streams) error {
	return x.l.call(ctx, "Executor.Attach", func() error { return nil })
}

func (x executor) Checkpoint(ctx context.Context, _ *runtime.Container, dir string) error {
	return x.l.call(ctx, "Executor.Checkpoint", func() error {
		return errors.Join(os.WriteFile(filepath.Join(dir, "core-1.img"), []byte("memory"), 0o600), os.WriteFile(filepath.Join(dir, "dump.log"), nil, 0o600))
	})
}

func (x executor) ReopenLog(ctx context.Context, _ *runtime.Container) error {
	return x.l.call(ctx, "Executor.ReopenLog", func() error { return nil })
}

func (x executor) EnsurePodCgroup(ctx context.Context, parent string) error {
	return x.l.call(ctx, "Executor.EnsurePodCgroup", func() error {
		x.l.w.cgroups[parent] = true
		return nil
	})
}

func (x executor) RemovePodCgroup(ctx context.Context, parent string) error {
	return x.l.call(ctx, "Executor.RemovePodCgroup", func() error {
		for _, p := range x.l.w.processes {
			if filepath.Dir(p.Cgroup) == parent && p.Exit == nil {
				return errs.New(errs.FailedPrecondition, "cgroup %s is not empty", parent)
			}
		}
		delete(x.l.w.cgroups, parent)
		return nil
	})
}

func (x executor) SweepPodCgroups(ctx context.Context, known []string) error {
	return x.l.call(ctx, "Executor.SweepPodCgroups", func() error {
		for parent := range x.l.w.cgroups {
			if !slices.Contains(known, parent) {
				delete(x.l.w.cgroups, parent)
			}
		}
		return nil
	})
}

func (x executor) Stats(ctx context.Context, cgroup string) (s *runtime.Stats, err error) {
	err = x.l.call(ctx, "Executor.Stats", func() error {
		s = &runtime.Stats{Time: time.Now(), CPU: &runtime.CPUStats{Usage: 1}, Pids: &runtime.PidsStats{Current: 3}}
		return nil
	})
	return s, err
}

func (x executor) DetailedStats(ctx context.Context, cgroup string, first int) (s *runtime.Stats, err error) {
	err = x.l.call(ctx, "Executor.DetailedStats", func() error {
		if !slices.ContainsFunc(slices.Collect(maps.Values(x.l.w.processes)), func(p *Process) bool { return p.Cgroup == cgroup && p.PID == first }) {
			return mustErr("process %d is not the first one of cgroup %s", first, cgroup)
		}
		s = &runtime.Stats{Time: time.Now(), CPU: &runtime.CPUStats{Usage: 1}, Details: &runtime.Details{Time: time.Now(), Processes: 3, HasProcesses: true}}
		return nil
	})
	return s, err
}

type sandboxes struct{ l *Life }

func (s sandboxes) Create(ctx context.Context, spec sandbox.Spec, step func(string)) (h *sandbox.Handle, err error) {
	step("namespaces")
	err = s.l.call(ctx, "Sandboxes.Create", func() error {
		w := s.l.w
		if w.places[spec.ID] != nil {
			return mustErr("sandbox %s exists", spec.ID)
		}
		w.nextIP++
		h = &sandbox.Handle{
			ID: spec.ID, BootID: w.boot, IPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 1, 2, w.nextIP})},
			Namespaces: namespaces.Paths{Net: "/run/naru/ns/" + spec.ID + "/net"},
			EtcFiles:   map[string]string{"/etc/hostname": filepath.Join(w.Dir, "hostname")},
		}
		if spec.SharePID {
			h.Namespaces.PID = "/run/naru/ns/" + spec.ID + "/pid"
		}
		w.places[spec.ID] = h
		return nil
	})
	if err != nil {
		return nil, err
	}
	step("network")
	return h, nil
}

func (s sandboxes) Adopt(ctx context.Context, spec sandbox.Spec, h *sandbox.Handle) (alive bool, err error) {
	err = s.l.call(ctx, "Sandboxes.Adopt", func() error {
		alive = s.l.w.places[spec.ID] != nil && h.BootID == s.l.w.boot
		return nil
	})
	return alive, err
}

func (s sandboxes) Release(ctx context.Context, id string, _ *sandbox.Handle) error {
	return s.l.call(ctx, "Sandboxes.Release", func() error {
		delete(s.l.w.places, id)
		return nil
	})
}

func (s sandboxes) Stats(ctx context.Context, _ *sandbox.Handle) (out []sandbox.Interface, err error) {
	err = s.l.call(ctx, "Sandboxes.Stats", func() error {
		out = []sandbox.Interface{{Name: "eth0", RxBytes: 5, Time: time.Now()}}
		return nil
	})
	return out, err
}

func (s sandboxes) NetworkInfo() map[string]any { return map[string]any{"cniconfig": map[string]any{}} }

func (s sandboxes) NetworkStatus() sandbox.NetworkStatus {
	s.l.w.mu.Lock()
	defer s.l.w.mu.Unlock()
	return s.l.w.network
}

func (s sandboxes) SetPodCIDRs(ctx context.Context, _ []netip.Prefix) error {
	return s.l.call(ctx, "Sandboxes.SetPodCIDRs", func() error { return nil })
}

// Dial returns one end of a socket pair whose other end says hello.
func (s sandboxes) Dial(ctx context.Context, _ *sandbox.Handle, _ uint16) (f *os.File, err error) {
	err = s.l.call(ctx, "Sandboxes.Dial", func() error {
		fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		other := os.NewFile(uintptr(fds[1]), "other end")
		_, _ = other.WriteString("hello")
		f = os.NewFile(uintptr(fds[0]), "dial")
		return other.Close()
	})
	return f, err
}

func (s sandboxes) Sweep(ctx context.Context, known map[string]bool) error {
	return s.l.call(ctx, "Sandboxes.Sweep", func() error {
		for id := range s.l.w.places {
			if !known[id] {
				delete(s.l.w.places, id)
			}
		}
		return nil
	})
}

type store struct{ l *Life }

func (s store) Resolve(ref string) (*images.Image, error) {
	s.l.w.mu.Lock()
	defer s.l.w.mu.Unlock()
	for id, img := range s.l.w.images {
		if id == ref || slices.Contains(img.RepoTags, ref) {
			return img, nil
		}
	}
	return nil, unknown("image", ref)
}

func (s store) Layers(ctx context.Context, imageID, owner string) (out []string, err error) {
	err = s.l.call(ctx, "Images.Layers", func() error {
		if s.l.w.images[imageID] == nil {
			return unknown("image", imageID)
		}
		if s.l.w.holds[owner] == nil {
			s.l.w.holds[owner] = map[string]bool{}
		}
		s.l.w.holds[owner][imageID] = true
		out = []string{filepath.Join(s.l.w.Dir, "rootfs")}
		return nil
	})
	return out, err
}

func (s store) ReleaseOwner(ctx context.Context, owner string) error {
	return s.l.call(ctx, "Images.ReleaseOwner", func() error {
		delete(s.l.w.holds, owner)
		return nil
	})
}

func (s store) NewWritable(ctx context.Context, id string) (images.Writable, error) {
	err := s.l.call(ctx, "Images.NewWritable", func() error {
		s.l.w.writables[id] = true
		return nil
	})
	return images.Writable{Upper: "/w/" + id + "/upper", Work: "/w/" + id + "/work", Places: "/w/places"}, err
}

func (s store) RemoveWritable(ctx context.Context, id string) error {
	return s.l.call(ctx, "Images.RemoveWritable", func() error {
		if p := s.l.w.processes[id]; p != nil && p.Exit == nil {
			return mustErr("writable layer of %s is removed under its process", id)
		}
		delete(s.l.w.writables, id)
		return nil
	})
}

func (s store) WriteDiff(ctx context.Context, _ string, w io.Writer) error {
	return s.l.call(ctx, "Images.WriteDiff", func() error { return tar.NewWriter(w).Close() })
}

func (s store) WritableUsage(ctx context.Context, id string) (u images.Usage, err error) {
	err = s.l.call(ctx, "Images.WritableUsage", func() error {
		if !s.l.w.writables[id] {
			return unknown("writable layer", id)
		}
		u = images.Usage{Bytes: 4096, Inodes: 1, Time: time.Now()}
		return nil
	})
	return u, err
}

func (s store) Disk() (images.Disk, error) {
	return images.Disk{Device: "/dev/disk", Bytes: 1 << 30, Time: time.Now()}, nil
}

func (s store) Sweep(ctx context.Context, known map[string]bool) error {
	return s.l.call(ctx, "Images.Sweep", func() error {
		for id := range s.l.w.writables {
			if !known[id] {
				delete(s.l.w.writables, id)
			}
		}
		for id := range s.l.w.holds {
			if !known[id] {
				delete(s.l.w.holds, id)
			}
		}
		return nil
	})
}
