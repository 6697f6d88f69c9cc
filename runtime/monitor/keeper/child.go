package keeper

import (
	"errors"
	"io"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime/monitor/wire"
)

// Descriptors that the worker finds beside 0, 1 and 2.
const (
	WorkerSocket   = 3
	WorkerListener = 4
	WorkerSelf     = 5
)

// workerProc is the running worker, if there is one.
type workerProc struct {
	pid, pidfd, sock int
	version          uint32
	started          time.Time
	failures         int
	startAt          time.Time // when to start the next one
	killAt           time.Time // when an asked one must have ended
	beat             uint64    // number of the unanswered beat; 0 = none
	beatAt           time.Time // when to send the next beat, or to give up on this one; zero = never
	queue            []outgoing
	polling          bool // EPOLLOUT is asked for
}

type outgoing struct {
	msg []byte
	fds []int
}

func (w *workerProc) reset() {
	*w = workerProc{pid: 0, pidfd: -1, sock: -1, failures: w.failures}
}

func (w *workerProc) signal(s unix.Signal) {
	if w.pidfd >= 0 {
		_ = unix.PidfdSendSignal(w.pidfd, s, nil, 0)
	}
}

// backOff sets when the next worker starts: at once after one that lived, later
// and later after several that did not.
func (w *workerProc) backOff() {
	delay := time.Duration(0)
	if w.failures > 0 {
		delay = min(10*time.Millisecond<<min(w.failures-1, 10), 2*time.Second)
	}
	w.failures++
	w.startAt = time.Now().Add(delay)
}

// startWorker starts the worker and hands it everything.
func (k *keeper) startWorker() error {
	w := &k.worker
	w.startAt = time.Time{}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return errs.New(errs.Internal, "make a socket pair: %w", err)
	}
	for _, fd := range pair {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, 1<<20)
	}
	pidfd := -1
	pid, err := syscall.ForkExec(fdPath(k.self), []string{"naru-monitor", "worker"}, &syscall.ProcAttr{
		Dir:   "/",
		Env:   environ(),
		Files: []uintptr{0, 1, 2, uintptr(pair[1]), uintptr(k.listener), uintptr(k.self)},
		Sys:   &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS, PidFD: &pidfd},
	})
	_ = unix.Close(pair[1])
	if err != nil {
		_ = unix.Close(pair[0])
		return errs.New(errs.Internal, "start the worker: %w", err)
	}
	w.reset()
	w.pid, w.pidfd, w.sock, w.started, w.version = pid, pidfd, pair[0], time.Now(), wire.KeeperMax
	w.beatAt = w.started.Add(beatEvery)
	if err := k.watchWorker(); err != nil {
		return err
	}
	for _, e := range k.entries {
		e.Mask = e.fds.Mask()
		k.tell(wire.KindEntry, 0, &e.Entry, e.fds.List())
	}
	k.tell(wire.KindEntriesEnd, 0, &wire.Hello{Min: wire.KeeperMin, Max: wire.KeeperMax}, nil)
	return nil
}

func (k *keeper) watchWorker() error {
	if err := k.add(k.worker.pidfd, unix.EPOLLIN, evWorker); err != nil {
		return err
	}
	return k.add(k.worker.sock, unix.EPOLLIN, evSocket)
}

// workerDied reaps the worker and has the next one started.
func (k *keeper) workerDied() {
	w := &k.worker
	si, err := waitid(pPidfd, w.pidfd, 0)
	if err == nil && si.pid == 0 {
		return
	}
	k.readSocket() // what it said last still counts
	x := si.exit("")
	if !k.stopping {
		k.logf("worker %d ended, status %d signal %d", w.pid, x.Status, x.Signal)
	}
	_ = unix.Close(w.sock)
	_ = unix.Close(w.pidfd)
	if time.Since(w.started) > time.Second {
		w.failures = 0
	}
	// Its unfinished clones hang on gates that nobody opens any more: they end
	// by themselves and are then nobody's.
	clear(k.clones)
	w.reset()
	w.backOff()
	if k.upgrade != nil && k.upgrade.req != 0 {
		k.upgrade.req = 0
	}
	k.signals.Or(1)
	_, _ = unix.Write(k.wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
}

// restartWorker asks the worker to end. It gets a while to finish its batches.
func (k *keeper) restartWorker() {
	if k.worker.pid == 0 {
		return
	}
	k.worker.signal(unix.SIGTERM)
	k.worker.killAt = time.Now().Add(5 * time.Second)
}

// endWorker reports whether the worker is gone, and asks it to go.
func (k *keeper) endWorker() bool {
	if k.worker.pid == 0 {
		return true
	}
	if k.worker.killAt.IsZero() {
		k.restartWorker()
	}
	return false
}

// tell queues a message for the worker. Descriptors are the table's: they stay
// open until the worker itself asks to drop them, which it cannot before it
// has read this.
func (k *keeper) tell(kind wire.Kind, req uint64, body wire.Body, fds []int) {
	w := &k.worker
	if w.sock < 0 {
		return
	}
	w.queue = append(w.queue, outgoing{wire.Marshal(kind, req, body), fds})
	k.flush()
}

func (k *keeper) flush() {
	w := &k.worker
	for len(w.queue) > 0 {
		err := wire.SendRaw(w.sock, w.queue[0].msg, w.queue[0].fds)
		if err == unix.EAGAIN || err == unix.ETOOMANYREFS {
			break
		}
		if err != nil {
			// EPIPE: its death is dealt with elsewhere. Anything else would
			// leave it with half a table.
			if err != unix.EPIPE && err != unix.ECONNRESET {
				k.logf("send to the worker: %v", err)
				w.signal(unix.SIGKILL)
			}
			w.queue = nil
			break
		}
		w.queue = w.queue[1:]
	}
	if len(w.queue) == 0 {
		w.queue = nil
	}
	if want := len(w.queue) > 0; want != w.polling {
		w.polling = want
		ev := unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(w.sock), Pad: evSocket}
		if want {
			ev.Events |= unix.EPOLLOUT
		}
		_ = unix.EpollCtl(k.ep, unix.EPOLL_CTL_MOD, w.sock, &ev)
	}
}

func (k *keeper) onSocket(events uint32) {
	if events&unix.EPOLLOUT != 0 {
		k.flush()
	}
	if !k.readSocket() {
		// It closed the socket: it cannot go on.
		k.remove(k.worker.sock)
		k.worker.signal(unix.SIGKILL)
	}
}

// readSocket handles all messages of the worker. false: it is gone.
func (k *keeper) readSocket() bool {
	if k.worker.sock < 0 {
		return true
	}
	for {
		p, err := wire.RecvRaw(k.worker.sock, k.buf)
		if err == unix.EAGAIN {
			return true
		}
		if errors.Is(err, io.EOF) {
			return false
		}
		if err != nil {
			k.logf("message of the worker: %v", err)
			k.worker.signal(unix.SIGKILL)
			return true
		}
		k.message(&p)
		p.Close()
	}
}

func (k *keeper) message(p *wire.Packet) {
	if p.Kind == wire.KindBeat {
		k.beaten(p.Req)
		return
	}
	k.worked()
	var err error
	switch p.Kind {
	case wire.KindBegin:
		k.count++
		k.clones[p.Req] = k.count
		return
	case wire.KindEnd:
		delete(k.clones, p.Req)
		k.nudge()
		return
	case wire.KindPut:
		if p.Lost {
			err = errs.New(errs.ResourceExhausted, "the keeper has no room for more descriptors")
		} else {
			err = k.put(p)
		}
		delete(k.clones, p.Req)
		k.nudge()
	case wire.KindWorkerUp:
		k.worker.failures = 0
		return
	case wire.KindRestart:
		k.ack(p.Req, nil)
		k.restartWorker()
		return
	case wire.KindReplace:
		k.replaceFrom(p)
		return
	default:
		err = k.change(p)
	}
	k.ack(p.Req, err)
}

// change handles the messages about one container.
func (k *keeper) change(p *wire.Packet) error {
	switch p.Kind {
	case wire.KindForget:
		var m wire.ID
		if err := wire.Unmarshal(p.Body, &m); err != nil {
			return errs.Wrap(errs.Internal, err)
		}
		return k.forget(m.ID)
	case wire.KindStarted:
		var m wire.ID
		if err := wire.Unmarshal(p.Body, &m); err != nil {
			return errs.Wrap(errs.Internal, err)
		}
		return k.setFDs(m.ID, func(e *entry) error {
			e.Started = true
			drop(e, wire.FDStatus)
			drop(e, wire.FDGate)
			return nil
		})
	case wire.KindDropFD, wire.KindSetFD:
		var m wire.FDChange
		if err := wire.Unmarshal(p.Body, &m); err != nil {
			return errs.Wrap(errs.Internal, err)
		}
		if m.Which == wire.FDPid || m.Which >= wire.FDStage0 {
			return errs.New(errs.InvalidArgument, "file %d of a container is not to be changed", m.Which)
		}
		return k.setFDs(m.ID, func(e *entry) error {
			if p.Kind == wire.KindSetFD {
				if len(p.FDs) != 1 {
					return errs.New(errs.Internal, "a file is missing")
				}
				drop(e, m.Which)
				e.fds[m.Which], p.FDs = p.FDs[0], nil
				return nil
			}
			drop(e, m.Which)
			return nil
		})
	}
	return errs.New(errs.Unimplemented, "message of kind %d", p.Kind)
}

func (k *keeper) setFDs(id string, f func(*entry) error) error {
	e := k.entries[id]
	if e == nil {
		return errs.New(errs.NotFound, "container %s is not known", id)
	}
	return f(e)
}

func drop(e *entry, which int) {
	if e.fds[which] >= 0 {
		_ = unix.Close(e.fds[which])
		e.fds[which] = -1
	}
}

func (k *keeper) ack(req uint64, err error) {
	if req == 0 {
		return
	}
	r := wire.Reply{}
	if err != nil {
		r.Failed, r.Class, r.Text = true, errs.Of(err), err.Error()
	}
	k.tell(wire.KindAck, req, &r, nil)
}

// nudge has orphans looked at that had to wait for an announced clone.
func (k *keeper) nudge() {
	if len(k.zombie) > 0 {
		k.signals.Or(1)
		_, _ = unix.Write(k.wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	}
}
