package streaming

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	goruntime "runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"

	"github.com/naru-project/naru/pod"
)

// fakeBackend runs what the command's first word says.
type fakeBackend struct {
	mu    sync.Mutex
	sizes []pod.Size
	dial  func(ctx context.Context, podID string, port uint16) (io.ReadWriteCloser, error)
	ended chan string // one word per ended call, if not nil
}

func (b *fakeBackend) Exec(ctx context.Context, id string, cmd []string, tty bool, s pod.Streams) (int, error) {
	defer b.end("exec")
	switch cmd[0] {
	case "echo": // all words to stdout
		_, err := io.WriteString(s.Stdout, strings.Join(cmd[1:], " "))
		return 0, err
	case "both":
		_, _ = io.WriteString(s.Stdout, "out")
		_, _ = io.WriteString(s.Stderr, "err")
		return 0, nil
	case "cat":
		n, err := io.Copy(s.Stdout, s.Stdin)
		if err == nil {
			_, err = fmt.Fprintf(s.Stdout, "[%d bytes]", n)
		}
		return 0, err
	case "exit":
		var code int
		_, _ = fmt.Sscan(cmd[1], &code)
		return code, nil
	case "fail":
		return 0, errors.New("no such program")
	case "yes":
		line := bytes.Repeat([]byte("y\n"), 16<<10)
		stop := context.AfterFunc(ctx, func() {})
		defer stop()
		for ctx.Err() == nil {
			if _, err := s.Stdout.Write(line); err != nil {
				return 0, err
			}
		}
		return 0, ctx.Err()
	case "sizes": // until three sizes have come, or the end
		for size := range s.Resize {
			b.mu.Lock()
			b.sizes = append(b.sizes, size)
			b.mu.Unlock()
			_, _ = fmt.Fprintf(s.Stdout, "%dx%d ", size.Width, size.Height)
		}
		return 0, nil
	case "wait":
		<-ctx.Done()
		return 0, ctx.Err()
	case "big":
		_, err := s.Stdout.Write(bytes.Repeat([]byte("0123456789abcdef"), 1<<16))
		return 7, err
	case "panic":
		panic("on purpose")
	}
	return 127, nil
}

func (b *fakeBackend) Attach(ctx context.Context, id string, s pod.Streams) error {
	defer b.end("attach")
	if id == "silent" {
		<-ctx.Done()
		return ctx.Err()
	}
	_, err := io.Copy(s.Stdout, s.Stdin)
	return err
}

func (b *fakeBackend) Dial(ctx context.Context, podID string, port uint16) (io.ReadWriteCloser, error) {
	if b.dial != nil {
		return b.dial(ctx, podID, port)
	}
	return nil, fmt.Errorf("connect to port %d: refused", port)
}

func (b *fakeBackend) end(word string) {
	if b.ended != nil {
		b.ended <- word
	}
}

// start runs a server until the end of the test and then demands that no
// goroutine is left.
func start(t *testing.T, b *fakeBackend, cfg Config) *Server {
	t.Helper()
	before := goruntime.NumGoroutine()
	s := New(cfg, b)
	if err := s.Listen(); err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve() }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := s.Close(ctx); err != nil {
			t.Errorf("close: %v", err)
		}
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
		http.DefaultTransport.(*http.Transport).CloseIdleConnections()
		settle(t, before)
	})
	return s
}

// settle waits until at most n goroutines are left.
func settle(t *testing.T, n int) {
	t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	for goruntime.NumGoroutine() > n {
		if time.Now().After(deadline) {
			buf := make([]byte, 1<<20)
			t.Fatalf("%d goroutines left, %d before:\n%s", goruntime.NumGoroutine(), n, buf[:goruntime.Stack(buf, true)])
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func must(t *testing.T, v string, err error) string {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// spdyClient is a client like client-go's SPDY executor.
type spdyClient struct {
	t        *testing.T
	conn     httpstream.Connection
	protocol string
	streams  map[string]httpstream.Stream
}

func dialSPDY(t *testing.T, rawURL string, protocols ...string) *spdyClient {
	t.Helper()
	c, resp, err := trySPDY(rawURL, nil, protocols...)
	if err != nil {
		t.Fatalf("upgrade: %v", err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return &spdyClient{t: t, conn: c, protocol: resp.Header.Get(httpstream.HeaderProtocolVersion), streams: map[string]httpstream.Stream{}}
}

func trySPDY(rawURL string, header http.Header, protocols ...string) (httpstream.Connection, *http.Response, error) {
	rt, err := spdy.NewRoundTripper(nil)
	if err != nil {
		return nil, nil, err
	}
	req, err := http.NewRequest(http.MethodPost, rawURL, nil)
	if err != nil {
		return nil, nil, err
	}
	for k, v := range header {
		req.Header[k] = v
	}
	for _, p := range protocols {
		req.Header.Add(httpstream.HeaderProtocolVersion, p)
	}
	resp, err := rt.RoundTrip(req)
	if err != nil {
		return nil, nil, err
	}
	c, err := rt.NewConnection(resp)
	return c, resp, err
}

// dialSPDYOver is dialSPDY that also tells the TCP connection it runs over.
func dialSPDYOver(t *testing.T, rawURL string, raw *net.Conn, protocol string) *spdyClient {
	t.Helper()
	tcp, u := rawDial(t, rawURL)
	_, _ = fmt.Fprintf(tcp, "POST %s HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: %s\r\n\r\n", u.Path, protocol)
	answer := make([]byte, 0, 1024) // to the empty line and not a byte more
	for !bytes.HasSuffix(answer, []byte("\r\n\r\n")) {
		var b [1]byte
		if _, err := tcp.Read(b[:]); err != nil {
			t.Fatalf("upgrade: %v after %q", err, answer)
		}
		answer = append(answer, b[0])
	}
	c, err := spdy.NewClientConnection(tcp)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	*raw = tcp
	return &spdyClient{t: t, conn: c, streams: map[string]httpstream.Stream{}}
}

// open opens streams by name.
func (c *spdyClient) open(names ...string) {
	c.t.Helper()
	for _, name := range names {
		s, err := c.conn.CreateStream(http.Header{remotecommand.StreamType: []string{name}})
		if err != nil {
			c.t.Fatalf("open %s: %v", name, err)
		}
		c.streams[name] = s
	}
}

// read reads a stream to its end.
func (c *spdyClient) read(name string) string {
	c.t.Helper()
	b, err := io.ReadAll(c.streams[name])
	if err != nil {
		c.t.Fatalf("read %s: %v", name, err)
	}
	return string(b)
}

// rawDial opens a plain TCP connection to the server of a URL.
func rawDial(t *testing.T, rawURL string) (net.Conn, *url.URL) {
	t.Helper()
	u, err := url.Parse(rawURL)
	if err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("tcp", u.Host)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c, u
}
