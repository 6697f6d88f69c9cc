package sys

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Pipe makes a pipe with one end for another process, in blocking mode, and
// one end for this one, non-blocking, with deadlines. (os.Pipe makes both
// non-blocking, which a child would inherit; os.File.Fd makes its file
// blocking, also for whoever shares it.)
func Pipe(oursReads bool) (ours, theirs *os.File, err error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, fmt.Errorf("make a pipe: %w", err)
	}
	a, b := p[0], p[1]
	if !oursReads {
		a, b = b, a
	}
	if err := unix.SetNonblock(a, true); err != nil {
		_, _ = unix.Close(a), unix.Close(b)
		return nil, nil, fmt.Errorf("make a pipe non-blocking: %w", err)
	}
	return os.NewFile(uintptr(a), "pipe"), os.NewFile(uintptr(b), "pipe"), nil
}

// FD returns the descriptor of f without touching its blocking mode. f must
// stay open while it is used.
func FD(f *os.File) int {
	rc, err := f.SyscallConn()
	if err != nil {
		return -1
	}
	fd := -1
	_ = rc.Control(func(n uintptr) { fd = int(n) })
	return fd
}
