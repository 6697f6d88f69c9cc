package sys

import (
	"fmt"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// PeerCred is who is at the other end of a unix socket, as the kernel saw it
// when the connection was made (SO_PEERCRED, SO_PEERGROUPS; unix(7)).
type PeerCred struct {
	PID      int32
	UID, GID uint32
	Groups   []uint32 // supplementary
}

// maxPeerGroups is NGROUPS_MAX of linux/limits.h.
const maxPeerGroups = 65536

// PeerCredentials asks the kernel who is at the other end of c.
func PeerCredentials(c *net.UnixConn) (PeerCred, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return PeerCred{}, fmt.Errorf("reach socket: %w", err)
	}
	var cred PeerCred
	var inner error
	if err := raw.Control(func(fd uintptr) { cred, inner = peerCredentials(int(fd)) }); err != nil {
		return PeerCred{}, fmt.Errorf("reach socket: %w", err)
	}
	return cred, inner
}

func peerCredentials(fd int) (PeerCred, error) {
	u, err := unix.GetsockoptUcred(fd, unix.SOL_SOCKET, unix.SO_PEERCRED)
	if err != nil {
		return PeerCred{}, fmt.Errorf("read SO_PEERCRED: %w", err)
	}
	cred := PeerCred{PID: u.Pid, UID: u.Uid, GID: u.Gid}
	cred.Groups, err = peerGroups(fd)
	if err != nil {
		return PeerCred{}, fmt.Errorf("read SO_PEERGROUPS: %w", err)
	}
	return cred, nil
}

// PeerHungUp reports whether the other end of a connection has closed its
// sending side or is gone, also while bytes it sent before lie unread
// (POLLRDHUP, poll(2)). A socket that is closed here counts as hung up.
func PeerHungUp(c syscall.Conn) bool {
	raw, err := c.SyscallConn()
	if err != nil {
		return true
	}
	hungUp := false
	err = raw.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
		n, err := unix.Poll(fds, 0)
		hungUp = err == nil && n > 0
	})
	return err != nil || hungUp
}
