package pod

import (
	"maps"
	"path"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	cdilib "tags.cncf.io/container-device-interface/pkg/cdi"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime"
)

// cdiDevices finds the devices of the request, before anything is made.
func (m *Manager) cdiDevices(w *containerWork) error {
	names, err := m.cdiNames(w.c.snap.Load().Config)
	if err != nil || len(names) == 0 {
		return err
	}
	w.devices, err = m.cdi.Resolve(names)
	return err
}

// cdiNames are the names in the request's own field and, where the node's
// administrator allows it, in the container's annotations (which its author
// writes, and no device plugin has checked). What an image says counts for
// nothing (CVE-2026-53492).
func (m *Manager) cdiNames(c *ContainerConfig) ([]string, error) {
	names := slices.Clone(c.CDIDevices)
	if m.live.Load().CDIAnnotations {
		for _, key := range slices.Sorted(maps.Keys(c.Annotations)) {
			_, more, err := cdilib.ParseAnnotations(map[string]string{key: c.Annotations[key]})
			if err != nil {
				return nil, errs.New(errs.InvalidArgument, "annotation %q: %w", clip(key), err)
			}
			names = append(names, more...)
		}
	}
	var once []string
	for _, n := range names {
		if !slices.Contains(once, n) {
			once = append(once, n)
		}
	}
	return once, nil
}

// withDevices adds the mounts of CDI devices to those of the request. They take
// the place of what the request has on the same path.
func (w *containerWork) withDevices() ([]Mount, map[int]runtime.ImageVolume) {
	if w.devices == nil {
		return w.mounts, w.volumes
	}
	p := w.pod.Config
	more := w.devices.Mounts(p.UIDMap, p.GIDMap)
	var all []Mount
	volumes := make(map[int]runtime.ImageVolume)
	for i, m := range w.mounts {
		if slices.ContainsFunc(more, func(d Mount) bool { return path.Clean(d.ContainerPath) == path.Clean(m.ContainerPath) }) {
			continue
		}
		if v, ok := w.volumes[i]; ok {
			volumes[len(all)] = v
		}
		all = append(all, m)
	}
	// Of two devices with the same mount, the later one has it.
	for i, m := range more {
		if !slices.ContainsFunc(more[i+1:], func(d Mount) bool { return path.Clean(d.ContainerPath) == path.Clean(m.ContainerPath) }) {
			all = append(all, m)
		}
	}
	return all, volumes
}

// applyDevices makes the other changes of CDI devices to the finished
// specification, and to what is known of the container's user.
func (w *containerWork) applyDevices(oci *specs.Spec, user *User) error {
	if w.devices == nil {
		return nil
	}
	if err := w.devices.Apply(oci); err != nil {
		return err
	}
	user.Groups = slices.Clone(oci.Process.User.AdditionalGids)
	ids := w.pod.Config.GIDMap
	for _, g := range user.Groups {
		if len(ids) > 0 && !slices.ContainsFunc(ids, func(m IDMap) bool { return g >= m.ContainerID && g-m.ContainerID < m.Size }) {
			return errs.New(errs.FailedPrecondition, "CDI devices %s: their group %d is outside the pod's user namespace", strings.Join(w.c.snap.Load().Config.CDIDevices, ", "), g)
		}
	}
	return nil
}
