package worker

import (
	"os"
	"sort"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/failpoint"
	"github.com/naru-project/naru/runtime/crilog"
	"github.com/naru-project/naru/runtime/monitor/wire"
)

// request answers one request.
func (s *conn) request(p *wire.Packet) {
	w := s.w
	var err error
	switch p.Kind {
	case wire.KindPing:
		err = w.link.check()
	case wire.KindCreate, wire.KindTake:
		begin := w.create
		if p.Kind == wire.KindTake {
			begin = w.take
		}
		var c *container
		if c, err = begin(p); err == nil {
			s.created(p.Req, c)
			return
		}
	case wire.KindExec:
		if err = w.exec(s, p); err == nil {
			return // answered
		}
	case wire.KindFiles:
		if err = s.files(p); err == nil {
			return
		}
	case wire.KindList:
		s.list(p.Req)
		return
	case wire.KindSubscribe:
		s.subscribe()
	case wire.KindJournal:
		s.reply(p.Req, wire.EncodeBody(w.useJournal(p)), nil, false, nil)
		return
	case wire.KindBinary:
		s.reply(p.Req, nil, []int{fdSelf}, false, nil)
		return
	default:
		err = w.change(p)
	}
	s.reply(p.Req, nil, nil, false, err)
}

// change handles the requests that are answered with yes or no.
func (w *worker) change(p *wire.Packet) error {
	switch p.Kind {
	case wire.KindStart, wire.KindCloseStdin:
		var m wire.ID
		if err := wire.Unmarshal(p.Body, &m); err != nil {
			return errs.Wrap(errs.InvalidArgument, err)
		}
		if p.Kind == wire.KindStart {
			return w.start(m.ID)
		}
		return w.closeStdin(m.ID)
	case wire.KindAttach:
		return w.attach(p)
	case wire.KindJournalFields:
		return w.setFields(p)
	case wire.KindSetLog, wire.KindDelete, wire.KindUpgrade:
		var m wire.Flag
		if err := wire.Unmarshal(p.Body, &m); err != nil {
			return errs.Wrap(errs.InvalidArgument, err)
		}
		switch p.Kind {
		case wire.KindSetLog:
			return w.setLog(p, m.ID, m.On)
		case wire.KindDelete:
			return w.delete(m.ID, m.On)
		}
		return w.link.call(wire.KindReplace, 0, nil, p.FDs)
	case wire.KindRestartWorker:
		return w.link.call(wire.KindRestart, 0, nil, nil)
	}
	return errs.New(errs.Unimplemented, "request of kind %d", p.Kind)
}

func (w *worker) container(id string) (*container, error) {
	w.mu.Lock()
	c := w.containers[id]
	w.mu.Unlock()
	if c != nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.ready {
			return c, nil
		}
	}
	return nil, errs.New(errs.NotFound, "container %s is not known to the monitor", id)
}

func (s *conn) created(req uint64, c *container) {
	_, fds, err := c.dupFDs(1 << wire.FDPid)
	s.reply(req, wire.EncodeBody(&wire.Created{PID: c.pid}), fds, false, err)
	wire.CloseAll(fds)
}

// files hands out what the daemon needs for attach, exec and stop.
func (s *conn) files(p *wire.Packet) error {
	var m wire.ID
	if err := wire.Unmarshal(p.Body, &m); err != nil {
		return errs.Wrap(errs.InvalidArgument, err)
	}
	c, err := s.w.container(m.ID)
	if err != nil {
		return err
	}
	mask, fds, err := c.dupFDs(1<<wire.FDPid | 1<<wire.FDStdin | 1<<wire.FDPty | 1<<wire.FDDevpts | 1<<wire.FDLog)
	if err != nil {
		return err
	}
	s.reply(p.Req, wire.EncodeBody(&wire.Mask{Mask: mask, TTY: c.tty, PID: c.pid}), fds, false, nil)
	wire.CloseAll(fds)
	return nil
}

const listChunk = 100

func (s *conn) list(req uint64) {
	s.w.mu.Lock()
	all := make([]*container, 0, len(s.w.containers))
	for _, c := range s.w.containers {
		all = append(all, c)
	}
	s.w.mu.Unlock()
	sort.Slice(all, func(i, j int) bool { return all[i].id < all[j].id })
	var part wire.Entries
	for _, c := range all {
		c.mu.Lock()
		ready := c.ready
		c.mu.Unlock()
		if !ready {
			continue
		}
		part.List = append(part.List, c.entry())
		if len(part.List) == listChunk {
			s.reply(req, wire.EncodeBody(&part), nil, true, nil)
			part.List = nil
		}
	}
	s.reply(req, wire.EncodeBody(&part), nil, false, nil)
}

// subscribe sends all exits there are, then each as it comes.
func (s *conn) subscribe() {
	s.w.mu.Lock()
	defer s.w.mu.Unlock()
	s.subscribed = true
	for _, c := range s.w.containers {
		c.mu.Lock()
		x := c.exit
		c.mu.Unlock()
		if x != nil {
			s.push(wire.Marshal(wire.KindExit, 0, x))
		}
	}
}

func (w *worker) closeStdin(id string) error {
	c, err := w.container(id)
	if err != nil {
		return err
	}
	if err := w.link.call(wire.KindDropFD, 0, &wire.FDChange{ID: id, Which: wire.FDStdin}, nil); err != nil {
		return err
	}
	c.drop(wire.FDStdin)
	return nil
}

// setLog gives the container another log file: no batch is under way, and the
// keeper knows the new file before the first byte goes there.
func (w *worker) setLog(p *wire.Packet, id string, has bool) error {
	if has != (len(p.FDs) == 1) || len(p.FDs) > 1 {
		return errs.New(errs.InvalidArgument, "a log file must come along")
	}
	c, err := w.container(id)
	if err != nil {
		return err
	}
	fd := -1
	if has {
		fd, p.FDs = p.FDs[0], nil
	}
	if c.out == nil {
		return c.swapLog(nil, nil, fd)
	}
	ran, err := c.out.do(startTime, func(cp *crilog.Copier, b *crilog.Buffers) error {
		return c.swapLog(cp, b, fd)
	})
	if !ran && fd >= 0 {
		_ = unix.Close(fd)
	}
	return err
}

// swapLog takes over fd, which is -1 for no log.
func (c *container) swapLog(cp *crilog.Copier, b *crilog.Buffers, fd int) error {
	err := func() error {
		if cp != nil {
			if err := cp.LeaveLog(b); err != nil {
				return err
			}
		}
		change := &wire.FDChange{ID: c.id, Which: wire.FDLog}
		if fd < 0 {
			return c.w.link.call(wire.KindDropFD, 0, change, nil)
		}
		return c.w.link.call(wire.KindSetFD, 0, change, []int{fd})
	}()
	if err != nil {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
		return err
	}
	c.drop(wire.FDLog)
	c.mu.Lock()
	c.fds[wire.FDLog] = fd
	c.mu.Unlock()
	if cp != nil {
		cp.SetLog(fd)
	}
	return nil
}

func (w *worker) attach(p *wire.Packet) error {
	var m wire.Attach
	if err := wire.Unmarshal(p.Body, &m); err != nil {
		return errs.Wrap(errs.InvalidArgument, err)
	}
	want := 0
	for _, on := range []bool{m.Stdout, m.Stderr} {
		if on {
			want++
		}
	}
	if want == 0 || len(p.FDs) != want {
		return errs.New(errs.InvalidArgument, "attach came with %d pipes, want %d", len(p.FDs), want)
	}
	c, err := w.container(m.ID)
	if err != nil {
		return err
	}
	if c.out == nil {
		return errs.New(errs.FailedPrecondition, "container %s has no output to attach to", m.ID)
	}
	for s, on := range []bool{m.Stdout, m.Stderr} {
		if !on {
			continue
		}
		fd, err := reopen(p.FDs[0], unix.O_WRONLY)
		if err != nil {
			return errs.New(errs.InvalidArgument, "open the reader's pipe: %w", err)
		}
		_ = unix.Close(p.FDs[0])
		p.FDs = p.FDs[1:]
		if err := c.out.attach.add(crilog.Stream(s), fd, w.poll, m.Lossless); err != nil {
			_ = unix.Close(fd)
			return err
		}
	}
	return nil
}

// delete drops a container that has ended, with its exit file and log state.
func (w *worker) delete(id string, force bool) error {
	c, err := w.container(id)
	if err != nil {
		if !wire.ValidID(id) {
			return errs.New(errs.InvalidArgument, "container ID %q", id)
		}
		// Repeated, or an exit file without an entry.
		return w.link.call(wire.KindForget, 0, &wire.ID{ID: id}, nil)
	}
	c.mu.Lock()
	ended := c.exit != nil
	c.mu.Unlock()
	if !ended {
		if !force {
			return errs.New(errs.FailedPrecondition, "container %s has not ended", id)
		}
		if err := c.kill(); err != nil {
			return err
		}
		select {
		case <-c.ended:
		case <-time.After(deleteTime):
			return errs.New(errs.DeadlineExceeded, "container %s was killed and did not end within %v: %s", id, deleteTime, whatKeeps(c.pid))
		}
	}
	if err := failpoint.Hit("worker", "delete", "last words"); err != nil {
		return err
	}
	if c.out != nil {
		c.lastWords()
	}
	if err := failpoint.Hit("worker", "delete", "forget"); err != nil {
		return err
	}
	if err := w.link.call(wire.KindForget, 0, &wire.ID{ID: id}, nil); err != nil {
		return err
	}
	w.mu.Lock()
	delete(w.containers, id)
	w.mu.Unlock()
	c.remove()
	return nil
}

// lastWords logs what processes that outlived the container wrote until now.
func (c *container) lastWords() {
	o := c.out
	_, _ = o.do(drainTime, func(cp *crilog.Copier, b *crilog.Buffers) error {
		for s := crilog.Stdout; s <= crilog.Stderr; s++ {
			if cp.Ended(s) {
				continue
			}
			if _, err := cp.Copy(s, b); err == nil || cp.Has(s) {
				_ = cp.Flush(s, b, true)
			}
		}
		return nil
	})
}

// handOver gives everything to a new keeper, because the old one is dead, and
// ends this process.
func (w *worker) handOver(s *conn) {
	if !w.awaitOrphan(3 * time.Second) {
		s.reply(1, nil, nil, false, errs.New(errs.FailedPrecondition, "the keeper of this worker lives"))
		return
	}
	if !w.pool.pause(drainTime) {
		logf("handing over while a log hangs")
	}
	if err := w.sendAll(s); err != nil {
		logf("hand over: %v", err)
		w.pool.resume()
		return
	}
	// The new keeper closes the connection when it has everything.
	_, _ = s.c.Recv(make([]byte, 64))
	os.Exit(0)
}

func (w *worker) awaitOrphan(d time.Duration) bool {
	for end := time.Now().Add(d); ; time.Sleep(20 * time.Millisecond) {
		if orphan := w.orphaned(); orphan || time.Now().After(end) {
			return orphan
		}
	}
}

func (w *worker) sendAll(s *conn) error {
	w.mu.Lock()
	all := make([]*container, 0, len(w.containers))
	for _, c := range w.containers {
		all = append(all, c)
	}
	w.mu.Unlock()
	// Sockets only know who listened: that keeper is dead. So the next one gets
	// a pidfd, to wait for the end of this process.
	pidfd, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(pidfd) }()
	if err := s.c.Send(wire.Marshal(wire.KindListener, 0, nil), []int{fdListener, pidfd}, sendTime); err != nil {
		return err
	}
	for _, c := range all {
		c.mu.Lock()
		e := wire.Entry{ID: c.id, PID: c.pid, TTY: c.tty, Started: c.started, Adopted: true, Exit: c.dead, Mask: c.fds.Mask()}
		ready, fds := c.ready, c.fds.List()
		c.mu.Unlock()
		if !ready {
			continue
		}
		if err := s.c.Send(wire.Marshal(wire.KindEntry, 0, &e), fds, sendTime); err != nil {
			return err
		}
	}
	return s.c.Send(wire.Marshal(wire.KindEntriesEnd, 0, nil), nil, sendTime)
}
