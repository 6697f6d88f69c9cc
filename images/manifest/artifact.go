package manifest

import (
	"path/filepath"
	"slices"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/naru-project/naru/internal/errs"
)

// Artifact is what is used of a manifest whose config is not that of an image:
// files that are shown as they are.
type Artifact struct {
	Type  string
	Files []File
}

// File is a blob of an artifact.
type File struct {
	// Name is local and clean; it may have folders in it. No other file has it,
	// nor stands in the way of it.
	Name string
	Blob ocispec.Descriptor
}

const (
	maxFileName = 255  // NAME_MAX
	maxFilePath = 1024 // of all components
)

// isImage tells the configs of images from those of artifacts.
func isImage(configType string) bool {
	return configType == ocispec.MediaTypeImageConfig || configType == DockerConfig
}

// artifact reads the list of files. What a file is called comes from its
// annotation org.opencontainers.image.title, or else from its digest.
func artifact(m *ocispec.Manifest) (*Artifact, error) {
	a := &Artifact{Type: m.ArtifactType}
	if a.Type == "" {
		a.Type = m.Config.MediaType
	}
	for _, l := range m.Layers {
		name := l.Annotations[ocispec.AnnotationTitle]
		if name == "" {
			if l.MediaType == ocispec.MediaTypeEmptyJSON {
				continue // stands for "no files" (image-spec, manifest.md)
			}
			name = strings.Replace(l.Digest.String(), ":", "-", 1)
		}
		clean, err := fileName(name)
		if err != nil {
			return nil, err
		}
		a.Files = append(a.Files, File{Name: clean, Blob: l})
	}
	return a, a.distinct()
}

// fileName accepts names of files below a folder, and gives their clean form.
func fileName(name string) (string, error) {
	bad := func(why string) (string, error) {
		return "", errs.New(errs.FailedPrecondition, "read artifact: the name %.200q of a file %s", name, why)
	}
	if strings.ContainsFunc(name, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return bad("has a control character")
	}
	if len(name) > maxFilePath {
		return bad("is too long")
	}
	parts := strings.Split(name, "/")
	if slices.Contains(parts, "..") || !filepath.IsLocal(name) || parts[len(parts)-1] == "" || parts[len(parts)-1] == "." {
		return bad("does not name a file below a folder")
	}
	if slices.ContainsFunc(parts, func(p string) bool { return len(p) > maxFileName }) {
		return bad("is too long")
	}
	return filepath.Clean(name), nil
}

// distinct refuses two files of one name, and a file where another has a folder.
func (a *Artifact) distinct() error {
	files := map[string]bool{}
	for _, f := range a.Files {
		if files[f.Name] {
			return errs.New(errs.FailedPrecondition, "read artifact: two files have the name %.200q", f.Name)
		}
		files[f.Name] = true
	}
	for _, f := range a.Files {
		for dir := filepath.Dir(f.Name); dir != "."; dir = filepath.Dir(dir) {
			if files[dir] {
				return errs.New(errs.FailedPrecondition, "read artifact: %.200q is a file, and the folder of %.200q", dir, f.Name)
			}
		}
	}
	return nil
}
