package firewall

import (
	"cmp"
	"encoding/binary"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
)

// sets are the named sets and maps of the table.
type sets struct {
	// Of one pod with host ports each.
	any4, any6         *nftables.Set // proto . port → pod address . port
	single4, single6   *nftables.Set // host address . proto . port → pod address . port
	hairpin4, hairpin6 *nftables.Set // pod address . the same: a pod that speaks to itself
	// Of the node.
	pods4, pods6   *nftables.Set // sources to masquerade
	plain4, plain6 *nftables.Set // destinations that see the pod's address
}

func (s *sets) all() []*nftables.Set {
	return []*nftables.Set{s.any4, s.any6, s.single4, s.single6, s.hairpin4, s.hairpin6, s.pods4, s.pods6, s.plain4, s.plain6}
}

// ports are those with elements of single pods.
func (s *sets) ports() []*nftables.Set { return s.all()[:6] }

// newSets describes them. IDs are given here (they only matter within a
// transaction), as the library's own counter is not safe for concurrent use.
func newSets(t *nftables.Table) sets {
	id := uint32(0)
	set := func(name string, value *nftables.SetDatatype, key ...nftables.SetDatatype) *nftables.Set {
		id++
		s := &nftables.Set{Table: t, ID: id, Name: name, KeyType: key[0]}
		if len(key) > 1 {
			s.Concatenation = true
			s.KeyType = nftables.MustConcatSetType(key...)
		}
		if value != nil {
			s.IsMap = true
			s.DataType = *value
		}
		return s
	}
	ranges := func(name string, key nftables.SetDatatype) *nftables.Set {
		s := set(name, nil, key)
		s.Interval = true
		return s
	}
	ip4, ip6, proto, port := nftables.TypeIPAddr, nftables.TypeIP6Addr, nftables.TypeInetProto, nftables.TypeInetService
	to4, to6 := nftables.MustConcatSetType(ip4, port), nftables.MustConcatSetType(ip6, port)
	return sets{
		any4: set("ports4", &to4, proto, port), any6: set("ports6", &to6, proto, port),
		single4: set("ports4_at", &to4, ip4, proto, port), single6: set("ports6_at", &to6, ip6, proto, port),
		hairpin4: set("hairpin4", nil, ip4, ip4), hairpin6: set("hairpin6", nil, ip6, ip6),
		pods4: ranges("pods4", ip4), pods6: ranges("pods6", ip6),
		plain4: ranges("plain4", ip4), plain6: ranges("plain6", ip6),
	}
}

// maxElements bounds the elements of one message: they are one attribute, whose
// length has 16 bits.
const maxElements = 300

// element is one element of a set, comparable.
type element struct {
	key, val string
	end      bool // of an interval
}

func (e element) compare(o element) int {
	if c := cmp.Or(strings.Compare(e.key, o.key), strings.Compare(e.val, o.val)); c != 0 {
		return c
	}
	switch {
	case e.end == o.end:
		return 0
	case e.end:
		return -1
	}
	return 1
}

func zero(s string) bool { return strings.Trim(s, "\x00") == "" }

func encode(elems []element) []nftables.SetElement {
	out := make([]nftables.SetElement, len(elems))
	for i, e := range elems {
		out[i] = nftables.SetElement{Key: []byte(e.key), IntervalEnd: e.end}
		if e.val != "" {
			out[i].Val = []byte(e.val)
		}
	}
	return out
}

// Parts of concatenated keys take whole registers of 4 bytes.
func protoPart(p uint8) string { return string([]byte{p, 0, 0, 0}) }

func portPart(p uint16) string { return string(binary.BigEndian.AppendUint16(nil, p)) + "\x00\x00" }

func addrPart(a netip.Addr) string { return string(a.AsSlice()) }

// elements are those of the given pods.
func (f *Firewall) elements(pods map[string]pod) map[*nftables.Set][]element {
	out := map[*nftables.Set][]element{}
	for _, p := range pods {
		f.podElements(p, func(s *nftables.Set, key, val string) {
			// Two ports of a pod share one hairpin, and a mapping may stand twice.
			if e := (element{key: key, val: val}); !slices.Contains(out[s], e) {
				out[s] = append(out[s], e)
			}
		})
	}
	return out
}

func (f *Firewall) podElements(p pod, add func(s *nftables.Set, key, val string)) {
	for _, port := range p.ports {
		key := protoPart(port.Proto) + portPart(port.HostPort)
		for _, ip := range p.ips {
			at, single, hairpin := f.sets.any4, f.sets.single4, f.sets.hairpin4
			if ip.Is6() {
				at, single, hairpin = f.sets.any6, f.sets.single6, f.sets.hairpin6
			}
			val := addrPart(ip) + portPart(port.PodPort)
			switch {
			case !port.HostIP.IsValid():
				add(at, key, val)
			case port.HostIP.Is4() == ip.Is4():
				add(single, addrPart(port.HostIP)+key, val)
			default:
				continue
			}
			add(hairpin, addrPart(ip)+addrPart(ip), "")
		}
	}
}

// intervals turns prefixes into elements of interval sets: starts, and ends
// one behind the last address. Ranges that touch or contain each other become
// one, since an interval set refuses overlaps.
func intervals(prefixes []netip.Prefix) (v4, v6 []element) {
	type span struct{ first, last netip.Addr }
	var spans []span
	for _, p := range prefixes {
		spans = append(spans, span{p.Masked().Addr(), lastOf(p)})
	}
	slices.SortFunc(spans, func(a, b span) int { return a.first.Compare(b.first) }) // IPv4 before IPv6
	var merged []span
	for _, s := range spans {
		if n := len(merged); n > 0 && merged[n-1].last.BitLen() == s.first.BitLen() &&
			(s.first.Compare(merged[n-1].last) <= 0 || merged[n-1].last.Next() == s.first) {
			if s.last.Compare(merged[n-1].last) > 0 {
				merged[n-1].last = s.last
			}
			continue
		}
		merged = append(merged, s)
	}
	for _, s := range merged {
		elems := []element{{key: addrPart(s.first)}}
		if next := s.last.Next(); next.IsValid() { // none behind the very last address
			elems = append(elems, element{key: addrPart(next), end: true})
		}
		if s.first.Is4() {
			v4 = append(v4, elems...)
		} else {
			v6 = append(v6, elems...)
		}
	}
	return v4, v6
}

func lastOf(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}
