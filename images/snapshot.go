package images

import (
	"cmp"
	"path"
	"slices"
	"strings"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"

	"github.com/naru-project/naru/images/layers"
	"github.com/naru-project/naru/images/manifest"
	"github.com/naru-project/naru/internal/errs"
)

// stored is an image with what the store needs to keep it.
type stored struct {
	rec    *record
	config *manifest.Config
	// artifact is nil for an image.
	artifact *manifest.Artifact
	layers   []*layers.Layer // one reference each, base first
	public   *Image
}

// snapshot is all images at one moment. It is never changed.
type snapshot struct {
	list     []*Image          // by ID
	byID     map[string]*Image // "sha256:…"
	byName   map[string]*Image // tags and repo@digest
	byTarget map[digest.Digest]*Image
}

func newSnapshot(images map[string]*stored) *snapshot {
	n := &snapshot{
		list: make([]*Image, 0, len(images)), byID: make(map[string]*Image, len(images)),
		byName: map[string]*Image{}, byTarget: map[digest.Digest]*Image{},
	}
	seq := map[string]uint64{}
	for _, st := range images {
		i := st.public
		n.list = append(n.list, i)
		n.byID[i.ID] = i
		for _, t := range st.rec.Tags {
			if n.byName[t.Name] == nil || t.Seq > seq[t.Name] {
				n.byName[t.Name], seq[t.Name] = i, t.Seq
			}
		}
		for _, d := range i.RepoDigests {
			n.byName[d] = i
			if _, target, ok := strings.Cut(d, "@"); ok {
				n.byTarget[digest.Digest(target)] = i
			}
		}
	}
	slices.SortFunc(n.list, func(a, b *Image) int { return cmp.Compare(a.ID, b.ID) })
	return n
}

// publish makes the current images what readers see. The caller holds mu.
func (s *Store) publish() { s.snap.Store(newSnapshot(s.images)) }

// present makes the public face of an image. It shares nothing that a reader
// could change for the store.
func (s *Store) present(st *stored) *Image {
	i := &Image{
		ID: st.rec.ID.String(), RepoDigests: slices.Clone(st.rec.Digests), Config: st.config.Config,
		RawConfig: st.rec.Config, Layers: slices.Clone(st.config.DiffIDs), Created: st.config.Created,
		Size: uint64(len(st.rec.Config)),
	}
	if st.artifact != nil {
		i.Artifact, i.Layers = st.artifact.Type, nil
		for _, f := range st.artifact.Files {
			i.Layers = append(i.Layers, f.Blob.Digest)
		}
	}
	for _, t := range st.rec.Tags {
		i.RepoTags = append(i.RepoTags, t.Name)
	}
	slices.Sort(i.RepoTags)
	seen := map[int]bool{}
	for _, l := range st.rec.Layers {
		if !seen[l.Dir] {
			seen[l.Dir] = true
			i.Size += l.Bytes
		}
	}
	i.Pinned = s.pinned(i)
	return i
}

func (s *Store) pinned(i *Image) bool {
	for _, p := range s.live.Load().Pinned {
		if match(p, i.ID) || slices.ContainsFunc(i.RepoTags, func(t string) bool { return match(p, t) }) ||
			slices.ContainsFunc(i.RepoDigests, func(t string) bool { return match(p, t) }) {
			return true
		}
		if named, err := normalize(p); err == nil && slices.Contains(i.RepoTags, named.String()) {
			return true
		}
	}
	return false
}

// match compares with a pattern in which "*" is any text, "/" too.
func match(pattern, s string) bool {
	pattern, s = strings.ReplaceAll(pattern, "/", "\x01"), strings.ReplaceAll(s, "/", "\x01")
	ok, err := path.Match(pattern, s)
	return err == nil && ok
}

// List returns all images, in the order of their IDs. The images are shared
// and must not be changed.
func (s *Store) List() []*Image { return slices.Clone(s.snap.Load().list) }

const (
	minPrefix = 12 // digits of an ID that are enough, as with other runtimes
	maxRef    = 4096
)

// Resolve finds an image by ID ("sha256:…", bare digits, or at least 12 of
// them), tag or digest; names may be short, as in docker.io/library.
func (s *Store) Resolve(ref string) (*Image, error) {
	n := s.snap.Load()
	if len(ref) > maxRef {
		return nil, errs.New(errs.InvalidArgument, "resolve image: the reference has %d bytes", len(ref))
	}
	if i := n.byID[ref]; i != nil {
		return i, nil
	}
	if i := n.byID["sha256:"+ref]; i != nil {
		return i, nil
	}
	named, err := normalize(ref)
	if err == nil {
		if i := n.byReference(named); i != nil {
			return i, nil
		}
	}
	if prefix := strings.TrimPrefix(ref, "sha256:"); len(prefix) >= minPrefix && isHex(prefix) {
		return n.byPrefix(prefix)
	}
	if err != nil {
		return nil, err
	}
	return nil, errs.New(errs.NotFound, "image %s is not on this node", named)
}

// byReference looks a name up; with tag and digest it is the digest that counts.
func (n *snapshot) byReference(named reference.Named) *Image {
	if d, ok := named.(reference.Digested); ok {
		return n.byName[named.Name()+"@"+d.Digest().String()]
	}
	return n.byName[named.String()]
}

func (n *snapshot) byPrefix(prefix string) (*Image, error) {
	full := "sha256:" + prefix
	at, _ := slices.BinarySearchFunc(n.list, full, func(i *Image, id string) int { return cmp.Compare(i.ID, id) })
	if at == len(n.list) || !strings.HasPrefix(n.list[at].ID, full) {
		return nil, errs.New(errs.NotFound, "image %.80s is not on this node", prefix)
	}
	if at+1 < len(n.list) && strings.HasPrefix(n.list[at+1].ID, full) {
		return nil, errs.New(errs.InvalidArgument, "image ID %.80s is the start of several, give more digits", prefix)
	}
	return n.list[at], nil
}

func isHex(s string) bool {
	return strings.Trim(s, "0123456789abcdef") == ""
}

// normalize reads a reference and gives it host, path and, without a digest, a
// tag. The grammar leaves no room for user names, ".." or control characters.
func normalize(ref string) (reference.Named, error) {
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return nil, errs.New(errs.InvalidArgument, "read image reference %.200q: %w", ref, err)
	}
	if d, ok := named.(reference.Digested); ok {
		if err := manifest.CheckDigest(d.Digest()); err != nil {
			return nil, errs.Wrap(errs.InvalidArgument, err)
		}
	}
	return reference.TagNameOnly(named), nil
}
