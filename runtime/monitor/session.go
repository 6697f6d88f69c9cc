package monitor

import (
	"context"
	"os"
	goruntime "runtime"
	"slices"
	"sync"
	"time"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime/monitor/wire"
	"github.com/naru-project/naru/runtime/plan"
)

// session is one connection to a worker.
type session struct {
	conn *wire.Conn
	info Info
	exit func(*wire.Exit)
	done chan struct{} // closed when the connection is lost

	mu      sync.Mutex
	next    uint64
	pending map[uint64]*pending
	execs   map[uint64]chan wire.Exit
	lost    bool
}

// pending is a request without an answer yet.
type pending struct {
	ch chan answer
	// late deals with an answer that nobody waits for any more.
	late func(*answer)
}

// answer is a reply whose body is a copy.
type answer struct {
	wire.Reply
	fds []int
}

const sendTime = 10 * time.Second

var errLost = errs.New(errs.Unavailable, "the monitor's worker was lost; it comes back by itself")

// open connects and agrees on a version.
func open(ctx context.Context, socket string, exit func(*wire.Exit)) (*session, error) {
	conn, err := wire.Dial(socket)
	if err != nil {
		return nil, errs.New(errs.Unavailable, "connect to the monitor at %s: %w", socket, err)
	}
	s := &session{conn: conn, exit: exit, done: make(chan struct{}), next: 1, pending: map[uint64]*pending{}, execs: map[uint64]chan wire.Exit{}}
	go s.read()
	a, err := s.call(ctx, wire.KindHello, &wire.Hello{Min: wire.ClientMin, Max: wire.ClientMax}, nil, nil)
	if err != nil {
		s.close()
		return nil, err
	}
	var h wire.HelloReply
	if err := wire.Unmarshal(a.Body, &h); err != nil {
		s.close()
		return nil, errs.New(errs.Internal, "greeting of the monitor: %w", err)
	}
	s.info = Info{Version: h.Version, KeeperPID: h.Keeper, WorkerPID: h.WorkerPID, Build: h.Build, Orphan: h.Orphan}
	return s, nil
}

func (s *session) close() { _ = s.conn.Close() }

// read is the session's reader; it ends with the connection.
func (s *session) read() {
	buf := make([]byte, wire.MaxMessage)
	for {
		p, err := s.conn.Recv(buf)
		if err != nil {
			break
		}
		s.receive(&p)
		p.Close()
	}
	_ = s.conn.Close()
	s.mu.Lock()
	s.lost = true
	s.mu.Unlock()
	close(s.done)
}

func (s *session) receive(p *wire.Packet) {
	switch p.Kind {
	case wire.KindExit:
		x := new(wire.Exit)
		if wire.Unmarshal(p.Body, x) == nil {
			s.exit(x)
		}
	case wire.KindExecExit:
		var x wire.Exit
		if wire.Unmarshal(p.Body, &x) != nil {
			return
		}
		s.mu.Lock()
		ch := s.execs[p.Req]
		delete(s.execs, p.Req)
		s.mu.Unlock()
		if ch != nil {
			ch <- x
		}
	case wire.KindReply:
		a := answer{fds: p.FDs}
		if err := wire.Unmarshal(p.Body, &a.Reply); err != nil {
			a.Reply = wire.Reply{Failed: true, Class: errs.Internal, Text: "answer of the monitor: " + err.Error()}
		}
		if p.Lost {
			a.Reply = wire.Reply{Failed: true, Class: errs.ResourceExhausted, Text: "no room for more descriptors (RLIMIT_NOFILE)"}
		}
		a.Body, a.Record = slices.Clone(a.Body), slices.Clone(a.Record)
		p.FDs = nil
		s.deliver(p.Req, &a)
	}
}

// deliver hands an answer to who waits for it.
func (s *session) deliver(req uint64, a *answer) {
	s.mu.Lock()
	w := s.pending[req]
	if !a.More {
		delete(s.pending, req)
	}
	late := w == nil || w.late != nil
	if w != nil && !late {
		w.ch <- *a // has room: see call
	}
	s.mu.Unlock()
	switch {
	case w == nil:
		wire.CloseAll(a.fds)
	case late:
		w.late(a)
		wire.CloseAll(a.fds)
	}
}

// listRoom bounds the parts of one answer that wait for their reader: far more
// than there can be (each part of a list has 100 entries).
const listRoom = 1024

// begin sends a request. prepare, if given, is called with its number first.
func (s *session) begin(kind wire.Kind, body wire.Body, files []*os.File, prepare func(uint64)) (uint64, *pending, error) {
	room := 1
	if kind == wire.KindList {
		room = listRoom
	}
	w := &pending{ch: make(chan answer, room)}
	s.mu.Lock()
	if s.lost {
		s.mu.Unlock()
		return 0, nil, errLost
	}
	req := s.next
	s.next++
	s.pending[req] = w
	if prepare != nil {
		prepare(req)
	}
	s.mu.Unlock()
	err := s.send(wire.Marshal(kind, req, body), files)
	if err != nil {
		s.mu.Lock()
		delete(s.pending, req)
		s.mu.Unlock()
		return 0, nil, err
	}
	return req, w, nil
}

func (s *session) send(msg []byte, files []*os.File) error {
	fds := make([]int, 0, len(files))
	for _, f := range files {
		fd, err := number(f)
		if err != nil {
			return errs.New(errs.InvalidArgument, "file %s: %w", f.Name(), err)
		}
		fds = append(fds, fd)
	}
	err := s.conn.Send(msg, fds, sendTime)
	goruntime.KeepAlive(files)
	switch {
	case err == nil:
		return nil
	case wire.Gone(err):
		return errLost
	}
	return errs.New(errs.Unavailable, "send to the monitor: %w", err)
}

// number is f.Fd without its side effects on f.
func number(f *os.File) (int, error) {
	rc, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	n := -1
	err = rc.Control(func(fd uintptr) { n = int(fd) })
	return n, err
}

// call sends a request and waits for its one answer.
func (s *session) call(ctx context.Context, kind wire.Kind, body wire.Body, files []*os.File, late func(*answer)) (*answer, error) {
	req, w, err := s.begin(kind, body, files, nil)
	if err != nil {
		return nil, err
	}
	return s.await(ctx, req, w, late)
}

// await waits for an answer. An answer that comes when ctx is over goes to late.
func (s *session) await(ctx context.Context, req uint64, w *pending, late func(*answer)) (*answer, error) {
	select {
	case a := <-w.ch:
		return a.check()
	case <-s.done:
		select {
		case a := <-w.ch: // it came before the end
			return a.check()
		default:
			return nil, errLost
		}
	case <-ctx.Done():
	}
	s.mu.Lock()
	select {
	case a := <-w.ch:
		s.mu.Unlock()
		return a.check()
	default:
	}
	if late == nil {
		late = func(*answer) {}
	}
	w.late = late
	s.mu.Unlock()
	return nil, errs.New(errs.Of(ctx.Err()), "waiting for the monitor: %w", context.Cause(ctx))
}

// check turns a failure into an error.
func (a *answer) check() (*answer, error) {
	if !a.Failed {
		return a, nil
	}
	wire.CloseAll(a.fds)
	if len(a.Record) > 0 {
		if r, err := plan.ParseRecord(a.Record); err == nil && r.Err() != nil {
			return nil, errs.Wrap(a.Class, r.Err())
		}
	}
	return nil, errs.New(a.Class, "%s", a.Text)
}

// file takes the answer's next descriptor.
func (a *answer) file(name string) *os.File {
	if len(a.fds) == 0 {
		return nil
	}
	fd := a.fds[0]
	a.fds = a.fds[1:]
	return os.NewFile(uintptr(fd), name)
}
