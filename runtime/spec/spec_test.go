package spec

import (
	"encoding/json"
	"flag"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/namespaces"
	"github.com/naru-project/naru/runtime"
	"github.com/naru-project/naru/runtime/seccomp"
)

var update = flag.Bool("update", false, "write the golden files again")

// files is a Root of texts, by path.
type files map[string]string

func (f files) Open(path string) (*os.File, error) {
	text, ok := f[path]
	if !ok {
		return nil, &os.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	go func() {
		_, _ = w.WriteString(text)
		_ = w.Close()
	}()
	return r, nil
}

// nodes is a DeviceSource of fixed devices.
type nodes map[string][]specs.LinuxDevice

func (n nodes) Lookup(path string) ([]specs.LinuxDevice, error) {
	d, ok := n[path]
	if !ok {
		return nil, errs.New(errs.InvalidArgument, "device %s: none", path)
	}
	return slices.Clone(d), nil
}

var testNodes = nodes{
	"/dev/fuse": {{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229, FileMode: new(os.FileMode(0o666)), UID: new(uint32), GID: new(uint32)}},
	"/dev/snd":  {{Path: "/dev/snd/seq", Type: "c", Major: 116, Minor: 1}, {Path: "/dev/snd/timer", Type: "c", Major: 116, Minor: 33}},
	"/dev":      {{Path: "/dev/null", Type: "c", Major: 1, Minor: 3}, {Path: "/dev/sda", Type: "b", Major: 8, Minor: 0}},
}

const passwd = `# accounts
root:x:0:0:root:/root:/bin/sh
app:x:1000:1001:App:/home/app:/bin/sh
www-data:x:33:33::/var/www:
nohome:x:70:70
4294967296:x:0:0::/:/bin/sh
65537:x:0:0::/:/bin/sh
bad:x:-1:0::/:
huge:x:4294967295:0::/:
word:x:abc:0::/:
twin:x:1000:5::/twin:
`

const group = `root:x:0:
app:x:1001:
www-data:x:33:app
audio:x:29:other,app
video:x:44:application,apps
disk:x:6:root
4294967296:x:0:
extra:x:50000:app
broken:x:zz:nobody
`

func testHost() Host {
	bounding := append(DefaultCapabilities(), "CAP_NET_ADMIN", "CAP_SYS_ADMIN", "CAP_SYS_PTRACE")
	slices.Sort(bounding)
	return Host{
		Arch: "amd64", Bounding: bounding, CgroupV2: true, MinOOMScoreAdj: -1000,
		MaxRlimits: map[string]uint64{"RLIMIT_NOFILE": 1048576, "RLIMIT_SIGPENDING": 30000},
	}
}

// ordinary is the input of a typical container.
func ordinary() Input {
	return Input{
		ID:      strings.Repeat("ab", 32),
		Command: []string{"/bin/app"}, Args: []string{"-v"},
		Env: []string{"KEY=value=with=signs", "BYTES=\xff\xfe\n"},
		Image: ocispec.ImageConfig{
			Entrypoint: []string{"/entry"}, Cmd: []string{"cmd"}, Env: []string{"PATH=/image/bin", "KEY=image"},
			User: "app", WorkingDir: "work", Volumes: map[string]struct{}{"/data": {}},
		},
		Security: runtime.Security{MaskedPaths: DefaultMaskedPaths(), ReadonlyPaths: DefaultReadonlyPaths(), NoNewPrivs: true},
		Resources: runtime.Resources{
			CPUPeriod: 100000, CPUQuota: 50000, CPUShares: 512, CpusetCpus: "0-1", Memory: 64 << 20, OOMScoreAdj: 999,
			Hugepages: []runtime.HugepageLimit{{PageSize: "2MB", Limit: 1 << 21}}, Unified: map[string]string{"memory.oom.group": "1"},
		},
		Hostname: "pod",
		EtcFiles: map[string]string{"/etc/hosts": "/run/x/hosts", "/etc/resolv.conf": "/run/x/resolv.conf"},
		Shm:      "/run/x/shm",
		Mounts: []runtime.Mount{
			{ContainerPath: "/vol/", HostPath: "/var/lib/vol", Readonly: true, RecursiveReadonly: true, Options: []string{"noexec"}},
			{ContainerPath: "/models", Image: "models:1", ImageRef: "sha256:1234", Readonly: true},
		},
		Namespaces: namespaces.Paths{Net: "/run/ns/net", IPC: "/run/ns/ipc", UTS: "/run/ns/uts"},
		CgroupPath: "/kubepods/pod1/c1", RootPath: "/rootfs", Annotations: map[string]string{"a": "b"},
		Host: testHost(), Root: files{"/etc/passwd": passwd, "/etc/group": group}, Nodes: testNodes,
	}
}

func TestBuildGolden(t *testing.T) {
	for name, edit := range map[string]func(*Input){
		"default": func(*Input) {},
		"privileged": func(in *Input) {
			in.Security.Privileged, in.Security.NoNewPrivs = true, false
			in.Security.RunAsUser = new(int64)
			in.Host.AppArmor = true
			in.Mounts = append(in.Mounts, runtime.Mount{ContainerPath: "/sys", HostPath: "/sys", Propagation: runtime.PropagationBidirectional})
		},
		"userns": func(in *Input) {
			m := []runtime.IDMap{{ContainerID: 0, HostID: 131072, Size: 65536}}
			in.UIDMap, in.GIDMap, in.Namespaces.User = m, m, "/run/ns/user"
			in.Security.AddCaps = []string{"NET_ADMIN"}
			in.Security.RunAsUser, in.Security.RunAsGroup = new(int64(0)), new(int64(7))
		},
		"readonly": func(in *Input) {
			in.Security.ReadonlyRootfs, in.Security.DropCaps = true, []string{"ALL"}
			in.Security.SupplementalGroups, in.Security.GroupsPolicyStrict = []int64{4, 3, 4}, true
			in.Host.AppArmor = true
		},
		"hostnetwork": func(in *Input) {
			in.Namespaces = namespaces.Paths{}
			in.Security.PIDMode = runtime.PIDNode
			in.Security.Seccomp.Type = runtime.ProfileUnconfined
			in.Devices = []runtime.Device{{HostPath: "/dev/fuse", ContainerPath: "/dev/fuse", Permissions: "rw"}, {HostPath: "/dev/snd", ContainerPath: "/dev/sound", Permissions: "r"}}
		},
		"tty": func(in *Input) {
			in.TTY = true
			in.Image = ocispec.ImageConfig{Cmd: []string{"sh"}}
			in.Command, in.Args, in.Mounts = nil, nil, nil
			in.Security.PIDMode, in.TargetPID = runtime.PIDTarget, 4711
			in.Security.AddAmbientCaps, in.Security.RunAsUser = []string{"net_bind_service"}, new(int64(12345))
		},
	} {
		t.Run(name, func(t *testing.T) {
			in := ordinary()
			edit(&in)
			s, u, err := Build(in)
			if err != nil {
				t.Fatal(err)
			}
			if sc := s.Linux.Seccomp; sc != nil {
				want := seccomp.Default(s.Process.Capabilities.Bounding, "amd64")
				if !reflect.DeepEqual(sc, want) {
					t.Error("the seccomp profile is not the default one")
				}
				sc.Syscalls = nil // tested where it is made
			}
			golden(t, name, map[string]any{"spec": s, "user": u})
		})
	}
}

func golden(t *testing.T, name string, v any) {
	t.Helper()
	got, err := json.MarshalIndent(v, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join("testdata", name+".json")
	if *update {
		if err := os.WriteFile(file, append(got, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if strings.TrimSpace(string(want)) != string(got) {
		t.Errorf("differs from %s (see the difference with -update and git diff):\n%s", file, got)
	}
}

// What comes out must not change with what went in, nor the reverse: images
// and configurations are shared between containers (CVE-2021-21334).
func TestBuildSharesNothing(t *testing.T) {
	in := ordinary()
	before, _ := json.Marshal(in.Image)
	a, ua, err := Build(in)
	if err != nil {
		t.Fatal(err)
	}
	first, _ := json.Marshal(a)
	a.Process.Env[0], a.Process.Args[0], a.Process.Capabilities.Bounding[0] = "X", "X", "X"
	a.Annotations["a"], a.Linux.Resources.Unified["memory.oom.group"] = "X", "X"
	a.Linux.MaskedPaths[0], a.Process.Rlimits[0].Soft = "X", 7
	ua.Groups[0] = 99
	a.Process.User.AdditionalGids[0] = 98
	b, ub, err := Build(in)
	if err != nil {
		t.Fatal(err)
	}
	second, _ := json.Marshal(b)
	after, _ := json.Marshal(in.Image)
	if string(first) != string(second) || string(before) != string(after) || ub.Groups[0] != 1001 {
		t.Error("the second container sees changes of the first")
	}
}

// refused runs Build on an edited ordinary input and wants an error of class.
func refused(t *testing.T, class errs.Class, edit func(*Input)) {
	t.Helper()
	in := ordinary()
	edit(&in)
	s, u, err := Build(in)
	if err == nil || errs.Of(err) != class {
		t.Errorf("%v (%v), want %v", err, errs.Of(err), class)
	}
	if s != nil || u != nil {
		t.Error("a result beside the error")
	}
}

func TestCommandRules(t *testing.T) {
	for _, c := range []struct{ command, args, entrypoint, cmd, want []string }{
		{nil, nil, []string{"e"}, []string{"c"}, []string{"e", "c"}},
		{nil, []string{"a"}, []string{"e"}, []string{"c"}, []string{"e", "a"}},
		{[]string{"k"}, nil, []string{"e"}, []string{"c"}, []string{"k"}},
		{[]string{"k"}, []string{"a"}, []string{"e"}, []string{"c"}, []string{"k", "a"}},
		{nil, []string{"a"}, nil, []string{"c"}, []string{"a"}},
		{nil, nil, nil, []string{"c"}, []string{"c"}},
		{[]string{"k", ""}, nil, nil, nil, []string{"k", ""}},
	} {
		in := ordinary()
		in.Command, in.Args, in.Image.Entrypoint, in.Image.Cmd = c.command, c.args, c.entrypoint, c.cmd
		s, _, err := Build(in)
		if err != nil || !slices.Equal(s.Process.Args, c.want) {
			t.Errorf("%+v: %v, %v", c, s, err)
		}
	}
	for name, argv := range map[string][]string{"none": nil, "empty": {""}, "NUL": {"a", "b\x00"}} {
		t.Run(name, func(t *testing.T) {
			refused(t, errs.InvalidArgument, func(in *Input) { in.Command, in.Args, in.Image.Entrypoint, in.Image.Cmd = argv, nil, nil, nil })
		})
	}
}

func TestEnvironment(t *testing.T) {
	in := ordinary()
	in.TTY = true
	in.Defaults.Env = []string{"FROM=config", "PROXY=p"}
	in.Image.Env = []string{"PATH=/i", "FROM=image", "noequals", "=nokey", "NUL=\x00", "EMPTY="}
	in.Env = []string{"FROM=container", "HOSTNAME=mine", "TWICE=1", "TWICE=2", "TERM=dumb"}
	s, _, err := Build(in)
	want := []string{"PATH=/i", "HOSTNAME=mine", "TERM=dumb", "FROM=container", "PROXY=p", "EMPTY=", "TWICE=2", "HOME=/home/app"}
	if err != nil || !slices.Equal(s.Process.Env, want) {
		t.Errorf("%q, %v, want %q", s.Process.Env, err, want)
	}
	in.Env, in.Image.Env, in.Defaults.Env = []string{"HOME="}, nil, nil
	if s, _, _ = Build(in); !slices.Equal(s.Process.Env, []string{"PATH=" + DefaultPath, "HOSTNAME=pod", "TERM=xterm", "HOME="}) {
		t.Errorf("%q", s.Process.Env)
	}
	for _, e := range []string{"", "secret", "=secret", "secret=\x00"} {
		in := ordinary()
		in.Env = []string{e}
		if _, _, err := Build(in); !errs.Is(err, errs.InvalidArgument) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%q: %v", e, err)
		}
	}
}

func TestWorkingDir(t *testing.T) {
	for _, c := range []struct{ container, image, want string }{
		{"", "", "/"},
		{"", "rel/ative", "/rel/ative"},
		{"/a/../b//c/", "/image", "/b/c"},
		{"../../x", "", "/x"},
		{"/process", "", "/process"},
		{"", "/proc/self/fd/7", ""},
		{"/proc", "", ""},
		{"/x/../proc/1/root", "", ""},
		{"proc/self/cwd/../../..", "", "/"},
		{"/a\x00b", "", ""},
		{"", strings.Repeat("/a", 32768), ""},
	} {
		in := ordinary()
		in.WorkingDir, in.Image.WorkingDir = c.container, c.image
		s, _, err := Build(in)
		if c.want == "" {
			if !errs.Is(err, errs.InvalidArgument) {
				t.Errorf("%q %q: %v", clip(c.container), clip(c.image), err)
			}
		} else if err != nil || s.Process.Cwd != c.want {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

func TestCapabilities(t *testing.T) {
	host := testHost().Bounding
	without := func(set []string, drop ...string) []string {
		return slices.DeleteFunc(slices.Clone(set), func(c string) bool { return slices.Contains(drop, c) })
	}
	with := func(set []string, add ...string) []string {
		out := slices.Concat(set, add)
		slices.Sort(out)
		return slices.Compact(out)
	}
	def := DefaultCapabilities()
	for name, c := range map[string]struct {
		sec      runtime.Security
		bounding []string
		ambient  []string
	}{
		"default":                  {runtime.Security{}, def, nil},
		"add":                      {runtime.Security{AddCaps: []string{"net_admin", "CAP_SYS_PTRACE"}}, with(def, "CAP_NET_ADMIN", "CAP_SYS_PTRACE"), nil},
		"drop":                     {runtime.Security{DropCaps: []string{"CHOWN", "cap_kill", "SYS_BOOT"}}, without(def, "CAP_CHOWN", "CAP_KILL"), nil},
		"drop all":                 {runtime.Security{DropCaps: []string{"all"}}, nil, nil},
		"drop all, add one":        {runtime.Security{DropCaps: []string{"ALL"}, AddCaps: []string{"CHOWN"}}, []string{"CAP_CHOWN"}, nil},
		"add all":                  {runtime.Security{AddCaps: []string{"ALL"}}, host, nil},
		"add all, drop one":        {runtime.Security{AddCaps: []string{"ALL"}, DropCaps: []string{"SYS_ADMIN"}}, without(host, "CAP_SYS_ADMIN"), nil},
		"add and drop all":         {runtime.Security{AddCaps: []string{"ALL"}, DropCaps: []string{"ALL"}}, nil, nil},
		"add and drop":             {runtime.Security{AddCaps: []string{"SYS_ADMIN"}, DropCaps: []string{"SYS_ADMIN"}}, def, nil},
		"drop what the host lacks": {runtime.Security{AddCaps: []string{"SYS_RESOURCE"}, DropCaps: []string{"SYS_RESOURCE"}}, def, nil},
		"ambient":                  {runtime.Security{AddAmbientCaps: []string{"NET_ADMIN"}}, with(def, "CAP_NET_ADMIN"), []string{"CAP_NET_ADMIN"}},
		"ambient, dropped":         {runtime.Security{AddAmbientCaps: []string{"NET_ADMIN"}, DropCaps: []string{"NET_ADMIN"}}, def, nil},
		"ambient all":              {runtime.Security{AddAmbientCaps: []string{"ALL"}}, host, host},
		"privileged":               {runtime.Security{Privileged: true, DropCaps: []string{"ALL"}, AddAmbientCaps: []string{"CHOWN"}}, host, nil},
	} {
		for _, uid := range []int64{0, 1000} {
			in := ordinary()
			in.Security = c.sec
			in.Security.RunAsUser = &uid
			s, _, err := Build(in)
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			got := s.Process.Capabilities
			effective := c.bounding
			if uid != 0 {
				effective = c.ambient
			}
			if !slices.Equal(got.Bounding, c.bounding) || !slices.Equal(got.Effective, effective) || !slices.Equal(got.Permitted, effective) ||
				!slices.Equal(got.Ambient, c.ambient) || !slices.Equal(got.Inheritable, c.ambient) {
				t.Errorf("%s as %d: %+v", name, uid, got)
			}
		}
	}
	for _, n := range []string{"", "CAP_", "NET-ADMIN", "CAP_CAP_CHOWN", "CHOWN\x00", strings.Repeat("A", 9999)} {
		for _, edit := range []func(*Input){
			func(in *Input) { in.Security.AddCaps = []string{n} },
			func(in *Input) { in.Security.DropCaps = []string{n} },
			func(in *Input) { in.Security.AddAmbientCaps = []string{n} },
		} {
			refused(t, errs.InvalidArgument, edit)
		}
	}
	refused(t, errs.FailedPrecondition, func(in *Input) { in.Security.AddCaps = []string{"SYS_RESOURCE"} })
}

func TestMountsAndPaths(t *testing.T) {
	good := runtime.Mount{ContainerPath: "/v", HostPath: "/h"}
	for name, edit := range map[string]func(*runtime.Mount){
		"relative": func(m *runtime.Mount) { m.ContainerPath = "v" }, "empty": func(m *runtime.Mount) { m.ContainerPath = "" },
		"root": func(m *runtime.Mount) { m.ContainerPath = "/a/.." }, "NUL": func(m *runtime.Mount) { m.ContainerPath = "/a\x00" },
		"long": func(m *runtime.Mount) { m.ContainerPath = strings.Repeat("/a", 4000) },
		"proc": func(m *runtime.Mount) { m.ContainerPath = "/proc" }, "proc dot": func(m *runtime.Mount) { m.ContainerPath = "//proc/." },
		"attr": func(m *runtime.Mount) { m.ContainerPath = "/proc/self/attr" }, "sysrq": func(m *runtime.Mount) { m.ContainerPath = "/proc/sysrq-trigger" },
		"proc by sys": func(m *runtime.Mount) { m.ContainerPath = "/sys/fs/../../proc" }, "sys": func(m *runtime.Mount) { m.ContainerPath = "/sys/" },
		"sys kernel": func(m *runtime.Mount) { m.ContainerPath = "/sys/kernel" }, "proc by dev": func(m *runtime.Mount) { m.ContainerPath = "/dev/../proc" },
		"below harmless": func(m *runtime.Mount) { m.ContainerPath = "/proc/cpuinfo/x" },
		"no source":      func(m *runtime.Mount) { m.HostPath = "" }, "relative source": func(m *runtime.Mount) { m.HostPath = "h" },
		"both sources": func(m *runtime.Mount) { m.Image = "x" }, "sub path": func(m *runtime.Mount) { m.ImageSubPath = "x" },
		"propagation": func(m *runtime.Mount) { m.Propagation = "loud" }, "option": func(m *runtime.Mount) { m.Options = []string{"suid"} },
		"rro alone": func(m *runtime.Mount) { m.RecursiveReadonly = true },
		"rro shared": func(m *runtime.Mount) {
			m.RecursiveReadonly, m.Readonly, m.Propagation = true, true, runtime.PropagationBidirectional
		},
		"half a map": func(m *runtime.Mount) { m.UIDMap = []runtime.IDMap{{HostID: 5, Size: 1}} },
	} {
		t.Run(name, func(t *testing.T) {
			refused(t, errs.InvalidArgument, func(in *Input) {
				m := good
				edit(&m)
				in.Mounts = []runtime.Mount{m}
			})
		})
	}
	for p, privileged := range map[string]bool{"/proc/cpuinfo": false, "/sys/fs/bpf": false, "/sys/fs/cgroup/x": false, "/sys": true, "/sys/kernel/debug": true, "/dev": false, "/dev/../data": false, "/processes": false} {
		if _, err := MountTarget(p, privileged); err != nil {
			t.Errorf("%s: %v", p, err)
		}
	}
	if _, err := MountTarget("/proc/self", true); !errs.Is(err, errs.InvalidArgument) {
		t.Errorf("privileged /proc/self: %v", err)
	}
	many := make([]string, 10000)
	for i := range many {
		many[i] = "/x"
	}
	for name, list := range map[string][]string{
		"relative": {"relative"}, "dots": {"/etc/../proc/kcore"}, "slash": {"/a/"}, "root": {"/"}, "empty": {""}, "many": many, "NUL": {"/a\x00"},
	} {
		t.Run(name, func(t *testing.T) {
			refused(t, errs.InvalidArgument, func(in *Input) { in.Security.MaskedPaths = list })
			refused(t, errs.InvalidArgument, func(in *Input) { in.Security.ReadonlyPaths = list })
		})
	}
	for _, p := range []string{"/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats",
		"/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap"} {
		if !slices.Contains(DefaultMaskedPaths(), p) {
			t.Errorf("%s is not masked", p)
		}
	}
	for _, p := range []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"} {
		if !slices.Contains(DefaultReadonlyPaths(), p) {
			t.Errorf("%s is not read-only", p)
		}
	}
}

func TestVolumes(t *testing.T) {
	set := func(v ...string) map[string]struct{} {
		m := map[string]struct{}{}
		for _, s := range v {
			m[s] = struct{}{}
		}
		return m
	}
	got, err := Volumes(set("/b", "a/", "/b/", "/taken", "/processes"), []runtime.Mount{{ContainerPath: "/taken/"}})
	if err != nil || !slices.Equal(got, []string{"/a", "/b", "/processes"}) {
		t.Error(got, err)
	}
	for _, v := range []string{"", "/", ".", "..", "../..", "/../../../etc", "/etc/../../../canary", "/a/..", "/proc", "proc/self", "/sys", "/sys/fs", "/dev", "/dev/x", "/a\x00", strings.Repeat("/a", 4000)} {
		if got, err := Volumes(set(v), nil); !errs.Is(err, errs.InvalidArgument) {
			t.Errorf("%q: %v, %v", clip(v), got, err)
		}
		refused(t, errs.InvalidArgument, func(in *Input) { in.Image.Volumes = set(v) })
	}
	bomb := map[string]struct{}{}
	for i := range 10000 {
		bomb["/v"+strings.Repeat("x", i%200)+string(rune('a'+i%26))+strings.Repeat("y", i/200)] = struct{}{}
	}
	if _, err := Volumes(bomb, nil); !errs.Is(err, errs.InvalidArgument) {
		t.Errorf("%d volumes: %v", len(bomb), err)
	}
}
