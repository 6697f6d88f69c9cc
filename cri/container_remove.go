package cri

import (
	"context"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// RemoveContainer implements RuntimeService. It succeeds on an unknown ID and
// kills what still runs.
func (s *Server) RemoveContainer(ctx context.Context, req *criv1.RemoveContainerRequest) (*criv1.RemoveContainerResponse, error) {
	if err := requireID("container_id", req.GetContainerId()); err != nil {
		return nil, err
	}
	return &criv1.RemoveContainerResponse{}, ignoreNotFound(s.pods.RemoveContainer(ctx, req.GetContainerId()))
}
