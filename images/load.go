package images

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/distribution/reference"

	"github.com/naru-project/naru/images/archive"
	"github.com/naru-project/naru/images/manifest"
	"github.com/naru-project/naru/internal/errs"
)

// LoadOptions say how to load an archive.
type LoadOptions struct {
	// Name is the reference of the image, for archives of one image; it counts
	// in place of the archive's own names.
	Name string
}

const (
	maxArchive     = 256 << 30
	archiveReserve = 64 << 20
)

// Load reads images from a stream: a docker archive or an OCI layout in a tar
// archive, compressed or not. It returns the references that they got.
func (s *Store) Load(ctx context.Context, r io.Reader, o LoadOptions) ([]string, error) {
	f, err := archive.Spool(ctx, r, s.cfg.Root, maxArchive, archiveReserve)
	if err != nil {
		return nil, fmt.Errorf("load images: %w", err)
	}
	a, err := archive.OpenTar(ctx, f)
	if err != nil {
		return nil, fmt.Errorf("load images: %w", err)
	}
	return s.load(ctx, a, o)
}

// LoadPath is Load for an archive, or the folder of an OCI layout, on the disk.
func (s *Store) LoadPath(ctx context.Context, path string, o LoadOptions) ([]string, error) {
	a, err := s.openArchive(ctx, path)
	if err != nil {
		return nil, fmt.Errorf("load images from %s: %w", path, err)
	}
	return s.load(ctx, a, o)
}

func (s *Store) openArchive(ctx context.Context, path string) (*archive.Archive, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, errs.Wrap(errs.InvalidArgument, err)
	}
	if st.IsDir() {
		return archive.OpenDir(path)
	}
	if !st.Mode().IsRegular() {
		return nil, errs.New(errs.InvalidArgument, "it is neither a file nor a folder")
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, errs.Wrap(errs.InvalidArgument, err)
	}
	packed, err := archive.Compressed(f)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	if !packed {
		return archive.OpenTar(ctx, f)
	}
	defer func() { _ = f.Close() }()
	plain, err := archive.Spool(ctx, f, s.cfg.Root, maxArchive, archiveReserve)
	if err != nil {
		return nil, err
	}
	return archive.OpenTar(ctx, plain)
}

func (s *Store) load(ctx context.Context, a *archive.Archive, o LoadOptions) (refs []string, err error) {
	defer func() { err = errors.Join(err, a.Close()) }()
	ctx, done, err := s.attend(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	list, err := a.Images(ctx, s.platform)
	if err != nil {
		return nil, fmt.Errorf("load images: %w", err)
	}
	if o.Name != "" {
		if err := rename(list, o.Name); err != nil {
			return nil, err
		}
	}
	for _, i := range list {
		if len(i.Tags) == 0 {
			return nil, errs.New(errs.InvalidArgument, "load images: image %s has no full reference in the archive, give it a name", i.ID)
		}
	}
	for _, i := range list {
		if err := s.loadOne(ctx, i); err != nil {
			return refs, fmt.Errorf("load image %s: %w", i.Tags[0], err)
		}
		refs = append(refs, i.Tags...)
	}
	return refs, nil
}

// attend ties a caller's operation to the life of the store.
func (s *Store) attend(ctx context.Context) (context.Context, func(), error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, nil, errClosed
	}
	s.work.Add(1)
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(s.life, func() { cancel(errClosed) })
	return ctx, func() { stop(); cancel(nil); s.work.Done() }, nil
}

func rename(list []archive.Image, name string) error {
	if len(list) != 1 {
		return errs.New(errs.InvalidArgument, "load images: a name was given, but the archive has %d images", len(list))
	}
	n, err := normalize(name)
	if err != nil {
		return err
	}
	if _, ok := n.(reference.Digested); ok {
		return errs.New(errs.InvalidArgument, "load images: name %.200q has a digest, which only the image itself can give", name)
	}
	list[0].Tags = []string{n.String()}
	return nil
}

func (s *Store) loadOne(ctx context.Context, a archive.Image) error {
	img := &image{id: a.ID, raw: a.Config, tags: a.Tags}
	if a.Target != "" {
		for _, t := range a.Tags {
			if n, err := reference.ParseNormalizedNamed(t); err == nil {
				img.digests = append(img.digests, n.Name()+"@"+a.Target.String())
			}
		}
	}
	for _, l := range a.Layers {
		img.sources = append(img.sources, source{blob: l.Digest, size: l.Size, open: archiveSource(l)})
	}
	if a.Artifact != nil {
		art, err := s.newArtifact(a.Artifact, a.Config, func(i int, _ manifest.File) func(context.Context, *slot) (io.ReadCloser, error) {
			return archiveSource(a.Layers[i])
		})
		if err != nil {
			return err
		}
		art.tags, art.digests = img.tags, img.digests
		img = art
	}
	p := &pull{ref: a.Tags[0], start: time.Now()}
	_, err := s.install(ctx, p, img)
	return err
}

func archiveSource(l archive.Layer) func(context.Context, *slot) (io.ReadCloser, error) {
	return func(ctx context.Context, place *slot) (io.ReadCloser, error) {
		if err := place.Acquire(ctx); err != nil {
			return nil, err
		}
		return l.Open(ctx)
	}
}
