package cri

import (
	"context"

	"google.golang.org/grpc"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ListPodSandbox implements RuntimeService.
func (s *Server) ListPodSandbox(_ context.Context, req *criv1.ListPodSandboxRequest) (*criv1.ListPodSandboxResponse, error) {
	items, err := s.listSandboxes(req.GetFilter())
	if err != nil {
		return nil, err
	}
	return &criv1.ListPodSandboxResponse{Items: items}, nil
}

// StreamPodSandboxes implements RuntimeService.
func (s *Server) StreamPodSandboxes(req *criv1.StreamPodSandboxesRequest, out grpc.ServerStreamingServer[criv1.StreamPodSandboxesResponse]) error {
	items, err := s.listSandboxes(req.GetFilter())
	if err != nil {
		return err
	}
	return sendChunks(out.Context(), items, func(chunk []*criv1.PodSandbox) error {
		return out.Send(&criv1.StreamPodSandboxesResponse{PodSandboxes: chunk})
	})
}
