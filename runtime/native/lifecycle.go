package native

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/failpoint"
	"github.com/naru-project/naru/internal/sys"
	"github.com/naru-project/naru/runtime"
	"github.com/naru-project/naru/runtime/plan"
	"github.com/naru-project/naru/runtime/stdio"
)

// Start opens the start gate, with the container's hooks before and after. When
// one of those fails the caller ends the container.
func (x *Executor) Start(ctx context.Context, c *runtime.Container) error {
	if c.Spec.Hooks == nil {
		return x.start(ctx, c.ID)
	}
	if err := x.startContainerHooks(ctx, c); err != nil {
		return err
	}
	h, err := x.lookup(ctx, c.ID)
	if err != nil {
		return err
	}
	_ = h.pidfd.Close()
	if err := x.start(ctx, c.ID); err != nil {
		return err
	}
	return x.programHooks(ctx, c, "poststart", c.Spec.Hooks.Poststart, specs.StateRunning, h.pid)
}

func (x *Executor) start(ctx context.Context, id string) error {
	x.releaseHolder(id)
	err := x.cfg.Monitor.Start(ctx, id)
	if err == nil {
		return nil
	}
	var pe *plan.Error
	if errors.As(err, &pe) {
		x.mu.Lock()
		what := ""
		if h := x.live[id]; h != nil && pe.Stage == plan.StageExec {
			what = fmt.Sprintf(" %q", h.command)
		}
		x.mu.Unlock()
		return errs.New(errs.Of(planError(pe)), "its first process%s: %w", what, pe)
	}
	return errs.New(errs.Of(err), "%w", err)
}

// remember keeps the pidfd of a container's first process.
func (x *Executor) remember(id string, pid int, pidfd *os.File, command string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if old := x.live[id]; old != nil {
		_ = old.pidfd.Close()
	}
	x.live[id] = &handle{pid: pid, pidfd: pidfd, command: command}
}

func (x *Executor) forget(id string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if h := x.live[id]; h != nil {
		_ = h.pidfd.Close()
		delete(x.live, id)
	}
}

// lookup returns a copy of the handle of a container; the caller closes its
// pidfd. After a restart the monitor is asked.
func (x *Executor) lookup(ctx context.Context, id string) (*handle, error) {
	x.mu.Lock()
	h := x.live[id]
	if h != nil {
		f, err := dup(h.pidfd)
		pid := h.pid
		x.mu.Unlock()
		if err != nil {
			return nil, err
		}
		return &handle{pid: pid, pidfd: f}, nil
	}
	x.mu.Unlock()
	files, err := x.cfg.Monitor.Files(ctx, id)
	if err != nil {
		return nil, err
	}
	defer files.Close()
	if files.PIDFD == nil {
		return nil, errs.New(errs.NotFound, "container %s has no process", short(id))
	}
	a, err := dup(files.PIDFD)
	if err != nil {
		return nil, err
	}
	b, err := dup(files.PIDFD)
	if err != nil {
		_ = a.Close()
		return nil, err
	}
	x.remember(id, files.PID, a, "")
	return &handle{pid: files.PID, pidfd: b}, nil
}

func dup(f *os.File) (*os.File, error) {
	// Never f.Fd(): it would make a shared FIFO or terminal blocking for all.
	fd, err := unix.FcntlInt(uintptr(sys.FD(f)), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, errs.New(errs.Internal, "duplicate %s: %w", f.Name(), err)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// Signal sends one signal to the first process, by pidfd: a reused pid is
// never hit.
func (x *Executor) Signal(ctx context.Context, id string, sig syscall.Signal) error {
	h, err := x.lookup(ctx, id)
	if err != nil {
		if errs.Is(err, errs.NotFound) {
			return nil
		}
		return err
	}
	defer func() { _ = h.pidfd.Close() }()
	if err := unix.PidfdSendSignal(int(h.pidfd.Fd()), sig, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return errs.New(errs.Internal, "send %s to container %s: %w", unix.SignalName(sig), short(id), err)
	}
	return nil
}

// Kill ends every process of the container: by its cgroup, and the first one
// by its pidfd whatever the cgroup says.
func (x *Executor) Kill(ctx context.Context, c *runtime.Container) error {
	err := x.Signal(ctx, c.ID, unix.SIGKILL)
	g, gerr := x.cfg.Cgroups.Open(c.Cgroup)
	if gerr != nil {
		if errs.Is(gerr, errs.NotFound) {
			return err
		}
		return errors.Join(err, gerr)
	}
	return errors.Join(err, g.Kill(ctx))
}

// Delete kills what is left of the container and removes its traces.
func (x *Executor) Delete(ctx context.Context, c *runtime.Container) error {
	x.releaseHolder(c.ID)
	var all []error
	for _, st := range []struct {
		name string
		do   func() error
	}{
		{"kill", func() error { return x.Kill(ctx, c) }},
		{"leave the monitor", func() error { return x.cfg.Monitor.Delete(ctx, c.ID) }},
		{"forget its process", func() error { x.forget(c.ID); return nil }},
		{"remove the cgroup", func() error {
			g, err := x.cfg.Cgroups.Open(c.Cgroup)
			if err != nil {
				return err
			}
			return g.Remove(ctx)
		}},
		{"remove the FIFOs", func() error {
			if err := os.RemoveAll(x.ioDir(c.ID)); err != nil { //nolint:forbidigo // below our own run folder
				return errs.New(errs.Internal, "remove the FIFOs of container %s: %w", short(c.ID), err)
			}
			return nil
		}},
		{"run poststop hooks", func() error {
			if len(all) > 0 {
				return nil // something is left of it: when that has gone
			}
			return x.poststop(ctx, c)
		}},
	} {
		err := failpoint.Hit("native", "delete", st.name)
		if err == nil {
			err = st.do()
		}
		if err != nil && !errs.Is(err, errs.NotFound) {
			all = append(all, err)
		}
	}
	return errors.Join(all...)
}

// List tells what the monitor keeps.
func (x *Executor) List(ctx context.Context) ([]runtime.State, error) {
	entries, err := x.cfg.Monitor.List(ctx)
	if err != nil {
		return nil, err
	}
	out := make([]runtime.State, 0, len(entries))
	for _, e := range entries {
		if strings.HasPrefix(e.ID, initPrefix) {
			continue // the init of a pod, kept with its sandbox
		}
		s := runtime.State{ID: e.ID, Process: runtime.Process{PID: e.PID}, Started: e.Started}
		if e.Exit != nil {
			x := exitOf(*e.Exit)
			s.Exit = &x
		} else if t, err := startTime(x.proc, e.PID); err == nil {
			s.Process.StartTime = t
			s.Cgroup = x.cfg.Cgroups.Find(e.PID, e.ID)
		}
		out = append(out, s)
	}
	return out, nil
}

// ReopenLog opens the log file anew and lets the worker go over to it.
func (x *Executor) ReopenLog(ctx context.Context, c *runtime.Container) error {
	f, err := stdio.OpenLog(c.LogPath)
	if err != nil || f == nil {
		return err
	}
	defer func() { _ = f.Close() }()
	return x.cfg.Monitor.SetLog(ctx, c.ID, f)
}

// procDir opens a process's folder in our own procfs. pidfd proves that the pid
// was still that process's when the folder was opened: until a process is
// reaped nobody else gets its pid.
func (x *Executor) procDir(pid int, pidfd *os.File) (*os.File, error) {
	d, err := sys.OpenBeneath(x.proc, itoa(pid), unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return nil, errs.New(errs.FailedPrecondition, "process %d is gone: %w", pid, err)
	}
	if err := unix.PidfdSendSignal(sys.FD(pidfd), 0, nil, 0); err != nil {
		_ = d.Close()
		return nil, errs.New(errs.FailedPrecondition, "process %d is gone: %w", pid, err)
	}
	return d, nil
}

// startTime is when a process was started: clock ticks since boot.
func startTime(proc *os.File, pid int) (uint64, error) {
	dir, err := sys.OpenBeneath(proc, itoa(pid), unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return 0, errs.New(errs.NotFound, "process %d is gone: %w", pid, err)
	}
	defer func() { _ = dir.Close() }()
	s, err := readStat(dir)
	return s.start, err
}

// stat is what is wanted of /proc/PID/stat (proc_pid_stat(5), fields 4 and 22).
type stat struct {
	parent int
	start  uint64
}

func readStat(dir *os.File) (stat, error) {
	f, err := sys.OpenBeneath(dir, "stat", unix.O_RDONLY)
	if err != nil {
		return stat{}, errs.New(errs.NotFound, "process %s is gone: %w", dir.Name(), err)
	}
	defer func() { _ = f.Close() }()
	buf := make([]byte, 1024)
	n, err := f.Read(buf)
	if err != nil {
		return stat{}, errs.New(errs.NotFound, "process %s is gone: %w", dir.Name(), err)
	}
	return parseStat(buf[:n])
}

// parseStat finds the fields behind the last ')': the name before it may hold
// anything.
func parseStat(line []byte) (s stat, err error) {
	i := bytes.LastIndexByte(line, ')')
	if i < 0 {
		return s, errs.New(errs.Internal, "stat line without a name")
	}
	f := bytes.Fields(line[i+1:])
	if len(f) < 20 {
		return s, errs.New(errs.Internal, "stat line with %d fields", len(f)+2)
	}
	if s.parent, err = strconv.Atoi(string(f[1])); err == nil {
		s.start, err = strconv.ParseUint(string(f[19]), 10, 64)
	}
	if err != nil {
		return s, errs.New(errs.Internal, "parent and start time in a stat line: %w", err)
	}
	return s, nil
}
