package seccomp

import (
	"maps"
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
)

// Options of Compile. The zero value is ready for use.
type Options struct {
	// Unknown, if not nil, is told each name that no ABI of the machine has,
	// once per rule that carries it. Such names have no effect.
	Unknown func(name string)
}

// MaxInstructions is the longest filter that the kernel takes (BPF_MAXINSNS).
const MaxInstructions = 4096

// filterFlags are the flags of seccomp(2) that make sense for a filter that
// the container's first process loads for itself.
var filterFlags = map[specs.LinuxSeccompFlag]uint32{
	"SECCOMP_FILTER_FLAG_TSYNC":       unix.SECCOMP_FILTER_FLAG_TSYNC,
	specs.LinuxSeccompFlagLog:         unix.SECCOMP_FILTER_FLAG_LOG,
	specs.LinuxSeccompFlagSpecAllow:   unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW,
	"SECCOMP_FILTER_FLAG_TSYNC_ESRCH": unix.SECCOMP_FILTER_FLAG_TSYNC_ESRCH,
}

// Compile translates a profile to a filter for the machine arch (a GOARCH:
// amd64 or arm64): struct sock_filter entries in the byte order of the machine
// (both are little-endian), for seccomp(2) SECCOMP_SET_MODE_FILTER with flags.
// The package documentation says what a profile means.
func Compile(p *specs.LinuxSeccomp, arch string, o Options) (filter []byte, flags uint32, err error) {
	m, pr, err := read(p, arch)
	if err != nil {
		return nil, 0, err
	}
	if o.Unknown != nil {
		pr.unknown(m, o.Unknown)
	}
	a := newAssembler()
	entries := map[*abi]target{}
	for _, b := range slices.Backward(m.compat) {
		if b.audit != m.native.audit && pr.listed[b.name] {
			entries[b] = a.tree(pr.segments(a, b))
		}
	}
	native := pr.segments(a, m.native)
	native = append(native, pr.x32(a, m)...)
	entries[m.native] = a.tree(native)
	a.dispatch(m, entries)
	if a.len() > MaxInstructions {
		return nil, 0, errs.New(errs.InvalidArgument,
			"compile seccomp profile: it needs %d instructions, the kernel takes %d; use fewer conditions", a.len(), MaxInstructions)
	}
	return a.bytes(), pr.flags, nil
}

// profile is an OCI profile whose words are all known to be good.
type profile struct {
	def    uint32
	flags  uint32
	listed map[specs.Arch]bool
	rules  []named
}

// named is a rule for some system calls. A rule without effect keeps its names:
// they are known to the author.
type named struct {
	names []string
	rule  rule
	noop  bool
}

// Check reports what is wrong with a profile, without compiling it.
func Check(p *specs.LinuxSeccomp, arch string) error {
	_, _, err := read(p, arch)
	return err
}

// read checks and translates a profile.
func read(p *specs.LinuxSeccomp, arch string) (*machine, *profile, error) {
	get, ok := machines[arch]
	if !ok {
		return nil, nil, errs.New(errs.Unimplemented, "compile seccomp profile: no system call table for %s", arch)
	}
	if p == nil {
		return nil, nil, errs.New(errs.InvalidArgument, "compile seccomp profile: there is none")
	}
	def, err := answer(p.DefaultAction, p.DefaultErrnoRet)
	if err != nil {
		return nil, nil, err
	}
	pr := &profile{def: def, listed: map[specs.Arch]bool{}}
	for _, a := range p.Architectures {
		if !architectures[a] {
			return nil, nil, errs.New(errs.InvalidArgument, "read seccomp profile: unknown architecture %q", a)
		}
		pr.listed[a] = true
	}
	for _, f := range p.Flags {
		bit, ok := filterFlags[f]
		if !ok {
			return nil, nil, errs.New(errs.InvalidArgument, "read seccomp profile: unsupported flag %q", f)
		}
		pr.flags |= bit
	}
	if p.ListenerPath != "" || p.ListenerMetadata != "" {
		return nil, nil, errs.New(errs.Unimplemented, "read seccomp profile: there is no notify agent to give listenerPath to")
	}
	for i, s := range p.Syscalls {
		n, err := readRule(s, def)
		if err != nil {
			return nil, nil, errs.New(errs.Of(err), "syscalls[%d]: %w", i, err)
		}
		pr.rules = append(pr.rules, n)
	}
	return get(), pr, nil
}

// readRule translates one entry of a profile's syscalls.
func readRule(s specs.LinuxSyscall, def uint32) (named, error) {
	if len(s.Names) == 0 || slices.Contains(s.Names, "") {
		return named{}, errs.New(errs.InvalidArgument, "read seccomp rule: it names no system call")
	}
	ret, err := answer(s.Action, s.ErrnoRet)
	if err != nil {
		return named{}, err
	}
	conds, err := conditions(s.Args)
	if err != nil {
		return named{}, err
	}
	return named{names: s.Names, rule: rule{conds: conds, ret: ret}, noop: ret == def && len(conds) == 0}, nil
}

func (pr *profile) unknown(m *machine, tell func(string)) {
	for _, n := range pr.rules {
		for _, s := range n.names {
			if !m.known(s) {
				tell(s)
			}
		}
	}
}

// table collects the rules of one ABI by system call number (without the x32
// bit), strictest first, and the highest ordinary number that the profile names.
func (pr *profile) table(b *abi) (rules map[uint32][]rule, last int64) {
	rules, last = make(map[uint32][]rule, len(b.nrs)), -1
	for _, n := range pr.rules {
		direct := n.rule
		var never bool
		if b.narrow {
			direct, never = narrow(direct)
		}
		for _, s := range n.names {
			nr, ok := b.nrs[s]
			if ok && nr < armPrivate {
				last = max(last, int64(nr))
			}
			if n.noop || never {
				continue
			}
			if ok {
				rules[nr] = append(rules[nr], direct)
			}
			if x, has := b.mux[s]; has {
				if r, ok := behind(n.rule, x, b, pr.def); ok {
					rules[x.nr] = append(rules[x.nr], r)
				}
			}
		}
	}
	for nr, rs := range rules {
		rules[nr] = order(rs)
	}
	return rules, last
}

// behind gives the rule for a multiplexer that stands for r behind it.
func behind(r rule, x mux, b *abi, def uint32) (rule, bool) {
	if len(r.conds) > 0 && stricter(r.ret, def) >= 0 {
		return rule{}, false
	}
	c := cond{op: opEQ, a: uint64(x.call)}
	if x.nr == b.nrs["ipc"] {
		// The upper half of ipc's first argument is a version.
		c = cond{op: opMasked, a: 0xffff, b: uint64(x.call)}
	}
	return rule{conds: []cond{c}, ret: r.ret}, true
}

// order sorts rules so that the first match is the right one, and drops those
// that can never be it.
func order(rs []rule) []rule {
	slices.SortStableFunc(rs, func(x, y rule) int { return stricter(x.ret, y.ret) })
	out := rs[:0]
	for _, r := range rs {
		if slices.ContainsFunc(out, func(o rule) bool { return o.ret == r.ret && slices.Equal(o.conds, r.conds) }) {
			continue
		}
		out = append(out, r)
		if len(r.conds) == 0 {
			break
		}
	}
	return out
}

// narrow rewrites a rule for 32-bit arguments: values above are decided here.
func narrow(r rule) (out rule, never bool) {
	out.ret = r.ret
	for _, c := range r.conds {
		const top = 1<<32 - 1
		switch {
		case c.op == opMasked && c.b > top, c.op != opMasked && c.a > top && !c.holds(0):
			return out, true // wants a bit that is not there
		case c.op == opMasked:
			c.a &= top
		case c.a > top:
			continue // true of every 32-bit value
		}
		out.conds = append(out.conds, c)
	}
	return out, false
}

// segments lists what each range of numbers of an ABI leads to; the code of
// the rules is emitted on the way.
func (pr *profile) segments(a *assembler, b *abi) []segment {
	rules, last := pr.table(b)
	other := func(nr int64) target { // a number without a rule
		if last >= 0 && nr > last && !permissive(pr.def) {
			return returns(retErrno | uint32(unix.ENOSYS))
		}
		return returns(pr.def)
	}
	c := &ruleCompiler{a: a, narrow: b.narrow, def: returns(pr.def), memo: map[string]target{}}
	segs := []segment{{at: uint64(b.bit), to: other(0)}}
	next := int64(0) // first number not covered yet
	gap := func(until int64) {
		if next < until {
			segs = append(segs, segment{at: uint64(next) | uint64(b.bit), to: other(next)})
			if last >= next && last+1 < until {
				segs = append(segs, segment{at: uint64(last+1) | uint64(b.bit), to: other(last + 1)})
			}
		}
	}
	for _, nr := range slices.Sorted(maps.Keys(rules)) {
		gap(int64(nr))
		segs = append(segs, segment{at: uint64(nr | b.bit), to: c.compile(rules[nr])})
		next = int64(nr) + 1
	}
	gap(1 << 31)
	return segs
}

// x32 lists the segments of the numbers with the x32 bit, on machines that share
// their audit architecture with x32.
func (pr *profile) x32(a *assembler, m *machine) []segment {
	for _, b := range m.compat {
		switch {
		case b.audit != m.native.audit:
		case pr.listed[b.name]:
			return pr.segments(a, b)
		default:
			return []segment{{at: uint64(b.bit), to: returns(retErrno | uint32(unix.ENOSYS))}}
		}
	}
	return nil
}
