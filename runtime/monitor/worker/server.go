package worker

import (
	"errors"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime/monitor/wire"
)

// conn is one connection of a daemon.
type conn struct {
	w    *worker
	c    *wire.Conn
	peer *unix.Ucred

	subscribed bool // guarded by worker.mu

	mu      sync.Mutex
	execs   []*execProc
	events  [][]byte // not yet sent
	sending bool
	gone    bool
}

const maxEvents = 16 << 10 // of one daemon that does not read them; it gets them again after a reconnect

// serve accepts daemons for ever.
func (w *worker) serve() error {
	if err := unix.SetNonblock(fdListener, true); err != nil {
		return errs.New(errs.Internal, "use the listener: %w", err)
	}
	w.listener = os.NewFile(fdListener, "monitor.sock")
	rc, err := w.listener.SyscallConn()
	if err != nil {
		return errs.New(errs.Internal, "use the listener: %w", err)
	}
	for {
		fd := -1
		rerr := rc.Read(func(l uintptr) bool {
			fd, _, err = unix.Accept4(int(l), unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK)
			return err != unix.EAGAIN
		})
		switch {
		case rerr != nil:
			select {} // handed over: the process ends by itself
		case err == unix.EMFILE || err == unix.ENFILE || err == unix.ENOMEM:
			logf("accept: %v", err)
			time.Sleep(100 * time.Millisecond)
		case err == nil:
			w.accept(fd)
		}
	}
}

func (w *worker) accept(fd int) {
	c, err := wire.NewConn(fd)
	if err != nil {
		logf("accept: %v", err)
		return
	}
	cred, err := c.PeerCred()
	// The socket's mode says the same; this is the second wall.
	if err != nil || cred.Uid != 0 {
		logf("a process of another user connected and was turned away")
		_ = c.Close()
		return
	}
	s := &conn{w: w, c: c, peer: cred}
	go s.run()
}

func (s *conn) run() {
	defer s.close()
	buf := make([]byte, 4<<10)
	if !s.hello(buf) {
		return
	}
	for {
		p, err := s.c.Recv(buf)
		if err != nil {
			if !wire.Gone(err) {
				logf("message of a client: %v", err)
			}
			return
		}
		if p.Lost {
			s.reply(p.Req, nil, nil, false, errs.New(errs.ResourceExhausted, "the monitor has no room for more descriptors (RLIMIT_NOFILE)"))
			continue
		}
		p.Body = slices.Clone(p.Body) // buf is used again
		s.w.busy <- struct{}{}
		go func() {
			defer func() { <-s.w.busy; s.w.tidy() }()
			defer p.Close()
			s.request(&p)
		}()
	}
}

// tidy has the garbage collected a while after some requests: a quiet worker
// would otherwise hold what it held at its busiest.
func (w *worker) tidy() {
	if w.tidying.CompareAndSwap(false, true) {
		time.AfterFunc(tidyTime, func() {
			w.tidying.Store(false)
			debug.FreeOSMemory()
		})
	}
}

// hello agrees on a version. The first message may be that of a new keeper
// instead.
func (s *conn) hello(buf []byte) bool {
	p, err := s.c.Recv(buf)
	if err != nil {
		return false
	}
	defer p.Close()
	if p.Kind == wire.KindHandover {
		s.w.handOver(s)
		return false
	}
	var m wire.Hello
	if p.Kind != wire.KindHello || wire.Unmarshal(p.Body, &m) != nil {
		return false
	}
	if m.Min > wire.ClientMax || m.Max < wire.ClientMin {
		s.reply(p.Req, nil, nil, false, errs.New(errs.FailedPrecondition,
			"the client speaks versions %d to %d, the monitor %d to %d; upgrade the older of naru and naru-monitor", m.Min, m.Max, wire.ClientMin, wire.ClientMax))
		return false
	}
	s.w.mu.Lock()
	s.w.conns[s] = struct{}{}
	s.w.mu.Unlock()
	s.reply(p.Req, wire.EncodeBody(&wire.HelloReply{
		Version: min(m.Max, wire.ClientMax), Keeper: s.w.keeper, WorkerPID: os.Getpid(), Build: s.w.build, Orphan: s.w.orphaned(),
	}), nil, false, nil)
	return true
}

// close ends the connection, and with it the execs of its client.
func (s *conn) close() {
	s.w.mu.Lock()
	delete(s.w.conns, s)
	s.w.mu.Unlock()
	s.mu.Lock()
	s.gone = true
	execs := s.execs
	s.execs, s.events = nil, nil
	s.mu.Unlock()
	for _, e := range execs {
		e.end()
	}
	_ = s.c.Close()
}

// addExec ties a process to the life of its client.
func (s *conn) addExec(e *execProc) {
	s.mu.Lock()
	gone := s.gone
	if !gone {
		s.execs = append(s.execs, e)
	}
	s.mu.Unlock()
	if gone {
		e.end()
	}
}

func (s *conn) removeExec(e *execProc) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := slices.Index(s.execs, e); i >= 0 {
		s.execs = slices.Delete(s.execs, i, i+1)
	}
}

// push queues an event. Events are sent in order by one goroutine, so that a
// client that does not read holds up nobody.
func (s *conn) push(msg []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gone {
		return
	}
	s.events = append(s.events, msg)
	if len(s.events) > maxEvents {
		_ = s.c.Close()
		return
	}
	if !s.sending {
		s.sending = true
		go s.sendEvents()
	}
}

func (s *conn) sendEvents() {
	for {
		s.mu.Lock()
		if len(s.events) == 0 || s.gone {
			s.sending, s.events = false, nil
			s.mu.Unlock()
			return
		}
		msg := s.events[0]
		s.events = s.events[1:]
		s.mu.Unlock()
		if err := s.c.Send(msg, nil, sendTime); err != nil {
			_ = s.c.Close()
		}
	}
}

// reply answers a request.
func (s *conn) reply(req uint64, body []byte, fds []int, more bool, err error) {
	r := wire.Reply{Body: body, More: more}
	if err != nil {
		r.Failed, r.Class, r.Text = true, errs.Of(err), strings.ToValidUTF8(err.Error(), "?")
		if len(r.Text) > 4096 {
			r.Text = r.Text[:4096]
		}
		var pf *planFailure
		if errors.As(err, &pf) {
			r.Record = pf.rec
		}
	}
	if err := s.c.Send(wire.Marshal(wire.KindReply, req, &r), fds, sendTime); err != nil {
		_ = s.c.Close()
	}
}
