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
	"syscall"
	"time"

	"github.com/naru-project/naru/hack/e2e"
	v1 "k8s.io/api/core/v1"
)

// summary is what is looked at of /stats/summary.
type summary struct {
	Node struct {
		Runtime struct {
			ImageFs struct{ UsedBytes, CapacityBytes, AvailableBytes, InodesUsed uint64 }
		}
	}
	Pods []struct {
		PodRef  struct{ Name string }
		Network *struct {
			Name             string
			RxBytes, TxBytes uint64
		}
		Memory     struct{ WorkingSetBytes uint64 }
		Containers []struct {
			Name   string
			CPU    struct{ UsageCoreNanoSeconds uint64 }
			Memory struct{ WorkingSetBytes uint64 }
			Rootfs struct{ UsedBytes *uint64 }
			Logs   struct{ UsedBytes *uint64 }
		}
	}
}

func (s *suite) summary(ctx context.Context) (*summary, error) {
	b, err := s.k.get(ctx, secureURL+"/stats/summary")
	if err != nil {
		return nil, err
	}
	var out summary
	return &out, json.Unmarshal(b, &out)
}

var statChecks = []check{
	{"/stats/summary: the file system of the images", imageFs},
	{"/stats/summary: every running container's processor, memory and disk", containerStats},
	{"/stats/summary: the network of pods", func(ctx context.Context, s *suite) error {
		sum, err := s.summary(ctx)
		if err != nil {
			return err
		}
		for _, p := range sum.Pods {
			if p.PodRef.Name == "hostport-"+nodeName && p.Network != nil && p.Network.Name == "eth0" && p.Network.RxBytes > 0 && p.Network.TxBytes > 0 {
				return nil
			}
		}
		return errors.New("none for pod hostport")
	}},
	{"/metrics/cadvisor: values with the labels of pods and containers", func(ctx context.Context, s *suite) error {
		pod := `namespace="default",pod="hostport-` + nodeName + `"`
		return errors.Join(
			s.metric(ctx, "container_memory_working_set_bytes", `container="web"`, `image="localhost/demo/nginx:1"`, pod),
			s.metric(ctx, "container_cpu_usage_seconds_total", `container="web"`, pod),
			s.metric(ctx, "container_network_receive_bytes_total", `container="POD"`, `interface="eth0"`, pod))
	}},
}

func imageFs(ctx context.Context, s *suite) error {
	sum, err := s.summary(ctx)
	if err != nil {
		return err
	}
	if fs := sum.Node.Runtime.ImageFs; fs.UsedBytes == 0 || fs.CapacityBytes == 0 || fs.AvailableBytes == 0 || fs.InodesUsed == 0 {
		return fmt.Errorf("imageFs is %+v", fs)
	}
	return nil
}

func containerStats(ctx context.Context, s *suite) error {
	sum, err := s.summary(ctx)
	if err != nil {
		return err
	}
	found := map[string]bool{}
	for _, p := range sum.Pods {
		for _, c := range p.Containers {
			if c.CPU.UsageCoreNanoSeconds > 0 && c.Memory.WorkingSetBytes > 0 && c.Rootfs.UsedBytes != nil && c.Logs.UsedBytes != nil {
				found[p.PodRef.Name+"/"+c.Name] = true
			}
		}
	}
	for name, c := range s.running() {
		if pod, container, _ := strings.Cut(name, "/"); !found[pod+"-"+nodeName+"/"+container] {
			return fmt.Errorf("none, or not all, for %s (%s)", name, c.ContainerID)
		}
	}
	return nil
}

// metric looks for a sample with all parts among its labels.
func (s *suite) metric(ctx context.Context, name string, parts ...string) error {
	b, err := s.k.get(ctx, secureURL+"/metrics/cadvisor")
	if err != nil {
		return err
	}
	for l := range strings.Lines(string(b)) {
		if strings.HasPrefix(l, name+"{") && !slices.ContainsFunc(parts, func(p string) bool { return !strings.Contains(l, p) }) {
			return nil
		}
	}
	return fmt.Errorf("no %s with %s", name, strings.Join(parts, " "))
}

// running returns the statuses of running containers by "pod/container", as
// the kubelet saw them last. The writer of pod logs ends by itself.
func (s *suite) running() map[string]v1.ContainerStatus {
	out := map[string]v1.ContainerStatus{}
	for name, p := range s.pods {
		for _, c := range p.Status.ContainerStatuses {
			if c.State.Running != nil && name != "logs" {
				out[name+"/"+c.Name] = c
			}
		}
	}
	return out
}

var restartChecks = []check{
	{"naru stopped and started: no container is touched", survives(func(ctx context.Context, s *suite) error { return s.RestartNaru(ctx, syscall.SIGTERM) })},
	{"naru killed and started, three times: no container is touched", survives(func(ctx context.Context, s *suite) error {
		for range 3 {
			if err := s.RestartNaru(ctx, syscall.SIGKILL); err != nil {
				return err
			}
		}
		return nil
	})},
	{"the kubelet killed and started: no container is touched", survives(func(ctx context.Context, s *suite) error {
		if err := s.StopKubelet(syscall.SIGKILL); err != nil {
			return err
		}
		return s.startKubelet(ctx, s.usual())
	})},
	{"a container that ends while naru is away is started again after", endsMeanwhile},
	{"a log through all of it: no line lost, none twice", steadyLog},
}

func steadyLog(_ context.Context, s *suite) error {
	files, err := s.logFiles("steady", "main")
	if err != nil {
		return err
	}
	return inOrder(files, 0)
}

// survives does something to the node and compares the containers before and
// after: the same ones run, and none was started again.
func survives(do func(context.Context, *suite) error) func(context.Context, *suite) error {
	var before map[string]v1.ContainerStatus
	return func(ctx context.Context, s *suite) error {
		if before == nil { // not again when the comparison is
			if err := s.refresh(ctx); err != nil {
				return err
			}
			before = s.running()
			if err := do(ctx, s); err != nil {
				return err
			}
			time.Sleep(2 * time.Second) // a relist or two of the kubelet's
		}
		if err := s.refresh(ctx); err != nil {
			return err
		}
		after := s.running()
		for name, was := range before {
			is, ok := after[name]
			if !ok || is.ContainerID != was.ContainerID || is.RestartCount != was.RestartCount || !is.State.Running.StartedAt.Equal(&was.State.Running.StartedAt) {
				return fmt.Errorf("%s was %s with %d restarts, now %+v", name, was.ContainerID, was.RestartCount, is)
			}
		}
		return nil
	}
}

// endsMeanwhile lets a container end between two daemons.
func endsMeanwhile(ctx context.Context, s *suite) error {
	c, err := s.container(ctx, "ends", "away")
	if err != nil || c.RestartCount == 1 {
		return err
	}
	if _, err := s.k.sh(ctx, "ends", "away", "touch /tmp/end"); err != nil {
		return err
	}
	w := e2e.Window{From: time.Now()}
	if err := s.Naru.Stop(syscall.SIGKILL); err != nil {
		return err
	}
	time.Sleep(2 * time.Second)
	err = s.StartNaru(ctx)
	w.To = time.Now().Add(3 * time.Second)
	s.Restarts = append(s.Restarts, w)
	return errors.Join(err, errors.New("not started again yet"))
}

// restartKubelet starts the kubelet, again if it runs, with other options.
func (s *suite) restartKubelet(ctx context.Context, o e2e.KubeletOptions) error {
	if err := s.StopKubelet(syscall.SIGTERM); err != nil {
		return err
	}
	return s.startKubelet(ctx, o)
}

var plainChecks = []check{
	{"no container is touched", func(ctx context.Context, s *suite) error { return untouched(ctx, s, "hostport", "web") }},
	{"/stats/summary: the file system of the images", imageFs},
	{"/stats/summary: every running container's processor, memory and disk", containerStats},
	{"what is missing is what docs/operations.md says: labels, and the network of pods", func(ctx context.Context, s *suite) error {
		sum, err := s.summary(ctx)
		if err != nil {
			return err
		}
		for _, p := range sum.Pods {
			if p.Network != nil && p.PodRef.Name == "hostport-"+nodeName {
				return errors.New("there is a pod's network: the documents are behind")
			}
		}
		if s.metric(ctx, "container_memory_working_set_bytes", `container="web"`) == nil {
			return errors.New("there are labels: the documents are behind")
		}
		return s.metric(ctx, "container_memory_working_set_bytes", `container=""`)
	}},
	{"short of disk: the kubelet removes the image that nobody uses, and no other", func(ctx context.Context, s *suite) error {
		images, err := s.Images(ctx)
		switch {
		case err != nil:
			return err
		case slices.Contains(images, unusedImage):
			return errors.New("it is still there")
		case !slices.Contains(images, "localhost/demo/nginx:1"):
			return errors.New("nginx's image is gone, too")
		}
		return untouched(ctx, s, "hostport", "web")
	}},
}

var eventedChecks = []check{
	{"no container is touched", func(ctx context.Context, s *suite) error { return untouched(ctx, s, "hostport", "web") }},
	{"a container's end reaches the kubelet as an event", eventRelists("one")},
	{"naru stopped and started: no container is touched", survives(func(ctx context.Context, s *suite) error { return s.RestartNaru(ctx, syscall.SIGTERM) })},
	{"a container's end still reaches the kubelet as an event", eventRelists("two")},
	{"naru killed and started, twice: no container is touched", survives(func(ctx context.Context, s *suite) error {
		return errors.Join(s.RestartNaru(ctx, syscall.SIGKILL), s.RestartNaru(ctx, syscall.SIGKILL))
	})},
	{"a container's end still reaches the kubelet as an event, after three restarts", eventRelists("three")},
	{"a log through all of it: no line lost, none twice", steadyLog},
}

// eventRelists lets a container end and looks for the kubelet's line that says
// that an event about it has asked for a relist.
func eventRelists(container string) func(context.Context, *suite) error {
	var id string
	return func(ctx context.Context, s *suite) error {
		if id == "" {
			c, err := s.container(ctx, "ends", container)
			if err != nil {
				return err
			}
			if _, err := s.k.sh(ctx, "ends", container, "touch /tmp/end"); err != nil {
				return err
			}
			_, id, _ = strings.Cut(c.ContainerID, "://")
		}
		b, err := os.ReadFile(s.Kubelet.Log)
		if err != nil {
			return err
		}
		for l := range strings.Lines(string(b)) {
			if strings.Contains(l, "Evented PLEG: requested pod relist") && strings.Contains(l, id) {
				return nil
			}
		}
		return fmt.Errorf("no relist for container %s", id)
	}
}

var endChecks = []check{
	{"all pods go when their manifests go", func(ctx context.Context, s *suite) error {
		files, err := filepath.Glob(filepath.Join(s.Work, "manifests", "*.yaml"))
		if err != nil {
			return err
		}
		for _, f := range files {
			if err := os.Remove(f); err != nil {
				return err
			}
		}
		if err := s.refresh(ctx); err != nil {
			return err
		}
		if len(s.pods) > 0 {
			return fmt.Errorf("%d pods are left", len(s.pods))
		}
		return nil
	}},
	{"and what a kubelet would collect later can be removed", func(ctx context.Context, s *suite) error { return s.RemoveAll(ctx) }},
}
