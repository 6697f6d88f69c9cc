package cri

import (
	"context"

	"google.golang.org/grpc"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/pod"
)

// GetContainerEvents implements RuntimeService. The subscription stands before
// the headers go out: a client that has them misses nothing that happens from
// then on, and what was before it finds by listing.
func (s *Server) GetContainerEvents(_ *criv1.GetEventsRequest, out grpc.ServerStreamingServer[criv1.ContainerEventResponse]) error {
	ctx, cancel := context.WithCancel(out.Context())
	defer cancel()
	events := s.pods.Subscribe(ctx)
	if err := out.SendHeader(nil); err != nil {
		return err
	}
	for {
		select {
		case e, ok := <-events:
			if !ok {
				return s.eventsEnded(out.Context())
			}
			if err := out.Send(s.event(e)); err != nil {
				return err
			}
		case <-s.done.Done():
			return errs.New(errs.Unavailable, "naru is shutting down")
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// eventsEnded tells why the manager closed a subscription.
func (s *Server) eventsEnded(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return errs.New(errs.Unavailable, "events came faster than they were read; subscribe again and list")
}

// event converts an event. kubelet drops those without the pod's metadata, so
// what the event lacks is looked up.
func (s *Server) event(e pod.Event) *criv1.ContainerEventResponse {
	p, containers := e.Pod, e.Containers
	if p == nil {
		p, _ = s.pods.Sandbox(e.PodID) // gone: the answer is nil, as it is
	}
	if containers == nil && p != nil {
		containers = s.pods.Containers(pod.Filter{PodID: p.ID})
	}
	out := &criv1.ContainerEventResponse{
		ContainerId:        e.ContainerID,
		ContainerEventType: eventTypes[e.Type],
		CreatedAt:          nanos(e.Time),
		ContainersStatuses: podContainerStatuses(containers),
	}
	if p != nil {
		out.PodSandboxStatus = sandboxStatus(p)
	}
	return out
}
