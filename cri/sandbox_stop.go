package cri

import (
	"context"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// StopPodSandbox implements RuntimeService. It succeeds on an unknown ID.
// kubelet calls it several times per pod.
func (s *Server) StopPodSandbox(ctx context.Context, req *criv1.StopPodSandboxRequest) (*criv1.StopPodSandboxResponse, error) {
	if err := requireID("pod_sandbox_id", req.GetPodSandboxId()); err != nil {
		return nil, err
	}
	return &criv1.StopPodSandboxResponse{}, ignoreNotFound(s.pods.StopSandbox(ctx, req.GetPodSandboxId()))
}
