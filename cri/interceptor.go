package cri

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"path"
	"runtime/debug"
	"strings"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/klog/v2"

	"github.com/naru-project/naru/internal/errs"
)

// call is what both interceptors do around one RPC.
type call struct {
	s      *Server
	method string // short name
	log    klog.Logger
	start  time.Time
}

func (s *Server) begin(ctx context.Context, fullMethod string, req any) (context.Context, *call) {
	c := &call{s: s, method: path.Base(fullMethod), start: time.Now()}
	what := append([]any{"request", requestID()}, subject(req)...)
	c.log = klog.LoggerWithValues(klog.FromContext(ctx), append([]any{"method", c.method}, what...)...)
	annotate(trace.SpanFromContext(ctx), what)
	return klog.NewContext(ctx, c.log), c
}

// gate lets calls wait while recovery runs: what a list would miss now, kubelet
// would take for gone, and a stream that is refused kubelet opens again at once,
// but five times in all.
func (c *call) gate(ctx context.Context) error {
	select {
	case <-c.s.ready:
		return nil
	case <-c.s.done.Done():
		return errs.New(errs.Unavailable, "naru is shutting down")
	case <-ctx.Done():
		return fmt.Errorf("wait until naru has taken stock after its start: %w", ctx.Err())
	}
}

// end turns err, or a panic that is under way, into the RPC's result, and logs
// and counts it. It must be deferred directly.
func (c *call) end(err *error) {
	if p := recover(); p != nil {
		c.log.Error(nil, "Panic in a CRI call", "panic", p, "stack", string(debug.Stack()))
		*err = errs.New(errs.Internal, "%s ran into a bug of naru; its log has the details", c.method)
	}
	*err = toStatus(*err)
	code := status.Code(*err)
	took := time.Since(c.start)
	if m := c.s.cfg.Metrics; m != nil {
		m.ObserveRPC(c.method, code.String(), took)
	}
	switch {
	case code == codes.Internal:
		c.log.Error(*err, "CRI call failed", "took", took)
	case code != codes.OK:
		c.log.V(levelOf(c.method)-1).Info("CRI call ended", "code", code, "took", took, "err", *err)
	default:
		c.log.V(levelOf(c.method)).Info("CRI call ended", "code", code, "took", took)
	}
}

// levelOf keeps what kubelet polls every second out of an ordinary log.
func levelOf(method string) int {
	for _, prefix := range []string{"List", "Stream", "Status", "Version", "PodSandboxSt", "ContainerSt", "Image", "ExecSync", "RuntimeConfig"} {
		if strings.HasPrefix(method, prefix) {
			return 5
		}
	}
	return 2
}

// unary is the one unary interceptor.
func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	ctx, c := s.begin(ctx, info.FullMethod, req)
	defer c.end(&err)
	if err := c.gate(ctx); err != nil {
		return nil, err
	}
	return handler(ctx, req)
}

// stream is the one stream interceptor.
func (s *Server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
	ctx, c := s.begin(ss.Context(), info.FullMethod, nil)
	defer c.end(&err)
	if err := c.gate(ctx); err != nil {
		return err
	}
	return handler(srv, &streamWithContext{ServerStream: ss, ctx: ctx})
}

// streamWithContext carries the call's logger.
type streamWithContext struct {
	grpc.ServerStream
	ctx context.Context
}

// Context implements grpc.ServerStream.
func (s *streamWithContext) Context() context.Context { return s.ctx }

// annotate names in a trace what a request is about, as the log does. Without
// traces span records nothing.
func annotate(span trace.Span, what []any) {
	if !span.IsRecording() {
		return
	}
	for i := 0; i+1 < len(what); i += 2 {
		span.SetAttributes(attribute.String("naru."+fmt.Sprint(what[i]), fmt.Sprint(what[i+1])))
	}
}

func requestID() string {
	var b [4]byte
	_, _ = rand.Read(b[:]) // documented never to fail
	return hex.EncodeToString(b[:])
}

// subject names what a request is about, for the log. Nothing else of a
// request is ever logged: environments and credentials stand in it.
func subject(req any) []any {
	var kv []any
	if r, ok := req.(interface{ GetPodSandboxId() string }); ok && r.GetPodSandboxId() != "" {
		kv = append(kv, "pod", clip(r.GetPodSandboxId()))
	}
	if r, ok := req.(interface{ GetContainerId() string }); ok && r.GetContainerId() != "" {
		kv = append(kv, "container", clip(r.GetContainerId()))
	}
	return append(kv, subjectName(req)...)
}

// clip keeps a hostile ID from filling the log.
func clip(s string) string {
	const most = 256
	if len(s) > most {
		return fmt.Sprintf("%s… (%d bytes)", strings.ToValidUTF8(s[:most], ""), len(s))
	}
	return s
}
