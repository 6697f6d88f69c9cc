package ring

import (
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// freezeWorker stops the worker, so that whatever needs it waits, until thaw.
func (n *Node) freezeWorker(t testing.TB) (thaw func()) {
	t.Helper()
	pid := n.WorkerPID()
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	thaw = sync.OnceFunc(func() { _ = unix.Kill(pid, unix.SIGCONT) })
	t.Cleanup(thaw)
	return thaw
}

// joined holds the creates of one kind against the rules for retries: the first
// caller gives up while the operation is stuck, others ask again.
type joined struct {
	n      *Node
	kind   string
	create func(ctx context.Context) (string, error)
	// other is the same create with another configuration; field is what differs.
	other func(ctx context.Context) (string, error)
	field string
}

func (j joined) run(t *testing.T) string {
	t.Helper()
	thaw := j.n.freezeWorker(t)
	ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
	defer cancel()
	_, err := j.create(ctx)
	wantError(t, err, codes.DeadlineExceeded)
	gone, leave := context.WithCancel(context.Background())
	leave()
	_, err = j.create(gone) // canceled before it was sent
	wantError(t, err, codes.Canceled)

	out, _ := j.n.naru(t, "ops")
	if strings.Count(out, j.kind) != 1 {
		t.Errorf("naru ops while the create is stuck:\n%s", out)
	}
	// The message names the step that the operation is in; the client's own
	// deadline wins the race for it, so a longer one on the server is not seen
	// here. What differs is told at once, though the operation is stuck.
	_, err = j.other(within(t, 5*time.Second))
	wantError(t, err, codes.AlreadyExists, j.field)

	type answer struct {
		id  string
		err error
	}
	answers := make(chan answer, 4)
	for range cap(answers) {
		go func() {
			id, err := j.create(within(t, callTime))
			answers <- answer{id, err}
		}()
	}
	time.Sleep(100 * time.Millisecond)
	if out, _ := j.n.naru(t, "ops"); strings.Count(out, j.kind) != 1 {
		t.Errorf("naru ops while four callers wait:\n%s", out)
	}
	thaw()
	id := ""
	for range cap(answers) {
		a := <-answers
		if a.err != nil {
			t.Fatalf("a retry: %v", a.err)
		}
		if id != "" && a.id != id {
			t.Errorf("retries got %s and %s", id, a.id)
		}
		id = a.id
	}
	if again, err := j.create(within(t, callTime)); err != nil || again != id {
		t.Errorf("a retry after the end: %s, %v; want %s", again, err, id)
	}
	_, err = j.other(within(t, callTime))
	wantError(t, err, codes.AlreadyExists, j.field)
	return id
}

func TestSurviveRetriesJoin(t *testing.T) {
	n := StartNode(t)
	runPod := func(c *criv1.PodSandboxConfig) func(context.Context) (string, error) {
		return func(ctx context.Context) (string, error) {
			r, err := n.Runtime.RunPodSandbox(ctx, &criv1.RunPodSandboxRequest{Config: proto.CloneOf(c)})
			return r.GetPodSandboxId(), err
		}
	}
	pc := n.PodConfig()
	pc.Linux.SecurityContext.NamespaceOptions.Pid = criv1.NamespaceMode_POD // its init needs the worker
	otherPod := proto.CloneOf(pc)
	otherPod.DnsConfig = &criv1.DNSConfig{Servers: []string{"192.0.2.53"}}
	pod := joined{n: n, kind: "RunPodSandbox", create: runPod(pc), other: runPod(otherPod), field: "dns.servers"}.run(t)

	createContainer := func(c *criv1.ContainerConfig) func(context.Context) (string, error) {
		return func(ctx context.Context) (string, error) {
			r, err := n.Runtime.CreateContainer(ctx, &criv1.CreateContainerRequest{PodSandboxId: pod, Config: proto.CloneOf(c), SandboxConfig: pc})
			return r.GetContainerId(), err
		}
	}
	cc := n.ContainerConfig()
	cc.Linux.SecurityContext.NamespaceOptions.Pid = criv1.NamespaceMode_POD
	otherContainer := proto.CloneOf(cc)
	otherContainer.Envs = []*criv1.KeyValue{{Key: "SECRET", Value: []byte("hunter2")}}
	id := joined{n: n, kind: "CreateContainer", create: createContainer(cc), other: createContainer(otherContainer), field: "env"}.run(t)
	if _, err := createContainer(otherContainer)(within(t, callTime)); strings.Contains(err.Error(), "hunter2") {
		t.Errorf("the error shows a value: %v", err)
	}
	n.Start(t, id)
	_, err := createContainer(cc)(within(t, callTime))
	wantError(t, err, codes.AlreadyExists, "running")
	pods, err := n.Runtime.ListPodSandbox(within(t, callTime), &criv1.ListPodSandboxRequest{})
	if err != nil || len(pods.Items) != 1 {
		t.Errorf("pods after all retries: %v, %v", pods, err)
	}
}

// StopPodSandbox ends a create that hangs in the pod: nothing is left of it.
func TestSurviveStopEndsCreate(t *testing.T) {
	n := StartNode(t)
	pod := n.Pod(t, nil)
	thaw := n.freezeWorker(t)
	failed := make(chan error, 1)
	c := n.ContainerConfig()
	go func() {
		_, err := n.Runtime.CreateContainer(within(t, callTime), &criv1.CreateContainerRequest{PodSandboxId: pod, Config: c, SandboxConfig: n.pods[pod]})
		failed <- err
	}()
	eventually(t, 10*time.Second, "the create", func() bool { out, _ := n.naru(t, "ops"); return strings.Contains(out, "CreateContainer") })
	stopped := make(chan error, 1)
	go func() {
		_, err := n.Runtime.StopPodSandbox(within(t, callTime), &criv1.StopPodSandboxRequest{PodSandboxId: pod})
		stopped <- err
	}()
	time.Sleep(200 * time.Millisecond)
	thaw()
	if err := <-stopped; err != nil {
		t.Errorf("stop of a pod in which a create hangs: %v", err)
	}
	if err := <-failed; err == nil {
		t.Error("the create came through in a pod that was stopped")
	} else {
		wantError(t, err, codes.Canceled, "stopped")
	}
	n.RemovePod(t, pod)
}
