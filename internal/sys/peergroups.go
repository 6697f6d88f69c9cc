package sys

import (
	"errors"
	"unsafe"

	"golang.org/x/sys/unix"
)

// peerGroups reads the supplementary groups of a socket's peer. A kernel that
// lacks SO_PEERGROUPS (before 4.13) or a peer without any answers none.
func peerGroups(fd int) ([]uint32, error) {
	const word = 4 // sizeof(gid_t)
	buf := make([]uint32, 64)
	for {
		size := uint32(len(buf) * word)
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&buf[0])), uintptr(unsafe.Pointer(&size)), 0)
		n := int(size) / word
		switch {
		case errno == 0:
			return buf[:min(n, len(buf))], nil
		case errors.Is(errno, unix.ERANGE) && n > len(buf) && n <= maxPeerGroups:
			buf = make([]uint32, n) // the kernel told the size it needs
		case errors.Is(errno, unix.ENOPROTOOPT), errors.Is(errno, unix.ENODATA):
			return nil, nil
		default:
			return nil, errno
		}
	}
}
