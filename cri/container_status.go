package cri

import (
	"context"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ContainerStatus implements RuntimeService.
func (s *Server) ContainerStatus(ctx context.Context, req *criv1.ContainerStatusRequest) (*criv1.ContainerStatusResponse, error) {
	if err := requireID("container_id", req.GetContainerId()); err != nil {
		return nil, err
	}
	c, err := s.pods.Container(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	out := &criv1.ContainerStatusResponse{Status: containerStatus(c)}
	if req.GetVerbose() {
		out.Info = s.infoOf(ctx, c.ID)
	}
	return out, nil
}
