package main

import (
	"archive/tar"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
)

// Annotations that carry an image's reference in an index: the OCI one, and
// the one that containerd reads first.
const (
	refAnnotation        = "org.opencontainers.image.ref.name"
	containerdAnnotation = "io.containerd.image.name"
)

// writeLayout writes images as an OCI layout, sorted, so that the same images
// always give the same bytes.
func writeLayout(dir string, images []named) error {
	slices.SortFunc(images, func(a, b named) int { return cmp.Compare(a.ref, b.ref) })
	var index v1.ImageIndex = empty.Index
	for _, n := range images {
		index = mutate.AppendManifests(index, mutate.IndexAddendum{
			Add: n.image,
			Descriptor: v1.Descriptor{
				Annotations: map[string]string{refAnnotation: n.ref, containerdAnnotation: n.ref},
			},
		})
	}
	_, err := layout.Write(dir, index)
	return err
}

// readLayout returns the images of a layout; with refs only these.
func readLayout(dir string, refs ...string) ([]named, error) {
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return nil, fmt.Errorf("read layout %s: %w", dir, err)
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		return nil, fmt.Errorf("read layout %s: %w", dir, err)
	}
	var out []named
	for _, d := range manifest.Manifests {
		ref := d.Annotations[refAnnotation]
		if len(refs) > 0 && !slices.Contains(refs, ref) {
			continue
		}
		img, err := index.Image(d.Digest)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", ref, err)
		}
		out = append(out, named{ref, img})
	}
	for _, ref := range refs {
		if !slices.ContainsFunc(out, func(n named) bool { return n.ref == ref }) {
			return nil, fmt.Errorf("%s has no image %s", dir, ref)
		}
	}
	return out, nil
}

// writeArchive writes images as one OCI archive (a layout in a tar).
func writeArchive(w io.Writer, images []named) error {
	dir, err := os.MkdirTemp("", "testimages-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := writeLayout(dir, images); err != nil {
		return err
	}
	tw := tar.NewWriter(w)
	err = filepath.WalkDir(dir, func(name string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		rel, err := filepath.Rel(dir, name)
		if err != nil {
			return err
		}
		b, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		h := &tar.Header{Name: rel, Mode: 0o644, Size: int64(len(b)), Typeflag: tar.TypeReg, ModTime: epoch}
		if err := tw.WriteHeader(h); err != nil {
			return err
		}
		_, err = tw.Write(b)
		return err
	})
	return errors.Join(err, tw.Close())
}

func isFile(name string) bool {
	info, err := os.Stat(name)
	return err == nil && info.Mode().IsRegular()
}
