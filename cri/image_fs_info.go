package cri

import (
	"context"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ImageFsInfo implements ImageService. Images and the writable layers of
// containers live on one file system, so both lists tell the same.
func (s *Server) ImageFsInfo(context.Context, *criv1.ImageFsInfoRequest) (*criv1.ImageFsInfoResponse, error) {
	info, err := s.images.FsInfo()
	if err != nil {
		return nil, err
	}
	list := []*criv1.FilesystemUsage{criFsUsage(info)}
	return &criv1.ImageFsInfoResponse{ImageFilesystems: list, ContainerFilesystems: list}, nil
}
