package cri

import (
	"context"
	"encoding/json"

	"k8s.io/klog/v2"
)

// info makes the map of a verbose answer. Its values are JSON; crictl prints
// those that are objects as such. A value that cannot be told is left out.
func info(ctx context.Context, values map[string]any) map[string]string {
	out := map[string]string{}
	for key, value := range values {
		if value == nil {
			continue
		}
		b, err := json.Marshal(value)
		if err != nil {
			klog.FromContext(ctx).Error(err, "Leaving out part of a verbose answer", "key", key)
			continue
		}
		out[key] = string(b)
	}
	return out
}

// infoOf is the verbose answer about a pod or container: one object under
// "info", where crictl's users look for pid and runtimeSpec.
func (s *Server) infoOf(ctx context.Context, id string) map[string]string {
	values := s.pods.Info(id)
	if values == nil {
		values = map[string]any{}
	}
	return info(ctx, map[string]any{"info": values})
}
