// Package regtest is a scriptable image registry and an image builder for
// tests. Only tests import it.
package regtest

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Registry serves what was put into it. Hook, when set, sees each request
// first and returns true when it has answered it.
type Registry struct {
	*httptest.Server

	mu        sync.Mutex
	blobs     map[string][]byte
	manifests map[string]Doc
	hook      func(http.ResponseWriter, *http.Request) bool
	log       []Request
}

// Doc is a manifest with its media type.
type Doc struct {
	Type string
	Data []byte
}

// Request is what was asked.
type Request struct {
	Method, Path, Query, Authorization string
	Header                             http.Header
}

// New starts a registry on 127.0.0.1 that speaks plain http.
func New(t testing.TB) *Registry {
	r := Make()
	r.Server = httptest.NewUnstartedServer(r)
	r.Server.Config.ErrorLog = log.New(io.Discard, "", 0)
	r.Server.Start()
	t.Cleanup(r.Close)
	return r
}

// Make makes a registry without a server.
func Make() *Registry {
	return &Registry{blobs: map[string][]byte{}, manifests: map[string]Doc{}}
}

// Host is host:port of the registry.
func (r *Registry) Host() string {
	_, host, _ := strings.Cut(r.URL, "://")
	return host
}

// SetHook replaces the hook.
func (r *Registry) SetHook(h func(http.ResponseWriter, *http.Request) bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.hook = h
}

// Requests returns what was asked so far, and forgets it.
func (r *Registry) Requests() []Request {
	r.mu.Lock()
	defer r.mu.Unlock()
	l := r.log
	r.log = nil
	return l
}

// Count counts the requests whose "METHOD path" matches.
func (r *Registry) Count(pattern string) int {
	re := regexp.MustCompile(pattern)
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	for _, q := range r.log {
		if re.MatchString(q.Method + " " + q.Path) {
			n++
		}
	}
	return n
}

var routes = regexp.MustCompile(`^/v2/(.+)/(manifests|blobs)/([^/]+)$`)

func (r *Registry) ServeHTTP(w http.ResponseWriter, q *http.Request) {
	r.mu.Lock()
	r.log = append(r.log, Request{q.Method, q.URL.Path, q.URL.RawQuery, q.Header.Get("Authorization"), q.Header.Clone()})
	hook := r.hook
	r.mu.Unlock()
	if hook != nil && hook(w, q) {
		return
	}
	m := routes.FindStringSubmatch(q.URL.Path)
	if m == nil {
		http.NotFound(w, q)
		return
	}
	r.mu.Lock()
	doc, isDoc := r.manifests[m[1]+":"+m[3]]
	blob, isBlob := r.blobs[m[3]]
	r.mu.Unlock()
	switch {
	case m[2] == "manifests" && isDoc:
		w.Header().Set("Content-Type", doc.Type)
		w.Header().Set("Docker-Content-Digest", digest.FromBytes(doc.Data).String())
		w.Header().Set("Content-Length", strconv.Itoa(len(doc.Data)))
		if q.Method != http.MethodHead {
			_, _ = w.Write(doc.Data)
		}
	case m[2] == "blobs" && isBlob:
		w.Header().Set("Content-Type", "application/octet-stream")
		http.ServeContent(w, q, "", time.Time{}, bytes.NewReader(blob))
	default:
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusNotFound)
		_, _ = io.WriteString(w, `{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}`)
	}
}

// PutBlob stores a blob under its digest.
func (r *Registry) PutBlob(data []byte) digest.Digest {
	d := digest.FromBytes(data)
	r.PutBlobAs(d.String(), data)
	return d
}

// PutBlobAs stores a blob under any name.
func (r *Registry) PutBlobAs(name string, data []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.blobs[name] = data
}

// PutManifest stores a manifest under its digest and, if not empty, a tag.
func (r *Registry) PutManifest(repo, tag, mediaType string, data []byte) ocispec.Descriptor {
	d := digest.FromBytes(data)
	r.PutManifestAs(repo, d.String(), mediaType, data)
	if tag != "" {
		r.PutManifestAs(repo, tag, mediaType, data)
	}
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(data))}
}

// PutManifestAs stores a manifest under any name.
func (r *Registry) PutManifestAs(repo, ref, mediaType string, data []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.manifests[repo+":"+ref] = Doc{mediaType, data}
}

// Layer is a layer, packed.
type Layer struct {
	Plain, Packed []byte
	Type          string
}

// Gzip packs a tar archive.
func Gzip(plain []byte) Layer {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	_, _ = z.Write(plain)
	_ = z.Close()
	return Layer{plain, b.Bytes(), ocispec.MediaTypeImageLayerGzip}
}

// Zstd packs a tar archive.
func Zstd(plain []byte) Layer {
	z, _ := zstd.NewWriter(nil)
	return Layer{plain, z.EncodeAll(plain, nil), ocispec.MediaTypeImageLayerZstd}
}

// Uncompressed is a layer as it is.
func Uncompressed(plain []byte) Layer {
	return Layer{plain, plain, ocispec.MediaTypeImageLayer}
}

// Image is what Build made.
type Image struct {
	Manifest ocispec.Descriptor
	ID       digest.Digest
	Config   []byte
	Doc      ocispec.Manifest
	DiffIDs  []digest.Digest
}

// Config makes an image config.
func Config(diffs []digest.Digest, change func(*ocispec.Image)) []byte {
	c := ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH},
		Config:   ocispec.ImageConfig{Env: []string{"PATH=/bin"}, Cmd: []string{"/bin/sh"}},
		RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: diffs},
	}
	if change != nil {
		change(&c)
	}
	return JSON(c)
}

// JSON marshals, or panics.
func JSON(v any) []byte {
	data, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return data
}

// Build puts an image into the registry.
func (r *Registry) Build(repo, tag string, change func(*ocispec.Image), ls ...Layer) Image {
	var img Image
	for _, l := range ls {
		img.DiffIDs = append(img.DiffIDs, digest.FromBytes(l.Plain))
		img.Doc.Layers = append(img.Doc.Layers, ocispec.Descriptor{MediaType: l.Type, Digest: r.PutBlob(l.Packed), Size: int64(len(l.Packed))})
	}
	img.Config = Config(img.DiffIDs, change)
	img.ID = r.PutBlob(img.Config)
	img.Doc.Versioned = specs.Versioned{SchemaVersion: 2}
	img.Doc.MediaType = ocispec.MediaTypeImageManifest
	img.Doc.Config = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: img.ID, Size: int64(len(img.Config))}
	if img.Doc.Layers == nil {
		img.Doc.Layers = []ocispec.Descriptor{}
	}
	img.Manifest = r.PutManifest(repo, tag, img.Doc.MediaType, JSON(img.Doc))
	return img
}

// Index puts an index into the registry.
func (r *Registry) Index(repo, tag string, list ...ocispec.Descriptor) ocispec.Descriptor {
	return r.PutManifest(repo, tag, ocispec.MediaTypeImageIndex, JSON(ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: list,
	}))
}

// Dir, File, Link and so on are entries for Tar.
func Dir(name string, mode int64) tar.Header {
	return tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: mode}
}

// Symlink is a symbolic link.
func Symlink(name, target string) tar.Header {
	return tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: target, Mode: 0o777}
}

// Link is a hard link.
func Link(name, target string) tar.Header {
	return tar.Header{Name: name, Typeflag: tar.TypeLink, Linkname: target, Mode: 0o644}
}

// Content goes into a header's PAXRecords under this key and becomes a file's content.
const Content = "NARUTEST.content"

// File is a file with content.
func File(name, content string, mode int64) tar.Header {
	return tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: mode, Size: int64(len(content)), PAXRecords: map[string]string{Content: content}}
}

// Tar makes an archive.
func Tar(list ...tar.Header) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range list {
		content := ""
		if c, ok := h.PAXRecords[Content]; ok {
			content = c
			rest := map[string]string{}
			for k, v := range h.PAXRecords {
				if k != Content {
					rest[k] = v
				}
			}
			h.PAXRecords = rest
		}
		if len(h.PAXRecords) > 0 {
			h.Format = tar.FormatPAX
		}
		if h.ModTime.IsZero() {
			h.ModTime = time.Unix(1_600_000_000, 0)
		}
		if err := w.WriteHeader(&h); err != nil {
			panic(fmt.Sprintf("%.100s: %v", h.Name, err))
		}
		_, _ = io.WriteString(w, content)
	}
	if err := w.Close(); err != nil {
		panic(err)
	}
	return b.Bytes()
}

// RawHeader makes a ustar header block with the fields given as bytes, for
// archives that no writer would make. Numbers are octal text.
func RawHeader(name, link string, typeflag byte, fields map[string]string) []byte {
	h := make([]byte, 512)
	put := func(off, n int, s string) { copy(h[off:off+n], s) }
	put(0, 100, name)
	put(100, 8, "0000644\x00")
	put(108, 8, "0000000\x00")
	put(116, 8, "0000000\x00")
	put(124, 12, "00000000000\x00")
	put(136, 12, "13727112345\x00")
	h[156] = typeflag
	put(157, 100, link)
	put(257, 8, "ustar\x0000")
	at := map[string][2]int{"mode": {100, 8}, "uid": {108, 8}, "gid": {116, 8}, "size": {124, 12}, "mtime": {136, 12}, "devmajor": {329, 8}, "devminor": {337, 8}}
	for k, v := range fields {
		p := at[k]
		clear(h[p[0] : p[0]+p[1]])
		put(p[0], p[1], v)
	}
	copy(h[148:156], "        ")
	sum := 0
	for _, c := range h {
		sum += int(c)
	}
	put(148, 8, fmt.Sprintf("%06o\x00 ", sum))
	return h
}

// Titled is a file of an artifact; without a Title it has its digest alone.
type Titled struct{ Title, Content string }

// Artifact puts an artifact of such files into the registry, with the empty
// config that most have.
func (r *Registry) Artifact(repo, tag string, files ...Titled) (ocispec.Descriptor, []byte) {
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, ArtifactType: "application/vnd.test.model", Layers: []ocispec.Descriptor{},
		Config: ocispec.Descriptor{MediaType: ocispec.MediaTypeEmptyJSON, Digest: r.PutBlob([]byte("{}")), Size: 2},
	}
	for _, f := range files {
		l := ocispec.Descriptor{MediaType: "application/octet-stream", Digest: r.PutBlob([]byte(f.Content)), Size: int64(len(f.Content))}
		if f.Title != "" {
			l.Annotations = map[string]string{ocispec.AnnotationTitle: f.Title}
		}
		m.Layers = append(m.Layers, l)
	}
	data := JSON(m)
	return r.PutManifest(repo, tag, m.MediaType, data), data
}
