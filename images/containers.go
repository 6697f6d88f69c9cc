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
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/naru-project/naru/images/internal/tree"
	"github.com/naru-project/naru/images/layers"
	"github.com/naru-project/naru/internal/atomicfile"
	"github.com/naru-project/naru/internal/errs"
)

const (
	upperName = "upper"
	workName  = "work"
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

// NewWritable makes the upper and work folders of a container, for overlayfs:
// on one file system, owned by the user that is root in the container. The
// folder above them is for root only. Safe to repeat.
func (s *Store) NewWritable(_ context.Context, containerID string, rootUID, rootGID uint32) (upper, work string, err error) {
	if err := checkName("container", containerID); err != nil {
		return "", "", err
	}
	dir := filepath.Join(s.dirs.writable.Name(), containerID)
	upper, work = filepath.Join(dir, upperName), filepath.Join(dir, workName)
	for _, d := range []struct {
		path  string
		mode  os.FileMode
		owned bool
	}{{dir, 0o700, false}, {upper, 0o755, true}, {work, 0o700, true}} {
		if err := os.Mkdir(d.path, d.mode); err != nil && !errors.Is(err, fs.ErrExist) {
			return "", "", noSpace("make writable folder", err)
		}
		if err := os.Chmod(d.path, d.mode); err != nil { // whatever the umask
			return "", "", fmt.Errorf("make writable folder: %w", err)
		}
		if !d.owned || rootUID == 0 && rootGID == 0 {
			continue
		}
		if err := os.Lchown(d.path, int(rootUID), int(rootGID)); err != nil {
			return "", "", fmt.Errorf("make writable folder: %w", err)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.usage[containerID] == nil {
		s.usage[containerID] = &usage{last: Usage{Bytes: 4096, Inodes: 1, Time: time.Now()}} // the empty upper folder
	}
	return upper, work, nil
}

// RemoveWritable removes a container's writable folders: out of the way at
// once, off the disk soon. Absent is no error.
func (s *Store) RemoveWritable(_ context.Context, containerID string) error {
	if err := checkName("container", containerID); err != nil {
		return err
	}
	s.mu.Lock()
	delete(s.usage, containerID)
	s.mu.Unlock()
	return s.trash.Put(int(s.dirs.writable.Fd()), containerID)
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
		if known[d.Name()] {
			continue
		}
		s.mu.Lock()
		delete(s.usage, d.Name())
		s.mu.Unlock()
		all = append(all, s.trash.Put(int(s.dirs.writable.Fd()), d.Name()))
	}
	return errors.Join(all...)
}

// usage is what a writable folder took when it was last counted. Guarded by
// Store.mu.
type usage struct {
	last     Usage
	counting bool
}

// WritableUsage returns what the container's writable folder took when it was
// last counted, and has it counted again in the background when that is some
// seconds ago. It never waits; before the first count after a restart the
// usage has no Time.
func (s *Store) WritableUsage(ctx context.Context, containerID string) (Usage, error) {
	if err := checkName("container", containerID); err != nil {
		return Usage{}, err
	}
	s.mu.Lock()
	u := s.usage[containerID]
	s.mu.Unlock()
	if u == nil {
		var st unix.Stat_t
		if err := unix.Fstatat(int(s.dirs.writable.Fd()), containerID, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return Usage{}, errs.New(errs.NotFound, "container %s has no writable folder", containerID)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if u = s.usage[containerID]; u == nil {
		u = &usage{}
		s.usage[containerID] = u
	}
	if !u.counting && time.Since(u.last.Time) >= s.cfg.UsageInterval {
		log := klog.FromContext(ctx)
		u.counting = s.begin(func() { s.count(log, containerID, u) })
	}
	return u.last, nil
}

// count measures one writable folder.
func (s *Store) count(log klog.Logger, containerID string, u *usage) {
	got, err := s.measure(containerID)
	s.mu.Lock()
	u.counting = false
	if err == nil {
		u.last = Usage{Bytes: got.Bytes, Inodes: got.Inodes, Time: time.Now()}
	}
	gone := s.usage[containerID] != u
	s.mu.Unlock()
	if err != nil && !gone && s.life.Err() == nil {
		log.Error(err, "Could not count the usage of a container's writable folder", "container", containerID)
	}
}

const measureTimeout = 5 * time.Minute

func (s *Store) measure(containerID string) (tree.Usage, error) {
	select {
	case s.meters <- struct{}{}:
	case <-s.life.Done():
		return tree.Usage{}, errClosed
	}
	defer func() { <-s.meters }()
	ctx, cancel := context.WithTimeout(s.life, measureTimeout)
	defer cancel()
	how := unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	}
	fd, err := unix.Openat2(int(s.dirs.writable.Fd()), containerID+"/"+upperName, &how)
	if err != nil {
		return tree.Usage{}, fmt.Errorf("open writable folder: %w", err)
	}
	defer func() { _ = unix.Close(fd) }()
	return tree.Measure(ctx, fd)
}
