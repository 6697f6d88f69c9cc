package cri

import (
	"context"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ListMetricDescriptors implements RuntimeService.
func (s *Server) ListMetricDescriptors(context.Context, *criv1.ListMetricDescriptorsRequest) (*criv1.ListMetricDescriptorsResponse, error) {
	return nil, unimplemented("ListMetricDescriptors")
}
