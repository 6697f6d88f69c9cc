package cni

import (
	"context"
	"sync"
)

// gate lets what is done for pods run side by side, and the collection of
// garbage alone, as the CNI specification wants it. Pods go first: garbage is
// only collected while nothing is done for them, and who comes meanwhile ends
// it, so that a plugin that hangs there keeps nobody waiting.
type gate struct {
	mu     sync.Mutex
	pods   int                // +checklocks:mu
	cancel context.CancelFunc // +checklocks:mu of the collection that runs, or nil
	done   chan struct{}      // +checklocks:mu closed at its end
}

// enter begins something for a pod; leave ends it.
func (g *gate) enter() {
	g.mu.Lock()
	g.pods++
	cancel, done := g.cancel, g.done
	g.mu.Unlock()
	if cancel != nil {
		cancel()
		<-done
	}
}

func (g *gate) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.pods--
}

// alone runs f while nothing is done for pods, and reports whether it did.
func (g *gate) alone(ctx context.Context, f func(context.Context)) bool {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	g.mu.Lock()
	if g.pods > 0 || g.cancel != nil {
		g.mu.Unlock()
		return false
	}
	done := make(chan struct{})
	g.cancel, g.done = cancel, done
	g.mu.Unlock()
	defer func() {
		g.mu.Lock()
		g.cancel, g.done = nil, nil
		g.mu.Unlock()
		close(done)
	}()
	f(ctx)
	return ctx.Err() == nil
}
