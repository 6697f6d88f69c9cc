package cri

import (
	"context"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// RuntimeConfig implements RuntimeService. kubelet asks once, at its start,
// and takes the answer as its own cgroup driver.
func (s *Server) RuntimeConfig(context.Context, *criv1.RuntimeConfigRequest) (*criv1.RuntimeConfigResponse, error) {
	driver := criv1.CgroupDriver_CGROUPFS
	if s.host.SystemdCgroups {
		driver = criv1.CgroupDriver_SYSTEMD
	}
	return &criv1.RuntimeConfigResponse{Linux: &criv1.LinuxRuntimeConfiguration{CgroupDriver: driver}}, nil
}
