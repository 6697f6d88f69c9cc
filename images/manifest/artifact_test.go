package manifest

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/naru-project/naru/internal/errs"
)

// artifactM is the manifest of an artifact with files of these titles.
func artifactM(titles ...string) string {
	m := map[string]any{"schemaVersion": 2, "artifactType": "application/x-test", "config": map[string]any{"mediaType": ocispec.MediaTypeEmptyJSON, "digest": "sha256:" + hex, "size": 2}}
	layers := []any{}
	for _, t := range titles {
		l := map[string]any{"mediaType": "application/octet-stream", "digest": "sha256:" + hex, "size": 3}
		if t != "" {
			l["annotations"] = map[string]string{ocispec.AnnotationTitle: t}
		}
		layers = append(layers, l)
	}
	m["layers"] = layers
	return string(must(json.Marshal(m)))
}

// I-01: names of an artifact's files come from a stranger: none leads out of the
// folder, two are never one.
func TestArtifactNames(t *testing.T) {
	long := strings.Repeat("x", 256)
	for _, x := range []struct {
		name   string
		titles []string
		want   []string // nil: refused
	}{
		{"plain", []string{"a", "b.bin", "with space", "ümlaut", "..."}, []string{"a", "b.bin", "with space", "ümlaut", "..."}},
		{"folders", []string{"m/a", "m/b", "./c", "d//e"}, []string{"m/a", "m/b", "c", "d/e"}},
		{"none", []string{""}, []string{"sha256-" + hex}},
		{"no files", nil, []string{}},
		{"up", []string{"../a"}, nil}, {"up in the middle", []string{"a/../b"}, nil}, {"up at the end", []string{"a/.."}, nil},
		{"absolute", []string{"/etc/passwd"}, nil}, {"folder", []string{"a/"}, nil}, {"dot", []string{"."}, nil}, {"dots", []string{".."}, nil}, {"slash", []string{"/"}, nil}, {"dot in folder", []string{"a/."}, nil},
		{"NUL", []string{"a\x00b"}, nil}, {"newline", []string{"a\nb"}, nil}, {"escape", []string{"a\x1b[2J"}, nil},
		{"long", []string{long}, nil}, {"long folder", []string{long + "/a"}, nil}, {"long path", []string{strings.Repeat("x/", 600) + "x"}, nil},
		{"twice", []string{"a", "a"}, nil}, {"twice in other words", []string{"a/b", "./a//b"}, nil}, {"twice without", []string{"", ""}, nil}, {"twice by digest", []string{"", "sha256-" + hex}, nil},
		{"file and folder", []string{"a", "a/b"}, nil}, {"folder and file", []string{"a/b/c", "a"}, nil},
	} {
		t.Run(x.name, func(t *testing.T) {
			doc, err := Parse([]byte(artifactM(x.titles...)), ociM)
			if x.want == nil {
				if !errs.Is(err, errs.FailedPrecondition) {
					t.Errorf("got %v", err)
				}
				return
			}
			if err != nil || doc.Artifact == nil {
				t.Fatal(doc, err)
			}
			got := []string{}
			for _, f := range doc.Artifact.Files {
				got = append(got, f.Name)
			}
			if !slices.Equal(got, x.want) || doc.Artifact.Type != "application/x-test" {
				t.Errorf("got %q of type %q, want %q", got, doc.Artifact.Type, x.want)
			}
		})
	}
	if doc, err := Parse([]byte(goodM), ociM); err != nil || doc.Artifact != nil {
		t.Errorf("an image is an artifact: %+v %v", doc.Artifact, err)
	}
	empty := strings.Replace(artifactM(""), "application/octet-stream", ocispec.MediaTypeEmptyJSON, 1)
	if doc, err := Parse([]byte(empty), ociM); err != nil || len(doc.Artifact.Files) != 0 {
		t.Errorf("the empty layer is a file: %+v %v", doc.Artifact, err)
	}
}
