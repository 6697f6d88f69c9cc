package main

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/naru-project/naru/hack/e2e"
	v1 "k8s.io/api/core/v1"
)

//go:embed pods/*.yaml
var manifests embed.FS

// options are the command line.
type options struct{ work, bin, cgroup, expected, dropins, results string }

// suite is one run: a node, its pods, and what has been found.
type suite struct {
	opts options
	*e2e.Node
	k     *kubelet
	page  *e2e.Page
	pods  map[string]*v1.Pod // as the kubelet saw them last
	seen  map[string]time.Time
	ready map[string]time.Time
}

// nodeName is part of the names of static pods.
const nodeName = "naru-e2e"

// check is one feature. Do is tried again until it succeeds or patience ends.
type check struct {
	feature string
	do      func(context.Context, *suite) error
}

// part is a stretch of the run with one set-up.
type part struct {
	name   string
	begin  func(context.Context, *suite) error
	checks []check
}

func run(ctx context.Context, o options) (err error) {
	s := &suite{opts: o, k: newKubelet(), seen: map[string]time.Time{}, ready: map[string]time.Time{}}
	s.Node = e2e.NewNode(e2e.Node{Name: nodeName, IP: nodeIP, Work: o.work, Bin: o.bin, CgroupRoot: o.cgroup})
	s.page = e2e.NewPage("The kubelet and naru", "kubelet-e2e", s.alive)
	defer func() { err = errors.Join(err, s.Stop()) }()
	if err := os.Mkdir(filepath.Join(o.work, "out"), 0o755); err != nil {
		return err
	}
	for _, part := range parts {
		s.page.Part(part.name, func() error {
			if part.begin == nil {
				return nil
			}
			return part.begin(ctx, s)
		})
		for _, c := range part.checks {
			s.page.Check(ctx, c.feature, func() error { return c.do(ctx, s) })
		}
	}
	s.table()
	return s.page.Write(o.results)
}

func (s *suite) alive() error { return errors.Join(s.Naru.Ended(), s.Kubelet.Ended()) }

// table adds how long each pod took from the kubelet's first sight of it to
// where its manifest leads.
func (s *suite) table() {
	s.page.Table("Pods, all at once", "pod", "seen to ready or ended, seconds")
	var names []string
	for name := range s.ready {
		names = append(names, name)
	}
	slices.SortFunc(names, func(a, b string) int { return s.ready[a].Compare(s.ready[b]) })
	for _, name := range names {
		took := s.ready[name].Sub(s.seen[name]).Seconds()
		fmt.Printf("     %6.2f s from seen to there: %s\n", took, name)
		s.page.Row(name, fmt.Sprintf("%.2f", took))
	}
}

// refresh asks the kubelet for its pods.
func (s *suite) refresh(ctx context.Context) (err error) {
	s.pods, err = s.k.pods(ctx)
	return err
}

// pod returns a pod as the kubelet sees it now.
func (s *suite) pod(ctx context.Context, name string) (*v1.Pod, error) {
	if err := s.refresh(ctx); err != nil {
		return nil, err
	}
	p := s.pods[name]
	if p == nil {
		return nil, fmt.Errorf("the kubelet has no pod %s", name)
	}
	return p, nil
}

// container returns a container's status, of an init container too.
func (s *suite) container(ctx context.Context, pod, name string) (*v1.ContainerStatus, error) {
	p, err := s.pod(ctx, pod)
	if err != nil {
		return nil, err
	}
	all := slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses)
	i := slices.IndexFunc(all, func(c v1.ContainerStatus) bool { return c.Name == name })
	if i < 0 {
		return nil, fmt.Errorf("pod %s has no status of container %s (phase %s)", pod, name, p.Status.Phase)
	}
	return &all[i], nil
}

// manifest returns a manifest for this run.
func (s *suite) manifest(name string) ([]byte, error) {
	b, err := manifests.ReadFile("pods/" + name + ".yaml")
	if err != nil {
		return nil, err
	}
	return []byte(strings.NewReplacer("@WORK@", s.Work, "@AGENT@", filepath.Join(s.Work, "agent")).Replace(string(b))), nil
}

// add gives the kubelet a manifest, whole at once.
func (s *suite) add(name string) error {
	b, err := s.manifest(name)
	if err != nil {
		return err
	}
	file := filepath.Join(s.Work, "manifests", name+".yaml")
	if err := os.WriteFile(filepath.Join(filepath.Dir(file), "."+name), b, 0o600); err != nil {
		return err
	}
	s.seen[name] = time.Now()
	return os.Rename(filepath.Join(filepath.Dir(file), "."+name), file)
}

// take takes a manifest away.
func (s *suite) take(name string) error {
	return os.Remove(filepath.Join(s.Work, "manifests", name+".yaml"))
}

// there says whether a pod is where its manifest leads.
func there(p *v1.Pod) bool {
	if p.Status.Phase == v1.PodSucceeded || p.Status.Phase == v1.PodFailed {
		return true
	}
	return slices.ContainsFunc(p.Status.Conditions, func(c v1.PodCondition) bool { return c.Type == v1.PodReady && c.Status == v1.ConditionTrue })
}

// addAll gives the kubelet all manifests and waits until each pod is where it
// is to go. Rootless is to go nowhere.
func (s *suite) addAll(ctx context.Context) error {
	files, err := fs.Glob(manifests, "pods/*.yaml")
	if err != nil {
		return err
	}
	for _, f := range files {
		if err := s.add(strings.TrimSuffix(filepath.Base(f), ".yaml")); err != nil {
			return err
		}
	}
	return e2e.Eventually(ctx, 2*time.Minute, func() error {
		if err := errors.Join(s.alive(), s.refresh(ctx)); err != nil {
			return err
		}
		var waiting []string
		for name := range s.seen {
			if _, ok := s.ready[name]; ok || name == "rootless" {
				continue
			}
			if p := s.pods[name]; p != nil && there(p) {
				s.ready[name] = time.Now()
			} else {
				waiting = append(waiting, name)
			}
		}
		if len(waiting) > 0 {
			slices.Sort(waiting)
			return fmt.Errorf("not there yet: %s", strings.Join(waiting, ", "))
		}
		return nil
	})
}
