package sandbox

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/sys"
	"github.com/naru-project/naru/sandbox/rtnl"
	"github.com/naru-project/naru/sandbox/sysctl"
)

// hostFacts are what pods' networks depend on and what seldom changes.
type hostFacts struct {
	mtu         int
	onlyAddress bool         // no global IPv4 address but those we make
	local       []netip.Addr // all addresses of the host
	ipv6Off     bool         // new links start with IPv6 disabled
}

// learnHost looks at the host's links and addresses.
func (m *Manager) learnHost() error {
	c, err := rtnl.Open()
	if err != nil {
		return errs.New(errs.Internal, "%w", err)
	}
	defer c.Close()
	f := &hostFacts{mtu: m.live.Load().MTU, onlyAddress: true}
	if f.mtu == 0 {
		f.mtu = defaultMTU
		if l, ok, err := c.Uplink(); err == nil && ok && l.MTU >= minMTU && l.MTU <= maxMTU {
			f.mtu = l.MTU
		}
	}
	addrs, err := c.Addresses()
	if err != nil {
		return errs.New(errs.Internal, "%w", err)
	}
	for _, a := range addrs {
		if a.IP == rtnl.Gateway4 || a.IP == rtnl.Gateway6 {
			continue
		}
		f.local = append(f.local, a.IP)
		if a.IP.Is4() && a.Global && !a.IP.IsLoopback() {
			f.onlyAddress = false
		}
	}
	if v, err := sysctl.Read(m.proc, "net/ipv6/conf/default/disable_ipv6"); err == nil && v == "1" {
		f.ipv6Off = true
	}
	m.facts.Store(f)
	return nil
}

// warnOverlap tells of a pod CIDR that holds an address of the host: pods and
// the host could not tell each other apart.
func (m *Manager) warnOverlap(ctx context.Context) {
	for _, p := range m.ranges() {
		for _, a := range m.facts.Load().local {
			if p.Contains(a) {
				klog.FromContext(ctx).Error(nil, "A pod CIDR holds an address of this host: give the node another range", "cidr", p, "address", a)
			}
		}
	}
}

func (m *Manager) hostFacts() (*hostFacts, error) {
	if f := m.facts.Load(); f != nil {
		return f, nil
	}
	if err := m.learnHost(); err != nil {
		return nil, err
	}
	return m.facts.Load(), nil
}

// prepareHost lets the host forward for pods. It changes no more than
// net.ipv4.ip_forward, net.ipv6.conf.all.forwarding (with IPv6 pods only) and,
// because the latter would make the host deaf for router advertisements,
// accept_ra of links that listened to them (ip-sysctl: 2 = also when
// forwarding).
func (m *Manager) prepareHost(ctx context.Context) error {
	cidrs := m.ranges()
	if slices.ContainsFunc(cidrs, func(p netip.Prefix) bool { return p.Addr().Is4() }) {
		if err := m.enable("net/ipv4/ip_forward"); err != nil {
			return err
		}
	}
	if slices.ContainsFunc(cidrs, func(p netip.Prefix) bool { return p.Addr().Is6() }) {
		if !m.ipv6 {
			return errs.New(errs.FailedPrecondition, "set up IPv6 pods: the kernel has IPv6 turned off")
		}
		if v, err := sysctl.Read(m.proc, "net/ipv6/conf/all/forwarding"); err != nil || v != "1" {
			if err := m.keepAdvertisements(ctx); err != nil {
				return err
			}
		}
		if err := m.enable("net/ipv6/conf/all/forwarding"); err != nil {
			return err
		}
	}
	return m.learnHost()
}

func (m *Manager) enable(path string) error {
	v, err := sysctl.Read(m.proc, path)
	if err == nil && v == "1" {
		return nil
	}
	if err = sysctl.Write(m.proc, path, "1"); err != nil {
		return errs.Wrap(errs.Internal, err)
	}
	return nil
}

func (m *Manager) keepAdvertisements(ctx context.Context) error {
	dir, err := sys.OpenBeneath(m.proc, "sys/net/ipv6/conf", unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return errs.New(errs.Internal, "list the links with IPv6: %w", err)
	}
	names, err := dir.Readdirnames(-1)
	_ = dir.Close()
	if err != nil {
		return errs.New(errs.Internal, "list the links with IPv6: %w", err)
	}
	for _, link := range names {
		if link == "all" || link == "default" || link == "lo" || strings.HasPrefix(link, m.cfg.LinkPrefix) {
			continue
		}
		path := "net/ipv6/conf/" + link + "/accept_ra"
		v, err := sysctl.Read(m.proc, path)
		if err != nil || v != "1" {
			continue // gone meanwhile, or not listening
		}
		if err := sysctl.Write(m.proc, path, "2"); err != nil {
			return errs.Wrap(errs.Internal, err)
		}
		klog.FromContext(ctx).Info("Router advertisements stay accepted while forwarding", "link", link)
	}
	return nil
}

// removeDoomed deletes host links whose pod was released a while ago and that
// are still there: something keeps the namespace, a process that cannot die
// for instance.
func (m *Manager) removeDoomed() error {
	due := map[string]string{}
	m.mu.Lock()
	for name, d := range m.doomed {
		if time.Since(d.since) >= doomedAfter {
			due[name] = d.alias
		}
	}
	m.mu.Unlock()
	if len(due) == 0 {
		return nil
	}
	c, err := rtnl.Open()
	if err != nil {
		return err
	}
	defer c.Close()
	links, err := c.Veths()
	if err != nil {
		return err
	}
	var left []int
	for _, l := range links {
		if alias, ok := due[l.Name]; ok && l.Alias == alias && l.Group == m.cfg.LinkGroup {
			left = append(left, l.Index)
		}
	}
	if err := m.deleteLinks(c, left); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for name, alias := range due {
		if m.doomed[name].alias == alias {
			delete(m.doomed, name)
		}
	}
	return nil
}

// writeAbsent writes a sysctl that the kernel may not have.
func writeAbsent(proc *os.File, path, value string) error {
	err := sys.WriteBeneath(proc, "sys/"+path, value)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}
