package ring

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/internal/sys"
	"github.com/naru-project/naru/internal/testhost"
)

// Addresses of the wire between the node and the world.
const (
	wireNode  = "198.51.100.1"
	wireWorld = "198.51.100.2"
)

// outside is a machine beside the node, with a wire between them.
type outside struct{ ns *os.File }

// newOutside makes it. It knows no route to the pods.
func newOutside(t *testing.T) *outside {
	t.Helper()
	o := &outside{}
	err := sys.NamespaceThread(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		o.ns, err = sys.ThreadNamespace(unix.CLONE_NEWNET)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = o.ns.Close() })
	veth := netlink.NewVeth(netlink.NewLinkAttrs())
	veth.Name, veth.PeerName = "wire0", "wire1"
	if err := netlink.LinkAdd(veth); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = netlink.LinkDel(veth) })
	up := func(name, addr string) error {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		a, err := netlink.ParseAddr(addr + "/24")
		if err != nil {
			return err
		}
		return errors.Join(netlink.AddrAdd(l, a), netlink.LinkSetUp(l))
	}
	peer, err := netlink.LinkByName("wire1")
	if err == nil {
		err = errors.Join(netlink.LinkSetNsFd(peer, int(o.ns.Fd())), up("wire0", wireNode))
	}
	if err != nil {
		t.Fatal(err)
	}
	o.do(t, func() error { return up("wire1", wireWorld) })
	return o
}

// do runs f on a thread of the other machine.
func (o *outside) do(t *testing.T, f func() error) {
	t.Helper()
	err := sys.NamespaceThread(func() error {
		if err := sys.Setns(o.ns, unix.CLONE_NEWNET); err != nil {
			return err
		}
		return f()
	})
	if err != nil {
		t.Errorf("on the machine outside: %v", err)
	}
}

// teller is a TCP server that tells every caller from where he calls. It
// listens where listen makes its socket.
func teller(t *testing.T, addr string, in func(func() error)) (port int) {
	t.Helper()
	var l net.Listener
	in(func() (err error) { l, err = net.Listen("tcp", addr); return err })
	if l == nil {
		t.Fatal("no listener")
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = fmt.Fprintln(c, netip.MustParseAddrPort(c.RemoteAddr().String()).Addr().Unmap())
			_ = c.Close()
		}
	}()
	t.Cleanup(func() { _ = l.Close(); <-done })
	return l.Addr().(*net.TCPAddr).Port
}

// echoUDP is a UDP server in the pod.
func (n *Node) echoUDP(t testing.TB, pod string, port int) {
	t.Helper()
	var c net.PacketConn
	n.inPod(t, pod, func() (err error) { c, err = net.ListenPacket("udp", ":"+strconv.Itoa(port)); return err })
	done := make(chan struct{})
	go func() {
		defer close(done)
		b := make([]byte, 1500)
		for {
			k, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = c.WriteTo(append([]byte("you said "), b[:k]...), from)
		}
	}()
	t.Cleanup(func() { _ = c.Close(); <-done })
}

func askUDP(addr string) error {
	c, err := net.Dial("udp", addr)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	b := make([]byte, 100)
	for range 5 {
		if _, err = io.WriteString(c, "hello"); err != nil {
			continue // ICMP error of the one before
		}
		_ = c.SetReadDeadline(time.Now().Add(testhost.Limit(500 * time.Millisecond)))
		var k int
		if k, err = c.Read(b); err == nil {
			if string(b[:k]) != "you said hello" {
				return fmt.Errorf("%s answers %q", addr, b[:k])
			}
			return nil
		}
	}
	return err
}

func TestPodNetwork(t *testing.T) {
	n := StartNode(t)
	world := newOutside(t)
	a, b := n.Pod(t, nil), n.Pod(t, nil)
	n.Run(t, a, speaker(8080, "this-is-a"))
	side := n.Run(t, a, nil)
	n.Run(t, b, speaker(8080, "this-is-b"))
	other := n.Run(t, b, nil)
	ipA, ipB := n.IPs(t, a), n.IPs(t, b)
	if len(ipA) != 2 || len(ipB) != 2 {
		t.Fatalf("addresses %v and %v, want IPv4 and IPv6", ipA, ipB)
	}
	here := func(f func() error) {
		if err := f(); err != nil {
			t.Fatal(err)
		}
	}
	hostPort := strconv.Itoa(teller(t, ":0", here))
	worldPort := strconv.Itoa(teller(t, wireWorld+":0", func(f func() error) { world.do(t, f) }))

	t.Run("the host reaches pods", func(t *testing.T) {
		for ip, word := range map[string]string{ipA[0]: "this-is-a", ipA[1]: "this-is-a", ipB[0]: "this-is-b", ipB[1]: "this-is-b"} {
			wantFetch(t, net.JoinHostPort(ip, "8080"), word)
		}
	})
	for _, c := range []struct{ name, from, addr, port, want string }{
		{"containers of a pod share the loopback", side, "127.0.0.1", "8080", "this-is-a"},
		{"containers of a pod share the loopback, IPv6", side, "::1", "8080", "this-is-a"},
		{"pods reach each other", side, ipB[0], "8080", "this-is-b"},
		{"pods reach each other, IPv6", side, ipB[1], "8080", "this-is-b"},
		{"and back", other, ipA[0], "8080", "this-is-a"},
		{"pods reach the host, with their own address", side, nodeIP, hostPort, ipA[0]},
		{"pods reach the host, IPv6", side, nodeIP6, hostPort, ipA[1]},
		{"pods reach the world, with an address of the node", side, wireWorld, worldPort, wireNode},
	} {
		t.Run(c.name, func(t *testing.T) {
			if out := n.Sh(t, c.from, "nc -w 5 "+c.addr+" "+c.port+" </dev/null"); out != c.want {
				t.Errorf("got %q, want %q", out, c.want)
			}
		})
	}
	t.Run("ping", func(t *testing.T) {
		for _, ip := range ipB {
			n.Sh(t, side, "ping -c 1 -W 5 "+ip)
		}
	})
	t.Run("after a restart of the daemon", func(t *testing.T) {
		n.RestartDaemon()
		wantFetch(t, net.JoinHostPort(ipA[0], "8080"), "this-is-a")
		if out := n.Sh(t, side, "nc -w 5 "+ipB[1]+" 8080 </dev/null"); out != "this-is-b" {
			t.Errorf("got %q", out)
		}
		if ip := n.IPs(t, n.Pod(t, nil)); ip[0] == ipA[0] || ip[0] == ipB[0] {
			t.Errorf("a new pod got the address of another: %v", ip)
		}
	})
}

func TestPodHostPorts(t *testing.T) {
	n := StartNode(t)
	world := newOutside(t)
	const tcp, udp = 30080, 30053
	ports := func(c *criv1.PodSandboxConfig) {
		c.PortMappings = []*criv1.PortMapping{
			{Protocol: criv1.Protocol_TCP, ContainerPort: 80, HostPort: tcp},
			{Protocol: criv1.Protocol_UDP, ContainerPort: 53, HostPort: udp},
			{Protocol: criv1.Protocol_TCP, ContainerPort: 80, HostPort: tcp + 1, HostIp: "127.0.0.1"},
			{Protocol: criv1.Protocol_TCP, ContainerPort: 9999}, // not published
		}
	}
	web := n.Pod(t, ports)
	n.Run(t, web, speaker(80, "web"))
	n.echoUDP(t, web, 53)
	client := n.Run(t, n.Pod(t, nil), nil)
	at := func(ip string, port int) string { return net.JoinHostPort(ip, strconv.Itoa(port)) }
	wantFetch(t, at(n.IPs(t, web)[0], 80), "web")

	check := func(t *testing.T) {
		t.Helper()
		for _, ip := range []string{"127.0.0.1", nodeIP, wireNode, nodeIP6} {
			wantFetch(t, at(ip, tcp), "web")
		}
		wantFetch(t, at("127.0.0.1", tcp+1), "web")
		if out, err := fetch(at(nodeIP, tcp+1)); err == nil {
			t.Errorf("a port published on 127.0.0.1 answers on the node's address: %q", out)
		}
		if out := n.Sh(t, client, fmt.Sprintf("nc -w 5 %s %d </dev/null", nodeIP, tcp)); out != "web" {
			t.Errorf("from another pod: %q", out)
		}
		world.do(t, func() error {
			out, err := fetch(at(wireNode, tcp))
			if err == nil && out != "web\n" {
				err = fmt.Errorf("got %q", out)
			}
			return errors.Join(err, askUDP(at(wireNode, udp)))
		})
		for _, ip := range []string{"127.0.0.1", nodeIP} {
			if err := askUDP(at(ip, udp)); err != nil {
				t.Errorf("UDP by %s: %v", ip, err)
			}
		}
	}
	t.Run("from everywhere", check)
	t.Run("from the pod itself", func(t *testing.T) {
		self := n.Run(t, web, nil)
		if out := n.Sh(t, self, fmt.Sprintf("nc -w 5 %s %d </dev/null", nodeIP, tcp)); out != "web" {
			t.Errorf("got %q", out)
		}
	})
	t.Run("a port that is taken", func(t *testing.T) {
		_, err := n.TryPod(t, ports)
		wantError(t, err, codes.FailedPrecondition, "30080", "ring/"+n.pods[web].Metadata.Name)
	})
	t.Run("after a restart of the daemon", func(t *testing.T) {
		n.RestartDaemon()
		check(t)
		_, err := n.TryPod(t, ports)
		wantError(t, err, codes.FailedPrecondition, "ring/"+n.pods[web].Metadata.Name)
	})
	t.Run("gone with the pod", func(t *testing.T) {
		n.RemovePod(t, web)
		for _, ip := range []string{"127.0.0.1", nodeIP, wireNode} {
			if out, err := fetch(at(ip, tcp)); err == nil {
				t.Errorf("the host port still answers on %s: %q", ip, out)
			}
		}
		if e := nftElements(t, n.NftTable); len(e) > 0 {
			t.Errorf("nftables elements are left: %x", e)
		}
		again := n.Pod(t, ports)
		n.Run(t, again, speaker(80, "again"))
		wantFetch(t, at("127.0.0.1", tcp), "again")
		// Who knew the old pod gets the new one, UDP flows included.
		n.echoUDP(t, again, 53)
		if err := askUDP(at(nodeIP, udp)); err != nil {
			t.Errorf("UDP to the next pod: %v", err)
		}
	})
}

func TestPodHostNetwork(t *testing.T) {
	n := StartNode(t)
	pod := n.Pod(t, namespaces(func(o *criv1.NamespaceOption) { o.Network = criv1.NamespaceMode_NODE }))
	if ips := n.IPs(t, pod); len(ips) > 0 {
		t.Errorf("a pod on the host's network reports %v", ips)
	}
	id := n.Run(t, pod, speaker(18080, "host"))
	wantFetch(t, net.JoinHostPort(nodeIP, "18080"), "host")
	host, _ := os.Hostname()
	if out := n.Sh(t, id, "hostname; cat /etc/hostname"); out != host+"\n"+host {
		t.Errorf("host name: %q, want that of the host, %q, twice", out, host)
	}
	if out, want := n.Sh(t, id, "readlink /proc/self/ns/net; readlink /proc/self/ns/uts"), nsOf(t, "net")+"\n"+nsOf(t, "uts"); out != want {
		t.Errorf("namespaces %q, want %q", out, want)
	}
	if out, _, _ := n.Exec(t, id, "/bin/hostname", "hijacked"); strings.Contains(out, "hijacked") {
		t.Error("the container renamed the host")
	}
}

// nsOf is this process's namespace, as readlink shows it.
func nsOf(t testing.TB, kind string) string {
	t.Helper()
	s, err := os.Readlink("/proc/self/ns/" + kind)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// pod_cidr = auto: the network waits for UpdateRuntimeConfig.
func TestPodCIDRAuto(t *testing.T) {
	n := StartNode(t)
	n.StopDaemon()
	n.opts.podCIDR = `["auto"]`
	n.writeConfig()
	n.LaunchDaemon()
	condition := func(kind string) *criv1.RuntimeCondition {
		t.Helper()
		var r *criv1.StatusResponse
		eventually(t, 30*time.Second, "an answer", func() (ok bool) {
			var err error
			r, err = n.Runtime.Status(within(t, callTime), &criv1.StatusRequest{})
			return err == nil // Unavailable while it takes stock
		})
		for _, c := range r.Status.Conditions {
			if c.Type == kind {
				return c
			}
		}
		t.Fatalf("no condition %s", kind)
		return nil
	}
	if c := condition("RuntimeReady"); !c.Status {
		t.Errorf("RuntimeReady: %v", c)
	}
	if c := condition("NetworkReady"); c.Status || c.Reason == "" || c.Message == "" {
		t.Errorf("NetworkReady before a range is known: %v", c)
	}
	_, err := n.TryPod(t, nil)
	wantError(t, err, codes.Unavailable, "CIDR")
	host := n.Run(t, n.Pod(t, namespaces(func(o *criv1.NamespaceOption) { o.Network = criv1.NamespaceMode_NODE })), nil)
	if out := n.Sh(t, host, "echo runs"); out != "runs" {
		t.Errorf("a pod on the host's network: %q", out)
	}
	tell := func(cidrs string) error {
		_, err := n.Runtime.UpdateRuntimeConfig(within(t, callTime), &criv1.UpdateRuntimeConfigRequest{
			RuntimeConfig: &criv1.RuntimeConfig{NetworkConfig: &criv1.NetworkConfig{PodCidr: cidrs}},
		})
		return err
	}
	wantError(t, tell("10.77.0.0/24,nonsense"), codes.InvalidArgument, "nonsense")
	inRange := func(pod string, ranges ...string) {
		t.Helper()
		ips := n.IPs(t, pod)
		if len(ips) != len(ranges) {
			t.Errorf("addresses %v, want one of each of %v", ips, ranges)
			return
		}
		for i, r := range ranges {
			if !netip.MustParsePrefix(r).Contains(netip.MustParseAddr(ips[i])) {
				t.Errorf("address %s is not in %s", ips[i], r)
			}
		}
	}
	if err := tell("10.77.0.0/24,fd77::/64"); err != nil {
		t.Fatal(err)
	}
	if c := condition("NetworkReady"); !c.Status {
		t.Fatalf("NetworkReady with a range: %v", c)
	}
	first := n.Pod(t, nil)
	n.Run(t, first, speaker(80, "first"))
	inRange(first, "10.77.0.0/24", "fd77::/64")
	ip := n.IPs(t, first)[0]
	if err := tell("10.78.0.0/24"); err != nil {
		t.Fatal(err)
	}
	second := n.Pod(t, nil)
	n.Run(t, second, speaker(80, "second"))
	inRange(second, "10.78.0.0/24")
	n.KillDaemon()
	n.StartDaemon() // which waits for all conditions
	inRange(n.Pod(t, nil), "10.78.0.0/24")
	inRange(first, "10.77.0.0/24", "fd77::/64")
	wantFetch(t, net.JoinHostPort(ip, "80"), "first")
	wantFetch(t, net.JoinHostPort(n.IPs(t, second)[0], "80"), "second")
}
