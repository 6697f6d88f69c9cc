package ring

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/internal/testhost"
)

// rpcs calls f for every RPC of the protocol.
func rpcs(f func(path string, m protoreflect.MethodDescriptor)) (n int) {
	services := criv1.File_staging_src_k8s_io_cri_api_pkg_apis_runtime_v1_api_proto.Services()
	for i := range services.Len() {
		methods := services.Get(i).Methods()
		for j := range methods.Len() {
			f(fmt.Sprintf("/%s/%s", services.Get(i).FullName(), methods.Get(j).Name()), methods.Get(j))
			n++
		}
	}
	return n
}

func emptyMessage(t testing.TB, d protoreflect.MessageDescriptor) proto.Message {
	t.Helper()
	mt, err := protoregistry.GlobalTypes.FindMessageByName(d.FullName())
	if err != nil {
		t.Fatal(err)
	}
	return mt.New().Interface()
}

// callRPC makes one call and reads its answer to the end.
func (n *Node) callRPC(t testing.TB, path string, m protoreflect.MethodDescriptor, req proto.Message) error {
	t.Helper()
	limit := testhost.Limit(10 * time.Second)
	if m.Name() == "GetContainerEvents" { // goes on until the caller ends it
		limit = 100 * time.Millisecond
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	if !m.IsStreamingServer() {
		return n.Conn.Invoke(ctx, path, req, emptyMessage(t, m.Output()))
	}
	s, err := n.Conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, path)
	if err != nil {
		return err
	}
	if err := s.SendMsg(req); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	_ = s.CloseSend()
	for {
		if err := s.RecvMsg(emptyMessage(t, m.Output())); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

// fill sets every field of a message, and of those in it, to a value that is
// wrong almost everywhere.
func fill(m protoreflect.Message, number int64, text string, depth int) {
	if depth > 5 {
		return
	}
	fields := m.Descriptor().Fields()
	scalar := func(f protoreflect.FieldDescriptor) protoreflect.Value {
		switch f.Kind() {
		case protoreflect.StringKind:
			return protoreflect.ValueOfString(text)
		case protoreflect.BytesKind:
			return protoreflect.ValueOfBytes([]byte(text))
		case protoreflect.BoolKind:
			return protoreflect.ValueOfBool(true)
		case protoreflect.EnumKind:
			return protoreflect.ValueOfEnum(protoreflect.EnumNumber(number))
		case protoreflect.Int32Kind:
			return protoreflect.ValueOfInt32(int32(number))
		case protoreflect.Int64Kind:
			return protoreflect.ValueOfInt64(number)
		case protoreflect.Uint32Kind:
			return protoreflect.ValueOfUint32(uint32(number))
		case protoreflect.Uint64Kind:
			return protoreflect.ValueOfUint64(uint64(number))
		}
		return protoreflect.ValueOfFloat64(float64(number))
	}
	for i := range fields.Len() {
		f := fields.Get(i)
		switch {
		case f.IsMap():
			m.Mutable(f).Map().Set(protoreflect.ValueOfString(text).MapKey(), protoreflect.ValueOfString(text))
		case f.IsList() && f.Message() != nil:
			fill(m.Mutable(f).List().AppendMutable().Message(), number, text, depth+1)
		case f.IsList():
			m.Mutable(f).List().Append(scalar(f))
		case f.Message() != nil:
			fill(m.Mutable(f).Message(), number, text, depth+1)
		default:
			m.Set(f, scalar(f))
		}
	}
}

// Row S-15: requests without content, and full of nonsense, get an answer that says what
// is wrong; never Unknown or Internal, and the daemon lives on.
func TestInputEmptyAndNonsense(t *testing.T) {
	n := StartNode(t)
	pod := n.Pod(t, nil)
	id := n.Run(t, pod, nil)
	daemon := n.DaemonPID()
	check := func(what string, m protoreflect.MethodDescriptor, err error) {
		t.Helper()
		c := codeOf(err)
		if c == codes.Unknown || c == codes.Internal || c == codes.Unavailable || (c == codes.DeadlineExceeded && m.Name() != "GetContainerEvents") {
			t.Errorf("%s with %s: %v", m.Name(), what, err)
		}
		if c != codes.OK && len(messageOf(err)) < 10 {
			t.Errorf("%s with %s says nothing: %v", m.Name(), what, err)
		}
	}
	count := rpcs(func(path string, m protoreflect.MethodDescriptor) {
		check("an empty request", m, n.callRPC(t, path, m, emptyMessage(t, m.Input())))
		for _, g := range []struct {
			number int64
			text   string
		}{{-1, "\x00"}, {1 << 62, "../../x"}, {2, pod}, {1, id}, {0, "a\nb"}, {3, strings.Repeat("y", 70000)}} {
			if m.Name() == "UpdateRuntimeConfig" && g.text == pod {
				continue
			}
			switch m.Name() {
			case "StopPodSandbox", "RemovePodSandbox", "StopContainer", "RemoveContainer":
				if g.text == pod || g.text == id {
					continue // would do it
				}
			}
			req := emptyMessage(t, m.Input())
			fill(req.ProtoReflect(), g.number, g.text, 0)
			check(fmt.Sprintf("%d and %.20q everywhere", g.number, g.text), m, n.callRPC(t, path, m, req))
		}
	})
	if count != 43 {
		t.Errorf("the protocol has %d RPCs, not 43", count)
	}
	if n.daemon.ended() || n.DaemonPID() != daemon {
		t.Error("the daemon died")
	}
	if out := n.Sh(t, id, "echo alive"); out != "alive" {
		t.Errorf("the container says %q", out)
	}
}

// Ids that nobody has.
func TestInputUnknownIDs(t *testing.T) {
	n := StartNode(t)
	r := n.Runtime
	ctx := within(t, callTime)
	for _, id := range []string{strings.Repeat("a", 64), "short", "../../etc", "not an id at all"} {
		for name, f := range map[string]func() error{
			"PodSandboxStatus": func() error {
				_, err := r.PodSandboxStatus(ctx, &criv1.PodSandboxStatusRequest{PodSandboxId: id})
				return err
			},
			"ContainerStatus": func() error {
				_, err := r.ContainerStatus(ctx, &criv1.ContainerStatusRequest{ContainerId: id})
				return err
			},
			"StartContainer": func() error {
				_, err := r.StartContainer(ctx, &criv1.StartContainerRequest{ContainerId: id})
				return err
			},
			"CreateContainer": func() error {
				_, err := r.CreateContainer(ctx, &criv1.CreateContainerRequest{PodSandboxId: id, Config: n.ContainerConfig(), SandboxConfig: n.PodConfig()})
				return err
			},
			"ExecSync": func() error {
				_, err := r.ExecSync(ctx, &criv1.ExecSyncRequest{ContainerId: id, Cmd: []string{"/bin/true"}})
				return err
			},
			"Exec": func() error {
				_, err := r.Exec(ctx, &criv1.ExecRequest{ContainerId: id, Cmd: []string{"/bin/true"}, Stdout: true})
				return err
			},
			"Attach": func() error {
				_, err := r.Attach(ctx, &criv1.AttachRequest{ContainerId: id, Stdout: true})
				return err
			},
			"PortForward": func() error {
				_, err := r.PortForward(ctx, &criv1.PortForwardRequest{PodSandboxId: id, Port: []int32{80}})
				return err
			},
			"ContainerStats": func() error {
				_, err := r.ContainerStats(ctx, &criv1.ContainerStatsRequest{ContainerId: id})
				return err
			},
			"PodSandboxStats": func() error {
				_, err := r.PodSandboxStats(ctx, &criv1.PodSandboxStatsRequest{PodSandboxId: id})
				return err
			},
			"ReopenContainerLog": func() error {
				_, err := r.ReopenContainerLog(ctx, &criv1.ReopenContainerLogRequest{ContainerId: id})
				return err
			},
			"UpdateContainerResources": func() error {
				_, err := r.UpdateContainerResources(ctx, &criv1.UpdateContainerResourcesRequest{ContainerId: id, Linux: &criv1.LinuxContainerResources{CpuShares: 100}})
				return err
			},
			"UpdatePodSandboxResources": func() error {
				_, err := r.UpdatePodSandboxResources(ctx, &criv1.UpdatePodSandboxResourcesRequest{PodSandboxId: id, Resources: &criv1.LinuxContainerResources{CpuShares: 100}})
				return err
			},
		} {
			if err := f(); codeOf(err) != codes.NotFound || !strings.Contains(messageOf(err), id[:5]) {
				t.Errorf("%s of %q: %v, want NotFound and the id", name, id, err)
			}
		}
		// What ends something is happy when there is nothing to end.
		for name, f := range map[string]func() error{
			"StopPodSandbox": func() error {
				_, err := r.StopPodSandbox(ctx, &criv1.StopPodSandboxRequest{PodSandboxId: id})
				return err
			},
			"RemovePodSandbox": func() error {
				_, err := r.RemovePodSandbox(ctx, &criv1.RemovePodSandboxRequest{PodSandboxId: id})
				return err
			},
			"StopContainer": func() error {
				_, err := r.StopContainer(ctx, &criv1.StopContainerRequest{ContainerId: id})
				return err
			},
			"RemoveContainer": func() error {
				_, err := r.RemoveContainer(ctx, &criv1.RemoveContainerRequest{ContainerId: id})
				return err
			},
		} {
			if err := f(); err != nil {
				t.Errorf("%s of %q: %v", name, id, err)
			}
		}
	}
}

// Entrypoints that cannot be started: the error names them, and the container
// has ended with the reason that kubelet shows.
func TestInputEntrypoint(t *testing.T) {
	n := StartNode(t)
	pod := n.Pod(t, nil)
	image := n.Image(t, ImageConfig{}, File("not-executable", 0o644, "#!/bin/sh\n"), File("no-interpreter", 0o755, "#!/no/such/interpreter\n"),
		File("no-program", 0o755, "\x00\x01\x02\x03"), Dir("folder"), Symlink("loop", "loop"), File("a-file", 0o644, "x"))
	with := func(cmd ...string) func(*criv1.ContainerConfig) {
		return func(c *criv1.ContainerConfig) { c.Image.Image, c.Command = image, cmd }
	}
	for _, cmd := range []string{"/no/such/entrypoint", "no-such-in-path", "/not-executable", "/no-interpreter", "/no-program", "/folder", "/loop", "/a-file/below"} {
		t.Run(cmd, func(t *testing.T) {
			id := n.Container(t, pod, with(cmd, "argument"))
			err := n.TryStart(t, id)
			wantError(t, err, codes.FailedPrecondition, cmd)
			s := n.Status(t, id)
			if s.State != criv1.ContainerState_CONTAINER_EXITED || s.Reason != "StartError" || s.ExitCode != 128 || !strings.Contains(s.Message, cmd) || s.FinishedAt == 0 {
				t.Errorf("the container is %v, reason %q, code %d, message %q", s.State, s.Reason, s.ExitCode, s.Message)
			}
			n.Remove(t, id)
		})
	}
	t.Run("a folder that is a file", func(t *testing.T) {
		_, err := n.TryRun(t, pod, each(with("/bin/true"), func(c *criv1.ContainerConfig) { c.WorkingDir = "/a-file" }))
		if c := codeOf(err); c != codes.InvalidArgument && c != codes.FailedPrecondition || !strings.Contains(err.Error(), "/a-file") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("nothing to run", func(t *testing.T) {
		empty := n.Image(t, ImageConfig{})
		_, err := n.TryContainer(t, pod, func(c *criv1.ContainerConfig) { c.Image.Image, c.Command = empty, nil })
		wantError(t, err, codes.InvalidArgument, "command")
	})
	t.Run("users", func(t *testing.T) {
		_, err := n.TryContainer(t, pod, security(func(s *criv1.LinuxContainerSecurityContext) { s.RunAsUsername = "nosuchuser" }))
		if c := codeOf(err); c != codes.InvalidArgument && c != codes.FailedPrecondition && c != codes.NotFound || !strings.Contains(err.Error(), "nosuchuser") {
			t.Errorf("got %v", err)
		}
		_, err = n.TryContainer(t, pod, security(func(s *criv1.LinuxContainerSecurityContext) { s.RunAsGroup = &criv1.Int64Value{Value: 5} }))
		wantError(t, err, codes.InvalidArgument, "run_as_group")
	})
	t.Run("a seccomp profile", func(t *testing.T) {
		for ref, part := range map[string]string{"/no/such/profile.json": "/no/such/profile.json", n.Config: n.Config} { // the second is no JSON
			_, err := n.TryContainer(t, pod, security(func(s *criv1.LinuxContainerSecurityContext) {
				s.Seccomp = &criv1.SecurityProfile{ProfileType: criv1.SecurityProfile_Localhost, LocalhostRef: ref}
			}))
			if c := codeOf(err); c == codes.OK || c == codes.Internal || c == codes.Unknown || !strings.Contains(err.Error(), part) {
				t.Errorf("got %v", err)
			}
		}
	})
	t.Run("a log folder that is a file", func(t *testing.T) {
		file := n.HostDir(t) + "/file"
		if err := os.WriteFile(file, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		c := n.PodConfig()
		c.LogDirectory = file
		p, err := n.Runtime.RunPodSandbox(within(t, callTime), &criv1.RunPodSandboxRequest{Config: c})
		if err != nil {
			t.Skipf("refused at once: %v", err)
		}
		cc := n.ContainerConfig()
		_, err = n.Runtime.CreateContainer(within(t, callTime), &criv1.CreateContainerRequest{PodSandboxId: p.PodSandboxId, Config: cc, SandboxConfig: c})
		if k := codeOf(err); k == codes.OK || k == codes.Internal || k == codes.Unknown || !strings.Contains(err.Error(), file) {
			t.Errorf("got %v", err)
		}
	})
}
