package streaming

import (
	"encoding/base64"
	"errors"
	"io"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/gorilla/websocket"

	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
)

// upgradeWebSocket upgrades with the first of the server's protocols that the
// client offers. A client that offers none speaks the oldest, channel.k8s.io.
// It returns nil after having answered.
func (ses *session) upgradeWebSocket(protocols []string) *websocket.Conn {
	offered := websocket.Subprotocols(ses.r)
	if len(offered) > 0 && !slices.ContainsFunc(offered, func(p string) bool { return slices.Contains(protocols, p) }) {
		ses.fail(http.StatusForbidden, "no common WebSocket protocol")
		return nil
	}
	u := websocket.Upgrader{
		HandshakeTimeout: headerTimeout,
		Subprotocols:     protocols,
		CheckOrigin:      func(*http.Request) bool { return true }, // done by originAllowed
		Error: func(_ http.ResponseWriter, _ *http.Request, code int, reason error) {
			ses.fail(code, reason.Error())
		},
	}
	c, err := u.Upgrade(ses.w, ses.r, nil)
	if err != nil {
		ses.log.V(4).Info("WebSocket upgrade did not work", "err", err)
		return nil
	}
	c.SetReadLimit(maxMessageBytes)
	return c
}

// mux carries numbered channels over one WebSocket: the first byte of each
// message is the channel's number (a digit in the base64 protocols).
type mux struct {
	c           *websocket.Conn
	base64      bool
	closeSignal bool     // v5: message {255, n} ends channel n
	in          []*inbox // by number; nil = not readable

	wmu sync.Mutex // one writer at a time (gorilla/websocket)
	wg  sync.WaitGroup
}

// newMux makes a mux with n channels of which the readable ones are listed,
// and starts its reader. lost is called when the client is gone.
func newMux(c *websocket.Conn, b64, closeSignal bool, n int, readable []int, lost func(error)) *mux {
	m := &mux{c: c, base64: b64, closeSignal: closeSignal, in: make([]*inbox, n)}
	for _, i := range readable {
		m.in[i] = newInbox()
	}
	m.wg.Go(func() {
		err := m.readAll()
		for _, b := range m.in {
			if b != nil {
				b.end()
			}
		}
		lost(err)
	})
	return m
}

func (m *mux) readAll() error {
	for {
		_, data, err := m.c.ReadMessage()
		if err != nil {
			return err
		}
		if err := m.deliver(data); err != nil {
			return err
		}
	}
}

var errProtocol = errors.New("WebSocket message does not follow the channel protocol")

// deliver passes one message on. Messages for unknown channels are ignored,
// as all servers of this protocol do.
func (m *mux) deliver(data []byte) error {
	if len(data) == 0 {
		return nil
	}
	number, data := int(data[0]), data[1:]
	if m.closeSignal && number == remotecommand.StreamClose {
		if len(data) != 1 {
			return errProtocol
		}
		if b := m.channel(int(data[0])); b != nil {
			b.end()
		}
		return nil
	}
	if m.base64 {
		number -= '0'
		plain, err := base64.StdEncoding.AppendDecode(nil, data)
		if err != nil {
			return errProtocol
		}
		data = plain
	}
	if b := m.channel(number); b != nil {
		b.put(data)
	}
	return nil
}

func (m *mux) channel(i int) *inbox {
	if i < 0 || i >= len(m.in) {
		return nil
	}
	return m.in[i]
}

func (m *mux) write(number int, p []byte) (int, error) {
	kind, message := websocket.BinaryMessage, make([]byte, 1, 1+len(p))
	message[0] = byte(number)
	if m.base64 {
		kind, message[0] = websocket.TextMessage, byte('0'+number)
		message = base64.StdEncoding.AppendEncode(message, p)
	} else {
		message = append(message, p...)
	}
	m.wmu.Lock()
	defer m.wmu.Unlock()
	if err := m.c.WriteMessage(kind, message); err != nil {
		return 0, err
	}
	return len(p), nil
}

// finish says goodbye and closes the connection once the client has taken
// everything.
func (m *mux) finish() {
	m.stop()
	goodbye := websocket.FormatCloseMessage(websocket.CloseNormalClosure, "")
	_ = m.c.WriteControl(websocket.CloseMessage, goodbye, time.Now().Add(lingerTimeout))
	_ = m.c.Close()
	m.wg.Wait()
}

// stop makes the channels' readers see their end, and further input be dropped.
func (m *mux) stop() {
	for _, b := range m.in {
		if b != nil {
			b.drop()
		}
	}
}

// channelStream is one channel as a stream.
type channelStream struct {
	m      *mux
	number int
}

// Write implements io.Writer.
func (c channelStream) Write(p []byte) (int, error) { return c.m.write(c.number, p) }

// Read implements io.Reader.
func (c channelStream) Read(p []byte) (int, error) {
	if b := c.m.in[c.number]; b != nil {
		return b.Read(p)
	}
	return 0, io.EOF
}

// Close implements io.Closer: what the client still sends is dropped. The
// protocols before v5 have no message for the other direction.
func (c channelStream) Close() error {
	if b := c.m.in[c.number]; b != nil {
		b.drop()
	}
	return nil
}

// The WebSocket protocols, best first.
const (
	protoV4       = remotecommand.StreamProtocolV4Name
	protoV4Base64 = "v4.base64.channel.k8s.io"
	protoV1Base64 = "base64.channel.k8s.io"
)

var commandProtocols = []string{
	remotecommand.StreamProtocolV5Name, protoV4, protoV4Base64, remotecommand.StreamProtocolV1Name, protoV1Base64,
}

func isBase64(protocol string) bool { return protocol == protoV4Base64 || protocol == protoV1Base64 }

// openWebSocket upgrades to a WebSocket with the channels of remote commands.
func (ses *session) openWebSocket(c Command) *stdio {
	ws := ses.upgradeWebSocket(commandProtocols)
	if ws == nil {
		return nil
	}
	protocol := ws.Subprotocol()
	v5 := protocol == remotecommand.StreamProtocolV5Name
	var readable []int
	if c.Stdin {
		readable = append(readable, remotecommand.StreamStdIn)
	}
	if c.TTY {
		readable = append(readable, remotecommand.StreamResize)
	}
	m := newMux(ws, isBase64(protocol), v5, remotecommand.StreamResize+1, readable, ses.cancel)
	st := &stdio{
		status: statusWriter(channelStream{m, remotecommand.StreamErr}, v5 || protocol == protoV4 || protocol == protoV4Base64),
		finish: m.finish,
	}
	hello := remotecommand.StreamErr
	if c.Stderr {
		st.stderr, hello = channelStream{m, remotecommand.StreamStdErr}, remotecommand.StreamStdErr
	}
	if c.Stdout {
		st.stdout, hello = channelStream{m, remotecommand.StreamStdOut}, remotecommand.StreamStdOut
	}
	if c.Stdin {
		st.stdin = channelStream{m, remotecommand.StreamStdIn}
	}
	if c.TTY {
		st.resize = channelStream{m, remotecommand.StreamResize}
	}
	// An empty message tells the client that the streams are open.
	if _, err := m.write(hello, nil); err != nil {
		ses.cancel(errClientGone)
	}
	st.release = func() {
		m.stop() // frees the reader if it is handing a message to a process that does not read
		ses.w.abort()
		m.wg.Wait()
	}
	return st
}
