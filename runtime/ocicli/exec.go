package ocicli

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"time"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/sys"
	"github.com/naru-project/naru/runtime"
	"github.com/naru-project/naru/runtime/monitor"
	"github.com/naru-project/naru/runtime/monitor/reaper"
	"github.com/naru-project/naru/runtime/native"
	"github.com/naru-project/naru/runtime/stdio"
)

// killTime is how long an exec may take to die once it is to be killed.
const killTime = 5 * time.Second

// exec is one exec, whose parent is a reaper.
type exec struct {
	h      *handler
	files  execFiles
	proc   *monitor.ExecProcess // the reaper
	report *os.File
}

// execFiles are the files of one exec in its container's folder.
type execFiles struct{ process, pid, log string }

func (o *Executor) execFiles(id string) execFiles {
	var b [6]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	p := filepath.Join(o.folder(id), "exec-"+hex.EncodeToString(b[:]))
	return execFiles{process: p + ".json", pid: p + ".pid", log: p + ".log"}
}

func (f execFiles) remove() {
	for _, p := range []string{f.process, f.pid, f.log} {
		_ = os.Remove(p)
	}
}

// startExec starts a command in the container. Its environment may hold
// secrets: it goes by a file, never by the command line.
func (o *Executor) startExec(ctx context.Context, h *handler, c *runtime.Container, s runtime.ExecSpec, streams [3]*os.File, con *console) (_ *exec, err error) {
	p := *c.Spec.Process
	p.Args, p.Terminal = s.Args, s.TTY
	data, err := json.Marshal(&p)
	if err != nil {
		return nil, errs.New(errs.Internal, "encode the process: %w", err)
	}
	e := &exec{h: h, files: o.execFiles(c.ID)}
	defer func() {
		if err != nil {
			e.close()
		}
	}()
	if err := os.WriteFile(e.files.process, data, 0o600); err != nil {
		return nil, errs.New(errs.Internal, "write the process: %w", err)
	}
	var w *os.File
	if e.report, w, err = sys.Pipe(true); err != nil {
		return nil, errs.Wrap(errs.Internal, err)
	}
	defer func() { _ = w.Close() }()
	bin, err := o.MonitorBinary(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { _ = bin.Close() }()
	args := []string{"exec", "--detach", "--process", e.files.process, "--pid-file", e.files.pid}
	if con != nil {
		args = append(args, "--console-socket", con.path)
	}
	e.proc, err = o.StartTool(ctx, native.Tool{
		Args:  append([]string{"naru-monitor", "exec", e.files.pid}, h.argv(e.files.log, append(args, c.ID)...)...),
		Stdio: streams, Umask: 0o022, Report: w, Binary: bin,
	})
	return e, err
}

// close releases what the exec had.
func (e *exec) close() {
	if e.proc != nil {
		e.proc.Close()
	}
	if e.report != nil {
		_ = e.report.Close()
	}
	e.files.remove()
}

// kill ends the exec.
func (e *exec) kill() { native.EndTool(e.proc, killTime) }

// wait waits for the end of the command and tells its code. The runtime's own
// part has a deadline.
func (e *exec) wait(ctx context.Context) (int, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	late := time.AfterFunc(startTime, func() {
		cancel(errs.New(errs.DeadlineExceeded, "%s exec did not end within %s", e.h.Path, startTime))
	})
	defer late.Stop()
	var text []byte
	told := make(chan struct{})
	go func() { // ends with the reaper, or with close
		defer close(told)
		buf := make([]byte, 512)
		for len(text) < 1<<12 {
			n, err := e.report.Read(buf)
			text = append(text, buf[:n]...)
			if err != nil {
				return
			}
			if bytes.IndexByte(text, '\n') >= 0 { // the first line comes when the program has ended
				late.Stop()
			}
		}
	}()
	_, err := e.proc.Wait(ctx)
	if err != nil {
		e.kill() // also when the worker was lost: nobody would know of it any more
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		return 0, err
	}
	_ = e.report.SetReadDeadline(time.Now().Add(killTime)) // nobody holds the other end any more
	<-told
	return e.result(reaper.Parse(text))
}

// result is what a reaper's report means.
func (e *exec) result(r reaper.Report) (int, error) {
	switch {
	case r.Exited:
		return r.Code, nil
	case r.Failed != 0:
		return 0, e.h.explain("exec", e.files.log, errs.New(errs.Internal, "it ended with status %d", r.Failed))
	case r.Problem != "":
		return 0, errs.New(errs.Internal, "%s", r.Problem)
	}
	return 0, errs.New(errs.Internal, "how it ended is not known: its parent was killed, or the running naru-monitor is older than this naru (upgrade it, SIGUSR2)")
}

// execError says what could not be executed where.
func execError(c *runtime.Container, args []string, err error) error {
	return errs.New(errs.Of(err), "exec %q in container %s: %w", args[0], short(c.ID), err)
}

// ExecSync runs a command to its end and returns its output.
func (o *Executor) ExecSync(ctx context.Context, c *runtime.Container, s runtime.ExecSpec) (runtime.ExecResult, error) {
	h, err := o.maker(c.ID)
	if err != nil {
		return runtime.ExecResult{}, err
	}
	if h == nil {
		return o.Executor.ExecSync(ctx, c, s)
	}
	if s.Timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, s.Timeout, errs.New(errs.DeadlineExceeded, "command %q timed out after %s", s.Args[0], s.Timeout))
		defer cancel()
	}
	out, err := stdio.NewCapture()
	if err != nil {
		return runtime.ExecResult{}, err
	}
	defer out.Close()
	s.TTY = false
	e, err := o.startExec(ctx, h, c, s, [3]*os.File{nil, out.W[0], out.W[1]}, nil)
	if err != nil {
		return runtime.ExecResult{}, execError(c, s.Args, err)
	}
	defer e.close()
	out.Start()
	code, err := e.wait(ctx)
	if err != nil {
		if ctx.Err() != nil {
			return runtime.ExecResult{}, context.Cause(ctx)
		}
		return runtime.ExecResult{}, execError(c, s.Args, err)
	}
	stdout, stderr := out.Finish()
	return runtime.ExecResult{Stdout: stdout, Stderr: stderr, Code: code}, nil
}

// Exec runs a command with streams and returns its exit code.
func (o *Executor) Exec(ctx context.Context, c *runtime.Container, s runtime.ExecSpec, st runtime.Streams) (int, error) {
	h, err := o.maker(c.ID)
	if err != nil {
		return 0, err
	}
	if h == nil {
		return o.Executor.Exec(ctx, c, s, st)
	}
	run := o.execPipes
	if s.TTY {
		run = o.execTerminal
	}
	code, err := run(ctx, h, c, s, st)
	if err != nil && ctx.Err() == nil {
		return 0, execError(c, s.Args, err)
	}
	return code, err
}

func (o *Executor) execPipes(ctx context.Context, h *handler, c *runtime.Container, s runtime.ExecSpec, st runtime.Streams) (int, error) {
	uid, gid := native.HostIDs(c)
	ses, err := stdio.NewSession(st, uid, gid)
	if err != nil {
		return 0, err
	}
	defer ses.Close()
	e, err := o.startExec(ctx, h, c, s, ses.Child, nil)
	if err != nil {
		return 0, err
	}
	defer e.close()
	ses.Start(ctx)
	code, err := e.wait(ctx)
	if err != nil {
		return 0, err
	}
	ses.Drain()
	return code, nil
}

func (o *Executor) execTerminal(ctx context.Context, h *handler, c *runtime.Container, s runtime.ExecSpec, st runtime.Streams) (int, error) {
	con, err := o.newConsole()
	if err != nil {
		return 0, err
	}
	defer con.close()
	e, err := o.startExec(ctx, h, c, s, [3]*os.File{}, con)
	if err != nil {
		return 0, err
	}
	defer e.close()
	// The terminal, or the end of a program that did not get so far.
	cctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	ended := make(chan struct{})
	var code int
	var werr error
	go func() {
		defer close(ended)
		code, werr = e.wait(ctx)
		cancel(errEnded)
	}()
	master, err := con.receive(cctx)
	if err != nil && !errors.Is(err, errEnded) {
		e.kill()
	}
	if err != nil {
		<-ended
		if werr != nil {
			return 0, werr
		}
		return 0, err
	}
	ses := stdio.NewTerminal(st, master, nil)
	defer ses.Close()
	ses.Start(ctx)
	<-ended
	if werr != nil {
		return 0, werr
	}
	ses.Drain()
	return code, nil
}

var errEnded = errs.New(errs.Internal, "the runtime ended without having made a terminal")
