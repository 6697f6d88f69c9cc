package seccomp

import (
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"

	moby "github.com/moby/profiles/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/naru-project/naru/internal/errs"
)

const small = `{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86_64"],"syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW"}]}`

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		t.Helper()
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	good := write("good.json", small)
	if err := os.Symlink("good.json", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{good, filepath.Join(dir, "link"), dir + "/./x/../good.json"} {
		p, err := Load(path, nil, "amd64")
		if err != nil || p.DefaultAction != specs.ActErrno || len(p.Syscalls) != 1 {
			t.Errorf("%s: %+v, %v", path, p, err)
		}
	}
	if err := syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	big := write("big.json", "")
	if err := os.Truncate(big, 64<<20); err != nil {
		t.Fatal(err)
	}
	for name, path := range map[string]string{
		"empty": "", "relative": "good.json", "parent": "../../etc/passwd", "NUL": good + "\x00", "missing": dir + "/none",
		"folder": dir, "FIFO": dir + "/fifo", "device": "/dev/zero", "64 MiB": big, "not JSON": write("x", "root:x:0:0"),
		"empty file": write("e", ""), "null": write("n", "null"), "no words": write("w", "{}"),
	} {
		if p, err := Load(path, nil, "amd64"); !errs.Is(err, errs.InvalidArgument) {
			t.Errorf("%s: %+v, %v", name, p, err)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	for name, text := range map[string]string{
		"trailing":          small + "x",
		"two documents":     small + small,
		"unknown field":     `{"defaultAction":"SCMP_ACT_ERRNO","syscals":[]}`,
		"unknown action":    `{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["read"],"action":"ALLOW"}]}`,
		"action elsewhere":  `{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["read"],"action":"NONE","includes":{"arches":["s390"]}}]}`,
		"unknown arch":      `{"defaultAction":"SCMP_ACT_ERRNO","architectures":["amd64"]}`,
		"unknown arch map":  `{"defaultAction":"SCMP_ACT_ERRNO","archMap":[{"architecture":"SCMP_ARCH_X86_64","subArchitectures":["i386"]}]}`,
		"both arch fields":  `{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86"],"archMap":[{"architecture":"SCMP_ARCH_X86_64","subArchitectures":[]}]}`,
		"both names":        `{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"name":"a","names":["read"],"action":"SCMP_ACT_ALLOW"}]}`,
		"errno name":        `{"defaultAction":"SCMP_ACT_ERRNO","defaultErrno":"EWHAT"}`,
		"errnos disagree":   `{"defaultAction":"SCMP_ACT_ERRNO","defaultErrno":"EPERM","defaultErrnoRet":2}`,
		"negative value":    `{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":-1,"op":"SCMP_CMP_EQ"}]}]}`,
		"bad kernel":        `{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW","includes":{"minKernel":"new"}}]}`,
		"listener":          `{"defaultAction":"SCMP_ACT_ERRNO","listenerPath":"/run/x"}`,
		"too large":         `{"defaultAction":"` + strings.Repeat(" ", MaxProfile) + `"}`,
		"deep":              strings.Repeat("[", 20000),
		"wrong type":        `{"defaultAction":7}`,
		"action is missing": `{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["read"]}]}`,
	} {
		if p, err := Parse([]byte(text), nil, "amd64"); err == nil || errs.Of(err) == errs.Internal {
			t.Errorf("%s: %+v, %v", name, p, err)
		}
	}
}

// The dialects of Docker and Podman: conditions, archMap, name, errno names.
func TestParseDialects(t *testing.T) {
	text := `{
	 "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38, "defaultErrno": "ENOSYS",
	 "archMap": [{"architecture":"SCMP_ARCH_X86_64","subArchitectures":["SCMP_ARCH_X86","SCMP_ARCH_X32"]},{"architecture":"SCMP_ARCH_AARCH64","subArchitectures":["SCMP_ARCH_ARM"]}],
	 "syscalls": [
	  {"name":"read","action":"SCMP_ACT_ALLOW","args":null,"comment":"c","includes":{},"excludes":{}},
	  {"names":["bdflush"],"action":"SCMP_ACT_ERRNO","errnoRet":1,"errno":"EPERM"},
	  {"names":["mount"],"action":"SCMP_ACT_ALLOW","includes":{"caps":["CAP_SYS_ADMIN"]}},
	  {"names":["clone"],"action":"SCMP_ACT_ALLOW","excludes":{"caps":["CAP_SYS_ADMIN"]}},
	  {"names":["arch_prctl"],"action":"SCMP_ACT_ALLOW","includes":{"arches":["amd64","x32"]}},
	  {"names":["ptrace"],"action":"SCMP_ACT_ALLOW","includes":{"minKernel":"4.8"}},
	  {"names":["future"],"action":"SCMP_ACT_ALLOW","includes":{"minKernel":"99.0"}}
	 ]}`
	for _, c := range []struct {
		arch  string
		caps  []string
		names []string
		sub   specs.Arch
	}{
		{"amd64", nil, []string{"read", "bdflush", "clone", "arch_prctl", "ptrace"}, specs.ArchX86},
		{"arm64", []string{"CAP_SYS_ADMIN"}, []string{"read", "bdflush", "mount", "ptrace"}, specs.ArchARM},
	} {
		p, err := Parse([]byte(text), c.caps, c.arch)
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, s := range p.Syscalls {
			names = append(names, s.Names...)
		}
		if !slices.Equal(names, c.names) || p.Architectures[1] != c.sub || *p.DefaultErrnoRet != 38 || *p.Syscalls[1].ErrnoRet != 1 {
			t.Errorf("%s: %v %+v", c.arch, names, p)
		}
	}
}

// The published form of the default profile, as operators copy it.
func TestParseMobyDefault(t *testing.T) {
	b, err := json.Marshal(moby.DefaultProfile())
	if err != nil {
		t.Fatal(err)
	}
	p, err := Parse(b, dockerCaps, "amd64")
	if err != nil {
		t.Fatal(err)
	}
	want, got := mobyProfile(t, dockerCaps, "amd64"), p
	x, _ := json.Marshal(want)
	y, _ := json.Marshal(got)
	if !reflect.DeepEqual(x, y) {
		t.Errorf("%s\n%s", x, y)
	}
}

// Other runtimes read a repeated argument as alternatives, so the default
// profile must not repeat one.
func TestDefaultIsPortable(t *testing.T) {
	for _, caps := range [][]string{nil, dockerCaps, adminCaps} {
		p := Default(caps, "amd64")
		for _, s := range p.Syscalls {
			seen := map[uint]bool{}
			for _, a := range s.Args {
				if seen[a.Index] {
					t.Errorf("%v repeats argument %d", s.Names, a.Index)
				}
				seen[a.Index] = true
			}
		}
		if slices.Contains(p.Architectures, specs.ArchX32) {
			t.Error("x32 is listed")
		}
	}
}

func FuzzParse(f *testing.F) {
	b, _ := json.Marshal(moby.DefaultProfile())
	f.Add(b)
	f.Add([]byte(small))
	f.Add([]byte(`{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["socket"],"action":"SCMP_ACT_KILL","args":[{"index":0,"value":1,"valueTwo":1,"op":"SCMP_CMP_MASKED_EQ"},{"index":0,"value":4294967295,"op":"SCMP_CMP_LE"}]}]}`))
	f.Add([]byte(`{"defaultAction":"SCMP_ACT_ERRNO","defaultErrno":"ENOSYS","syscalls":[{"name":"ipc","errno":"EPERM","action":"SCMP_ACT_TRACE","includes":{"minKernel":"5.0"}}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, arch := range []string{"amd64", "arm64"} {
			p, err := Parse(b, dockerCaps, arch)
			if err != nil {
				if errs.Of(err) == errs.Internal {
					t.Fatal(err)
				}
				continue
			}
			filter, _, err := Compile(p, arch, Options{})
			if err != nil {
				if !errs.Is(err, errs.InvalidArgument) {
					t.Fatal(err)
				}
				continue // too long
			}
			vm := filterVM(t, filter)
			for _, b := range machineABIs(arch) {
				for _, nr := range []uint32{0, 41, 56, 117, 359, 600} {
					for _, args := range [][6]uint64{{}, {1, 2, 3}, {1<<32 + 1, ^uint64(0), 6}} {
						if g, w := run(t, vm, b.audit, nr|b.bit, args), naive(p, arch, b.audit, nr|b.bit, args); g != w {
							t.Fatalf("%s nr %d args %x: %08x, want %08x", b.name, nr, args, g, w)
						}
					}
				}
			}
		}
	})
}
