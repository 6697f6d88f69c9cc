package ring

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/internal/testhost"
)

// churn is the daemon's life as a kubelet would give it, with the daemon killed
// again and again. Callers pause while the daemon is down and then try the
// same call again, with the same metadata.
type churn struct {
	t *testing.T
	n *Node

	mu     sync.Mutex
	turned *sync.Cond
	open   bool // calls may begin
	over   bool
	epoch  int // which daemon
	ctx    context.Context
	cancel context.CancelFunc

	lost, retried, rounds int // guarded by mu
}

func newChurn(t *testing.T, n *Node) *churn {
	c := &churn{t: t, n: n}
	c.turned = sync.NewCond(&c.mu)
	return c
}

// begin lets calls begin; end makes those that run fail and holds others back.
func (c *churn) begin() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.epoch++
	c.open = true
	c.ctx, c.cancel = context.WithCancel(context.Background())
	c.turned.Broadcast()
}

func (c *churn) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.open = false
}

func (c *churn) enter() (ctx context.Context, epoch int, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for !c.open && !c.over {
		c.turned.Wait()
	}
	return c.ctx, c.epoch, !c.over
}

// same tells whether the daemon of that epoch is still meant to be there.
func (c *churn) same(epoch int) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.open && c.epoch == epoch
}

// call makes one call until it comes through. It reports false at the end of
// the test and after a failure that no kill explains.
func (c *churn) call(what string, f func(ctx context.Context) error) bool {
	for try := 0; ; try++ {
		ctx, epoch, ok := c.enter()
		if !ok {
			return false
		}
		err := f(ctx)
		if err == nil {
			if try > 0 {
				c.mu.Lock()
				c.retried++
				c.mu.Unlock()
			}
			return true
		}
		if c.same(epoch) {
			c.t.Errorf("%s, try %d: %v", what, try+1, err)
			return false
		}
		c.mu.Lock()
		c.lost++
		c.mu.Unlock()
	}
}

// live runs pods of one kind, one after the other.
func (c *churn) live(kind int) {
	n := c.n
	for round := 0; ; round++ {
		name := fmt.Sprintf("churn-%d-%d", kind, round)
		pc := n.PodConfig()
		pc.Metadata, pc.LogDirectory = &criv1.PodSandboxMetadata{Name: name, Uid: name, Namespace: "ring"}, n.LogDir+"/"+name
		pc.Linux.CgroupParent = n.Below(name)
		ns := pc.Linux.SecurityContext.NamespaceOptions
		switch kind {
		case 1:
			ns.Pid = criv1.NamespaceMode_POD
		case 2:
			ids := []*criv1.IDMapping{{HostId: 1 << 20, Length: 65536}}
			ns.UsernsOptions = &criv1.UserNamespace{Mode: criv1.NamespaceMode_POD, Uids: ids, Gids: ids}
		}
		pc.PortMappings = []*criv1.PortMapping{{ContainerPort: 80, HostPort: int32(31000 + kind)}}
		cc := n.ContainerConfig()
		cc.Linux.SecurityContext.NamespaceOptions = ns
		cc.Stdin, cc.Tty = kind == 1, kind == 3
		if !c.pod(name, pc, cc) {
			return
		}
		c.mu.Lock()
		c.rounds++
		c.mu.Unlock()
	}
}

// pod is the life of one pod.
func (c *churn) pod(name string, pc *criv1.PodSandboxConfig, cc *criv1.ContainerConfig) bool {
	r := c.n.Runtime
	var pod, id string
	return c.call("run "+name, func(ctx context.Context) error {
		a, err := r.RunPodSandbox(ctx, &criv1.RunPodSandboxRequest{Config: pc})
		pod = a.GetPodSandboxId()
		return err
	}) && c.call("create "+name, func(ctx context.Context) error {
		a, err := r.CreateContainer(ctx, &criv1.CreateContainerRequest{PodSandboxId: pod, Config: cc, SandboxConfig: pc})
		id = a.GetContainerId()
		return err
	}) && c.call("start "+name, func(ctx context.Context) error {
		_, err := r.StartContainer(ctx, &criv1.StartContainerRequest{ContainerId: id})
		if status.Code(err) == codes.FailedPrecondition { // the try that the kill cut short had started it
			s, serr := r.ContainerStatus(ctx, &criv1.ContainerStatusRequest{ContainerId: id})
			if serr == nil && s.Status.State == criv1.ContainerState_CONTAINER_RUNNING {
				return nil
			}
		}
		return err
	}) && c.call("exec in "+name, func(ctx context.Context) error {
		a, err := r.ExecSync(ctx, &criv1.ExecSyncRequest{ContainerId: id, Cmd: []string{"/bin/echo", name}, Timeout: 20})
		if err == nil && string(a.Stdout) != name+"\n" {
			err = fmt.Errorf("it says %q", a.Stdout)
		}
		return err
	}) && c.call("stop container of "+name, func(ctx context.Context) error {
		_, err := r.StopContainer(ctx, &criv1.StopContainerRequest{ContainerId: id})
		return err
	}) && c.call("status of "+name, func(ctx context.Context) error {
		s, err := r.ContainerStatus(ctx, &criv1.ContainerStatusRequest{ContainerId: id})
		if err == nil && (s.Status.State != criv1.ContainerState_CONTAINER_EXITED || s.Status.ExitCode != 137) {
			err = fmt.Errorf("it is %v with code %d, %s", s.Status.State, s.Status.ExitCode, s.Status.Message)
		}
		return err
	}) && c.call("remove container of "+name, func(ctx context.Context) error {
		_, err := r.RemoveContainer(ctx, &criv1.RemoveContainerRequest{ContainerId: id})
		return err
	}) && c.call("stop "+name, func(ctx context.Context) error {
		_, err := r.StopPodSandbox(ctx, &criv1.StopPodSandboxRequest{PodSandboxId: pod})
		return err
	}) && c.call("remove "+name, func(ctx context.Context) error {
		_, err := r.RemovePodSandbox(ctx, &criv1.RemovePodSandboxRequest{PodSandboxId: pod})
		return err
	})
}

// The daemon is killed at random moments of everything that it does. After
// each restart nothing is on the host that belongs to nobody, and the retries
// of kubelet come through.
func TestSurviveChurn(t *testing.T) {
	n := StartNode(t)
	c := newChurn(t, n)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 2))
	var wg sync.WaitGroup
	for kind := range 4 {
		wg.Go(func() { c.live(kind) })
	}
	finish := sync.OnceFunc(func() {
		c.begin()
		c.mu.Lock()
		c.over = true // the calls that are under way end, the next ones do not begin
		c.turned.Broadcast()
		c.mu.Unlock()
		if t.Failed() {
			c.cancel()
		}
		wg.Wait()
		c.cancel()
	})
	defer finish()
	kills := scaled(30, 300)
	for i := 0; i < kills && !t.Failed(); i++ {
		c.begin()
		time.Sleep(testhost.Limit(time.Duration(5+rnd.IntN(120)) * time.Millisecond))
		c.end()
		n.KillDaemon()
		if i%5 == 4 { // the worker too
			n.KillWorker()
		}
		c.cancel() // before the new one could answer
		n.StartDaemon()
		var left []string
		for end := time.Now().Add(testhost.Limit(10 * time.Second)); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
			if left = n.ownerless(t); len(left) == 0 {
				break
			}
		}
		for _, l := range left {
			t.Errorf("after kill %d nobody owns %s", i+1, l)
		}
	}
	finish()
	t.Logf("%d kills, %d calls cut short, %d came through when tried again, %d whole pods", kills, c.lost, c.retried, c.rounds)
	if !t.Failed() && (c.lost < kills/2 || c.rounds < kills/4) {
		t.Errorf("the kills hit too little to tell anything")
	}
}
