// Package tracing sends OpenTelemetry traces of what the daemon does to a
// collector (OTLP over gRPC). A call of the kubelet that is part of a trace goes
// on with it: the RPC is a span, each step of its operation one below it.
//
// Nothing waits for the collector. Spans are queued, sent in the background, and
// dropped where the queue is full. They name methods, steps, pods and containers;
// nothing else of a request is in them.
//
// Who wants no traces has no Tracing: its methods do nothing on nil.
//
// Concurrency: all methods may be called by many goroutines.
package tracing

import (
	"context"
	"crypto/tls"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/naru-project/naru/internal/errs"
)

const (
	// exportTime is how long one delivery may take, with its repetitions.
	exportTime = 10 * time.Second
	// queue is how many spans may wait. A pod has some thirty.
	queue = 2048
	// scope names what made the spans of steps.
	scope = "github.com/naru-project/naru"
)

// Config of a Tracing.
type Config struct {
	Endpoint string // host:port, or unix:///path
	// PerMillion is how many of a million calls are traced that come without a
	// decision of their caller's.
	PerMillion int
	Version    string // of the daemon
	// Failed is told why spans could not be sent.
	Failed func(error)
}

// Tracing makes spans and sends them.
type Tracing struct {
	provider *sdktrace.TracerProvider
	tracer   trace.Tracer
}

// New returns a Tracing. The collector need not be there yet, or ever.
func New(ctx context.Context, c Config) (*Tracing, error) {
	exporter, err := otlptracegrpc.New(ctx,
		otlptracegrpc.WithEndpoint(c.Endpoint), otlptracegrpc.WithTimeout(exportTime),
		otlptracegrpc.WithDialOption(grpc.WithTransportCredentials(security(c.Endpoint))))
	if err != nil {
		return nil, errs.New(errs.InvalidArgument, "send traces to %s: %w", c.Endpoint, err)
	}
	if c.Failed != nil {
		otel.SetErrorHandler(otel.ErrorHandlerFunc(c.Failed)) // the library has one for all
	}
	attrs := []attribute.KeyValue{attribute.String("service.name", "naru"), attribute.String("service.version", c.Version)}
	if host, err := os.Hostname(); err == nil {
		attrs = append(attrs, attribute.String("host.name", host))
	}
	p := sdktrace.NewTracerProvider(
		sdktrace.WithBatcher(exporter, sdktrace.WithMaxQueueSize(queue), sdktrace.WithExportTimeout(exportTime)),
		sdktrace.WithResource(resource.NewSchemaless(attrs...)),
		sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(float64(c.PerMillion)/1e6))),
	)
	return &Tracing{provider: p, tracer: p.Tracer(scope)}, nil
}

// security is none on this host, where the kubelet has none either, and TLS with
// the host's authorities for any other.
func security(endpoint string) credentials.TransportCredentials {
	if Local(endpoint) {
		return insecure.NewCredentials()
	}
	return credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS12})
}

// Local reports whether an endpoint is on this host.
func Local(endpoint string) bool {
	if strings.HasPrefix(endpoint, "unix:") {
		return true
	}
	host, _, err := net.SplitHostPort(endpoint)
	if err != nil {
		return false
	}
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}

// ServerOptions have a gRPC server go on with its callers' traces.
func (t *Tracing) ServerOptions() []grpc.ServerOption {
	if t == nil {
		return nil
	}
	return []grpc.ServerOption{grpc.StatsHandler(otelgrpc.NewServerHandler(
		otelgrpc.WithTracerProvider(t.provider), otelgrpc.WithPropagators(propagation.TraceContext{})))}
}

// Step adds a span for what is over already, below that of ctx.
func (t *Tracing) Step(ctx context.Context, operation, step string, began, ended time.Time) {
	if t == nil || !trace.SpanFromContext(ctx).IsRecording() && !trace.SpanContextFromContext(ctx).IsSampled() {
		return
	}
	_, span := t.tracer.Start(ctx, operation+": "+step, trace.WithTimestamp(began))
	span.End(trace.WithTimestamp(ended))
}

// Close sends what waits, until ctx ends.
func (t *Tracing) Close(ctx context.Context) error {
	if t == nil {
		return nil
	}
	if err := t.provider.Shutdown(ctx); err != nil {
		return errs.New(errs.Unavailable, "send the last traces: %w", err)
	}
	return nil
}
