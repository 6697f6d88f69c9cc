package sandbox

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/sys"
)

// All tests that need root run in namespaces of their own: TestMain starts the
// test binary again, as a child with new network, mount, UTS and IPC
// namespaces. Nothing of the machine is touched.
const (
	envInside = "NARU_SANDBOX_TEST_INSIDE"
	envHolder = "NARU_SANDBOX_TEST_HOLDER"
	envCrash  = "NARU_SANDBOX_TEST_CRASH"
)

func TestMain(m *testing.M) {
	switch {
	case os.Getenv(envHolder) != "":
		holdNamespaces()
	case os.Getenv(envCrash) != "":
		crash()
	case os.Getenv(envInside) != "":
		os.Exit(inside(m))
	case os.Geteuid() != 0 || slices.ContainsFunc(os.Args, func(a string) bool {
		return strings.HasPrefix(a, "-test.fuzz") && !strings.HasPrefix(a, "-test.fuzzcache")
	}):
		os.Exit(m.Run()) // without what needs namespaces; a fuzz worker talks by inherited descriptors
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), envInside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
		Pdeathsig:  unix.SIGKILL,
	}
	goruntime.LockOSThread() // Pdeathsig is of the thread
	if err := cmd.Run(); err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			os.Exit(exit.ExitCode())
		}
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

var outsideNS *os.File // a network namespace that plays the world outside

// Addresses of the host under test and of the world outside, on one link.
const (
	hostIP4, outIP4 = "198.51.100.1", "198.51.100.2"
	hostIP6, outIP6 = "2001:db8:1::1", "2001:db8:1::2"
	farIP4, farIP6  = "198.51.100.77", "2001:db8:1::77" // of the outside too, none of the host's
)

func inside(m *testing.M) int {
	if err := makeWorld(); err != nil {
		fmt.Fprintln(os.Stderr, "make the test network:", err)
		return 1
	}
	time.Sleep(50 * time.Millisecond) // the threads that made the world end
	before := snapshot()
	code := m.Run()
	defer func() {
		if dir := os.Getenv("TMPDIR"); strings.Contains(dir, "naru-sandbox-test") {
			_ = unix.Unmount(dir, unix.MNT_DETACH)
			_ = os.Remove(dir)
		}
	}()
	if code != 0 {
		return code
	}
	deadline := time.Now().Add(15 * time.Second)
	for {
		after := snapshot()
		diff := compare(before, after)
		if len(diff) == 0 {
			return 0
		}
		if time.Now().After(deadline) {
			fmt.Fprintln(os.Stderr, "LEAKED:\n"+strings.Join(diff, "\n"))
			return 1
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func makeWorld() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	// The run folder of a node lies on a tmpfs, so that of the tests does.
	dir, err := os.MkdirTemp("", "naru-sandbox-test")
	if err != nil {
		return err
	}
	if err := unix.Mount("naru-test", dir, "tmpfs", 0, ""); err != nil {
		return err
	}
	if err := os.Setenv("TMPDIR", dir); err != nil {
		return err
	}
	err = sys.NamespaceThread(func() (err error) {
		if err = unix.Unshare(unix.CLONE_NEWNET); err == nil {
			outsideNS, err = sys.ThreadNamespace(unix.CLONE_NEWNET)
		}
		return err
	})
	if err != nil {
		return err
	}
	pin := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), outsideNS.Fd())
	for _, c := range []string{
		"ip link set lo up",
		"ip link add uplink0 type veth peer name world0 netns " + pin,
		"ip addr add " + hostIP4 + "/24 dev uplink0",
		"ip addr add " + hostIP6 + "/64 dev uplink0 nodad",
		"sysctl -q net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.uplink0.accept_dad=0", // no second of waiting
		"ip link set uplink0 mtu 1420 up",
		"ip route add default via " + outIP4,
		"ip -6 route add default via " + outIP6,
	} {
		if err := run(c); err != nil {
			return err
		}
	}
	return sys.NamespaceThread(func() error {
		if err := sys.Setns(outsideNS, unix.CLONE_NEWNET); err != nil {
			return err
		}
		for _, c := range []string{
			"ip link set lo up",
			"ip addr add " + outIP4 + "/24 dev world0", "ip addr add " + farIP4 + "/24 dev world0",
			"ip addr add " + outIP6 + "/64 dev world0 nodad", "ip addr add " + farIP6 + "/64 dev world0 nodad",
			"sysctl -q net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.world0.accept_dad=0",
			"ip link set world0 mtu 1420 up",
		} {
			if err := run(c); err != nil {
				return err
			}
		}
		return nil
	})
}

// run starts a command in the namespaces of the calling thread.
func run(command string) error {
	f := strings.Fields(command)
	if out, err := exec.Command(f[0], f[1:]...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", command, err, out)
	}
	return nil
}

func output(t testing.TB, command string) string {
	t.Helper()
	f := strings.Fields(command)
	out, err := exec.Command(f[0], f[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", command, err, out)
	}
	return string(out)
}

// snapshot lists what must be the same before and after.
func snapshot() map[string][]string {
	out := map[string][]string{}
	if links, err := net.Interfaces(); err == nil {
		for _, l := range links {
			out["link"] = append(out["link"], l.Name)
		}
	}
	if mounts, err := os.ReadFile("/proc/self/mountinfo"); err == nil {
		for line := range strings.Lines(string(mounts)) {
			// Mounts of the machine, copied into our namespace, come and go by themselves.
			if f := strings.Fields(line); strings.HasPrefix(f[4], os.Getenv("TMPDIR")+"/") {
				out["mount"] = append(out["mount"], f[4])
			}
		}
	}
	for _, kind := range []string{"net", "ipc", "uts", "mnt"} {
		tasks, _ := filepath.Glob("/proc/self/task/*/ns/" + kind)
		own, _ := os.Readlink("/proc/self/ns/" + kind)
		for _, l := range tasks {
			if s, err := os.Readlink(l); err == nil && s != own {
				out["thread elsewhere"] = append(out["thread elsewhere"], s)
			}
		}
	}
	fds, _ := os.ReadDir("/proc/self/fd")
	for _, f := range fds {
		to, err := os.Readlink("/proc/self/fd/" + f.Name())
		if err != nil || strings.HasPrefix(to, "anon_inode:") || strings.HasPrefix(to, "/proc/") {
			continue // epoll and eventfd of the Go runtime; the listing itself
		}
		kind, _, _ := strings.Cut(to, ":[") // without inode numbers
		out["fd"] = append(out["fd"], kind)
	}
	if b, err := exec.Command("ip", "-4", "route", "show", "proto", "110").Output(); err == nil {
		out["route"] = strings.Split(string(b), "\n")
	}
	if b, err := exec.Command("nft", "list", "tables").Output(); err == nil {
		out["nft"] = strings.Split(string(b), "\n")
	}
	out["goroutines"] = []string{fmt.Sprint(goruntime.NumGoroutine())}
	for k := range out {
		slices.Sort(out[k])
	}
	return out
}

func compare(a, b map[string][]string) (diff []string) {
	keys := maps.Clone(a)
	maps.Copy(keys, b)
	for k := range keys {
		if !slices.Equal(a[k], b[k]) {
			diff = append(diff, fmt.Sprintf("%s: before %q, after %q", k, a[k], b[k]))
		}
	}
	return diff
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Getenv(envInside) == "" {
		t.Skip("needs root, for namespaces of its own: mounts, nftables, links")
	}
}

func newID(t testing.TB) string {
	t.Helper()
	b := make([]byte, 32)
	if _, err := rand.Read(b); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(b)
}

func testConfig(t testing.TB) Config {
	dir := t.TempDir()
	cfg := DefaultConfig()
	cfg.RunDir = filepath.Join(dir, "run")
	cfg.StateFile = filepath.Join(dir, "lib", "network.json")
	cfg.PodCIDRs = []string{"10.77.0.0/24", "fd77::/112"}
	cfg.PoolSize = 0
	cfg.CNI.ConfDir = filepath.Join(dir, "net.d")
	cfg.CNI.StateDir = filepath.Join(dir, "lib", "cni")
	cfg.HostEtc = filepath.Join(dir, "etc")
	cfg.HostResolv = filepath.Join(dir, "resolv.conf")
	if err := os.Mkdir(cfg.HostEtc, 0o755); err != nil {
		t.Fatal(err)
	}
	return cfg
}

// start starts a Manager that is taken down with all it has at the end.
func start(t testing.TB, cfg Config, deps Deps) *Manager {
	t.Helper()
	needRoot(t)
	m, err := New(cfg, deps)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		last := m
		for successors[last] != nil {
			last = successors[last]
		}
		takeDown(t, last)
	})
	return m
}

var successors = map[*Manager]*Manager{}

// restart closes a Manager and starts another like it, as a restart of the
// daemon does.
func restart(t testing.TB, m *Manager) *Manager {
	t.Helper()
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	n, err := New(m.cfg, m.deps)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	successors[m] = n
	return n
}

func takeDown(t testing.TB, m *Manager) {
	t.Helper()
	if err := m.Sweep(context.Background(), nil); err != nil {
		t.Errorf("sweep: %v", err)
	}
	if err := m.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
	if err := m.fw.Delete(); err != nil {
		t.Errorf("delete table: %v", err)
	}
	for _, d := range []string{m.nsDir(), m.podsDir()} {
		if names, err := os.ReadDir(d); err != nil || len(names) > 0 {
			t.Errorf("left in %s: %v, %v", d, names, err)
		}
		if err := unmountAll(d); err != nil {
			t.Error(err)
		}
	}
}

func podSpec(t testing.TB, name string, ports ...PortMapping) Spec {
	return Spec{ID: newID(t), Name: "ns/" + name, Hostname: name, Network: ModePod, IPC: ModePod, UTS: ModePod, Ports: ports}
}

func create(t testing.TB, m *Manager, s Spec) *Handle {
	t.Helper()
	h, err := m.Create(t.Context(), s, nil)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

func release(t testing.TB, m *Manager, h *Handle) {
	t.Helper()
	if err := m.Release(t.Context(), h.ID, h); err != nil {
		t.Error(err)
	}
}

// netns opens the network namespace of a pod; "" stands for the host.
func netns(t testing.TB, h *Handle) *os.File {
	t.Helper()
	f, err := sys.OpenNamespace(h.Namespaces.Net, unix.CLONE_NEWNET)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// in runs fn in a network namespace; nil is the host.
func in(t testing.TB, ns *os.File, fn func() error) {
	t.Helper()
	if err := inErr(ns, fn); err != nil {
		t.Fatal(err)
	}
}

func inErr(ns *os.File, fn func() error) error {
	if ns == nil {
		return fn()
	}
	return sys.NamespaceThread(func() error {
		if err := sys.Setns(ns, unix.CLONE_NEWNET); err != nil {
			return err
		}
		return fn()
	})
}

// serve answers on addr in ns with the address of who asked, and its own.
func serve(t testing.TB, ns *os.File, network, addr, name string) {
	t.Helper()
	in(t, ns, func() error {
		if strings.HasPrefix(network, "udp") {
			c, err := net.ListenPacket(network, addr)
			if err != nil {
				return err
			}
			t.Cleanup(func() { _ = c.Close() })
			go func() {
				buf := make([]byte, 64)
				for {
					_, from, err := c.ReadFrom(buf)
					if err != nil {
						return
					}
					_, _ = c.WriteTo([]byte(name+" "+from.String()), from)
				}
			}()
			return nil
		}
		l, err := net.Listen(network, addr)
		if err != nil {
			return err
		}
		t.Cleanup(func() { _ = l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				_, _ = io.WriteString(c, name+" "+c.RemoteAddr().String()+"\n")
				_ = c.Close()
			}
		}()
		return nil
	})
}

const askTimeout = 1500 * time.Millisecond

// ask connects from ns and returns who answered, and the source it saw.
func ask(ns *os.File, network, addr string) (name string, source netip.Addr, err error) {
	return askFor(ns, network, addr, askTimeout)
}

func askFor(ns *os.File, network, addr string, timeout time.Duration) (name string, source netip.Addr, err error) {
	err = inErr(ns, func() error {
		c, err := (&net.Dialer{Timeout: timeout}).Dial(network, addr)
		if err != nil {
			return err
		}
		defer func() { _ = c.Close() }()
		_ = c.SetDeadline(time.Now().Add(timeout))
		var line string
		if strings.HasPrefix(network, "udp") {
			buf := make([]byte, 128)
			if _, err := c.Write([]byte("?")); err != nil {
				return err
			}
			n, err := c.Read(buf)
			if err != nil {
				return err
			}
			line = string(buf[:n])
		} else if line, err = bufio.NewReader(c).ReadString('\n'); err != nil {
			return err
		}
		who, from, _ := strings.Cut(strings.TrimSpace(line), " ")
		ap, err := netip.ParseAddrPort(from)
		name, source = who, ap.Addr().Unmap()
		return err
	})
	return name, source, err
}

// wantAnswer checks who answers, and from which source it was asked.
func wantAnswer(t testing.TB, ns *os.File, network, addr, name, source string) {
	t.Helper()
	got, from, err := ask(ns, network, addr)
	if err != nil || got != name || source != "" && from.String() != source {
		t.Errorf("%s %s: answered by %q, source %s, %v; want %q, source %q", network, addr, got, from, err, name, source)
	}
}

// wantSilence checks that nobody, or not the named one, answers.
func wantSilence(t testing.TB, ns *os.File, network, addr string) {
	t.Helper()
	if got, from, err := askFor(ns, network, addr, 300*time.Millisecond); err == nil {
		t.Errorf("%s %s: answered by %q (source %s); want no answer", network, addr, got, from)
	}
}

func hostPort(ip string, port int) string { return net.JoinHostPort(ip, fmt.Sprint(port)) }

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

func linkExists(name string) bool {
	_, err := os.Stat("/proc/sys/net/ipv4/conf/" + name)
	return err == nil
}
