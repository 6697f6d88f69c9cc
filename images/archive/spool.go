package archive

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
)

// Spool copies a stream into a file without a name in dir, so that its members
// can be read in any order; gzip and zstd are taken off. It stops at limit
// bytes, or when the file system would be left with less than reserve.
func Spool(ctx context.Context, r io.Reader, dir string, limit int64, reserve uint64) (*os.File, error) {
	br := bufio.NewReaderSize(r, 64<<10)
	plain, done, err := unpacked(br)
	if err != nil {
		return nil, err
	}
	defer done()
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("make temporary file: %w", err)
	}
	f := os.NewFile(uintptr(fd), "archive")
	if err := copyBounded(ctx, f, plain, limit, reserve); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// Compressed reports whether a file starts as gzip or zstd do.
func Compressed(f *os.File) (bool, error) {
	var head [4]byte
	n, err := f.ReadAt(head[:], 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return false, err
	}
	return isGzip(head[:n]) || isZstd(head[:n]), nil
}

func isGzip(b []byte) bool { return bytes.HasPrefix(b, []byte{0x1f, 0x8b}) }
func isZstd(b []byte) bool { return bytes.HasPrefix(b, []byte{0x28, 0xb5, 0x2f, 0xfd}) }

func unpacked(br *bufio.Reader) (io.Reader, func(), error) {
	head, err := br.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, fmt.Errorf("read archive: %w", err)
	}
	switch {
	case isGzip(head):
		z, err := gzip.NewReader(br)
		if err != nil {
			return nil, nil, errs.New(errs.InvalidArgument, "read archive: %w", err)
		}
		return z, func() { _ = z.Close() }, nil
	case isZstd(head):
		z, err := zstd.NewReader(br, zstd.WithDecoderMaxWindow(128<<20), zstd.WithDecoderLowmem(true))
		if err != nil {
			return nil, nil, errs.New(errs.InvalidArgument, "read archive: %w", err)
		}
		return z, z.Close, nil
	}
	return br, func() {}, nil
}

func copyBounded(ctx context.Context, f *os.File, r io.Reader, limit int64, reserve uint64) error {
	const step = 8 << 20
	for total := int64(0); ; {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		var st unix.Statfs_t
		if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
			return fmt.Errorf("look at the free space: %w", err)
		}
		if st.Bavail*uint64(st.Bsize) < reserve+step {
			return errs.New(errs.ResourceExhausted, "read archive: the file system of the images is full but for its reserve")
		}
		n, err := io.CopyN(f, r, step)
		if total += n; total > limit {
			return errs.New(errs.ResourceExhausted, "read archive: more than %d bytes", limit)
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return errs.New(errs.InvalidArgument, "read archive: %w", err)
		}
	}
}
