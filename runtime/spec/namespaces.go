package spec

import (
	"fmt"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime"
)

func (b *builder) idMaps() error {
	if err := ValidateIDMaps(b.in.UIDMap, b.in.GIDMap); err != nil {
		return err
	}
	b.spec.Linux.UIDMappings = mappings(b.in.UIDMap)
	b.spec.Linux.GIDMappings = mappings(b.in.GIDMap)
	return nil
}

func mappings(in []runtime.IDMap) (out []specs.LinuxIDMapping) {
	for _, m := range in {
		out = append(out, specs.LinuxIDMapping{ContainerID: m.ContainerID, HostID: m.HostID, Size: m.Size})
	}
	return out
}

// namespaces lists those that the container gets (no path) or joins. One that
// is not listed is the host's.
func (b *builder) namespaces() error {
	in := b.in
	list := []specs.LinuxNamespace{{Type: specs.MountNamespace}, {Type: specs.CgroupNamespace}}
	join := func(t specs.LinuxNamespaceType, path string) {
		if path != "" {
			list = append(list, specs.LinuxNamespace{Type: t, Path: path})
		}
	}
	join(specs.NetworkNamespace, in.Namespaces.Net)
	join(specs.IPCNamespace, in.Namespaces.IPC)
	join(specs.UTSNamespace, in.Namespaces.UTS)
	switch in.Security.PIDMode {
	case runtime.PIDContainer, "":
		list = append(list, specs.LinuxNamespace{Type: specs.PIDNamespace})
	case runtime.PIDPod:
		if in.Namespaces.PID == "" {
			return errs.New(errs.FailedPrecondition, "PID mode pod: the pod shares no PID namespace")
		}
		join(specs.PIDNamespace, in.Namespaces.PID)
	case runtime.PIDTarget:
		if in.TargetPID <= 0 {
			return errs.New(errs.FailedPrecondition, "PID mode target: container %s does not run", clip(in.Security.PIDTarget))
		}
		join(specs.PIDNamespace, fmt.Sprintf("/proc/%d/ns/pid", in.TargetPID))
	case runtime.PIDNode:
	default:
		return errs.New(errs.InvalidArgument, "PID mode %q: unknown", clip(string(in.Security.PIDMode)))
	}
	if len(in.UIDMap) > 0 {
		list = append(list, specs.LinuxNamespace{Type: specs.UserNamespace, Path: in.Namespaces.User})
	}
	b.spec.Linux.Namespaces = list
	return nil
}
