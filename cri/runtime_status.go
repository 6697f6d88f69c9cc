package cri

import (
	"context"
	"maps"
	goruntime "runtime"
	"strings"
	"time"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Status implements RuntimeService. kubelet asks every few seconds; it is
// answered from memory.
func (s *Server) Status(ctx context.Context, req *criv1.StatusRequest) (*criv1.StatusResponse, error) {
	out := &criv1.StatusResponse{
		Status: &criv1.RuntimeStatus{Conditions: []*criv1.RuntimeCondition{s.runtimeReady(), s.networkReady()}},
		Features: &criv1.RuntimeFeatures{
			SupplementalGroupsPolicy:  true,
			UserNamespacesHostNetwork: s.host.UserNamespaces && s.host.UserNamespacesHostNetwork,
			MountOptions:              s.host.MountOptions,
		},
	}
	for _, name := range s.handlers() {
		userns := s.host.UserNamespaces
		if s.cfg.UserNamespaces != nil {
			userns = userns && s.cfg.UserNamespaces(name)
		}
		out.RuntimeHandlers = append(out.RuntimeHandlers, &criv1.RuntimeHandler{
			Name: name,
			Features: &criv1.RuntimeHandlerFeatures{
				RecursiveReadOnlyMounts: s.host.RecursiveReadOnlyMounts,
				UserNamespaces:          userns,
			},
		})
	}
	if req.GetVerbose() {
		out.Info = s.statusInfo(ctx)
	}
	return out, nil
}

func (s *Server) runtimeReady() *criv1.RuntimeCondition {
	c := &criv1.RuntimeCondition{Type: criv1.RuntimeReady, Status: true}
	if s.cfg.Health == nil {
		return c
	}
	if err := s.cfg.Health(); err != nil {
		c.Status, c.Reason, c.Message = false, "RuntimeUnhealthy", strings.ToValidUTF8(err.Error(), "\uFFFD")
	}
	return c
}

func (s *Server) networkReady() *criv1.RuntimeCondition {
	ready, reason, message := s.pods.NetworkStatus()
	return &criv1.RuntimeCondition{Type: criv1.NetworkReady, Status: ready, Reason: reason, Message: message}
}

// statusInfo is what "crictl info" shows beside the conditions.
func (s *Server) statusInfo(ctx context.Context) map[string]string {
	values := map[string]any{
		"version":    s.cfg.Version,
		"golang":     goruntime.Version(),
		"uptime":     time.Since(s.started).Round(time.Second).String(),
		"operations": map[string]any{"running": s.pods.Operations()},
		"streaming":  map[string]any{"address": s.streams.Addr()},
	}
	if s.cfg.Verbose != nil {
		values["config"] = s.cfg.Verbose()
	}
	texts := map[string]string{}
	for key, value := range s.pods.NetworkInfo() {
		if text, ok := value.(string); ok {
			texts[key] = text // lastCNILoadStatus: tools compare it with OK
		} else {
			values[key] = value
		}
	}
	out := info(ctx, values)
	maps.Copy(out, texts)
	return out
}
