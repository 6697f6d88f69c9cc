package pod

import (
	"context"
	"errors"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/pod/store"
	"github.com/naru-project/naru/runtime"
	"github.com/naru-project/naru/sandbox"
)

func fullContainer() *ContainerConfig {
	uid := int64(3)
	return &ContainerConfig{
		Metadata: ContainerMetadata{Name: "c", Attempt: 1}, Image: "i", Env: []string{"A=1", "B=2", "A=3"},
		Mounts: []Mount{
			{ContainerPath: "/dev/termination-log", HostPath: "/pods/x/1234"},
			{ContainerPath: "/data", HostPath: "/data"},
		},
		Devices:     []Device{{ContainerPath: "/dev/b", HostPath: "/dev/b", Permissions: "r"}, {ContainerPath: "/dev/a", HostPath: "/dev/a", Permissions: "r"}},
		Annotations: map[string]string{terminationPathAnnotation: "/dev/termination-log"},
		Labels:      map[string]string{"x": "y"},
		Resources:   Resources{Hugepages: []HugepageLimit{{PageSize: "2MB", Limit: 1}, {PageSize: "1GB", Limit: 1}}},
		Security:    Security{RunAsUser: &uid, SupplementalGroups: []int64{5, 4}},
	}
}

func TestFirstDifference(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*ContainerConfig)
		want   string
	}{
		"same":         {func(*ContainerConfig) {}, ""},
		"env order":    {func(c *ContainerConfig) { c.Env = []string{"B=2", "A=1", "A=3"} }, ""},
		"env same key": {func(c *ContainerConfig) { c.Env = []string{"A=3", "B=2", "A=1"} }, "env[0]"},
		"env longer":   {func(c *ContainerConfig) { c.Env = append(c.Env, "C=secret") }, "env"},
		"device order": {func(c *ContainerConfig) { c.Devices[0], c.Devices[1] = c.Devices[1], c.Devices[0] }, ""},
		"hugepage order": {func(c *ContainerConfig) {
			c.Resources.Hugepages = []HugepageLimit{{PageSize: "1GB", Limit: 1}, {PageSize: "2MB", Limit: 1}}
		}, ""},
		"group order":      {func(c *ContainerConfig) { c.Security.SupplementalGroups = []int64{4, 5} }, ""},
		"termination file": {func(c *ContainerConfig) { c.Mounts[0].HostPath = "/pods/x/9999" }, ""},
		"other host path":  {func(c *ContainerConfig) { c.Mounts[1].HostPath = "/etc" }, "mounts[1].host_path"},
		"nil and empty":    {func(c *ContainerConfig) { c.Args = []string{}; c.CDIDevices = []string{} }, ""},
		"label":            {func(c *ContainerConfig) { c.Labels = map[string]string{"x": "z"} }, `labels["x"]`},
		"label gone":       {func(c *ContainerConfig) { c.Labels = nil }, `labels["x"]`},
		"pointer":          {func(c *ContainerConfig) { u := int64(4); c.Security.RunAsUser = &u }, "security.run_as_user"},
		"pointer nil":      {func(c *ContainerConfig) { c.Security.RunAsUser = nil }, "security.run_as_user"},
		"deep":             {func(c *ContainerConfig) { c.Resources.Memory = 7 }, "resources.memory"},
		"selinux":          {func(c *ContainerConfig) { c.Security.SELinux = &SELinux{Level: "s0"} }, "security.selinux"},
	} {
		b := fullContainer()
		tc.change(b)
		if got := firstDifference(fullContainer(), b); got != tc.want {
			t.Errorf("%s: %q, want %q", name, got, tc.want)
		}
		if err := sameConfig("x", "id", fullContainer(), b); (err != nil) != (tc.want != "") || err != nil && !errs.Is(err, errs.AlreadyExists) {
			t.Errorf("%s: %v", name, err)
		} else if err != nil && strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: a value is in the error: %v", name, err)
		}
	}
	a := &SandboxConfig{Ports: []PortMapping{{Protocol: sandbox.TCP, HostPort: 1, HostIP: netip.MustParseAddr("10.0.0.1")}}}
	b := &SandboxConfig{Ports: []PortMapping{{Protocol: sandbox.TCP, HostPort: 1, HostIP: netip.MustParseAddr("10.0.0.2")}}}
	if got := firstDifference(a, b); got != "ports[0].host_ip" {
		t.Errorf("host ip: %q", got)
	}
	if got := firstDifference(a, a); got != "" {
		t.Errorf("same sandbox: %q", got)
	}
	if firstDifference(a, fullContainer()) == "" {
		t.Error("a pod equals a container")
	}
}

func goodSandbox() *SandboxConfig {
	return &SandboxConfig{
		Metadata: Metadata{Name: "p", Namespace: "n", UID: "u"}, Network: sandbox.ModePod, IPC: sandbox.ModePod,
		PID: runtime.PIDPod, LogDirectory: "/var/log/pods/n_p_u", CgroupParent: "/kubepods/x",
	}
}

type plainCgroups struct{}

func (plainCgroups) ContainerPath(p, id string) (string, error) { return p + "/" + id, nil }
func (plainCgroups) ParentPath(p string) (string, error) {
	if strings.Contains(p, "..") {
		return "", errs.New(errs.InvalidArgument, "bad parent")
	}
	return p, nil
}

func TestValidateSandbox(t *testing.T) {
	m := &Manager{deps: Deps{Cgroups: plainCgroups{}}}
	m.live.Store(&Live{Handlers: builtinHandlers()})
	if err := m.validateSandbox(goodSandbox()); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*SandboxConfig){
		"no name":              func(c *SandboxConfig) { c.Metadata.Name = "" },
		"control character":    func(c *SandboxConfig) { c.Metadata.Namespace = "a\nb" },
		"long uid":             func(c *SandboxConfig) { c.Metadata.UID = strings.Repeat("u", 2000) },
		"unknown handler":      func(c *SandboxConfig) { c.Handler = "kata" },
		"long hostname":        func(c *SandboxConfig) { c.Hostname = strings.Repeat("h", 65) },
		"odd hostname":         func(c *SandboxConfig) { c.Hostname = "a b" },
		"relative log folder":  func(c *SandboxConfig) { c.LogDirectory = "var/log" },
		"log folder leads out": func(c *SandboxConfig) { c.LogDirectory = "/var/log/pods/../../../etc" },
		"cgroup parent":        func(c *SandboxConfig) { c.CgroupParent = "/a/../b" },
		"network mode":         func(c *SandboxConfig) { c.Network = "" },
		"ipc mode":             func(c *SandboxConfig) { c.IPC = "target" },
		"pid mode":             func(c *SandboxConfig) { c.PID = runtime.PIDTarget },
		"half a userns":        func(c *SandboxConfig) { c.UIDMap = []IDMap{{ContainerID: 0, HostID: 1000, Size: 10}} },
		"protocol":             func(c *SandboxConfig) { c.Ports = []PortMapping{{Protocol: "icmp", ContainerPort: 1}} },
		"port to nowhere":      func(c *SandboxConfig) { c.Ports = []PortMapping{{Protocol: sandbox.TCP, HostPort: 1}} },
		"negative memory":      func(c *SandboxConfig) { c.Resources = &Resources{Memory: -5} },
		"overhead":             func(c *SandboxConfig) { c.Overhead = &Resources{CPUPeriod: -5} },
		"sysctl":               func(c *SandboxConfig) { c.Sysctls = map[string]string{"net/../kernel/core_pattern": "|/x"} },
	} {
		c := goodSandbox()
		change(c)
		if err := m.validateSandbox(c); !errs.Is(err, errs.InvalidArgument) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestValidateContainer(t *testing.T) {
	p := goodSandbox()
	good := func() *ContainerConfig { return &ContainerConfig{Metadata: ContainerMetadata{Name: "c"}, Image: "i"} }
	mount := func(f func(*Mount)) func(*ContainerConfig) {
		return func(c *ContainerConfig) {
			m := Mount{ContainerPath: "/data", HostPath: "/tmp"}
			f(&m)
			c.Mounts = []Mount{m}
		}
	}
	for name, change := range map[string]func(*ContainerConfig){
		"plain": func(*ContainerConfig) {},
		"mount": mount(func(*Mount) {}),
		"rro":   mount(func(m *Mount) { m.Readonly, m.RecursiveReadonly = true, true }),
		"rro private": mount(func(m *Mount) {
			m.Readonly, m.RecursiveReadonly, m.Propagation = true, true, runtime.PropagationPrivate
		}),
		"options":   mount(func(m *Mount) { m.Options = []string{"noexec", "nodev", "nosuid"} }),
		"image":     mount(func(m *Mount) { m.HostPath, m.Image, m.ImageSubPath = "", "x", "sub" }),
		"log":       func(c *ContainerConfig) { c.LogPath = "c/0.log" },
		"bytes env": func(c *ContainerConfig) { c.Env = []string{"A=\xff\xfe", "B="} },
		"unlimited": func(c *ContainerConfig) { c.Resources = Resources{CPUQuota: -1, MemorySwap: -1, Memory: 5} },
	} {
		c := good()
		change(c)
		if err := validateContainer(p, c); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, change := range map[string]func(*ContainerConfig){
		"no name":         func(c *ContainerConfig) { c.Metadata.Name = "" },
		"no image":        func(c *ContainerConfig) { c.Image = "" },
		"env without =":   func(c *ContainerConfig) { c.Env = []string{"A"} },
		"env without key": func(c *ContainerConfig) { c.Env = []string{"=A"} },
		"env NUL":         func(c *ContainerConfig) { c.Env = []string{"A=\x00"} },
		"arg NUL":         func(c *ContainerConfig) { c.Args = []string{"\x00"} },
		"relative target": mount(func(m *Mount) { m.ContainerPath = "data" }),
		"target ..":       mount(func(m *Mount) { m.ContainerPath = "/data/../etc" }),
		"target root":     mount(func(m *Mount) { m.ContainerPath = "//" }),
		"relative source": mount(func(m *Mount) { m.HostPath = "tmp" }),
		"source NUL":      mount(func(m *Mount) { m.HostPath = "/\x00" }),
		"no source":       mount(func(m *Mount) { m.HostPath = "" }),
		"two sources":     mount(func(m *Mount) { m.Image = "x" }),
		"sub-path alone":  mount(func(m *Mount) { m.ImageSubPath = "x" }),
		"propagation":     mount(func(m *Mount) { m.Propagation = "rshared" }),
		"rro without ro":  mount(func(m *Mount) { m.RecursiveReadonly = true }),
		"rro slave": mount(func(m *Mount) {
			m.Readonly, m.RecursiveReadonly, m.Propagation = true, true, runtime.PropagationHostToContainer
		}),
		"option":    mount(func(m *Mount) { m.Options = []string{"suid"} }),
		"mount map": mount(func(m *Mount) { m.UIDMap = []IDMap{{ContainerID: 0, HostID: 0, Size: 1}} }),
		"device perms": func(c *ContainerConfig) {
			c.Devices = []Device{{ContainerPath: "/dev/a", HostPath: "/dev/a", Permissions: "rwx"}}
		},
		"device no perms": func(c *ContainerConfig) {
			c.Devices = []Device{{ContainerPath: "/dev/a", HostPath: "/dev/a", Permissions: ""}}
		},
		"device ..": func(c *ContainerConfig) {
			c.Devices = []Device{{ContainerPath: "/dev/a", HostPath: "/dev/../dev/mem", Permissions: "r"}}
		},
		"absolute log":     func(c *ContainerConfig) { c.LogPath = "/etc/cron.d/x" },
		"log leads out":    func(c *ContainerConfig) { c.LogPath = "../../etc/cron.d/x" },
		"log inner ..":     func(c *ContainerConfig) { c.LogPath = "a/../../b" },
		"log folder":       func(c *ContainerConfig) { c.LogPath = "a/" },
		"log dot":          func(c *ContainerConfig) { c.LogPath = "." },
		"quota":            func(c *ContainerConfig) { c.Resources.CPUQuota = -2 },
		"period":           func(c *ContainerConfig) { c.Resources.CPUPeriod = -1 },
		"shares":           func(c *ContainerConfig) { c.Resources.CPUShares = math.MinInt64 },
		"swap below limit": func(c *ContainerConfig) { c.Resources.Memory, c.Resources.MemorySwap = 10, 5 },
		"cpuset":           func(c *ContainerConfig) { c.Resources.CpusetCpus = "a" },
		"oom":              func(c *ContainerConfig) { c.Resources.OOMScoreAdj = -1001 },
		"signal":           func(c *ContainerConfig) { c.StopSignal = "SIGNOPE" },
		"pid mode":         func(c *ContainerConfig) { c.Security.PIDMode = "host" },
		"pid no target":    func(c *ContainerConfig) { c.Security.PIDMode = runtime.PIDTarget },
	} {
		c := good()
		change(c)
		if err := validateContainer(p, c); !errs.Is(err, errs.InvalidArgument) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestValidMaps(t *testing.T) {
	for name, tc := range map[string]struct {
		maps []IDMap
		ok   bool
	}{
		"none":              {nil, true},
		"one":               {[]IDMap{{ContainerID: 0, HostID: 100000, Size: 65536}}, true},
		"two":               {[]IDMap{{ContainerID: 0, HostID: 100000, Size: 10}, {ContainerID: 10, HostID: 200000, Size: 10}}, true},
		"empty range":       {[]IDMap{{ContainerID: 0, HostID: 100000, Size: 0}}, false},
		"no root":           {[]IDMap{{ContainerID: 1, HostID: 100000, Size: 10}}, false},
		"over the end":      {[]IDMap{{ContainerID: 0, HostID: math.MaxUint32, Size: 10}}, false},
		"host overlap":      {[]IDMap{{ContainerID: 0, HostID: 100000, Size: 10}, {ContainerID: 10, HostID: 100005, Size: 10}}, false},
		"container overlap": {[]IDMap{{ContainerID: 0, HostID: 100000, Size: 10}, {ContainerID: 5, HostID: 200000, Size: 10}}, false},
	} {
		if err := validMaps(tc.maps, tc.maps); (err == nil) != tc.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
	if id, ok := hostID([]IDMap{{ContainerID: 0, HostID: 100000, Size: 10}, {ContainerID: 100, HostID: 5, Size: 1}}, 100); !ok || id != 5 {
		t.Errorf("mapped to %d, %v", id, ok)
	}
	if _, ok := hostID([]IDMap{{ContainerID: 0, HostID: 100000, Size: 10}}, 10); ok {
		t.Error("an id past the range is mapped")
	}
}

func TestLogPath(t *testing.T) {
	for _, tc := range []struct{ dir, rel, want string }{
		{"/var/log/pods/x", "c/0.log", "/var/log/pods/x/c/0.log"},
		{"/var/log/pods/x", "./c//0.log", "/var/log/pods/x/c/0.log"},
		{"/var/log/pods/x", "..log", "/var/log/pods/x/..log"},
		{"", "c/0.log", ""}, {"/x", "", ""},
	} {
		if got, err := logPath(tc.dir, tc.rel); err != nil || got != tc.want {
			t.Errorf("%q %q: %q, %v", tc.dir, tc.rel, got, err)
		}
	}
}

func TestLogFoldersStayInside(t *testing.T) {
	dir, outside := t.TempDir(), t.TempDir()
	if err := makeLogFolders(t.Context(), filepath.Join(dir, "pod"), "a/b/0.log"); err != nil {
		t.Fatal(err)
	}
	st, err := os.Stat(filepath.Join(dir, "pod", "a", "b"))
	if err != nil || st.Mode().Perm() != 0o755 {
		t.Fatalf("%v %v", st, err)
	}
	if err := os.Symlink(outside, filepath.Join(dir, "pod", "out")); err != nil {
		t.Fatal(err)
	}
	if err := makeLogFolders(t.Context(), filepath.Join(dir, "pod"), "out/sub/0.log"); !errs.Is(err, errs.FailedPrecondition) {
		t.Errorf("a link led out: %v", err)
	}
	if names, _ := os.ReadDir(outside); len(names) != 0 {
		t.Errorf("made outside: %v", names)
	}
}

func TestMerged(t *testing.T) {
	old := Resources{
		CPUShares: 2, Memory: 100, CpusetCpus: "0", Hugepages: []HugepageLimit{{PageSize: "2MB", Limit: 1}},
		Unified: map[string]string{"a": "1", "b": "1"},
	}
	got := merged(old, Resources{
		Memory: 200, CpusetMems: "1", Hugepages: []HugepageLimit{{PageSize: "1GB", Limit: 3}, {PageSize: "2MB", Limit: 2}}, Unified: map[string]string{"b": "2"},
	})
	want := Resources{
		CPUShares: 2, Memory: 200, CpusetCpus: "0", CpusetMems: "1",
		Hugepages: []HugepageLimit{{PageSize: "2MB", Limit: 2}, {PageSize: "1GB", Limit: 3}}, Unified: map[string]string{"a": "1", "b": "2"},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%+v", got)
	}
	if old.Hugepages[0].Limit != 1 || old.Unified["b"] != "1" {
		t.Error("the old limits were changed in place")
	}
}

func TestParseStat(t *testing.T) {
	s, err := parseStat([]byte("7 (a) (b) D) D 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20"))
	if err != nil || s.State != "D" || s.StartTime != 4242 {
		t.Fatalf("%+v, %v", s, err)
	}
	for _, bad := range []string{"", "7 a D", "7 (a) D 1", "7 (a) DD 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242"} {
		if _, err := parseStat([]byte(bad)); err == nil {
			t.Errorf("read %q", bad)
		}
	}
	if s, ok := (osHost{}).Process(os.Getpid()); !ok || s.StartTime == 0 {
		t.Errorf("own process: %+v, %v", s, ok)
	}
	if id, err := (osHost{}).BootID(); err != nil || len(id) != 36 {
		t.Errorf("boot id %q, %v", id, err)
	}
}

func TestRecordsKeepBytes(t *testing.T) {
	c := &Container{
		ID: strings.Repeat("a", 64), PodID: strings.Repeat("b", 64), Phase: PhaseRunning,
		Config:    &ContainerConfig{Env: []string{"A=\xff\x00x", "B=é"}, Mounts: []Mount{{ContainerPath: "/v", Image: "i"}}},
		CreatedAt: time.Unix(1, 2).UTC(), Mounts: []Mount{{ContainerPath: "/v", Image: "i", ImageRef: "sha256:1"}},
	}
	e := newContainerEntry(c)
	e.proc, e.cgroup = runtime.Process{PID: 5, StartTime: 6}, "/p/x"
	data, err := store.Encode(recordSchema, newContainerRecord(e, c, "boot"), nil)
	if err != nil {
		t.Fatal(err)
	}
	r, x, err := store.Decode[containerRecord](recordSchema, data)
	if err != nil || x != nil {
		t.Fatal(err, x)
	}
	if err := r.check(c.ID); err != nil {
		t.Fatal(err)
	}
	got := r.snapshot()
	c.State, c.PID = StateRunning, 5
	if !reflect.DeepEqual(got, c) {
		t.Errorf("\n%+v\n%+v", got, c)
	}
	for _, bad := range []func(*containerRecord){
		func(r *containerRecord) { r.ID = strings.Repeat("c", 64) },
		func(r *containerRecord) { r.PodID = "../x" },
		func(r *containerRecord) { r.Config = nil },
		func(r *containerRecord) { r.Phase = PhaseReady },
	} {
		r2 := *r
		bad(&r2)
		if r2.check(c.ID) == nil {
			t.Errorf("record passed: %+v", r2)
		}
	}
}

func TestSpecFiles(t *testing.T) {
	dir := t.TempDir()
	s, err := openSpecFiles(dir)
	if err != nil {
		t.Fatal(err)
	}
	profile := func(a specs.LinuxSeccompAction) *specs.LinuxSeccomp { return &specs.LinuxSeccomp{DefaultAction: a} }
	make1 := func(digit string, p *specs.LinuxSeccomp) *runtime.Container {
		return &runtime.Container{
			ID: strings.Repeat(digit, 64), Cgroup: "/c",
			Spec: &specs.Spec{Process: &specs.Process{Env: []string{"A=\xfe"}}, Linux: &specs.Linux{Seccomp: p}},
		}
	}
	one, two, three := make1("1", profile(specs.ActErrno)), make1("2", profile(specs.ActErrno)), make1("3", profile(specs.ActLog))
	for _, c := range []*runtime.Container{one, two, three} {
		if err := s.save(c); err != nil {
			t.Fatal(err)
		}
	}
	if one.Spec.Linux.Seccomp == nil || one.Spec.Process.Env[0] != "A=\xfe" {
		t.Fatal("save changed what it was given")
	}
	if names, _ := os.ReadDir(s.profiles); len(names) != 2 {
		t.Fatalf("%d profiles for two", len(names))
	}
	again, err := openSpecFiles(dir) // a restart
	if err != nil {
		t.Fatal(err)
	}
	r1, err1 := again.get(one.ID)
	r2, err2 := again.get(two.ID)
	if err1 != nil || err2 != nil || !reflect.DeepEqual(r1, one) || r1.Spec.Linux.Seccomp != r2.Spec.Linux.Seccomp {
		t.Fatalf("%v %v\n%+v\n%+v", err1, err2, r1, one)
	}
	if err := again.sweep(map[string]bool{one.ID: true}); err != nil {
		t.Fatal(err)
	}
	for i := range profilesKept {
		if err := os.WriteFile(filepath.Join(s.profiles, strings.Repeat("f", 63)+string(rune('a'+i))), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := again.sweep(map[string]bool{one.ID: true}); err != nil {
		t.Fatal(err)
	}
	if names, _ := os.ReadDir(s.profiles); len(names) != 1 {
		t.Fatalf("%d profiles after the sweep", len(names))
	}
	if _, err := again.get(three.ID); !errs.Is(err, errs.Internal) {
		t.Fatalf("swept spec: %v", err)
	}
	if err := again.remove(one.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := again.get(one.ID); err == nil {
		t.Fatal("removed spec is still there")
	}
	if _, err := again.get("../../etc/passwd"); err == nil {
		t.Fatal("an id that is none was read")
	}
	// A profile that was tampered with is not used.
	if err := again.save(two); err != nil {
		t.Fatal(err)
	}
	names, _ := os.ReadDir(s.profiles)
	for _, n := range names {
		if err := os.WriteFile(filepath.Join(s.profiles, n.Name()), []byte(`{"defaultAction":"SCMP_ACT_ALLOW"}`), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	third, _ := openSpecFiles(dir)
	if _, err := third.get(two.ID); err == nil {
		t.Fatal("a changed seccomp profile was taken")
	}
	for i := range 3 * specsInCache {
		c := make1("4", nil)
		c.ID = strings.Repeat("4", 60) + string([]byte{'0' + byte(i/100), '0' + byte(i/10%10), '0' + byte(i%10), '0'})
		third.remember(c)
	}
	if len(third.cache) != specsInCache || third.recent.Len() != specsInCache {
		t.Fatalf("cache holds %d", len(third.cache))
	}
}

type hangingHost struct {
	osHost
	hang chan struct{}
}

func (h hangingHost) Stat(path string) error {
	if path == "/dead" {
		<-h.hang
	}
	return os.ErrNotExist
}

func TestStatterDoesNotHang(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := hangingHost{hang: make(chan struct{})}
		s := newStatter(h, 10*time.Second)
		began := time.Now()
		for range maxStuckStats {
			go func() {
				if err := s.check(t.Context(), "/dead"); !errs.Is(err, errs.Unavailable) || !strings.Contains(err.Error(), "/dead") {
					t.Errorf("dead mount: %v", err)
				}
			}()
		}
		synctest.Wait()
		if err := s.check(t.Context(), "/x"); !errs.Is(err, errs.ResourceExhausted) {
			t.Errorf("with all slots taken: %v", err)
		}
		time.Sleep(11 * time.Second)
		if took := time.Since(began); took != 11*time.Second {
			t.Errorf("took %s", took)
		}
		close(h.hang)
		synctest.Wait()
		if err := s.check(t.Context(), "/missing"); !errs.Is(err, errs.FailedPrecondition) || !strings.Contains(err.Error(), "/missing does not exist") {
			t.Errorf("missing: %v", err)
		}
		ctx, cancel := context.WithCancelCause(t.Context())
		h.hang = make(chan struct{})
		s.host = h
		why := errors.New("why")
		cancel(why)
		if err := s.check(ctx, "/dead"); !errors.Is(err, why) {
			t.Errorf("cancelled: %v", err)
		}
		close(h.hang)
	})
}

func TestOpLockIsFair(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newOpLock()
		if err := l.lock(t.Context()); err != nil {
			t.Fatal(err)
		}
		var order []int
		for i := range 3 {
			go func() {
				if err := l.lock(t.Context()); err != nil {
					t.Error(err)
				}
				order = append(order, i)
				l.unlock()
			}()
			synctest.Wait()
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := l.lock(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("lock: %v", err)
		}
		if l.tryLock() {
			t.Error("took a held lock")
		}
		l.unlock()
		synctest.Wait()
		if !reflect.DeepEqual(order, []int{0, 1, 2}) {
			t.Errorf("order %v", order)
		}
	})
}
