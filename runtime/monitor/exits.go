package monitor

import (
	"context"
	"time"

	"github.com/naru-project/naru/runtime/monitor/wire"
)

// Exits delivers how containers ended: all that have not been deleted, then
// each as it comes. After the worker was lost all are delivered once more, so
// an exit may come several times, always with the same content, and is never
// lost. The channel is closed by Close.
func (c *Client) Exits() <-chan Exit {
	c.mu.Lock()
	first := !c.subscribe
	c.subscribe = true
	s := c.session
	c.mu.Unlock()
	if first && s != nil {
		c.wg.Go(func() { c.subscribeOn(s) })
	}
	return c.exits
}

// subscribeOn asks a session for exits. A session that does not answer is
// closed: the next one is asked again.
func (c *Client) subscribeOn(s *session) {
	ctx, cancel := context.WithTimeout(c.ctx, 10*time.Second)
	defer cancel()
	if _, err := s.call(ctx, wire.KindSubscribe, nil, nil, nil); err != nil {
		s.close()
	}
}

// onExit is called by the session's reader, which must not wait for the
// receiver of Exits.
func (c *Client) onExit(x *wire.Exit) {
	c.mu.Lock()
	c.queue = append(c.queue, exitFrom(x))
	c.mu.Unlock()
	select {
	case c.queued <- struct{}{}:
	default:
	}
}

func (c *Client) feedExits() {
	defer close(c.exits)
	for {
		c.mu.Lock()
		batch := c.queue
		c.queue = nil
		c.mu.Unlock()
		for _, x := range batch {
			select {
			case c.exits <- x:
			case <-c.ctx.Done():
				return
			}
		}
		if len(batch) > 0 {
			continue
		}
		select {
		case <-c.queued:
		case <-c.ctx.Done():
			return
		}
	}
}
