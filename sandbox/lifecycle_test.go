package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/sys"
	"github.com/naru-project/naru/sandbox/hostport"
	"github.com/naru-project/naru/sandbox/rtnl"
	"github.com/naru-project/naru/sandbox/sysctl"
)

var allSteps = []string{
	"check sandbox", "choose network", "reserve folder", "claim host ports", "lease addresses", "make namespaces", "connect network",
	"set sysctls", "write etc files", "mount shm", "publish host ports",
}

// nothingLeft checks that the host has nothing of any sandbox.
func nothingLeft(t testing.TB, m *Manager) {
	t.Helper()
	eventually(t, "links gone", func() bool { return !strings.Contains(output(t, "ip -o link"), "alias naru") })
	if out := output(t, "ip route show proto 110") + output(t, "ip -6 route show proto 110"); out != "" {
		t.Errorf("routes left: %s", out)
	}
	for _, d := range []string{m.nsDir(), m.podsDir()} {
		if names, err := os.ReadDir(d); err != nil || len(names) > 0 {
			t.Errorf("left in %s: %v %v", d, names, err)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		if strings.HasPrefix(f[4], m.cfg.RunDir) && f[4] != m.nsDir() && f[4] != m.podsDir() {
			t.Errorf("mount left: %s", f[4])
		}
	}
	if len(m.ips.IDs())+len(m.ports.IDs())+len(m.fw.Known()) > 0 {
		t.Errorf("leases %v, ports %v, published %v", m.ips.IDs(), m.ports.IDs(), m.fw.Known())
	}
	if out := output(t, "nft list table inet "+m.cfg.Table); strings.Contains(out, " tcp . ") || strings.Contains(out, " udp . ") {
		t.Errorf("elements left: %s", out)
	}
}

func fullSpec(t testing.TB) Spec {
	s := podSpec(t, "full", mapping(TCP, 8080, 80, ""), mapping(UDP, 5353, 53, hostIP4))
	s.Sysctls = map[string]string{"net.ipv4.ip_local_port_range": "2000 3000", "kernel.shm_rmid_forced": "1"}
	return s
}

func TestStepsAreUndone(t *testing.T) {
	m := start(t, testConfig(t), Deps{})
	var seen []string
	for _, pooled := range []bool{false, true} {
		for _, at := range allSteps {
			if pooled {
				m.pool.size = 1
				if err := m.pool.add(); err != nil {
					t.Fatal(err)
				}
			}
			ctx, cancel := context.WithCancelCause(t.Context())
			stop := errs.New(errs.Unavailable, "injected")
			seen = nil
			h, err := m.Create(ctx, fullSpec(t), func(s string) {
				if seen = append(seen, s); s == at {
					cancel(stop)
				}
			})
			if h != nil || !errors.Is(err, stop) || !errs.Is(err, errs.Unavailable) || !strings.HasPrefix(err.Error(), at+": ") {
				t.Errorf("stopped at %q: %v, %v", at, h, err)
			}
			if err := m.pool.drain(); err != nil {
				t.Error(err)
			}
			nothingLeft(t, m)
		}
	}
	if !slices.Equal(seen, allSteps) {
		t.Errorf("steps %q", seen)
	}
	bad := fullSpec(t)
	bad.Sysctls["net.ipv4.ip_local_port_range"] = "no numbers"
	if _, err := m.Create(t.Context(), bad, nil); !errs.Is(err, errs.InvalidArgument) || !strings.Contains(err.Error(), "ip_local_port_range") {
		t.Errorf("bad value: %v", err)
	}
	bad.Sysctls = map[string]string{"net.core.there_is_none": "1"}
	if _, err := m.Create(t.Context(), bad, nil); !errs.Is(err, errs.InvalidArgument) {
		t.Errorf("unknown sysctl: %v", err)
	}
	nothingLeft(t, m)
}

func TestBadSpecs(t *testing.T) {
	m := start(t, testConfig(t), Deps{})
	for name, change := range map[string]func(*Spec){
		"id":           func(s *Spec) { s.ID = "../../etc" },
		"id upper":     func(s *Spec) { s.ID = strings.ToUpper(s.ID) },
		"mode":         func(s *Spec) { s.Network = "container" },
		"uts":          func(s *Spec) { s.UTS = ModeNode },
		"hostname":     func(s *Spec) { s.Hostname = "a\nb" },
		"shm":          func(s *Spec) { s.ShmSize = -1 },
		"maps":         func(s *Spec) { s.UIDMap = testMap },
		"sysctl":       func(s *Spec) { s.Sysctls = map[string]string{"kernel.core_pattern": "|/bin/sh"} },
		"sysctl value": func(s *Spec) { s.Sysctls = map[string]string{"kernel.sem": "1\n2"} },
		"host ipc":     func(s *Spec) { s.IPC = ModeNode; s.Sysctls = map[string]string{"kernel.shmmax": "1"} },
		"host net": func(s *Spec) {
			s.Network, s.UTS = ModeNode, ModeNode
			s.Sysctls = map[string]string{"net.ipv4.ip_forward": "0"}
		},
	} {
		s := podSpec(t, "bad")
		change(&s)
		if _, err := m.Create(t.Context(), s, nil); !errs.Is(err, errs.InvalidArgument) {
			t.Errorf("%s: %v", name, err)
		}
	}
	nothingLeft(t, m)
	h := create(t, m, podSpec(t, "a"))
	again := podSpec(t, "a", mapping(TCP, 1, 1, ""))
	again.ID = h.ID
	if _, err := m.Create(t.Context(), again, nil); !errs.Is(err, errs.AlreadyExists) {
		t.Errorf("the same id again: %v", err)
	}
	serve(t, netns(t, h), "tcp4", "0.0.0.0:80", "a")
	wantAnswer(t, nil, "tcp4", hostPort(pick(h, true), 80), "a", "") // it took no harm
	if got := m.ips.IDs(); !slices.Equal(got, []string{h.ID}) {
		t.Errorf("leases %v", got)
	}
}

func TestFilesShmAndSysctls(t *testing.T) {
	cfg := testConfig(t)
	cfg.UnprivilegedPing, cfg.UnprivilegedPorts = true, true
	m := start(t, cfg, Deps{})
	s := fullSpec(t)
	s.ShmSize = 3 << 20
	s.Sysctls["net.ipv4.ip_unprivileged_port_start"] = "80" // the pod's own word counts
	s.DNS = DNS{Servers: []string{"10.96.0.10"}}
	h := create(t, m, s)
	for path, want := range map[string]string{
		"/etc/hostname": "full\n", "/etc/hosts": h.IPs[0].String() + "\tfull\n", "/etc/resolv.conf": "nameserver 10.96.0.10\n",
	} {
		b, err := os.ReadFile(h.EtcFiles[path])
		if err != nil || !strings.HasSuffix(string(b), want) && !strings.Contains(string(b), want) {
			t.Errorf("%s: %q %v", path, b, err)
		}
		var st unix.Stat_t
		if err := unix.Stat(h.EtcFiles[path], &st); err != nil || st.Mode&0o7777 != 0o644 || st.Uid != 0 {
			t.Errorf("%s: mode %o, %v", path, st.Mode, err)
		}
	}
	// Whoever may write to the files cannot fill the host's disk (row C-13).
	f, err := os.OpenFile(h.EtcFiles["/etc/hosts"], os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	total := 0
	for total < 64<<20 {
		n, err := f.Write(make([]byte, 1<<20))
		total += n
		if err != nil {
			break
		}
	}
	_ = f.Close()
	if total > 2<<20 {
		t.Errorf("%d bytes went into /etc/hosts", total)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(h.Shm, &fs); err != nil || int64(fs.Blocks)*fs.Bsize != 3<<20 || fs.Type != unix.TMPFS_MAGIC ||
		fs.Flags&(unix.ST_NOSUID|unix.ST_NODEV|unix.ST_NOEXEC) != unix.ST_NOSUID|unix.ST_NODEV|unix.ST_NOEXEC {
		t.Errorf("shm %+v %v", fs, err)
	}
	if st, err := os.Stat(h.Shm); err != nil || st.Mode().Perm() != 0o777 || st.Mode()&os.ModeSticky == 0 {
		t.Errorf("shm mode %v %v", st.Mode(), err)
	}
	ipc, err := sys.OpenNamespace(h.Namespaces.IPC, unix.CLONE_NEWIPC)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ipc.Close() }()
	uts, err := sys.OpenNamespace(h.Namespaces.UTS, unix.CLONE_NEWUTS)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = uts.Close() }()
	got := map[string]string{}
	o := &opened{files: map[string]*os.File{"net": netns(t, h), "ipc": ipc, "uts": uts}}
	if err := m.inNamespaces(o, unix.CLONE_NEWNET|unix.CLONE_NEWIPC|unix.CLONE_NEWUTS, func() error {
		var u unix.Utsname
		if err := unix.Uname(&u); err != nil {
			return err
		}
		got["hostname"] = unix.ByteSliceToString(u.Nodename[:])
		for _, p := range []string{"kernel/shm_rmid_forced", "net/ipv4/ip_local_port_range", "net/ipv4/ip_unprivileged_port_start", "net/ipv4/ping_group_range"} {
			v, err := sysctl.Read(m.proc, p)
			if err != nil {
				return err
			}
			got[p] = v
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	for k, v := range map[string]string{
		"hostname": "full", "kernel/shm_rmid_forced": "1", "net/ipv4/ip_local_port_range": "2000\t3000",
		"net/ipv4/ip_unprivileged_port_start": "80", "net/ipv4/ping_group_range": "0\t2147483647",
	} {
		if got[k] != v {
			t.Errorf("%s = %q, want %q", k, got[k], v)
		}
	}
	if name, _ := os.Hostname(); name == "full" {
		t.Error("the host was renamed")
	}
	if v, err := sysctl.Read(m.proc, "kernel/shm_rmid_forced"); err != nil || v != "0" {
		t.Errorf("the host's shm_rmid_forced is %q, %v", v, err)
	}
}

func TestHostNetworkPod(t *testing.T) {
	cfg := testConfig(t)
	m := start(t, cfg, Deps{})
	if err := os.WriteFile(filepath.Join(cfg.HostEtc, "hosts"), []byte("127.0.0.1 here\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	s := podSpec(t, "ignored", mapping(TCP, 8080, 8080, ""))
	s.Network, s.UTS, s.IPC = ModeNode, ModeNode, ModeNode
	h := create(t, m, s)
	if h.Namespaces.Net+h.Namespaces.IPC+h.Namespaces.UTS != "" || len(h.IPs) != 0 || h.HostLink != "" || h.Shm != "/dev/shm" || len(h.Ports) != 0 {
		t.Errorf("%+v", h)
	}
	host, _ := os.Hostname()
	for path, want := range map[string]string{"/etc/hosts": "127.0.0.1 here\n", "/etc/hostname": host + "\n"} {
		if b, err := os.ReadFile(h.EtcFiles[path]); err != nil || string(b) != want {
			t.Errorf("%s: %q %v", path, b, err)
		}
	}
	if st, err := m.Stats(t.Context(), h); err != nil || len(st) != 0 {
		t.Errorf("stats %v %v", st, err)
	}
	if alive, err := m.Adopt(t.Context(), s, h); !alive || err != nil {
		t.Errorf("adopt %v %v", alive, err)
	}
	release(t, m, h)
	if _, err := os.Stat("/dev/shm"); err != nil {
		t.Error("the host's /dev/shm is gone")
	}
}

func TestReleaseIsIdempotent(t *testing.T) {
	m := start(t, testConfig(t), Deps{})
	h := create(t, m, fullSpec(t))
	for range 3 {
		release(t, m, h)
	}
	nothingLeft(t, m)
	release(t, m, &Handle{ID: newID(t)})
	if err := m.Release(t.Context(), newID(t), nil); err != nil {
		t.Error(err)
	}
	if err := m.Release(t.Context(), "../x", nil); !errs.Is(err, errs.InvalidArgument) {
		t.Error(err)
	}
	if err := m.Release(t.Context(), newID(t), h); !errs.Is(err, errs.InvalidArgument) {
		t.Error(err)
	}
	// Of a former boot: nothing of it is there, and nothing of others is touched.
	h = create(t, m, fullSpec(t))
	old := *h
	old.ID, old.BootID = newID(t), "another"
	release(t, m, &old)
	serve(t, netns(t, h), "tcp4", "0.0.0.0:80", "web")
	wantAnswer(t, nil, "tcp4", "127.0.0.1:8080", "web", "")
	// Half taken down by somebody else.
	if err := unmountAll(h.Shm); err != nil {
		t.Fatal(err)
	}
	if err := unmountAll(h.Namespaces.IPC); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(h.Namespaces.IPC); err != nil {
		t.Fatal(err)
	}
	if err := run("ip link del " + h.HostLink); err != nil {
		t.Fatal(err)
	}
	release(t, m, h)
	nothingLeft(t, m)
	// Without its handle.
	h = create(t, m, fullSpec(t))
	if err := m.Release(t.Context(), h.ID, nil); err != nil {
		t.Error(err)
	}
	nothingLeft(t, m)
}

// An old handle that is released once more takes nothing from the pod that
// has the same port now.
func TestReleaseAgainSparesTheSuccessor(t *testing.T) {
	m := start(t, testConfig(t), Deps{})
	old := create(t, m, podSpec(t, "old", mapping(TCP, 8080, 80, "")))
	release(t, m, old)
	h := create(t, m, podSpec(t, "new", mapping(TCP, 8080, 80, "")))
	serve(t, netns(t, h), "tcp4", "0.0.0.0:80", "new")
	release(t, m, old)
	wantAnswer(t, nil, "tcp4", "127.0.0.1:8080", "new", "")
	if id, ok := m.ports.Owner(mustKey(t, mapping(TCP, 8080, 80, ""))); !ok || id != h.ID {
		t.Errorf("owner %q", id)
	}
}

func mustKey(t *testing.T, p PortMapping) hostport.Key {
	t.Helper()
	key, err := p.key()
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func TestRestartAdoptSweep(t *testing.T) {
	m := start(t, testConfig(t), Deps{})
	sA, sB, sC := podSpec(t, "a", mapping(TCP, 8080, 80, "")), podSpec(t, "b", mapping(TCP, 8081, 80, "")), podSpec(t, "c", mapping(TCP, 8082, 80, ""))
	a, b, c := create(t, m, sA), create(t, m, sB), create(t, m, sC)
	for name, h := range map[string]*Handle{"a": a, "b": b, "c": c} {
		serve(t, netns(t, h), "tcp4", "0.0.0.0:80", name)
	}
	m = restart(t, m)
	// Before anybody is adopted everything goes on, also when the table must be made anew.
	wantAnswer(t, outsideNS, "tcp4", hostPort(hostIP4, 8080), "a", "")
	wantAnswer(t, outsideNS, "tcp4", hostPort(hostIP4, 8081), "b", "")
	if alive, err := m.Adopt(t.Context(), sA, a); !alive || err != nil {
		t.Fatalf("adopt: %v %v", alive, err)
	}
	if err := run("nft flush chain inet naru ports"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "rules back", func() bool { return strings.Contains(output(t, "nft list chain inet naru ports"), "dnat") })
	wantAnswer(t, outsideNS, "tcp4", hostPort(hostIP4, 8081), "b", "")
	// A new pod takes over the port of one that is not adopted: the record is what counts.
	d := create(t, m, podSpec(t, "d", mapping(TCP, 8082, 80, "")))
	serve(t, netns(t, d), "tcp4", "0.0.0.0:80", "d")
	wantAnswer(t, outsideNS, "tcp4", hostPort(hostIP4, 8082), "d", "")
	if ip := d.IPs[0]; ip == a.IPs[0] {
		t.Errorf("address %s given twice", ip)
	}
	if _, err := m.Create(t.Context(), podSpec(t, "x", mapping(TCP, 8080, 80, "")), nil); !errs.Is(err, errs.FailedPrecondition) {
		t.Errorf("adopted port is free: %v", err)
	}
	// A handle that nobody adopted is released: its element goes, if it is still its own.
	release(t, m, c)
	wantAnswer(t, outsideNS, "tcp4", hostPort(hostIP4, 8082), "d", "")
	// What Sweep does not know goes, what others have stays.
	for _, cmd := range []string{"ip link add narufake type veth peer name foreign1", "nft add table inet foreign"} {
		if err := run(cmd); err != nil {
			t.Fatal(err)
		}
	}
	stray := filepath.Join(m.podsDir(), newID(t))
	if err := makeFileDir(stray); err != nil {
		t.Fatal(err)
	}
	if err := m.Sweep(t.Context(), map[string]bool{a.ID: true, d.ID: true}); err != nil {
		t.Fatal(err)
	}
	wantAnswer(t, outsideNS, "tcp4", hostPort(hostIP4, 8080), "a", "")
	wantAnswer(t, outsideNS, "tcp4", hostPort(hostIP4, 8082), "d", "")
	wantSilence(t, outsideNS, "tcp4", hostPort(hostIP4, 8081))
	if _, err := os.Stat(stray); err == nil {
		t.Error("stray folder stays")
	}
	if _, err := os.Stat(filepath.Join(m.nsDir(), b.ID)); err == nil {
		t.Error("pins of b stay")
	}
	eventually(t, "link of b gone", func() bool { return !linkExists(b.HostLink) })
	if !linkExists("narufake") || !strings.Contains(output(t, "nft list tables"), "foreign") {
		t.Error("somebody else's link or table is gone")
	}
	for _, cmd := range []string{"ip link del narufake", "nft delete table inet foreign"} {
		if err := run(cmd); err != nil {
			t.Error(err)
		}
	}
	// A former boot holds nothing.
	old := *b
	old.BootID = "another"
	if alive, err := m.Adopt(t.Context(), sB, &old); alive || err != nil {
		t.Errorf("former boot: %v %v", alive, err)
	}
	if _, taken := m.ports.Owner(mustKey(t, mapping(TCP, 8081, 80, ""))); taken {
		t.Error("a pod of a former boot holds a port")
	}
	// Two records with one address.
	twin, id := *a, newID(t)
	twin.ID = id
	spec := sA
	spec.ID = id
	if alive, err := m.Adopt(t.Context(), spec, &twin); alive || !errs.Is(err, errs.FailedPrecondition) {
		t.Errorf("twin: %v %v", alive, err)
	}
}

// crashPlan is what a child of TestKilledAtEachStep is told.
type crashPlan struct {
	Config Config
	Spec   Spec
	At     string
	Pool   int
}

// crash creates a sandbox and kills its own process on the way.
func crash() {
	var p crashPlan
	if err := json.Unmarshal([]byte(os.Getenv(envCrash)), &p); err != nil {
		fmt.Println(err)
		os.Exit(3)
	}
	die := func() { _ = unix.Kill(os.Getpid(), unix.SIGKILL); select {} }
	m, err := New(p.Config, Deps{})
	if err == nil {
		err = m.Start(context.Background())
	}
	for range p.Pool {
		if err == nil {
			err = m.pool.add()
		}
	}
	if err == nil {
		_, err = m.Create(context.Background(), p.Spec, func(s string) {
			if s == p.At {
				die()
			}
		})
	}
	if err == nil {
		die() // after the last step
	}
	fmt.Println(err)
	os.Exit(3)
}

func TestKilledAtEachStep(t *testing.T) {
	m := start(t, testConfig(t), Deps{})
	for _, pool := range []int{0, 2} {
		for _, at := range append(slices.Clone(allSteps), "the end") {
			spec := fullSpec(t)
			plan, err := json.Marshal(crashPlan{m.cfg, spec, at, pool})
			if err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command("/proc/self/exe")
			cmd.Env = append(os.Environ(), envCrash+"="+string(plan))
			out, err := cmd.CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != -1 {
				t.Fatalf("at %q: %v %s", at, err, out)
			}
			n := restart(t, m)
			m = n
			if err := m.Sweep(t.Context(), nil); err != nil {
				t.Errorf("sweep after a kill at %q: %v", at, err)
			}
			nothingLeft(t, m)
			release(t, m, create(t, m, spec)) // the same again works
		}
	}
}

func TestPool(t *testing.T) {
	cfg := testConfig(t)
	cfg.PoolSize = 3
	m := start(t, cfg, Deps{})
	full := func() bool {
		m.pool.mu.Lock()
		defer m.pool.mu.Unlock()
		return len(m.pool.ready) == 3
	}
	eventually(t, "pool full", full)
	if err := m.Sweep(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if !full() {
		t.Fatal("Sweep took the pool")
	}
	var pods []*Handle
	early := map[string]bool{} // links that were there before their pod
	for i := range 8 {
		if i%3 == 2 {
			eventually(t, "pool full", full)
		}
		s := podSpec(t, fmt.Sprint("p", i), mapping(TCP, uint16(8080+i), 80, ""))
		s.Sysctls = map[string]string{"net.ipv4.ip_local_port_range": "2000 3000"}
		m.pool.mu.Lock()
		for _, e := range m.pool.ready {
			early[e.link] = true
		}
		m.pool.mu.Unlock()
		h := create(t, m, s)
		pods = append(pods, h)
		serve(t, netns(t, h), "tcp", ":80", s.Hostname)
		if alive, err := m.Adopt(t.Context(), s, h); !alive || err != nil {
			t.Errorf("adopt: %v %v", alive, err)
		}
		uts, err := sys.OpenNamespace(h.Namespaces.UTS, unix.CLONE_NEWUTS)
		if err != nil {
			t.Fatal(err)
		}
		err = m.inNamespaces(&opened{files: map[string]*os.File{"uts": uts}}, unix.CLONE_NEWUTS, func() error {
			if got, err := os.Hostname(); err != nil || got != s.Hostname {
				return fmt.Errorf("hostname %q, %w", got, err)
			}
			return nil
		})
		_ = uts.Close()
		if err != nil {
			t.Error(err)
		}
	}
	fromPool := 0
	for i, h := range pods {
		if early[h.HostLink] {
			fromPool++
		}
		name := fmt.Sprint("p", i)
		wantAnswer(t, outsideNS, "tcp4", hostPort(hostIP4, 8080+i), name, "")
		wantAnswer(t, nil, "tcp6", hostPort(pick(h, false), 80), name, "")
		wantAnswer(t, netns(t, pods[0]), "tcp4", hostPort(pick(h, true), 80), name, pick(pods[0], true))
	}
	if fromPool < 5 {
		t.Errorf("%d of %d came from the pool", fromPool, len(pods))
	}
	for _, h := range pods {
		release(t, m, h)
	}
	eventually(t, "pool full", full)
	// What a killed daemon left of its pool goes with Sweep.
	m.stop()
	m.wg.Wait()
	n, err := New(cfg, Deps{})
	if err != nil {
		t.Fatal(err)
	}
	left := m.pool.ready
	for _, e := range left {
		e.ns.close()
	}
	m.pool.ready = nil
	n.cfg.PoolSize, n.pool.size = 0, 0
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	_ = m.proc.Close()
	successors[m] = n
	if err := n.Sweep(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	nothingLeft(t, n)
}

// A namespace that something keeps does not keep the link: it goes some
// seconds after the release.
func TestDoomedLink(t *testing.T) {
	m := start(t, testConfig(t), Deps{})
	h := create(t, m, podSpec(t, "stuck"))
	_ = netns(t, h) // open until the end of the test
	release(t, m, h)
	if !linkExists(h.HostLink) {
		t.Fatal("link is gone although its namespace is open")
	}
	if out := output(t, "ip route show proto 110"); out != "" {
		t.Errorf("routes: %s", out)
	}
	if err := m.removeDoomed(); err != nil {
		t.Fatal(err)
	}
	if !linkExists(h.HostLink) {
		t.Fatal("deleted too early")
	}
	m.mu.Lock()
	d := m.doomed[h.HostLink]
	d.since = d.since.Add(-time.Minute)
	m.doomed[h.HostLink] = d
	m.mu.Unlock()
	if err := m.removeDoomed(); err != nil {
		t.Fatal(err)
	}
	if linkExists(h.HostLink) || len(m.doomed) != 0 {
		t.Error("link stays")
	}
}

func TestStats(t *testing.T) {
	m := start(t, testConfig(t), Deps{})
	h := create(t, m, podSpec(t, "a"))
	ns, err := sys.OpenNamespace(h.Namespaces.Net, unix.CLONE_NEWNET)
	if err != nil {
		t.Fatal(err)
	}
	sent := ipv4UDP(pick(h, true), outIP4, 5, 5, strings.Repeat("x", 1000))
	for range 10 {
		sendEther(t, ns, sent, unix.ETH_P_IP)
	}
	got, err := m.Stats(t.Context(), h)
	if err != nil || len(got) != 1 || got[0].Name != "eth0" {
		t.Fatalf("%+v %v", got, err)
	}
	if age := time.Since(got[0].Time); age < 0 || age > 2*statsAge {
		t.Errorf("the counters are %v old", age)
	}
	if s := got[0]; s.TxPackets < 10 || s.TxBytes < 10000 || s.TxBytes > 20000 || s.RxBytes > s.TxBytes {
		t.Errorf("%+v", s)
	}
	// It agrees with what the pod itself counts.
	in(t, ns, func() error {
		c, err := rtnl.Open()
		if err != nil {
			return err
		}
		defer c.Close()
		links, err := c.Veths()
		if err == nil && (links[0].Stats.TxBytes != got[0].TxBytes || links[0].Stats.TxPackets != got[0].TxPackets) {
			t.Errorf("the pod counts %+v, we say %+v", links[0].Stats, got[0])
		}
		return err
	})
	_ = ns.Close()
	release(t, m, h)
	eventually(t, "link gone", func() bool { return !linkExists(h.HostLink) })
	m.stats.at = time.Time{}
	if _, err := m.Stats(t.Context(), h); !errs.Is(err, errs.NotFound) {
		t.Errorf("released: %v", err)
	}
}

func TestStateFile(t *testing.T) {
	cfg := testConfig(t)
	cfg.PodCIDRs = []string{AutoCIDR}
	if err := os.MkdirAll(filepath.Dir(cfg.StateFile), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(cfg.StateFile, []byte(`{"version":9}`), 0o600); err != nil {
		t.Fatal(err)
	}
	m := start(t, cfg, Deps{})
	if st := m.NetworkStatus(); st.Reason != "NoPodCIDR" {
		t.Errorf("%+v", st)
	}
	if _, err := os.Stat(cfg.StateFile + ".bad"); err != nil {
		t.Error("the file was not set aside")
	}
	if err := m.SetPodCIDRs(t.Context(), []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}); !errs.Is(err, errs.InvalidArgument) {
		t.Error(err)
	}
	if err := m.SetPodCIDRs(t.Context(), []netip.Prefix{netip.MustParsePrefix("10.5.0.7/24"), netip.MustParsePrefix("fd05::/80")}); err != nil {
		t.Error(err)
	}
	b, err := os.ReadFile(cfg.StateFile)
	if want := `{"version":1,"pod_cidrs":["10.5.0.0/24","fd05::/80"]}` + "\n"; err != nil || string(b) != want {
		t.Errorf("%q %v", b, err)
	}
	fixed := testConfig(t)
	fixed.Table, fixed.LinkPrefix = "other", "othr"
	n := start(t, fixed, Deps{})
	if err := n.SetPodCIDRs(t.Context(), []netip.Prefix{netip.MustParsePrefix("10.5.0.0/24")}); err != nil {
		t.Error(err)
	}
	if got := n.ips.String(); got != "[10.77.0.0/24 fd77::/112]" {
		t.Errorf("configured CIDRs gave way: %s", got)
	}
}

func FuzzParseState(f *testing.F) {
	f.Add([]byte(`{"version":1,"pod_cidrs":["10.5.0.0/24"]}`))
	f.Add([]byte(`{"version":1,"pod_cidrs":["fd00::/64","x"]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := parseState(data)
		for _, c := range p {
			if err == nil && (!c.IsValid() || c != c.Masked()) {
				t.Fatalf("%v", c)
			}
		}
	})
}

func TestConfigCheck(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"run dir": func(c *Config) { c.RunDir = "run" }, "table": func(c *Config) { c.Table = "a; flush ruleset" },
		"prefix": func(c *Config) { c.LinkPrefix = "toolong7" }, "prefix /": func(c *Config) { c.LinkPrefix = "a/b" },
		"group": func(c *Config) { c.LinkGroup = 0 }, "mtu": func(c *Config) { c.MTU = 100 },
		"cidr": func(c *Config) { c.PodCIDRs = []string{"10.0.0.0"} }, "auto twice": func(c *Config) { c.PodCIDRs = []string{"auto", "10.0.0.0/8"} },
		"state": func(c *Config) { c.StateFile, c.PodCIDRs = "", nil }, "pool": func(c *Config) { c.PoolSize = -1 },
		"plain": func(c *Config) { c.NonMasqueradeCIDRs = []string{"x"} },
	} {
		c := DefaultConfig()
		change(&c)
		if _, err := New(c, Deps{}); !errs.Is(err, errs.InvalidArgument) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if m, err := New(DefaultConfig(), Deps{}); err != nil || m.NetworkStatus().Ready {
		t.Errorf("default: %v", err)
	} else if err := m.Close(); err != nil {
		t.Error(err)
	}
}

func TestLinkNamesAndMACs(t *testing.T) {
	m, err := New(DefaultConfig(), Deps{})
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for range 2000 {
		n := m.newLinkName()
		if len(n) != 15 || names[n] || !strings.HasPrefix(n, "naru") {
			t.Fatalf("name %q", n)
		}
		names[n] = true
		host, pod := macs(n)
		if host == pod || host[0]&3 != 2 || pod[0]&3 != 2 {
			t.Fatalf("%x %x", host, pod)
		}
	}
}

// One hundred lives leave nothing: no descriptor, thread, mount, link, route.
func TestHundredCycles(t *testing.T) {
	cfg := testConfig(t)
	cfg.PoolSize = 2
	m := start(t, cfg, Deps{})
	cycle := func(n int) {
		var wg sync.WaitGroup
		for w := range 4 {
			wg.Go(func() {
				for i := range n / 4 {
					s := podSpec(t, "p", mapping(TCP, uint16(1000+w*100+i), 80, ""), mapping(UDP, uint16(1000+w*100+i), 80, ""))
					ctx, cancel := context.WithCancelCause(t.Context())
					fail := i%10 == 9
					h, err := m.Create(ctx, s, func(step string) {
						if fail && step == allSteps[(i/10+w)%len(allSteps)] {
							cancel(errors.New("injected"))
						}
					})
					cancel(nil)
					if (err != nil) != fail {
						t.Errorf("create: %v", err)
					}
					if err == nil {
						release(t, m, h)
					}
				}
			})
		}
		wg.Wait()
	}
	settle := func() map[string][]string {
		eventually(t, "all links gone", func() bool { return strings.Count(output(t, "ip -o link"), "alias naru") <= cfg.PoolSize })
		eventually(t, "pool full", func() bool { m.pool.mu.Lock(); defer m.pool.mu.Unlock(); return len(m.pool.ready) == cfg.PoolSize })
		s := snapshot()
		delete(s, "link") // the pool's have random names
		for i, p := range s["mount"] {
			s["mount"][i] = filepath.Base(filepath.Dir(p))[:min(4, len(filepath.Base(filepath.Dir(p))))]
		}
		slices.Sort(s["mount"])
		return s
	}
	cycle(20)
	before := settle()
	cycle(100)
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		diff := compare(before, settle())
		if len(diff) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("left: %s", strings.Join(diff, "\n"))
		}
	}
}

// Sweep runs while pods are made: none of them is hurt, though it knows none.
func TestSweepWhileCreating(t *testing.T) {
	m := start(t, testConfig(t), Deps{})
	var wg sync.WaitGroup
	stop := make(chan struct{})
	known := sync.Map{}
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			snapshot := map[string]bool{}
			known.Range(func(k, _ any) bool { snapshot[k.(string)] = true; return true })
			if err := m.Sweep(t.Context(), snapshot); err != nil {
				t.Error(err)
			}
		}
	})
	var made sync.WaitGroup
	for w := range 3 {
		made.Go(func() {
			for i := range 10 {
				s := podSpec(t, "p", mapping(TCP, uint16(1000+100*w+i), 80, ""))
				h, err := m.Create(t.Context(), s, func(string) { known.Store(s.ID, true) }) // as the pod manager: the record goes first
				if err != nil {
					t.Error(err)
					return
				}
				if alive, err := m.Adopt(t.Context(), s, h); !alive || err != nil {
					t.Errorf("hurt by Sweep: %v %v", alive, err)
				}
				release(t, m, h)
			}
		})
	}
	made.Wait()
	close(stop)
	wg.Wait()
}
