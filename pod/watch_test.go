package pod_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/naru-project/naru/pod"
	"github.com/naru-project/naru/pod/podtest"
)

// recorder writes down what a Watcher is told.
type recorder struct {
	mu    sync.Mutex
	steps []string
	exits []string
}

type traceKey struct{}

func (r *recorder) StepDone(ctx context.Context, operation, step string, began, ended time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if ended.Before(began) || began.IsZero() {
		step += " with a wrong time"
	}
	r.steps = append(r.steps, fmt.Sprintf("%v/%s/%s", ctx.Value(traceKey{}), operation, step))
}

func (r *recorder) ContainerExited(reason string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.exits = append(r.exits, reason)
}

// TestWatcher: each step that began is told of once when it is over, with what
// the caller's context holds.
func TestWatcher(t *testing.T) {
	var seen recorder
	var begun []string
	inBubble(t, func(r *rig) {
		ctx := context.WithValue(r.ctx(), traceKey{}, "traced")
		id, err := r.m.RunSandbox(ctx, podtest.SandboxConfig("a"))
		if err != nil {
			t.Fatal(err)
		}
		c, err := r.m.CreateContainer(ctx, id, podtest.ContainerConfig("c"))
		if err == nil {
			err = r.m.StartContainer(ctx, c)
		}
		if err == nil {
			err = r.m.StopSandbox(ctx, id)
		}
		if err != nil {
			t.Fatal(err)
		}
	}, func(c *pod.Config) {
		c.Watch = &seen
		c.Observe = func(kind, step string) { begun = append(begun, "traced/"+kind+"/"+step) }
	})
	slices.Sort(begun) // the stop of a pod goes on while those of its containers run
	slices.Sort(seen.steps)
	if len(begun) < 10 || !slices.Equal(seen.steps, begun) {
		t.Errorf("began\n%s\ntold\n%s", strings.Join(begun, "\n"), strings.Join(seen.steps, "\n"))
	}
	if len(seen.exits) != 1 {
		t.Errorf("exits %v", seen.exits)
	}
}
