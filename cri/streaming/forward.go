package streaming

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/gorilla/websocket"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/streaming/pkg/httpstream"
)

// tunnelProtocol is SPDY inside WebSocket messages (KEP-4006, part 2).
const tunnelProtocol = "SPDY/3.1+" + portforward.ProtocolV1Name

// portForward serves connections to ports inside a pod until the client leaves.
func (ses *session) portForward(f Forward) {
	if !isWebSocket(ses.r) {
		ses.forwardSPDY(f)
		return
	}
	if slices.Contains(websocket.Subprotocols(ses.r), tunnelProtocol) {
		ses.forwardTunnel(f)
		return
	}
	ses.forwardChannels(f)
}

// connect carries one connection: from the client's data stream to the pod's
// port and back. It returns when the pod's side has ended; idle tells that
// also the client's side has.
func (ses *session) connect(ctx context.Context, f Forward, port uint16, data io.ReadWriter) (idle <-chan struct{}, err error) {
	done := make(chan struct{})
	if len(f.Ports) > 0 && !slices.Contains(f.Ports, port) {
		close(done)
		return done, fmt.Errorf("port %d is not among the requested ones", port)
	}
	c, err := ses.s.backend.Dial(ctx, f.PodID, port)
	if err != nil {
		close(done)
		return done, err
	}
	stop := context.AfterFunc(ctx, func() { _ = c.Close() })
	defer func() {
		stop()
		_ = c.Close()
	}()
	go func() {
		defer close(done)
		_, _ = io.CopyBuffer(onlyWriter{c}, data, make([]byte, copyBufferBytes))
		if hc, ok := c.(interface{ CloseWrite() error }); ok {
			_ = hc.CloseWrite() // the client has said all; the pod may still answer
		}
	}()
	_, err = io.CopyBuffer(onlyWriter{data}, c, make([]byte, copyBufferBytes))
	if ctx.Err() != nil {
		err = nil // the client left
	}
	return done, err
}

// onlyWriter hides ReadFrom, so that io.CopyBuffer copies in bounded pieces.
type onlyWriter struct{ io.Writer }

// forwardChannels speaks the WebSocket channel protocol: two channels for each
// port of the request, data and error, each beginning with the port's number
// as two bytes, little endian.
func (ses *session) forwardChannels(f Forward) {
	if len(f.Ports) == 0 {
		ses.fail(http.StatusBadRequest, "no ports requested")
		return
	}
	ws := ses.upgradeWebSocket([]string{protoV4, protoV4Base64})
	if ws == nil {
		return
	}
	readable := make([]int, len(f.Ports))
	for i := range readable {
		readable[i] = 2 * i
	}
	m := newMux(ws, isBase64(ws.Subprotocol()), false, 2*len(f.Ports), readable, ses.cancel)
	var wg sync.WaitGroup
	for i, port := range f.Ports {
		data, errors := channelStream{m, 2 * i}, channelStream{m, 2*i + 1}
		prefix := []byte{byte(port), byte(port >> 8)}
		for _, s := range []channelStream{data, errors} {
			if _, err := s.Write(prefix); err != nil {
				ses.cancel(errClientGone)
			}
		}
		wg.Go(func() {
			idle, err := ses.connect(ses.ctx, f, port, data)
			if err != nil {
				_, _ = io.WriteString(errors, forwardError(f, port, err))
			}
			_ = data.Close()
			<-idle
		})
	}
	wg.Wait()
	if ses.ctx.Err() == nil {
		m.finish()
	}
	m.stop()
	ses.w.abort()
	m.wg.Wait()
}

func forwardError(f Forward, port uint16, err error) string {
	return fmt.Sprintf("forward port %d of pod %s: %v", port, f.PodID, err)
}

// forwardTunnel speaks SPDY inside the binary messages of a WebSocket.
func (ses *session) forwardTunnel(f Forward) {
	ws := ses.upgradeWebSocket([]string{tunnelProtocol})
	if ws == nil {
		return
	}
	p := newPairs(ses, f)
	conn, err := newSPDYServer(&spdyConn{Conn: &messageConn{netConn: ws.NetConn(), ws: ws}}, p.accept)
	if err != nil {
		ses.cancel(err)
		return
	}
	p.serve(conn)
}

// messageConn makes a byte stream of a WebSocket's binary messages.
type messageConn struct {
	netConn
	ws     *websocket.Conn
	reader io.Reader
	wmu    sync.Mutex
}

// Read implements net.Conn.
func (c *messageConn) Read(p []byte) (int, error) {
	for {
		if c.reader == nil {
			kind, r, err := c.ws.NextReader()
			if err != nil {
				return 0, err
			}
			if kind != websocket.BinaryMessage {
				return 0, errProtocol
			}
			c.reader = r
		}
		n, err := c.reader.Read(p)
		if errors.Is(err, io.EOF) {
			c.reader = nil
			if n == 0 {
				continue
			}
			err = nil
		}
		return n, err
	}
}

// Write implements net.Conn.
func (c *messageConn) Write(p []byte) (int, error) {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	if err := c.ws.WriteMessage(websocket.BinaryMessage, p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Close implements net.Conn.
func (c *messageConn) Close() error {
	goodbye := websocket.FormatCloseMessage(websocket.CloseNormalClosure, "")
	_ = c.ws.WriteControl(websocket.CloseMessage, goodbye, time.Now().Add(lingerTimeout))
	return c.ws.Close()
}

// forwardSPDY upgrades the connection itself to SPDY.
func (ses *session) forwardSPDY(f Forward) {
	if _, err := httpstream.Handshake(ses.r, ses.w, portforward.SupportedProtocols); err != nil {
		return // Handshake has answered
	}
	p := newPairs(ses, f)
	conn := upgradeSPDY(ses, p.accept)
	if conn == nil {
		return // the upgrader has answered
	}
	p.serve(conn)
}
