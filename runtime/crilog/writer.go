package crilog

import (
	"bytes"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
)

// writer logs one batch.
type writer struct {
	c     *Copier
	s     Stream
	b     *Buffers
	total uint64

	begun bool  // the note says writing
	lost  bool  // given up: the batch is dropped
	start int64 // offset of the batch in the log
	at    int64 // offset of the next write
	since time.Time
}

// run formats and writes the total bytes that lie in the scratch pipe, and
// leaves the unfinished line in the memfd and its length in the note, which
// the caller then saves.
func (w *writer) run(total int) error {
	st := &w.c.streams[w.s]
	st.fmt.Stamp(w.s, w.c.clock())
	rest := int(st.note.carry) // bytes of the unfinished line before carryRoom
	loaded, fresh := rest == 0, true
	for left := total; left > 0; {
		n, err := w.read(min(left, rawRoom))
		if err != nil {
			return err
		}
		left -= n
		in := w.b.raw[carryRoom : carryRoom+n]
		if fresh && left == 0 && rest+n <= MaxContent && bytes.IndexByte(in, '\n') < 0 {
			return w.extendCarry(in)
		}
		fresh = false
		if !loaded {
			if err := w.loadCarry(carryRoom); err != nil {
				return err
			}
			loaded = true
		}
		src := w.b.raw[carryRoom-rest : carryRoom+n]
		used, err := w.records(src)
		if err != nil {
			return err
		}
		if w.c.tap != nil {
			w.c.tap(w.s, in)
		}
		rest = len(src) - used
		copy(w.b.raw[carryRoom-rest:carryRoom], src[used:])
	}
	w.finish()
	return w.storeCarry(w.b.raw[carryRoom-rest : carryRoom])
}

// records writes all records that src completes.
func (w *writer) records(src []byte) (used int, err error) {
	st := &w.c.streams[w.s]
	for {
		out, n := st.fmt.Append(w.b.out[:0:len(w.b.out)], src[used:])
		if n == 0 {
			return used, nil
		}
		used += n
		if err := w.write(out); err != nil {
			return used, err
		}
		if w.c.records != nil {
			w.c.records(w.s, out)
		}
	}
}

// read takes exactly n bytes from the scratch pipe.
func (w *writer) read(n int) (int, error) {
	for {
		m, err := unix.Read(w.b.scratch[0], w.b.raw[carryRoom:carryRoom+n])
		if err == unix.EINTR {
			continue
		}
		if err != nil || m == 0 {
			return 0, errs.New(errs.Internal, "read the scratch pipe: %d bytes, %w", m, err)
		}
		return m, nil
	}
}

// write appends out to the log. A log that cannot be written is not an error:
// the batch is lost then, and counted.
func (w *writer) write(out []byte) error {
	if w.c.files.Log < 0 || w.lost || len(out) == 0 {
		return nil
	}
	if !w.begun {
		if err := w.begin(); err != nil || w.lost {
			return err
		}
	}
	for len(out) > 0 {
		n, err := w.put(out)
		if n > 0 {
			out = out[n:]
			w.at += int64(n)
		}
		if err != nil && !w.again() {
			w.giveUp()
			return nil
		}
	}
	return nil
}

// begin notes where the batch starts in the log.
func (w *writer) begin() error {
	st := &w.c.streams[w.s]
	for !w.prepared() {
		if !w.again() {
			w.giveUp()
			return nil
		}
	}
	w.begun = true
	st.note.offset = w.start
	return w.c.save(w.s, w.b, writing)
}

// prepared finds the end of the log, after what a failed batch has left there
// is cut off.
func (w *writer) prepared() bool {
	if !w.c.regular {
		return true
	}
	for s := Stdout; s <= Stderr; s++ {
		n := &w.c.streams[s].note
		if n.flags&flagRepair == 0 {
			continue
		}
		if w.c.cutBack(n.offset) != nil {
			return false
		}
		// Noted before anything is written behind that offset.
		n.set(flagRepair, false)
		if w.c.save(s, w.b, n.phase) != nil {
			n.set(flagRepair, true)
			return false
		}
	}
	var st unix.Stat_t
	if unix.Fstat(w.c.files.Log, &st) != nil {
		return false
	}
	w.start, w.at = st.Size, st.Size
	return true
}

func (w *writer) put(p []byte) (int, error) {
	for {
		var n int
		var err error
		if w.c.regular {
			n, err = unix.Pwrite(w.c.files.Log, p, w.at)
		} else {
			n, err = unix.Write(w.c.files.Log, p)
		}
		if err == unix.EINTR {
			continue
		}
		if n < 0 {
			n = 0
		}
		if n == 0 && err == nil {
			err = unix.EIO
		}
		return n, err
	}
}

// again waits before another try. It reports false when patience is at its
// end; a log that failed before gets one try per batch, so that a full disk
// does not slow the container down to a batch every two seconds.
func (w *writer) again() bool {
	if w.c.failing {
		return false
	}
	now := time.Now()
	if w.since.IsZero() {
		w.since = now
	}
	spent := now.Sub(w.since)
	if spent >= Patience {
		return false
	}
	time.Sleep(min(max(spent, retryMin), retryMax))
	return true
}

// giveUp drops the batch: no half record stays in the log.
func (w *writer) giveUp() {
	n := &w.c.streams[w.s].note
	w.lost, w.c.failing = true, true
	if w.begun && w.c.cutBack(w.start) != nil {
		n.offset = w.start
		n.set(flagRepair, true)
	}
}

// finish counts the batch.
func (w *writer) finish() {
	switch {
	case w.lost:
		w.c.streams[w.s].note.dropped += w.total
	case w.begun:
		w.c.failing = false
	}
}

// cutBack cuts the log back to offset. A file that is shorter already was
// truncated by somebody else and is left alone.
func (c *Copier) cutBack(offset int64) error {
	if !c.regular {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(c.files.Log, &st); err != nil {
		return err
	}
	if st.Size <= offset {
		return nil
	}
	return unix.Ftruncate(c.files.Log, offset)
}

// loadCarry reads the unfinished line so that it ends at raw[end].
func (w *writer) loadCarry(end int) error {
	n := &w.c.streams[w.s].note
	p := w.b.raw[end-int(n.carry) : end]
	m, err := unix.Pread(w.c.files.State, p, carryAt(w.s, n.slot()))
	if err != nil || m != len(p) {
		return errs.New(errs.Internal, "read the unfinished line: %d of %d bytes, %w", m, len(p), err)
	}
	return nil
}

// extendCarry appends to the unfinished line, in its place: the note's length
// decides what counts. So single bytes cost no copy of the whole line.
func (w *writer) extendCarry(in []byte) error {
	n := &w.c.streams[w.s].note
	if err := w.putCarry(in, carryAt(w.s, n.slot())+int64(n.carry)); err != nil {
		return err
	}
	if w.c.tap != nil {
		w.c.tap(w.s, in)
	}
	n.carry += uint32(len(in))
	return nil
}

// storeCarry writes the unfinished line to the place that does not count yet.
func (w *writer) storeCarry(rest []byte) error {
	st := &w.c.streams[w.s]
	slot := 1 - st.note.slot()
	if err := w.putCarry(rest, carryAt(w.s, slot)); err != nil {
		return err
	}
	st.note.carry = uint32(len(rest))
	st.note.set(flagSlot, slot == 1)
	st.note.set(flagMid, st.fmt.Mid)
	return nil
}

func (w *writer) putCarry(p []byte, at int64) error {
	if len(p) == 0 {
		return nil
	}
	if m, err := unix.Pwrite(w.c.files.State, p, at); err != nil || m != len(p) {
		return errs.New(errs.Internal, "keep the unfinished line: %d of %d bytes, %w", m, len(p), err)
	}
	return nil
}
