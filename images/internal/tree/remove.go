// Package tree removes and measures folder trees that strangers filled: by
// descriptors only, never following a link, however deep or wide they are.
//
// Functions may be called concurrently on different trees.
package tree

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// maxDepth is how far Remove recurses, which is also how many descriptors it
// holds. What lies deeper is first moved up.
const maxDepth = 32

var spilled atomic.Uint64

// Remove removes name below the directory dirfd, whatever it is. Folders
// deeper than a bound are renamed into spill, a directory of the same file
// system that nobody else uses, and removed from there: a chain of 100,000
// folders then costs no more memory than a flat one. Absent is no error.
func Remove(ctx context.Context, dirfd int, name string, spill int) error {
	r := remover{ctx: ctx, spill: spill}
	if err := r.remove(dirfd, name, 0); err != nil {
		return err
	}
	for len(r.queue) > 0 {
		next := r.queue[len(r.queue)-1]
		r.queue = r.queue[:len(r.queue)-1]
		if err := r.remove(spill, next, 0); err != nil {
			return err
		}
	}
	return nil
}

type remover struct {
	ctx   context.Context
	spill int
	queue []string
}

func (r *remover) remove(dirfd int, name string, depth int) error {
	err := unlink(dirfd, name, 0)
	if err == nil || errors.Is(err, unix.ENOENT) {
		return nil
	}
	if !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("remove %.100q: %w", name, err)
	}
	if depth >= maxDepth {
		moved := fmt.Sprintf("deep-%d-%d", os.Getpid(), spilled.Add(1))
		if err := unix.Renameat(dirfd, name, r.spill, moved); err != nil {
			return fmt.Errorf("move deep folder up: %w", err)
		}
		r.queue = append(r.queue, moved)
		return nil
	}
	for range 3 { // a container that still runs may add entries
		if err = r.empty(dirfd, name, depth); err != nil {
			return err
		}
		err = unlink(dirfd, name, unix.AT_REMOVEDIR)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.ENOTEMPTY) {
			break
		}
	}
	return fmt.Errorf("remove folder %.100q: %w", name, err)
}

func (r *remover) empty(dirfd int, name string, depth int) error {
	fd, err := unix.Openat(dirfd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open folder %.100q: %w", name, err)
	}
	defer func() { _ = unix.Close(fd) }()
	return Entries(r.ctx, fd, func(child string) error { return r.remove(fd, child, depth+1) })
}

// unlink takes away the immutable and append-only flags, which a privileged
// container may have set, when they stand in the way.
func unlink(dirfd int, name string, flags int) error {
	err := unix.Unlinkat(dirfd, name, flags)
	if !errors.Is(err, unix.EPERM) {
		return err
	}
	clearFlags(dirfd, ".")
	clearFlags(dirfd, name)
	return unix.Unlinkat(dirfd, name, flags)
}

func clearFlags(dirfd int, name string) {
	const immutable, appendOnly = 0x10, 0x20 // FS_IMMUTABLE_FL, FS_APPEND_FL (linux/fs.h)
	var st unix.Stat_t
	if unix.Fstatat(dirfd, name, &st, unix.AT_SYMLINK_NOFOLLOW) != nil {
		return
	}
	if t := st.Mode & unix.S_IFMT; t != unix.S_IFREG && t != unix.S_IFDIR {
		return // opening anything else could have an effect
	}
	fd, err := unix.Openat(dirfd, name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer func() { _ = unix.Close(fd) }()
	got, err := unix.IoctlGetUint32(fd, unix.FS_IOC_GETFLAGS)
	if err == nil && got&(immutable|appendOnly) != 0 {
		_ = unix.IoctlSetPointerInt(fd, unix.FS_IOC_SETFLAGS, int(got&^(immutable|appendOnly)))
	}
}

// Entries calls fn with the names in the directory fd, but "." and "..".
func Entries(ctx context.Context, fd int, fn func(name string) error) error {
	buf := make([]byte, 16<<10)
	var names []string
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := unix.Getdents(fd, buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("read folder: %w", err)
		}
		if n == 0 {
			return nil
		}
		_, _, names = unix.ParseDirent(buf[:n], -1, names[:0])
		for _, name := range names {
			if err := fn(name); err != nil {
				return err
			}
		}
	}
}
