package cri

import (
	"strings"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/pod"
)

// containerConfig converts and checks what CreateContainer is given. The
// sandbox is the pod's own record: the request's copy of it is not believed.
func (s *Server) containerConfig(c *criv1.ContainerConfig, sandbox *pod.SandboxConfig) (*pod.ContainerConfig, error) {
	if c == nil {
		return nil, invalid("config is missing")
	}
	if c.GetMetadata().GetName() == "" {
		return nil, invalid("config.metadata.name is empty")
	}
	if c.GetImage().GetImage() == "" {
		return nil, invalid("config.image.image is empty")
	}
	if err := s.checkHandler(c.GetImage().GetRuntimeHandler()); err != nil {
		return nil, err
	}
	out := &pod.ContainerConfig{
		Metadata:         pod.ContainerMetadata{Name: c.GetMetadata().GetName(), Attempt: c.GetMetadata().GetAttempt()},
		Image:            c.GetImage().GetImage(),
		UserImage:        c.GetImage().GetUserSpecifiedImage(),
		ImageAnnotations: c.GetImage().GetAnnotations(),
		Command:          c.GetCommand(),
		Args:             c.GetArgs(),
		WorkingDir:       c.GetWorkingDir(),
		Labels:           c.GetLabels(),
		Annotations:      c.GetAnnotations(),
		LogPath:          c.GetLogPath(),
		Stdin:            c.GetStdin(),
		StdinOnce:        c.GetStdinOnce(),
		TTY:              c.GetTty(),
	}
	if err := checkContainerTexts(out); err != nil {
		return nil, err
	}
	var err error
	if out.Env, err = environment(c.GetEnvs()); err != nil {
		return nil, err
	}
	if out.Mounts, err = s.mounts(c.GetMounts()); err != nil {
		return nil, err
	}
	if out.Devices, err = devices(c.GetDevices()); err != nil {
		return nil, err
	}
	if out.CDIDevices, err = cdiDevices(c.GetCDIDevices()); err != nil {
		return nil, err
	}
	if out.StopSignal, err = signalName("config.stop_signal", c.GetStopSignal()); err != nil {
		return nil, err
	}
	if out.Resources, err = resources("config.linux.resources", c.GetLinux().GetResources()); err != nil {
		return nil, err
	}
	sc := c.GetLinux().GetSecurityContext()
	if out.Security, err = containerSecurity(sc, sandbox); err != nil {
		return nil, err
	}
	return out, s.containerNamespaces(sc.GetNamespaceOptions(), sandbox, &out.Security)
}

func checkContainerTexts(c *pod.ContainerConfig) error {
	if err := checkLine("config.metadata.name", c.Metadata.Name); err != nil {
		return err
	}
	if err := checkText("config.image.image", c.Image); err != nil {
		return err
	}
	if err := checkTexts("config.command", c.Command); err != nil {
		return err
	}
	if err := checkTexts("config.args", c.Args); err != nil {
		return err
	}
	if err := checkText("config.working_dir", c.WorkingDir); err != nil {
		return err
	}
	if c.LogPath != "" {
		return checkLocal("config.log_path", c.LogPath)
	}
	return nil
}

// environment makes KEY=value strings. Values are bytes and never shown.
func environment(in []*criv1.KeyValue) ([]string, error) {
	var out []string
	for _, kv := range in {
		key, value := kv.GetKey(), string(kv.GetValue())
		if key == "" || strings.ContainsAny(key, "=\x00") {
			return nil, invalid("config.envs: %q is not a name for a variable", clip(key))
		}
		if err := checkText("config.envs: the value of "+clip(key), value); err != nil {
			return nil, err
		}
		out = append(out, key+"="+value)
	}
	return out, nil
}

func devices(in []*criv1.Device) ([]pod.Device, error) {
	var out []pod.Device
	for _, d := range in {
		if err := checkAbs("config.devices.host_path", d.GetHostPath()); err != nil {
			return nil, err
		}
		if err := checkAbs("config.devices.container_path", d.GetContainerPath()); err != nil {
			return nil, err
		}
		if strings.Trim(d.GetPermissions(), "rwm") != "" {
			return nil, invalid("config.devices.permissions %q is not of r, w and m", clip(d.GetPermissions()))
		}
		dev := pod.Device{HostPath: d.GetHostPath(), ContainerPath: d.GetContainerPath(), Permissions: d.GetPermissions()}
		if dev.Permissions == "" {
			dev.Permissions = "rwm" // api.proto: nothing said about it; what peers do
		}
		out = append(out, dev)
	}
	return out, nil
}

func cdiDevices(in []*criv1.CDIDevice) ([]string, error) {
	var out []string
	for _, d := range in {
		if d.GetName() == "" {
			return nil, invalid("config.CDI_devices holds an empty name")
		}
		if err := checkLine("config.CDI_devices", d.GetName()); err != nil {
			return nil, err
		}
		out = append(out, d.GetName())
	}
	return out, nil
}

// containerNamespaces checks a container's namespace options against its pod's
// and sets the PID mode. Protobuf cannot tell POD from "not said", so POD
// means what the pod has: a shared PID namespace, none, or the host's.
func (s *Server) containerNamespaces(o *criv1.NamespaceOption, sandbox *pod.SandboxConfig, out *pod.Security) error {
	const field = "config.linux.security_context.namespace_options"
	if net, ok := podOrNode(o.GetNetwork()); !ok || net == pod.ModeNode && sandbox.Network != pod.ModeNode {
		return invalid("%s.network %s is not possible in this pod", field, o.GetNetwork())
	}
	if ipc, ok := podOrNode(o.GetIpc()); !ok || ipc == pod.ModeNode && sandbox.IPC != pod.ModeNode {
		return invalid("%s.ipc %s is not possible in this pod", field, o.GetIpc())
	}
	if err := sameUserNamespace(field, o.GetUsernsOptions(), sandbox); err != nil {
		return err
	}
	mode, ok := pidModes[o.GetPid()]
	if !ok {
		return invalid("%s.pid %d is not a namespace mode", field, o.GetPid())
	}
	out.PIDMode = mode
	switch mode {
	case pod.PIDPod:
		if sandbox.PID != "" {
			out.PIDMode = sandbox.PID
		}
	case pod.PIDNode:
		if len(sandbox.UIDMap) > 0 {
			return invalid("%s.pid NODE cannot go with a user namespace", field)
		}
	case pod.PIDTarget:
		if o.GetTargetId() == "" {
			return invalid("%s.target_id is empty", field)
		}
		out.PIDTarget = o.GetTargetId()
	}
	return nil
}

// sameUserNamespace refuses options that differ from the pod's; nil agrees.
func sameUserNamespace(field string, u *criv1.UserNamespace, sandbox *pod.SandboxConfig) error {
	if u == nil {
		return nil
	}
	uids, _, err := userNamespace(u)
	if err != nil {
		return err
	}
	same := len(uids) == len(sandbox.UIDMap)
	for i := range uids {
		same = same && uids[i] == sandbox.UIDMap[i]
	}
	if !same {
		return invalid("%s.userns_options differ from the pod's", field)
	}
	return nil
}

// containerStatus converts a container to CRI's ContainerStatus.
func containerStatus(c *pod.Container) *criv1.ContainerStatus {
	cfg := containerConfigOf(c)
	out := &criv1.ContainerStatus{
		Id:          c.ID,
		Metadata:    containerMetadata(cfg),
		State:       criContainerState(c.State),
		CreatedAt:   nanos(c.CreatedAt),
		StartedAt:   nanos(c.StartedAt),
		FinishedAt:  nanos(c.FinishedAt),
		ExitCode:    c.ExitCode,
		Image:       imageSpec(cfg),
		ImageRef:    c.ImageRef,
		ImageId:     c.ImageID,
		Reason:      strings.ToValidUTF8(c.Reason, "\uFFFD"),
		Message:     strings.ToValidUTF8(c.Message, "\uFFFD"),
		Labels:      cfg.Labels,
		Annotations: cfg.Annotations,
		Mounts:      criMounts(c.Mounts),
		LogPath:     c.LogPath,
		Resources:   &criv1.ContainerResources{Linux: criResources(c.Resources)},
		StopSignal:  criSignal(c.StopSignal),
	}
	if c.User != nil {
		out.User = &criv1.ContainerUser{Linux: containerUser(c.User)}
	}
	return out
}

func containerItem(c *pod.Container) *criv1.Container {
	cfg := containerConfigOf(c)
	return &criv1.Container{
		Id:           c.ID,
		PodSandboxId: c.PodID,
		Metadata:     containerMetadata(cfg),
		Image:        imageSpec(cfg),
		ImageRef:     c.ImageRef,
		ImageId:      c.ImageID,
		State:        criContainerState(c.State),
		CreatedAt:    nanos(c.CreatedAt),
		Labels:       cfg.Labels,
		Annotations:  cfg.Annotations,
	}
}

func containerConfigOf(c *pod.Container) *pod.ContainerConfig {
	if c.Config == nil {
		return &pod.ContainerConfig{}
	}
	return c.Config
}

func containerMetadata(c *pod.ContainerConfig) *criv1.ContainerMetadata {
	return &criv1.ContainerMetadata{Name: c.Metadata.Name, Attempt: c.Metadata.Attempt}
}

func imageSpec(c *pod.ContainerConfig) *criv1.ImageSpec {
	return &criv1.ImageSpec{Image: c.Image, UserSpecifiedImage: c.UserImage, Annotations: c.ImageAnnotations}
}

func containerUser(u *pod.User) *criv1.LinuxContainerUser {
	out := &criv1.LinuxContainerUser{Uid: int64(u.UID), Gid: int64(u.GID)}
	for _, g := range u.Groups {
		out.SupplementalGroups = append(out.SupplementalGroups, int64(g))
	}
	return out
}
