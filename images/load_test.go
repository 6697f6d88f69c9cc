package images

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/naru-project/naru/images/internal/regtest"
	"github.com/naru-project/naru/internal/errs"
)

func blobFile(d digest.Digest) string { return "blobs/" + d.Algorithm().String() + "/" + d.Encoded() }

// ociFiles are the files of an OCI layout with one image under each name.
func ociFiles(names ...string) (files map[string]string, img regtest.Image) {
	reg := regtest.Make()
	l := regtest.Gzip(simple("a"))
	img = reg.Build("x", "", nil, l)
	files = map[string]string{
		"oci-layout":     `{"imageLayoutVersion":"1.0.0"}`,
		blobFile(img.ID): string(img.Config), blobFile(img.Manifest.Digest): string(regtest.JSON(img.Doc)),
		blobFile(digest.FromBytes(l.Packed)): string(l.Packed),
	}
	idx := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	for _, n := range names {
		d := img.Manifest
		if n != "" {
			d.Annotations = map[string]string{ocispec.AnnotationRefName: n}
		}
		idx.Manifests = append(idx.Manifests, d)
	}
	files["index.json"] = string(regtest.JSON(idx))
	return files, img
}

// dockerFiles are what "docker save" wrote of old: layers are links at times.
func dockerFiles(tags ...string) (list []tar.Header, id string) {
	one, two := simple("one"), simple("two")
	conf := regtest.Config([]digest.Digest{digest.FromBytes(one), digest.FromBytes(two), digest.FromBytes(one)}, nil)
	m := []map[string]any{{"Config": "c.json", "RepoTags": tags, "Layers": []string{"1/layer.tar", "2/layer.tar", "3/layer.tar"}}}
	return []tar.Header{
		regtest.File("c.json", string(conf), 0o644), regtest.File("1/layer.tar", string(one), 0o644),
		regtest.File("2/layer.tar", string(two), 0o644), regtest.Symlink("3/layer.tar", "../1/layer.tar"),
		regtest.File("manifest.json", string(regtest.JSON(m)), 0o644),
	}, digest.FromBytes(conf).String()
}

func tarOf(files map[string]string) []byte {
	var list []tar.Header
	for n, c := range files {
		list = append(list, regtest.File(n, c, 0o644))
	}
	slices.SortFunc(list, func(a, b tar.Header) int { return strings.Compare(a.Name, b.Name) })
	return regtest.Tar(list...)
}

func zip(data []byte) []byte {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	_, _ = z.Write(data)
	_ = z.Close()
	return b.Bytes()
}

func TestLoadForms(t *testing.T) {
	docker, dockerID := dockerFiles("busybox:1", "registry.example/x/y:2")
	dockerTar := regtest.Tar(docker...)
	dockerRefs := []string{"docker.io/library/busybox:1", "registry.example/x/y:2"}
	files, img := ociFiles("registry.example/app:v1", "other/app:v2")
	ociRefs := []string{"registry.example/app:v1", "docker.io/other/app:v2"}
	dir := t.TempDir()
	for n, c := range files {
		must(t, os.MkdirAll(filepath.Join(dir, filepath.Dir(n)), 0o755))
		must(t, os.WriteFile(filepath.Join(dir, n), []byte(c), 0o644))
	}
	put := func(data []byte) string {
		p := filepath.Join(t.TempDir(), "a.tar")
		must(t, os.WriteFile(p, data, 0o644))
		return p
	}
	for name, c := range map[string]struct {
		load func(s *Store) ([]string, error)
		refs []string
		id   string
	}{
		"docker stream": {func(s *Store) ([]string, error) {
			return s.Load(t.Context(), bytes.NewReader(dockerTar), LoadOptions{})
		}, dockerRefs, dockerID},
		"docker gzip stream": {func(s *Store) ([]string, error) {
			return s.Load(t.Context(), bytes.NewReader(zip(dockerTar)), LoadOptions{})
		}, dockerRefs, dockerID},
		"docker file":      {func(s *Store) ([]string, error) { return s.LoadPath(t.Context(), put(dockerTar), LoadOptions{}) }, dockerRefs, dockerID},
		"docker gzip file": {func(s *Store) ([]string, error) { return s.LoadPath(t.Context(), put(zip(dockerTar)), LoadOptions{}) }, dockerRefs, dockerID},
		"oci stream": {func(s *Store) ([]string, error) {
			return s.Load(t.Context(), bytes.NewReader(tarOf(files)), LoadOptions{})
		}, ociRefs, img.ID.String()},
		"oci folder": {func(s *Store) ([]string, error) { return s.LoadPath(t.Context(), dir, LoadOptions{}) }, ociRefs, img.ID.String()},
		"with a name": {func(s *Store) ([]string, error) {
			return s.Load(t.Context(), bytes.NewReader(tarOf(files)), LoadOptions{Name: "mine"})
		}, []string{"docker.io/library/mine:latest"}, img.ID.String()},
	} {
		t.Run(name, func(t *testing.T) {
			s := openStore(t, testConfig(t))
			refs, err := c.load(s)
			if err != nil || !slices.Equal(refs, c.refs) {
				t.Fatal(refs, err)
			}
			for _, r := range refs {
				if i, err := s.Resolve(r); err != nil || i.ID != c.id {
					t.Error(r, err)
				}
			}
			if dirs, err := s.Layers(t.Context(), c.id, "c"); err != nil || len(dirs) == 0 {
				t.Error(dirs, err)
			}
			if strings.HasPrefix(name, "oci") && len(s.List()[0].RepoDigests) != 2 {
				t.Error(s.List()[0].RepoDigests)
			}
		})
	}
}

func TestLoadRefused(t *testing.T) {
	s := openStore(t, testConfig(t))
	docker, _ := dockerFiles("busybox:1")
	change := func(f func(map[string]string)) []byte {
		files, _ := ociFiles("a/b:c")
		f(files)
		return tarOf(files)
	}
	_, img := ociFiles("a/b:c")
	layerBlob := blobFile(img.Doc.Layers[0].Digest)
	manifestWith := func(item string) []byte {
		return regtest.Tar(append(docker[:4:4], regtest.File("manifest.json", item, 0o644))...)
	}
	for name, data := range map[string][]byte{
		"nothing": nil, "no archive": []byte(strings.Repeat("x", 2048)), "no image": regtest.Tar(regtest.File("a", "b", 0o644)),
		"twice":              regtest.Tar(append(docker[:5:5], docker[0])...),
		"manifest is a link": regtest.Tar(append(docker[:4:4], regtest.Symlink("manifest.json", "c.json"))...),
		"config is a link":   regtest.Tar(append([]tar.Header{regtest.Symlink("c.json", "/etc/passwd")}, docker[1:]...)...),
		"config elsewhere":   manifestWith(`[{"Config":"../../../../etc/passwd","RepoTags":["a:b"],"Layers":[]}]`),
		"layer elsewhere":    manifestWith(`[{"Config":"c.json","RepoTags":["a:b"],"Layers":["../../etc/passwd","/etc/passwd","x"]}]`),
		"layers missing":     manifestWith(`[{"Config":"c.json","RepoTags":["a:b"],"Layers":["1/layer.tar"]}]`),
		"bad name":           manifestWith(`[{"Config":"c.json","RepoTags":["../x"],"Layers":["1/layer.tar","2/layer.tar","3/layer.tar"]}]`),
		"no name":            manifestWith(`[{"Config":"c.json","RepoTags":null,"Layers":["1/layer.tar","2/layer.tar","3/layer.tar"]}]`),
		"case variant":       manifestWith(`[{"config":"c.json"}]`),
		"no docker image":    manifestWith(`[]`),
		"huge manifest":      manifestWith(strings.Repeat(" ", 5<<20)),
		"wrong layer":        regtest.Tar(append([]tar.Header{docker[0], regtest.File("1/layer.tar", string(simple("evil")), 0o644)}, docker[2:]...)...),
		"oci bare tag":       func() []byte { f, _ := ociFiles("v1"); return tarOf(f) }(),
		"oci no name":        func() []byte { f, _ := ociFiles(""); return tarOf(f) }(),
		"oci version":        change(func(m map[string]string) { m["oci-layout"] = `{"imageLayoutVersion":"9"}` }),
		"oci index twice": change(func(m map[string]string) {
			m["index.json"] = strings.Replace(m["index.json"], "{", `{"manifests":[],`, 1)
		}),
		"oci manifest changed": change(func(m map[string]string) { m[blobFile(img.Manifest.Digest)] += " " }),
		"oci config missing":   change(func(m map[string]string) { delete(m, blobFile(img.ID)) }),
		"oci layer missing":    change(func(m map[string]string) { delete(m, layerBlob) }),
		"oci layer changed":    change(func(m map[string]string) { m[layerBlob] = strings.Repeat("z", len(m[layerBlob])) }),
		"oci digest is a path": change(func(m map[string]string) {
			m["index.json"] = strings.ReplaceAll(m["index.json"], img.Manifest.Digest.String(), "sha256:../../../../etc/passwd")
		}),
	} {
		t.Run(name, func(t *testing.T) {
			refs, err := s.Load(t.Context(), bytes.NewReader(data), LoadOptions{})
			if err == nil || len(refs) != 0 {
				t.Fatalf("loaded %v", refs)
			}
			if errs.Of(err) == errs.Internal {
				t.Errorf("no class: %v", err)
			}
		})
	}
	if len(s.List()) != 0 {
		t.Error(s.List())
	}
	waitEmpty(t, s)
	two := regtest.Tar(append(docker[:4:4], regtest.File("manifest.json", `[{"Config":"c.json","RepoTags":["a:b"],"Layers":["1/layer.tar","2/layer.tar","3/layer.tar"]},`+
		`{"Config":"c.json","RepoTags":["c:d"],"Layers":["1/layer.tar","2/layer.tar","3/layer.tar"]}]`, 0o644))...)
	for _, name := range []string{"x", "../x", "x@sha256:" + strings.Repeat("a", 64)} {
		if _, err := s.Load(t.Context(), bytes.NewReader(two), LoadOptions{Name: name}); errs.Of(err) != errs.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	if refs, err := s.Load(t.Context(), bytes.NewReader(two), LoadOptions{}); err != nil || len(refs) != 2 || len(s.List()) != 1 {
		t.Error(refs, err)
	}
	// A folder whose files are links out of it.
	files, _ := ociFiles("a/b:c")
	dir := t.TempDir()
	out := filepath.Join(t.TempDir(), "index.json")
	must(t, os.WriteFile(out, []byte(files["index.json"]), 0o644))
	must(t, os.WriteFile(filepath.Join(dir, "oci-layout"), []byte(files["oci-layout"]), 0o644))
	must(t, os.Symlink(out, filepath.Join(dir, "index.json")))
	if _, err := s.LoadPath(t.Context(), dir, LoadOptions{}); errs.Of(err) != errs.InvalidArgument {
		t.Error(err)
	}
	for _, p := range []string{"/nonexistent", "/dev/null"} {
		if _, err := s.LoadPath(t.Context(), p, LoadOptions{}); errs.Of(err) != errs.InvalidArgument {
			t.Error(p, err)
		}
	}
}

func FuzzLoad(f *testing.F) {
	if os.Geteuid() != 0 {
		f.Skip("needs root")
	}
	docker, _ := dockerFiles("a:b")
	f.Add(regtest.Tar(docker...))
	files, _ := ociFiles("a/b:c")
	f.Add(tarOf(files))
	cfg := testConfig(f)
	if d, err := os.MkdirTemp("/dev/shm", "naru-test"); err == nil {
		f.Cleanup(func() { _ = os.RemoveAll(d) })
		cfg.Root = filepath.Join(d, "store")
	}
	s := openStore(f, cfg)
	f.Fuzz(func(t *testing.T, data []byte) {
		refs, err := s.Load(t.Context(), bytes.NewReader(data), LoadOptions{})
		if err != nil && errs.Of(err) == errs.Internal {
			t.Errorf("no class: %v", err)
		}
		for _, r := range refs {
			if _, err := s.Resolve(r); err != nil {
				t.Errorf("%s: %v", r, err)
			}
			_ = s.Remove(t.Context(), r)
		}
	})
}
