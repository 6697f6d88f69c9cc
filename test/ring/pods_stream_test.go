package ring

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"google.golang.org/grpc/codes"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/streaming/pkg/httpstream"

	"github.com/naru-project/naru/internal/testhost"
)

func TestPodExecStream(t *testing.T) {
	n := StartNode(t)
	pod := n.Pod(t, nil)
	id := n.Run(t, pod, nil)
	t.Run("streams and exit code", func(t *testing.T) {
		s := n.execStream(t, id, streamOptions{}, "/bin/sh", "-c", "echo out; echo err >&2; exit 17")
		if code := s.exitCode(); code != 17 || s.out.String() != "out\n" || s.err.String() != "err\n" {
			t.Errorf("got %q, %q, %d", s.out.String(), s.err.String(), code)
		}
	})
	t.Run("half close of stdin", func(t *testing.T) {
		s := n.execStream(t, id, streamOptions{stdin: true}, "/bin/sh", "-c", "wc -c; echo after")
		s.send(strings.Repeat("0123456789", 20000))
		_ = s.stdin.Close()
		if code := s.exitCode(); code != 0 || s.out.String() != "200000\nafter\n" {
			t.Errorf("got %q, %d", s.out.String(), code)
		}
	})
	t.Run("much output", func(t *testing.T) {
		s := n.execStream(t, id, streamOptions{}, "/bin/sh", "-c", "seq 1 300000; exit 2")
		var want bytes.Buffer
		for i := range 300000 {
			fmt.Fprintln(&want, i+1)
		}
		if code := s.exitCode(); code != 2 || s.out.String() != want.String() {
			t.Errorf("%d bytes, want %d; exit code %d", len(s.out.String()), want.Len(), code)
		}
	})
	t.Run("terminal and its size", func(t *testing.T) {
		s := n.execStream(t, id, streamOptions{stdin: true, tty: true}, "/bin/sh", "-c", `trap 'stty size' WINCH; tty; while :; do read -r line && echo "=$line="; [ "$line" != bye ] || exit 12; done`)
		s.out.waitFor(t, "/dev/pts/")
		s.resize(101, 37)
		s.out.waitFor(t, "37 101")
		s.send("hello\r")
		s.out.waitFor(t, "=hello=")
		s.send("bye\r")
		if code := s.exitCode(); code != 12 {
			t.Errorf("exit code %d", code)
		}
	})
	t.Run("a client that hangs up ends the command", func(t *testing.T) {
		s := n.execStream(t, id, streamOptions{}, "/bin/sh", "-c", "echo here; exec sleep 6543")
		s.out.waitFor(t, "here")
		s.close()
		eventually(t, 10*time.Second, "the end of the command", func() bool { return strings.TrimSpace(n.Sh(t, id, "ps | grep -c 'slee[p] 6543' || true")) == "0" })
	})
	t.Run("WebSocket", func(t *testing.T) { execWebSocket(t, n, id) })
	t.Run("a URL works once", func(t *testing.T) {
		r, err := n.Runtime.Exec(within(t, callTime), &criv1.ExecRequest{ContainerId: id, Cmd: []string{"/bin/true"}, Stdout: true, Stderr: true})
		if err != nil {
			t.Fatal(err)
		}
		if s := openStream(t, r.Url, streamOptions{}); s.exitCode() != 0 {
			t.Error("it did not work at all")
		}
		if c, err := dialSPDY(r.Url, remotecommand.StreamProtocolV4Name); err == nil {
			_ = c.Close()
			t.Error("it worked twice")
		}
	})
	t.Run("no such command", func(t *testing.T) {
		s := n.execStream(t, id, streamOptions{}, "/no/such/command")
		eventually(t, 10*time.Second, "the status", func() bool { return s.status.ended() })
		if !strings.Contains(s.status.String(), "Failure") || !strings.Contains(s.status.String(), "/no/such/command") {
			t.Errorf("status %q", s.status.String())
		}
	})
	t.Run("requests that cannot be", func(t *testing.T) {
		_, err := n.Runtime.Exec(within(t, callTime), &criv1.ExecRequest{ContainerId: id, Cmd: []string{"/bin/true"}})
		wantError(t, err, codes.InvalidArgument)
		_, err = n.Runtime.Exec(within(t, callTime), &criv1.ExecRequest{ContainerId: id, Cmd: []string{"/bin/true"}, Tty: true, Stdout: true, Stderr: true})
		wantError(t, err, codes.InvalidArgument, "tty")
		_, err = n.Runtime.Exec(within(t, callTime), &criv1.ExecRequest{ContainerId: strings.Repeat("a", 64), Cmd: []string{"/bin/true"}, Stdout: true})
		wantError(t, err, codes.NotFound)
	})
}

// execWebSocket is kubectl's newest protocol: channels in messages, and a
// message that closes one.
func execWebSocket(t *testing.T, n *Node, id string) {
	r, err := n.Runtime.Exec(within(t, callTime), &criv1.ExecRequest{
		ContainerId: id, Cmd: []string{"/bin/sh", "-c", "cat; echo to stderr >&2; exit 19"}, Stdin: true, Stdout: true, Stderr: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	d := websocket.Dialer{Subprotocols: []string{remotecommand.StreamProtocolV5Name}}
	c, resp, err := d.Dial(strings.Replace(r.Url, "http://", "ws://", 1), nil)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	defer func() { _ = c.Close() }()
	if c.Subprotocol() != remotecommand.StreamProtocolV5Name {
		t.Errorf("negotiated %q", c.Subprotocol())
	}
	for _, m := range [][]byte{append([]byte{remotecommand.StreamStdIn}, "typed\n"...), {remotecommand.StreamClose, remotecommand.StreamStdIn}} {
		if err := c.WriteMessage(websocket.BinaryMessage, m); err != nil {
			t.Fatal(err)
		}
	}
	got := map[byte]string{}
	_ = c.SetReadDeadline(time.Now().Add(testhost.Limit(20 * time.Second)))
	for {
		_, m, err := c.ReadMessage()
		if err != nil {
			break
		}
		if len(m) > 0 {
			got[m[0]] += string(m[1:])
		}
	}
	var st struct{ Reason string }
	if err := json.Unmarshal([]byte(got[remotecommand.StreamErr]), &st); err != nil || st.Reason != "NonZeroExitCode" || !strings.Contains(got[remotecommand.StreamErr], `"19"`) {
		t.Errorf("status %q, %v", got[remotecommand.StreamErr], err)
	}
	if got[remotecommand.StreamStdOut] != "typed\n" || got[remotecommand.StreamStdErr] != "to stderr\n" {
		t.Errorf("got %q", got)
	}
}

func TestPodAttach(t *testing.T) {
	n := StartNode(t)
	pod := n.Pod(t, nil)
	t.Run("stdin_once", func(t *testing.T) {
		id := n.Run(t, pod, func(c *criv1.ContainerConfig) {
			c.Stdin, c.StdinOnce, c.Command = true, true, []string{"/bin/sh", "-c", "cat; echo end of input; exit 3"}
		})
		s := n.attachStream(t, id, streamOptions{stdin: true})
		s.send("one\n")
		s.out.waitFor(t, "one\n")
		_ = s.stdin.Close()
		s.out.waitFor(t, "end of input\n")
		if st := n.WaitExit(t, id); st.ExitCode != 3 || n.LogText(t, id) != "one\nend of input\n" {
			t.Errorf("exit code %d, log %q", st.ExitCode, n.LogText(t, id))
		}
		eventually(t, 10*time.Second, "the end of the attach", func() bool { return s.status.ended() })
	})
	t.Run("stdin_once, the client hangs up", func(t *testing.T) {
		id := n.Run(t, pod, func(c *criv1.ContainerConfig) {
			c.Stdin, c.StdinOnce, c.Command = true, true, []string{"/bin/sh", "-c", "cat; exit 4"}
		})
		s := n.attachStream(t, id, streamOptions{stdin: true})
		s.send("one\n")
		s.out.waitFor(t, "one\n")
		s.close()
		if st := n.WaitExit(t, id); st.ExitCode != 4 {
			t.Errorf("exit code %d", st.ExitCode)
		}
	})
	t.Run("stdin stays open, for one after the other", func(t *testing.T) {
		id := n.Run(t, pod, func(c *criv1.ContainerConfig) { c.Stdin, c.Command = true, []string{"/bin/cat"} })
		for _, word := range []string{"first\n", "second\n"} {
			s := n.attachStream(t, id, streamOptions{stdin: true})
			s.send(word)
			s.out.waitFor(t, word)
			s.close()
		}
		if n.Status(t, id).State != criv1.ContainerState_CONTAINER_RUNNING || n.LogText(t, id) != "first\nsecond\n" {
			t.Errorf("log %q", n.LogText(t, id))
		}
	})
	t.Run("several at a time, both streams", func(t *testing.T) {
		ctl := n.HostDir(t)
		id := n.Run(t, pod, each(mounts(Volume(ctl, "/ctl")), shell("while [ ! -e /ctl/go ]; do usleep 5000; done; seq 1 5000; echo err >&2; usleep 100000")))
		a, b := n.attachStream(t, id, streamOptions{}), n.attachStream(t, id, streamOptions{})
		time.Sleep(100 * time.Millisecond) // until both are there
		n.Sh(t, id, "touch /ctl/go")
		for _, s := range []*stream{a, b} {
			eventually(t, 10*time.Second, "the end of the attach", func() bool { return s.status.ended() })
			if out := s.out.String(); strings.Count(out, "\n") != 5000 || !strings.HasSuffix(out, "\n5000\n") || s.err.String() != "err\n" {
				t.Errorf("%d lines, stderr %q", strings.Count(out, "\n"), s.err.String())
			}
		}
	})
	t.Run("terminal", func(t *testing.T) {
		id := n.Run(t, pod, func(c *criv1.ContainerConfig) { c.Stdin, c.Tty, c.Command = true, true, []string{"/bin/sh"} })
		s := n.attachStream(t, id, streamOptions{stdin: true, tty: true})
		s.resize(77, 33)
		s.send("usleep 100000; stty size; tty; ls -l $(tty) | cut -c1\r")
		s.out.waitFor(t, "33 77")
		s.out.waitFor(t, "/dev/")
		s.send("exit 21\r")
		if st := n.WaitExit(t, id); st.ExitCode != 21 {
			t.Errorf("exit code %d", st.ExitCode)
		}
	})
	t.Run("requests that cannot be", func(t *testing.T) {
		id := n.Run(t, pod, nil)
		_, err := n.Runtime.Attach(within(t, callTime), &criv1.AttachRequest{ContainerId: id})
		wantError(t, err, codes.InvalidArgument)
		n.stop(t, id, 0)
		_, err = n.Runtime.Attach(within(t, callTime), &criv1.AttachRequest{ContainerId: id, Stdout: true, Stderr: true})
		wantError(t, err, codes.FailedPrecondition)
	})
}

// forwarded opens one connection by the port-forward session.
func forwarded(t testing.TB, c httpstream.Connection, port, request int) (data, errs httpstream.Stream) {
	t.Helper()
	h := http.Header{}
	h.Set(portforward.PortHeader, strconv.Itoa(port))
	h.Set(portforward.PortForwardRequestIDHeader, strconv.Itoa(request))
	open := func(kind string) httpstream.Stream {
		h.Set(portforward.StreamType, kind)
		s, err := c.CreateStream(h)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	errs = open(portforward.StreamTypeError)
	return open(portforward.StreamTypeData), errs
}

func TestPodPortForward(t *testing.T) {
	n := StartNode(t)
	session := func(t *testing.T, pod string, ports ...int32) httpstream.Connection {
		t.Helper()
		r, err := n.Runtime.PortForward(within(t, callTime), &criv1.PortForwardRequest{PodSandboxId: pod, Port: ports})
		if err != nil {
			t.Fatal(err)
		}
		c, err := dialSPDY(r.Url, portforward.ProtocolV1Name)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	pod := n.Pod(t, nil)
	n.Run(t, pod, speaker(80, "from-the-pod"))
	cat := n.Run(t, pod, shell("exec nc -ll -p 81 -e /bin/cat"))
	wantFetch(t, net.JoinHostPort(n.IPs(t, pod)[0], "80"), "from-the-pod")
	c := session(t, pod, 80, 81, 82, 8443)
	t.Run("a server", func(t *testing.T) {
		for i := range 3 {
			data, errs := forwarded(t, c, 80, i)
			if b, err := io.ReadAll(data); err != nil || string(b) != "from-the-pod\n" {
				t.Errorf("got %q, %v", b, err)
			}
			if b, _ := io.ReadAll(errs); len(b) > 0 {
				t.Errorf("error stream: %q", b)
			}
			c.RemoveStreams(data, errs)
		}
	})
	t.Run("both ways, with a half close", func(t *testing.T) {
		eventually(t, 10*time.Second, "the server", func() bool { return n.Sh(t, cat, "cat /proc/net/tcp /proc/net/tcp6 | grep -c :0051 || true") != "0" })
		data, errs := forwarded(t, c, 81, 10)
		sent := bytes.Repeat([]byte("port-forward "), 100000)
		go func() {
			_, _ = io.CopyBuffer(struct{ io.Writer }{data}, struct{ io.Reader }{bytes.NewReader(sent)}, make([]byte, 32<<10)) // as clients do
			_ = data.Close()
		}()
		if got, err := io.ReadAll(data); err != nil || !bytes.Equal(got, sent) {
			b, _ := io.ReadAll(errs)
			t.Errorf("%d bytes of %d came back, %v, %q", len(got), len(sent), err, b)
		}
	})
	t.Run("nobody listens", func(t *testing.T) {
		_, errs := forwarded(t, c, 82, 20)
		if b, _ := io.ReadAll(errs); !strings.Contains(string(b), "refused") || !strings.Contains(string(b), "82") {
			t.Errorf("error stream: %q", b)
		}
	})
	t.Run("nobody listens, and much is sent", func(t *testing.T) {
		data, errs := forwarded(t, c, 82, 21)
		wrote := make(chan error, 1)
		go func() {
			var err error
			for i := 0; i < 64 && err == nil; i++ {
				_, err = data.Write(make([]byte, 32<<10))
			}
			wrote <- err
		}()
		if b, _ := io.ReadAll(errs); !strings.Contains(string(b), "refused") {
			t.Errorf("error stream: %q", b)
		}
		<-wrote
		data, _ = forwarded(t, c, 80, 22)
		if b, err := io.ReadAll(data); string(b) != "from-the-pod\n" {
			t.Errorf("the next connection: %q, %v", b, err)
		}
	})
	t.Run("a port that was not asked for", func(t *testing.T) {
		_, errs := forwarded(t, c, 83, 23)
		if b, _ := io.ReadAll(errs); !strings.Contains(string(b), "83") {
			t.Errorf("error stream: %q", b)
		}
	})
	t.Run("only the loopback of the pod", func(t *testing.T) {
		n.inPod(t, pod, func() error {
			l, err := net.Listen("tcp6", "[::1]:8443")
			if err != nil {
				return err
			}
			t.Cleanup(func() { _ = l.Close() })
			go func() {
				if k, err := l.Accept(); err == nil {
					_, _ = io.WriteString(k, "six")
					_ = k.Close()
				}
			}()
			return nil
		})
		data, _ := forwarded(t, c, 8443, 30)
		if b, err := io.ReadAll(data); string(b) != "six" {
			t.Errorf("got %q, %v", b, err)
		}
	})
	t.Run("host network", func(t *testing.T) {
		host := n.Pod(t, namespaces(func(o *criv1.NamespaceOption) { o.Network = criv1.NamespaceMode_NODE }))
		n.Run(t, host, speaker(18081, "from-the-host"))
		wantFetch(t, "127.0.0.1:18081", "from-the-host")
		data, _ := forwarded(t, session(t, host, 18081), 18081, 0)
		if b, err := io.ReadAll(data); string(b) != "from-the-host\n" {
			t.Errorf("got %q, %v", b, err)
		}
	})
	t.Run("a stopped pod", func(t *testing.T) {
		stopped := n.Pod(t, nil)
		if _, err := n.Runtime.StopPodSandbox(within(t, callTime), &criv1.StopPodSandboxRequest{PodSandboxId: stopped}); err != nil {
			t.Fatal(err)
		}
		_, err := n.Runtime.PortForward(within(t, callTime), &criv1.PortForwardRequest{PodSandboxId: stopped, Port: []int32{80}})
		wantError(t, err, codes.FailedPrecondition)
	})
}
