package worker

import (
	"errors"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/failpoint"
	"github.com/naru-project/naru/runtime/monitor/wire"
	"github.com/naru-project/naru/runtime/plan"
)

// planFailure is the record of an operation that failed in a child.
type planFailure struct {
	rec []byte
	err error
}

func (f *planFailure) Error() string { return f.err.Error() }
func (f *planFailure) Unwrap() error { return f.err }

// create clones the first process of a container and gives it to the keeper.
func (w *worker) create(p *wire.Packet) (*container, error) {
	var m wire.Create
	if err := wire.Unmarshal(p.Body, &m); err != nil {
		return nil, errs.Wrap(errs.InvalidArgument, err)
	}
	const own = 1<<wire.FDPid | 1<<wire.FDStage0 | 1<<wire.FDStage1 | 1<<wire.FDState
	c := &container{w: w, id: m.ID, tty: m.TTY, fds: wire.NoFDs(), ended: make(chan struct{}), starting: make(chan struct{}, 1)}
	switch {
	case !wire.ValidID(m.ID):
		return nil, errs.New(errs.InvalidArgument, "container ID %q cannot name a file", m.ID)
	case m.Kept&own != 0 || len(p.FDs) < 1+m.Slots || !c.fds.Fill(m.Kept, p.FDs[1+m.Slots:]):
		return nil, errs.New(errs.InvalidArgument, "create came with %d files for %d slots and the mask %#x", len(p.FDs), m.Slots, m.Kept)
	}
	start := p.FDs[:1+m.Slots]
	p.FDs = nil
	defer func() { wire.CloseAll(start) }()
	if err := w.reserve(c); err != nil {
		wire.CloseAll(c.fds.List())
		return nil, err
	}
	err := w.clone(c, &m, &start)
	if err != nil {
		w.mu.Lock()
		delete(w.containers, c.id)
		w.mu.Unlock()
		c.remove()
		return nil, err
	}
	return c, nil
}

// take gives the keeper a process that an OCI runtime made: its child, once
// the runtime's program has ended. It has no gate; the program starts it.
func (w *worker) take(p *wire.Packet) (*container, error) {
	var m wire.Take
	if err := wire.Unmarshal(p.Body, &m); err != nil {
		return nil, errs.Wrap(errs.InvalidArgument, err)
	}
	const may = 1<<wire.FDPid | 1<<wire.FDStdin | 1<<wire.FDStdout | 1<<wire.FDStderr | 1<<wire.FDPty | 1<<wire.FDLog
	c := &container{w: w, id: m.ID, pid: m.PID, tty: m.TTY, fds: wire.NoFDs(), ended: make(chan struct{}), starting: make(chan struct{}, 1)}
	switch {
	case !wire.ValidID(m.ID):
		return nil, errs.New(errs.InvalidArgument, "container ID %q cannot name a file", m.ID)
	case m.PID <= 1 || m.Kept&^may != 0 || m.Kept&(1<<wire.FDPid) == 0 || !c.fds.Fill(m.Kept, p.FDs):
		return nil, errs.New(errs.InvalidArgument, "take of process %d came with %d files for the mask %#x", m.PID, len(p.FDs), m.Kept)
	}
	p.FDs = nil
	err := w.reserve(c)
	if err != nil {
		wire.CloseAll(c.fds.List())
		return nil, err
	}
	if err = makeLogFiles(&c.fds); err == nil {
		var seq uint64
		if seq, err = w.link.begin(); err == nil {
			err = w.put(c, seq)
		}
	}
	if err != nil {
		w.mu.Lock()
		delete(w.containers, c.id)
		w.mu.Unlock()
		c.remove()
		return nil, err
	}
	return c, nil
}

// reserve enters c into the table; it becomes visible when it is ready.
func (w *worker) reserve(c *container) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.orphan:
		return errOrphan
	case w.containers[c.id] != nil:
		return errs.New(errs.AlreadyExists, "container %s exists", c.id)
	}
	w.containers[c.id] = c
	return nil
}

func (w *worker) clone(c *container, m *wire.Create, start *[]int) error {
	if err := failpoint.Hit("worker", "create", "begin"); err != nil {
		return err
	}
	if err := reopenStatus(&c.fds); err != nil {
		return err
	}
	if err := makeLogFiles(&c.fds); err != nil {
		return err
	}
	seq, err := w.link.begin()
	if err != nil {
		return err
	}
	var child child
	if err = failpoint.Hit("worker", "create", "clone"); err == nil {
		child, err = startPlan(start, plan.Clone{Flags: m.Clone.Flags, Parent: true, Cgroup: m.Clone.Cgroup})
	}
	if err == nil && m.TwoStage {
		err = w.secondStage(&child, c.fds[wire.FDStatus], func(int) {})
	}
	if err != nil {
		w.link.end(seq)
		return err
	}
	c.pid, c.fds[wire.FDPid] = child.pid, child.pidfd
	return w.put(c, seq)
}

// put gives a container to the keeper and starts to copy its output.
func (w *worker) put(c *container, seq uint64) error {
	e := wire.Entry{ID: c.id, PID: c.pid, TTY: c.tty, Mask: c.fds.Mask()}
	c.openOutput()
	err := failpoint.Hit("worker", "create", "give to the keeper")
	if err == nil {
		err = w.link.call(wire.KindPut, seq, &e, c.fds.List())
	}
	if err != nil {
		_ = unix.PidfdSendSignal(c.fds[wire.FDPid], unix.SIGKILL, nil, 0)
		return err
	}
	_ = failpoint.Hit("worker", "create", "given") // no way to fail from here
	c.mu.Lock()
	c.ready = true
	c.mu.Unlock()
	return nil
}

// reopenStatus gives the worker an open file of its own for the status pipe,
// so that it can be non-blocking without the daemon noticing.
func reopenStatus(fds *wire.FDs) error {
	if fds[wire.FDStatus] < 0 {
		return nil
	}
	fd, err := reopen(fds[wire.FDStatus], unix.O_RDONLY)
	if err != nil {
		return errs.New(errs.InvalidArgument, "open the status pipe: %w", err)
	}
	_ = unix.Close(fds[wire.FDStatus])
	fds[wire.FDStatus] = fd
	return nil
}

func reopen(fd, mode int) (int, error) {
	return unix.Open("/proc/self/fd/"+strconv.Itoa(fd), mode|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
}

type child struct{ pid, pidfd int }

// startPlan clones a child. start holds the plan and its slots, which are
// closed afterwards: the end of the status pipe must be seen.
func startPlan(start *[]int, cl plan.Clone) (child, error) {
	fds := *start
	*start = nil
	f := os.NewFile(uintptr(fds[0]), "plan")
	pid, pidfd, err := plan.Start(f, fds[1:], cl)
	_ = f.Close()
	wire.CloseAll(fds[1:])
	return child{pid, pidfd}, err
}

// secondStage waits for the pid of the child's own child, which takes c's
// place. reap is called with the pidfd of each of them that has ended or is to
// end; it does not close it.
func (w *worker) secondStage(c *child, status int, reap func(pidfd int)) error {
	second, err := w.readPID(status)
	first := c.pidfd
	defer func() { _ = unix.Close(first) }()
	// The second is a child of the same parent and cannot have been reaped: the
	// keeper waits for put, and here nobody else would.
	pidfd := -1
	if second > 1 {
		var oerr error
		if pidfd, oerr = unix.PidfdOpen(second, 0); oerr != nil && err == nil {
			err = errs.New(errs.Internal, "open process %d: %w", second, oerr)
		}
	} else if err == nil {
		err = errs.New(errs.Internal, "the child ended before it cloned")
	}
	if err != nil {
		_ = unix.PidfdSendSignal(first, unix.SIGKILL, nil, 0)
		reap(first)
		if pidfd >= 0 {
			_ = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0)
			reap(pidfd)
			_ = unix.Close(pidfd)
		}
		return err
	}
	reap(first)
	c.pid, c.pidfd = second, pidfd
	return nil
}

// readPID reads the pid of the second child. Its own failure may be reported
// before its pid: then both are returned.
func (w *worker) readPID(status int) (pid int, err error) {
	for range 2 {
		rerr := w.readStatus(status, func(r plan.Record) bool {
			if r.Kind == plan.KindPID {
				pid = int(r.Value)
			}
			return r.Kind == plan.KindPID
		})
		if err == nil {
			err = rerr
		}
		var pf *planFailure
		if pid != 0 || !errors.As(rerr, &pf) {
			break
		}
	}
	return pid, err
}

// readStatus reads records until f returns true or the pipe ends: then every
// holder of its write end has executed its program, or is dead. A failure
// record is returned as error.
func (w *worker) readStatus(fd int, f func(plan.Record) bool) error {
	deadline := time.Now().Add(startTime)
	buf := make([]byte, plan.RecordSize)
	for {
		n, err := unix.Read(fd, buf)
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.EAGAIN:
			ok, err := w.poll.wait(fd, deadline)
			if err != nil {
				return err
			}
			if !ok {
				return errs.New(errs.DeadlineExceeded, "the child did not report within %v", startTime)
			}
			continue
		case err != nil:
			return errs.New(errs.Internal, "read the status pipe: %w", err)
		case n == 0:
			return nil
		}
		r, err := plan.ParseRecord(buf[:n])
		if err != nil {
			return errs.Wrap(errs.Internal, err)
		}
		if ferr := r.Err(); ferr != nil {
			return &planFailure{rec: buf, err: errs.Wrap(errs.Internal, ferr)}
		}
		if f(r) {
			return nil
		}
	}
}

// start opens the gate of a created container and waits until its program
// runs. Repeated, it finds the gate's reader gone or the work done.
func (w *worker) start(id string) error {
	c, err := w.container(id)
	if err != nil {
		return err
	}
	c.starting <- struct{}{}
	defer func() { <-c.starting }()
	c.mu.Lock()
	started := c.started
	c.mu.Unlock()
	if started {
		return nil
	}
	mask, fds, err := c.dupFDs(1<<wire.FDStatus | 1<<wire.FDGate)
	if err != nil {
		return err
	}
	defer wire.CloseAll(fds)
	switch mask {
	case 0: // taken: the runtime that made it has started it
		return w.isStarted(c)
	case 1<<wire.FDStatus | 1<<wire.FDGate:
	default:
		return errs.New(errs.FailedPrecondition, "container %s has no start gate", id)
	}
	status, gate := fds[0], fds[1]
	if err := failpoint.Hit("worker", "start", "open the gate"); err != nil {
		return err
	}
	// EPIPE: the child is past the gate (an earlier Start) or dead; the status
	// pipe tells.
	if _, err := unix.Write(gate, []byte{1}); err != nil && !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.EAGAIN) {
		return errs.New(errs.Internal, "open the start gate of %s: %w", id, err)
	}
	if err := w.readStatus(status, func(plan.Record) bool { return false }); err != nil {
		return err
	}
	if err := w.isStarted(c); err != nil {
		return err
	}
	c.drop(wire.FDStatus)
	c.drop(wire.FDGate)
	return nil
}

func (w *worker) isStarted(c *container) error {
	if err := failpoint.Hit("worker", "start", "tell the keeper"); err != nil {
		return err
	}
	if err := w.link.call(wire.KindStarted, 0, &wire.ID{ID: c.id}, nil); err != nil {
		return err
	}
	c.mu.Lock()
	c.started = true
	c.mu.Unlock()
	return nil
}
