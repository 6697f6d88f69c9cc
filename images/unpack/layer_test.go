package unpack

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"

	"github.com/naru-project/naru/images/internal/regtest"
	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/testhost"
)

func TestMain(m *testing.M) { os.Exit(regtest.Main(m)) }

func reader(b []byte) func(context.Context) (io.ReadCloser, error) {
	return func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil }
}

func runLayer(t testing.TB, b Blob, lim Limits) (string, error) {
	t.Helper()
	needRoot(t)
	path := t.TempDir()
	dir, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = dir.Close() }()
	_, err = Layer(t.Context(), dir, b, lim)
	return path, err
}

func TestLayerForms(t *testing.T) {
	plain := regtest.Tar(dir("d", 0o755), file("d/f", strings.Repeat("x", 700_000), 0o644), file("g", "g", 0o600))
	var members bytes.Buffer // gzip allows several, as bgzip and pigz make them
	for i := 0; i < len(plain); i += 100_000 {
		members.Write(regtest.Gzip(plain[i:min(i+100_000, len(plain))]).Packed)
	}
	for name, packed := range map[string][]byte{
		"gzip": regtest.Gzip(plain).Packed, "zstd": regtest.Zstd(plain).Packed, "plain": plain, "gzip members": members.Bytes(),
		"zstd behind a skippable frame": append([]byte{0x52, 0x2a, 0x4d, 0x18, 4, 0, 0, 0, 1, 2, 3, 4}, regtest.Zstd(plain).Packed...),
	} {
		t.Run(name, func(t *testing.T) {
			d := digest.FromBytes(plain)
			path, err := runLayer(t, Blob{Open: reader(packed), Digest: digest.FromBytes(packed), Size: int64(len(packed)), DiffID: d}, Limits{})
			if err != nil {
				t.Fatal(err)
			}
			if data, err := os.ReadFile(path + "/d/f"); err != nil || len(data) != 700_000 {
				t.Error(len(data), err)
			}
			if _, err := runLayer(t, Blob{Open: reader(packed), Size: -1, DiffID: d}, Limits{}); err != nil {
				t.Error("without digest: ", err)
			}
			d512 := digest.SHA512.FromBytes(plain)
			if _, err := runLayer(t, Blob{Open: reader(packed), Digest: digest.SHA512.FromBytes(packed), Size: int64(len(packed)), DiffID: d512}, Limits{}); err != nil {
				t.Error("sha512: ", err)
			}
		})
	}
}

// Rows I-15 and I-16: a layer whose bytes are not those that were promised.
func TestLayerRefused(t *testing.T) {
	plain := regtest.Tar(file("f", strings.Repeat("abc", 100_000), 0o644))
	good := regtest.Gzip(plain).Packed
	of := func(packed, says []byte, diff digest.Digest) Blob {
		return Blob{Open: reader(packed), Digest: digest.FromBytes(says), Size: int64(len(says)), DiffID: diff}
	}
	diff := digest.FromBytes(plain)
	garbage := append(append([]byte{}, good...), "garbage behind the end"...)
	flipped := append([]byte{}, good...)
	flipped[len(flipped)/2] ^= 0x40
	longName := append([]byte{0x1f, 0x8b, 8, 8, 0, 0, 0, 0, 0, 255}, bytes.Repeat([]byte("n"), 1<<20)...)
	cases := []struct {
		name string
		blob Blob
		want string
	}{
		{"other bytes", of(regtest.Gzip(regtest.Tar(file("evil", "x", 0o644))).Packed, good, diff), "bytes, the manifest says"},
		{"a bit flipped", of(flipped, good, diff), "its digest is"},
		{"no archive at all", of(bytes.Repeat([]byte("z"), len(good)), good, diff), "its digest is"},
		{"too short", of(good[:len(good)-5], good, diff), "bytes, the manifest says"},
		{"too long", of(append(append([]byte{}, good...), 1), good, diff), "more than the"},
		{"wrong diff ID", of(good, good, digest.FromString("other")), "its diff ID is"},
		{"garbage behind gzip", of(garbage, garbage, diff), "gzip"},
		{"truncated gzip", of(good[:len(good)/2], good[:len(good)/2], diff), "EOF"},
		{"gzip name without end", of(longName, longName, diff), "gzip"},
		{"bzip2", of([]byte("BZh91AY&SY..."), []byte("BZh91AY&SY..."), diff), ""},
		{"xz", of([]byte("\xfd7zXZ\x00..."), []byte("\xfd7zXZ\x00..."), diff), ""},
		{"empty", of(nil, nil, diff), "its diff ID is"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			_, err := runLayer(t, c.blob, Limits{})
			if errs.Of(err) != errs.FailedPrecondition || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("%v: %v", errs.Of(err), err)
			}
		})
	}
}

// endless yields the same bytes for ever, and counts.
type endless struct{ n *int64 }

func (e endless) Read(p []byte) (int, error) { *e.n += int64(len(p)); return len(p), nil }
func (endless) Close() error                 { return nil }

// Row I-15: reading stops one byte behind the promised size.
func TestEndlessBlob(t *testing.T) {
	var n int64
	b := Blob{Digest: digest.FromString("x"), Size: 1000, DiffID: digest.FromString("y"),
		Open: func(context.Context) (io.ReadCloser, error) { return endless{&n}, nil }}
	if _, err := runLayer(t, b, Limits{}); err == nil || n > 4096 {
		t.Fatal(n, err)
	}
}

// bomb is a tar archive with one file of zeros, gzipped.
func bomb(t testing.TB, size int64) []byte {
	t.Helper()
	var b bytes.Buffer
	z, _ := gzip.NewWriterLevel(&b, gzip.BestSpeed)
	_, _ = z.Write(regtest.RawHeader("zeros", "", '0', map[string]string{"size": octal(size)}))
	zero := make([]byte, 1<<20)
	for i := int64(0); i < size; i += int64(len(zero)) {
		_, _ = z.Write(zero)
	}
	_, _ = z.Write(make([]byte, 1024))
	_ = z.Close()
	return b.Bytes()
}

func octal(n int64) string {
	s := ""
	for ; n > 0; n >>= 3 {
		s = string(rune('0'+n&7)) + s
	}
	return strings.Repeat("0", 11-len(s)) + s + "\x00"
}

func TestBombs(t *testing.T) {
	packed := bomb(t, 1<<30)
	blob := Blob{Open: reader(packed), Digest: digest.FromBytes(packed), Size: int64(len(packed)), DiffID: digest.FromString("x")}
	if _, err := runLayer(t, blob, Limits{}); errs.Of(err) != errs.ResourceExhausted || !strings.Contains(err.Error(), "ratio") {
		t.Errorf("ratio: %v", err)
	}
	if _, err := runLayer(t, blob, Limits{MaxRatio: 1 << 20, MaxBytes: 100 << 20}); errs.Of(err) != errs.ResourceExhausted {
		t.Errorf("bytes: %v", err)
	}
	// A frame that wants a window of 2 GiB: descriptor byte 0xa8 (RFC 8878, 3.1.1.1.2).
	frame := []byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa8, 0x01, 0x00, 0x00}
	wide := append(frame, make([]byte, 100)...)
	blob = Blob{Open: reader(wide), Digest: digest.FromBytes(wide), Size: int64(len(wide)), DiffID: digest.FromString("x")}
	if _, err := runLayer(t, blob, Limits{}); errs.Of(err) != errs.FailedPrecondition || !errors.Is(err, zstd.ErrWindowSizeExceeded) {
		t.Errorf("zstd window: %v", err)
	}
	one := regtest.Gzip(nil).Packed
	members := bytes.Repeat(one, 200_000)
	blob = Blob{Open: reader(members), Digest: digest.FromBytes(members), Size: int64(len(members)), DiffID: digest.FromBytes(nil)}
	start := time.Now()
	if _, err := runLayer(t, blob, Limits{}); err != nil || time.Since(start) > testhost.Limit(20*time.Second) {
		t.Errorf("empty gzip members: %v after %s", err, time.Since(start))
	}
}

func TestBombMemory(t *testing.T) {
	packed := bomb(t, 256<<20)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	_, err := runLayer(t, Blob{Open: reader(packed), Digest: digest.FromBytes(packed), Size: int64(len(packed)), DiffID: digest.FromString("x")}, Limits{})
	runtime.ReadMemStats(&after)
	if err == nil || after.TotalAlloc-before.TotalAlloc > 64<<20 {
		t.Errorf("%v, %d MiB allocated", err, (after.TotalAlloc-before.TotalAlloc)>>20)
	}
}

// blocked is a transfer that never brings anything.
type blocked struct{ ctx context.Context }

func (b blocked) Read([]byte) (int, error) { <-b.ctx.Done(); return 0, context.Cause(b.ctx) }
func (blocked) Close() error               { return nil }

func TestLayerCancel(t *testing.T) {
	needRoot(t)
	for _, closeFirst := range []bool{true, false} {
		dir, err := os.Open(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		cause := errors.New("enough")
		ctx, cancel := context.WithCancelCause(t.Context())
		if closeFirst {
			cancel(cause)
		} else {
			time.AfterFunc(50*time.Millisecond, func() { cancel(cause) })
		}
		start := time.Now()
		_, err = Layer(ctx, dir, Blob{Size: 10, DiffID: digest.FromString("x"),
			Open: func(ctx context.Context) (io.ReadCloser, error) { return blocked{ctx}, nil }}, Limits{})
		if !errors.Is(err, cause) || time.Since(start) > testhost.Limit(time.Second) {
			t.Errorf("%v after %s", err, time.Since(start))
		}
		_ = dir.Close()
	}
}

func TestSourceError(t *testing.T) {
	plain := regtest.Tar(file("f", strings.Repeat("x", 2<<20), 0o644))
	broken := errs.New(errs.Unavailable, "RegistryUnavailable: the line is down")
	_, err := runLayer(t, Blob{Size: int64(len(plain)), DiffID: digest.FromBytes(plain), Open: func(context.Context) (io.ReadCloser, error) {
		return io.NopCloser(io.MultiReader(bytes.NewReader(plain[:1<<20]), errReader{broken})), nil
	}}, Limits{})
	if err != broken {
		t.Fatal(err)
	}
}

type errReader struct{ err error }

func (e errReader) Read([]byte) (int, error) { return 0, e.err }
