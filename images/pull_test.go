package images

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	ggcr "github.com/google/go-containerregistry/pkg/registry"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/naru-project/naru/images/internal/regtest"
	"github.com/naru-project/naru/images/manifest"
	"github.com/naru-project/naru/images/unpack"
	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/testhost"
)

func TestMain(m *testing.M) {
	if os.Getenv(crashEnv) != "" {
		crashChild()
		return
	}
	os.Exit(regtest.Main(m))
}

func failPull(t testing.TB, s *Store, ref string, class errs.Class, parts ...string) {
	t.Helper()
	id, err := s.Pull(t.Context(), ref, nil)
	if err == nil || id != "" || errs.Of(err) != class {
		t.Fatalf("pull %s: %q %v: %v", ref, id, errs.Of(err), err)
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("%q is not in: %v", p, err)
		}
	}
}

func TestIndexes(t *testing.T) {
	reg := regtest.New(t)
	s := openStore(t, testConfig(t))
	img := reg.Build("app", "", nil, regtest.Gzip(simple("a")))
	foreign := reg.Build("app", "", func(i *ocispec.Image) { i.Architecture = "s390x" }, regtest.Gzip(simple("b")))
	mine, theirs := img.Manifest, foreign.Manifest
	mine.Platform = &ocispec.Platform{OS: "linux", Architecture: nodeArch()}
	theirs.Platform = &ocispec.Platform{OS: "linux", Architecture: "s390x"}
	top := reg.Index("app", "multi", theirs, mine)
	ref := reg.Host() + "/app:"
	if id := mustPull(t, s, ref+"multi"); id != img.ID.String() {
		t.Fatal(id)
	}
	if i, err := s.Resolve(reg.Host() + "/app@" + top.Digest.String()); err != nil || i.ID != img.ID.String() {
		t.Error(err)
	}
	// tag and digest: the digest counts, no tag is made.
	both := ref + "other@" + top.Digest.String()
	if id := mustPull(t, s, both); id != img.ID.String() {
		t.Error(id)
	}
	if _, err := s.Resolve(ref + "other"); !errs.Is(err, errs.NotFound) {
		t.Errorf("a tag beside a digest was made: %v", err)
	}
	inner := reg.Index("app", "", mine)
	reg.Index("app", "two", inner)
	if id := mustPull(t, s, ref+"two"); id != img.ID.String() {
		t.Error(id)
	}
	reg.Index("app", "three", reg.Index("app", "", inner))
	failPull(t, s, ref+"three", errs.FailedPrecondition, "more than 2 indexes")
	reg.Index("app", "foreign", theirs)
	failPull(t, s, ref+"foreign", errs.NotFound, "no variant")
	reg.PutManifestAs("app", "s390x", foreign.Manifest.MediaType, regtest.JSON(foreign.Doc))
	failPull(t, s, ref+"s390x", errs.FailedPrecondition, "s390x")
	lie := mine
	lie.MediaType = manifest.DockerManifest
	reg.Index("app", "lie", lie)
	failPull(t, s, ref+"lie", errs.FailedPrecondition, "the index says")
	short := mine
	short.Size--
	reg.Index("app", "short", short)
	failPull(t, s, ref+"short", errs.FailedPrecondition, "the index says")
	confused := fmt.Sprintf(`{"schemaVersion":2,"manifests":[],%s`, strings.TrimPrefix(string(regtest.JSON(img.Doc)), "{"))
	reg.PutManifest("app", "confused", ocispec.MediaTypeImageManifest, []byte(strings.Replace(confused, `"schemaVersion":2,"mediaType"`, `"mediaType"`, 1)))
	failPull(t, s, ref+"confused", errs.FailedPrecondition)
}

func nodeArch() string { return runtime.GOARCH }

func TestDockerTypes(t *testing.T) {
	reg := regtest.New(t)
	s := openStore(t, testConfig(t))
	l := regtest.Gzip(simple("a"))
	conf := regtest.Config([]digest.Digest{digest.FromBytes(l.Plain)}, nil)
	doc := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: manifest.DockerManifest,
		Config: ocispec.Descriptor{MediaType: manifest.DockerConfig, Digest: reg.PutBlob(conf), Size: int64(len(conf))},
		Layers: []ocispec.Descriptor{{MediaType: manifest.DockerLayerGzip, Digest: reg.PutBlob(l.Packed), Size: int64(len(l.Packed)),
			URLs: []string{"http://127.0.0.1:1/evil"}}}} // is never asked
	d := reg.PutManifest("app", "", manifest.DockerManifest, regtest.JSON(doc))
	d.Platform = &ocispec.Platform{OS: "linux", Architecture: nodeArch()}
	list := regtest.JSON(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: manifest.DockerManifestList, Manifests: []ocispec.Descriptor{d}})
	reg.PutManifest("app", "list", manifest.DockerManifestList, list)
	if id := mustPull(t, s, reg.Host()+"/app:list"); id != digest.FromBytes(conf).String() {
		t.Error(id)
	}
	doc.Layers[0].MediaType = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
	reg.PutManifest("app", "foreign", manifest.DockerManifest, regtest.JSON(doc))
	failPull(t, s, reg.Host()+"/app:foreign", errs.FailedPrecondition, "foreign")
}

// Row I-07: many pulls of the same layers at once share one transfer of each.
func TestJoinedPulls(t *testing.T) {
	reg := regtest.New(t)
	img := reg.Build("app", "v1", nil, regtest.Gzip(simple("a")), regtest.Gzip(simple("b")))
	s := openStore(t, testConfig(t))
	gate := make(chan struct{})
	reg.SetHook(func(_ http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, "/blobs/") {
			<-gate
		}
		return false
	})
	var wg sync.WaitGroup
	first, giveUp := context.WithCancel(t.Context())
	for i := range 10 {
		wg.Go(func() {
			ctx := t.Context()
			if i == 0 {
				ctx = first
			}
			id, err := s.Pull(ctx, reg.Host()+"/app:v1", nil)
			if i == 0 {
				if !errors.Is(err, context.Canceled) {
					t.Error(err)
				}
				return
			}
			if err != nil || id != img.ID.String() {
				t.Error(id, err)
			}
		})
	}
	// Another caller has credentials of its own: a pull of its own, the same layers.
	wg.Go(func() {
		if _, err := s.Pull(t.Context(), reg.Host()+"/app:v1", &Auth{Username: "joe", Password: "x"}); err != nil {
			t.Error(err)
		}
	})
	waitFor(t, func() bool {
		n := 0
		for _, p := range s.Progress() {
			n += p.Waiting
		}
		return n == 11 && len(s.Progress()) == 2
	})
	giveUp() // the others go on
	waitFor(t, func() bool { return reg.Count("GET .*/blobs/") >= 2 })
	close(gate)
	wg.Wait()
	for _, l := range img.Doc.Layers {
		if n := reg.Count("GET .*/blobs/" + l.Digest.String()); n != 1 {
			t.Errorf("layer transferred %d times", n)
		}
	}
	if n := reg.Count("GET .*/manifests/"); n != 2 {
		t.Errorf("manifest transferred %d times", n)
	}
	if len(s.Progress()) != 0 {
		t.Error("pulls left over")
	}
}

func waitFor(t testing.TB, ok func() bool) {
	t.Helper()
	for range 1000 {
		if ok() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("waited in vain")
}

func TestCancelLeavesNothing(t *testing.T) {
	reg := regtest.New(t)
	big := regtest.Uncompressed(regtest.Tar(regtest.File("f", strings.Repeat("x", 4<<20), 0o644)))
	reg.Build("app", "v1", nil, regtest.Gzip(simple("a")), big)
	stop := make(chan struct{})
	defer close(stop)
	reg.SetHook(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, digest.FromBytes(big.Packed).String()) {
			return false
		}
		_, _ = w.Write(big.Packed[:1<<20])
		w.(http.Flusher).Flush()
		select {
		case <-stop:
		case <-r.Context().Done():
		}
		return true
	})
	s := openStore(t, testConfig(t))
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	for range 3 {
		wg.Go(func() {
			if _, err := s.Pull(ctx, reg.Host()+"/app:v1", nil); !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
		})
	}
	waitFor(t, func() bool { p := s.Progress(); return len(p) == 1 && p[0].Bytes > 1<<19 && p[0].Waiting == 3 })
	if p := s.Progress()[0]; p.Ref != reg.Host()+"/app:v1" || p.Stage != "layers" || p.AllLayers != 2 || p.Total < 4<<20 {
		t.Errorf("%+v", p)
	}
	start := time.Now()
	cancel()
	wg.Wait()
	waitEmpty(t, s)
	if time.Since(start) > testhost.Limit(3*time.Second) {
		t.Errorf("took %s", time.Since(start))
	}
	if len(s.List()) != 0 || len(s.Progress()) != 0 {
		t.Error("something is left")
	}
}

// Row I-16: an image that claims the layers of another.
func TestPoisonedDiffID(t *testing.T) {
	reg := regtest.New(t)
	s := openStore(t, testConfig(t))
	victim := regtest.Gzip(regtest.Tar(regtest.File("bin/sh", "good", 0o755)))
	evil := regtest.Gzip(regtest.Tar(regtest.File("bin/sh", "evil", 0o755)))
	lying := regtest.Layer{Plain: victim.Plain, Packed: evil.Packed, Type: evil.Type} // says it is the victim's
	reg.Build("evil", "before", nil, lying)
	failPull(t, s, reg.Host()+"/evil:before", errs.FailedPrecondition, "diff ID")
	waitEmpty(t, s)
	reg.Build("good", "v1", nil, victim)
	id := mustPull(t, s, reg.Host()+"/good:v1")
	reg.Build("evil", "after", func(i *ocispec.Image) { i.Author = "another image" }, lying)
	failPull(t, s, reg.Host()+"/evil:after", errs.FailedPrecondition, "diff ID")
	dirs, err := s.Layers(t.Context(), id, "c")
	if err != nil {
		t.Fatal(err)
	}
	if data, _ := os.ReadFile(filepath.Join(dirs[0], "bin/sh")); string(data) != "good" {
		t.Errorf("%q", data)
	}
	// The same content packed in another way is checked, and shared.
	reg.Build("good", "zstd", func(i *ocispec.Image) { i.Author = "x" }, regtest.Zstd(victim.Plain))
	id2 := mustPull(t, s, reg.Host()+"/good:zstd")
	dirs2, err := s.Layers(t.Context(), id2, "c2")
	if err != nil || !slices.Equal(dirs, dirs2) {
		t.Error(dirs, dirs2, err)
	}
	// Counts that do not fit.
	img := reg.Build("app", "", nil, victim)
	img.Doc.Layers = append(img.Doc.Layers, img.Doc.Layers[0])
	reg.PutManifest("app", "more", img.Doc.MediaType, regtest.JSON(img.Doc))
	failPull(t, s, reg.Host()+"/app:more", errs.FailedPrecondition, "2 layers, the config has 1")
	img.Doc.Layers = []ocispec.Descriptor{}
	reg.PutManifest("app", "none", img.Doc.MediaType, regtest.JSON(img.Doc))
	failPull(t, s, reg.Host()+"/app:none", errs.FailedPrecondition, "0 layers")
}

func TestSharedLayersAndRepeat(t *testing.T) {
	reg := regtest.New(t)
	s := openStore(t, testConfig(t))
	base := regtest.Gzip(simple("base"))
	reg.Build("a", "v1", nil, base, regtest.Gzip(simple("a")))
	reg.Build("b", "v1", nil, base, regtest.Gzip(simple("b")), base) // the same layer twice, too
	mustPull(t, s, reg.Host()+"/a:v1")
	reg.Requests()
	id := mustPull(t, s, reg.Host()+"/b:v1")
	if n := reg.Count("GET .*/blobs/" + digest.FromBytes(base.Packed).String()); n != 0 {
		t.Error("a layer that is here was transferred")
	}
	dirs, err := s.Layers(t.Context(), id, "c")
	if err != nil || len(dirs) != 2 {
		t.Error(dirs, err)
	}
	reg.Requests()
	mustPull(t, s, reg.Host()+"/b:v1")
	if n := len(reg.Requests()); n != 1 {
		t.Errorf("%d requests for an image that is here", n)
	}
	if err := s.Remove(t.Context(), reg.Host()+"/a:v1"); err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(filepath.Join(dirs[0], "base")); err != nil {
		t.Error(data, err)
	}
	if err := errors.Join(s.Remove(t.Context(), id), s.ReleaseOwner(t.Context(), "c")); err != nil {
		t.Fatal(err)
	}
	waitEmpty(t, s)
}

func TestAlwaysAsks(t *testing.T) {
	reg := regtest.New(t)
	reg.Build("private", "v1", nil, regtest.Gzip(simple("a")))
	hook := func(w http.ResponseWriter, r *http.Request) bool {
		if u, p, _ := r.BasicAuth(); u == "joe" && p == "right" {
			return false
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	}
	reg.SetHook(hook)
	s := openStore(t, testConfig(t))
	ref := reg.Host() + "/private:v1"
	good := &Auth{Auth: base64.StdEncoding.EncodeToString([]byte("joe:right"))}
	if _, err := s.Pull(t.Context(), ref, good); err != nil {
		t.Fatal(err)
	}
	for _, a := range []*Auth{nil, {Username: "joe", Password: "wrong"}} {
		if _, err := s.Pull(t.Context(), ref, a); errs.Of(err) != errs.FailedPrecondition || !strings.Contains(err.Error(), "access denied") {
			t.Errorf("an image that is here was given without the right password: %v", err)
		}
	}
	reg.Requests()
	if _, err := s.Pull(t.Context(), ref, good); err != nil || reg.Count("GET") != 0 {
		t.Error(err)
	}
}

func TestTagMoves(t *testing.T) {
	reg := regtest.New(t)
	cfg := testConfig(t)
	s := openStore(t, cfg)
	ref := reg.Host() + "/app:v1"
	one := reg.Build("app", "v1", func(i *ocispec.Image) { i.Author = "1" }, regtest.Gzip(simple("1")))
	mustPull(t, s, ref)
	two := reg.Build("app", "v1", func(i *ocispec.Image) { i.Author = "2" }, regtest.Gzip(simple("2")))
	mustPull(t, s, ref)
	check := func(s *Store) {
		t.Helper()
		if i, err := s.Resolve(ref); err != nil || i.ID != two.ID.String() {
			t.Error(i, err)
		}
		old, err := s.Resolve(one.ID.String())
		if err != nil || len(old.RepoTags) != 0 || !slices.Equal(old.RepoDigests, []string{reg.Host() + "/app@" + one.Manifest.Digest.String()}) {
			t.Errorf("%+v %v", old, err)
		}
		if len(s.List()) != 2 {
			t.Error(len(s.List()))
		}
	}
	check(s)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	// As a crash between the two records would leave it: both have the name.
	path := filepath.Join(cfg.Root, "images", recordFile(one.ID))
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	rec, err := decodeRecord(data)
	if err != nil {
		t.Fatal(err)
	}
	rec.Tags = []tag{{ref, 1}}
	if data, err = rec.encode(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	s = openStore(t, cfg)
	check(s)
	// And back, which an image that is here gets by asking only.
	reg.PutManifestAs("app", "v1", one.Manifest.MediaType, regtest.JSON(one.Doc))
	reg.Requests()
	if id := mustPull(t, s, ref); id != one.ID.String() || reg.Count("GET") != 0 {
		t.Error(id)
	}
	if i, err := s.Resolve(ref); err != nil || i.ID != one.ID.String() {
		t.Error(err)
	}
	// A second tag; removing by one name removes all.
	reg.PutManifestAs("app", "v2", one.Manifest.MediaType, regtest.JSON(one.Doc))
	mustPull(t, s, reg.Host()+"/app:v2")
	if i, _ := s.Resolve(ref); len(i.RepoTags) != 2 {
		t.Error(i.RepoTags)
	}
	if err := s.Remove(t.Context(), reg.Host()+"/app:v2"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Resolve(ref); !errs.Is(err, errs.NotFound) {
		t.Error(err)
	}
}

func TestOnlyTheNameAskedFor(t *testing.T) {
	reg := regtest.New(t)
	s := openStore(t, testConfig(t))
	img := reg.Build("a/b", "", nil, regtest.Gzip(simple("a")))
	img.Doc.Annotations = map[string]string{ocispec.AnnotationRefName: "docker.io/library/nginx:latest", "io.containerd.image.name": "docker.io/library/nginx:latest"}
	reg.PutManifest("a/b", "v1", img.Doc.MediaType, regtest.JSON(img.Doc))
	mustPull(t, s, reg.Host()+"/a/b:v1")
	if i := s.List()[0]; !slices.Equal(i.RepoTags, []string{reg.Host() + "/a/b:v1"}) || len(i.RepoDigests) != 1 {
		t.Errorf("%+v", i)
	}
}

func TestReferences(t *testing.T) {
	s := openStore(t, testConfig(t))
	for _, ref := range []string{"", "../../x:latest", "host/..%2f", "user:pw@host/img", strings.Repeat("a", 5000), "a:b\n", "a b", "A/B", "x:y@sha256:short",
		"host/\u0430pp", "/abs", "a//b", "a:", "@sha256:" + strings.Repeat("a", 64), strings.Repeat("a", 64), "sha256:" + strings.Repeat("a", 64) + "/x",
		"x@md5:" + strings.Repeat("a", 32), "x@sha384:" + strings.Repeat("a", 96), "\x00"} {
		if _, err := s.Pull(t.Context(), ref, nil); errs.Of(err) != errs.InvalidArgument {
			t.Errorf("pull %.40q: %v", ref, err)
		}
		if _, err := s.Resolve(ref); err == nil {
			t.Errorf("resolve %.40q", ref)
		}
	}
	for in, want := range map[string]string{
		"nginx": "docker.io/library/nginx:latest", "foo/bar:1": "docker.io/foo/bar:1", "localhost:5000/x": "localhost:5000/x:latest",
		"index.docker.io/library/x": "docker.io/library/x:latest", "[::1]:5000/a": "[::1]:5000/a:latest",
		"x:y@sha256:" + strings.Repeat("a", 64): "docker.io/library/x:y@sha256:" + strings.Repeat("a", 64),
	} {
		if n, err := normalize(in); err != nil || n.String() != want {
			t.Errorf("%s: %v %v", in, n, err)
		}
	}
}

func TestBombLeavesNothing(t *testing.T) {
	reg := regtest.New(t)
	cfg := testConfig(t)
	cfg.Limits = unpack.Limits{MaxBytes: 1 << 20}
	s := openStore(t, cfg)
	reg.Build("app", "v1", nil, regtest.Gzip(simple("fine")), regtest.Gzip(regtest.Tar(regtest.File("f", strings.Repeat("\x00", 4<<20), 0o644))))
	failPull(t, s, reg.Host()+"/app:v1", errs.ResourceExhausted)
	waitEmpty(t, s)
	reg.Build("app", "v2", nil, regtest.Gzip(simple("fine")))
	mustPull(t, s, reg.Host()+"/app:v2")
}

// Registries that never send anything must not keep the others from being used.
func TestStalledPullsStarveNobody(t *testing.T) {
	reg, tarpit := regtest.New(t), regtest.New(t)
	cfg := testConfig(t)
	cfg.MaxTransfers = 2
	cfg.Registry.ProgressTimeout, cfg.Registry.HeaderTimeout = time.Minute, time.Minute
	s := openStore(t, cfg)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	var stuck atomic.Int32
	tarpit.SetHook(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.URL.Path, "/blobs/") || r.Header.Get("Range") == "" && strings.HasSuffix(r.URL.Path, "config") {
			return false
		}
		w.Header().Set("Content-Length", "1000")
		if r.ContentLength == 0 && isLayer(r.URL.Path) {
			w.WriteHeader(http.StatusOK)
			w.(http.Flusher).Flush()
			stuck.Add(1)
			<-r.Context().Done()
			return true
		}
		return false
	})
	for i := range 20 {
		l := regtest.Uncompressed(simple(fmt.Sprint("f", i)))
		l.Packed = l.Packed[:1000:1000] // its size is 1000
		img := tarpit.Build("app", fmt.Sprint("v", i), func(c *ocispec.Image) { c.Author = fmt.Sprint(i) }, l)
		layersOf.Store(img.Doc.Layers[0].Digest.String(), true)
		wg.Go(func() {
			if _, err := s.Pull(ctx, tarpit.Host()+"/app:"+fmt.Sprint("v", i), nil); err == nil {
				t.Error("pulled from a tarpit")
			}
		})
	}
	waitFor(t, func() bool { return stuck.Load() >= 2 })
	reg.Build("good", "v1", nil, regtest.Gzip(simple("a")), regtest.Gzip(simple("b")), regtest.Gzip(simple("c")))
	start := time.Now()
	mustPull(t, s, reg.Host()+"/good:v1")
	if e := time.Since(start); e > 5*time.Second {
		t.Errorf("a good pull beside %d stalled ones took %s", stuck.Load(), e)
	}
	start = time.Now()
	cancel()
	wg.Wait()
	if time.Since(start) > testhost.Limit(time.Second) {
		t.Errorf("20 pulls took %s to cancel", time.Since(start))
	}
}

var layersOf sync.Map

func isLayer(path string) bool {
	_, ok := layersOf.Load(path[strings.LastIndex(path, "/")+1:])
	return ok
}

func TestPullTimeout(t *testing.T) {
	reg := regtest.New(t)
	reg.Build("app", "v1", nil)
	reg.SetHook(func(_ http.ResponseWriter, r *http.Request) bool { <-r.Context().Done(); return true })
	cfg := testConfig(t)
	cfg.PullTimeout = 200 * time.Millisecond
	failPull(t, openStore(t, cfg), reg.Host()+"/app:v1", errs.DeadlineExceeded, "not done in")
}

func TestUnreachable(t *testing.T) {
	s := openStore(t, testConfig(t))
	_, err := s.Pull(t.Context(), "127.0.0.1:1/app:v1", nil)
	if errs.Of(err) != errs.Unavailable || !strings.HasPrefix(err.Error(), "RegistryUnavailable") {
		t.Error(err)
	}
	// Also when it breaks off in a layer.
	reg := regtest.New(t)
	img := reg.Build("app", "v1", nil, regtest.Gzip(simple("a")))
	reg.SetHook(func(w http.ResponseWriter, r *http.Request) bool {
		if strings.HasSuffix(r.URL.Path, img.Doc.Layers[0].Digest.String()) {
			w.WriteHeader(http.StatusBadGateway)
			return true
		}
		return false
	})
	_, err = s.Pull(t.Context(), reg.Host()+"/app:v1", nil)
	if errs.Of(err) != errs.Unavailable || !strings.HasPrefix(err.Error(), "RegistryUnavailable") || !strings.Contains(err.Error(), "502") {
		t.Error(err)
	}
}

func TestCloseEndsPulls(t *testing.T) {
	reg := regtest.New(t)
	reg.Build("app", "v1", nil)
	in := make(chan struct{}, 10)
	reg.SetHook(func(_ http.ResponseWriter, r *http.Request) bool { in <- struct{}{}; <-r.Context().Done(); return true })
	needRoot(t)
	s, err := Open(t.Context(), testConfig(t))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { _, err := s.Pull(context.Background(), reg.Host()+"/app:v1", nil); done <- err }()
	<-in
	start := time.Now()
	if err := s.Close(); err != nil || time.Since(start) > testhost.Limit(time.Second) {
		t.Error(err, time.Since(start))
	}
	if err := <-done; errs.Of(err) != errs.Unavailable {
		t.Error(err)
	}
	if _, err := s.Pull(t.Context(), "x", nil); errs.Of(err) != errs.Unavailable {
		t.Error(err)
	}
	if _, err := s.Load(t.Context(), io.LimitReader(nil, 0), LoadOptions{}); err == nil {
		t.Error("loaded into a closed store")
	}
}

// Everything at once, for the race detector. Row I-07: images that share a
// layer are unpacked, used and removed in parallel.
func TestConcurrentUse(t *testing.T) {
	reg := regtest.New(t)
	base := regtest.Gzip(simple("base"))
	for i := range 4 {
		reg.Build("app", fmt.Sprint("v", i), func(c *ocispec.Image) { c.Author = fmt.Sprint(i) }, base, regtest.Gzip(simple(fmt.Sprint(i))))
	}
	s := openStore(t, testConfig(t))
	var wg sync.WaitGroup
	stop := time.Now().Add(3 * time.Second)
	for w := range 4 {
		wg.Go(func() {
			for n := 0; time.Now().Before(stop); n++ {
				ref := fmt.Sprintf("%s/app:v%d", reg.Host(), (n+w)%4)
				owner := fmt.Sprintf("c%d-%d", w, n)
				id, err := s.Pull(t.Context(), ref, nil)
				if err != nil {
					t.Error(err)
					return
				}
				dirs, err := s.Layers(t.Context(), id, owner)
				if err == nil {
					if err := s.Remove(t.Context(), ref); err != nil {
						t.Error(err)
					}
					for _, d := range dirs {
						if _, err := os.Stat(d); err != nil {
							t.Errorf("a held layer is gone: %v", err)
						}
					}
				} else if !errs.Is(err, errs.NotFound) {
					t.Error(err)
				}
				if err := s.ReleaseOwner(t.Context(), owner); err != nil {
					t.Error(err)
				}
				for _, i := range s.List() {
					_, _ = s.Resolve(i.ID)
				}
				_, _ = s.FsInfo()
				s.Progress()
			}
		})
	}
	wg.Wait()
	for _, i := range s.List() {
		if err := s.Remove(t.Context(), i.ID); err != nil {
			t.Error(err)
		}
	}
	waitEmpty(t, s)
}

// Another implementation of a registry, pushed to by its own API.
func TestAgainstGoContainerregistry(t *testing.T) {
	srv := httptest.NewServer(ggcr.New(ggcr.Logger(log.New(io.Discard, "", 0))))
	defer srv.Close()
	host := strings.TrimPrefix(srv.URL, "http://")
	local := regtest.Make()
	l := regtest.Gzip(simple("a"))
	img := local.Build("x", "", nil, l)
	do := func(method, path, contentType string, body []byte) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), method, srv.URL+path, bytes.NewReader(body))
		must(t, err)
		req.Header.Set("Content-Type", contentType)
		resp, err := http.DefaultClient.Do(req)
		must(t, err)
		_ = resp.Body.Close()
		if resp.StatusCode/100 != 2 {
			t.Fatal(method, path, resp.Status)
		}
	}
	for _, b := range [][]byte{l.Packed, img.Config} {
		do("POST", "/v2/team/app/blobs/uploads/?digest="+digest.FromBytes(b).String(), "application/octet-stream", b)
	}
	do("PUT", "/v2/team/app/manifests/v1", img.Manifest.MediaType, regtest.JSON(img.Doc))
	http.DefaultClient.CloseIdleConnections()
	s := openStore(t, testConfig(t))
	if id := mustPull(t, s, host+"/team/app:v1"); id != img.ID.String() {
		t.Error(id)
	}
	failPull(t, s, host+"/team/app:v2", errs.NotFound, "404")
}

func BenchmarkPull(b *testing.B) {
	reg := regtest.New(b)
	var hdrs []tar.Header
	for i := range 5000 {
		hdrs = append(hdrs, regtest.File(fmt.Sprintf("d%d/f%d", i/50, i), strings.Repeat("x", 3000), 0o644))
	}
	reg.Build("app", "v1", nil, regtest.Gzip(regtest.Tar(hdrs...)), regtest.Gzip(regtest.Tar(regtest.File("big", strings.Repeat("0123456789abcdefghij", 2<<20), 0o644))))
	s := openStore(b, testConfig(b))
	for b.Loop() {
		id := mustPull(b, s, reg.Host()+"/app:v1")
		b.StopTimer()
		must(b, s.Remove(b.Context(), id))
		waitEmpty(b, s)
		b.StartTimer()
	}
}

func BenchmarkPullKnown(b *testing.B) {
	reg := regtest.New(b)
	reg.Build("app", "v1", nil, regtest.Gzip(simple("a")))
	s := openStore(b, testConfig(b))
	mustPull(b, s, reg.Host()+"/app:v1")
	for b.Loop() {
		mustPull(b, s, reg.Host()+"/app:v1")
	}
}

func BenchmarkResolveListLayers(b *testing.B) {
	reg := regtest.New(b)
	s := openStore(b, testConfig(b))
	for i := range 100 {
		reg.Build("app", fmt.Sprint(i), func(c *ocispec.Image) { c.Author = fmt.Sprint(i) }, regtest.Gzip(simple("a")))
		mustPull(b, s, fmt.Sprintf("%s/app:%d", reg.Host(), i))
	}
	id := s.List()[0].ID
	b.Run("Resolve", func(b *testing.B) {
		for b.Loop() {
			_, _ = s.Resolve(reg.Host() + "/app:50")
		}
	})
	b.Run("List100", func(b *testing.B) {
		for b.Loop() {
			s.List()
		}
	})
	b.Run("Layers+Release", func(b *testing.B) {
		for b.Loop() {
			_, err := s.Layers(b.Context(), id, "c")
			must(b, err)
			must(b, s.ReleaseOwner(b.Context(), "c"))
		}
	})
}
