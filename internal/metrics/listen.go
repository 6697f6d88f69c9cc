package metrics

import (
	"context"
	"errors"
	"net"
	"net/http"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/naru-project/naru/internal/errs"
)

// Bounds on a scrape's connection.
const (
	headerTime = 5 * time.Second
	idleTime   = 2 * time.Minute
	closeTime  = 2 * time.Second
)

// Server answers scrapes at an address that may change, or nowhere.
type Server struct {
	handler http.Handler
	listen  func(address string) (net.Listener, error)

	mu      sync.Mutex
	address string
	http    *http.Server
	served  sync.WaitGroup
}

// NewServer makes a server of h that listens nowhere yet.
func NewServer(h http.Handler, listen func(address string) (net.Listener, error)) *Server {
	return &Server{handler: h, listen: listen}
}

// Listen has the server answer at address and nowhere else; empty = nowhere.
// After an error it answers where it did.
func (s *Server) Listen(address string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if address == s.address {
		return nil
	}
	var next *http.Server
	if address != "" {
		l, err := s.listen(address)
		if err != nil {
			return errs.New(errs.Of(err), "listen for scrapes at %s: %w", address, err)
		}
		next = &http.Server{Handler: s.handler, ReadHeaderTimeout: headerTime, IdleTimeout: idleTime, MaxHeaderBytes: 16 << 10}
		s.served.Go(func() {
			if err := next.Serve(l); !errors.Is(err, http.ErrServerClosed) {
				klog.ErrorS(err, "Scrapes are not answered any more", "address", address)
			}
		})
	}
	s.shut()
	s.address, s.http = address, next
	return nil
}

// shut ends the present server. The caller holds mu.
func (s *Server) shut() {
	if s.http == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), closeTime)
	defer cancel()
	if s.http.Shutdown(ctx) != nil {
		_ = s.http.Close()
	}
	s.http = nil
}

// Close ends it.
func (s *Server) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.shut()
	s.address = ""
	s.served.Wait()
	return nil
}
