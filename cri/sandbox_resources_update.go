package cri

import (
	"context"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"

	"github.com/naru-project/naru/internal/errs"
)

// UpdatePodSandboxResources implements RuntimeService. The new totals are kept
// with the pod; kubelet has set the pod's cgroup itself. It is best effort by
// the protocol, yet kubelet fails the resize on any error: so only a bad
// request or an unknown pod is one.
func (s *Server) UpdatePodSandboxResources(ctx context.Context, req *criv1.UpdatePodSandboxResourcesRequest) (*criv1.UpdatePodSandboxResourcesResponse, error) {
	if err := requireID("pod_sandbox_id", req.GetPodSandboxId()); err != nil {
		return nil, err
	}
	overhead, err := optionalResources("overhead", req.GetOverhead())
	if err != nil {
		return nil, err
	}
	total, err := optionalResources("resources", req.GetResources())
	if err != nil {
		return nil, err
	}
	err = s.pods.UpdateSandbox(ctx, req.GetPodSandboxId(), overhead, total)
	if errs.Is(err, errs.NotFound) || errs.Is(err, errs.InvalidArgument) {
		return nil, err
	}
	if err != nil {
		klog.FromContext(ctx).Error(err, "New resources of the pod were not kept")
	}
	return &criv1.UpdatePodSandboxResourcesResponse{}, nil
}
