package registry

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
)

// zone is the kind of network an address is in. A registry may send the node
// to its own zone or a more public one, not to one that only the node can
// reach: that would be asking in somebody else's name (SSRF).
type zone int32

const (
	zoneUnknown zone = iota
	zonePublic
	zonePrivate   // RFC 1918, RFC 6598, unique local
	zoneLinkLocal // cloud metadata services live here
	zoneLoopback
	zoneSpecial // unspecified, multicast, broadcast: never right
)

func (z zone) String() string {
	return [...]string{"unknown", "public", "private", "link-local", "loopback", "special"}[z]
}

var sharedSpace = netip.MustParsePrefix("100.64.0.0/10") // RFC 6598

func zoneOf(a netip.Addr) zone {
	a = a.Unmap()
	switch {
	case !a.IsValid() || a.IsUnspecified() || a.IsMulticast() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return zoneSpecial
	case a.IsLoopback():
		return zoneLoopback
	case a.IsLinkLocalUnicast():
		return zoneLinkLocal
	case a.IsPrivate() || sharedSpace.Contains(a):
		return zonePrivate
	}
	return zonePublic
}

// zoneBox remembers where the registry itself was met.
type zoneBox struct{ v atomic.Int32 }

func (b *zoneBox) set(z zone) { b.v.Store(int32(z)) }
func (b *zoneBox) get() zone  { return zone(b.v.Load()) }

func (b *zoneBox) note(conn net.Conn) {
	if ap, err := netip.ParseAddrPort(conn.RemoteAddr().String()); err == nil {
		b.set(zoneOf(ap.Addr()))
	}
}

// purpose is why another host than the registry is asked.
type purpose int

const (
	forBytes purpose = iota // the target of a redirect; what it sends is checked by digest
	forToken                // a token server, which gets the credentials
)

// allows is the rule for going from a registry in zone from to an address in
// zone to.
func (p purpose) allows(from, to zone) bool {
	switch to {
	case zonePublic:
		return true
	case zoneSpecial:
		return false
	case from:
		return true
	case zonePrivate:
		return p == forBytes
	}
	return false
}

// elsewhere returns the client for hosts that are not the registry: without
// its client certificate, and with the rule above applied to the address that
// is really dialled, so that no name can resolve around it.
func (h *host) elsewhere(ctx context.Context, p purpose, target string) (*http.Client, error) {
	if err := h.checkLiteral(p, target); err != nil {
		return nil, err
	}
	select {
	case h.lock <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	defer func() { <-h.lock }()
	return h.elsewhereLocked(p), nil
}

func (h *host) elsewhereLocked(p purpose) *http.Client {
	if h.away[p] != nil {
		return h.away[p]
	}
	tr, ok := h.Client.Transport.(*http.Transport)
	if ok {
		tr = tr.Clone()
	} else {
		tr = docker.DefaultHTTPTransport(nil)
	}
	c := &http.Client{Transport: tr}
	_ = h.client.cfg.client(c)
	if tr.TLSClientConfig != nil {
		tr.TLSClientConfig.Certificates = nil
		if p == forToken {
			tr.TLSClientConfig.InsecureSkipVerify = false
		}
	}
	dialer := net.Dialer{
		Timeout: connectTimeout, KeepAlive: 30 * time.Second,
		ControlContext: func(ctx context.Context, _, address string, _ syscall.RawConn) error {
			if viaProxy(ctx) {
				return nil // the proxy's address says nothing, and it has rules of its own
			}
			ap, err := netip.ParseAddrPort(address)
			if err != nil {
				return err
			}
			return h.checkZone(p, zoneOf(ap.Addr()))
		},
	}
	tr.DialContext = dialer.DialContext
	h.away[p] = c
	return c
}

type proxyKey struct{}

func viaProxy(ctx context.Context) bool { return ctx.Value(proxyKey{}) != nil }

// proxied reports whether a request goes through a proxy.
func proxied(c *http.Client, r *http.Request) bool {
	tr, ok := c.Transport.(*http.Transport)
	if !ok || tr.Proxy == nil {
		return false
	}
	u, err := tr.Proxy(r)
	return err == nil && u != nil
}

func (h *host) checkZone(p purpose, to zone) error {
	from := h.zone.get()
	if from == zoneUnknown {
		from = zonePublic
	}
	if p.allows(from, to) {
		return nil
	}
	return &policyError{fmt.Sprintf("its address is %s, the registry's is %s", to, from)}
}

// checkLiteral applies the rule to an address given as a number, which counts
// even when a proxy makes the connection.
func (h *host) checkLiteral(p purpose, target string) error {
	name := strings.ToLower(strings.Trim(target, "[]"))
	if name == "localhost" || strings.HasSuffix(name, ".localhost") {
		return h.checkZone(p, zoneLoopback)
	}
	if a, err := netip.ParseAddr(name); err == nil {
		return h.checkZone(p, zoneOf(a))
	}
	return nil
}

// policyError is a refusal of ours, not a failure of a host.
type policyError struct{ text string }

func (e *policyError) Error() string { return e.text }
