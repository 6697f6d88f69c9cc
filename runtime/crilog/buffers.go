package crilog

import (
	"errors"

	"golang.org/x/sys/unix"
)

// Sizes of one set of buffers. They fit a core's second-level cache; of an
// idle set nothing but the first pages is resident.
const (
	noteRoom  = 4 << 10
	carryRoom = MaxContent
	rawRoom   = 96 << 10
	outRoom   = 256 << 10
	bufRoom   = noteRoom + carryRoom + rawRoom + outRoom
)

// pipeMax is what pipes of a busy stream are grown to: the most that a process
// without CAP_SYS_RESOURCE may ask for (/proc/sys/fs/pipe-max-size).
const pipeMax = 1 << 20

// Buffers are what a Copier needs while it copies. They lie outside the Go
// heap in a mapping that children do not inherit (MADV_DONTFORK): the output
// of one container must not be found in the memory of another one's first
// process, which is a copy of the worker's.
type Buffers struct {
	mem     []byte
	note    []byte // scratch of one note; aligned, so that it never crosses a page
	raw     []byte // carryRoom in front: an unfinished line goes right before what was read
	out     []byte
	scratch [2]int // pipe for tee
	touched bool
}

// NewBuffers makes a set.
func NewBuffers() (*Buffers, error) {
	mem, err := unix.Mmap(-1, 0, bufRoom, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, err
	}
	b := &Buffers{mem: mem, scratch: [2]int{-1, -1}}
	if err := unix.Madvise(mem, unix.MADV_DONTFORK); err != nil {
		b.Close()
		return nil, err
	}
	b.note = mem[:noteSize]
	b.raw = mem[noteRoom : noteRoom+carryRoom+rawRoom]
	b.out = mem[noteRoom+carryRoom+rawRoom:]
	if err := b.newScratch(); err != nil {
		b.Close()
		return nil, err
	}
	return b, nil
}

// newScratch replaces the scratch pipe, as large as may be.
func (b *Buffers) newScratch() error {
	b.closeScratch()
	if err := unix.Pipe2(b.scratch[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		b.scratch = [2]int{-1, -1}
		return err
	}
	_, _ = unix.FcntlInt(uintptr(b.scratch[1]), unix.F_SETPIPE_SZ, pipeMax)
	return nil
}

func (b *Buffers) closeScratch() {
	for i, fd := range b.scratch {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
		b.scratch[i] = -1
	}
}

// Trim gives the memory back to the kernel; the set stays usable.
func (b *Buffers) Trim() {
	if b.touched {
		_ = unix.Madvise(b.mem, unix.MADV_DONTNEED)
		b.touched = false
	}
}

// Close frees the set.
func (b *Buffers) Close() {
	b.closeScratch()
	if b.mem != nil {
		_ = unix.Munmap(b.mem)
		b.mem = nil
	}
}

func pipeSize(fd int) int {
	n, err := unix.FcntlInt(uintptr(fd), unix.F_GETPIPE_SZ, 0)
	if err != nil {
		return 0
	}
	return n
}

// pending returns how many bytes lie in a pipe or terminal.
func pending(fd int) int {
	n, err := unix.IoctlGetInt(fd, unix.TIOCINQ)
	if err != nil {
		return 0
	}
	return n
}

var errScratch = errors.New("the scratch pipe is smaller than the staging pipe")

// Touched reports whether Trim would give back more than a few pages.
func (b *Buffers) Touched() bool { return b.touched }
