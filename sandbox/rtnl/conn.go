package rtnl

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// Conn is one rtnetlink socket.
type Conn struct {
	fd  int
	seq uint32
	buf []byte
}

// timeout guards against waiting for ever; the kernel answers a request before
// sendto returns, so it is only reached if something is badly wrong.
const timeout = 20 * time.Second

// Open opens a socket in the network namespace of the calling thread.
func Open() (*Conn, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open a route socket: %w", err)
	}
	tv := unix.NsecToTimeval(timeout.Nanoseconds())
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1),
		unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_EXT_ACK, 1),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv))
	if err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("set up a route socket: %w", err)
	}
	return &Conn{fd: fd, seq: uint32(time.Now().UnixNano())}, nil
}

// Close closes the socket. Safe on nil.
func (c *Conn) Close() {
	if c != nil && c.fd >= 0 {
		_ = unix.Close(c.fd)
		c.fd = -1
	}
}

// Do sends a batch and waits until the kernel has worked on all of it. Each
// message that is an answer goes to reply, if there is one. All requests are
// tried, also behind one that was refused; the first refusal is returned.
func (c *Conn) Do(b *Batch, reply func(message)) error {
	if len(b.ops) == 0 {
		return nil
	}
	first := c.seq + 1
	c.number(b)
	if err := c.send(b.buf); err != nil {
		return fmt.Errorf("%s: %w", b.ops[0].name, err)
	}
	if c.buf == nil {
		c.buf = make([]byte, 32<<10)
	}
	var failed error
	for {
		n, _, err := unix.Recvfrom(c.fd, c.buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("%s: read the answer: %w", b.ops[0].name, err)
		}
		for _, m := range messages(c.buf[:n]) {
			i := int(m.seq - first)
			if m.seq < first || i >= len(b.ops) {
				continue // of an earlier batch that timed out
			}
			if m.typ != unix.NLMSG_ERROR {
				if reply != nil {
					reply(m)
				}
				continue
			}
			if err := refusal(m, b.ops[i]); err != nil && failed == nil {
				failed = err
			}
			if i == len(b.ops)-1 {
				return failed
			}
		}
	}
}

// number gives each message its sequence number, and asks for an
// acknowledgement of the last.
func (c *Conn) number(b *Batch) {
	left := len(b.ops)
	for at := 0; at < len(b.buf); {
		c.seq++
		native.PutUint32(b.buf[at+8:], c.seq)
		if left--; left == 0 {
			native.PutUint16(b.buf[at+6:], native.Uint16(b.buf[at+6:])|unix.NLM_F_ACK)
		}
		at = (at + int(native.Uint32(b.buf[at:])) + 3) &^ 3
	}
}

func (c *Conn) send(buf []byte) error {
	for {
		err := unix.Sendto(c.fd, buf, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// refusal turns an NLMSG_ERROR into an error, with the kernel's own words
// (NLMSGERR_ATTR_MSG) if it has any.
func refusal(m message, o op) error {
	if len(m.data) < 4 {
		return fmt.Errorf("%s: short answer of the kernel", o.name)
	}
	code := unix.Errno(-int32(native.Uint32(m.data)))
	if code == 0 {
		return nil
	}
	for _, a := range o.allow {
		if code == a {
			return nil
		}
	}
	if m.flags&unix.NLM_F_ACK_TLVS != 0 && len(m.data) > 4+unix.SizeofNlMsghdr {
		text := ""
		attributes(m.data[4+unix.SizeofNlMsghdr:], func(typ uint16, v []byte) bool {
			if typ == unix.NLMSGERR_ATTR_MSG {
				text = cString(v)
			}
			return true
		})
		if text != "" {
			return fmt.Errorf("%s: %w (%s)", o.name, code, text)
		}
	}
	return fmt.Errorf("%s: %w", o.name, code)
}

// dump sends one dump request and hands on every message of the answer.
func (c *Conn) dump(b *Batch, reply func(message)) error {
	c.number(b)
	if err := c.send(b.buf); err != nil {
		return fmt.Errorf("%s: %w", b.ops[0].name, err)
	}
	if c.buf == nil {
		c.buf = make([]byte, 32<<10)
	}
	for {
		n, _, err := unix.Recvfrom(c.fd, c.buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("%s: read the answer: %w", b.ops[0].name, err)
		}
		for _, m := range messages(c.buf[:n]) {
			switch {
			case m.seq != c.seq:
			case m.typ == unix.NLMSG_DONE:
				return nil
			case m.typ == unix.NLMSG_ERROR:
				return refusal(m, b.ops[0])
			default:
				reply(m)
			}
		}
	}
}
