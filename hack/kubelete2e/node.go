package main

import (
	"context"
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

// node is naru and a kubelet.
type node struct {
	work, bin     string
	dropins       string
	naru, kubelet *process
	held          *os.File // the CRI socket, held open over restarts of naru as systemd holds it
	restarts      []window // when the kubelet may complain
}

// window is a time within which the kubelet's log may hold anything.
type window struct{ from, to time.Time }

const nodeName = "naru-e2e"

func newNode(o options) *node {
	return &node{work: o.work, bin: o.bin, dropins: o.dropins, naru: newProcess(o.work, "naru"), kubelet: newProcess(o.work, "kubelet")}
}

func (n *node) socket() string { return filepath.Join(n.work, "run", "naru.sock") }

// startNaru starts the daemon and waits until it answers.
func (n *node) startNaru(ctx context.Context) error {
	args := []string{filepath.Join(n.bin, "naru"), "serve", "--config", filepath.Join(n.work, "config.toml")}
	cmd := exec.CommandContext(context.WithoutCancel(ctx), args[0], args[1:]...)
	if n.held != nil { // sd_listen_fds(3): the process's own id must be in its environment
		cmd = exec.CommandContext(context.WithoutCancel(ctx), "/bin/sh", append([]string{"-c", `LISTEN_PID=$$ exec "$@"`, "sh"}, args...)...)
		cmd.Env = append(os.Environ(), "LISTEN_FDS=1")
		cmd.ExtraFiles = []*os.File{n.held}
	}
	if err := n.naru.start(cmd); err != nil {
		return err
	}
	return eventually(ctx, 30*time.Second, func() error {
		if err := n.naru.ended(); err != nil {
			return err
		}
		return n.ask(ctx, func(ctx context.Context, c *grpc.ClientConn) error {
			_, err := criv1.NewRuntimeServiceClient(c).Status(ctx, &criv1.StatusRequest{})
			return err
		})
	})
}

// ask asks naru itself.
func (n *node) ask(ctx context.Context, do func(context.Context, *grpc.ClientConn) error) error {
	c, err := grpc.NewClient("unix://"+n.socket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	return do(ctx, c)
}

// images returns the names of all images.
func (n *node) images(ctx context.Context) (names []string, err error) {
	err = n.ask(ctx, func(ctx context.Context, c *grpc.ClientConn) error {
		list, err := criv1.NewImageServiceClient(c).ListImages(ctx, &criv1.ListImagesRequest{})
		for _, i := range list.GetImages() {
			names = append(names, i.RepoTags...)
		}
		return err
	})
	return names, err
}

// pull pulls an image that no pod asks for.
func (n *node) pull(ctx context.Context, name string) error {
	return n.ask(ctx, func(ctx context.Context, c *grpc.ClientConn) error {
		_, err := criv1.NewImageServiceClient(c).PullImage(ctx, &criv1.PullImageRequest{Image: &criv1.ImageSpec{Image: name}})
		return err
	})
}

// removeAll removes the sandboxes that are left, which have no living container.
func (n *node) removeAll(ctx context.Context) error {
	return n.ask(ctx, func(ctx context.Context, c *grpc.ClientConn) error {
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

// restartNaru ends the daemon by a signal and starts it again, with the
// kubelet looking on. What the kubelet logs meanwhile, and for a moment after,
// is not held against anybody.
func (n *node) restartNaru(ctx context.Context, sig syscall.Signal) error {
	w := window{from: time.Now()}
	err := n.naru.stop(sig)
	if err == nil {
		err = n.startNaru(ctx)
	}
	w.to = time.Now().Add(3 * time.Second)
	n.restarts = append(n.restarts, w)
	return err
}

// holdSocket makes the CRI socket and keeps it, as a systemd unit of type
// socket does. Naru must not run meanwhile.
func (n *node) holdSocket(ctx context.Context) error {
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

// kubeletOptions are what one start of the kubelet differs in from others.
type kubeletOptions struct {
	dropins  bool // with those that naru ships
	gates    map[string]bool
	eviction string // threshold of imagefs.available
	verbose  int
}

const kubeletConfig = `apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
staticPodPath: %[1]s/manifests
containerRuntimeEndpoint: unix://%[2]s
podLogsDir: %[1]s/podlogs
cgroupRoot: /%[3]s-pods
featureGates: {%[4]s}
failCgroupV1: false
enforceNodeAllocatable: []
fileCheckFrequency: 1s
syncFrequency: 5s
registerNode: false
readOnlyPort: 10255
address: 127.0.0.1
healthzBindAddress: 127.0.0.1
volumePluginDir: %[1]s/volumeplugins
seccompDefault: true
containerLogMaxSize: 2Mi
containerLogMaxFiles: 100
containerLogMonitorInterval: 3s
evictionHard: {memory.available: "0%%", nodefs.available: "0%%", nodefs.inodesFree: "0%%", imagefs.available: "%[5]s", imagefs.inodesFree: "0%%"}
imageGCHighThresholdPercent: 100
imageMinimumGCAge: 1s
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
`

// startKubelet writes its configuration, starts it and waits until it is healthy.
func (n *node) startKubelet(ctx context.Context, k *kubelet, o kubeletOptions) error {
	var gates []string
	for _, g := range slices.Sorted(maps.Keys(o.gates)) {
		gates = append(gates, fmt.Sprintf("%s: %t", g, o.gates[g]))
	}
	if o.eviction == "" {
		o.eviction = "0%"
	}
	file := filepath.Join(n.work, "kubelet.yaml")
	text := fmt.Sprintf(kubeletConfig, n.work, n.socket(), os.Getenv("RUN_NAME"), strings.Join(gates, ", "), o.eviction)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		return err
	}
	bin, err := filepath.EvalSymlinks(filepath.Join(n.bin, "kubelet"))
	if err != nil {
		return err
	}
	dir := filepath.Join(n.work, "kubelet")
	cmd := exec.CommandContext(context.WithoutCancel(ctx), "unshare", "--mount", "--propagation", "unchanged", "sh", filepath.Join(n.work, "kubelet.sh"),
		bin, "--config", file, "--root-dir", dir, "--cert-dir", filepath.Join(dir, "pki"),
		"--hostname-override", nodeName, "--node-ip", nodeIP, fmt.Sprintf("--v=%d", max(o.verbose, 2)))
	if o.dropins {
		cmd.Args = append(cmd.Args, "--config-dir", n.dropins)
	}
	if err := n.kubelet.start(cmd); err != nil {
		return err
	}
	return eventually(ctx, time.Minute, func() error {
		if err := n.kubelet.ended(); err != nil {
			return err
		}
		_, err := k.get(ctx, "http://127.0.0.1:10248/healthz")
		return err
	})
}

// stopKubelet ends the kubelet, which cancels what it asks meanwhile.
func (n *node) stopKubelet(sig syscall.Signal) error {
	w := window{from: time.Now()}
	err := n.kubelet.stop(sig)
	w.to = time.Now()
	n.restarts = append(n.restarts, w)
	return err
}

// stop ends both.
func (n *node) stop() error {
	err := n.stopKubelet(syscall.SIGTERM)
	if naruErr := n.naru.stop(syscall.SIGTERM); err == nil {
		err = naruErr
	}
	if n.held != nil {
		_ = n.held.Close()
		_ = os.Remove(n.socket())
		n.held = nil
	}
	return err
}
