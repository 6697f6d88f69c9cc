// Package worker is the process that does the monitor's work: it runs start
// and exec plans, copies logs, and answers the daemon. It may be killed at any
// moment: what must not be lost is with the keeper, which starts the next one.
//
//	daemon ── monitor.sock ── server ── create, start, exec, attach …
//	                            │            │ begin, put, forget …
//	 pipes ── poller ── pool ── output       └── link ── keeper
//	                            └ crilog.Copier, attachers
//
// It lives in a mount namespace of its own that holds procfs, sysfs and an
// empty directory, nothing of the host: what it clones starts from there, so
// the copy is cheap and no host path can leak. So it opens no files by path;
// they arrive as descriptors.
//
// It never maps a plan, keeps no request longer than its answer, and has the
// containers' output only in mappings that a child does not get: each child
// begins as a copy of this process.
//
// # Concurrency
//
// One goroutine reads the keeper's socket, one each connection of a daemon, one
// waits on the poller; each request has its own. A container with nothing to
// copy has none: its pipes are in the poller, and the pool gives it a goroutine
// when one is readable. worker.mu guards the table and the connections;
// container.mu one container; pool.mu all outputs' queues. They are never held
// over a call that can block, and taken in that order.
package worker

import (
	"fmt"
	"os"
	"os/signal"
	goruntime "runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime/monitor/wire"
	"github.com/naru-project/naru/runtime/plan"
)

// Descriptors that the keeper passes.
const (
	fdSocket   = 3
	fdListener = 4
	fdSelf     = 5
)

// Times that something may take.
const (
	startTime  = 30 * time.Second // until a plan reports
	drainTime  = 2 * time.Second  // for what a dead container left in its pipes
	deleteTime = 10 * time.Second // for a killed container to end
	sendTime   = 10 * time.Second // for a daemon to read
	termTime   = 5 * time.Second  // from SIGTERM to SIGKILL
	tidyTime   = 2 * time.Second  // from a request to a garbage collection
)

type worker struct {
	build    string
	link     *link
	poll     *poller
	pool     *pool
	listener *os.File
	busy     chan struct{} // one slot per running request
	journal  *journal
	tidying  atomic.Bool

	mu         sync.Mutex
	containers map[string]*container
	conns      map[*conn]struct{}
	orphan     bool // the keeper's socket was closed; see orphaned

	keeper int // its pid; it keeps it over its upgrades
}

// orphaned reports whether the keeper is dead. A child changes its parent at
// its parent's death, before that can be waited for; the socket tells it later.
func (w *worker) orphaned() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.orphan || os.Getppid() != w.keeper
}

// Run is the life of a worker.
func Run(build string) error {
	debug.SetGCPercent(20)
	debug.SetMemoryLimit(64 << 20)
	goruntime.GOMAXPROCS(4) // more than cores: a goroutine in a slow write keeps its slot for a while
	unix.Umask(0o077)
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return errs.New(errs.Internal, "become non-dumpable: %w", err)
	}
	_ = os.WriteFile("/proc/self/comm", []byte("naru-worker"), 0)
	for _, fd := range []int{fdSocket, fdListener, fdSelf} {
		unix.CloseOnExec(fd)
	}
	if err := enterEmptyRoot(); err != nil {
		return err
	}
	w := &worker{
		build: build, containers: map[string]*container{}, conns: map[*conn]struct{}{},
		busy: make(chan struct{}, 256),
	}
	var err error
	if w.poll, err = newPoller(); err != nil {
		return err
	}
	w.pool = newPool()
	w.journal = newJournal()
	if err := w.receiveTable(); err != nil {
		return err
	}
	w.endOnSIGTERM()
	if err := plan.LeaveOut(); err != nil {
		return err
	}
	return w.serve()
}

func logf(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%s worker: %s\n", time.Now().UTC().Format("2006-01-02T15:04:05.000Z"), fmt.Sprintf(format, args...))
}

// receiveTable reads what the keeper holds and takes up every container's log.
func (w *worker) receiveTable() error {
	sock, err := wire.NewConn(fdSocket)
	if err != nil {
		return errs.New(errs.Internal, "use the keeper's socket: %w", err)
	}
	w.link = newLink(sock)
	// Not the parent, which may be another one already: who made the socket.
	cred, err := unix.GetsockoptUcred(fdSocket, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return errs.New(errs.Internal, "ask who the keeper is: %w", err)
	}
	w.keeper = int(cred.Pid)
	buf := make([]byte, wire.MaxMessage)
	for {
		p, err := sock.Recv(buf)
		if err != nil {
			return errs.New(errs.Internal, "read the keeper's table: %w", err)
		}
		switch p.Kind {
		case wire.KindEntry:
			w.restore(&p)
		case wire.KindExit:
			w.onExit(&p)
		case wire.KindEntriesEnd:
			var v wire.Hello
			if err := wire.Unmarshal(p.Body, &v); err != nil || v.Min > wire.KeeperMax || v.Max < wire.KeeperMin {
				return errs.New(errs.FailedPrecondition, "the keeper speaks versions %d to %d, this worker %d to %d", v.Min, v.Max, wire.KeeperMin, wire.KeeperMax)
			}
			go w.readKeeper(buf)
			return w.link.send(wire.KindWorkerUp, 0, nil, nil)
		}
		p.Close()
	}
}

// restore takes up one container of the table.
func (w *worker) restore(p *wire.Packet) {
	var e wire.Entry
	c := &container{w: w, ended: make(chan struct{}), starting: make(chan struct{}, 1)}
	if err := wire.Unmarshal(p.Body, &e); err != nil || p.Lost || !c.fds.Fill(e.Mask, p.FDs) {
		logf("container %s could not be taken up: %d files, no room for more: %v", e.ID, len(p.FDs), p.Lost)
		p.Close()
		return
	}
	p.FDs = nil
	c.id, c.pid, c.tty, c.started, c.adopted, c.ready = e.ID, e.PID, e.TTY, e.Started, e.Adopted, true
	w.containers[c.id] = c
	c.openOutput()
	if e.Exit != nil {
		w.exited(c, e.Exit)
	}
}

// readKeeper handles the keeper's messages. When the keeper is dead the worker
// stays, copies logs, and waits for the next keeper.
func (w *worker) readKeeper(buf []byte) {
	for {
		p, err := w.link.conn.Recv(buf)
		if err != nil {
			break
		}
		switch p.Kind {
		case wire.KindExit:
			w.onExit(&p)
		case wire.KindAck:
			w.link.acked(&p)
		case wire.KindBeat:
			_ = w.link.send(wire.KindBeat, p.Req, nil, nil)
		}
		p.Close()
	}
	w.mu.Lock()
	w.orphan = true
	w.mu.Unlock()
	logf("the keeper is gone; logs go on, waiting for the next one")
	w.link.die()
}

func (w *worker) onExit(p *wire.Packet) {
	x := new(wire.Exit)
	if err := wire.Unmarshal(p.Body, x); err != nil {
		logf("exit message: %v", err)
		return
	}
	w.mu.Lock()
	c := w.containers[x.ID]
	w.mu.Unlock()
	if c != nil {
		w.exited(c, x)
	}
}

// exited drains the container's pipes and then announces its end.
func (w *worker) exited(c *container, x *wire.Exit) {
	c.mu.Lock()
	again := c.dead != nil
	if !again {
		c.dead = x
	}
	c.mu.Unlock()
	if again {
		return
	}
	go func() {
		c.drain()
		w.mu.Lock()
		defer w.mu.Unlock()
		c.mu.Lock()
		c.exit = x
		c.mu.Unlock()
		close(c.ended)
		for s := range w.conns {
			if s.subscribed {
				s.push(wire.Marshal(wire.KindExit, 0, x))
			}
		}
	}()
}

// endOnSIGTERM finishes the batches under way and ends. A worker that is
// killed instead loses nothing, its successor only has to write a batch again.
func (w *worker) endOnSIGTERM() {
	ch := make(chan os.Signal, 16)
	// Not ignored but received: what is ignored stays so in children, and a
	// broken stderr must not kill.
	signal.Notify(ch, syscall.SIGTERM, syscall.SIGPIPE, syscall.SIGHUP, syscall.SIGINT)
	go func() {
		for s := range ch {
			if s == syscall.SIGTERM {
				w.pool.pause(drainTime)
				time.Sleep(20 * time.Millisecond) // for the answer to who asked for it
				os.Exit(0)
			}
		}
	}()
}
