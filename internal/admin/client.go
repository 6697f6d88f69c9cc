package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"time"

	"github.com/naru-project/naru/internal/errs"
)

// dialTimeout bounds reaching the socket; answers of lists have listTimeout.
const (
	dialTimeout = 5 * time.Second
	listTimeout = 30 * time.Second
	maxAnswer   = 16 << 20
)

// Client asks the daemon.
type Client struct {
	socket string
	http   *http.Client
}

// NewClient returns a client of the daemon at socket. Nothing is dialled yet.
func NewClient(socket string) *Client {
	d := net.Dialer{Timeout: dialTimeout}
	t := &http.Transport{
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return d.DialContext(ctx, "unix", socket) },
		DisableKeepAlives: true,
		WriteBufferSize:   256 << 10,
	}
	return &Client{socket: socket, http: &http.Client{Transport: t}}
}

// Operations lists the running changes.
func (c *Client) Operations(ctx context.Context) (v []Operation, err error) {
	return v, c.ask(ctx, http.MethodGet, "operations", &v)
}

// Pulls lists the images being fetched.
func (c *Client) Pulls(ctx context.Context) (v []Pull, err error) {
	return v, c.ask(ctx, http.MethodGet, "pulls", &v)
}

// Version of the daemon.
func (c *Client) Version(ctx context.Context) (v Version, err error) {
	return v, c.ask(ctx, http.MethodGet, "version", &v)
}

// Config is the daemon's configuration in effect, as TOML.
func (c *Client) Config(ctx context.Context) (string, error) {
	var v struct{ TOML string }
	err := c.ask(ctx, http.MethodGet, "config", &v)
	return v.TOML, err
}

// Reload has the daemon read its configuration again.
func (c *Client) Reload(ctx context.Context) (v Reload, err error) {
	return v, c.ask(ctx, http.MethodPost, "reload", &v)
}

// Load sends an archive and returns the references of its images. progress is
// called as the daemon tells how far it is, from one goroutine; it may be nil.
func (c *Client) Load(ctx context.Context, r io.Reader, name string, progress func(Progress)) ([]string, error) {
	q := url.Values{}
	if name != "" {
		q.Set("name", name)
	}
	return c.stream(ctx, "images/load?"+q.Encode(), "application/x-tar", io.NopCloser(r), progress)
}

// Import has the daemon read an archive or OCI layout from its own disk.
func (c *Client) Import(ctx context.Context, path, name string, progress func(Progress)) ([]string, error) {
	b, err := json.Marshal(map[string]string{"path": path, "name": name})
	if err != nil {
		return nil, errs.New(errs.Internal, "write the request: %w", err)
	}
	return c.stream(ctx, "images/import", "application/json", bytes.NewReader(b), progress)
}

func (c *Client) do(ctx context.Context, method, path, kind string, body io.Reader) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://naru/v1/"+path, body)
	if err != nil {
		return nil, errs.New(errs.Internal, "make the request: %w", err)
	}
	if kind != "" {
		req.Header.Set("Content-Type", kind)
	}
	resp, err := c.http.Do(req)
	if err == nil {
		return resp, nil
	}
	if ctx.Err() != nil {
		return nil, errs.New(errs.Of(ctx.Err()), "ask the daemon at %s: %w", c.socket, context.Cause(ctx))
	}
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "dial" {
		return nil, errs.New(errs.Unavailable, "reach the daemon at %s: %w (is naru running, and are you root?)", c.socket, op.Err)
	}
	return nil, errs.New(errs.Unavailable, "ask the daemon at %s: %w", c.socket, err)
}

func (c *Client) ask(ctx context.Context, method, what string, v any) error {
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	resp, err := c.do(ctx, method, what, "", nil)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return errs.New(errs.Unavailable, "read the daemon's answer: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		return readFail(resp, b)
	}
	if err := json.Unmarshal(b, v); err != nil {
		return errs.New(errs.Internal, "read the daemon's answer: %w", err)
	}
	return nil
}

func (c *Client) stream(ctx context.Context, path, kind string, body io.Reader, progress func(Progress)) ([]string, error) {
	resp, err := c.do(ctx, http.MethodPost, path, kind, body)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		b, _ := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
		return nil, readFail(resp, b)
	}
	dec := json.NewDecoder(resp.Body)
	for {
		var e event
		if err := dec.Decode(&e); err != nil {
			if ctx.Err() != nil {
				return nil, errs.New(errs.Of(ctx.Err()), "load the image: %w", context.Cause(ctx))
			}
			return nil, errs.New(errs.Unavailable, "the daemon's answer broke off: %w", err)
		}
		switch {
		case e.Error != nil:
			return nil, fromWire(e.Error)
		case e.Done:
			return e.Refs, nil
		case e.Progress != nil && progress != nil:
			progress(*e.Progress)
		}
	}
}

func readFail(resp *http.Response, b []byte) error {
	var e event
	if json.Unmarshal(b, &e) != nil || e.Error == nil {
		return errs.New(errs.Internal, "the daemon answered %s", resp.Status)
	}
	return fromWire(e.Error)
}

// fromWire gives the error its class back.
func fromWire(w *wireErr) error {
	for c := errs.Internal; c <= errs.Unimplemented; c++ {
		if c.String() == w.Class {
			return errs.New(c, "%s", w.Message)
		}
	}
	return errs.New(errs.Internal, "%s", w.Message)
}
