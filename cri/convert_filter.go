package cri

import (
	"cmp"
	"slices"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/images"
	"github.com/naru-project/naru/pod"
)

// sandboxFilter converts a filter; nil matches all.
func sandboxFilter(f *criv1.PodSandboxFilter) (pod.Filter, error) {
	out := pod.Filter{ID: f.GetId(), Labels: f.GetLabelSelector()}
	if f.GetState() != nil {
		switch f.GetState().GetState() {
		case criv1.PodSandboxState_SANDBOX_READY:
			out.State = "ready"
		case criv1.PodSandboxState_SANDBOX_NOTREADY:
			out.State = "notready"
		default:
			return out, invalid("filter.state %d is not known", f.GetState().GetState())
		}
	}
	return out, nil
}

// containerFilter converts a filter; nil matches all.
func containerFilter(f *criv1.ContainerFilter) (pod.Filter, error) {
	out := pod.Filter{ID: f.GetId(), PodID: f.GetPodSandboxId(), Labels: f.GetLabelSelector()}
	if f.GetState() == nil {
		return out, nil
	}
	for state, cri := range containerStates {
		if cri == f.GetState().GetState() {
			out.State = string(state)
			return out, nil
		}
	}
	return out, invalid("filter.state %d is not known", f.GetState().GetState())
}

func containerStatsFilter(f *criv1.ContainerStatsFilter) pod.Filter {
	return pod.Filter{ID: f.GetId(), PodID: f.GetPodSandboxId(), Labels: f.GetLabelSelector()}
}

func sandboxStatsFilter(f *criv1.PodSandboxStatsFilter) pod.Filter {
	return pod.Filter{ID: f.GetId(), Labels: f.GetLabelSelector()}
}

// The lists below come oldest first, so that two calls give the same order.

func (s *Server) listSandboxes(f *criv1.PodSandboxFilter) ([]*criv1.PodSandbox, error) {
	filter, err := sandboxFilter(f)
	if err != nil {
		return nil, err
	}
	list := slices.SortedFunc(slices.Values(s.pods.Sandboxes(filter)), func(a, b *pod.Pod) int {
		return cmp.Or(a.CreatedAt.Compare(b.CreatedAt), cmp.Compare(a.ID, b.ID))
	})
	return convertAll(list, sandboxItem), nil
}

func (s *Server) listContainers(f *criv1.ContainerFilter) ([]*criv1.Container, error) {
	filter, err := containerFilter(f)
	if err != nil {
		return nil, err
	}
	return convertAll(s.sortedContainers(filter), containerItem), nil
}

func (s *Server) sortedContainers(f pod.Filter) []*pod.Container {
	return slices.SortedFunc(slices.Values(s.pods.Containers(f)), func(a, b *pod.Container) int {
		return cmp.Or(a.CreatedAt.Compare(b.CreatedAt), cmp.Compare(a.ID, b.ID))
	})
}

// podContainerStatuses are those of one pod's containers, the newest first:
// kubelet with EventedPLEG takes the first of a name for the present one.
func podContainerStatuses(in []*pod.Container) []*criv1.ContainerStatus {
	return convertAll(slices.SortedFunc(slices.Values(in), func(a, b *pod.Container) int {
		return cmp.Or(b.CreatedAt.Compare(a.CreatedAt), cmp.Compare(b.Config.Metadata.Attempt, a.Config.Metadata.Attempt))
	}), containerStatus)
}

// listImages lists all images, or the one that the filter names.
func (s *Server) listImages(f *criv1.ImageFilter) ([]*criv1.Image, error) {
	if err := s.checkHandler(f.GetImage().GetRuntimeHandler()); err != nil {
		return nil, err
	}
	if f.GetImage().GetImage() != "" {
		image, err := s.resolveImage(f.GetImage())
		if image == nil || err != nil {
			return nil, err
		}
		return []*criv1.Image{criImage(image)}, nil
	}
	list := slices.SortedFunc(slices.Values(s.images.List()), func(a, b *images.Image) int { return cmp.Compare(a.ID, b.ID) })
	return convertAll(list, criImage), nil
}

// resolveImage finds an image; nil without an error when it is absent.
func (s *Server) resolveImage(spec *criv1.ImageSpec) (*images.Image, error) {
	ref, err := s.imageRef(spec)
	if err != nil {
		return nil, err
	}
	image, err := s.images.Resolve(ref)
	if err != nil {
		return nil, ignoreNotFound(err)
	}
	return image, nil
}

// convertAll converts a list; it keeps nil elements out.
func convertAll[A, B any](in []*A, convert func(*A) *B) []*B {
	out := make([]*B, 0, len(in))
	for _, a := range in {
		if a != nil {
			out = append(out, convert(a))
		}
	}
	return out
}
