package archive

import (
	"context"
	"io"
	"strings"

	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/naru-project/naru/images/manifest"
	"github.com/naru-project/naru/internal/errs"
)

// Image is one image of an archive.
type Image struct {
	Tags   []string      // full references
	Target digest.Digest // of the manifest or index; empty in docker archives
	ID     digest.Digest
	Config []byte // its digest is ID
	Layers []Layer
	// Artifact, when it is not an image: Config is its manifest, Layers are its files.
	Artifact *manifest.Artifact
}

// Layer is a layer's file. Digest is empty where the archive does not say it.
type Layer struct {
	Digest digest.Digest
	Size   int64
	Open   func(ctx context.Context) (io.ReadCloser, error)
}

// Images reads what the archive holds for this node. In an OCI layout an image
// has the name of its annotation if that is a full reference.
func (a *Archive) Images(ctx context.Context, m platforms.MatchComparer) ([]Image, error) {
	oci := a.files.has("index.json") && a.files.has("oci-layout")
	docker := a.files.has("manifest.json")
	var (
		list []Image
		err  error
	)
	switch {
	case oci:
		list, err = a.layout(ctx, m)
		// Newer "docker save" writes both; the names are in its own list then.
		if err == nil && docker && !named(list) {
			return a.docker(m)
		}
	case docker:
		list, err = a.docker(m)
	default:
		return nil, errs.New(errs.InvalidArgument, "it is neither a docker archive nor an OCI image layout: no manifest.json, no index.json")
	}
	if err == nil && len(list) == 0 {
		err = errs.New(errs.InvalidArgument, "there is no image in it")
	}
	return list, err
}

func named(list []Image) bool {
	for _, i := range list {
		if len(i.Tags) == 0 {
			return false
		}
	}
	return len(list) > 0
}

type layoutFile struct {
	Version string `json:"imageLayoutVersion"`
}

func (a *Archive) layout(ctx context.Context, m platforms.MatchComparer) ([]Image, error) {
	data, err := a.read("oci-layout", 4<<10)
	if err != nil {
		return nil, err
	}
	var l layoutFile
	if err := manifest.Unmarshal(data, &l); err != nil || !strings.HasPrefix(l.Version, "1.") {
		return nil, errs.New(errs.InvalidArgument, "read oci-layout: it is not of version 1")
	}
	if data, err = a.read("index.json", manifest.MaxManifestSize); err != nil {
		return nil, err
	}
	doc, err := manifest.Parse(data, ocispec.MediaTypeImageIndex)
	if err != nil {
		return nil, err
	}
	if len(doc.Index) > maxImages {
		return nil, errs.New(errs.ResourceExhausted, "read index.json: %d images, more than %d", len(doc.Index), maxImages)
	}
	byTarget := map[digest.Digest]int{}
	var out []Image
	for _, d := range doc.Index {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		name := refName(d.Annotations)
		if i, ok := byTarget[d.Digest]; ok { // one image, several names
			out[i].Tags = append(out[i].Tags, name...)
			continue
		}
		if !manifest.IsManifest(d.MediaType) {
			continue
		}
		img, err := a.layoutImage(d, m)
		if errs.Is(err, errs.NotFound) && len(doc.Index) > 1 {
			continue // of another platform
		}
		if err != nil {
			return nil, err
		}
		img.Tags = name
		byTarget[d.Digest] = len(out)
		out = append(out, *img)
	}
	return out, nil
}

// refName takes a name from annotations. ref.name may be a bare tag by the OCI
// spec; only something with a path or a tag in it is a reference.
func refName(annotations map[string]string) []string {
	for _, key := range []string{"io.containerd.image.name", ocispec.AnnotationRefName} {
		v := annotations[key]
		if !strings.ContainsAny(v, ":/") {
			continue
		}
		if n, err := reference.ParseNormalizedNamed(v); err == nil {
			if _, digested := n.(reference.Digested); !digested {
				return []string{reference.TagNameOnly(n).String()}
			}
		}
	}
	return nil
}

func (a *Archive) layoutImage(top ocispec.Descriptor, m platforms.MatchComparer) (*Image, error) {
	d := top
	for depth := 0; ; depth++ {
		data, err := a.blob(d.Digest, d.Size, manifest.MaxManifestSize)
		if err != nil {
			return nil, err
		}
		doc, err := manifest.Parse(data, d.MediaType)
		if err != nil {
			return nil, err
		}
		if doc.Artifact != nil {
			return a.artifact(top.Digest, doc.Artifact, data), nil
		}
		if doc.Manifest != nil {
			return a.layoutManifest(top.Digest, doc.Manifest, m)
		}
		if depth >= manifest.MaxIndexDepth {
			return nil, errs.New(errs.FailedPrecondition, "read index: more than %d indexes stand above the manifest", manifest.MaxIndexDepth)
		}
		if d, err = manifest.Select(doc.Index, m); err != nil {
			return nil, err
		}
	}
}

func (a *Archive) layoutManifest(target digest.Digest, doc *ocispec.Manifest, m platforms.MatchComparer) (*Image, error) {
	raw, err := a.blob(doc.Config.Digest, doc.Config.Size, manifest.MaxConfigSize)
	if err != nil {
		return nil, err
	}
	cfg, err := manifest.ParseConfig(raw)
	if err != nil {
		return nil, err
	}
	if cfg.CheckPlatform(m) != nil {
		return nil, errs.Wrap(errs.NotFound, cfg.CheckPlatform(m))
	}
	img := &Image{Target: target, ID: doc.Config.Digest, Config: raw}
	for _, l := range doc.Layers {
		img.Layers = append(img.Layers, a.layer(blobPath(l.Digest), l.Digest, l.Size))
	}
	return img, nil
}

func (a *Archive) artifact(target digest.Digest, doc *manifest.Artifact, raw []byte) *Image {
	img := &Image{Target: target, ID: digest.FromBytes(raw), Config: raw, Artifact: doc}
	for _, f := range doc.Files {
		img.Layers = append(img.Layers, a.layer(blobPath(f.Blob.Digest), f.Blob.Digest, f.Blob.Size))
	}
	return img
}

func (a *Archive) layer(name string, d digest.Digest, size int64) Layer {
	return Layer{Digest: d, Size: size, Open: func(context.Context) (io.ReadCloser, error) {
		rc, _, err := a.files.open(name)
		return rc, err
	}}
}

// dockerItem is an element of manifest.json, as "docker save" writes it.
type dockerItem struct {
	Config       string                        `json:"Config"`
	RepoTags     []string                      `json:"RepoTags"`
	Layers       []string                      `json:"Layers"`
	Parent       string                        `json:"Parent"`
	LayerSources map[string]ocispec.Descriptor `json:"LayerSources"`
}

func (a *Archive) docker(m platforms.MatchComparer) ([]Image, error) {
	data, err := a.read("manifest.json", manifest.MaxManifestSize)
	if err != nil {
		return nil, err
	}
	var items []dockerItem
	if err := manifest.Unmarshal(data, &items); err != nil {
		return nil, errs.New(errs.InvalidArgument, "read manifest.json: %w", err)
	}
	if len(items) > maxImages {
		return nil, errs.New(errs.ResourceExhausted, "read manifest.json: %d images, more than %d", len(items), maxImages)
	}
	var out []Image
	for _, item := range items {
		img, err := a.dockerImage(item, m)
		if err != nil {
			return nil, err
		}
		out = append(out, *img)
	}
	return out, nil
}

func (a *Archive) dockerImage(item dockerItem, m platforms.MatchComparer) (*Image, error) {
	raw, err := a.read(item.Config, manifest.MaxConfigSize)
	if err != nil {
		return nil, err
	}
	cfg, err := manifest.ParseConfig(raw)
	if err != nil {
		return nil, err
	}
	if err := cfg.CheckPlatform(m); err != nil {
		return nil, err
	}
	if len(cfg.DiffIDs) != len(item.Layers) {
		return nil, errs.New(errs.InvalidArgument, "read manifest.json: %d layers, the config has %d", len(item.Layers), len(cfg.DiffIDs))
	}
	img := &Image{ID: digest.FromBytes(raw), Config: raw}
	for _, name := range item.Layers {
		img.Layers = append(img.Layers, a.layer(name, "", -1))
	}
	for _, t := range item.RepoTags {
		n, err := reference.ParseNormalizedNamed(t)
		if err != nil {
			return nil, errs.New(errs.InvalidArgument, "read manifest.json: name %.200q: %w", t, err)
		}
		if _, digested := n.(reference.Digested); !digested {
			img.Tags = append(img.Tags, reference.TagNameOnly(n).String())
		}
	}
	return img, nil
}
