package cri

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/testing/protocmp"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/images"
	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/pod"
)

func TestVersionAndRuntimeConfig(t *testing.T) {
	s, _, _ := newTestServer()
	v, err := s.Version(t.Context(), nil)
	if err != nil || v.Version != "0.1.0" || v.RuntimeName != "naru" || v.RuntimeVersion != "1.2.3" || v.RuntimeApiVersion != "v1" {
		t.Errorf("%v, %v", v, err)
	}
	for systemd, want := range map[bool]criv1.CgroupDriver{true: criv1.CgroupDriver_SYSTEMD, false: criv1.CgroupDriver_CGROUPFS} {
		s.host.SystemdCgroups = systemd
		if c, err := s.RuntimeConfig(t.Context(), nil); err != nil || c.Linux.CgroupDriver != want {
			t.Errorf("%v, %v", c, err)
		}
	}
}

func TestStatus(t *testing.T) {
	s, pods, _ := newTestServer()
	s.SetHandlers([]string{"runc"})
	s.cfg.Verbose = func() any { return map[string]string{"stateDir": "/run/naru"} }
	out, err := s.Status(t.Context(), &criv1.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	features := &criv1.RuntimeHandlerFeatures{RecursiveReadOnlyMounts: true, UserNamespaces: true}
	want := &criv1.StatusResponse{
		Status: &criv1.RuntimeStatus{Conditions: []*criv1.RuntimeCondition{
			{Type: "RuntimeReady", Status: true}, {Type: "NetworkReady", Status: true},
		}},
		RuntimeHandlers: []*criv1.RuntimeHandler{{Name: "", Features: features}, {Name: "naru", Features: features}, {Name: "runc", Features: features}},
		Features:        &criv1.RuntimeFeatures{SupplementalGroupsPolicy: true, UserNamespacesHostNetwork: true, MountOptions: true},
	}
	if diff := cmp.Diff(want, out, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	s.cfg.UserNamespaces = func(handler string) bool { return handler != "runc" }
	out, err = s.Status(t.Context(), &criv1.StatusRequest{})
	if err != nil || len(out.RuntimeHandlers) != 3 || !out.RuntimeHandlers[1].Features.UserNamespaces || out.RuntimeHandlers[2].Features.UserNamespaces || !out.RuntimeHandlers[2].Features.RecursiveReadOnlyMounts {
		t.Errorf("with a runtime that has no user namespaces: %v, %v", out, err)
	}
	pods.notReady = "NoPodCIDR"
	s.cfg.Health = func() error { return errors.New("the monitor is gone") }
	out, err = s.Status(t.Context(), &criv1.StatusRequest{Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	if c := out.Status.Conditions; c[0].Status || c[0].Reason != "RuntimeUnhealthy" || c[0].Message != "the monitor is gone" || c[1].Status || c[1].Reason != "NoPodCIDR" {
		t.Errorf("%v", c)
	}
	for key, value := range out.Info {
		if key == "lastCNILoadStatus" { // text, as tools have it from containerd
			if value != "OK" {
				t.Errorf("info %s: %s", key, value)
			}
			continue
		}
		if !json.Valid([]byte(value)) {
			t.Errorf("info %s is not JSON: %s", key, value)
		}
	}
	for key, part := range map[string]string{"config": "/run/naru", "version": "1.2.3", "golang": "go1.", "operations": "make network", "cniconfig": `"PluginConfDir":"/c"`, "uptime": "s"} {
		if !strings.Contains(out.Info[key], part) {
			t.Errorf("info %s: %q", key, out.Info[key])
		}
	}
}

func TestUpdateRuntimeConfig(t *testing.T) {
	s, pods, _ := newTestServer()
	update := func(list string) error {
		pods.cidrs = nil
		_, err := s.UpdateRuntimeConfig(t.Context(), &criv1.UpdateRuntimeConfigRequest{
			RuntimeConfig: &criv1.RuntimeConfig{NetworkConfig: &criv1.NetworkConfig{PodCidr: list}},
		})
		return err
	}
	if err := update("10.1.2.3/24, fd00::/64"); err != nil {
		t.Fatal(err)
	}
	if want := []netip.Prefix{netip.MustParsePrefix("10.1.2.0/24"), netip.MustParsePrefix("fd00::/64")}; len(pods.cidrs) != 2 || pods.cidrs[0] != want[0] || pods.cidrs[1] != want[1] {
		t.Errorf("%v", pods.cidrs)
	}
	if err := update(""); err != nil || pods.cidrs != nil {
		t.Errorf("empty: %v %v", err, pods.cidrs)
	}
	for _, bad := range []string{"x", "10.0.0.1", "10.0.0.0/33", "10.0.0.0/8,", ",", "::ffff:10.0.0.0/104", strings.Repeat("10.0.0.0/8,", 20) + "10.0.0.0/8"} {
		if err := update(bad); !errs.Is(err, errs.InvalidArgument) || pods.cidrs != nil {
			t.Errorf("%q: %v", bad, err)
		}
	}
	pods.err["SetPodCIDRs"] = errs.New(errs.FailedPrecondition, "in use")
	if err := update("10.0.0.0/8"); !errs.Is(err, errs.FailedPrecondition) {
		t.Errorf("%v", err)
	}
}

func TestUpdateResources(t *testing.T) {
	s, pods, _ := newTestServer()
	_, err := s.UpdateContainerResources(t.Context(), &criv1.UpdateContainerResourcesRequest{
		ContainerId: "c", Linux: &criv1.LinuxContainerResources{CpuQuota: 5, Unified: map[string]string{"memory.high": "1"}},
	})
	if err != nil || pods.resources.CPUQuota != 5 || pods.resources.Unified["memory.high"] != "1" {
		t.Errorf("%v, %v", pods.resources, err)
	}
	update := func(id string) error {
		_, err := s.UpdatePodSandboxResources(t.Context(), &criv1.UpdatePodSandboxResourcesRequest{PodSandboxId: id})
		return err
	}
	if err := update("p"); err != nil {
		t.Error(err)
	}
	if err := update("absent"); !errs.Is(err, errs.NotFound) {
		t.Errorf("unknown pod: %v", err)
	}
	pods.err["UpdateSandbox"] = errors.New("disk full") // best effort: kubelet would fail the resize
	if err := update("p"); err != nil {
		t.Error(err)
	}
}

func TestStats(t *testing.T) {
	s, pods, _ := newTestServer()
	at := time.Unix(9, 0)
	p := &pod.PSI{Some: pod.PSILine{Total: 1, Avg10: 2, Avg60: 3, Avg300: 4}, Full: pod.PSILine{Total: 5}}
	wantPSI := &criv1.PsiStats{Some: &criv1.PsiData{Total: 1, Avg10: 2, Avg60: 3, Avg300: 4}, Full: &criv1.PsiData{Total: 5}}
	stats := fullStats(at, p)
	pods.containers["c"].Config = &pod.ContainerConfig{Metadata: pod.ContainerMetadata{Name: "n"}, Labels: map[string]string{"a": "b"}}
	pods.stats["c"] = &pod.ContainerStats{
		Container: pods.containers["c"], Stats: stats,
		Writable: images.Usage{Bytes: 21, Inodes: 22, Time: at}, WritableMountpoint: "/var/lib",
	}
	out, err := s.ContainerStats(t.Context(), &criv1.ContainerStatsRequest{ContainerId: "c"})
	if err != nil {
		t.Fatal(err)
	}
	now := at.UnixNano()
	cpu := &criv1.CpuUsage{Timestamp: now, UsageCoreNanoSeconds: u64(1), UsageNanoCores: u64(2), Psi: wantPSI}
	memory := &criv1.MemoryUsage{
		Timestamp: now, WorkingSetBytes: u64(3), AvailableBytes: u64(4), UsageBytes: u64(5), RssBytes: u64(6), PageFaults: u64(7), MajorPageFaults: u64(8), Psi: wantPSI,
	}
	io := &criv1.IoUsage{Timestamp: now, Psi: wantPSI}
	want := &criv1.ContainerStats{
		Attributes: &criv1.ContainerAttributes{Id: "c", Metadata: &criv1.ContainerMetadata{Name: "n"}, Labels: map[string]string{"a": "b"}},
		Cpu:        cpu, Memory: memory, Io: io,
		WritableLayer: &criv1.FilesystemUsage{Timestamp: now, FsId: &criv1.FilesystemIdentifier{Mountpoint: "/var/lib"}, UsedBytes: u64(21), InodesUsed: u64(22)},
		Swap:          &criv1.SwapUsage{Timestamp: now, SwapUsageBytes: u64(9), SwapAvailableBytes: u64(1)},
	}
	if diff := cmp.Diff(want, out.Stats, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	sb := sandboxStats(&pod.SandboxStats{
		Pod: &pod.Pod{ID: "p", Config: &pod.SandboxConfig{Metadata: pod.Metadata{Name: "pod"}}}, Stats: stats, Processes: 11,
		Interfaces: []pod.Interface{{Name: "eth0", RxBytes: 1, RxErrors: 2, TxBytes: 3, TxErrors: 4}, {Name: "lo"}},
		Containers: []*pod.ContainerStats{pods.stats["c"]},
	})
	wantPod := &criv1.PodSandboxStats{
		Attributes: &criv1.PodSandboxAttributes{Id: "p", Metadata: &criv1.PodSandboxMetadata{Name: "pod"}},
		Linux: &criv1.LinuxPodSandboxStats{
			Cpu: cpu, Memory: memory, Io: io,
			Network: &criv1.NetworkUsage{
				Timestamp:        now,
				DefaultInterface: &criv1.NetworkInterfaceUsage{Name: "eth0", RxBytes: u64(1), RxErrors: u64(2), TxBytes: u64(3), TxErrors: u64(4)},
				Interfaces:       []*criv1.NetworkInterfaceUsage{{Name: "lo", RxBytes: u64(0), RxErrors: u64(0), TxBytes: u64(0), TxErrors: u64(0)}},
			},
			Process:    &criv1.ProcessUsage{Timestamp: now, ProcessCount: u64(11)},
			Containers: []*criv1.ContainerStats{want},
		},
	}
	if diff := cmp.Diff(wantPod, sb, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	stopped := containerStats(&pod.ContainerStats{Container: pods.containers["c"]})
	if stopped.Cpu != nil || stopped.Memory != nil || stopped.Swap != nil || stopped.WritableLayer != nil || stopped.Attributes.Id != "c" {
		t.Errorf("stopped: %v", stopped)
	}
}

func testImages() []*images.Image {
	return []*images.Image{
		{ID: "sha256:b", Config: ocispec.ImageConfig{User: "web"}, Pinned: true, Size: 7, RepoTags: []string{"r:t"}, RepoDigests: []string{"r@sha256:d"},
			RawConfig: []byte(`{"os":"linux"}`), Layers: []digest.Digest{"sha256:l"}},
		{ID: "sha256:a", Config: ocispec.ImageConfig{User: "1000:1000"}, RawConfig: []byte("{broken")},
	}
}

func TestImages(t *testing.T) {
	s, _, store := newTestServer()
	store.list = testImages()
	b := &criv1.Image{Id: "sha256:b", RepoTags: []string{"r:t"}, RepoDigests: []string{"r@sha256:d"}, Size: 7, Username: "web", Pinned: true, Spec: &criv1.ImageSpec{Image: "sha256:b"}}
	a := &criv1.Image{Id: "sha256:a", Uid: &criv1.Int64Value{Value: 1000}, Spec: &criv1.ImageSpec{Image: "sha256:a"}}
	list, err := s.ListImages(t.Context(), &criv1.ListImagesRequest{})
	if diff := cmp.Diff([]*criv1.Image{a, b}, list.GetImages(), protocmp.Transform()); err != nil || diff != "" {
		t.Error(err, diff)
	}
	spec := func(ref string) *criv1.ImageSpec { return &criv1.ImageSpec{Image: ref} }
	for ref, want := range map[string]int{"sha256:b": 1, "absent": 0} {
		list, err := s.ListImages(t.Context(), &criv1.ListImagesRequest{Filter: &criv1.ImageFilter{Image: spec(ref)}})
		if err != nil || len(list.Images) != want {
			t.Errorf("filter %s: %v, %v", ref, list, err)
		}
	}
	st, err := s.ImageStatus(t.Context(), &criv1.ImageStatusRequest{Image: spec("sha256:b"), Verbose: true})
	if err != nil || st.Image.GetId() != "sha256:b" || st.Info["info"] != `{"layers":["sha256:l"],"imageSpec":{"os":"linux"}}` {
		t.Errorf("%v, %v", st, err)
	}
	st, err = s.ImageStatus(t.Context(), &criv1.ImageStatusRequest{Image: spec("sha256:a"), Verbose: true})
	if err != nil || st.Info["info"] != `{}` {
		t.Errorf("broken config: %v, %v", st, err)
	}
	st, err = s.ImageStatus(t.Context(), &criv1.ImageStatusRequest{Image: spec("absent")})
	if err != nil || st.Image != nil {
		t.Errorf("absent: %v, %v", st, err)
	}
	if _, err := s.RemoveImage(t.Context(), &criv1.RemoveImageRequest{Image: spec("absent")}); err != nil {
		t.Errorf("remove absent: %v", err)
	}
	fs, err := s.ImageFsInfo(t.Context(), nil)
	want := []*criv1.FilesystemUsage{{Timestamp: 7e9, FsId: &criv1.FilesystemIdentifier{Mountpoint: "/var/lib"}, UsedBytes: u64(5), InodesUsed: u64(6)}}
	if diff := cmp.Diff(&criv1.ImageFsInfoResponse{ImageFilesystems: want, ContainerFilesystems: want}, fs, protocmp.Transform()); err != nil || diff != "" {
		t.Error(err, diff)
	}
}

// TestImageRuntimeHandler: "If the runtime handler is unknown, the request
// should be rejected" (api.proto, ImageSpec).
func TestImageRuntimeHandler(t *testing.T) {
	s, _, store := newTestServer()
	store.list = testImages()
	s.SetHandlers([]string{"runc"})
	container := func(i *criv1.ImageSpec) *criv1.ContainerConfig {
		return &criv1.ContainerConfig{Metadata: &criv1.ContainerMetadata{Name: "n"}, Image: i}
	}
	for name, call := range map[string]func(*criv1.ImageSpec) error{
		"PullImage": func(i *criv1.ImageSpec) error {
			_, err := s.PullImage(t.Context(), &criv1.PullImageRequest{Image: i})
			return err
		},
		"ImageStatus": func(i *criv1.ImageSpec) error {
			_, err := s.ImageStatus(t.Context(), &criv1.ImageStatusRequest{Image: i})
			return err
		},
		"RemoveImage": func(i *criv1.ImageSpec) error {
			_, err := s.RemoveImage(t.Context(), &criv1.RemoveImageRequest{Image: i})
			return err
		},
		"ListImages": func(i *criv1.ImageSpec) error {
			_, err := s.ListImages(t.Context(), &criv1.ListImagesRequest{Filter: &criv1.ImageFilter{Image: i}})
			return err
		},
		"ListImages of all": func(i *criv1.ImageSpec) error {
			i.Image = ""
			_, err := s.ListImages(t.Context(), &criv1.ListImagesRequest{Filter: &criv1.ImageFilter{Image: i}})
			return err
		},
		"CreateContainer": func(i *criv1.ImageSpec) error { return create(s, t, container(i)) },
		"an image volume": func(i *criv1.ImageSpec) error {
			c := container(&criv1.ImageSpec{Image: "sha256:a"})
			c.Mounts = []*criv1.Mount{{ContainerPath: "/v", Image: i}}
			return create(s, t, c)
		},
	} {
		for _, handler := range []string{"", "naru", "runc"} {
			if err := call(&criv1.ImageSpec{Image: "sha256:a", RuntimeHandler: handler}); err != nil {
				t.Errorf("%s with handler %q: %v", name, handler, err)
			}
		}
		err := call(&criv1.ImageSpec{Image: "sha256:a", RuntimeHandler: "kata"})
		if !errs.Is(err, errs.InvalidArgument) || !strings.Contains(err.Error(), `runtime_handler "kata"`) {
			t.Errorf("%s with an unknown handler: %v", name, err)
		}
	}
}

func TestPull(t *testing.T) {
	s, _, store := newTestServer()
	c := criv1.NewImageServiceClient(serve(t, s))
	req := &criv1.PullImageRequest{Image: &criv1.ImageSpec{Image: "x"}, Auth: &criv1.AuthConfig{
		Username: "u", Password: "p", Auth: "a", ServerAddress: "s", IdentityToken: "i", RegistryToken: "r",
	}}
	out, err := c.PullImage(t.Context(), req)
	if err != nil || out.ImageRef != "sha256:x" {
		t.Errorf("%v, %v", out, err)
	}
	if want := (images.Auth{Username: "u", Password: "p", Auth: "a", ServerAddress: "s", IdentityToken: "i", RegistryToken: "r"}); *store.auth != want {
		t.Errorf("%+v", store.auth)
	}
	req.Auth = &criv1.AuthConfig{}
	if _, err := c.PullImage(t.Context(), req); err != nil || store.auth != nil {
		t.Errorf("empty auth: %v, %v", store.auth, err)
	}
	store.err = errs.New(errs.Unavailable, "RegistryUnavailable: no route")
	if _, err := c.PullImage(t.Context(), req); status.Code(err) != codes.Unavailable || !strings.HasPrefix(status.Convert(err).Message(), "RegistryUnavailable") {
		t.Errorf("%v", err)
	}
}

func TestImageUser(t *testing.T) {
	tests := []struct {
		user, name string
		uid        int64 // -1 = none
	}{
		{"", "", -1}, {":0", "", -1}, {":1000", "", -1},
		{"root", "root", -1}, {"nobody", "nobody", -1}, {"toor:0", "toor", -1},
		{"0", "", 0}, {"0:0", "", 0}, {"1000", "", 1000}, {"1000:1000", "", 1000}, {"1000:web", "", 1000},
		{"0 ", "0 ", -1}, {"+5", "+5", -1}, {"-1", "-1", -1}, {"0x10", "0x10", -1}, {"4294967294", "", 4294967294},
		{"4294967295", "4294967295", -1}, {"4294967296", "4294967296", -1},
	}
	for _, tt := range tests {
		uid, name := imageUser(tt.user)
		if name != tt.name || (uid == nil) != (tt.uid < 0) || (uid != nil && uid.Value != tt.uid) {
			t.Errorf("%q: %v %q", tt.user, uid, name)
		}
	}
}

// Exec, attach and port-forward from the RPC to the stream.
func TestStreamingURLs(t *testing.T) {
	s, pods, _ := newTestServer()
	c := runtimeClient(t, s)
	exec := &criv1.ExecRequest{ContainerId: "c", Cmd: []string{"echo", "hi"}, Stdout: true}
	if _, err := c.Exec(t.Context(), exec); status.Code(err) != codes.Unavailable {
		t.Errorf("before the streaming server listens: %v", err)
	}
	if err := s.Streams().Listen(); err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Streams().Serve() }()
	t.Cleanup(func() {
		_ = s.Close(t.Context())
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	out, err := c.Exec(t.Context(), exec)
	if err != nil || !strings.HasPrefix(out.GetUrl(), "http://127.0.0.1:") || !strings.Contains(out.GetUrl(), "/exec/") {
		t.Fatalf("%v, %v", out, err)
	}
	for range 2 { // no upgrade: refused, and spent
		resp, err := http.Get(out.Url)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		if resp.StatusCode < 400 || resp.StatusCode >= 500 {
			t.Errorf("%v", resp.Status)
		}
	}
	check := func(name string, err error, want codes.Code) {
		t.Helper()
		if status.Code(err) != want {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
	}
	_, err = c.Exec(t.Context(), &criv1.ExecRequest{ContainerId: "c", Cmd: []string{"x"}, Tty: true, Stderr: true})
	check("tty and stderr", err, codes.InvalidArgument)
	_, err = c.Exec(t.Context(), &criv1.ExecRequest{ContainerId: "c", Cmd: []string{"x"}})
	check("no streams", err, codes.InvalidArgument)
	_, err = c.Exec(t.Context(), &criv1.ExecRequest{ContainerId: "absent", Cmd: []string{"x"}, Stdout: true})
	check("unknown container", err, codes.NotFound)
	_, err = c.Attach(t.Context(), &criv1.AttachRequest{ContainerId: "c", Stdin: true})
	check("attach to stdin that is not there", err, codes.FailedPrecondition)
	_, err = c.Attach(t.Context(), &criv1.AttachRequest{ContainerId: "c", Stdout: true})
	check("attach", err, codes.OK)
	pf, err := c.PortForward(t.Context(), &criv1.PortForwardRequest{PodSandboxId: "p", Port: []int32{80}})
	check("port-forward", err, codes.OK)
	if !strings.Contains(pf.GetUrl(), "/portforward/") {
		t.Errorf("%v", pf)
	}
	for _, port := range []int32{0, -1, 65536, 1e9} {
		_, err = c.PortForward(t.Context(), &criv1.PortForwardRequest{PodSandboxId: "p", Port: []int32{port}})
		check("port", err, codes.InvalidArgument)
	}
	_, err = c.PortForward(t.Context(), &criv1.PortForwardRequest{PodSandboxId: "p", Port: make([]int32, 101)})
	check("many ports", err, codes.InvalidArgument)
	pods.mu.Lock()
	pods.containers["c"] = &pod.Container{ID: "c", State: pod.StateExited}
	pods.pods["p"] = &pod.Pod{ID: "p", Phase: pod.PhaseStopped}
	pods.mu.Unlock()
	_, err = c.Exec(t.Context(), exec)
	check("exec in an exited container", err, codes.FailedPrecondition)
	_, err = c.Attach(t.Context(), &criv1.AttachRequest{ContainerId: "c", Stdout: true})
	check("attach to an exited container", err, codes.FailedPrecondition)
	_, err = c.PortForward(t.Context(), &criv1.PortForwardRequest{PodSandboxId: "p"})
	check("port-forward to a stopped pod", err, codes.FailedPrecondition)
}

func TestTooManyOutstandingURLs(t *testing.T) {
	s, _, _ := newTestServer()
	if err := s.Streams().Listen(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close(t.Context()) }()
	for i := range 1001 {
		_, err := s.Exec(t.Context(), &criv1.ExecRequest{ContainerId: "c", Cmd: []string{"x"}, Stdout: true})
		if want := i == 1000; errs.Is(err, errs.ResourceExhausted) != want || (err != nil) != want {
			t.Fatalf("call %d: %v", i, err)
		}
	}
}
