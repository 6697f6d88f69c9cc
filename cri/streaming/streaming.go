// Package streaming serves exec, attach and port-forward over HTTP: the URLs
// that the CRI calls Exec, Attach and PortForward hand out. It speaks what
// kubelet, crictl and client-go speak: SPDY/3.1 with the remote command
// protocols v1 to v4 and portforward.k8s.io, WebSocket with the channel
// protocols v1, v4 and v5 (binary and base64), and SPDY tunnelled through a
// WebSocket for port-forward. Names and numbers of these protocols are those
// of k8s.io/cri-streaming.
//
// Why not the server of k8s.io/cri-streaming itself: its tokens have 48 bits,
// it does not know v5 nor the tunnel, it leaves a connection open whose client
// never opens its streams, does not notice a client that went away from a
// silent process, and lets surplus streams pin goroutines.
//
// A URL holds a single-use token of 256 bits that lives one minute. Whoever
// has it is treated as the one who made the call; there is no other
// authentication, therefore the server listens on loopback only.
//
// It must not know about gRPC or protobuf. Memory per connection is bounded:
// nothing is buffered but one frame per stream, so a slow client slows its
// process down.
//
// Concurrency: New starts no goroutine. Serve runs until Close; each connection
// has one handler goroutine and some helpers, all of which Close waits for.
package streaming

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"log" //nolint:depguard // http.Server takes its ErrorLog as this type only
	"net"
	"net/http"
	"net/url"
	"path"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/pod"
)

// Backend does the work behind the streams (the pod manager). Every call
// returns soon after its context ends.
type Backend interface {
	Exec(ctx context.Context, id string, cmd []string, tty bool, s pod.Streams) (exitCode int, err error)
	Attach(ctx context.Context, id string, s pod.Streams) error
	Dial(ctx context.Context, podID string, port uint16) (io.ReadWriteCloser, error)
}

// Config of the server. Zero values stand for the defaults.
type Config struct {
	Addr            string        // host:port; default 127.0.0.1:0
	IdleTimeout     time.Duration // a connection without a byte either way for so long is cut; default 4 h, kubelet's
	CreationTimeout time.Duration // how long a client may take to open its streams; default 30 s
	TokenTTL        time.Duration // default 1 min
	MaxTokens       int           // outstanding URLs; default 1000
	MaxConns        int           // connections at once; default 1024
	TLS             *tls.Config   // nil = plain HTTP
}

// Limits that are no matter of taste.
const (
	headerTimeout   = 10 * time.Second // to send the request line and headers
	requestTimeout  = 30 * time.Second // for the HTTP part; lifted by the upgrade
	maxHeaderBytes  = 16 << 10
	lingerTimeout   = 2 * time.Second // for the client to take the last bytes
	maxForwards     = 512             // connections at once through one port-forward session
	maxMessageBytes = 4 << 20         // one WebSocket message
	copyBufferBytes = 32 << 10
)

func (c Config) withDefaults() Config {
	setDefault(&c.Addr, "127.0.0.1:0")
	setDefault(&c.IdleTimeout, 4*time.Hour)
	setDefault(&c.CreationTimeout, 30*time.Second)
	setDefault(&c.TokenTTL, time.Minute)
	setDefault(&c.MaxTokens, 1000)
	setDefault(&c.MaxConns, 1024)
	return c
}

func setDefault[T comparable](v *T, def T) {
	var zero T
	if *v == zero {
		*v = def
	}
}

// Server serves the streams. Make it with New.
type Server struct {
	cfg     Config
	backend Backend
	tokens  *tokenCache
	http    *http.Server
	ctx     context.Context // ends with Close; the parent of every session
	cancel  context.CancelCauseFunc

	mu       sync.Mutex
	listener net.Listener
	base     url.URL
	closed   bool
	sessions sync.WaitGroup // added to under mu while not closed
}

var errShutdown = errors.New("naru is shutting down")

// New makes a server that does not listen yet.
func New(cfg Config, b Backend) *Server {
	s := &Server{cfg: cfg.withDefaults(), backend: b}
	s.tokens = newTokenCache(s.cfg.MaxTokens, s.cfg.TokenTTL, time.Now)
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	var protocols http.Protocols
	protocols.SetHTTP1(true) // an upgraded connection is HTTP/1.1 only
	s.http = &http.Server{
		Handler:           http.HandlerFunc(s.serveHTTP),
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       requestTimeout,
		WriteTimeout:      requestTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		TLSConfig:         s.cfg.TLS,
		Protocols:         &protocols,
		BaseContext:       func(net.Listener) context.Context { return s.ctx },
		ErrorLog:          log.New(httpLog{}, "", 0),
	}
	// One request per connection: a failed upgrade never leaves a connection
	// on which a second request could follow.
	s.http.SetKeepAlivesEnabled(false)
	return s
}

// Listen binds the address. URLs can be handed out afterwards.
func (s *Server) Listen() error {
	tcp, err := net.Listen("tcp", s.cfg.Addr)
	if err != nil {
		return errs.New(errs.Unavailable, "listen for streams on %s: %w", s.cfg.Addr, err)
	}
	l := newLimitListener(tcp.(*net.TCPListener), s.cfg.MaxConns)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.listener != nil {
		_ = l.Close()
		return errs.New(errs.FailedPrecondition, "listen for streams on %s: server is closed or listens already", s.cfg.Addr)
	}
	s.listener = l
	s.base = url.URL{Scheme: "http", Host: l.Addr().String()}
	if s.cfg.TLS != nil {
		s.base.Scheme = "https"
	}
	return nil
}

// Addr is where the server listens; empty before Listen.
func (s *Server) Addr() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.base.Host
}

// Serve answers requests until Close. It returns nil after Close.
func (s *Server) Serve() error {
	s.mu.Lock()
	l := s.listener
	s.mu.Unlock()
	if l == nil {
		return errs.New(errs.FailedPrecondition, "serve streams: not listening")
	}
	var err error
	if s.cfg.TLS != nil {
		err = s.http.ServeTLS(l, "", "")
	} else {
		err = s.http.Serve(l)
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return errs.New(errs.Internal, "serve streams: %w", err)
}

// Close stops listening, cuts every session and waits for their goroutines
// until ctx ends. Processes that were attached to go on.
func (s *Server) Close(ctx context.Context) error {
	s.mu.Lock()
	s.closed = true
	l := s.listener
	s.mu.Unlock()
	s.cancel(errShutdown)
	_ = s.http.Close()
	if l != nil {
		_ = l.Close() // Serve may never have been called
	}
	done := make(chan struct{})
	go func() {
		s.sessions.Wait()
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return errs.New(errs.DeadlineExceeded, "wait for streaming sessions to end: %w", ctx.Err())
	}
}

// Command is an exec or attach request: which container and which streams.
// Cmd is empty for attach.
type Command struct {
	ContainerID                string
	Cmd                        []string
	TTY, Stdin, Stdout, Stderr bool
}

// size is what c takes in memory, about.
func (c Command) size() int {
	n := requestBytes + len(c.ContainerID)
	for _, word := range c.Cmd {
		n += 16 + len(word)
	}
	return n
}

// Forward is a port-forward request. Ports, where given, are the only ones
// that may be forwarded; the WebSocket channel protocol needs them.
type Forward struct {
	PodID string
	Ports []uint16
}

func (f Forward) size() int { return requestBytes + len(f.PodID) + 2*len(f.Ports) }

// requestBytes is what every request with a token takes, about.
const requestBytes = 512

// kind of a request, as it stands in the URL.
type kind string

const (
	kindExec        kind = "exec"
	kindAttach      kind = "attach"
	kindPortForward kind = "portforward"
)

// ExecURL returns the one-time URL of an exec.
func (s *Server) ExecURL(c Command) (string, error) { return s.url(kindExec, c, c.size()) }

// AttachURL returns the one-time URL of an attach.
func (s *Server) AttachURL(c Command) (string, error) { return s.url(kindAttach, c, c.size()) }

// PortForwardURL returns the one-time URL of a port-forward.
func (s *Server) PortForwardURL(f Forward) (string, error) {
	return s.url(kindPortForward, f, f.size())
}

func (s *Server) url(k kind, request any, size int) (string, error) {
	s.mu.Lock()
	base, closed := s.base, s.closed
	s.mu.Unlock()
	if closed || base.Host == "" {
		return "", errs.New(errs.Unavailable, "make %s URL: streaming server is not running", k)
	}
	token, err := s.tokens.insert(k, request, size)
	if err != nil {
		return "", err
	}
	base.Path = path.Join("/", string(k), token)
	return base.String(), nil
}

// begin counts a session in, unless the server is closing.
func (s *Server) begin() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.sessions.Add(1)
	return true
}

// httpLog takes net/http's own messages (broken handshakes and the like).
type httpLog struct{}

func (httpLog) Write(p []byte) (int, error) {
	klog.V(4).InfoS("Streaming server", "message", string(p))
	return len(p), nil
}
