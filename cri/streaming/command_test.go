package streaming

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	goruntime "runtime"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	spdyframe "github.com/moby/spdystream/spdy"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/streaming/pkg/httpstream"

	"github.com/naru-project/naru/internal/testhost"
	"github.com/naru-project/naru/pod"
)

func TestExecSPDY(t *testing.T) {
	s := start(t, &fakeBackend{}, Config{})
	u, err := s.ExecURL(Command{ContainerID: "c", Cmd: []string{"both"}, Stdout: true, Stderr: true})
	c := dialSPDY(t, must(t, u, err), remotecommand.SupportedStreamingProtocols...)
	if c.protocol != "v4.channel.k8s.io" {
		t.Errorf("negotiated %q", c.protocol)
	}
	c.open("error", "stdout", "stderr")
	if got := c.read("stdout"); got != "out" {
		t.Errorf("stdout %q", got)
	}
	if got := c.read("stderr"); got != "err" {
		t.Errorf("stderr %q", got)
	}
	if got := c.read("error"); got != `{"status":"Success"}` {
		t.Errorf("status %s", got)
	}
}

func TestExitCodes(t *testing.T) {
	s := start(t, &fakeBackend{}, Config{})
	tests := []struct {
		protocol string
		cmd      []string
		want     string
	}{
		{"v4.channel.k8s.io", []string{"exit", "42"},
			`{"status":"Failure","message":"command terminated with exit code 42","reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"42"}]}}`},
		{"v4.channel.k8s.io", []string{"fail"}, `{"status":"Failure","message":"no such program","reason":"InternalError","code":500}`},
		{"v3.channel.k8s.io", []string{"exit", "3"}, "command terminated with exit code 3"},
		{"v2.channel.k8s.io", []string{"exit", "0"}, ""},
		{"channel.k8s.io", []string{"fail"}, "no such program"},
	}
	for _, tt := range tests {
		u, err := s.ExecURL(Command{ContainerID: "c", Cmd: tt.cmd, Stdout: true})
		c := dialSPDY(t, must(t, u, err), tt.protocol)
		c.open("error", "stdout")
		if got := c.read("error"); got != tt.want {
			t.Errorf("%s %v: %s, want %s", tt.protocol, tt.cmd, got, tt.want)
		}
	}
}

// A process that ends while the client still sends must not lose its last
// output and its status.
func TestExecSPDYOutputSurvivesPendingInput(t *testing.T) {
	s := start(t, &fakeBackend{}, Config{})
	began := time.Now()
	for range 20 {
		u, err := s.ExecURL(Command{ContainerID: "c", Cmd: []string{"big"}, Stdin: true, Stdout: true})
		c := dialSPDY(t, must(t, u, err), "v4.channel.k8s.io")
		c.open("error", "stdin", "stdout")
		go func() {
			chunk := make([]byte, 32<<10)
			for {
				if _, err := c.streams["stdin"].Write(chunk); err != nil {
					return
				}
			}
		}()
		if got := len(c.read("stdout")); got != 1<<20 {
			t.Fatalf("%d bytes of output, want %d", got, 1<<20)
		}
		if got := c.read("error"); !strings.Contains(got, `"7"`) {
			t.Fatalf("status %s", got)
		}
		_ = c.conn.Close()
	}
	if took := time.Since(began); took > testhost.Limit(10*time.Second) { // a goodbye stuck behind input takes lingerTimeout each
		t.Errorf("20 rounds took %v", took)
	}
}

func TestStdinHalfCloseSPDY(t *testing.T) {
	s := start(t, &fakeBackend{}, Config{})
	u, err := s.ExecURL(Command{ContainerID: "c", Cmd: []string{"cat"}, Stdin: true, Stdout: true})
	c := dialSPDY(t, must(t, u, err), "v4.channel.k8s.io")
	c.open("error", "stdin", "stdout")
	_, _ = io.WriteString(c.streams["stdin"], "hello")
	_ = c.streams["stdin"].Close()
	if got := c.read("stdout"); got != "hello[5 bytes]" {
		t.Errorf("stdout %q", got)
	}
}

func TestResizeSPDY(t *testing.T) {
	b := &fakeBackend{}
	s := start(t, b, Config{})
	u, err := s.ExecURL(Command{ContainerID: "c", Cmd: []string{"sizes"}, TTY: true, Stdout: true})
	c := dialSPDY(t, must(t, u, err), "v4.channel.k8s.io")
	c.open("error", "stdout", "resize")
	resize := c.streams["resize"]
	for _, bad := range []string{`{"Width":0,"Height":5}`, `{"Width":-1,"Height":-1}`, `{"Width":65536,"Height":1}`} {
		_, _ = io.WriteString(resize, bad)
	}
	_, _ = io.WriteString(resize, `{"Width":65535,"Height":24}`)
	buf := make([]byte, 32)
	n, err := c.streams["stdout"].Read(buf)
	if err != nil || string(buf[:n]) != "65535x24 " {
		t.Fatalf("%q, %v", buf[:n], err)
	}
	for i := range 10_000 { // far more than anybody takes
		_, _ = fmt.Fprintf(resize, `{"Width":%d,"Height":1}`, i+1)
	}
	_ = resize.Close()
	out := c.read("stdout")
	if !strings.HasSuffix(out, "10000x1 ") {
		t.Errorf("the last size did not come: …%q", out[max(0, len(out)-40):])
	}
}

func TestResizeGarbage(t *testing.T) {
	s := start(t, &fakeBackend{}, Config{})
	u, err := s.ExecURL(Command{ContainerID: "c", Cmd: []string{"sizes"}, TTY: true, Stdout: true})
	c := dialSPDY(t, must(t, u, err), "v4.channel.k8s.io")
	c.open("error", "stdout", "resize")
	_, _ = c.streams["resize"].Write(bytes.Repeat([]byte(`"`+strings.Repeat("x", 1000)), 1000)) // a string that never ends
	if got := c.read("error"); !strings.Contains(got, "Success") {
		t.Errorf("status %s", got)
	}
}

// dialWS is a client like client-go's WebSocket executor.
func dialWS(t *testing.T, rawURL string, protocols ...string) *websocket.Conn {
	t.Helper()
	d := websocket.Dialer{Subprotocols: protocols}
	c, resp, err := d.Dial("ws"+strings.TrimPrefix(rawURL, "http"), nil)
	if err != nil {
		t.Fatalf("upgrade: %v (%v)", err, resp)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// readWS collects what comes on each channel until the server says goodbye.
func readWS(t *testing.T, c *websocket.Conn) map[byte]string {
	t.Helper()
	got := map[byte]string{}
	for {
		_, data, err := c.ReadMessage()
		var closed *websocket.CloseError
		if errors.As(err, &closed) && closed.Code == websocket.CloseNormalClosure {
			return got
		}
		if err != nil {
			t.Fatalf("read: %v", err)
		}
		got[data[0]] += string(data[1:])
	}
}

func TestExecWebSocketV5(t *testing.T) {
	s := start(t, &fakeBackend{}, Config{})
	u, err := s.ExecURL(Command{ContainerID: "c", Cmd: []string{"cat"}, Stdin: true, Stdout: true})
	c := dialWS(t, must(t, u, err), "v5.channel.k8s.io", "v4.channel.k8s.io")
	if c.Subprotocol() != "v5.channel.k8s.io" {
		t.Fatalf("negotiated %q", c.Subprotocol())
	}
	_ = c.WriteMessage(websocket.BinaryMessage, []byte("\x00hello"))
	_ = c.WriteMessage(websocket.BinaryMessage, []byte{77, 1})      // no such channel
	_ = c.WriteMessage(websocket.BinaryMessage, []byte{255, 99})    // closes no channel
	_ = c.WriteMessage(websocket.BinaryMessage, []byte{255, 0})     // half-close of stdin
	_ = c.WriteMessage(websocket.BinaryMessage, []byte{255, 0})     // twice is fine
	_ = c.WriteMessage(websocket.BinaryMessage, []byte("\x00more")) // dropped
	got := readWS(t, c)
	if got[1] != "hello[5 bytes]" || got[3] != `{"status":"Success"}` {
		t.Errorf("got %q", got)
	}
}

func TestExecWebSocketFragments(t *testing.T) {
	s := start(t, &fakeBackend{}, Config{})
	u, err := s.ExecURL(Command{ContainerID: "c", Cmd: []string{"cat"}, Stdin: true, Stdout: true})
	d := websocket.Dialer{Subprotocols: []string{"v5.channel.k8s.io"}, WriteBufferSize: 256} // bigger messages go in fragments
	c, _, err := d.Dial("ws"+strings.TrimPrefix(must(t, u, err), "http"), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	w, _ := c.NextWriter(websocket.BinaryMessage)
	_, _ = w.Write([]byte{0})
	for range 100 {
		_, _ = w.Write(bytes.Repeat([]byte("\x02\x00\x01x"), 25))
	}
	_ = w.Close()
	_ = c.WriteMessage(websocket.BinaryMessage, []byte{255, 0})
	if got := readWS(t, c); got[1] != strings.Repeat("\x02\x00\x01x", 2500)+"[10000 bytes]" {
		t.Errorf("%d bytes came back", len(got[1]))
	}
}

func TestExecWebSocketProtocols(t *testing.T) {
	s := start(t, &fakeBackend{}, Config{})
	const exit3 = `{"status":"Failure","message":"command terminated with exit code 3","reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"3"}]}}`
	tests := []struct {
		protocols []string
		channel   byte
		want      string
	}{
		{[]string{"v4.channel.k8s.io"}, 3, exit3},
		{[]string{"channel.k8s.io"}, 3, "command terminated with exit code 3"},
		{nil, 3, "command terminated with exit code 3"},
		{[]string{"base64.channel.k8s.io"}, '3', "Y29tbWFuZCB0ZXJtaW5hdGVkIHdpdGggZXhpdCBjb2RlIDM="},
	}
	for _, tt := range tests {
		u, err := s.ExecURL(Command{ContainerID: "c", Cmd: []string{"exit", "3"}, Stdout: true})
		c := dialWS(t, must(t, u, err), tt.protocols...)
		if got := readWS(t, c); got[tt.channel] != tt.want {
			t.Errorf("%v: %q, want %s", tt.protocols, got, tt.want)
		}
	}
	u, err := s.ExecURL(Command{ContainerID: "c", Cmd: []string{"exit", "3"}, Stdout: true})
	d := websocket.Dialer{Subprotocols: []string{"v9.channel.k8s.io"}}
	if _, resp, err := d.Dial("ws"+strings.TrimPrefix(must(t, u, err), "http"), nil); err == nil || resp.StatusCode != http.StatusForbidden {
		t.Errorf("unknown protocol: %v %v", err, resp)
	}
}

func TestWebSocketAbuse(t *testing.T) {
	b := &fakeBackend{ended: make(chan string, 100)}
	s := start(t, b, Config{})
	header := "\x00\x00\x00\x00"
	for name, bytes := range map[string]string{
		"frame of 2^63 bytes": "\x82\xff\xff\xff\xff\xff\xff\xff\xff\xff" + header,
		"frame of 8 MiB":      "\x82\xff\x00\x00\x00\x00\x00\x80\x00\x00" + header,
		"unmasked frame":      "\x82\x03\x00hi",
		"reserved bit":        "\xc2\x83" + header + "\x00hi",
		"bad close signal":    "\x82\x83" + header + "\xff\x00\x00",
	} {
		t.Run(name, func(t *testing.T) {
			u, err := s.ExecURL(Command{ContainerID: "c", Cmd: []string{"wait"}, Stdin: true, Stdout: true})
			c := dialWS(t, must(t, u, err), "v5.channel.k8s.io")
			_, _ = io.WriteString(c.NetConn(), bytes)
			select {
			case <-b.ended:
			case <-time.After(5 * time.Second):
				t.Error("session goes on")
			}
		})
	}
}

func TestAttach(t *testing.T) {
	s := start(t, &fakeBackend{}, Config{})
	u, err := s.AttachURL(Command{ContainerID: "c", Stdin: true, Stdout: true})
	c := dialSPDY(t, must(t, u, err), "v4.channel.k8s.io")
	c.open("error", "stdin", "stdout")
	_, _ = io.WriteString(c.streams["stdin"], "hello")
	_ = c.streams["stdin"].Close()
	if got := c.read("stdout"); got != "hello" {
		t.Errorf("stdout %q", got)
	}
}

// Clients that leave a silent process must leave nothing behind.
func TestClientsThatDrop(t *testing.T) {
	b := &fakeBackend{ended: make(chan string, 1000)}
	s := start(t, b, Config{})
	before := goruntime.NumGoroutine()
	const rounds = 100
	for i := range rounds {
		command := Command{ContainerID: "silent", Stdin: i%2 == 0, Stdout: true, TTY: i%4 < 2}
		u, err := s.AttachURL(command)
		names := []string{"error", "stdout"}
		if command.Stdin {
			names = append(names, "stdin")
		}
		if command.TTY {
			names = append(names, "resize")
		}
		if i%3 == 0 {
			c := dialWS(t, must(t, u, err), "v5.channel.k8s.io")
			if command.Stdin { // nobody will read it
				_ = c.WriteMessage(websocket.BinaryMessage, []byte{0})
			}
			_ = c.NetConn().Close()
			continue
		}
		c := dialSPDY(t, must(t, u, err), "v4.channel.k8s.io")
		c.open(names...)
		if i%3 == 1 {
			_ = c.conn.Close()
			continue
		}
		for _, st := range c.streams {
			_ = st.Reset()
		}
		_ = c.conn.Close()
	}
	settle(t, before)
}

func TestStreamsAreNeverOpened(t *testing.T) {
	s := start(t, &fakeBackend{}, Config{CreationTimeout: 50 * time.Millisecond})
	before := goruntime.NumGoroutine()
	u, err := s.ExecURL(Command{ContainerID: "c", Cmd: []string{"wait"}, Stdout: true})
	c := dialSPDY(t, must(t, u, err), "v4.channel.k8s.io")
	c.open("stdout")
	select {
	case <-c.conn.CloseChan():
	case <-time.After(5 * time.Second):
		t.Fatal("connection stays open")
	}
	_ = c.conn.Close()
	settle(t, before)
}

func TestSurplusStreams(t *testing.T) {
	b := &fakeBackend{ended: make(chan string, 1)}
	s := start(t, b, Config{})
	u, err := s.ExecURL(Command{ContainerID: "c", Cmd: []string{"wait"}, Stdout: true})
	var raw net.Conn
	c := dialSPDYOver(t, must(t, u, err), &raw, "v4.channel.k8s.io")
	c.open("error", "stdout")
	// More streams than anybody needs, without waiting for answers. The client
	// library numbers its own 1 and 3.
	framer, err := spdyframe.NewFramer(raw, raw)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 1000 {
		frame := &spdyframe.SynStreamFrame{StreamId: spdyframe.StreamId(5 + 2*i)}
		if framer.WriteFrame(frame) != nil {
			break // the connection was cut
		}
	}
	select {
	case <-b.ended:
	case <-time.After(5 * time.Second):
		t.Fatal("session goes on")
	}
}

func TestIdleTimeout(t *testing.T) {
	b := &fakeBackend{ended: make(chan string, 2)}
	s := start(t, b, Config{IdleTimeout: 100 * time.Millisecond})
	u, err := s.ExecURL(Command{ContainerID: "c", Cmd: []string{"wait"}, Stdout: true})
	c := dialSPDY(t, must(t, u, err), "v4.channel.k8s.io")
	c.open("error", "stdout")
	u, err = s.ExecURL(Command{ContainerID: "c", Cmd: []string{"yes"}, Stdout: true})
	stuck := dialWS(t, must(t, u, err), "v5.channel.k8s.io") // never reads
	defer stuck.Close()
	for range 2 {
		select {
		case <-b.ended:
		case <-time.After(5 * time.Second):
			t.Fatal("session outlives the idle timeout")
		}
	}
}

// More keystrokes than the library queues, to a process that takes no input:
// nobody reads the connection any more, so the end of it cannot be read.
func TestClientHangsUpWhileInputIsStuck(t *testing.T) {
	defer func(d time.Duration) { hangUpCheck = d }(hangUpCheck)
	hangUpCheck = 20 * time.Millisecond
	b := &fakeBackend{ended: make(chan string, 1)}
	s := start(t, b, Config{})
	u, err := s.ExecURL(Command{ContainerID: "c", Cmd: []string{"wait"}, Stdin: true, Stdout: true})
	var raw net.Conn
	c := dialSPDYOver(t, must(t, u, err), &raw, "v4.channel.k8s.io")
	c.open("error", "stdin", "stdout")
	for range 500 {
		if _, err := c.streams["stdin"].Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(100 * time.Millisecond) // several checks while all is well
	select {
	case <-b.ended:
		t.Fatal("exec ended while its client was there")
	default:
	}
	_ = raw.Close()
	select {
	case <-b.ended:
	case <-time.After(5 * time.Second):
		t.Error("exec goes on without its client")
	}
}

// Close must not wait for clients that read nothing.
func TestCloseWithStuckClients(t *testing.T) {
	b := &fakeBackend{ended: make(chan string, 10)}
	s := New(Config{}, b)
	if err := s.Listen(); err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve() }()
	u, err := s.ExecURL(Command{ContainerID: "c", Cmd: []string{"yes"}, Stdout: true})
	c, _, err := trySPDYRaw(must(t, u, err))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	u, err = s.ExecURL(Command{ContainerID: "c", Cmd: []string{"yes"}, Stdout: true})
	ws := dialWS(t, must(t, u, err), "v5.channel.k8s.io")
	defer ws.Close()
	time.Sleep(200 * time.Millisecond) // until the sockets are full
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := s.Close(ctx); err != nil {
		t.Fatal(err)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
	if _, err := s.ExecURL(Command{}); err == nil {
		t.Error("a closed server hands out URLs")
	}
}

// trySPDYRaw upgrades and opens the streams, but reads nothing afterwards.
func trySPDYRaw(u string) (httpstream.Connection, *http.Response, error) {
	c, resp, err := trySPDY(u, nil, "v4.channel.k8s.io")
	if err != nil {
		return nil, nil, err
	}
	for _, name := range []string{"error", "stdout"} {
		if _, err := c.CreateStream(http.Header{remotecommand.StreamType: []string{name}}); err != nil {
			return nil, nil, err
		}
	}
	return c, resp, nil
}

func TestPanicEndsOnlyItsSession(t *testing.T) {
	s := start(t, &fakeBackend{}, Config{})
	u, err := s.ExecURL(Command{ContainerID: "c", Cmd: []string{"panic"}, Stdout: true})
	c := dialSPDY(t, must(t, u, err), "v4.channel.k8s.io")
	c.open("error", "stdout")
	select {
	case <-c.conn.CloseChan():
	case <-time.After(5 * time.Second):
		t.Fatal("connection stays open")
	}
	u, err = s.ExecURL(Command{ContainerID: "c", Cmd: []string{"echo", "hi"}, Stdout: true})
	c = dialSPDY(t, must(t, u, err), "v4.channel.k8s.io")
	c.open("error", "stdout")
	if got := c.read("stdout"); got != "hi" {
		t.Errorf("next session: %q", got)
	}
}

func FuzzSizes(f *testing.F) {
	f.Add([]byte(`{"Width":80,"Height":24}{"Width":1,"Height":1}`))
	f.Add([]byte(`{"Width":-1}[[[[`))
	f.Fuzz(func(t *testing.T, in []byte) {
		ch := make(chan pod.Size, 1)
		readSizes(t.Context(), bytes.NewReader(in), ch)
		select {
		case s := <-ch:
			if s.Width == 0 || s.Height == 0 {
				t.Errorf("size %v", s)
			}
		default:
		}
	})
}

func TestStatusJSONIsWhatClientsParse(t *testing.T) {
	b, err := json.Marshal(statusOf(5, nil))
	if err != nil {
		t.Fatal(err)
	}
	var v struct {
		Status, Reason string
		Details        struct {
			Causes []struct {
				Reason, Message string
			}
		}
	}
	if err := json.Unmarshal(b, &v); err != nil {
		t.Fatal(err)
	}
	if v.Status != "Failure" || v.Reason != "NonZeroExitCode" || len(v.Details.Causes) != 1 ||
		v.Details.Causes[0].Reason != "ExitCode" || v.Details.Causes[0].Message != "5" {
		t.Errorf("%s", b)
	}
}
