package doctor

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"unsafe"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

func checkNftables(context.Context, *Config) []Result {
	c, err := nftables.New()
	if err != nil {
		return result("nftables", Fail, "netlink: "+err.Error(), "host ports and masquerade need it")
	}
	tables, err := c.ListTables()
	if err != nil {
		return result("nftables", Fail, "list tables: "+err.Error(), "the kernel lacks nf_tables (CONFIG_NF_TABLES), or naru lacks CAP_NET_ADMIN")
	}
	return ok("nftables", "answers, %d tables", len(tables))
}

const dropFollows = "a drop in any table wins over naru's accept: pods lose what is forwarded, " +
	"to other nodes, host ports and the Internet; accept forwarded traffic of the pod range there"

// checkFirewall finds what drops forwarded packets before, or beside, Naru's own
// table: base chains on the forward hook with policy drop.
func checkFirewall(_ context.Context, cfg *Config) []Result {
	var out []Result
	if c, err := nftables.New(); err == nil {
		chains, err := c.ListChains()
		if err != nil {
			out = append(out, Result{Name: "firewall", Status: Warn, Detail: "list chains: " + err.Error()})
		}
		out = append(out, judgeChains(chains, cfg.Table)...)
	}
	out = append(out, checkLegacy(cfg)...)
	if out == nil {
		out = ok("firewall", "nothing else drops forwarded packets by policy")
	}
	return out
}

func judgeChains(chains []*nftables.Chain, own string) []Result {
	var out []Result
	for _, c := range chains {
		if c.Hooknum == nil || *c.Hooknum != *nftables.ChainHookForward || c.Policy == nil || *c.Policy != nftables.ChainPolicyDrop || c.Table == nil {
			continue
		}
		if c.Table.Family == nftables.TableFamilyARP || c.Table.Family == nftables.TableFamilyBridge || (own != "" && c.Table.Name == own) {
			continue
		}
		out = append(out, Result{Name: "firewall", Status: Warn,
			Detail: fmt.Sprintf("nftables table %s %s: chain %s on the forward hook has policy drop%s", family(c.Table.Family), c.Table.Name, c.Name, whose(c)), Follows: dropFollows})
	}
	return out
}

func family(f nftables.TableFamily) string {
	switch f {
	case nftables.TableFamilyIPv4:
		return "ip"
	case nftables.TableFamilyIPv6:
		return "ip6"
	case nftables.TableFamilyINet:
		return "inet"
	}
	return fmt.Sprint(f)
}

// whose guesses who made a chain.
func whose(c *nftables.Chain) string {
	switch {
	case c.Table.Name == "filter" && c.Name == "FORWARD":
		return " (iptables-nft: Docker or ufw)"
	case strings.HasPrefix(c.Table.Name, "firewalld"):
		return " (firewalld)"
	}
	return ""
}

// Version 1 of iptables (x_tables) is not seen by nftables' netlink. Its tables
// are read by getsockopt(2); constants and layouts are those of
// linux/netfilter_ipv4/ip_tables.h.
const (
	soGetInfo    = 64 // IPT_SO_GET_INFO, IP6T_SO_GET_INFO
	soGetEntries = 65 // IPT_SO_GET_ENTRIES, IP6T_SO_GET_ENTRIES
	hookForward  = 2  // NF_INET_FORWARD
	tableNameLen = 32 // XT_TABLE_MAXNAMELEN
	targetLen    = 32 // sizeof(struct xt_entry_target)
	verdictDrop  = -1 // -NF_DROP - 1
	maxEntries   = 64 << 20
	entryTarget4 = 88  // offsetof(struct ipt_entry, target_offset)
	entryTarget6 = 140 // offsetof(struct ip6t_entry, target_offset)
)

// getInfo is struct ipt_getinfo.
type getInfo struct {
	name       [tableNameLen]byte
	validHooks uint32
	hookEntry  [5]uint32
	underflow  [5]uint32
	numEntries uint32
	size       uint32
}

// checkLegacy looks only at what is loaded already: asking for a table that is
// not would load its module.
func checkLegacy(cfg *Config) []Result {
	var out []Result
	for _, v := range []struct {
		file, tool         string
		family, level, off int
	}{
		{"net/ip_tables_names", "iptables-legacy", unix.AF_INET, unix.IPPROTO_IP, entryTarget4},
		{"net/ip6_tables_names", "ip6tables-legacy", unix.AF_INET6, unix.IPPROTO_IPV6, entryTarget6},
	} {
		b, err := os.ReadFile(filepath.Join(cfg.Proc, v.file))
		if err != nil || !hasWord(string(b), "filter") {
			continue
		}
		drops, err := legacyForwardDrops(v.family, v.level, v.off)
		switch {
		case err != nil:
			out = append(out, Result{Name: "firewall", Status: Warn, Detail: v.tool + " is in use, its rules cannot be read: " + err.Error(), Follows: "look yourself: " + v.tool + " -S FORWARD"})
		case drops:
			out = append(out, Result{Name: "firewall", Status: Warn, Detail: v.tool + ": FORWARD has policy drop", Follows: dropFollows})
		}
	}
	return out
}

func hasWord(s, word string) bool {
	for _, f := range strings.Fields(s) {
		if f == word {
			return true
		}
	}
	return false
}

// legacyForwardDrops reads the policy of the filter table's FORWARD chain: the
// verdict of the rule that the chain ends in.
func legacyForwardDrops(family, level, targetOff int) (bool, error) {
	fd, err := unix.Socket(family, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
	if err != nil {
		return false, err
	}
	defer func() { _ = unix.Close(fd) }()
	var info getInfo
	copy(info.name[:], "filter")
	if err := getsockopt(fd, level, soGetInfo, unsafe.Pointer(&info), unsafe.Sizeof(info)); err != nil {
		return false, err
	}
	if info.validHooks&(1<<hookForward) == 0 || info.size > maxEntries {
		return false, nil
	}
	const head = tableNameLen + 4 + 4 // name, size, padding
	buf := make([]byte, head+int(info.size))
	copy(buf, "filter")
	binary.NativeEndian.PutUint32(buf[tableNameLen:], info.size)
	if err := getsockopt(fd, level, soGetEntries, unsafe.Pointer(&buf[0]), uintptr(len(buf))); err != nil {
		return false, err
	}
	return policyDrops(buf[head:], int(info.underflow[hookForward]), targetOff)
}

// policyDrops reads the verdict of the entry at off. An error is a layout that
// is not understood.
func policyDrops(entries []byte, off, targetOff int) (bool, error) {
	if off < 0 || off+targetOff+2 > len(entries) {
		return false, fmt.Errorf("the policy lies at %d of %d bytes", off, len(entries))
	}
	at := off + int(binary.NativeEndian.Uint16(entries[off+targetOff:])) + targetLen
	if at+4 > len(entries) {
		return false, fmt.Errorf("the verdict lies at %d of %d bytes", at, len(entries))
	}
	return int32(binary.NativeEndian.Uint32(entries[at:])) == verdictDrop, nil
}

func getsockopt(fd, level, name int, p unsafe.Pointer, size uintptr) error {
	n := uint32(size)
	_, _, e := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(name), uintptr(p), uintptr(unsafe.Pointer(&n)), 0)
	if e != 0 {
		return e
	}
	return nil
}
