package registry

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"

	"github.com/containerd/containerd/v2/core/remotes/docker/auth"
)

const (
	maxChallenges = 16
	maxTokenBody  = 1 << 20
	maxToken      = 64 << 10
	maxRealm      = 4 << 10
)

// authState is how a host lets us in: the value of the Authorization header,
// and how often it changed.
type authState struct {
	value      string
	generation int
}

// authorization returns the header to send, and its generation. A registry
// token is sent unasked, everything else after a challenge.
func (h *host) authorization(ctx context.Context) (authState, error) {
	select {
	case h.lock <- struct{}{}:
	case <-ctx.Done():
		return authState{}, context.Cause(ctx)
	}
	defer func() { <-h.lock }()
	if h.auth.generation == 0 && h.trusted && h.client.creds.bearer != "" {
		h.auth = authState{value: "Bearer " + h.client.creds.bearer, generation: 1}
	}
	return h.auth, nil
}

// challenge answers a 401 to a request that was sent with state used. Requests
// that got their 401 at the same time share one token.
func (h *host) challenge(ctx context.Context, resp *http.Response, used authState) error {
	select {
	case h.lock <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	defer func() { <-h.lock }()
	if h.auth.generation != used.generation {
		return nil
	}
	value, err := h.answer(ctx, resp)
	if err != nil {
		return err
	}
	h.auth = authState{value: value, generation: h.auth.generation + 1}
	return nil
}

func (h *host) answer(ctx context.Context, resp *http.Response) (string, error) {
	creds := h.client.creds
	if h.trusted && creds.bearer != "" {
		return "", h.deny("the registry token is not accepted")
	}
	list := auth.ParseAuthHeader(resp.Header)
	if len(list) > maxChallenges {
		list = list[:maxChallenges]
	}
	for _, c := range list {
		switch c.Scheme {
		case auth.BearerAuth:
			return h.token(ctx, c)
		case auth.BasicAuth:
			if !h.trusted || creds.user == "" && creds.password == "" {
				return "", h.deny("401 Unauthorized: it asks for a password, and none is known for it")
			}
			if strings.HasPrefix(h.auth.value, "Basic ") {
				return "", h.deny("401 Unauthorized: user name and password are not accepted")
			}
			return "Basic " + basic(creds), nil
		}
	}
	return "", h.deny("401 Unauthorized, without a way to log in that is known here")
}

func basic(c *credentials) string {
	return base64.StdEncoding.EncodeToString([]byte(c.user + ":" + c.password))
}

func (h *host) deny(format string, args ...any) error {
	return &hostError{host: h.Host, reason: denied, text: h.client.hide.clean(fmt.Sprintf(format, args...))}
}

func (h *host) refuse(format string, args ...any) error {
	return &hostError{host: h.Host, reason: refused, text: h.client.hide.clean(fmt.Sprintf(format, args...))}
}

// token gets a bearer token from the server that the challenge names.
func (h *host) token(ctx context.Context, c auth.Challenge) (string, error) {
	realm, client, err := h.realm(c.Parameters["realm"])
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, 2*h.client.cfg.HeaderTimeout, errSlow)
	defer cancel()
	req, err := h.tokenRequest(ctx, realm, c)
	if err != nil {
		return "", err
	}
	if proxied(client, req) {
		req = req.WithContext(context.WithValue(req.Context(), proxyKey{}, true))
	}
	resp, err := roundTrip(client, req)
	if err != nil {
		he := h.transport(ctx, err)
		return "", &hostError{host: he.host, reason: he.reason, text: h.client.hide.clean("token server " + realm.Host + ": " + he.text)}
	}
	if resp.StatusCode != http.StatusOK {
		he := h.status(resp, "token server "+realm.Host+": ")
		if he.reason != unreachable {
			he.reason = denied
		}
		return "", he
	}
	defer func() { _ = resp.Body.Close() }()
	t, err := readToken(resp.Body)
	if err != nil {
		return "", h.refuse("token server %s: %v", realm.Host, err)
	}
	h.client.hide.addOne(t)
	return "Bearer " + t, nil
}

// realm decides whether a challenge's token server may be asked. The registry
// names it, so the name alone is worth nothing: it must be as safe as the
// registry's own connection and in no network that the registry is not in.
func (h *host) realm(raw string) (*url.URL, *http.Client, error) {
	if raw == "" || len(raw) > maxRealm {
		return nil, nil, h.refuse("its challenge names no token server")
	}
	u, err := url.Parse(raw)
	if err != nil || u.Host == "" || u.User != nil || u.Opaque != "" {
		return nil, nil, h.refuse("its challenge names a token server by something that is no plain URL")
	}
	u.Fragment = ""
	switch {
	case u.Scheme == "https":
	case u.Scheme == "http" && h.Scheme == "http":
	default:
		return nil, nil, h.refuse("its token server %s is not reached by https", u.Host)
	}
	if sameOrigin(u, h) {
		return u, h.Client, nil
	}
	for _, t := range h.client.cfg.TrustedRealms {
		if strings.EqualFold(t, u.Host) || strings.EqualFold(t, u.Hostname()) {
			return u, h.Client, nil
		}
	}
	if err := h.checkLiteral(forToken, u.Hostname()); err != nil {
		return nil, nil, h.refuse("its token server %s is not asked: %v", u.Host, err)
	}
	return u, h.elsewhereLocked(forToken), nil
}

func (h *host) tokenRequest(ctx context.Context, realm *url.URL, c auth.Challenge) (*http.Request, error) {
	creds := h.client.creds
	if !h.trusted {
		creds = nil
	}
	service := c.Parameters["service"]
	if len(service) > 1024 {
		return nil, h.refuse("its challenge names a service of %d bytes", len(service))
	}
	scopes := scopesOf(c.Parameters["scope"], h.client.repo)
	u := *realm
	var (
		req *http.Request
		err error
	)
	if creds != nil && creds.identity != "" { // OAuth2, as the distribution project's docs/spec/auth/oauth.md has it
		form := url.Values{
			"grant_type": {"refresh_token"}, "refresh_token": {creds.identity}, "service": {service},
			"client_id": {h.client.cfg.UserAgent}, "scope": {strings.Join(scopes, " ")},
		}
		req, err = http.NewRequestWithContext(ctx, http.MethodPost, u.String(), strings.NewReader(form.Encode()))
		if err == nil {
			req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		}
	} else {
		q := u.Query()
		if service != "" {
			q.Set("service", service)
		}
		q["scope"] = scopes
		u.RawQuery = q.Encode()
		req, err = http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
		if err == nil && !creds.empty() {
			req.Header.Set("Authorization", "Basic "+basic(creds))
		}
	}
	if err != nil {
		return nil, h.refuse("its challenge names a token server that cannot be asked")
	}
	req.Header.Set("User-Agent", h.client.cfg.UserAgent)
	if sameOrigin(realm, h) {
		for k, v := range h.Header {
			req.Header[http.CanonicalHeaderKey(k)] = v
		}
	}
	return req, nil
}

// scopesOf asks for reading this repository and nothing else, whatever the
// challenge wants. A mirror may keep the repository under a prefix; its own
// name for it is taken then.
func scopesOf(challenge, repo string) []string {
	var out []string
	for _, s := range strings.Fields(challenge) {
		name, ok := strings.CutPrefix(s, "repository:")
		if i := strings.LastIndex(name, ":"); ok && i > 0 && len(out) < 4 {
			name = name[:i]
			if name == repo || strings.HasSuffix(name, "/"+repo) {
				out = append(out, "repository:"+name+":pull")
			}
		}
	}
	if out == nil {
		out = []string{"repository:" + repo + ":pull"}
	}
	return out
}

func readToken(r io.Reader) (string, error) {
	data, err := io.ReadAll(io.LimitReader(r, maxTokenBody+1))
	if err != nil {
		return "", fmt.Errorf("the answer breaks off")
	}
	if len(data) > maxTokenBody {
		return "", fmt.Errorf("the answer has more than %d bytes", maxTokenBody)
	}
	var doc struct {
		Token       string `json:"token"`
		AccessToken string `json:"access_token"`
	}
	if json.Unmarshal(data, &doc) != nil {
		return "", fmt.Errorf("the answer is not the JSON of a token")
	}
	t := doc.AccessToken
	if t == "" {
		t = doc.Token
	}
	if t == "" || len(t) > maxToken {
		return "", fmt.Errorf("the answer has no token of at most %d bytes", maxToken)
	}
	for i := range len(t) {
		if t[i] <= ' ' || t[i] > '~' {
			return "", fmt.Errorf("the token has characters that no header takes")
		}
	}
	return t, nil
}
