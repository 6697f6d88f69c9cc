package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/naru-project/naru/hack/e2e"
	"google.golang.org/grpc"
	v1 "k8s.io/api/core/v1"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func (c *cluster) volumeChecks(ctx context.Context) {
	c.page.Part("ConfigMaps, Secrets, tokens", func() error { return c.begin(ctx, "volumes", "volumes", "userns") })
	c.page.Check(ctx, "a ConfigMap as files, as one file, in the environment", func() error {
		return c.says(ctx, "volumes", `cat /settings/colour; echo; cat /words; echo; echo $COLOUR; touch /settings/x 2>/dev/null || echo no`, "blue\nas they were\nblue\nno")
	})
	c.page.Check(ctx, "a changed ConfigMap is seen by the container", func() error {
		if _, err := c.kubectl(ctx, "patch", "configmap", "settings", "-p", `{"data":{"colour":"green"}}`); err != nil {
			return err
		}
		return c.says(ctx, "volumes", "cat /settings/colour /words", "greenas they were")
	})
	c.page.Check(ctx, "a Secret for one user's group alone, and in the environment", func() error {
		return c.says(ctx, "volumes", `cat /secret/password; echo; stat -L -c '%a %g' /secret/password; id -G; echo $SECRET_password; awk '$2 == "/secret" {print $3}' /proc/mounts`,
			"open sesame\n440 5678\n0 5678\nopen sesame\ntmpfs")
	})
	c.page.Check(ctx, "a token by which the API server knows the pod", func() error { return c.known(ctx, "volumes") })
	c.page.Check(ctx, "hostUsers: false: root of the pod is nobody on the node, and owns its Secret and token", func() error {
		m, err := c.sh(ctx, "userns", "cat /proc/self/uid_map")
		if err != nil {
			return err
		}
		if f := strings.Fields(m); len(f) != 3 || f[0] != "0" || f[1] == "0" || f[2] != "65536" {
			return fmt.Errorf("uid_map is %q", m)
		}
		return errors.Join(c.says(ctx, "userns", "cat /secret/password; echo; stat -L -c '%a %u' /secret/password /token/token", "open sesame\n400 0\n600 0"), c.known(ctx, "userns"))
	})
}

// known asks the API server whose a pod's token is.
func (c *cluster) known(ctx context.Context, pod string) error {
	token, err := c.sh(ctx, pod, "cat /token/token")
	if err != nil {
		return err
	}
	// Without the administrator's certificate, which would be believed first.
	out, err := c.kubectl(ctx, "--kubeconfig", "/dev/null", "--server", apiURL, "--certificate-authority", c.ca.file("ca.crt"), "--token", token, "auth", "whoami", "-o", "json")
	if err != nil {
		return errors.New("the token of pod " + pod + " is not accepted") // the command line has the token
	}
	var review struct {
		Status struct {
			UserInfo struct {
				Username string
				Extra    map[string][]string
			}
		}
	}
	if err := json.Unmarshal([]byte(out), &review); err != nil {
		return err
	}
	who := review.Status.UserInfo
	return errors.Join(e2e.Want("user", who.Username, "system:serviceaccount:e2e:robot"),
		e2e.Want("pod", strings.Join(who.Extra["authentication.kubernetes.io/pod-name"], " "), pod))
}

func (c *cluster) classChecks(ctx context.Context) {
	c.page.Part("RuntimeClasses", func() error { return c.apply(ctx, "classes") })
	for _, class := range []string{"native", "runc"} {
		c.page.Check(ctx, "a pod of RuntimeClass "+class+" answers", func() error {
			if err := c.ready(ctx, class); err != nil {
				return err
			}
			p, err := c.pod(ctx, class)
			if err != nil {
				return err
			}
			return fetch(ctx, "http://"+p.Status.PodIP+"/")
		})
	}
	c.page.Check(ctx, "a handler that naru does not have: the pod's events say so", func() error {
		out, err := c.kubectl(ctx, "get", "events", "--field-selector", "involvedObject.name=nowhere,reason=FailedCreatePodSandBox", "-o", "jsonpath={.items[*].message}")
		if err == nil && (!strings.Contains(out, "nowhere") || !strings.Contains(out, "handler")) {
			err = fmt.Errorf("the events say %q", out)
		}
		return err
	})
	c.page.Check(ctx, "the three pods are deleted", func() error {
		_, err := c.kubectl(ctx, "delete", "pod", "native", "runc", "nowhere", "--ignore-not-found", "--timeout=60s")
		return err
	})
}

func (c *cluster) resizeChecks(ctx context.Context) {
	c.page.Part("Resize", func() error { return c.begin(ctx, "resize", "containers", "whole") })
	c.page.Check(ctx, "a container gets more, in place", func() error {
		return c.resized(ctx, "stays", `{"requests":{"cpu":"200m","memory":"48Mi"},"limits":{"cpu":"500m","memory":"96Mi"}}`, "100663296\n50000", 0)
	})
	c.page.Check(ctx, "and less again", func() error {
		return c.resized(ctx, "stays", `{"requests":{"cpu":"100m","memory":"16Mi"},"limits":{"cpu":"100m","memory":"48Mi"}}`, "50331648\n10000", 0)
	})
	c.page.Check(ctx, "a container that wants it is started again for it", func() error {
		return c.resized(ctx, "again", `{"requests":{"memory":"48Mi"},"limits":{"memory":"96Mi"}}`, "100663296\n20000", 1)
	})
	c.page.Check(ctx, "a pod gets more, in place", func() error {
		if _, err := c.kubectl(ctx, "patch", "pod", "whole", "--subresource", "resize", "-p", `{"spec":{"resources":{"requests":{"cpu":"300m","memory":"96Mi"},"limits":{"cpu":"600m","memory":"192Mi"}}}}`); err != nil {
			return err
		}
		p, err := c.pod(ctx, "whole")
		if err != nil {
			return err
		}
		if r := p.Status.Resources; r == nil || r.Limits.Memory().Value() != 192<<20 || r.Limits.Cpu().MilliValue() != 600 || p.Status.ContainerStatuses[0].RestartCount != 0 {
			return fmt.Errorf("the status says %+v, %d restarts", r, p.Status.ContainerStatuses[0].RestartCount)
		}
		return c.podLimits(p, "60000", "201326592")
	})
}

// resized resizes a container of pod containers and looks at its status and into it.
func (c *cluster) resized(ctx context.Context, container, resources, inside string, restarts int32) error {
	patch := fmt.Sprintf(`{"spec":{"containers":[{"name":%q,"resources":%s}]}}`, container, resources)
	if _, err := c.kubectl(ctx, "patch", "pod", "containers", "--subresource", "resize", "-p", patch); err != nil {
		return err
	}
	p, err := c.pod(ctx, "containers")
	if err != nil {
		return err
	}
	i := slices.IndexFunc(p.Status.ContainerStatuses, func(s v1.ContainerStatus) bool { return s.Name == container })
	s := p.Status.ContainerStatuses[i]
	var want v1.ResourceRequirements
	if err := json.Unmarshal([]byte(resources), &want); err != nil {
		return err
	}
	if s.RestartCount != restarts || s.Resources == nil || !s.Resources.Limits.Memory().Equal(*want.Limits.Memory()) {
		return fmt.Errorf("%d restarts, want %d; the status says %+v", s.RestartCount, restarts, s.Resources)
	}
	// Only then: the kubelet complains when a container cannot be reached.
	out, err := c.kubectl(ctx, "exec", "containers", "-c", container, "--", "sh", "-c", e2e.Limits)
	return errors.Join(err, e2e.Want("limits", out, inside))
}

// podLimits compares the limits of a pod's own cgroup.
func (c *cluster) podLimits(p *v1.Pod, cpu, memory string) error {
	i := slices.IndexFunc(c.nodes, func(n *node) bool { return n.Name == p.Spec.NodeName })
	found := map[string]string{}
	for _, dir := range c.nodes[i].cgroups() {
		if !strings.Contains(filepath.Base(dir), strings.ReplaceAll(string(p.UID), "-", "")) && !strings.Contains(filepath.Base(dir), string(p.UID)) {
			continue
		}
		for name, file := range map[string]string{"cpu.max": "cpu", "cpu.cfs_quota_us": "cpu", "memory.max": "memory", "memory.limit_in_bytes": "memory"} {
			if b, err := os.ReadFile(filepath.Join(dir, name)); err == nil {
				found[file] = strings.Fields(string(b))[0]
			}
		}
	}
	return errors.Join(e2e.Want("processor", found["cpu"], cpu), e2e.Want("memory", found["memory"], memory))
}

// cgroups are the cgroups of a node's pods and containers, in every hierarchy.
func (n *node) cgroups() (dirs []string) {
	roots, _ := filepath.Glob("/sys/fs/cgroup" + n.CgroupRoot)
	v1, _ := filepath.Glob("/sys/fs/cgroup/*" + n.CgroupRoot)
	for _, root := range append(roots, v1...) {
		_ = filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
			if err == nil && d.IsDir() && strings.HasPrefix(d.Name(), "pod") {
				dirs = append(dirs, path)
			}
			return nil
		})
	}
	return dirs
}

// empty says what of pods is left on a node.
func (n *node) empty(ctx context.Context) error {
	var left []string
	err := n.Ask(ctx, func(ctx context.Context, conn *grpc.ClientConn) error {
		r := criv1.NewRuntimeServiceClient(conn)
		containers, err := r.ListContainers(ctx, &criv1.ListContainersRequest{})
		if err != nil {
			return err
		}
		pods, err := r.ListPodSandbox(ctx, &criv1.ListPodSandboxRequest{})
		if n := len(containers.GetContainers()) + len(pods.GetItems()); n > 0 {
			left = append(left, fmt.Sprintf("%d containers and sandboxes", n))
		}
		return err
	})
	if err != nil {
		return err
	}
	links, err := output(n.inside(ctx, "ip", "-o", "link", "show"))
	if err != nil {
		return err
	}
	for l := range strings.Lines(links) {
		if f := strings.Fields(l); !strings.HasPrefix(f[1], "lo:") && !strings.HasPrefix(f[1], "uplink0") {
			left = append(left, "link "+f[1])
		}
	}
	left = append(left, n.cgroups()...)
	for _, dir := range []string{"run/netns", "kubelet/pods", "podlogs"} {
		entries, err := os.ReadDir(filepath.Join(n.Work, dir))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		for _, e := range entries {
			left = append(left, filepath.Join(dir, e.Name()))
		}
	}
	if len(left) > 0 {
		return errors.New(strings.Join(left, ", "))
	}
	return nil
}
