package cri

import (
	"context"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// RemoveImage implements ImageService. It removes the image with all its names
// and succeeds on an absent one.
func (s *Server) RemoveImage(ctx context.Context, req *criv1.RemoveImageRequest) (*criv1.RemoveImageResponse, error) {
	ref, err := s.imageRef(req.GetImage())
	if err != nil {
		return nil, err
	}
	return &criv1.RemoveImageResponse{}, ignoreNotFound(s.images.Remove(ctx, ref))
}
