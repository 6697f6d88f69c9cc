package rtnl

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// Constants of uapi/linux/{if_link,ip,neighbour,rtnetlink,if_addr}.h that
// golang.org/x/sys/unix does not have.
const (
	vethInfoPeer       = 1
	inet6AddrGenNone   = 1 // IN6_ADDR_GEN_MODE_NONE
	extFilterSkipStats = 1 << 3
	ifaFlagNoDAD       = 0x2
	nudPermanent       = 0x80
	nhOnlink           = 4

	confProxyARP        = 3
	confAcceptRedirects = 4
	confSendRedirects   = 6
	confRPFilter        = 8
	confSourceRoute     = 9
	confARPIgnore       = 19
	confRouteLocalnet   = 26
)

// How long Settle waits at most: 20 ms.
const (
	settleTries = 40
	settlePause = 500 * time.Microsecond
)

// RouteProtocol marks the routes that Naru made (`ip route show proto 110`).
const RouteProtocol = 110

// PodLink is the name of the interface inside a pod.
const PodLink = "eth0"

// The gateway of every pod: an address on the host end of its veth pair. The
// same for all, as a /32 and a /128 of their link.
var (
	Gateway4 = netip.AddrFrom4([4]byte{169, 254, 1, 1})
	Gateway6 = netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 15: 1})
)

func gateway(of netip.Addr) netip.Addr {
	if of.Is4() {
		return Gateway4
	}
	return Gateway6
}

// Pair describes the veth pair of a pod.
type Pair struct {
	Host    string // name of the host end
	HostMAC [6]byte
	PodMAC  [6]byte
	MTU     int
	Group   uint32 // of the host end: by it the guard rules know pod links
	Alias   string // of the host end: whose it is
	NetNS   int    // descriptor of the pod's network namespace
	IPv6    bool   // the kernel has IPv6
}

// CreatePair makes the pair, the pod end directly in the pod's namespace, both
// ends down and without any address, link-local ones included. It returns the
// index of the host end.
func (c *Conn) CreatePair(p Pair) (index int, err error) {
	b := &Batch{}
	b.begin("create veth "+p.Host, unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	b.link(0, 0, 0)
	b.attrString(unix.IFLA_IFNAME, p.Host)
	b.attr(unix.IFLA_ADDRESS, p.HostMAC[:])
	b.attrU32(unix.IFLA_MTU, uint32(p.MTU))
	b.attrU32(unix.IFLA_GROUP, p.Group)
	info := b.nest(unix.IFLA_LINKINFO)
	b.attr(unix.IFLA_INFO_KIND, []byte("veth"))
	data := b.nest(unix.IFLA_INFO_DATA)
	peer := b.nest(vethInfoPeer)
	b.link(0, 0, 0)
	b.attrString(unix.IFLA_IFNAME, PodLink)
	b.attr(unix.IFLA_ADDRESS, p.PodMAC[:])
	b.attrU32(unix.IFLA_MTU, uint32(p.MTU))
	b.attrU32(unix.IFLA_NET_NS_FD, uint32(p.NetNS))
	peer()
	data()
	info()
	b.end()
	b.settings(p.Host, p.Alias, p.IPv6, true)
	b.get(p.Host)
	index, err = c.doGet(b)
	if err != nil {
		return 0, err
	}
	return index, nil
}

// settings makes a link plain: no automatic addresses, no redirects, no proxy
// ARP, strict reverse path filter on the host end.
func (b *Batch) settings(name, alias string, ipv6, host bool) {
	b.begin("set up link "+name, unix.RTM_NEWLINK, 0)
	b.link(0, 0, 0)
	b.attrString(unix.IFLA_IFNAME, name)
	if alias != "" {
		b.attr(unix.IFLA_IFALIAS, []byte(alias))
	}
	spec := b.nest(unix.IFLA_AF_SPEC)
	inet := b.nest(unix.AF_INET)
	conf := b.nest(unix.IFLA_INET_CONF)
	b.attrU32(confAcceptRedirects, 0)
	b.attrU32(confSourceRoute, 0)
	if host {
		b.attrU32(confProxyARP, 0)
		b.attrU32(confSendRedirects, 0)
		b.attrU32(confRPFilter, 1)
		b.attrU32(confARPIgnore, 1)
	}
	conf()
	inet()
	if ipv6 {
		inet6 := b.nest(unix.AF_INET6)
		b.attr(unix.IFLA_INET6_ADDR_GEN_MODE, []byte{inet6AddrGenNone})
		inet6()
	}
	spec()
	b.end()
}

// get asks for one link by name.
func (b *Batch) get(name string) {
	b.begin("find link "+name, unix.RTM_GETLINK, 0)
	b.link(0, 0, 0)
	b.attrString(unix.IFLA_IFNAME, name)
	b.attrU32(unix.IFLA_EXT_MASK, extFilterSkipStats)
	b.end()
}

func (c *Conn) doGet(b *Batch) (index int, err error) {
	err = c.Do(b, func(m message) {
		if m.typ == unix.RTM_NEWLINK && len(m.data) >= unix.SizeofIfInfomsg {
			index = int(int32(native.Uint32(m.data[4:])))
		}
	})
	if err == nil && index == 0 {
		err = errors.New("find link: the kernel named none")
	}
	return index, err
}

// HostEnd is what the host end of a pair is given.
type HostEnd struct {
	Index       int
	PodMAC      [6]byte
	IPs         []netip.Addr
	OnlyAddress bool // the host has no other IPv4 address to speak from
}

// ConfigureHost brings the host end up, with the gateway addresses, one route
// and one permanent neighbour per pod address. It may be repeated: what is
// there already is put right.
func (c *Conn) ConfigureHost(h HostEnd) error {
	b := &Batch{}
	b.up(h.Index)
	for _, ip := range h.IPs {
		gw := gateway(ip)
		scope := byte(unix.RT_SCOPE_LINK)
		if ip.Is4() && h.OnlyAddress {
			scope = unix.RT_SCOPE_UNIVERSE
		}
		b.address(h.Index, gw, scope, unix.EEXIST)
	}
	for _, ip := range h.IPs {
		b.begin("add route to "+ip.String(), unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE)
		b.route(ip, h.Index)
		b.end()
		b.neighbour(h.Index, ip, h.PodMAC)
	}
	return c.Do(b, nil)
}

// route appends struct rtmsg and attributes of a host route. Its scope is
// universe and not link, as it would be by habit: so the kernel speaks to a pod
// from a global address of the host, and takes the gateway's link-local one
// only if that was given universe scope too (OnlyAddress).
func (b *Batch) route(ip netip.Addr, index int) {
	b.raw(family(ip), byte(ip.BitLen()), 0, 0, unix.RT_TABLE_MAIN, RouteProtocol, unix.RT_SCOPE_UNIVERSE, unix.RTN_UNICAST)
	b.u32(0)
	b.attrAddr(unix.RTA_DST, ip)
	b.attrU32(unix.RTA_OIF, uint32(index))
}

func (b *Batch) up(index int) {
	b.begin(fmt.Sprintf("bring link %d up", index), unix.RTM_NEWLINK, 0)
	b.link(index, unix.IFF_UP, unix.IFF_UP)
	b.end()
}

// address adds one address as a /32 or /128, without duplicate address
// detection: nobody else can be on the link.
func (b *Batch) address(index int, ip netip.Addr, scope byte, allow ...unix.Errno) {
	b.begin("add address "+ip.String(), unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL, allow...)
	b.raw(family(ip), byte(ip.BitLen()), ifaFlagNoDAD, scope)
	b.u32(uint32(index))
	b.attrAddr(unix.IFA_LOCAL, ip)
	b.attrAddr(unix.IFA_ADDRESS, ip)
	b.end()
}

// neighbour adds an entry that never expires and that no packet can change.
func (b *Batch) neighbour(index int, ip netip.Addr, mac [6]byte) {
	b.begin("add neighbour "+ip.String(), unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|unix.NLM_F_REPLACE)
	b.raw(family(ip), 0, 0, 0)
	b.u32(uint32(index))
	b.u16(nudPermanent)
	b.raw(0, unix.RTN_UNICAST)
	b.attrAddr(unix.NDA_DST, ip)
	b.attr(unix.NDA_LLADDR, mac[:])
	b.end()
}

// LoopbackUp brings the loopback of the namespace up.
func (c *Conn) LoopbackUp() error {
	b := &Batch{}
	b.up(1)
	return c.Do(b, nil)
}

// PreparePod brings the loopback of a pod up and makes its eth0 plain; c is a
// socket in the pod's namespace. It returns the index of eth0.
func (c *Conn) PreparePod(ipv6 bool) (index int, err error) {
	b := &Batch{}
	b.up(1)
	b.settings(PodLink, "", ipv6, false)
	b.get(PodLink)
	return c.doGet(b)
}

// ConfigurePod gives a pod's eth0 its addresses and its way out.
func (c *Conn) ConfigurePod(index int, hostMAC [6]byte, ips []netip.Addr) error {
	b := &Batch{}
	b.up(index)
	for _, ip := range ips {
		b.address(index, ip, unix.RT_SCOPE_UNIVERSE)
		gw := gateway(ip)
		b.neighbour(index, gw, hostMAC)
		b.begin("add default route by "+gw.String(), unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_EXCL)
		b.raw(family(ip), 0, 0, 0, unix.RT_TABLE_MAIN, RouteProtocol, unix.RT_SCOPE_UNIVERSE, unix.RTN_UNICAST)
		b.u32(nhOnlink)
		b.attrAddr(unix.RTA_GATEWAY, gw)
		b.attrU32(unix.RTA_OIF, uint32(index))
		b.end()
	}
	return c.Do(b, nil)
}

// Settle waits, shortly, until a link that was brought up with its peer really
// takes packets. The carrier shows at once, yet until the kernel's link watch
// has run the queue drops everything. Since 6.8 asking for the link is enough.
func (c *Conn) Settle(index int) error {
	for try := 0; ; try++ {
		b := &Batch{}
		b.begin(fmt.Sprintf("find link %d", index), unix.RTM_GETLINK, 0)
		b.link(index, 0, 0)
		b.attrU32(unix.IFLA_EXT_MASK, extFilterSkipStats)
		b.end()
		running := false
		err := c.Do(b, func(m message) {
			if m.typ == unix.RTM_NEWLINK && len(m.data) >= unix.SizeofIfInfomsg {
				running = native.Uint32(m.data[8:])&unix.IFF_RUNNING != 0
			}
		})
		if err != nil || running || try == settleTries {
			return err
		}
		time.Sleep(settlePause)
	}
}

// SetAlias renames whose a link is.
func (c *Conn) SetAlias(index int, alias string) error {
	b := &Batch{}
	b.begin(fmt.Sprintf("set alias of link %d", index), unix.RTM_NEWLINK, 0)
	b.link(index, 0, 0)
	b.attr(unix.IFLA_IFALIAS, []byte(alias))
	b.end()
	return c.Do(b, nil)
}

// SetRouteLocalnet lets packets with a source in 127/8 leave by a link, and
// their answers come back by it.
func (c *Conn) SetRouteLocalnet(index int, on bool) error {
	v := uint32(0)
	if on {
		v = 1
	}
	b := &Batch{}
	b.begin(fmt.Sprintf("set route_localnet of link %d", index), unix.RTM_NEWLINK, 0)
	b.link(index, 0, 0)
	spec := b.nest(unix.IFLA_AF_SPEC)
	inet := b.nest(unix.AF_INET)
	conf := b.nest(unix.IFLA_INET_CONF)
	b.attrU32(confRouteLocalnet, v)
	conf()
	inet()
	spec()
	b.end()
	return c.Do(b, nil)
}

// DeleteRoutes removes the host routes to ips by link index; routes that are
// not there, or lead elsewhere by now, are no error.
func (c *Conn) DeleteRoutes(index int, ips []netip.Addr) error {
	b := &Batch{}
	for _, ip := range ips {
		b.begin("delete route to "+ip.String(), unix.RTM_DELROUTE, 0, unix.ESRCH, unix.ENODEV)
		b.route(ip, index)
		b.end()
	}
	return c.Do(b, nil)
}

// DeleteLinks removes links. Those that are gone already are no error. One
// request for each holds the RTNL lock through an RCU grace period, so several
// are first put into one group, which is deleted by one request.
func (c *Conn) DeleteLinks(doomed uint32, indexes ...int) error {
	if len(indexes) == 0 {
		return nil
	}
	b := &Batch{}
	for _, i := range indexes {
		b.begin(fmt.Sprintf("doom link %d", i), unix.RTM_NEWLINK, 0, unix.ENODEV)
		b.link(i, 0, 0)
		b.attrU32(unix.IFLA_GROUP, doomed)
		b.end()
	}
	b.begin("delete links", unix.RTM_DELLINK, 0, unix.ENODEV)
	b.link(0, 0, 0)
	b.attrU32(unix.IFLA_GROUP, doomed)
	b.end()
	return c.Do(b, nil)
}
