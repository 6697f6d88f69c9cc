package unpack

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"sync"
	"sync/atomic"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"

	"github.com/naru-project/naru/internal/errs"
)

// Blob is a layer as it comes, with what is known about it. Digests were
// checked for their form by the caller.
type Blob struct {
	// Open starts the transfer; the reader ends when ctx does. Its errors have
	// a class of internal/errs.
	Open   func(ctx context.Context) (io.ReadCloser, error)
	Digest digest.Digest // of the bytes that come; empty: not known
	Size   int64         // of the bytes that come; negative: not known
	DiffID digest.Digest // of the unpacked archive; always known
}

// Layer does all that happens to a layer in one pass: it reads the blob,
// checks size and digest, unpacks gzip or zstd within the limits, checks the
// diff ID and fills dir. Each stage has its goroutine, all are gone when Layer
// returns. dir may be used only when there is no error.
func Layer(ctx context.Context, dir *os.File, b Blob, lim Limits) (Result, error) {
	caller := ctx
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	rc, err := b.Open(ctx)
	if err != nil {
		return Result{}, err
	}
	p := pipeline{ctx: ctx, blob: b, lim: lim.orDefault()}
	packed, plain, hashed := newPipe(ctx), newPipe(ctx), newPipe(ctx)
	var (
		wg      sync.WaitGroup
		res     Result
		stage   [4]error // in the order in which they are believed
		archive error
	)
	wg.Go(func() { stage[0] = packed.finish(p.receive(rc, packed)); _ = rc.Close() })
	wg.Go(func() { stage[1] = plain.finish(p.decompress(packed, plain)) })
	wg.Go(func() { stage[3] = hashed.finish(p.verify(plain, hashed)) })
	res, archive = Tar(ctx, dir, hashed, lim)
	if archive == nil {
		_, archive = io.Copy(io.Discard, hashed) // the padding behind the archive belongs to the diff ID
	}
	if archive != nil && errs.Is(archive, errs.FailedPrecondition) {
		hashed.discard(suspect) // see whether the blob is the wrong one: the better message
	}
	if archive != nil {
		cancel(errStopped)
	}
	wg.Wait()
	if caller.Err() != nil {
		return Result{}, context.Cause(caller)
	}
	stage[2] = archive
	for _, err := range stage {
		// Once the archive failed, other stages end because they are stopped.
		if err != nil && (archive == nil || !errors.Is(err, context.Canceled)) {
			return Result{}, err
		}
	}
	return res, archive
}

// suspect is how many bytes more are read of a blob that makes no sense, to
// tell a bad layer from the wrong bytes.
const suspect = 64 << 20

type pipeline struct {
	ctx  context.Context
	blob Blob
	lim  Limits
	in   atomic.Int64 // packed bytes so far
}

// receive reads the blob, never more than one byte beyond its size.
func (p *pipeline) receive(r io.Reader, to *pipe) error {
	h := hasher(p.blob.Digest)
	if p.blob.Size >= 0 {
		r = io.LimitReader(r, p.blob.Size+1)
	}
	err := to.fill(r, func(chunk []byte) error {
		if h != nil {
			_, _ = h.Write(chunk)
		}
		if n := p.in.Add(int64(len(chunk))); p.blob.Size >= 0 && n > p.blob.Size {
			return errs.New(errs.FailedPrecondition, "check layer %s: more than the %d bytes that the manifest says", p.blob.Digest, p.blob.Size)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if n := p.in.Load(); p.blob.Size >= 0 && n != p.blob.Size {
		return errs.New(errs.FailedPrecondition, "check layer %s: %d bytes, the manifest says %d", p.blob.Digest, n, p.blob.Size)
	}
	if h != nil {
		if got := digest.NewDigest(p.blob.Digest.Algorithm(), h); got != p.blob.Digest {
			return errs.New(errs.FailedPrecondition, "check layer: its digest is %s, the manifest says %s", got, p.blob.Digest)
		}
	}
	return nil
}

func hasher(d digest.Digest) hash.Hash {
	if d == "" {
		return nil
	}
	return d.Algorithm().Hash()
}

// decompress unpacks what is packed, told by the first bytes: the diff ID
// settles the content, so that a wrong media type can do no harm.
func (p *pipeline) decompress(from, to *pipe) error {
	err := p.expand(bufio.NewReaderSize(from, 64<<10), to)
	if err != nil {
		if errs.Of(err) == errs.Internal {
			err = errs.New(errs.FailedPrecondition, "unpack layer: %w", err)
		}
		if errs.Is(err, errs.FailedPrecondition) {
			from.discard(suspect)
		}
	}
	return err
}

func (p *pipeline) expand(br *bufio.Reader, to *pipe) error {
	magic, err := br.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	var r io.Reader = br
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}): // RFC 1952
		z, err := gzip.NewReader(br)
		if err != nil {
			return err
		}
		r = z
	case bytes.HasPrefix(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}), // RFC 8878: a frame,
		len(magic) == 4 && magic[0]&0xf0 == 0x50 && bytes.Equal(magic[1:], []byte{0x2a, 0x4d, 0x18}): // or a skippable one
		z, err := zstd.NewReader(br, zstd.WithDecoderMaxWindow(p.lim.MaxWindow), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderConcurrency(2))
		if err != nil {
			return err
		}
		defer z.Close()
		r = z
	}
	var out int64
	return to.fill(r, func(chunk []byte) error {
		out += int64(len(chunk))
		if out > p.lim.MaxBytes {
			return errs.New(errs.ResourceExhausted, "unpack layer: more than %d bytes", p.lim.MaxBytes)
		}
		if in := p.in.Load(); out > p.lim.RatioFrom && out/p.lim.MaxRatio > in {
			return errs.New(errs.ResourceExhausted, "unpack layer: %d bytes out of %d, which is over the ratio of %d", out, in, p.lim.MaxRatio)
		}
		return nil
	})
}

// verify checks the diff ID on the way to the archive reader.
func (p *pipeline) verify(from, to *pipe) error {
	h := hasher(p.blob.DiffID)
	for {
		c, err := from.next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		_, _ = h.Write(c.data())
		if err := to.put(c); err != nil {
			return err
		}
	}
	if got := digest.NewDigest(p.blob.DiffID.Algorithm(), h); got != p.blob.DiffID {
		return errs.New(errs.FailedPrecondition, "check layer: its diff ID is %s, the image config says %s", got, p.blob.DiffID)
	}
	return nil
}

// errStopped: a later stage gave up first.
var errStopped = fmt.Errorf("stopped: %w", context.Canceled)

const chunkSize = 256 << 10

type chunk struct {
	buf  []byte
	n    int
	last error // the stage's end, in place of data
}

func (c *chunk) data() []byte { return c.buf[:c.n] }

var chunks = sync.Pool{New: func() any { return &chunk{buf: make([]byte, chunkSize)} }}

// pipe hands chunks from one stage to the next, some ahead. It has one writer
// and one reader.
type pipe struct {
	ctx context.Context
	ch  chan *chunk
	cur *chunk
	off int
	err error
}

func newPipe(ctx context.Context) *pipe { return &pipe{ctx: ctx, ch: make(chan *chunk, 6)} }

// fill reads r to its end, in whole chunks.
func (p *pipe) fill(r io.Reader, check func([]byte) error) error {
	for {
		c, _ := chunks.Get().(*chunk)
		c.last = nil
		n, err := readSome(r, c.buf)
		c.n = n
		if cerr := check(c.data()); cerr != nil {
			return cerr
		}
		if n > 0 {
			if perr := p.put(c); perr != nil {
				return perr
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// readSome fills buf unless the reader ends first; the error is the reader's own.
func readSome(r io.Reader, buf []byte) (n int, err error) {
	for n < len(buf) && err == nil {
		var k int
		k, err = r.Read(buf[n:])
		n += k
	}
	return n, err
}

func (p *pipe) put(c *chunk) error {
	select {
	case p.ch <- c:
		return nil
	case <-p.ctx.Done():
		return errStopped
	}
}

// finish tells the reader that the writer is done, and how.
func (p *pipe) finish(err error) error {
	if err == nil {
		err = io.EOF
	}
	select {
	case p.ch <- &chunk{last: err}:
	case <-p.ctx.Done():
	}
	if errors.Is(err, io.EOF) && err == io.EOF { //nolint:errorlint // the bare end, not one wrapped
		return nil
	}
	return err
}

func (p *pipe) next() (*chunk, error) {
	if p.err != nil {
		return nil, p.err
	}
	select {
	case c := <-p.ch:
		if c.last != nil {
			p.err = c.last
			return nil, p.err
		}
		return c, nil
	case <-p.ctx.Done():
		p.err = context.Cause(p.ctx)
		return nil, p.err
	}
}

// Read makes a pipe an io.Reader.
func (p *pipe) Read(b []byte) (int, error) {
	for p.cur == nil || p.off == p.cur.n {
		if p.cur != nil {
			chunks.Put(p.cur)
			p.cur = nil
		}
		c, err := p.next()
		if err != nil {
			return 0, err
		}
		p.cur, p.off = c, 0
	}
	n := copy(b, p.cur.data()[p.off:])
	p.off += n
	return n, nil
}

// discard reads on, at most limit bytes.
func (p *pipe) discard(limit int) {
	for limit > 0 {
		c, err := p.next()
		if err != nil {
			return
		}
		limit -= c.n
		chunks.Put(c)
	}
}
