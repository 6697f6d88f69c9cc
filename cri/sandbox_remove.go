package cri

import (
	"context"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// RemovePodSandbox implements RuntimeService. It succeeds on an unknown ID.
// It kills what still runs.
func (s *Server) RemovePodSandbox(ctx context.Context, req *criv1.RemovePodSandboxRequest) (*criv1.RemovePodSandboxResponse, error) {
	if err := requireID("pod_sandbox_id", req.GetPodSandboxId()); err != nil {
		return nil, err
	}
	return &criv1.RemovePodSandboxResponse{}, ignoreNotFound(s.pods.RemoveSandbox(ctx, req.GetPodSandboxId()))
}
