package cri

import (
	"context"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ReopenContainerLog implements RuntimeService: kubelet has renamed the file.
func (s *Server) ReopenContainerLog(ctx context.Context, req *criv1.ReopenContainerLogRequest) (*criv1.ReopenContainerLogResponse, error) {
	if err := requireID("container_id", req.GetContainerId()); err != nil {
		return nil, err
	}
	return &criv1.ReopenContainerLogResponse{}, s.pods.ReopenLog(ctx, req.GetContainerId())
}
