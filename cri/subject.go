package cri

import criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

// subjectName names the pod, container or image that a request is to make or
// to look up by name. All getters are nil-safe.
func subjectName(req any) []any {
	switch r := req.(type) {
	case *criv1.RunPodSandboxRequest:
		m := r.GetConfig().GetMetadata()
		return []any{"name", clip(m.GetNamespace() + "/" + m.GetName()), "uid", clip(m.GetUid()), "attempt", m.GetAttempt()}
	case *criv1.CreateContainerRequest:
		m := r.GetConfig().GetMetadata()
		return []any{"name", clip(m.GetName()), "attempt", m.GetAttempt()}
	case *criv1.PullImageRequest:
		return []any{"image", clip(r.GetImage().GetImage())}
	case *criv1.RemoveImageRequest:
		return []any{"image", clip(r.GetImage().GetImage())}
	case *criv1.ImageStatusRequest:
		return []any{"image", clip(r.GetImage().GetImage())}
	}
	return nil
}
