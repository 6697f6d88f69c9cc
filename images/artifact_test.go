package images

import (
	"context"
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/naru-project/naru/images/internal/regtest"
	"github.com/naru-project/naru/images/unpack"
	"github.com/naru-project/naru/internal/errs"
)

// filesOf reads all files of an image's layers, as an overlay of them shows them.
func filesOf(t testing.TB, s *Store, id, owner string) map[string]string {
	t.Helper()
	dirs, err := s.Layers(t.Context(), id, owner)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, d := range dirs {
		err := filepath.WalkDir(d, func(p string, e os.DirEntry, err error) error {
			if err != nil || e.IsDir() {
				return err
			}
			st, err := e.Info()
			if err != nil {
				return err
			}
			if st.Mode() != 0o644 {
				t.Errorf("%s has mode %v", p, st.Mode())
			}
			rel, _ := filepath.Rel(d, p)
			if _, twice := out[rel]; twice {
				t.Errorf("%s is in two layers", rel)
			}
			data, err := os.ReadFile(p)
			out[rel] = string(data)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return out
}

func TestArtifact(t *testing.T) {
	reg := regtest.New(t)
	top, raw := reg.Artifact("ai/model", "v1", regtest.Titled{Title: "weights.bin", Content: "wwww"}, regtest.Titled{Title: "conf/a.json", Content: "{}"}, regtest.Titled{Content: "bare"})
	reg.Artifact("ai/other", "v1", regtest.Titled{Title: "weights.bin", Content: "wwww"}, regtest.Titled{Title: "copy.bin", Content: "wwww"})
	reg.Artifact("ai/empty", "v1")
	cfg := testConfig(t)
	s := openStore(t, cfg)
	ref := reg.Host() + "/ai/model:v1"
	id := mustPull(t, s, ref)
	if id != top.Digest.String() {
		t.Errorf("id %s, want that of the manifest, %s", id, top.Digest)
	}
	want := map[string]string{"weights.bin": "wwww", "conf/a.json": "{}", "sha256-" + digest.FromString("bare").Encoded(): "bare"}
	check := func(s *Store) {
		t.Helper()
		for _, name := range []string{ref, id, id[7:19], reg.Host() + "/ai/model@" + top.Digest.String()} {
			i, err := s.Resolve(name)
			if err != nil || i.ID != id || i.Artifact != "application/vnd.test.model" || string(i.RawConfig) != string(raw) || i.Size < 3*4096 ||
				len(i.Layers) != 3 || i.Layers[0] != digest.FromString("wwww") || !slices.Equal(i.RepoTags, []string{ref}) {
				t.Errorf("resolve %s: %+v %v", name, i, err)
			}
		}
		if got := filesOf(t, s, id, "c1"); len(got) != len(want) || got["weights.bin"] != "wwww" || got["conf/a.json"] != "{}" {
			t.Errorf("files %v, want %v", got, want)
		}
	}
	check(s)
	reg.Requests()
	other := mustPull(t, s, reg.Host()+"/ai/other:v1")
	if n := reg.Count("GET .*/blobs/"); n != 1 {
		t.Errorf("%d blobs were transferred for one new file", n)
	}
	empty := mustPull(t, s, reg.Host()+"/ai/empty:v1")
	if got := filesOf(t, s, empty, "c2"); len(got) != 0 {
		t.Errorf("an artifact without files has %v", got)
	}
	if len(s.List()) != 3 {
		t.Errorf("artifacts with one config are not told apart: %v", s.List())
	}
	reg.Requests()
	if again := mustPull(t, s, ref); again != id || reg.Count("GET") != 0 {
		t.Errorf("pulled again: %s, %d transfers", again, reg.Count("GET"))
	}
	// A restart, then removal while a container holds it.
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = openStore(t, cfg)
	check(s)
	for _, r := range []string{ref, other, empty} {
		if err := s.Remove(t.Context(), r); err != nil {
			t.Fatal(err)
		}
	}
	if got := filesOf(t, s, id, "c1"); got["weights.bin"] != "wwww" {
		t.Errorf("the files of a running container are gone: %v", got)
	}
	if err := s.Sweep(t.Context(), map[string]bool{}); err != nil {
		t.Fatal(err)
	}
	if u, _ := s.FsInfo(); u.Bytes != 0 || u.Inodes != 0 {
		t.Errorf("%+v is left", u)
	}
	waitEmpty(t, s)
}

// TestArtifactOfIndex: an index above the manifest is gone through as for images.
func TestArtifactOfIndex(t *testing.T) {
	reg := regtest.New(t)
	top, _ := reg.Artifact("a", "", regtest.Titled{Title: "f", Content: "x"})
	reg.Index("a", "all", top)
	s := openStore(t, testConfig(t))
	if id := mustPull(t, s, reg.Host()+"/a:all"); id != top.Digest.String() {
		t.Errorf("id %s", id)
	}
}

// TestArtifactRefused: blobs that are not what the manifest says, and names that
// lead elsewhere, leave nothing.
func TestArtifactRefused(t *testing.T) {
	reg := regtest.New(t)
	cfg := testConfig(t)
	cfg.Limits = unpack.Limits{MaxBytes: 1000}
	s := openStore(t, cfg)
	for name, x := range map[string]struct {
		files []regtest.Titled
		lie   string // in place of the first file's content
		class errs.Class
		says  string
	}{
		"other bytes": {[]regtest.Titled{{Title: "f", Content: "true"}}, "lies", errs.FailedPrecondition, "digest"},
		"fewer":       {[]regtest.Titled{{Title: "f", Content: "true fewer"}}, "true", errs.FailedPrecondition, "bytes"},
		"more":        {[]regtest.Titled{{Title: "f", Content: "true more"}}, "true more and more", errs.FailedPrecondition, "bytes"},
		"large":       {[]regtest.Titled{{Title: "f", Content: strings.Repeat("x", 1001)}}, "", errs.ResourceExhausted, "more than 1000"},
		"large in all": {[]regtest.Titled{{Title: "f", Content: strings.Repeat("x", 600)}, {Title: "g", Content: strings.Repeat("y", 600)}}, "",
			errs.ResourceExhausted, "more than 1000"},
		"climbing": {[]regtest.Titled{{Title: "../../canary", Content: "c"}}, "", errs.FailedPrecondition, `"../../canary"`},
		"absolute": {[]regtest.Titled{{Title: "/tmp/canary", Content: "c"}}, "", errs.FailedPrecondition, `"/tmp/canary"`},
		"twice":    {[]regtest.Titled{{Title: "f", Content: "1"}, {Title: "f", Content: "2"}}, "", errs.FailedPrecondition, "two files"},
	} {
		t.Run(name, func(t *testing.T) {
			reg.Artifact("r", "1", x.files...)
			if x.lie != "" {
				reg.PutBlobAs(digest.FromString(x.files[0].Content).String(), []byte(x.lie))
			}
			failPull(t, s, reg.Host()+"/r:1", x.class, x.says)
			if len(s.List()) != 0 {
				t.Errorf("listed: %v", s.List())
			}
			waitEmpty(t, s)
		})
	}
}

// TestArtifactIsNoImage: what is one of the two cannot become the other, by
// whatever bytes.
func TestArtifactIsNoImage(t *testing.T) {
	reg := regtest.New(t)
	top, raw := reg.Artifact("a", "1", regtest.Titled{Title: "f", Content: "x"})
	reg.PutBlob(raw)
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Layers: []ocispec.Descriptor{},
		Config: ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: top.Digest, Size: int64(len(raw))},
	}
	reg.PutManifest("evil", "1", m.MediaType, regtest.JSON(m))
	s := openStore(t, testConfig(t))
	for range 2 { // before and after the real one is there
		failPull(t, s, reg.Host()+"/evil:1", errs.FailedPrecondition, "it is a manifest")
		id := mustPull(t, s, reg.Host()+"/a:1")
		if got := filesOf(t, s, id, "c"); got["f"] != "x" {
			t.Errorf("files %v", got)
		}
	}
}

// TestArtifactDamage: a record that does not fit its manifest is set aside.
func TestArtifactDamage(t *testing.T) {
	for name, change := range map[string][2]string{
		"not an artifact": {`"artifact":true`, `"artifact":false`},
		"another file":    {`"artifact:`, `"artifact:0`},
	} {
		reg := regtest.New(t)
		reg.Artifact("a", "1", regtest.Titled{Title: "f", Content: "x"})
		cfg := testConfig(t)
		s := openStore(t, cfg)
		id := mustPull(t, s, reg.Host()+"/a:1")
		must(t, s.Close())
		path := filepath.Join(cfg.Root, "images", recordFile(digest.Digest(id)))
		data, err := os.ReadFile(path)
		must(t, err)
		var rec record
		rest, err := unseal(data, &rec, recordKeys)
		must(t, err)
		body, err := seal(&rec, rest)
		must(t, err)
		text := string(body)
		if !strings.Contains(text, change[0]) {
			t.Fatalf("no %s in %s", change[0], text)
		}
		body2 := strings.Replace(text, change[0], change[1], 1)
		var e envelope
		must(t, json.Unmarshal([]byte(body2), &e))
		e.Checksum = digest.FromBytes(e.Body)
		must(t, os.WriteFile(path, regtest.JSON(e), 0o600))
		s = openStore(t, cfg)
		if len(s.List()) != 0 {
			t.Errorf("%s: %+v is served", name, s.List()[0])
		}
		if bad, _ := os.ReadDir(filepath.Join(cfg.Root, "quarantine")); len(bad) != 1 {
			t.Errorf("%s: quarantine has %v", name, bad)
		}
	}
}

// TestLoadArtifact: an OCI layout can hold an artifact, too.
func TestLoadArtifact(t *testing.T) {
	reg := regtest.Make()
	top, raw := reg.Artifact("a", "", regtest.Titled{Title: "f", Content: "xyz"})
	top.Annotations = map[string]string{ocispec.AnnotationRefName: "example.test/model:1"}
	idx := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{top}}
	dir := t.TempDir()
	for name, text := range map[string]string{
		"oci-layout": `{"imageLayoutVersion":"1.0.0"}`, "index.json": string(regtest.JSON(idx)),
		blobFile(top.Digest): string(raw), blobFile(digest.FromString("xyz")): "xyz",
	} {
		must(t, os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755))
		must(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644))
	}
	s := openStore(t, testConfig(t))
	refs, err := s.LoadPath(t.Context(), dir, LoadOptions{})
	if err != nil || !slices.Equal(refs, []string{"example.test/model:1"}) {
		t.Fatal(refs, err)
	}
	i, err := s.Resolve("example.test/model:1")
	if err != nil || i.Artifact == "" || i.ID != top.Digest.String() {
		t.Fatal(i, err)
	}
	if got := filesOf(t, s, i.ID, "c"); got["f"] != "xyz" {
		t.Errorf("files %v", got)
	}
}

// TestArtifactCanceled: a pull that its callers give up leaves no half of a file.
func TestArtifactCanceled(t *testing.T) {
	reg := regtest.New(t)
	reg.Artifact("a", "1", regtest.Titled{Title: "f", Content: strings.Repeat("x", 1<<20)})
	s := openStore(t, testConfig(t))
	ctx, cancel := context.WithCancel(t.Context())
	reg.SetHook(func(w http.ResponseWriter, q *http.Request) bool {
		if !strings.Contains(q.URL.Path, "/blobs/") {
			return false
		}
		w.Header().Set("Content-Length", "1048576")
		_, _ = w.Write(make([]byte, 4096))
		w.(http.Flusher).Flush()
		cancel()
		<-q.Context().Done()
		return true
	})
	if _, err := s.Pull(ctx, reg.Host()+"/a:1", nil); !errs.Is(err, errs.Canceled) {
		t.Errorf("got %v", err)
	}
	waitEmpty(t, s)
}
