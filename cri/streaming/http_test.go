package streaming

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/klog/v2"
)

// Row S-01: without a token there is one answer, whatever is asked for.
func TestEverythingElseIsNotFound(t *testing.T) {
	s := start(t, &fakeBackend{}, Config{})
	base := "http://" + s.Addr()
	var answers []string
	for _, path := range []string{"/", "/exec", "/exec/", "/exec/short", "/exec/" + strings.Repeat("A", 43), "/attach/x", "/portforward/x",
		"/exec/a/b", "/debug/pprof/", "/debug/pprof/cmdline", "/metrics", "/healthz", "//exec/x", "/exec/../exec/x", "/%65xec/x", "/exec/" + strings.Repeat("A", 8000)} {
		for _, method := range []string{http.MethodGet, http.MethodPost, http.MethodPut, http.MethodDelete, http.MethodOptions, http.MethodHead, "BREW"} {
			req, _ := http.NewRequest(method, base+path, nil)
			resp, err := http.DefaultTransport.RoundTrip(req)
			if err != nil {
				t.Fatalf("%s %s: %v", method, path, err)
			}
			body, _ := io.ReadAll(resp.Body)
			_ = resp.Body.Close()
			if resp.StatusCode != http.StatusNotFound || !resp.Close {
				t.Errorf("%s %s: %s, close %v", method, path, resp.Status, resp.Close)
			}
			if method != http.MethodHead {
				answers = append(answers, string(body))
			}
		}
	}
	for _, a := range answers {
		if a != answers[0] {
			t.Errorf("answers differ: %q, %q", a, answers[0])
		}
	}
	if host, _, _ := net.SplitHostPort(s.Addr()); host != "127.0.0.1" {
		t.Errorf("listens on %s", host)
	}
}

// Row S-02: after a session that succeeded, its URL is spent.
func TestTokenWorksOnce(t *testing.T) {
	s := start(t, &fakeBackend{}, Config{})
	u, err := s.ExecURL(Command{ContainerID: "c", Cmd: []string{"echo", "x"}, Stdout: true})
	c := dialSPDY(t, must(t, u, err), "v4.channel.k8s.io")
	c.open("error", "stdout")
	_ = c.read("stdout")
	if _, _, err := trySPDY(u, nil, "v4.channel.k8s.io"); err == nil {
		t.Error("the URL worked twice")
	}
	u, err = s.ExecURL(Command{ContainerID: "c", Cmd: []string{"echo"}, Stdout: true})
	wrong := strings.Replace(must(t, u, err), "/exec/", "/attach/", 1)
	if _, _, err := trySPDY(wrong, nil, "v4.channel.k8s.io"); err == nil {
		t.Error("an exec token was good for attach")
	}
}

// A refused upgrade must end its connection: a proxy could otherwise pass a
// second request on it (CVE-2018-1002105).
func TestRefusedUpgradeEndsConnection(t *testing.T) {
	s := start(t, &fakeBackend{}, Config{})
	for name, headers := range map[string]string{
		"no upgrade":      "",
		"no protocol":     "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\n",
		"bad protocol":    "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v99\r\n",
		"h2c":             "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n",
		"bad websocket":   "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 1\r\n",
		"upgrade to what": "Connection: Upgrade\r\nUpgrade: cheese\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			first, err := s.ExecURL(Command{ContainerID: "c", Cmd: []string{"echo"}, Stdout: true})
			c, u := rawDial(t, must(t, first, err))
			second, err := s.ExecURL(Command{ContainerID: "c", Cmd: []string{"echo"}, Stdout: true})
			_ = must(t, second, err)
			_, _ = fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: x\r\n%s\r\n", u.Path, headers)
			_, _ = fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: x\r\n\r\n", strings.TrimPrefix(second, "http://"+u.Host))
			_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
			r := bufio.NewReader(c)
			resp, err := http.ReadResponse(r, nil)
			if err != nil {
				t.Fatal(err)
			}
			_, _ = io.Copy(io.Discard, resp.Body)
			if resp.StatusCode < 400 || resp.StatusCode >= 500 || resp.Header.Get("Location") != "" {
				t.Errorf("status %s", resp.Status)
			}
			rest, err := io.ReadAll(r)
			if nerr, ok := err.(net.Error); ok && nerr.Timeout() {
				t.Error("connection stays open")
			}
			if len(rest) > 0 {
				t.Errorf("a second answer came: %q", rest)
			}
		})
	}
}

func TestOrigin(t *testing.T) {
	s := start(t, &fakeBackend{}, Config{})
	tests := []struct {
		origin, forwarded string
		ok                bool
	}{
		{"", "", true},
		{"http://" + s.Addr(), "", true},
		{"http://evil.example", "", false},
		{"http://evil.example", "10.0.0.1", true}, // by kubelet's proxy
		{"null", "", false},
		{"http://127.0.0.1", "", false}, // another port
		{"%zz", "", false},
	}
	for _, tt := range tests {
		u, err := s.ExecURL(Command{ContainerID: "c", Cmd: []string{"echo"}, Stdout: true})
		_ = must(t, u, err)
		h := http.Header{}
		if tt.origin != "" {
			h.Set("Origin", tt.origin)
		}
		if tt.forwarded != "" {
			h.Set("X-Forwarded-For", tt.forwarded)
		}
		c, _, err := trySPDY(u, h, "v4.channel.k8s.io")
		if (err == nil) != tt.ok {
			t.Errorf("origin %q by %q: %v, want ok %v", tt.origin, tt.forwarded, err, tt.ok)
		}
		if c != nil {
			_ = c.Close()
		}
	}
}

func TestHTTPLimits(t *testing.T) {
	s := start(t, &fakeBackend{}, Config{MaxConns: 2})
	c, _ := rawDial(t, "http://"+s.Addr())
	_, _ = fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: x\r\nX: %s\r\n\r\n", strings.Repeat("a", 1<<20))
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil || resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
		t.Errorf("1 MiB of header: %v %v", resp, err)
	}
	_ = c.Close()
	var held []net.Conn
	for range 2 {
		c, _ := rawDial(t, "http://"+s.Addr())
		held = append(held, c)
	}
	time.Sleep(50 * time.Millisecond)
	extra, _ := rawDial(t, "http://"+s.Addr()) // queued by the kernel, not served
	_, _ = io.WriteString(extra, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	_ = extra.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	if _, err := extra.Read(make([]byte, 1)); err == nil {
		t.Error("third connection was served while two are held")
	}
	_ = held[0].Close()
	_ = extra.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := extra.Read(make([]byte, 1)); err != nil {
		t.Errorf("third connection after one has left: %v", err)
	}
	_ = held[1].Close()
}

func TestSPDYFrameLimits(t *testing.T) {
	frame := func(control bool, length uint32, payload int) []byte {
		h := make([]byte, 8)
		if control {
			h[0], h[1], h[3] = 0x80, 3, 1
		} else {
			h[3] = 1
		}
		binary.BigEndian.PutUint32(h[4:], length)
		return append(h, make([]byte, payload)...)
	}
	tests := []struct {
		name  string
		bytes []byte
		ok    bool
	}{
		{"small data", frame(false, 100, 100), true},
		{"two frames", append(frame(false, 5, 5), frame(true, 7, 7)...), true},
		{"big data", frame(false, maxSPDYData+1, 0), false},
		{"most data", frame(false, maxSPDYData, 10), true},
		{"big control", frame(true, maxSPDYControl+1, 0), false},
		{"bad second", append(frame(false, 5, 5), frame(true, 1<<24-1, 0)...), false},
	}
	for _, tt := range tests {
		for _, step := range []int{1, 3, 8, 1000, 1 << 20} {
			var c spdyConn
			var err error
			for p := tt.bytes; len(p) > 0 && err == nil; {
				n := min(step, len(p))
				err = c.check(p[:n])
				p = p[n:]
			}
			if (err == nil) != tt.ok {
				t.Errorf("%s by %d: %v", tt.name, step, err)
			}
		}
	}
}

func TestSPDYBombs(t *testing.T) {
	b := &fakeBackend{ended: make(chan string, 1)}
	s := start(t, b, Config{})
	for name, frame := range map[string]string{
		"SETTINGS of 16 MiB": "\x80\x03\x00\x04\x00\xff\xff\xff",
		"data of 16 MiB":     "\x00\x00\x00\x01\x00\xff\xff\xff",
	} {
		u, err := s.ExecURL(Command{ContainerID: "c", Cmd: []string{"wait"}, Stdout: true})
		c, parsed := rawDial(t, must(t, u, err))
		_, _ = fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n\r\n%s", parsed.Path, frame)
		_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := io.ReadAll(c); err != nil && !strings.Contains(err.Error(), "reset") {
			t.Errorf("%s: connection stays open: %v", name, err)
		}
	}
}

// Row S-02: tokens must never be logged, however loud the log is.
func TestTokensAreNotLogged(t *testing.T) {
	var mu sync.Mutex
	var out bytes.Buffer
	state := klog.CaptureState()
	klog.LogToStderr(false)
	klog.SetOutput(writerFunc(func(p []byte) (int, error) {
		mu.Lock()
		defer mu.Unlock()
		return out.Write(p)
	}))
	var verbosity klog.Level
	_ = verbosity.Set("10")
	var token string
	t.Cleanup(func() { // after the server has ended
		_ = verbosity.Set("0")
		klog.Flush()
		state.Restore()
		mu.Lock()
		defer mu.Unlock()
		if strings.Contains(out.String(), token) {
			t.Error("the token is in the log")
		}
		if !strings.Contains(out.String(), "the-container") {
			t.Errorf("nothing was logged: %q", out.String())
		}
	})
	s := start(t, &fakeBackend{}, Config{})
	u, err := s.ExecURL(Command{ContainerID: "the-container", Cmd: []string{"panic"}, Stdout: true})
	c := dialSPDY(t, must(t, u, err), "v4.channel.k8s.io")
	c.open("error", "stdout")
	<-c.conn.CloseChan()
	token = u[strings.LastIndex(u, "/")+1:]
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }
