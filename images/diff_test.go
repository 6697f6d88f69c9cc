package images

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
)

// What a container changed is written as a layer, and nothing outside of it.
func TestWriteDiff(t *testing.T) {
	s := openStore(t, testConfig(t))
	w, err := s.NewWritable(t.Context(), "c")
	must(t, err)
	up := func(name string) string { return filepath.Join(w.Upper, name) }
	secret := filepath.Join(t.TempDir(), "secret")
	must(t, os.WriteFile(secret, []byte("of the host"), 0o600))
	must(t, os.MkdirAll(up("a/b"), 0o755))
	must(t, os.WriteFile(up("a/file"), []byte("content"), 0o640))
	must(t, os.Chown(up("a/file"), 1000, 2000))
	must(t, os.Chmod(up("a/file"), os.ModeSetuid|0o755))
	must(t, os.Link(up("a/file"), up("a/link")))
	must(t, os.Symlink(secret, up("a/out")))
	must(t, os.Symlink(filepath.Dir(secret), up("a/outdir")))
	must(t, unix.Mkfifo(up("fifo"), 0o600))
	must(t, unix.Mknod(up("a/gone"), unix.S_IFCHR, 0))
	must(t, unix.Mknod(up("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	must(t, os.Mkdir(up("opaque"), 0o755))
	if err := unix.Setxattr(up("opaque"), "trusted.overlay.opaque", []byte("y"), 0); err != nil {
		t.Skipf("no trusted attributes here: %v", err)
	}
	must(t, unix.Setxattr(up("a/file"), "user.note", []byte("a\x00b"), 0))

	var b bytes.Buffer
	must(t, s.WriteDiff(t.Context(), "c", &b))
	if bytes.Contains(b.Bytes(), []byte("of the host")) {
		t.Error("a file of the host is in the archive")
	}
	got := map[string]*tar.Header{}
	var order []string
	for in := tar.NewReader(&b); ; {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		must(t, err)
		got[h.Name] = h
		order = append(order, h.Name)
		if h.Typeflag == tar.TypeReg && h.Size > 0 {
			if data, err := io.ReadAll(in); err != nil || string(data) != "content" {
				t.Errorf("%s holds %q, %v", h.Name, data, err)
			}
		}
	}
	first, second := "a/file", "a/link"
	if got[first] == nil || got[first].Typeflag != tar.TypeReg {
		first, second = second, first
	}
	for name, ok := range map[string]func(h *tar.Header) bool{
		"a/": func(h *tar.Header) bool { return h.Typeflag == tar.TypeDir }, "a/b/": func(h *tar.Header) bool { return h.Typeflag == tar.TypeDir },
		first: func(h *tar.Header) bool {
			return h.Typeflag == tar.TypeReg && h.Uid == 1000 && h.Gid == 2000 && h.Mode == 0o4755 && h.Uname == "" && h.PAXRecords["SCHILY.xattr.user.note"] == "a\x00b"
		},
		second:     func(h *tar.Header) bool { return h.Typeflag == tar.TypeLink && h.Linkname == first },
		"a/out":    func(h *tar.Header) bool { return h.Typeflag == tar.TypeSymlink && h.Linkname == secret },
		"a/outdir": func(h *tar.Header) bool { return h.Typeflag == tar.TypeSymlink },
		"fifo":     func(h *tar.Header) bool { return h.Typeflag == tar.TypeFifo },
		"null":     func(h *tar.Header) bool { return h.Typeflag == tar.TypeChar && h.Devmajor == 1 && h.Devminor == 3 },
		"a/.wh.gone": func(h *tar.Header) bool {
			return h.Typeflag == tar.TypeReg && h.Size == 0
		},
		"opaque/":             func(h *tar.Header) bool { return h.Typeflag == tar.TypeDir },
		"opaque/.wh..wh..opq": func(h *tar.Header) bool { return h.Typeflag == tar.TypeReg },
	} {
		if h := got[name]; h == nil || !ok(h) {
			t.Errorf("%s is %+v", name, h)
		}
	}
	if len(got) != 11 || len(order) != 11 {
		t.Errorf("the archive has %q", order)
	}
	if slices.Index(order, "a/") > slices.Index(order, "a/b/") {
		t.Errorf("a folder comes after what is in it: %q", order)
	}
}

func TestWriteDiffRefused(t *testing.T) {
	s := openStore(t, testConfig(t))
	if err := s.WriteDiff(t.Context(), "nobody", io.Discard); !errs.Is(err, errs.NotFound) {
		t.Error(err)
	}
	if err := s.WriteDiff(t.Context(), "../x", io.Discard); !errs.Is(err, errs.InvalidArgument) {
		t.Error(err)
	}
	w, err := s.NewWritable(t.Context(), "c")
	must(t, err)
	deep(t, w.Upper, maxDiffDepth+10)
	if err := s.WriteDiff(t.Context(), "c", io.Discard); !errs.Is(err, errs.ResourceExhausted) {
		t.Error(err)
	}
	must(t, os.RemoveAll(w.Upper))
	must(t, os.Mkdir(w.Upper, 0o755))
	must(t, os.WriteFile(filepath.Join(w.Upper, "f"), make([]byte, 1<<20), 0o600))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.WriteDiff(ctx, "c", io.Discard); err == nil || !strings.Contains(err.Error(), "canceled") {
		t.Error(err)
	}
}
