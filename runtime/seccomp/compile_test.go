package seccomp

import (
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/naru-project/naru/internal/errs"
)

// compareNaive runs every number with every vector through filter and naive.
func compareNaive(t *testing.T, p *specs.LinuxSeccomp, goarch string, vecs [][6]uint64) {
	t.Helper()
	filter, _, err := Compile(p, goarch, Options{})
	if err != nil {
		t.Fatal(err)
	}
	vm := filterVM(t, filter)
	audits := []uint32{0x1234}
	for _, b := range machineABIs(goarch) {
		audits = append(audits, b.audit)
	}
	slices.Sort(audits)
	numbers := []uint32{0x0effff, 0x0f0000, 0x0f0001, 0x0f0005, 0x0f0006, 0x0f0007, 0x3fffffff, 0x40000000 - 1, 0x7fffffff, 0x80000000, 0xffffffff}
	for nr := range uint32(601) {
		numbers = append(numbers, nr, nr|0x40000000)
	}
	conditional := map[uint32]bool{}
	for _, b := range machineABIs(goarch) {
		for _, s := range p.Syscalls {
			for _, n := range s.Names {
				if nr, ok := b.nrs[n]; ok && len(s.Args) > 0 {
					conditional[nr|b.bit] = true
				}
				if x, ok := b.mux[n]; ok {
					conditional[x.nr] = true
				}
			}
		}
	}
	for _, audit := range slices.Compact(audits) {
		for _, nr := range numbers {
			vecs := vecs
			if !conditional[nr] {
				vecs = vecs[:2] // the answer does not depend on them
			}
			for _, args := range vecs {
				got, want := run(t, vm, audit, nr, args), naive(p, goarch, audit, nr, args)
				if got != want {
					t.Fatalf("arch %x nr %d (%#x) args %x: filter answers %08x, the profile says %08x", audit, nr, nr, args, got, want)
				}
			}
		}
	}
}

func TestCompileDefaultLikeNaive(t *testing.T) {
	for _, goarch := range []string{"amd64", "arm64"} {
		for name, caps := range map[string][]string{"none": nil, "docker": dockerCaps, "admin": adminCaps} {
			t.Run(goarch+"/"+name, func(t *testing.T) {
				compareNaive(t, Default(caps, goarch), goarch, vectors)
				compareNaive(t, mobyProfile(t, caps, goarch), goarch, vectors)
			})
		}
	}
}

func TestCompileRandomLikeNaive(t *testing.T) {
	n := 40
	if testing.Short() {
		n = 10
	}
	for seed := range uint64(n) {
		r := rand.New(rand.NewPCG(seed, 7))
		goarch := []string{"amd64", "arm64"}[seed%2]
		p := randomProfile(r, goarch, false)
		p.Syscalls = slices.DeleteFunc(p.Syscalls, func(s specs.LinuxSyscall) bool {
			_, err := conditions(s.Args)
			if err == nil {
				return false
			}
			// A rule that is refused must indeed be unable to match.
			for _, v := range vectors {
				if allHold(s.Args, v) {
					t.Fatalf("rule refused although %x matches: %+v", v, s.Args)
				}
			}
			return true
		})
		var vecs [][6]uint64
		for range 12 {
			vecs = append(vecs, vectors[r.IntN(len(vectors))])
		}
		compareNaive(t, p, goarch, vecs)
	}
}

// A rule with hundreds of far-away jumps makes every kind of trampoline.
func TestCompileLargeLikeNaive(t *testing.T) {
	p := &specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Architectures: []specs.Arch{specs.ArchX86, specs.ArchX32}}
	names := slices.Sorted(maps.Keys(machines["amd64"]().native.nrs))[:340]
	for nr, name := range names {
		for i := range uint64(2) {
			p.Syscalls = append(p.Syscalls, specs.LinuxSyscall{
				Names: []string{name}, Action: specs.ActErrno, ErrnoRet: new(uint(nr%80 + 2)),
				Args: []specs.LinuxSeccompArg{{Index: uint(i), Value: uint64(nr) % 11, Op: specs.OpEqualTo}},
			})
		}
	}
	_, _, err := Compile(p, "amd64", Options{})
	if !errs.Is(err, errs.InvalidArgument) {
		t.Fatalf("three ABIs with %d conditional calls: %v, want a refusal", len(names), err)
	}
	p.Architectures = nil
	compareNaive(t, p, "amd64", vectors[:14])
}

func TestCompileSize(t *testing.T) {
	for arch, limit := range map[string]int{"amd64": 330, "arm64": 330} {
		f, flags, err := Compile(Default(dockerCaps, arch), arch, Options{})
		if err != nil || flags != 0 {
			t.Fatal(flags, err)
		}
		t.Logf("%s: default profile takes %d instructions", arch, len(f)/8)
		if len(f)/8 > limit {
			t.Errorf("%s: %d instructions, want at most %d", arch, len(f)/8, limit)
		}
	}
}

func TestCompileRefuses(t *testing.T) {
	good := func() *specs.LinuxSeccomp {
		return &specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Syscalls: []specs.LinuxSyscall{{Names: []string{"read"}, Action: specs.ActAllow}}}
	}
	args := func(a ...specs.LinuxSeccompArg) func(*specs.LinuxSeccomp) {
		return func(p *specs.LinuxSeccomp) { p.Syscalls[0].Args = a }
	}
	for name, c := range map[string]struct {
		edit  func(*specs.LinuxSeccomp)
		class errs.Class
	}{
		"no default":      {func(p *specs.LinuxSeccomp) { p.DefaultAction = "" }, errs.InvalidArgument},
		"unknown action":  {func(p *specs.LinuxSeccomp) { p.Syscalls[0].Action = "SCMP_ACT_SMILE" }, errs.InvalidArgument},
		"unknown default": {func(p *specs.LinuxSeccomp) { p.DefaultAction = "ALLOW" }, errs.InvalidArgument},
		"notify":          {func(p *specs.LinuxSeccomp) { p.Syscalls[0].Action = specs.ActNotify }, errs.Unimplemented},
		"listener":        {func(p *specs.LinuxSeccomp) { p.ListenerPath = "/x" }, errs.Unimplemented},
		"unknown arch":    {func(p *specs.LinuxSeccomp) { p.Architectures = []specs.Arch{"x86_64"} }, errs.InvalidArgument},
		"unknown flag":    {func(p *specs.LinuxSeccomp) { p.Flags = []specs.LinuxSeccompFlag{"X"} }, errs.InvalidArgument},
		"wait killable": {func(p *specs.LinuxSeccomp) {
			p.Flags = []specs.LinuxSeccompFlag{specs.LinuxSeccompFlagWaitKillableRecv}
		}, errs.InvalidArgument},
		"errno too large":   {func(p *specs.LinuxSeccomp) { p.DefaultErrnoRet = new(uint(4096)) }, errs.InvalidArgument},
		"no names":          {func(p *specs.LinuxSeccomp) { p.Syscalls[0].Names = nil }, errs.InvalidArgument},
		"empty name":        {func(p *specs.LinuxSeccomp) { p.Syscalls[0].Names = []string{""} }, errs.InvalidArgument},
		"argument 6":        {args(specs.LinuxSeccompArg{Index: 6, Op: specs.OpEqualTo}), errs.InvalidArgument},
		"unknown operator":  {args(specs.LinuxSeccompArg{Op: "=="}), errs.InvalidArgument},
		"two values":        {args(specs.LinuxSeccompArg{Op: specs.OpEqualTo, Value: 1}, specs.LinuxSeccompArg{Op: specs.OpEqualTo, Value: 2}), errs.InvalidArgument},
		"empty range":       {args(specs.LinuxSeccompArg{Op: specs.OpGreaterThan, Value: 5}, specs.LinuxSeccompArg{Op: specs.OpLessThan, Value: 5}), errs.InvalidArgument},
		"below zero":        {args(specs.LinuxSeccompArg{Op: specs.OpLessThan}), errs.InvalidArgument},
		"above all":         {args(specs.LinuxSeccompArg{Op: specs.OpGreaterThan, Value: ^uint64(0)}), errs.InvalidArgument},
		"bits outside mask": {args(specs.LinuxSeccompArg{Op: specs.OpMaskedEqual, Value: 1, ValueTwo: 2}), errs.InvalidArgument},
		"masks disagree": {args(specs.LinuxSeccompArg{Op: specs.OpMaskedEqual, Value: 3, ValueTwo: 1},
			specs.LinuxSeccompArg{Op: specs.OpMaskedEqual, Value: 2, ValueTwo: 2}), errs.InvalidArgument},
	} {
		t.Run(name, func(t *testing.T) {
			p := good()
			c.edit(p)
			if _, _, err := Compile(p, "amd64", Options{}); errs.Of(err) != c.class || err == nil {
				t.Fatalf("%v (%v), want %v", err, errs.Of(err), c.class)
			}
		})
	}
	if _, _, err := Compile(good(), "riscv64", Options{}); !errs.Is(err, errs.Unimplemented) {
		t.Errorf("riscv64: %v", err)
	}
	if _, _, err := Compile(nil, "amd64", Options{}); !errs.Is(err, errs.InvalidArgument) {
		t.Errorf("nil: %v", err)
	}
}

func TestCompileFlagsAndUnknown(t *testing.T) {
	p := &specs.LinuxSeccomp{
		DefaultAction: specs.ActErrno,
		Flags:         []specs.LinuxSeccompFlag{specs.LinuxSeccompFlagLog, specs.LinuxSeccompFlagSpecAllow},
		Syscalls: []specs.LinuxSyscall{
			{Names: []string{"read", "no_such_call", "socketcall"}, Action: specs.ActAllow},
		},
	}
	var unknown []string
	_, flags, err := Compile(p, "amd64", Options{Unknown: func(s string) { unknown = append(unknown, s) }})
	if err != nil || flags != 2|4 || !slices.Equal(unknown, []string{"no_such_call"}) {
		t.Fatal(flags, unknown, err)
	}
}

// The meaning in the corners, spelled out.
func TestCompileMeaning(t *testing.T) {
	const x86, i386 = 0xc000003e, 0x40000003
	eq := func(i uint, v uint64) []specs.LinuxSeccompArg {
		return []specs.LinuxSeccompArg{{Index: i, Value: v, Op: specs.OpEqualTo}}
	}
	rule := func(a specs.LinuxSeccompAction, args []specs.LinuxSeccompArg, names ...string) specs.LinuxSyscall {
		return specs.LinuxSyscall{Names: names, Action: a, Args: args}
	}
	type probe struct {
		audit, nr uint32
		args      [6]uint64
		want      uint32
	}
	for name, c := range map[string]struct {
		p      *specs.LinuxSeccomp
		probes []probe
	}{
		"strictest wins, whatever the order": {
			&specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Syscalls: []specs.LinuxSyscall{
				rule(specs.ActAllow, nil, "socket"), rule(specs.ActKillProcess, eq(0, 40), "socket"),
			}},
			[]probe{{x86, 41, [6]uint64{40}, retKillProcess}, {x86, 41, [6]uint64{1}, retAllow}},
		},
		"a rule that repeats the default is none": {
			&specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Syscalls: []specs.LinuxSyscall{
				rule(specs.ActErrno, nil, "clone"), rule(specs.ActAllow, eq(0, 17), "clone"),
			}},
			[]probe{{x86, 56, [6]uint64{17}, retAllow}, {x86, 56, [6]uint64{18}, retErrno | 1}},
		},
		"newer than the profile is ENOSYS": {
			&specs.LinuxSeccomp{DefaultAction: specs.ActKillProcess, Syscalls: []specs.LinuxSyscall{rule(specs.ActAllow, nil, "openat2")}},
			[]probe{
				{x86, 437, [6]uint64{}, retAllow}, {x86, 436, [6]uint64{}, retKillProcess},
				{x86, 438, [6]uint64{}, retErrno | 38}, {x86, 0xffffffff, [6]uint64{}, retErrno | 38},
			},
		},
		"but not below a permissive default": {
			&specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{rule(specs.ActErrno, nil, "openat2")}},
			[]probe{{x86, 600, [6]uint64{}, retAllow}, {x86, 0x40000000, [6]uint64{}, retErrno | 38}, {i386, 3, [6]uint64{}, retKillProcess}},
		},
		"upper halves do not count for i386": {
			&specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Architectures: []specs.Arch{specs.ArchX86}, Syscalls: []specs.LinuxSyscall{
				rule(specs.ActErrno, eq(0, 38), "socket"),
			}},
			[]probe{
				{i386, 359, [6]uint64{38}, retErrno | 1}, {i386, 359, [6]uint64{1<<32 + 38}, retErrno | 1}, {i386, 359, [6]uint64{1}, retAllow},
				{i386, 102, [6]uint64{1}, retErrno | 1}, {i386, 102, [6]uint64{2}, retAllow}, // a denial covers the multiplexer
			},
		},
		"conditions do not open a multiplexer": {
			&specs.LinuxSeccomp{DefaultAction: specs.ActErrno, Architectures: []specs.Arch{specs.ArchX86}, Syscalls: []specs.LinuxSyscall{
				rule(specs.ActAllow, eq(0, 1), "socket"), rule(specs.ActAllow, nil, "bind", "shmat"),
			}},
			[]probe{
				{i386, 359, [6]uint64{1}, retAllow}, {i386, 102, [6]uint64{1}, retErrno | 1}, {i386, 102, [6]uint64{2}, retAllow},
				{i386, 117, [6]uint64{21}, retAllow}, {i386, 117, [6]uint64{1<<16 + 21}, retAllow}, {i386, 117, [6]uint64{22}, retErrno | 1},
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			f, _, err := Compile(c.p, "amd64", Options{})
			if err != nil {
				t.Fatal(err)
			}
			vm := filterVM(t, f)
			for _, x := range c.probes {
				if got := run(t, vm, x.audit, x.nr, x.args); got != x.want {
					t.Errorf("arch %x nr %d args %x: %08x, want %08x", x.audit, x.nr, x.args, got, x.want)
				}
			}
		})
	}
}

func BenchmarkDefault(b *testing.B) {
	for b.Loop() {
		Default(dockerCaps, "amd64")
	}
}

func BenchmarkCompile(b *testing.B) {
	p := Default(dockerCaps, "amd64")
	for b.Loop() {
		if _, _, err := Compile(p, "amd64", Options{}); err != nil {
			b.Fatal(err)
		}
	}
}
