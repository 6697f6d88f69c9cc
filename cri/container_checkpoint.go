package cri

import (
	"context"
	"time"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/internal/errs"
)

// CheckpointContainer implements RuntimeService.
func (s *Server) CheckpointContainer(ctx context.Context, req *criv1.CheckpointContainerRequest) (*criv1.CheckpointContainerResponse, error) {
	if err := requireID("container_id", req.GetContainerId()); err != nil {
		return nil, err
	}
	const longest = int64(24 * time.Hour / time.Second)
	if t := req.GetTimeout(); t < 0 || t > longest {
		return nil, errs.New(errs.InvalidArgument, "timeout of %d seconds is not between 0 (the default) and %d", t, longest)
	}
	if err := s.pods.Checkpoint(ctx, req.GetContainerId(), req.GetLocation(), time.Duration(req.GetTimeout())*time.Second); err != nil {
		return nil, err
	}
	return &criv1.CheckpointContainerResponse{}, nil
}
