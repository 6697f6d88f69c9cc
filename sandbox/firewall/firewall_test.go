package firewall

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func prefixes(s ...string) (out []netip.Prefix) {
	for _, p := range s {
		out = append(out, netip.MustParsePrefix(p))
	}
	return out
}

func show(elems []element) (out []string) {
	for _, e := range elems {
		a, _ := netip.AddrFromSlice([]byte(e.key))
		s := a.String()
		if e.end {
			s = "<" + s
		}
		out = append(out, s)
	}
	return out
}

func TestIntervals(t *testing.T) {
	for _, c := range []struct{ in, v4, v6 []string }{
		{nil, nil, nil},
		{[]string{"10.0.0.0/24"}, []string{"10.0.0.0", "<10.0.1.0"}, nil},
		{[]string{"10.0.1.0/24", "10.0.0.0/24"}, []string{"10.0.0.0", "<10.0.2.0"}, nil},                               // touching
		{[]string{"10.0.0.0/8", "10.3.0.0/16", "10.0.0.7/32"}, []string{"10.0.0.0", "<11.0.0.0"}, nil},                 // nested
		{[]string{"10.0.0.9/24", "10.0.0.0/24"}, []string{"10.0.0.0", "<10.0.1.0"}, nil},                               // the same
		{[]string{"255.255.255.0/24", "0.0.0.0/32"}, []string{"0.0.0.0", "<0.0.0.1", "255.255.255.0"}, nil},            // to the very end
		{[]string{"fd00::/64", "10.0.0.0/32"}, []string{"10.0.0.0", "<10.0.0.1"}, []string{"fd00::", "<fd00:0:0:1::"}}, // both
		{[]string{"255.255.255.255/32", "::/128"}, []string{"255.255.255.255"}, []string{"::", "<::1"}},
	} {
		v4, v6 := intervals(prefixes(c.in...))
		if !slices.Equal(show(v4), c.v4) || !slices.Equal(show(v6), c.v6) {
			t.Errorf("%v: %v %v", c.in, show(v4), show(v6))
		}
	}
}

// Whatever the prefixes are, an address is in the intervals exactly when it is
// in one of them, and intervals do not overlap or touch.
func TestIntervalsRandom(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		var in []netip.Prefix
		for range r.IntN(8) {
			a := netip.AddrFrom4([4]byte{10, 0, byte(r.IntN(2)), byte(r.IntN(256))})
			in = append(in, netip.PrefixFrom(a, 23+r.IntN(10)))
		}
		v4, _ := intervals(in)
		for i := 1; i < len(v4); i++ {
			if v4[i-1].key >= v4[i].key || v4[i].end == v4[i-1].end {
				t.Fatalf("%v gave %v", in, show(v4))
			}
		}
		for range 20 {
			a := netip.AddrFrom4([4]byte{10, 0, byte(r.IntN(3)), byte(r.IntN(256))})
			want := slices.ContainsFunc(in, func(p netip.Prefix) bool { return p.Contains(a) })
			got := false
			for _, e := range v4 {
				if e.key <= string(a.AsSlice()) {
					got = !e.end
				}
			}
			if got != want {
				t.Fatalf("%s in %v: %v, intervals %v", a, in, got, show(v4))
			}
		}
	}
}

func TestElements(t *testing.T) {
	f := New(Config{Table: "x", Group: 7}, nil)
	ips := []netip.Addr{netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::2")}
	e := f.elements(map[string]pod{"a": {ips, []Port{
		{Proto: unix.IPPROTO_TCP, HostPort: 8080, PodPort: 80},
		{Proto: unix.IPPROTO_UDP, HostPort: 53, PodPort: 5353, HostIP: netip.MustParseAddr("192.0.2.1")},
	}}})
	want := map[string]string{
		"ports4":    "\x06\x00\x00\x00\x1f\x90\x00\x00=\x0a\x00\x00\x02\x00\x50\x00\x00",
		"ports4_at": "\xc0\x00\x02\x01\x11\x00\x00\x00\x00\x35\x00\x00=\x0a\x00\x00\x02\x14\xe9\x00\x00",
		"hairpin4":  "\x0a\x00\x00\x02\x0a\x00\x00\x02=",
	}
	for _, set := range f.sets.all() {
		got := ""
		for _, x := range e[set] {
			got += x.key + "=" + x.val
		}
		if w, ok := want[set.Name]; ok && got != w {
			t.Errorf("%s: %q", set.Name, got)
		}
		for _, x := range e[set] {
			if len(x.key) != int(set.KeyType.Bytes) || len(x.val) != int(set.DataType.Bytes) {
				t.Errorf("%s: lengths %d and %d, want %d and %d", set.Name, len(x.key), len(x.val), set.KeyType.Bytes, set.DataType.Bytes)
			}
		}
	}
	if len(e[f.sets.any6]) != 1 || len(e[f.sets.single6]) != 0 || len(e[f.sets.hairpin6]) != 1 {
		t.Errorf("IPv6: %v", e)
	}
}

func TestUDPFilter(t *testing.T) {
	flow := func(proto uint8, dst string, dport uint16, from string, fport uint16) *netlink.ConntrackFlow {
		return &netlink.ConntrackFlow{
			Forward: netlink.IPTuple{Protocol: proto, DstIP: net.ParseIP(dst), DstPort: dport},
			Reverse: netlink.IPTuple{Protocol: proto, SrcIP: net.ParseIP(from), SrcPort: fport},
		}
	}
	host, pod := "192.0.2.1", "10.0.0.2"
	ports := []Port{{Proto: unix.IPPROTO_UDP, HostPort: 53, PodPort: 5353}, {Proto: unix.IPPROTO_TCP, HostPort: 80, PodPort: 80}}
	gone := &udpFilter{ips: []netip.Addr{netip.MustParseAddr(pod)}, ports: ports}
	come := &udpFilter{ips: gone.ips, ports: ports, local: map[netip.Addr]bool{netip.MustParseAddr(host): true}}
	one := &udpFilter{ips: gone.ips, ports: []Port{{Proto: unix.IPPROTO_UDP, HostPort: 53, PodPort: 5353, HostIP: netip.MustParseAddr("192.0.2.9")}}}
	for i, c := range []struct {
		f    *udpFilter
		flow *netlink.ConntrackFlow
		want bool
	}{
		{gone, flow(unix.IPPROTO_UDP, host, 53, pod, 5353), true},
		{gone, flow(unix.IPPROTO_UDP, host, 53, "10.0.0.3", 5353), false},   // to another pod
		{gone, flow(unix.IPPROTO_UDP, host, 54, pod, 5353), false},          // another port
		{gone, flow(unix.IPPROTO_TCP, host, 80, pod, 80), false},            // TCP ends by itself
		{gone, flow(unix.IPPROTO_UDP, host, 53, host, 53), false},           // never translated
		{come, flow(unix.IPPROTO_UDP, host, 53, host, 53), true},            // from before the pod
		{come, flow(unix.IPPROTO_UDP, "8.8.8.8", 53, "8.8.8.8", 53), false}, // the world's port 53
		{come, flow(unix.IPPROTO_UDP, host, 53, "10.0.0.9", 53), false},     // a service's
		{one, flow(unix.IPPROTO_UDP, host, 53, pod, 5353), false},           // of another host address
		{one, flow(unix.IPPROTO_UDP, "192.0.2.9", 53, pod, 5353), true},
	} {
		if got := c.f.MatchConntrackFlow(c.flow); got != c.want {
			t.Errorf("case %d: %v", i, got)
		}
	}
}

func TestTagsDiffer(t *testing.T) {
	seen := map[string]bool{}
	for _, c := range []Config{{Table: "a", Group: 1}, {Table: "a", Group: 2}, {Table: "b", Group: 1}} {
		seen[New(c, nil).tag] = true
	}
	if len(seen) != 3 {
		t.Error(fmt.Sprint(seen))
	}
}
