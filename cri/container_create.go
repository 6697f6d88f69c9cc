package cri

import (
	"context"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/pod"
)

// CreateContainer implements RuntimeService. A retry after the client's
// deadline joins the operation that is still running.
func (s *Server) CreateContainer(ctx context.Context, req *criv1.CreateContainerRequest) (*criv1.CreateContainerResponse, error) {
	if err := requireID("pod_sandbox_id", req.GetPodSandboxId()); err != nil {
		return nil, err
	}
	if req.GetConfig() == nil {
		return nil, invalid("config is missing")
	}
	p, err := s.pods.Sandbox(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	config, err := s.containerConfig(req.GetConfig(), configOf(p))
	if err != nil {
		return nil, err
	}
	if err := s.resolveTarget(p.ID, &config.Security); err != nil {
		return nil, err
	}
	id, err := s.pods.CreateContainer(ctx, p.ID, config)
	if err != nil {
		return nil, err
	}
	return &criv1.CreateContainerResponse{ContainerId: id}, nil
}

// resolveTarget finds the container whose PID namespace is to be joined: one
// of the same pod that runs (kubectl debug --target).
func (s *Server) resolveTarget(podID string, sec *pod.Security) error {
	if sec.PIDMode != pod.PIDTarget {
		return nil
	}
	target, err := s.pods.Container(sec.PIDTarget)
	if err != nil {
		return err
	}
	if target.PodID != podID {
		return invalid("config.linux.security_context.namespace_options.target_id %s is a container of another pod", target.ID)
	}
	if target.State != pod.StateRunning {
		return errs.New(errs.FailedPrecondition, "join PID namespace of container %s: it is %s, not running", target.ID, target.State)
	}
	sec.PIDTarget = target.ID
	return nil
}
