package cri

import (
	"context"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/cri/streaming"
	"github.com/naru-project/naru/internal/errs"
)

// PortForward implements RuntimeService: it returns a one-time URL.
func (s *Server) PortForward(_ context.Context, req *criv1.PortForwardRequest) (*criv1.PortForwardResponse, error) {
	if err := requireID("pod_sandbox_id", req.GetPodSandboxId()); err != nil {
		return nil, err
	}
	ports, err := forwardPorts(req.GetPort())
	if err != nil {
		return nil, err
	}
	p, err := s.pods.Sandbox(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	if !p.Ready() {
		return nil, errs.New(errs.FailedPrecondition, "forward ports of pod %s: it is not ready", p.ID)
	}
	url, err := s.streams.PortForwardURL(streaming.Forward{PodID: p.ID, Ports: ports})
	if err != nil {
		return nil, err
	}
	return &criv1.PortForwardResponse{Url: url}, nil
}

// maxForwardPorts is what the channel numbers of a WebSocket leave room for.
const maxForwardPorts = 100

func forwardPorts(in []int32) ([]uint16, error) {
	if len(in) > maxForwardPorts {
		return nil, invalid("port lists %d ports, more than %d", len(in), maxForwardPorts)
	}
	var out []uint16
	for _, p := range in {
		if err := checkRange("port", int64(p), 1, 65535); err != nil {
			return nil, err
		}
		out = append(out, uint16(p))
	}
	return out, nil
}
