package spec

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/namespaces"
	"github.com/naru-project/naru/runtime"
)

func TestSeccompChoice(t *testing.T) {
	profile := filepath.Join(t.TempDir(), "p.json")
	if err := os.WriteFile(profile, []byte(`{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir"],"action":"SCMP_ACT_ERRNO"}]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		sec  runtime.Security
		want specs.LinuxSeccompAction
	}{
		"unset":                 {runtime.Security{}, specs.ActErrno},
		"default":               {runtime.Security{Seccomp: runtime.Profile{Type: runtime.ProfileRuntimeDefault}}, specs.ActErrno},
		"unconfined":            {runtime.Security{Seccomp: runtime.Profile{Type: runtime.ProfileUnconfined}}, ""},
		"localhost":             {runtime.Security{Seccomp: runtime.Profile{Type: runtime.ProfileLocalhost, Ref: profile}}, specs.ActAllow},
		"privileged":            {runtime.Security{Privileged: true}, ""},
		"privileged, localhost": {runtime.Security{Privileged: true, Seccomp: runtime.Profile{Type: runtime.ProfileLocalhost, Ref: profile}}, ""},
	} {
		in := ordinary()
		in.Security = c.sec
		s, _, err := Build(in)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var got specs.LinuxSeccompAction
		if s.Linux.Seccomp != nil {
			got = s.Linux.Seccomp.DefaultAction
		}
		if got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
	for _, ref := range []string{"", "p.json", "../../etc/passwd", profile + ".missing", "/etc/passwd", "/dev/null"} {
		refused(t, errs.InvalidArgument, func(in *Input) { in.Security.Seccomp = runtime.Profile{Type: runtime.ProfileLocalhost, Ref: ref} })
	}
	refused(t, errs.InvalidArgument, func(in *Input) { in.Security.Seccomp.Type = "Sometimes" })
}

func TestAppArmorChoice(t *testing.T) {
	local := func(ref string) runtime.Profile { return runtime.Profile{Type: runtime.ProfileLocalhost, Ref: ref} }
	for name, c := range map[string]struct {
		host bool
		sec  runtime.Security
		want string
	}{
		"unset":                {true, runtime.Security{}, "naru-default"},
		"unset, no AppArmor":   {false, runtime.Security{}, ""},
		"default, no AppArmor": {false, runtime.Security{AppArmor: runtime.Profile{Type: runtime.ProfileRuntimeDefault}}, ""},
		"unconfined":           {true, runtime.Security{AppArmor: runtime.Profile{Type: runtime.ProfileUnconfined}}, ""},
		"localhost":            {true, runtime.Security{AppArmor: local("mine")}, "mine"},
		"localhost, prefixed":  {true, runtime.Security{AppArmor: local("localhost/mine")}, "mine"},
		"privileged":           {true, runtime.Security{Privileged: true}, ""},
		"privileged, asked":    {true, runtime.Security{Privileged: true, AppArmor: local("mine")}, "mine"},
	} {
		in := ordinary()
		in.Security, in.Host.AppArmor = c.sec, c.host
		in.Host.ProfileLoaded = func(n string) bool { return n == "mine" || n == DefaultAppArmor }
		s, _, err := Build(in)
		if err != nil || s.Process.ApparmorProfile != c.want {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	refused(t, errs.FailedPrecondition, func(in *Input) { in.Security.AppArmor = local("mine") })
	// Nobody has loaded the default profile: an error for who asks for it only.
	none := func(string) bool { return false }
	refused(t, errs.FailedPrecondition, func(in *Input) {
		in.Host.AppArmor, in.Host.ProfileLoaded, in.Security.AppArmor.Type = true, none, runtime.ProfileRuntimeDefault
	})
	in := ordinary()
	in.Host.AppArmor, in.Host.ProfileLoaded = true, none
	if s, _, err := Build(in); err != nil || s.Process.ApparmorProfile != "" {
		t.Errorf("unset, not loaded: %v", err)
	}
	refused(t, errs.FailedPrecondition, func(in *Input) {
		in.Security.AppArmor, in.Host.AppArmor, in.Host.ProfileLoaded = local("mine"), true, func(string) bool { return false }
	})
	for _, ref := range []string{"", "localhost/", "a\nb", "a\x00"} {
		refused(t, errs.InvalidArgument, func(in *Input) { in.Security.AppArmor, in.Host.AppArmor = local(ref), true })
	}
	refused(t, errs.InvalidArgument, func(in *Input) { in.Security.AppArmor.Type = "Sometimes" })
}

func TestSELinux(t *testing.T) {
	in := ordinary()
	in.Host.SELinux, in.Security.SELinux = true, &runtime.SELinux{Level: "s0:c1,c2"}
	s, _, err := Build(in)
	if err != nil || s.Process.SelinuxLabel != "system_u:system_r:container_t:s0:c1,c2" || s.Linux.MountLabel != "system_u:object_r:container_file_t:s0:c1,c2" {
		t.Errorf("%v", err)
	}
	in.Host.SELinux, in.Security.SELinux = false, &runtime.SELinux{}
	if _, _, err := Build(in); err != nil {
		t.Error(err)
	}
	refused(t, errs.FailedPrecondition, func(in *Input) { in.Security.SELinux = &runtime.SELinux{Type: "spc_t"} })
	for _, l := range []runtime.SELinux{{Type: "a:b"}, {User: "a b"}, {Level: "s0\n"}, {Role: strings.Repeat("a", 999)}} {
		refused(t, errs.InvalidArgument, func(in *Input) { in.Host.SELinux, in.Security.SELinux = true, &l })
	}
}

func TestLimits(t *testing.T) {
	in := ordinary()
	in.Host.MaxRlimits = map[string]uint64{"RLIMIT_NOFILE": 4096, "RLIMIT_NPROC": 100, "RLIMIT_STACK": 1 << 20}
	in.Host.MinOOMScoreAdj = 5
	in.Resources.OOMScoreAdj = -500
	in.Defaults.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_CORE", Soft: unlimited, Hard: unlimited}}
	s, _, err := Build(in)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]specs.POSIXRlimit{}
	for _, r := range s.Process.Rlimits {
		got[r.Type] = r
	}
	for _, w := range []specs.POSIXRlimit{
		{Type: "RLIMIT_NOFILE", Soft: 1024, Hard: 4096}, {Type: "RLIMIT_NPROC", Soft: 100, Hard: 100},
		{Type: "RLIMIT_STACK", Soft: 1 << 20, Hard: 1 << 20}, {Type: "RLIMIT_CORE", Soft: unlimited, Hard: unlimited},
		{Type: "RLIMIT_AS", Soft: unlimited, Hard: unlimited},
	} {
		if got[w.Type] != w {
			t.Errorf("%+v, want %+v", got[w.Type], w)
		}
	}
	if len(got) != 16 || len(rlimitNumbers) != 16 {
		t.Errorf("%d limits, want one for each of the kernel's 16", len(got))
	}
	if *s.Process.OOMScoreAdj != 5 {
		t.Errorf("oom_score_adj %d, want it raised to what the host allows", *s.Process.OOMScoreAdj)
	}
	refused(t, errs.InvalidArgument, func(in *Input) { in.Defaults.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_X"}} })
	refused(t, errs.InvalidArgument, func(in *Input) { in.Defaults.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_CPU", Soft: 2, Hard: 1}} })
	for _, r := range []runtime.Resources{{OOMScoreAdj: -1001}, {OOMScoreAdj: 1001}, {CPUShares: -1}, {CpusetCpus: "a"}, {Memory: -2}, {Unified: map[string]string{"../x": "1"}}} {
		refused(t, errs.InvalidArgument, func(in *Input) { in.Resources = r })
	}
}

func TestNamespaces(t *testing.T) {
	in := ordinary()
	in.Namespaces.PID, in.Security.PIDMode = "/run/ns/pid", runtime.PIDPod
	s, _, err := Build(in)
	if err != nil || !slices.Contains(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.PIDNamespace, Path: "/run/ns/pid"}) {
		t.Errorf("%v", err)
	}
	refused(t, errs.FailedPrecondition, func(in *Input) { in.Security.PIDMode, in.Namespaces = runtime.PIDPod, namespaces.Paths{} })
	refused(t, errs.FailedPrecondition, func(in *Input) { in.Security.PIDMode = runtime.PIDTarget })
	refused(t, errs.InvalidArgument, func(in *Input) { in.Security.PIDMode = "none" })
}

func TestDevices(t *testing.T) {
	in := ordinary()
	in.Devices = []runtime.Device{{HostPath: "/dev/fuse", Permissions: "mr"}}
	s, _, err := Build(in)
	if err != nil {
		t.Fatal(err)
	}
	rules := s.Linux.Resources.Devices
	if first := rules[0]; first.Allow || first.Type != "" || first.Major != nil || first.Access != "rwm" {
		t.Errorf("the first rule is not to deny all: %+v", first)
	}
	if last := rules[len(rules)-1]; *last.Major != 10 || *last.Minor != 229 || last.Access != "mr" || len(rules) != 10 {
		t.Errorf("%d rules, last %+v", len(rules), last)
	}
	in.Defaults.DeviceOwner, in.Security.RunAsUser, in.Security.RunAsGroup = true, new(int64(1000)), new(int64(2000))
	if s, _, err = Build(in); err != nil || *s.Linux.Devices[0].UID != 1000 || *s.Linux.Devices[0].GID != 2000 {
		t.Errorf("a device that goes to the container's user: %+v, %v", s.Linux.Devices, err)
	}
	if *testNodes["/dev/fuse"][0].UID != 0 {
		t.Error("the host's own device was changed")
	}
	for name, d := range map[string]runtime.Device{
		"perms": {HostPath: "/dev/fuse", Permissions: "rwmx"}, "twice": {HostPath: "/dev/fuse", Permissions: "rr"},
		"relative host": {HostPath: "dev/fuse"}, "missing": {HostPath: "/dev/none"}, "relative": {HostPath: "/dev/fuse", ContainerPath: "fuse"},
		"kcore": {HostPath: "/dev/fuse", ContainerPath: "/proc/kcore"}, "proc": {HostPath: "/dev/fuse", ContainerPath: "/dev/../proc/x"},
		"sys": {HostPath: "/dev/fuse", ContainerPath: "/sys"}, "root": {HostPath: "/dev/fuse", ContainerPath: "/dev/.."}, "NUL": {HostPath: "/dev/fuse\x00"},
	} {
		t.Run(name, func(t *testing.T) {
			refused(t, errs.InvalidArgument, func(in *Input) { in.Devices = []runtime.Device{d} })
		})
	}
}

func TestHostDevices(t *testing.T) {
	got, err := HostDevices{}.Lookup("/dev/null")
	if err != nil || len(got) != 1 || got[0].Type != "c" || got[0].Major != 1 || got[0].Minor != 3 || got[0].FileMode.Perm() != 0o666 {
		t.Errorf("%+v, %v", got, err)
	}
	dir := t.TempDir()
	link, fifo, file := filepath.Join(dir, "link"), filepath.Join(dir, "fifo"), filepath.Join(dir, "file")
	if err := errors.Join(os.Symlink("/dev/zero", link), syscall.Mkfifo(fifo, 0o600), os.WriteFile(file, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if got, err = (HostDevices{}).Lookup(link); err != nil || got[0].Minor != 5 || got[0].Path != link {
		t.Errorf("%+v, %v", got, err)
	}
	for _, p := range []string{fifo, file, dir, "/", filepath.Join(dir, "none"), "/dev/../etc"} {
		if got, err := (HostDevices{}).Lookup(p); !errs.Is(err, errs.InvalidArgument) {
			t.Errorf("%s: %+v, %v", p, got, err)
		}
	}
	all, err := HostDevices{}.Lookup("/dev")
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, d := range all {
		if !strings.HasPrefix(d.Path, "/dev/") || strings.HasPrefix(d.Path, "/dev/pts/") || strings.HasPrefix(d.Path, "/dev/shm/") || d.Path == "/dev/console" {
			t.Errorf("%+v", d)
		}
		if d.Path == "/dev/null" || d.Path == "/dev/urandom" {
			found++
		}
	}
	if found != 2 {
		t.Errorf("null and urandom are not among %d devices", len(all))
	}
}

func TestProbeHost(t *testing.T) {
	h, err := ProbeHost(0)
	if err != nil {
		t.Fatal(err)
	}
	var mask uint64
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if v, ok := strings.CutPrefix(line, "CapBnd:"); ok {
			_, _ = fmt.Sscanf(strings.TrimSpace(v), "%x", &mask)
		}
	}
	n := 0
	for ; mask != 0; mask &= mask - 1 {
		n++
	}
	if len(h.Bounding) != n || h.Arch == "" || h.MaxRlimits["RLIMIT_NOFILE"] == 0 {
		t.Errorf("%d capabilities, want %d: %+v", len(h.Bounding), n, h)
	}
	in := ordinary()
	in.Host = h
	if _, _, err := Build(in); err != nil {
		t.Error(err)
	}
}

func TestSysctls(t *testing.T) {
	good := map[string]string{
		"kernel.shm_rmid_forced": "1", "kernel.sem": "250 32000 32\t128", "fs.mqueue.msg_max": "10", "net.ipv4.ip_unprivileged_port_start": "0",
		"net/ipv4/conf/eth0.100/forwarding": "1", "net.ipv4.conf.eth1/200.forwarding": "1", "net.core.somaxconn": "1024",
		"net.ipv4.ip_local_reserved_ports": "8080,9148-9150", "net.ipv4.tcp_congestion_control": "bbr", "kernel.domainname": "a.example",
	}
	if err := ValidateSysctls(good, true, true, false); err != nil {
		t.Error(err)
	}
	for key, path := range map[string]string{
		"net.ipv4.conf.eth0/100.x": "net/ipv4/conf/eth0.100/x", "net/ipv4/conf/eth0.100/x": "net/ipv4/conf/eth0.100/x", "kernel.sem": "kernel/sem",
	} {
		if p, err := SysctlPath(key); err != nil || p != path {
			t.Errorf("%s: %s, %v", key, p, err)
		}
	}
	for _, key := range []string{
		"kernel.core_pattern", "kernel.modprobe", "kernel.hostname", "vm.overcommit_memory", "fs.file-max", "fs.mqueue", "net.core.rmem_max", "net.core.bpf_jit_enable",
		"net/../kernel/core_pattern", "net.ipv4/../../kernel/core_pattern", "net.ipv4...kernel.core_pattern", "/net/ipv4/ip_forward", ".net.ipv4.ip_forward",
		"net.ipv4.ip_forward.", "net..ipv4", "Kernel.sem", "kernel.sem ", "kernel.sem\x00", "kernel.sem=1", "kernel", "", "net.ipv4", "net.ipv4./.x",
		"kernel.shmmax.x", "user.max_user_namespaces", strings.Repeat("net.ipv4.", 99) + "x", "net/ipv4/../../fs/file-max", "net/ipv4/.",
	} {
		if err := ValidateSysctls(map[string]string{key: "1"}, true, true, false); !errs.Is(err, errs.InvalidArgument) {
			t.Errorf("%q: %v", clip(key), err)
		}
	}
	for _, v := range []string{"", "1+kernel.core_pattern=|/x", "1\nkernel.x = 2", "1\x00", "a=b", "|/x", "1;2", strings.Repeat("1", 1<<20), "é", "$(x)", "1\r"} {
		if err := ValidateSysctls(map[string]string{"kernel.shm_rmid_forced": v}, true, true, false); !errs.Is(err, errs.InvalidArgument) {
			t.Errorf("%q: %v", clip(v), err)
		}
	}
	for _, c := range []struct {
		key            string
		net, ipc, user bool
		ok             bool
	}{
		{"net.ipv4.ip_forward", false, true, true, false}, {"kernel.msgmax", true, false, true, false}, {"fs.mqueue.msg_max", true, false, true, false},
		{"kernel.domainname", false, true, true, false}, {"user.max_user_namespaces", true, true, false, false}, {"user.max_user_namespaces", false, false, true, true},
		{"kernel.msgmax", false, true, false, true}, {"net.ipv4.ip_forward", true, false, false, true},
	} {
		if err := ValidateSysctls(map[string]string{c.key: "1"}, c.net, c.ipc, c.user); (err == nil) != c.ok || err != nil && !errs.Is(err, errs.InvalidArgument) {
			t.Errorf("%+v: %v", c, err)
		}
	}
	if err := ValidateSysctls(map[string]string{"kernel.sem": "1", "kernel/sem": "2"}, true, true, true); !errs.Is(err, errs.InvalidArgument) {
		t.Errorf("one key twice: %v", err)
	}
	many := map[string]string{}
	for i := range 300 {
		many[fmt.Sprintf("net.ipv4.x%d", i)] = "1"
	}
	if err := ValidateSysctls(many, true, true, true); !errs.Is(err, errs.InvalidArgument) {
		t.Errorf("many: %v", err)
	}
}

func TestSignals(t *testing.T) {
	for s, want := range map[string]syscall.Signal{
		"SIGTERM": 15, "term": 15, "15": 15, "SIGKILL": 9, "usr1": 10, "SIGWINCH": 28, "SIGCLD": unix.SIGCHLD, "POLL": unix.SIGIO, "SIGIOT": unix.SIGABRT,
		"SIGRTMIN": 34, "RTMIN+3": 37, "SIGRTMINPLUS3": 37, "SIGRTMAX": 64, "SIGRTMAX-1": 63, "SIGRTMAXMINUS14": 50, "sigrtmin+30": 64, "64": 64, "1": 1,
		"SIGSTKFLT": 16, "SIGPWR": unix.SIGPWR, "SIGSYS": unix.SIGSYS,
	} {
		if got, err := ParseSignal(s); err != nil || got != want {
			t.Errorf("%s: %d, %v, want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "0", "65", "9999", "-1", "+15", "1.5", "SIGFOO", "SIG", "RTMIN+31", "RTMIN-1", "RTMAX+1", "RTMAX-31", "RTMIN+", "RTMIN+-1", "SIGSIGTERM", "15 ", "TERM\x00", strings.Repeat("9", 9999), "RTMINPLUS+1"} {
		if got, err := ParseSignal(s); !errs.Is(err, errs.InvalidArgument) {
			t.Errorf("%q: %d, %v", clip(s), got, err)
		}
	}
	for _, c := range []struct {
		asked, image string
		want         syscall.Signal
	}{{"", "", 15}, {"", "SIGQUIT", 3}, {"", "9999", 15}, {"", "SIGFOO", 15}, {"", "-1", 15}, {"SIGINT", "SIGQUIT", 2}} {
		if got, err := StopSignal(c.asked, c.image); err != nil || got != c.want {
			t.Errorf("%+v: %d, %v", c, got, err)
		}
	}
	if _, err := StopSignal("SIGFOO", "SIGQUIT"); !errs.Is(err, errs.InvalidArgument) {
		t.Error(err)
	}
}

func FuzzSysctl(f *testing.F) {
	for _, s := range [][2]string{{"net.ipv4.conf.eth0/100.x", "1"}, {"kernel/sem", "1 2 3 4"}, {"net/../x", "\n"}} {
		f.Add(s[0], s[1])
	}
	f.Fuzz(func(t *testing.T, key, value string) {
		err := ValidateSysctls(map[string]string{key: value}, true, true, true)
		if err != nil {
			if !errs.Is(err, errs.InvalidArgument) {
				t.Fatal(err)
			}
			return
		}
		p, err := SysctlPath(key)
		if err != nil || filepath.Clean("/proc/sys/"+p) != "/proc/sys/"+p || strings.ContainsAny(value, "\n\x00=|") {
			t.Fatalf("%q = %q, path %q, %v", key, value, p, err)
		}
		if !slices.Contains([]string{"net", "kernel", "fs", "user"}, strings.Split(p, "/")[0]) {
			t.Fatalf("%q", p)
		}
	})
}

func FuzzSignal(f *testing.F) {
	for _, s := range []string{"SIGTERM", "15", "RTMIN+3", "SIGRTMAXMINUS1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if sig, err := ParseSignal(s); err == nil && (sig < 1 || sig > 64) || err != nil && !errs.Is(err, errs.InvalidArgument) {
			t.Fatalf("%q: %d, %v", s, sig, err)
		}
	})
}

func BenchmarkBuild(b *testing.B) {
	in := ordinary()
	for b.Loop() {
		if _, _, err := Build(in); err != nil {
			b.Fatal(err)
		}
	}
}
