package rtnl

import (
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Link is what is read of one link.
type Link struct {
	Index int
	Name  string
	Alias string
	Group uint32
	MTU   int
	Up    bool
	Stats Counters
}

// Counters are of struct rtnl_link_stats64.
type Counters struct {
	RxPackets, TxPackets, RxBytes, TxBytes   uint64
	RxErrors, TxErrors, RxDropped, TxDropped uint64
}

// FindLink returns one link by name; ok is false if there is none.
func (c *Conn) FindLink(name string) (l Link, ok bool, err error) {
	b := &Batch{}
	b.begin("find link "+name, unix.RTM_GETLINK, 0, unix.ENODEV)
	b.link(0, 0, 0)
	b.attrString(unix.IFLA_IFNAME, name)
	b.attrU32(unix.IFLA_EXT_MASK, extFilterSkipStats)
	b.end()
	err = c.Do(b, func(m message) {
		if got, good := parseLink(m); good {
			l, ok = got, true
		}
	})
	return l, ok, err
}

// Veths lists all veth links of the namespace, with their counters.
func (c *Conn) Veths() ([]Link, error) { return c.links("veth") }

// Links lists all links of the namespace, with their counters.
func (c *Conn) Links() ([]Link, error) { return c.links("") }

func (c *Conn) links(kind string) ([]Link, error) {
	b := &Batch{}
	b.begin("list links", unix.RTM_GETLINK, unix.NLM_F_DUMP)
	b.link(0, 0, 0)
	if kind != "" {
		info := b.nest(unix.IFLA_LINKINFO)
		b.attr(unix.IFLA_INFO_KIND, []byte(kind))
		info()
	}
	b.end()
	var out []Link
	err := c.dump(b, func(m message) {
		if l, ok := parseLink(m); ok {
			out = append(out, l)
		}
	})
	return out, err
}

func parseLink(m message) (Link, bool) {
	if m.typ != unix.RTM_NEWLINK || len(m.data) < unix.SizeofIfInfomsg {
		return Link{}, false
	}
	l := Link{
		Index: int(int32(native.Uint32(m.data[4:]))),
		Up:    native.Uint32(m.data[8:])&unix.IFF_UP != 0,
	}
	attributes(m.data[unix.SizeofIfInfomsg:], func(typ uint16, v []byte) bool {
		switch {
		case typ == unix.IFLA_IFNAME:
			l.Name = cString(v)
		case typ == unix.IFLA_IFALIAS:
			l.Alias = cString(v)
		case typ == unix.IFLA_GROUP && len(v) >= 4:
			l.Group = native.Uint32(v)
		case typ == unix.IFLA_MTU && len(v) >= 4:
			l.MTU = int(native.Uint32(v))
		case typ == unix.IFLA_STATS64 && len(v) >= 64:
			u := func(i int) uint64 { return native.Uint64(v[8*i:]) }
			l.Stats = Counters{u(0), u(1), u(2), u(3), u(4), u(5), u(6), u(7)}
		}
		return true
	})
	return l, l.Name != ""
}

// Where an uplink is looked for: by the route that a packet to an address of
// no network of ours would take (RFC 5737, RFC 3849). Nothing is sent.
var (
	elsewhere4 = netip.MustParseAddr("203.0.113.1")
	elsewhere6 = netip.MustParseAddr("2001:db8::1")
)

// Uplink is the link that packets for the rest of the world take, and its MTU.
// ok is false if there is no such route.
func (c *Conn) Uplink() (l Link, ok bool, err error) {
	for _, dst := range []netip.Addr{elsewhere4, elsewhere6} {
		index, err := c.routeTo(dst)
		if err != nil || index <= 1 {
			continue // no route, none of this family, or loopback
		}
		b := &Batch{}
		b.begin(fmt.Sprintf("find link %d", index), unix.RTM_GETLINK, 0)
		b.link(index, 0, 0)
		b.end()
		err = c.Do(b, func(m message) {
			if got, good := parseLink(m); good {
				l, ok = got, true
			}
		})
		return l, ok, err
	}
	return Link{}, false, nil
}

func (c *Conn) routeTo(dst netip.Addr) (index int, err error) {
	b := &Batch{}
	b.begin("find the route to "+dst.String(), unix.RTM_GETROUTE, 0)
	b.raw(family(dst), byte(dst.BitLen()), 0, 0, 0, 0, 0, 0)
	b.u32(0)
	b.attrAddr(unix.RTA_DST, dst)
	b.end()
	err = c.Do(b, func(m message) {
		if m.typ != unix.RTM_NEWROUTE || len(m.data) < unix.SizeofRtMsg || m.data[7] != unix.RTN_UNICAST {
			return
		}
		attributes(m.data[unix.SizeofRtMsg:], func(typ uint16, v []byte) bool {
			if typ == unix.RTA_OIF && len(v) >= 4 {
				index = int(native.Uint32(v))
			}
			return true
		})
	})
	return index, err
}

// Address is one address of a link.
type Address struct {
	Index  int
	IP     netip.Addr
	Global bool // of universe scope
}

// Addresses lists all addresses of the namespace.
func (c *Conn) Addresses() ([]Address, error) {
	b := &Batch{}
	b.begin("list addresses", unix.RTM_GETADDR, unix.NLM_F_DUMP)
	b.raw(unix.AF_UNSPEC, 0, 0, 0)
	b.u32(0)
	b.end()
	var out []Address
	err := c.dump(b, func(m message) {
		if a, ok := parseAddress(m); ok {
			out = append(out, a)
		}
	})
	return out, err
}

func parseAddress(m message) (Address, bool) {
	if m.typ != unix.RTM_NEWADDR || len(m.data) < unix.SizeofIfAddrmsg {
		return Address{}, false
	}
	a := Address{Index: int(native.Uint32(m.data[4:])), Global: m.data[3] == unix.RT_SCOPE_UNIVERSE}
	var local, address netip.Addr
	attributes(m.data[unix.SizeofIfAddrmsg:], func(typ uint16, v []byte) bool {
		switch typ {
		case unix.IFA_LOCAL: // on a point-to-point link IFA_ADDRESS is the other side
			local, _ = netip.AddrFromSlice(v)
		case unix.IFA_ADDRESS:
			address, _ = netip.AddrFromSlice(v)
		}
		return true
	})
	if a.IP = local; !a.IP.IsValid() {
		a.IP = address
	}
	return a, a.IP.IsValid()
}
