package unpack

import (
	"context"
	"errors"
	"io"
	"os"
	"path"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
)

// CheckTotal refuses content that is larger, as a whole, than a layer may be.
func (l Limits) CheckTotal(size int64) error {
	if most := l.orDefault().MaxBytes; size < 0 || size > most {
		return errs.New(errs.ResourceExhausted, "the files have %d bytes, more than %d", size, most)
	}
	return nil
}

// File stores a blob as it is, as the file name in dir, an empty directory that
// nobody else uses. The name is local and clean; size and digest of the blob
// are known, and checked. On error dir may hold a part of it.
func File(ctx context.Context, dir *os.File, name string, b Blob, lim Limits) (Result, error) {
	e := &extractor{ctx: ctx, root: int(dir.Fd()), lim: lim.orDefault(), buf: make([]byte, copyBuffer)}
	defer e.cache.close()
	if err := lim.CheckTotal(b.Size); err != nil {
		return Result{}, err
	}
	if err := e.checkFree(0); err != nil {
		return Result{}, errs.New(errs.ResourceExhausted, "store file: %w", err)
	}
	e.made(blockSize) // the root folder
	rc, err := b.Open(ctx)
	if err != nil {
		return Result{}, err
	}
	defer func() { _ = rc.Close() }()
	parent, err := e.parent(path.Dir("/"+name), 0)
	if err != nil {
		return Result{}, errs.New(errs.Of(err), "store file %.200q: %w", name, err)
	}
	fd, err := unix.Openat(parent, path.Base(name), unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return Result{}, errs.New(errs.Internal, "store file %.200q: %w", name, err)
	}
	err = e.receive(fd, rc, b)
	if err == nil {
		err = unix.Fchmod(fd, 0o644)
	}
	if err = errors.Join(err, unix.Close(fd)); err != nil {
		if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
			err = errs.Wrap(errs.ResourceExhausted, err)
		}
		return Result{}, err
	}
	e.made(b.Size)
	return e.res, nil
}

// receive copies the blob, never more than one byte beyond its size, and checks
// that it is the one.
func (e *extractor) receive(fd int, r io.Reader, b Blob) error {
	h := hasher(b.Digest)
	if h == nil {
		return errs.New(errs.Internal, "store file: its digest is not known")
	}
	r = io.LimitReader(r, b.Size+1)
	var size int64
	for {
		if e.ctx.Err() != nil {
			return context.Cause(e.ctx)
		}
		n, err := r.Read(e.buf)
		if size += int64(n); size > b.Size {
			return errs.New(errs.FailedPrecondition, "check file %s: more than the %d bytes that the manifest says", b.Digest, b.Size)
		}
		_, _ = h.Write(e.buf[:n])
		if werr := e.write(fd, e.buf[:n]); werr != nil {
			return werr
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
	}
	if size != b.Size {
		return errs.New(errs.FailedPrecondition, "check file %s: %d bytes, the manifest says %d", b.Digest, size, b.Size)
	}
	if got := digest.NewDigest(b.Digest.Algorithm(), h); got != b.Digest {
		return errs.New(errs.FailedPrecondition, "check file: its digest is %s, the manifest says %s", got, b.Digest)
	}
	return nil
}
