package streaming

import (
	"io"
	"sync"
)

// inboxBytes may wait in an inbox before its writer does.
const inboxBytes = 256 << 10

// inbox is a bounded pipe. Unlike io.Pipe it lets the writer, which is the
// connection's only reader, go on while the process does not read, so that a
// client that leaves is noticed.
type inbox struct {
	mu      sync.Mutex
	cond    sync.Cond // on mu; any change below
	buf     []byte
	ended   bool // no more will be written
	dropped bool // nobody reads any more
}

func newInbox() *inbox {
	b := &inbox{}
	b.cond.L = &b.mu
	return b
}

// put appends p, once there is room. It owns p from then on.
func (b *inbox) put(p []byte) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for len(b.buf) >= inboxBytes && !b.dropped && !b.ended {
		b.cond.Wait()
	}
	if b.dropped || b.ended {
		return
	}
	if len(b.buf) == 0 {
		b.buf = p
	} else {
		b.buf = append(b.buf, p...)
	}
	b.cond.Broadcast()
}

// end makes the reader see EOF after what is there.
func (b *inbox) end() { b.set(&b.ended) }

// drop makes the reader see EOF now, and the writer's bytes vanish.
func (b *inbox) drop() { b.set(&b.dropped) }

func (b *inbox) set(flag *bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	*flag = true
	if b.dropped {
		b.buf = nil
	}
	b.cond.Broadcast()
}

// Read implements io.Reader.
func (b *inbox) Read(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for len(b.buf) == 0 && !b.dropped && !b.ended {
		b.cond.Wait()
	}
	if len(b.buf) == 0 {
		return 0, io.EOF
	}
	n := copy(p, b.buf)
	b.buf = b.buf[n:]
	b.cond.Broadcast()
	return n, nil
}
