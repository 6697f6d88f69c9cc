package images

import (
	"context"
	"errors"
	"io"
	"os"
	"runtime/debug"
	"sync/atomic"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"k8s.io/klog/v2"

	"github.com/naru-project/naru/images/layers"
	"github.com/naru-project/naru/images/manifest"
	"github.com/naru-project/naru/images/registry"
	"github.com/naru-project/naru/images/unpack"
	"github.com/naru-project/naru/internal/errs"
)

// image is an image on its way in, from wherever.
type image struct {
	id      digest.Digest // of raw
	raw     []byte        // the config blob, verified
	sources []source      // base first
	// artifact: raw is its manifest.
	artifact *manifest.Artifact
	tags     []string
	digests  []string
}

// source is where a layer comes from.
type source struct {
	blob digest.Digest // of the packed form; empty: not known
	size int64         // of the packed form; negative: not known
	file string        // not empty: the blob is this file, not a layer
	open func(ctx context.Context, s *slot) (io.ReadCloser, error)
}

func registrySource(c *registry.Client, d ocispec.Descriptor) source {
	return source{blob: d.Digest, size: d.Size, open: func(ctx context.Context, s *slot) (io.ReadCloser, error) {
		return c.Blob(ctx, d, s)
	}}
}

// install unpacks the layers that are not here, all at once within the node's
// budget, and records the image when all of them are on the disk.
func (s *Store) install(ctx context.Context, p *pull, img *image) (string, error) {
	cfg, artifact, err := parse(img.raw, img.artifact != nil)
	if err != nil {
		return "", err
	}
	if artifact == nil {
		if err := cfg.CheckPlatform(s.platform); err != nil {
			return "", err
		}
	}
	if len(cfg.DiffIDs) != len(img.sources) {
		return "", errs.New(errs.FailedPrecondition, "read manifest: it has %d layers, the config has %d", len(img.sources), len(cfg.DiffIDs))
	}
	p.stage.Store("layers")
	got, err := s.fetchLayers(ctx, p, img.sources, cfg.DiffIDs)
	if err != nil {
		return "", err
	}
	p.stage.Store("commit")
	if err := s.layers.Sync(got); err != nil {
		return "", errors.Join(err, s.layers.Release(got...))
	}
	if err := ctx.Err(); err != nil {
		return "", errors.Join(context.Cause(ctx), s.layers.Release(got...))
	}
	if err := s.keep(ctx, made{id: img.id, raw: img.raw, config: cfg, artifact: artifact, layers: got, tags: img.tags, digests: img.digests}); err != nil {
		return "", err
	}
	return img.id.String(), nil
}

// fetchLayers returns a reference to each layer, or none and an error.
func (s *Store) fetchLayers(ctx context.Context, p *pull, from []source, diffs []digest.Digest) ([]*layers.Layer, error) {
	got := make([]*layers.Layer, len(from))
	p.layersTotal.Store(int32(len(from)))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(s.cfg.MaxTransfers)
	for i := range from {
		if !s.layers.Has(diffs[i], from[i].blob) && from[i].size > 0 {
			p.total.Add(from[i].size)
		}
	}
	for i := range from {
		g.Go(func() (err error) {
			defer func() {
				if v := recover(); v != nil {
					klog.Background().Error(nil, "Panic while a layer was unpacked", "value", v, "stack", string(debug.Stack()))
					err = errs.New(errs.Internal, "unpack layer: a bug in Naru: %v", v)
				}
			}()
			got[i], err = s.layers.Ensure(gctx, diffs[i], from[i].blob, func(ctx context.Context, dir *os.File) (unpack.Result, error) {
				return s.fill(ctx, p, from[i], diffs[i], dir)
			})
			p.layersDone.Add(1)
			return err
		})
	}
	err := g.Wait()
	if err == nil {
		return got, nil
	}
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	var have []*layers.Layer
	for _, l := range got {
		if l != nil {
			have = append(have, l)
		}
	}
	if rerr := s.layers.Release(have...); rerr != nil {
		err = errors.Join(err, rerr)
	}
	return nil, err
}

// fill transfers and unpacks one layer.
func (s *Store) fill(ctx context.Context, p *pull, from source, diff digest.Digest, dir *os.File) (unpack.Result, error) {
	place := &slot{sem: s.budget} // taken when bytes come
	defer place.Release()
	b := unpack.Blob{
		Digest: from.blob, Size: from.size, DiffID: diff,
		Open: func(ctx context.Context) (io.ReadCloser, error) {
			rc, err := from.open(ctx, place)
			if err != nil {
				return nil, err
			}
			return &counter{rc, &p.bytes}, nil
		},
	}
	if from.file != "" {
		return unpack.File(ctx, dir, from.file, b, s.cfg.Limits)
	}
	return unpack.Layer(ctx, dir, b, s.cfg.Limits)
}

// counter counts the bytes of a transfer for Progress.
type counter struct {
	io.ReadCloser
	n *atomic.Int64
}

func (c *counter) Read(b []byte) (int, error) {
	n, err := c.ReadCloser.Read(b)
	c.n.Add(int64(n))
	return n, err
}
