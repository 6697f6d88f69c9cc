package rtnl

import (
	"testing"

	"golang.org/x/sys/unix"
)

func TestBatchLayout(t *testing.T) {
	b := &Batch{}
	b.begin("one", unix.RTM_NEWLINK, unix.NLM_F_CREATE)
	b.link(7, unix.IFF_UP, unix.IFF_UP)
	n := b.nest(unix.IFLA_LINKINFO)
	b.attr(unix.IFLA_INFO_KIND, []byte("veth1"))
	n()
	b.end()
	b.begin("two", unix.RTM_DELLINK, 0)
	b.link(8, 0, 0)
	b.end()
	c := &Conn{seq: 99}
	c.number(b)
	ms := messages(b.buf)
	if len(ms) != 2 || ms[0].seq != 100 || ms[1].seq != 101 || ms[0].flags&unix.NLM_F_ACK != 0 || ms[1].flags&unix.NLM_F_ACK == 0 {
		t.Fatalf("%+v", ms)
	}
	found := ""
	attributes(ms[0].data[unix.SizeofIfInfomsg:], func(typ uint16, v []byte) bool {
		if typ == unix.IFLA_LINKINFO {
			attributes(v, func(typ uint16, v []byte) bool { found = string(v); return true })
		}
		return true
	})
	if found != "veth1" {
		t.Fatalf("kind %q", found)
	}
}

// The kernel is trusted, yet nothing it could send makes a parser fail.
func FuzzMessages(f *testing.F) {
	b := &Batch{}
	b.begin("x", unix.RTM_NEWLINK, 0)
	b.link(3, 1, 1)
	b.attrString(unix.IFLA_IFNAME, "eth0")
	b.attr(unix.IFLA_STATS64, make([]byte, 64))
	b.end()
	b.begin("x", unix.RTM_NEWADDR, 0)
	b.raw(unix.AF_INET, 32, 0, 0)
	b.u32(3)
	b.attr(unix.IFA_LOCAL, []byte{1, 2, 3, 4})
	b.end()
	f.Add(b.buf)
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, m := range messages(data) {
			if l, ok := parseLink(m); ok && l.Name == "" {
				t.Fatal("link without name")
			}
			if a, ok := parseAddress(m); ok && !a.IP.IsValid() {
				t.Fatal("address without address")
			}
			_ = refusal(m, op{name: "x"})
		}
	})
}
