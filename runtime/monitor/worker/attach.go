package worker

import (
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime/crilog"
)

const (
	attachQueue    = 256 << 10       // bytes that wait for one slow reader
	attachPatience = 5 * time.Second // until it is dropped
	attachLimit    = 64              // readers of one container
)

// attachers are the people who watch one container's output live.
//
// None of them slows the log: what does not fit into a reader's pipe waits in
// a queue of its own. A reader that does not catch up within attachPatience is
// dropped; what does not fit into its queue until then is not shown to it. The
// exception are lossless readers, meant for containers that are driven by
// their reader (stdin is open: kubectl run -i … > file): the copier waits for
// one of those as long as it goes on reading, and drops it when it has not
// read a byte for attachPatience.
type attachers struct {
	mu    sync.Mutex
	list  [2][]*attacher
	ended [2]bool
}

// add takes over fd on success.
func (a *attachers) add(s crilog.Stream, fd int, poll *poller, lossless bool) error {
	x := &attacher{fd: fd, poll: poll, lossless: lossless, room: make(chan struct{}, 1)}
	x.drop = func() { a.remove(s, x) }
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.ended[s] {
		_ = unix.Close(fd)
		return nil
	}
	if len(a.list[s]) >= attachLimit {
		return errs.New(errs.ResourceExhausted, "%d attached readers are too many", attachLimit)
	}
	x.mu.Lock() // an event may come before the token is known
	defer x.mu.Unlock()
	var err error
	if x.token, err = poll.watch(fd, unix.EPOLLOUT, x.onEvent); err != nil {
		return err
	}
	a.list[s] = append(a.list[s], x)
	return nil
}

func (a *attachers) remove(s crilog.Stream, x *attacher) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if i := slices.Index(a.list[s], x); i >= 0 {
		a.list[s] = slices.Delete(a.list[s], i, i+1)
	}
}

// tap is the copier's Tap.
func (a *attachers) tap(s crilog.Stream, p []byte) {
	a.mu.Lock()
	if len(a.list[s]) == 0 {
		a.mu.Unlock()
		return
	}
	list := slices.Clone(a.list[s])
	a.mu.Unlock()
	for _, x := range list {
		x.write(p)
	}
}

// endStream closes the readers of a stream once they have read all.
func (a *attachers) endStream(s crilog.Stream) {
	a.mu.Lock()
	a.ended[s] = true
	list := slices.Clone(a.list[s])
	a.mu.Unlock()
	for _, x := range list {
		x.end()
	}
}

func (a *attachers) closeAll() {
	a.endStream(crilog.Stdout)
	a.endStream(crilog.Stderr)
}

// attacher is one reader of one stream.
type attacher struct {
	fd       int // write end of its pipe, O_NONBLOCK
	poll     *poller
	lossless bool
	drop     func()
	room     chan struct{} // signalled when the queue has room again, or is gone

	mu     sync.Mutex
	token  int32
	mem    []byte // mapping of the queue: not inherited by children
	queue  []byte // part of mem that waits
	timer  *time.Timer
	ending bool
	closed bool
}

// write passes p on, or what can be of it.
func (x *attacher) write(p []byte) {
	for len(p) > 0 {
		x.mu.Lock()
		p = x.put(p)
		wait := x.lossless && !x.closed && len(p) > 0
		x.mu.Unlock()
		if !wait {
			return
		}
		<-x.room
	}
}

// put writes and queues what it can and returns the rest; x.mu is held.
func (x *attacher) put(p []byte) []byte {
	if x.closed || x.ending {
		return nil
	}
	if len(x.queue) == 0 {
		p = x.send(p)
	}
	if len(p) == 0 || x.closed {
		return nil
	}
	if x.mem == nil {
		mem, err := unix.Mmap(-1, 0, attachQueue, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
		if err != nil {
			x.close()
			return nil
		}
		_ = unix.Madvise(mem, unix.MADV_DONTFORK)
		x.mem, x.queue = mem, mem[:0]
	}
	if len(x.queue) == 0 {
		x.queue = x.mem[:0]
		x.wait()
	} else if cap(x.queue)-len(x.queue) < len(p) { // move it to the front
		x.queue = x.mem[:copy(x.mem, x.queue)]
	}
	n := min(len(p), cap(x.queue)-len(x.queue))
	x.queue = append(x.queue, p[:n]...)
	return p[n:]
}

// send writes to the pipe and returns what it does not take; x.mu is held.
func (x *attacher) send(p []byte) []byte {
	for len(p) > 0 && !x.closed {
		n, err := unix.Write(x.fd, p)
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			return p
		case err != nil: // EPIPE: the reader went away
			x.close()
		default:
			p = p[n:]
		}
	}
	return p
}

// wait starts the patience with a reader that is behind; x.mu is held.
func (x *attacher) wait() {
	if x.timer != nil {
		x.timer.Stop()
	}
	x.timer = time.AfterFunc(attachPatience, func() {
		x.mu.Lock()
		defer x.mu.Unlock()
		if len(x.queue) > 0 {
			x.close()
		}
	})
}

// onEvent: the pipe has room, or nobody reads it any more.
func (x *attacher) onEvent(events uint32) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if events&unix.EPOLLERR != 0 {
		x.close()
		return
	}
	if x.closed || len(x.queue) == 0 {
		return
	}
	rest := x.send(x.queue)
	if x.closed {
		return
	}
	progress := len(rest) < len(x.queue)
	x.queue = rest
	switch {
	case len(rest) == 0 && x.timer != nil:
		x.timer.Stop()
	case progress && x.lossless:
		x.wait()
	}
	if progress {
		x.signal()
	}
	if len(rest) == 0 && x.ending {
		x.close()
	}
}

func (x *attacher) signal() {
	select {
	case x.room <- struct{}{}:
	default:
	}
}

// end closes the reader's pipe once it has read what waits for it.
func (x *attacher) end() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.ending = true
	if len(x.queue) == 0 {
		x.close()
	}
}

// close drops the reader; x.mu is held.
func (x *attacher) close() {
	if x.closed {
		return
	}
	x.closed = true
	x.poll.unwatch(x.fd, x.token)
	_ = unix.Close(x.fd)
	if x.timer != nil {
		x.timer.Stop()
	}
	if x.mem != nil {
		_ = unix.Munmap(x.mem)
	}
	x.mem, x.queue = nil, nil
	x.signal()
	go x.drop() // takes attachers.mu, which comes before x.mu
}
