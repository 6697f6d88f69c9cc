package registry

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/naru-project/naru/images/internal/regtest"
	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/testhost"
)

func TestMain(m *testing.M) { os.Exit(regtest.Main(m)) }

const canary = "p4ssw0rd-canary"

type setup struct {
	t   testing.TB
	cfg Config
}

func newSetup(t testing.TB) *setup {
	return &setup{t, Config{HostDirs: []string{t.TempDir()}, HeaderTimeout: time.Second, ProgressTimeout: time.Second}}
}

// hostsFile writes hosts.toml for a registry name.
func (s *setup) hostsFile(name, text string, files map[string][]byte) {
	s.t.Helper()
	dir := filepath.Join(s.cfg.HostDirs[0], strings.ReplaceAll(name, ":", "_")+map[bool]string{true: "_"}[strings.Contains(name, ":")])
	if err := os.MkdirAll(dir, 0o755); err != nil {
		s.t.Fatal(err)
	}
	if text != "" {
		files = merge(files, "hosts.toml", []byte(text))
	}
	for n, data := range files {
		if err := os.WriteFile(filepath.Join(dir, n), data, 0o600); err != nil {
			s.t.Fatal(err)
		}
	}
}

func merge(m map[string][]byte, k string, v []byte) map[string][]byte {
	out := map[string][]byte{k: v}
	for k, v := range m {
		out[k] = v
	}
	return out
}

func (s *setup) open(ref string, auth *Auth) *Client {
	s.t.Helper()
	n, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		s.t.Fatal(err)
	}
	c, err := s.cfg.Open(context.Background(), n, auth)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(c.Close)
	return c
}

func (s *setup) resolve(ref string, auth *Auth) (Manifest, error) {
	s.t.Helper()
	_, tag, _ := strings.Cut(ref, "@")
	if tag == "" {
		tag = ref[strings.LastIndex(ref, ":")+1:]
	}
	return s.open(ref, auth).Resolve(s.t.Context(), tag, nil)
}

func wantErr(t testing.TB, err error, class errs.Class, parts ...string) {
	t.Helper()
	if err == nil || errs.Of(err) != class {
		t.Errorf("want %v, got %v: %v", class, errs.Of(err), err)
		return
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("%q is not in: %v", p, err)
		}
	}
	if strings.Contains(err.Error(), canary) {
		t.Errorf("a secret is in: %v", err)
	}
}

func basicOnly(user, pass string) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		if u, p, ok := r.BasicAuth(); ok && u == user && p == pass {
			return false
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	}
}

func TestBasicAuthForms(t *testing.T) {
	reg := regtest.New(t)
	img := reg.Build("app", "v1", nil)
	reg.SetHook(basicOnly("joe", canary))
	s := newSetup(t)
	ref := reg.Host() + "/app:v1"
	for name, a := range map[string]*Auth{
		"user and password":  {Username: "joe", Password: canary},
		"base64":             {Auth: "am9lOnA0c3N3MHJkLWNhbmFyeQ=="},
		"for this server":    {Username: "joe", Password: canary, ServerAddress: "https://" + reg.Host() + "/v1/"},
		"for this server, 2": {Username: "joe", Password: canary, ServerAddress: reg.Host()},
	} {
		if m, err := s.resolve(ref, a); err != nil || m.Digest != img.Manifest.Digest {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, err := s.resolve(ref, nil)
	wantErr(t, err, errs.FailedPrecondition, "access denied", reg.Host(), "asks for a password")
	_, err = s.resolve(ref, &Auth{Username: "joe", Password: "wrong" + canary})
	wantErr(t, err, errs.FailedPrecondition, "not accepted")
	reg.Requests()
	_, err = s.resolve(ref, &Auth{Username: "joe", Password: canary, ServerAddress: "other.example"})
	wantErr(t, err, errs.FailedPrecondition, "access denied")
	for _, r := range reg.Requests() {
		if r.Authorization != "" {
			t.Error("credentials for another server were sent")
		}
	}
	n, _ := reference.ParseNormalizedNamed("x/y")
	for _, a := range []*Auth{{Auth: "%%%"}, {Auth: "am9l"}, {Username: "a", Password: "x\r\ny"}, {RegistryToken: "a\nb"}} {
		_, err := s.cfg.Open(t.Context(), n, a)
		wantErr(t, err, errs.InvalidArgument)
	}
}

// tokenServer is a token server of the distribution spec; the registry asks it.
func tokenServer(t testing.TB, handler http.HandlerFunc) *httptest.Server {
	srv := httptest.NewServer(handler)
	t.Cleanup(srv.Close)
	return srv
}

func bearerHook(realm, token string) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		if r.Header.Get("Authorization") == "Bearer "+token {
			return false
		}
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm=%q,service="reg",scope="repository:app:pull,push registry:catalog:* repository:other:pull"`, realm))
		w.WriteHeader(http.StatusUnauthorized)
		return true
	}
}

func TestBearer(t *testing.T) {
	reg := regtest.New(t)
	reg.Build("app", "v1", nil)
	s := newSetup(t)
	ref := reg.Host() + "/app:v1"
	ts := tokenServer(t, func(w http.ResponseWriter, r *http.Request) {
		if err := r.ParseForm(); err != nil {
			t.Error(err)
		}
		if got := strings.Join(r.Form["scope"], "|"); got != "repository:app:pull" || r.Form.Get("service") != "reg" {
			t.Errorf("scope %q, service %q", got, r.Form.Get("service"))
		}
		user, pass, _ := r.BasicAuth()
		switch {
		case r.Method == http.MethodGet && user == "joe" && pass == canary:
		case r.Method == http.MethodPost && r.Form.Get("grant_type") == "refresh_token" && r.Form.Get("refresh_token") == canary:
		default:
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		_, _ = io.WriteString(w, `{"token":"good-token","expires_in":-1}`)
	})
	reg.SetHook(bearerHook(ts.URL+"/token", "good-token"))
	for name, a := range map[string]*Auth{
		"password": {Username: "joe", Password: canary}, "identity token": {IdentityToken: canary},
		"registry token": {RegistryToken: "good-token"},
	} {
		if _, err := s.resolve(ref, a); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, err := s.resolve(ref, nil)
	wantErr(t, err, errs.FailedPrecondition, "access denied", "token server")
	_, err = s.resolve(ref, &Auth{Username: "joe", Password: "bad"})
	wantErr(t, err, errs.FailedPrecondition, "access denied", "401")
	_, err = s.resolve(ref, &Auth{RegistryToken: canary})
	wantErr(t, err, errs.FailedPrecondition, "registry token is not accepted")
	// A token that never helps must not lead round in circles.
	reg.SetHook(bearerHook(ts.URL, "another"))
	reg.Requests()
	_, err = s.resolve(ref, &Auth{Username: "joe", Password: canary})
	wantErr(t, err, errs.FailedPrecondition, "again after logging in")
	if n := len(reg.Requests()); n > 6 {
		t.Errorf("%d requests", n)
	}
}

func TestTokenAnswers(t *testing.T) {
	reg := regtest.New(t)
	reg.Build("app", "v1", nil)
	s := newSetup(t)
	for name, body := range map[string]string{
		"no JSON": "<html>", "no token": "{}", "huge": `{"token":"` + strings.Repeat("x", 2<<20) + `"}`,
		"long": `{"token":"` + strings.Repeat("x", 100<<10) + `"}`, "header break": `{"token":"a\r\nX-Evil: 1"}`, "number": `{"token":1}`,
	} {
		ts := tokenServer(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, body) })
		reg.SetHook(bearerHook(ts.URL, "x"))
		_, err := s.resolve(reg.Host()+"/app:v1", &Auth{Username: "joe", Password: canary})
		if err == nil {
			t.Errorf("%s: accepted", name)
		}
		wantErr(t, err, errs.FailedPrecondition, "token server")
	}
	// A token server that redirects would take the password with it.
	evil := tokenServer(t, func(http.ResponseWriter, *http.Request) { t.Error("followed a redirect of the token server") })
	ts := tokenServer(t, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, evil.URL, http.StatusTemporaryRedirect)
	})
	reg.SetHook(bearerHook(ts.URL, "x"))
	_, err := s.resolve(reg.Host()+"/app:v1", &Auth{Username: "joe", Password: canary})
	wantErr(t, err, errs.FailedPrecondition)
	stuck := make(chan struct{})
	ts = tokenServer(t, func(http.ResponseWriter, *http.Request) { <-stuck })
	defer close(stuck)
	reg.SetHook(bearerHook(ts.URL, "x"))
	start := time.Now()
	_, err = s.resolve(reg.Host()+"/app:v1", nil)
	wantErr(t, err, errs.Unavailable)
	if time.Since(start) > testhost.Limit(15*time.Second) {
		t.Errorf("a token server that never answers held the pull for %s", time.Since(start))
	}
}

func TestRealmPolicy(t *testing.T) {
	// A TLS registry: its token server must have TLS too.
	ca := regtest.NewCA(t)
	cert, _, _ := ca.Leaf(t, nil)
	reg := regtest.Make()
	reg.ServeTLS(t, &tls.Config{Certificates: []tls.Certificate{cert}})
	reg.Build("app", "v1", nil)
	s := newSetup(t)
	s.hostsFile(reg.Host(), fmt.Sprintf("server = %q\nca = \"ca.pem\"\n", reg.URL), map[string][]byte{"ca.pem": ca.PEM})
	asked := false
	plain := tokenServer(t, func(http.ResponseWriter, *http.Request) { asked = true })
	for _, realm := range []string{
		plain.URL, "http://169.254.169.254/latest/meta-data/", "https://169.254.169.254/", "https://10.0.0.1/", "https://[fe80::1]/",
		"https://0.0.0.0/", "https://[::]/", "https://224.0.0.1/", "file:///etc/passwd", "gopher://127.0.0.1/", "//x", "", "::",
		"https://user:pw@127.0.0.1/", "https://" + strings.Repeat("a", 5000), "unix:///run/x.sock",
	} {
		reg.SetHook(bearerHook(realm, "x"))
		_, err := s.resolve(reg.Host()+"/app:v1", &Auth{Username: "joe", Password: canary})
		if err == nil || errs.Of(err) != errs.FailedPrecondition {
			t.Errorf("%s: %v", realm, err)
		}
		wantErr(t, err, errs.FailedPrecondition)
	}
	if asked {
		t.Error("a token server without TLS was asked by a registry with TLS")
	}
	reg.SetHook(func(w http.ResponseWriter, _ *http.Request) bool { // a hundred challenges
		for range 100 {
			w.Header().Add("WWW-Authenticate", `Digest realm="x"`)
		}
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
	_, err := s.resolve(reg.Host()+"/app:v1", &Auth{Username: "joe", Password: canary})
	wantErr(t, err, errs.FailedPrecondition, "log in")
	reg.SetHook(func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("WWW-Authenticate", `Bearer realm="`+strings.Repeat("x", 1<<20)+`"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
	if _, err := s.resolve(reg.Host()+"/app:v1", nil); err == nil {
		t.Error("a header of 1 MiB is accepted")
	}
}

func TestZones(t *testing.T) {
	for _, c := range []struct {
		p        purpose
		from, to zone
		ok       bool
	}{
		{forToken, zonePublic, zonePublic, true}, {forToken, zonePublic, zonePrivate, false}, {forToken, zonePublic, zoneLoopback, false},
		{forToken, zonePublic, zoneLinkLocal, false}, {forToken, zonePrivate, zonePrivate, true}, {forToken, zonePrivate, zonePublic, true},
		{forToken, zonePrivate, zoneLoopback, false}, {forToken, zoneLoopback, zoneLoopback, true}, {forToken, zoneLoopback, zoneLinkLocal, false},
		{forToken, zoneSpecial, zoneSpecial, false},
		{forBytes, zonePublic, zonePrivate, true}, {forBytes, zonePublic, zoneLoopback, false}, {forBytes, zonePublic, zoneLinkLocal, false},
		{forBytes, zonePrivate, zoneLinkLocal, false},
	} {
		if c.p.allows(c.from, c.to) != c.ok {
			t.Errorf("%d from %v to %v", c.p, c.from, c.to)
		}
	}
	// What is really dialled counts, not the name.
	srv := httptest.NewServer(http.NotFoundHandler())
	defer srv.Close()
	s := newSetup(t)
	c := s.open("registry.example/app", nil)
	h := c.hosts[0]
	h.zone.set(zonePublic)
	client, err := h.elsewhere(t.Context(), forToken, "innocent.example")
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Get(srv.URL)
	if err == nil {
		_ = resp.Body.Close()
	}
	var pe *policyError
	if !errors.As(err, &pe) {
		t.Errorf("dialled a loopback address for a public registry: %v", err)
	}
	if _, err := h.elsewhere(t.Context(), forBytes, "localhost"); !errors.As(err, &pe) {
		t.Error(err)
	}
	h.zone.set(zoneLoopback)
	resp, err = client.Get(srv.URL)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	client.CloseIdleConnections()
}

func TestRedirects(t *testing.T) {
	reg := regtest.New(t)
	reg.Build("app", "v1", nil)
	blob := []byte(strings.Repeat("layer", 1000))
	d := ocispec.Descriptor{Digest: reg.PutBlob(blob), Size: int64(len(blob))}
	other := regtest.New(t)
	other.PutBlob(blob)
	s := newSetup(t)
	s.hostsFile(reg.Host(), fmt.Sprintf("server = %q\n[header]\n  x-secret = %q\n", reg.URL, canary), nil)
	auth := &Auth{Username: "joe", Password: canary}
	read := func() ([]byte, error) {
		rc, err := s.open(reg.Host()+"/app", auth).Blob(t.Context(), d, nil)
		if err != nil {
			return nil, err
		}
		defer func() { _ = rc.Close() }()
		return io.ReadAll(rc)
	}
	to := func(location string) {
		login := basicOnly("joe", canary)
		reg.SetHook(func(w http.ResponseWriter, r *http.Request) bool {
			if r.URL.Query().Get("home") != "" {
				return false
			}
			if login(w, r) {
				return true
			}
			w.Header().Set("Location", location)
			w.WriteHeader(http.StatusTemporaryRedirect)
			return true
		})
	}
	to(other.URL + "/v2/app/blobs/" + d.Digest.String() + "?X-Signature=" + canary)
	if data, err := read(); err != nil || string(data) != string(blob) {
		t.Fatal(err)
	}
	for _, r := range other.Requests() {
		if r.Authorization != "" || r.Header.Get("x-secret") != "" || r.Header.Get("Cookie") != "" {
			t.Errorf("secrets went to another host: %+v", r)
		}
	}
	// Away and back: home again, but not trusted any more.
	other.SetHook(func(w http.ResponseWriter, r *http.Request) bool {
		http.Redirect(w, r, reg.URL+"/v2/app/blobs/"+d.Digest.String()+"?home=1", http.StatusFound)
		return true
	})
	reg.Requests()
	if _, err := read(); err != nil {
		t.Fatal(err)
	}
	for _, r := range reg.Requests() {
		if r.Query != "" && r.Authorization != "" {
			t.Error("credentials were sent after a foreign redirect")
		}
	}
	// The target asks for a password: it gets none, and the signature is in no message.
	other.SetHook(func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("WWW-Authenticate", `Basic realm="evil"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
	_, err := read()
	wantErr(t, err, errs.FailedPrecondition, "redirected to "+other.Host(), "401")
	for _, r := range other.Requests() {
		if r.Authorization != "" {
			t.Error("credentials went to another host")
		}
	}
	for _, bad := range []string{"", "::", "http://user:" + canary + "@" + other.Host() + "/", "file:///etc/passwd", "http://169.254.169.254/x", "http://0.0.0.0/",
		"http://[fe80::1]/", "http://" + canary + " /"} {
		to(bad)
		_, err := read()
		wantErr(t, err, errs.FailedPrecondition)
	}
	to(reg.URL + "/v2/app/blobs/" + d.Digest.String()) // to itself, for ever
	reg.Requests()
	_, err = read()
	wantErr(t, err, errs.FailedPrecondition, "redirects")
	if n := len(reg.Requests()); n > 13 {
		t.Errorf("%d requests", n)
	}
	dead := "http://127.0.0.1:1/x?X-Signature=" + canary
	to(dead)
	_, err = read()
	wantErr(t, err, errs.Unavailable, UnavailablePrefix)
}

func TestTLS(t *testing.T) {
	ca := regtest.NewCA(t)
	good, _, _ := ca.Leaf(t, nil)
	_, clientCert, clientKey := ca.Leaf(t, nil)
	pool := x509.NewCertPool()
	pool.AddCert(ca.Cert)
	serve := func(cfg *tls.Config) *regtest.Registry {
		reg := regtest.Make()
		reg.ServeTLS(t, cfg)
		reg.Build("app", "v1", nil)
		reg.SetHook(func(_ http.ResponseWriter, r *http.Request) bool { return false })
		return reg
	}
	auth := &Auth{RegistryToken: canary} // would be sent with the first request
	withCA := func(s *setup, reg *regtest.Registry, more string) {
		s.hostsFile(reg.Host(), fmt.Sprintf("server = %q\nca = \"ca.pem\"\n%s", reg.URL, more),
			map[string][]byte{"ca.pem": ca.PEM, "c.pem": clientCert, "k.pem": clientKey})
	}
	t.Run("CA", func(t *testing.T) {
		s, reg := newSetup(t), serve(&tls.Config{Certificates: []tls.Certificate{good}})
		withCA(s, reg, "")
		if _, err := s.resolve(reg.Host()+"/app:v1", auth); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("docker's certificate folder", func(t *testing.T) {
		s, reg := newSetup(t), serve(&tls.Config{Certificates: []tls.Certificate{good}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert})
		s.hostsFile(reg.Host(), "", map[string][]byte{"ca.crt": ca.PEM, "client.cert": clientCert, "client.key": clientKey})
		if _, err := s.resolve(reg.Host()+"/app:v1", auth); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("client certificate", func(t *testing.T) {
		s, reg := newSetup(t), serve(&tls.Config{Certificates: []tls.Certificate{good}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert})
		withCA(s, reg, "client = [[\"c.pem\", \"k.pem\"]]\n")
		if _, err := s.resolve(reg.Host()+"/app:v1", auth); err != nil {
			t.Fatal(err)
		}
		s = newSetup(t)
		withCA(s, reg, "")
		_, err := s.resolve(reg.Host()+"/app:v1", auth)
		wantErr(t, err, errs.Unavailable, UnavailablePrefix)
	})
	t.Run("skip_verify", func(t *testing.T) {
		s, reg := newSetup(t), serve(&tls.Config{Certificates: []tls.Certificate{good}})
		s.hostsFile(reg.Host(), fmt.Sprintf("server = %q\nskip_verify = true\n", reg.URL), nil)
		if _, err := s.resolve(reg.Host()+"/app:v1", auth); err != nil {
			t.Fatal(err)
		}
	})
	bad := func(change func(*x509.Certificate)) tls.Certificate { c, _, _ := ca.Leaf(t, change); return c }
	for name, cfg := range map[string]*tls.Config{
		"unknown CA": {Certificates: []tls.Certificate{good}},
		"expired":    {Certificates: []tls.Certificate{bad(func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })}},
		"wrong name": {Certificates: []tls.Certificate{bad(func(c *x509.Certificate) {
			c.IPAddresses, c.DNSNames = []net.IP{net.IPv4(127, 0, 0, 9)}, []string{"other.example"}
		})}},
		"TLS 1.0": {Certificates: []tls.Certificate{good}, MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS10}, //nolint:gosec // on purpose
	} {
		t.Run(name, func(t *testing.T) {
			s, reg := newSetup(t), serve(cfg)
			if name == "unknown CA" {
				s.hostsFile(reg.Host(), fmt.Sprintf("server = %q\n", reg.URL), nil)
			} else {
				withCA(s, reg, "")
			}
			_, err := s.resolve(reg.Host()+"/app:v1", auth)
			wantErr(t, err, errs.Unavailable, UnavailablePrefix, "tls")
			if n := len(reg.Requests()); n != 0 {
				t.Errorf("%d requests got through", n)
			}
		})
	}
	t.Run("http where https is due", func(t *testing.T) {
		s, reg := newSetup(t), regtest.New(t)
		reg.Build("app", "v1", nil)
		s.hostsFile(reg.Host(), fmt.Sprintf("server = %q\n", "https://"+reg.Host()), nil)
		_, err := s.resolve(reg.Host()+"/app:v1", auth)
		wantErr(t, err, errs.Unavailable, UnavailablePrefix)
		if n := len(reg.Requests()); n != 0 {
			t.Errorf("%d requests without TLS", n)
		}
	})
}

func TestDefaultSchemes(t *testing.T) {
	s := newSetup(t)
	for domain, want := range map[string]string{
		"docker.io": "https registry-1.docker.io", "registry.example": "https registry.example", "registry.example:5000": "https registry.example:5000",
		"10.0.0.1:5000": "https 10.0.0.1:5000", "localhost:5000": "http localhost:5000", "127.0.0.1:5000": "http 127.0.0.1:5000",
		"[::1]:5000": "http [::1]:5000", "localhost": "https localhost", "127.0.0.1:443": "https 127.0.0.1:443", "localhost.evil.example:5000": "https localhost.evil.example:5000",
	} {
		hosts, err := s.cfg.hosts(t.Context(), domain)
		if err != nil || len(hosts) != 1 || hosts[0].Scheme+" "+hosts[0].Host != want {
			t.Errorf("%s: %+v %v", domain, hosts, err)
		}
		if tr, ok := hosts[0].Client.Transport.(*http.Transport); !ok || tr.TLSClientConfig.InsecureSkipVerify {
			t.Errorf("%s: certificates are not verified", domain)
		}
	}
	for _, bad := range []string{"", "..", "../x", "a/b", "_default", ".hidden", "x\x00"} {
		if _, err := s.cfg.hostDir(bad); err == nil {
			t.Errorf("%q accepted", bad)
		}
	}
}

func TestMirrors(t *testing.T) {
	up, mirror := regtest.New(t), regtest.New(t)
	img := up.Build("lib/app", "v1", nil)
	s := newSetup(t)
	name := "registry.example"
	file := func(text string) { s.hostsFile(name, text, nil) }
	both := fmt.Sprintf("server = %q\n[host.%q]\n", up.URL, mirror.URL)
	auth := &Auth{Username: "joe", Password: canary}
	ref := name + "/lib/app:v1"
	ok := func(what string) {
		t.Helper()
		if m, err := s.resolve(ref, auth); err != nil || m.Digest != img.Manifest.Digest {
			t.Errorf("%s: %v", what, err)
		}
	}
	file(both)
	ok("mirror has it not")
	if n := mirror.Count("GET /v2/lib/app/manifests/v1"); n != 1 {
		t.Errorf("the mirror was asked %d times", n)
	}
	for _, r := range mirror.Requests() {
		if r.Query != "ns=registry.example" || r.Authorization != "" {
			t.Errorf("%+v", r)
		}
	}
	mirror.SetHook(func(w http.ResponseWriter, _ *http.Request) bool {
		w.WriteHeader(http.StatusServiceUnavailable)
		return true
	})
	start := time.Now()
	ok("mirror is ill")
	if time.Since(start) > testhost.Limit(time.Second) {
		t.Error("waited for an ill mirror")
	}
	mirror.SetHook(basicOnly("joe", canary))
	mirror.Requests()
	ok("mirror wants a password")
	for _, r := range mirror.Requests() {
		if r.Authorization != "" {
			t.Error("the registry's password went to a mirror")
		}
	}
	up.SetHook(basicOnly("joe", canary)) // the server that hosts.toml names is the registry itself
	ok("server wants the password")
	up.SetHook(nil)
	file(fmt.Sprintf("server = %q\n[host.\"http://127.0.0.1:1\"]\n", up.URL))
	ok("mirror is down")

	mirror.SetHook(nil)
	img2 := mirror.Build("lib/app", "v1", nil, regtest.Gzip(regtest.Tar()))
	file(both)
	if m, err := s.resolve(ref, nil); err != nil || m.Digest != img2.Manifest.Digest {
		t.Error("mirror first: ", err)
	}
	file(fmt.Sprintf("server = %q\n[host.%q]\n  capabilities = [\"pull\"]\n", up.URL, mirror.URL))
	ok("mirror may not resolve tags")
	if m, err := s.resolve(name+"/lib/app@"+img2.Manifest.Digest.String(), nil); err != nil || m.Digest != img2.Manifest.Digest {
		t.Error("but digests: ", err)
	}
	mirror.PutManifestAs("proxy/lib/app", "v1", img.Manifest.MediaType, regtest.JSON(img.Doc))
	file(fmt.Sprintf("server = %q\n[host.\"%s/v2/proxy\"]\n  override_path = true\n  [host.\"%s/v2/proxy\".header]\n    x-key = \"1\"\n", up.URL, mirror.URL, mirror.URL))
	mirror.Requests()
	ok("override_path")
	for _, r := range mirror.Requests() {
		if r.Path != "/v2/proxy/lib/app/manifests/v1" || r.Header.Get("X-Key") != "1" {
			t.Errorf("%+v", r)
		}
	}
	// The order in the file counts, and the file is read each time.
	file(fmt.Sprintf("[host.%q]\n[host.%q]\n", up.URL, mirror.URL))
	ok("order")

	up.Close()
	mirror.Close()
	file(both)
	_, err := s.resolve(ref, auth)
	wantErr(t, err, errs.Unavailable, up.Host(), mirror.Host(), "connection refused", ref)
	if !strings.HasPrefix(err.Error(), "RegistryUnavailable") {
		t.Error(err)
	}
	for what, text := range map[string]string{
		"syntax": "server = ", "capability": "capabilities = [\"fly\"]", "timeout": "dial_timeout = \"soon\"", "scheme": "server = \"ftp://x\"", "ca": "ca = 5",
	} {
		file(text)
		n, _ := reference.ParseNormalizedNamed(name + "/lib/app")
		_, err := s.cfg.Open(t.Context(), n, nil)
		if err == nil {
			t.Errorf("%s: accepted", what)
		}
		wantErr(t, err, errs.FailedPrecondition, "registry configuration")
	}
}

func TestDefaultDirAndSeveral(t *testing.T) {
	reg := regtest.New(t)
	img := reg.Build("app", "v1", nil)
	s := newSetup(t)
	second := t.TempDir()
	s.cfg.HostDirs = append(s.cfg.HostDirs, second)
	if err := os.MkdirAll(filepath.Join(second, "_default"), 0o755); err != nil {
		t.Fatal(err)
	}
	text := fmt.Sprintf("[host.%q]\n", reg.URL)
	if err := os.WriteFile(filepath.Join(second, "_default", "hosts.toml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if m, err := s.resolve("any.example/app:v1", nil); err != nil || m.Digest != img.Manifest.Digest {
		t.Error(err)
	}
	s.hostsFile("own.example", "server = \"http://127.0.0.1:1\"\n", nil)
	_, err := s.resolve("own.example/app:v1", nil)
	wantErr(t, err, errs.Unavailable, "127.0.0.1:1")
}

// Row I-15, among others: what a registry may answer about a manifest.
func TestAnswers(t *testing.T) {
	reg := regtest.New(t)
	img := reg.Build("app", "v1", nil)
	doc := regtest.JSON(img.Doc)
	s := newSetup(t)
	tag, byDigest := reg.Host()+"/app:v1", reg.Host()+"/app@"+img.Manifest.Digest.String()
	answer := func(code int, header map[string]string, body string) {
		reg.SetHook(func(w http.ResponseWriter, _ *http.Request) bool {
			for k, v := range header {
				w.Header().Set(k, v)
			}
			w.WriteHeader(code)
			_, _ = io.WriteString(w, body)
			return true
		})
	}
	other := digest.FromString("other").String()
	answer(200, map[string]string{"Docker-Content-Digest": other}, string(doc))
	_, err := s.resolve(tag, nil)
	wantErr(t, err, errs.FailedPrecondition, "digest")
	answer(200, map[string]string{"Docker-Content-Digest": "sha256:../../x"}, string(doc))
	_, err = s.resolve(tag, nil)
	wantErr(t, err, errs.FailedPrecondition, "not a digest")
	answer(200, nil, string(doc)+" ")
	_, err = s.resolve(byDigest, nil)
	wantErr(t, err, errs.FailedPrecondition, "it should be "+img.Manifest.Digest.String())
	answer(200, map[string]string{"Content-Encoding": "gzip"}, string(regtest.Gzip(doc).Packed))
	_, err = s.resolve(tag, nil)
	wantErr(t, err, errs.FailedPrecondition, "Content-Encoding")
	answer(200, nil, strings.Repeat(" ", 5<<20))
	_, err = s.resolve(tag, nil)
	wantErr(t, err, errs.FailedPrecondition, "more than")
	answer(404, nil, `{"errors":[{"code":"MANIFEST_UNKNOWN","message":"no such thing"}]}`)
	_, err = s.resolve(tag, nil)
	wantErr(t, err, errs.NotFound, "404", "no such thing", tag)
	answer(403, nil, "")
	_, err = s.resolve(tag, nil)
	wantErr(t, err, errs.FailedPrecondition, "access denied", "403")
	answer(204, nil, "")
	_, err = s.resolve(tag, nil)
	if err == nil {
		t.Error("204 accepted")
	}
	answer(429, map[string]string{"Retry-After": "1000000000"}, `{"errors":[{"code":"TOOMANYREQUESTS","message":"slow\u0000 down\n\u001b[31m"}]}`)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	start := time.Now()
	_, err = s.open(reg.Host()+"/app", nil).Resolve(ctx, "v1", nil)
	if err == nil || time.Since(start) > testhost.Limit(time.Second) {
		t.Error("Retry-After held the pull", err)
	}
	if retryAfter(&http.Response{Header: http.Header{"Retry-After": {"1000000000"}}}) > maxRetryWait {
		t.Error("Retry-After has no bound")
	}
	// What a registry sends back of our secrets stays out of the message.
	reg.SetHook(func(w http.ResponseWriter, r *http.Request) bool {
		if basicOnly("joe", canary)(w, r) {
			return true
		}
		w.WriteHeader(http.StatusBadRequest)
		_, _ = fmt.Fprintf(w, `{"errors":[{"code":"X","message":"you sent %s, which is %s\n\u001b"}]}`, r.Header.Get("Authorization"), canary)
		return true
	})
	_, err = s.resolve(tag, &Auth{Username: "joe", Password: canary})
	wantErr(t, err, errs.FailedPrecondition, "***")
	if strings.ContainsAny(err.Error(), "\n\x1b") || strings.Contains(err.Error(), "am9lOn") {
		t.Errorf("%q", err)
	}
	// Known content is only asked for.
	reg.SetHook(nil)
	reg.Requests()
	m, err := s.open(reg.Host()+"/app", nil).Resolve(t.Context(), "v1", func(d digest.Digest) bool { return d == img.Manifest.Digest })
	if err != nil || m.Data != nil || m.Digest != img.Manifest.Digest || reg.Count("GET") != 0 {
		t.Error(m, err)
	}
	// Registries without HEAD, or without Docker-Content-Digest.
	reg.SetHook(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodHead {
			w.WriteHeader(http.StatusMethodNotAllowed)
			return true
		}
		w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
		_, _ = w.Write(doc)
		return true
	})
	m, err = s.open(reg.Host()+"/app", nil).Resolve(t.Context(), "v1", func(digest.Digest) bool { return true })
	if err != nil || m.Digest != img.Manifest.Digest {
		t.Error(m, err)
	}
}

func TestRef512(t *testing.T) {
	reg := regtest.New(t)
	img := reg.Build("app", "v1", nil)
	d := digest.SHA512.FromBytes(regtest.JSON(img.Doc))
	reg.PutManifestAs("app", d.String(), img.Manifest.MediaType, regtest.JSON(img.Doc))
	if m, err := newSetup(t).resolve(reg.Host()+"/app@"+d.String(), nil); err != nil || m.Digest != d {
		t.Error(m, err)
	}
}

func FuzzHosts(f *testing.F) {
	f.Add([]byte("server = \"https://x\"\n[host.\"https://y\"]\n capabilities=[\"pull\"]\n ca=[\"a\"]\n client=[[\"a\",\"b\"]]\n skip_verify=true\n override_path=true\n dial_timeout=\"1s\"\n [host.\"https://y\".header]\n a=[\"b\"]\n"))
	f.Add([]byte("[host]\n[host.x]\nserver=\"\"\n"))
	root := f.TempDir()
	f.Fuzz(func(t *testing.T, data []byte) {
		if checkHosts(data) != nil {
			return
		}
		dir := filepath.Join(root, "r.example")
		_ = os.MkdirAll(dir, 0o755)
		if err := os.WriteFile(filepath.Join(dir, "hosts.toml"), data, 0o600); err != nil {
			t.Fatal(err)
		}
		hosts, err := Config{HostDirs: []string{root}}.orDefault().hosts(context.Background(), "r.example")
		if err != nil {
			return
		}
		for _, h := range hosts {
			if h.Client == nil {
				t.Error("no client")
			}
		}
	})
}

func FuzzChallenge(f *testing.F) {
	f.Add(`Bearer realm="https://auth.example/token",service="s",scope="repository:app:pull"`, "app")
	f.Add(`Basic realm="x"`, "a/b")
	f.Add(`Bearer realm="http://127.0.0.1/",scope="repository:x/app:* repository:../app:pull"`, "app")
	c, err := Config{HostDirs: []string{f.TempDir()}}.Open(context.Background(), must(reference.ParseNormalizedNamed("registry.example/app")), nil)
	if err != nil {
		f.Fatal(err)
	}
	h := c.hosts[0]
	h.zone.set(zonePublic)
	// Nothing may be dialled: the challenge is read, the request is not sent.
	f.Fuzz(func(t *testing.T, header, repo string) {
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		_, _ = h.answer(ctx, &http.Response{Header: http.Header{"Www-Authenticate": {header}}})
		for _, s := range scopesOf(header, repo) {
			if !strings.HasPrefix(s, "repository:") || !strings.HasSuffix(s, repo+":pull") {
				t.Errorf("scope %q for %q", s, repo)
			}
		}
		if u, _, err := h.realm(header); err == nil && (u.Scheme != "https" || u.User != nil) {
			t.Errorf("realm %s", u)
		}
	})
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
