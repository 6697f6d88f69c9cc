package cri

import (
	"context"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// StartContainer implements RuntimeService.
func (s *Server) StartContainer(ctx context.Context, req *criv1.StartContainerRequest) (*criv1.StartContainerResponse, error) {
	if err := requireID("container_id", req.GetContainerId()); err != nil {
		return nil, err
	}
	return &criv1.StartContainerResponse{}, s.pods.StartContainer(ctx, req.GetContainerId())
}
