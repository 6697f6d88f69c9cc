package seccomp

import (
	"cmp"
	"encoding/binary"
	"slices"

	"golang.org/x/sys/unix"
)

// Offsets in struct seccomp_data (linux/seccomp.h), little-endian.
const (
	offNr   = 0
	offArch = 4
	offArgs = 16
)

// reach is how far a conditional jump may go; the format has 8 bits, and some
// room is kept for what gets emitted between finding a target and jumping.
const reach = 250

// insn is struct sock_filter.
type insn struct {
	code   uint16
	jt, jf uint8
	k      uint32
}

// target is where control can go: an answer, or the instruction at pos.
// Positions count from the end of the program, which is written backwards:
// classic BPF jumps only forwards, so every target exists before its jump.
type target struct {
	answer bool
	ret    uint32
	pos    int
}

func returns(ret uint32) target { return target{answer: true, ret: ret} }

// segment says that numbers from at on, up to the next segment, go to to.
type segment struct {
	at uint64
	to target
}

// assembler writes a program from its end.
type assembler struct {
	code    []insn         // last instruction first
	returns map[uint32]int // newest position of an answer
	hops    map[int]int    // newest trampoline to a position
}

func newAssembler() *assembler {
	return &assembler{code: make([]insn, 0, 512), returns: map[uint32]int{}, hops: map[int]int{}}
}

func (a *assembler) len() int { return len(a.code) }

func (a *assembler) emit(i insn) target {
	a.code = append(a.code, i)
	return target{pos: len(a.code) - 1}
}

// near gives a position within reach of the next instruction that leads to t.
func (a *assembler) near(t target) int {
	n := len(a.code)
	if t.answer {
		if pos, ok := a.returns[t.ret]; ok && n-pos <= reach {
			return pos
		}
		a.returns[t.ret] = n
		return a.emit(insn{code: unix.BPF_RET | unix.BPF_K, k: t.ret}).pos
	}
	if n-t.pos <= reach {
		return t.pos
	}
	if pos, ok := a.hops[t.pos]; ok && n-pos <= reach {
		return pos
	}
	a.hops[t.pos] = n
	return a.emit(insn{code: unix.BPF_JMP | unix.BPF_JA, k: uint32(n - t.pos - 1)}).pos
}

// jump emits a comparison of the accumulator with k.
func (a *assembler) jump(code uint16, k uint32, yes, no target) target {
	if yes == no {
		return yes
	}
	y, n := a.near(yes), a.near(no)
	at := len(a.code)
	return a.emit(insn{code: unix.BPF_JMP | unix.BPF_K | code, k: k, jt: uint8(at - y - 1), jf: uint8(at - n - 1)})
}

// fall makes sure that the instruction emitted next falls through to t.
func (a *assembler) fall(t target) {
	n := len(a.code)
	switch {
	case t.answer:
		a.returns[t.ret] = n
		a.emit(insn{code: unix.BPF_RET | unix.BPF_K, k: t.ret})
	case t.pos != n-1:
		a.emit(insn{code: unix.BPF_JMP | unix.BPF_JA, k: uint32(n - t.pos - 1)})
	}
}

// load emits a load of one word, which then goes to next.
func (a *assembler) load(off uint32, next target) target {
	a.fall(next)
	return a.emit(insn{code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, k: off})
}

// tree emits a binary search of the accumulator among segments.
func (a *assembler) tree(segs []segment) target {
	slices.SortStableFunc(segs, func(x, y segment) int { return cmp.Compare(x.at, y.at) })
	merged := segs[:0]
	for i, s := range segs {
		if i+1 < len(segs) && segs[i+1].at == s.at {
			continue // empty
		}
		if len(merged) == 0 || merged[len(merged)-1].to != s.to {
			merged = append(merged, s)
		}
	}
	return a.search(merged)
}

func (a *assembler) search(segs []segment) target {
	switch {
	case len(segs) == 1:
		return segs[0].to
	case len(segs) == 3 && segs[0].to == segs[2].to && segs[2].at-segs[1].at == 1:
		return a.jump(unix.BPF_JEQ, uint32(segs[1].at), segs[1].to, segs[0].to)
	}
	mid := len(segs) / 2
	high := a.search(segs[mid:])
	low := a.search(segs[:mid])
	return a.jump(unix.BPF_JGE, uint32(segs[mid].at), high, low)
}

// dispatch emits the head of the program: the check of the architecture.
func (a *assembler) dispatch(m *machine, entries map[*abi]target) {
	load := func(b *abi) target { return a.load(offNr, entries[b]) }
	next := returns(retKillProcess)
	for _, b := range slices.Backward(m.compat) {
		if _, ok := entries[b]; ok {
			next = a.jump(unix.BPF_JEQ, b.audit, load(b), next)
		}
	}
	a.load(offArch, a.jump(unix.BPF_JEQ, m.native.audit, load(m.native), next))
}

// bytes gives the program in its final order.
func (a *assembler) bytes() []byte {
	out := make([]byte, 0, 8*len(a.code))
	for _, i := range slices.Backward(a.code) {
		out = binary.LittleEndian.AppendUint16(out, i.code)
		out = append(out, i.jt, i.jf)
		out = binary.LittleEndian.AppendUint32(out, i.k)
	}
	return out
}
