package cri

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	goruntime "runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/internal/testhost"
	"github.com/naru-project/naru/pod"
)

// The rows of docs/security.md about the CRI calls.

// Row U-01: what kubelet learns of an image's USER, for runAsNonRoot: the number
// that it is, or a text that it refuses as it is no number; nothing only when
// nothing stands there.
func TestRowU01WhatKubeletLearns(t *testing.T) {
	for _, user := range []string{"4294967296", "4294967295", "2147483648", "99999999999999999999", "-1", "00", "+0", "0x0", "1e3", "1000 ", "１０００", "1000:4294967296",
		"0", "0:0", "0 ", "root", "toor:5", "nobody", "1000", "+1000", "-0"} {
		uid, name := imageUser(user)
		half, _, _ := strings.Cut(user, ":")
		n, err := strconv.ParseInt(half, 10, 64)
		if uid != nil && (err != nil || n != uid.Value || name != "") || uid == nil && name != half {
			t.Errorf("%q: uid %v, name %q", user, uid, name)
		}
	}
	for _, user := range []string{"", ":", ":5"} {
		if uid, name := imageUser(user); uid != nil || name != "" {
			t.Errorf("%q: uid %v, name %q", user, uid, name)
		}
	}
}

// repeated sends the same MiB again and again as one message.
type repeated struct {
	block mem.Buffer
	times int
}

// Marshal implements encoding.CodecV2.
func (r repeated) Marshal(any) (mem.BufferSlice, error) {
	var all mem.BufferSlice
	for range r.times {
		r.block.Ref()
		all = append(all, r.block)
	}
	return all, nil
}

// Unmarshal implements encoding.CodecV2.
func (repeated) Unmarshal(mem.BufferSlice, any) error { return nil }

// Name implements encoding.CodecV2.
func (repeated) Name() string { return "proto" }

// Row S-14: a message of 512 MiB is refused by its length; nothing of it is kept.
func TestRowS14HugeMessage(t *testing.T) {
	s, pods, _ := newTestServer()
	conn := serve(t, s)
	var before, after goruntime.MemStats
	block := mem.SliceBuffer(make([]byte, 1<<20))
	goruntime.ReadMemStats(&before)
	for range 4 {
		err := conn.Invoke(t.Context(), "/runtime.v1.RuntimeService/ExecSync", &criv1.ExecSyncRequest{}, &criv1.ExecSyncResponse{},
			grpc.ForceCodecV2(repeated{block, 512}), grpc.MaxCallSendMsgSize(1<<30))
		if status.Code(err) != codes.ResourceExhausted {
			t.Fatalf("512 MiB: %v", err)
		}
	}
	goruntime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 256<<20 {
		t.Errorf("%d MiB were allocated for four messages", n>>20)
	}
	if len(pods.calls) != 0 {
		t.Errorf("calls arrived: %v", pods.calls)
	}
	if _, err := criv1.NewRuntimeServiceClient(conn).Version(t.Context(), &criv1.VersionRequest{}); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// Row S-14: 100 000 labels in a request.
func TestRowS14ManyLabels(t *testing.T) {
	s, pods, _ := newTestServer()
	c := runtimeClient(t, s)
	labels := map[string]string{}
	for i := range 100_000 {
		labels[fmt.Sprintf("label-%d.example.com/name", i)] = "value"
	}
	start := time.Now()
	_, err := c.RunPodSandbox(t.Context(), &criv1.RunPodSandboxRequest{Config: &criv1.PodSandboxConfig{
		Metadata: &criv1.PodSandboxMetadata{Name: "n", Uid: "u", Namespace: "ns"}, Labels: labels,
	}})
	if code := status.Code(err); code != codes.OK && code != codes.InvalidArgument || err == nil && len(pods.sandbox.Labels) != len(labels) {
		t.Errorf("a pod: %v", err)
	}
	_, err = c.CreateContainer(t.Context(), &criv1.CreateContainerRequest{PodSandboxId: "p", Config: &criv1.ContainerConfig{
		Metadata: &criv1.ContainerMetadata{Name: "c"}, Image: &criv1.ImageSpec{Image: "i"}, Annotations: labels,
	}})
	if code := status.Code(err); code != codes.OK && code != codes.InvalidArgument {
		t.Errorf("a container: %v", err)
	}
	if _, err := c.ListContainers(t.Context(), &criv1.ListContainersRequest{Filter: &criv1.ContainerFilter{LabelSelector: labels}}); err != nil {
		t.Error(err)
	}
	if d := time.Since(start); d > testhost.Limit(30*time.Second) {
		t.Errorf("took %v", d)
	}
}

// Row S-14: lists of 10 000, as kubelet's pods look. What does not fit in a
// message is ResourceExhausted, and the streamed twin has it all.
func TestRowS14LongLists(t *testing.T) {
	const n = 10_000
	s, pods, _ := newTestServer()
	clear(pods.pods)
	clear(pods.containers)
	labels := func(i int) map[string]string {
		return map[string]string{"io.kubernetes.container.name": "server", "io.kubernetes.pod.name": fmt.Sprintf("frontend-7c5ddbdf54-%05d", i),
			"io.kubernetes.pod.namespace": "production", "io.kubernetes.pod.uid": fmt.Sprintf("f3a5c1f2-8d8e-4d6e-9d0c-%012d", i)}
	}
	notes := map[string]string{"io.kubernetes.container.hash": "5a1b2c3d", "io.kubernetes.container.restartCount": "0",
		"io.kubernetes.container.terminationMessagePath": "/dev/termination-log", "io.kubernetes.container.terminationMessagePolicy": "File", "io.kubernetes.pod.terminationGracePeriod": "30"}
	at := time.Now()
	for i := range n {
		p := &pod.Pod{ID: fmt.Sprintf("%064x", i), Phase: pod.PhaseReady, Config: &pod.SandboxConfig{Metadata: pod.Metadata{Name: fmt.Sprint("frontend", i), UID: fmt.Sprint("u", i)}, Labels: labels(i), Annotations: notes}}
		c := &pod.Container{ID: fmt.Sprintf("%064x", n+i), PodID: p.ID, State: pod.StateRunning,
			Config: &pod.ContainerConfig{Metadata: pod.ContainerMetadata{Name: "server"}, Image: "registry.example.com/team/frontend:v1.2.3", Labels: labels(i), Annotations: notes}}
		pods.pods[p.ID], pods.containers[c.ID] = p, c
		pods.stats[c.ID] = &pod.ContainerStats{Container: c, Stats: fullStats(at, &pod.PSI{})}
	}
	conn := serve(t, s)
	c := criv1.NewRuntimeServiceClient(conn)
	lists := map[string]func() (int, error){
		"containers": func() (int, error) {
			r, err := c.ListContainers(t.Context(), &criv1.ListContainersRequest{})
			return len(r.GetContainers()), err
		},
		"pod stats": func() (int, error) {
			r, err := c.ListPodSandboxStats(t.Context(), &criv1.ListPodSandboxStatsRequest{})
			return len(r.GetStats()), err
		},
	}
	for what, list := range lists {
		got, err := list()
		t.Logf("%s: %d, %v", what, got, err)
		if err != nil && status.Code(err) != codes.ResourceExhausted || err == nil && got != n {
			t.Errorf("%s: %d, %v", what, got, err)
		}
	}
	streamed := map[string]func() (int, error){
		"containers": countStream(c.StreamContainers(t.Context(), &criv1.StreamContainersRequest{}))(func(r *criv1.StreamContainersResponse) int { return len(r.Containers) }),
		"pod stats":  countStream(c.StreamPodSandboxStats(t.Context(), &criv1.StreamPodSandboxStatsRequest{}))(func(r *criv1.StreamPodSandboxStatsResponse) int { return len(r.PodSandboxStats) }),
	}
	for what, stream := range streamed {
		if got, err := stream(); err != nil || got != n {
			t.Errorf("%s streamed: %d, %v", what, got, err)
		}
	}
}

// countStream reads a stream to its end and counts what its messages hold.
func countStream[T any](s grpc.ServerStreamingClient[T], err error) func(func(*T) int) func() (int, error) {
	return func(size func(*T) int) func() (int, error) {
		return func() (int, error) {
			n := 0
			for err == nil {
				var m *T
				if m, err = s.Recv(); err == nil {
					n += size(m)
				}
			}
			if errors.Is(err, io.EOF) {
				err = nil
			}
			return n, err
		}
	}
}

// Row S-15: each call with random messages: fields left out, enums and numbers
// out of range, bytes flipped on the wire. 30 000 calls, for a million would
// take half a minute; FuzzCRI goes on from there.
func TestRowS15RandomMessages(t *testing.T) {
	s, pods, _ := newTestServer()
	const calls = 30_000
	rnd := rand.New(rand.NewPCG(1, 2))
	desc := append(criv1.RuntimeService_ServiceDesc.Methods, criv1.ImageService_ServiceDesc.Methods...)
	inputs := map[string]protoreflect.MessageDescriptor{}
	eachMethod(t, func(_ string, m protoreflect.MethodDescriptor) { inputs[string(m.Name())] = m.Input() })
	seen := map[codes.Code]int{}
	for i := range calls {
		d := desc[i%len(desc)]
		req := newMessage(t, inputs[d.MethodName])
		scramble(rnd, req.ProtoReflect(), 0)
		raw, err := proto.MarshalOptions{AllowPartial: true}.Marshal(req)
		if err != nil {
			t.Fatal(err)
		}
		for range rnd.IntN(3) {
			if len(raw) > 0 {
				raw[rnd.IntN(len(raw))] ^= byte(1 << rnd.IntN(8))
			}
		}
		bad := false
		_, err = d.Handler(s, context.Background(), func(v any) error {
			err := proto.Unmarshal(raw, v.(proto.Message))
			bad = err != nil
			return err
		}, s.unary)
		if c := status.Code(err); !bad && (c == codes.Unknown || c == codes.Internal) {
			t.Fatalf("%s with %x: %v", d.MethodName, raw, err)
		}
		seen[status.Code(err)]++
		pods.mu.Lock()
		pods.calls = nil
		pods.mu.Unlock()
	}
	t.Logf("%v", seen)
	if seen[codes.OK] == 0 || seen[codes.InvalidArgument] == 0 {
		t.Error("the messages were all of one kind")
	}
}

// scramble fills a message at random.
func scramble(rnd *rand.Rand, m protoreflect.Message, depth int) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		if rnd.IntN(2) == 0 || depth > 6 {
			continue
		}
		g := garbage{number: []int64{0, 1, -1, 9999, -1 << 63, 1<<63 - 1, 1 << 32}[rnd.IntN(7)], enum: []int32{0, 1, 2, 9999, -1}[rnd.IntN(5)],
			text: []string{"", "p", "c", "x", "../..", "/a", "a=b", "\x00", "a\nb", strings.Repeat("y", 5000)}[rnd.IntN(10)]}
		f := fields.Get(i)
		switch {
		case f.IsMap():
			m.Mutable(f).Map().Set(protoreflect.ValueOfString(g.text).MapKey(), protoreflect.ValueOfString(g.text))
		case f.IsList():
			for range rnd.IntN(3) {
				if list := m.Mutable(f).List(); f.Message() != nil {
					scramble(rnd, list.AppendMutable().Message(), depth+1)
				} else {
					list.Append(g.scalar(f))
				}
			}
		case f.Message() != nil:
			scramble(rnd, m.Mutable(f).Message(), depth+1)
		default:
			m.Set(f, g.scalar(f))
		}
	}
}

// wireBytes is a message that is sent as it is.
type wireBytes []byte

// Marshal implements encoding.CodecV2.
func (b wireBytes) Marshal(any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(b)}, nil
}

// Unmarshal implements encoding.CodecV2.
func (wireBytes) Unmarshal(mem.BufferSlice, any) error { return nil }

// Name implements encoding.CodecV2.
func (wireBytes) Name() string { return "proto" }

// Row S-15: on the wire: strings that are no UTF-8, cut messages, endless
// nesting; and a panic, which is counted.
func TestRowS15OnTheWire(t *testing.T) {
	s, pods, _ := newTestServer()
	metrics := &countMetrics{seen: map[string]int{}}
	s.cfg.Metrics = metrics
	conn := serve(t, s)
	// Field 1, which every one of these has, as text, as a message, and cut short.
	for _, b := range []string{"\x0a\x02\xff\xfe", "\x0a\x04\x0a\x02\xff\xfe", "\x0a\xff\xff\xff\xff\x0f", "\x0a", "\xff", "\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", strings.Repeat("\x0b", 20_000),
		strings.Repeat("\x0a\x80\x80\x01", 10)} {
		eachMethod(t, func(path string, m protoreflect.MethodDescriptor) {
			if m.IsStreamingServer() {
				return
			}
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			err := conn.Invoke(ctx, path, &criv1.VersionRequest{}, &criv1.VersionResponse{}, grpc.ForceCodecV2(wireBytes(b)))
			// What cannot be decoded never reaches a handler: gRPC says Internal by itself.
			if c := status.Code(err); c == codes.Unknown || c == codes.Unavailable || c == codes.Internal && !strings.Contains(err.Error(), "unmarshal") {
				t.Errorf("%s with %.20q: %v", path, b, err)
			}
		})
	}
	pods.mu.Lock()
	pods.panics = true
	pods.mu.Unlock()
	c := criv1.NewRuntimeServiceClient(conn)
	if _, err := c.StartContainer(t.Context(), &criv1.StartContainerRequest{ContainerId: "c"}); status.Code(err) != codes.Internal {
		t.Errorf("a panic: %v", err)
	}
	metrics.mu.Lock()
	defer metrics.mu.Unlock()
	if metrics.seen["StartContainer Internal"] != 1 {
		t.Errorf("the panic was not counted: %v", metrics.seen)
	}
}
