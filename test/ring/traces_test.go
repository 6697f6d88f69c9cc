package ring

import (
	"context"
	"encoding/hex"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	otlp "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// spans is a collector of traces.
type spans struct {
	collector.UnimplementedTraceServiceServer
	mu  sync.Mutex
	all []*otlp.Span
}

// Export implements collector.TraceServiceServer.
func (s *spans) Export(_ context.Context, r *collector.ExportTraceServiceRequest) (*collector.ExportTraceServiceResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, rs := range r.ResourceSpans {
		for _, ss := range rs.ScopeSpans {
			s.all = append(s.all, ss.Spans...)
		}
	}
	return &collector.ExportTraceServiceResponse{}, nil
}

// TestTraces: calls of a kubelet that traces are part of its trace, with their
// steps; they name what they are about, and no secret.
func TestTraces(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s, g := &spans{}, grpc.NewServer()
	collector.RegisterTraceServiceServer(g, s)
	go func() { _ = g.Serve(l) }()
	t.Cleanup(g.Stop)
	n := StartNode(t, WithConfig(fmt.Sprintf("tracing.endpoint = %q", l.Addr())))
	const trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
	kubelet := func() context.Context {
		return metadata.AppendToOutgoingContext(within(t, callTime), "traceparent", "00-"+trace+"-"+parent+"-01")
	}
	pod := n.PodConfig()
	p, err := n.Runtime.RunPodSandbox(kubelet(), &criv1.RunPodSandboxRequest{Config: pod})
	if err != nil {
		t.Fatal(err)
	}
	c := n.ContainerConfig()
	c.Envs, c.Args = []*criv1.KeyValue{{Key: "PASSWORD", Value: []byte("hunter2")}}, []string{"hunter2"}
	c.Command = []string{"/bin/sh", "-c", "sleep 1000"}
	_, err = n.Runtime.CreateContainer(kubelet(), &criv1.CreateContainerRequest{PodSandboxId: p.PodSandboxId, Config: c, SandboxConfig: pod})
	if err != nil {
		t.Fatal(err)
	}
	n.Run(t, n.Pod(t, nil), nil) // of nobody's trace
	n.StopDaemon()               // sends the last ones
	eventually(t, 20*time.Second, "all spans", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.all) > 10
	})
	s.mu.Lock()
	defer s.mu.Unlock()
	byName := map[string]*otlp.Span{}
	for _, x := range s.all {
		byName[x.Name] = x
		if hex.EncodeToString(x.TraceId) != trace {
			t.Errorf("%s is of trace %x", x.Name, x.TraceId)
		}
		if text := x.String(); strings.Contains(text, "hunter2") || strings.Contains(text, "PASSWORD") {
			t.Errorf("a secret is in %s", text)
		}
	}
	for rpc, want := range map[string]struct{ about, step string }{
		"runtime.v1.RuntimeService/RunPodSandbox":   {pod.Metadata.Name, "RunPodSandbox: record ready"},
		"runtime.v1.RuntimeService/CreateContainer": {p.PodSandboxId, "CreateContainer: process"},
	} {
		x, step := byName[rpc], byName[want.step]
		if x == nil || step == nil {
			t.Errorf("no span of %s, or none of its step %q", rpc, want.step)
			continue
		}
		if hex.EncodeToString(x.ParentSpanId) != parent || string(step.ParentSpanId) != string(x.SpanId) {
			t.Errorf("%s is below %x, its step below %x", rpc, x.ParentSpanId, step.ParentSpanId)
		}
		if !strings.Contains(x.String(), want.about) {
			t.Errorf("%s does not name %s: %s", rpc, want.about, x)
		}
	}
}
