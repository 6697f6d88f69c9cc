package cri

import (
	"context"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ListMetricDescriptors implements RuntimeService. kubelet asks once, at its
// start, and ignores metrics that are not declared here.
func (s *Server) ListMetricDescriptors(context.Context, *criv1.ListMetricDescriptorsRequest) (*criv1.ListMetricDescriptorsResponse, error) {
	return &criv1.ListMetricDescriptorsResponse{Descriptors: append(describe(podMetrics()), describe(containerMetrics())...)}, nil
}
