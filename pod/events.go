package pod

import (
	"context"
	"sync"

	"k8s.io/klog/v2"
)

// hub hands events to subscribers. Publishing never waits: who does not keep
// up with the bound is dropped, and must list anew.
type hub struct {
	bound int
	mu    sync.Mutex
	subs  map[*subscriber]struct{} // guarded by mu
}

type subscriber struct {
	ch   chan Event
	stop func() bool // ends the watch of the subscriber's context
}

// subscribe delivers until ctx ends or the subscriber is dropped; then the
// channel is closed.
func (h *hub) subscribe(ctx context.Context) <-chan Event {
	s := &subscriber{ch: make(chan Event, h.bound)}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.subs[s] = struct{}{}
	s.stop = context.AfterFunc(ctx, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.drop(s)
	})
	return s.ch
}

// drop is called with mu held.
func (h *hub) drop(s *subscriber) {
	if _, ok := h.subs[s]; ok {
		delete(h.subs, s)
		close(s.ch)
	}
}

func (h *hub) idle() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.subs) == 0
}

func (h *hub) publish(e Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for s := range h.subs {
		select {
		case s.ch <- e:
		default:
			h.drop(s)
			s.stop()
			klog.Background().Info("dropped an event subscriber that does not read",
				"unread", h.bound, "type", e.Type, "container", e.ContainerID)
		}
	}
}
