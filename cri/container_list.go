package cri

import (
	"context"

	"google.golang.org/grpc"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ListContainers implements RuntimeService.
func (s *Server) ListContainers(_ context.Context, req *criv1.ListContainersRequest) (*criv1.ListContainersResponse, error) {
	items, err := s.listContainers(req.GetFilter())
	if err != nil {
		return nil, err
	}
	return &criv1.ListContainersResponse{Containers: items}, nil
}

// StreamContainers implements RuntimeService.
func (s *Server) StreamContainers(req *criv1.StreamContainersRequest, out grpc.ServerStreamingServer[criv1.StreamContainersResponse]) error {
	items, err := s.listContainers(req.GetFilter())
	if err != nil {
		return err
	}
	return sendChunks(out.Context(), items, func(chunk []*criv1.Container) error {
		return out.Send(&criv1.StreamContainersResponse{Containers: chunk})
	})
}
