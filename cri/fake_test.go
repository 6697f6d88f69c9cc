package cri

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/images"
	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/pod"
)

// fakePods is a pod manager in memory. It keeps what it was told, answers
// from its maps and fails where err says so.
type fakePods struct {
	mu         sync.Mutex
	pods       map[string]*pod.Pod
	containers map[string]*pod.Container
	stats      map[string]*pod.ContainerStats
	metrics    []*pod.SandboxStats
	err        map[string]error // by method name
	calls      []string
	sandbox    *pod.SandboxConfig
	container  *pod.ContainerConfig
	resources  *pod.Resources
	grace      time.Duration
	cidrs      []netip.Prefix
	exec       pod.ExecResult
	events     chan pod.Event
	subscribed chan struct{}
	panics     bool
	block      chan struct{} // RunSandbox waits for it, if not nil
	info       map[string]any
	notReady   string
}

func newFakePods() *fakePods {
	return &fakePods{
		pods: map[string]*pod.Pod{}, containers: map[string]*pod.Container{}, stats: map[string]*pod.ContainerStats{},
		err: map[string]error{}, events: make(chan pod.Event, 16), subscribed: make(chan struct{}, 16),
		info: map[string]any{"pid": 42, "runtimeSpec": map[string]any{"ociVersion": "1.3.0"}},
	}
}

func (f *fakePods) called(method string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, method)
	if f.panics {
		panic("fake panic in " + method)
	}
	return f.err[method]
}

func (f *fakePods) RunSandbox(ctx context.Context, c *pod.SandboxConfig) (string, error) {
	f.mu.Lock()
	f.sandbox = c
	block := f.block
	f.mu.Unlock()
	if block != nil {
		select {
		case <-block:
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
	return strings.Repeat("a", 64), f.called("RunSandbox")
}

func (f *fakePods) StopSandbox(_ context.Context, id string) error {
	if err := f.called("StopSandbox"); err != nil {
		return err
	}
	_, err := f.Sandbox(id)
	return err
}

func (f *fakePods) RemoveSandbox(ctx context.Context, id string) error { return f.StopSandbox(ctx, id) }

func (f *fakePods) Sandbox(id string) (*pod.Pod, error) {
	if err := f.called("Sandbox"); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if p := f.pods[id]; p != nil {
		return p, nil
	}
	return nil, errs.New(errs.NotFound, "find pod %q: no such pod", id)
}

func (f *fakePods) Sandboxes(filter pod.Filter) []*pod.Pod {
	_ = f.called("Sandboxes")
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []*pod.Pod
	for id, p := range f.pods {
		ready := "notready"
		if p.Ready() {
			ready = "ready"
		}
		if (filter.ID == "" || filter.ID == id) && (filter.State == "" || filter.State == ready) && hasLabels(configOf(p).Labels, filter.Labels) {
			out = append(out, p)
		}
	}
	return out
}

func hasLabels(have, want map[string]string) bool {
	for k, v := range want {
		if have[k] != v {
			return false
		}
	}
	return true
}

func (f *fakePods) UpdateSandbox(_ context.Context, id string, _, _ *pod.Resources) error {
	if err := f.called("UpdateSandbox"); err != nil {
		return err
	}
	_, err := f.Sandbox(id)
	return err
}

func (f *fakePods) CreateContainer(_ context.Context, _ string, c *pod.ContainerConfig) (string, error) {
	f.mu.Lock()
	f.container = c
	f.mu.Unlock()
	return strings.Repeat("c", 64), f.called("CreateContainer")
}

func (f *fakePods) byID(method, id string) error {
	if err := f.called(method); err != nil {
		return err
	}
	_, err := f.Container(id)
	return err
}

func (f *fakePods) StartContainer(_ context.Context, id string) error {
	return f.byID("StartContainer", id)
}

func (f *fakePods) StopContainer(_ context.Context, id string, grace time.Duration) error {
	f.mu.Lock()
	f.grace = grace
	f.mu.Unlock()
	return f.byID("StopContainer", id)
}

func (f *fakePods) RemoveContainer(_ context.Context, id string) error {
	return f.byID("RemoveContainer", id)
}

func (f *fakePods) Container(id string) (*pod.Container, error) {
	if err := f.called("Container"); err != nil {
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if c := f.containers[id]; c != nil {
		return c, nil
	}
	return nil, errs.New(errs.NotFound, "find container %q: no such container", id)
}

func (f *fakePods) Containers(filter pod.Filter) []*pod.Container {
	_ = f.called("Containers")
	f.mu.Lock()
	defer f.mu.Unlock()
	var out []*pod.Container
	for id, c := range f.containers {
		if (filter.ID == "" || filter.ID == id) && (filter.PodID == "" || filter.PodID == c.PodID) &&
			(filter.State == "" || filter.State == string(c.State)) && hasLabels(containerConfigOf(c).Labels, filter.Labels) {
			out = append(out, c)
		}
	}
	return out
}

func (f *fakePods) UpdateContainer(_ context.Context, id string, r pod.Resources, _ map[string]string) error {
	f.mu.Lock()
	f.resources = &r
	f.mu.Unlock()
	return f.byID("UpdateContainer", id)
}

func (f *fakePods) Checkpoint(_ context.Context, id, location string, timeout time.Duration) error {
	f.mu.Lock()
	f.grace = timeout
	f.mu.Unlock()
	if location == "" {
		return errs.New(errs.InvalidArgument, "no location")
	}
	return f.byID("Checkpoint", id)
}

func (f *fakePods) ReopenLog(_ context.Context, id string) error { return f.byID("ReopenLog", id) }

func (f *fakePods) ExecSync(_ context.Context, id string, _ []string, _ time.Duration) (pod.ExecResult, error) {
	if err := f.byID("ExecSync", id); err != nil {
		return pod.ExecResult{}, err
	}
	return f.exec, nil
}

func (f *fakePods) Exec(_ context.Context, id string, cmd []string, _ bool, s pod.Streams) (int, error) {
	if err := f.byID("Exec", id); err != nil {
		return 0, err
	}
	_, err := io.WriteString(s.Stdout, strings.Join(cmd, " "))
	return 3, err
}

func (f *fakePods) Attach(_ context.Context, id string, _ pod.Streams) error {
	return f.byID("Attach", id)
}

func (f *fakePods) Dial(context.Context, string, uint16) (io.ReadWriteCloser, error) {
	return nil, f.called("Dial")
}

func (f *fakePods) ContainerStats(_ context.Context, id string) (*pod.ContainerStats, error) {
	if err := f.byID("ContainerStats", id); err != nil {
		return nil, err
	}
	return f.stats[id], nil
}

func (f *fakePods) ListContainerStats(_ context.Context, filter pod.Filter) []*pod.ContainerStats {
	var out []*pod.ContainerStats
	for _, c := range f.Containers(filter) {
		out = append(out, f.stats[c.ID])
	}
	return out
}

func (f *fakePods) SandboxStats(_ context.Context, id string) (*pod.SandboxStats, error) {
	p, err := f.Sandbox(id)
	if err != nil {
		return nil, err
	}
	return &pod.SandboxStats{Pod: p}, nil
}

func (f *fakePods) ListSandboxStats(ctx context.Context, filter pod.Filter) []*pod.SandboxStats {
	var out []*pod.SandboxStats
	members := map[string][]*pod.ContainerStats{}
	for _, c := range f.ListContainerStats(ctx, pod.Filter{}) {
		if c != nil {
			members[c.Container.PodID] = append(members[c.Container.PodID], c)
		}
	}
	for _, p := range f.Sandboxes(filter) {
		st := &pod.SandboxStats{Pod: p, Containers: members[p.ID]}
		if len(st.Containers) > 0 {
			st.Stats = st.Containers[0].Stats
		}
		out = append(out, st)
	}
	return out
}

func (f *fakePods) ListSandboxMetrics(context.Context) []*pod.SandboxStats {
	_ = f.called("ListSandboxMetrics")
	return f.metrics
}

func (f *fakePods) Subscribe(context.Context) <-chan pod.Event {
	f.subscribed <- struct{}{}
	return f.events
}

func (f *fakePods) Operations() []pod.Operation {
	return []pod.Operation{{ID: "x", Kind: "RunPodSandbox", Step: "make network"}}
}

func (f *fakePods) NetworkInfo() map[string]any {
	return map[string]any{"cniconfig": map[string]any{"PluginConfDir": "/c"}, "lastCNILoadStatus": "OK"}
}

func (f *fakePods) NetworkStatus() (bool, string, string) {
	return f.notReady == "", f.notReady, ""
}

func (f *fakePods) SetPodCIDRs(_ context.Context, cidrs []netip.Prefix) error {
	f.cidrs = cidrs
	return f.called("SetPodCIDRs")
}

func (f *fakePods) Info(string) map[string]any { return f.info }

// fakeImages is an image store with the given images.
type fakeImages struct {
	list []*images.Image
	auth *images.Auth
	err  error
}

func (f *fakeImages) Pull(_ context.Context, ref string, auth *images.Auth) (string, error) {
	f.auth = auth
	if f.err != nil {
		return "", f.err
	}
	return "sha256:" + ref, nil
}

func (f *fakeImages) Resolve(ref string) (*images.Image, error) {
	for _, i := range f.list {
		if i.ID == ref {
			return i, nil
		}
	}
	return nil, errs.New(errs.NotFound, "find image %q: no such image", ref)
}

func (f *fakeImages) List() []*images.Image { return f.list }

func (f *fakeImages) Remove(_ context.Context, ref string) error {
	_, err := f.Resolve(ref)
	return err
}

func (f *fakeImages) FsInfo() (images.FsInfo, error) {
	return images.FsInfo{Mountpoint: "/var/lib", Usage: images.Usage{Bytes: 5, Inodes: 6, Time: time.Unix(7, 0)}}, f.err
}

// allHost has every feature.
var allHost = Host{
	SystemdCgroups: true, RecursiveReadOnlyMounts: true, UserNamespaces: true, UserNamespacesHostNetwork: true, MountOptions: true,
}

// newTestServer is a ready server over fakes with one pod "p" and one running
// container "c" in it.
func newTestServer() (*Server, *fakePods, *fakeImages) {
	pods, store := newFakePods(), &fakeImages{}
	pods.pods["p"] = &pod.Pod{ID: "p", Phase: pod.PhaseReady, Config: &pod.SandboxConfig{}}
	pods.containers["c"] = &pod.Container{ID: "c", PodID: "p", State: pod.StateRunning, Config: &pod.ContainerConfig{}}
	s := New(Config{Version: "1.2.3"}, pods, store, allHost)
	s.SetReady()
	return s, pods, store
}

// serve serves s on a unix socket of its own and returns a connection to it.
func serve(t *testing.T, s *Server) *grpc.ClientConn {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := Listen(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	return serveOn(t, s, l, path)
}

func serveOn(t *testing.T, s *Server, l net.Listener, path string) *grpc.ClientConn {
	t.Helper()
	g := NewGRPCServer(s)
	done := make(chan error, 1)
	go func() { done <- g.Serve(l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if err := s.Close(ctx); err != nil {
			t.Error(err)
		}
		g.GracefulStop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20), grpc.MaxCallSendMsgSize(64<<20)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func runtimeClient(t *testing.T, s *Server) criv1.RuntimeServiceClient {
	t.Helper()
	return criv1.NewRuntimeServiceClient(serve(t, s))
}

var errFake = fmt.Errorf("without a class")
