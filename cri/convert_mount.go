package cri

import (
	"slices"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/pod"
)

// mountOptions are what CRI lets a volume be mounted with (api.proto, Mount).
var mountOptions = []string{"noexec", "nodev", "nosuid"}

func (s *Server) mounts(in []*criv1.Mount) ([]pod.Mount, error) {
	var out []pod.Mount
	for _, m := range in {
		if m == nil {
			return nil, invalid("config.mounts holds a nil entry")
		}
		mount, err := s.mount(m)
		if err != nil {
			return nil, err
		}
		out = append(out, mount)
	}
	return out, nil
}

func (s *Server) mount(m *criv1.Mount) (pod.Mount, error) {
	propagation, ok := propagations[m.GetPropagation()]
	if !ok {
		return pod.Mount{}, invalid("config.mounts.propagation %d is not known", m.GetPropagation())
	}
	out := pod.Mount{
		ContainerPath:     m.GetContainerPath(),
		HostPath:          m.GetHostPath(),
		Readonly:          m.GetReadonly(),
		RecursiveReadonly: m.GetRecursiveReadOnly(),
		Propagation:       propagation,
		SelinuxRelabel:    m.GetSelinuxRelabel(),
		Image:             m.GetImage().GetImage(),
		UserImage:         m.GetImage().GetUserSpecifiedImage(),
		ImageAnnotations:  m.GetImage().GetAnnotations(),
		ImageSubPath:      m.GetImageSubPath(),
	}
	if err := checkAbs("config.mounts.container_path", out.ContainerPath); err != nil {
		return out, err
	}
	if err := checkMountSource(m, &out); err != nil {
		return out, err
	}
	if err := s.checkHandler(m.GetImage().GetRuntimeHandler()); err != nil {
		return out, err
	}
	if err := s.checkRecursiveReadonly(&out); err != nil {
		return out, err
	}
	if len(m.GetMountOptions()) > 0 && !s.host.MountOptions {
		return out, invalid("config.mounts.mount_options are not supported on this node")
	}
	for _, o := range m.GetMountOptions() {
		if !slices.Contains(mountOptions, o) {
			return out, invalid("config.mounts.mount_options: %q is not noexec, nodev or nosuid", clip(o))
		}
		if !slices.Contains(out.Options, o) {
			out.Options = append(out.Options, o)
		}
	}
	var err error
	if out.UIDMap, err = idMaps("config.mounts.uidMappings", m.GetUidMappings()); err != nil {
		return out, err
	}
	out.GIDMap, err = idMaps("config.mounts.gidMappings", m.GetGidMappings())
	return out, err
}

// checkMountSource: a volume is a host path or an image, not both. The kubelet
// names the subPath of any volume in image_sub_path; that of a host path is in
// the path already.
func checkMountSource(m *criv1.Mount, out *pod.Mount) error {
	if m.GetImage() == nil {
		out.ImageSubPath = ""
		return checkAbs("config.mounts.host_path", out.HostPath)
	}
	switch {
	case out.Image == "":
		return invalid("config.mounts.image.image is empty")
	case out.HostPath != "":
		return invalid("config.mounts: host_path and image exclude each other")
	case out.ImageSubPath != "":
		if err := checkLocal("config.mounts.image_sub_path", out.ImageSubPath); err != nil {
			return err
		}
	}
	out.Readonly = true // an image volume always is (KEP-4639)
	return checkText("config.mounts.image.image", out.Image)
}

// checkRecursiveReadonly: api.proto wants readonly and private propagation
// with it (KEP-3857).
func (s *Server) checkRecursiveReadonly(m *pod.Mount) error {
	switch {
	case !m.RecursiveReadonly:
		return nil
	case !m.Readonly:
		return invalid("config.mounts: recursive_read_only needs readonly")
	case m.Propagation != pod.PropagationPrivate:
		return invalid("config.mounts: recursive_read_only needs propagation PROPAGATION_PRIVATE")
	case !s.host.RecursiveReadOnlyMounts:
		return invalid("config.mounts: recursive_read_only is not supported by this kernel")
	}
	return nil
}

// criMounts echoes a container's volumes, with what image volumes resolved to.
func criMounts(in []pod.Mount) []*criv1.Mount {
	var out []*criv1.Mount
	for _, m := range in {
		c := &criv1.Mount{
			ContainerPath:     m.ContainerPath,
			HostPath:          m.HostPath,
			Readonly:          m.Readonly,
			RecursiveReadOnly: m.RecursiveReadonly,
			Propagation:       criPropagation(m.Propagation),
			SelinuxRelabel:    m.SelinuxRelabel,
			UidMappings:       criIDMaps(m.UIDMap),
			GidMappings:       criIDMaps(m.GIDMap),
			ImageSubPath:      m.ImageSubPath,
			MountOptions:      m.Options,
		}
		if m.Image != "" {
			c.Image = &criv1.ImageSpec{Image: m.Image, UserSpecifiedImage: m.UserImage, Annotations: m.ImageAnnotations, ImageRef: m.ImageRef}
		}
		out = append(out, c)
	}
	return out
}
