package ring

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"

	"github.com/naru-project/naru/internal/sys"
	"github.com/naru-project/naru/internal/testhost"
)

// shell sets a script as the container's command.
func shell(script string) func(*criv1.ContainerConfig) {
	return func(c *criv1.ContainerConfig) { c.Command = []string{"/bin/sh", "-c", script} }
}

// each makes one mutation of several.
func each[T any](all ...func(T)) func(T) {
	return func(c T) {
		for _, f := range all {
			if f != nil {
				f(c)
			}
		}
	}
}

// security and resources give access to the parts that most tests change.
func security(f func(*criv1.LinuxContainerSecurityContext)) func(*criv1.ContainerConfig) {
	return func(c *criv1.ContainerConfig) { f(c.Linux.SecurityContext) }
}

func mounts(m ...*criv1.Mount) func(*criv1.ContainerConfig) {
	return func(c *criv1.ContainerConfig) { c.Mounts = append(c.Mounts, m...) }
}

// namespaces changes the namespace options of a pod; they must be set before
// the containers are made, which take them over.
func namespaces(f func(*criv1.NamespaceOption)) func(*criv1.PodSandboxConfig) {
	return func(c *criv1.PodSandboxConfig) { f(c.Linux.SecurityContext.NamespaceOptions) }
}

// wantError checks code and text of an error.
func wantError(t testing.TB, err error, code codes.Code, parts ...string) {
	t.Helper()
	if status.Code(err) != code {
		t.Errorf("got %v, want code %v", err, code)
		return
	}
	for _, p := range parts {
		if !strings.Contains(status.Convert(err).Message(), p) {
			t.Errorf("the error does not say %q: %v", p, err)
		}
	}
}

// PodStatus is the pod's status.
func (n *Node) PodStatus(t testing.TB, id string) *criv1.PodSandboxStatus {
	t.Helper()
	r, err := n.Runtime.PodSandboxStatus(within(t, callTime), &criv1.PodSandboxStatusRequest{PodSandboxId: id})
	if err != nil {
		t.Fatalf("status of pod: %v", err)
	}
	return r.Status
}

// IPs are the pod's addresses, primary first.
func (n *Node) IPs(t testing.TB, pod string) (ips []string) {
	t.Helper()
	s := n.PodStatus(t, pod).Network
	if s.GetIp() != "" {
		ips = append(ips, s.Ip)
	}
	for _, a := range s.GetAdditionalIps() {
		ips = append(ips, a.Ip)
	}
	return ips
}

// podInfo decodes the verbose part of a pod's or container's status.
func (n *Node) podInfo(t testing.TB, pod string, into any) {
	t.Helper()
	r, err := n.Runtime.PodSandboxStatus(within(t, callTime), &criv1.PodSandboxStatusRequest{PodSandboxId: pod, Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(r.Info["info"]), into); err != nil {
		t.Fatalf("info of pod: %v in %q", err, r.Info["info"])
	}
}

// inPod runs f on a thread in the pod's network namespace; sockets made there
// stay there.
func (n *Node) inPod(t testing.TB, pod string, f func() error) {
	t.Helper()
	var info struct {
		Netns string `json:"netns"`
	}
	n.podInfo(t, pod, &info)
	err := sys.NamespaceThread(func() error {
		ns, err := sys.OpenNamespace(info.Netns, 0x40000000) // CLONE_NEWNET
		if err != nil {
			return err
		}
		defer func() { _ = ns.Close() }()
		if err := sys.Setns(ns, 0x40000000); err != nil {
			return err
		}
		return f()
	})
	if err != nil {
		t.Fatalf("in the pod's network: %v", err)
	}
}

// fetch reads what a TCP server says.
func fetch(addr string) (string, error) {
	c, err := net.DialTimeout("tcp", addr, testhost.Limit(3*time.Second))
	if err != nil {
		return "", err
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(testhost.Limit(5 * time.Second)))
	b, err := io.ReadAll(c)
	return string(b), err
}

// speaker makes a container that tells its name to everybody who connects, on
// IPv4 and IPv6.
func speaker(port int, word string) func(*criv1.ContainerConfig) {
	return shell(fmt.Sprintf("exec nc -ll -p %d -e /bin/echo %s", port, word))
}

// wantFetch waits until a server says word.
func wantFetch(t testing.TB, addr, word string) {
	t.Helper()
	var got string
	var err error
	for end := time.Now().Add(testhost.Limit(5 * time.Second)); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if got, err = fetch(addr); err == nil && strings.TrimSpace(got) == word {
			return
		}
	}
	t.Errorf("%s says %q, %v; want %q", addr, got, err, word)
}

// cgroupV2 tells whether this machine has cgroup version 2 alone.
func cgroupV2() bool {
	_, err := os.Stat("/sys/fs/cgroup/cgroup.controllers")
	return err == nil
}

// cgroupFile reads a file of the container's cgroup; v1 is the hierarchy and
// the file of version 1, v2 the file of version 2.
func (n *Node) cgroupFile(t testing.TB, id, v1, v2 string) string {
	t.Helper()
	controller, file, _ := strings.Cut(v1, "/")
	if cgroupV2() {
		file = v2
	}
	b, err := os.ReadFile(filepath.Join(cgroupOf(t, n.PID(t, id), controller), file))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

// cgroupTop is the mount point of the hierarchy that has the controller.
func cgroupTop(controller string) string {
	if cgroupV2() {
		return "/sys/fs/cgroup"
	}
	return "/sys/fs/cgroup/" + controller
}

// cgroupOf is the folder of a process's cgroup in the hierarchy that has the
// controller.
func cgroupOf(t testing.TB, pid int, controller string) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		t.Fatal(err)
	}
	want := controller
	if cgroupV2() {
		want = "" // 0::/path
	}
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		for name := range strings.SplitSeq(f[1], ",") {
			if name == want {
				return filepath.Join(cgroupTop(controller), f[2])
			}
		}
	}
	t.Fatalf("process %d is in no cgroup with the controller %s:\n%s", pid, controller, b)
	return ""
}

// sink collects output and can be waited on.
type sink struct {
	mu   sync.Mutex
	buf  bytes.Buffer
	done bool
}

func (s *sink) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.Write(p)
}

func (s *sink) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.String()
}

func (s *sink) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.done = true
}

func (s *sink) ended() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.done
}

// waitFor waits until the output holds text.
func (s *sink) waitFor(t testing.TB, text string) {
	t.Helper()
	for end := time.Now().Add(testhost.Limit(10 * time.Second)); !strings.Contains(s.String(), text); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) || s.ended() && !strings.Contains(s.String(), text) {
			t.Fatalf("the output does not hold %q: %.500q (ended: %v)", text, s.String(), s.ended())
		}
	}
}

// stream is a client of Exec or Attach, over SPDY.
type stream struct {
	t              testing.TB
	conn           httpstream.Connection
	stdin, resizes httpstream.Stream
	out, err       sink
	status         sink
	wg             sync.WaitGroup
}

type streamOptions struct{ stdin, tty bool }

func (n *Node) execStream(t testing.TB, id string, o streamOptions, cmd ...string) *stream {
	t.Helper()
	r, err := n.Runtime.Exec(within(t, callTime), &criv1.ExecRequest{ContainerId: id, Cmd: cmd, Tty: o.tty, Stdin: o.stdin, Stdout: true, Stderr: !o.tty})
	if err != nil {
		t.Fatalf("exec: %v", err)
	}
	return openStream(t, r.Url, o)
}

func (n *Node) attachStream(t testing.TB, id string, o streamOptions) *stream {
	t.Helper()
	r, err := n.Runtime.Attach(within(t, callTime), &criv1.AttachRequest{ContainerId: id, Tty: o.tty, Stdin: o.stdin, Stdout: true, Stderr: !o.tty})
	if err != nil {
		t.Fatalf("attach: %v", err)
	}
	return openStream(t, r.Url, o)
}

func dialSPDY(url, protocol string) (httpstream.Connection, error) {
	rt, err := spdy.NewRoundTripper(nil)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequest(http.MethodPost, url, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set(httpstream.HeaderProtocolVersion, protocol)
	resp, err := rt.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	return rt.NewConnection(resp)
}

func openStream(t testing.TB, url string, o streamOptions) *stream {
	t.Helper()
	conn, err := dialSPDY(url, remotecommand.StreamProtocolV4Name)
	if err != nil {
		t.Fatalf("open %s: %v", url, err)
	}
	s := &stream{t: t, conn: conn}
	t.Cleanup(s.close)
	open := func(name string) httpstream.Stream {
		st, err := conn.CreateStream(http.Header{remotecommand.StreamType: []string{name}})
		if err != nil {
			t.Fatalf("open stream %s: %v", name, err)
		}
		return st
	}
	collect := func(name string, to *sink) {
		st := open(name)
		s.wg.Go(func() {
			_, _ = io.Copy(to, st)
			to.end()
		})
	}
	collect(remotecommand.StreamTypeError, &s.status)
	if o.stdin {
		s.stdin = open(remotecommand.StreamTypeStdin)
	}
	collect(remotecommand.StreamTypeStdout, &s.out)
	if o.tty {
		s.resizes = open(remotecommand.StreamTypeResize)
	} else {
		collect(remotecommand.StreamTypeStderr, &s.err)
	}
	return s
}

func (s *stream) send(text string) {
	s.t.Helper()
	if _, err := io.WriteString(s.stdin, text); err != nil {
		s.t.Fatalf("send %q: %v", text, err)
	}
}

func (s *stream) resize(width, height int) {
	s.t.Helper()
	if _, err := fmt.Fprintf(s.resizes, `{"Width":%d,"Height":%d}`, width, height); err != nil {
		s.t.Fatalf("resize: %v", err)
	}
}

// exitCode waits for the end of the command and of its output, which come by
// streams of their own.
func (s *stream) exitCode() int {
	s.t.Helper()
	eventually(s.t, 30*time.Second, "the status of the command", func() bool { return s.status.ended() && s.out.ended() })
	var st struct {
		Status  string
		Message string
		Details struct {
			Causes []struct{ Reason, Message string }
		}
	}
	if err := json.Unmarshal([]byte(s.status.String()), &st); err != nil {
		s.t.Fatalf("status %q: %v", s.status.String(), err)
	}
	if st.Status == "Success" {
		return 0
	}
	for _, c := range st.Details.Causes {
		if c.Reason == "ExitCode" {
			code, _ := strconv.Atoi(c.Message)
			return code
		}
	}
	s.t.Fatalf("status %q", s.status.String())
	return -1
}

func (s *stream) close() {
	_ = s.conn.Close()
	s.wg.Wait()
}

// naru runs the command line against the node and returns its output.
func (n *Node) naru(t testing.TB, args ...string) (string, int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), testhost.Limit(30*time.Second))
	defer cancel()
	cmd := exec.CommandContext(ctx, naruBin, append([]string{"--config", n.Config}, args...)...)
	out, err := cmd.CombinedOutput()
	var ended *exec.ExitError
	switch {
	case err == nil:
		return string(out), 0
	case errors.As(err, &ended):
		return string(out), ended.ExitCode()
	}
	t.Fatalf("naru %q: %v", args, err)
	return "", 0
}

// containerInfo decodes the verbose part of a container's status.
func (n *Node) containerInfo(t testing.TB, id string, into any) {
	t.Helper()
	r, err := n.Runtime.ContainerStatus(within(t, callTime), &criv1.ContainerStatusRequest{ContainerId: id, Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(r.Info["info"]), into); err != nil {
		t.Fatalf("info of container: %v in %q", err, r.Info["info"])
	}
}

func codeOf(err error) codes.Code { return status.Code(err) }

// stop stops a container and returns how long that took.
func (n *Node) stop(t testing.TB, id string, seconds int64) time.Duration {
	t.Helper()
	began := time.Now()
	if _, err := n.Runtime.StopContainer(within(t, callTime), &criv1.StopContainerRequest{ContainerId: id, Timeout: seconds}); err != nil {
		t.Fatalf("stop container: %v", err)
	}
	return time.Since(began)
}

// messageOf is the text of a call's error.
func messageOf(err error) string { return status.Convert(err).Message() }
