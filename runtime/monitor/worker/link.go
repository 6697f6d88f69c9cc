package worker

import (
	"sync"
	"time"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime/monitor/wire"
)

// link is the worker's side of the socket to the keeper.
type link struct {
	conn *wire.Conn

	mu   sync.Mutex
	next uint64
	wait map[uint64]chan error
	dead bool
}

func newLink(c *wire.Conn) *link { return &link{conn: c, wait: map[uint64]chan error{}} }

var errOrphan = errs.New(errs.Unavailable, "the keeper is gone; its successor is awaited")

func (l *link) send(kind wire.Kind, req uint64, body wire.Body, fds []int) error {
	// The keeper never waits for anybody: if it does not read, it is dead.
	if err := l.conn.Send(wire.Marshal(kind, req, body), fds, time.Minute); err != nil {
		return errs.New(errs.Unavailable, "tell the keeper: %w", err)
	}
	return nil
}

// call sends a message and waits for the keeper's answer. seq 0: any number.
func (l *link) call(kind wire.Kind, seq uint64, body wire.Body, fds []int) error {
	ch := make(chan error, 1)
	l.mu.Lock()
	if l.dead {
		l.mu.Unlock()
		return errOrphan
	}
	if seq == 0 {
		seq = l.number()
	}
	l.wait[seq] = ch
	l.mu.Unlock()
	if err := l.send(kind, seq, body, fds); err != nil {
		l.mu.Lock()
		delete(l.wait, seq)
		l.mu.Unlock()
		return err
	}
	return <-ch
}

// check reports whether the keeper lives.
func (l *link) check() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.dead {
		return errOrphan
	}
	return nil
}

// number returns a number for a message; l.mu is held.
func (l *link) number() uint64 {
	l.next++
	return l.next
}

// begin announces a clone. The keeper reaps no unknown child until put or end.
func (l *link) begin() (uint64, error) {
	l.mu.Lock()
	if l.dead {
		l.mu.Unlock()
		return 0, errOrphan
	}
	seq := l.number()
	l.mu.Unlock()
	return seq, l.send(wire.KindBegin, seq, nil, nil)
}

func (l *link) end(seq uint64) { _ = l.send(wire.KindEnd, seq, nil, nil) }

func (l *link) acked(p *wire.Packet) {
	var r wire.Reply
	err := wire.Unmarshal(p.Body, &r)
	if err == nil && r.Failed {
		err = errs.New(r.Class, "%s", r.Text)
	}
	l.mu.Lock()
	ch := l.wait[p.Req]
	delete(l.wait, p.Req)
	l.mu.Unlock()
	if ch != nil {
		ch <- err
	}
}

func (l *link) die() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.dead = true
	for seq, ch := range l.wait {
		delete(l.wait, seq)
		ch <- errOrphan
	}
}
