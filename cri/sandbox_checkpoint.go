package cri

import (
	"context"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// CheckpointPod implements RuntimeService.
func (s *Server) CheckpointPod(context.Context, *criv1.CheckpointPodRequest) (*criv1.CheckpointPodResponse, error) {
	return nil, unimplemented("CheckpointPod")
}
