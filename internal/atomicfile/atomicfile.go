// Package atomicfile replaces files so that a reader, or the next start after
// a crash, sees the old content or the new one and nothing between.
package atomicfile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/failpoint"
)

// TempPrefix starts the names of files that were not finished; whoever reads a
// folder skips them, and CleanTemp removes them.
const TempPrefix = ".tmp-"

// written numbers the unfinished files of this process.
var written atomic.Uint64

// Write makes data the content of path. With sync, file and folder are on the
// disk when it returns; without, a power loss may take the new content, and
// the old one with it: whoever reads must be able to tell (a checksum).
func Write(path string, data []byte, perm fs.FileMode, sync bool) (err error) {
	if err := failpoint.Hit("file", path, "write"); err != nil {
		return err
	}
	dir := filepath.Dir(path)
	fd, tmp, err := create(dir, perm)
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	done := false
	defer func() { // after a panic too
		if done {
			return
		}
		_ = os.Remove(tmp)
		if err != nil {
			err = fmt.Errorf("write %s: %w", path, err)
		}
	}()
	if err := fill(fd, data, perm, sync); err != nil {
		return err
	}
	if err := failpoint.Hit("file", path, "rename"); err != nil {
		return err
	}
	if !sync {
		err = exchange(tmp, path)
	} else if err = os.Rename(tmp, path); err == nil {
		err = SyncDir(dir)
	}
	done = err == nil
	return err
}

// create makes an unfinished file that is nobody else's.
func create(dir string, perm fs.FileMode) (fd int, name string, err error) {
	for {
		name = filepath.Join(dir, TempPrefix+strconv.Itoa(os.Getpid())+"-"+strconv.FormatUint(written.Add(1), 10))
		fd, err = unix.Open(name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_CLOEXEC, uint32(perm.Perm()))
		switch err {
		case nil:
			return fd, name, nil
		case unix.EEXIST, unix.EINTR: // a crash of a process with our number left it
		default:
			return -1, "", err
		}
	}
}

// fill writes data and closes fd.
func fill(fd int, data []byte, perm fs.FileMode, sync bool) (err error) {
	defer func() { err = errors.Join(err, unix.Close(fd)) }()
	if perm&0o077 != 0 { // the umask may have taken it
		if err := unix.Fchmod(fd, uint32(perm.Perm())); err != nil {
			return err
		}
	}
	for len(data) > 0 {
		n, err := unix.Write(fd, data)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		data = data[max(n, 0):]
	}
	if sync {
		return unix.Fsync(fd)
	}
	return nil
}

// exchange gives the file tmp the name path. A file that had it goes: by
// exchange and unlink, because ext4 takes a rename over a file as a wish to
// have the new content on the disk at once (auto_da_alloc), which costs ten
// times as much as all the rest.
func exchange(tmp, path string) error {
	err := unix.Renameat2(unix.AT_FDCWD, tmp, unix.AT_FDCWD, path, unix.RENAME_EXCHANGE)
	switch err {
	case nil:
	case unix.ENOENT, unix.EINVAL, unix.ENOSYS: // there is none yet; the file system cannot
		return os.Rename(tmp, path)
	default:
		return err
	}
	err = failpoint.Hit("file", path, "unlink the old one")
	if err == nil {
		err = unix.Unlink(tmp)
	}
	if err != nil { // a folder had the name
		return errors.Join(err, unix.Renameat2(unix.AT_FDCWD, tmp, unix.AT_FDCWD, path, unix.RENAME_EXCHANGE))
	}
	return nil
}

// Remove removes path, also a folder that somebody put in the file's place; one
// that is not there is no error.
func Remove(path string) error {
	if err := failpoint.Hit("file", path, "remove"); err != nil {
		return err
	}
	return os.RemoveAll(path)
}

// SyncDir makes the names in a folder durable.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	err = d.Sync()
	return errors.Join(err, d.Close())
}

// CleanTemp removes unfinished files that a crash left in dir.
func CleanTemp(dir string) error {
	names, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var all []error
	for _, n := range names {
		if strings.HasPrefix(n.Name(), TempPrefix) {
			all = append(all, Remove(filepath.Join(dir, n.Name())))
		}
	}
	return errors.Join(all...)
}
