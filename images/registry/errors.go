package registry

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/textproto"
	"net/url"
	"strings"
	"sync"
	"unicode"

	"github.com/naru-project/naru/internal/errs"
)

// UnavailablePrefix starts the message of errors about registries that cannot
// be reached; kubelet looks for it (cri-api, pkg/errors).
const UnavailablePrefix = "RegistryUnavailable"

// reason is what became of the attempt at one host.
type reason int

const (
	unreachable reason = iota // no connection, no answer, or an answer to try again later
	denied
	absent
	refused // by us: what the host says or wants is not acceptable
)

type hostError struct {
	host   string
	reason reason
	text   string
	final  bool // trying again cannot help
}

func (e *hostError) Error() string { return e.host + ": " + e.text }

// failure makes one error of what all hosts said. Its class is that of the
// last one, the registry itself.
func (c *Client) failure(what string, all []*hostError) error {
	if len(all) == 0 {
		return errs.New(errs.NotFound, "pull %s: no configured host may %s", c.ref, what)
	}
	var texts []string
	for _, e := range all {
		texts = append(texts, e.Error())
	}
	said := strings.Join(texts, "; ")
	switch all[len(all)-1].reason {
	case absent:
		return errs.New(errs.NotFound, "pull %s: not found: %s", c.ref, said)
	case denied:
		return errs.New(errs.FailedPrecondition, "pull %s: access denied, or the repository does not exist: %s", c.ref, said)
	case refused:
		return errs.New(errs.FailedPrecondition, "pull %s: %s", c.ref, said)
	}
	return errs.New(errs.Unavailable, "%s: pull %s: %s", UnavailablePrefix, c.ref, said)
}

// transport makes a hostError of a failed request. The text leaves out the
// URL, which may carry a signature.
func (h *host) transport(ctx context.Context, err error) *hostError {
	he := &hostError{host: h.Host, reason: unreachable}
	var own *hostError
	var policy *policyError
	var proto textproto.ProtocolError
	var cert *tls.CertificateVerificationError
	var record tls.RecordHeaderError
	he.final = errors.As(err, &cert) || errors.As(err, &record)
	switch {
	case errors.As(err, &own):
		return own
	case errors.As(err, &policy):
		he.reason, he.text = refused, policy.text
	case ctx.Err() != nil:
		he.text = context.Cause(ctx).Error()
	case errors.As(err, &proto):
		he.text = "its answer has a header that cannot be read" // which may be a URL
	default:
		he.text = err.Error()
	}
	he.text = h.client.hide.clean(he.text)
	return he
}

// status makes a hostError of an answer that is not the wanted one, and closes it.
func (h *host) status(resp *http.Response, at string) *hostError {
	defer func() { _ = resp.Body.Close() }()
	he := &hostError{host: h.Host, text: at + resp.Status, reason: refused}
	switch code := resp.StatusCode; {
	case code == http.StatusNotFound:
		he.reason = absent
	case code == http.StatusUnauthorized, code == http.StatusForbidden:
		he.reason = denied
	case code == http.StatusTooManyRequests, code == http.StatusRequestTimeout, code >= 500:
		he.reason = unreachable
	}
	if said := registryWords(resp); said != "" {
		he.text += " (" + said + ")"
	}
	he.text = h.client.hide.clean(he.text)
	return he
}

// registryWords reads the error document of the distribution spec.
func registryWords(resp *http.Response) string {
	if resp.Request != nil && resp.Request.Method == http.MethodHead {
		return ""
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, 8<<10))
	if err != nil {
		return ""
	}
	var doc struct {
		Errors []struct {
			Code    string `json:"code"`
			Message string `json:"message"`
		} `json:"errors"`
	}
	if json.Unmarshal(data, &doc) != nil || len(doc.Errors) == 0 {
		return ""
	}
	return fmt.Sprintf("%.64s: %.200s", doc.Errors[0].Code, doc.Errors[0].Message)
}

// redactor keeps what is secret out of texts. A host may send back what it was
// sent.
type redactor struct {
	mu      sync.RWMutex
	secrets []string
}

const minSecret = 4 // shorter ones would turn every text into stars

func (r *redactor) add(c *credentials) {
	if c == nil {
		return
	}
	for _, s := range []string{c.password, c.identity, c.bearer} {
		r.addOne(s)
	}
	if c.password != "" {
		r.addOne(base64.StdEncoding.EncodeToString([]byte(c.user + ":" + c.password)))
	}
}

func (r *redactor) addOne(s string) {
	if len(s) < minSecret {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.secrets = append(r.secrets, s)
	if e := url.QueryEscape(s); e != s {
		r.secrets = append(r.secrets, e)
	}
}

// clean also drops control characters and cuts at 400 bytes: the text ends up
// in pod events.
func (r *redactor) clean(s string) string {
	r.mu.RLock()
	for _, secret := range r.secrets {
		s = strings.ReplaceAll(s, secret, "***")
	}
	r.mu.RUnlock()
	s = strings.Map(func(c rune) rune {
		if !unicode.IsPrint(c) {
			return ' '
		}
		return c
	}, strings.ToValidUTF8(s, "?"))
	if len(s) > 400 {
		s = strings.ToValidUTF8(s[:400], "") + "…"
	}
	return s
}
