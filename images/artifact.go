package images

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"io"

	"github.com/opencontainers/go-digest"

	"github.com/naru-project/naru/images/manifest"
	"github.com/naru-project/naru/internal/errs"
)

// An artifact is kept like an image: each of its files is a layer of its own
// with this one file in it, its manifest stands where an image has its config,
// and its ID is the manifest's digest (the configs of most artifacts are the
// same two bytes). Files are shared between artifacts as layers are.

// filePrefix begins the diff IDs of files. No image can name them: theirs are
// digests.
const filePrefix = "artifact:"

// fileID stands for the layer that has this file alone.
func fileID(f manifest.File) digest.Digest {
	sum := sha256.Sum256([]byte(f.Name + "\x00" + f.Blob.Digest.String()))
	return digest.Digest(filePrefix + hex.EncodeToString(sum[:]))
}

// fileConfig is what an artifact has in place of an image's config: nothing,
// but the list of its layers.
func fileConfig(a *manifest.Artifact) *manifest.Config {
	c := &manifest.Config{}
	for _, f := range a.Files {
		c.DiffIDs = append(c.DiffIDs, fileID(f))
	}
	return c
}

// newArtifact makes an image of an artifact, whose manifest is raw.
func (s *Store) newArtifact(a *manifest.Artifact, raw []byte, open func(i int, f manifest.File) func(context.Context, *slot) (io.ReadCloser, error)) (*image, error) {
	img := &image{id: digest.FromBytes(raw), raw: raw, artifact: a}
	var total int64
	for i, f := range a.Files {
		total += f.Blob.Size
		if err := s.cfg.Limits.CheckTotal(total); err != nil { // here already, before it can run over
			return nil, err
		}
		img.sources = append(img.sources, source{blob: f.Blob.Digest, size: f.Blob.Size, file: f.Name, open: open(i, f)})
	}
	return img, nil
}

// parse reads the config of an image, or the manifest of an artifact.
func parse(raw []byte, isArtifact bool) (*manifest.Config, *manifest.Artifact, error) {
	if !isArtifact {
		c, err := manifest.ParseConfig(raw)
		return c, nil, err
	}
	doc, err := manifest.Parse(raw, "")
	if err != nil {
		return nil, nil, err
	}
	if doc.Artifact == nil {
		return nil, nil, errs.New(errs.Internal, "decode record: its manifest is not that of an artifact")
	}
	return fileConfig(doc.Artifact), doc.Artifact, nil
}
