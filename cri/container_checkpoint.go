package cri

import (
	"context"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// CheckpointContainer implements RuntimeService.
func (s *Server) CheckpointContainer(context.Context, *criv1.CheckpointContainerRequest) (*criv1.CheckpointContainerResponse, error) {
	return nil, unimplemented("CheckpointContainer")
}
