package native

import (
	"context"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/sys"
	"github.com/naru-project/naru/runtime"
	"github.com/naru-project/naru/runtime/cgroup"
	"github.com/naru-project/naru/runtime/monitor"
	"github.com/naru-project/naru/runtime/stdio"
)

// killTime is how long an exec may take to die once it was killed.
const killTime = 5 * time.Second

// exec is one exec session.
type exec struct {
	x     *Executor
	proc  *monitor.ExecProcess
	group *cgroup.ExecGroup
}

// startExec clones a process into the container with the given streams.
func (x *Executor) startExec(ctx context.Context, c *runtime.Container, args []string, tty bool, files [3]*os.File) (*exec, error) {
	p, err := x.process(c, args, tty)
	if err != nil {
		return nil, err
	}
	return x.startProcess(ctx, c, p, files)
}

func (x *Executor) startProcess(ctx context.Context, c *runtime.Container, p *process, files [3]*os.File) (_ *exec, err error) {
	h, err := x.lookup(ctx, c.ID)
	if err != nil {
		return nil, err
	}
	defer func() { _ = h.pidfd.Close() }()
	g, err := x.cfg.Cgroups.Open(c.Cgroup)
	if err != nil {
		return nil, err
	}
	e := &exec{x: x}
	if e.group, err = g.NewExec(ctx); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			e.close(ctx)
		}
	}()
	sr, sw, err := sys.Pipe(true)
	if err != nil {
		return nil, errs.Wrap(errs.Internal, err)
	}
	defer func() { _, _ = sr.Close(), sw.Close() }()
	spaces := unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWPID | unix.CLONE_NEWCGROUP
	if len(c.UIDMap) > 0 {
		spaces |= unix.CLONE_NEWUSER
	}
	l := joinPlan(p, spaces, joinFiles{
		status: sw, proc: x.proc, target: h.pidfd, tasks: e.group.TaskFDs(), cgroup: e.group.CloneFD(),
		stdin: files[0], stdout: files[1], stderr: files[2],
	})
	f, err := l.memfd("exec")
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	e.proc, err = x.cfg.Monitor.Exec(ctx, monitor.ExecRequest{
		ContainerID: c.ID, Plan: f, FDs: l.files, Clone: l.clone, TwoStage: l.twoStage, StatusR: sr,
	})
	if err != nil {
		return nil, planError(err)
	}
	e.group.Close()
	return e, nil
}

// close releases the session; what still lives of it stays in the container.
func (e *exec) close(ctx context.Context) {
	if e.proc != nil {
		e.proc.Close()
	}
	e.group.Close()
	// Busy while a process that was left behind lives: it goes with the container.
	_ = e.group.Remove(context.WithoutCancel(ctx))
}

// kill ends everything that the exec started and waits for its own process.
func (e *exec) kill(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), killTime)
	defer cancel()
	_ = unix.PidfdSendSignal(int(e.proc.PIDFD.Fd()), unix.SIGKILL, nil, 0)
	_ = e.group.Kill(ctx)
	_, _ = e.proc.Wait(ctx)
}

func exitCode(e monitor.Exit) int {
	if e.Signal != 0 {
		return 128 + e.Signal
	}
	return e.Status
}

// ExecSync runs a command to its end and returns its output.
func (x *Executor) ExecSync(ctx context.Context, c *runtime.Container, s runtime.ExecSpec) (runtime.ExecResult, error) {
	if s.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, s.Timeout, errs.New(errs.DeadlineExceeded, "command %q timed out after %s", s.Args[0], s.Timeout))
		defer cancel()
	}
	null, err := os.Open(os.DevNull) //nolint:forbidigo // a path of the host
	if err != nil {
		return runtime.ExecResult{}, errs.New(errs.Internal, "open the null device: %w", err)
	}
	defer func() { _ = null.Close() }()
	out, err := stdio.NewCapture()
	if err != nil {
		return runtime.ExecResult{}, err
	}
	defer out.Close()
	e, err := x.startExec(ctx, c, s.Args, false, [3]*os.File{null, out.W[0], out.W[1]})
	if err != nil {
		return runtime.ExecResult{}, execError(c, s.Args, err)
	}
	defer e.close(ctx)
	out.Start()
	exit, err := e.proc.Wait(ctx)
	if err != nil {
		e.kill(ctx) // also when the worker was lost: nobody would know of it any more
		if ctx.Err() != nil {
			return runtime.ExecResult{}, context.Cause(ctx)
		}
		return runtime.ExecResult{}, execError(c, s.Args, err)
	}
	stdout, stderr := out.Finish()
	return runtime.ExecResult{Stdout: stdout, Stderr: stderr, Code: exitCode(exit)}, nil
}

func execError(c *runtime.Container, args []string, err error) error {
	return errs.New(errs.Of(err), "exec %q in container %s: %w", args[0], short(c.ID), err)
}

// Exec runs a command with streams and returns its exit code.
func (x *Executor) Exec(ctx context.Context, c *runtime.Container, s runtime.ExecSpec, st runtime.Streams) (int, error) {
	io3, err := x.openSession(ctx, c, s.TTY, st)
	if err != nil {
		return 0, err
	}
	defer io3.Close()
	e, err := x.startExec(ctx, c, s.Args, s.TTY, io3.Child)
	if err != nil {
		return 0, execError(c, s.Args, err)
	}
	defer e.close(ctx)
	io3.Start(ctx)
	exit, err := e.proc.Wait(ctx)
	if err != nil {
		e.kill(ctx)
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		return 0, execError(c, s.Args, err)
	}
	io3.Drain()
	return exitCode(exit), nil
}

// openSession makes the streams of an exec.
func (x *Executor) openSession(ctx context.Context, c *runtime.Container, tty bool, st runtime.Streams) (*stdio.Session, error) {
	uid, gid := hostID(c.UIDMap, c.Spec.Process.User.UID), hostID(c.GIDMap, c.Spec.Process.User.GID)
	if !tty {
		return stdio.NewSession(st, uid, gid)
	}
	files, err := x.cfg.Monitor.Files(ctx, c.ID)
	if err != nil {
		return nil, err
	}
	defer files.Close()
	if files.Devpts == nil {
		return nil, errs.New(errs.FailedPrecondition, "container %s has no terminals", short(c.ID))
	}
	master, slave, err := openPty(files.Devpts)
	if err != nil {
		return nil, err
	}
	s := stdio.NewTerminal(st, master, slave)
	if err := slave.Chown(uid, hostID(c.GIDMap, 5)); err != nil {
		s.Close()
		return nil, errs.New(errs.Internal, "chown the terminal: %w", err)
	}
	return s, nil
}

// Attach connects a person to the container's own streams. Its output also
// goes to the log, whether anybody looks on or not.
func (x *Executor) Attach(ctx context.Context, c *runtime.Container, st runtime.Streams) error {
	files, err := x.cfg.Monitor.Files(ctx, c.ID)
	if err != nil {
		return err
	}
	defer files.Close() // what is closed before stays closed
	done := make(chan struct{})
	defer close(done)
	var outs, ends [2]*os.File
	var wg sync.WaitGroup
	defer func() {
		for _, f := range []*os.File{outs[0], outs[1], ends[0], ends[1]} {
			if f != nil {
				_ = f.Close()
			}
		}
		wg.Wait()
	}()
	for i, w := range []io.Writer{st.Stdout, st.Stderr} {
		if w == nil || (i == 1 && c.TTY) {
			continue
		}
		if outs[i], ends[i], err = sys.Pipe(true); err != nil {
			return errs.New(errs.Internal, "make a pipe: %w", err)
		}
	}
	if err := x.cfg.Monitor.Attach(ctx, c.ID, ends[0], ends[1]); err != nil {
		return err
	}
	closed := make(chan struct{})
	for i, w := range []io.Writer{st.Stdout, st.Stderr} {
		if outs[i] != nil {
			_ = ends[i].Close()
			ends[i] = nil
			wg.Go(func() { stdio.CopyOutput(w, outs[i]) })
		}
	}
	stdin, in := x.attachStdin(c, files, st)
	if stdin != nil {
		// A copy that the container does not read must not stay behind.
		defer func() { _ = stdin.Close() }()
	}
	if c.TTY && files.Pty != nil {
		pty, err := dup(files.Pty)
		if err != nil {
			return err
		}
		defer func() { _ = pty.Close() }()
		go stdio.Resize(ctx, pty, st.Resize, done)
	}
	// Copies of the container's stdin would keep it from ever ending.
	files.Close()
	if outs[0] != nil || outs[1] != nil {
		go func() { wg.Wait(); close(closed) }()
		in = nil // the end of the input does not end the output
	}
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-closed:
	case <-in:
	}
	return nil
}

// attachStdin copies a person's input into the container. It returns the file
// that it is copied to, which the caller closes, and a channel that is closed
// when the input has ended.
func (x *Executor) attachStdin(c *runtime.Container, files *monitor.Files, st runtime.Streams) (*os.File, <-chan struct{}) {
	to := files.Stdin
	if c.TTY {
		to = files.Pty
	}
	if st.Stdin == nil || to == nil || !c.Stdin {
		return nil, nil
	}
	f, err := dup(to)
	if err != nil {
		return nil, nil
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, _ = io.Copy(f, st.Stdin)
		_ = f.Close()
		if c.StdinOnce && !c.TTY {
			ctx, cancel := context.WithTimeout(context.Background(), killTime)
			defer cancel()
			_ = x.cfg.Monitor.CloseStdin(ctx, c.ID)
		}
	}()
	return f, ended
}
