package sys

import (
	"errors"
	"fmt"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// inRoot resolves as if dirfd were "/": no path, symlink or ".." leaves it, and
// no magic link (/proc/PID/fd/N) is followed (openat2(2)).
const inRoot = unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS

// Openat2 is openat2(2) with close-on-exec, tried again on EAGAIN (a rename
// raced with the resolution) and EINTR a bounded number of times.
func Openat2(dirfd int, name string, flags int, mode uint32, resolve uint64) (int, error) {
	how := unix.OpenHow{Flags: uint64(flags) | unix.O_CLOEXEC, Mode: uint64(mode), Resolve: resolve}
	for try := 0; ; try++ {
		fd, err := unix.Openat2(dirfd, name, &how)
		if err == nil {
			return fd, nil
		}
		if try < 128 && (errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR)) {
			continue
		}
		return -1, err
	}
}

// OpenInRoot opens name below root, resolved as inside the container. The
// caller closes the file. flags may be O_PATH.
func OpenInRoot(root *os.File, name string, flags int) (*os.File, error) {
	fd, err := Openat2(int(root.Fd()), name, flags, 0, inRoot)
	if err != nil {
		return nil, &os.PathError{Op: "open in the root file system", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}

// OpenRealDir opens a directory below root whose path has no symlink at all,
// making it when it is absent. It is for /proc, /sys and /dev, which an image
// must not redirect (CVE-2019-19921 and its kind).
func OpenRealDir(root *os.File, name string) (*os.File, error) {
	const resolve = inRoot | unix.RESOLVE_NO_SYMLINKS
	rel := strings.TrimPrefix(name, "/")
	fd, err := Openat2(int(root.Fd()), rel, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0, resolve)
	if errors.Is(err, unix.ENOENT) {
		if err := unix.Mkdirat(int(root.Fd()), rel, 0o755); err != nil && !errors.Is(err, unix.EEXIST) {
			return nil, &os.PathError{Op: "make the directory", Path: name, Err: err}
		}
		fd, err = Openat2(int(root.Fd()), rel, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0, resolve)
	}
	if err != nil {
		if errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENOTDIR) {
			return nil, fmt.Errorf("%s of the image must be an ordinary directory, it is a link or a file", name)
		}
		return nil, &os.PathError{Op: "open in the root file system", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}

// maxComponents bounds how deep EnsureInRoot makes directories.
const maxComponents = 256

// EnsureInRoot opens name below root with O_PATH, making what is missing of it:
// directories (0755), and at the end a directory or an empty file (0644).
// Every step is taken on descriptors resolved inside root, so a container that
// exchanges directories for links at the same time gains nothing.
func EnsureInRoot(root *os.File, name string, dir bool) (*os.File, error) {
	f, err := OpenInRoot(root, name, unix.O_PATH)
	if err == nil || !errors.Is(err, unix.ENOENT) {
		return f, err
	}
	parts := strings.Split(strings.Trim(path.Clean("/"+name), "/"), "/")
	if len(parts) > maxComponents {
		return nil, &os.PathError{Op: "make in the root file system", Path: name, Err: unix.ENAMETOOLONG}
	}
	for i := range parts {
		if err := ensureOne(root, "/"+strings.Join(parts[:i], "/"), parts[i], dir || i+1 < len(parts)); err != nil {
			return nil, &os.PathError{Op: "make in the root file system", Path: name, Err: err}
		}
	}
	return OpenInRoot(root, name, unix.O_PATH)
}

func ensureOne(root *os.File, parent, base string, dir bool) error {
	p, err := OpenInRoot(root, parent, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer func() { _ = p.Close() }()
	if dir {
		err = unix.Mkdirat(int(p.Fd()), base, 0o755)
	} else {
		err = unix.Mknodat(int(p.Fd()), base, unix.S_IFREG|0o644, 0)
	}
	if errors.Is(err, unix.EEXIST) {
		// There already, or a dangling link: the next open tells, and stays inside.
		var st unix.Stat_t
		if serr := unix.Fstatat(int(p.Fd()), base, &st, unix.AT_SYMLINK_NOFOLLOW); serr == nil && st.Mode&unix.S_IFMT == unix.S_IFLNK {
			if t, terr := OpenInRoot(root, parent+"/"+base, unix.O_PATH); terr == nil {
				return t.Close()
			}
			return fmt.Errorf("%s/%s is a link to nowhere", parent, base)
		}
		return nil
	}
	return err
}
