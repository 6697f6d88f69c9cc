package unpack

import (
	"archive/tar"
	"errors"
	"fmt"
	"path"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/images/internal/tree"
	"github.com/naru-project/naru/internal/sys"
)

// Names are resolved as if the layer's root were "/", and never into another
// mount or through /proc's links.
const inRoot = unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV

// parent gives a descriptor of the folder dir ("/a/b"), which is made when it
// is not there. The cache owns it; it stays open while the entry is made.
func (e *extractor) parent(dir string, hops int) (int, error) {
	if dir == "/" {
		return e.root, nil
	}
	if fd, ok := e.cache.get(dir); ok {
		return fd, nil
	}
	fd, err := sys.Openat2(e.root, dir[1:], unix.O_PATH|unix.O_DIRECTORY, 0, inRoot)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		fd, err = e.makeDir(dir, hops)
	}
	if err != nil {
		return -1, fmt.Errorf("open its folder: %w", err)
	}
	e.cache.put(dir, fd)
	return fd, nil
}

// existing is parent for a folder that must be there already.
func (e *extractor) existing(dir string) (int, error) {
	if dir == "/" {
		return e.root, nil
	}
	if fd, ok := e.cache.get(dir); ok {
		return fd, nil
	}
	fd, err := sys.Openat2(e.root, dir[1:], unix.O_PATH|unix.O_DIRECTORY, 0, inRoot)
	if err != nil {
		return -1, err
	}
	e.cache.put(dir, fd)
	return fd, nil
}

// makeDir makes the folder dir, and the ones above it, which the archive has
// no entry for: 0755 and root's.
func (e *extractor) makeDir(dir string, hops int) (int, error) {
	parent, err := e.parent(path.Dir(dir), hops)
	if err != nil {
		return -1, err
	}
	base := path.Base(dir)
	err = unix.Mkdirat(parent, base, 0o700)
	if errors.Is(err, unix.EEXIST) {
		return e.inPlaceOf(parent, base, dir, hops)
	}
	if err != nil {
		return -1, err
	}
	return e.implicit(parent, base, dir, false)
}

func (e *extractor) implicit(parent int, base, name string, opaque bool) (int, error) {
	if err := e.count(); err != nil {
		return -1, err
	}
	e.made(blockSize)
	fd, err := openDir(parent, base)
	if err != nil {
		return -1, err
	}
	err = unix.Fchown(fd, 0, 0) // the group may have come from a setgid folder
	if err == nil {
		err = unix.Fchmod(fd, 0o755)
	}
	if err == nil && opaque {
		err = e.setOpaque(fd, name)
	}
	if err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// inPlaceOf deals with something that is where a folder is needed: a link to
// nowhere has its target made, inside the root; a whiteout gives way to a
// folder that hides what is below; anything else is the archive's error.
func (e *extractor) inPlaceOf(parent int, base, dir string, hops int) (int, error) {
	var st unix.Stat_t
	if err := unix.Fstatat(parent, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return -1, err
	}
	switch {
	case st.Mode&unix.S_IFMT == unix.S_IFLNK:
		if hops++; hops > maxHops {
			return -1, unix.ELOOP
		}
		target, err := e.target(parent, base)
		if err != nil {
			return -1, err
		}
		if target == "/" {
			return dupDir(e.root)
		}
		fd, err := e.parent(target, hops)
		if err != nil {
			return -1, err
		}
		return dupDir(fd)
	case isWhiteout(&st):
		if err := e.replace(parent, base); err != nil {
			return -1, err
		}
		if err := unix.Mkdirat(parent, base, 0o700); err != nil {
			return -1, err
		}
		return e.implicit(parent, base, dir, true)
	case st.Mode&unix.S_IFMT == unix.S_IFDIR:
		return openDir(parent, base)
	}
	return -1, fmt.Errorf("%.100q: %w", dir, unix.ENOTDIR)
}

// target is where the link base in the folder parent points, as a name below
// the root; ".." in it ends at the root.
func (e *extractor) target(parent int, base string) (string, error) {
	buf := make([]byte, pathMax)
	n, err := unix.Readlinkat(parent, base, buf)
	if err != nil {
		return "", err
	}
	to := string(buf[:n])
	if !path.IsAbs(to) {
		above, err := realPath(parent)
		if err != nil {
			return "", err
		}
		root, err := realPath(e.root)
		if err != nil {
			return "", err
		}
		to = strings.TrimPrefix(above, root) + "/" + to
	}
	return e.clean(to)
}

func realPath(fd int) (string, error) {
	buf := make([]byte, 4*pathMax)
	n, err := unix.Readlink("/proc/self/fd/"+strconv.Itoa(fd), buf)
	if err != nil {
		return "", err
	}
	return string(buf[:n]), nil
}

func dupDir(fd int) (int, error) {
	return unix.Openat(fd, ".", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
}

func openDir(parent int, base string) (int, error) {
	return unix.Openat(parent, base, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
}

// dir makes a folder, or gives the one that is there its attributes.
func (e *extractor) dir(parent int, base, name string, hdr *tar.Header) error {
	opaque := false
	err := unix.Mkdirat(parent, base, 0o700)
	if errors.Is(err, unix.EEXIST) {
		var st unix.Stat_t
		if err := unix.Fstatat(parent, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR {
			// It was a whiteout or a file of this layer, so that what a lower
			// layer has under this name is gone already.
			if err := e.replace(parent, base); err != nil {
				return err
			}
			if err := unix.Mkdirat(parent, base, 0o700); err != nil {
				return err
			}
			opaque = true
			e.made(blockSize)
		}
	} else if err != nil {
		return err
	} else {
		e.made(blockSize)
	}
	fd, err := openDir(parent, base)
	if err != nil {
		return err
	}
	if err = e.attributes(fd, hdr, unix.S_IFDIR); err == nil && opaque {
		err = e.setOpaque(fd, name)
	}
	if err != nil {
		_ = unix.Close(fd)
		return err
	}
	e.cache.put(name, fd)
	e.later(name, hdr)
	return nil
}

func (e *extractor) setOpaque(fd int, name string) error {
	if err := unix.Fsetxattr(fd, "trusted.overlay.opaque", []byte("y"), 0); err != nil {
		return fmt.Errorf("mark folder opaque: %w", err)
	}
	if e.names += len(name); e.names <= namesBuffer {
		e.opaque = append(e.opaque, name)
	}
	return nil
}

// dropWhiteouts removes the whiteouts in opaque folders: they say nothing
// there, and overlayfs, which reads a folder that only one layer has without
// looking, would list them as names that cannot be opened.
func (e *extractor) dropWhiteouts() error {
	for _, name := range e.opaque {
		fd, err := sys.Openat2(e.root, name[1:], unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0, inRoot)
		if err != nil {
			continue // replaced since
		}
		err = tree.Entries(e.ctx, fd, func(child string) error {
			var st unix.Stat_t
			if err := unix.Fstatat(fd, child, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil || !isWhiteout(&st) {
				return err
			}
			e.res.Inodes--
			return unix.Unlinkat(fd, child, 0)
		})
		_ = unix.Close(fd)
		if err != nil {
			return fmt.Errorf("clean opaque folder %.200q: %w", name, err)
		}
	}
	return nil
}

// dirTime is the time of a folder, set when everything in it is made.
type dirTime struct {
	name string
	ts   [2]unix.Timespec
}

func (e *extractor) later(name string, hdr *tar.Header) {
	e.times = append(e.times, dirTime{name, timesOf(hdr)})
	if e.names += len(name); e.names > namesBuffer {
		e.applyTimes() // entries that come later then touch some folders again
	}
}

// applyTimes sets the times of folders. One that is no folder any more, or not
// there, was replaced by a later entry.
func (e *extractor) applyTimes() {
	for _, t := range e.times {
		fd := e.root
		if t.name != "/" {
			var err error
			fd, err = sys.Openat2(e.root, t.name[1:], unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0, inRoot)
			if err != nil {
				continue
			}
		}
		_ = unix.UtimesNanoAt(fd, "", t.ts[:], unix.AT_EMPTY_PATH)
		if fd != e.root {
			_ = unix.Close(fd)
		}
	}
	e.times, e.names = e.times[:0], 0
}

// dirCache keeps the folders used last open. An entry stays true as long as
// nothing is removed from the tree: making things cannot change what a name
// that resolved already means.
type dirCache struct {
	slots [16]struct {
		name string
		fd   int
		used uint64
	}
	clock uint64
	stale []int // forgotten by flush, perhaps still in use by the current entry
}

func (c *dirCache) get(name string) (int, bool) {
	for i := range c.slots {
		if s := &c.slots[i]; s.name == name {
			c.clock++
			s.used = c.clock
			return s.fd, true
		}
	}
	return -1, false
}

func (c *dirCache) put(name string, fd int) {
	oldest := &c.slots[0]
	for i := range c.slots {
		s := &c.slots[i]
		if s.name == name {
			oldest = s
			break
		}
		if s.used < oldest.used {
			oldest = s
		}
	}
	if oldest.name != "" {
		_ = unix.Close(oldest.fd) // at most the three newest are in use
	}
	c.clock++
	oldest.name, oldest.fd, oldest.used = name, fd, c.clock
}

// flush forgets everything: something was removed from the tree.
func (c *dirCache) flush() {
	for i := range c.slots {
		if s := &c.slots[i]; s.name != "" {
			c.stale = append(c.stale, s.fd)
			s.name, s.used = "", 0
		}
	}
}

// reap closes what the last entry may still have used.
func (c *dirCache) reap() {
	for _, fd := range c.stale {
		_ = unix.Close(fd)
	}
	c.stale = c.stale[:0]
}

func (c *dirCache) close() {
	c.flush()
	c.reap()
}
