package cri

import (
	"context"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/cri/streaming"
	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/pod"
)

// Exec implements RuntimeService: it returns a one-time URL.
func (s *Server) Exec(_ context.Context, req *criv1.ExecRequest) (*criv1.ExecResponse, error) {
	if err := checkCommand(req.GetContainerId(), req.GetCmd()); err != nil {
		return nil, err
	}
	if err := checkStreams(req.GetTty(), req.GetStdin(), req.GetStdout(), req.GetStderr()); err != nil {
		return nil, err
	}
	c, err := s.runningContainer(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	url, err := s.streams.ExecURL(streaming.Command{
		ContainerID: c.ID, Cmd: req.GetCmd(), TTY: req.GetTty(),
		Stdin: req.GetStdin(), Stdout: req.GetStdout(), Stderr: req.GetStderr(),
	})
	if err != nil {
		return nil, err
	}
	return &criv1.ExecResponse{Url: url}, nil
}

// checkStreams: a terminal has one output, and something must be streamed.
func checkStreams(tty, stdin, stdout, stderr bool) error {
	if tty && stderr {
		return invalid("tty and stderr exclude each other")
	}
	if !stdin && !stdout && !stderr {
		return invalid("none of stdin, stdout and stderr is set")
	}
	return nil
}

// runningContainer finds a container and demands that it runs.
func (s *Server) runningContainer(id string) (*pod.Container, error) {
	c, err := s.pods.Container(id)
	if err != nil {
		return nil, err
	}
	if c.State != pod.StateRunning {
		return nil, errs.New(errs.FailedPrecondition, "reach into container %s: it is %s, not running", c.ID, c.State)
	}
	return c, nil
}
