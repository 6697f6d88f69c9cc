package seccomp

import (
	"cmp"
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
)

// Answers of a filter (linux/seccomp.h): the action in the upper half, data in
// the lower.
const (
	retKillProcess = 0x80000000
	retKillThread  = 0x00000000
	retTrap        = 0x00030000
	retErrno       = 0x00050000
	retTrace       = 0x7ff00000
	retLog         = 0x7ffc0000
	retAllow       = 0x7fff0000

	maxErrno = 4095 // MAX_ERRNO: the kernel cuts larger ones to this
)

// op is a comparison of an argument with a value.
type op uint8

const (
	opEQ op = iota
	opNE
	opLT
	opLE
	opGT
	opGE
	opMasked // arg & a == b
)

var ops = map[specs.LinuxSeccompOperator]op{
	specs.OpEqualTo: opEQ, specs.OpNotEqual: opNE, specs.OpLessThan: opLT, specs.OpLessEqual: opLE,
	specs.OpGreaterThan: opGT, specs.OpGreaterEqual: opGE, specs.OpMaskedEqual: opMasked,
}

// cond is one condition on one argument.
type cond struct {
	arg  uint8
	op   op
	a, b uint64
}

// holds reports whether the condition is true of the value v.
func (c cond) holds(v uint64) bool {
	switch c.op {
	case opEQ:
		return v == c.a
	case opNE:
		return v != c.a
	case opLT:
		return v < c.a
	case opLE:
		return v <= c.a
	case opGT:
		return v > c.a
	case opGE:
		return v >= c.a
	default:
		return v&c.a == c.b
	}
}

// rule answers ret when all its conditions hold.
type rule struct {
	conds []cond
	ret   uint32
}

// stricter orders answers as the kernel ranks those of stacked filters: the
// smaller as a signed number wins (kernel/seccomp.c, seccomp_run_filters).
func stricter(a, b uint32) int {
	return cmp.Compare(int32(a&0xffff0000), int32(b&0xffff0000))
}

// permissive answers let the system call run.
func permissive(ret uint32) bool {
	switch ret & 0xffff0000 {
	case retAllow, retLog, retTrace:
		return true
	}
	return false
}

// answer translates an OCI action.
func answer(a specs.LinuxSeccompAction, errno *uint) (uint32, error) {
	data := uint32(unix.EPERM)
	if errno != nil {
		if *errno > maxErrno {
			return 0, errs.New(errs.InvalidArgument, "read seccomp action %s: errno %d is above %d", a, *errno, maxErrno)
		}
		data = uint32(*errno)
	}
	switch a {
	case specs.ActAllow:
		return retAllow, nil
	case specs.ActErrno:
		return retErrno | data, nil
	case specs.ActKill, specs.ActKillThread:
		return retKillThread, nil
	case specs.ActKillProcess:
		return retKillProcess, nil
	case specs.ActTrap:
		return retTrap, nil
	case specs.ActTrace:
		return retTrace | data, nil
	case specs.ActLog:
		return retLog, nil
	case specs.ActNotify:
		return 0, errs.New(errs.Unimplemented, "read seccomp action %s: there is no notify agent", a)
	}
	return 0, errs.New(errs.InvalidArgument, "read seccomp profile: unknown action %q", a)
}

// conditions translates the arguments of an OCI rule, sorted, and refuses what
// can never hold.
func conditions(args []specs.LinuxSeccompArg) ([]cond, error) {
	conds := make([]cond, 0, len(args))
	for _, a := range args {
		o, ok := ops[a.Op]
		if !ok {
			return nil, errs.New(errs.InvalidArgument, "read seccomp condition: unknown operator %q", a.Op)
		}
		if a.Index > 5 {
			return nil, errs.New(errs.InvalidArgument, "read seccomp condition: a system call has no argument %d", a.Index)
		}
		conds = append(conds, cond{arg: uint8(a.Index), op: o, a: a.Value, b: a.ValueTwo})
		if o != opMasked {
			conds[len(conds)-1].b = 0
		}
	}
	slices.SortStableFunc(conds, func(x, y cond) int { return cmp.Compare(x.arg, y.arg) })
	conds = slices.Compact(conds)
	for i := 0; i < len(conds); {
		j := i
		for j < len(conds) && conds[j].arg == conds[i].arg {
			j++
		}
		if never(conds[i:j]) {
			return nil, errs.New(errs.InvalidArgument,
				"read seccomp rule: its conditions on argument %d can never hold together (they are ANDed; write one rule for each alternative)", conds[i].arg)
		}
		i = j
	}
	return conds, nil
}

// never reports whether the conditions, all on one argument, exclude each
// other. It may miss an exclusion, it never invents one.
func never(conds []cond) bool {
	lo, hi := uint64(0), ^uint64(0)
	var mask, want uint64
	for _, c := range conds {
		switch c.op {
		case opEQ:
			lo, hi = max(lo, c.a), min(hi, c.a)
		case opLE:
			hi = min(hi, c.a)
		case opGE:
			lo = max(lo, c.a)
		case opLT:
			if c.a == 0 {
				return true
			}
			hi = min(hi, c.a-1)
		case opGT:
			if c.a == ^uint64(0) {
				return true
			}
			lo = max(lo, c.a+1)
		case opMasked:
			if c.b&^c.a != 0 || (want^c.b)&mask&c.a != 0 {
				return true
			}
			mask, want = mask|c.a, want|c.b
		}
	}
	if lo > hi {
		return true
	}
	if lo == hi {
		return slices.ContainsFunc(conds, func(c cond) bool { return !c.holds(lo) })
	}
	return false
}
