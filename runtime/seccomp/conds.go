package seccomp

import (
	"encoding/binary"
	"slices"

	"golang.org/x/sys/unix"
)

// ruleCompiler emits the code for the rules of system calls of one ABI. Equal
// lists share their code.
type ruleCompiler struct {
	a      *assembler
	narrow bool
	def    target
	memo   map[string]target
	splits int // spent on search trees; a bound on work for hostile profiles
}

const (
	maxSplits = 512 // per ABI
	maxParts  = 8   // different remainders of one split
)

// compile emits code that answers by the first rule that matches.
func (c *ruleCompiler) compile(rs []rule) target {
	if len(rs) == 0 {
		return c.def
	}
	if len(rs[0].conds) == 0 {
		return returns(rs[0].ret)
	}
	k := key(rs)
	if t, ok := c.memo[k]; ok {
		return t
	}
	t, ok := c.split(rs)
	if !ok {
		t = c.chain(rs)
	}
	c.memo[k] = t
	return t
}

// chain emits the first rule as a chain of tests that falls to the others.
func (c *ruleCompiler) chain(rs []rule) target {
	no := c.compile(rs[1:])
	yes := returns(rs[0].ret)
	for _, cd := range slices.Backward(rs[0].conds) {
		yes = c.test(cd, yes, no)
	}
	return yes
}

// split emits a search on the argument of the first condition, when all rules
// only compare it with values that fit a word: what is left of the rules in
// each range is mostly an answer. Families of rules like "socket with family 1,
// 2, 3 …" become a few instructions.
func (c *ruleCompiler) split(rs []rule) (target, bool) {
	arg := rs[0].conds[0].arg
	borders, ok := cuts(rs, arg)
	if !ok || c.splits >= maxSplits {
		return target{}, false
	}
	c.splits++
	parts := map[string]bool{}
	rest := make([][]rule, len(borders))
	for i, v := range borders {
		rest[i] = assume(rs, arg, v)
		if len(rest[i]) > 0 && len(rest[i][0].conds) > 0 {
			parts[key(rest[i])] = true
		}
	}
	if len(parts) > maxParts {
		return target{}, false
	}
	segs := make([]segment, len(borders))
	for i, v := range borders {
		segs[i] = segment{at: v, to: c.compile(rest[i])}
	}
	above := segs[len(segs)-1].to // of values that do not fit a word
	off := offArgs + 8*uint32(arg)
	low := c.a.tree(segs[:len(segs)-1])
	if !low.answer {
		low = c.a.load(off, low)
	}
	if c.narrow {
		return low, true
	}
	t := c.a.jump(unix.BPF_JEQ, 0, low, above)
	if t == low {
		return low, true
	}
	return c.a.load(off+4, t), true
}

// cuts lists where an argument's value changes the outcome of conditions on
// it: 0, then each border in order, then 1<<32 for all that is above a word.
func cuts(rs []rule, arg uint8) ([]uint64, bool) {
	const top = 1 << 32
	out := []uint64{0, top}
	for _, r := range rs {
		for _, cd := range r.conds {
			if cd.arg != arg {
				continue
			}
			if cd.op == opMasked || cd.a >= top {
				return nil, false
			}
			switch cd.op {
			case opLT, opGE:
				out = append(out, cd.a)
			case opLE, opGT:
				out = append(out, cd.a+1)
			default:
				out = append(out, cd.a, cd.a+1)
			}
		}
	}
	slices.Sort(out)
	return slices.Compact(out), true
}

// assume gives what is left of rules when the argument has the value v.
func assume(rs []rule, arg uint8, v uint64) []rule {
	var out []rule
next:
	for _, r := range rs {
		left := rule{ret: r.ret}
		for _, cd := range r.conds {
			if cd.arg != arg {
				left.conds = append(left.conds, cd)
			} else if !cd.holds(v) {
				continue next
			}
		}
		out = append(out, left)
		if len(left.conds) == 0 {
			break
		}
	}
	return out
}

// test emits one condition.
func (c *ruleCompiler) test(cd cond, yes, no target) target {
	if yes == no {
		return yes
	}
	lo, hi := uint32(cd.a), uint32(cd.a>>32)
	switch cd.op {
	case opEQ:
		return c.compare(cd.arg, unix.BPF_JEQ, hi, lo, yes, no)
	case opNE:
		return c.compare(cd.arg, unix.BPF_JEQ, hi, lo, no, yes)
	case opGT:
		return c.compare(cd.arg, unix.BPF_JGT, hi, lo, yes, no)
	case opGE:
		return c.compare(cd.arg, unix.BPF_JGE, hi, lo, yes, no)
	case opLT:
		return c.compare(cd.arg, unix.BPF_JGE, hi, lo, no, yes)
	case opLE:
		return c.compare(cd.arg, unix.BPF_JGT, hi, lo, no, yes)
	}
	off := offArgs + 8*uint32(cd.arg)
	t := yes
	if lo != 0 {
		t = c.masked(off, lo, uint32(cd.b), t, no)
	}
	if hi != 0 {
		t = c.masked(off+4, hi, uint32(cd.b>>32), t, no)
	}
	return t
}

// masked emits "word & mask == want".
func (c *ruleCompiler) masked(off, mask, want uint32, yes, no target) target {
	t := c.a.jump(unix.BPF_JEQ, want, yes, no)
	if mask != 1<<32-1 {
		c.a.fall(t)
		t = c.a.emit(insn{code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, k: mask})
	}
	return c.a.load(off, t)
}

// compare emits a comparison of a whole argument with the value hi:lo.
func (c *ruleCompiler) compare(arg uint8, code uint16, hi, lo uint32, yes, no target) target {
	off := offArgs + 8*uint32(arg)
	t := c.a.load(off, c.a.jump(code, lo, yes, no))
	if c.narrow {
		return t
	}
	t = c.a.jump(unix.BPF_JEQ, hi, t, no) // equal upper words: the lower ones decide
	if code != unix.BPF_JEQ {
		t = c.a.jump(unix.BPF_JGT, hi, yes, t)
	}
	return c.a.load(off+4, t)
}

// key identifies a list of rules.
func key(rs []rule) string {
	var b []byte
	for _, r := range rs {
		b = binary.LittleEndian.AppendUint32(b, r.ret)
		b = append(b, byte(len(r.conds)))
		for _, cd := range r.conds {
			b = append(b, cd.arg, byte(cd.op))
			b = binary.LittleEndian.AppendUint64(b, cd.a)
			b = binary.LittleEndian.AppendUint64(b, cd.b)
		}
	}
	return string(b)
}
