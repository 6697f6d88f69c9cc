package ocicli

import (
	"encoding/json"
	"os"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime"
	"github.com/naru-project/naru/runtime/cgroup"
	"github.com/naru-project/naru/runtime/native"
)

func testContainer() *runtime.Container {
	return &runtime.Container{
		ID: strings.Repeat("a", 64), Cgroup: "/pods.slice/pods-x.slice/naru-aa.scope",
		Mounts: []runtime.Mount{{ContainerPath: "/shared", Propagation: runtime.PropagationBidirectional}, {ContainerPath: "/slave/", Propagation: runtime.PropagationHostToContainer}},
		Spec: &specs.Spec{
			Version: specs.Version, Root: &specs.Root{Path: "rootfs", Readonly: true},
			Process: &specs.Process{Args: []string{"sh"}, Env: []string{"SECRET=s"}},
			Mounts: []specs.Mount{
				{Destination: "/proc", Type: "proc"}, {Destination: "/dev/mqueue", Type: "mqueue"}, {Destination: "/sys", Type: "sysfs"},
				{Destination: "/sys/fs/cgroup", Type: "cgroup"}, {Destination: "/etc/hosts", Type: "bind", Source: "/host/hosts"},
			},
			Linux: &specs.Linux{
				Namespaces: []specs.LinuxNamespace{{Type: specs.MountNamespace}, {Type: specs.CgroupNamespace}},
				Resources:  &specs.LinuxResources{Unified: map[string]string{"memory.high": "1"}, HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "2MB"}}, Pids: &specs.LinuxPids{}},
			},
		},
	}
}

func testBundle(t *testing.T, systemd, v2 bool) (*bundle, string) {
	t.Helper()
	dir := t.TempDir()
	b := newBundle(dir, filepath.Join(dir, "rootfs"), nil, []native.Volume{{Path: "/a/b/c"}, {Path: "/shared", Dir: true}, {Path: "/slave", Dir: true}}, []string{"/data"})
	b.systemd, b.cgroup2 = systemd, v2
	return b, dir
}

func TestBundle(t *testing.T) {
	c := testContainer()
	b, dir := testBundle(t, true, false)
	if err := b.write(c); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(dir, "config.json"))
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(filepath.Join(dir, "config.json")); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("config.json, which holds the environment, has mode %v, %v", st.Mode(), err)
	}
	var s specs.Spec
	if err := json.Unmarshal(data, &s); err != nil {
		t.Fatal(err)
	}
	if s.Version != ociVersion || s.Root.Path != dir+"/rootfs" || !s.Root.Readonly || s.Linux.CgroupsPath != "pods-x.slice:naru:aa" || s.Linux.RootfsPropagation != "rshared" {
		t.Errorf("spec %+v %+v %+v", s, s.Root, s.Linux)
	}
	if len(s.Linux.Namespaces) != 1 || s.Linux.Resources.Unified != nil || s.Linux.Resources.HugepageLimits != nil || s.Linux.Resources.Pids == nil {
		t.Errorf("namespaces %v, resources %+v", s.Linux.Namespaces, s.Linux.Resources)
	}
	var got []string
	for _, m := range s.Mounts {
		got = append(got, strings.TrimSpace(m.Destination+" "+strings.TrimPrefix(m.Source, dir)+" "+strings.Join(m.Options, ",")))
	}
	want := []string{
		"/proc", "/dev/mqueue", "/sys", "/sys/fs/cgroup",
		"/data /image-0 rbind,rprivate", "/shared /volume-1 rbind,rshared", "/slave /volume-2 rbind,rslave", "/a/b/c /volume-0 rbind,rprivate",
	}
	if !slices.Equal(got, want) {
		t.Errorf("mounts:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	for _, m := range s.Mounts[4:] {
		if _, err := os.Lstat(m.Source); err != nil {
			t.Error(err)
		}
	}
	a := b.attachments()
	if len(a) != 5 || a[0].At != dir+"/rootfs" || a[1].Of != "/data" {
		t.Errorf("attachments %+v", a)
	}
}

func TestBundleUserNamespace(t *testing.T) {
	c := testContainer()
	c.UIDMap = []runtime.IDMap{{HostID: 1 << 20, Size: 65536}}
	b, _ := testBundle(t, false, false)
	s := b.spec(c)
	if s.Linux.CgroupsPath != c.Cgroup {
		t.Errorf("cgroupsPath %s", s.Linux.CgroupsPath)
	}
	for _, m := range s.Mounts {
		if m.Type == "cgroup" || m.Type == "mqueue" || m.Type == "sysfs" {
			t.Errorf("mount %+v cannot be made in a user namespace", m)
		}
	}
	b.cgroup2 = true
	if s = b.spec(c); len(s.Linux.Namespaces) != 2 || !slices.ContainsFunc(s.Mounts, func(m specs.Mount) bool { return m.Type == "cgroup" }) {
		t.Errorf("cgroup version 2: %v %v", s.Linux.Namespaces, s.Mounts)
	}
	if c.Spec.Version != specs.Version || len(c.Spec.Mounts) != 5 {
		t.Error("the container's own spec was changed")
	}
}

func TestFeatures(t *testing.T) {
	for text, want := range map[string]struct {
		userns bool
		err    string
	}{
		`{"ociVersionMax":"1.0.2","linux":{"namespaces":["pid","user"]}}`: {userns: true},
		`{"ociVersionMax":"1.0.2","linux":{"namespaces":["pid"]}}`:        {},
		`{"ociVersionMax":"1.0.2"}`:                                       {},
		`{}`:                                                              {err: "which version"},
		`<html>`:                                                          {err: "no JSON"},
		``:                                                                {err: "no JSON"},
		`{"linux":[]}`:                                                    {err: "no JSON"},
	} {
		f, err := parseFeatures([]byte(text))
		if f.UserNamespaces != want.userns || (err == nil) != (want.err == "") || err != nil && !strings.Contains(err.Error(), want.err) {
			t.Errorf("%q: %+v, %v", text, f, err)
		}
	}
}

func TestLog(t *testing.T) {
	for text, want := range map[string]string{
		"": "", "\n\n": "",
		`{"level":"error","msg":"first"}` + "\n" + `{"level":"warning","msg":"w"}` + "\n" + `{"level":"error","msg":"last"}` + "\n": "last",
		"plain text\nmore":                                            "more",
		`{"level":"info","msg":"i"}` + "\nplain":                      "plain",
		`{"level":"error","msg":"` + strings.Repeat("x", 5000) + `"}`: strings.Repeat("x", 1024),
	} {
		if got := parseLog([]byte(text)); got != want {
			t.Errorf("%.60q: got %.60q, want %.60q", text, got, want)
		}
	}
	for said, want := range map[string]errs.Class{
		`exec: "/x": stat /x: no such file or directory`: errs.FailedPrecondition, "container does not exist": errs.NotFound, "the moon": errs.Internal,
	} {
		if got := classOf(said); got != want {
			t.Errorf("%q: class %v, want %v", said, got, want)
		}
	}
}

func TestArgv(t *testing.T) {
	h := &handler{Handler: Handler{Path: "/runc", Args: []string{"--debug"}}, root: "/root", systemd: true}
	if got := strings.Join(h.argv("/log", "start", "x"), " "); got != "/runc --debug --root /root --log /log --log-format json --systemd-cgroup start x" {
		t.Error(got)
	}
}

func TestTerminal(t *testing.T) {
	master, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(master) }()
	null, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Close(null) }()
	dups := func(fds ...int) (out []int) { // what terminalOf gets is its own
		for _, fd := range fds {
			d, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, d)
		}
		return out
	}
	before := openFiles(t)
	f, err := terminalOf(unix.UnixRights(dups(master)...))
	if err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	for _, oob := range [][]byte{nil, {1, 2, 3}, unix.UnixRights(dups(null)...), unix.UnixRights(dups(master, master)...)} {
		if f, err := terminalOf(oob); err == nil {
			_ = f.Close()
			t.Errorf("%v is taken for a terminal", oob)
		}
	}
	if n := openFiles(t); n != before {
		t.Errorf("%d files are open, before it were %d", n, before)
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	l, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(l)
}

func FuzzRuntimeOutput(f *testing.F) {
	f.Add([]byte(`{"ociVersionMax":"1.0.2","linux":{"namespaces":["user"]}}`))
	f.Add([]byte(`{"status":"running"}`))
	f.Add([]byte(`{"level":"error","msg":"x"}` + "\nplain"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if v, err := parseFeatures(b); err == nil && len(v.Version) > 400 {
			t.Errorf("a version of %d bytes", len(v.Version))
		}
		_, _ = parseState(b)
		if s := parseLog(b); len(s) > 4096 {
			t.Errorf("a message of %d bytes", len(s))
		}
	})
}

// A container stays with who made it when a reload gives its handler's name to
// another: its execs too.
func TestReconfigureLeavesContainersWhereTheyAre(t *testing.T) {
	drv := &cgroup.Driver{}
	o, err := New(nil, Config{RunDir: t.TempDir(), Cgroups: drv, Live: Live{Native: []string{"", "native"}, Handlers: []Handler{{Name: "oci", Path: "/bin/runtime"}}}})
	if err != nil {
		t.Fatal(err)
	}
	byRuntime, byUs := strings.Repeat("a", 64), strings.Repeat("b", 64)
	if err := os.Mkdir(o.folder(byRuntime), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(o.folder(byRuntime), "handler"), []byte("oci"), 0o600); err != nil {
		t.Fatal(err)
	}
	if h, err := o.maker(byRuntime); err != nil || h == nil || h.Name != "oci" {
		t.Errorf("made by a runtime: %v, %v", h, err)
	}
	o.Reconfigure(Live{Native: []string{"", "oci"}, Handlers: []Handler{{Name: "native", Path: "/bin/runtime"}}})
	if h, err := o.maker(byRuntime); h != nil || !errs.Is(err, errs.FailedPrecondition) {
		t.Errorf("made by a runtime whose handler is a native one now: %v, %v", h, err)
	}
	if h, err := o.maker(byUs); h != nil || err != nil {
		t.Errorf("native: %v, %v", h, err)
	}
}

// What Status tells of user namespaces was found out before: the place that
// they need is looked at when the runtime is asked, for on a host it may lie on
// a file server that hangs.
func TestUserNamespacesFromMemory(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: CAP_SYS_ADMIN for a mount namespace")
	}
	o, err := New(nil, Config{RunDir: t.TempDir(), Cgroups: &cgroup.Driver{}, UserNamespaces: true, Live: Live{Handlers: []Handler{{Name: "oci", Path: "/bin/runtime"}}}})
	if err != nil {
		t.Fatal(err)
	}
	h := o.table.Load().handlers["oci"]
	h.asked, h.can = true, Features{UserNamespaces: true, Place: true}
	covered := make(chan bool)
	go func() {
		defer close(covered)
		goruntime.LockOSThread() // for good: the thread has other mounts
		err := unix.Unshare(unix.CLONE_NEWNS)
		if err == nil {
			err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
		}
		if err == nil {
			err = unix.Mount("none", foreignRoot, "tmpfs", 0, "mode=0700")
		}
		if err != nil {
			t.Errorf("cover %s: %v", foreignRoot, err)
			return
		}
		if checkForeignRoot() == nil {
			t.Errorf("%s is closed and not found to be", foreignRoot)
		}
		covered <- o.UserNamespaces("oci")
	}()
	if told, ok := <-covered; ok && !told {
		t.Error("UserNamespaces has looked at the host")
	}
}
