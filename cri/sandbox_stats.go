package cri

import (
	"context"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// PodSandboxStats implements RuntimeService. kubelet probes it once with an
// empty ID: any answer but Unimplemented means that it is there.
func (s *Server) PodSandboxStats(ctx context.Context, req *criv1.PodSandboxStatsRequest) (*criv1.PodSandboxStatsResponse, error) {
	if err := requireID("pod_sandbox_id", req.GetPodSandboxId()); err != nil {
		return nil, err
	}
	stats, err := s.pods.SandboxStats(ctx, req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	return &criv1.PodSandboxStatsResponse{Stats: sandboxStats(stats)}, nil
}
