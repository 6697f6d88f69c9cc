package tree

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Usage is what a tree takes of its file system.
type Usage struct {
	Bytes, Inodes uint64
}

// maxOpen bounds the descriptors of a measurement on file systems that have no
// file handles; folders beyond it are not counted.
const maxOpen = 256

// maxLinks bounds the memory for files with several names; beyond it each name
// counts.
const maxLinks = 1 << 18

// Measure counts the allocated bytes and the inodes of the tree whose root is
// the directory fd. The tree may change all the time: folders that wait for
// their turn are remembered by file handle (open_by_handle_at(2)), not by name
// or descriptor, so neither renames nor depth lead anywhere else or cost more.
// Other file systems mounted in the tree are not entered.
func Measure(ctx context.Context, fd int) (Usage, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return Usage{}, fmt.Errorf("measure folder: %w", err)
	}
	m := meter{ctx: ctx, root: fd, dev: uint64(st.Dev), seen: map[uint64]struct{}{}}
	defer m.close()
	m.noHandles = !handlesWork(fd)
	m.count(&st)
	dup, err := unix.Openat(fd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return Usage{}, fmt.Errorf("measure folder: %w", err)
	}
	if err := m.folder(dup); err != nil {
		return Usage{}, err
	}
	for len(m.todo) > 0 {
		next := m.todo[len(m.todo)-1]
		m.todo = m.todo[:len(m.todo)-1]
		fd, err := m.open(next)
		if errors.Is(err, unix.ESTALE) || errors.Is(err, unix.ENOENT) {
			continue // removed meanwhile
		}
		if err != nil {
			return Usage{}, fmt.Errorf("measure folder: %w", err)
		}
		if err := m.folder(fd); err != nil {
			return Usage{}, err
		}
	}
	return m.sum, nil
}

// handlesWork tries it: the file system may have no handles, the process may
// lack CAP_DAC_READ_SEARCH.
func handlesWork(fd int) bool {
	h, _, err := unix.NameToHandleAt(fd, "", unix.AT_EMPTY_PATH)
	if err != nil {
		return false
	}
	got, err := unix.OpenByHandleAt(fd, h, unix.O_PATH|unix.O_CLOEXEC)
	if err != nil {
		return false
	}
	_ = unix.Close(got)
	return true
}

type meter struct {
	ctx       context.Context
	root      int
	dev       uint64
	sum       Usage
	seen      map[uint64]struct{}
	todo      []pending
	opened    int
	noHandles bool
}

// pending is a folder still to be read: a handle, or a descriptor where the
// file system has none.
type pending struct {
	handle unix.FileHandle
	fd     int
}

func (m *meter) close() {
	for _, p := range m.todo {
		if p.fd >= 0 {
			_ = unix.Close(p.fd)
		}
	}
}

func (m *meter) open(p pending) (int, error) {
	if p.fd >= 0 {
		m.opened--
		return p.fd, nil
	}
	return unix.OpenByHandleAt(m.root, p.handle, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC)
}

// folder reads one folder and closes fd.
func (m *meter) folder(fd int) error {
	defer func() { _ = unix.Close(fd) }()
	err := Entries(m.ctx, fd, func(name string) error {
		var st unix.Stat_t
		err := unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT)
		if errors.Is(err, unix.ENOENT) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("measure folder: %w", err)
		}
		if uint64(st.Dev) != m.dev {
			return nil
		}
		m.count(&st)
		if st.Mode&unix.S_IFMT == unix.S_IFDIR {
			m.later(fd, name)
		}
		return nil
	})
	if errors.Is(err, unix.ENOENT) { // the folder itself went away while it was read
		return nil
	}
	return err
}

func (m *meter) later(dir int, name string) {
	if !m.noHandles {
		h, _, err := unix.NameToHandleAt(dir, name, 0)
		if err == nil {
			m.todo = append(m.todo, pending{handle: h, fd: -1})
			return
		}
		if errors.Is(err, unix.ENOENT) {
			return
		}
		m.noHandles = true
	}
	if m.opened >= maxOpen {
		return
	}
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err == nil {
		m.opened++
		m.todo = append(m.todo, pending{fd: fd})
	}
}

func (m *meter) count(st *unix.Stat_t) {
	if st.Nlink > 1 && st.Mode&unix.S_IFMT != unix.S_IFDIR {
		if _, dup := m.seen[st.Ino]; dup {
			return
		}
		if len(m.seen) < maxLinks {
			m.seen[st.Ino] = struct{}{}
		}
	}
	m.sum.Inodes++
	m.sum.Bytes += uint64(st.Blocks) * 512
}
