package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/naru-project/naru/hack/e2e"
	v1 "k8s.io/api/core/v1"
)

var lifeChecks = []check{
	{"init containers run in order, a restartable one between them", says("init", "main", "cat /shared/order", "first\nsidecar\nsecond")},
	{"init containers have ended with 0, the restartable one runs", initEnded},
	{"a restartable init container is started again when it dies", sidecarRestarts()},
	{"Always: ended with 3, started again", alwaysRestarted},
	{"logs of this run and of the one before", bothRuns},
	{"OnFailure: started again until it succeeds, then left alone", func(ctx context.Context, s *suite) error {
		return endedAs(ctx, s, "onfailure", v1.PodSucceeded, 0, 1, "Completed")
	}},
	{"Never: failed and left alone", func(ctx context.Context, s *suite) error {
		return endedAs(ctx, s, "never", v1.PodFailed, 7, 0, "Error")
	}},
	{"the last words in the log are the termination message", func(ctx context.Context, s *suite) error {
		c, err := s.container(ctx, "never", "main")
		if err != nil {
			return err
		}
		return e2e.Want("message", strings.TrimSpace(c.State.Terminated.Message), "last words")
	}},
}

func initEnded(ctx context.Context, s *suite) error {
	for _, name := range []string{"first", "second"} {
		c, err := s.container(ctx, "init", name)
		if err != nil {
			return err
		}
		if t := c.State.Terminated; t == nil || t.ExitCode != 0 || t.Reason != "Completed" {
			return fmt.Errorf("%s: %+v", name, c.State)
		}
	}
	c, err := s.container(ctx, "init", "sidecar")
	if err == nil && (c.State.Running == nil || c.Started == nil || !*c.Started) {
		err = fmt.Errorf("the sidecar: %+v", c.State)
	}
	return err
}

func sidecarRestarts() func(context.Context, *suite) error {
	told := false
	return func(ctx context.Context, s *suite) error {
		if !told { // once: after a second time it would not be started again at once
			if _, err := s.k.sh(ctx, "init", "sidecar", "kill -TERM 1"); err != nil {
				return err
			}
			told = true
		}
		c, err := s.container(ctx, "init", "sidecar")
		if err == nil && (c.RestartCount != 1 || c.State.Running == nil) {
			err = fmt.Errorf("restarts %d, %+v", c.RestartCount, c.State)
		}
		return err
	}
}

func alwaysRestarted(ctx context.Context, s *suite) error {
	c, err := s.container(ctx, "always", "main")
	if err != nil {
		return err
	}
	t := c.LastTerminationState.Terminated
	if c.RestartCount != 1 || c.State.Running == nil || t == nil || t.ExitCode != 3 {
		return fmt.Errorf("restarts %d, state %+v, before %+v", c.RestartCount, c.State, c.LastTerminationState)
	}
	return e2e.Want("message", strings.TrimSpace(t.Message), "because")
}

func bothRuns(ctx context.Context, s *suite) error {
	now, err := s.k.logs(ctx, "always", "main", false)
	if err != nil {
		return err
	}
	before, err := s.k.logs(ctx, "always", "main", true)
	return errors.Join(err, e2e.Want("log", now, "second run\n"), e2e.Want("log of the run before", before, "first run\n"))
}

// endedAs compares how a pod with one container has ended.
func endedAs(ctx context.Context, s *suite, pod string, phase v1.PodPhase, code, restarts int32, reason string) error {
	c, err := s.container(ctx, pod, "main")
	if err != nil {
		return err
	}
	t := c.State.Terminated
	if got := s.pods[pod].Status.Phase; got != phase || t == nil || t.ExitCode != code || t.Reason != reason || c.RestartCount != restarts {
		return fmt.Errorf("phase %s, restarts %d, %+v", got, c.RestartCount, t)
	}
	return nil
}

var probeChecks = []check{
	{"HTTP probe: nginx has been asked by kube-probe", func(ctx context.Context, s *suite) error {
		log, err := s.k.logs(ctx, "probes", "http", false)
		if err == nil && !strings.Contains(log, "kube-probe/") {
			err = errors.New("no kube-probe in the access log")
		}
		return err
	}},
	{"exec probe: the container is not ready while it fails, and is again after", readyFollowsProbe},
	{"TCP and gRPC probes: both containers are ready and were never started again", func(ctx context.Context, s *suite) error {
		return errors.Join(untouched(ctx, s, "probes", "http"), untouched(ctx, s, "probes", "grpc"))
	}},
	{"a failed liveness probe starts the container again", func(ctx context.Context, s *suite) error {
		c, err := s.container(ctx, "liveness", "main")
		if err == nil && (c.RestartCount != 1 || !c.Ready) {
			err = fmt.Errorf("restarts %d, ready %t", c.RestartCount, c.Ready)
		}
		return err
	}},
	{"postStart of both kinds has run", func(ctx context.Context, s *suite) error {
		return errors.Join(untouched(ctx, s, "hooks", "web"), s.trace("hooks", "postStart"))
	}},
	{"preStop of both kinds, then SIGTERM, then the grace to end in", gone("hooks", func(ctx context.Context, s *suite) error {
		log, err := s.k.logs(ctx, "hostnet", "web", false)
		if err == nil && !strings.Contains(log, "GET /?stopping") {
			err = errors.New("no GET /?stopping in the access log")
		}
		return errors.Join(err, s.trace("hooks", "postStart preStop term end"))
	})},
	{"a container that does not listen is killed when its grace of 2 s is over", gone("stubborn", func(_ context.Context, s *suite) error {
		grace, err := s.between("stubborn-term", "stubborn-last")
		if err == nil && (grace < 1700*time.Millisecond || grace > 5*time.Second) {
			err = fmt.Errorf("killed %v after SIGTERM", grace)
		}
		return err
	})},
	{"a restartable init container ends after the others", gone("init", func(_ context.Context, s *suite) error {
		return s.trace("init", "sidecar main sidecar") // the first is from sidecarRestarts
	})},
}

func readyFollowsProbe(ctx context.Context, s *suite) error {
	for _, step := range []struct {
		script string
		ready  bool
	}{{"rm /tmp/ready", false}, {"touch /tmp/ready", true}} {
		if _, err := s.k.sh(ctx, "probes", "exec", step.script); err != nil {
			return err
		}
		err := e2e.Eventually(ctx, 15*time.Second, func() error {
			c, err := s.container(ctx, "probes", "exec")
			if err == nil && c.Ready != step.ready {
				err = fmt.Errorf("ready is %t after %s", c.Ready, step.script)
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// untouched says whether a container runs, is ready and was started once.
func untouched(ctx context.Context, s *suite, pod, container string) error {
	c, err := s.container(ctx, pod, container)
	if err == nil && (!c.Ready || c.RestartCount != 0 || c.State.Running == nil) {
		err = fmt.Errorf("%s of %s: ready %t, restarts %d, %+v", container, pod, c.Ready, c.RestartCount, c.State)
	}
	return err
}

// trace compares the words that containers have left in a file.
func (s *suite) trace(name, words string) error {
	b, err := os.ReadFile(filepath.Join(s.Work, "out", name))
	return errors.Join(err, e2e.Want("trace", strings.Join(strings.Fields(string(b)), " "), words))
}

// between is the time between two copies of /proc/uptime.
func (s *suite) between(from, to string) (time.Duration, error) {
	var at [2]float64
	for i, name := range []string{from, to} {
		b, err := os.ReadFile(filepath.Join(s.Work, "out", name))
		if err != nil {
			return 0, err
		}
		up, _, _ := strings.Cut(string(b), " ")
		if at[i], err = strconv.ParseFloat(up, 64); err != nil {
			return 0, err
		}
	}
	return time.Duration((at[1] - at[0]) * float64(time.Second)), nil
}

// gone takes a pod's manifest away, waits until the kubelet has ended the pod,
// and looks at what it left.
func gone(pod string, then func(context.Context, *suite) error) func(context.Context, *suite) error {
	return func(ctx context.Context, s *suite) error {
		if err := s.take(pod); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		if err := s.refresh(ctx); err != nil {
			return err
		}
		if s.pods[pod] != nil {
			return fmt.Errorf("the kubelet still has pod %s", pod)
		}
		return then(ctx, s)
	}
}

var networkChecks = []check{
	{"a host port leads to the pod", func(ctx context.Context, s *suite) error {
		return s.greets(ctx, "http://"+nodeIP+":8080/")
	}},
	// The address in such a pod's status is the node's, which a kubelet without
	// an API server does not know.
	{"the host's network: the pod's ports are the node's", func(ctx context.Context, s *suite) error {
		return s.greets(ctx, "http://"+nodeIP+":80/")
	}},
	{"two addresses, and another pod reaches both", func(ctx context.Context, s *suite) error {
		p, err := s.pod(ctx, "hostport")
		if err != nil {
			return err
		}
		if len(p.Status.PodIPs) != 2 {
			return fmt.Errorf("addresses %v, want two", p.Status.PodIPs)
		}
		for _, ip := range p.Status.PodIPs {
			host := ip.IP
			if strings.Contains(host, ":") {
				host = "[" + host + "]"
			}
			out, err := s.k.sh(ctx, "limits", "main", "wget -qO- http://"+host+"/")
			if err := errors.Join(err, e2e.Want(host, out, "<h1>Hello from a pod</h1>")); err != nil {
				return err
			}
		}
		return nil
	}},
	{"shareProcessNamespace: one container sees the other's processes", says("shared", "other", "pidof nginx | wc -w", "2")},
}

// greets says whether nginx of the demo answers.
func (s *suite) greets(ctx context.Context, address string) error {
	b, err := s.k.get(ctx, address)
	return errors.Join(err, e2e.Want(address, strings.TrimSpace(string(b)), "<h1>Hello from a pod</h1>"))
}

var volumeChecks = []check{
	{"emptyDir holds what an init container wrote", says("volumes", "main", "cat /disk/file", "whole")},
	{"emptyDir in memory is a tmpfs of its size", says("volumes", "main", "awk '$2 == \"/memory\" {print $3}' /proc/mounts; df -k /memory | awk 'END {print $2}'", "tmpfs\n16384")},
	{"subPath of a folder and of a file, the file read-only", says("volumes", "main", "cat /sub/file /one; ( : >>/one ) 2>/dev/null || echo no", "below\nwhole\nno")},
	{"subPathExpr is filled in from the environment", says("volumes", "main", "touch /expr/x && ls /disk/of-$POD/", "x")},
	{"hostPath is the host's folder, read-only", func(ctx context.Context, s *suite) error {
		if err := os.WriteFile(filepath.Join(s.Work, "out", "of-the-host"), []byte("hello\n"), 0o644); err != nil {
			return err
		}
		return says("volumes", "main", "cat /host/of-the-host; touch /host/x 2>/dev/null || echo no", "hello\nno")(ctx, s)
	}},
	{"downwardAPI: labels, an annotation, a limit, the address", func(ctx context.Context, s *suite) error {
		p, err := s.pod(ctx, "volumes")
		if err != nil {
			return err
		}
		return says("volumes", "main", `cat /info/labels; echo; cat /info/note; echo; cat /info/limit; echo; echo $POD $IP`,
			"app=\"volumes\"\nas annotated\n64\nvolumes-"+nodeName+" "+p.Status.PodIP)(ctx, s)
	}},
	{"an image is a volume, read-only, whole and by subPath", says("volumes", "main", "cat /page/index.html; ls /image/usr/sbin/nginx; touch /image/x 2>/dev/null || echo no",
		"<h1>Hello from a pod</h1>\n/image/usr/sbin/nginx\nno")},
}

var securityChecks = []check{
	{"hostUsers: false: root is nobody on the host, and owns its volumes", func(ctx context.Context, s *suite) error {
		m, err := s.k.sh(ctx, "userns", "main", "cat /proc/self/uid_map")
		if err != nil {
			return err
		}
		f := strings.Fields(m)
		if len(f) != 3 || f[0] != "0" || f[1] == "0" || f[2] != "65536" {
			return fmt.Errorf("uid_map is %q", m)
		}
		return says("userns", "main", "stat -c %u /disk/file /info/name; id -u; cat /info/name", "0\n0\n0\nuserns-"+nodeName)(ctx, s)
	}},
	{"runAsNonRoot: an image's numeric user and a chosen one run", func(ctx context.Context, s *suite) error {
		return errors.Join(says("nonroot", "number", "id -u", "1002")(ctx, s), says("nonroot", "chosen", "id -u; id -g; awk '/^(NoNewPrivs|CapBnd)/ {print $2}' /proc/self/status; touch /x 2>/dev/null || echo no",
			"1234\n5678\n0000000000000000\n1\nno")(ctx, s))
	}},
	{"runAsNonRoot: a user that is a name, or root, does not", func(ctx context.Context, s *suite) error {
		for name, why := range map[string]string{"name": "non-numeric user (www-data)", "root": "image will run as root"} {
			c, err := s.container(ctx, "rootless", name)
			if err != nil {
				return err
			}
			if w := c.State.Waiting; w == nil || w.Reason != "CreateContainerConfigError" || !strings.Contains(w.Message, why) {
				return fmt.Errorf("%s: %+v", name, c.State)
			}
		}
		return nil
	}},
	{"seccompDefault: filtered, but for who says Unconfined", func(ctx context.Context, s *suite) error {
		const script = "awk '/^Seccomp:/ {print $2}' /proc/1/status"
		return errors.Join(says("limits", "main", script, "2")(ctx, s), says("limits", "unconfined", script, "0")(ctx, s))
	}},
	{"limits of memory and processor are set and reported", limitsReported},
	{"too much memory: OOMKilled, 137", func(ctx context.Context, s *suite) error {
		return endedAs(ctx, s, "oom", v1.PodFailed, 137, 0, "OOMKilled")
	}},
}

func limitsReported(ctx context.Context, s *suite) error {
	c, err := s.container(ctx, "limits", "main")
	if err != nil {
		return err
	}
	if c.Resources == nil || c.Resources.Limits.Memory().Value() != 48<<20 || c.Resources.Limits.Cpu().MilliValue() != 500 {
		return fmt.Errorf("the status says %+v", c.Resources)
	}
	return says("limits", "main", e2e.Limits, "50331648\n50000")(ctx, s)
}
