package worker

import (
	"errors"
	"io"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime/crilog"
	"github.com/naru-project/naru/runtime/monitor/wire"
)

// container is what the worker knows of one.
type container struct {
	w        *worker
	id       string
	pid      int
	tty      bool
	adopted  bool
	out      *output       // nil: it has no output streams
	ended    chan struct{} // closed when its end has been announced
	starting chan struct{} // one slot: Start runs once at a time

	mu      sync.Mutex
	ready   bool // the keeper knows it
	started bool
	dead    *wire.Exit // as the keeper said
	exit    *wire.Exit // the same, once its output is drained
	gone    bool       // deleted: fds are closed, or will be by its output
	fds     wire.FDs
}

func (c *container) entry() wire.Entry {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := wire.Entry{ID: c.id, PID: c.pid, TTY: c.tty, Started: c.started, Adopted: c.adopted, Exit: c.exit}
	if c.out != nil {
		e.Dropped = c.out.dropped.Load()
	}
	return e
}

// makeLogFiles makes what the exactly-once copier needs beside the streams.
func makeLogFiles(fds *wire.FDs) error {
	if fds[wire.FDStdout] < 0 && fds[wire.FDStderr] < 0 && fds[wire.FDPty] < 0 {
		return nil
	}
	var err error
	if fds[wire.FDState], err = crilog.NewState(); err != nil {
		return err
	}
	for i, stream := range []bool{fds[wire.FDStdout] >= 0 || fds[wire.FDPty] >= 0, fds[wire.FDStderr] >= 0} {
		if !stream {
			continue
		}
		if fds[wire.FDStage0+i], err = crilog.NewStage(); err != nil {
			return err
		}
	}
	return nil
}

// openOutput starts to copy the container's output.
func (c *container) openOutput() {
	f := &c.fds
	if f[wire.FDState] < 0 {
		return
	}
	in := [2]int{f[wire.FDStdout], f[wire.FDStderr]}
	tty := f[wire.FDPty] >= 0
	if tty {
		in = [2]int{f[wire.FDPty], -1}
	}
	o := &output{pool: c.w.pool, poll: c.w.poll, name: c.id}
	o.onClose = func() { c.closeFDs() }
	o.copier = crilog.New(crilog.Files{
		In: in, Stage: [2]int{f[wire.FDStage0], f[wire.FDStage1]}, State: f[wire.FDState], Log: f[wire.FDLog], TTY: tty,
	}, o.attach.tap)
	if err := c.sendToJournal(o.copier, crilog.ReadFields(f[wire.FDState])); err != nil {
		logf("container %s: %v", c.id, err)
	}
	c.mu.Lock()
	c.out = o
	c.mu.Unlock()
	p := o.pool
	p.mu.Lock()
	o.tasks = append(o.tasks, &task{err: make(chan error, 1), do: func(cp *crilog.Copier, b *crilog.Buffers) error {
		err := cp.Recover(b)
		if err != nil {
			logf("container %s: %v", c.id, err)
		}
		o.dropped.Store(cp.Dropped())
		return err
	}})
	p.enqueue(o)
	p.mu.Unlock()
	o.watchStreams(in)
}

// drain logs what a dead container left in its pipes: as much as was there
// when it ended, or until the pipes are empty. Its own descendants may hold the
// pipes open and go on writing: that is logged as it comes.
func (c *container) drain() {
	o := c.out
	if o == nil {
		return
	}
	deadline := time.Now().Add(drainTime)
	var target [2]uint64
	first := true
	for more := true; more; first = false {
		_, err := o.do(time.Until(deadline), func(cp *crilog.Copier, b *crilog.Buffers) error {
			if first {
				for s := range target {
					// One more byte than there was: so the end of the stream is looked for.
					target[s] = cp.Taken(crilog.Stream(s)) + uint64(cp.Waiting(crilog.Stream(s))) + 1
				}
			}
			var err error
			more, err = drainOnce(cp, b, o, target, time.Now().After(deadline))
			o.dropped.Store(cp.Dropped())
			return err
		})
		if err != nil {
			logf("container %s ended, its output is not drained: %v", c.id, err)
			break
		}
	}
	o.attach.closeAll()
}

// drainOnce copies one batch of each stream. At the end it writes unfinished
// lines. It reports whether there is more.
func drainOnce(cp *crilog.Copier, b *crilog.Buffers, o *output, target [2]uint64, late bool) (more bool, err error) {
	for s := crilog.Stdout; s <= crilog.Stderr; s++ {
		if cp.Ended(s) {
			continue
		}
		_, err := cp.Copy(s, b)
		switch {
		case errors.Is(err, io.EOF):
			o.attach.endStream(s)
			continue
		case errors.Is(err, crilog.ErrNothing):
		case err != nil:
			return false, err
		case cp.TTY() || cp.Taken(s) < target[s]:
			if !late {
				more = true
				continue
			}
		}
		if err := cp.Flush(s, b, false); err != nil {
			return false, err
		}
	}
	return more, nil
}

// closeFDs closes all files.
func (c *container) closeFDs() {
	c.mu.Lock()
	defer c.mu.Unlock()
	wire.CloseAll(c.fds.List())
	c.fds = wire.NoFDs()
}

// remove ends the use of the container's files.
func (c *container) remove() {
	c.mu.Lock()
	c.gone = true
	fds := c.fds
	c.mu.Unlock()
	o := c.out
	if o == nil {
		c.closeFDs()
		return
	}
	in := [2]int{fds[wire.FDStdout], fds[wire.FDStderr]}
	if fds[wire.FDPty] >= 0 {
		in[0] = fds[wire.FDPty]
	}
	for s, fd := range in {
		if fd >= 0 {
			o.poll.unwatch(fd, o.watches[s])
		}
	}
	o.close()
}

// kill sends SIGKILL to the container's first process.
func (c *container) kill() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fds[wire.FDPid] < 0 || c.dead != nil {
		return nil
	}
	err := unix.PidfdSendSignal(c.fds[wire.FDPid], unix.SIGKILL, nil, 0)
	if err != nil && err != unix.ESRCH {
		return errs.New(errs.Internal, "kill container %s: %w", c.id, err)
	}
	return nil
}

// dupFDs duplicates the files of mask, for a message: the originals may be
// closed while it is sent.
func (c *container) dupFDs(mask uint32) (uint32, []int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.gone {
		return 0, nil, errs.New(errs.NotFound, "container %s is deleted", c.id)
	}
	var got uint32
	var fds []int
	for i, fd := range c.fds {
		if fd < 0 || mask&(1<<i) == 0 {
			continue
		}
		d, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			wire.CloseAll(fds)
			return 0, nil, errs.New(errs.ResourceExhausted, "duplicate a descriptor: %w", err)
		}
		got |= 1 << i
		fds = append(fds, d)
	}
	return got, fds, nil
}

// drop closes one file.
func (c *container) drop(which int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fds[which] >= 0 {
		_ = unix.Close(c.fds[which])
		c.fds[which] = -1
	}
}
