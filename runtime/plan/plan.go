// Package plan is the list of system calls that a container's first process,
// or an exec, makes between clone and execve.
//
// A container start needs no program: the parent writes a plan (operations,
// data, relocations) into a sealed memfd; Start clones a child on a copy of the
// caller's memory; the child maps the plan and makes the calls, one by one,
// with raw system calls only. Nothing of the Go runtime runs in it. The last
// operation is execve.
//
// A plan is data: made by pure code (Builder), printable (Dump), golden-tested,
// and each of its operations can be made to fail. What a plan refers to from
// outside are file descriptors by slot; slot 0 is the write end of the status
// pipe, into which the child writes Records: a failure with operation, stage
// and errno, or news that the plan itself writes.
//
// The parent never maps a plan: it carries the container's environment, which
// no other child may find in a copy of the parent's memory.
//
// Concurrency: a Builder belongs to one goroutine; Start may be called from many.
package plan

import (
	"encoding/binary"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
)

// Version of the plan format. Writer and runner must agree exactly: both sides
// of an upgrade carry the same or the next release, and the worker refuses a
// plan of another version with a sentence.
const Version = 1

// MaxSize bounds a plan in bytes: the kernel's own limit on arguments and
// environment (a quarter of an 8 MiB stack, execve(2)) with room for the rest.
const MaxSize = 8 << 20

const (
	magic      = 0x4e4c504e // "NPLN"
	headerSize = 64
	opSize     = 104
)

// header is the first 64 bytes of a plan, little-endian.
type header struct {
	magic, version uint32
	nops, nrelocs  uint32
	ops, relocs    uint64 // offsets
	size           uint64
	slots          uint32 // number of descriptors it wants
	_              uint32
	_              [16]byte
}

// How an argument word is to be read.
const (
	argImm    = iota // as it is
	argPtr           // offset in the plan; the child adds the base address
	argSlot          // number of a slot; the child takes the descriptor
	argResult        // number of an earlier operation; the child takes its result
	argLoad          // offset of four bytes in the plan; the child takes what is there
)

// What an operation does beside its call.
const (
	flagMayFail = 1 << iota // errnos in allow do not end the plan (allow all zero: any)
	flagExpect              // the result must equal expect
	flagStore4              // store the result, 4 bytes wide, at store
	flagStore8              // the same, 8 bytes wide
	flagJumpPos             // result > 0: go on at jump (parent's side of a clone)
	flagReslot              // the result becomes the descriptor of slot jump
)

// op is one operation in memory, exactly opSize bytes on every architecture.
type op struct {
	nr     uint32
	flags  uint32
	stage  uint32
	jump   uint32
	kind   [6]uint8
	_      [2]uint8
	args   [6]uint64
	allow  [4]uint16
	expect int64
	store  uint64
	result int64 // written by the child
}

// Ref is the offset of data within a plan. The zero Ref is a nil pointer.
type Ref uint64

// Arg is one argument of an operation.
type Arg struct {
	kind uint8
	val  uint64
}

// Int is a number as argument.
func Int[T ~int | ~int32 | ~int64 | ~uint | ~uint32 | ~uint64 | ~uintptr](v T) Arg {
	return Arg{argImm, uint64(v)}
}

// Ptr is a pointer to data of the plan, or nil for the zero Ref.
func Ptr(r Ref) Arg {
	if r == 0 {
		return Arg{argImm, 0}
	}
	return Arg{argPtr, uint64(r)}
}

// Slot is the descriptor in slot i.
func Slot(i int) Arg { return Arg{argSlot, uint64(i)} }

// Load is the 32-bit number that lies at r when the call is made.
func Load(r Ref) Arg { return Arg{argLoad, uint64(r)} }

// Op is one operation of a plan under construction.
type Op struct {
	index int
	o     op
}

// Result is what the operation will return, as argument of a later one.
func (o *Op) Result() Arg { return Arg{argResult, uint64(o.index)} }

// Index of the operation in its plan.
func (o *Op) Index() int { return o.index }

// MayFail lets the plan go on when the call fails with one of at most four
// errnos; with none given, any.
func (o *Op) MayFail(errnos ...unix.Errno) *Op {
	if len(errnos) > len(o.o.allow) {
		panic("plan: more than four errnos to allow")
	}
	o.o.flags |= flagMayFail
	for i, e := range errnos {
		o.o.allow[i] = uint16(e)
	}
	return o
}

// Expect makes any other result than v a failure with errno 0.
func (o *Op) Expect(v int64) *Op {
	o.o.flags |= flagExpect
	o.o.expect = v
	return o
}

// Store writes the result, width 4 or 8 bytes, at r when the call is done.
func (o *Op) Store(r Ref, width int) *Op {
	switch width {
	case 4:
		o.o.flags |= flagStore4
	case 8:
		o.o.flags |= flagStore8
	default:
		panic("plan: store width must be 4 or 8")
	}
	o.o.store = uint64(r)
	return o
}

// Reslot makes the result the descriptor of slot i from here on: for dup3.
func (o *Op) Reslot(i int) *Op {
	o.o.flags |= flagReslot
	o.o.jump = uint32(i)
	return o
}

// Builder collects operations and data.
type Builder struct {
	ops   []*Op
	data  []byte
	ptrs  []Ref // words in data that hold a Ref
	strs  map[Ref]string
	slots []string
}

// dataBase is added to data offsets while building, so that no Ref is zero and
// Seal can tell data from the rest; Seal moves data to its final place.
const dataBase = 1 << 32

// New returns an empty plan whose slots have the given names (for Dump). Slot
// 0 must be the status pipe.
func New(slots ...string) *Builder {
	return &Builder{slots: slots, strs: map[Ref]string{}}
}

// AddSlot adds a slot and returns its number.
func (b *Builder) AddSlot(name string) int {
	b.slots = append(b.slots, name)
	return len(b.slots) - 1
}

// Slots returns how many slots the plan has.
func (b *Builder) Slots() int { return len(b.slots) }

// Data puts bytes into the plan, aligned to 8.
func (b *Builder) Data(p []byte) Ref {
	for len(b.data)%8 != 0 {
		b.data = append(b.data, 0)
	}
	r := Ref(dataBase + len(b.data))
	b.data = append(b.data, p...)
	return r
}

// Str puts a NUL-terminated string into the plan. s must not hold a NUL.
func (b *Builder) Str(s string) Ref {
	r := Ref(dataBase + len(b.data))
	b.data = append(b.data, s...)
	b.data = append(b.data, 0)
	b.strs[r] = s
	return r
}

// Strs puts a NULL-terminated vector of strings into the plan, as execve wants.
func (b *Builder) Strs(ss []string) Ref {
	refs := make([]Ref, len(ss))
	for i, s := range ss {
		refs[i] = b.Str(s)
	}
	v := b.Data(make([]byte, 8*(len(ss)+1)))
	for i, r := range refs {
		b.SetPtr(v, 8*i, r)
	}
	b.strs[v] = fmt.Sprintf("%d strings", len(ss))
	return v
}

// SetPtr makes the word at r+off a pointer to target.
func (b *Builder) SetPtr(r Ref, off int, target Ref) {
	at := int(r-dataBase) + off
	binary.LittleEndian.PutUint64(b.data[at:], uint64(target))
	b.ptrs = append(b.ptrs, r+Ref(off))
}

// PutUint16 sets the two bytes at r.
func (b *Builder) PutUint16(r Ref, v uint16) {
	binary.LittleEndian.PutUint16(b.data[int(r-dataBase):], v)
}

// Sys adds a system call.
func (b *Builder) Sys(s Stage, nr uintptr, args ...Arg) *Op {
	o := &Op{index: len(b.ops)}
	o.o.nr, o.o.stage = uint32(nr), uint32(s)
	for i, a := range args {
		o.o.kind[i], o.o.args[i] = a.kind, a.val
	}
	b.ops = append(b.ops, o)
	return o
}

// Clone adds a second clone (clone3 without CLONE_VM). The child goes on with
// the next operation; the parent tells the child's pid by a KindPID record and
// exits with status 0. The child waits for that: no record of its own can be
// read before its pid. Until then both are in a process group of their own, by
// which a child can be reaped whose pid was never told.
func (b *Builder) Clone(flags uint64, exitSignal unix.Signal) {
	args := b.Data(make([]byte, cloneArgsSize))
	at := int(args - dataBase)
	binary.LittleEndian.PutUint64(b.data[at:], flags|unix.CLONE_CLEAR_SIGHAND)
	binary.LittleEndian.PutUint64(b.data[at+cloneArgsExitSignal:], uint64(exitSignal))
	pipe, buf, one := b.Data(make([]byte, 8)), b.Data(make([]byte, 8)), b.Data([]byte{1})
	r, w := Load(pipe), Load(pipe+4)
	b.Sys(StageClone, unix.SYS_SETPGID, Int(0), Int(0))
	b.Sys(StageClone, unix.SYS_PIPE2, Ptr(pipe), Int(unix.O_CLOEXEC))
	rec := b.Record(Record{Kind: KindPID})
	c := b.Sys(StageClone, unix.SYS_CLONE3, Ptr(args), Int(cloneArgsSize)).Store(rec+recordValue, 8)
	c.o.flags |= flagJumpPos
	// The child. End of file: its parent died before it had told the pid.
	b.Sys(StageClone, unix.SYS_CLOSE, w)
	b.Sys(StageClone, unix.SYS_READ, r, Ptr(buf), Int(1)).Expect(1)
	b.Sys(StageClone, unix.SYS_CLOSE, r)
	// getpid always has a positive result: a jump over the parent's part.
	skip := b.Sys(StageClone, unix.SYS_GETPID)
	skip.o.flags |= flagJumpPos
	c.o.jump = uint32(len(b.ops))
	b.Send(StageClone, rec)
	b.Sys(StageClone, unix.SYS_WRITE, w, Ptr(one), Int(1)).Expect(1)
	b.Sys(StageClone, unix.SYS_EXIT_GROUP, Int(0))
	skip.o.jump = uint32(len(b.ops))
}

// Sabotage shows each kind of call of each stage, once, and makes the first
// call of those fail that it is told to: a system call that no kernel has.
func (b *Builder) Sabotage(breaks func(op string) bool) {
	seen := map[string]bool{}
	for _, o := range b.ops {
		name := Stage(o.o.stage).String() + " " + callName(o.o.nr)
		if !seen[name] && breaks(name) {
			o.o.nr, o.o.flags = 1<<20, 0
		}
		seen[name] = true
	}
}

// Record puts a status record into the plan, to be filled by Store and sent.
func (b *Builder) Record(r Record) Ref {
	p := make([]byte, RecordSize)
	r.put(p)
	return b.Data(p)
}

// Send writes a status record that lies at r.
func (b *Builder) Send(s Stage, r Ref) *Op {
	return b.Sys(s, unix.SYS_WRITE, Slot(0), Ptr(r), Int(RecordSize)).Expect(RecordSize)
}

// Seal lays the plan out as one block of bytes.
func (b *Builder) Seal() ([]byte, error) {
	opsAt := uint64(headerSize)
	relocsAt := opsAt + uint64(len(b.ops))*opSize
	dataAt := relocsAt + uint64(len(b.ptrs))*8
	dataAt = (dataAt + 15) &^ 15
	size := dataAt + uint64(len(b.data))
	if size > MaxSize {
		return nil, errs.New(errs.InvalidArgument, "arguments and environment take %d bytes, more than the %d that one start may carry", size, MaxSize)
	}
	out := make([]byte, size)
	le := binary.LittleEndian
	le.PutUint32(out[0:], magic)
	le.PutUint32(out[4:], Version)
	le.PutUint32(out[8:], uint32(len(b.ops)))
	le.PutUint32(out[12:], uint32(len(b.ptrs)))
	le.PutUint64(out[16:], opsAt)
	le.PutUint64(out[24:], relocsAt)
	le.PutUint64(out[32:], size)
	le.PutUint32(out[40:], uint32(len(b.slots)))
	final := func(r uint64) uint64 { return r - dataBase + dataAt }
	for i, o := range b.ops {
		p := out[opsAt+uint64(i)*opSize:]
		le.PutUint32(p[0:], o.o.nr)
		le.PutUint32(p[4:], o.o.flags)
		le.PutUint32(p[8:], o.o.stage)
		le.PutUint32(p[12:], o.o.jump)
		copy(p[16:22], o.o.kind[:])
		for j, a := range o.o.args {
			if o.o.kind[j] == argPtr || o.o.kind[j] == argLoad {
				a = final(a)
			}
			le.PutUint64(p[24+8*j:], a)
		}
		for j, e := range o.o.allow {
			le.PutUint16(p[72+2*j:], e)
		}
		le.PutUint64(p[80:], uint64(o.o.expect))
		if o.o.store != 0 {
			le.PutUint64(p[88:], final(o.o.store))
		}
	}
	copy(out[dataAt:], b.data)
	for i, r := range b.ptrs {
		at := final(uint64(r))
		le.PutUint64(out[relocsAt+uint64(i)*8:], at)
		le.PutUint64(out[at:], final(le.Uint64(out[at:])))
	}
	return out, nil
}

// Memfd writes the plan into a sealed memfd (memfd_create(2)).
func (b *Builder) Memfd() (*os.File, error) {
	p, err := b.Seal()
	if err != nil {
		return nil, err
	}
	fd, err := unix.MemfdCreate("naru-plan", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, errs.New(errs.Internal, "make a memfd for the plan: %w", err)
	}
	f := os.NewFile(uintptr(fd), "naru-plan")
	if _, err := f.Write(p); err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SEAL|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_WRITE)
		if err == nil {
			clear(p)
			return f, nil
		}
	}
	_ = f.Close()
	return nil, errs.New(errs.Internal, "write the plan: %w", err)
}
