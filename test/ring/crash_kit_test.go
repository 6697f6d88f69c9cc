package ring

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/internal/testhost"
)

// failing builds the two programs with failpoints (internal/failpoint), once.
var failing = sync.OnceValues(func() (programs [2]string, err error) {
	programs = [2]string{filepath.Join(workDir, "naru-failing"), filepath.Join(workDir, "naru-monitor-failing")}
	for i, pkg := range []string{"cmd/shim", "cmd/monitor"} {
		cmd := exec.Command("go", "build", "-tags", "failpoint", "-o", programs[i], "github.com/naru-project/naru/"+pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return programs, fmt.Errorf("build %s with failpoints: %w\n%s", pkg, err, out)
		}
	}
	return programs, nil
})

// crashRig is a node whose processes are broken, with a pod that nothing may
// happen to and a story that is lived over and over.
type crashRig struct {
	t      *testing.T
	n      *Node
	plan   string // files of internal/failpoint
	passed string
	number int // of the plan

	witness string // a container that writes and is never touched
	ctl     string
	was     identity
	stories int
}

func newCrashRig(t *testing.T, opts ...Option) *crashRig {
	r := &crashRig{t: t}
	f, err := os.MkdirTemp(workDir, "points")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(f) })
	r.plan, r.passed = f+"/plan", f+"/passed"
	r.arm("", "")
	r.n = StartNode(t, append(opts, WithEnv("NARU_FAILPOINTS="+r.plan+":"+r.passed))...)
	r.ctl = r.n.HostDir(t)
	pod := r.n.Pod(t, func(c *criv1.PodSandboxConfig) { c.Linux.CgroupParent = r.n.Parent + "/" + c.Metadata.Name })
	r.witness = r.n.Run(t, pod, each(mounts(Volume(r.ctl, "/ctl")), shell(`i=0; while [ ! -e /ctl/stop ]; do n=0; while [ $n -lt 50 ]; do i=$((i+1)); echo $i; echo $i >&2; n=$((n+1)); done; usleep 10000; done; echo $i >/ctl/both; exit 7`)))
	r.was = identityOf(r.n.PID(t, r.witness))
	return r
}

// arm writes the plan; an empty point ends it.
func (r *crashRig) arm(action, point string) {
	r.number++
	if point == "" {
		action, point = "none", "none"
	}
	line := fmt.Sprintf("%d %s %s\n", r.number, action, point)
	f, err := os.OpenFile(r.plan, os.O_WRONLY|os.O_CREATE, 0o600) // in place: the processes have it open
	if err == nil {
		_, err = f.WriteAt([]byte(line+strings.Repeat("\n", 400-len(line))), 0)
		_ = f.Close()
	}
	if err != nil {
		r.t.Fatal(err)
	}
}

// points returns what was passed since the last call, each once, in order, and
// the point at which the plan was followed.
func (r *crashRig) points() (all []string, followed string) {
	b, err := os.ReadFile(r.passed)
	if err != nil {
		r.t.Fatal(err)
	}
	seen := map[string]bool{}
	for line := range strings.Lines(string(b)) {
		p, hit := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "!")
		if hit {
			followed = p
		}
		if !seen[p] {
			seen[p] = true
			all = append(all, p)
		}
	}
	return all, followed
}

func (r *crashRig) forget() {
	if err := os.Truncate(r.passed, 0); err != nil && !os.IsNotExist(err) {
		r.t.Fatal(err)
	}
}

// story is the life of one pod as a kubelet would give it: each call is made
// again until it comes through.
type story struct {
	r       *crashRig
	kind    int
	name    string
	lenient bool // an error was planted: a start or a stop may end another way
	config  *criv1.PodSandboxConfig
	pod     string
	attempt uint32
	handles string // ends with 33 on SIGTERM
}

func (r *crashRig) newStory(kind int) *story {
	r.stories++
	s := &story{r: r, kind: kind, name: fmt.Sprintf("story-%d", r.stories)}
	n := r.n
	s.config = n.PodConfig()
	s.config.Metadata = &criv1.PodSandboxMetadata{Name: s.name, Uid: s.name, Namespace: "ring"}
	s.config.LogDirectory = n.LogDir + "/" + s.name
	s.config.Linux.CgroupParent = n.Parent + "/" + s.name
	s.config.PortMappings = []*criv1.PortMapping{{ContainerPort: 80, HostPort: 31000}, {ContainerPort: 81, HostPort: 31000, Protocol: criv1.Protocol_UDP}}
	if kind == 1 {
		ids := []*criv1.IDMapping{{HostId: 1 << 20, Length: 65536}}
		s.config.Linux.SecurityContext.NamespaceOptions = &criv1.NamespaceOption{
			Pid: criv1.NamespaceMode_POD, UsernsOptions: &criv1.UserNamespace{Mode: criv1.NamespaceMode_POD, Uids: ids, Gids: ids},
		}
	}
	return s
}

// call makes one call until it comes through.
func (s *story) call(what string, f func(ctx context.Context) error) error {
	for end := time.Now().Add(testhost.Limit(60 * time.Second)); ; time.Sleep(5 * time.Millisecond) {
		ctx, cancel := context.WithTimeout(context.Background(), testhost.Limit(30*time.Second))
		err := f(ctx)
		cancel()
		if err == nil {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("%s: %s: %w", s.name, what, err)
		}
		if code := status.Code(err); code == codes.Internal || code == codes.Unknown {
			s.lenient = true
		}
	}
}

func (s *story) create(ctx context.Context, name, script string) (string, error) {
	c := s.r.n.ContainerConfig()
	c.Metadata = &criv1.ContainerMetadata{Name: name, Attempt: s.attempt}
	c.LogPath = fmt.Sprintf("%s-%d.log", name, s.attempt)
	c.Command = []string{"/bin/sh", "-c", script}
	c.Linux.SecurityContext.NamespaceOptions = s.config.Linux.SecurityContext.NamespaceOptions
	a, err := s.r.n.Runtime.CreateContainer(ctx, &criv1.CreateContainerRequest{PodSandboxId: s.pod, Config: c, SandboxConfig: s.config})
	return a.GetContainerId(), err
}

func (s *story) status(ctx context.Context, id string) (*criv1.ContainerStatus, error) {
	a, err := s.r.n.Runtime.ContainerStatus(ctx, &criv1.ContainerStatusRequest{ContainerId: id})
	return a.GetStatus(), err
}

// run creates and starts a container. A start that failed is tried again with
// the next attempt, as the kubelet does.
func (s *story) run(name, script string) (id string, err error) {
	rt := s.r.n.Runtime
	err = s.call("run "+name, func(ctx context.Context) (err error) {
		if id == "" {
			if id, err = s.create(ctx, name, script); err != nil {
				if status.Code(err) == codes.AlreadyExists {
					return fmt.Errorf("the create before was forgotten: %w", err)
				}
				return err
			}
		}
		_, err = rt.StartContainer(ctx, &criv1.StartContainerRequest{ContainerId: id})
		if err == nil {
			return nil
		}
		st, serr := s.status(ctx, id)
		if serr != nil {
			return serr
		}
		switch st.State {
		case criv1.ContainerState_CONTAINER_RUNNING: // the try before had started it
			return nil
		case criv1.ContainerState_CONTAINER_EXITED:
			if st.Reason != "StartError" && !strings.Contains(st.Message, "starting") && !s.lenient {
				return fmt.Errorf("it ended with %d (%s: %s)", st.ExitCode, st.Reason, st.Message)
			}
			s.attempt++
			id = ""
		}
		return err
	})
	return id, err
}

// live is the whole story.
func (s *story) live() error {
	rt := s.r.n.Runtime
	var writes, idle string
	steps := []struct {
		name string
		do   func(ctx context.Context) error
	}{
		{"run pod", func(ctx context.Context) error {
			a, err := rt.RunPodSandbox(ctx, &criv1.RunPodSandboxRequest{Config: s.config})
			s.pod = a.GetPodSandboxId()
			return err
		}},
		{"handles", func(context.Context) (err error) {
			s.handles, err = s.run("handles", `trap 'echo 4; echo 4 >&2; exit 33' TERM; for i in 1 2 3; do echo $i; echo $i >&2; done; while :; do usleep 5000; done`)
			return err
		}},
		{"exec", func(ctx context.Context) error {
			a, err := rt.ExecSync(ctx, &criv1.ExecSyncRequest{ContainerId: s.handles, Cmd: []string{"/bin/sh", "-c", "echo out; exit 3"}, Timeout: 20})
			if err == nil && (string(a.Stdout) != "out\n" || a.ExitCode != 3) {
				err = fmt.Errorf("it says %q and ends with %d", a.Stdout, a.ExitCode)
			}
			return err
		}},
		{"update container", func(ctx context.Context) error {
			_, err := rt.UpdateContainerResources(ctx, &criv1.UpdateContainerResourcesRequest{ContainerId: s.handles, Linux: &criv1.LinuxContainerResources{CpuShares: 512}})
			return err
		}},
		{"update pod", func(ctx context.Context) error {
			_, err := rt.UpdatePodSandboxResources(ctx, &criv1.UpdatePodSandboxResourcesRequest{PodSandboxId: s.pod, Resources: &criv1.LinuxContainerResources{CpuShares: 512}})
			return err
		}},
		{"writes", func(context.Context) (err error) {
			writes, err = s.run("writes", "seq 1 3000; seq 1 3000 >&2; exit 9")
			return err
		}},
		{"idle", func(context.Context) (err error) { idle, err = s.run("idle", "exec sleep 86400"); return err }},
		{"create only", func(ctx context.Context) error { _, err := s.create(ctx, "only", "exit 1"); return err }},
		{"writes has ended", func(ctx context.Context) error { return s.ended(ctx, writes, 3000, 9) }},
		{"remove container", func(ctx context.Context) error {
			_, err := rt.RemoveContainer(ctx, &criv1.RemoveContainerRequest{ContainerId: writes})
			return err
		}},
		{"log is ready", func(ctx context.Context) error { return s.logged(ctx, s.handles, 3) }},
		{"stop container", func(ctx context.Context) error {
			_, err := rt.StopContainer(ctx, &criv1.StopContainerRequest{ContainerId: s.handles, Timeout: 20})
			return err
		}},
		{"handles has ended", func(ctx context.Context) error {
			if s.lenient { // a signal that could not be sent is followed by SIGKILL at once
				if st, err := s.status(ctx, s.handles); err == nil && st.ExitCode == 137 {
					return nil
				}
			}
			return s.ended(ctx, s.handles, 4, 33)
		}},
		{"stop pod", func(ctx context.Context) error {
			_, err := rt.StopPodSandbox(ctx, &criv1.StopPodSandboxRequest{PodSandboxId: s.pod})
			return err
		}},
		{"idle has ended", func(ctx context.Context) error { return s.ended(ctx, idle, 0, 137) }},
		{"remove pod", func(ctx context.Context) error {
			_, err := rt.RemovePodSandbox(ctx, &criv1.RemovePodSandboxRequest{PodSandboxId: s.pod})
			return err
		}},
	}
	for _, st := range steps {
		if err := s.call(st.name, st.do); err != nil {
			return err
		}
	}
	return nil
}

// ended checks how a container ended and what it logged.
func (s *story) ended(ctx context.Context, id string, lines int, code int32) error {
	st, err := s.status(ctx, id)
	switch {
	case err != nil:
		return err
	case st.State != criv1.ContainerState_CONTAINER_EXITED:
		return fmt.Errorf("it is %v", st.State)
	case st.ExitCode != code:
		s.r.t.Errorf("%s: container %s ended with %d (%s: %s), not %d", s.name, st.Metadata.Name, st.ExitCode, st.Reason, st.Message, code)
		return nil
	case lines == 0:
		return nil
	}
	got := numbers(s.r.t, st.LogPath)
	if got["stdout"] != lines || got["stderr"] != lines {
		s.r.t.Errorf("%s: the log of %s ends with %v, written were %d", s.name, st.Metadata.Name, got, lines)
	}
	return nil
}

// logged waits for so many lines of a running container.
func (s *story) logged(ctx context.Context, id string, lines int) error {
	st, err := s.status(ctx, id)
	if err != nil {
		return err
	}
	b, err := os.ReadFile(st.LogPath)
	if n := strings.Count(string(b), "\n"); err != nil || n < 2*lines {
		return fmt.Errorf("the log has %d lines, %w", n, err)
	}
	return nil
}

// check is what must hold after each story: the witness never noticed, and
// nothing is there that belongs to nobody.
func (r *crashRig) check(after string) {
	r.t.Helper()
	if now := identityOf(r.was.pid); now != r.was {
		r.t.Fatalf("after %s: the witness was process %v, now %v", after, r.was, now)
	}
	exec := func() (*criv1.ExecSyncResponse, error) {
		return r.n.Runtime.ExecSync(within(r.t, 20*time.Second), &criv1.ExecSyncRequest{ContainerId: r.witness, Cmd: []string{"/bin/echo", "here"}, Timeout: 10})
	}
	out, err := exec()
	if status.Code(err) == codes.Unavailable { // it was killed after its last answer to the story
		if r.n.daemon.ended() {
			r.n.StartDaemon()
		}
		out, err = exec()
	}
	if err != nil || string(out.Stdout) != "here\n" {
		r.t.Errorf("after %s: exec in the witness: %v, %v", after, out, err)
	}
	var left []string
	for end := time.Now().Add(testhost.Limit(10 * time.Second)); ; time.Sleep(20 * time.Millisecond) {
		if left = r.n.ownerless(r.t); len(left) == 0 || time.Now().After(end) {
			break
		}
	}
	for _, l := range left {
		r.t.Errorf("after %s nobody owns %s", after, l)
	}
	if m := r.n.remember(r.t); len(m.pods) != 1 || len(m.containers) != 1 {
		r.t.Errorf("after %s: %d pods and %d containers are listed, not the witness alone", after, len(m.pods), len(m.containers))
	}
}

// finish holds the witness's log against what it wrote.
func (r *crashRig) finish() {
	if r.t.Failed() {
		return
	}
	if err := os.WriteFile(r.ctl+"/stop", nil, 0o644); err != nil {
		r.t.Fatal(err)
	}
	st := r.n.WaitExit(r.t, r.witness)
	b, err := os.ReadFile(r.ctl + "/both")
	got := numbers(r.t, st.LogPath)
	if want := strings.TrimSpace(string(b)); err != nil || st.ExitCode != 7 || fmt.Sprint(got["stdout"]) != want || fmt.Sprint(got["stderr"]) != want {
		r.t.Errorf("the witness ended with %d, its log with %v; it wrote %s (%v)", st.ExitCode, got, want, err)
	}
	r.t.Logf("the witness has %v lines in its log", got)
}

// quiet empties the logs of daemon and keeper after a panic that was planted:
// at the end of a test they are searched for others.
func (r *crashRig) quiet() {
	for _, name := range []string{"naru.log", "keeper.log"} {
		if err := os.Truncate(filepath.Join(r.n.Dir, name), 0); err != nil {
			r.t.Error(err)
		}
	}
}

func killPID(pid int) { _ = unix.Kill(pid, unix.SIGKILL) }
