package cri

import (
	"context"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// UpdateRuntimeConfig implements RuntimeService: kubelet tells the node's pod
// CIDRs. An empty list says nothing and changes nothing.
func (s *Server) UpdateRuntimeConfig(ctx context.Context, req *criv1.UpdateRuntimeConfigRequest) (*criv1.UpdateRuntimeConfigResponse, error) {
	if req.GetRuntimeConfig() == nil {
		return nil, invalid("runtime_config is missing")
	}
	list := req.GetRuntimeConfig().GetNetworkConfig().GetPodCidr()
	if list == "" {
		return &criv1.UpdateRuntimeConfigResponse{}, nil
	}
	cidrs, err := podCIDRs(list)
	if err != nil {
		return nil, err
	}
	return &criv1.UpdateRuntimeConfigResponse{}, s.pods.SetPodCIDRs(ctx, cidrs)
}
