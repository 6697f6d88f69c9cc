package streaming

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"sync"
	"syscall"
	"time"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/sys"
)

// upgradeWriter hands out the connection of an upgraded request as a conn, so
// that the session learns when its client is gone and can always cut it.
type upgradeWriter struct {
	http.ResponseWriter
	session *session
	spdy    bool // set before the upgrade: check SPDY frames
	conn    *conn
}

// Hijack implements http.Hijacker.
func (u *upgradeWriter) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	raw, buffered, err := http.NewResponseController(u.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	early, _ := buffered.Reader.Peek(buffered.Reader.Buffered()) // cannot fail: it is there
	c := newConn(raw, early, u.session.s.cfg.IdleTimeout, u.session.cancel)
	u.conn = c
	context.AfterFunc(u.session.ctx, c.abort)
	var nc net.Conn = c
	if u.spdy {
		nc = &spdyConn{Conn: c}
	}
	return nc, bufio.NewReadWriter(bufio.NewReader(nc), bufio.NewWriter(nc)), nil
}

// abort cuts the connection if there was an upgrade.
func (u *upgradeWriter) abort() {
	if u.conn != nil {
		u.conn.abort()
	}
}

var (
	errClientGone = errors.New("client is gone")
	errIdle       = errs.New(errs.DeadlineExceeded, "no traffic for the idle timeout")
)

// conn is an upgraded connection. Any read error means that the client is
// gone and ends the session; so does silence for the idle timeout.
type conn struct {
	net.Conn
	early  []byte // read by net/http before the upgrade
	idle   time.Duration
	timer  *time.Timer // fires after idle
	cancel context.CancelCauseFunc
	once   sync.Once

	mu      sync.Mutex
	check   *time.Timer // fires every hangUpCheck
	aborted bool
}

// hangUpCheck is how often a connection is asked whether its client hung up,
// while nobody may be reading it because the process does not take its input.
var hangUpCheck = 10 * time.Second

func newConn(raw net.Conn, early []byte, idle time.Duration, cancel context.CancelCauseFunc) *conn {
	c := &conn{Conn: raw, early: append([]byte(nil), early...), idle: idle, cancel: cancel}
	c.timer = time.AfterFunc(idle, func() { cancel(errIdle) })
	if u, ok := raw.(interface{ NetConn() net.Conn }); ok { // TLS
		raw = u.NetConn()
	}
	if socket, ok := raw.(syscall.Conn); ok {
		c.watch(socket)
	}
	return c
}

// watch asks again and again whether the client hung up.
func (c *conn) watch(socket syscall.Conn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.aborted {
		return
	}
	c.check = time.AfterFunc(hangUpCheck, func() {
		if sys.PeerHungUp(socket) {
			c.cancel(errClientGone)
			return
		}
		c.watch(socket)
	})
}

// Read implements net.Conn.
func (c *conn) Read(p []byte) (int, error) {
	if len(c.early) > 0 {
		n := copy(p, c.early)
		c.early = c.early[n:]
		return n, nil
	}
	n, err := c.Conn.Read(p)
	if err != nil {
		c.cancel(errClientGone)
		return n, err
	}
	c.timer.Reset(c.idle)
	return n, nil
}

// Write implements net.Conn.
func (c *conn) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	if n > 0 {
		c.timer.Reset(c.idle)
	}
	return n, err
}

// Close ends the connection in good order: what was written reaches the client
// even if it is still sending, because closing a socket with unread bytes
// makes the kernel send a reset that overtakes them (RFC 2525, 2.17).
func (c *conn) Close() error {
	c.once.Do(func() {
		if hc, ok := c.Conn.(interface{ CloseWrite() error }); ok && hc.CloseWrite() == nil {
			_ = c.SetReadDeadline(time.Now().Add(lingerTimeout))
			_, _ = io.Copy(io.Discard, c.Conn)
		}
	})
	c.abort()
	return nil
}

// abort cuts the connection now. It may be called at any time, repeatedly.
func (c *conn) abort() {
	c.timer.Stop()
	c.mu.Lock()
	c.aborted = true
	if c.check != nil {
		c.check.Stop()
	}
	c.mu.Unlock()
	_ = c.Conn.Close()
}

// Bounds for SPDY frames from clients: they copy with buffers of 32 KiB and
// their headers are a few words. The library would take frames of 16 MiB.
const (
	maxSPDYData    = 1 << 20
	maxSPDYControl = 16 << 10
)

var errSPDYFrame = errors.New("SPDY frame too big")

// spdyConn checks the length of each incoming SPDY frame before the framer
// allocates for it. A frame has a header of 8 bytes: the first bit tells
// control from data frames, the last three bytes are the length.
type spdyConn struct {
	net.Conn
	header [8]byte
	have   int    // bytes of header seen
	skip   uint32 // bytes of payload still to come
}

// Read implements net.Conn.
func (c *spdyConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if checkErr := c.check(p[:n]); checkErr != nil {
		_ = c.Conn.Close()
		return 0, checkErr
	}
	return n, err
}

func (c *spdyConn) check(p []byte) error {
	for len(p) > 0 {
		if c.skip > 0 {
			n := min(uint32(len(p)), c.skip)
			c.skip -= n
			p = p[n:]
			continue
		}
		n := copy(c.header[c.have:], p)
		c.have += n
		p = p[n:]
		if c.have < len(c.header) {
			return nil
		}
		c.have = 0
		length := binary.BigEndian.Uint32(c.header[4:]) & 0xffffff
		limit := uint32(maxSPDYData)
		if c.header[0]&0x80 != 0 {
			limit = maxSPDYControl
		}
		if length > limit {
			return errSPDYFrame
		}
		c.skip = length
	}
	return nil
}
