package crilog

import (
	"encoding/binary"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
)

// The memfd of one container, version 1:
//
//	0      note of stdout (noteSize bytes)
//	64     note of stderr
//	128    the fields of the journal (journal.go)
//	4096   carry 0 of stdout (MaxContent bytes), 1 of stdout, 0 of stderr, 1 of stderr
//
// A note is written with one pwrite of 64 bytes that lie within one page on
// both sides, which SIGKILL cannot tear (signals are looked at between pages,
// mm/filemap.c generic_perform_write). The memfd is not mapped: nothing of it
// is in the memory that children copy, and a quiet container costs one page.
const (
	noteSize  = 64
	carryBase = 4096
	stateSize = carryBase + 4*MaxContent
	noteMagic = 0x4c4e0001 // "NL", version 1
)

type phase uint32

const (
	idle phase = iota
	writing
	done
)

const (
	flagSlot   = 1 << iota // which of the two carries counts
	flagMid                // the last record had the tag P
	flagRepair             // the log must be cut back to offset before the next write
)

// note is how far the copier is with one stream.
type note struct {
	phase   phase
	flags   uint32
	carry   uint32 // bytes of the unfinished line
	offset  int64  // of the log: where the batch begins
	dropped uint64 // output bytes that could not be written
}

func (n *note) slot() int { return int(n.flags & flagSlot) }

func (n *note) set(flag uint32, on bool) {
	if on {
		n.flags |= flag
	} else {
		n.flags &^= flag
	}
}

func (n *note) put(p []byte) {
	le := binary.LittleEndian
	le.PutUint32(p[0:], noteMagic)
	le.PutUint32(p[4:], uint32(n.phase))
	le.PutUint32(p[8:], n.flags)
	le.PutUint32(p[12:], n.carry)
	le.PutUint64(p[16:], uint64(n.offset))
	le.PutUint64(p[24:], n.dropped)
	clear(p[32:noteSize])
}

func parseNote(p []byte) (note, error) {
	le := binary.LittleEndian
	if len(p) != noteSize {
		return note{}, errs.New(errs.Internal, "log note of %d bytes", len(p))
	}
	n := note{
		phase: phase(le.Uint32(p[4:])), flags: le.Uint32(p[8:]), carry: le.Uint32(p[12:]),
		offset: int64(le.Uint64(p[16:])), dropped: le.Uint64(p[24:]),
	}
	switch m := le.Uint32(p); {
	case m == 0 && n == (note{}):
		return note{}, nil // never written
	case m != noteMagic, n.phase > done, n.carry > MaxContent, n.offset < 0:
		return note{}, errs.New(errs.Internal, "log note is not one of this release")
	}
	return n, nil
}

func carryAt(s Stream, slot int) int64 {
	return carryBase + int64(2*int(s)+slot)*MaxContent
}

// NewState makes the memfd of one container.
func NewState() (int, error) {
	fd, err := unix.MemfdCreate("naru-log", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_NOEXEC_SEAL)
	if err == unix.EINVAL { // before kernel 6.3
		fd, err = unix.MemfdCreate("naru-log", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return -1, errs.New(errs.Internal, "make a memfd for the log state: %w", err)
	}
	if err := unix.Ftruncate(fd, stateSize); err != nil {
		_ = unix.Close(fd)
		return -1, errs.New(errs.Internal, "size the log state: %w", err)
	}
	return fd, nil
}

// NewStage makes a staging pipe: one descriptor, open for both directions, so
// that it costs its holders one slot each and never reports an end of file.
func NewStage() (int, error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return -1, errs.New(errs.Internal, "make a staging pipe: %w", err)
	}
	fd, err := unix.Open("/proc/self/fd/"+itoa(p[0]), unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	_ = unix.Close(p[0])
	_ = unix.Close(p[1])
	if err != nil {
		return -1, errs.New(errs.Internal, "open a staging pipe: %w", err)
	}
	return fd, nil
}

func itoa(n int) string {
	var b [20]byte
	i := len(b)
	for {
		i--
		b[i] = byte('0' + n%10)
		if n /= 10; n == 0 {
			return string(b[i:])
		}
	}
}
