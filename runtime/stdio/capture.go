package stdio

import (
	"os"
	"sync"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/sys"
)

// Capture reads two pipes into memory, up to MaxOutput each.
type Capture struct {
	W   [2]*os.File // the process's ends: stdout, stderr
	r   [2]*os.File
	buf [2]limited
	end Ending
	wg  sync.WaitGroup
}

// NewCapture makes the pipes.
func NewCapture() (*Capture, error) {
	c := &Capture{}
	for i := range c.r {
		var err error
		if c.r[i], c.W[i], err = sys.Pipe(true); err != nil {
			c.Close()
			return nil, errs.Wrap(errs.Internal, err)
		}
	}
	return c, nil
}

// Start closes the process's ends and reads.
func (c *Capture) Start() {
	for i := range c.r {
		_ = c.W[i].Close()
		c.wg.Go(func() { c.end.Copy(&c.buf[i], c.r[i]) })
	}
}

// Finish reads what is left when the process has ended.
func (c *Capture) Finish() (stdout, stderr []byte) {
	c.end.Set(c.r[:]...)
	c.wg.Wait()
	return c.buf[0].b, c.buf[1].b
}

// Close releases what is open.
func (c *Capture) Close() {
	for i := range c.r {
		for _, f := range []*os.File{c.r[i], c.W[i]} {
			if f != nil {
				_ = f.Close()
			}
		}
	}
	c.wg.Wait()
}

// limited keeps the first MaxOutput bytes and swallows the rest.
type limited struct{ b []byte }

func (l *limited) Write(p []byte) (int, error) {
	if n := MaxOutput - len(l.b); n > 0 {
		l.b = append(l.b, p[:min(n, len(p))]...)
	}
	return len(p), nil
}
