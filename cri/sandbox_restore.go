package cri

import (
	"context"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// RestorePod implements RuntimeService.
func (s *Server) RestorePod(context.Context, *criv1.RestorePodRequest) (*criv1.RestorePodResponse, error) {
	return nil, unimplemented("RestorePod")
}
