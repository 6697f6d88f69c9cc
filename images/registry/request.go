package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strconv"
	"strings"
	"time"
)

const (
	maxRedirects = 10
	maxLogins    = 3 // answers to challenges per request
	maxRetries   = 2 // of the last host, when it says "later"
	retryWait    = 500 * time.Millisecond
	maxRetryWait = 5 * time.Second
)

var errSlow = errors.New("no complete answer in time")

// request is one GET or HEAD below the repository.
type request struct {
	method string
	path   []string // "manifests", "latest"
	accept string
	offset int64 // first byte wanted
}

// do sends a request to the host, logs in when asked to, follows redirects and
// returns an answer of 2xx; everything else is a hostError. last: no other
// host comes after this one, so it is worth trying again.
func (h *host) do(ctx context.Context, r request, last bool) (*http.Response, error) {
	for try := 0; ; try++ {
		resp, err := h.login(ctx, r)
		if err == nil {
			return resp, nil
		}
		var he *hostError
		if !last || try >= maxRetries || !errors.As(err, &he) || he.reason != unreachable || he.final || ctx.Err() != nil {
			return nil, err
		}
		wait := retryWait << try
		if resp != nil {
			wait = max(wait, retryAfter(resp))
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil, err
		}
	}
}

func retryAfter(resp *http.Response) time.Duration {
	n, err := strconv.Atoi(resp.Header.Get("Retry-After"))
	if err != nil || n < 0 {
		return 0
	}
	return min(time.Duration(min(n, 3600))*time.Second, maxRetryWait)
}

// login is one request with its answers to challenges. The response that goes
// with an error is closed and for its header only.
func (h *host) login(ctx context.Context, r request) (*http.Response, error) {
	for range maxLogins {
		state, err := h.authorization(ctx)
		if err != nil {
			return nil, h.transport(ctx, err)
		}
		resp, home, err := h.follow(ctx, r, state)
		switch {
		case err != nil:
			return nil, h.transport(ctx, err)
		case resp.StatusCode == http.StatusUnauthorized && home:
			drain(resp)
			if err := h.challenge(ctx, resp, state); err != nil {
				return nil, h.transport(ctx, err)
			}
		case resp.StatusCode < 200 || resp.StatusCode > 299:
			at := ""
			if !home {
				at = "redirected to " + resp.Request.URL.Host + ": "
			}
			return resp, h.status(resp, at)
		case !identity(resp):
			drain(resp)
			return nil, h.refuse("its answer has Content-Encoding %.40q, which was not asked for", resp.Header.Get("Content-Encoding"))
		default:
			return resp, nil
		}
	}
	return nil, h.deny("401 Unauthorized, again after logging in")
}

func identity(resp *http.Response) bool {
	e := resp.Header.Get("Content-Encoding")
	return e == "" || strings.EqualFold(e, "identity")
}

// drain reads what is left of a short answer, so that the connection can be
// used again.
func drain(resp *http.Response) {
	_, _ = io.CopyN(io.Discard, resp.Body, 4<<10)
	_ = resp.Body.Close()
}

// follow sends a request and follows redirects. home reports whether the
// answer is from the registry itself: once a redirect led away, nothing that
// is secret is sent any more, not even back home.
func (h *host) follow(ctx context.Context, r request, state authState) (resp *http.Response, home bool, err error) {
	u := h.url(r)
	home = true
	for range maxRedirects + 1 {
		resp, err = h.send(ctx, r, u, home, state)
		if err != nil {
			return nil, home, err
		}
		switch resp.StatusCode {
		case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther,
			http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		default:
			return resp, home, nil
		}
		location := resp.Header.Get("Location")
		drain(resp)
		if u, err = h.redirect(u, location); err != nil {
			return nil, home, err
		}
		home = home && sameOrigin(u, h)
	}
	return nil, home, h.refuse("more than %d redirects", maxRedirects)
}

func (h *host) url(r request) *url.URL {
	u := &url.URL{
		Scheme: h.Scheme, Host: h.Host,
		Path: strings.TrimSuffix(h.Path, "/") + "/" + h.client.repo + "/" + strings.Join(r.path, "/"),
	}
	if dockerAlias(h.Host) != dockerAlias(h.client.domain) { // a mirror may serve several registries
		u.RawQuery = url.Values{"ns": {h.client.domain}}.Encode()
	}
	return u
}

// redirect resolves a Location. Its text may be a signed URL: it is in no error.
func (h *host) redirect(from *url.URL, location string) (*url.URL, error) {
	u, err := from.Parse(location)
	switch {
	case location == "" || err != nil || u.Host == "":
		return nil, h.refuse("it redirects to something that is no URL")
	case u.User != nil:
		return nil, h.refuse("it redirects to a URL with a user name, at %s", u.Host)
	case u.Scheme != "https" && u.Scheme != "http":
		return nil, h.refuse("it redirects to a URL of scheme %.20q", u.Scheme)
	case from.Scheme == "https" && u.Scheme == "http":
		return nil, h.refuse("it redirects from https to http, at %s", u.Host)
	}
	u.Fragment = ""
	return u, nil
}

func (h *host) send(ctx context.Context, r request, u *url.URL, home bool, state authState) (*http.Response, error) {
	client := h.Client
	if !sameOrigin(u, h) {
		away, err := h.elsewhere(ctx, forBytes, u.Hostname())
		if err != nil {
			return nil, err
		}
		client = away
	}
	req, err := http.NewRequestWithContext(ctx, r.method, u.String(), nil)
	if err != nil {
		return nil, h.refuse("its address cannot be asked")
	}
	if home {
		for k, v := range h.Header { // may be secret too
			req.Header[http.CanonicalHeaderKey(k)] = v
		}
		if state.value != "" {
			req.Header.Set("Authorization", state.value)
		}
	}
	req.Header.Set("User-Agent", h.client.cfg.UserAgent)
	req.Header.Set("Accept-Encoding", "identity")
	if r.accept != "" {
		req.Header.Set("Accept", r.accept)
	}
	if r.offset > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", r.offset))
	}
	if proxied(client, req) {
		req = req.WithContext(context.WithValue(req.Context(), proxyKey{}, true))
	} else if home {
		req = req.WithContext(httptrace.WithClientTrace(req.Context(), &httptrace.ClientTrace{
			GotConn: func(i httptrace.GotConnInfo) { h.zone.note(i.Conn) },
		}))
	}
	return roundTrip(client, req)
}

// roundTrip is one request and its answer, whatever it is. http.Client would
// read Location first, and put it into its error when it cannot.
func roundTrip(c *http.Client, r *http.Request) (*http.Response, error) {
	tr := c.Transport
	if tr == nil {
		tr = http.DefaultTransport
	}
	return tr.RoundTrip(r)
}

// sameOrigin: scheme, host and port are those of the registry.
func sameOrigin(u *url.URL, h *host) bool {
	if u.Scheme != h.Scheme {
		return false
	}
	own := &url.URL{Scheme: h.Scheme, Host: h.Host}
	return strings.EqualFold(u.Hostname(), own.Hostname()) && port(u) == port(own)
}

func port(u *url.URL) string {
	if p := u.Port(); p != "" {
		return p
	}
	if u.Scheme == "http" {
		return "80"
	}
	return "443"
}
