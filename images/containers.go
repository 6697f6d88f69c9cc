package images

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/images/layers"
	"github.com/naru-project/naru/internal/atomicfile"
	"github.com/naru-project/naru/internal/errs"
)

const (
	emptyName = "empty"
)

func isNoSpace(err error) bool {
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)
}

// checkName accepts what may become a file name: container IDs, and what other
// callers make of them.
func checkName(what, name string) error {
	ok := name != "" && len(name) <= 200 && name[0] != '.' && strings.Trim(name,
		"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-") == ""
	if !ok {
		return errs.New(errs.InvalidArgument, "%s %.100q is no plain name", what, name)
	}
	return nil
}

// Layers returns the folders of an image's layers, topmost first, and holds
// them for owner until ReleaseOwner: they stay when the image is removed, and
// over a restart. An owner may hold several images. An image without layers
// gives one empty folder.
func (s *Store) Layers(_ context.Context, imageID, owner string) ([]string, error) {
	if err := checkName("owner", owner); err != nil {
		return nil, err
	}
	s.mu.Lock()
	h := s.holds[owner]
	if h != nil {
		for _, i := range h.images {
			if i.id == imageID {
				s.mu.Unlock()
				return s.stack(i.layers)
			}
		}
	}
	st := s.images[imageID]
	if st == nil {
		s.mu.Unlock()
		return nil, errs.New(errs.NotFound, "image %.100s is not on this node", imageID)
	}
	held := heldImage{id: imageID}
	for _, l := range st.layers {
		held.layers = append(held.layers, s.layers.Share(l))
	}
	next := &hold{}
	if h != nil {
		next.images, next.rest = slices.Clone(h.images), h.rest
	}
	next.images = append(next.images, held)
	s.holds[owner] = next
	data, err := next.file(owner)
	s.mu.Unlock()
	if err == nil {
		// Not synced: a crash of the machine ends the container too.
		err = atomicfile.Write(s.holdPath(owner), data, 0o600, false)
	}
	if err != nil {
		return nil, errors.Join(noSpace("hold layers", err), s.ReleaseOwner(context.Background(), owner))
	}
	return s.stack(held.layers)
}

func (s *Store) holdPath(owner string) string {
	return filepath.Join(s.dirs.holds.Name(), owner+".json")
}

func (s *Store) stack(ls []*layers.Layer) ([]string, error) {
	if len(ls) > 0 {
		return s.layers.Stack(infos(ls)), nil
	}
	path := filepath.Join(s.cfg.Root, emptyName)
	if err := os.Mkdir(path, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("make empty layer: %w", err)
	}
	return []string{path}, nil
}

// ReleaseOwner gives back all that owner holds. Unknown owners are no error.
func (s *Store) ReleaseOwner(_ context.Context, owner string) error {
	if err := checkName("owner", owner); err != nil {
		return err
	}
	s.mu.Lock()
	h := s.holds[owner]
	delete(s.holds, owner)
	s.mu.Unlock()
	err := atomicfile.Remove(s.holdPath(owner))
	if h == nil {
		return err
	}
	return errors.Join(err, s.layers.Release(h.all()...))
}

// Sweep removes writable folders and holds whose owner is not in known. The
// pod manager calls it once it knows what there is.
func (s *Store) Sweep(ctx context.Context, known map[string]bool) error {
	var all []error
	s.mu.Lock()
	var owners []string
	for o := range s.holds {
		if !known[o] {
			owners = append(owners, o)
		}
	}
	s.mu.Unlock()
	for _, o := range owners {
		all = append(all, s.ReleaseOwner(ctx, o))
	}
	list, err := os.ReadDir(s.dirs.writable.Name())
	all = append(all, err)
	for _, d := range list {
		if known[d.Name()] || strings.HasPrefix(d.Name(), sparePrefix) {
			continue
		}
		s.mu.Lock()
		delete(s.usage, d.Name())
		s.mu.Unlock()
		all = append(all, s.trash.Put(int(s.dirs.writable.Fd()), d.Name()))
	}
	return errors.Join(all...)
}
