package images

import (
	"bytes"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/naru-project/naru/images/internal/regtest"
	"github.com/naru-project/naru/internal/errs"
)

// The rows of docs/security.md that are about what a registry says.

// lie answers requests for one part of an image in its own way.
type lie struct {
	name   string
	answer func(w http.ResponseWriter, r *http.Request, right []byte)
}

func endlessly(w http.ResponseWriter, right []byte) (sent int) {
	for sent < 1<<30 {
		n, err := w.Write(bytes.Repeat(right, 1+4096/len(right)))
		if sent += n; err != nil {
			break
		}
	}
	return sent
}

// lies are what a registry may send in place of the right bytes.
func lies(t *testing.T) []lie {
	abort := func(w http.ResponseWriter, part []byte, total int) {
		w.Header().Set("Content-Length", fmt.Sprint(total))
		_, _ = w.Write(part)
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	}
	flip := func(right []byte) []byte {
		out := append([]byte{}, right...)
		out[len(out)/2] ^= 1
		return out
	}
	return []lie{
		{"other bytes", func(w http.ResponseWriter, _ *http.Request, right []byte) { _, _ = w.Write(flip(right)) }},
		{"a byte more", func(w http.ResponseWriter, _ *http.Request, right []byte) {
			_, _ = w.Write(append(append([]byte{}, right...), ' '))
		}},
		{"a byte more, chunked", func(w http.ResponseWriter, _ *http.Request, right []byte) {
			_, _ = w.Write(right)
			w.(http.Flusher).Flush()
			_, _ = w.Write([]byte(" "))
		}},
		{"a byte less", func(w http.ResponseWriter, _ *http.Request, right []byte) { _, _ = w.Write(right[:len(right)-1]) }},
		{"a byte less, chunked", func(w http.ResponseWriter, _ *http.Request, right []byte) {
			_, _ = w.Write(right[:len(right)-2])
			w.(http.Flusher).Flush()
			_, _ = w.Write(right[len(right)-2 : len(right)-1])
		}},
		{"nothing", func(http.ResponseWriter, *http.Request, []byte) {}},
		{"without end", func(w http.ResponseWriter, _ *http.Request, right []byte) {
			if n := endlessly(w, right); n > 32<<20 {
				t.Errorf("%d MiB were taken of what has %d bytes", n>>20, len(right))
			}
		}},
		{"gzip by Content-Encoding", func(w http.ResponseWriter, _ *http.Request, right []byte) {
			w.Header().Set("Content-Encoding", "gzip")
			_, _ = w.Write(regtest.Gzip(right).Packed)
		}},
		{"Content-Encoding is a lie", func(w http.ResponseWriter, _ *http.Request, right []byte) {
			w.Header().Set("Content-Encoding", "gzip")
			_, _ = w.Write(right)
		}},
		{"206 though nobody asked", func(w http.ResponseWriter, _ *http.Request, right []byte) {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes 0-%d/%d", len(right)-1, len(right)))
			w.WriteHeader(http.StatusPartialContent)
			_, _ = w.Write(right)
		}},
		{"goes on elsewhere", func(w http.ResponseWriter, r *http.Request, right []byte) {
			if r.Header.Get("Range") == "" {
				abort(w, right[:len(right)/2], len(right))
			}
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", 1, len(right)-1, len(right)))
			w.WriteHeader(http.StatusPartialContent)
			_, _ = w.Write(right[1:])
		}},
		{"goes on with other bytes, 206", func(w http.ResponseWriter, r *http.Request, right []byte) {
			if r.Header.Get("Range") == "" {
				abort(w, right[:len(right)/2], len(right))
			}
			var from int
			_, _ = fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from)
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(right)-1, len(right)))
			w.WriteHeader(http.StatusPartialContent)
			_, _ = w.Write(bytes.Repeat([]byte("e"), len(right)-from))
		}},
		{"begins again with other bytes, 200", func(w http.ResponseWriter, r *http.Request, right []byte) {
			if r.Header.Get("Range") == "" {
				abort(w, right[:len(right)/2], len(right))
			}
			_, _ = w.Write(bytes.Repeat([]byte("e"), len(right)))
		}},
	}
}

// Row I-15: a registry that lies about the manifest, the config or a layer.
// The pull fails and leaves nothing; honest again, it is believed.
func TestRowI15Lies(t *testing.T) {
	for _, part := range []string{"manifest", "config", "layer"} {
		for _, c := range lies(t) {
			t.Run(part+" "+c.name, func(t *testing.T) {
				t.Parallel() // what breaks off is tried again after a while
				tryLie(t, part, c)
			})
		}
	}
}

func tryLie(t *testing.T, part string, c lie) {
	reg := regtest.New(t)
	big := strings.Repeat("0123456789abcdef", 4096)
	l := regtest.Uncompressed(regtest.Tar(tfile("f", big)))
	img := reg.Build("app", "v1", func(i *ocispec.Image) { i.Author = big[:4096] }, l)
	s := openStore(t, testConfig(t))
	refs := []string{reg.Host() + "/app:v1"}
	path, right := "/blobs/"+img.ID.String(), img.Config
	switch part {
	case "manifest":
		path, right = "/manifests/", regtest.JSON(img.Doc)
		refs = append(refs, reg.Host()+"/app@"+img.Manifest.Digest.String())
	case "layer":
		path, right = "/blobs/"+img.Doc.Layers[0].Digest.String(), l.Packed
	}
	var asked atomic.Bool
	reg.SetHook(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.URL.Path, path) || r.Method == http.MethodHead {
			return false
		}
		asked.Store(true)
		w.Header().Set("Docker-Content-Digest", digest.FromBytes(right).String()) // what it should be
		w.Header().Set("Content-Type", img.Doc.MediaType)
		c.answer(w, r, right)
		return true
	})
	for _, ref := range refs {
		if id, err := s.Pull(t.Context(), ref, nil); err == nil || errs.Of(err) != errs.FailedPrecondition && errs.Of(err) != errs.Unavailable {
			t.Errorf("%s: %q, %v: %v", ref, id, errs.Of(err), err)
		}
	}
	if len(s.List()) != 0 || !asked.Load() {
		t.Errorf("%d images; asked: %v", len(s.List()), asked.Load())
	}
	waitEmpty(t, s)
	reg.SetHook(nil)
	mustPull(t, s, refs[0])
}

// Row I-15: a Docker-Content-Digest that is not that of the answer.
func TestRowI15ContentDigest(t *testing.T) {
	reg := regtest.New(t)
	l := regtest.Gzip(simple("a"))
	img := reg.Build("app", "v1", nil, l)
	s := openStore(t, testConfig(t))
	byTag, byDigest := reg.Host()+"/app:v1", reg.Host()+"/app@"+img.Manifest.Digest.String()
	other := regtest.JSON(reg.Build("app", "", func(i *ocispec.Image) { i.Author = "other" }, l).Doc)
	for _, head := range []bool{false, true} { // also in the answer to HEAD alone
		reg.SetHook(func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.Contains(r.URL.Path, "/manifests/") {
				return false
			}
			if r.Method == http.MethodHead || !head {
				w.Header().Set("Docker-Content-Digest", img.Manifest.Digest.String())
			}
			w.Header().Set("Content-Type", img.Doc.MediaType)
			_, _ = w.Write(other)
			return true
		})
		if id, err := s.Pull(t.Context(), byDigest, nil); errs.Of(err) != errs.FailedPrecondition {
			t.Errorf("by digest: %q %v", id, err)
		}
		// By tag, an answer without the header is what the registry says it has.
		if id, err := s.Pull(t.Context(), byTag, nil); !head && errs.Of(err) != errs.FailedPrecondition || id == img.ID.String() {
			t.Errorf("by tag: %q %v", id, err)
		}
	}
}

// Row I-16: lists of diff IDs that do not fit the layers, and a victim that is
// pulled at the same time as the image that claims its layers.
func TestRowI16DiffIDs(t *testing.T) {
	reg := regtest.New(t)
	s := openStore(t, testConfig(t))
	a, b := regtest.Gzip(simple("a")), regtest.Gzip(simple("b"))
	da, db := digest.FromBytes(a.Plain), digest.FromBytes(b.Plain)
	for name, diffs := range map[string][]digest.Digest{
		"empty": {}, "none": nil, "one": {da}, "three": {da, db, db}, "the first twice": {da, da}, "the second twice": {db, db}, "in the other order": {db, da},
		"packed digests": {digest.FromBytes(a.Packed), digest.FromBytes(b.Packed)}, "sha512 of another": {da, digest.SHA512.FromString("x")},
	} {
		t.Run(name, func(t *testing.T) {
			reg.Build("app", "v1", func(i *ocispec.Image) { i.RootFS.DiffIDs = diffs }, a, b)
			failPull(t, s, reg.Host()+"/app:v1", errs.FailedPrecondition)
			waitEmpty(t, s)
		})
	}
	t.Run("at the same time", func(t *testing.T) {
		for i := range 20 {
			victim := regtest.Gzip(regtest.Tar(tfile("bin/sh", fmt.Sprint("good", i))))
			evil := regtest.Gzip(regtest.Tar(tfile("bin/sh", fmt.Sprint("evil", i))))
			reg.Build("good", "v1", func(c *ocispec.Image) { c.Author = fmt.Sprint("good", i) }, victim)
			reg.Build("evil", "v1", func(c *ocispec.Image) { c.Author = fmt.Sprint("evil", i) }, regtest.Layer{Plain: victim.Plain, Packed: evil.Packed, Type: evil.Type})
			var wg sync.WaitGroup
			for range 3 {
				wg.Go(func() {
					if _, err := s.Pull(t.Context(), reg.Host()+"/evil:v1", nil); errs.Of(err) != errs.FailedPrecondition {
						t.Errorf("evil: %v", err)
					}
				})
			}
			mountImage(t, s, reg.Host()+"/good:v1").content("bin/sh", fmt.Sprint("good", i))
			wg.Wait()
		}
	})
}
