package tracing

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.opentelemetry.io/otel/trace"
	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	otlp "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/naru-project/naru/internal/testhost"
)

// sink is a collector.
type sink struct {
	collector.UnimplementedTraceServiceServer
	hold chan struct{} // not nil: answers wait for its end

	mu    sync.Mutex
	spans []*otlp.Span
}

// Export implements collector.TraceServiceServer.
func (s *sink) Export(ctx context.Context, r *collector.ExportTraceServiceRequest) (*collector.ExportTraceServiceResponse, error) {
	if s.hold != nil {
		select {
		case <-s.hold:
		case <-ctx.Done():
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, rs := range r.ResourceSpans {
		for _, ss := range rs.ScopeSpans {
			s.spans = append(s.spans, ss.Spans...)
		}
	}
	return &collector.ExportTraceServiceResponse{}, nil
}

func (s *sink) find(name string) *otlp.Span {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, x := range s.spans {
		if x.Name == name {
			return x
		}
	}
	return nil
}

func (s *sink) serve(t testing.TB, network, address string) string {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer()
	collector.RegisterTraceServiceServer(g, s)
	go func() { _ = g.Serve(l) }()
	t.Cleanup(g.Stop)
	return l.Addr().String()
}

// checked is a server whose calls have a step each.
type checked struct {
	healthpb.UnimplementedHealthServer
	t *Tracing
}

// Check implements healthpb.HealthServer.
func (c checked) Check(ctx context.Context, r *healthpb.HealthCheckRequest) (*healthpb.HealthCheckResponse, error) {
	now := time.Now()
	// The operation outlives its call.
	c.t.Step(context.WithoutCancel(ctx), "Check", "a step", now.Add(-time.Second), now)
	if r.Service == "fails" {
		return nil, status.Error(codes.NotFound, "no such thing")
	}
	return &healthpb.HealthCheckResponse{}, nil
}

// dial returns a client of such a server, and what waits until all of its calls
// have ended for the server, too.
func dial(t testing.TB, tr *Tracing) (c healthpb.HealthClient, wait func()) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer(tr.ServerOptions()...)
	healthpb.RegisterHealthServer(g, checked{t: tr})
	go func() { _ = g.Serve(l) }()
	t.Cleanup(g.Stop)
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return healthpb.NewHealthClient(conn), g.GracefulStop
}

const (
	traceID  = "0af7651916cd43dd8448eb211c80319c"
	parentID = "b7ad6b7169203331"
)

// caller is a context of a caller whose span it is part of (W3C Trace Context).
func caller(ctx context.Context, sampled string) context.Context {
	return metadata.AppendToOutgoingContext(ctx, "traceparent", "00-"+traceID+"-"+parentID+"-"+sampled)
}

// A call goes on with its caller's trace, and its steps are below it.
func TestContinuesTheCallersTrace(t *testing.T) {
	for network, address := range map[string]string{"tcp": "127.0.0.1:0", "unix": filepath.Join(t.TempDir(), "otlp")} {
		s := &sink{}
		endpoint := s.serve(t, network, address)
		if network == "unix" {
			endpoint = "unix://" + endpoint
		}
		tr, err := New(t.Context(), Config{Endpoint: endpoint, Version: "1.2.3"})
		if err != nil {
			t.Fatal(err)
		}
		c, wait := dial(t, tr)
		for _, sampled := range []string{"00", "01"} { // the first one's caller wants no trace
			if _, err := c.Check(caller(t.Context(), sampled), &healthpb.HealthCheckRequest{Service: "fails"}); status.Code(err) != codes.NotFound {
				t.Fatal(err)
			}
		}
		if _, err := c.Check(t.Context(), &healthpb.HealthCheckRequest{}); err != nil { // no caller's trace, and none in a million
			t.Fatal(err)
		}
		wait()
		ctx, cancel := context.WithTimeout(t.Context(), testhost.Limit(10*time.Second))
		defer cancel()
		if err := tr.Close(ctx); err != nil {
			t.Fatal(err)
		}
		rpc, step := s.find("grpc.health.v1.Health/Check"), s.find("Check: a step")
		if rpc == nil || step == nil || len(s.spans) != 2 {
			t.Fatalf("%s: spans %v", network, s.spans)
		}
		if hex(rpc.TraceId) != traceID || hex(rpc.ParentSpanId) != parentID || hex(step.TraceId) != traceID || hex(step.ParentSpanId) != hex(rpc.SpanId) {
			t.Errorf("%s: RPC %v\nstep %v", network, rpc, step)
		}
		if step.EndTimeUnixNano-step.StartTimeUnixNano != uint64(time.Second) {
			t.Errorf("%s: the step took %d ns", network, step.EndTimeUnixNano-step.StartTimeUnixNano)
		}
	}
}

func hex(b []byte) string {
	const digits = "0123456789abcdef"
	var out strings.Builder
	for _, x := range b {
		out.WriteByte(digits[x>>4])
		out.WriteByte(digits[x&15])
	}
	return out.String()
}

// Calls that nobody has decided on are traced at the rate that is set.
func TestSamplingRate(t *testing.T) {
	s := &sink{}
	tr, err := New(t.Context(), Config{Endpoint: s.serve(t, "tcp", "127.0.0.1:0"), PerMillion: 1e6})
	if err != nil {
		t.Fatal(err)
	}
	c, wait := dial(t, tr)
	for range 10 {
		if _, err := c.Check(t.Context(), &healthpb.HealthCheckRequest{}); err != nil {
			t.Fatal(err)
		}
	}
	wait()
	if err := tr.Close(t.Context()); err != nil || len(s.spans) != 20 {
		t.Errorf("%d spans, %v", len(s.spans), err)
	}
}

// A collector that hangs, or that is not there, holds up no call, and the end
// only as long as it may.
func TestCollectorIsNoMatter(t *testing.T) {
	hold := make(chan struct{})
	defer close(hold)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
	for name, endpoint := range map[string]string{"hangs": (&sink{hold: hold}).serve(t, "tcp", "127.0.0.1:0"), "absent": l.Addr().String()} {
		t.Run(name, func(t *testing.T) {
			failed := make(chan error, 100)
			tr, err := New(t.Context(), Config{Endpoint: endpoint, PerMillion: 1e6, Failed: func(err error) {
				select {
				case failed <- err:
				default:
				}
			}})
			if err != nil {
				t.Fatal(err)
			}
			c, _ := dial(t, tr)
			began := time.Now()
			sampled := trace.ContextWithSpanContext(t.Context(), trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID{1}, SpanID: trace.SpanID{1}, TraceFlags: trace.FlagsSampled}))
			for range 3 * queue { // more than may wait
				tr.Step(sampled, "Check", "another", began, began)
			}
			for range 20 {
				if _, err := c.Check(t.Context(), &healthpb.HealthCheckRequest{}); err != nil {
					t.Fatal(err)
				}
			}
			if d := time.Since(began); d > testhost.Limit(5*time.Second) {
				t.Errorf("20 calls took %s", d)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
			defer cancel()
			began = time.Now()
			err = tr.Close(ctx)
			if d := time.Since(began); d > testhost.Limit(5*time.Second) {
				t.Errorf("the end took %s", d)
			}
			if err == nil && len(failed) == 0 {
				t.Error("nobody was told that spans are lost")
			}
			if err != nil && !errors.Is(err, context.DeadlineExceeded) {
				t.Log(err)
			}
		})
	}
}

func TestLocal(t *testing.T) {
	for endpoint, want := range map[string]bool{
		"127.0.0.1:4317": true, "[::1]:4317": true, "localhost:4317": true, "unix:///run/otlp": true,
		"192.0.2.1:4317": false, "collector:4317": false, "localhost.example:4317": false, "": false,
	} {
		if got := Local(endpoint); got != want {
			t.Errorf("%q: %v", endpoint, got)
		}
	}
}

// BenchmarkCall: a call through gRPC with one step, without traces, with a trace
// that its caller does not want, and with one that it does.
func BenchmarkCall(b *testing.B) {
	on := func(b *testing.B) *Tracing {
		tr, err := New(b.Context(), Config{Endpoint: (&sink{}).serve(b, "tcp", "127.0.0.1:0")})
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = tr.Close(context.Background()) })
		return tr
	}
	for _, x := range []struct {
		name    string
		make    func(*testing.B) *Tracing
		sampled string
	}{{"off", func(*testing.B) *Tracing { return nil }, "01"}, {"unsampled", on, "00"}, {"sampled", on, "01"}} {
		b.Run(x.name, func(b *testing.B) {
			c, _ := dial(b, x.make(b))
			ctx := caller(b.Context(), x.sampled)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := c.Check(ctx, &healthpb.HealthCheckRequest{}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkStep: what a step costs that is not traced.
func BenchmarkStep(b *testing.B) {
	now := time.Now()
	tr, err := New(b.Context(), Config{Endpoint: "127.0.0.1:1"})
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = tr.Close(b.Context()) }()
	unsampled := trace.ContextWithSpanContext(b.Context(), trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID{1}, SpanID: trace.SpanID{1}}))
	for name, tr := range map[string]*Tracing{"off": nil, "unsampled": tr} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				tr.Step(unsampled, "RunPodSandbox", "record", now, now)
			}
		})
	}
}
