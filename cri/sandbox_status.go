package cri

import (
	"context"
	"time"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/pod"
)

// PodSandboxStatus implements RuntimeService. The timestamp is taken first:
// what is told is at least as new.
func (s *Server) PodSandboxStatus(ctx context.Context, req *criv1.PodSandboxStatusRequest) (*criv1.PodSandboxStatusResponse, error) {
	if err := requireID("pod_sandbox_id", req.GetPodSandboxId()); err != nil {
		return nil, err
	}
	now := time.Now()
	p, err := s.pods.Sandbox(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	out := &criv1.PodSandboxStatusResponse{
		Status:             sandboxStatus(p),
		ContainersStatuses: podContainerStatuses(s.pods.Containers(pod.Filter{PodID: p.ID})),
		Timestamp:          nanos(now),
	}
	if req.GetVerbose() {
		out.Info = s.infoOf(ctx, p.ID)
	}
	return out, nil
}
