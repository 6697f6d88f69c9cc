package admin

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/klog/v2"

	"github.com/naru-project/naru/internal/errs"
)

// Bounds on requests. There is none on the length of an archive: the image
// store has its own.
const (
	headerTimeout = 5 * time.Second
	maxBody       = 64 << 10 // of requests other than a load
	maxName       = 1024
	progressEvery = 200 * time.Millisecond
)

// Server answers the command line.
type Server struct {
	backend Backend
	http    *http.Server
}

// New makes a server for b.
func New(b Backend) *Server {
	s := &Server{backend: b}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/operations", list(b.Operations))
	mux.HandleFunc("GET /v1/pulls", list(b.Pulls))
	mux.HandleFunc("GET /v1/version", func(w http.ResponseWriter, _ *http.Request) { reply(w, b.Version()) })
	mux.HandleFunc("GET /v1/config", s.config)
	mux.HandleFunc("POST /v1/reload", s.reload)
	mux.HandleFunc("POST /v1/images/load", s.load)
	mux.HandleFunc("POST /v1/images/import", s.importPath)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		fail(w, errs.New(errs.Unimplemented, "%s %s: this daemon does not know it; is the command line of another release?", r.Method, clip(r.URL.Path)))
	})
	s.http = &http.Server{Handler: mux, ReadHeaderTimeout: headerTimeout, MaxHeaderBytes: 16 << 10, IdleTimeout: time.Minute}
	return s
}

// Serve answers on l until Shutdown. It closes l.
func (s *Server) Serve(l net.Listener) error {
	err := s.http.Serve(l)
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return errs.New(errs.Internal, "serve the admin socket: %w", err)
}

// Shutdown lets running requests end until ctx does, then cuts them.
func (s *Server) Shutdown(ctx context.Context) {
	if s.http.Shutdown(ctx) != nil {
		_ = s.http.Close()
	}
}

// list answers with what fn returns; an empty list is [], not null.
func list[T any](fn func() []T) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		v := fn()
		if v == nil {
			v = []T{}
		}
		reply(w, v)
	}
}

func (s *Server) config(w http.ResponseWriter, _ *http.Request) {
	text, err := s.backend.Config()
	if err != nil {
		fail(w, err)
		return
	}
	reply(w, map[string]string{"toml": text})
}

func (s *Server) reload(w http.ResponseWriter, _ *http.Request) {
	done, err := s.backend.Reload()
	if err != nil {
		fail(w, err)
		return
	}
	reply(w, done)
}

func (s *Server) load(w http.ResponseWriter, r *http.Request) {
	name := r.URL.Query().Get("name")
	if err := checkName(name); err != nil {
		fail(w, err)
		return
	}
	body := &counter{r: r.Body}
	s.stream(w, r, body, func(ctx context.Context) ([]string, error) { return s.backend.LoadImage(ctx, body, name) })
}

func (s *Server) importPath(w http.ResponseWriter, r *http.Request) {
	var q struct{ Path, Name string }
	d := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
	d.DisallowUnknownFields()
	if err := d.Decode(&q); err != nil {
		fail(w, errs.New(errs.InvalidArgument, "read the request: %w", err))
		return
	}
	if err := checkName(q.Name); err != nil {
		fail(w, err)
		return
	}
	if !filepath.IsAbs(q.Path) || filepath.Clean(q.Path) != q.Path || strings.ContainsRune(q.Path, 0) {
		fail(w, errs.New(errs.InvalidArgument, "path %q is not absolute and clean", clip(q.Path)))
		return
	}
	body := &counter{}
	body.end.Store(true)
	s.stream(w, r, body, func(ctx context.Context) ([]string, error) { return s.backend.ImportImage(ctx, q.Path, q.Name) })
}

// stream runs work and writes its progress as it goes. Cutting the connection
// cancels the work.
func (s *Server) stream(w http.ResponseWriter, r *http.Request, body *counter, work func(context.Context) ([]string, error)) {
	rc := http.NewResponseController(w)
	// Answers go out while the archive still comes in.
	if err := rc.EnableFullDuplex(); err != nil {
		fail(w, errs.New(errs.Internal, "answer while receiving: %w", err))
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	enc := json.NewEncoder(w)
	var mu sync.Mutex // one writer at a time
	send := func(e event) {
		mu.Lock()
		defer mu.Unlock()
		_ = enc.Encode(e) // a client that is gone ends r.Context()
		_ = rc.Flush()
	}
	ctx, cancel := context.WithCancel(r.Context())
	var wg sync.WaitGroup
	wg.Go(func() { report(ctx, body, send) })
	refs, err := work(ctx)
	cancel()
	wg.Wait()
	if err != nil {
		klog.InfoS("Loading an image from the command line ended in an error", "err", err)
		send(event{Error: toWire(err)})
		return
	}
	send(event{Refs: refs, Done: true})
}

func report(ctx context.Context, body *counter, send func(event)) {
	tick := time.NewTicker(progressEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		p := Progress{Stage: "receive", Bytes: body.n.Load()}
		if body.end.Load() {
			p.Stage = "unpack"
		}
		send(event{Progress: &p})
	}
}

// counter counts what is read through it.
type counter struct {
	r   io.Reader
	n   atomic.Int64
	end atomic.Bool
}

// Read implements io.Reader.
func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n.Add(int64(n))
	if err != nil {
		c.end.Store(true)
	}
	return n, err //nolint:wrapcheck // a reader's errors pass as they are
}

func checkName(name string) error {
	if len(name) > maxName || strings.ContainsFunc(name, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return errs.New(errs.InvalidArgument, "image name %q is too long or has control characters", clip(name))
	}
	return nil
}

func reply(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // the client is gone
}

// status says the class in HTTP's words, for curl; the client reads the body.
var status = map[errs.Class]int{
	errs.InvalidArgument: http.StatusBadRequest, errs.NotFound: http.StatusNotFound, errs.AlreadyExists: http.StatusConflict,
	errs.FailedPrecondition: http.StatusConflict, errs.Unavailable: http.StatusServiceUnavailable, errs.Unimplemented: http.StatusNotImplemented,
}

func fail(w http.ResponseWriter, err error) {
	code := status[errs.Of(err)]
	if code == 0 {
		code = http.StatusInternalServerError
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(event{Error: toWire(err)})
}

func toWire(err error) *wireErr {
	return &wireErr{Class: errs.Of(err).String(), Message: err.Error()}
}

func clip(s string) string {
	if len(s) > 200 {
		return s[:200] + "…"
	}
	return s
}
