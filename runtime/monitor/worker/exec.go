package worker

import (
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/failpoint"
	"github.com/naru-project/naru/runtime/monitor/wire"
	"github.com/naru-project/naru/runtime/plan"
)

const (
	pPgid  = 2 // P_PGID
	pPidfd = 3 // P_PIDFD
)

// reap waits for a child of this process that has ended or soon will, in the
// poller, and hands over how it ended. pidfd stays the caller's until done is
// called.
func (w *worker) reap(pidfd int, done func(wire.Exit)) {
	var mu sync.Mutex // two may look at once, and only the first can reap
	var over bool
	var token int32
	var ready = make(chan struct{})
	look := func() {
		mu.Lock()
		defer mu.Unlock()
		if over {
			return
		}
		x, ok := reapNow(pidfd)
		if !ok {
			return
		}
		over = true
		go func() {
			<-ready
			w.poll.unwatch(pidfd, token)
			done(x)
		}()
	}
	var err error
	token, err = w.poll.watch(pidfd, unix.EPOLLIN, func(uint32) { look() })
	if err != nil {
		logf("wait for a child: %v", err)
	}
	close(ready)
	look()
}

// reapNow reaps a child that is dead. ok is also true when it cannot be known.
func reapNow(pidfd int) (x wire.Exit, ok bool) {
	var si struct {
		signo, errno, code, _ int32
		pid                   int32
		uid                   uint32
		status                int32
		_                     [100]byte
	}
	var err error
	for {
		err = unix.Waitid(pPidfd, pidfd, (*unix.Siginfo)(unsafe.Pointer(&si)), unix.WEXITED|unix.WNOHANG|unix.WALL, nil)
		if err != unix.EINTR {
			break
		}
	}
	x = wire.Exit{PID: int(si.pid), Time: time.Now().UnixNano()}
	switch {
	case err != nil:
		x.Unknown, x.Status = true, 255
		return x, true
	case si.pid == 0:
		return x, false
	case si.code == 1: // CLD_EXITED
		x.Status = int(si.status)
	default:
		x.Signal = int(si.status)
	}
	return x, true
}

// execProc is a running exec.
type execProc struct {
	pidfd int
	group int // its process group, if it is to end with it; 0 = not
	term  bool
	mu    sync.Mutex
	over  bool
}

// end ends the process because its client is gone.
func (e *execProc) end() {
	if !e.term {
		e.kill()
		return
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.over {
		_ = unix.PidfdSendSignal(e.pidfd, unix.SIGTERM, nil, 0)
		time.AfterFunc(termTime, e.kill)
	}
}

func (e *execProc) kill() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.over {
		return
	}
	if e.group != 0 {
		err := unix.PidfdSendSignal(e.pidfd, unix.SIGKILL, nil, unix.PIDFD_SIGNAL_PROCESS_GROUP)
		if err == unix.EINVAL { // before Linux 6.9
			_ = unix.Kill(-e.group, unix.SIGKILL) //nolint:forbidigo // its leader is a child of ours that is not reaped
		}
	}
	_ = unix.PidfdSendSignal(e.pidfd, unix.SIGKILL, nil, 0)
}

// exec clones a process beside a container. It is the worker's own child, so
// that it is reaped here before the daemon hears of its end: an init cannot be
// reaped before every process of its PID namespace is.
func (w *worker) exec(s *conn, p *wire.Packet) error {
	var m wire.Exec
	if err := wire.Unmarshal(p.Body, &m); err != nil {
		return errs.Wrap(errs.InvalidArgument, err)
	}
	want := 1 + m.Slots
	if m.Status {
		want++
	}
	if len(p.FDs) != want || m.Slots == 0 || (m.Hold && m.TwoStage && !m.Status) {
		return errs.New(errs.InvalidArgument, "exec came with %d files, want %d and a status pipe", len(p.FDs), want)
	}
	start := p.FDs[:1+m.Slots]
	defer func() { wire.CloseAll(start) }()
	fds := wire.NoFDs()
	if m.Status {
		fds[wire.FDStatus] = p.FDs[want-1]
	}
	p.FDs = nil
	defer func() { wire.CloseAll(fds.List()) }()
	if err := execStatus(&fds, start, m.Hold); err != nil {
		return err
	}
	if err := failpoint.Hit("worker", "exec", "clone"); err != nil {
		return err
	}
	c, err := startPlan(&start, plan.Clone{Flags: m.Clone.Flags, Cgroup: m.Clone.Cgroup})
	if err != nil {
		return err
	}
	status := fds[wire.FDStatus]
	if m.TwoStage {
		if err := w.execSecond(&c, status); err != nil {
			return err
		}
	}
	if !m.Hold {
		if err := w.readStatus(status, func(plan.Record) bool { return false }); err != nil {
			_ = unix.PidfdSendSignal(c.pidfd, unix.SIGKILL, nil, 0)
			w.reapAndClose(c.pidfd)
			return err
		}
	}
	if err := failpoint.Hit("worker", "exec", "answer"); err != nil {
		_ = unix.PidfdSendSignal(c.pidfd, unix.SIGKILL, nil, 0)
		w.reapAndClose(c.pidfd)
		return err
	}
	group := 0
	if m.Container == "" && !m.Hold {
		group = c.pid // a program of the host: it leads a session, and no cgroup holds what it starts
	}
	return w.execRuns(s, p.Req, c, &execProc{pidfd: c.pidfd, group: group, term: m.Term})
}

// execStatus sets up the status pipe of an exec. Who waits for its end must be
// alone with the child's end of it, and the client cannot have closed its own
// yet: so the child gets a pipe of the worker's. With hold, the client reads
// on, from its own.
func execStatus(fds *wire.FDs, start []int, hold bool) error {
	if hold {
		return reopenStatus(fds)
	}
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return errs.New(errs.ResourceExhausted, "make a status pipe: %w", err)
	}
	if fds[wire.FDStatus] >= 0 {
		_ = unix.Close(fds[wire.FDStatus])
	}
	_ = unix.Close(start[1])
	fds[wire.FDStatus], start[1] = p[0], p[1]
	return unix.SetNonblock(p[0], true)
}

// execSecond waits for the second child and reaps the first. If it fails, the
// second may be there with a pid that was never told (the first was killed with
// the container, say); it ends by itself, and must be reaped, or the init of its
// PID namespace cannot end.
func (w *worker) execSecond(c *child, status int) error {
	first := c.pid
	err := w.secondStage(c, status, func(pidfd int) {
		d, err := unix.FcntlInt(uintptr(pidfd), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			logf("wait for a child: %v", err)
			return
		}
		w.reapAndClose(d)
	})
	if err != nil {
		go reapGroup(first)
	}
	return err
}

// reapGroup reaps the children in the process group that a first child leads,
// until there are none.
func reapGroup(first int) {
	for {
		if err := unix.Waitid(pPgid, first, nil, unix.WEXITED|unix.WALL, nil); err != nil && err != unix.EINTR {
			return
		}
	}
}

func (w *worker) reapAndClose(pidfd int) {
	w.reap(pidfd, func(wire.Exit) { _ = unix.Close(pidfd) })
}

// execRuns answers the client and tells it later how the process ended.
func (w *worker) execRuns(s *conn, req uint64, c child, e *execProc) error {
	s.addExec(e)
	s.reply(req, wire.EncodeBody(&wire.Created{PID: c.pid}), []int{c.pidfd}, false, nil)
	w.reap(c.pidfd, func(x wire.Exit) {
		e.mu.Lock()
		e.over = true
		e.mu.Unlock()
		_ = unix.Close(c.pidfd)
		x.PID = c.pid
		s.removeExec(e)
		s.push(wire.Marshal(wire.KindExecExit, req, &x))
	})
	return nil
}
