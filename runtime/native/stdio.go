package native

import (
	"context"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
)

// makeStdio makes the container's standard streams and their other ends.
func (k *creation) makeStdio(context.Context) (err error) {
	dir := k.x.ioDir(k.c.ID)
	if err := os.MkdirAll(dir, 0o700); err != nil { //nolint:forbidigo // below our own run folder
		return errs.New(errs.Internal, "make %s: %w", dir, err)
	}
	k.undo.Add("remove the FIFOs", func(context.Context) error { return os.RemoveAll(dir) }) //nolint:forbidigo // below our own run folder
	if k.kept.Log, err = openLog(k.c.LogPath); err != nil {
		return err
	}
	k.later(k.kept.Log)
	uid, gid := hostID(k.c.UIDMap, k.process.user.UID), hostID(k.c.GIDMap, k.process.user.GID)
	if k.c.TTY {
		d := k.place.devices
		if err := d.slave.Chown(uid, hostID(k.c.GIDMap, 5)); err != nil {
			return errs.New(errs.Internal, "chown the terminal: %w", err)
		}
		k.kept.Pty, k.kept.Devpts = d.master, d.pts
		k.files.stdin, k.files.stdout, k.files.stderr = d.slave, d.slave, d.slave
		return nil
	}
	k.kept.Devpts = k.place.devices.pts
	if k.c.Stdin {
		var w, r *os.File
		if r, w, err = openStdinFIFO(filepath.Join(dir, "0")); err != nil {
			return err
		}
		k.files.stdin, k.kept.Stdin = k.later(r), k.later(w)
		if err := r.Chown(uid, gid); err != nil {
			return errs.New(errs.Internal, "chown the stdin FIFO: %w", err)
		}
	} else {
		if k.files.stdin, err = k.place.devices.null(unix.O_RDONLY); err != nil {
			return err
		}
		k.later(k.files.stdin)
	}
	for _, o := range []struct {
		name     string
		in, kept **os.File
	}{{"1", &k.files.stdout, &k.kept.Stdout}, {"2", &k.files.stderr, &k.kept.Stderr}} {
		r, w, err := openOutputFIFO(filepath.Join(dir, o.name))
		if err != nil {
			return err
		}
		*o.kept, *o.in = k.later(r), k.later(w)
		// A program that opens /dev/stdout anew, as nginx does, needs the right.
		if err := w.Chown(uid, gid); err != nil {
			return errs.New(errs.Internal, "chown the output FIFO: %w", err)
		}
	}
	return nil
}

// openOutputFIFO makes a FIFO that the container holds open for reading and
// writing: when every reader dies there is no SIGPIPE, bytes wait in the pipe.
func openOutputFIFO(path string) (r, w *os.File, err error) {
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

// openStdinFIFO makes a FIFO whose reading end the container gets without the
// right to write: it would never see the end of file otherwise.
func openStdinFIFO(path string) (r, w *os.File, err error) {
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
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0) //nolint:forbidigo // a path of ours, made a moment ago
	if err != nil {
		return nil, errs.New(errs.Internal, "open FIFO %s: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// openLog opens a log file for writing at its end, refusing anything but a
// regular file: a link would lead out of the pod's folder, a FIFO would block.
func openLog(path string) (*os.File, error) {
	if path == "" {
		return nil, nil
	}
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CREAT|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY, 0o640) //nolint:forbidigo // a path of ours; the last component is not followed
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
