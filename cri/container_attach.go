package cri

import (
	"context"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/cri/streaming"
	"github.com/naru-project/naru/internal/errs"
)

// Attach implements RuntimeService: it returns a one-time URL.
func (s *Server) Attach(_ context.Context, req *criv1.AttachRequest) (*criv1.AttachResponse, error) {
	if err := requireID("container_id", req.GetContainerId()); err != nil {
		return nil, err
	}
	if err := checkStreams(req.GetTty(), req.GetStdin(), req.GetStdout(), req.GetStderr()); err != nil {
		return nil, err
	}
	c, err := s.runningContainer(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	if req.GetStdin() && !containerConfigOf(c).Stdin {
		return nil, errs.New(errs.FailedPrecondition, "attach to stdin of container %s: it was created without one", c.ID)
	}
	url, err := s.streams.AttachURL(streaming.Command{
		ContainerID: c.ID, TTY: req.GetTty(), Stdin: req.GetStdin(), Stdout: req.GetStdout(), Stderr: req.GetStderr(),
	})
	if err != nil {
		return nil, err
	}
	return &criv1.AttachResponse{Url: url}, nil
}
