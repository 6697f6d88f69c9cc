package e2e

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Node is naru and a kubelet in a place that a script has made: a folder with
// config.toml and kubelet.sh.
type Node struct {
	Name, IP   string // IP may be two, with a comma
	Work       string // its folder
	Bin        string // naru's and the kubelet's
	CgroupRoot string
	Enter      []string // by what its daemons are started, where the place is not this process's own

	Naru, Kubelet *Process
	Restarts      []Window // when the kubelet may complain

	begun time.Time
	held  *os.File // the CRI socket, held open over restarts of naru as systemd holds it
}

// NewNode fills in what a node begins with.
func NewNode(n Node) *Node {
	n.Naru, n.Kubelet, n.begun = NewProcess(n.Work, "naru"), NewProcess(n.Work, "kubelet"), time.Now()
	return &n
}

func (n *Node) socket() string { return filepath.Join(n.Work, "run", "naru.sock") }

// command is a program in the node's place, which outlives ctx.
func (n *Node) command(ctx context.Context, args ...string) *exec.Cmd {
	args = append(slices.Clone(n.Enter), args...)
	return exec.CommandContext(context.WithoutCancel(ctx), args[0], args[1:]...)
}

// StartNaru starts the daemon and waits until it answers.
func (n *Node) StartNaru(ctx context.Context) error {
	args := []string{filepath.Join(n.Bin, "naru"), "serve", "--config", filepath.Join(n.Work, "config.toml")}
	cmd := n.command(ctx, args...)
	if n.held != nil { // sd_listen_fds(3): the process's own id must be in its environment
		cmd = n.command(ctx, append([]string{"/bin/sh", "-c", `LISTEN_PID=$$ exec "$@"`, "sh"}, args...)...)
		cmd.Env = append(os.Environ(), "LISTEN_FDS=1")
		cmd.ExtraFiles = []*os.File{n.held}
	}
	if err := n.Naru.Start(cmd); err != nil {
		return err
	}
	return Eventually(ctx, 30*time.Second, func() error {
		if err := n.Naru.Ended(); err != nil {
			return err
		}
		return n.Ask(ctx, func(ctx context.Context, c *grpc.ClientConn) error {
			_, err := criv1.NewRuntimeServiceClient(c).Status(ctx, &criv1.StatusRequest{})
			return err
		})
	})
}

// Ask asks naru itself.
func (n *Node) Ask(ctx context.Context, do func(context.Context, *grpc.ClientConn) error) error {
	c, err := grpc.NewClient("unix://"+n.socket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	return do(ctx, c)
}

// Images returns the names of all images.
func (n *Node) Images(ctx context.Context) (names []string, err error) {
	err = n.Ask(ctx, func(ctx context.Context, c *grpc.ClientConn) error {
		list, err := criv1.NewImageServiceClient(c).ListImages(ctx, &criv1.ListImagesRequest{})
		for _, i := range list.GetImages() {
			names = append(names, i.RepoTags...)
		}
		return err
	})
	return names, err
}

// Pull pulls an image that no pod asks for.
func (n *Node) Pull(ctx context.Context, name string) error {
	return n.Ask(ctx, func(ctx context.Context, c *grpc.ClientConn) error {
		_, err := criv1.NewImageServiceClient(c).PullImage(ctx, &criv1.PullImageRequest{Image: &criv1.ImageSpec{Image: name}})
		return err
	})
}

// RemoveAll removes the sandboxes that are left, which have no living container.
func (n *Node) RemoveAll(ctx context.Context) error {
	return n.Ask(ctx, func(ctx context.Context, c *grpc.ClientConn) error {
		r := criv1.NewRuntimeServiceClient(c)
		alive, err := r.ListContainers(ctx, &criv1.ListContainersRequest{Filter: &criv1.ContainerFilter{State: &criv1.ContainerStateValue{State: criv1.ContainerState_CONTAINER_RUNNING}}})
		if err != nil {
			return err
		}
		if len(alive.Containers) > 0 {
			return fmt.Errorf("%d containers run", len(alive.Containers))
		}
		list, err := r.ListPodSandbox(ctx, &criv1.ListPodSandboxRequest{})
		if err != nil {
			return err
		}
		for _, p := range list.Items {
			if _, err := r.RemovePodSandbox(ctx, &criv1.RemovePodSandboxRequest{PodSandboxId: p.Id}); err != nil {
				return err
			}
		}
		return nil
	})
}

// RestartNaru ends the daemon by a signal and starts it again, with the
// kubelet looking on. What the kubelet logs meanwhile, and for a moment after,
// is not held against anybody.
func (n *Node) RestartNaru(ctx context.Context, sig syscall.Signal) error {
	w := Window{From: time.Now()}
	err := n.Naru.Stop(sig)
	if err == nil {
		err = n.StartNaru(ctx)
	}
	w.To = time.Now().Add(3 * time.Second)
	n.Restarts = append(n.Restarts, w)
	return err
}

// HoldSocket makes the CRI socket and keeps it, as a systemd unit of type
// socket does. Naru must not run meanwhile.
func (n *Node) HoldSocket(ctx context.Context) error {
	l, err := (&net.ListenConfig{}).Listen(ctx, "unix", n.socket())
	if err != nil {
		return err
	}
	u := l.(*net.UnixListener)
	u.SetUnlinkOnClose(false)
	defer func() { _ = u.Close() }()
	if err := os.Chmod(n.socket(), 0o600); err != nil {
		return err
	}
	n.held, err = u.File()
	return err
}

// KubeletOptions are what one start of a kubelet differs in from others.
type KubeletOptions struct {
	Dropins  string // folder of those that naru ships; none without
	Gates    map[string]bool
	Eviction string // threshold of imagefs.available
	Verbose  int
	Config   string   // more lines of its configuration
	Args     []string // more of its command line
	Healthy  func(context.Context) error
}

const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
containerRuntimeEndpoint: unix://%[2]s
podLogsDir: %[1]s/podlogs
cgroupRoot: %[3]s
featureGates: {%[4]s}
failCgroupV1: false
enforceNodeAllocatable: []
syncFrequency: 5s
healthzBindAddress: 127.0.0.1
volumePluginDir: %[1]s/volumeplugins
seccompDefault: true
evictionHard: {memory.available: "0%%", nodefs.available: "0%%", nodefs.inodesFree: "0%%", imagefs.available: "%[5]s", imagefs.inodesFree: "0%%"}
imageGCHighThresholdPercent: 100
imageMinimumGCAge: 1s
%[6]s`

// StartKubelet writes its configuration, starts it and waits until it is healthy.
func (n *Node) StartKubelet(ctx context.Context, o KubeletOptions) error {
	var gates []string
	for _, g := range slices.Sorted(maps.Keys(o.Gates)) {
		gates = append(gates, fmt.Sprintf("%s: %t", g, o.Gates[g]))
	}
	file := filepath.Join(n.Work, "kubelet.yaml")
	text := fmt.Sprintf(kubeletConfig, n.Work, n.socket(), n.CgroupRoot, strings.Join(gates, ", "), cmp.Or(o.Eviction, "0%"), o.Config)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		return err
	}
	bin, err := filepath.EvalSymlinks(filepath.Join(n.Bin, "kubelet"))
	if err != nil {
		return err
	}
	dir := filepath.Join(n.Work, "kubelet")
	cmd := n.command(ctx, append([]string{"unshare", "--mount", "--propagation", "unchanged", "sh", filepath.Join(n.Work, "kubelet.sh"),
		bin, "--config", file, "--root-dir", dir, "--cert-dir", filepath.Join(dir, "pki"),
		"--hostname-override", n.Name, "--node-ip", n.IP, fmt.Sprintf("--v=%d", max(o.Verbose, 2))}, o.Args...)...)
	if o.Dropins != "" {
		cmd.Args = append(cmd.Args, "--config-dir", o.Dropins)
	}
	if err := n.Kubelet.Start(cmd); err != nil {
		return err
	}
	return Eventually(ctx, time.Minute, func() error { return errors.Join(n.Kubelet.Ended(), o.Healthy(ctx)) })
}

// StopKubelet ends the kubelet, which cancels what it asks meanwhile.
func (n *Node) StopKubelet(sig syscall.Signal) error {
	w := Window{From: time.Now()}
	err := n.Kubelet.Stop(sig)
	w.To = time.Now()
	n.Restarts = append(n.Restarts, w)
	return err
}

// Stop ends both.
func (n *Node) Stop() error {
	err := n.StopKubelet(syscall.SIGTERM)
	if naruErr := n.Naru.Stop(syscall.SIGTERM); err == nil {
		err = naruErr
	}
	if n.held != nil {
		_ = n.held.Close()
		_ = os.Remove(n.socket())
		n.held = nil
	}
	return err
}
