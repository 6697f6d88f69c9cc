package cri

import (
	"context"

	"google.golang.org/grpc"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ListPodSandboxStats implements RuntimeService.
func (s *Server) ListPodSandboxStats(ctx context.Context, req *criv1.ListPodSandboxStatsRequest) (*criv1.ListPodSandboxStatsResponse, error) {
	list := s.pods.ListSandboxStats(ctx, sandboxStatsFilter(req.GetFilter()))
	return &criv1.ListPodSandboxStatsResponse{Stats: convertAll(list, sandboxStats)}, nil
}

// StreamPodSandboxStats implements RuntimeService.
func (s *Server) StreamPodSandboxStats(req *criv1.StreamPodSandboxStatsRequest, out grpc.ServerStreamingServer[criv1.StreamPodSandboxStatsResponse]) error {
	list := s.pods.ListSandboxStats(out.Context(), sandboxStatsFilter(req.GetFilter()))
	return sendChunks(out.Context(), convertAll(list, sandboxStats), func(chunk []*criv1.PodSandboxStats) error {
		return out.Send(&criv1.StreamPodSandboxStatsResponse{PodSandboxStats: chunk})
	})
}
