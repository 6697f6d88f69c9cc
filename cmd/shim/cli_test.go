package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/internal/admin"
	"github.com/naru-project/naru/internal/errs"
)

// node is a daemon without anything behind it.
type node struct {
	criv1.UnimplementedRuntimeServiceServer
	criv1.UnimplementedImageServiceServer
	removed []string
	loaded  []byte
}

const (
	podID   = "aaaa0000000000000000000000000000000000000000000000000000000000aa"
	ctrID   = "bbbb0000000000000000000000000000000000000000000000000000000000bb"
	deadID  = "dddd0000000000000000000000000000000000000000000000000000000000dd"
	imageID = "sha256:cccc0000000000000000000000000000000000000000000000000000000000cc"
)

func (n *node) ListPodSandbox(context.Context, *criv1.ListPodSandboxRequest) (*criv1.ListPodSandboxResponse, error) {
	return &criv1.ListPodSandboxResponse{Items: []*criv1.PodSandbox{
		{Id: podID, Metadata: &criv1.PodSandboxMetadata{Name: "web", Namespace: "default"}, CreatedAt: time.Now().Add(-5 * time.Minute).UnixNano()},
		{Id: deadID, Metadata: &criv1.PodSandboxMetadata{Name: "old", Namespace: "kube-system"}, State: criv1.PodSandboxState_SANDBOX_NOTREADY},
	}}, nil
}

func (n *node) ListContainers(context.Context, *criv1.ListContainersRequest) (*criv1.ListContainersResponse, error) {
	return &criv1.ListContainersResponse{Containers: []*criv1.Container{
		{
			Id: ctrID, PodSandboxId: podID, Metadata: &criv1.ContainerMetadata{Name: "nginx", Attempt: 3}, State: criv1.ContainerState_CONTAINER_RUNNING,
			Image: &criv1.ImageSpec{Image: imageID, UserSpecifiedImage: "nginx:1\x1b[31m"}, ImageId: imageID, CreatedAt: time.Now().UnixNano(),
		},
		{Id: deadID, PodSandboxId: podID, Metadata: &criv1.ContainerMetadata{Name: "init"}, State: criv1.ContainerState_CONTAINER_EXITED, Image: &criv1.ImageSpec{Image: "busybox"}},
	}}, nil
}

func (n *node) PodSandboxStatus(_ context.Context, r *criv1.PodSandboxStatusRequest) (*criv1.PodSandboxStatusResponse, error) {
	if strings.HasPrefix(deadID, r.GetPodSandboxId()) {
		return &criv1.PodSandboxStatusResponse{Status: &criv1.PodSandboxStatus{Id: deadID}}, nil
	}
	if !strings.HasPrefix(podID, r.GetPodSandboxId()) {
		return nil, status.Error(codes.NotFound, "no such pod")
	}
	return &criv1.PodSandboxStatusResponse{
		Status: &criv1.PodSandboxStatus{Id: podID, Network: &criv1.PodSandboxNetworkStatus{Ip: "10.85.0.4", AdditionalIps: []*criv1.PodIP{{Ip: "fd85::4"}}}},
		Info:   map[string]string{"netns": `"/run/naru/ns/x/net"`},
	}, nil
}

func (n *node) ContainerStatus(_ context.Context, r *criv1.ContainerStatusRequest) (*criv1.ContainerStatusResponse, error) {
	switch {
	case r.GetContainerId() == "boom":
		return nil, status.Error(codes.Internal, "the disk burns\x07")
	case strings.HasPrefix(deadID, r.GetContainerId()):
		return &criv1.ContainerStatusResponse{Status: &criv1.ContainerStatus{Id: deadID}}, nil
	case !strings.HasPrefix(ctrID, r.GetContainerId()):
		return nil, status.Error(codes.NotFound, "no such container")
	}
	return &criv1.ContainerStatusResponse{
		Status: &criv1.ContainerStatus{Id: ctrID}, Info: map[string]string{"pid": "42", "runtimeSpec": `{"ociVersion":"1.3.0"}`, "odd": "no JSON"},
	}, nil
}

func (n *node) ListImages(context.Context, *criv1.ListImagesRequest) (*criv1.ListImagesResponse, error) {
	return &criv1.ListImagesResponse{Images: []*criv1.Image{
		{Id: imageID, RepoTags: []string{"docker.io/library/nginx:1", "docker.io/library/nginx:latest"}, Size: 123_456_789, Pinned: true},
		{Id: "sha256:ffff"},
	}}, nil
}

func (n *node) ImageStatus(_ context.Context, r *criv1.ImageStatusRequest) (*criv1.ImageStatusResponse, error) {
	switch r.GetImage().GetImage() {
	case "nginx":
		return &criv1.ImageStatusResponse{Image: &criv1.Image{Id: imageID}}, nil
	case "idle":
		return &criv1.ImageStatusResponse{Image: &criv1.Image{Id: "sha256:ffff"}}, nil
	}
	return &criv1.ImageStatusResponse{}, nil
}

func (n *node) RemoveImage(_ context.Context, r *criv1.RemoveImageRequest) (*criv1.RemoveImageResponse, error) {
	n.removed = append(n.removed, r.GetImage().GetImage())
	return &criv1.RemoveImageResponse{}, nil
}

// backend is the node's admin side.
type backend struct{ n *node }

func (b backend) Operations() []admin.Operation {
	now := time.Now()
	return []admin.Operation{{ID: podID, Name: "default/web", Kind: "RunPodSandbox", Step: "network", Started: now.Add(-90 * time.Minute), StepAt: now.Add(-30 * time.Minute)}}
}

func (b backend) Pulls() []admin.Pull {
	return []admin.Pull{{Ref: "docker.io/library/nginx:1", Stage: "layers", Bytes: 5_000_000, Total: 20_000_000, Layers: 1, AllLayers: 4, Waiting: 2, Started: time.Now()}}
}
func (b backend) Version() admin.Version  { return admin.Version{Version: "9.9.9"} }
func (b backend) Config() (string, error) { return "version = 1 # running\n", nil }

func (b backend) Reload() (admin.Reload, error) {
	return admin.Reload{File: "/etc/naru/config.toml", Changes: []admin.Change{{Key: "network.mtu", Old: "0", New: "1400"}}}, nil
}

func (b backend) LoadImage(_ context.Context, r io.Reader, name string) ([]string, error) {
	data, err := io.ReadAll(r)
	b.n.loaded = data
	if string(data) == "bad" {
		return nil, errs.New(errs.InvalidArgument, "this is no archive")
	}
	return []string{"docker.io/library/app:1" + name}, err
}

func (b backend) ImportImage(_ context.Context, path, _ string) ([]string, error) {
	return []string{"from " + path}, nil
}

// startNode serves n and returns a configuration for it.
func startNode(t *testing.T) (n *node, cfg string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "naru") // short: the path of a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	cfg = filepath.Join(dir, "config.toml")
	text := fmt.Sprintf("version = 1\nroot = %q\nrun = %q\nsocket = %q\n", dir+"/root", dir, dir+"/naru.sock")
	if err := os.WriteFile(cfg, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	n = &node{}
	g := grpc.NewServer()
	criv1.RegisterRuntimeServiceServer(g, n)
	criv1.RegisterImageServiceServer(g, n)
	l, err := net.Listen("unix", dir+"/naru.sock")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = g.Serve(l) }()
	t.Cleanup(g.Stop)
	al, err := net.Listen("unix", dir+"/"+admin.SocketName)
	if err != nil {
		t.Fatal(err)
	}
	a := admin.New(backend{n})
	go func() { _ = a.Serve(al) }()
	t.Cleanup(func() { a.Shutdown(context.Background()) })
	return n, cfg
}

// naru runs the command line.
func naru(t *testing.T, stdin string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	root := newRoot()
	var out, errOut bytes.Buffer
	root.SetArgs(args)
	root.SetOut(&out)
	root.SetErr(&errOut)
	root.SetIn(strings.NewReader(stdin))
	err := root.ExecuteContext(t.Context())
	if err != nil && !isSilent(err) {
		fmt.Fprintln(&errOut, err)
	}
	return out.String(), errOut.String(), exitCode(err)
}

func wantIn(t *testing.T, text string, parts ...string) {
	t.Helper()
	for _, p := range parts {
		if !strings.Contains(text, p) {
			t.Errorf("%q is not in\n%s", p, text)
		}
	}
}

func TestUsageErrors(t *testing.T) {
	for _, args := range [][]string{
		{}, {"nothing"}, {"image"}, {"image", "lod"}, {"ps", "x"}, {"ps", "--nope"}, {"ps", "-o", "yaml"}, {"inspect"}, {"inspect", ""}, {"inspect", "a", "b"},
		{"image", "load"}, {"image", "rm"}, {"completion"}, {"completion", "tcsh"}, {"config"}, {"config", "check", "a", "b"}, {"serve", "x"},
		{"ps", "--socket", "relative"}, {"--nope"},
	} {
		if _, stderr, code := naru(t, "", args...); code != exitUsage {
			t.Errorf("%q: exit code %d, %s", args, code, stderr)
		}
	}
	_, stderr, _ := naru(t, "", "image", "lod")
	wantIn(t, stderr, `no command "lod"`, "did you mean load")
}

// TestHelp: every command explains itself, and says how it is used.
func TestHelp(t *testing.T) {
	var walk func(args []string)
	walk = func(args []string) {
		out, _, code := naru(t, "", append(args, "--help")...)
		if code != exitOK || len(out) < 100 {
			t.Errorf("%q --help: exit code %d\n%s", args, code, out)
		}
		root := newRoot()
		c, _, err := root.Find(args)
		if err != nil {
			t.Fatal(err)
		}
		for _, sub := range c.Commands() {
			if !sub.Hidden && sub.Name() != "help" {
				if sub.Short == "" {
					t.Errorf("%s says nothing of itself", sub.CommandPath())
				}
				walk(append(append([]string{}, args...), sub.Name()))
			}
		}
	}
	walk(nil)
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if out, _, code := naru(t, "", "completion", shell); code != exitOK || !strings.Contains(out, "naru") {
			t.Errorf("completion %s: %d", shell, code)
		}
	}
}

func TestPs(t *testing.T) {
	_, cfg := startNode(t)
	out, _, code := naru(t, "", "ps", "--config", cfg)
	if code != exitOK {
		t.Fatal(code)
	}
	wantIn(t, out, "aaaa000000000 ", "default/web", "ready", "10.85.0.4,fd85::4", "nginx", "running", "  3 ", "5m")
	if strings.Contains(out, "\x1b") || strings.Contains(out, "old") || strings.Contains(out, "init") {
		t.Errorf("an escape sequence, or what has ended:\n%s", out)
	}
	out, _, _ = naru(t, "", "ps", "--all", "-n", "kube-system", "--config", cfg)
	wantIn(t, out, "kube-system/old", "notready")
	if strings.Contains(out, "default/web") {
		t.Errorf("another namespace:\n%s", out)
	}
	out, _, _ = naru(t, "", "ps", "-o", "json", "--endpoint", "unix://"+filepath.Dir(cfg)+"/naru.sock")
	var pods []psPod
	if err := json.Unmarshal([]byte(out), &pods); err != nil || len(pods) != 1 || pods[0].Containers[0].Restarts != 3 {
		t.Errorf("%v %+v", err, pods)
	}
}

func TestNoDaemon(t *testing.T) {
	_, stderr, code := naru(t, "", "ps", "--socket", filepath.Join(t.TempDir(), "none"))
	if code != exitError {
		t.Errorf("exit code %d", code)
	}
	wantIn(t, stderr, "is naru running", "no such file or directory")
	if strings.Contains(stderr, "connection error") {
		t.Errorf("gRPC's own words: %s", stderr)
	}
	_, stderr, code = naru(t, "", "ops", "--admin-socket", filepath.Join(t.TempDir(), "none"))
	if code != exitError {
		t.Errorf("exit code %d", code)
	}
	wantIn(t, stderr, "is naru running")
}

func TestInspect(t *testing.T) {
	_, cfg := startNode(t)
	for id, kind := range map[string]string{"bbbb": "container", podID: "pod", "nginx": "image"} {
		out, _, code := naru(t, "", "inspect", id, "--config", cfg)
		var v inspected
		if err := json.Unmarshal([]byte(out), &v); err != nil || code != exitOK || v.Kind != kind {
			t.Errorf("%s: %v\n%s", id, err, out)
		}
	}
	out, _, _ := naru(t, "", "inspect", "bbbb", "--config", cfg)
	wantIn(t, out, `"pid": 42`, `"ociVersion": "1.3.0"`, `"odd": "no JSON"`)
	_, stderr, code := naru(t, "", "inspect", "zzzz", "--config", cfg)
	if code != exitError {
		t.Errorf("exit code %d", code)
	}
	wantIn(t, stderr, `no container, pod or image "zzzz"`)
	// A beginning that a container and a pod share names neither.
	_, stderr, code = naru(t, "", "inspect", "dddd", "--config", cfg)
	if code != exitError {
		t.Errorf("exit code %d", code)
	}
	wantIn(t, stderr, "several ids", "container "+deadID, "pod "+deadID)
	_, stderr, code = naru(t, "", "inspect", "boom", "--config", cfg)
	if code != exitError || strings.Contains(stderr, "\x07") {
		t.Errorf("%d %q", code, stderr)
	}
	wantIn(t, stderr, "the disk burns")
}

func TestOpsAndPulls(t *testing.T) {
	_, cfg := startNode(t)
	out, _, _ := naru(t, "", "ops", "--config", cfg)
	wantIn(t, out, "RunPodSandbox", "default/web", "network", "30m", "90m")
	out, _, _ = naru(t, "", "image", "pulls", "--config", cfg)
	wantIn(t, out, "nginx:1", "layers", "1/4", "5.0 MB of 20 MB")
	out, _, _ = naru(t, "", "ops", "-o", "json", "--config", cfg)
	wantIn(t, out, `"step": "network"`)
	out, _, _ = naru(t, "", "version", "--config", cfg)
	wantIn(t, out, "naru "+version, "daemon 9.9.9")
	out, _, _ = naru(t, "", "config", "show", "--running", "--config", cfg)
	wantIn(t, out, "# running")
}

func TestImages(t *testing.T) {
	n, cfg := startNode(t)
	out, _, _ := naru(t, "", "image", "list", "--config", cfg)
	wantIn(t, out, "docker.io/library/nginx:latest", "cccc000000000", "123 MB", "pinned", "<no name>")

	out, _, code := naru(t, "tar bytes", "image", "load", "-", "--name", "-x", "--config", cfg)
	if code != exitOK || string(n.loaded) != "tar bytes" {
		t.Errorf("%d %q", code, n.loaded)
	}
	wantIn(t, out, "loaded docker.io/library/app:1-x")
	file := filepath.Join(t.TempDir(), "a.tar")
	if err := os.WriteFile(file, []byte("bad"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, stderr, code := naru(t, "", "image", "load", file, "--config", cfg)
	if code != exitError {
		t.Errorf("exit code %d", code)
	}
	wantIn(t, stderr, "this is no archive")
	if _, stderr, code = naru(t, "", "image", "load", filepath.Dir(file), "--config", cfg); code != exitUsage {
		t.Errorf("a folder: %d %s", code, stderr)
	}
	if _, _, code = naru(t, "", "image", "load", file+"x", "--config", cfg); code != exitError {
		t.Errorf("a missing file: %d", code)
	}
	out, _, _ = naru(t, "", "image", "import", file, "--config", cfg)
	wantIn(t, out, "loaded from "+file)

	_, stderr, code = naru(t, "", "image", "rm", "nginx", "none", "--config", cfg)
	if code != exitError || len(n.removed) != 0 {
		t.Errorf("%d %v", code, n.removed)
	}
	wantIn(t, stderr, "was made from it", "there is none")
	out, _, code = naru(t, "", "image", "rm", "idle", "--config", cfg)
	if code != exitOK || len(n.removed) != 1 {
		t.Errorf("%d %v %s", code, n.removed, out)
	}
	if _, _, code = naru(t, "", "image", "rm", "--force", "nginx", "--config", cfg); code != exitOK || n.removed[1] != imageID {
		t.Errorf("%d %v", code, n.removed)
	}
}

func TestConfigCommands(t *testing.T) {
	out, _, code := naru(t, "", "config", "default")
	if code != exitOK {
		t.Fatal(code)
	}
	file := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(file, []byte(out), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, _, code = naru(t, "", "config", "check", file); code != exitOK || !strings.HasSuffix(out, ": good\n") {
		t.Errorf("%d %s", code, out)
	}
	if err := os.WriteFile(file, []byte("[network]\nmtuu = 5\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	_, stderr, code := naru(t, "", "config", "check", "--config", file)
	if code != exitError {
		t.Errorf("exit code %d", code)
	}
	wantIn(t, stderr, `did you mean "network.mtu"`)
}

func TestWords(t *testing.T) {
	for d, want := range map[time.Duration]string{-time.Second: "0s", 1500 * time.Millisecond: "1.5s", 70 * time.Second: "70s", 3 * time.Minute: "3m", 5 * time.Hour: "5h", 72 * time.Hour: "3d"} {
		if got := age(d); got != want {
			t.Errorf("age %v: %s", d, got)
		}
	}
	for n, want := range map[uint64]string{0: "0 B", 999: "999 B", 1000: "1.0 kB", 12_300: "12 kB", 9_960_000: "10 MB", 123_456_789: "123 MB", 999_600_000: "1.0 GB", 1 << 63: "9.2 EB"} {
		if got := size(n); got != want {
			t.Errorf("size %d: %s", n, got)
		}
	}
	if got := clean("a\x1b[31m\nb\u202e\u00e4"); got != "a\uFFFD[31m\uFFFDb\uFFFD\u00e4" {
		t.Errorf("clean: %q", got)
	}
	var b bytes.Buffer
	p := newProgress(&b)
	p.show("one")
	p.show("two") // too soon for a second line where nobody watches
	p.done()
	if b.String() != "one\n" {
		t.Errorf("progress: %q", b.String())
	}
}
