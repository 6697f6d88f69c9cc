package wire

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Packet is a received message. The receiver owns FDs.
type Packet struct {
	Header
	Body []byte
	FDs  []int
	// Lost: descriptors came along that this process had no room for
	// (RLIMIT_NOFILE); none of them was kept.
	Lost bool
}

// Close closes the packet's descriptors that were not taken.
func (p *Packet) Close() {
	CloseAll(p.FDs)
	p.FDs = nil
}

// CloseAll closes descriptors.
func CloseAll(fds []int) {
	for _, fd := range fds {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}

// SendRaw sends one message without waiting. EAGAIN: the peer's queue is full.
func SendRaw(fd int, msg []byte, fds []int) error {
	if len(msg) > MaxMessage || len(fds) > MaxFDs {
		return unix.EMSGSIZE
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	for {
		_, err := unix.SendmsgN(fd, msg, oob, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
		if err != unix.EINTR {
			return err
		}
	}
}

// RecvRaw receives one message without waiting. io.EOF: the peer is gone.
func RecvRaw(fd int, buf []byte) (Packet, error) {
	var oob [1280]byte // room for MaxFDs descriptors
	var n, oobn, flags int
	var err error
	for {
		n, oobn, flags, _, err = unix.Recvmsg(fd, buf, oob[:], unix.MSG_CMSG_CLOEXEC|unix.MSG_DONTWAIT)
		if err != unix.EINTR {
			break
		}
	}
	if err != nil {
		if err == unix.ECONNRESET {
			err = io.EOF
		}
		return Packet{}, err
	}
	var p Packet
	p.FDs, err = rights(oob[:oobn])
	if n == 0 && err == nil {
		p.Close()
		return Packet{}, io.EOF
	}
	if err == nil {
		p.Header, p.Body, err = ParseHeader(buf[:n])
	}
	if err != nil || flags&unix.MSG_TRUNC != 0 {
		p.Close()
		return Packet{}, ErrMalformed
	}
	if flags&unix.MSG_CTRUNC != 0 {
		p.Close()
		p.Lost = true
	}
	return p, nil
}

func rights(oob []byte) ([]int, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, ErrMalformed
	}
	var all []int
	for i := range msgs {
		if msgs[i].Header.Level != unix.SOL_SOCKET || msgs[i].Header.Type != unix.SCM_RIGHTS {
			continue
		}
		fds, err := unix.ParseUnixRights(&msgs[i])
		if err != nil {
			CloseAll(all)
			return nil, ErrMalformed
		}
		all = append(all, fds...)
	}
	return all, nil
}

// Conn is one end of a connection for goroutines: it waits in Go's poller, so
// that a waiting reader costs no thread.
type Conn struct {
	f  *os.File
	rc syscall.RawConn

	wmu sync.Mutex // one sender at a time
}

// NewConn takes over fd, a connected seqpacket socket.
func NewConn(fd int) (*Conn, error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "seqpacket")
	rc, err := f.SyscallConn()
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	return &Conn{f: f, rc: rc}, nil
}

// Close closes the connection; waiting readers and writers return.
func (c *Conn) Close() error { return c.f.Close() }

// ErrClosed is what a call on a closed connection returns.
var ErrClosed = os.ErrClosed

// Send sends one message and descriptors (which stay the caller's). It waits
// at most patience for a peer that does not read.
func (c *Conn) Send(msg []byte, fds []int, patience time.Duration) error {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	// The first try needs no timer: it nearly always succeeds.
	var err error
	first := true
	werr := c.rc.Write(func(fd uintptr) bool {
		err = SendRaw(int(fd), msg, fds)
		if err != unix.EAGAIN {
			return true
		}
		if first {
			first = false
			_ = c.f.SetWriteDeadline(time.Now().Add(patience))
		}
		return false
	})
	if !first {
		_ = c.f.SetWriteDeadline(time.Time{})
	}
	if werr != nil {
		return waitError(werr)
	}
	return err
}

// waitError is the error of a wait that did not come to a call. Of a connection
// that this side has closed Go's poller says so in words of its own.
func waitError(err error) error {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	return fmt.Errorf("%w (%w)", ErrClosed, err)
}

// Recv waits for one message. The body aliases buf.
func (c *Conn) Recv(buf []byte) (Packet, error) {
	var p Packet
	var err error
	rerr := c.rc.Read(func(fd uintptr) bool {
		p, err = RecvRaw(int(fd), buf)
		return err != unix.EAGAIN
	})
	if rerr != nil {
		return Packet{}, waitError(rerr)
	}
	return p, err
}

// PeerCred returns who connected (SO_PEERCRED).
func (c *Conn) PeerCred() (*unix.Ucred, error) {
	var cred *unix.Ucred
	var err error
	if cerr := c.rc.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); cerr != nil {
		return nil, cerr
	}
	return cred, err
}

// Gone reports whether err means that the peer is away.
func Gone(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, os.ErrClosed) || errors.Is(err, unix.EPIPE) ||
		errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.ENOTCONN)
}

// Dial connects to the socket at path without waiting: a full backlog is
// EAGAIN.
func Dial(path string) (*Conn, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	// A path longer than sun_path is reached through its folder.
	addr := path
	if len(path) >= 108 {
		dir, base := splitPath(path)
		d, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			_ = unix.Close(fd)
			return nil, err
		}
		defer func() { _ = unix.Close(d) }()
		addr = "/proc/self/fd/" + itoa(d) + "/" + base
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: addr}); err != nil {
		_ = unix.Close(fd)
		return nil, err
	}
	return NewConn(fd)
}

func splitPath(p string) (dir, base string) {
	for i := len(p) - 1; i >= 0; i-- {
		if p[i] == '/' {
			return p[:i+1], p[i+1:]
		}
	}
	return ".", p
}

func itoa(n int) string {
	if n == 0 {
		return "0"
	}
	var b [20]byte
	i := len(b)
	for ; n > 0; n /= 10 {
		i--
		b[i] = byte('0' + n%10)
	}
	return string(b[i:])
}
