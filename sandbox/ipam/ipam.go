// Package ipam gives pod addresses out of the node's pod CIDRs.
//
// There is no store: the leases are the sandbox handles that the pod manager
// keeps, adopted after a restart. Addresses are given round robin, so that one
// that was just given back is not used again while clients may still hold
// connections to it.
//
// Concurrency: all methods may be called concurrently; no IO under the lock.
package ipam

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/naru-project/naru/internal/errs"
)

// ErrNoCIDR says that no pod CIDR is known yet.
var ErrNoCIDR = errors.New("no pod CIDR is known")

// Allocator holds the leases of one node.
type Allocator struct {
	mu    sync.Mutex
	pools []*pool               // +checklocks:mu
	byIP  map[netip.Addr]string // +checklocks:mu
	byID  map[string][]netip.Addr
}

type pool struct {
	cidr        netip.Prefix
	first, last netip.Addr // what may be given, both included
	next        netip.Addr
}

// New returns an allocator without ranges.
func New() *Allocator {
	return &Allocator{byIP: map[netip.Addr]string{}, byID: map[string][]netip.Addr{}}
}

// ParsePrefixes reads CIDRs from strings that may themselves be comma lists.
func ParsePrefixes(list ...string) ([]netip.Prefix, error) {
	var out []netip.Prefix
	for _, s := range strings.Split(strings.Join(list, ","), ",") {
		if s = strings.TrimSpace(s); s == "" {
			continue
		}
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return nil, errs.New(errs.InvalidArgument, "parse CIDR %.80q: %w", s, err)
		}
		out = append(out, p)
	}
	return out, nil
}

// Check says whether prefixes can serve as pod CIDRs, and returns them with
// host bits cleared.
func Check(prefixes []netip.Prefix) ([]netip.Prefix, error) {
	var out []netip.Prefix
	for _, p := range prefixes {
		switch a := p.Addr(); {
		case !p.IsValid() || a.Is4In6() || a.Zone() != "":
			return nil, errs.New(errs.InvalidArgument, "pod CIDR %s is not usable", p)
		case p.Bits() == 0, a.IsLoopback(), a.IsMulticast(), a.IsLinkLocalUnicast(), a.IsUnspecified():
			return nil, errs.New(errs.InvalidArgument, "pod CIDR %s is no range of ordinary addresses", p)
		}
		p = p.Masked()
		for _, q := range out {
			if p.Overlaps(q) {
				return nil, errs.New(errs.InvalidArgument, "pod CIDRs %s and %s overlap", q, p)
			}
		}
		out = append(out, p)
	}
	return out, nil
}

// SetCIDRs replaces the ranges for leases to come; leases that exist stay.
func (a *Allocator) SetCIDRs(prefixes []netip.Prefix) error {
	prefixes, err := Check(prefixes)
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	var pools []*pool
	for _, p := range prefixes {
		if i := slices.IndexFunc(a.pools, func(o *pool) bool { return o.cidr == p }); i >= 0 {
			pools = append(pools, a.pools[i]) // keeps its place in the round
			continue
		}
		pools = append(pools, newPool(p))
	}
	a.pools = pools
	return nil
}

// newPool leaves out the addresses that others may take for the network, its
// broadcast address or its gateway: of IPv4 the first two and the last, of
// IPv6 the subnet router's (RFC 4291 2.6.1) and the one after it. Very small
// ranges are used in full (RFC 3021).
func newPool(p netip.Prefix) *pool {
	first, last := p.Addr(), Last(p)
	host := p.Addr().BitLen() - p.Bits()
	if host >= 3 || host == 2 && first.Is4() {
		first = first.Next()
		if host >= 3 {
			first = first.Next()
		}
		if first.Is4() {
			last = last.Prev()
		}
	}
	return &pool{cidr: p, first: first, last: last, next: first}
}

// Last returns the last address of a prefix.
func Last(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// CIDRs returns the present ranges.
func (a *Allocator) CIDRs() []netip.Prefix {
	a.mu.Lock()
	defer a.mu.Unlock()
	out := make([]netip.Prefix, len(a.pools))
	for i, p := range a.pools {
		out[i] = p.cidr
	}
	return out
}

// Outside returns leased addresses that lie outside of ranges.
func (a *Allocator) Outside(ranges []netip.Prefix) []netip.Addr {
	a.mu.Lock()
	defer a.mu.Unlock()
	var out []netip.Addr
	for ip := range a.byIP {
		if !slices.ContainsFunc(ranges, func(p netip.Prefix) bool { return p.Contains(ip) }) {
			out = append(out, ip)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out
}

// Lease gives id one address of each family that has a range, in the order of
// the ranges: all or none. An id that has a lease gets the same again.
func (a *Allocator) Lease(id string) ([]netip.Addr, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if have := a.byID[id]; len(have) > 0 {
		return slices.Clone(have), nil
	}
	if len(a.pools) == 0 {
		return nil, errs.Wrap(errs.Unavailable, ErrNoCIDR)
	}
	var ips []netip.Addr
	for _, v4 := range a.families() {
		ip, err := a.take(v4)
		if err != nil {
			return nil, err
		}
		ips = append(ips, ip)
	}
	for _, ip := range ips {
		a.byIP[ip] = id
	}
	a.byID[id] = ips
	return slices.Clone(ips), nil
}

// families returns, primary first, whether each family is IPv4.
func (a *Allocator) families() []bool {
	var out []bool
	for _, p := range a.pools {
		if !slices.Contains(out, p.cidr.Addr().Is4()) {
			out = append(out, p.cidr.Addr().Is4())
		}
	}
	return out
}

func (a *Allocator) take(v4 bool) (netip.Addr, error) {
	var full []string
	for _, p := range a.pools {
		if p.cidr.Addr().Is4() != v4 {
			continue
		}
		for ip, start := p.next, p.next; ; {
			after := ip.Next()
			if ip == p.last {
				after = p.first
			}
			if _, used := a.byIP[ip]; !used {
				p.next = after
				return ip, nil
			}
			if ip = after; ip == start {
				break
			}
		}
		full = append(full, p.cidr.String())
	}
	return netip.Addr{}, errs.New(errs.ResourceExhausted,
		"give a pod address: every address of %s is in use by a pod of this node (%d leases); remove pods or give the node a larger pod CIDR",
		strings.Join(full, " and "), len(a.byIP))
}

// Adopt counts addresses as leased to id, whatever the ranges are now.
func (a *Allocator) Adopt(id string, ips []netip.Addr) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, ip := range ips {
		if holder, ok := a.byIP[ip]; ok && holder != id {
			return errs.New(errs.FailedPrecondition, "address %s is held by sandbox %s", ip, holder)
		}
	}
	a.release(id)
	for _, ip := range ips {
		a.byIP[ip] = id
		for _, p := range a.pools {
			// After a restart the round goes on behind the highest lease.
			if p.cidr.Contains(ip) && !ip.Less(p.next) && ip.Less(p.last) && !ip.Less(p.first) {
				p.next = ip.Next()
			}
		}
	}
	if len(ips) > 0 {
		a.byID[id] = slices.Clone(ips)
	}
	return nil
}

// Release gives back what id has. Safe to repeat.
func (a *Allocator) Release(id string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.release(id)
}

func (a *Allocator) release(id string) {
	for _, ip := range a.byID[id] {
		delete(a.byIP, ip)
	}
	delete(a.byID, id)
}

// Holder returns who has an address, "" if nobody has.
func (a *Allocator) Holder(ip netip.Addr) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.byIP[ip]
}

// Usage is how many addresses of one family are leased, and free.
type Usage struct {
	IPv4       bool
	Used, Free float64 // an IPv6 range has more than an integer holds
}

// Usage tells of each family that has a range or a lease.
func (a *Allocator) Usage() []Usage {
	a.mu.Lock()
	defer a.mu.Unlock()
	var out []Usage
	for _, v4 := range []bool{true, false} {
		u := Usage{IPv4: v4}
		inside := 0.0
		for ip := range a.byIP {
			if ip.Is4() != v4 {
				continue
			}
			u.Used++
			if slices.ContainsFunc(a.pools, func(p *pool) bool { return p.cidr.Contains(ip) }) {
				inside++
			}
		}
		ranges := 0
		for _, p := range a.pools {
			if p.cidr.Addr().Is4() == v4 {
				u.Free += p.size()
				ranges++
			}
		}
		u.Free = max(u.Free-inside, 0)
		if ranges > 0 || u.Used > 0 {
			out = append(out, u)
		}
	}
	return out
}

// size is how many addresses the pool may give.
func (p *pool) size() float64 {
	first, last, n := p.first.AsSlice(), p.last.AsSlice(), 0.0
	for i := range first { // digit by digit: what they have in common is more than a float64 holds
		n = n*256 + float64(last[i]) - float64(first[i])
	}
	return n + 1
}

// IDs returns who has leases.
func (a *Allocator) IDs() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	out := make([]string, 0, len(a.byID))
	for id := range a.byID {
		out = append(out, id)
	}
	return out
}

// String tells the ranges, for logs.
func (a *Allocator) String() string { return fmt.Sprint(a.CIDRs()) }
