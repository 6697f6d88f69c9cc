package sandbox

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/testhost"
)

func pick(h *Handle, v4 bool) string {
	i := slices.IndexFunc(h.IPs, func(a netip.Addr) bool { return a.Is4() == v4 })
	return h.IPs[i].String()
}

func TestConnectivity(t *testing.T) {
	m := start(t, testConfig(t), Deps{})
	a, b := create(t, m, podSpec(t, "a")), create(t, m, podSpec(t, "b"))
	nsA, nsB := netns(t, a), netns(t, b)
	if len(a.IPs) != 2 || !a.IPs[0].Is4() || !a.IPs[1].Is6() {
		t.Fatalf("addresses %v", a.IPs)
	}
	for _, fam := range []struct {
		v4        bool
		tcp, udp  string
		host, out string
	}{{true, "tcp4", "udp4", hostIP4, outIP4}, {false, "tcp6", "udp6", hostIP6, outIP6}} {
		any := map[bool]string{true: "0.0.0.0", false: "::"}[fam.v4]
		serve(t, nsB, fam.tcp, hostPort(any, 80), "pod-b")
		serve(t, nsB, fam.udp, hostPort(any, 53), "pod-b")
		serve(t, nil, fam.tcp, hostPort(fam.host, 7000), "host")
		serve(t, outsideNS, fam.tcp, hostPort(fam.out, 7001), "world")
		serve(t, outsideNS, fam.udp, hostPort(fam.out, 7001), "world")
		ipA, ipB := pick(a, fam.v4), pick(b, fam.v4)

		wantAnswer(t, nsA, fam.tcp, hostPort(ipB, 80), "pod-b", ipA)            // pod to pod, source kept
		wantAnswer(t, nsA, fam.udp, hostPort(ipB, 53), "pod-b", ipA)            //
		wantAnswer(t, nil, fam.tcp, hostPort(ipB, 80), "pod-b", fam.host)       // host to pod, by its own address
		wantAnswer(t, nsA, fam.tcp, hostPort(fam.host, 7000), "host", ipA)      // pod to host
		wantAnswer(t, nsB, fam.tcp, hostPort(ipB, 80), "pod-b", ipB)            // pod to itself
		wantAnswer(t, nsA, fam.tcp, hostPort(fam.out, 7001), "world", fam.host) // masqueraded
		wantAnswer(t, nsA, fam.udp, hostPort(fam.out, 7001), "world", fam.host)
	}
	in(t, nsA, func() error {
		for _, want := range []struct{ cmd, has string }{
			{"ip link show eth0", "mtu 1420"},
			{"ip link show lo", "LOOPBACK,UP"},
			{"ip neigh show dev eth0", "169.254.1.1 lladdr"},
			{"ip -6 neigh show dev eth0", "PERMANENT"},
			{"ip route", "default via 169.254.1.1 dev eth0"},
			{"ip -6 route", "default via fe80::1 dev eth0"},
		} {
			if out := output(t, want.cmd); !strings.Contains(out, want.has) {
				t.Errorf("%s: no %q in %s", want.cmd, want.has, out)
			}
		}
		if out := output(t, "ip -6 addr show dev eth0"); strings.Contains(out, "fe80") || strings.Contains(out, "tentative") {
			t.Errorf("automatic or tentative address: %s", out)
		}
		if out := output(t, "ip addr show dev eth0"); !strings.Contains(out, pick(a, true)+"/32") || !strings.Contains(out, pick(a, false)+"/128") {
			t.Errorf("addresses: %s", out)
		}
		return nil
	})
	if out := output(t, "ip -d link show "+a.HostLink); !strings.Contains(out, "alias naru "+a.ID) {
		t.Errorf("host link: %s", out)
	}
}

// The first packet to a new pod is not lost while the link's carrier settles.
func TestFirstPacketArrives(t *testing.T) {
	m := start(t, testConfig(t), Deps{})
	slow := 0
	for i := range 20 {
		h := create(t, m, podSpec(t, fmt.Sprint("p", i)))
		ip := netip.AddrPortFrom(h.IPs[0], 9)
		began := time.Now()
		// Nobody listens: the answer is a reset, or an ICMP message, at once.
		_, _, err := askFor(nil, "tcp", ip.String(), 3*time.Second)
		if err == nil || !strings.Contains(err.Error(), "refused") {
			t.Fatalf("%v", err)
		}
		if time.Since(began) > testhost.Limit(500*time.Millisecond) {
			slow++
		}
		release(t, m, h)
	}
	if slow > 0 {
		t.Errorf("the first packet was lost for %d of 20 pods", slow)
	}
}

func TestNonMasqueradeAndStrays(t *testing.T) {
	cfg := testConfig(t)
	cfg.PodCIDRs = []string{AutoCIDR}
	cfg.NonMasqueradeCIDRs = []string{farIP4 + "/32"}
	m := start(t, cfg, Deps{})
	if st := m.NetworkStatus(); st.Ready || st.Reason != "NoPodCIDR" {
		t.Fatalf("status %+v", st)
	}
	if _, err := m.Create(t.Context(), podSpec(t, "early"), nil); !errs.Is(err, errs.Unavailable) {
		t.Fatalf("without CIDR: %v", err)
	}
	set := func(s string) {
		t.Helper()
		if err := m.SetPodCIDRs(t.Context(), []netip.Prefix{netip.MustParsePrefix(s)}); err != nil {
			t.Fatal(err)
		}
	}
	set("10.81.0.0/24")
	if st := m.NetworkStatus(); !st.Ready {
		t.Fatalf("status %+v", st)
	}
	old := create(t, m, podSpec(t, "old"))
	set("10.82.0.0/24")
	young := create(t, m, podSpec(t, "young"))
	if !strings.HasPrefix(old.IPs[0].String(), "10.81.") || !strings.HasPrefix(young.IPs[0].String(), "10.82.") {
		t.Fatalf("%v %v", old.IPs, young.IPs)
	}
	serve(t, outsideNS, "tcp4", hostPort(outIP4, 7002), "world")
	serve(t, netns(t, young), "tcp4", "0.0.0.0:80", "young")
	wantAnswer(t, netns(t, old), "tcp4", hostPort(outIP4, 7002), "world", hostIP4) // a stray is still masqueraded
	wantAnswer(t, netns(t, young), "tcp4", hostPort(outIP4, 7002), "world", hostIP4)
	wantAnswer(t, netns(t, old), "tcp4", hostPort(young.IPs[0].String(), 80), "young", old.IPs[0].String())
	// To a destination that sees pod addresses the source is kept; its answer
	// finds the way back by a route.
	in(t, outsideNS, func() error { return run("ip route add 10.82.0.0/24 via " + hostIP4) })
	t.Cleanup(func() { in(t, outsideNS, func() error { return run("ip route del 10.82.0.0/24") }) })
	serve(t, outsideNS, "tcp4", hostPort(farIP4, 7002), "far")
	wantAnswer(t, netns(t, young), "tcp4", hostPort(farIP4, 7002), "far", young.IPs[0].String())
	// New settings count at once, for pods that exist, too.
	reconfigure := func(l Live) {
		t.Helper()
		if err := m.Reconfigure(l); err != nil {
			t.Fatal(err)
		}
	}
	reconfigure(Live{MTU: 1300})
	wantAnswer(t, netns(t, young), "tcp4", hostPort(farIP4, 7002), "far", hostIP4)
	if err := m.Reconfigure(Live{NonMasqueradeCIDRs: []string{"x"}}); !errs.Is(err, errs.InvalidArgument) {
		t.Errorf("a wrong range: %v", err)
	}
	reconfigure(Live{NonMasqueradeCIDRs: []string{farIP4 + "/32"}, MTU: 1300})
	wantAnswer(t, netns(t, young), "tcp4", hostPort(farIP4, 7002), "far", young.IPs[0].String())
	if facts, err := m.hostFacts(); err != nil || facts.mtu != 1300 {
		t.Errorf("MTU of pods to come: %+v %v", facts, err)
	}
	if out := output(t, "nft list set inet naru pods4"); !strings.Contains(out, old.IPs[0].String()) {
		t.Errorf("stray not in the set: %s", out)
	}
	release(t, m, old)
	if out := output(t, "nft list set inet naru pods4"); strings.Contains(out, "10.81") {
		t.Errorf("stray still in the set: %s", out)
	}
	// Told CIDRs last over a restart.
	again := restart(t, m)
	if got := again.ips.String(); got != "[10.82.0.0/24]" || !again.NetworkStatus().Ready {
		t.Errorf("after a restart: %s, %+v", got, again.NetworkStatus())
	}
}

func mapping(proto Protocol, host, pod uint16, ip string) PortMapping {
	p := PortMapping{Protocol: proto, HostPort: host, ContainerPort: pod}
	if ip != "" {
		p.HostIP = netip.MustParseAddr(ip)
	}
	return p
}

func TestHostPorts(t *testing.T) {
	m := start(t, testConfig(t), Deps{})
	h := create(t, m, podSpec(t, "web",
		mapping(TCP, 8080, 80, ""), mapping(UDP, 5353, 53, ""),
		mapping(TCP, 8081, 80, hostIP4), mapping(TCP, 8082, 80, "127.0.0.1"), mapping(TCP, 8083, 80, hostIP6),
		mapping(TCP, 8084, 80, "0.0.0.0")))
	other := create(t, m, podSpec(t, "client"))
	ns, client := netns(t, h), netns(t, other)
	serve(t, ns, "tcp", ":80", "web")
	serve(t, ns, "udp4", "0.0.0.0:53", "dns")
	serve(t, ns, "udp6", "[::]:53", "dns")

	wantAnswer(t, outsideNS, "tcp4", hostPort(hostIP4, 8080), "web", outIP4) // from outside, source kept
	wantAnswer(t, outsideNS, "tcp6", hostPort(hostIP6, 8080), "web", "")
	wantAnswer(t, outsideNS, "udp4", hostPort(hostIP4, 5353), "dns", outIP4)
	wantAnswer(t, outsideNS, "udp6", hostPort(hostIP6, 5353), "dns", "")
	wantAnswer(t, nil, "tcp4", hostPort(hostIP4, 8080), "web", "") // from the host
	wantAnswer(t, nil, "tcp6", hostPort(hostIP6, 8080), "web", "")
	wantAnswer(t, nil, "tcp4", "127.0.0.1:8080", "web", hostIP4)
	wantAnswer(t, nil, "udp4", "127.0.0.1:5353", "dns", hostIP4)
	wantAnswer(t, client, "tcp4", hostPort(hostIP4, 8080), "web", pick(other, true)) // from another pod
	wantAnswer(t, client, "tcp6", hostPort(hostIP6, 8080), "web", pick(other, false))
	wantAnswer(t, client, "udp4", hostPort(hostIP4, 5353), "dns", pick(other, true))
	wantAnswer(t, ns, "tcp4", hostPort(hostIP4, 8080), "web", "") // from itself: the hairpin
	wantAnswer(t, ns, "tcp6", hostPort(hostIP6, 8080), "web", "")
	wantAnswer(t, ns, "udp4", hostPort(hostIP4, 5353), "dns", "")

	// A host IP is honoured exactly.
	wantAnswer(t, outsideNS, "tcp4", hostPort(hostIP4, 8081), "web", outIP4)
	wantSilence(t, nil, "tcp4", "127.0.0.1:8081")
	wantSilence(t, nil, "tcp6", hostPort(hostIP6, 8081))
	wantAnswer(t, nil, "tcp4", "127.0.0.1:8082", "web", "")
	wantSilence(t, outsideNS, "tcp4", hostPort(hostIP4, 8082))
	wantAnswer(t, outsideNS, "tcp6", hostPort(hostIP6, 8083), "web", "")
	wantSilence(t, outsideNS, "tcp4", hostPort(hostIP4, 8083))
	wantAnswer(t, outsideNS, "tcp4", hostPort(hostIP4, 8084), "web", "")
	wantAnswer(t, outsideNS, "tcp6", hostPort(hostIP6, 8084), "web", "") // unspecified = every address

	// [::1] cannot be mapped, and says so at once.
	if _, _, err := ask(nil, "tcp6", "[::1]:8080"); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("[::1]: %v", err)
	}

	release(t, m, h)
	wantSilence(t, outsideNS, "tcp4", hostPort(hostIP4, 8080))
	wantSilence(t, nil, "tcp4", "127.0.0.1:8080")
	for _, set := range []string{"ports4", "ports6", "ports4_at", "ports6_at"} {
		if out := output(t, "nft list map inet naru "+set); strings.Contains(out, "elements") {
			t.Errorf("left: %s", out)
		}
	}
}

// sctpInit is an SCTP INIT packet (RFC 9260 3.3.2) with its CRC-32c.
func sctpInit(src, dst uint16) []byte {
	p := make([]byte, 12+20)
	be16 := func(i int, v uint16) { p[i], p[i+1] = byte(v>>8), byte(v) }
	be16(0, src)
	be16(2, dst)
	p[12] = 1 // INIT
	be16(14, 20)
	p[19] = 7      // initiate tag
	p[22] = 0xff   // window
	be16(24, 1)    // streams out
	be16(26, 1)    // and in
	p[31] = 1      // TSN
	c := crc32c(p) // with the field itself zero
	p[8], p[9], p[10], p[11] = byte(c), byte(c>>8), byte(c>>16), byte(c>>24)
	return p
}

// The kernel here may lack SCTP sockets; the mapping of SCTP packets works all
// the same, and is seen by raw sockets.
func TestHostPortSCTP(t *testing.T) {
	m := start(t, testConfig(t), Deps{})
	h := create(t, m, podSpec(t, "sctp", mapping(SCTP, 9899, 3868, "")))
	var fd int
	in(t, netns(t, h), func() (err error) {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_SCTP)
		return err
	})
	f := os.NewFile(uintptr(fd), "raw")
	t.Cleanup(func() { _ = f.Close() })
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 2}); err != nil {
		t.Fatal(err)
	}
	in(t, outsideNS, func() error {
		s, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_SCTP)
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(s) }()
		a := netip.MustParseAddr(hostIP4).As4()
		return unix.Sendto(s, sctpInit(4000, 9899), 0, &unix.SockaddrInet4{Addr: a})
	})
	buf := make([]byte, 256)
	n, err := unix.Read(fd, buf)
	if err != nil || n < 24 {
		t.Fatalf("no SCTP packet in the pod: %d, %v", n, err)
	}
	sctp := buf[int(buf[0]&15)*4 : n]
	if port := int(sctp[2])<<8 | int(sctp[3]); port != 3868 {
		t.Errorf("arrived at port %d", port)
	}
}

func crc32c(p []byte) uint32 {
	crc := ^uint32(0)
	for _, b := range p {
		crc ^= uint32(b)
		for range 8 {
			if crc&1 != 0 {
				crc = crc>>1 ^ 0x82f63b78
			} else {
				crc >>= 1
			}
		}
	}
	return ^crc
}

func TestHostPortsOff(t *testing.T) {
	cfg := testConfig(t)
	cfg.HostPorts = false
	m := start(t, cfg, Deps{})
	a := create(t, m, podSpec(t, "a", mapping(TCP, 8080, 80, "")))
	b := create(t, m, podSpec(t, "b", mapping(TCP, 8080, 80, "")))
	serve(t, netns(t, a), "tcp", ":80", "a")
	wantSilence(t, outsideNS, "tcp4", hostPort(hostIP4, 8080))
	release(t, m, a)
	release(t, m, b)
}

// A node without any address but its loopback still reaches its pods.
func TestLonelyNode(t *testing.T) {
	cfg := testConfig(t)
	needRoot(t)
	for _, c := range []string{"ip addr flush dev uplink0", "ip link set uplink0 down"} {
		if err := run(c); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		for _, c := range []string{
			"ip link set uplink0 up", "ip addr add " + hostIP4 + "/24 dev uplink0", "ip addr add " + hostIP6 + "/64 dev uplink0 nodad",
			"ip route add default via " + outIP4, "ip -6 route add default via " + outIP6,
		} {
			if err := run(c); err != nil {
				t.Error(err)
			}
		}
	})
	m := start(t, cfg, Deps{})
	h := create(t, m, podSpec(t, "web", mapping(TCP, 8080, 80, "")))
	serve(t, netns(t, h), "tcp", ":80", "web")
	wantAnswer(t, nil, "tcp4", hostPort(pick(h, true), 80), "web", "169.254.1.1")
	wantAnswer(t, nil, "tcp6", hostPort(pick(h, false), 80), "web", "")
	wantAnswer(t, nil, "tcp4", "127.0.0.1:8080", "web", "169.254.1.1")
}

func TestSingleStack(t *testing.T) {
	for _, c := range []struct{ cidr, tcp, host, out string }{
		{"10.79.0.0/24", "tcp4", hostIP4, outIP4}, {"fd79::/64", "tcp6", hostIP6, outIP6},
	} {
		t.Run(c.tcp, func(t *testing.T) {
			cfg := testConfig(t)
			cfg.PodCIDRs = []string{c.cidr}
			m := start(t, cfg, Deps{})
			h := create(t, m, podSpec(t, "web", mapping(TCP, 8080, 80, "")))
			if len(h.IPs) != 1 {
				t.Fatalf("addresses %v", h.IPs)
			}
			serve(t, netns(t, h), "tcp", ":80", "web")
			serve(t, outsideNS, c.tcp, hostPort(c.out, 7003), "world")
			wantAnswer(t, outsideNS, c.tcp, hostPort(c.host, 8080), "web", "")
			wantAnswer(t, netns(t, h), c.tcp, hostPort(c.out, 7003), "world", c.host)
			other := map[string]string{"tcp4": hostIP6, "tcp6": hostIP4}[c.tcp]
			if _, err := m.Create(t.Context(), podSpec(t, "x", mapping(TCP, 8081, 80, other)), nil); !errs.Is(err, errs.InvalidArgument) {
				t.Errorf("host IP of the other family: %v", err)
			}
		})
	}
}

// A host that has IPv6 disabled for new links still has pods with IPv6.
func TestIPv6DisabledByDefault(t *testing.T) {
	needRoot(t)
	knob := "/proc/sys/net/ipv6/conf/default/disable_ipv6"
	if err := os.WriteFile(knob, []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.WriteFile(knob, []byte("0"), 0) })
	m := start(t, testConfig(t), Deps{})
	h := create(t, m, podSpec(t, "web"))
	serve(t, netns(t, h), "tcp6", ":80", "web")
	wantAnswer(t, nil, "tcp6", hostPort(pick(h, false), 80), "web", hostIP6)
}
