package native

import (
	"context"
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/program"
	"github.com/naru-project/naru/internal/sys"
	"github.com/naru-project/naru/runtime/monitor"
	"github.com/naru-project/naru/runtime/plan"
	"github.com/naru-project/naru/runtime/stdio"
)

// Programs of the host are children of the worker: the daemon executes nothing,
// and has given up some privileges that they may need. They see the daemon's
// mounts and network. When the daemon dies they are killed.

// RunProgram runs a program to its end and returns what it printed. When ctx
// ends, or it prints too much, it is killed with its whole process group. What
// it left behind and that holds its output open is not waited for.
func (x *Executor) RunProgram(ctx context.Context, r program.Request) (_ program.Result, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	in, err := memoryFile("stdin", r.Stdin)
	if err != nil {
		return program.Result{}, err
	}
	defer func() { _ = in.Close() }()
	var read, write [2]*os.File
	defer func() {
		for _, f := range []*os.File{read[0], read[1], write[0], write[1]} {
			if f != nil {
				_ = f.Close()
			}
		}
	}()
	for i := range read {
		if read[i], write[i], err = sys.Pipe(true); err != nil {
			return program.Result{}, errs.Wrap(errs.Internal, err)
		}
	}
	p, err := x.startProgram(ctx, programFiles{stdio: [3]*os.File{in, write[0], write[1]}}, &process{
		args: []string{r.Path}, env: r.Env, umask: 0o022, oomScoreAdj: new(0),
		rlimits: hookLimits(),
	})
	if err != nil {
		return program.Result{}, err
	}
	defer p.Close()
	_, _ = write[0].Close(), write[1].Close()
	out := &upTo{limit: r.MaxOutput, over: func() {
		cancel(errs.New(errs.ResourceExhausted, "it printed more than %d bytes", r.MaxOutput))
	}}
	var said head
	var end stdio.Ending
	copied := make(chan struct{}, 2)
	go func() { end.Copy(out, read[0]); copied <- struct{}{} }()
	go func() { end.Copy(&said, read[1]); copied <- struct{}{} }()
	exit, err := p.Wait(ctx)
	if err != nil {
		killGroup(ctx, p) // also when the worker was lost: nobody would know of it any more
	}
	end.Set(read[:]...)
	_, _ = <-copied, <-copied
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return program.Result{}, errs.New(errs.Of(err), "%w%s", err, said.text())
	}
	return program.Result{Stdout: out.b, Stderr: said.b, Status: exit.Status, Signal: exit.Signal}, nil
}

// startProgram clones the process of a program.
func (x *Executor) startProgram(ctx context.Context, files programFiles, p *process) (*monitor.ExecProcess, error) {
	sr, sw, err := sys.Pipe(true)
	if err != nil {
		return nil, errs.Wrap(errs.Internal, err)
	}
	defer func() { _, _ = sr.Close(), sw.Close() }()
	mnt, err := sys.OpenNamespace("/proc/self/ns/mnt", unix.CLONE_NEWNS)
	if err != nil {
		return nil, errs.Wrap(errs.Internal, err)
	}
	defer func() { _ = mnt.Close() }()
	net, err := sys.OpenNamespace("/proc/self/ns/net", unix.CLONE_NEWNET)
	if err != nil {
		return nil, errs.Wrap(errs.Internal, err)
	}
	defer func() { _ = net.Close() }()
	files.status, files.proc, files.mnt, files.net = sw, x.proc, mnt, net
	l := programPlan(p, files)
	f, err := l.memfd("program")
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	e, err := x.cfg.Monitor.Exec(ctx, monitor.ExecRequest{Plan: f, FDs: l.files, Clone: l.clone, StatusR: sr, Term: files.binary != nil})
	if err != nil {
		return nil, planError(err)
	}
	return e, nil
}

// programFiles are the files of a program's plan.
type programFiles struct {
	status, proc *os.File
	mnt, net     *os.File // namespaces to join
	stdio        [3]*os.File
	mounts       []Attachment // in a mount namespace of its own; none = it has the daemon's
	binary       *os.File     // executed in place of what its first argument names
	report       *os.File     // with binary: its descriptor 3
}

// programPlan: the daemon's network and mounts, the streams, execve.
func programPlan(p *process, f programFiles) *launch {
	l := newLaunch(f.status)
	proc := l.slot("proc", f.proc)
	var streams [3]plan.Arg
	for i, name := range []string{"stdin", "stdout", "stderr"} {
		streams[i] = l.slot(name, f.stdio[i])
	}
	l.schedule()
	l.setOOMScoreAdj(proc, p.oomScoreAdj)
	l.Sys(plan.StageNamespaces, unix.SYS_SETNS, l.slot("net", f.net), plan.Int(unix.CLONE_NEWNET))
	l.Sys(plan.StageNamespaces, unix.SYS_SETNS, l.slot("mnt", f.mnt), plan.Int(unix.CLONE_NEWNS))
	l.attach(f.mounts)
	var keep []int
	var report, binary plan.Arg
	if f.binary != nil {
		report, binary = l.slot("report", f.report), l.slot("binary", f.binary)
		keep = []int{l.Slots() - 2, l.Slots() - 1}
	}
	l.stdio(streams[0], streams[1], streams[2])
	l.closeFiles(keep...)
	l.inheritance(p)
	l.session(p)
	if f.binary != nil {
		l.executeFile(p, binary, report)
	} else {
		l.execute(p)
	}
	return l
}

// killGroup ends a program with its process group and waits for its own end.
func killGroup(ctx context.Context, p *monitor.ExecProcess) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), killTime)
	defer cancel()
	signalGroup(p, unix.SIGKILL)
	_, _ = p.Wait(ctx)
}

// signalGroup signals a program and all that it started and that is still in
// its process group, which it leads (setsid).
func signalGroup(p *monitor.ExecProcess, sig unix.Signal) {
	fd := sys.FD(p.PIDFD)
	err := unix.PidfdSendSignal(fd, sig, nil, unix.PIDFD_SIGNAL_PROCESS_GROUP)
	if errors.Is(err, unix.EINVAL) && unix.PidfdSendSignal(fd, 0, nil, 0) == nil {
		// Before Linux 6.9. The number is the group's as long as its leader lives.
		_ = unix.Kill(-p.PID, sig) //nolint:forbidigo // of a living leader, see above
	}
}

// memoryFile is a file without a name, with data in it.
func memoryFile(name string, data []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, errs.New(errs.Internal, "make %s: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), name)
	_, err = f.Write(data)
	if err == nil {
		_, err = f.Seek(0, 0)
	}
	if err != nil {
		_ = f.Close()
		return nil, errs.New(errs.Internal, "write %s: %w", name, err)
	}
	return f, nil
}

// upTo keeps an output that has a limit, and tells when that is passed.
type upTo struct {
	b     []byte
	limit int
	over  func()
}

func (u *upTo) Write(p []byte) (int, error) {
	n := min(len(p), u.limit-len(u.b))
	u.b = append(u.b, p[:n]...)
	if n < len(p) {
		u.over()
	}
	return len(p), nil
}
