package crilog

import (
	"errors"
	"io"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
)

// ErrNothing means that the stream has no bytes now.
var ErrNothing = errors.New("nothing to copy")

// Patience is how long a batch is tried again when the log cannot be written
// (no space, I/O error), before it is dropped and counted. Retry bounds the
// pauses in between.
const (
	Patience = 2 * time.Second
	retryMin = 10 * time.Millisecond
	retryMax = 250 * time.Millisecond
)

// Files are the descriptors of a Copier, which stay the caller's. -1 = not there.
type Files struct {
	In    [2]int // read ends of stdout and stderr; for a terminal its master, as stdout
	Stage [2]int // staging pipes (NewStage)
	State int    // memfd (NewState)
	Log   int    // -1: the output goes nowhere but to the taps
	TTY   bool
}

// Tap sees the bytes of a stream after they were logged. They must be copied.
type Tap func(s Stream, p []byte)

// Copier copies the output of one container.
type Copier struct {
	files   Files
	regular bool // the log is a regular file: offsets and truncation make sense
	failing bool // the last batch was dropped: try once, do not wait
	streams [2]stream
	tap     Tap
	records func(s Stream, out []byte)
	clock   func() time.Time
}

type stream struct {
	note  note
	fmt   Format
	eof   bool
	grown bool
	raw   uint64 // bytes taken since this process began
}

// New returns a copier. Recover must be called before anything else.
func New(f Files, tap Tap) *Copier {
	c := &Copier{files: f, tap: tap, clock: time.Now}
	c.regular = isRegular(f.Log)
	return c
}

func isRegular(fd int) bool {
	var st unix.Stat_t
	return fd >= 0 && unix.Fstat(fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFREG
}

// OnRecords has f called with all records from now on, after they were logged
// or could not be. f must not wait; out is valid until it returns. Records may
// come again after this process was killed.
func (c *Copier) OnRecords(f func(s Stream, out []byte)) { c.records = f }

// Has reports whether the container has the stream.
func (c *Copier) Has(s Stream) bool { return c.files.In[s] >= 0 }

// TTY reports whether the output is that of a terminal.
func (c *Copier) TTY() bool { return c.files.TTY }

// Ended reports whether the stream has come to its end.
func (c *Copier) Ended(s Stream) bool { return !c.Has(s) || c.streams[s].eof }

// Dropped returns how many output bytes could not be logged.
func (c *Copier) Dropped() uint64 { return c.streams[0].note.dropped + c.streams[1].note.dropped }

// Taken returns how many bytes this copier has taken from the stream.
func (c *Copier) Taken(s Stream) uint64 { return c.streams[s].raw }

// Waiting returns how many bytes of the stream wait to be copied.
func (c *Copier) Waiting(s Stream) int {
	if !c.Has(s) {
		return 0
	}
	return pending(c.files.In[s]) + pending(c.files.Stage[s])
}

// LeaveLog ends the use of the log file, so that nothing noted refers to it any
// more. It comes before the keeper is given another file, SetLog after: killed
// in between, the next copier goes on with either.
func (c *Copier) LeaveLog(b *Buffers) error {
	for s := Stdout; s <= Stderr; s++ {
		n := &c.streams[s].note
		if n.flags&flagRepair == 0 {
			continue
		}
		_ = c.cutBack(n.offset) // a last try
		n.set(flagRepair, false)
		if err := c.save(s, b, n.phase); err != nil {
			return err
		}
	}
	return nil
}

// SetLog changes the log file (rotation). Whole records went to the old one;
// an unfinished line will go to the new one. fd -1: no log.
func (c *Copier) SetLog(fd int) {
	c.files.Log = fd
	c.regular = isRegular(fd)
	c.failing = false
}

// Recover takes up what an earlier process left, which may have been killed
// anywhere.
func (c *Copier) Recover(b *Buffers) error {
	for s := Stdout; s <= Stderr; s++ {
		if !c.Has(s) {
			continue
		}
		if err := c.recover(s, b); err != nil {
			return err
		}
	}
	return nil
}

func (c *Copier) recover(s Stream, b *Buffers) error {
	st := &c.streams[s]
	if _, err := unix.Pread(c.files.State, b.note, int64(s)*noteSize); err != nil {
		return errs.New(errs.Internal, "read the log state: %w", err)
	}
	var err error
	if st.note, err = parseNote(b.note); err != nil {
		return err
	}
	st.fmt.Mid = st.note.flags&flagMid != 0
	switch st.note.phase {
	case writing:
		if err := c.cutBack(st.note.offset); err != nil {
			st.note.set(flagRepair, true)
		}
	case done:
		return c.settle(s, b)
	}
	if pending(c.files.Stage[s]) == 0 {
		return c.save(s, b, idle)
	}
	_, err = c.batch(s, b)
	return err
}

// Copy copies one batch of the stream and returns its size. It returns
// ErrNothing when there is none and io.EOF at the end of the stream, when the
// unfinished line has been written. Any other error is one of this host, not
// of the log file: those are dealt with.
func (c *Copier) Copy(s Stream, b *Buffers) (int, error) {
	st := &c.streams[s]
	if !c.Has(s) || st.eof {
		return 0, io.EOF
	}
	n, err := c.stage(s)
	switch {
	case err == unix.EAGAIN:
		return 0, ErrNothing
	case err == unix.EIO && c.files.TTY: // no process has the terminal open; one may open it again
		if err := c.Flush(s, b, true); err != nil {
			return 0, err
		}
		return 0, ErrNothing
	case err != nil:
		return 0, errs.New(errs.Internal, "take %s: %w", s, err)
	case n == 0:
		if err := c.Flush(s, b, true); err != nil {
			return 0, err
		}
		st.eof = true
		return 0, io.EOF
	}
	return c.batch(s, b)
}

// stage moves what the container wrote into the staging pipe, which must be
// empty. The move is done by the kernel in one call: killed before or after
// it, every byte is in one of the two pipes.
func (c *Copier) stage(s Stream) (int, error) {
	size := pipeMax
	if c.files.TTY {
		if err := readable(c.files.In[s]); err != nil {
			return 0, err
		}
		// The kernel allocates pages for the whole length beforehand
		// (copy_splice_read); a terminal never has more than 4 KiB at once.
		size = 8 << 10
	}
	for {
		n, err := unix.Splice(c.files.In[s], nil, c.files.Stage[s], nil, size, unix.SPLICE_F_NONBLOCK|unix.SPLICE_F_MOVE)
		if err != unix.EINTR {
			return int(n), err
		}
	}
}

// readable looks before a terminal is read: SPLICE_F_NONBLOCK is about pipes
// only, and whether the master itself waits is for those to choose who share
// the open file. EIO: no process has the terminal open.
func readable(fd int) error {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(p, 0)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return err
		case n > 0 && p[0].Revents&unix.POLLIN != 0:
			return nil
		case n > 0 && p[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0:
			return unix.EIO
		}
		return unix.EAGAIN
	}
}

// grow makes the pipes of a busy stream larger, once. A quiet one keeps the
// default: the kernel holds an array of slots for each pipe.
func (c *Copier) grow(s Stream, b *Buffers, n int) {
	st := &c.streams[s]
	if st.grown || n < 32<<10 {
		return
	}
	st.grown = true
	if !c.files.TTY {
		_, _ = unix.FcntlInt(uintptr(c.files.In[s]), unix.F_SETPIPE_SZ, pipeMax)
	}
	_, _ = unix.FcntlInt(uintptr(c.files.Stage[s]), unix.F_SETPIPE_SZ, min(pipeMax, pipeSize(b.scratch[1])))
}

// batch logs what is in the staging pipe and empties it.
func (c *Copier) batch(s Stream, b *Buffers) (int, error) {
	st := &c.streams[s]
	total, err := c.tee(s, b)
	if err != nil {
		return 0, err
	}
	st.raw += uint64(total)
	if total > 8<<10 {
		b.touched = true
	}
	w := writer{c: c, s: s, b: b, total: uint64(total)}
	if err := w.run(total); err != nil {
		_ = b.newScratch() // what is left in it must not get into the next batch
		return 0, err
	}
	if err := c.save(s, b, done); err != nil {
		return 0, err
	}
	if err := c.settle(s, b); err != nil {
		return 0, err
	}
	c.grow(s, b, total)
	return total, nil
}

// tee copies the staging pipe, as a whole, to the scratch pipe.
func (c *Copier) tee(s Stream, b *Buffers) (int, error) {
	want := pending(c.files.Stage[s])
	for {
		n, err := unix.Tee(c.files.Stage[s], b.scratch[1], pipeMax, unix.SPLICE_F_NONBLOCK)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return 0, errs.New(errs.Internal, "copy the staging pipe of %s: %w", s, err)
		}
		if int(n) != want {
			_ = b.newScratch()
			return 0, errs.Wrap(errs.Internal, errScratch)
		}
		return want, nil
	}
}

// settle throws away what the staging pipe holds and notes idle.
func (c *Copier) settle(s Stream, b *Buffers) error {
	for {
		_, err := unix.Read(c.files.Stage[s], b.out)
		switch err {
		case nil, unix.EINTR:
		case unix.EAGAIN:
			return c.save(s, b, idle)
		default:
			return errs.New(errs.Internal, "empty the staging pipe of %s: %w", s, err)
		}
	}
}

// save notes the phase of the stream.
func (c *Copier) save(s Stream, b *Buffers, p phase) error {
	n := &c.streams[s].note
	n.phase = p
	n.put(b.note)
	if _, err := unix.Pwrite(c.files.State, b.note, int64(s)*noteSize); err != nil {
		return errs.New(errs.Internal, "note the log state: %w", err)
	}
	return nil
}

// Flush writes the unfinished line, if there is one: as the last record of its
// line at the end of the stream, else as a part of it.
func (c *Copier) Flush(s Stream, b *Buffers, end bool) error {
	st := &c.streams[s]
	if !c.Has(s) || st.note.carry == 0 && (!end || !st.fmt.Mid) {
		return nil
	}
	carry := int(st.note.carry)
	w := writer{c: c, s: s, b: b, total: uint64(carry)}
	if err := w.loadCarry(carryRoom); err != nil {
		return err
	}
	st.fmt.Stamp(s, c.clock())
	out := st.fmt.Flush(b.out[:0:len(b.out)], b.raw[carryRoom-carry:carryRoom], end)
	if err := w.write(out); err != nil {
		return err
	}
	if c.records != nil {
		c.records(s, out)
	}
	w.finish()
	st.note.carry = 0
	st.note.set(flagMid, st.fmt.Mid)
	return c.save(s, b, idle)
}
