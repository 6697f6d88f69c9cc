package cri

import (
	"context"
	"sync/atomic"
	"time"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/cri/streaming"
	"github.com/naru-project/naru/internal/errs"
)

// Names and versions that Version tells. The name becomes the prefix of the
// container IDs in pod statuses (naru://…).
const (
	runtimeName       = "naru"
	kubeletAPIVersion = "0.1.0" // of VersionResponse.version; what kubelet and critest know
	criAPIVersion     = "v1"
)

// Config of the CRI edge.
type Config struct {
	Version  string   // of Naru, a semantic version set by the build; empty = 0.0.0-dev
	Handlers []string // runtime handlers besides "" and "naru"; SetHandlers changes them
	// UserNamespaces tells whether pods of a handler can have one; nil: as the host.
	UserNamespaces func(handler string) bool
	Streaming      streaming.Config // zero values stand for its defaults
	AllowGIDs      []uint32         // groups that may use the socket besides root
	// Verbose is the effective configuration as Status shows it when asked to
	// be verbose; it must hold no secrets. Nil = none.
	Verbose func() any
	// Health tells why the runtime cannot start containers now (say, its
	// monitor is gone). Nil, or a nil error, means that it can.
	Health func() error
	// Metrics is told of each RPC. Nil = nobody.
	Metrics Metrics
}

// Server implements RuntimeService and ImageService.
//
// Concurrency: all methods may be called concurrently; it holds no locks.
type Server struct {
	criv1.UnimplementedRuntimeServiceServer // for RPCs of a newer CRI
	criv1.UnimplementedImageServiceServer

	cfg     Config
	pods    Pods
	images  Images
	host    Host
	streams *streaming.Server
	ready   chan struct{}            // closed when recovery is done
	named   atomic.Pointer[[]string] // the handlers besides the built-in ones
	done    context.Context          // ends with Close: long streams end with it
	close   context.CancelFunc
	started time.Time
}

// New makes the server. It lets all RPCs wait until SetReady.
func New(cfg Config, pods Pods, images Images, host Host) *Server {
	if cfg.Version == "" {
		cfg.Version = "0.0.0-dev"
	}
	s := &Server{cfg: cfg, pods: pods, images: images, host: host, ready: make(chan struct{}), started: time.Now()}
	s.SetHandlers(cfg.Handlers)
	s.streams = streaming.New(cfg.Streaming, pods)
	s.done, s.close = context.WithCancel(context.Background())
	return s
}

// SetHandlers changes the runtime handlers besides "" and "naru".
func (s *Server) SetHandlers(names []string) { s.named.Store(&names) }

// SetReady opens the gate: recovery is over. It is called once.
func (s *Server) SetReady() { close(s.ready) }

// Streams is the streaming server: the caller has it Listen and Serve.
func (s *Server) Streams() *streaming.Server { return s.streams }

// Close ends event streams and the streaming server's sessions and waits for
// them until ctx ends. Call it before stopping the gRPC server, whose graceful
// stop waits for open streams.
func (s *Server) Close(ctx context.Context) error {
	s.close()
	return s.streams.Close(ctx)
}

// unimplemented is the answer of RPCs that are still to come.
func unimplemented(what string) error {
	return errs.New(errs.Unimplemented, "naru does not implement %s yet; see the README table", what)
}
