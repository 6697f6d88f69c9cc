package cri

import (
	"context"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// UpdateContainerResources implements RuntimeService.
func (s *Server) UpdateContainerResources(ctx context.Context, req *criv1.UpdateContainerResourcesRequest) (*criv1.UpdateContainerResourcesResponse, error) {
	if err := requireID("container_id", req.GetContainerId()); err != nil {
		return nil, err
	}
	if req.GetLinux() == nil {
		return nil, invalid("linux is missing")
	}
	r, err := resources("linux", req.GetLinux())
	if err != nil {
		return nil, err
	}
	return &criv1.UpdateContainerResourcesResponse{}, s.pods.UpdateContainer(ctx, req.GetContainerId(), r, req.GetAnnotations())
}
