// Package atomicfile replaces files so that a reader, or the next start after
// a crash, sees the old content or the new one and nothing between.
package atomicfile

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// TempPrefix starts the names of files that were not finished; whoever reads a
// folder skips them, and CleanTemp removes them.
const TempPrefix = ".tmp-"

// Write makes data the content of path. With sync, file and folder are on the
// disk when it returns; without, only the order (content before name) holds
// as far as the file system keeps it.
func Write(path string, data []byte, perm fs.FileMode, sync bool) (err error) {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, TempPrefix+"*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	tmp := f.Name()
	defer func() {
		if err != nil {
			_ = f.Close()
			_ = os.Remove(tmp)
			err = fmt.Errorf("write %s: %w", path, err)
		}
	}()
	if perm != 0o600 { // what CreateTemp gives
		if err = f.Chmod(perm); err != nil {
			return err
		}
	}
	if _, err = f.Write(data); err != nil {
		return err
	}
	if sync {
		if err = f.Sync(); err != nil {
			return err
		}
	}
	if err = f.Close(); err != nil {
		return err
	}
	if err = os.Rename(tmp, path); err != nil {
		return err
	}
	if sync {
		return SyncDir(dir)
	}
	return nil
}

// Remove removes path; one that is not there is no error.
func Remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
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
