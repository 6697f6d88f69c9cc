package cri

import (
	"context"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// PullImage implements ImageService. The answer is the image's ID, the same as
// in Image.id and ContainerStatus.image_id. Errors pass as they are: kubelet
// looks at how their text begins.
func (s *Server) PullImage(ctx context.Context, req *criv1.PullImageRequest) (*criv1.PullImageResponse, error) {
	ref, err := s.imageRef(req.GetImage())
	if err != nil {
		return nil, err
	}
	id, err := s.images.Pull(ctx, ref, auth(req.GetAuth()))
	if err != nil {
		return nil, err
	}
	return &criv1.PullImageResponse{ImageRef: id}, nil
}
