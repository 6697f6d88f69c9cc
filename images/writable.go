package images

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/naru-project/naru/images/internal/tree"
	"github.com/naru-project/naru/internal/errs"
)

const (
	upperName   = "upper"
	workName    = "work"
	placesName  = "places"
	sparePrefix = ".spare-" // no name of a container
)

// maxSpare is how many folders wait for their container.
const maxSpare = 2

// NewWritable makes the folders of a container. The folder above them is for
// root only. Safe to repeat.
func (s *Store) NewWritable(_ context.Context, containerID string) (w Writable, err error) {
	if err := checkName("container", containerID); err != nil {
		return w, err
	}
	if w.Places, err = s.places(); err != nil {
		return w, err
	}
	dir := filepath.Join(s.dirs.writable.Name(), containerID)
	w.Upper, w.Work = filepath.Join(dir, upperName), filepath.Join(dir, workName)
	if err := s.placeSpare(dir); err != nil {
		return w, noSpace("make writable folder", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.usage[containerID] == nil {
		s.usage[containerID] = &usage{last: Usage{Bytes: 4096, Inodes: 1, Time: time.Now()}} // the empty upper folder
	}
	s.begin(s.fillSpare)
	return w, nil
}

// placeSpare gives a folder that was made before the name dir, unless there is
// one of that name already.
func (s *Store) placeSpare(dir string) (err error) {
	if _, err := os.Lstat(filepath.Join(dir, workName)); err == nil { // the last that is made
		return nil
	}
	var spare string
	select {
	case spare = <-s.spare:
	default:
		if spare, err = s.makeSpare(); err != nil {
			return err
		}
	}
	// os.Rename refuses to replace a folder, which rename(2) does if it is empty.
	if err := unix.Rename(spare, dir); err != nil {
		return errors.Join(&os.LinkError{Op: "rename", Old: spare, New: dir, Err: err}, os.RemoveAll(spare))
	}
	return nil
}

// makeSpare makes writable folders of nobody yet.
func (s *Store) makeSpare() (dir string, err error) {
	dir = filepath.Join(s.dirs.writable.Name(), sparePrefix+strconv.FormatUint(s.spares.Add(1), 10))
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}()
	for _, d := range []struct {
		path string
		mode os.FileMode
	}{{dir, 0o700}, {filepath.Join(dir, upperName), 0o755}, {filepath.Join(dir, workName), 0o700}} {
		if err := os.Mkdir(d.path, d.mode); err != nil {
			return "", err
		}
		if err := os.Chmod(d.path, d.mode); err != nil { // whatever the umask
			return "", err
		}
	}
	return dir, nil
}

// fillSpare makes folders for the next containers, so that none of them waits
// for it.
func (s *Store) fillSpare() {
	for len(s.spare) < maxSpare && s.life.Err() == nil {
		dir, err := s.makeSpare()
		if err != nil {
			return // who needs one says so
		}
		select {
		case s.spare <- dir:
		default:
			_ = os.RemoveAll(dir)
			return
		}
	}
}

// removeSpare removes the folders that are nobody's, also those that a killed
// daemon left.
func (s *Store) removeSpare() error {
	if s.dirs.writable == nil {
		return nil
	}
	list, err := os.ReadDir(s.dirs.writable.Name())
	all := []error{err}
	for _, d := range list {
		if strings.HasPrefix(d.Name(), sparePrefix) {
			all = append(all, os.RemoveAll(filepath.Join(s.dirs.writable.Name(), d.Name())))
		}
	}
	return errors.Join(all...)
}

// places returns a layer with what every container gets mounts on. Below all
// layers of the image it is seen only where they have nothing of that name;
// without it these would be made in the writable layer, each time anew.
func (s *Store) places() (string, error) {
	path := filepath.Join(s.cfg.Root, placesName)
	if s.hasPlaces.Load() {
		return path, nil
	}
	if err := makePlaces(path); err != nil { // the disk may be full now and not later
		return "", noSpace("make the layer of mount points", err)
	}
	s.hasPlaces.Store(true)
	return path, nil
}

func makePlaces(path string) error {
	for _, name := range []string{"", "dev", "proc", "sys", "etc"} {
		dir := filepath.Join(path, name)
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("make the layer of mount points: %w", err)
		}
		if err := os.Chmod(dir, 0o755); err != nil {
			return fmt.Errorf("make the layer of mount points: %w", err)
		}
	}
	for _, name := range []string{"hosts", "hostname", "resolv.conf"} {
		f, err := os.OpenFile(filepath.Join(path, "etc", name), os.O_CREATE|os.O_WRONLY|unix.O_NOFOLLOW, 0o644)
		if err == nil {
			err = errors.Join(f.Chmod(0o644), f.Close())
		}
		if err != nil {
			return fmt.Errorf("make the layer of mount points: %w", err)
		}
	}
	return nil
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
