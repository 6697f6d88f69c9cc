package cri

import (
	"context"
	"math"
	"time"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// StopContainer implements RuntimeService. It succeeds on an unknown ID. A
// timeout of 0 kills at once.
func (s *Server) StopContainer(ctx context.Context, req *criv1.StopContainerRequest) (*criv1.StopContainerResponse, error) {
	if err := requireID("container_id", req.GetContainerId()); err != nil {
		return nil, err
	}
	grace, err := seconds("timeout", req.GetTimeout())
	if err != nil {
		return nil, err
	}
	return &criv1.StopContainerResponse{}, ignoreNotFound(s.pods.StopContainer(ctx, req.GetContainerId(), grace))
}

// seconds converts a number of seconds; more than a Duration holds (292 years)
// is that.
func seconds(field string, n int64) (time.Duration, error) {
	const most = int64(math.MaxInt64 / time.Second)
	if n < 0 {
		return 0, invalid("%s %d is negative", field, n)
	}
	return time.Duration(min(n, most)) * time.Second, nil
}
