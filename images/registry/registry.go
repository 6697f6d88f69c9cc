// Package registry talks to image registries: which hosts serve a name
// (hosts.toml), how to be let in, what a tag points to, and the bytes of
// manifests and layers.
//
// A registry is a stranger. It gets the caller's credentials only when it is
// the registry that the image's name says, over a connection that is as safe
// as configured; a mirror, a redirect's target or a token server of another
// kind of network does not. What it sends is measured against limits and
// digests here or by the reader. Its words reach errors shortened, without
// control characters and without anything that is secret.
//
// The hosts come from containerd's config package, so that the same hosts.toml
// files mean the same. The requests are made here, not by containerd's
// resolver: that one takes the answer's Content-Encoding off before the digest
// is checked, follows a challenge's realm anywhere, reads token answers
// without bound and reports one host's error only.
//
// Plain http is spoken only to hosts that hosts.toml gives an http:// address,
// and to registries on a loopback address or "localhost", whose traffic stays
// on the node (on port 443, or with certificates configured, those get TLS).
//
// It must not know about layers' folders or the store. A Client belongs to one
// pull; its methods may be called concurrently.
package registry

import (
	"context"
	"encoding/base64"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/distribution/reference"

	"github.com/naru-project/naru/internal/errs"
)

// Config says how registries are reached. Zero fields get the default.
type Config struct {
	// HostDirs are folders with hosts.toml files or certificates, per registry
	// (/etc/naru/certs.d/<host>/hosts.toml); the first that has the registry
	// wins, "_default" of each is asked after that.
	HostDirs  []string
	UserAgent string
	// ProgressTimeout ends a transfer that brings less than 64 KiB in this
	// time; default 5 minutes.
	ProgressTimeout time.Duration
	// HeaderTimeout is how long a host may think about an answer; default 30 s.
	HeaderTimeout time.Duration
	// TrustedRealms are hosts whose token servers may lie in a more private
	// network than the registry itself.
	TrustedRealms []string
}

func (c Config) orDefault() Config {
	if c.UserAgent == "" {
		c.UserAgent = "naru"
	}
	if c.ProgressTimeout <= 0 {
		c.ProgressTimeout = 5 * time.Minute
	}
	if c.HeaderTimeout <= 0 {
		c.HeaderTimeout = 30 * time.Second
	}
	return c
}

// Auth is how to be let in; see images.Auth.
type Auth struct {
	Username, Password, Auth     string
	ServerAddress                string
	IdentityToken, RegistryToken string
}

// credentials is Auth, read.
type credentials struct {
	user, password string
	identity       string
	bearer         string
	server         string // host that they are for; empty: that of the image's name
}

func (c *credentials) empty() bool {
	return c == nil || c.user == "" && c.password == "" && c.identity == "" && c.bearer == ""
}

func (a *Auth) read() (*credentials, error) {
	if a == nil {
		return nil, nil
	}
	c := &credentials{user: a.Username, password: a.Password, identity: a.IdentityToken, bearer: a.RegistryToken}
	if a.Auth != "" && c.user == "" && c.password == "" {
		raw, err := base64.StdEncoding.DecodeString(a.Auth)
		if err != nil {
			return nil, errs.New(errs.InvalidArgument, "read the credentials: auth is not base64")
		}
		user, password, ok := strings.Cut(string(raw), ":")
		if !ok {
			return nil, errs.New(errs.InvalidArgument, "read the credentials: auth is not user:password")
		}
		c.user, c.password = user, strings.Trim(password, "\x00")
	}
	for _, s := range []string{c.user, c.password, c.identity, c.bearer} {
		if strings.ContainsAny(s, "\r\n\x00") {
			return nil, errs.New(errs.InvalidArgument, "read the credentials: a line break is in them")
		}
	}
	c.server = serverHost(a.ServerAddress)
	return c, nil
}

// serverHost takes the host out of "https://index.docker.io/v1/" and the like.
func serverHost(s string) string {
	if _, rest, ok := strings.Cut(s, "://"); ok {
		s = rest
	}
	s, _, _ = strings.Cut(s, "/")
	return dockerAlias(strings.ToLower(s))
}

// dockerAlias: Docker Hub answers under several names.
func dockerAlias(host string) string {
	switch host {
	case "index.docker.io", "registry-1.docker.io":
		return "docker.io"
	}
	return host
}

// Client is the way to one repository, for one pull.
type Client struct {
	cfg    Config
	ref    string // for messages
	domain string
	repo   string
	creds  *credentials
	hosts  []*host
	hide   redactor
}

// host is one address that serves the repository.
type host struct {
	docker.RegistryHost
	client  *Client
	trusted bool // may see the credentials
	auth    authState
	zone    zoneBox
	away    [2]*http.Client // for other hosts, by purpose; made when first used
	lock    chan struct{}   // guards auth and away; held while a token is fetched
}

// Open reads the hosts that serve named. auth may be nil.
func (c Config) Open(ctx context.Context, named reference.Named, auth *Auth) (*Client, error) {
	creds, err := auth.read()
	if err != nil {
		return nil, err
	}
	cl := &Client{
		cfg: c.orDefault(), ref: named.String(), creds: creds,
		domain: reference.Domain(named), repo: reference.Path(named),
	}
	cl.hide.add(creds)
	found, err := cl.cfg.hosts(ctx, cl.domain)
	if err != nil {
		return nil, err
	}
	for i, h := range found {
		cl.hosts = append(cl.hosts, &host{
			RegistryHost: h, client: cl, lock: make(chan struct{}, 1),
			trusted: !creds.empty() && cl.trusts(h.Host, i == len(found)-1),
		})
	}
	return cl, nil
}

// trusts reports whether the credentials are for this host. last is the
// registry itself (hosts.toml: server), the others are mirrors.
func (c *Client) trusts(addr string, last bool) bool {
	addr = dockerAlias(strings.ToLower(addr))
	domain := dockerAlias(strings.ToLower(c.domain))
	own := addr == domain || last
	switch c.creds.server {
	case "":
		return own
	case addr:
		return true
	}
	return own && c.creds.server == domain
}

// Close drops idle connections.
func (c *Client) Close() {
	for _, h := range c.hosts {
		h.Client.CloseIdleConnections()
		for _, a := range h.away {
			if a != nil {
				a.CloseIdleConnections()
			}
		}
	}
}

// with returns the hosts that can do all of caps.
func (c *Client) with(caps docker.HostCapabilities) []*host {
	var out []*host
	for _, h := range c.hosts {
		if h.Capabilities.Has(caps) {
			out = append(out, h)
		}
	}
	return out
}

func isLoopback(addr string) bool {
	name := addr
	if h, _, err := net.SplitHostPort(addr); err == nil {
		name = h
	}
	name = strings.Trim(name, "[]")
	if name == "localhost" {
		return true
	}
	ip := net.ParseIP(name)
	return ip != nil && ip.IsLoopback()
}
