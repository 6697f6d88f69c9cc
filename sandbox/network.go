package sandbox

import (
	"context"
	crand "crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/sandbox/firewall"
	"github.com/naru-project/naru/sandbox/rtnl"
)

// aliasPrefix starts the alias of a host link; the sandbox id follows.
const aliasPrefix = "naru "

// newLinkName is a name for the host end of a veth pair: a prefix and random
// letters up to IFNAMSIZ (16, with a NUL). It is not derived from the sandbox
// id: the kernel takes links apart in its own time, so that one of a failed try
// may still be there. Whose a link is says its alias.
func (m *Manager) newLinkName() string {
	return (m.cfg.LinkPrefix + strings.ToLower(crand.Text()))[:unix.IFNAMSIZ-1]
}

// macs derives the hardware addresses of a pair from the name of its host end,
// so that the handle is enough to know them. Both are locally administered.
func macs(link string) (host, pod [6]byte) {
	sum := sha256.Sum256([]byte("mac " + link))
	copy(host[:], sum[:6])
	copy(pod[:], sum[6:12])
	host[0] = host[0]&^1 | 2
	pod[0] = pod[0]&^1 | 2
	return host, pod
}

// connect makes the pod's network, unless it came from the pool.
func (c *creation) connect(ctx context.Context) error {
	if c.network != nil {
		return c.attach(ctx)
	}
	if c.spec.Network == ModeNode || c.h.HostLink != "" {
		return nil
	}
	c.h.HostLink = c.m.newLinkName()
	c.undo.Add("network", func(context.Context) error { return c.m.disconnect(c.spec.ID, c.h) })
	host, err := rtnl.Open()
	if err != nil {
		return errs.New(errs.Internal, "%w", err)
	}
	defer host.Close()
	p, err := c.m.makePair(host, c.ns, c.h.HostLink, aliasPrefix+c.spec.ID)
	if err != nil {
		return err
	}
	return c.m.address(host, c.ns, p, c.h.HostLink, c.h.IPs)
}

// pair is a veth pair that exists.
type pair struct{ host, pod int } // indexes of both ends

// makePair makes the veth pair of open namespaces, without addresses.
func (m *Manager) makePair(host *rtnl.Conn, o *opened, link, alias string) (p pair, err error) {
	facts, err := m.hostFacts()
	if err != nil {
		return p, err
	}
	hostMAC, podMAC := macs(link)
	p.host, err = host.CreatePair(rtnl.Pair{
		Host: link, HostMAC: hostMAC, PodMAC: podMAC, MTU: facts.mtu,
		Group: m.cfg.LinkGroup, Alias: alias, NetNS: int(o.files["net"].Fd()), IPv6: m.ipv6,
	})
	if err == nil {
		err = m.plainIPv6(link, facts)
	}
	if err == nil {
		p.pod, err = o.route.PreparePod(m.ipv6)
	}
	if err != nil {
		return p, errs.New(errs.Internal, "%w", err)
	}
	return p, nil
}

// plainIPv6 sets what rtnetlink has no message for: no router on a pod's link
// is listened to.
func (m *Manager) plainIPv6(link string, facts *hostFacts) error {
	if !m.ipv6 {
		return nil
	}
	conf := "net/ipv6/conf/" + link
	if err := writeAbsent(m.proc, conf+"/accept_ra", "0"); err != nil {
		return err
	}
	if facts.ipv6Off {
		return writeAbsent(m.proc, conf+"/disable_ipv6", "0")
	}
	return nil
}

// address brings both ends up with their addresses and routes.
func (m *Manager) address(host *rtnl.Conn, o *opened, p pair, link string, ips []netip.Addr) error {
	facts, err := m.hostFacts()
	if err != nil {
		return err
	}
	hostMAC, podMAC := macs(link)
	err = host.ConfigureHost(rtnl.HostEnd{Index: p.host, PodMAC: podMAC, IPs: ips, OnlyAddress: facts.onlyAddress})
	if err == nil {
		err = o.route.ConfigurePod(p.pod, hostMAC, ips)
	}
	if err == nil {
		err = errors.Join(host.Settle(p.host), o.route.Settle(p.pod))
	}
	if err != nil {
		return errs.New(errs.Internal, "%w", err)
	}
	return nil
}

// disconnect takes a pod off the network at once: its routes go, so that
// nothing reaches it and the guard drops what it sends. The link itself goes
// with the pod's namespace, which costs nobody the RTNL lock.
func (m *Manager) disconnect(id string, h *Handle) error {
	c, err := rtnl.Open()
	if err != nil {
		return errs.New(errs.Internal, "%w", err)
	}
	defer c.Close()
	link, ok, err := m.findLink(c, id, h)
	if err == nil && ok {
		m.doom(link)
		if h != nil {
			err = c.DeleteRoutes(link.Index, h.IPs)
		}
	}
	if err != nil {
		return errs.New(errs.Internal, "%w", err)
	}
	return nil
}

// findLink finds the host link of a sandbox, by its handle or by its alias.
func (m *Manager) findLink(c *rtnl.Conn, id string, h *Handle) (rtnl.Link, bool, error) {
	if h != nil {
		if h.HostLink == "" || !strings.HasPrefix(h.HostLink, m.cfg.LinkPrefix) || len(h.HostLink) >= unix.IFNAMSIZ {
			return rtnl.Link{}, false, nil
		}
		l, ok, err := c.FindLink(h.HostLink)
		return l, ok && m.ours(l) && l.Alias == aliasPrefix+id, err
	}
	all, err := c.Veths()
	if i := slices.IndexFunc(all, func(l rtnl.Link) bool { return m.ours(l) && l.Alias == aliasPrefix+id }); i >= 0 {
		return all[i], true, err
	}
	return rtnl.Link{}, false, err
}

// ours tells whether a link was made by this Manager, or one configured alike.
func (m *Manager) ours(l rtnl.Link) bool {
	return l.Group == m.cfg.LinkGroup && strings.HasPrefix(l.Name, m.cfg.LinkPrefix) && strings.HasPrefix(l.Alias, aliasPrefix)
}

// deleteLinks removes links that nothing else takes along.
func (m *Manager) deleteLinks(c *rtnl.Conn, indexes []int) error {
	group := m.cfg.LinkGroup
	for group == m.cfg.LinkGroup || group == 0 {
		group = rand.Uint32() &^ (1 << 31)
	}
	return c.DeleteLinks(group, indexes...)
}

// routeLocalnet lets the host's own connections by 127.0.0.1 reach a pod with
// host ports. The guard chain keeps the other direction shut.
func (m *Manager) routeLocalnet(h *Handle, rules []firewall.Port) error {
	if len(rules) == 0 || !slices.ContainsFunc(h.IPs, netip.Addr.Is4) {
		return nil
	}
	c, err := rtnl.Open()
	if err != nil {
		return errs.New(errs.Internal, "%w", err)
	}
	defer c.Close()
	l, ok, err := m.findLink(c, h.ID, h)
	if err == nil && !ok {
		err = fmt.Errorf("link %s of the pod is gone", h.HostLink)
	}
	if err == nil {
		err = c.SetRouteLocalnet(l.Index, true)
	}
	if err != nil {
		return errs.New(errs.Internal, "%w", err)
	}
	return nil
}

// pingRange is every group of the pod: those that its user namespace maps from
// 0 on, or all.
func pingRange(s *Spec) string {
	for _, e := range s.GIDMap {
		if e.ContainerID == 0 && e.Size > 0 {
			return fmt.Sprintf("0 %d", e.Size-1)
		}
	}
	return "0 2147483647"
}
