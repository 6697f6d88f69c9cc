package ocicli

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime"
	"github.com/naru-project/naru/runtime/monitor"
	"github.com/naru-project/naru/runtime/monitor/reaper"
	"github.com/naru-project/naru/runtime/native"
	"github.com/naru-project/naru/runtime/stdio"
)

// creation is one Create on its way.
type creation struct {
	o    *Executor
	h    *handler
	c    *runtime.Container
	root *os.File
	dir  string

	volumes []native.Volume
	bundle  *bundle
	stdio   [3]*os.File // the container's
	kept    monitor.Kept
	console *console
	open    []*os.File // closed at the end, whatever comes
	proc    runtime.Process
}

// Create makes the container up to the point where its first process waits for
// Start.
func (o *Executor) Create(ctx context.Context, c *runtime.Container, root *os.File) (runtime.Process, error) {
	h, err := o.of(c)
	if err != nil {
		_ = root.Close()
		return runtime.Process{}, err
	}
	if h == nil {
		return o.Executor.Create(ctx, c, root)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, createTime, errs.New(errs.DeadlineExceeded, "the container was not made within %s", createTime))
	defer cancel()
	k := &creation{o: o, h: h, c: c, root: root, dir: o.folder(c.ID)}
	defer k.close()
	for _, s := range []struct {
		name string
		do   func(context.Context) error
	}{
		{"make its folder", k.makeFolder}, {"open volumes", k.openVolumes}, {"make stdio", k.makeStdio},
		{"write the bundle", func(context.Context) error { return k.bundle.write(c) }},
		{"run the runtime", k.run}, {"set limits", k.limit}, {"keep its first process", k.keep},
	} {
		if err := s.do(ctx); err != nil {
			err = k.explain(ctx, err)
			err = errs.New(errs.Of(err), "create container %s: %s: %w", short(c.ID), s.name, err)
			// The undo has a deadline of its own: the caller's may be what failed.
			uctx, ucancel := context.WithTimeout(context.WithoutCancel(ctx), createTime)
			defer ucancel()
			return runtime.Process{}, errors.Join(err, o.Delete(uctx, c))
		}
	}
	return k.proc, nil
}

func (k *creation) close() {
	_ = k.root.Close()
	native.CloseVolumes(k.volumes)
	for _, f := range k.open {
		if f != nil {
			_ = f.Close()
		}
	}
	if k.console != nil {
		k.console.close()
	}
}

// makeFolder begins anew: what an earlier try left is no use. The handler's
// name comes first, for it is how Delete knows what the folder is.
func (k *creation) makeFolder(context.Context) error {
	err := os.RemoveAll(k.dir)
	if err == nil {
		err = os.Mkdir(k.dir, 0o700)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(k.dir, "handler"), []byte(k.h.Name), 0o600)
	}
	if err != nil {
		return errs.New(errs.Internal, "make %s: %w", k.dir, err)
	}
	return nil
}

func (k *creation) openVolumes(ctx context.Context) (err error) {
	if k.volumes, err = k.o.Volumes(ctx, k.c); err != nil {
		return err
	}
	k.bundle, err = k.o.newBundleFor(k.h, k.root, k.c, k.volumes)
	return err
}

func (k *creation) makeStdio(context.Context) (err error) {
	if k.kept.Log, err = stdio.OpenLog(k.c.LogPath); err != nil {
		return err
	}
	k.open = append(k.open, k.kept.Log)
	if k.c.TTY {
		k.console, err = k.o.newConsole()
		return err
	}
	uid, gid := native.HostIDs(k.c)
	f, err := stdio.NewFIFOs(k.dir, k.c.Stdin, uid, gid)
	if err != nil {
		return err
	}
	k.open = append(append(k.open, f.Child[:]...), f.Kept[:]...)
	k.stdio = f.Child
	k.kept.Stdin, k.kept.Stdout, k.kept.Stderr = f.Kept[0], f.Kept[1], f.Kept[2]
	return nil
}

// run runs the program.
func (k *creation) run(ctx context.Context) error {
	args := []string{"create", "--bundle", k.dir, "--pid-file", filepath.Join(k.dir, "pid")}
	if k.console == nil {
		return k.h.call(ctx, command{args: append(args, k.c.ID), limit: createTime, log: k.log(), stdio: k.stdio, mounts: k.bundle.attachments()})
	}
	// The terminal comes while the program runs, which may wait for that.
	cctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var cerr error
	got := make(chan struct{})
	go func() {
		defer close(got)
		k.kept.Pty, cerr = k.console.receive(cctx)
	}()
	err := k.h.call(ctx, command{
		args: append(args, "--console-socket", k.console.path, k.c.ID), limit: createTime, log: k.log(), mounts: k.bundle.attachments(),
	})
	if err != nil {
		cancel()
	}
	<-got
	k.open = append(k.open, k.kept.Pty)
	if err == nil && cerr != nil {
		err = cerr
	}
	return err
}

func (k *creation) log() string { return filepath.Join(k.dir, "log") }

// limit sets all limits by our own hand: what a limit means does not depend on
// who made the container.
func (k *creation) limit(ctx context.Context) error {
	return k.o.Update(ctx, k.c, k.c.Resources)
}

// keep hands the first process to the monitor.
func (k *creation) keep(ctx context.Context) error {
	f, err := os.Open(filepath.Join(k.dir, "pid"))
	if err != nil {
		return errs.New(errs.Internal, "the runtime left no pid: %w", err)
	}
	defer func() { _ = f.Close() }()
	b, err := io.ReadAll(io.LimitReader(f, 64))
	if err != nil {
		return errs.New(errs.Internal, "read the runtime's pid file: %w", err)
	}
	pid, err := reaper.ParsePID(b)
	if err != nil {
		return errs.New(errs.Internal, "the runtime's pid file: %w", err)
	}
	k.proc, err = k.o.Keep(ctx, k.c, pid, k.kept)
	return err
}

// explain names the OOM killer where it is why a creation failed.
func (k *creation) explain(ctx context.Context, err error) error {
	oom, oerr := k.o.OOMKilled(context.WithoutCancel(ctx), k.c)
	if (oerr == nil && oom) || strings.Contains(err.Error(), "OOM-killed") {
		return errs.New(errs.FailedPrecondition, "the kernel's OOM killer ended the container's process before it could start; its memory limit (or the pod's) is too low for %s (%w)", k.h.Path, err)
	}
	return err
}
