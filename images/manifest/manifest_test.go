package manifest

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/naru-project/naru/internal/errs"
)

var (
	hex    = strings.Repeat("ab", 32)
	conf   = fmt.Sprintf(`"config":{"mediaType":%q,"digest":"sha256:%s","size":10}`, ocispec.MediaTypeImageConfig, hex)
	layer  = fmt.Sprintf(`{"mediaType":%q,"digest":"sha256:%s","size":10}`, ocispec.MediaTypeImageLayerGzip, hex)
	sub    = fmt.Sprintf(`{"mediaType":%q,"digest":"sha256:%s","size":10}`, ocispec.MediaTypeImageManifest, hex)
	ociM   = ocispec.MediaTypeImageManifest
	ociI   = ocispec.MediaTypeImageIndex
	goodM  = `{"schemaVersion":2,` + conf + `,"layers":[` + layer + `]}`
	goodI  = `{"schemaVersion":2,"manifests":[` + sub + `]}`
	typedM = `{"schemaVersion":2,"mediaType":"` + ociM + `",` + conf + `,"layers":[]}`
)

func TestParse(t *testing.T) {
	desc := func(d string) string {
		return `{"schemaVersion":2,` + conf + `,"layers":[{"mediaType":"` + ocispec.MediaTypeImageLayer + `","size":1,"digest":` + string(must(json.Marshal(d))) + `}]}`
	}
	layerType := func(mt string) string {
		return `{"schemaVersion":2,` + conf + `,"layers":[{"mediaType":"` + mt + `","size":1,"digest":"sha256:` + hex + `"}]}`
	}
	cases := []struct {
		name, doc, sent string
		ok              bool
	}{
		{"manifest", goodM, ociM, true},
		{"manifest with charset", goodM, ociM + "; charset=utf-8", true},
		{"manifest sent as JSON", goodM, "application/json", true},
		{"manifest sent as nothing", goodM, "", true},
		{"typed manifest", typedM, ociM, true},
		{"index", goodI, ociI, true},
		{"index sent as text", goodI, "text/plain", true},
		{"unknown field", `{"schemaVersion":2,"new":{"a":1,"A":2},` + conf + `}`, ociM, true},
		{"annotations that differ by case", `{"schemaVersion":2,"annotations":{"a":"1","A":"2"},` + conf + `}`, ociM, true},

		{"both", `{"schemaVersion":2,` + conf + `,"layers":[],"manifests":[]}`, ociM, false},
		{"index with layers", `{"schemaVersion":2,"layers":[],"manifests":[]}`, ociI, false},
		{"index with config", `{"schemaVersion":2,` + conf + `,"manifests":[]}`, ociI, false},
		{"neither", `{"schemaVersion":2}`, ociM, false},
		{"layers only", `{"schemaVersion":2,"layers":[]}`, ociM, false},
		{"manifest sent as index", goodM, ociI, false},
		{"index sent as manifest", goodI, ociM, false},
		{"type disagrees", typedM, DockerManifest, false},
		{"field says index", strings.Replace(typedM, ociM, ociI, 1), "", false},
		{"field unknown", strings.Replace(typedM, ociM, "application/x", 1), "", false},
		{"schema 1", `{"schemaVersion":1,"fsLayers":[],"history":[],"signatures":[]}`, "", false},
		{"schema 1 sent", goodM, "application/vnd.docker.distribution.manifest.v1+prettyjws", false},
		{"schema 2 with fsLayers", `{"schemaVersion":2,"fsLayers":[],` + conf + `}`, "", false},
		{"schema 3", `{"schemaVersion":3,` + conf + `}`, "", false},
		{"no schema", `{` + conf + `}`, "", false},
		{"artifact", `{"schemaVersion":2,"blobs":[]}`, "", false},
		{"artifact config", strings.Replace(goodM, ocispec.MediaTypeImageConfig, "application/vnd.cncf.helm.config.v1+json", 1), ociM, true},
		{"config of no type", strings.Replace(goodM, ocispec.MediaTypeImageConfig, "", 1), ociM, false},
		{"artifact with its config as layer", strings.Replace(goodM, ocispec.MediaTypeImageConfig, ocispec.MediaTypeEmptyJSON, 1), DockerManifest, true},

		{"duplicate key", `{"schemaVersion":2,"layers":[],"layers":[` + layer + `],` + conf + `}`, ociM, false},
		{"duplicate by escape", `{"schemaVersion":2,"layers":[],"\u006cayers":[` + layer + `],` + conf + `}`, ociM, false},
		{"case variant", `{"schemaVersion":2,"Layers":[` + layer + `],` + conf + `}`, ociM, false},
		{"case variant below", strings.Replace(goodM, `"digest"`, `"Digest"`, 1), ociM, false},
		{"Kelvin sign", `{"schemaVersion":2,"` + "\u212a" + `x":1,` + conf + `}`, ociM, true}, // folds to no field
		{"long s", `{"schemaVersion":2,"layer` + "\u017f" + `":[],` + conf + `}`, ociM, false},
		{"duplicate in annotations", `{"schemaVersion":2,"annotations":{"a":"1","a":"2"},` + conf + `}`, ociM, false},
		{"duplicate in unknown", `{"schemaVersion":2,"x":{"a":1,"a":2},` + conf + `}`, ociM, false},
		{"trailing document", goodM + goodI, ociM, false},
		{"trailing text", goodM + "x", ociM, false},
		{"BOM", "\xef\xbb\xbf" + goodM, ociM, false},
		{"UTF-16", "\xff\xfe{\x00}\x00", ociM, false},
		{"not UTF-8", strings.Replace(goodM, "{", "{\"\xff\":1,", 1), ociM, false},
		{"empty", "", ociM, false},
		{"array", "[]", ociM, false},
		{"null", "null", ociM, false},
		{"deep", `{"x":` + strings.Repeat("[", 100000) + strings.Repeat("]", 100000) + `}`, ociM, false},
		{"open", `{"schemaVersion":2,`, ociM, false},

		{"digest with a path", desc("sha256:../../../../etc/passwd"), ociM, false},
		{"digest in capitals", desc("sha256:" + strings.ToUpper(hex)), ociM, false},
		{"digest short", desc("sha256:" + hex[1:]), ociM, false},
		{"digest long", desc("sha256:" + hex + "a"), ociM, false},
		{"digest of dots", desc("sha256:" + strings.Repeat(".", 64)), ociM, false},
		{"digest escaped", desc("sha256:%2e%2e" + hex[6:]), ociM, false},
		{"digest with newline", desc("sha256:" + hex + "\n"), ociM, false},
		{"digest md5", desc("md5:" + hex[:32]), ociM, false},
		{"digest sha384", desc("sha384:" + hex + hex[:32]), ociM, false},
		{"digest sha512", desc("sha512:" + hex + hex), ociM, true},
		{"digest empty", desc(""), ociM, false},
		{"config digest", strings.Replace(goodM, "sha256:"+hex, "sha256:../x", 1), ociM, false},
		{"index digest", strings.Replace(goodI, "sha256:"+hex, "sha256:../x", 1), ociI, false},
		{"negative size", strings.Replace(goodM, `"size":10`, `"size":-1`, 1), ociM, false},
		{"size no number", strings.Replace(goodM, `"size":10`, `"size":"x"`, 1), ociM, false},
		{"size overflow", strings.Replace(goodM, `"size":10`, `"size":1e30`, 1), ociM, false},
		{"config too big", strings.Replace(goodM, `"size":10`, `"size":9999999999`, 1), ociM, false},

		{"layer docker", layerType(DockerLayerGzip), ociM, true},
		{"layer foreign", layerType("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"), ociM, false},
		{"layer nondistributable", layerType("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"), ociM, false},
		{"layer erofs", layerType("application/vnd.erofs.layer.v1"), ociM, false},
		{"layer encrypted", layerType("application/vnd.oci.image.layer.v1.tar+gzip+encrypted"), ociM, false},
		{"layer octets", layerType("application/octet-stream"), ociM, false},
		{"layer of no type", layerType(""), ociM, false},
		{"layers 500", layersN(500), ociM, true},
		{"layers 501", layersN(501), ociM, false},
		{"too large", goodM + strings.Repeat(" ", MaxManifestSize), ociM, false},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			doc, err := Parse([]byte(c.doc), c.sent)
			if (err == nil) != c.ok {
				t.Fatalf("%v", err)
			}
			if err != nil && errs.Of(err) == errs.Internal {
				t.Errorf("no class: %v", err)
			}
			if err == nil && (doc.Manifest == nil) == (doc.Index == nil) {
				t.Errorf("%+v", doc)
			}
		})
	}
}

func must(b []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return b
}

func layersN(n int) string {
	return `{"schemaVersion":2,` + conf + `,"layers":[` + strings.TrimSuffix(strings.Repeat(layer+",", n), ",") + `]}`
}

func TestParseConfig(t *testing.T) {
	cases := []struct {
		name, doc string
		ok        bool
	}{
		{"empty", `{}`, true},
		{"usual", `{"os":"linux","architecture":"amd64","config":{"Env":["A=b"]},"container_config":{"Env":["x"]},"docker_version":"1","rootfs":{"type":"layers","diff_ids":["sha256:` + hex + `"]},"history":[{}]}`, true},
		{"bad date", `{"created":"yesterday"}`, true},
		{"bad date type", `{"created":12}`, true},
		{"entrypoint null", `{"config":{"Entrypoint":null}}`, true},
		{"entrypoint string", `{"config":{"Entrypoint":"sh"}}`, false},
		{"entrypoint number", `{"config":{"Entrypoint":1}}`, false},
		{"NUL", `{"config":{"Env":["A=\u0000"]}}`, false},
		{"NUL in user", `{"config":{"User":"\u0000"}}`, false},
		{"case variant", `{"config":{"env":["A=b"]}}`, false},
		{"two configs", `{"config":{},"Config":{}}`, false},
		{"rootfs type", `{"rootfs":{"type":"other"}}`, false},
		{"diff ID", `{"rootfs":{"diff_ids":["sha256:../"]}}`, false},
		{"a manifest", goodM, false},
		{"schema version", `{"schemaVersion":null}`, false},
		{"too large", `{"config":{"User":"` + strings.Repeat("x", MaxConfigSize) + `"}}`, false},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			if _, err := ParseConfig([]byte(c.doc)); (err == nil) != c.ok || err != nil && errs.Of(err) == errs.Internal {
				t.Fatal(err)
			}
		})
	}
	c, err := ParseConfig([]byte(`{"config":{"Env":["A=b","noequals","=x","C="]}}`))
	if err != nil || strings.Join(c.Config.Env, "|") != "A=b|C=" {
		t.Error(c, err)
	}
}

func TestSelect(t *testing.T) {
	m := platforms.Only(platforms.Platform{OS: "linux", Architecture: "arm", Variant: "v7"})
	d := func(name, os, arch, variant string) ocispec.Descriptor {
		x := ocispec.Descriptor{MediaType: ociM, Digest: digest.FromString(name), Size: 1}
		if os != "" {
			x.Platform = &ocispec.Platform{OS: os, Architecture: arch, Variant: variant}
		}
		return x
	}
	v6, v7, none := d("v6", "linux", "arm", "v6"), d("v7", "linux", "arm", "v7"), d("none", "", "", "")
	attest := d("att", "unknown", "unknown", "")
	other := d("win", "windows", "amd64", "")
	layerDesc := d("layer", "linux", "arm", "v7")
	layerDesc.MediaType = ocispec.MediaTypeImageLayer
	for _, c := range []struct {
		list []ocispec.Descriptor
		want string
	}{
		{[]ocispec.Descriptor{attest, other, v6, v7, none}, "v7"},
		{[]ocispec.Descriptor{v6, other}, "v6"},
		{[]ocispec.Descriptor{attest, none}, "none"},
		{[]ocispec.Descriptor{layerDesc, other}, ""},
		{nil, ""},
	} {
		got, err := Select(c.list, m)
		if c.want == "" && !errs.Is(err, errs.NotFound) || c.want != "" && got.Digest != digest.FromString(c.want) {
			t.Errorf("%s: %v %v", c.want, got, err)
		}
	}
	cfg := &Config{Platform: ocispec.Platform{OS: "linux", Architecture: "s390x"}}
	if err := cfg.CheckPlatform(m); errs.Of(err) != errs.FailedPrecondition {
		t.Error(err)
	}
	if err := (&Config{}).CheckPlatform(platforms.Only(platforms.DefaultSpec())); err != nil {
		t.Error(runtime.GOARCH, err)
	}
}

// What Parse accepts has one meaning: read again after a round through the
// generic decoder it is the same.
func FuzzParse(f *testing.F) {
	for _, s := range []string{goodM, goodI, typedM, artifactM("a", "b/c"), artifactM("..", "/a"), `{"schemaVersion":2,"manifests":null,` + conf + `}`} {
		f.Add([]byte(s), ociM)
		f.Add([]byte(s), "")
	}
	f.Fuzz(func(t *testing.T, data []byte, sent string) {
		doc, err := Parse(data, sent)
		if err != nil {
			if errs.Of(err) == errs.Internal {
				t.Errorf("no class: %v", err)
			}
			return
		}
		var generic map[string]any
		if err := json.Unmarshal(data, &generic); err != nil {
			t.Fatalf("accepted what is no JSON: %v", err)
		}
		_, hasManifests := generic["manifests"].([]any)
		_, hasConfig := generic["config"].(map[string]any)
		if hasManifests == hasConfig || hasManifests != (doc.Index != nil) {
			t.Errorf("two things at once: %q", data)
		}
		if doc.Artifact != nil {
			seen := map[string]bool{}
			for _, f := range doc.Artifact.Files {
				if !filepath.IsLocal(f.Name) || filepath.Clean(f.Name) != f.Name || f.Name == "." || seen[f.Name] {
					t.Errorf("file name %q", f.Name)
				}
				seen[f.Name] = true
			}
			if _, err := ParseConfig(data); err == nil {
				t.Error("it is an image config, too")
			}
		}
		if doc.Manifest != nil {
			n, _ := generic["layers"].([]any)
			if len(n) != len(doc.Manifest.Layers) {
				t.Errorf("%d layers read, %d there", len(doc.Manifest.Layers), len(n))
			}
		}
	})
}

func FuzzConfig(f *testing.F) {
	f.Add([]byte(`{"os":"linux","config":{"Env":["A=b"],"User":"0"},"rootfs":{"type":"layers","diff_ids":["sha256:` + hex + `"]}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := ParseConfig(data)
		if err != nil {
			return
		}
		for _, d := range c.DiffIDs {
			if CheckDigest(d) != nil {
				t.Errorf("diff ID %q", d)
			}
		}
		for _, e := range c.Config.Env {
			if !strings.Contains(e, "=") || strings.Contains(e, "\x00") {
				t.Errorf("variable %q", e)
			}
		}
	})
}
