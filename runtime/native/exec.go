package native

import (
	"context"
	"errors"
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
)

const (
	// maxOutput is how much of each stream ExecSync returns; the rest is read
	// and thrown away (CRI: ExecSyncResponse; 16 MiB is the gRPC limit's worth).
	maxOutput = 16 << 20
	// drainTime is how long output is still read after the process has ended: a
	// child it left behind may hold the pipe open for ever.
	drainTime = 250 * time.Millisecond
	// killTime is how long an exec may take to die once it was killed.
	killTime = 5 * time.Second
)

// exec is one exec session.
type exec struct {
	x     *Executor
	proc  *monitor.ExecProcess
	group *cgroup.ExecGroup
}

// startExec clones a process into the container with the given streams.
func (x *Executor) startExec(ctx context.Context, c *runtime.Container, args []string, tty bool, stdio [3]*os.File) (_ *exec, err error) {
	p, err := x.process(c, args, tty)
	if err != nil {
		return nil, err
	}
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
		stdin: stdio[0], stdout: stdio[1], stderr: stdio[2],
	})
	f, err := l.memfd()
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
	out, err := newCapture()
	if err != nil {
		return runtime.ExecResult{}, err
	}
	defer out.close()
	e, err := x.startExec(ctx, c, s.Args, false, [3]*os.File{null, out.w[0], out.w[1]})
	if err != nil {
		return runtime.ExecResult{}, execError(c, s.Args, err)
	}
	defer e.close(ctx)
	out.start()
	exit, err := e.proc.Wait(ctx)
	if err != nil {
		e.kill(ctx) // also when the worker was lost: nobody would know of it any more
		if ctx.Err() != nil {
			return runtime.ExecResult{}, context.Cause(ctx)
		}
		return runtime.ExecResult{}, execError(c, s.Args, err)
	}
	stdout, stderr := out.finish()
	return runtime.ExecResult{Stdout: stdout, Stderr: stderr, Code: exitCode(exit)}, nil
}

func execError(c *runtime.Container, args []string, err error) error {
	return errs.New(errs.Of(err), "exec %q in container %s: %w", args[0], short(c.ID), err)
}

// capture reads two pipes into memory, up to maxOutput each.
type capture struct {
	r, w [2]*os.File
	buf  [2]limited
	end  ending
	wg   sync.WaitGroup
}

func newCapture() (*capture, error) {
	c := &capture{}
	for i := range c.r {
		var err error
		if c.r[i], c.w[i], err = sys.Pipe(true); err != nil {
			c.close()
			return nil, errs.Wrap(errs.Internal, err)
		}
	}
	return c, nil
}

func (c *capture) start() {
	for i := range c.r {
		_ = c.w[i].Close()
		c.wg.Go(func() { c.end.copy(&c.buf[i], c.r[i]) })
	}
}

// finish reads what is left.
func (c *capture) finish() (stdout, stderr []byte) {
	c.end.set(c.r[:]...)
	c.wg.Wait()
	return c.buf[0].b, c.buf[1].b
}

func (c *capture) close() {
	for i := range c.r {
		for _, f := range []*os.File{c.r[i], c.w[i]} {
			if f != nil {
				_ = f.Close()
			}
		}
	}
	c.wg.Wait()
}

// limited keeps the first maxOutput bytes and swallows the rest.
type limited struct{ b []byte }

func (l *limited) Write(p []byte) (int, error) {
	if n := maxOutput - len(l.b); n > 0 {
		l.b = append(l.b, p[:min(n, len(p))]...)
	}
	return len(p), nil
}

// Exec runs a command with streams and returns its exit code.
func (x *Executor) Exec(ctx context.Context, c *runtime.Container, s runtime.ExecSpec, st runtime.Streams) (int, error) {
	io3, err := x.openSession(ctx, c, s.TTY, st)
	if err != nil {
		return 0, err
	}
	defer io3.close()
	e, err := x.startExec(ctx, c, s.Args, s.TTY, io3.child)
	if err != nil {
		return 0, execError(c, s.Args, err)
	}
	defer e.close(ctx)
	io3.start(ctx)
	exit, err := e.proc.Wait(ctx)
	if err != nil {
		e.kill(ctx)
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		return 0, execError(c, s.Args, err)
	}
	io3.drain()
	return exitCode(exit), nil
}

// session holds both ends of an exec's streams.
type session struct {
	st     runtime.Streams
	child  [3]*os.File // closed once the child has them
	stdin  *os.File
	output [2]*os.File
	master *os.File
	end    ending
	wg     sync.WaitGroup // copies of output
	done   chan struct{}
}

func (x *Executor) openSession(ctx context.Context, c *runtime.Container, tty bool, st runtime.Streams) (_ *session, err error) {
	s := &session{st: st, done: make(chan struct{})}
	defer func() {
		if err != nil {
			s.close()
		}
	}()
	if tty {
		files, err := x.cfg.Monitor.Files(ctx, c.ID)
		if err != nil {
			return nil, err
		}
		defer files.Close()
		if files.Devpts == nil {
			return nil, errs.New(errs.FailedPrecondition, "container %s has no terminals", short(c.ID))
		}
		var slave *os.File
		if s.master, slave, err = openPty(files.Devpts); err != nil {
			return nil, err
		}
		s.child = [3]*os.File{slave, slave, slave}
		if err := slave.Chown(hostID(c.UIDMap, c.Spec.Process.User.UID), hostID(c.GIDMap, 5)); err != nil {
			return nil, errs.New(errs.Internal, "chown the terminal: %w", err)
		}
		return s, nil
	}
	null := func() (*os.File, error) { return os.OpenFile(os.DevNull, os.O_RDWR, 0) } //nolint:forbidigo // a path of ours or of the host, not of the image
	if st.Stdin != nil {
		s.stdin, s.child[0], err = sys.Pipe(false)
	} else {
		s.child[0], err = null()
	}
	for i, w := range []io.Writer{st.Stdout, st.Stderr} {
		if err != nil {
			break
		}
		if w != nil {
			s.output[i], s.child[i+1], err = sys.Pipe(true)
		} else {
			s.child[i+1], err = null()
		}
	}
	if err != nil {
		return nil, errs.New(errs.Internal, "make the streams: %w", err)
	}
	uid, gid := hostID(c.UIDMap, c.Spec.Process.User.UID), hostID(c.GIDMap, c.Spec.Process.User.GID)
	for i, f := range s.child {
		if (i == 0 && s.stdin != nil) || (i > 0 && s.output[i-1] != nil) {
			if err := f.Chown(uid, gid); err != nil {
				return nil, errs.New(errs.Internal, "chown a stream: %w", err)
			}
		}
	}
	return s, nil
}

// start copies between the person and the process.
func (s *session) start(ctx context.Context) {
	s.closeChild()
	if s.master != nil {
		s.wg.Go(func() { s.end.copy(s.st.Stdout, s.master) })
		if s.st.Stdin != nil {
			go func() { _, _ = io.Copy(s.master, s.st.Stdin) }()
		}
		go resize(ctx, s.master, s.st.Resize, s.done)
		return
	}
	for i, w := range []io.Writer{s.st.Stdout, s.st.Stderr} {
		if s.output[i] != nil {
			s.wg.Go(func() { s.end.copy(w, s.output[i]) })
		}
	}
	if s.stdin != nil {
		go func() {
			// Ends with the client's stream; what it closes is this end only.
			_, _ = io.Copy(s.stdin, s.st.Stdin)
			_ = s.stdin.Close()
		}()
	}
}

func copyOutput(w io.Writer, r *os.File) {
	if w == nil {
		w = io.Discard
	}
	_, _ = io.Copy(w, r)
}

// resize follows the size of the person's window.
func resize(ctx context.Context, master *os.File, sizes <-chan runtime.Size, done <-chan struct{}) {
	if sizes == nil {
		return
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-done:
			return
		case z, ok := <-sizes:
			if !ok {
				return
			}
			if z.Width == 0 || z.Height == 0 {
				continue
			}
			_ = setSize(master, z)
		}
	}
}

func setSize(master *os.File, z runtime.Size) error {
	rc, err := master.SyscallConn()
	if err != nil {
		return err
	}
	var ierr error
	err = rc.Control(func(fd uintptr) {
		ierr = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: z.Height, Col: z.Width})
	})
	return errors.Join(err, ierr)
}

// drain lets the output reach the person.
func (s *session) drain() {
	s.end.set(s.master, s.output[0], s.output[1])
	s.wg.Wait()
}

func (s *session) closeChild() {
	for i, f := range s.child {
		if f != nil {
			_ = f.Close()
			s.child[i] = nil
		}
	}
}

func (s *session) close() {
	select {
	case <-s.done:
	default:
		close(s.done)
	}
	s.closeChild()
	for _, f := range []*os.File{s.stdin, s.output[0], s.output[1], s.master} {
		if f != nil {
			_ = f.Close()
		}
	}
	s.wg.Wait()
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
			wg.Go(func() { copyOutput(w, outs[i]) })
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
		go resize(ctx, pty, st.Resize, done)
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
