package cgroup

import (
	"errors"
	"io/fs"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
)

// maxFile bounds what is read of one cgroup file; cgroup.procs is read in
// pieces instead.
const maxFile = 64 << 10

// openAt opens a file of a hierarchy, relative to its folder.
func openAt(dir int, name string, flags int) (int, error) {
	for {
		fd, err := unix.Openat(dir, name, flags|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

// writeAt writes value with a single write(2), as cgroup files require.
func writeAt(dir int, name, value string) error {
	fd, err := openAt(dir, name, unix.O_WRONLY)
	if err != nil {
		return &fs.PathError{Op: "open", Path: name, Err: err}
	}
	defer unix.Close(fd)
	if value == "" {
		value = "\n" // an empty write is not delivered to the kernel's handler
	}
	for {
		_, err = unix.Write(fd, []byte(value))
		if err != unix.EINTR {
			break
		}
	}
	if err != nil {
		return &fs.PathError{Op: "write " + strconv.Quote(clip(value)) + " to", Path: name, Err: err}
	}
	return nil
}

// readAt reads a whole, small file.
func readAt(dir int, name string) ([]byte, error) {
	fd, err := openAt(dir, name, unix.O_RDONLY)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	defer unix.Close(fd)
	b := make([]byte, 0, 512)
	for len(b) < maxFile {
		if len(b) == cap(b) {
			b = append(b, 0)[:len(b)]
		}
		n, err := unix.Read(fd, b[len(b):cap(b)])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, &fs.PathError{Op: "read", Path: name, Err: err}
		}
		if n == 0 {
			break
		}
		b = b[:len(b)+n]
	}
	return b, nil
}

func readStringAt(dir int, name string) (string, error) {
	b, err := readAt(dir, name)
	return strings.TrimSpace(string(b)), err
}

// readUintAt reads a number; "max" and what does not fit are MaxUint64.
func readUintAt(dir int, name string) (uint64, error) {
	s, err := readStringAt(dir, name)
	if err != nil {
		return 0, err
	}
	if s == "max" {
		return ^uint64(0), nil
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil && !errors.Is(err, strconv.ErrRange) {
		return 0, errs.New(errs.Internal, "read %s: %q is no number", name, clip(s))
	}
	return n, nil
}

// keyed finds "key value" in a flat keyed file.
func keyed(b []byte, key string) (uint64, bool) {
	for _, line := range strings.Split(string(b), "\n") {
		if v, ok := strings.CutPrefix(line, key+" "); ok {
			n, err := strconv.ParseUint(strings.TrimSpace(v), 10, 64)
			return n, err == nil
		}
	}
	return 0, false
}

func exists(dir int, name string) bool {
	return unix.Faccessat(dir, name, unix.F_OK, unix.AT_SYMLINK_NOFOLLOW) == nil
}

func clip(s string) string {
	if len(s) > 64 {
		return s[:64] + "…"
	}
	return s
}

// classify gives an error of a system call on a cgroup file the class that
// says whose fault it is.
func classify(err error, format string, args ...any) error {
	class := errs.Of(err)
	switch {
	case class != errs.Internal: // it says so itself
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ERANGE), errors.Is(err, unix.EOVERFLOW),
		errors.Is(err, unix.ENOTDIR), errors.Is(err, unix.ENAMETOOLONG):
		class = errs.InvalidArgument
	case errors.Is(err, unix.EBUSY), errors.Is(err, unix.EOPNOTSUPP):
		class = errs.FailedPrecondition
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV):
		class = errs.NotFound
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENOMEM), errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE):
		class = errs.ResourceExhausted
	}
	return errs.New(class, format+": %w", append(args, err)...)
}
