package sandbox

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/sys"
	"github.com/naru-project/naru/internal/testhost"
	"github.com/naru-project/naru/sandbox/sysctl"
)

// The names of the tests here are rows of the project's attack table.

// sendRaw sends one IPv6 packet of ICMPv6 from a pod, with the source given, by
// a packet socket: no check of the pod's own kernel side stands in the way.
func sendEther(t *testing.T, ns *os.File, payload []byte, proto uint16) {
	t.Helper()
	in(t, ns, func() error {
		eth, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(fd) }()
		to := &unix.SockaddrLinklayer{Protocol: proto<<8 | proto>>8, Ifindex: eth.Index, Halen: 6}
		copy(to.Addr[:], peerMAC(t))
		return unix.Sendto(fd, payload, 0, to)
	})
}

// peerMAC is the host's hardware address, as the pod of the calling thread knows it.
func peerMAC(t *testing.T) net.HardwareAddr {
	for line := range strings.Lines(output(t, "ip neigh show dev eth0")) {
		f := strings.Fields(line)
		if i := slices.Index(f, "lladdr"); i > 0 {
			mac, err := net.ParseMAC(f[i+1])
			if err != nil {
				t.Error(err)
			}
			return mac
		}
	}
	t.Error("no neighbour in the pod")
	return make(net.HardwareAddr, 6)
}

func ipv6Packet(src, dst string, next byte, payload []byte) []byte {
	s, d := netip.MustParseAddr(src).As16(), netip.MustParseAddr(dst).As16()
	p := []byte{0x60, 0, 0, 0, byte(len(payload) >> 8), byte(len(payload)), next, 255}
	p = append(append(p, s[:]...), d[:]...)
	if next == unix.IPPROTO_ICMPV6 {
		pseudo := slices.Concat(s[:], d[:], []byte{0, 0, byte(len(payload) >> 8), byte(len(payload)), 0, 0, 0, next}, payload)
		c := checksum(pseudo)
		payload = slices.Clone(payload)
		payload[2], payload[3] = byte(c>>8), byte(c)
	}
	return append(p, payload...)
}

func ipv4UDP(src, dst string, sport, dport uint16, data string) []byte {
	s, d := netip.MustParseAddr(src).As4(), netip.MustParseAddr(dst).As4()
	n := 28 + len(data)
	p := []byte{0x45, 0, byte(n >> 8), byte(n), 0, 1, 0, 0, 64, unix.IPPROTO_UDP, 0, 0}
	p = append(append(p, s[:]...), d[:]...)
	c := checksum(p)
	p[10], p[11] = byte(c>>8), byte(c)
	p = append(p, byte(sport>>8), byte(sport), byte(dport>>8), byte(dport), byte((8+len(data))>>8), byte(8+len(data)), 0, 0)
	return append(p, data...)
}

func checksum(p []byte) uint16 {
	sum := uint32(0)
	for i := 0; i+1 < len(p); i += 2 {
		sum += uint32(p[i])<<8 | uint32(p[i+1])
	}
	if len(p)%2 == 1 {
		sum += uint32(p[len(p)-1]) << 8
	}
	for sum>>16 != 0 {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// dropped is how many packets the guard chain has dropped.
func dropped(t *testing.T) (n int) {
	t.Helper()
	for line := range strings.Lines(output(t, "nft list chain inet naru guard")) {
		f := strings.Fields(line)
		if i := slices.Index(f, "packets"); i > 0 {
			var k int
			_, _ = fmt.Sscan(f[i+1], &k)
			n += k
		}
	}
	return n
}

func TestW01RouterAdvertisements(t *testing.T) {
	m := start(t, testConfig(t), Deps{})
	evil, victim := create(t, m, podSpec(t, "evil")), create(t, m, podSpec(t, "victim"))
	ns := netns(t, evil)
	routes := func() string {
		all := output(t, "ip -6 route") + output(t, "ip -6 addr")
		in(t, netns(t, victim), func() error { all += output(t, "ip -6 route") + output(t, "ip -6 addr"); return nil })
		return all
	}
	// Prefix 2001:db8:66::/64, autonomous, on link; router lifetime 1800 s.
	ra := []byte{134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0}
	ra = append(ra, 3, 4, 64, 0xc0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0)
	prefix := netip.MustParseAddr("2001:db8:66::").As16()
	ra = append(ra, prefix[:]...)
	before := routes()
	hits := dropped(t)
	for _, src := range []string{"fe80::66", "fe80::1", pick(evil, false)} {
		for _, dst := range []string{"ff02::1", "fe80::1", pick(victim, false)} {
			sendEther(t, ns, ipv6Packet(src, dst, unix.IPPROTO_ICMPV6, ra), unix.ETH_P_IPV6)
		}
	}
	if got := dropped(t) - hits; got != 9 {
		t.Errorf("guard dropped %d of 9 advertisements", got)
	}
	// Even with the guard away nobody listens.
	if err := run("nft flush chain inet naru guard"); err == nil {
		sendEther(t, ns, ipv6Packet("fe80::66", "ff02::1", unix.IPPROTO_ICMPV6, ra), unix.ETH_P_IPV6)
	}
	time.Sleep(100 * time.Millisecond)
	if after := routes(); after != before {
		t.Errorf("changed:\n%s\n%s", before, after)
	}
	for _, link := range []string{evil.HostLink, victim.HostLink} {
		if v, err := os.ReadFile("/proc/sys/net/ipv6/conf/" + link + "/accept_ra"); err != nil || strings.TrimSpace(string(v)) != "0" {
			t.Errorf("accept_ra of %s: %q %v", link, v, err)
		}
	}
	in(t, netns(t, victim), func() error {
		if v, err := sysctl.Read(m.proc, "net/ipv6/conf/eth0/accept_ra"); err != nil || v != "0" {
			t.Errorf("accept_ra in the pod: %q %v", v, err)
		}
		return nil
	})
}

// Sources that are not the pod's own are dropped, in both families, whatever
// the pod sends them to.
func TestSpoofedSources(t *testing.T) {
	m := start(t, testConfig(t), Deps{})
	evil, victim := create(t, m, podSpec(t, "evil")), create(t, m, podSpec(t, "victim"))
	ns := netns(t, evil)
	var got sync.Map
	for _, where := range []struct {
		ns   *os.File
		addr string
	}{{netns(t, victim), ":9000"}, {nil, ":9000"}, {outsideNS, ":9000"}} {
		in(t, where.ns, func() error {
			c, err := net.ListenPacket("udp", where.addr)
			if err != nil {
				return err
			}
			t.Cleanup(func() { _ = c.Close() })
			go func() {
				buf := make([]byte, 100)
				for {
					n, _, err := c.ReadFrom(buf)
					if err != nil {
						return
					}
					got.Store(string(buf[:n]), true)
				}
			}()
			return nil
		})
	}
	for _, src := range []string{pick(victim, true), hostIP4, "169.254.1.1", "127.0.0.1", "10.77.0.200", "0.0.0.0", outIP4, "8.8.8.8"} {
		for _, dst := range []string{pick(victim, true), hostIP4, outIP4, "169.254.1.1"} {
			sendEther(t, ns, ipv4UDP(src, dst, 9, 9000, "spoofed "+src+" "+dst), unix.ETH_P_IP)
		}
	}
	udp6 := func(data string) []byte { // checksum is wrong for UDP over IPv6: counted as dropped by the guard before anybody looks
		return append([]byte{0, 9, 0x23, 0x28, 0, byte(8 + len(data)), 0, 1}, data...)
	}
	before, sent := dropped(t), 0
	for _, src := range []string{pick(victim, false), hostIP6, "fe80::1", "fe80::5", "2001:4860::1"} {
		for _, dst := range []string{pick(victim, false), hostIP6, outIP6} {
			sendEther(t, ns, ipv6Packet(src, dst, unix.IPPROTO_UDP, udp6("x")), unix.ETH_P_IPV6)
			sent++
		}
	}
	if n := dropped(t) - before; n != sent {
		t.Errorf("guard dropped %d of %d spoofed IPv6 packets", n, sent)
	}
	// The positive control: its own source passes.
	for _, dst := range []string{pick(victim, true), hostIP4, outIP4} {
		sendEther(t, ns, ipv4UDP(pick(evil, true), dst, 9, 9000, "own "+dst), unix.ETH_P_IP)
		eventually(t, "own packet to "+dst, func() bool { _, ok := got.Load("own " + dst); return ok })
	}
	got.Range(func(k, _ any) bool {
		if strings.HasPrefix(k.(string), "spoofed") {
			t.Errorf("arrived: %s", k)
		}
		return true
	})
}

func TestW02OnlyLocalDestinations(t *testing.T) {
	m := start(t, testConfig(t), Deps{})
	web := create(t, m, podSpec(t, "web", mapping(TCP, 8080, 80, ""), mapping(UDP, 53, 53, ""), mapping(TCP, 8088, 80, hostIP4)))
	other := create(t, m, podSpec(t, "other"))
	client := create(t, m, podSpec(t, "client"))
	serve(t, netns(t, web), "tcp", ":80", "web")
	serve(t, netns(t, web), "udp4", "0.0.0.0:53", "web")
	for _, where := range []struct {
		ns   *os.File
		name string
	}{{netns(t, other), "other"}, {outsideNS, "world"}} {
		serve(t, where.ns, "tcp", ":8080", where.name)
		serve(t, where.ns, "tcp", ":8088", where.name)
		serve(t, where.ns, "udp4", map[string]string{"other": "0.0.0.0:53", "world": outIP4 + ":53"}[where.name], where.name)
	}
	for _, from := range []*os.File{netns(t, client), nil} {
		for _, port := range []int{8080, 8088} {
			wantAnswer(t, from, "tcp4", hostPort(pick(other, true), port), "other", "")
			wantAnswer(t, from, "tcp6", hostPort(pick(other, false), port), "other", "")
			wantAnswer(t, from, "tcp4", hostPort(outIP4, port), "world", "")
			wantAnswer(t, from, "tcp6", hostPort(outIP6, port), "world", "")
		}
		wantAnswer(t, from, "udp4", hostPort(pick(other, true), 53), "other", "")
		wantAnswer(t, from, "udp4", hostPort(outIP4, 53), "world", "")
		wantAnswer(t, from, "tcp4", hostPort(hostIP4, 8080), "web", "")
	}
}

// kubeProxy makes rules as a service proxy does, in nat chains at -100 and 100:
// addr:port leads to target; a pod that reaches itself is masqueraded.
func kubeProxy(t *testing.T, addr string, port int, target string) {
	t.Helper()
	host := strings.Split(target, ":")[0]
	rules := fmt.Sprintf(`table ip kube-proxy {
		chain services { ip daddr %s tcp dport %d dnat to %s; }
		chain nat-prerouting { type nat hook prerouting priority dstnat; policy accept; jump services; }
		chain nat-output { type nat hook output priority -100; policy accept; jump services; }
		chain nat-postrouting { type nat hook postrouting priority srcnat; policy accept; ip saddr %s ip daddr %s masquerade; }
	}`, addr, port, target, host, host)
	file := filepath.Join(t.TempDir(), "rules")
	if err := os.WriteFile(file, []byte(rules), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := run("nft -f " + file); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = run("nft delete table ip kube-proxy") })
}

func TestW03ServiceRulesGoFirst(t *testing.T) {
	for _, order := range []string{"service first", "host port first"} {
		t.Run(order, func(t *testing.T) {
			m := start(t, testConfig(t), Deps{})
			svc := create(t, m, podSpec(t, "svc"))
			serve(t, netns(t, svc), "tcp4", "0.0.0.0:80", "service")
			proxy := func() { kubeProxy(t, hostIP4, 8080, pick(svc, true)+":80") } // as of a NodePort on that address
			if order == "service first" {
				proxy()
			}
			web := create(t, m, podSpec(t, "web", mapping(TCP, 8080, 80, "")))
			serve(t, netns(t, web), "tcp4", "0.0.0.0:80", "web")
			if order != "service first" {
				proxy()
			}
			wantAnswer(t, outsideNS, "tcp4", hostPort(hostIP4, 8080), "service", "")
			wantAnswer(t, nil, "tcp4", hostPort(hostIP4, 8080), "service", "")
			wantAnswer(t, nil, "tcp4", "127.0.0.1:8080", "web", "") // an address that the service does not claim
		})
	}
}

// A service leads to a pod of the same node, and to the very pod that asks.
func TestServiceOnTheSameNode(t *testing.T) {
	m := start(t, testConfig(t), Deps{})
	svc, client := create(t, m, podSpec(t, "svc")), create(t, m, podSpec(t, "client"))
	serve(t, netns(t, svc), "tcp4", "0.0.0.0:80", "service")
	kubeProxy(t, "10.96.0.7", 443, pick(svc, true)+":80")
	wantAnswer(t, netns(t, client), "tcp4", "10.96.0.7:443", "service", pick(client, true))
	wantAnswer(t, netns(t, svc), "tcp4", "10.96.0.7:443", "service", "")
	wantAnswer(t, nil, "tcp4", "10.96.0.7:443", "service", "")
}

func TestW04LoopbackStaysTheHosts(t *testing.T) {
	m := start(t, testConfig(t), Deps{})
	web := create(t, m, podSpec(t, "web", mapping(TCP, 8080, 80, ""), mapping(UDP, 8080, 80, "")))
	serve(t, netns(t, web), "tcp4", "0.0.0.0:80", "web")
	wantAnswer(t, nil, "tcp4", "127.0.0.1:8080", "web", "") // route_localnet is in use
	var heard sync.Map
	c, err := net.ListenPacket("udp4", "127.0.0.1:9999")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	go func() {
		buf := make([]byte, 100)
		for {
			n, _, err := c.ReadFrom(buf)
			if err != nil {
				return
			}
			heard.Store(string(buf[:n]), true)
		}
	}()
	sendEther(t, netns(t, web), ipv4UDP(pick(web, true), "127.0.0.1", 5, 9999, "from the pod"), unix.ETH_P_IP)
	sendEther(t, netns(t, web), ipv4UDP("127.0.0.1", "127.0.0.1", 5, 9999, "from the pod as loopback"), unix.ETH_P_IP)
	// From a neighbour on the host's own network, to the host's hardware address.
	up, err := net.InterfaceByName("uplink0")
	if err != nil {
		t.Fatal(err)
	}
	in(t, outsideNS, func() error {
		w, err := net.InterfaceByName("world0")
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(fd) }()
		to := &unix.SockaddrLinklayer{Protocol: 0x0008, Ifindex: w.Index, Halen: 6}
		copy(to.Addr[:], up.HardwareAddr)
		return unix.Sendto(fd, ipv4UDP(outIP4, "127.0.0.1", 5, 9999, "from a neighbour"), 0, to)
	})
	self, err := net.Dial("udp4", "127.0.0.1:9999")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = self.Close() }()
	if _, err := self.Write([]byte("from the host")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the host's own packet", func() bool { _, ok := heard.Load("from the host"); return ok })
	heard.Range(func(k, _ any) bool {
		if k != "from the host" {
			t.Errorf("heard %q", k)
		}
		return true
	})
	for _, name := range []string{"all", "default", "uplink0", "lo"} {
		if v, err := os.ReadFile("/proc/sys/net/ipv4/conf/" + name + "/route_localnet"); err != nil || strings.TrimSpace(string(v)) != "0" {
			t.Errorf("route_localnet of %s: %q %v", name, v, err)
		}
	}
}

func TestW08HostilePins(t *testing.T) {
	m := start(t, testConfig(t), Deps{})
	for what, put := range map[string]func(path string) error{
		"symlink": func(p string) error { return os.Symlink("/", p) },
		"file":    func(p string) error { return os.WriteFile(p, nil, 0o600) },
		"folder":  func(p string) error { return os.Mkdir(p, 0o700) },
	} {
		s := podSpec(t, "a")
		if err := put(filepath.Join(m.nsDir(), s.ID)); err != nil {
			t.Fatal(err)
		}
		if _, err := m.Create(t.Context(), s, nil); !errs.Is(err, errs.AlreadyExists) {
			t.Errorf("%s: %v", what, err)
		}
		if err := os.Remove(filepath.Join(m.nsDir(), s.ID)); err != nil {
			t.Error(err)
		}
	}
	if ids := m.ips.IDs(); len(ids) != 0 {
		t.Errorf("leases %v", ids)
	}
	h := create(t, m, podSpec(t, "b"))
	other := create(t, m, podSpec(t, "c"))
	for _, path := range []string{"/proc/self/ns/net", h.Namespaces.IPC, other.Namespaces.Net, m.nsDir() + "/../ns/" + h.ID + "/net", "/etc/passwd"} {
		bad := *h
		bad.Namespaces.Net = path
		if _, err := m.Dial(t.Context(), &bad, 80); !errs.Is(err, errs.FailedPrecondition) {
			t.Errorf("dial by %s: %v", path, err)
		}
	}
	// The pin lost its mount: what is left is an ordinary file.
	if err := unix.Unmount(h.Namespaces.Net, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Dial(t.Context(), h, 80); !errs.Is(err, errs.FailedPrecondition) {
		t.Errorf("dial: %v", err)
	}
	if alive, _ := m.Adopt(t.Context(), podSpecOf(h), h); alive {
		t.Error("alive without its network namespace")
	}
	release(t, m, h)
}

func podSpecOf(h *Handle) Spec {
	return Spec{ID: h.ID, Name: "ns/x", Network: ModePod, IPC: ModePod, UTS: ModePod}
}

func TestW11FlushedRuleset(t *testing.T) {
	m := start(t, testConfig(t), Deps{})
	s := podSpec(t, "web", mapping(TCP, 8080, 80, ""))
	h := create(t, m, s)
	serve(t, netns(t, h), "tcp4", "0.0.0.0:80", "web")
	check := func(when string) {
		t.Helper()
		wantAnswer(t, outsideNS, "tcp4", hostPort(hostIP4, 8080), "web", "")
		if out := output(t, "nft list ruleset"); strings.Count(out, "table inet naru") != 1 || strings.Count(out, "chain ") != 6 || strings.Count(out, "jump ports") != 2 {
			t.Errorf("%s: %s", when, out)
		}
	}
	check("at first")
	rules := strings.Count(output(t, "nft list ruleset"), "comment \"naru")
	gone := func() bool { ok, err := m.fw.Ensure(); return err == nil && !ok }
	for _, cmd := range []string{"nft flush ruleset", "nft delete table inet naru", "nft flush chain inet naru guard", "nft flush table inet naru"} {
		if err := run(cmd); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		eventually(t, "table back after "+cmd, func() bool {
			return strings.Count(output(t, "nft list ruleset"), "comment \"naru") == rules
		})
		t.Logf("back %v after %s", time.Since(began).Round(time.Millisecond), cmd)
		if !gone() {
			t.Error("not whole")
		}
		check("after " + cmd)
		time.Sleep(1100 * time.Millisecond) // the pause between two repairs
	}
	// Without the watcher: the daemon was away meanwhile.
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if err := run("nft flush ruleset"); err != nil {
		t.Fatal(err)
	}
	for _, c := range []string{"ip route flush proto 110", "ip -6 route flush proto 110"} {
		if err := run(c); err != nil {
			t.Fatal(err)
		}
	}
	n, err := New(m.cfg, m.deps)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	successors[m] = n
	if alive, err := n.Adopt(t.Context(), s, h); !alive || err != nil {
		t.Fatalf("adopt: %v %v", alive, err)
	}
	check("after Adopt")
	if rebuilt, err := n.fw.Reconcile(); rebuilt || err != nil {
		t.Errorf("reconcile: %v %v", rebuilt, err)
	}
}

func TestW12Names(t *testing.T) {
	m := start(t, testConfig(t), Deps{})
	before := output(t, "nft list ruleset")
	s := podSpec(t, "web", mapping(TCP, 8080, 80, ""))
	s.Name = "ns/\"; nft flush ruleset\n" + strings.Repeat("x", 5000)
	h := create(t, m, s)
	_, err := m.Create(t.Context(), podSpec(t, "b", mapping(TCP, 8080, 80, "")), nil)
	if !errs.Is(err, errs.FailedPrecondition) || strings.ContainsAny(err.Error(), "\n") || len(err.Error()) > 500 {
		t.Errorf("conflict: %v", err)
	}
	release(t, m, h)
	if after := output(t, "nft list ruleset"); after != before {
		t.Errorf("ruleset changed: %s", after)
	}
	for _, ip := range []string{"224.0.0.1", "255.255.255.255", "ff02::1", "fe80::1%eth0", "::1"} {
		p := mapping(TCP, 8080, 80, ip)
		if _, err := m.Create(t.Context(), podSpec(t, "x", p), nil); !errs.Is(err, errs.InvalidArgument) {
			t.Errorf("host IP %s: %v", ip, err)
		}
	}
	mapped := create(t, m, podSpec(t, "x", mapping(TCP, 8080, 80, "::ffff:127.0.0.1")))
	if out := output(t, "nft list map inet naru ports4_at"); !strings.Contains(out, "127.0.0.1 . tcp . 8080") {
		t.Errorf("v4-mapped host IP: %s", out)
	}
	release(t, m, mapped)
}

func TestW13PortMappings(t *testing.T) {
	m := start(t, testConfig(t), Deps{})
	for name, ports := range map[string][]PortMapping{
		"container port 0": {mapping(TCP, 8080, 0, "")},
		"protocol":         {mapping("icmp", 8080, 80, "")},
		"no protocol":      {mapping("", 8080, 80, "")},
		"twice":            {mapping(TCP, 8080, 80, ""), mapping(TCP, 8080, 81, "")},
		"overlap":          {mapping(TCP, 8080, 80, ""), mapping(TCP, 8080, 81, hostIP4)},
	} {
		if _, err := m.Create(t.Context(), podSpec(t, "x", ports...), nil); !errs.Is(err, errs.InvalidArgument) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Host port 0 is none; the same mapping twice is one.
	release(t, m, create(t, m, podSpec(t, "x", mapping(TCP, 0, 80, ""), mapping(TCP, 8080, 80, ""), mapping(TCP, 8080, 80, ""))))

	holder := podSpec(t, "holder", mapping(TCP, 8080, 80, ""), mapping(UDP, 8081, 53, hostIP4))
	h := create(t, m, holder)
	links := func() (names []string) {
		for line := range strings.Lines(output(t, "ip -o link")) {
			names = append(names, strings.Fields(line)[1])
		}
		return names
	}
	pods := func() int { return strings.Count(strings.Join(links(), " "), m.cfg.LinkPrefix) }
	// The kernel removes the link of the pod before a moment after its namespace.
	for end := time.Now().Add(2 * time.Second); pods() > 1 && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
	}
	state := func() string { return output(t, "nft list ruleset") + strings.Join(links(), "\n") }
	before := state()
	for _, p := range []PortMapping{
		mapping(TCP, 8080, 80, ""), mapping(TCP, 8080, 80, hostIP4), mapping(TCP, 8080, 80, "0.0.0.0"),
		mapping(UDP, 8081, 53, ""), mapping(UDP, 8081, 53, hostIP4),
	} {
		steps := []string{}
		_, err := m.Create(t.Context(), podSpec(t, "late", mapping(TCP, 9000, 9, ""), p), func(s string) { steps = append(steps, s) })
		if !errs.Is(err, errs.FailedPrecondition) || !strings.Contains(err.Error(), "is held by pod ns/holder ("+h.ID[:13]) {
			t.Errorf("%+v: %v", p, err)
		}
		if slices.Contains(steps, "make namespaces") {
			t.Errorf("%+v: side effects before the conflict: %v", p, steps)
		}
	}
	if after := state(); after != before {
		t.Errorf("a refused pod changed the host: it was\n%s\nand is\n%s", before, after)
	}
	for _, p := range []PortMapping{mapping(SCTP, 8080, 80, ""), mapping(UDP, 8080, 80, ""), mapping(UDP, 8081, 53, "127.0.0.1"), mapping(TCP, 9000, 9, "")} {
		release(t, m, create(t, m, podSpec(t, "other", p)))
	}
	// A port that a process of the host listens on is no conflict, and wins nothing.
	serve(t, nil, "tcp4", hostPort(hostIP4, 8090), "process")
	over := create(t, m, podSpec(t, "over", mapping(TCP, 8090, 80, "")))
	serve(t, netns(t, over), "tcp4", "0.0.0.0:80", "pod")
	wantAnswer(t, outsideNS, "tcp4", hostPort(hostIP4, 8090), "pod", "")
	release(t, m, over)
	wantAnswer(t, outsideNS, "tcp4", hostPort(hostIP4, 8090), "process", "")
}

// A UDP client that goes on sending from one port reaches each new pod.
func TestW13StaleUDP(t *testing.T) {
	m := start(t, testConfig(t), Deps{})
	var c net.Conn
	in(t, outsideNS, func() (err error) {
		c, err = net.Dial("udp4", hostPort(hostIP4, 5353))
		return err
	})
	defer func() { _ = c.Close() }()
	answer := func() string {
		buf := make([]byte, 100)
		for range 3 {
			_, _ = c.Write([]byte("?"))
			_ = c.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
			if n, err := c.Read(buf); err == nil {
				name, _, _ := strings.Cut(string(buf[:n]), " ")
				return name
			}
		}
		return ""
	}
	// First nobody: the flow is known to conntrack without any translation.
	serve(t, nil, "udp4", hostPort(hostIP4, 5353), "process")
	if got := answer(); got != "process" {
		t.Fatalf("%q", got)
	}
	for i := range 3 {
		name := fmt.Sprint("pod", i)
		h := create(t, m, podSpec(t, name, mapping(UDP, 5353, 53, "")))
		serve(t, netns(t, h), "udp4", "0.0.0.0:53", name)
		if got := answer(); got != name {
			t.Errorf("answered by %q, want %q", got, name)
		}
		release(t, m, h)
	}
	if got := answer(); got != "process" {
		t.Errorf("at the end answered by %q", got)
	}
}

func TestW15SmallRangeChurn(t *testing.T) {
	cfg := testConfig(t)
	cfg.PodCIDRs = []string{"10.78.0.0/28"}
	m := start(t, cfg, Deps{})
	var mu sync.Mutex
	held := map[netip.Addr]string{}
	made, refused := 0, 0
	var wg sync.WaitGroup
	for i := range 300 {
		wg.Go(func() {
			s := podSpec(t, fmt.Sprint("p", i))
			var h *Handle
			for {
				var err error
				if h, err = m.Create(t.Context(), s, nil); err == nil {
					break
				}
				if !errs.Is(err, errs.ResourceExhausted) || !strings.Contains(err.Error(), "10.78.0.0/28") {
					t.Error(err)
					return
				}
				time.Sleep(time.Duration(1+i%5) * time.Millisecond)
				mu.Lock()
				refused++
				mu.Unlock()
			}
			mu.Lock()
			made++
			if o, dup := held[h.IPs[0]]; dup {
				t.Errorf("%s given to %s and %s", h.IPs[0], o, h.ID)
			}
			held[h.IPs[0]] = h.ID
			mu.Unlock()
			time.Sleep(time.Duration(i%7) * time.Millisecond)
			mu.Lock()
			delete(held, h.IPs[0])
			mu.Unlock()
			release(t, m, h)
		})
	}
	wg.Wait()
	t.Logf("%d made, %d refused", made, refused)
	if made != 300 || refused == 0 {
		t.Errorf("%d made, %d refused", made, refused)
	}
	// All addresses are back: fill it, reach every one, and meet the end.
	var all []*Handle
	for i := range 13 {
		h := create(t, m, podSpec(t, fmt.Sprint("f", i)))
		serve(t, netns(t, h), "tcp4", "0.0.0.0:80", fmt.Sprint("f", i))
		all = append(all, h)
	}
	for i, h := range all {
		wantAnswer(t, nil, "tcp4", hostPort(h.IPs[0].String(), 80), fmt.Sprint("f", i), "")
	}
	if _, err := m.Create(t.Context(), podSpec(t, "too-many"), nil); !errs.Is(err, errs.ResourceExhausted) {
		t.Error(err)
	}
	for _, h := range all {
		release(t, m, h)
	}
	eventually(t, "links gone", func() bool { return !strings.Contains(output(t, "ip -o link"), "naru") })
}

// sysctls reads everything below /proc/sys/net but what belongs to single links
// that come and go, and counters.
func sysctls(t *testing.T) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := filepath.WalkDir("/proc/sys/net", func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return nil //nolint:nilerr // links go while we walk
		}
		if strings.Contains(path, "/naru") || strings.HasSuffix(path, "nf_conntrack_count") {
			return nil
		}
		if b, err := os.ReadFile(path); err == nil {
			out[path] = string(b)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestW16HostStaysAsItIs(t *testing.T) {
	needRoot(t)
	for _, p := range []string{"/proc/sys/net/ipv4/ip_forward", "/proc/sys/net/ipv6/conf/all/forwarding"} {
		if err := os.WriteFile(p, []byte("0"), 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile("/proc/sys/net/ipv6/conf/uplink0/accept_ra", []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
	if err := run("nft add table inet foreign"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = run("nft delete table inet foreign") })
	state := func() string {
		all := ""
		for _, c := range []string{"ip rule", "ip -6 rule", "ip route show table all", "ip -o addr", "nft list table inet foreign", "nft list tables"} {
			for line := range strings.Lines(output(t, c)) {
				if !strings.HasPrefix(line, "anycast") { // a forwarding host has those of routers (RFC 4291 2.6.1)
					all += line
				}
			}
		}
		return all
	}
	net0, state0 := sysctls(t), state()
	t.Run("life", func(t *testing.T) {
		m := start(t, testConfig(t), Deps{})
		for i := range 3 {
			release(t, m, create(t, m, podSpec(t, "a", mapping(TCP, uint16(8080+i), 80, ""))))
		}
		left := create(t, m, podSpec(t, "b"))
		changed := map[string]bool{}
		for k, v := range sysctls(t) {
			if net0[k] != v {
				changed[strings.TrimPrefix(k, "/proc/sys/net/")] = true
			}
		}
		for k := range changed {
			forwarding := strings.HasSuffix(k, "/forwarding") || k == "ipv4/ip_forward"
			if !forwarding && k != "ipv6/conf/uplink0/accept_ra" && k != "ipv4/conf/all/accept_redirects" && k != "netfilter/nf_hooks_lwtunnel" {
				t.Errorf("sysctl %s changed", k)
			}
		}
		if v, _ := os.ReadFile("/proc/sys/net/ipv6/conf/uplink0/accept_ra"); strings.TrimSpace(string(v)) != "2" {
			t.Errorf("accept_ra of the uplink is %s", v)
		}
		release(t, m, left)
	})
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		now := state()
		if now == state0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("before:\n%s\nafter:\n%s", state0, now)
		}
	}
}

func TestW17ResolvConf(t *testing.T) {
	cfg := testConfig(t)
	m := start(t, cfg, Deps{})
	host := func(s string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(cfg.HostEtc, "resolv.conf"), []byte(s), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	conf := func(change func(*Spec)) string {
		t.Helper()
		s := podSpec(t, "a")
		change(&s)
		h := create(t, m, s)
		b, err := os.ReadFile(h.EtcFiles["/etc/resolv.conf"])
		if err != nil {
			t.Fatal(err)
		}
		release(t, m, h)
		return string(b)
	}
	none := func(*Spec) {}
	host("nameserver 127.0.0.53\nnameserver ::1\nnameserver 192.0.2.9\nsearch corp\n")
	if got := conf(none); got != "nameserver 192.0.2.9\nsearch corp\n" {
		t.Errorf("filtered: %q", got)
	}
	if got := conf(func(s *Spec) {
		s.DNS = DNS{Servers: []string{"127.0.0.1"}, Searches: []string{"a", "b"}, Options: []string{"ndots:5"}}
	}); got != "search a b\nnameserver 127.0.0.1\noptions ndots:5\n" {
		t.Errorf("verbatim: %q", got)
	}
	if got := conf(func(s *Spec) { s.Network, s.UTS = ModeNode, ModeNode }); !strings.Contains(got, "127.0.0.53") {
		t.Errorf("host network: %q", got)
	}
	host("nameserver 127.0.0.53\n")
	if err := os.WriteFile(cfg.HostResolv, []byte("nameserver 192.0.2.53\nnameserver 127.0.0.1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got := conf(none); got != "nameserver 192.0.2.53\n" {
		t.Errorf("fallback: %q", got)
	}
	for _, d := range []DNS{{Servers: []string{"1.1.1.1\nnameserver 6.6.6.6"}}, {Searches: []string{"a b"}}, {Options: []string{""}}} {
		s := podSpec(t, "a")
		s.DNS = d
		if _, err := m.Create(t.Context(), s, nil); !errs.Is(err, errs.InvalidArgument) {
			t.Errorf("%+v: %v", d, err)
		}
	}
}

func TestS10Dial(t *testing.T) {
	m := start(t, testConfig(t), Deps{})
	h := create(t, m, podSpec(t, "a"))
	ns := netns(t, h)
	serve(t, ns, "tcp4", "127.0.0.1:7001", "pod")
	serve(t, ns, "tcp6", "[::1]:7002", "pod")
	for _, p := range []string{"127.0.0.1:7003", "127.0.0.1:7001", "[::1]:7002", "[::1]:7001"} { // canaries of the host
		serve(t, nil, map[bool]string{true: "tcp6", false: "tcp4"}[p[0] == '['], p, "host")
	}
	talk := func(h *Handle, port uint16) (string, error) {
		f, err := m.Dial(t.Context(), h, port)
		if err != nil {
			return "", err
		}
		defer func() { _ = f.Close() }()
		_ = f.SetReadDeadline(time.Now().Add(2 * time.Second))
		buf := make([]byte, 100)
		n, err := f.Read(buf)
		name, _, _ := strings.Cut(string(buf[:n]), " ")
		return name, err
	}
	for _, port := range []uint16{7001, 7002} {
		if who, err := talk(h, port); who != "pod" || err != nil {
			t.Errorf("port %d: %q %v", port, who, err)
		}
	}
	if _, err := talk(h, 7003); !errs.Is(err, errs.Unavailable) {
		t.Errorf("no listener in the pod: %v", err)
	}
	if _, err := talk(h, 0); !errs.Is(err, errs.InvalidArgument) {
		t.Errorf("port 0: %v", err)
	}
	s := podSpec(t, "host")
	s.Network, s.UTS = ModeNode, ModeNode
	onHost := create(t, m, s)
	if who, err := talk(onHost, 7003); who != "host" || err != nil {
		t.Errorf("host network: %q %v", who, err)
	}
	lost := *h
	lost.Namespaces.Net = ""
	if _, err := talk(&lost, 7003); !errs.Is(err, errs.FailedPrecondition) {
		t.Errorf("lost path: %v", err)
	}
	old := *h
	old.BootID = "another"
	if _, err := talk(&old, 7001); !errs.Is(err, errs.FailedPrecondition) {
		t.Errorf("former boot: %v", err)
	}
	// A pod that drops everything: the caller's deadline counts.
	in(t, ns, func() error {
		if err := run("nft add table inet x"); err != nil {
			return err
		}
		if err := run("nft add chain inet x in { type filter hook input priority 0; policy drop; }"); err != nil {
			return err
		}
		return nil
	})
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	began := time.Now()
	if _, err := m.Dial(ctx, h, 7001); !errs.Is(err, errs.DeadlineExceeded) || time.Since(began) > testhost.Limit(time.Second) {
		t.Errorf("deadline: %v after %v", err, time.Since(began))
	}
	release(t, m, h)
	if _, err := m.Dial(t.Context(), h, 7001); !errs.Is(err, errs.FailedPrecondition) {
		t.Errorf("released pod: %v", err)
	}
	release(t, m, onHost)
}

func TestW18NoThreadStaysBehind(t *testing.T) {
	m := start(t, testConfig(t), Deps{})
	h := create(t, m, podSpec(t, "a"))
	serve(t, netns(t, h), "tcp4", "127.0.0.1:7001", "pod")
	o := &opened{files: map[string]*os.File{"net": netns(t, h)}}
	for i := range 300 {
		switch i % 4 {
		case 0:
			if f, err := m.Dial(t.Context(), h, 7001); err != nil {
				t.Fatal(err)
			} else {
				_ = f.Close()
			}
		case 1:
			if err := m.inNamespaces(o, unix.CLONE_NEWNET, func() error { return errors.New("injected") }); err == nil {
				t.Fatal("no error")
			}
		case 2:
			if err := m.inNamespaces(o, unix.CLONE_NEWNET, func() error { panic("injected") }); err == nil {
				t.Fatal("no error")
			}
		case 3:
			if _, err := m.Stats(t.Context(), h); err != nil {
				t.Fatal(err)
			}
		}
	}
	own := map[string]string{}
	for _, k := range []string{"net", "ipc", "uts", "mnt", "user", "pid"} {
		own[k], _ = os.Readlink("/proc/self/ns/" + k)
	}
	eventually(t, "all threads in the host's namespaces", func() bool {
		for k, want := range own {
			tasks, _ := filepath.Glob("/proc/self/task/*/ns/" + k)
			for _, l := range tasks {
				if got, err := os.Readlink(l); err == nil && got != want {
					return false
				}
			}
		}
		return true
	})
	hostNet, err := sys.ThreadNamespace(unix.CLONE_NEWNET)
	if err != nil {
		t.Fatal(err)
	}
	_ = hostNet.Close()
	release(t, m, h)
}
