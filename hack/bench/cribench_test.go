package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestQuantile(t *testing.T) {
	hundred := make([]float64, 100)
	for i := range hundred {
		hundred[99-i] = float64(i + 1)
	}
	m := distribution("x", "ms", "lower", hundred)
	if m.P50 != 50 || m.P90 != 90 || m.P99 != 99 || m.Max != 100 || m.Min != 1 || m.Mean != 50.5 {
		t.Errorf("got %+v", m)
	}
	if q := quantile([]float64{7}, 0.99); q != 7 {
		t.Errorf("p99 of one sample is %v", q)
	}
	if v := median([]float64{3, 1, 2, 4}); v != 2.5 {
		t.Errorf("median is %v", v)
	}
}

func TestParseProc(t *testing.T) {
	stat := "12 (a) b (c) S 1 12 12 0 -1 4194304 100 200 0 0 11 22 33 44 20 0 9 0 100 1 2"
	p, err := parseStat(12, []byte(stat))
	if err != nil || p.Self != 330*time.Millisecond || p.Children != 770*time.Millisecond || p.Threads != 9 {
		t.Errorf("got %+v, %v", p, err)
	}
	if busy := parseBusy("cpu  1 2 4 1000 2000 8 16 4000 8000 9000\n"); busy != 310*time.Millisecond {
		t.Errorf("busy is %v", busy)
	}
	pss, anon := parsePSS([]byte("5500-7ffd ---p 00000000 00:00 0  [rollup]\nRss:  900 kB\nPss:  300 kB\nPss_Anon:  200 kB\n"))
	if pss != 300 || anon != 200 {
		t.Errorf("pss %d, anonymous %d", pss, anon)
	}
}

func TestParseLog(t *testing.T) {
	const ts = "2026-01-02T03:04:05.678Z"
	log := ts + " stdout F abcdefg\n" +
		ts + " stdout P abcd\n" + ts + " stdout F efg\n" +
		ts + " stdout F other\n" +
		"garbage\n" +
		ts + " stdout F abcd" // cut short: not there yet
	c, err := parseLog(strings.NewReader(log), []byte("abcdefg"))
	if err != nil || c.lines != 2 || c.bad != 2 || c.partial != 1 || c.bytes != 8+8+6 {
		t.Errorf("got %+v, %v", c, err)
	}
	if c.begin.Format(time.RFC3339Nano) != ts {
		t.Errorf("begins at %v", c.begin)
	}
}

func TestCompareRounds(t *testing.T) {
	round := func(p50, v float64) Result {
		return Result{Metrics: []Metric{
			{Name: "call", Unit: "ms", N: 9, P50: p50, P99: 10 * p50},
			scalar("rate", "1/s", "higher", v, ""),
		}}
	}
	rows := compareRounds("pod", [][]Result{
		{round(10, 1), round(20, 1), round(40, 1)},
		{round(20, 3), round(30, 3), {}}, // its last round failed
	})
	if len(rows) != 3 {
		t.Fatalf("got %d rows", len(rows))
	}
	p50 := rows[0]
	if p50.Metric != "call p50" || *p50.Medians[0] != 20 || *p50.Medians[1] != 25 {
		t.Errorf("got %+v", p50)
	}
	if q := p50.Ratios[0]; q.Median != 1.75 || q.Min != 1.5 || q.Max != 2 {
		t.Errorf("ratio %+v", q)
	}
	if rows[2].Metric != "rate" || rows[2].Ratios[0].Median != 3 {
		t.Errorf("got %+v", rows[2])
	}
}

func TestOptions(t *testing.T) {
	base := []string{"--endpoint", "a=unix:///a", "--endpoint", "b=unix:///b", "--image", "i"}
	o, run, err := parseOptions("compare", append(base, "--run", "pod", "--count", "7,exec=9", "--set", "b.proc-match=x", "--set", "b.image=j"))
	if err != nil {
		t.Fatal(err)
	}
	if run != "pod" || o.count("pod") != 7 || o.count("exec") != 9 {
		t.Errorf("run %q, counts %v", run, o.Counts)
	}
	if a, b := o.Targets[0], o.Targets[1]; a.Image != "i" || b.Image != "j" || len(a.ProcMatch) != 0 || len(b.ProcMatch) != 1 {
		t.Errorf("targets %+v and %+v", a, b)
	}
	for _, more := range []string{"--count=0", "--count=nosuch=1", "--set=c.image=x", "--set=a.colour=x", "--network=none", "--line-bytes=1", "--base-pods=50", "--endpoint=a=unix:///c", "extra"} {
		if _, _, err := parseOptions("compare", append(base[:len(base):len(base)], more)); err == nil {
			t.Errorf("%s is accepted", more)
		}
	}
}

// fakeCRI keeps pods and containers in memory. It ignores the label filters,
// as a careless runtime might.
type fakeCRI struct {
	cri.UnimplementedRuntimeServiceServer
	cri.UnimplementedImageServiceServer
	mu         sync.Mutex
	seq        int
	pods       map[string]*cri.PodSandbox
	configs    map[string]*cri.PodSandboxConfig
	containers map[string]*cri.Container
	failStart  int // the start that fails, counted from 1; 0 for none
	starts     int
}

func (f *fakeCRI) Version(context.Context, *cri.VersionRequest) (*cri.VersionResponse, error) {
	return &cri.VersionResponse{RuntimeName: "fake", RuntimeVersion: "1", RuntimeApiVersion: "v1"}, nil
}

func (f *fakeCRI) ImageStatus(_ context.Context, r *cri.ImageStatusRequest) (*cri.ImageStatusResponse, error) {
	if r.Image.Image != "here" {
		return &cri.ImageStatusResponse{}, nil
	}
	return &cri.ImageStatusResponse{Image: &cri.Image{Id: "id"}}, nil
}

func (f *fakeCRI) id() string { f.seq++; return fmt.Sprint(f.seq) }

func (f *fakeCRI) RunPodSandbox(_ context.Context, r *cri.RunPodSandboxRequest) (*cri.RunPodSandboxResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	id := f.id()
	f.pods[id] = &cri.PodSandbox{Id: id, Metadata: r.Config.Metadata, Labels: r.Config.Labels, State: cri.PodSandboxState_SANDBOX_READY}
	f.configs[id] = r.Config
	return &cri.RunPodSandboxResponse{PodSandboxId: id}, nil
}

func (f *fakeCRI) CreateContainer(_ context.Context, r *cri.CreateContainerRequest) (*cri.CreateContainerResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	id := f.id()
	f.containers[id] = &cri.Container{Id: id, PodSandboxId: r.PodSandboxId, Metadata: r.Config.Metadata, Labels: r.Config.Labels}
	return &cri.CreateContainerResponse{ContainerId: id}, nil
}

func (f *fakeCRI) StartContainer(_ context.Context, r *cri.StartContainerRequest) (*cri.StartContainerResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.starts++; f.starts == f.failStart {
		return nil, fmt.Errorf("start fails on purpose")
	}
	c := f.containers[r.ContainerId]
	c.State = cri.ContainerState_CONTAINER_RUNNING
	log := filepath.Join(f.configs[c.PodSandboxId].LogDirectory, c.Metadata.Name+".log")
	return &cri.StartContainerResponse{}, os.WriteFile(log, []byte("2026-01-02T03:04:05Z stdout F cribench\n"), 0o644)
}

func (f *fakeCRI) StopContainer(context.Context, *cri.StopContainerRequest) (*cri.StopContainerResponse, error) {
	return &cri.StopContainerResponse{}, nil
}

func (f *fakeCRI) RemoveContainer(_ context.Context, r *cri.RemoveContainerRequest) (*cri.RemoveContainerResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.containers, r.ContainerId)
	return &cri.RemoveContainerResponse{}, nil
}

func (f *fakeCRI) StopPodSandbox(context.Context, *cri.StopPodSandboxRequest) (*cri.StopPodSandboxResponse, error) {
	return &cri.StopPodSandboxResponse{}, nil
}

func (f *fakeCRI) RemovePodSandbox(_ context.Context, r *cri.RemovePodSandboxRequest) (*cri.RemovePodSandboxResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.pods, r.PodSandboxId)
	for id, c := range f.containers {
		if c.PodSandboxId == r.PodSandboxId {
			delete(f.containers, id)
		}
	}
	return &cri.RemovePodSandboxResponse{}, nil
}

func (f *fakeCRI) ListPodSandbox(context.Context, *cri.ListPodSandboxRequest) (*cri.ListPodSandboxResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	resp := &cri.ListPodSandboxResponse{}
	for _, p := range f.pods {
		resp.Items = append(resp.Items, p)
	}
	return resp, nil
}

func (f *fakeCRI) ListContainers(context.Context, *cri.ListContainersRequest) (*cri.ListContainersResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	resp := &cri.ListContainersResponse{}
	for _, c := range f.containers {
		resp.Containers = append(resp.Containers, c)
	}
	return resp, nil
}

// serveFake starts the fake and returns the options to measure it with.
func serveFake(t *testing.T, f *fakeCRI) (endpoint string, args []string) {
	f.pods = map[string]*cri.PodSandbox{"other": {Id: "other", Labels: map[string]string{"app": "theirs"}}}
	f.configs = map[string]*cri.PodSandboxConfig{}
	f.containers = map[string]*cri.Container{"theirs": {Id: "theirs", PodSandboxId: "other"}}
	dir := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	cri.RegisterRuntimeServiceServer(srv, f)
	cri.RegisterImageServiceServer(srv, f)
	go srv.Serve(l)
	t.Cleanup(srv.Stop)
	endpoint = "unix://" + filepath.Join(dir, "s")
	logs := filepath.Join(dir, "logs")
	t.Cleanup(func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		if len(f.pods) != 1 || len(f.containers) != 1 {
			t.Errorf("left %d pods and %d containers, want the one that is not ours", len(f.pods), len(f.containers))
		}
		if left, _ := os.ReadDir(logs); len(left) != 0 {
			t.Errorf("left %d log directories", len(left))
		}
	})
	return endpoint, []string{"--endpoint", endpoint, "--image", "here", "--cgroup-parent", "none",
		"--log-dir", logs, "--timeout", "5s", "--pods", "5"}
}

func TestPodAndBurst(t *testing.T) {
	_, args := serveFake(t, &fakeCRI{})
	if err := measureCommand("pod,burst", append(args, "--count", "3")); err != nil {
		t.Fatal(err)
	}
}

func TestListNotesMissingCalls(t *testing.T) {
	_, args := serveFake(t, &fakeCRI{})
	out := filepath.Join(t.TempDir(), "out.json")
	if err := measureCommand("list", append(args, "--count", "3", "--json", out)); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(out)
	if err != nil || !bytes.Contains(b, []byte("Unimplemented")) {
		t.Errorf("the report does not tell that stats are missing: %v\n%s", err, b)
	}
}

func TestCleansUpAfterFailure(t *testing.T) {
	for _, n := range []int{1, 3, 5} {
		_, args := serveFake(t, &fakeCRI{failStart: n})
		err := measureCommand("burst", append(args, "--warmup", "0"))
		if err == nil || !strings.Contains(err.Error(), "on purpose") {
			t.Errorf("failing start %d gives %v", n, err)
		}
	}
}

func TestDensityWithBase(t *testing.T) {
	_, args := serveFake(t, &fakeCRI{})
	out := filepath.Join(t.TempDir(), "out.json")
	// The fake runs in this process, which scan leaves out: weigh the shell
	// of a sleeping child instead.
	child := exec.Command("sleep", "60")
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { child.Process.Kill(); child.Wait() })
	if err := measureCommand("density", append(args, "--base-pods", "2", "--settle", "1ms", "--proc-match", "/(sleep|busybox|coreutils)$", "--json", out)); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(out)
	if err != nil || !bytes.Contains(b, []byte(`"base-pods": 2`)) || !bytes.Contains(b, []byte(`"pss/pod"`)) {
		t.Errorf("the report lacks the slope: %v\n%s", err, b)
	}
}

func TestMissingImage(t *testing.T) {
	_, args := serveFake(t, &fakeCRI{})
	err := measureCommand("pod", append(args, "--image", "absent"))
	if err == nil || !strings.Contains(err.Error(), "absent") {
		t.Errorf("got %v", err)
	}
}

func TestCompareFakes(t *testing.T) {
	a, args := serveFake(t, &fakeCRI{})
	b, _ := serveFake(t, &fakeCRI{})
	out := filepath.Join(t.TempDir(), "out.json")
	args = append([]string{"--endpoint", "a=" + a, "--endpoint", "b=" + b, "--run", "pod", "--rounds", "2", "--count", "2", "--json", out}, args[2:]...)
	if err := measureCommand("compare", args); err != nil {
		t.Fatal(err)
	}
	if report, _ := os.ReadFile(out); !bytes.Contains(report, []byte(`"ready p50"`)) {
		t.Errorf("no comparison in the report:\n%s", report)
	}
}
