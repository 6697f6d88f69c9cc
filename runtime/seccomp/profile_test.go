package seccomp

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	moby "github.com/moby/profiles/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/net/bpf"
)

// dockerCaps are the capabilities of an ordinary container.
var dockerCaps = []string{
	"CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_MKNOD",
	"CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT",
}

// adminCaps open most of the conditional parts of the default profile.
var adminCaps = append([]string{
	"CAP_SYS_ADMIN", "CAP_NET_ADMIN", "CAP_SYS_PTRACE", "CAP_BPF", "CAP_SYS_TIME", "CAP_SYS_NICE", "CAP_DAC_READ_SEARCH",
}, dockerCaps...)

// mobyProfile is moby's own profile as it stands, with all its ABIs.
func mobyProfile(t testing.TB, caps []string, arch string) *specs.LinuxSeccomp {
	t.Helper()
	base := moby.DefaultProfile()
	d := document{DefaultAction: base.DefaultAction, DefaultErrnoRet: base.DefaultErrnoRet, ArchMap: base.ArchMap}
	for _, s := range base.Syscalls {
		d.Syscalls = append(d.Syscalls, entry{
			Names: s.Names, Action: s.Action, ErrnoRet: s.ErrnoRet, Args: s.Args, Includes: s.Includes, Excludes: s.Excludes,
		})
	}
	p, err := d.resolve(environment{caps: caps, arch: arch, kernel: moby.KernelVersion{Kernel: 6, Major: 1}})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// vectors are the arguments that every number is tried with: families of
// sockets, personalities, flags of clone, and values around borders.
var vectors = func() (out [][6]uint64) {
	for f := range uint64(48) {
		out = append(out, [6]uint64{f})
	}
	for _, v := range []uint64{
		0x20000, 0x20008, 0xffffffff, 1 << 32, 1<<32 + 1, 1<<32 + 8, 1<<32 + 38, ^uint64(0), 1 << 63, 0xfffffffe, 0xffffffff00000000,
		0x20000000, 0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x40000000, 0x7e020000, 0x01200011, 0x3d0f00,
	} {
		out = append(out, [6]uint64{v}, [6]uint64{0, v}, [6]uint64{2, 1, v})
	}
	return append(out, [6]uint64{16, 3, 6}, [6]uint64{16, 3, 7}, [6]uint64{16, 3, 1<<32 + 6}, [6]uint64{1, 2, 3, 4, 5, 6})
}()

// machineABIs are the ABIs of an architecture with their audit numbers.
func machineABIs(goarch string) []*abi {
	m := machines[goarch]()
	return append([]*abi{m.native}, m.compat...)
}

// filterVM loads a filter into a BPF machine.
func filterVM(t testing.TB, filter []byte) *bpf.VM {
	t.Helper()
	if len(filter)%8 != 0 {
		t.Fatalf("%d bytes are not whole instructions", len(filter))
	}
	var prog []bpf.Instruction
	for f := range slices.Chunk(filter, 8) {
		raw := bpf.RawInstruction{Op: binary.LittleEndian.Uint16(f), Jt: f[2], Jf: f[3], K: binary.LittleEndian.Uint32(f[4:])}
		in := raw.Disassemble()
		if _, unknown := in.(bpf.RawInstruction); unknown {
			t.Fatalf("not an instruction: %+v", raw)
		}
		prog = append(prog, in)
	}
	vm, err := bpf.NewVM(prog)
	if err != nil {
		t.Fatal(err)
	}
	return vm
}

// run gives a filter's answer. The kernel loads words of struct seccomp_data in
// the order of the machine, the VM big-endian: so each word is stored that way.
func run(t testing.TB, vm *bpf.VM, audit, nr uint32, args [6]uint64) uint32 {
	t.Helper()
	data := make([]byte, 64)
	binary.BigEndian.PutUint32(data, nr)
	binary.BigEndian.PutUint32(data[4:], audit)
	for i, a := range args {
		binary.BigEndian.PutUint32(data[16+8*i:], uint32(a))
		binary.BigEndian.PutUint32(data[20+8*i:], uint32(a>>32))
	}
	ret, err := vm.Run(data)
	if err != nil {
		t.Fatal(err)
	}
	return uint32(ret)
}

// naive answers from the profile itself, rule by rule, without any of the
// compiler's code but the tables of numbers.
func naive(p *specs.LinuxSeccomp, goarch string, audit, nr uint32, args [6]uint64) uint32 {
	var b *abi
	for _, x := range machineABIs(goarch) {
		if x.audit == audit && (x.bit == 0 || nr&0x40000000 != 0 || nr >= 0x40000000) {
			b = x // the last that fits: x32 for numbers with its bit
		}
	}
	native := machines[goarch]().native
	switch {
	case b == nil, b != native && b.audit != native.audit && !slices.Contains(p.Architectures, b.name):
		return retKillProcess
	case b != native && b.audit == native.audit && !slices.Contains(p.Architectures, b.name):
		return retErrno | 38
	}
	if b.narrow {
		for i := range args {
			args[i] &= 0xffffffff
		}
	}
	def := mustAnswer(p.DefaultAction, p.DefaultErrnoRet)
	best, matched, named, highest := uint32(0), false, false, int64(-1)
	consider := func(ret uint32) {
		if !matched || int32(ret&0xffff0000) < int32(best&0xffff0000) {
			best, matched = ret, true
		}
	}
	for _, s := range p.Syscalls {
		ret := mustAnswer(s.Action, s.ErrnoRet)
		for _, name := range s.Names {
			n, ok := b.nrs[name]
			if ok && n < 0xf0000 {
				highest = max(highest, int64(n|b.bit))
			}
			if ret == def && len(s.Args) == 0 {
				continue
			}
			if ok && n|b.bit == nr {
				named = named || possible(s.Args)
				if allHold(s.Args, args) {
					consider(ret)
				}
			}
			if x, ok := b.mux[name]; ok && x.nr == nr {
				call := args[0]
				if name[:3] == "sem" || name[:3] == "shm" || name[:3] == "msg" {
					call &= 0xffff
				}
				deny := int32(ret&0xffff0000) < int32(def&0xffff0000)
				if call == uint64(x.call) && (len(s.Args) == 0 || deny && possible(s.Args)) {
					consider(ret)
				}
			}
		}
	}
	newer := highest >= 0 && int64(nr) > highest && !named // named: ARM's private range
	switch {
	case matched:
		return best
	case newer && !slices.Contains([]uint32{retAllow, retLog, retTrace}, def&0xffff0000):
		return retErrno | 38
	}
	return def
}

// possible reports whether 32-bit arguments can fulfil each condition alone.
func possible(conds []specs.LinuxSeccompArg) bool {
	for _, c := range conds {
		switch c.Op {
		case specs.OpEqualTo, specs.OpGreaterEqual, specs.OpGreaterThan:
			if c.Value > 0xffffffff {
				return false
			}
		case specs.OpMaskedEqual:
			if c.ValueTwo > 0xffffffff {
				return false
			}
		}
	}
	return true
}

func allHold(conds []specs.LinuxSeccompArg, args [6]uint64) bool {
	for _, c := range conds {
		v, ok := args[c.Index], false
		switch c.Op {
		case specs.OpEqualTo:
			ok = v == c.Value
		case specs.OpNotEqual:
			ok = v != c.Value
		case specs.OpLessThan:
			ok = v < c.Value
		case specs.OpLessEqual:
			ok = v <= c.Value
		case specs.OpGreaterThan:
			ok = v > c.Value
		case specs.OpGreaterEqual:
			ok = v >= c.Value
		case specs.OpMaskedEqual:
			ok = v&c.Value == c.ValueTwo
		}
		if !ok {
			return false
		}
	}
	return true
}

func mustAnswer(a specs.LinuxSeccompAction, errno *uint) uint32 {
	data := uint32(1)
	if errno != nil {
		data = uint32(*errno)
	}
	switch a {
	case specs.ActAllow:
		return retAllow
	case specs.ActErrno:
		return retErrno | data
	case specs.ActKillProcess:
		return retKillProcess
	case specs.ActKillThread, specs.ActKill:
		return retKillThread
	case specs.ActTrap:
		return retTrap
	case specs.ActTrace:
		return retTrace | data
	case specs.ActLog:
		return retLog
	}
	panic(fmt.Sprintf("action %q", a))
}

// randomProfile makes a profile with many conflicts and all operators.
func randomProfile(r *rand.Rand, goarch string, tidy bool) *specs.LinuxSeccomp {
	actions := []specs.LinuxSeccompAction{
		specs.ActAllow, specs.ActErrno, specs.ActKillProcess, specs.ActKillThread, specs.ActTrap, specs.ActTrace, specs.ActLog,
	}
	all := machineABIs(goarch)
	var names []string
	for _, b := range all {
		for n := range b.nrs {
			names = append(names, n)
		}
	}
	slices.Sort(names)
	names = slices.Compact(names)
	p := &specs.LinuxSeccomp{DefaultAction: actions[r.IntN(len(actions))]}
	if p.DefaultAction == specs.ActErrno && r.IntN(2) == 0 {
		p.DefaultErrnoRet = new(uint(r.IntN(100)))
	}
	for _, b := range all {
		if b.bit != 0 && tidy {
			continue
		}
		if r.IntN(3) > 0 {
			p.Architectures = append(p.Architectures, b.name)
		}
	}
	hot := []string{"socket", "clone", "personality", "ioctl", "bind", "semop", "shmat", "ipc", "socketcall"}
	used := map[string]bool{}
	for range 1 + r.IntN(60) {
		s := specs.LinuxSyscall{Action: actions[r.IntN(len(actions))]}
		if s.Action == specs.ActErrno {
			s.ErrnoRet = new(uint(r.IntN(60)))
		}
		if tidy && mustAnswer(s.Action, s.ErrnoRet) == mustAnswer(p.DefaultAction, p.DefaultErrnoRet) {
			continue
		}
		for range 1 + r.IntN(8) {
			n := names[r.IntN(len(names))]
			if r.IntN(3) == 0 {
				n = hot[r.IntN(len(hot))]
			}
			if tidy && (used[n] || slices.Contains(hot, n)) {
				continue
			}
			used[n] = true
			s.Names = append(s.Names, n)
		}
		if len(s.Names) == 0 {
			continue
		}
		if r.IntN(2) == 0 {
			s.Args = randomArgs(r, tidy)
		}
		p.Syscalls = append(p.Syscalls, s)
	}
	return p
}

func randomArgs(r *rand.Rand, tidy bool) (out []specs.LinuxSeccompArg) {
	kinds := []specs.LinuxSeccompOperator{
		specs.OpEqualTo, specs.OpNotEqual, specs.OpLessThan, specs.OpLessEqual,
		specs.OpGreaterThan, specs.OpGreaterEqual, specs.OpMaskedEqual,
	}
	for range 1 + r.IntN(3) {
		a := specs.LinuxSeccompArg{Index: uint(r.IntN(3)), Op: kinds[r.IntN(len(kinds))]}
		v := vectors[r.IntN(len(vectors))]
		a.Value = v[r.IntN(3)]
		if tidy && (a.Value == 0 || a.Value > 0xffffffff || slices.ContainsFunc(out, func(o specs.LinuxSeccompArg) bool { return o.Index == a.Index })) {
			continue
		}
		if a.Op == specs.OpMaskedEqual {
			a.ValueTwo = a.Value & r.Uint64()
		}
		out = append(out, a)
	}
	return out
}
