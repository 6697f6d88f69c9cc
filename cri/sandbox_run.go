package cri

import (
	"context"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// RunPodSandbox implements RuntimeService. A retry after the client's deadline
// joins the operation that is still running.
func (s *Server) RunPodSandbox(ctx context.Context, req *criv1.RunPodSandboxRequest) (*criv1.RunPodSandboxResponse, error) {
	config, err := s.sandboxConfig(req.GetConfig(), req.GetRuntimeHandler())
	if err != nil {
		return nil, err
	}
	id, err := s.pods.RunSandbox(ctx, config)
	if err != nil {
		return nil, err
	}
	return &criv1.RunPodSandboxResponse{PodSandboxId: id}, nil
}
