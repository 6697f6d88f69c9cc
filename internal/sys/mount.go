package sys

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// FsOption is one option of a new file system: Key=Value, or a flag without a
// value, or a descriptor.
type FsOption struct {
	Key, Value string
	Flag       bool
}

// NewFs makes a new file system of the given type as a detached mount
// (fsopen(2), fsmount(2)). attrs are MOUNT_ATTR_*.
func NewFs(fstype string, attrs int, opts ...FsOption) (*os.File, error) {
	fd, err := unix.Fsopen(fstype, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("fsopen %s: %w", fstype, err)
	}
	defer func() { _ = unix.Close(fd) }()
	for _, o := range opts {
		if o.Flag {
			err = unix.FsconfigSetFlag(fd, o.Key)
		} else {
			err = unix.FsconfigSetString(fd, o.Key, o.Value)
		}
		if err != nil {
			return nil, fmt.Errorf("set %s=%s of a new %s: %w%s", o.Key, o.Value, fstype, err, fsLog(fd))
		}
	}
	if err := unix.FsconfigCreate(fd); err != nil {
		return nil, fmt.Errorf("create a %s: %w%s", fstype, err, fsLog(fd))
	}
	m, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, attrs)
	if err != nil {
		return nil, fmt.Errorf("fsmount %s: %w", fstype, err)
	}
	return os.NewFile(uintptr(m), fstype), nil
}

// fsLog returns what the kernel had to say about a file system context.
func fsLog(fd int) string {
	buf := make([]byte, 1024)
	n, err := unix.Read(fd, buf)
	if err != nil || n <= 2 {
		return ""
	}
	return " (" + string(buf[2:n]) + ")"
}

// CloneTree opens a detached copy of the mount (with recursive, of all mounts)
// at path below dirfd (open_tree(2)). An empty path clones dirfd itself.
func CloneTree(dirfd int, path string, recursive bool) (*os.File, error) {
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC)
	if recursive {
		flags |= unix.AT_RECURSIVE
	}
	if path == "" {
		flags |= unix.AT_EMPTY_PATH
	}
	fd, err := unix.OpenTree(dirfd, path, flags)
	if err != nil {
		return nil, &os.PathError{Op: "clone the mount", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// SetAttr changes attributes of a mount (mount_setattr(2)).
func SetAttr(m *os.File, recursive bool, attr unix.MountAttr) error {
	flags := uint(unix.AT_EMPTY_PATH)
	if recursive {
		flags |= unix.AT_RECURSIVE
	}
	if err := unix.MountSetattr(int(m.Fd()), "", flags, &attr); err != nil {
		return fmt.Errorf("mount_setattr %s: %w", m.Name(), err)
	}
	return nil
}

// Attach puts a detached mount on the directory or file that target (O_PATH)
// is, in the caller's mount namespace. No path is looked up.
func Attach(m, target *os.File) error {
	err := unix.MoveMount(int(m.Fd()), "", int(target.Fd()), "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
	if err != nil {
		return fmt.Errorf("attach %s on %s: %w", m.Name(), target.Name(), err)
	}
	return nil
}

// Getfd takes a copy of descriptor fd of the process behind pidfd
// (pidfd_getfd(2)). The copy is close-on-exec.
func Getfd(pidfd *os.File, fd int, name string) (*os.File, error) {
	n, err := unix.PidfdGetfd(int(pidfd.Fd()), fd, 0)
	if err != nil {
		return nil, fmt.Errorf("fetch descriptor %d (%s): %w", fd, name, err)
	}
	return os.NewFile(uintptr(n), name), nil
}

// OpenProc makes a procfs of our own, not attached anywhere, for the caller's
// PID namespace, and checks that it is one: nobody can have mounted over any
// file of it.
func OpenProc() (*os.File, error) {
	p, err := NewFs("proc", unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return nil, err
	}
	if err := CheckProc(p); err != nil {
		_ = p.Close()
		return nil, err
	}
	return p, nil
}

// CheckProc verifies that f is the root of a procfs (fstatfs magic, inode 1).
func CheckProc(f *os.File) error {
	var fs unix.Statfs_t
	var st unix.Stat_t
	if err := errors.Join(unix.Fstatfs(int(f.Fd()), &fs), unix.Fstat(int(f.Fd()), &st)); err != nil {
		return fmt.Errorf("check procfs: %w", err)
	}
	if fs.Type != unix.PROC_SUPER_MAGIC || st.Ino != 1 {
		return fmt.Errorf("%s is not the root of a procfs (type %#x, inode %d)", f.Name(), fs.Type, st.Ino)
	}
	return nil
}

// OpenBeneath opens a file strictly below dir, with no symlink and no mount
// crossed: for procfs and cgroup files.
func OpenBeneath(dir *os.File, name string, flags int) (*os.File, error) {
	fd, err := Openat2(int(dir.Fd()), name, flags, 0, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS|unix.RESOLVE_NO_XDEV)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: dir.Name() + "/" + name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}

// WriteBeneath writes one value into a file opened by OpenBeneath.
func WriteBeneath(dir *os.File, name, value string) error {
	f, err := OpenBeneath(dir, name, unix.O_WRONLY)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	if _, err := f.WriteString(value); err != nil {
		return fmt.Errorf("write %q: %w", value, err)
	}
	return nil
}
