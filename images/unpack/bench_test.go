package unpack

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
)

func benchTar(files, size int) []byte {
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	rnd := rand.New(rand.NewPCG(1, 2))
	body := make([]byte, size)
	for i := range files {
		if i%20 == 0 {
			_ = tw.WriteHeader(&tar.Header{Name: fmt.Sprintf("d%d/", i/20), Typeflag: tar.TypeDir, Mode: 0o755, ModTime: time.Unix(1e9, 0)})
		}
		for j := 0; j < len(body); j += 2 { // about 2:1
			body[j] = byte(rnd.Uint32())
		}
		_ = tw.WriteHeader(&tar.Header{Name: fmt.Sprintf("d%d/f%d", i/20, i), Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(size), ModTime: time.Unix(1e9, 0)})
		_, _ = tw.Write(body)
	}
	_ = tw.Close()
	return buf.Bytes()
}

func benchLayer(b *testing.B, plain []byte, pack func(io.Writer) io.WriteCloser, files int) {
	var packed bytes.Buffer
	w := pack(&packed)
	_, _ = w.Write(plain)
	_ = w.Close()
	blob := Blob{
		Open: func(context.Context) (io.ReadCloser, error) {
			return io.NopCloser(bytes.NewReader(packed.Bytes())), nil
		},
		Digest: digest.FromBytes(packed.Bytes()), Size: int64(packed.Len()), DiffID: digest.FromBytes(plain),
	}
	b.SetBytes(int64(len(plain)))
	for b.Loop() {
		dir, err := os.Open(b.TempDir())
		if err != nil {
			b.Fatal(err)
		}
		if _, err := Layer(b.Context(), dir, blob, Limits{}); err != nil {
			b.Fatal(err)
		}
		_ = dir.Close()
	}
	b.ReportMetric(float64(files)*float64(b.N)/b.Elapsed().Seconds(), "files/s")
}

type nopWriter struct{ io.Writer }

func (nopWriter) Close() error { return nil }

func gzipPack(w io.Writer) io.WriteCloser  { return gzip.NewWriter(w) }
func zstdPack(w io.Writer) io.WriteCloser  { z, _ := zstd.NewWriter(w); return z }
func plainPack(w io.Writer) io.WriteCloser { return nopWriter{w} }

func BenchmarkLayer(b *testing.B) {
	big, small := benchTar(4, 64<<20), benchTar(20_000, 2048)
	b.Run("256MiB/gzip", func(b *testing.B) { benchLayer(b, big, gzipPack, 4) })
	b.Run("256MiB/zstd", func(b *testing.B) { benchLayer(b, big, zstdPack, 4) })
	b.Run("256MiB/plain", func(b *testing.B) { benchLayer(b, big, plainPack, 4) })
	b.Run("20kfiles/gzip", func(b *testing.B) { benchLayer(b, small, gzipPack, 20_000) })
}
