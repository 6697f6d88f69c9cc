package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/naru-project/naru/internal/errs"
)

const (
	progressUnit = 64 << 10    // what counts as progress
	resumeUnit   = 1 << 20     // what earns a new set of attempts
	maxAttempts  = 5           // to go on after a connection broke
	idleGrace    = time.Second // after which a place in the node's budget is lent out
)

// Slot is a place in the node's budget of transfers. A transfer takes it when
// bytes come and gives it away while none do, so that hosts that send nothing
// keep nobody waiting. Both methods may be called from different goroutines,
// one after the other; to acquire what is held, or release what is not,
// changes nothing.
type Slot interface {
	Release()
	Acquire(ctx context.Context) error
}

// Blob opens a blob. The reader goes on at another host, or from where it was,
// when a connection breaks; it does not check the digest. slot may be nil.
func (c *Client) Blob(ctx context.Context, d ocispec.Descriptor, slot Slot) (io.ReadCloser, error) {
	hosts := c.with(docker.HostCapabilityPull)
	if len(hosts) == 0 {
		return nil, c.failure("give blobs", nil)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	b := &blob{c: c, ctx: ctx, cancel: cancel, d: d, hosts: hosts, slot: slot, attempts: maxAttempts}
	if err := b.open(); err != nil {
		cancel(nil)
		return nil, err
	}
	return b, nil
}

// blob belongs to one reading goroutine.
type blob struct {
	c      *Client
	ctx    context.Context //nolint:containedctx // of the transfer, which Close ends
	cancel context.CancelCauseFunc
	d      ocispec.Descriptor
	hosts  []*host // the first is the one in use
	slot   Slot

	body     io.ReadCloser
	off      int64
	attempts int
	earned   int64         // bytes since attempts were full
	waited   time.Duration // for the current unit of progress
	unit     int64         // bytes of it
}

// open asks the hosts in turn for the rest of the blob.
func (b *blob) open() error {
	var failed []*hostError
	for i, h := range b.hosts {
		err := b.openAt(h, i == len(b.hosts)-1)
		if err == nil {
			b.hosts = append([]*host{h}, append(append([]*host{}, b.hosts[:i]...), b.hosts[i+1:]...)...)
			return nil
		}
		if b.ctx.Err() != nil {
			return context.Cause(b.ctx)
		}
		failed = append(failed, asHostError(h, err))
	}
	return b.c.failure("give blobs", failed)
}

func (b *blob) openAt(h *host, last bool) error {
	resp, err := h.do(b.ctx, request{method: http.MethodGet, path: []string{"blobs", b.d.Digest.String()}, offset: b.off}, last)
	if err != nil {
		return err
	}
	skip, err := b.check(h, resp)
	if err != nil {
		_ = resp.Body.Close()
		return err
	}
	b.body = resp.Body
	if skip > 0 { // the host does not do ranges
		if _, err := io.CopyN(io.Discard, stallReader{b}, skip); err != nil {
			_ = resp.Body.Close()
			b.body = nil
			return h.transport(b.ctx, err)
		}
	}
	return nil
}

// check looks whether an answer is the part that was asked for, and how much
// of its start is known already.
func (b *blob) check(h *host, resp *http.Response) (skip int64, err error) {
	want := b.d.Size
	switch {
	case resp.StatusCode == http.StatusOK:
		skip = b.off
	case resp.StatusCode == http.StatusPartialContent && b.off > 0:
		if !rangeFrom(resp.Header.Get("Content-Range"), b.off) {
			return 0, h.refuse("asked for a layer from byte %d, it sends another part", b.off)
		}
		want -= b.off
	default:
		return 0, h.refuse("asked for a layer, it answers %s", resp.Status)
	}
	if resp.ContentLength >= 0 && resp.ContentLength != want {
		return 0, h.refuse("layer %s has %d bytes there, the manifest says %d", b.d.Digest, resp.ContentLength+b.d.Size-want, b.d.Size)
	}
	return skip, nil
}

// rangeFrom reads the start of "bytes 100-199/200".
func rangeFrom(s string, off int64) bool {
	s, ok := strings.CutPrefix(s, "bytes ")
	from, _, ok2 := strings.Cut(s, "-")
	n, err := strconv.ParseInt(from, 10, 64)
	return ok && ok2 && err == nil && n == off
}

// Read reads on, over broken connections.
func (b *blob) Read(p []byte) (int, error) {
	if b.off >= b.d.Size {
		return b.end(p)
	}
	for {
		n, err := b.stalled(p)
		b.off += int64(n)
		if b.earned += int64(n); b.earned >= resumeUnit {
			b.attempts, b.earned = maxAttempts, 0
		}
		if n > 0 {
			return n, nil
		}
		if err == nil {
			continue
		}
		if b.ctx.Err() != nil {
			return 0, b.cause()
		}
		if err := b.again(err); err != nil {
			return 0, err
		}
	}
}

// end looks for bytes behind the blob's end; the caller takes them as an error.
func (b *blob) end(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	n, err := b.stalled(p[:1])
	if n == 0 && err != nil {
		return 0, io.EOF
	}
	return n, nil
}

// again opens the rest after the connection broke with err.
func (b *blob) again(err error) error {
	_ = b.body.Close()
	if b.attempts--; b.attempts < 0 {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		h := b.hosts[0]
		return b.c.failure("", []*hostError{{host: h.Host, reason: unreachable,
			text: fmt.Sprintf("layer %s breaks off at byte %d of %d: %s", b.d.Digest, b.off, b.d.Size, b.c.hide.clean(err.Error()))}})
	}
	select {
	case <-time.After(retryWait / 4 << (maxAttempts - 1 - b.attempts)):
	case <-b.ctx.Done():
		return b.cause()
	}
	if err := b.open(); err != nil {
		if b.ctx.Err() != nil {
			return b.cause()
		}
		return err
	}
	return nil
}

// cause is why the transfer ended, with a class.
func (b *blob) cause() error {
	err := context.Cause(b.ctx)
	if errors.Is(err, errStall) {
		return errs.New(errs.Unavailable, "%s: pull %s: %s: layer %s: less than %d KiB in %s", UnavailablePrefix, b.c.ref,
			b.hosts[0].Host, b.d.Digest, progressUnit>>10, b.c.cfg.ProgressTimeout)
	}
	return err
}

var errStall = errors.New("no progress")

// stalled reads from the connection, and counts only the time it waits there:
// less than a unit of progress in the time allowed ends the transfer.
func (b *blob) stalled(p []byte) (int, error) {
	if b.body == nil {
		return 0, io.ErrUnexpectedEOF
	}
	left := b.c.cfg.ProgressTimeout - b.waited
	end := time.AfterFunc(max(left, 0), func() { b.cancel(errStall) })
	lent := make(chan struct{})
	var lend *time.Timer
	if b.slot != nil {
		lend = time.AfterFunc(idleGrace, func() { b.slot.Release(); close(lent) })
	}
	start := time.Now()
	n, err := b.body.Read(p)
	end.Stop()
	b.waited += time.Since(start)
	if lend != nil {
		if !lend.Stop() {
			<-lent
		}
		if n > 0 {
			if aerr := b.slot.Acquire(b.ctx); aerr != nil && err == nil {
				err = aerr
			}
		}
	}
	if b.unit += int64(n); b.unit >= progressUnit {
		b.unit, b.waited = 0, 0
	}
	return n, err
}

// stallReader reads a connection under the same rules.
type stallReader struct{ b *blob }

func (r stallReader) Read(p []byte) (int, error) { return r.b.stalled(p) }

// Close ends the transfer.
func (b *blob) Close() error {
	b.cancel(nil)
	if b.body != nil {
		return b.body.Close()
	}
	return nil
}
