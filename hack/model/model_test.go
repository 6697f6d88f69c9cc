package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// fake is a runtime in memory that keeps all rules but the one that is named.
// Its containers are what the model's commands would be.
type fake struct {
	cri.UnimplementedRuntimeServiceServer
	broken string

	mu   sync.Mutex
	pods map[string]*fakePod
	ctrs map[string]*fakeCtr
	ips  int
	left []*os.File // a planted leak of the host
}

type fakePod struct {
	config *cri.PodSandboxConfig
	status *cri.PodSandboxStatus
}

type fakeCtr struct {
	pod    string
	log    string
	config *cri.ContainerConfig
	status *cri.ContainerStatus
}

func fakeID() string {
	b := make([]byte, 32)
	_, _ = rand.Read(b)
	return hex.EncodeToString(b)
}

func (f *fake) lock() func() { f.mu.Lock(); return f.mu.Unlock }

// is tells whether the rule is to be broken.
func (f *fake) is(fault string) bool { return f.broken == fault }

func (f *fake) Version(context.Context, *cri.VersionRequest) (*cri.VersionResponse, error) {
	return &cri.VersionResponse{RuntimeName: "fake"}, nil
}

func (f *fake) RunPodSandbox(_ context.Context, q *cri.RunPodSandboxRequest) (*cri.RunPodSandboxResponse, error) {
	defer f.lock()()
	for id, p := range f.pods {
		if p.config.Metadata.Uid == q.Config.Metadata.Uid && !f.is("second id of a pod") {
			if p.config.Hostname != q.Config.Hostname && !f.is("another config of a pod") {
				return nil, status.Error(codes.AlreadyExists, "another config")
			}
			return &cri.RunPodSandboxResponse{PodSandboxId: id}, nil
		}
	}
	if f.is("valid refused") {
		return nil, status.Error(codes.Internal, "no")
	}
	id := fakeID()
	switch {
	case f.is("short id"):
		id = id[:40]
	case f.is("one id for all pods"):
		id = strings.Repeat("7", 64)
	}
	f.ips++
	ip := fmt.Sprintf("10.0.%d.%d", f.ips/250, f.ips%250)
	if f.is("one address for all") {
		ip = "10.0.0.1"
	}
	s := &cri.PodSandboxStatus{
		Id: id, Metadata: q.Config.Metadata, Labels: maps.Clone(q.Config.Labels), Annotations: maps.Clone(q.Config.Annotations),
		CreatedAt: time.Now().UnixNano(), Network: &cri.PodSandboxNetworkStatus{Ip: ip},
	}
	if f.is("labels of a pod") {
		s.Labels["more"] = "x"
	}
	if f.is("no pod ready") {
		s.State = cri.PodSandboxState_SANDBOX_NOTREADY
	}
	if f.is("host") && f.left == nil {
		for range 2 * spare {
			x, _ := os.Open("/dev/null")
			f.left = append(f.left, x)
		}
	}
	f.pods[id] = &fakePod{q.Config, s}
	return &cri.RunPodSandboxResponse{PodSandboxId: id}, nil
}

func (f *fake) PodSandboxStatus(_ context.Context, q *cri.PodSandboxStatusRequest) (*cri.PodSandboxStatusResponse, error) {
	defer f.lock()()
	p := f.pods[q.PodSandboxId]
	if p == nil {
		if f.is("a removed pod is found") {
			return &cri.PodSandboxStatusResponse{Status: &cri.PodSandboxStatus{}}, nil
		}
		return nil, status.Error(codes.NotFound, "no such pod")
	}
	return &cri.PodSandboxStatusResponse{Status: p.status}, nil
}

func has(all, want map[string]string) bool {
	for k, v := range want {
		if all[k] != v {
			return false
		}
	}
	return true
}

func (f *fake) ListPodSandbox(_ context.Context, q *cri.ListPodSandboxRequest) (*cri.ListPodSandboxResponse, error) {
	defer f.lock()()
	a := &cri.ListPodSandboxResponse{}
	for id, p := range f.pods {
		q := q.GetFilter()
		switch {
		case q.GetId() != "" && q.GetId() != id,
			q.GetState() != nil && q.GetState().State != p.status.State && !f.is("state filter"),
			!has(p.status.Labels, q.GetLabelSelector()) && !f.is("label filter of pods"):
			continue
		}
		a.Items = append(a.Items, &cri.PodSandbox{Id: id, Metadata: p.status.Metadata, State: p.status.State, Labels: p.status.Labels})
		if f.is("a pod twice") {
			a.Items = append(a.Items, a.Items[len(a.Items)-1])
		}
	}
	return a, nil
}

func (f *fake) CreateContainer(_ context.Context, q *cri.CreateContainerRequest) (*cri.CreateContainerResponse, error) {
	defer f.lock()()
	for id, c := range f.ctrs {
		if c.pod == q.PodSandboxId && c.config.Metadata.Name == q.Config.Metadata.Name && !f.is("second id of a container") {
			if !slices.Equal(c.config.Command, q.Config.Command) && !f.is("another config of a container") {
				return nil, status.Error(codes.AlreadyExists, "another config")
			}
			return &cri.CreateContainerResponse{ContainerId: id}, nil
		}
	}
	id := fakeID()
	s := &cri.ContainerStatus{
		Id: id, Metadata: q.Config.Metadata, Labels: q.Config.Labels, Annotations: maps.Clone(q.Config.Annotations),
		CreatedAt: time.Now().UnixNano(), State: cri.ContainerState_CONTAINER_CREATED,
	}
	switch {
	case f.is("annotations of a container"):
		s.Annotations["note"] = ""
	case f.is("started when created"):
		s.StartedAt = s.CreatedAt
	case f.is("running when created"):
		s.State = cri.ContainerState_CONTAINER_RUNNING
	}
	f.ctrs[id] = &fakeCtr{q.PodSandboxId, filepath.Join(q.SandboxConfig.LogDirectory, q.Config.LogPath), q.Config, s}
	return &cri.CreateContainerResponse{ContainerId: id}, nil
}

func (f *fake) StartContainer(_ context.Context, q *cri.StartContainerRequest) (*cri.StartContainerResponse, error) {
	defer f.lock()()
	c := f.ctrs[q.ContainerId]
	if c == nil {
		return nil, status.Error(codes.NotFound, "no such container")
	}
	if c.status.State != cri.ContainerState_CONTAINER_CREATED {
		if f.is("started twice") {
			return &cri.StartContainerResponse{}, nil
		}
		return nil, status.Error(codes.FailedPrecondition, "it was started")
	}
	c.status.State, c.status.StartedAt = cri.ContainerState_CONTAINER_RUNNING, time.Now().UnixNano()
	if f.is("started before created") {
		c.status.StartedAt = 1
	}
	if c.config.Command[len(c.config.Command)-1] == "1000000" {
		if f.is("ends by itself") {
			f.exit(c, 0)
		}
		return &cri.StartContainerResponse{}, nil
	}
	var lines, code int
	if n, _ := fmt.Sscanf(c.config.Command[2], "seq 1 %d;", &lines); n == 1 {
		_, _ = fmt.Sscanf(c.config.Command[2][strings.LastIndex(c.config.Command[2], "exit"):], "exit %d", &code)
		f.writeLog(c, lines)
		f.exit(c, int32(code))
	}
	return &cri.StartContainerResponse{}, nil
}

func (f *fake) writeLog(c *fakeCtr, lines int) {
	var b strings.Builder
	for _, stream := range []string{"stdout", "stderr"} {
		for i := 1; i <= lines; i++ {
			if f.is("a line lost") && i == lines || f.is("streams mixed") && stream == "stderr" {
				continue
			}
			fmt.Fprintf(&b, "%s %s F %d\n", time.Now().Format(time.RFC3339Nano), stream, i)
			if f.is("a line doubled") && i == 1 {
				fmt.Fprintf(&b, "%s %s F %d\n", time.Now().Format(time.RFC3339Nano), stream, i)
			}
		}
	}
	if f.is("half a record") {
		b.WriteString("2026-")
	}
	_ = os.WriteFile(c.log, []byte(b.String()), 0o600)
}

func (f *fake) exit(c *fakeCtr, code int32) {
	if c.status.State == cri.ContainerState_CONTAINER_EXITED {
		return
	}
	c.status.State, c.status.ExitCode, c.status.FinishedAt = cri.ContainerState_CONTAINER_EXITED, code, time.Now().UnixNano()
	switch {
	case f.is("exit code"):
		c.status.ExitCode++
	case f.is("an exit unknown"):
		c.status.ExitCode, c.status.Reason = 255, "ContainerStatusUnknown"
	case f.is("finished before started"):
		c.status.FinishedAt = c.status.StartedAt - 1
	}
}

func (f *fake) ContainerStatus(_ context.Context, q *cri.ContainerStatusRequest) (*cri.ContainerStatusResponse, error) {
	defer f.lock()()
	c := f.ctrs[q.ContainerId]
	if c == nil {
		if f.is("a removed container is found") {
			return &cri.ContainerStatusResponse{Status: &cri.ContainerStatus{}}, nil
		}
		return nil, status.Error(codes.NotFound, "no such container")
	}
	s := c.status
	return &cri.ContainerStatusResponse{Status: &cri.ContainerStatus{
		Id: s.Id, Metadata: s.Metadata, State: s.State, CreatedAt: s.CreatedAt, StartedAt: s.StartedAt, FinishedAt: s.FinishedAt,
		ExitCode: s.ExitCode, Reason: s.Reason, Labels: s.Labels, Annotations: s.Annotations,
	}}, nil
}

func (f *fake) ListContainers(_ context.Context, q *cri.ListContainersRequest) (*cri.ListContainersResponse, error) {
	defer f.lock()()
	a := &cri.ListContainersResponse{}
	for id, c := range f.ctrs {
		q := q.GetFilter()
		if q.GetPodSandboxId() != "" && q.GetPodSandboxId() != c.pod && !f.is("pod filter") || !has(c.config.Labels, q.GetLabelSelector()) {
			continue
		}
		if f.is("a container is not listed") && len(a.Containers) == 0 && len(f.ctrs) > 1 {
			continue
		}
		a.Containers = append(a.Containers, &cri.Container{Id: id, PodSandboxId: c.pod, Metadata: c.config.Metadata, State: c.status.State, Labels: c.config.Labels})
	}
	return a, nil
}

func (f *fake) ExecSync(_ context.Context, q *cri.ExecSyncRequest) (*cri.ExecSyncResponse, error) {
	var out string
	var code int32
	_, _ = fmt.Sscanf(q.Cmd[2], "echo out of %s echo err >&2; exit %d", &out, &code)
	a := &cri.ExecSyncResponse{Stdout: []byte("out of " + strings.TrimSuffix(out, ";") + "\n"), Stderr: []byte("err\n"), ExitCode: code}
	switch {
	case f.is("exec output"):
		a.Stdout = nil
	case f.is("exec code"):
		a.ExitCode = 0
	}
	return a, nil
}

func (f *fake) StopContainer(_ context.Context, q *cri.StopContainerRequest) (*cri.StopContainerResponse, error) {
	defer f.lock()()
	c := f.ctrs[q.ContainerId]
	switch {
	case c == nil && f.is("stop of an unknown one"):
		return nil, status.Error(codes.Internal, "what?")
	case c == nil:
		return &cri.StopContainerResponse{}, nil
	case c.status.State == cri.ContainerState_CONTAINER_EXITED && f.is("stop twice"):
		return nil, status.Error(codes.Internal, "it has ended")
	case f.is("stop does nothing"):
		return &cri.StopContainerResponse{}, nil
	}
	f.exit(c, 137)
	return &cri.StopContainerResponse{}, nil
}

func (f *fake) RemoveContainer(_ context.Context, q *cri.RemoveContainerRequest) (*cri.RemoveContainerResponse, error) {
	defer f.lock()()
	if f.ctrs[q.ContainerId] == nil && f.is("remove twice") {
		return nil, status.Error(codes.Internal, "it is gone")
	}
	if !f.is("remove does nothing") {
		delete(f.ctrs, q.ContainerId)
	}
	return &cri.RemoveContainerResponse{}, nil
}

func (f *fake) StopPodSandbox(_ context.Context, q *cri.StopPodSandboxRequest) (*cri.StopPodSandboxResponse, error) {
	defer f.lock()()
	if p := f.pods[q.PodSandboxId]; p != nil {
		p.status.State = cri.PodSandboxState_SANDBOX_NOTREADY
		if f.is("a pod stays ready") {
			p.status.State = cri.PodSandboxState_SANDBOX_READY
		}
	}
	for _, c := range f.ctrs {
		if c.pod == q.PodSandboxId && !f.is("containers outlive their pod") {
			f.exit(c, 137)
		}
	}
	return &cri.StopPodSandboxResponse{}, nil
}

func (f *fake) RemovePodSandbox(_ context.Context, q *cri.RemovePodSandboxRequest) (*cri.RemovePodSandboxResponse, error) {
	defer f.lock()()
	if f.is("pods stay") {
		return &cri.RemovePodSandboxResponse{}, nil
	}
	delete(f.pods, q.PodSandboxId)
	for id, c := range f.ctrs {
		if c.pod == q.PodSandboxId && !f.is("containers stay") {
			delete(f.ctrs, id)
		}
	}
	return &cri.RemovePodSandboxResponse{}, nil
}

func judge(t *testing.T, fault string) *Report {
	t.Helper()
	f := &fake{broken: fault, pods: map[string]*fakePod{}, ctrs: map[string]*fakeCtr{}}
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	cri.RegisterRuntimeServiceServer(s, f)
	go func() { _ = s.Serve(l) }()
	defer func() {
		s.Stop()
		for _, x := range f.left {
			_ = x.Close()
		}
	}()
	o := options{Endpoint: socket, Image: "x", LogDir: t.TempDir(), Seed: 7, Workers: 4, Pods: 60, Lines: 30, Duration: time.Minute, Patience: time.Second, Settle: 300 * time.Millisecond}
	if fault == "host" {
		o.Host.PIDs = fmt.Sprint(os.Getpid())
	}
	r, err := Run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// A runtime that keeps all rules has no violations.
func TestModelKeepsQuiet(t *testing.T) {
	r := judge(t, "")
	if len(r.Violations) > 0 || r.Pods != 60 || r.Exits == 0 || r.Lines == 0 || r.Duplicates == 0 || r.Cancelled == 0 {
		t.Errorf("%+v", r)
	}
}

// Each rule that a runtime breaks is reported by its name: else a run without
// violations would prove nothing.
func TestModelSeesEachBrokenRule(t *testing.T) {
	seen := map[string]bool{}
	for fault, rule := range map[string]string{
		"valid refused":                 ruleValid,
		"second id of a pod":            ruleSameID,
		"second id of a container":      ruleSameID,
		"another config of a pod":       ruleOther,
		"another config of a container": ruleOther,
		"short id":                      ruleID,
		"one id for all pods":           ruleID,
		"no pod ready":                  ruleState,
		"running when created":          ruleState,
		"ends by itself":                ruleState,
		"a pod stays ready":             ruleState,
		"stop does nothing":             ruleState,
		"containers outlive their pod":  ruleState,
		"started when created":          ruleTimes,
		"started before created":        ruleTimes,
		"finished before started":       ruleTimes,
		"labels of a pod":               ruleIdentity,
		"annotations of a container":    ruleIdentity,
		"one address for all":           ruleIP,
		"state filter":                  ruleFilter,
		"label filter of pods":          ruleFilter,
		"pod filter":                    ruleFilter,
		"a pod twice":                   ruleFilter,
		"a container is not listed":     ruleFilter,
		"exit code":                     ruleExit,
		"an exit unknown":               ruleExit,
		"exec output":                   ruleExec,
		"exec code":                     ruleExec,
		"started twice":                 ruleRestart,
		"stop twice":                    ruleIdempotent,
		"remove twice":                  ruleIdempotent,
		"stop of an unknown one":        ruleIdempotent,
		"remove does nothing":           ruleGone,
		"a removed pod is found":        ruleGone,
		"a removed container is found":  ruleGone,
		"a line lost":                   ruleLog,
		"a line doubled":                ruleLog,
		"streams mixed":                 ruleLog,
		"half a record":                 ruleLog,
		"pods stay":                     ruleEmpty,
		"containers stay":               ruleEmpty,
		"host":                          ruleHost,
	} {
		seen[rule] = true
		t.Run(fault, func(t *testing.T) {
			r := judge(t, fault)
			if !slices.ContainsFunc(r.Violations, func(v Violation) bool { return v.Rule == rule }) {
				t.Errorf("no violation of %q in %+v", rule, r)
			}
		})
	}
	for _, rule := range []string{ruleValid, ruleSameID, ruleOther, ruleID, ruleState, ruleTimes, ruleIdentity, ruleIP, ruleFilter, ruleExit, ruleExec, ruleRestart, ruleIdempotent, ruleGone, ruleLog, ruleEmpty, ruleHost} {
		if !seen[rule] {
			t.Errorf("no fault breaks the rule %q", rule)
		}
	}
}

func TestNumbered(t *testing.T) {
	const ts = "2026-01-02T03:04:05.678Z "
	for text, good := range map[string]bool{
		"":                                       true,
		ts + "stdout F 1\n":                      true,
		ts + "stdout P 1\n" + ts + "stdout F \n": true,
		ts + "stdout F 1\n" + ts + "stderr F 1\n" + ts + "stdout F 2\n": true,
		ts + "stdout F 2\n":                       false,
		ts + "stdout F 1\n" + ts + "stdout F 1\n": false,
		ts + "stdout F 1\n" + ts + "stdout F 3\n": false,
		ts + "stdout F 1":                         false,
		ts + "stdout P 1\n":                       false,
		ts + "stdin F 1\n":                        false,
		ts + "stdout X 1\n":                       false,
		"yesterday stdout F 1\n":                  false,
		"\n":                                      false,
	} {
		if last, err := numbered(strings.NewReader(text)); (err == nil) != good {
			t.Errorf("%q: %v, %v", text, last, err)
		}
	}
}

func TestHostBeyond(t *testing.T) {
	before := host{"mount /a": 1, "descriptors of process 1": 10}
	if left := (host{"mount /a": 1, "descriptors of process 1": 10 + spare}).beyond(before); len(left) > 0 {
		t.Errorf("%q", left)
	}
	if left := (host{"mount /a": 2, "link x": 1, "descriptors of process 1": 11 + spare}).beyond(before); len(left) != 3 {
		t.Errorf("%q", left)
	}
}

func FuzzNumbered(f *testing.F) {
	f.Add("2026-01-02T03:04:05.678Z stdout P:x 1\n")
	f.Fuzz(func(t *testing.T, text string) {
		last, err := numbered(strings.NewReader(text))
		if n := strings.Count(text, "\n"); err == nil && last["stdout"]+last["stderr"] > n {
			t.Errorf("%v of %d lines", last, n)
		}
	})
}

func FuzzMounts(f *testing.F) {
	f.Add([]byte("36 35 98:0 / /mnt\\040x rw - ext4 /dev/sda rw\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if n := len(parseMounts(b)); n > strings.Count(string(b), "\n")+1 {
			t.Errorf("%d mounts", n)
		}
	})
}

func FuzzNft(f *testing.F) {
	f.Add([]byte(`{"nftables":[{"set":{"name":"a","elem":[1,2]}},{"map":{"name":"a","elem":[[1,2]]}},{}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if sets, err := parseNft(b); err == nil {
			for _, n := range sets {
				if n < 0 || n > len(b) {
					t.Errorf("%d elements", n)
				}
			}
		}
	})
}
