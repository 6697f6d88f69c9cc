package streaming

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	goruntime "runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
)

// echoPod is a backend whose port 80 answers with what it was sent and, after
// the half-close, with "bye"; port 81 says hello and hangs up; others refuse.
func echoPod(t *testing.T) *fakeBackend {
	t.Helper()
	serve := func(handle func(*net.TCPConn)) net.Listener {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				wg.Go(func() {
					handle(c.(*net.TCPConn))
					_ = c.Close()
				})
			}
		})
		t.Cleanup(func() {
			_ = l.Close()
			wg.Wait()
		})
		return l
	}
	echo := serve(func(c *net.TCPConn) {
		_, _ = io.Copy(c, c)
		_, _ = io.WriteString(c, "bye")
	})
	hello := serve(func(c *net.TCPConn) { _, _ = io.WriteString(c, "hello") })
	return &fakeBackend{dial: func(ctx context.Context, podID string, port uint16) (io.ReadWriteCloser, error) {
		addr := map[uint16]string{80: echo.Addr().String(), 81: hello.Addr().String()}[port]
		if addr == "" || podID != "p" {
			return nil, fmt.Errorf("connect to port %d of %s: connection refused", port, podID)
		}
		var d net.Dialer
		return d.DialContext(ctx, "tcp", addr)
	}}
}

// openPair opens the two streams of one forwarded connection.
func openPair(t *testing.T, c httpstream.Connection, port, id string) (data, errStream httpstream.Stream) {
	t.Helper()
	h := http.Header{}
	h.Set(portforward.PortHeader, port)
	if id != "" {
		h.Set(portforward.PortForwardRequestIDHeader, id)
	}
	h.Set(portforward.StreamType, portforward.StreamTypeError)
	errStream, err := c.CreateStream(h)
	if err != nil {
		t.Fatalf("open error stream: %v", err)
	}
	h.Set(portforward.StreamType, portforward.StreamTypeData)
	data, err = c.CreateStream(h)
	if err != nil {
		t.Fatalf("open data stream: %v", err)
	}
	return data, errStream
}

func checkForward(t *testing.T, c httpstream.Connection, id string) {
	t.Helper()
	data, errStream := openPair(t, c, "80", id)
	_, _ = io.WriteString(data, "hello")
	_ = data.Close() // half-close
	if got, err := io.ReadAll(data); err != nil || string(got) != "hellobye" {
		t.Errorf("data %q, %v", got, err)
	}
	if got, err := io.ReadAll(errStream); err != nil || len(got) > 0 {
		t.Errorf("error stream %q, %v", got, err)
	}
	c.RemoveStreams(data, errStream)
}

func TestForwardSPDY(t *testing.T) {
	s := start(t, echoPod(t), Config{})
	u, err := s.PortForwardURL(Forward{PodID: "p"})
	c := dialSPDY(t, must(t, u, err), portforward.ProtocolV1Name)
	for i := range 5 {
		checkForward(t, c.conn, strconv.Itoa(i))
	}
	checkForward(t, c.conn, "") // a client without request IDs
	data, errStream := openPair(t, c.conn, "81", "h")
	if got, _ := io.ReadAll(data); string(got) != "hello" {
		t.Errorf("port 81: %q", got)
	}
	_, _ = io.ReadAll(errStream)
	data, errStream = openPair(t, c.conn, "9", "x")
	if got, _ := io.ReadAll(errStream); !strings.Contains(string(got), "connection refused") {
		t.Errorf("closed port: %q", got)
	}
	if got, _ := io.ReadAll(data); len(got) > 0 {
		t.Errorf("closed port: data %q", got)
	}
	checkForward(t, c.conn, "after the failure")
}

func TestForwardManyAtOnce(t *testing.T) {
	s := start(t, echoPod(t), Config{})
	u, err := s.PortForwardURL(Forward{PodID: "p"})
	c := dialSPDY(t, must(t, u, err), portforward.ProtocolV1Name)
	checkForward(t, c.conn, "first") // all of the connection's goroutines run now
	time.Sleep(50 * time.Millisecond)
	before := goruntime.NumGoroutine()
	var wg sync.WaitGroup
	for i := range 100 {
		wg.Go(func() { checkForward(t, c.conn, strconv.Itoa(i)) })
	}
	wg.Wait()
	settle(t, before)
}

func TestForwardBadPorts(t *testing.T) {
	s := start(t, echoPod(t), Config{})
	u, err := s.PortForwardURL(Forward{PodID: "p", Ports: []uint16{81}})
	c := dialSPDY(t, must(t, u, err), portforward.ProtocolV1Name)
	for _, port := range []string{"0", "-1", "65536", "1000000000", "", "22x"} {
		h := http.Header{}
		h.Set(portforward.PortHeader, port)
		h.Set(portforward.StreamType, portforward.StreamTypeError)
		if _, err := c.conn.CreateStream(h); err == nil {
			t.Errorf("port %q was accepted", port)
		}
	}
	_, errStream := openPair(t, c.conn, "80", "1")
	if got, _ := io.ReadAll(errStream); !strings.Contains(string(got), "not among the requested") {
		t.Errorf("a port that was not asked for: %q", got)
	}
}

func TestForwardHalfAPair(t *testing.T) {
	s := start(t, echoPod(t), Config{CreationTimeout: 50 * time.Millisecond})
	u, err := s.PortForwardURL(Forward{PodID: "p"})
	c := dialSPDY(t, must(t, u, err), portforward.ProtocolV1Name)
	h := http.Header{}
	h.Set(portforward.PortHeader, "80")
	h.Set(portforward.PortForwardRequestIDHeader, "7")
	h.Set(portforward.StreamType, portforward.StreamTypeError)
	lonely, err := c.conn.CreateStream(h)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(lonely); err != nil {
		t.Error(err)
	}
	checkForward(t, c.conn, "8")
}

// The client leaves while connections are open and silent.
func TestForwardClientDrops(t *testing.T) {
	b := echoPod(t)
	s := start(t, b, Config{})
	before := goruntime.NumGoroutine()
	for range 20 {
		u, err := s.PortForwardURL(Forward{PodID: "p"})
		c := dialSPDY(t, must(t, u, err), portforward.ProtocolV1Name)
		for i := range 3 {
			_, _ = openPair(t, c.conn, "80", strconv.Itoa(i))
		}
		_ = c.conn.Close()
	}
	settle(t, before)
}

func TestForwardTunnel(t *testing.T) {
	s := start(t, echoPod(t), Config{})
	u, err := s.PortForwardURL(Forward{PodID: "p"})
	ws := dialWS(t, must(t, u, err), tunnelProtocol)
	c, err := spdy.NewClientConnection(&messageConn{netConn: ws.NetConn(), ws: ws})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 5 {
		checkForward(t, c, strconv.Itoa(i))
	}
	_ = c.Close()
}

func TestForwardChannels(t *testing.T) {
	s := start(t, echoPod(t), Config{})
	u, err := s.PortForwardURL(Forward{PodID: "p", Ports: []uint16{81, 9}})
	c := dialWS(t, must(t, u, err), "v4.channel.k8s.io")
	got := readWS(t, c)
	if got[0] != "\x51\x00hello" || got[1] != "\x51\x00" {
		t.Errorf("port 81: %q, %q", got[0], got[1])
	}
	if got[2] != "\x09\x00" || !strings.Contains(got[3], "connection refused") {
		t.Errorf("port 9: %q, %q", got[2], got[3])
	}
	u, err = s.PortForwardURL(Forward{PodID: "p"})
	d := websocket.Dialer{Subprotocols: []string{"v4.channel.k8s.io"}}
	if _, resp, err := d.Dial("ws"+strings.TrimPrefix(must(t, u, err), "http"), nil); err == nil || resp.StatusCode != http.StatusBadRequest {
		t.Errorf("without ports: %v %v", err, resp)
	}
}

func TestForwardEcho(t *testing.T) {
	s := start(t, echoPod(t), Config{})
	u, err := s.PortForwardURL(Forward{PodID: "p", Ports: []uint16{80}})
	c := dialWS(t, must(t, u, err), "v4.channel.k8s.io")
	_ = c.WriteMessage(websocket.BinaryMessage, []byte("\x00ping"))
	var data string
	for !strings.HasSuffix(data, "ping") {
		_, m, err := c.ReadMessage()
		if err != nil {
			t.Fatal(err)
		}
		if m[0] == 0 {
			data += string(m[1:])
		}
	}
	if data != "\x50\x00ping" {
		t.Errorf("%q", data)
	}
}
