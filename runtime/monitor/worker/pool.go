package worker

import (
	"errors"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime/crilog"
)

const (
	poolSize  = 4                      // outputs that are copied at the same time
	quantum   = 8                      // batches before others get their turn
	stuckTime = 50 * time.Millisecond  // a batch that takes longer does not count as running
	trimTime  = 500 * time.Millisecond // until unused buffers go back to the kernel
)

// pool gives goroutines and buffers to outputs that have something to copy. A
// log whose disk hangs keeps its goroutine but not its place: after stuckTime
// another output gets one.
type pool struct {
	mu       sync.Mutex
	running  int // not counting those that are stuck
	stuck    int
	queue    []*output
	jobs     map[*output]struct{}
	free     []*crilog.Buffers
	paused   bool
	idle     *sync.Cond // running and stuck are zero
	watching bool
	trimming bool
}

func newPool() *pool {
	p := &pool{jobs: map[*output]struct{}{}}
	p.idle = sync.NewCond(&p.mu)
	return p
}

// output is the copying side of one container. Its copier is used by the one
// goroutine that the pool gave it.
type output struct {
	pool    *pool
	poll    *poller
	copier  *crilog.Copier
	attach  attachers
	name    string
	watches [2]int32
	onClose func()
	dropped atomic.Uint64 // output bytes that could not be logged

	// Guarded by pool.mu.
	pending [2]bool
	tasks   []*task
	active  bool // queued or running
	closed  bool
	since   time.Time // of the current batch
	isStuck bool
}

// task is done by the goroutine of an output, between batches.
type task struct {
	do  func(*crilog.Copier, *crilog.Buffers) error
	err chan error
	ran bool // set before err is sent
}

// kick has the streams looked at.
func (o *output) kick(streams ...crilog.Stream) {
	p := o.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range streams {
		o.pending[s] = true
	}
	p.enqueue(o)
}

// do has f done with the output's copier and returns its error. When a hung
// log makes it give up, ran tells whether f has been or is still to be done.
func (o *output) do(timeout time.Duration, f func(*crilog.Copier, *crilog.Buffers) error) (ran bool, err error) {
	t := &task{do: f, err: make(chan error, 1)}
	p := o.pool
	p.mu.Lock()
	if o.closed {
		p.mu.Unlock()
		return false, errs.New(errs.NotFound, "the container was deleted")
	}
	o.tasks = append(o.tasks, t)
	p.enqueue(o)
	p.mu.Unlock()
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case err := <-t.err:
		return t.ran, err
	case <-timer.C:
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	err = errs.New(errs.DeadlineExceeded, "the log of %s hangs", o.name)
	if i := slices.Index(o.tasks, t); i >= 0 {
		o.tasks = slices.Delete(o.tasks, i, i+1)
		return false, err
	}
	return true, err
}

// close ends the output; its files are closed when its goroutine, if it has
// one, comes back from the log.
func (o *output) close() {
	p := o.pool
	p.mu.Lock()
	if o.closed {
		p.mu.Unlock()
		return
	}
	o.closed = true
	for _, t := range o.tasks {
		t.err <- errs.New(errs.NotFound, "the container was deleted")
	}
	o.tasks = nil
	active := o.active
	p.mu.Unlock()
	o.attach.closeAll()
	if !active {
		o.onClose()
	}
}

// enqueue and dispatch are called with p.mu held.
func (p *pool) enqueue(o *output) {
	if !o.active && !o.closed {
		o.active = true
		p.queue = append(p.queue, o)
		p.dispatch()
	}
}

func (p *pool) dispatch() {
	for len(p.queue) > 0 && p.running < poolSize && !p.paused {
		o := p.queue[0]
		p.queue = p.queue[1:]
		p.running++
		p.jobs[o] = struct{}{}
		o.since = time.Now()
		go p.work(o)
	}
	if len(p.queue) == 0 {
		p.queue = nil
	} else if !p.watching && !p.paused {
		p.watching = true
		time.AfterFunc(stuckTime/2, p.lookForStuck)
	}
}

// lookForStuck frees the places of those that hang. It runs only while
// somebody waits for a place.
func (p *pool) lookForStuck() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.watching = false
	for o := range p.jobs {
		if !o.isStuck && time.Since(o.since) > stuckTime {
			o.isStuck = true
			p.running--
			p.stuck++
		}
	}
	p.dispatch()
}

// work copies what o has.
func (p *pool) work(o *output) {
	b, err := p.buffers()
	if err != nil {
		logf("no buffers to copy logs with: %v", err)
		time.Sleep(100 * time.Millisecond)
		p.mu.Lock()
		p.leave(o, true)
		p.mu.Unlock()
		return
	}
	for n := 0; ; n++ {
		streams, tasks, ok := p.next(o, n, b)
		if !ok {
			return
		}
		for _, t := range tasks {
			t.ran = true
			t.err <- t.do(o.copier, b)
		}
		for s, want := range streams {
			if want {
				o.step(crilog.Stream(s), b)
			}
		}
	}
}

// next tells what there is to do. When there is nothing, or when it is the turn
// of others, it ends the job.
func (p *pool) next(o *output, n int, b *crilog.Buffers) (streams [2]bool, tasks []*task, ok bool) {
	p.mu.Lock()
	if o.isStuck {
		o.isStuck = false
		p.stuck--
		p.running++
	}
	o.since = time.Now()
	more := o.pending != [2]bool{} || len(o.tasks) > 0
	if more && !o.closed && !p.paused && (n < quantum || len(p.queue) == 0) {
		streams, tasks = o.pending, o.tasks
		o.pending, o.tasks = [2]bool{}, nil
		p.mu.Unlock()
		return streams, tasks, true
	}
	p.giveBack(b)
	p.leave(o, more && !o.closed)
	closed := o.closed
	p.mu.Unlock()
	if closed {
		o.onClose()
	}
	return streams, nil, false
}

// leave ends the job of o, with p.mu held.
func (p *pool) leave(o *output, again bool) {
	if o.isStuck {
		o.isStuck = false
		p.stuck--
		p.running++
	}
	p.running--
	delete(p.jobs, o)
	o.active = again
	if again {
		p.queue = append(p.queue, o)
	}
	p.dispatch()
	if p.running+p.stuck == 0 {
		p.idle.Broadcast()
	}
}

// step copies one batch of a stream.
func (o *output) step(s crilog.Stream, b *crilog.Buffers) {
	_, err := o.copier.Copy(s, b)
	switch {
	case err == nil:
		o.dropped.Store(o.copier.Dropped())
		o.pool.mu.Lock()
		o.pending[s] = true
		o.pool.mu.Unlock()
	case errors.Is(err, crilog.ErrNothing):
	case errors.Is(err, io.EOF):
		o.attach.endStream(s)
	default:
		// Not the log's fault (those are counted and go on) but this host's:
		// out of memory or descriptors. It is tried again.
		logf("container %s, %s: %v", o.name, s, err)
		time.AfterFunc(time.Second, func() { o.kick(s) })
	}
}

// buffers takes a set, or makes one.
func (p *pool) buffers() (*crilog.Buffers, error) {
	p.mu.Lock()
	if n := len(p.free); n > 0 {
		b := p.free[n-1]
		p.free = p.free[:n-1]
		p.mu.Unlock()
		return b, nil
	}
	p.mu.Unlock()
	return crilog.NewBuffers()
}

// giveBack keeps a few sets, whose memory goes back to the kernel after a
// while; p.mu is held.
func (p *pool) giveBack(b *crilog.Buffers) {
	if len(p.free) >= poolSize {
		b.Close()
		return
	}
	p.free = append(p.free, b)
	if b.Touched() && !p.trimming {
		p.trimming = true
		time.AfterFunc(trimTime, func() {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.trimming = false
			for _, b := range p.free {
				b.Trim()
			}
		})
	}
}

// pause lets no new batch begin and waits for those under way. It reports
// whether all are through.
func (p *pool) pause(timeout time.Duration) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.paused = true
	late := false
	t := time.AfterFunc(timeout, func() {
		p.mu.Lock()
		late = true
		p.idle.Broadcast()
		p.mu.Unlock()
	})
	defer t.Stop()
	for p.running+p.stuck > 0 && !late {
		p.idle.Wait()
	}
	return p.running+p.stuck == 0
}

func (p *pool) resume() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.paused = false
	p.dispatch()
}

// watchStreams has the poller kick the output.
func (o *output) watchStreams(fds [2]int) {
	for s, fd := range fds {
		if fd < 0 {
			continue
		}
		token, err := o.poll.watch(fd, unix.EPOLLIN, func(uint32) { o.kick(crilog.Stream(s)) })
		if err != nil {
			logf("container %s: %v", o.name, err)
		}
		o.watches[s] = token
	}
	o.kick(crilog.Stdout, crilog.Stderr) // what came before the watch
}
