package ring

import (
	"context"
	"fmt"
	"path"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"github.com/naru-project/naru/internal/testhost"
)

// criServices are those whose requests are looked at.
var criServices = []protoreflect.FullName{"runtime.v1.RuntimeService", "runtime.v1.ImageService"}

// rpc is one call of CRI with the paths of all fields of its request.
type rpc struct {
	name   string
	fields []string // RunPodSandbox.config.port_mappings[].host_ip
	method protoreflect.MethodDescriptor
}

// requestFields lists every leaf of every request message: scalars, and lists
// and maps of scalars as wholes. "[]" stands for every element of a list of
// messages.
func requestFields(t testing.TB) (all []rpc) {
	t.Helper()
	for _, name := range criServices {
		d, err := protoregistry.GlobalFiles.FindDescriptorByName(name)
		if err != nil {
			t.Fatal(err)
		}
		methods := d.(protoreflect.ServiceDescriptor).Methods()
		for i := range methods.Len() {
			m := methods.Get(i)
			r := rpc{name: string(m.Name()), method: m}
			leaves(m.Input(), r.name, nil, &r.fields)
			all = append(all, r)
		}
	}
	return all
}

// leaves adds what lies below a message. A message inside itself is a leaf.
func leaves(m protoreflect.MessageDescriptor, at string, above []protoreflect.FullName, out *[]string) {
	above = append(slices.Clip(above), m.FullName())
	for i := range m.Fields().Len() {
		f := m.Fields().Get(i)
		p := at + "." + string(f.Name())
		if f.Message() == nil || f.IsMap() || slices.Contains(above, f.Message().FullName()) {
			*out = append(*out, p)
			continue
		}
		if f.IsList() {
			p += "[]"
		}
		leaves(f.Message(), p, above, out)
	}
}

// dropper takes one field out of the requests that a node's client sends.
type dropper struct{ armed atomic.Pointer[drop] }

type drop struct {
	method string
	path   []string
	hits   atomic.Int64 // fields that were there and were taken out
}

// callTimeArmed bounds a call that lacks a field: what it waits for may never come.
const callTimeArmed = 3 * time.Second

func (d *dropper) arm(field string) *drop {
	parts := strings.Split(field, ".")
	a := &drop{method: parts[0], path: parts[1:]}
	d.armed.Store(a)
	return a
}

func (d *dropper) disarm() { d.armed.Store(nil) }

// mutate gives the request as it shall be sent, and whether it is another one.
func (d *dropper) mutate(method string, req any) (any, bool) {
	a := d.armed.Load()
	m, ok := req.(proto.Message)
	if a == nil || !ok || a.method != path.Base(method) {
		return req, false
	}
	m = proto.Clone(m)
	n := dropField(m.ProtoReflect(), a.path)
	a.hits.Add(int64(n))
	return m, n > 0
}

// dropField clears a field and tells how many there were.
func dropField(m protoreflect.Message, path []string) (n int) {
	name, list := strings.CutSuffix(path[0], "[]")
	f := m.Descriptor().Fields().ByName(protoreflect.Name(name))
	switch {
	case f == nil || !m.Has(f):
		return 0
	case len(path) == 1:
		m.Clear(f)
		return 1
	case !list:
		return dropField(m.Mutable(f).Message(), path[1:])
	}
	l := m.Mutable(f).List()
	for i := range l.Len() {
		n += dropField(l.Get(i).Message(), path[1:])
	}
	return n
}

func (d *dropper) unary(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	req, mutated := d.mutate(method, req)
	if mutated {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, testhost.Limit(callTimeArmed))
		defer cancel()
	}
	return invoke(ctx, method, req, reply, cc, opts...)
}

func (d *dropper) stream(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	s, err := open(ctx, desc, cc, method, opts...)
	if err != nil {
		return nil, err
	}
	return &droppingStream{s, d, method}, nil
}

type droppingStream struct {
	grpc.ClientStream
	d      *dropper
	method string
}

// SendMsg implements grpc.ClientStream.
func (s *droppingStream) SendMsg(m any) error {
	m, _ = s.d.mutate(s.method, m)
	return s.ClientStream.SendMsg(m)
}

// recorder is a testing.TB whose failure is a result and not the test's.
type recorder struct {
	testing.TB
	mu       sync.Mutex
	failed   bool
	why      []string
	panicked string
	cleanups []func()
}

// run calls f on a goroutine of its own, which FailNow may end.
func (r *recorder) run(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() {
			if p := recover(); p != nil {
				r.mu.Lock()
				defer r.mu.Unlock()
				r.failed, r.panicked = true, fmt.Sprintf("%v\n%s", p, debug.Stack())
			}
		}()
		f()
	}()
	<-done
}

// clean calls what Cleanup was given, last first.
func (r *recorder) clean() {
	for len(r.cleanups) > 0 {
		last := len(r.cleanups) - 1
		f := r.cleanups[last]
		r.cleanups = r.cleanups[:last]
		r.run(f)
	}
}

func (r *recorder) fail(why string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failed = true
	if why = strings.TrimSpace(why); why != "" {
		r.why = append(r.why, why)
	}
}

func (r *recorder) fatal(why string) {
	r.fail(why)
	runtime.Goexit()
}

func (r *recorder) text() string { return strings.Join(r.why, "; ") }

// The part of testing.TB that speaks of success and failure.

func (r *recorder) Error(args ...any)                 { r.fail(fmt.Sprintln(args...)) }
func (r *recorder) Errorf(format string, args ...any) { r.fail(fmt.Sprintf(format, args...)) }
func (r *recorder) Fail()                             { r.fail("") }
func (r *recorder) FailNow()                          { r.fatal("") }
func (r *recorder) Fatal(args ...any)                 { r.fatal(fmt.Sprintln(args...)) }
func (r *recorder) Fatalf(format string, args ...any) { r.fatal(fmt.Sprintf(format, args...)) }
func (r *recorder) Log(...any)                        {}
func (r *recorder) Logf(string, ...any)               {}

// A check that skips proves nothing.
func (r *recorder) Skip(args ...any) { r.fatal("skipped: " + fmt.Sprintln(args...)) }
func (r *recorder) Skipf(format string, args ...any) {
	r.fatal("skipped: " + fmt.Sprintf(format, args...))
}
func (r *recorder) SkipNow() { r.fatal("skipped") }

func (r *recorder) Failed() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.failed
}

func (r *recorder) Cleanup(f func()) { r.cleanups = append(r.cleanups, f) }
