package streaming

import (
	"context"
	"errors"
	"net/http"
	"net/url"
	"runtime/debug"
	"strings"

	"github.com/gorilla/websocket"
	"k8s.io/klog/v2"
)

// session is one upgraded connection from request to end.
type session struct {
	s      *Server
	ctx    context.Context // ends when the client is gone, the session is over or the server closes
	cancel context.CancelCauseFunc
	w      *upgradeWriter
	r      *http.Request
	log    klog.Logger
}

// errEnded is the cause of a session's context once it is over.
var errEnded = errors.New("session ended")

// serveHTTP answers one request. Everything that is not a valid upgrade with a
// valid token gets the same short answer, and its connection is closed.
func (s *Server) serveHTTP(w http.ResponseWriter, r *http.Request) {
	if !s.begin() {
		http.Error(w, "shutting down", http.StatusServiceUnavailable)
		return
	}
	defer s.sessions.Done()
	if !s.originAllowed(r) {
		http.Error(w, "origin not allowed", http.StatusForbidden)
		return
	}
	k, request, ok := s.redeem(r)
	if !ok {
		http.NotFound(w, r)
		return
	}
	ctx, cancel := context.WithCancelCause(r.Context())
	defer cancel(errEnded)
	ses := &session{s: s, ctx: ctx, cancel: cancel, r: r, log: klog.LoggerWithValues(klog.Background(), "stream", string(k))}
	ses.w = &upgradeWriter{ResponseWriter: w, session: ses}
	defer ses.w.abort()
	defer ses.recover()
	switch req := request.(type) {
	case Command:
		ses.log = klog.LoggerWithValues(ses.log, "container", req.ContainerID)
		ses.command(k, req)
	case Forward:
		ses.log = klog.LoggerWithValues(ses.log, "pod", req.PodID)
		ses.portForward(req)
	}
}

// recover keeps a panic in one session from being more than its end.
func (ses *session) recover() {
	if p := recover(); p != nil {
		ses.log.Error(nil, "Panic in a streaming session", "panic", p, "stack", string(debug.Stack()))
	}
}

// redeem finds the request that the URL's token stands for.
func (s *Server) redeem(r *http.Request) (kind, any, bool) {
	if r.Method != http.MethodGet && r.Method != http.MethodPost {
		return "", nil, false
	}
	k, token, ok := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	if !ok || strings.Contains(token, "/") {
		return "", nil, false
	}
	request, ok := s.tokens.take(kind(k), token)
	return kind(k), request, ok
}

// originAllowed guards against web pages (DNS rebinding, cross-site WebSocket).
// A browser always sends Origin with a WebSocket and lets no page set
// X-Forwarded-For on one; kubelet's proxy always adds it and passes its user's
// Origin on. So an Origin is accepted if it names this server or came by proxy.
func (s *Server) originAllowed(r *http.Request) bool {
	origin := r.Header.Get("Origin")
	if origin == "" || r.Header.Get("X-Forwarded-For") != "" {
		return true
	}
	u, err := url.Parse(origin)
	return err == nil && u.Host == s.Addr()
}

// fail answers a request that was not upgraded.
func (ses *session) fail(code int, text string) {
	http.Error(ses.w, text, code)
}

func isWebSocket(r *http.Request) bool { return websocket.IsWebSocketUpgrade(r) }
