package worker

import (
	"encoding/binary"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime/crilog"
	"github.com/naru-project/naru/runtime/monitor/wire"
)

// The journal gets lines in its native protocol, one datagram each
// (systemd.io/JOURNAL_NATIVE_PROTOCOL). It may be slow, stopped or gone, and
// nobody waits for it: lines wait in a queue of bounded size, what has no room
// there is dropped and counted. The socket comes from the daemon, for there is
// no path here that leads to it; a worker without one collects until it comes.
//
// The queue is two mappings that children do not inherit (see crilog.Buffers).

const (
	journalRoom = 512 << 10 // of each of the two
	trimAbove   = 32 << 10
	socketWait  = 1000 // milliseconds after which a socket that takes nothing is looked at again
)

type journal struct {
	wake chan struct{}

	mu      sync.Mutex
	fill    []byte // entries, each with its length before it; nil until there are any
	drain   []byte // what the sender works on
	next    int    // the socket to be used from now on, -1 = the present one
	sock    int    // the sender's; it closes it
	dropped uint64
	broken  bool // nobody listens at the other end of the socket
}

func newJournal() *journal { return &journal{wake: make(chan struct{}, 1), next: -1, sock: -1} }

// start makes the queue when the first container needs it; j.mu is held.
func (j *journal) start() error {
	if j.fill != nil {
		return nil
	}
	var maps [2][]byte
	for i := range maps {
		m, err := unix.Mmap(-1, 0, journalRoom, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err == nil {
			err = unix.Madvise(m, unix.MADV_DONTFORK)
		}
		if err != nil {
			return errs.New(errs.ResourceExhausted, "make the queue of the journal: %w", err)
		}
		maps[i] = m[:0]
	}
	j.fill, j.drain = maps[0], maps[1]
	go j.run()
	return nil
}

// put queues a line.
func (j *journal) put(fields []byte, s crilog.Stream, content []byte, partial bool) {
	priority := "PRIORITY=6\n"
	if s == crilog.Stderr {
		priority = "PRIORITY=3\n"
	}
	more := ""
	if partial {
		more = "CONTAINER_PARTIAL_MESSAGE=true\n"
	}
	const message = "MESSAGE\n"
	size := len(fields) + len(priority) + len(more) + len(message) + 8 + len(content) + 1
	j.mu.Lock()
	defer j.mu.Unlock()
	if cap(j.fill)-len(j.fill) < 4+size {
		j.dropped++
		return
	}
	b := binary.LittleEndian.AppendUint32(j.fill, uint32(size))
	b = append(append(append(append(b, fields...), priority...), more...), message...)
	b = append(binary.LittleEndian.AppendUint64(b, uint64(len(content))), content...)
	j.fill = append(b, '\n')
	j.poke()
}

func (j *journal) poke() {
	select {
	case j.wake <- struct{}{}:
	default:
	}
}

func (j *journal) run() {
	for range j.wake {
		for j.round() {
		}
	}
}

// round sends what there is.
func (j *journal) round() bool {
	j.mu.Lock()
	sock := j.socket()
	if sock < 0 || len(j.fill) == 0 {
		j.mu.Unlock()
		return false
	}
	j.fill, j.drain = j.drain[:0], j.fill
	b := j.drain
	j.mu.Unlock()
	for len(b) > 0 {
		n := 4 + int(binary.LittleEndian.Uint32(b))
		j.send(b[4:n])
		b = b[n:]
	}
	if len(j.drain) > trimAbove {
		_ = unix.Madvise(j.drain[:cap(j.drain)], unix.MADV_DONTNEED)
	}
	return true
}

// socket takes up a new one; j.mu is held.
func (j *journal) socket() int {
	if j.next >= 0 {
		if j.sock >= 0 {
			_ = unix.Close(j.sock)
		}
		j.sock, j.next = j.next, -1
	}
	return j.sock
}

// send sends a line, or drops it where nobody is there to take it.
func (j *journal) send(entry []byte) {
	for {
		j.mu.Lock()
		sock := j.socket()
		j.mu.Unlock()
		_, err := unix.SendmsgN(sock, entry, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		switch err {
		case nil:
			return
		case unix.EINTR:
		case unix.EAGAIN:
			p := []unix.PollFd{{Fd: int32(sock), Events: unix.POLLOUT}}
			_, _ = unix.Poll(p, socketWait)
		default:
			j.mu.Lock()
			j.dropped++
			j.broken = j.next < 0
			j.mu.Unlock()
			return
		}
	}
}

// useJournal takes the socket that came along, if one did, and tells how it goes.
func (w *worker) useJournal(p *wire.Packet) *wire.Journal {
	j := w.journal
	j.mu.Lock()
	defer j.mu.Unlock()
	if len(p.FDs) == 1 {
		if j.next >= 0 {
			_ = unix.Close(j.next)
		}
		j.next, j.broken, p.FDs = p.FDs[0], false, nil
		j.poke()
	}
	return &wire.Journal{Dropped: j.dropped, Broken: j.broken}
}

// setFields has a container's output sent to the journal from now on.
func (w *worker) setFields(p *wire.Packet) error {
	var m wire.JournalFields
	if err := wire.Unmarshal(p.Body, &m); err != nil {
		return errs.Wrap(errs.InvalidArgument, err)
	}
	c, err := w.container(m.ID)
	if err != nil || c.out == nil {
		return err
	}
	_, err = c.out.do(startTime, func(cp *crilog.Copier, _ *crilog.Buffers) error {
		c.mu.Lock()
		state := c.fds[wire.FDState]
		c.mu.Unlock()
		if err := crilog.WriteFields(state, m.Fields); err != nil {
			return err
		}
		return c.sendToJournal(cp, m.Fields)
	})
	return err
}

// sendToJournal has cp give its lines to the journal, if there are fields.
func (c *container) sendToJournal(cp *crilog.Copier, fields []byte) error {
	if len(fields) == 0 {
		return nil
	}
	j := c.w.journal
	j.mu.Lock()
	err := j.start()
	j.mu.Unlock()
	if err != nil {
		return err
	}
	cp.OnRecords(func(s crilog.Stream, out []byte) {
		crilog.EachRecord(out, func(content []byte, partial bool) { j.put(fields, s, content, partial) })
	})
	return nil
}
