package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const (
	labelTool = "cribench"     // on everything this tool makes
	labelRun  = "cribench-run" // one value per connection
	namespace = "cribench"
	ownCgroup = "/cribench"      // cgroup parent of pods, under cgroupfs
	logPrefix = "cribench-logs-" // of the log directories
)

// Target is a runtime to measure, and how.
type Target struct {
	Name         string   `json:"name"`
	Endpoint     string   `json:"endpoint"`
	Image        string   `json:"image"`
	Handler      string   `json:"runtime_handler,omitempty"`
	CgroupParent string   `json:"cgroup_parent,omitempty"`
	Network      string   `json:"network"`
	LogDir       string   `json:"log_dir,omitempty"`
	Seccomp      string   `json:"seccomp"`
	ProcMatch    []string `json:"proc_match"`
	PullImage    string   `json:"pull_image,omitempty"`
	Software     string   `json:"software"` // name and versions, filled by connect
}

// Runtime is a connection to a CRI runtime that remembers what to clean up.
type Runtime struct {
	Target
	cri.RuntimeServiceClient
	images  cri.ImageServiceClient
	conn    *grpc.ClientConn
	hard    context.Context // cancelled only by the second Ctrl-C
	timeout time.Duration   // of one call
	run     string          // value of labelRun
	logs    string          // directory of the container logs, ours
	match   procMatcher
	imageID string
	cgroups *cgroupGuard
	// The cgroup directory of the daemon, empty if it is the root cgroup.
	daemonCgroup string
	// An image to remove in close.
	dropImage string
	seq       atomic.Int64
}

func socketPath(endpoint string) string { return strings.TrimPrefix(endpoint, "unix://") }

// connect dials the endpoint and checks that it speaks CRI v1.
func connect(hard context.Context, t Target, timeout time.Duration) (*Runtime, error) {
	path := socketPath(t.Endpoint)
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("endpoint %q is not unix:///PATH", t.Endpoint)
	}
	if fi, err := os.Stat(path); err != nil {
		return nil, err
	} else if fi.Mode()&os.ModeSocket == 0 {
		return nil, fmt.Errorf("%s is not a socket", path)
	}
	conn, err := grpc.NewClient("unix://"+path,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20))) // as the kubelet
	if err != nil {
		return nil, err
	}
	r := &Runtime{
		Target: t, conn: conn, hard: hard, timeout: timeout,
		RuntimeServiceClient: cri.NewRuntimeServiceClient(conn),
		images:               cri.NewImageServiceClient(conn),
		run:                  fmt.Sprintf("%d-%x", os.Getpid(), time.Now().UnixNano()),
	}
	var v *cri.VersionResponse
	if _, err := r.call("Version", func(ctx context.Context) (err error) {
		v, err = r.Version(ctx, &cri.VersionRequest{})
		return err
	}); err != nil {
		conn.Close()
		return nil, fmt.Errorf("%s: %w", t.Endpoint, err)
	}
	r.Software = fmt.Sprintf("%s %s (CRI %s)", v.RuntimeName, v.RuntimeVersion, v.RuntimeApiVersion)
	pid, exe, ownerErr := socketOwner(path)
	if ownerErr == nil {
		r.daemonCgroup = cpuCgroup(pid)
	}
	if len(r.ProcMatch) == 0 {
		r.ProcMatch = []string{helperPattern}
		if ownerErr == nil {
			r.ProcMatch = append(r.ProcMatch, "^"+regexp.QuoteMeta(exe)+"$")
		}
	}
	for _, p := range r.ProcMatch {
		re, err := regexp.Compile(p)
		if err != nil {
			conn.Close()
			return nil, fmt.Errorf("--proc-match: %w", err)
		}
		r.match = append(r.match, re)
	}
	return r, nil
}

// prepare resolves the image and makes the log directory. pull fetches the
// image when it is missing.
func (r *Runtime) prepare(pull bool) error {
	id, err := r.imageStatus(r.Image)
	if err == nil && id == "" && pull {
		if _, err = r.pull(r.Image); err == nil {
			id, err = r.imageStatus(r.Image)
		}
	}
	if err != nil {
		return err
	}
	if id == "" {
		return fmt.Errorf("image %q is not in the runtime's store: import it, or give --pull", r.Image)
	}
	r.imageID = id
	base := r.LogDir
	if base == "" {
		base = os.TempDir()
	} else if base, err = filepath.Abs(base); err != nil {
		return err
	} else if err = os.MkdirAll(base, 0o755); err != nil {
		return err
	}
	if r.logs, err = os.MkdirTemp(base, logPrefix); err != nil {
		return err
	}
	switch r.CgroupParent {
	case "auto":
		r.CgroupParent = r.defaultCgroupParent()
	case "none":
		r.CgroupParent = ""
	}
	r.cgroups = newCgroupGuard(r.CgroupParent)
	// Ours from the start: a runtime that removes an empty parent again would
	// take the CPU time charged to it along.
	if dir := r.podCgroup(); dir != "" && !strings.HasSuffix(dir, ".slice") {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	return os.Chmod(r.logs, 0o755)
}

// defaultCgroupParent follows the cgroup driver that the runtime reports;
// runtimes that cannot tell mostly use cgroupfs.
func (r *Runtime) defaultCgroupParent() string {
	parent := ownCgroup
	r.call("RuntimeConfig", func(ctx context.Context) error {
		resp, err := r.RuntimeConfig(ctx, &cri.RuntimeConfigRequest{})
		if err == nil && resp.GetLinux().GetCgroupDriver() == cri.CgroupDriver_SYSTEMD {
			parent = "cribench.slice"
		}
		return err
	})
	return parent
}

// podCgroup is the directory that accounts the CPU time of all our pods.
func (r *Runtime) podCgroup() string {
	root := cpuHierarchy("cpuacct")
	if root == "" {
		root = cpuHierarchy("")
	}
	if r.CgroupParent == "" || root == "" {
		return ""
	}
	dir := filepath.Join(root, r.CgroupParent)
	if dir == r.daemonCgroup || strings.HasPrefix(dir, r.daemonCgroup+"/") {
		return "" // counted already
	}
	return dir
}

// call runs one RPC under the call timeout and times it.
func (r *Runtime) call(name string, f func(context.Context) error) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(r.hard, r.timeout)
	defer cancel()
	start := time.Now()
	err := f(ctx)
	d := time.Since(start)
	if err != nil {
		err = fmt.Errorf("%s after %s: %w", name, d.Round(time.Millisecond), err)
	}
	return d, err
}

func (r *Runtime) imageStatus(ref string) (id string, err error) {
	_, err = r.call("ImageStatus", func(ctx context.Context) error {
		s, err := r.images.ImageStatus(ctx, &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: ref}})
		if err == nil && s.Image != nil {
			id = s.Image.Id
		}
		return err
	})
	return id, err
}

func (r *Runtime) pull(ref string) (time.Duration, error) {
	return r.call("PullImage", func(ctx context.Context) error {
		_, err := r.images.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}})
		return err
	})
}

func (r *Runtime) removeImage(ref string) (time.Duration, error) {
	return r.call("RemoveImage", func(ctx context.Context) error {
		_, err := r.images.RemoveImage(ctx, &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: ref}})
		return err
	})
}

// Pod is a sandbox and its containers.
type Pod struct {
	ID         string
	Config     *cri.PodSandboxConfig
	Containers []string
}

func (r *Runtime) labels() map[string]string {
	return map[string]string{labelTool: "true", labelRun: r.run}
}

func (r *Runtime) seccomp() *cri.SecurityProfile {
	if r.Seccomp == "unconfined" {
		return &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Unconfined}
	}
	return &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault}
}

func (r *Runtime) namespaces() *cri.NamespaceOption {
	n := &cri.NamespaceOption{Network: cri.NamespaceMode_POD, Pid: cri.NamespaceMode_CONTAINER, Ipc: cri.NamespaceMode_POD}
	if r.Network == "host" {
		n.Network = cri.NamespaceMode_NODE
	}
	return n
}

// newPod makes the configuration that a kubelet would send for a pod without
// resource requests, and its log directory. Nothing runs yet.
func (r *Runtime) newPod() (*Pod, error) {
	name := fmt.Sprintf("p%d", r.seq.Add(1))
	c := &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: name, Namespace: namespace, Uid: r.run + "-" + name},
		LogDirectory: filepath.Join(r.logs, name),
		Labels:       r.labels(),
		Linux: &cri.LinuxPodSandboxConfig{
			CgroupParent: r.CgroupParent,
			SecurityContext: &cri.LinuxSandboxSecurityContext{
				NamespaceOptions: r.namespaces(),
				Seccomp:          r.seccomp(),
			},
		},
	}
	if r.Network != "host" {
		c.Hostname = name
	}
	return &Pod{Config: c}, os.Mkdir(c.LogDirectory, 0o755)
}

func (p *Pod) logPath(container int) string {
	return filepath.Join(p.Config.LogDirectory, logName(container))
}

func logName(container int) string { return fmt.Sprintf("c%d.log", container) }

func (r *Runtime) runSandbox(p *Pod, rec *Recorder) error {
	d, err := r.call("RunPodSandbox", func(ctx context.Context) error {
		resp, err := r.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: p.Config, RuntimeHandler: r.Handler})
		p.ID = resp.GetPodSandboxId()
		return err
	})
	if err == nil {
		rec.add("RunPodSandbox", d)
	}
	return err
}

// startContainer creates and starts the pod's next container.
func (r *Runtime) startContainer(p *Pod, rec *Recorder, command ...string) error {
	i := len(p.Containers)
	var id string
	d, err := r.call("CreateContainer", func(ctx context.Context) error {
		resp, err := r.CreateContainer(ctx, &cri.CreateContainerRequest{
			PodSandboxId:  p.ID,
			SandboxConfig: p.Config,
			Config: &cri.ContainerConfig{
				Metadata: &cri.ContainerMetadata{Name: fmt.Sprintf("c%d", i)},
				Image:    &cri.ImageSpec{Image: r.imageID, UserSpecifiedImage: r.Image},
				Command:  command,
				Labels:   r.labels(),
				LogPath:  logName(i),
				Linux: &cri.LinuxContainerConfig{
					// What the kubelet gives a best-effort container.
					Resources: &cri.LinuxContainerResources{CpuShares: 2, OomScoreAdj: 1000},
					SecurityContext: &cri.LinuxContainerSecurityContext{
						NamespaceOptions: r.namespaces(),
						Seccomp:          r.seccomp(),
					},
				},
			},
		})
		id = resp.GetContainerId()
		return err
	})
	if err != nil {
		return err
	}
	p.Containers = append(p.Containers, id)
	rec.add("CreateContainer", d)
	d, err = r.call("StartContainer", func(ctx context.Context) error {
		_, err := r.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: id})
		return err
	})
	if err == nil {
		rec.add("StartContainer", d)
	}
	return err
}

func (r *Runtime) stopContainer(id string, rec *Recorder) error {
	d, err := r.call("StopContainer", func(ctx context.Context) error {
		_, err := r.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: id, Timeout: 0})
		return err
	})
	if err == nil {
		rec.add("StopContainer", d)
	}
	return err
}

func (r *Runtime) removeContainer(id string, rec *Recorder) error {
	d, err := r.call("RemoveContainer", func(ctx context.Context) error {
		_, err := r.RemoveContainer(ctx, &cri.RemoveContainerRequest{ContainerId: id})
		return err
	})
	if err == nil {
		rec.add("RemoveContainer", d)
	}
	return err
}

func (r *Runtime) stopSandbox(id string, rec *Recorder) error {
	d, err := r.call("StopPodSandbox", func(ctx context.Context) error {
		_, err := r.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: id})
		return err
	})
	if err == nil {
		rec.add("StopPodSandbox", d)
	}
	return err
}

func (r *Runtime) removeSandbox(id string, rec *Recorder) error {
	d, err := r.call("RemovePodSandbox", func(ctx context.Context) error {
		_, err := r.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: id})
		return err
	})
	if err == nil {
		rec.add("RemovePodSandbox", d)
	}
	return err
}

// teardown stops and removes the containers, then the sandbox.
func (r *Runtime) teardown(p *Pod, rec *Recorder) error {
	for _, id := range p.Containers {
		if err := r.stopContainer(id, rec); err != nil {
			return err
		}
		if err := r.removeContainer(id, rec); err != nil {
			return err
		}
	}
	if err := r.stopSandbox(p.ID, rec); err != nil {
		return err
	}
	if err := r.removeSandbox(p.ID, rec); err != nil {
		return err
	}
	return os.RemoveAll(p.Config.LogDirectory)
}

// listed returns the sandboxes and containers that carry all given labels.
// The labels are checked here again: a runtime that ignores the filter must
// not make this tool remove somebody's pods.
func (r *Runtime) listed(want map[string]string) (pods []*cri.PodSandbox, containers []*cri.Container, err error) {
	ours := func(l map[string]string) bool {
		for k, v := range want {
			if l[k] != v {
				return false
			}
		}
		return true
	}
	_, err = r.call("ListPodSandbox", func(ctx context.Context) error {
		resp, err := r.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{Filter: &cri.PodSandboxFilter{LabelSelector: want}})
		for _, p := range resp.GetItems() {
			if ours(p.Labels) {
				pods = append(pods, p)
			}
		}
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	_, err = r.call("ListContainers", func(ctx context.Context) error {
		resp, err := r.ListContainers(ctx, &cri.ListContainersRequest{Filter: &cri.ContainerFilter{LabelSelector: want}})
		for _, c := range resp.GetContainers() {
			if ours(c.Labels) {
				containers = append(containers, c)
			}
		}
		return err
	})
	return pods, containers, err
}

// cleanup removes everything that carries the labels. It lists again until
// nothing is left, since a cancelled call may still finish in the runtime.
func (r *Runtime) cleanup(want map[string]string) (removed int, err error) {
	var deadline time.Time
	for try := 0; ; try++ {
		pods, containers, lerr := r.listed(want)
		if lerr != nil {
			return removed, lerr
		}
		n := len(pods) + len(containers)
		if n == 0 {
			return removed, nil
		}
		if try == 0 {
			deadline = time.Now().Add(2*r.timeout + time.Duration(n)*time.Second)
		} else {
			time.Sleep(300 * time.Millisecond)
		}
		if try == 5 || time.Now().After(deadline) {
			return removed, errors.Join(fmt.Errorf("%d pods and %d containers are left behind", len(pods), len(containers)), err)
		}
		err = nil
		for _, c := range containers {
			if time.Now().Before(deadline) {
				err = errors.Join(err, r.stopContainer(c.Id, nil), r.removeContainer(c.Id, nil))
			}
		}
		for _, p := range pods {
			if time.Now().Before(deadline) {
				perr := errors.Join(r.stopSandbox(p.Id, nil), r.removeSandbox(p.Id, nil))
				if perr == nil {
					removed++
				}
				err = errors.Join(err, perr)
			}
		}
	}
}

// close cleans up and disconnects. It uses a context of its own, so that it
// works after Ctrl-C.
func (r *Runtime) close() error {
	r.hard = context.Background()
	var err error
	if r.imageID != "" { // something may have been created
		_, err = r.cleanup(r.labels())
	}
	if r.dropImage != "" {
		_, derr := r.removeImage(r.dropImage)
		err = errors.Join(err, derr)
	}
	if r.logs != "" {
		err = errors.Join(err, os.RemoveAll(r.logs))
	}
	if r.cgroups != nil {
		r.cgroups.remove()
	}
	return errors.Join(err, r.conn.Close())
}

// cgroupGuard removes the cgroup parent after the run if it was not there
// before: runtimes create it with the first pod and nobody removes it.
type cgroupGuard struct{ fresh []string }

func newCgroupGuard(parent string) *cgroupGuard {
	g := &cgroupGuard{}
	parent = strings.Trim(filepath.Clean(parent), "/")
	if parent == "" || strings.HasSuffix(parent, ".slice") { // systemd keeps its own slices
		return g
	}
	for _, dir := range cgroupMounts() {
		// The topmost directory that is not there yet.
		for part := range strings.SplitSeq(parent, "/") {
			dir = filepath.Join(dir, part)
			if _, err := os.Stat(dir); os.IsNotExist(err) {
				g.fresh = append(g.fresh, dir)
				break
			}
		}
	}
	return g
}

func cgroupMounts() (dirs []string) {
	mounts, _ := os.ReadFile("/proc/self/mounts")
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 2 && (f[2] == "cgroup" || f[2] == "cgroup2") {
			dirs = append(dirs, f[1])
		}
	}
	return dirs
}

func (g *cgroupGuard) remove() {
	for _, top := range g.fresh {
		removeCgroup(top)
	}
}

// removeCgroup removes a cgroup and those below it as far as they are unused.
func removeCgroup(top string) {
	var dirs []string
	filepath.WalkDir(top, func(p string, d os.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, p)
		}
		return nil
	})
	for i := len(dirs) - 1; i >= 0; i-- { // children first
		os.Remove(dirs[i]) // fails, as it should, while in use
	}
}
