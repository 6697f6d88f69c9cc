// Package stdio makes and copies the standard streams of containers and execs,
// whoever starts them: FIFOs that outlive their readers, log files, and the
// streams of a session or a captured command.
//
// It must not know how a process is started.
//
// Concurrency: a Session or Capture belongs to one goroutine; what it copies
// with is its own, and Close waits for that.
package stdio

import (
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
)

// FIFOs are the streams of a container without a terminal: stdin, stdout and
// stderr, the container's ends and those that are kept for its life. Without
// standard input the first of each is nil.
type FIFOs struct{ Child, Kept [3]*os.File }

// NewFIFOs makes FIFOs in dir that belong to uid and gid: a program that opens
// /dev/stdout anew, as nginx does, needs the right.
func NewFIFOs(dir string, stdin bool, uid, gid int) (_ *FIFOs, err error) {
	f := &FIFOs{}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	if stdin {
		if f.Child[0], f.Kept[0], err = stdinFIFO(filepath.Join(dir, "0")); err != nil {
			return nil, err
		}
	}
	for i, name := range []string{"1", "2"} {
		if f.Kept[i+1], f.Child[i+1], err = outputFIFO(filepath.Join(dir, name)); err != nil {
			return nil, err
		}
	}
	for _, c := range f.Child {
		if c == nil {
			continue
		}
		if err := c.Chown(uid, gid); err != nil {
			return nil, errs.New(errs.Internal, "chown FIFO %s: %w", c.Name(), err)
		}
	}
	return f, nil
}

// Close closes all ends.
func (f *FIFOs) Close() {
	for _, x := range slices.Concat(f.Child[:], f.Kept[:]) {
		if x != nil {
			_ = x.Close()
		}
	}
}

// outputFIFO makes a FIFO that the container holds open for reading and
// writing: when every reader dies there is no SIGPIPE, bytes wait in the pipe.
func outputFIFO(path string) (r, w *os.File, err error) {
	if err := unix.Mkfifo(path, 0o600); err != nil {
		return nil, nil, errs.New(errs.Internal, "make FIFO %s: %w", path, err)
	}
	if w, err = openFIFO(path, unix.O_RDWR); err != nil {
		return nil, nil, err
	}
	if r, err = openFIFO(path, unix.O_RDONLY|unix.O_NONBLOCK); err != nil {
		_ = w.Close()
		return nil, nil, err
	}
	return r, w, nil
}

// stdinFIFO makes a FIFO whose reading end the container gets without the
// right to write: it would never see the end of file otherwise.
func stdinFIFO(path string) (r, w *os.File, err error) {
	if err := unix.Mkfifo(path, 0o600); err != nil {
		return nil, nil, errs.New(errs.Internal, "make FIFO %s: %w", path, err)
	}
	both, err := openFIFO(path, unix.O_RDWR)
	if err != nil {
		return nil, nil, err
	}
	defer func() { _ = both.Close() }()
	if r, err = openFIFO(path, unix.O_RDONLY); err != nil {
		return nil, nil, err
	}
	// Non-blocking: who attaches and writes more than is read must be able to go.
	if w, err = openFIFO(path, unix.O_WRONLY|unix.O_NONBLOCK); err != nil {
		_ = r.Close()
		return nil, nil, err
	}
	return r, w, nil
}

// openFIFO opens what Mkfifo made in a folder for root alone. Without
// O_NOFOLLOW: the container's descriptor would show it (F_GETFL), and criu
// could not open it anew through /proc/self/fd.
func openFIFO(path string, flags int) (*os.File, error) {
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, errs.New(errs.Internal, "open FIFO %s: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// OpenLog opens a log file for writing at its end, refusing anything but a
// regular file: a link would lead out of the pod's folder, a FIFO would block.
func OpenLog(path string) (*os.File, error) {
	if path == "" {
		return nil, nil
	}
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CREAT|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY, 0o640)
	if err != nil {
		return nil, errs.New(errs.FailedPrecondition, "open log file %s: %w", path, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		_ = unix.Close(fd)
		return nil, errs.New(errs.FailedPrecondition, "log file %s is not a regular file", path)
	}
	if err := unix.SetNonblock(fd, false); err != nil {
		_ = unix.Close(fd)
		return nil, errs.New(errs.Internal, "log file %s: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}
