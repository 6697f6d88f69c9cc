package ring

import (
	"errors"
	"io"
	"slices"
	"testing"

	"google.golang.org/grpc"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// all reads a stream of chunks to its end.
func all[M, E any](t testing.TB, s grpc.ServerStreamingClient[M], err error, items func(*M) []E) (list []E) {
	t.Helper()
	for err == nil {
		var m *M
		if m, err = s.Recv(); err == nil {
			list = append(list, items(m)...)
		}
	}
	if !errors.Is(err, io.EOF) {
		t.Fatalf("stream: %v", err)
	}
	return list
}

// one gives the list of a call that is not a stream.
func one[R, E any](t testing.TB, r R, err error, items func(R) []E) []E {
	t.Helper()
	if err != nil {
		t.Fatalf("list: %v", err)
	}
	return items(r)
}

func idsOf[E interface{ GetId() string }](list []E) (ids []string) {
	for _, e := range list {
		ids = append(ids, e.GetId())
	}
	return ids
}

// statsIDs are those of statistics, whose attributes hold them.
func statsIDs[E interface{ GetAttributes() A }, A interface{ GetId() string }](list []E) (ids []string) {
	for _, e := range list {
		ids = append(ids, e.GetAttributes().GetId())
	}
	return ids
}

// The calls that list something: the ids that they give for a filter.
var (
	podLists = map[string]func(testing.TB, *Node, *criv1.PodSandboxFilter) []string{
		"ListPodSandbox": func(t testing.TB, n *Node, f *criv1.PodSandboxFilter) []string {
			r, err := n.Runtime.ListPodSandbox(within(t, callTime), &criv1.ListPodSandboxRequest{Filter: f})
			return idsOf(one(t, r, err, (*criv1.ListPodSandboxResponse).GetItems))
		},
		"StreamPodSandboxes": func(t testing.TB, n *Node, f *criv1.PodSandboxFilter) []string {
			s, err := n.Runtime.StreamPodSandboxes(within(t, callTime), &criv1.StreamPodSandboxesRequest{Filter: f})
			return idsOf(all(t, s, err, (*criv1.StreamPodSandboxesResponse).GetPodSandboxes))
		},
	}
	containerLists = map[string]func(testing.TB, *Node, *criv1.ContainerFilter) []string{
		"ListContainers": func(t testing.TB, n *Node, f *criv1.ContainerFilter) []string {
			r, err := n.Runtime.ListContainers(within(t, callTime), &criv1.ListContainersRequest{Filter: f})
			return idsOf(one(t, r, err, (*criv1.ListContainersResponse).GetContainers))
		},
		"StreamContainers": func(t testing.TB, n *Node, f *criv1.ContainerFilter) []string {
			s, err := n.Runtime.StreamContainers(within(t, callTime), &criv1.StreamContainersRequest{Filter: f})
			return idsOf(all(t, s, err, (*criv1.StreamContainersResponse).GetContainers))
		},
	}
	containerStatsLists = map[string]func(testing.TB, *Node, *criv1.ContainerStatsFilter) []string{
		"ListContainerStats": func(t testing.TB, n *Node, f *criv1.ContainerStatsFilter) []string {
			r, err := n.Runtime.ListContainerStats(within(t, callTime), &criv1.ListContainerStatsRequest{Filter: f})
			return statsIDs(one(t, r, err, (*criv1.ListContainerStatsResponse).GetStats))
		},
		"StreamContainerStats": func(t testing.TB, n *Node, f *criv1.ContainerStatsFilter) []string {
			s, err := n.Runtime.StreamContainerStats(within(t, callTime), &criv1.StreamContainerStatsRequest{Filter: f})
			return statsIDs(all(t, s, err, (*criv1.StreamContainerStatsResponse).GetContainerStats))
		},
	}
	podStatsLists = map[string]func(testing.TB, *Node, *criv1.PodSandboxStatsFilter) []string{
		"ListPodSandboxStats": func(t testing.TB, n *Node, f *criv1.PodSandboxStatsFilter) []string {
			r, err := n.Runtime.ListPodSandboxStats(within(t, callTime), &criv1.ListPodSandboxStatsRequest{Filter: f})
			return statsIDs(one(t, r, err, (*criv1.ListPodSandboxStatsResponse).GetStats))
		},
		"StreamPodSandboxStats": func(t testing.TB, n *Node, f *criv1.PodSandboxStatsFilter) []string {
			s, err := n.Runtime.StreamPodSandboxStats(within(t, callTime), &criv1.StreamPodSandboxStatsRequest{Filter: f})
			return statsIDs(all(t, s, err, (*criv1.StreamPodSandboxStatsResponse).GetPodSandboxStats))
		},
	}
	imageLists = map[string]func(testing.TB, *Node, *criv1.ImageSpec) ([]string, error){
		"ListImages": func(t testing.TB, n *Node, i *criv1.ImageSpec) ([]string, error) {
			r, err := n.Images.ListImages(within(t, callTime), &criv1.ListImagesRequest{Filter: &criv1.ImageFilter{Image: i}})
			return idsOf(r.GetImages()), err
		},
		"StreamImages": func(t testing.TB, n *Node, i *criv1.ImageSpec) (ids []string, err error) {
			s, err := n.Images.StreamImages(within(t, callTime), &criv1.StreamImagesRequest{Filter: &criv1.ImageFilter{Image: i}})
			for err == nil {
				var m *criv1.StreamImagesResponse
				if m, err = s.Recv(); err == nil {
					ids = append(ids, idsOf(m.Images)...)
				}
			}
			if errors.Is(err, io.EOF) {
				err = nil
			}
			return ids, err
		},
	}
)

// labelled makes two pods, of which the first has labels.
func (n *Node) labelled(t testing.TB, labels map[string]string) (first, second string) {
	t.Helper()
	return n.Pod(t, func(c *criv1.PodSandboxConfig) { c.Labels = labels }), n.Pod(t, nil)
}

func listChecks() (checks []fieldCheck) {
	labels := map[string]string{"tier": "fields"}
	add := func(rpc string, fields []string, run func(testing.TB, *Node)) {
		checks = append(checks, fieldCheck{"filter of " + rpc, "the ids that are listed", under(rpc+".filter", fields...), run})
	}
	for rpc, list := range podLists {
		add(rpc, []string{"id", "state.state", "label_selector"}, func(t testing.TB, n *Node) {
			a, b := n.labelled(t, labels)
			if _, err := n.Runtime.StopPodSandbox(within(t, callTime), &criv1.StopPodSandboxRequest{PodSandboxId: b}); err != nil {
				t.Fatal(err)
			}
			want(t, "by id", list(t, n, &criv1.PodSandboxFilter{Id: a}), []string{a})
			want(t, "by state", list(t, n, &criv1.PodSandboxFilter{State: &criv1.PodSandboxStateValue{State: criv1.PodSandboxState_SANDBOX_NOTREADY}}), []string{b})
			want(t, "by label", list(t, n, &criv1.PodSandboxFilter{LabelSelector: labels}), []string{a})
		})
	}
	for rpc, list := range containerLists {
		add(rpc, []string{"id", "state.state", "pod_sandbox_id", "label_selector"}, func(t testing.TB, n *Node) {
			x, other, z := n.threeContainers(t, labels)
			want(t, "by id", list(t, n, &criv1.ContainerFilter{Id: x}), []string{x})
			want(t, "by state", list(t, n, &criv1.ContainerFilter{State: &criv1.ContainerStateValue{State: criv1.ContainerState_CONTAINER_RUNNING}}), []string{x})
			want(t, "by pod", list(t, n, &criv1.ContainerFilter{PodSandboxId: other}), []string{z})
			want(t, "by label", list(t, n, &criv1.ContainerFilter{LabelSelector: labels}), []string{x})
		})
	}
	for rpc, list := range containerStatsLists {
		add(rpc, []string{"id", "pod_sandbox_id", "label_selector"}, func(t testing.TB, n *Node) {
			x, other, z := n.threeContainers(t, labels)
			n.Start(t, z) // one that does not run has no statistics
			want(t, "by id", list(t, n, &criv1.ContainerStatsFilter{Id: x}), []string{x})
			want(t, "by pod", list(t, n, &criv1.ContainerStatsFilter{PodSandboxId: other}), []string{z})
			want(t, "by label", list(t, n, &criv1.ContainerStatsFilter{LabelSelector: labels}), []string{x})
		})
	}
	for rpc, list := range podStatsLists {
		add(rpc, []string{"id", "label_selector"}, func(t testing.TB, n *Node) {
			a, _ := n.labelled(t, labels)
			want(t, "by id", list(t, n, &criv1.PodSandboxStatsFilter{Id: a}), []string{a})
			want(t, "by label", list(t, n, &criv1.PodSandboxStatsFilter{LabelSelector: labels}), []string{a})
		})
	}
	for rpc, list := range imageLists {
		add(rpc, []string{"image.image", "image.runtime_handler"}, func(t testing.TB, n *Node) {
			image := n.Image(t, ImageConfig{}, File("mark", 0o644, newID()))
			ids, err := list(t, n, &criv1.ImageSpec{Image: image})
			if err != nil || len(ids) != 1 {
				t.Errorf("by name: %v, %v", ids, err)
			}
			if _, err := list(t, n, &criv1.ImageSpec{Image: image, RuntimeHandler: "no-such-handler"}); err == nil {
				t.Error("an unknown runtime handler is not refused")
			}
		})
	}
	slices.SortFunc(checks, func(a, b fieldCheck) int { return slices.Compare(a.fields, b.fields) })
	return checks
}

// threeContainers makes x with labels, which runs, another in the same pod,
// and z in another pod.
func (n *Node) threeContainers(t testing.TB, labels map[string]string) (x, other, z string) {
	t.Helper()
	pod, other := n.Pod(t, nil), n.Pod(t, nil)
	x = n.Run(t, pod, func(c *criv1.ContainerConfig) { c.Labels = labels })
	n.Container(t, pod, nil)
	return x, other, n.Container(t, other, nil)
}
