package cri

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"reflect"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// emptyCodes is what each RPC answers to an empty request. Every RPC of the
// protocol must be here.
var emptyCodes = map[string]codes.Code{
	"Version":                   codes.OK,
	"RunPodSandbox":             codes.InvalidArgument,
	"StopPodSandbox":            codes.InvalidArgument,
	"RemovePodSandbox":          codes.InvalidArgument,
	"PodSandboxStatus":          codes.InvalidArgument,
	"ListPodSandbox":            codes.OK,
	"StreamPodSandboxes":        codes.OK,
	"CreateContainer":           codes.InvalidArgument,
	"StartContainer":            codes.InvalidArgument,
	"StopContainer":             codes.InvalidArgument,
	"RemoveContainer":           codes.InvalidArgument,
	"ListContainers":            codes.OK,
	"StreamContainers":          codes.OK,
	"ContainerStatus":           codes.InvalidArgument,
	"UpdateContainerResources":  codes.InvalidArgument,
	"ReopenContainerLog":        codes.InvalidArgument,
	"ExecSync":                  codes.InvalidArgument,
	"Exec":                      codes.InvalidArgument,
	"Attach":                    codes.InvalidArgument,
	"PortForward":               codes.InvalidArgument,
	"ContainerStats":            codes.InvalidArgument,
	"ListContainerStats":        codes.OK,
	"StreamContainerStats":      codes.OK,
	"PodSandboxStats":           codes.InvalidArgument, // kubelet's probe: not Unimplemented
	"ListPodSandboxStats":       codes.OK,
	"StreamPodSandboxStats":     codes.OK,
	"UpdateRuntimeConfig":       codes.InvalidArgument,
	"Status":                    codes.OK,
	"CheckpointContainer":       codes.InvalidArgument,
	"CheckpointPod":             codes.Unimplemented,
	"RestorePod":                codes.Unimplemented,
	"GetContainerEvents":        codes.DeadlineExceeded, // goes on until the caller ends it
	"ListMetricDescriptors":     codes.OK,
	"ListPodSandboxMetrics":     codes.OK,
	"StreamPodSandboxMetrics":   codes.OK,
	"RuntimeConfig":             codes.OK,
	"UpdatePodSandboxResources": codes.InvalidArgument,
	"ListImages":                codes.OK,
	"StreamImages":              codes.OK,
	"ImageStatus":               codes.InvalidArgument,
	"PullImage":                 codes.InvalidArgument,
	"RemoveImage":               codes.InvalidArgument,
	"ImageFsInfo":               codes.OK,
}

// garbageCodes is what each RPC answers to a request full of bad values,
// where it is not InvalidArgument.
var garbageCodes = map[string]codes.Code{
	"Version": codes.OK, "Status": codes.OK, "RuntimeConfig": codes.OK, "ImageFsInfo": codes.OK,
	"ListContainerStats": codes.OK, "StreamContainerStats": codes.OK, "ListPodSandboxStats": codes.OK, "StreamPodSandboxStats": codes.OK,
	"CheckpointPod": codes.Unimplemented, "RestorePod": codes.Unimplemented,
	"ListMetricDescriptors": codes.OK, "ListPodSandboxMetrics": codes.OK, "StreamPodSandboxMetrics": codes.OK,
	"GetContainerEvents": codes.DeadlineExceeded,
}

func eachMethod(t testing.TB, f func(path string, m protoreflect.MethodDescriptor)) {
	t.Helper()
	services := criv1.File_staging_src_k8s_io_cri_api_pkg_apis_runtime_v1_api_proto.Services()
	n := 0
	for i := range services.Len() {
		methods := services.Get(i).Methods()
		for j := range methods.Len() {
			f(fmt.Sprintf("/%s/%s", services.Get(i).FullName(), methods.Get(j).Name()), methods.Get(j))
			n++
		}
	}
	if n != 43 {
		t.Errorf("the protocol has %d RPCs, the tables here are for 43", n)
	}
}

func newMessage(t testing.TB, d protoreflect.MessageDescriptor) proto.Message {
	t.Helper()
	mt, err := protoregistry.GlobalTypes.FindMessageByName(d.FullName())
	if err != nil {
		t.Fatal(err)
	}
	return mt.New().Interface()
}

// call makes one RPC over the wire and reads its whole answer.
func callRPC(ctx context.Context, t testing.TB, conn *grpc.ClientConn, path string, m protoreflect.MethodDescriptor, req proto.Message) error {
	if !m.IsStreamingServer() {
		return conn.Invoke(ctx, path, req, newMessage(t, m.Output()))
	}
	s, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, path)
	if err != nil {
		return err
	}
	if err := s.SendMsg(req); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	_ = s.CloseSend()
	for {
		if err := s.RecvMsg(newMessage(t, m.Output())); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// Row S-15: every call with nothing in its request.
func TestAllRPCsWithEmptyRequests(t *testing.T) {
	s, _, _ := newTestServer()
	conn := serve(t, s)
	eachMethod(t, func(path string, m protoreflect.MethodDescriptor) {
		want, ok := emptyCodes[string(m.Name())]
		if !ok {
			t.Errorf("%s is not in the table", m.Name())
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), timeoutFor(m))
		defer cancel()
		err := callRPC(ctx, t, conn, path, m, newMessage(t, m.Input()))
		if got := status.Code(err); got != want {
			t.Errorf("%s: %v (%v), want %v", m.Name(), got, err, want)
		}
		if want == codes.InvalidArgument && len(status.Convert(err).Message()) < 10 {
			t.Errorf("%s: the error does not say which field: %v", m.Name(), err)
		}
		if want == codes.Unimplemented && !strings.HasSuffix(status.Convert(err).Message(), "yet; see the README table") {
			t.Errorf("%s: %v", m.Name(), err)
		}
	})
}

func timeoutFor(m protoreflect.MethodDescriptor) time.Duration {
	if m.Name() == "GetContainerEvents" {
		return 100 * time.Millisecond
	}
	return 10 * time.Second
}

// Row S-15: every field wrong.
func TestAllRPCsWithGarbage(t *testing.T) {
	s, _, _ := newTestServer()
	conn := serve(t, s)
	eachMethod(t, func(path string, m protoreflect.MethodDescriptor) {
		for _, g := range []garbage{{number: -1, enum: 9999, text: "\x00"}, {number: math.MinInt64, enum: -5, text: "../\x00\n"}} {
			req := newMessage(t, m.Input())
			g.fill(req.ProtoReflect(), 0)
			want, ok := garbageCodes[string(m.Name())]
			if !ok {
				want = codes.InvalidArgument
			}
			ctx, cancel := context.WithTimeout(context.Background(), timeoutFor(m))
			err := callRPC(ctx, t, conn, path, m, req)
			cancel()
			if got := status.Code(err); got != want {
				t.Errorf("%s: %v (%v), want %v", m.Name(), got, err, want)
			}
		}
	})
}

// garbage fills every field of a message, and of its messages, with values
// that are wrong almost everywhere.
type garbage struct {
	number int64
	enum   int32
	text   string
}

func (g garbage) fill(m protoreflect.Message, depth int) {
	if depth > 6 {
		return
	}
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		switch {
		case f.IsMap():
			m.Mutable(f).Map().Set(protoreflect.ValueOfString(g.text).MapKey(), protoreflect.ValueOfString(g.text))
		case f.IsList():
			list := m.Mutable(f).List()
			if f.Message() != nil {
				g.fill(list.AppendMutable().Message(), depth+1)
			} else {
				list.Append(g.scalar(f))
			}
		case f.Message() != nil:
			g.fill(m.Mutable(f).Message(), depth+1)
		default:
			m.Set(f, g.scalar(f))
		}
	}
}

func (g garbage) scalar(f protoreflect.FieldDescriptor) protoreflect.Value {
	switch f.Kind() {
	case protoreflect.StringKind:
		return protoreflect.ValueOfString(g.text)
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes([]byte(g.text))
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(true)
	case protoreflect.EnumKind:
		return protoreflect.ValueOfEnum(protoreflect.EnumNumber(g.enum))
	case protoreflect.Int32Kind:
		return protoreflect.ValueOfInt32(int32(g.number))
	case protoreflect.Int64Kind:
		return protoreflect.ValueOfInt64(g.number)
	case protoreflect.Uint32Kind:
		return protoreflect.ValueOfUint32(uint32(g.number))
	case protoreflect.Uint64Kind:
		return protoreflect.ValueOfUint64(uint64(g.number))
	case protoreflect.DoubleKind:
		return protoreflect.ValueOfFloat64(math.NaN())
	}
	panic("field kind " + f.Kind().String())
}

// Row S-15, one nil at a time: a request that is fine but for one message that is not there.
func TestAllRPCsWithOneNilSubmessage(t *testing.T) {
	s, _, _ := newTestServer()
	desc := append(criv1.RuntimeService_ServiceDesc.Methods, criv1.ImageService_ServiceDesc.Methods...)
	inputs := map[string]protoreflect.MessageDescriptor{}
	eachMethod(t, func(_ string, m protoreflect.MethodDescriptor) { inputs[string(m.Name())] = m.Input() })
	for _, d := range desc {
		base := newMessage(t, inputs[d.MethodName])
		garbage{number: 1, enum: 0, text: "p"}.fill(base.ProtoReflect(), 0)
		walkMessages(base.ProtoReflect(), func(parent protoreflect.Message, f protoreflect.FieldDescriptor) {
			saved := parent.Get(f)
			parent.Clear(f)
			err := invoke(s, d, base)
			if c := status.Code(err); c == codes.Unknown || c == codes.Internal {
				t.Errorf("%s without %s: %v", d.MethodName, f.FullName(), err)
			}
			parent.Set(f, saved)
		})
	}
}

func walkMessages(m protoreflect.Message, f func(parent protoreflect.Message, field protoreflect.FieldDescriptor)) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		fd := fields.Get(i)
		if fd.Message() == nil || fd.IsMap() {
			continue
		}
		f(m, fd)
		if fd.IsList() {
			for j := range m.Get(fd).List().Len() {
				walkMessages(m.Get(fd).List().Get(j).Message(), f)
			}
		} else {
			walkMessages(m.Get(fd).Message(), f)
		}
	}
}

// invoke calls a unary method the way gRPC does, without the wire.
func invoke(s *Server, d grpc.MethodDesc, req proto.Message) error {
	_, err := d.Handler(s, context.Background(), func(v any) error {
		proto.Merge(v.(proto.Message), req)
		return nil
	}, s.unary)
	return err
}

// Row S-15: handlers must stand a nil request: in-process callers may pass one.
func TestAllHandlersWithNilRequest(t *testing.T) {
	s, _, _ := newTestServer()
	v := reflect.ValueOf(s)
	eachMethod(t, func(_ string, m protoreflect.MethodDescriptor) {
		if m.IsStreamingServer() {
			return
		}
		f := v.MethodByName(string(m.Name()))
		out := f.Call([]reflect.Value{reflect.ValueOf(context.Background()), reflect.Zero(f.Type().In(1))})
		err, _ := out[1].Interface().(error)
		if got := status.Code(toStatus(err)); got != emptyCodes[string(m.Name())] {
			t.Errorf("%s(nil): %v (%v), want %v", m.Name(), got, err, emptyCodes[string(m.Name())])
		}
	})
}

// discard is a server stream whose client takes everything.
type discard struct {
	grpc.ServerStream
	ctx context.Context
	req []byte
}

func (d *discard) Context() context.Context     { return d.ctx }
func (d *discard) SendMsg(any) error            { return nil }
func (d *discard) SendHeader(metadata.MD) error { return nil }
func (d *discard) RecvMsg(m any) error {
	return proto.Unmarshal(d.req, m.(proto.Message))
}

// FuzzCRI (row S-15) sends bytes as the request of any RPC.
func FuzzCRI(f *testing.F) {
	s, pods, store := newTestServer()
	_ = store
	pods.events = nil
	type rpc struct {
		name   string
		invoke func([]byte) error
	}
	var rpcs []rpc
	for _, d := range append(criv1.RuntimeService_ServiceDesc.Methods, criv1.ImageService_ServiceDesc.Methods...) {
		rpcs = append(rpcs, rpc{d.MethodName, func(in []byte) error {
			bad := false
			_, err := d.Handler(s, context.Background(), func(v any) error {
				if err := proto.Unmarshal(in, v.(proto.Message)); err != nil {
					bad = true
					return err
				}
				return nil
			}, s.unary)
			if bad {
				return nil // gRPC itself answers
			}
			return err
		}})
	}
	for _, d := range append(criv1.RuntimeService_ServiceDesc.Streams, criv1.ImageService_ServiceDesc.Streams...) {
		rpcs = append(rpcs, rpc{d.StreamName, func(in []byte) error {
			ctx, cancel := context.WithCancel(context.Background())
			cancel()
			err := s.stream(s, &discard{ctx: ctx, req: in}, &grpc.StreamServerInfo{FullMethod: d.StreamName}, func(srv any, ss grpc.ServerStream) error {
				err := d.Handler(srv, ss)
				if errors.Is(err, proto.Error) {
					return nil
				}
				return err
			})
			return err
		}})
	}
	eachMethod(f, func(_ string, m protoreflect.MethodDescriptor) {
		for i, r := range rpcs {
			if r.name != string(m.Name()) {
				continue
			}
			for _, g := range []garbage{{number: 1, text: "p"}, {number: 1, text: "c"}, {number: -1, enum: 77, text: "/x"}} {
				req := newMessage(f, m.Input())
				g.fill(req.ProtoReflect(), 0)
				b, err := proto.Marshal(req)
				if err != nil {
					f.Fatal(err)
				}
				f.Add(byte(i), b)
			}
		}
	})
	f.Fuzz(func(t *testing.T, which byte, in []byte) {
		select { // keep the subscription count from filling up
		case <-pods.subscribed:
		default:
		}
		pods.mu.Lock()
		pods.calls = nil
		pods.mu.Unlock()
		r := rpcs[int(which)%len(rpcs)]
		err := r.invoke(in)
		if c := status.Code(err); c == codes.Unknown || c == codes.Internal {
			t.Errorf("%s: %v", r.name, err)
		}
	})
}
