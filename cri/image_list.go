package cri

import (
	"context"

	"google.golang.org/grpc"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ListImages implements ImageService.
func (s *Server) ListImages(_ context.Context, req *criv1.ListImagesRequest) (*criv1.ListImagesResponse, error) {
	list, err := s.listImages(req.GetFilter())
	if err != nil {
		return nil, err
	}
	return &criv1.ListImagesResponse{Images: list}, nil
}

// StreamImages implements ImageService.
func (s *Server) StreamImages(req *criv1.StreamImagesRequest, out grpc.ServerStreamingServer[criv1.StreamImagesResponse]) error {
	list, err := s.listImages(req.GetFilter())
	if err != nil {
		return err
	}
	return sendChunks(out.Context(), list, func(chunk []*criv1.Image) error {
		return out.Send(&criv1.StreamImagesResponse{Images: chunk})
	})
}
