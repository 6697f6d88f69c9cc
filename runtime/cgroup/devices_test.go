package cgroup

import (
	"fmt"
	"math/rand"
	"os"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime"
)

// decide is the policy in plain words, as devices_check in
// security/device_cgroup.c has it.
func (p *devicePolicy) decide(kind byte, major, minor int64, access int) bool {
	for _, r := range p.rules {
		if r.kind != kind || (r.major != anyNumber && r.major != major) || (r.minor != anyNumber && r.minor != minor) {
			continue
		}
		if p.allow && r.access&access != 0 {
			return false
		}
		if !p.allow && access&^r.access == 0 {
			return true
		}
	}
	return p.allow
}

// run interprets a filter; an unknown instruction or a jump out of it panics.
func run(prog []insn, kind byte, major, minor int64, access int) bool {
	var r [11]uint64
	k := uint32(2)
	if kind == 'b' {
		k = 1
	}
	ctx := map[int16]uint32{0: k | uint32(access)<<16, 4: uint32(major), 8: uint32(minor)}
	ctxLive := true
	for pc := 0; ; pc++ {
		i := prog[pc]
		dst, src := i.regs&15, i.regs>>4
		switch i.code {
		case opLoadWord:
			if src != 1 || !ctxLive {
				panic("load from something else than the context")
			}
			r[dst] = uint64(ctx[i.off])
		case opMovReg:
			r[dst] = uint64(uint32(r[src]))
			ctxLive = ctxLive && dst != 1
		case opMovImm:
			r[dst] = uint64(uint32(i.imm))
		case opAndImm:
			r[dst] = uint64(uint32(r[dst]) & uint32(i.imm))
		case opShrImm:
			r[dst] = uint64(uint32(r[dst]) >> uint(i.imm))
		case opJeqImm:
			if r[dst] == uint64(int64(i.imm)) {
				pc += int(i.off)
			}
		case opJneImm:
			if r[dst] != uint64(int64(i.imm)) {
				pc += int(i.off)
			}
		case opExit:
			return r[0] != 0
		default:
			panic(fmt.Sprintf("unknown opcode %#x", i.code))
		}
	}
}

func TestDeviceProgramAgreesWithPolicy(t *testing.T) {
	rnd := rand.New(rand.NewSource(1))
	number := func() *int64 {
		n := []int64{-1, 0, 1, 3, 1<<20 - 1}[rnd.Intn(5)]
		return &n
	}
	tried := 0
	for i := 0; i < 3000; i++ {
		rules := []specs.LinuxDeviceCgroup{{Allow: rnd.Intn(2) == 0, Access: "rwm"}}
		for j := rnd.Intn(6); j > 0; j-- {
			rules = append(rules, specs.LinuxDeviceCgroup{
				Allow: rnd.Intn(2) == 0, Type: []string{"b", "c"}[rnd.Intn(2)], Major: number(), Minor: number(),
				Access: []string{"", "r", "w", "m", "rw", "rwm", "wm"}[rnd.Intn(7)],
			})
		}
		p, err := newDevicePolicy(rules)
		if err != nil {
			wantClass(t, err, errs.InvalidArgument)
			continue
		}
		prog := p.program()
		for _, kind := range []byte("bc") {
			for _, major := range []int64{0, 1, 2, 3, 1<<20 - 1} {
				for _, minor := range []int64{0, 1, 2, 1<<20 - 1} {
					for acc := 1; acc <= accAll; acc++ {
						tried++
						if got, want := run(prog, kind, major, minor, acc), p.decide(kind, major, minor, acc); got != want {
							t.Fatalf("rules %v policy %+v: %c %d:%d access %d: filter says %v, policy %v", rules, p, kind, major, minor, acc, got, want)
						}
					}
				}
			}
		}
	}
	if tried < 100000 {
		t.Errorf("only %d requests were tried", tried)
	}
}

// TestDevicePolicy states a few verdicts outright.
func TestDevicePolicy(t *testing.T) {
	deny := specs.LinuxDeviceCgroup{Access: "rwm"}
	for _, c := range []struct {
		rules []specs.LinuxDeviceCgroup
		acc   int
		want  bool // for c 1:3
	}{
		{nil, accRead, false},
		{[]specs.LinuxDeviceCgroup{deny}, accRead, false},
		{[]specs.LinuxDeviceCgroup{{Allow: true}}, accAll, true},
		{[]specs.LinuxDeviceCgroup{{Allow: true}, deny}, accRead, false},
		{[]specs.LinuxDeviceCgroup{deny, dev(true, "c", 1, 3, "r")}, accRead, true},
		{[]specs.LinuxDeviceCgroup{deny, dev(true, "c", 1, 3, "r")}, accRead | accWrite, false}, // all of it, not any
		{[]specs.LinuxDeviceCgroup{deny, dev(true, "c", 1, 3, "r"), dev(true, "c", 1, 3, "w")}, accRead | accWrite, true},
		{[]specs.LinuxDeviceCgroup{deny, dev(true, "c", 1, -1, "rw")}, accRead, true},
		{[]specs.LinuxDeviceCgroup{deny, dev(true, "b", 1, 3, "rwm")}, accRead, false},
		{[]specs.LinuxDeviceCgroup{deny, dev(true, "c", 1, 3, "rwm"), dev(false, "c", 1, 3, "w")}, accWrite, false},
		{[]specs.LinuxDeviceCgroup{{Allow: true}, dev(false, "c", 1, 3, "w")}, accRead | accWrite, false},
		{[]specs.LinuxDeviceCgroup{{Allow: true}, dev(false, "c", 1, 3, "w")}, accRead, true},
	} {
		p, err := newDevicePolicy(c.rules)
		if err != nil {
			t.Fatal(err)
		}
		if got := run(p.program(), 'c', 1, 3, c.acc); got != c.want {
			t.Errorf("%v access %d: got %v", c.rules, c.acc, got)
		}
	}
	big := int64(1 << 20)
	for _, rules := range [][]specs.LinuxDeviceCgroup{
		{{Type: "x"}}, {{Type: "p"}}, {{Type: "c", Access: "rwx"}}, {{Type: "c", Major: &big}}, {{Type: "a", Access: "r"}},
		{deny, dev(true, "c", 1, -1, "rwm"), dev(false, "c", 1, 3, "w")},                            // a hole in a wider rule
		{deny, dev(true, "c", 1, -1, "rwm"), dev(true, "c", 1, 3, "w"), dev(false, "c", 1, 3, "w")}, // also with an exact one beside it
	} {
		_, err := newDevicePolicy(rules)
		wantClass(t, err, errs.InvalidArgument)
	}
}

// tryDevices reads and writes two devices from inside a group.
const tryDevices = `
a=no; (exec 9</dev/zero) 2>/dev/null && a=yes
b=no; (exec 9>/dev/zero) 2>/dev/null && b=yes
c=no; (exec 9<>/dev/zero) 2>/dev/null && c=yes
d=no; (exec 9</dev/full) 2>/dev/null && d=yes
e=no; mknod "$T/m" c 1 7 2>/dev/null && e=yes
echo "$a $b $c $d $e" >"$T/out"
echo in`

func testDevices(t *testing.T, d *Driver, parent string) {
	for i, c := range []struct {
		rules []specs.LinuxDeviceCgroup
		want  string // read, write, read-write of c 1:5; read of c 1:7; mknod of it
	}{
		// c 1:3 is /dev/null, which the shell needs for itself.
		{[]specs.LinuxDeviceCgroup{{Access: "rwm"}, dev(true, "c", 1, 3, "rw"), dev(true, "c", 1, 5, "r")}, "yes no no no no"},
		{[]specs.LinuxDeviceCgroup{{Access: "rwm"}, dev(true, "c", 1, 3, "rw"), dev(true, "c", 1, 5, "rw"), dev(true, "c", -1, -1, "m")}, "yes yes yes no yes"},
		{[]specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}, dev(false, "c", 1, 5, "w")}, "yes no no yes yes"},
		{[]specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}, "yes yes yes yes yes"},
	} {
		g := create(t, d, parent, fmt.Sprintf("dev%d", i), runtime.Resources{}, c.rules...)
		dir := t.TempDir()
		t.Setenv("T", dir)
		enter(t, g.CloneFD(), g.TaskFDs(), tryDevices)
		b, err := os.ReadFile(dir + "/out")
		if got := strings.TrimSpace(string(b)); err != nil || got != c.want {
			t.Errorf("%v: got %q %v, want %q", c.rules, got, err, c.want)
		}
	}
}

func TestDevicesHost(t *testing.T) {
	d, parent := hostDriver(t)
	testDevices(t, d, parent)
}

// TestDevicesFilter has the kernel's verifier and hook judge the BPF program,
// on a hybrid host too.
func TestDevicesFilter(t *testing.T) {
	testDevices(t, unifiedDriver(t), "/pod")
}

func FuzzDeviceRule(f *testing.F) {
	f.Add("c", int64(1), int64(3), "rwm", true)
	f.Add("a", int64(-1), int64(-1), "", false)
	f.Add("x", int64(1<<40), int64(-9), "z", true)
	f.Fuzz(func(t *testing.T, kind string, major, minor int64, access string, allow bool) {
		p, err := newDevicePolicy([]specs.LinuxDeviceCgroup{{Allow: !allow}, {Allow: allow, Type: kind, Major: &major, Minor: &minor, Access: access}})
		if err != nil {
			wantClass(t, err, errs.InvalidArgument)
			return
		}
		prog := p.program()
		for acc := 1; acc <= accAll; acc++ {
			if run(prog, 'c', 1, 3, acc) != p.decide('c', 1, 3, acc) {
				t.Fatalf("filter and policy differ for access %d", acc)
			}
		}
	})
}
