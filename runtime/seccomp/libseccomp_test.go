package seccomp

import (
	"bytes"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

var (
	libseccomp = flag.String("libseccomp", "", "program made of testdata/libseccomp.c")
	update     = flag.Bool("update", false, "write testdata again (needs -libseccomp)")
)

// The recorded verdicts of libseccomp for the default profile and its model.
func TestLibseccompVerdicts(t *testing.T) {
	for _, goarch := range []string{"amd64", "arm64"} {
		for name, p := range map[string]*specs.LinuxSeccomp{
			"moby":          mobyProfile(t, dockerCaps, goarch),
			"default":       Default(dockerCaps, goarch),
			"default-admin": Default(adminCaps, goarch),
		} {
			t.Run(goarch+"/"+name, func(t *testing.T) {
				file := filepath.Join("testdata", "verdicts-"+name+"-"+goarch+".txt")
				if *update {
					if err := os.WriteFile(file, []byte(record(t, p, goarch)), 0o644); err != nil {
						t.Fatal(err)
					}
				}
				b, err := os.ReadFile(file)
				if err != nil {
					t.Fatal(err)
				}
				compareRecorded(t, p, goarch, string(b))
			})
		}
	}
}

// compareRecorded compares a compiled profile with a table of verdicts.
func compareRecorded(t *testing.T, p *specs.LinuxSeccomp, goarch, table string) {
	t.Helper()
	filter, _, err := Compile(p, goarch, Options{})
	if err != nil {
		t.Fatal(err)
	}
	vm := filterVM(t, filter)
	unknown, want := parseVerdicts(t, table)
	compared := 0
	for _, b := range listed(p, goarch) {
		skip := map[uint32]bool{}
		for _, n := range unknown {
			if nr, ok := b.nrs[n]; ok {
				skip[nr] = true
			}
		}
		last := lastNamed(p, b)
		for nr := range uint32(601) {
			if skip[nr] {
				continue
			}
			for i, args := range vectors {
				w := want[string(b.name)][nr][i]
				if nr > last {
					w = retErrno | 38 // libseccomp leaves that to its users, see the package documentation
				}
				if b.narrow && nr == b.nrs["socketcall"] && nr != 0 && args[0]&0xffffffff == 1 && !slices.Contains(p.Architectures, specs.ArchX32) {
					// libseccomp opens SYS_SOCKET because some families are
					// allowed; the default profile closes it for that reason.
					w = retErrno | 1
				}
				if got := run(t, vm, b.audit, nr|b.bit, args); got != w {
					t.Fatalf("%s nr %d args %x: %08x, libseccomp answers %08x", b.name, nr, args, got, w)
				}
				compared++
			}
		}
	}
	if compared < 50000 {
		t.Fatalf("only %d verdicts compared", compared)
	}
}

// listed are the ABIs of a profile.
func listed(p *specs.LinuxSeccomp, goarch string) (out []*abi) {
	for i, b := range machineABIs(goarch) {
		if i == 0 || slices.Contains(p.Architectures, b.name) {
			out = append(out, b)
		}
	}
	return out
}

func lastNamed(p *specs.LinuxSeccomp, b *abi) (last uint32) {
	for _, s := range p.Syscalls {
		for _, n := range s.Names {
			if nr, ok := b.nrs[n]; ok && nr < armPrivate {
				last = max(last, nr)
			}
		}
	}
	return last
}

// reference runs libseccomp on a profile.
func reference(t *testing.T, p *specs.LinuxSeccomp, goarch string) (filter []byte, unknown []string) {
	t.Helper()
	var in, out, errb bytes.Buffer
	def := mustAnswer(p.DefaultAction, p.DefaultErrnoRet)
	fmt.Fprintf(&in, "default %x\n", def)
	for _, b := range listed(p, goarch) {
		fmt.Fprintf(&in, "arch %s\n", b.name)
	}
	kinds := map[specs.LinuxSeccompOperator]int{ // enum scmp_compare
		specs.OpNotEqual: 1, specs.OpLessThan: 2, specs.OpLessEqual: 3, specs.OpEqualTo: 4,
		specs.OpGreaterEqual: 5, specs.OpGreaterThan: 6, specs.OpMaskedEqual: 7,
	}
	for _, s := range p.Syscalls {
		ret := mustAnswer(s.Action, s.ErrnoRet)
		for _, n := range s.Names {
			if ret == def {
				continue
			}
			fmt.Fprintf(&in, "rule %x %s %d", ret, n, len(s.Args))
			for _, a := range s.Args {
				fmt.Fprintf(&in, " %d %d %x %x", a.Index, kinds[a.Op], a.Value, a.ValueTwo)
			}
			in.WriteByte('\n')
		}
	}
	cmd := exec.Command(*libseccomp)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = &in, &out, &errb
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v: %s", err, errb.String())
	}
	return out.Bytes(), strings.Fields(errb.String())
}

// record makes a table of verdicts with libseccomp.
func record(t *testing.T, p *specs.LinuxSeccomp, goarch string) string {
	filter, unknown := reference(t, p, goarch)
	vm := filterVM(t, filter)
	var out strings.Builder
	slices.Sort(unknown)
	for _, n := range slices.Compact(unknown) {
		fmt.Fprintf(&out, "unknown %s\n", n)
	}
	for _, b := range listed(p, goarch) {
		first, before := uint32(0), ""
		flush := func(until uint32) {
			if before != "" {
				fmt.Fprintf(&out, "%s %s %s\n", b.name, span(first, until), before)
			}
		}
		for nr := range uint32(601) {
			var row []uint32
			for _, args := range vectors {
				row = append(row, run(t, vm, b.audit, nr|b.bit, args))
			}
			if s := squeeze(row); s != before {
				flush(nr - 1)
				first, before = nr, s
			}
		}
		flush(600)
	}
	return out.String()
}

func span(first, last uint32) string {
	if first == last {
		return fmt.Sprint(first)
	}
	return fmt.Sprintf("%d-%d", first, last)
}

// squeeze writes answers by vector as ranges.
func squeeze(row []uint32) string {
	var parts []string
	first := 0
	for i := range row {
		if i+1 < len(row) && row[i+1] == row[first] {
			continue
		}
		parts = append(parts, fmt.Sprintf("%s=%08x", span(uint32(first), uint32(i)), row[first]))
		first = i + 1
	}
	if len(parts) == 1 {
		return fmt.Sprintf("%08x", row[0])
	}
	return strings.Join(parts, ",")
}

// parseVerdicts reads what record wrote: answers by architecture, number, vector.
func parseVerdicts(t *testing.T, table string) (unknown []string, out map[string][][]uint32) {
	t.Helper()
	out = map[string][][]uint32{}
	for line := range strings.Lines(table) {
		f := strings.Fields(line)
		if f[0] == "unknown" {
			unknown = append(unknown, f[1])
			continue
		}
		row := make([]uint32, len(vectors))
		for part := range strings.SplitSeq(f[2], ",") {
			first, last, ret := uint32(0), uint32(len(vectors)-1), part
			if r, v, ok := strings.Cut(part, "="); ok {
				first, last = parseSpan(t, r)
				ret = v
			}
			for i := first; i <= last; i++ {
				if _, err := fmt.Sscanf(ret, "%x", &row[i]); err != nil {
					t.Fatalf("%q: %v", line, err)
				}
			}
		}
		first, last := parseSpan(t, f[1])
		for range last - first + 1 {
			out[f[0]] = append(out[f[0]], row)
		}
	}
	for a, rows := range maps.All(out) {
		if len(rows) != 601 {
			t.Fatalf("%s: %d rows", a, len(rows))
		}
	}
	return unknown, out
}

func parseSpan(t *testing.T, s string) (first, last uint32) {
	t.Helper()
	if n, _ := fmt.Sscanf(s, "%d-%d", &first, &last); n == 1 {
		last = first
	} else if n != 2 {
		t.Fatalf("range %q", s)
	}
	return first, last
}

// Random profiles without the conflicts on which this package and libseccomp
// knowingly differ, against libseccomp itself.
func TestLibseccompRandom(t *testing.T) {
	if *libseccomp == "" {
		t.Skip("needs -libseccomp, see testdata/README.md; the recorded verdicts are always compared")
	}
	for seed := range uint64(60) {
		r := rand.New(rand.NewPCG(seed, 11))
		goarch := []string{"amd64", "arm64"}[seed%2]
		p := randomProfile(r, goarch, true)
		p.Syscalls = slices.DeleteFunc(p.Syscalls, func(s specs.LinuxSyscall) bool {
			_, err := conditions(s.Args)
			return err != nil
		})
		filter, unknown := reference(t, p, goarch)
		theirs := filterVM(t, filter)
		ours, _, err := Compile(p, goarch, Options{})
		if err != nil {
			t.Fatal(err)
		}
		vm := filterVM(t, ours)
		def := mustAnswer(p.DefaultAction, p.DefaultErrnoRet)
		for _, b := range listed(p, goarch) {
			last := lastNamed(p, b)
			for name, nr := range b.nrs {
				if slices.Contains(unknown, name) || nr > last || nr == b.nrs["ipc"] || nr == b.nrs["socketcall"] {
					continue
				}
				for _, args := range vectors {
					w, g := run(t, theirs, b.audit, nr|b.bit, args), run(t, vm, b.audit, nr|b.bit, args)
					if w != g {
						t.Errorf("seed %d %s %s (%d) args %x: %08x, libseccomp %08x, default %08x", seed, b.name, name, nr, args, g, w, def)
						for _, s := range p.Syscalls {
							if slices.Contains(s.Names, name) {
								t.Logf("%+v", s)
							}
						}
						return
					}
				}
			}
		}
	}
}
