package sandbox

import (
	"context"
	"net/netip"
	"path/filepath"
	"regexp"
	"time"

	"github.com/naru-project/naru/internal/config"
	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/namespaces"
	"github.com/naru-project/naru/sandbox/cni"
	"github.com/naru-project/naru/sandbox/ipam"
)

// AutoCIDR as the only pod CIDR means: whatever UpdateRuntimeConfig tells.
const AutoCIDR = "auto"

// What makes the network of new pods.
const (
	// PluginAuto is CNI from when its first configuration appears, the built-in
	// network until then.
	PluginAuto    = "auto"
	PluginBuiltin = "builtin"
	PluginCNI     = "cni"
)

// Config of a Manager. Start from DefaultConfig.
type Config struct {
	// RunDir gets the folders ns (pinned namespaces) and pods (files of pods).
	// It belongs to one boot.
	RunDir string
	// StateFile keeps pod CIDRs told by UpdateRuntimeConfig over restarts.
	StateFile string
	// Plugin is one of the Plugin constants.
	Plugin string
	// CNI says where configurations and plugins are, and how long they may take.
	CNI cni.Config
	// PodCIDRs are IPv4 or IPv6 ranges, primary family first, or AutoCIDR alone.
	PodCIDRs []string
	// HostPorts maps ports of the node; without, mappings are ignored.
	HostPorts bool
	// Table is the name of the nftables table (family inet), LinkPrefix starts
	// the names of host links, LinkGroup is their link group. Two daemons on
	// one host need different tables and prefixes.
	Table      string
	LinkPrefix string
	LinkGroup  uint32
	// PoolSize is how many namespaces with a network are kept ready.
	PoolSize int
	// HostEtc is where the host's hosts and resolv.conf are.
	HostEtc string
	// HostResolv is the fallback where HostEtc's resolv.conf names only servers
	// on the loopback, as that of systemd-resolved does.
	HostResolv string

	Live
}

// Live is what Reconfigure changes while the manager runs. Pods that exist keep
// what they have, but for the destinations that see their own addresses.
type Live struct {
	// NonMasqueradeCIDRs are destinations that see pods' own addresses: the
	// whole cluster's pod range belongs here. The node's own always does.
	NonMasqueradeCIDRs []string
	// MTU of pod links; 0 = that of the link with the default route.
	MTU int
	// UnprivilegedPorts lets any process of a pod bind ports below 1024, and
	// UnprivilegedPing lets it ping without CAP_NET_RAW, unless the pod's own
	// sysctls say otherwise.
	UnprivilegedPorts bool
	UnprivilegedPing  bool
}

// DefaultConfig is what an installation without configuration uses.
func DefaultConfig() Config {
	return Config{
		RunDir: "/run/naru",
		Plugin: PluginAuto,
		CNI: cni.Config{
			ConfDir: "/etc/cni/net.d", BinDirs: []string{"/opt/cni/bin", "/usr/lib/cni"}, StateDir: "/var/lib/naru/cni",
			Timeout: time.Minute, StatusTimeout: 5 * time.Second, StatusEvery: 10 * time.Second, GCAfter: 10 * time.Second,
		},
		StateFile:  "/var/lib/naru/network.json",
		PodCIDRs:   []string{AutoCIDR},
		HostPorts:  true,
		Table:      "naru",
		LinkPrefix: "naru",
		LinkGroup:  0x6e617275, // "naru"
		PoolSize:   2,
		HostEtc:    "/etc",
		HostResolv: "/run/systemd/resolve/resolv.conf",
	}
}

// NamespaceMaker makes the namespaces that a process with threads cannot make.
type NamespaceMaker interface {
	// Make makes new namespaces and returns them open; the caller closes them.
	Make(ctx context.Context, r namespaces.Request) (*namespaces.Files, error)
	// Release ends what keeps them alive (the pod's init). Unknown ids are no error.
	Release(ctx context.Context, id string) error
}

// Deps are what a Manager needs of others.
type Deps struct {
	Namespaces NamespaceMaker // may be nil: then pods with user or shared PID namespace are refused
	Programs   cni.Runner     // may be nil: then CNI plugins cannot be run
}

var sandboxID = regexp.MustCompile(`^[0-9a-f]{64}$`)

// Limits of an Ethernet MTU that carries IPv6 (RFC 8200 5).
const (
	minMTU     = 1280
	maxMTU     = 65535
	defaultMTU = 1500
)

// parsed is a Config that was found good.
type parsed struct {
	auto  bool
	cidrs []netip.Prefix
}

func (c *Config) check() (p parsed, err error) {
	bad := func(format string, args ...any) (parsed, error) {
		return parsed{}, errs.New(errs.InvalidArgument, format, args...)
	}
	switch {
	case !filepath.IsAbs(c.RunDir):
		return bad("run folder %q is not absolute", c.RunDir)
	case !config.TableName.MatchString(c.Table):
		return bad("nftables table %q is no plain name", c.Table)
	case !config.LinkPrefix.MatchString(c.LinkPrefix):
		return bad("link prefix %q must be 1 to 6 letters and digits", c.LinkPrefix)
	case c.Plugin != PluginAuto && c.Plugin != PluginBuiltin && c.Plugin != PluginCNI:
		return bad("network plugin %.40q is none of %s, %s, %s", c.Plugin, PluginAuto, PluginBuiltin, PluginCNI)
	case !filepath.IsAbs(c.CNI.StateDir):
		return bad("folder of CNI's state %q is not absolute", c.CNI.StateDir)
	case c.CNI.Timeout <= 0 || c.CNI.StatusTimeout <= 0 || c.CNI.StatusEvery <= 0:
		return bad("the times of CNI plugins must be positive")
	case c.LinkGroup == 0:
		return bad("link group 0 is the group of all links")
	case c.PoolSize < 0 || c.PoolSize > 64:
		return bad("pool size %d is outside 0 to 64", c.PoolSize)
	}
	if len(c.PodCIDRs) == 0 || len(c.PodCIDRs) == 1 && c.PodCIDRs[0] == AutoCIDR {
		if c.StateFile == "" {
			return bad("pod CIDR %q needs a state file", AutoCIDR)
		}
		p.auto = true
		return p, nil
	}
	if p.cidrs, err = ipam.ParsePrefixes(c.PodCIDRs...); err != nil {
		return parsed{}, err
	}
	p.cidrs, err = ipam.Check(p.cidrs)
	return p, err
}

// check returns the destinations that see pods' own addresses.
func (l *Live) check() ([]netip.Prefix, error) {
	if l.MTU != 0 && (l.MTU < minMTU || l.MTU > maxMTU) {
		return nil, errs.New(errs.InvalidArgument, "MTU %d is outside %d to %d", l.MTU, minMTU, maxMTU)
	}
	return ipam.ParsePrefixes(l.NonMasqueradeCIDRs...)
}

// Reconfigure takes new settings for pods to come. After an error some may
// count and some not: call it again, with the former ones.
func (m *Manager) Reconfigure(l Live) error {
	plain, err := l.check()
	if err != nil {
		return err
	}
	old := m.live.Swap(&l)
	if err := m.fw.SetPlain(plain); err != nil {
		return errs.New(errs.Of(err), "change the destinations that see pods' addresses: %w", err)
	}
	if old.MTU != l.MTU {
		return m.learnHost()
	}
	return nil
}
