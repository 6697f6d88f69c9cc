package cri

import (
	"context"

	"google.golang.org/grpc"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/pod"
)

// ListPodSandboxMetrics implements RuntimeService. kubelet calls it for each
// scrape of /metrics/cadvisor.
func (s *Server) ListPodSandboxMetrics(ctx context.Context, _ *criv1.ListPodSandboxMetricsRequest) (*criv1.ListPodSandboxMetricsResponse, error) {
	return &criv1.ListPodSandboxMetricsResponse{PodMetrics: s.sandboxMetrics(ctx)}, nil
}

// StreamPodSandboxMetrics implements RuntimeService.
func (s *Server) StreamPodSandboxMetrics(_ *criv1.StreamPodSandboxMetricsRequest, out grpc.ServerStreamingServer[criv1.StreamPodSandboxMetricsResponse]) error {
	return sendChunks(out.Context(), s.sandboxMetrics(out.Context()), func(chunk []*criv1.PodSandboxMetrics) error {
		return out.Send(&criv1.StreamPodSandboxMetricsResponse{PodSandboxMetrics: chunk})
	})
}

// sandboxMetrics is the one place that makes the metrics of all pods.
func (s *Server) sandboxMetrics(ctx context.Context) []*criv1.PodSandboxMetrics {
	pods, containers := podMetrics(), containerMetrics()
	return convertAll(s.pods.ListSandboxMetrics(ctx), func(p *pod.SandboxStats) *criv1.PodSandboxMetrics {
		out := &criv1.PodSandboxMetrics{PodSandboxId: p.Pod.ID, Metrics: collect(pods, p, podLabels(p.Pod))}
		for _, c := range p.Containers {
			out.ContainerMetrics = append(out.ContainerMetrics, &criv1.ContainerMetrics{
				ContainerId: c.Container.ID, Metrics: collect(containers, c, containerLabels(p.Pod, c.Container)),
			})
		}
		return out
	})
}
