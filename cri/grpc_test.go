package cri

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	goruntime "runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/pod"
)

// Until recovery is done calls wait, of both kinds: the kubelet gives up the
// stream of events for good when it has been refused five times.
func TestReadinessGate(t *testing.T) {
	s, _, _ := newTestServer()
	s.ready = make(chan struct{})
	c := runtimeClient(t, s)
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := c.Version(short, &criv1.VersionRequest{}); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("a short call before recovery: %v", err)
	}
	answers := make(chan error, 2)
	go func() {
		_, err := c.Version(t.Context(), &criv1.VersionRequest{})
		answers <- err
	}()
	go func() {
		st, err := c.StreamContainers(t.Context(), &criv1.StreamContainersRequest{})
		if err == nil {
			_, err = st.Recv()
		}
		answers <- err
	}()
	select {
	case err := <-answers:
		t.Errorf("answered before recovery: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	s.SetReady()
	for range 2 {
		if err := <-answers; err != nil {
			t.Errorf("after recovery: %v", err)
		}
	}
}

// A daemon that ends before it is ready lets nobody wait.
func TestReadinessGateEnds(t *testing.T) {
	s, _, _ := newTestServer()
	s.ready = make(chan struct{})
	c := runtimeClient(t, s)
	answer := make(chan error, 1)
	go func() {
		_, err := c.Version(t.Context(), &criv1.VersionRequest{})
		answer <- err
	}()
	time.Sleep(50 * time.Millisecond)
	s.close()
	if err := <-answer; status.Code(err) != codes.Unavailable {
		t.Errorf("got %v", err)
	}
}

func TestErrorCodes(t *testing.T) {
	s, pods, _ := newTestServer()
	c := runtimeClient(t, s)
	tests := []struct {
		err  error
		want codes.Code
	}{
		{errFake, codes.Internal},
		{context.Canceled, codes.Canceled},
		{fmt.Errorf("wait: %w", context.DeadlineExceeded), codes.DeadlineExceeded},
		{errs.New(errs.Internal, "wait: %w", context.DeadlineExceeded), codes.DeadlineExceeded},
		{errs.New(errs.Unavailable, "wait: %w", context.DeadlineExceeded), codes.Unavailable},
		{status.Error(codes.Unknown, "x"), codes.Internal},
	}
	for class := errs.Internal; class <= errs.Unimplemented; class++ {
		if _, ok := codeOf[class]; !ok {
			t.Errorf("%v has no code", class)
		}
		tests = append(tests, struct {
			err  error
			want codes.Code
		}{errs.New(class, "boom"), codeOf[class]})
		if got := codeOf[class].String(); got != class.String() {
			t.Errorf("%v maps to %v", class, got)
		}
	}
	for _, tt := range tests {
		pods.mu.Lock()
		pods.err["StartContainer"] = tt.err
		pods.mu.Unlock()
		_, err := c.StartContainer(t.Context(), &criv1.StartContainerRequest{ContainerId: "c"})
		if status.Code(err) != tt.want || status.Convert(err).Message() != tt.err.Error() {
			t.Errorf("%v: got %v, want %v", tt.err, err, tt.want)
		}
	}
}

func TestErrorTextIsValidUTF8(t *testing.T) {
	if err := toStatus(errors.New("bad \xff byte")); status.Convert(err).Message() != "bad \uFFFD byte" {
		t.Error(err)
	}
}

// Row S-15: a bug in a handler ends one call.
func TestPanicBecomesInternal(t *testing.T) {
	s, pods, _ := newTestServer()
	c := runtimeClient(t, s)
	pods.mu.Lock()
	pods.panics = true
	pods.mu.Unlock()
	logged := captureLog(t, func() {
		_, err := c.StartContainer(t.Context(), &criv1.StartContainerRequest{ContainerId: "c"})
		if status.Code(err) != codes.Internal || strings.Contains(err.Error(), "fake panic") {
			t.Errorf("got %v", err)
		}
		st, err := c.StreamContainers(t.Context(), &criv1.StreamContainersRequest{})
		if err == nil {
			_, err = st.Recv()
		}
		if status.Code(err) != codes.Internal {
			t.Errorf("stream: %v", err)
		}
	})
	if !strings.Contains(logged, "fake panic in StartContainer") || !strings.Contains(logged, "container_start.go") {
		t.Errorf("the log lacks panic or stack: %s", logged)
	}
	pods.mu.Lock()
	pods.panics = false
	pods.mu.Unlock()
	if _, err := c.StartContainer(t.Context(), &criv1.StartContainerRequest{ContainerId: "c"}); err != nil {
		t.Errorf("after the panic: %v", err)
	}
}

// captureLog runs f and returns what was logged meanwhile, at any level.
func captureLog(t *testing.T, f func()) string {
	t.Helper()
	var mu sync.Mutex
	var buf bytes.Buffer
	state := klog.CaptureState()
	klog.LogToStderr(false)
	klog.SetOutput(lockedWriter{&mu, &buf})
	var level klog.Level
	_ = level.Set("10")
	defer func() {
		_ = level.Set("0")
		state.Restore()
	}()
	f()
	klog.Flush()
	mu.Lock()
	defer mu.Unlock()
	return buf.String()
}

type lockedWriter struct {
	mu *sync.Mutex
	w  io.Writer
}

func (l lockedWriter) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}

func TestSecretsAreNotLogged(t *testing.T) {
	s, _, store := newTestServer()
	conn := serve(t, s)
	const secret = "hunter2-the-secret"
	logged := captureLog(t, func() {
		_, err := criv1.NewImageServiceClient(conn).PullImage(t.Context(), &criv1.PullImageRequest{
			Image: &criv1.ImageSpec{Image: "busybox"},
			Auth:  &criv1.AuthConfig{Username: "u", Password: secret, Auth: secret, IdentityToken: secret, RegistryToken: secret},
		})
		if err != nil {
			t.Fatal(err)
		}
		for _, key := range []string{"TOKEN", "BAD=KEY"} { // accepted and refused
			_, _ = criv1.NewRuntimeServiceClient(conn).CreateContainer(t.Context(), &criv1.CreateContainerRequest{
				PodSandboxId: "p",
				Config: &criv1.ContainerConfig{
					Metadata: &criv1.ContainerMetadata{Name: "c1"}, Image: &criv1.ImageSpec{Image: "i"},
					Envs: []*criv1.KeyValue{{Key: key, Value: []byte(secret)}, {Key: "Z", Value: []byte(secret + "\x00")}},
					Args: []string{secret},
				},
			})
		}
	})
	if store.auth == nil || store.auth.Password != secret {
		t.Error("the credentials did not arrive")
	}
	if strings.Contains(logged, secret) {
		t.Errorf("a secret is in the log: %s", logged)
	}
	for _, want := range []string{`method="PullImage"`, `image="busybox"`, `name="c1"`, `request=`, `took=`, "InvalidArgument"} {
		if !strings.Contains(logged, want) {
			t.Errorf("the log lacks %s: %s", want, logged)
		}
	}
}

type countMetrics struct {
	mu   sync.Mutex
	seen map[string]int
	took time.Duration
}

func (m *countMetrics) ObserveRPC(method, code string, took time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.seen[method+" "+code]++
	m.took += took
}

func TestMetrics(t *testing.T) {
	s, _, _ := newTestServer()
	m := &countMetrics{seen: map[string]int{}}
	s.cfg.Metrics = m
	c := runtimeClient(t, s)
	_, _ = c.Version(t.Context(), &criv1.VersionRequest{})
	_, _ = c.Version(t.Context(), &criv1.VersionRequest{})
	_, _ = c.StartContainer(t.Context(), &criv1.StartContainerRequest{ContainerId: "absent"})
	st, _ := c.StreamContainers(t.Context(), &criv1.StreamContainersRequest{})
	for {
		if _, err := st.Recv(); err != nil {
			break
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.seen["Version OK"] != 2 || m.seen["StartContainer NotFound"] != 1 || m.seen["StreamContainers OK"] != 1 || m.took <= 0 {
		t.Errorf("%v %v", m.seen, m.took)
	}
}

// Row S-14: messages of 15 and 17 MiB, and an answer longer than a message.
func TestMessageLimits(t *testing.T) {
	s, pods, _ := newTestServer()
	c := runtimeClient(t, s)
	big := func(n int) *criv1.ExecSyncRequest {
		return &criv1.ExecSyncRequest{ContainerId: "c", Cmd: []string{strings.Repeat("x", n)}}
	}
	if _, err := c.ExecSync(t.Context(), big(15<<20)); err != nil {
		t.Errorf("15 MiB: %v", err)
	}
	if _, err := c.ExecSync(t.Context(), big(17<<20)); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("17 MiB: %v", err)
	}
	pods.exec = pod.ExecResult{Stdout: make([]byte, 16<<20), Stderr: make([]byte, 16<<20), Code: 3}
	out, err := c.ExecSync(t.Context(), big(1))
	if err != nil {
		t.Fatalf("answer of 32 MiB: %v", err)
	}
	if n := len(out.Stdout) + len(out.Stderr); n != maxExecOutput || len(out.Stderr) < maxExecOutput/2-1 || out.ExitCode != 3 {
		t.Errorf("%d + %d bytes, code %d", len(out.Stdout), len(out.Stderr), out.ExitCode)
	}
	for i := range 20 {
		id := fmt.Sprintf("huge%d", i)
		pods.containers[id] = &pod.Container{ID: id, PodID: "p", Config: &pod.ContainerConfig{Annotations: map[string]string{"a": strings.Repeat("x", 1<<20)}}}
	}
	if _, err := c.ListContainers(t.Context(), &criv1.ListContainersRequest{}); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("list of 20 MiB: %v", err)
	}
	st, err := c.StreamContainers(t.Context(), &criv1.StreamContainersRequest{})
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for {
		m, err := st.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if len(m.Containers) == 0 {
			t.Error("an empty message")
		}
		for _, x := range m.Containers {
			if seen[x.Id] {
				t.Errorf("%s came twice", x.Id)
			}
			seen[x.Id] = true
		}
	}
	if len(seen) != 21 {
		t.Errorf("streamed %d containers, want 21", len(seen))
	}
}

func TestFitOutput(t *testing.T) {
	for _, tt := range []struct{ out, err, wantOut, wantErr int }{
		{3, 4, 3, 4}, {100, 0, 10, 0}, {0, 100, 0, 10}, {100, 100, 5, 5}, {8, 2, 8, 2}, {9, 2, 8, 2}, {2, 9, 2, 8}, {6, 6, 5, 5},
	} {
		o, e := fitOutput(make([]byte, tt.out), make([]byte, tt.err), 10)
		if len(o) != tt.wantOut || len(e) != tt.wantErr {
			t.Errorf("%d+%d: got %d+%d, want %d+%d", tt.out, tt.err, len(o), len(e), tt.wantOut, tt.wantErr)
		}
	}
}

// Row S-14: 5000 calls at once, all given up by their caller.
func TestManyCallsAtOnce(t *testing.T) {
	s, pods, _ := newTestServer()
	pods.block = make(chan struct{})
	c := runtimeClient(t, s)
	req := &criv1.RunPodSandboxRequest{Config: &criv1.PodSandboxConfig{Metadata: &criv1.PodSandboxMetadata{Name: "n"}}}
	if _, err := c.Version(t.Context(), &criv1.VersionRequest{}); err != nil { // the connection is there
		t.Fatal(err)
	}
	before := goruntime.NumGoroutine()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	got := make([]codes.Code, 5000)
	for i := range got {
		wg.Go(func() {
			_, err := c.RunPodSandbox(ctx, req)
			got[i] = status.Code(err)
		})
	}
	time.Sleep(300 * time.Millisecond)
	cancel() // the client gives up on all of them
	wg.Wait()
	for i, code := range got {
		if code != codes.Canceled {
			t.Fatalf("call %d: %v", i, code)
		}
	}
	for end := time.Now().Add(5 * time.Second); goruntime.NumGoroutine() > before+10; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d goroutines before, %d after", before, goruntime.NumGoroutine())
		}
	}
	close(pods.block)
	if _, err := c.RunPodSandbox(t.Context(), req); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

func TestEvents(t *testing.T) {
	s, pods, _ := newTestServer()
	c := runtimeClient(t, s)
	st, err := c.GetContainerEvents(t.Context(), &criv1.GetEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := st.Header(); err != nil { // comes before any event, after the subscription
		t.Fatal(err)
	}
	select {
	case <-pods.subscribed:
	default:
		t.Error("headers came before the subscription")
	}
	at := time.Unix(5, 6)
	pods.events <- pod.Event{Type: pod.EventStopped, ContainerID: "c", PodID: "p", Time: at} // without snapshots
	e, err := st.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if e.ContainerEventType != criv1.ContainerEventType_CONTAINER_STOPPED_EVENT || e.ContainerId != "c" || e.CreatedAt != at.UnixNano() ||
		e.PodSandboxStatus.GetMetadata() == nil || len(e.ContainersStatuses) != 1 {
		t.Errorf("event %v", e)
	}
	gone := &pod.Pod{ID: "q", Config: &pod.SandboxConfig{Metadata: pod.Metadata{Name: "gone"}}}
	pods.events <- pod.Event{Type: pod.EventDeleted, ContainerID: "q", PodID: "q", Pod: gone, Containers: []*pod.Container{}}
	e, err = st.Recv()
	if err != nil || e.PodSandboxStatus.GetMetadata().GetName() != "gone" || e.ContainerEventType != criv1.ContainerEventType_CONTAINER_DELETED_EVENT {
		t.Errorf("event %v, %v", e, err)
	}
	pods.events <- pod.Event{Type: pod.EventDeleted, ContainerID: "z", PodID: "z"}
	if e, err = st.Recv(); err != nil || e.PodSandboxStatus != nil {
		t.Errorf("event of an unknown pod: %v, %v", e, err)
	}
	close(pods.events) // fell behind
	if _, err := st.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("after the subscription ended: %v", err)
	}
}

func TestEventsEndWithTheServer(t *testing.T) {
	s, _, _ := newTestServer()
	c := runtimeClient(t, s)
	st, err := c.GetContainerEvents(t.Context(), &criv1.GetEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	_, _ = st.Header()
	if err := s.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := st.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("%v", err)
	}
}

// The kubelet with EventedPLEG takes the first status of a name for the
// container's present one, and makes another container if that one has ended.
func TestStatusesOfAPodAreNewestFirst(t *testing.T) {
	s, pods, _ := newTestServer()
	start := time.Unix(1000, 0)
	for i, id := range []string{"first", "second", "third"} {
		pods.containers[id] = &pod.Container{
			ID: id, PodID: "p", CreatedAt: start.Add(time.Duration(i) * time.Minute),
			Config: &pod.ContainerConfig{Metadata: pod.ContainerMetadata{Name: "main", Attempt: uint32(i)}},
		}
	}
	delete(pods.containers, "c")
	r, err := s.PodSandboxStatus(t.Context(), &criv1.PodSandboxStatusRequest{PodSandboxId: "p"})
	if err != nil {
		t.Fatal(err)
	}
	for what, statuses := range map[string][]*criv1.ContainerStatus{
		"status": r.ContainersStatuses,
		"event":  s.event(pod.Event{Type: pod.EventStopped, ContainerID: "first", PodID: "p"}).ContainersStatuses,
	} {
		var ids []string
		for _, c := range statuses {
			ids = append(ids, c.Id)
		}
		if got := strings.Join(ids, " "); got != "third second first" {
			t.Errorf("%s: %s", what, got)
		}
	}
}
