package firewall

import (
	"errors"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
)

// A client that keeps sending UDP from one port keeps its conntrack entry, and
// with it the translation of its first packet: to a pod that is gone, or to
// none. Such entries are deleted when a mapping comes or goes.

type udpFilter struct {
	ips   []netip.Addr
	ports []Port
	local map[netip.Addr]bool // nil: the pod goes; else addresses of the host, the pod comes
}

// MatchConntrackFlow implements netlink.CustomConntrackFilter.
func (f *udpFilter) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	if flow.Forward.Protocol != unix.IPPROTO_UDP {
		return false
	}
	dst, ok1 := netip.AddrFromSlice(flow.Forward.DstIP)
	from, ok2 := netip.AddrFromSlice(flow.Reverse.SrcIP)
	if !ok1 || !ok2 {
		return false
	}
	dst, from = dst.Unmap(), from.Unmap()
	return slices.ContainsFunc(f.ports, func(p Port) bool {
		if p.Proto != unix.IPPROTO_UDP || p.HostPort != flow.Forward.DstPort || p.HostIP.IsValid() && p.HostIP != dst {
			return false
		}
		if f.local == nil {
			return slices.Contains(f.ips, from) && p.PodPort == flow.Reverse.SrcPort
		}
		return f.local[dst] && from == dst
	})
}

// FlushUDP deletes the entries of UDP flows to the given ports: those that lead
// to a pod that goes, or, with the addresses of the host as local, those that
// were not translated before the pod came.
func FlushUDP(ips []netip.Addr, ports []Port, local []netip.Addr) error {
	filter := &udpFilter{ips: ips, ports: ports}
	if local != nil {
		filter.local = map[netip.Addr]bool{}
		for _, a := range local {
			filter.local[a] = true
		}
	}
	if !slices.ContainsFunc(ports, func(p Port) bool { return p.Proto == unix.IPPROTO_UDP }) {
		return nil
	}
	var all []error
	for _, fam := range []struct {
		family netlink.InetFamily
		v4     bool
	}{{unix.AF_INET, true}, {unix.AF_INET6, false}} {
		if !slices.ContainsFunc(ips, func(a netip.Addr) bool { return a.Is4() == fam.v4 }) {
			continue
		}
		_, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, fam.family, filter)
		if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
			all = append(all, errs.New(errs.Internal, "delete conntrack entries: %w", err))
		}
	}
	return errors.Join(all...)
}
