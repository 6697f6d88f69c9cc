package firewall

import (
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// rulesetVersion is raised with every change of the rules or sets below, so
// that a table of another version is replaced.
const rulesetVersion = 1

// Priorities, see the package comment.
const (
	priorityGuard      = -300
	priorityDNAT       = -95
	priorityRedirects  = 0
	priorityMasquerade = 105
	icmpRedirect       = 5   // ICMP_REDIRECT
	icmp6Redirect      = 137 // NDISC_REDIRECT
	icmp6Advertisement = 134 // NDISC_ROUTER_ADVERTISEMENT
	ctStatusDNAT       = 1 << 5
	offsetSource4      = 12
	offsetDestination4 = 16
	offsetSource6      = 8
	offsetDestination6 = 24
	offsetPort         = 2 // destination port of TCP, UDP and SCTP alike
	reg                = 1 // NFT_REG_1, 16 bytes: NFT_REG32_00 to _03
	reg4Second         = 9 // NFT_REG32_01
	reg4Third          = 10
	reg6Second         = 2  // NFT_REG_2, the 16 bytes behind
	reg6Third          = 13 // NFT_REG32_05
)

type chain struct {
	chain *nftables.Chain
	rules [][]expr.Any
}

type exprs = []expr.Any

func (f *Firewall) ruleset() []chain {
	base := func(name string, typ nftables.ChainType, hook *nftables.ChainHook, prio nftables.ChainPriority) *nftables.Chain {
		accept := nftables.ChainPolicyAccept
		return &nftables.Chain{Table: f.table, Name: name, Type: typ, Hooknum: hook, Priority: &prio, Policy: &accept}
	}
	ports := &nftables.Chain{Table: f.table, Name: "ports"}
	toPorts := join(destinationLocal(), exprs{&expr.Verdict{Kind: expr.VerdictJump, Chain: ports.Name}})
	return []chain{
		{ports, f.portRules()},
		{base("guard", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, priorityGuard), f.guardRules()},
		{base("prerouting", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, priorityDNAT), []exprs{toPorts}},
		{base("output", nftables.ChainTypeNAT, nftables.ChainHookOutput, priorityDNAT), []exprs{toPorts}},
		{base("postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, priorityMasquerade), f.masqueradeRules()},
		{base("redirects", nftables.ChainTypeFilter, nftables.ChainHookOutput, priorityRedirects), []exprs{
			join(f.group(expr.MetaKeyOIFGROUP, expr.CmpOpEq), icmp(unix.IPPROTO_ICMP, icmpRedirect), drop()),
			join(f.group(expr.MetaKeyOIFGROUP, expr.CmpOpEq), icmp(unix.IPPROTO_ICMPV6, icmp6Redirect), drop()),
		}},
	}
}

// guardRules see packets as they come from a pod, before conntrack undoes any
// address translation: the answers to a host's own connection by 127.0.0.1 have
// an ordinary destination here, so that 127/8 as such can be refused although
// route_localnet is on for the links of pods with host ports (CVE-2020-8558).
func (f *Firewall) guardRules() []exprs {
	loopback, this := []byte{127, 0, 0, 0}, []byte{0, 0, 0, 0}
	return []exprs{
		join(f.group(expr.MetaKeyIIFGROUP, expr.CmpOpNeq), exprs{&expr.Verdict{Kind: expr.VerdictAccept}}),
		join(v4(), prefix8(offsetDestination4, loopback), drop()),
		join(v4(), prefix8(offsetSource4, loopback), drop()),
		join(v4(), prefix8(offsetSource4, this), drop()),
		join(icmp(unix.IPPROTO_ICMPV6, icmp6Advertisement), drop()),
		// The source must be an address that is routed to the link it came by.
		join(exprs{
			&expr.Fib{Register: reg, FlagSADDR: true, FlagIIF: true, ResultOIF: true},
			&expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: make([]byte, 4)},
		}, drop()),
	}
}

// portRules look a destination up in the maps; host addresses named in a
// mapping go before the mappings for every address. [::1] is left out: IPv6 has
// no route_localnet, an answer to ::1 that comes by a link is lost, so that a
// connection would hang instead of being refused.
func (f *Firewall) portRules() []exprs {
	loopback6 := append(make([]byte, 15), 1)
	protoPort := func(first, second uint32) exprs {
		return exprs{
			&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: first},
			&expr.Payload{DestRegister: second, Base: expr.PayloadBaseTransportHeader, Offset: offsetPort, Len: 2},
		}
	}
	dnat := func(set *nftables.Set, fam, portReg uint32) exprs {
		return exprs{
			&expr.Lookup{SourceRegister: reg, DestRegister: reg, IsDestRegSet: true, SetName: set.Name, SetID: set.ID},
			&expr.NAT{Type: expr.NATTypeDestNAT, Family: fam, RegAddrMin: reg, RegProtoMin: portReg},
		}
	}
	return []exprs{
		join(v4(), load(reg, offsetDestination4, 4), protoPort(reg4Second, reg4Third), dnat(f.sets.single4, unix.NFPROTO_IPV4, reg4Second)),
		join(v4(), protoPort(reg, reg4Second), dnat(f.sets.any4, unix.NFPROTO_IPV4, reg4Second)),
		join(v6(), load(reg, offsetDestination6, 16), protoPort(reg6Second, reg6Third), dnat(f.sets.single6, unix.NFPROTO_IPV6, reg6Second)),
		join(v6(), load(reg, offsetDestination6, 16), exprs{&expr.Cmp{Op: expr.CmpOpNeq, Register: reg, Data: loopback6}},
			protoPort(reg, reg4Second), dnat(f.sets.any6, unix.NFPROTO_IPV6, reg6Second)),
	}
}

// masqueradeRules: a pod that reaches itself by a host port must see another
// source than itself; the host's loopback addresses cannot leave the host;
// pods' addresses mean nothing outside.
func (f *Firewall) masqueradeRules() []exprs {
	in := func(s *nftables.Set, invert bool) exprs {
		return exprs{&expr.Lookup{SourceRegister: reg, SetName: s.Name, SetID: s.ID, Invert: invert}}
	}
	dnatted := exprs{
		&expr.Ct{Key: expr.CtKeySTATUS, Register: reg},
		&expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(ctStatusDNAT), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg, Data: make([]byte, 4)},
	}
	masquerade := exprs{&expr.Masq{FullyRandom: true}}
	toPod := f.group(expr.MetaKeyOIFGROUP, expr.CmpOpEq)
	return []exprs{
		join(v4(), dnatted, load(reg, offsetSource4, 4), load(reg4Second, offsetDestination4, 4), in(f.sets.hairpin4, false), masquerade),
		join(v6(), dnatted, load(reg, offsetSource6, 16), load(reg6Second, offsetDestination6, 16), in(f.sets.hairpin6, false), masquerade),
		join(toPod, v4(), prefix8(offsetSource4, []byte{127, 0, 0, 0}), masquerade),
		join(v4(), load(reg, offsetSource4, 4), in(f.sets.pods4, false), load(reg, offsetDestination4, 4), in(f.sets.plain4, true), masquerade),
		join(v6(), load(reg, offsetSource6, 16), in(f.sets.pods6, false), load(reg, offsetDestination6, 16), in(f.sets.plain6, true), masquerade),
	}
}

func join(parts ...exprs) exprs { return slices.Concat(parts...) }

func v4() exprs { return family(unix.NFPROTO_IPV4) }

func v6() exprs { return family(unix.NFPROTO_IPV6) }

func family(f byte) exprs {
	return exprs{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: reg},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: []byte{f}},
	}
}

func load(register, offset, size uint32) exprs {
	return exprs{&expr.Payload{DestRegister: register, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: size}}
}

// prefix8 compares an IPv4 address by its first byte.
func prefix8(offset uint32, addr []byte) exprs {
	return join(load(reg, offset, 4), exprs{
		&expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 4, Mask: []byte{0xff, 0, 0, 0}, Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: addr},
	})
}

func (f *Firewall) group(key expr.MetaKey, op expr.CmpOp) exprs {
	return exprs{
		&expr.Meta{Key: key, Register: reg},
		&expr.Cmp{Op: op, Register: reg, Data: binaryutil.NativeEndian.PutUint32(f.cfg.Group)},
	}
}

func icmp(proto, typ byte) exprs {
	return exprs{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: []byte{proto}},
		&expr.Payload{DestRegister: reg, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: []byte{typ}},
	}
}

// drop counts, so that `nft list table` tells what was refused.
func drop() exprs { return exprs{&expr.Counter{}, &expr.Verdict{Kind: expr.VerdictDrop}} }

// destinationLocal matches addresses of this host only: a mapped port of the
// node is nobody else's port (CVE-2025-67499).
func destinationLocal() exprs {
	return exprs{
		&expr.Fib{Register: reg, FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
	}
}

func comment(s string) []byte {
	return userdata.AppendString(nil, userdata.TypeComment, s)
}
