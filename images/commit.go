package images

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	"k8s.io/klog/v2"

	"github.com/naru-project/naru/images/layers"
	"github.com/naru-project/naru/images/manifest"
	"github.com/naru-project/naru/internal/atomicfile"
	"github.com/naru-project/naru/internal/errs"
)

// made is an image ready to be recorded.
type made struct {
	id     digest.Digest
	raw    []byte
	config *manifest.Config
	// artifact: raw is its manifest.
	artifact *manifest.Artifact
	layers   []*layers.Layer // references that go over to the store
	tags     []string
	digests  []string
}

// errGone: the image was removed meanwhile.
var errGone = errs.New(errs.NotFound, "the image was removed meanwhile")

// keep records an image, new or known, with its names. A name that another
// image has moves here; the other keeps its digests. The references in m are
// the store's afterwards, also on error.
func (s *Store) keep(ctx context.Context, m made) (err error) {
	unlock, err := s.lockCommit(ctx)
	if err != nil {
		return errors.Join(err, s.layers.Release(m.layers...))
	}
	defer unlock()
	s.mu.Lock()
	old := s.images[m.id.String()]
	seq := s.seq + 1
	s.seq = seq
	others := s.losing(m)
	s.mu.Unlock()

	spare := m.layers
	defer func() { err = errors.Join(err, s.layers.Release(spare...)) }()
	st, changed, err := s.next(old, m, seq)
	if err != nil {
		return err
	}
	if !changed && len(others) == 0 {
		return nil
	}
	if err := s.write(st.rec); err != nil {
		if old == nil {
			_ = atomicfile.Remove(s.recordPath(st.rec)) // it may have got its name before the error
		}
		return noSpace("record image", err)
	}
	for _, o := range others {
		if err := s.write(o.rec); err != nil { // the later owner of a name wins at the next start
			klog.FromContext(ctx).Error(err, "Could not take a name from the record of an older image", "id", o.rec.ID)
		}
	}
	if old == nil {
		spare = nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.images[m.id.String()] = st
	for _, o := range others {
		s.images[o.rec.ID.String()] = o
	}
	s.publish()
	return nil
}

// next makes the image as it will be. changed: it differs from the one there.
func (s *Store) next(old *stored, m made, seq uint64) (st *stored, changed bool, err error) {
	switch {
	case old != nil:
		st = &stored{rec: old.rec.clone(), config: old.config, artifact: old.artifact, layers: old.layers}
	case m.config == nil:
		return nil, false, errGone
	default:
		st = &stored{config: m.config, artifact: m.artifact, layers: m.layers, rec: &record{
			ID: m.id, Config: m.raw, Artifact: m.artifact != nil, Layers: infos(m.layers), Pulled: time.Now().UnixNano(),
		}}
		changed = true
	}
	for _, name := range m.tags {
		if !slices.ContainsFunc(st.rec.Tags, func(t tag) bool { return t.Name == name }) {
			st.rec.Tags = append(st.rec.Tags, tag{name, seq})
			changed = true
		}
	}
	for _, d := range m.digests {
		if !slices.Contains(st.rec.Digests, d) {
			st.rec.Digests = append(st.rec.Digests, d)
			changed = true
		}
	}
	st.public = s.present(st)
	return st, changed, nil
}

// losing lists the other images that have one of m's tags, as they will be
// without. The caller holds mu.
func (s *Store) losing(m made) []*stored {
	var out []*stored
	for id, o := range s.images {
		if id == m.id.String() {
			continue
		}
		var left []tag
		for _, t := range o.rec.Tags {
			if !slices.Contains(m.tags, t.Name) {
				left = append(left, t)
			}
		}
		if len(left) != len(o.rec.Tags) {
			n := &stored{rec: o.rec.clone(), config: o.config, artifact: o.artifact, layers: o.layers}
			n.rec.Tags = left
			n.public = s.present(n)
			out = append(out, n)
		}
	}
	return out
}

func noSpace(what string, err error) error {
	if isNoSpace(err) {
		return errs.New(errs.ResourceExhausted, "%s: %w", what, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// Remove removes the image that ref names, with all its names; absent is no
// error. Layers that containers use stay until the last of them lets go.
func (s *Store) Remove(ctx context.Context, ref string) error {
	unlock, err := s.lockCommit(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	i, err := s.Resolve(ref)
	if errs.Is(err, errs.NotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	s.mu.Lock()
	st := s.images[i.ID]
	s.mu.Unlock()
	if st == nil {
		return nil
	}
	if err := atomicfile.Remove(s.recordPath(st.rec)); err != nil {
		return fmt.Errorf("remove image record: %w", err)
	}
	err = s.dirs.images.Sync()
	s.mu.Lock()
	delete(s.images, i.ID)
	s.publish()
	s.mu.Unlock()
	return errors.Join(err, s.layers.Release(st.layers...))
}
