package cri

import (
	"context"

	"google.golang.org/grpc"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ListContainerStats implements RuntimeService.
func (s *Server) ListContainerStats(ctx context.Context, req *criv1.ListContainerStatsRequest) (*criv1.ListContainerStatsResponse, error) {
	list := s.pods.ListContainerStats(ctx, containerStatsFilter(req.GetFilter()))
	return &criv1.ListContainerStatsResponse{Stats: convertAll(list, containerStats)}, nil
}

// StreamContainerStats implements RuntimeService.
func (s *Server) StreamContainerStats(req *criv1.StreamContainerStatsRequest, out grpc.ServerStreamingServer[criv1.StreamContainerStatsResponse]) error {
	list := s.pods.ListContainerStats(out.Context(), containerStatsFilter(req.GetFilter()))
	return sendChunks(out.Context(), convertAll(list, containerStats), func(chunk []*criv1.ContainerStats) error {
		return out.Send(&criv1.StreamContainerStatsResponse{ContainerStats: chunk})
	})
}
