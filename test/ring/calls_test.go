package ring

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/internal/testhost"
)

// PodConfig is the request for a plain pod, with a name of its own.
func (n *Node) PodConfig() *criv1.PodSandboxConfig {
	name := fmt.Sprintf("pod%d", n.names.Add(1))
	return &criv1.PodSandboxConfig{
		Metadata: &criv1.PodSandboxMetadata{Name: name, Namespace: "ring", Uid: newID()[:32]}, Hostname: name,
		LogDirectory: filepath.Join(n.LogDir, name),
		Linux:        &criv1.LinuxPodSandboxConfig{SecurityContext: &criv1.LinuxSandboxSecurityContext{NamespaceOptions: &criv1.NamespaceOption{Pid: criv1.NamespaceMode_CONTAINER}}},
	}
}

// TryPod runs a pod; mutate may be nil.
func (n *Node) TryPod(t testing.TB, mutate func(*criv1.PodSandboxConfig)) (string, error) {
	t.Helper()
	c := n.PodConfig()
	if mutate != nil {
		mutate(c)
	}
	if err := os.MkdirAll(c.LogDirectory, 0o755); err != nil {
		t.Fatal(err)
	}
	r, err := n.Runtime.RunPodSandbox(within(t, callTime), &criv1.RunPodSandboxRequest{Config: c, RuntimeHandler: n.handler})
	if err != nil {
		return "", err
	}
	n.pods[r.PodSandboxId] = c
	return r.PodSandboxId, nil
}

// Pod runs a pod.
func (n *Node) Pod(t testing.TB, mutate func(*criv1.PodSandboxConfig)) string {
	t.Helper()
	id, err := n.TryPod(t, mutate)
	if err != nil {
		t.Fatalf("run pod: %v", err)
	}
	return id
}

// ContainerConfig is the request for a container of the default image that
// sleeps.
func (n *Node) ContainerConfig() *criv1.ContainerConfig {
	name := fmt.Sprintf("c%d", n.names.Add(1))
	return &criv1.ContainerConfig{
		Metadata: &criv1.ContainerMetadata{Name: name}, Image: &criv1.ImageSpec{Image: Busybox},
		Command: []string{"/bin/sleep", "86400"}, LogPath: name + ".log",
		Linux: &criv1.LinuxContainerConfig{Resources: &criv1.LinuxContainerResources{}, SecurityContext: &criv1.LinuxContainerSecurityContext{
			NamespaceOptions: &criv1.NamespaceOption{Pid: criv1.NamespaceMode_CONTAINER},
		}},
	}
}

// TryContainer creates a container.
func (n *Node) TryContainer(t testing.TB, pod string, mutate func(*criv1.ContainerConfig)) (string, error) {
	t.Helper()
	c := n.ContainerConfig()
	if s := n.pods[pod].GetLinux().GetSecurityContext().GetNamespaceOptions(); s != nil {
		c.Linux.SecurityContext.NamespaceOptions = s
	}
	if mutate != nil {
		mutate(c)
	}
	r, err := n.Runtime.CreateContainer(within(t, callTime), &criv1.CreateContainerRequest{PodSandboxId: pod, Config: c, SandboxConfig: n.pods[pod]})
	if err != nil {
		return "", err
	}
	return r.ContainerId, nil
}

// Container creates a container.
func (n *Node) Container(t testing.TB, pod string, mutate func(*criv1.ContainerConfig)) string {
	t.Helper()
	id, err := n.TryContainer(t, pod, mutate)
	if err != nil {
		t.Fatalf("create container: %v", err)
	}
	return id
}

// TryStart starts a created container.
func (n *Node) TryStart(t testing.TB, id string) error {
	t.Helper()
	_, err := n.Runtime.StartContainer(within(t, callTime), &criv1.StartContainerRequest{ContainerId: id})
	return err
}

// Start starts a created container.
func (n *Node) Start(t testing.TB, id string) {
	t.Helper()
	if err := n.TryStart(t, id); err != nil {
		t.Fatalf("start container: %v", err)
	}
}

// Run creates and starts a container.
func (n *Node) Run(t testing.TB, pod string, mutate func(*criv1.ContainerConfig)) string {
	t.Helper()
	id := n.Container(t, pod, mutate)
	n.Start(t, id)
	return id
}

// TryRun creates and starts a container; the error is that of either.
func (n *Node) TryRun(t testing.TB, pod string, mutate func(*criv1.ContainerConfig)) (string, error) {
	t.Helper()
	id, err := n.TryContainer(t, pod, mutate)
	if err != nil {
		return "", err
	}
	return id, n.TryStart(t, id)
}

// Remove stops and removes a container.
func (n *Node) Remove(t testing.TB, id string) {
	t.Helper()
	if _, err := n.Runtime.RemoveContainer(within(t, callTime), &criv1.RemoveContainerRequest{ContainerId: id}); err != nil {
		t.Fatalf("remove container: %v", err)
	}
}

// RemovePod stops and removes a pod.
func (n *Node) RemovePod(t testing.TB, id string) {
	t.Helper()
	if err := n.removePod(within(t, callTime), id); err != nil {
		t.Fatalf("remove pod: %v", err)
	}
}

// ExecErr is ExecSync.
func (n *Node) ExecErr(t testing.TB, id string, cmd ...string) (*criv1.ExecSyncResponse, error) {
	t.Helper()
	return n.ExecTimeout(t, id, 30*int64(testhost.Factor()), cmd...)
}

// ExecTimeout is ExecSync with a timeout in seconds.
func (n *Node) ExecTimeout(t testing.TB, id string, seconds int64, cmd ...string) (*criv1.ExecSyncResponse, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), testhost.Limit(callTime))
	defer cancel()
	return n.Runtime.ExecSync(ctx, &criv1.ExecSyncRequest{ContainerId: id, Cmd: cmd, Timeout: seconds})
}

// Exec runs a command in the container; it must at least start.
func (n *Node) Exec(t testing.TB, id string, cmd ...string) (stdout, stderr string, code int32) {
	t.Helper()
	r, err := n.ExecErr(t, id, cmd...)
	if err != nil {
		t.Fatalf("exec %q: %v", cmd, err)
	}
	return string(r.Stdout), string(r.Stderr), r.ExitCode
}

// Sh runs a shell command in the container, which must succeed, and returns
// its output without the last newline.
func (n *Node) Sh(t testing.TB, id, script string) string {
	t.Helper()
	out, errOut, code := n.Exec(t, id, "/bin/sh", "-c", script)
	if code != 0 {
		t.Fatalf("%q: exit code %d\n%s%s", script, code, out, errOut)
	}
	return strings.TrimRight(out, "\n")
}

// Status is the container's status.
func (n *Node) Status(t testing.TB, id string) *criv1.ContainerStatus {
	t.Helper()
	r, err := n.Runtime.ContainerStatus(within(t, callTime), &criv1.ContainerStatusRequest{ContainerId: id})
	if err != nil {
		t.Fatalf("status of container: %v", err)
	}
	return r.Status
}

// WaitExit waits until the container has exited.
func (n *Node) WaitExit(t testing.TB, id string) *criv1.ContainerStatus {
	t.Helper()
	var s *criv1.ContainerStatus
	eventually(t, callTime, "the end of container "+id[:12], func() bool {
		s = n.Status(t, id)
		return s.State == criv1.ContainerState_CONTAINER_EXITED
	})
	return s
}

// Output runs the container to its end and returns its exit code and what it wrote.
func (n *Node) Output(t testing.TB, pod string, mutate func(*criv1.ContainerConfig)) (string, int32) {
	t.Helper()
	id := n.Run(t, pod, mutate)
	s := n.WaitExit(t, id)
	return n.LogText(t, id), s.ExitCode
}

// LogLine is one record of a container's log.
type LogLine struct {
	Time   time.Time
	Stream string // stdout or stderr
	Part   bool   // P: the line goes on in the next record
	Text   string
}

// Log reads the container's log.
func (n *Node) Log(t testing.TB, id string) []LogLine {
	t.Helper()
	b, err := os.ReadFile(n.Status(t, id).LogPath)
	if err != nil {
		t.Fatal(err)
	}
	var lines []LogLine
	for line := range strings.Lines(string(b)) {
		if !strings.HasSuffix(line, "\n") {
			t.Fatalf("the log ends in a half record: %.200q", line)
		}
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), " ", 4)
		if len(f) != 4 || (f[2] != "F" && f[2] != "P") || (f[1] != "stdout" && f[1] != "stderr") {
			t.Fatalf("log record %.200q", line)
		}
		at, err := time.Parse(time.RFC3339Nano, f[0])
		if err != nil {
			t.Fatalf("log record %.200q: %v", line, err)
		}
		lines = append(lines, LogLine{at, f[1], f[2] == "P", f[3]})
	}
	return lines
}

// LogText is what the container wrote, both streams in the log's order.
func (n *Node) LogText(t testing.TB, id string) string {
	t.Helper()
	var b strings.Builder
	for _, l := range n.Log(t, id) {
		b.WriteString(l.Text)
		if !l.Part {
			b.WriteByte('\n')
		}
	}
	return b.String()
}

// PID is the container's first process, as the host sees it.
func (n *Node) PID(t testing.TB, id string) int {
	t.Helper()
	r, err := n.Runtime.ContainerStatus(within(t, callTime), &criv1.ContainerStatusRequest{ContainerId: id, Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	var info struct {
		PID int `json:"pid"`
	}
	for _, v := range r.Info {
		if json.Unmarshal([]byte(v), &info) == nil && info.PID > 0 {
			return info.PID
		}
	}
	if pid, err := strconv.Atoi(r.Info["pid"]); err == nil && pid > 0 {
		return pid
	}
	f, err := n.monitor().Files(within(t, callTime), id)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	return f.PID
}

// SharedDir makes a folder of the host that is a shared mount.
func (n *Node) SharedDir(t testing.TB) string {
	t.Helper()
	d := n.HostDir(t)
	if err := unix.Mount(d, d, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("", d, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	return d
}

// HostDir makes a folder on the host, outside of the node's roots.
func (n *Node) HostDir(t testing.TB) string {
	t.Helper()
	d := filepath.Join(n.Dir, fmt.Sprintf("host%d", n.names.Add(1)))
	if err := os.Mkdir(d, 0o755); err != nil {
		t.Fatal(err)
	}
	return d
}

// Volume is a mount of a host path.
func Volume(host, container string) *criv1.Mount {
	return &criv1.Mount{HostPath: host, ContainerPath: container}
}
