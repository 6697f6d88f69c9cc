package sys

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// Guarded checks that an open file is of that kind (unix.S_IFDIR, S_IFREG) and
// that nobody but root can change it: who writes such a file runs programs as
// root, or gets any file of the host.
func Guarded(f *os.File, kind uint32) (*unix.Stat_t, error) {
	var st unix.Stat_t
	if err := unix.Fstat(FD(f), &st); err != nil {
		return nil, err
	}
	switch {
	case st.Mode&unix.S_IFMT != kind:
		return nil, errors.New("it is not what it should be, a folder or a regular file")
	case st.Uid != 0:
		return nil, fmt.Errorf("it belongs to user %d; root must own it (chown root:root)", st.Uid)
	case st.Mode&0o022 != 0:
		return nil, fmt.Errorf("others than root may write to it, mode %#o (chmod go-w)", st.Mode&0o7777)
	}
	return &st, nil
}

// ReadGuarded reads a whole file of the host that only root can change.
func ReadGuarded(path string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0) // a FIFO must not make us wait
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	if _, err := Guarded(f, unix.S_IFREG); err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = fmt.Errorf("it is larger than %d bytes", limit)
	}
	return data, err
}
