package cdi

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime"
	"github.com/naru-project/naru/runtime/spec"
)

var update = flag.Bool("update", false, "write the golden files again")

// folder makes a folder of specification files as only root can.
func folder(t testing.TB, files map[string]string) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: specification files are root's")
	}
	dir := t.TempDir()
	for name, text := range files {
		write(t, filepath.Join(dir, name), text)
	}
	return dir
}

func write(t testing.TB, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// gpu is what nvidia-ctk writes, shortened.
const gpu = `cdiVersion: 0.7.0
kind: nvidia.com/gpu
containerEdits:
  env: [NVIDIA_VISIBLE_DEVICES=void, LD_LIBRARY_PATH=/driver]
  deviceNodes:
  - {path: /dev/nvidiactl, type: c, major: 195, minor: 255, fileMode: 438}
  hooks:
  - {hookName: createContainer, path: /usr/bin/nvidia-cdi-hook, args: [nvidia-cdi-hook, update-ldcache, --folder, /usr/lib64], env: [NVIDIA_CTK_DEBUG=false]}
  mounts:
  - {hostPath: /usr/bin/nvidia-smi, containerPath: /usr/bin/nvidia-smi, options: [ro, nosuid, nodev, rbind, rprivate]}
devices:
- name: "0"
  containerEdits:
    env: [GPU=0]
    deviceNodes: [{path: /dev/nvidia0, type: c, major: 195, minor: 0, permissions: rw, gid: 44}]
- name: "1"
  containerEdits:
    env: [GPU=1]
    deviceNodes: [{path: /dev/nvidia1, type: c, major: 195, minor: 1, permissions: none}]
    mounts: [{hostPath: /run/gpu1, containerPath: /data, options: [rslave]}]
    additionalGids: [44, 0]
`

func plain(kind, device, edits string) string {
	return fmt.Sprintf("cdiVersion: 1.1.0\nkind: %s\ndevices:\n- name: %q\n  containerEdits: {%s}\n", kind, device, edits)
}

// TestGolden pins what devices do to the specification of a container.
func TestGolden(t *testing.T) {
	r := New([]string{folder(t, map[string]string{"gpu.yaml": gpu})})
	for name, devices := range map[string][]string{"one": {"nvidia.com/gpu=0"}, "two": {"nvidia.com/gpu=1", "nvidia.com/gpu=0"}} {
		t.Run(name, func(t *testing.T) {
			e, err := r.Resolve(devices)
			if err != nil {
				t.Fatal(err)
			}
			in := spec.Input{
				ID: strings.Repeat("a", 64), Command: []string{"/bin/app"}, Env: []string{"GPU=none", "MINE=1"}, Image: ocispec.ImageConfig{Env: []string{"LD_LIBRARY_PATH=/image"}},
				Security: runtime.Security{Seccomp: runtime.Profile{Type: runtime.ProfileUnconfined}}, Mounts: e.Mounts(nil, nil), CgroupPath: "/x", RootPath: "rootfs",
				Host: spec.Host{Arch: "amd64", MaxRlimits: map[string]uint64{}},
			}
			s, _, err := spec.Build(in)
			if err == nil {
				err = e.Apply(s)
			}
			if err != nil {
				t.Fatal(err)
			}
			got, err := json.MarshalIndent(s, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			golden := filepath.Join("testdata", name+".json")
			if *update {
				write(t, golden, string(got)+"\n")
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if string(want) != string(got)+"\n" {
				t.Errorf("differs from %s (-update after a change that is meant):\n%s", golden, got)
			}
		})
	}
}

// TestNoneIsNone: the permissions "none" give a node and no access to it.
func TestNoneIsNone(t *testing.T) {
	r := New([]string{folder(t, map[string]string{"gpu.yaml": gpu})})
	e, err := r.Resolve([]string{"nvidia.com/gpu=1"})
	if err != nil {
		t.Fatal(err)
	}
	s := &specs.Spec{}
	if err := e.Apply(s); err != nil {
		t.Fatal(err)
	}
	if len(s.Linux.Devices) != 2 || len(s.Linux.Resources.Devices) != 1 || *s.Linux.Resources.Devices[0].Minor != 255 {
		t.Errorf("devices %v with the rules %v", s.Linux.Devices, s.Linux.Resources.Devices)
	}
}

func TestMounts(t *testing.T) {
	dir := folder(t, map[string]string{"a.json": `{"cdiVersion":"0.6.0","kind":"a.com/x","devices":[{"name":"1","containerEdits":{"mounts":[
		{"hostPath":"/a","containerPath":"/b","options":["rbind","ro","noexec","nosuid","nodev","rshared"]},
		{"hostPath":"/c","containerPath":"/d"}]}}]}`})
	e, err := New([]string{dir}).Resolve([]string{"a.com/x=1"})
	if err != nil {
		t.Fatal(err)
	}
	ids := []runtime.IDMap{{HostID: 1000, Size: 10}}
	want := []runtime.Mount{
		{HostPath: "/a", ContainerPath: "/b", Readonly: true, Options: []string{"noexec", "nosuid", "nodev"}, Propagation: runtime.PropagationBidirectional, UIDMap: ids, GIDMap: ids},
		{HostPath: "/c", ContainerPath: "/d", Propagation: runtime.PropagationPrivate},
	}
	if got := e.Mounts(ids, ids); !reflect.DeepEqual(got, want) {
		t.Errorf("%+v", got)
	}
}

// TestRefused: what cannot be done is an error that names device, file and
// part; never a device that is there by half.
func TestRefused(t *testing.T) {
	for edits, want := range map[string]struct {
		class errs.Class
		text  string
	}{
		"intelRdt: {closID: x}":                                           {errs.Unimplemented, "intelRdt"},
		"netDevices: [{hostInterfaceName: eth9, name: eth0}]":             {errs.Unimplemented, "netDevices"},
		"hooks: [{hookName: createContainer, path: bin/x}]":               {errs.FailedPrecondition, "absolute"},
		"hooks: [{hookName: createContainer, path: /bin/x, timeout: -1}]": {errs.FailedPrecondition, "-1 seconds"},
		`env: ["A=b\0c"]`: {errs.FailedPrecondition, "NUL"},
		"mounts: [{hostPath: tmpfs, containerPath: /t, type: tmpfs}]":         {errs.Unimplemented, `type "tmpfs"`},
		"mounts: [{hostPath: /a, containerPath: /t, options: [nosymfollow]}]": {errs.Unimplemented, `option "nosymfollow"`},
	} {
		r := New([]string{folder(t, map[string]string{"v.yaml": plain("v.com/x", "d", edits)})})
		_, err := r.Resolve([]string{"v.com/x=d"})
		if errs.Of(err) != want.class || err == nil || !strings.Contains(err.Error(), want.text) || !strings.Contains(err.Error(), `"v.com/x=d"`) || !strings.Contains(err.Error(), "v.yaml") {
			t.Errorf("%s: %v (%v)", edits, err, errs.Of(err))
		}
	}
	// A node of the host that is not there is found when it is needed.
	e, err := New([]string{folder(t, map[string]string{"v.yaml": plain("v.com/x", "d", "deviceNodes: [{path: /dev/no-such-node}]")})}).Resolve([]string{"v.com/x=d"})
	if err != nil {
		t.Fatal(err)
	}
	if err := e.Apply(&specs.Spec{}); !errs.Is(err, errs.FailedPrecondition) || !strings.Contains(err.Error(), "/dev/no-such-node") || !strings.Contains(err.Error(), "v.com/x=d") {
		t.Error(err)
	}
}

// K-03: names are checked, unknown ones are errors that say where was looked;
// a broken file costs only its own devices, and what others than root can
// write counts for nothing.
func TestBrokenFilesK03(t *testing.T) {
	good := plain("good.com/x", "d", "env: [A=b]")
	broken := map[string]string{
		"text": "not: [yaml", "empty": "", "version": "cdiVersion: 9.9.9\nkind: v.com/x\ndevices: []\n",
		"unknown key": "cdiVersion: 0.6.0\nkind: v.com/x\nnew: 1\n",
		"null node":   plain("v.com/x", "d", "deviceNodes: [null]"), "null mount": plain("v.com/x", "d", "mounts: [null]"), "null hook": plain("v.com/x", "d", "hooks: [null]"),
		"climbing kind": plain("v.com/../x", "d", "env: [A=b]"), "huge": strings.Repeat("#", maxFile+1),
	}
	other := map[string]func(path string) error{
		"FIFO":             func(p string) error { return unix.Mkfifo(p, 0o600) },
		"folder":           func(p string) error { return os.Mkdir(p, 0o755) },
		"link to nowhere":  func(p string) error { return os.Symlink("/no/such/file", p) },
		"link to a device": func(p string) error { return os.Symlink("/dev/zero", p) },
		"writable": func(p string) error {
			return os.WriteFile(p, []byte(plain("v.com/x", "d", "env: [A=b]")), 0o644)
		},
		"another's": func(p string) error {
			return os.WriteFile(p, []byte(plain("v.com/x", "d", "env: [A=b]")), 0o644)
		},
	}
	for name, text := range broken {
		other[name] = func(p string) error { return os.WriteFile(p, []byte(text), 0o644) }
	}
	for name, make := range other {
		t.Run(name, func(t *testing.T) {
			dir := folder(t, map[string]string{"good.yaml": good})
			bad := filepath.Join(dir, "bad.yaml")
			if err := make(bad); err != nil {
				t.Fatal(err)
			}
			switch name {
			case "writable":
				_ = os.Chmod(bad, 0o666)
			case "another's":
				_ = os.Chown(bad, 1000, 0)
			}
			r := New([]string{"/no/such/folder", dir})
			if e, err := r.Resolve([]string{"good.com/x=d"}); err != nil || e.edits.Env[0] != "A=b" {
				t.Errorf("the good device: %v", err)
			}
			_, err := r.Resolve([]string{"v.com/x=d"})
			if !errs.Is(err, errs.FailedPrecondition) || !strings.Contains(err.Error(), `"v.com/x=d" is in no specification file of /no/such/folder, `+dir) {
				t.Errorf("the bad one: %v", err)
			}
			if name != "link to nowhere" && !strings.Contains(err.Error(), "bad.yaml") {
				t.Errorf("the error does not say which file is bad: %v", err)
			}
		})
	}
	t.Run("folder of another", func(t *testing.T) {
		for name, change := range map[string]func(dir string) error{
			"owner": func(d string) error { return os.Chown(d, 1000, 0) }, "mode": func(d string) error { return os.Chmod(d, 0o777) },
		} {
			dir := folder(t, map[string]string{"good.yaml": good})
			if err := change(dir); err != nil {
				t.Fatal(err)
			}
			if _, err := New([]string{dir}).Resolve([]string{"good.com/x=d"}); !errs.Is(err, errs.FailedPrecondition) || !strings.Contains(err.Error(), "root") {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
	for _, name := range []string{"", "gpu", "v.com/x", "v.com/x=../y", "v.com/../x=d", "v.com/x=d\n", strings.Repeat("v", 4096)} {
		if _, err := New([]string{t.TempDir()}).Resolve([]string{name}); !errs.Is(err, errs.InvalidArgument) {
			t.Errorf("%.20q: %v", name, err)
		}
	}
	if _, err := New(nil).Resolve([]string{"v.com/x=d"}); !errs.Is(err, errs.FailedPrecondition) || !strings.Contains(err.Error(), "switched off") {
		t.Error(err)
	}
}

// TestRefresh: each change of the folders is seen by the next call, at once.
func TestRefresh(t *testing.T) {
	low, high := folder(t, nil), folder(t, nil)
	r := New([]string{low, filepath.Join(high, "later")})
	want := func(env string) {
		t.Helper()
		e, err := r.Resolve([]string{"v.com/x=d"})
		switch {
		case env == "" && !errs.Is(err, errs.FailedPrecondition):
			t.Errorf("got %v, want no device", err)
		case env != "" && (err != nil || !slices.Equal(e.edits.Env, []string{env})):
			t.Errorf("got %v, want %s", err, env)
		}
	}
	text := func(env string) string { return plain("v.com/x", "d", "env: ["+env+"]") }
	want("")
	for i := range 20 { // of one size, and faster than a clock ticks
		write(t, low+"/a.yaml", text(fmt.Sprintf("A=%02d", i)))
		want(fmt.Sprintf("A=%02d", i))
		time.Sleep(5 * time.Millisecond)
	}
	if err := os.Mkdir(high+"/later", 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, high+"/later/b.json", `{"cdiVersion":"0.6.0","kind":"v.com/x","devices":[{"name":"d","containerEdits":{"env":["B=high"]}}]}`)
	want("B=high") // the later folder goes before
	write(t, high+"/later/c.yaml", text("C=twin"))
	if _, err := r.Resolve([]string{"v.com/x=d"}); !errs.Is(err, errs.FailedPrecondition) || !strings.Contains(err.Error(), "b.json") || !strings.Contains(err.Error(), "c.yaml") {
		t.Errorf("a device in two files of a folder: %v", err)
	}
	if err := os.RemoveAll(high + "/later"); err != nil {
		t.Fatal(err)
	}
	want("A=19")
	if err := os.Rename(low+"/a.yaml", low+"/a.yaml.off"); err != nil {
		t.Fatal(err)
	}
	want("")
}

// TestMany uses a registry from several sides: the library completes device
// nodes in place, which must not be seen by others.
func TestMany(t *testing.T) {
	r := New([]string{folder(t, map[string]string{"v.yaml": plain("v.com/x", "d", "deviceNodes: [{path: /dev/mine, hostPath: /dev/null}]")})})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 20 {
				e, err := r.Resolve([]string{"v.com/x=d"})
				if err != nil {
					t.Error(err)
					return
				}
				s := &specs.Spec{}
				if err := e.Apply(s); err != nil || s.Linux.Devices[0].Major != 1 || s.Linux.Devices[0].Minor != 3 {
					t.Error(s.Linux, err)
				}
				if n := e.edits.DeviceNodes[0]; n.Major != 0 || n.FileMode != nil {
					t.Errorf("the edits were changed: %+v", n)
				}
			}
		})
	}
	wg.Wait()
}

// No file makes the daemon end, and what is taken can be applied.
func FuzzSpec(f *testing.F) {
	f.Add([]byte(gpu))
	f.Add([]byte(plain("v.com/x", "d", "deviceNodes: [null]")))
	f.Add([]byte(plain("v.com/x", "d", "mounts: [{hostPath: /a, containerPath: /b, options: [ro]}], additionalGids: [1]")))
	f.Fuzz(func(t *testing.T, data []byte) {
		dir := folder(t, map[string]string{"f.yaml": string(data)})
		r := New([]string{dir})
		r.refresh()
		for name := range r.devices() {
			e, err := r.Resolve([]string{name})
			if err != nil {
				if errs.Of(err) == errs.Internal {
					t.Errorf("no class: %v", err)
				}
				continue
			}
			e.Mounts(nil, nil)
			if err := e.Apply(&specs.Spec{}); err != nil && errs.Of(err) == errs.Internal {
				t.Errorf("no class: %v", err)
			}
		}
	})
}
