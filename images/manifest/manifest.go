// Package manifest reads the JSON documents of an image (manifest, index,
// config) strictly: each has one meaning or is refused.
//
// It is pure: bytes in, values out. It must not know about registries, files
// or the store. Everything in it is safe for concurrent use.
package manifest

import (
	_ "crypto/sha256" // makes the algorithms available to go-digest
	_ "crypto/sha512"
	"mime"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/naru-project/naru/internal/errs"
)

// Limits of the documents of an image.
const (
	MaxManifestSize = 4 << 20
	MaxConfigSize   = 8 << 20
	MaxLayers       = 500
	// MaxIndexDepth is how many indexes may stand above a manifest.
	MaxIndexDepth = 2
)

// Media types of Docker's image format, version 2, schema 2.
const (
	DockerManifest     = "application/vnd.docker.distribution.manifest.v2+json"
	DockerManifestList = "application/vnd.docker.distribution.manifest.list.v2+json"
	DockerConfig       = "application/vnd.docker.container.image.v1+json"
	DockerLayer        = "application/vnd.docker.image.rootfs.diff.tar"
	DockerLayerGzip    = "application/vnd.docker.image.rootfs.diff.tar.gzip"
	DockerLayerZstd    = "application/vnd.docker.image.rootfs.diff.tar.zstd"

	dockerSchema1       = "application/vnd.docker.distribution.manifest.v1+json"
	dockerSchema1Signed = "application/vnd.docker.distribution.manifest.v1+prettyjws"
)

// Accept lists the manifest types to ask a registry for.
var Accept = strings.Join([]string{
	ocispec.MediaTypeImageIndex, DockerManifestList, ocispec.MediaTypeImageManifest, DockerManifest,
}, ", ")

// Document is one manifest or one index; exactly one of the two is set.
type Document struct {
	MediaType string
	Manifest  *ocispec.Manifest
	Artifact  *Artifact // beside Manifest, when that is not an image's
	Index     []ocispec.Descriptor
}

// wire has the keys of all documents that a registry may send, so that one
// that is two things at once is seen.
type wire struct {
	SchemaVersion int                   `json:"schemaVersion"`
	MediaType     string                `json:"mediaType"`
	ArtifactType  string                `json:"artifactType"`
	Config        *ocispec.Descriptor   `json:"config"`
	Layers        *[]ocispec.Descriptor `json:"layers"`
	Manifests     *[]ocispec.Descriptor `json:"manifests"`
	FSLayers      *[]any                `json:"fsLayers"`
	History       *[]any                `json:"history"`
	Signatures    *[]any                `json:"signatures"`
	Blobs         *[]any                `json:"blobs"`
	Subject       *ocispec.Descriptor   `json:"subject"`
	Annotations   map[string]string     `json:"annotations"`
}

// Parse reads a manifest or an index. contentType is what the sender called
// it; when it names a manifest type it must agree with the document
// (CVE-2021-41190).
func Parse(data []byte, contentType string) (*Document, error) {
	if len(data) > MaxManifestSize {
		return nil, errs.New(errs.ResourceExhausted, "read manifest: larger than %d bytes", MaxManifestSize)
	}
	var w wire
	if err := Unmarshal(data, &w); err != nil {
		return nil, errs.New(errs.FailedPrecondition, "read manifest: %w", err)
	}
	kind, err := w.kind()
	if err != nil {
		return nil, err
	}
	mt, err := mediaType(w.MediaType, contentType, kind)
	if err != nil {
		return nil, err
	}
	doc := &Document{MediaType: mt}
	if kind == kindIndex {
		doc.Index = *w.Manifests
		return doc, checkAll(doc.Index)
	}
	doc.Manifest = &ocispec.Manifest{MediaType: mt, ArtifactType: w.ArtifactType, Config: *w.Config, Annotations: w.Annotations}
	if w.Layers != nil {
		doc.Manifest.Layers = *w.Layers
	}
	if err := checkManifest(doc.Manifest); err != nil {
		return doc, err
	}
	if !isImage(doc.Manifest.Config.MediaType) {
		doc.Artifact, err = artifact(doc.Manifest)
	}
	return doc, err
}

type kind string

const (
	kindManifest kind = "manifest"
	kindIndex    kind = "index"
)

func (w *wire) kind() (kind, error) {
	switch {
	case w.FSLayers != nil || w.Signatures != nil || w.SchemaVersion == 1:
		return "", errs.New(errs.FailedPrecondition, "read manifest: it has Docker's schema 1, which is not supported: push the image again with a newer tool")
	case w.SchemaVersion != 2:
		return "", errs.New(errs.FailedPrecondition, "read manifest: schemaVersion is %d, want 2", w.SchemaVersion)
	case w.Blobs != nil:
		return "", errs.New(errs.FailedPrecondition, "read manifest: it is an artifact manifest, not an image")
	case w.Manifests != nil && (w.Config != nil || w.Layers != nil):
		return "", errs.New(errs.FailedPrecondition, "read manifest: it is a manifest and an index at once")
	case w.Manifests != nil:
		return kindIndex, nil
	case w.Config != nil:
		return kindManifest, nil
	}
	return "", errs.New(errs.FailedPrecondition, "read manifest: it has neither a config nor a list of manifests")
}

func kindOf(mediaType string) kind {
	switch mediaType {
	case ocispec.MediaTypeImageIndex, DockerManifestList:
		return kindIndex
	case ocispec.MediaTypeImageManifest, DockerManifest:
		return kindManifest
	}
	return ""
}

// IsManifest reports whether mediaType is one of a manifest or an index.
func IsManifest(mediaType string) bool { return kindOf(mediaType) != "" }

// mediaType settles what a document is called: by its own field, by its
// sender, and by what it contains; all that speak must agree.
func mediaType(field, contentType string, k kind) (string, error) {
	sent := contentType
	if t, _, err := mime.ParseMediaType(contentType); err == nil {
		sent = t
	}
	if sent == dockerSchema1 || sent == dockerSchema1Signed {
		return "", errs.New(errs.FailedPrecondition, "read manifest: it has Docker's schema 1, which is not supported")
	}
	if field != "" && kindOf(field) != k {
		return "", errs.New(errs.FailedPrecondition, "read manifest: it is called %.100q but is an image %s", field, k)
	}
	if kindOf(sent) != "" {
		if kindOf(sent) != k || field != "" && field != sent {
			return "", errs.New(errs.FailedPrecondition, "read manifest: it was sent as %.100q but is %.100q", sent, field)
		}
		return sent, nil
	}
	if field != "" {
		return field, nil
	}
	if k == kindIndex {
		return ocispec.MediaTypeImageIndex, nil
	}
	return ocispec.MediaTypeImageManifest, nil
}

func checkAll(list []ocispec.Descriptor) error {
	for i := range list {
		if err := CheckDescriptor(list[i]); err != nil {
			return err
		}
	}
	return nil
}

func checkManifest(m *ocispec.Manifest) error {
	if err := CheckDescriptor(m.Config); err != nil {
		return err
	}
	image := isImage(m.Config.MediaType)
	if m.Config.MediaType == "" {
		return errs.New(errs.FailedPrecondition, "read manifest: its config has no type")
	}
	if image && m.Config.Size > MaxConfigSize {
		return errs.New(errs.ResourceExhausted, "read manifest: the config has %d bytes, more than %d", m.Config.Size, MaxConfigSize)
	}
	if len(m.Layers) > MaxLayers {
		return errs.New(errs.ResourceExhausted, "read manifest: %d layers, more than %d", len(m.Layers), MaxLayers)
	}
	for _, l := range m.Layers {
		if err := CheckDescriptor(l); err != nil {
			return err
		}
		if !image {
			continue // any type of file
		}
		if err := CheckLayerType(l.MediaType); err != nil {
			return err
		}
	}
	return nil
}

// CheckDescriptor refuses descriptors whose digest or size cannot be.
func CheckDescriptor(d ocispec.Descriptor) error {
	if err := CheckDigest(d.Digest); err != nil {
		return err
	}
	if d.Size < 0 {
		return errs.New(errs.FailedPrecondition, "read descriptor of %s: its size is negative", d.Digest)
	}
	return nil
}

// CheckDigest accepts sha256 and sha512 in the one spelling they have. It runs
// before a digest becomes part of a path or URL (CVE-2024-3727).
func CheckDigest(d digest.Digest) error {
	ok := d.Validate() == nil
	if ok {
		switch d.Algorithm() {
		case digest.SHA256, digest.SHA512:
			return nil
		}
	}
	return errs.New(errs.FailedPrecondition, "read digest: %.100q is not a sha256 or sha512 digest", string(d))
}

// CheckLayerType refuses layers that are not tar archives or lie elsewhere.
func CheckLayerType(mediaType string) error {
	switch mediaType {
	case DockerLayer, DockerLayerGzip, DockerLayerZstd,
		ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerZstd:
		return nil
	}
	if strings.Contains(mediaType, "nondistributable") || strings.Contains(mediaType, ".foreign.") {
		return errs.New(errs.FailedPrecondition, "read layer: type %.100q lies at a foreign address, which is not fetched", mediaType)
	}
	return errs.New(errs.FailedPrecondition, "read layer: type %.100q is not supported", mediaType)
}
