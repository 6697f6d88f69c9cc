package registry

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"

	"github.com/naru-project/naru/internal/errs"
)

const (
	maxHostsFile    = 1 << 20
	maxHeaderBytes  = 256 << 10
	connsPerHost    = 16
	connectTimeout  = 30 * time.Second
	tlsTimeout      = 10 * time.Second
	defaultHostsDir = "_default"
)

// hosts reads who serves domain, the mirrors first and the registry itself last.
func (c Config) hosts(ctx context.Context, domain string) ([]docker.RegistryHost, error) {
	dir, err := c.hostDir(domain)
	if err != nil {
		return nil, err
	}
	if dir != "" {
		if err := checkHostsFile(filepath.Join(dir, "hosts.toml")); err != nil {
			return nil, err
		}
	}
	opts := config.HostOptions{
		HostDir: func(string) (string, error) {
			if dir == "" {
				return "", errdefs.ErrNotFound
			}
			return dir, nil
		},
		DefaultScheme: "https",
		UpdateClient:  c.client,
	}
	if _, port, _ := net.SplitHostPort(domain); isLoopback(domain) && port != "" && port != "443" && !hasCerts(dir) {
		opts.DefaultScheme = "http"
	}
	found, err := config.ConfigureHosts(ctx, opts)(domain)
	if err != nil {
		return nil, errs.New(errs.FailedPrecondition, "read the registry configuration of %s: %w", domain, err)
	}
	return found, nil
}

// client sets what every client of a registry has: redirects come back to us,
// nothing is unpacked on the way, answers have bounds.
func (c Config) client(h *http.Client) error {
	h.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	h.Jar = nil
	tr, ok := h.Transport.(*http.Transport)
	if !ok {
		return fmt.Errorf("the transport is of type %T", h.Transport)
	}
	tr.DisableCompression = true
	tr.ResponseHeaderTimeout = c.HeaderTimeout
	tr.TLSHandshakeTimeout = tlsTimeout
	tr.MaxResponseHeaderBytes = maxHeaderBytes
	tr.MaxIdleConnsPerHost = connsPerHost
	return nil
}

// hostDir finds the folder of a registry: in every configured folder by the
// registry's name, then their defaults. The name has passed the reference
// grammar, which has neither "/" nor "..".
func (c Config) hostDir(domain string) (string, error) {
	if domain == "" || strings.ContainsAny(domain, "/\x00") || strings.HasPrefix(domain, ".") || domain == defaultHostsDir {
		return "", errs.New(errs.InvalidArgument, "read the registry configuration: %.100q is no registry name", domain)
	}
	names := []string{domain}
	if i := strings.LastIndex(domain, ":"); i > 0 {
		names = []string{domain[:i] + "_" + domain[i+1:] + "_", domain}
	}
	for _, name := range append(names, defaultHostsDir) {
		for _, root := range c.HostDirs {
			dir := filepath.Join(root, name)
			_, err := os.Stat(dir)
			if err == nil {
				return dir, nil
			}
			if !errors.Is(err, fs.ErrNotExist) {
				return "", errs.New(errs.FailedPrecondition, "read the registry configuration: %w", err)
			}
		}
	}
	return "", nil
}

func hasCerts(dir string) bool {
	if dir == "" {
		return false
	}
	list, err := os.ReadDir(dir)
	if err != nil {
		return false
	}
	for _, f := range list {
		if ext := filepath.Ext(f.Name()); ext == ".crt" || ext == ".cert" {
			return true
		}
	}
	return false
}

// hostsFile has the parts of hosts.toml that containerd's reader checks. That
// one goes on without a file it cannot read, and so without its mirrors and
// CAs; here it is an error that says where.
type hostsFile struct {
	hostEntry
	Server string               `toml:"server"`
	Host   map[string]hostEntry `toml:"host"`
}

type hostEntry struct {
	Capabilities []string       `toml:"capabilities"`
	CA           any            `toml:"ca"`
	Client       any            `toml:"client"`
	SkipVerify   *bool          `toml:"skip_verify"`
	Header       map[string]any `toml:"header"`
	OverridePath bool           `toml:"override_path"`
	DialTimeout  string         `toml:"dial_timeout"`
}

func checkHostsFile(path string) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return errs.New(errs.FailedPrecondition, "read the registry configuration: %w", err)
	}
	defer func() { _ = f.Close() }()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() || st.Size() > maxHostsFile {
		return errs.New(errs.FailedPrecondition, "read the registry configuration: %s is not a file of at most %d bytes", path, maxHostsFile)
	}
	data, err := os.ReadFile(path)
	if err == nil {
		err = checkHosts(data)
	}
	if err != nil {
		return errs.New(errs.FailedPrecondition, "read the registry configuration %s: %w", path, err)
	}
	return nil
}

func checkHosts(data []byte) error {
	var h hostsFile
	if err := toml.Unmarshal(data, &h); err != nil {
		return err
	}
	if err := h.check("server", h.Server); err != nil {
		return err
	}
	for name, e := range h.Host {
		if err := e.check("host", name); err != nil {
			return err
		}
	}
	return nil
}

func (e *hostEntry) check(what, addr string) error {
	if scheme, _, ok := strings.Cut(addr, "://"); ok && scheme != "http" && scheme != "https" {
		return fmt.Errorf("%s %q: the scheme must be http or https", what, addr)
	}
	for _, c := range e.Capabilities {
		switch strings.ToLower(c) {
		case "pull", "resolve", "push", "referrers":
		default:
			return fmt.Errorf("%s %q: unknown capability %q", what, addr, c)
		}
	}
	if !texts(e.CA, 1) || !texts(e.Client, 2) {
		return fmt.Errorf("%s %q: ca and client must be paths or lists of paths", what, addr)
	}
	for k, v := range e.Header {
		if !texts(v, 1) {
			return fmt.Errorf("%s %q: header %q must be text", what, addr, k)
		}
	}
	if e.DialTimeout != "" {
		if _, err := time.ParseDuration(e.DialTimeout); err != nil {
			return fmt.Errorf("%s %q: dial_timeout: %w", what, addr, err)
		}
	}
	return nil
}

// texts reports whether v is nothing, a text, or a list of such, depth lists deep.
func texts(v any, depth int) bool {
	switch v := v.(type) {
	case nil, string:
		return true
	case []any:
		for _, e := range v {
			if depth == 0 || e == nil || !texts(e, depth-1) {
				return false
			}
		}
		return depth > 0
	}
	return false
}
