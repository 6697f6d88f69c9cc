package ring

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// collect reads a streamed list to its end. A message without items is against
// the contract (api.proto: at least one).
func collect[R any, T proto.Message](t *testing.T, items func(*R) []T, open func(ctx context.Context) (grpc.ServerStreamingClient[R], error)) (all []T, chunks int) {
	t.Helper()
	st, err := open(within(t, callTime))
	if err != nil {
		t.Fatal(err)
	}
	for {
		r, err := st.Recv()
		if errors.Is(err, io.EOF) {
			return all, chunks
		}
		if err != nil {
			t.Fatal(err)
		}
		if len(items(r)) == 0 {
			t.Error("a message without items")
		}
		all = append(all, items(r)...)
		chunks++
	}
}

// sameItems compares two lists without regard to order, by what key says.
func sameItems[T any](t *testing.T, what string, list, stream []T, key func(T) string) {
	t.Helper()
	seen := map[string]int{}
	for _, x := range list {
		seen[key(x)]++
	}
	for _, x := range stream {
		seen[key(x)]--
	}
	for k, n := range seen {
		if n != 0 {
			t.Errorf("%s: the list has %d more of %.80q than the stream", what, n, k)
		}
	}
	if len(list) == 0 {
		t.Errorf("%s: nothing is listed", what)
	}
}

// Streams tell what the lists tell, in chunks, each thing once, and end.
func TestStreamedLists(t *testing.T) {
	n := StartNode(t)
	label := map[string]string{"of": "this test"}
	big := strings.Repeat("x", 600<<10) // three do not fit into one message
	var pods []string
	for range 3 {
		pods = append(pods, n.Pod(t, func(c *criv1.PodSandboxConfig) {
			c.Labels, c.Annotations = label, map[string]string{"big": big}
		}))
	}
	other := n.Pod(t, nil)
	for _, p := range append(pods, other) {
		for range 2 {
			n.Run(t, p, func(c *criv1.ContainerConfig) {
				if p != other {
					c.Labels, c.Annotations = label, map[string]string{"big": big}
				}
			})
		}
	}
	ctx := within(t, callTime)
	rt := n.Runtime
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Run("pods", func(t *testing.T) {
		for _, f := range []*criv1.PodSandboxFilter{nil, {LabelSelector: label}, {Id: other}} {
			list, err := rt.ListPodSandbox(ctx, &criv1.ListPodSandboxRequest{Filter: f})
			must(err)
			stream, chunks := collect(t, (*criv1.StreamPodSandboxesResponse).GetPodSandboxes, func(ctx context.Context) (grpc.ServerStreamingClient[criv1.StreamPodSandboxesResponse], error) {
				return rt.StreamPodSandboxes(ctx, &criv1.StreamPodSandboxesRequest{Filter: f})
			})
			sameItems(t, "pods", list.Items, stream, (*criv1.PodSandbox).GetId)
			if f != nil && f.Id == "" && (chunks < 2 || len(stream) != 3) {
				t.Errorf("%d pods in %d messages", len(stream), chunks)
			}
		}
	})
	t.Run("containers", func(t *testing.T) {
		for _, f := range []*criv1.ContainerFilter{nil, {LabelSelector: label}, {PodSandboxId: other}} {
			list, err := rt.ListContainers(ctx, &criv1.ListContainersRequest{Filter: f})
			must(err)
			stream, chunks := collect(t, (*criv1.StreamContainersResponse).GetContainers, func(ctx context.Context) (grpc.ServerStreamingClient[criv1.StreamContainersResponse], error) {
				return rt.StreamContainers(ctx, &criv1.StreamContainersRequest{Filter: f})
			})
			sameItems(t, "containers", list.Containers, stream, (*criv1.Container).GetId)
			if f == nil && (chunks < 4 || len(stream) != 8) {
				t.Errorf("%d containers in %d messages", len(stream), chunks)
			}
		}
	})
	t.Run("container statistics", func(t *testing.T) {
		for _, f := range []*criv1.ContainerStatsFilter{nil, {LabelSelector: label}, {PodSandboxId: other}} {
			list, err := rt.ListContainerStats(ctx, &criv1.ListContainerStatsRequest{Filter: f})
			must(err)
			stream, _ := collect(t, (*criv1.StreamContainerStatsResponse).GetContainerStats, func(ctx context.Context) (grpc.ServerStreamingClient[criv1.StreamContainerStatsResponse], error) {
				return rt.StreamContainerStats(ctx, &criv1.StreamContainerStatsRequest{Filter: f})
			})
			sameItems(t, "container statistics", list.Stats, stream, func(s *criv1.ContainerStats) string { return s.Attributes.GetId() })
		}
	})
	t.Run("pod statistics", func(t *testing.T) {
		for _, f := range []*criv1.PodSandboxStatsFilter{nil, {LabelSelector: label}, {Id: other}} {
			list, err := rt.ListPodSandboxStats(ctx, &criv1.ListPodSandboxStatsRequest{Filter: f})
			must(err)
			stream, _ := collect(t, (*criv1.StreamPodSandboxStatsResponse).GetPodSandboxStats, func(ctx context.Context) (grpc.ServerStreamingClient[criv1.StreamPodSandboxStatsResponse], error) {
				return rt.StreamPodSandboxStats(ctx, &criv1.StreamPodSandboxStatsRequest{Filter: f})
			})
			sameItems(t, "pod statistics", list.Stats, stream, func(s *criv1.PodSandboxStats) string { return s.Attributes.GetId() })
		}
	})
	t.Run("images", func(t *testing.T) {
		list, err := n.Images.ListImages(ctx, &criv1.ListImagesRequest{})
		must(err)
		stream, _ := collect(t, (*criv1.StreamImagesResponse).GetImages, func(ctx context.Context) (grpc.ServerStreamingClient[criv1.StreamImagesResponse], error) {
			return n.Images.StreamImages(ctx, &criv1.StreamImagesRequest{})
		})
		sameItems(t, "images", list.Images, stream, (*criv1.Image).GetId)
	})
	t.Run("a pod's status has those of its containers", func(t *testing.T) {
		r, err := rt.PodSandboxStatus(ctx, &criv1.PodSandboxStatusRequest{PodSandboxId: other})
		must(err)
		list, err := rt.ListContainers(ctx, &criv1.ListContainersRequest{Filter: &criv1.ContainerFilter{PodSandboxId: other}})
		must(err)
		var a, b []string
		for _, c := range list.Containers {
			a = append(a, c.Id+c.State.String())
		}
		for _, c := range r.ContainersStatuses {
			b = append(b, c.Id+c.State.String())
		}
		sameItems(t, "containers of a pod", a, b, func(s string) string { return s })
		if r.Timestamp == 0 {
			t.Error("no timestamp")
		}
	})
}
