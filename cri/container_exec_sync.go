package cri

import (
	"context"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ExecSync implements RuntimeService. A timeout of 0 means none; a command
// that runs into it is killed and the answer is DeadlineExceeded.
func (s *Server) ExecSync(ctx context.Context, req *criv1.ExecSyncRequest) (*criv1.ExecSyncResponse, error) {
	if err := checkCommand(req.GetContainerId(), req.GetCmd()); err != nil {
		return nil, err
	}
	timeout, err := seconds("timeout", req.GetTimeout())
	if err != nil {
		return nil, err
	}
	result, err := s.pods.ExecSync(ctx, req.GetContainerId(), req.GetCmd(), timeout)
	if err != nil {
		return nil, err
	}
	stdout, stderr := fitOutput(result.Stdout, result.Stderr, maxExecOutput)
	return &criv1.ExecSyncResponse{Stdout: stdout, Stderr: stderr, ExitCode: int32(result.Code)}, nil
}

// maxExecOutput leaves room for the rest of the message: what does not fit
// in a message would be an error, and CRI wants it cut instead.
const maxExecOutput = maxMessage - 4096

// fitOutput cuts two outputs to limit bytes in all. One gets what the other
// leaves, but at least half.
func fitOutput(stdout, stderr []byte, limit int) (out, err []byte) {
	half := limit / 2
	out = stdout[:min(len(stdout), max(half, limit-len(stderr)))]
	err = stderr[:min(len(stderr), limit-len(out))]
	return out, err
}

func checkCommand(id string, cmd []string) error {
	if err := requireID("container_id", id); err != nil {
		return err
	}
	if len(cmd) == 0 || cmd[0] == "" {
		return invalid("cmd is empty")
	}
	return checkTexts("cmd", cmd)
}
