package cri

import (
	"context"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ImageStatus implements ImageService. An absent image is no error but nil.
func (s *Server) ImageStatus(ctx context.Context, req *criv1.ImageStatusRequest) (*criv1.ImageStatusResponse, error) {
	image, err := s.resolveImage(req.GetImage())
	if image == nil || err != nil {
		return &criv1.ImageStatusResponse{}, err
	}
	out := &criv1.ImageStatusResponse{Image: criImage(image)}
	if req.GetVerbose() {
		out.Info = info(ctx, map[string]any{"info": imageInfo(image)})
	}
	return out, nil
}
