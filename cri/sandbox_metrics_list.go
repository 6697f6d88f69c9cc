package cri

import (
	"context"

	"google.golang.org/grpc"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ListPodSandboxMetrics implements RuntimeService.
func (s *Server) ListPodSandboxMetrics(ctx context.Context, _ *criv1.ListPodSandboxMetricsRequest) (*criv1.ListPodSandboxMetricsResponse, error) {
	list, err := s.sandboxMetrics(ctx)
	if err != nil {
		return nil, err
	}
	return &criv1.ListPodSandboxMetricsResponse{PodMetrics: list}, nil
}

// StreamPodSandboxMetrics implements RuntimeService.
func (s *Server) StreamPodSandboxMetrics(_ *criv1.StreamPodSandboxMetricsRequest, out grpc.ServerStreamingServer[criv1.StreamPodSandboxMetricsResponse]) error {
	list, err := s.sandboxMetrics(out.Context())
	if err != nil {
		return err
	}
	return sendChunks(out.Context(), list, func(chunk []*criv1.PodSandboxMetrics) error {
		return out.Send(&criv1.StreamPodSandboxMetricsResponse{PodSandboxMetrics: chunk})
	})
}

// sandboxMetrics is the one place that makes the metrics of all pods.
func (s *Server) sandboxMetrics(context.Context) ([]*criv1.PodSandboxMetrics, error) {
	return nil, unimplemented("the metrics of pods")
}
