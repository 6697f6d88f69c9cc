package main

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// worker lives the lives of pods, one after the other.
type worker struct {
	*model
	n   int
	rnd *rand.Rand
	seq int
	now *pod
}

// pod and container are what the model knows of them.
type pod struct {
	id, name string
	config   *cri.PodSandboxConfig
	ready    bool
	members  []*container
}

type container struct {
	id, name string
	config   *cri.ContainerConfig
	state    cri.ContainerState
	kind     kind
	code     int32 // that it ends with by itself, or on a signal
	lines    int   // on stdout, and as many on stderr
	stopped  bool  // by us: the code is that of the signal
}

// kind is what a container does.
type kind int

const (
	writes  kind = iota // numbered lines, then ends with its code
	sleeps              // PID 1 without a handler: only SIGKILL ends it
	handles             // ends with its code on SIGTERM
	kinds
)

func (c *container) command() []string {
	switch c.kind {
	case writes:
		return []string{"sh", "-c", fmt.Sprintf("seq 1 %d; seq 1 %d >&2; exit %d", c.lines, c.lines, c.code)}
	case handles:
		return []string{"sh", "-c", fmt.Sprintf("trap 'exit %d' TERM; echo 1; echo 1 >&2; while :; do sleep 0.02; done", c.code)}
	}
	return []string{"sleep", "1000000"}
}

// pod is the life of one pod. An error is a valid call that failed.
func (w *worker) pod(ctx context.Context) error {
	w.seq++
	p := &pod{name: fmt.Sprintf("model-%s-%d-%d", w.run, w.n, w.seq)}
	p.config = w.podConfig(p.name, "model")
	if w.rnd.IntN(4) == 0 {
		p.config.Linux.SecurityContext.NamespaceOptions.Pid = cri.NamespaceMode_POD
	}
	if err := os.MkdirAll(p.config.LogDirectory, 0o755); err != nil {
		return err
	}
	defer os.RemoveAll(p.config.LogDirectory)
	w.now = p
	for _, f := range []func(context.Context, *pod) error{w.runPod, w.fill, w.lists, w.endSome, w.stopPod, w.removePod} {
		if err := f(ctx, p); err != nil {
			return fmt.Errorf("pod %s: %w", p.name, err)
		}
	}
	w.count(func(r *Report) { r.Pods++ })
	w.now = nil
	return nil
}

func (w *worker) podConfig(name, hostname string) *cri.PodSandboxConfig {
	return &cri.PodSandboxConfig{
		Metadata: &cri.PodSandboxMetadata{Name: name, Uid: name, Namespace: "crimodel"},
		Hostname: hostname, LogDirectory: filepath.Join(w.o.LogDir, name),
		Labels:      map[string]string{runLabel: w.run, "pod": name},
		Annotations: map[string]string{"note": "of " + name},
		Linux:       &cri.LinuxPodSandboxConfig{CgroupParent: w.o.CgroupParent, SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: &cri.NamespaceOption{}}},
	}
}

// cleanUp removes what a life that broke off has left.
func (w *worker) cleanUp(ctx context.Context) {
	if p := w.now; p != nil && p.id != "" {
		_, _ = retry(ctx, w, "StopPodSandbox", &cri.StopPodSandboxRequest{PodSandboxId: p.id}, w.rt.StopPodSandbox)
		_, _ = retry(ctx, w, "RemovePodSandbox", &cri.RemovePodSandboxRequest{PodSandboxId: p.id}, w.rt.RemovePodSandbox)
		w.dropIP(p.name)
	}
}

func (w *worker) runPod(ctx context.Context, p *pod) error {
	q := &cri.RunPodSandboxRequest{Config: p.config}
	answers, err := several(ctx, w, "RunPodSandbox", q, w.rt.RunPodSandbox)
	for _, a := range answers {
		if p.id != "" && a.PodSandboxId != p.id {
			w.violate(ruleSameID, "pod %s is %s and %s", p.name, p.id, a.PodSandboxId)
		}
		p.id = a.PodSandboxId
		w.given(p.id, p.name)
	}
	if err != nil {
		return err
	}
	p.ready = true
	if w.rnd.IntN(4) == 0 {
		other := w.podConfig(p.name, "another")
		a, err := retry(ctx, w, "RunPodSandbox", &cri.RunPodSandboxRequest{Config: other}, w.rt.RunPodSandbox)
		if err == nil {
			w.violate(ruleOther, "pod %s with another hostname is %s", p.name, a.PodSandboxId)
		}
	}
	return w.checkPod(ctx, p)
}

func (w *worker) checkPod(ctx context.Context, p *pod) error {
	a, err := retry(ctx, w, "PodSandboxStatus", &cri.PodSandboxStatusRequest{PodSandboxId: p.id}, w.rt.PodSandboxStatus)
	if err != nil {
		return fmt.Errorf("PodSandboxStatus: %w", err)
	}
	s := a.Status
	want := cri.PodSandboxState_SANDBOX_NOTREADY
	if p.ready {
		want = cri.PodSandboxState_SANDBOX_READY
	}
	if s.GetState() != want {
		w.violate(ruleState, "pod %s is %v, not %v", p.name, s.GetState(), want)
	}
	md := s.GetMetadata()
	if s.GetId() != p.id || md.GetName() != p.name || md.GetUid() != p.name || md.GetNamespace() != "crimodel" ||
		!maps.Equal(s.GetLabels(), p.config.Labels) || s.GetAnnotations()["note"] != p.config.Annotations["note"] {
		w.violate(ruleIdentity, "pod %s came back as %v", p.name, s)
	}
	if p.ready {
		w.takeIP(s.GetNetwork().GetIp(), p.name)
	}
	return nil
}

// fill makes one to three containers and starts most of them.
func (w *worker) fill(ctx context.Context, p *pod) error {
	for i := range 1 + w.rnd.IntN(3) {
		c := &container{name: fmt.Sprintf("c%d", i), kind: kind(w.rnd.IntN(int(kinds))), code: int32(w.rnd.IntN(200)), lines: 1 + w.rnd.IntN(w.o.Lines)}
		c.config = &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: c.name}, Image: &cri.ImageSpec{Image: w.o.Image}, Command: c.command(),
			LogPath: c.name + ".log", Labels: map[string]string{runLabel: w.run, "pod": p.name, "name": c.name},
			Annotations: map[string]string{"note": "of " + c.name},
			Linux:       &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{NamespaceOptions: p.config.Linux.SecurityContext.NamespaceOptions}},
		}
		if err := w.create(ctx, p, c); err != nil {
			return err
		}
		if w.rnd.IntN(8) == 0 {
			continue // never started
		}
		if err := w.start(ctx, p, c); err != nil {
			return err
		}
	}
	return nil
}

func (w *worker) create(ctx context.Context, p *pod, c *container) error {
	q := &cri.CreateContainerRequest{PodSandboxId: p.id, Config: c.config, SandboxConfig: p.config}
	answers, err := several(ctx, w, "CreateContainer", q, w.rt.CreateContainer)
	for _, a := range answers {
		if c.id != "" && a.ContainerId != c.id {
			w.violate(ruleSameID, "container %s of %s is %s and %s", c.name, p.name, c.id, a.ContainerId)
		}
		c.id = a.ContainerId
		w.given(c.id, p.name+"/"+c.name)
	}
	if err != nil {
		return err
	}
	c.state = cri.ContainerState_CONTAINER_CREATED
	p.members = append(p.members, c)
	w.count(func(r *Report) { r.Containers++ })
	if w.rnd.IntN(4) == 0 {
		other := &cri.ContainerConfig{Metadata: c.config.Metadata, Image: c.config.Image, Command: []string{"true"}, Linux: c.config.Linux}
		a, err := retry(ctx, w, "CreateContainer", &cri.CreateContainerRequest{PodSandboxId: p.id, Config: other, SandboxConfig: p.config}, w.rt.CreateContainer)
		if err == nil {
			w.violate(ruleOther, "container %s of %s with another command is %s", c.name, p.name, a.ContainerId)
		}
	}
	return w.checkContainer(ctx, p, c)
}

func (w *worker) start(ctx context.Context, p *pod, c *container) error {
	q := &cri.StartContainerRequest{ContainerId: c.id}
	cut := 0
	if w.rnd.IntN(4) == 0 {
		if _, ok := impatient(ctx, w, "StartContainer", q, w.rt.StartContainer); !ok {
			cut = 1
		} else {
			c.state = cri.ContainerState_CONTAINER_RUNNING
		}
	}
	if c.state == cri.ContainerState_CONTAINER_CREATED {
		_, n, err := retried(ctx, w, "StartContainer", q, w.rt.StartContainer)
		if err != nil && cut+n > 0 { // one that was cut short may have started it, or failed for good
			s, serr := w.status(ctx, c)
			if serr == nil && s.State == cri.ContainerState_CONTAINER_EXITED && s.Reason == "StartError" {
				w.count(func(r *Report) { r.Failed++ })
				c.state = s.State
				return nil
			}
			if serr == nil && s.State != cri.ContainerState_CONTAINER_CREATED {
				err = nil
			}
		}
		if err != nil {
			return fmt.Errorf("StartContainer %s: %w", c.name, err)
		}
		c.state = cri.ContainerState_CONTAINER_RUNNING
	}
	if w.rnd.IntN(4) == 0 {
		if _, err := retry(ctx, w, "StartContainer", q, w.rt.StartContainer); err == nil {
			w.violate(ruleRestart, "container %s of %s was started a second time", c.name, p.name)
		}
	}
	if err := w.checkContainer(ctx, p, c); err != nil || c.kind == writes {
		return err
	}
	return w.exec(ctx, p, c)
}

func (w *worker) exec(ctx context.Context, p *pod, c *container) error {
	code := int32(w.rnd.IntN(100))
	a, err := retry(ctx, w, "ExecSync", &cri.ExecSyncRequest{
		ContainerId: c.id, Timeout: 20, Cmd: []string{"sh", "-c", fmt.Sprintf("echo out of %s; echo err >&2; exit %d", p.name, code)},
	}, w.rt.ExecSync)
	if err != nil {
		return fmt.Errorf("ExecSync in %s: %w", c.name, err)
	}
	if string(a.Stdout) != "out of "+p.name+"\n" || string(a.Stderr) != "err\n" || a.ExitCode != code {
		w.violate(ruleExec, "container %s of %s: %q, %q, code %d, not %d", c.name, p.name, a.Stdout, a.Stderr, a.ExitCode, code)
	}
	return nil
}

func (w *worker) status(ctx context.Context, c *container) (*cri.ContainerStatus, error) {
	a, err := retry(ctx, w, "ContainerStatus", &cri.ContainerStatusRequest{ContainerId: c.id}, w.rt.ContainerStatus)
	if err != nil {
		return nil, fmt.Errorf("ContainerStatus of %s: %w", c.name, err)
	}
	if a.Status == nil {
		return &cri.ContainerStatus{}, nil
	}
	return a.Status, nil
}

// checkContainer holds a status against what the container must be.
func (w *worker) checkContainer(ctx context.Context, p *pod, c *container) error {
	s, err := w.status(ctx, c)
	if err != nil {
		return err
	}
	switch c.state {
	case cri.ContainerState_CONTAINER_RUNNING:
		if s.State != c.state && (c.kind != writes || s.State != cri.ContainerState_CONTAINER_EXITED) {
			w.violate(ruleState, "container %s of %s (%v) runs and is %v, code %d, %s: %s", c.name, p.name, c.config.Command, s.State, s.ExitCode, s.Reason, s.Message)
		}
	default:
		if s.State != c.state {
			w.violate(ruleState, "container %s of %s is %v, not %v", c.name, p.name, s.State, c.state)
		}
	}
	if s.Id != c.id || s.Metadata.GetName() != c.name || !maps.Equal(s.Labels, c.config.Labels) || s.Annotations["note"] != c.config.Annotations["note"] {
		w.violate(ruleIdentity, "container %s of %s came back as %v", c.name, p.name, s)
	}
	started := s.State == cri.ContainerState_CONTAINER_RUNNING || s.State == cri.ContainerState_CONTAINER_EXITED && c.state == cri.ContainerState_CONTAINER_RUNNING
	ended := s.State == cri.ContainerState_CONTAINER_EXITED
	if s.CreatedAt <= 0 || started && s.StartedAt < s.CreatedAt || ended && s.FinishedAt < max(s.StartedAt, s.CreatedAt) ||
		!ended && s.FinishedAt != 0 || s.State == cri.ContainerState_CONTAINER_CREATED && s.StartedAt != 0 {
		w.violate(ruleTimes, "container %s of %s is %v: created %d, started %d, finished %d", c.name, p.name, s.State, s.CreatedAt, s.StartedAt, s.FinishedAt)
	}
	return nil
}

// lists holds what lists say against what there is.
func (w *worker) lists(ctx context.Context, p *pod) error {
	pods, err := retry(ctx, w, "ListPodSandbox", &cri.ListPodSandboxRequest{}, w.rt.ListPodSandbox)
	if err != nil {
		return fmt.Errorf("ListPodSandbox: %w", err)
	}
	all := func(items []*cri.PodSandbox) (ids []string) {
		for _, i := range items {
			if i.Labels["pod"] == p.name {
				ids = append(ids, i.Id)
			}
		}
		return ids
	}
	if got := all(pods.Items); !slices.Equal(got, []string{p.id}) {
		w.violate(ruleFilter, "the list of all pods has %s as %v", p.name, got)
	}
	for what, f := range map[string]*cri.PodSandboxFilter{
		"its id":       {Id: p.id},
		"its label":    {LabelSelector: map[string]string{"pod": p.name}},
		"its state":    {Id: p.id, State: &cri.PodSandboxStateValue{State: cri.PodSandboxState_SANDBOX_READY}},
		"another":      {Id: p.id, State: &cri.PodSandboxStateValue{State: cri.PodSandboxState_SANDBOX_NOTREADY}},
		"a half label": {LabelSelector: map[string]string{"pod": p.name, "name": "none"}},
	} {
		a, err := retry(ctx, w, "ListPodSandbox", &cri.ListPodSandboxRequest{Filter: f}, w.rt.ListPodSandbox)
		if err != nil {
			return fmt.Errorf("ListPodSandbox by %s: %w", what, err)
		}
		var want []string
		if strings.HasPrefix(what, "its") {
			want = []string{p.id}
		}
		var got []string
		for _, i := range a.Items {
			got = append(got, i.Id)
		}
		if !slices.Equal(got, want) {
			w.violate(ruleFilter, "pod %s by %s: %v", p.name, what, got)
		}
	}
	return w.listMembers(ctx, p)
}

func (w *worker) listMembers(ctx context.Context, p *pod) error {
	states := map[string]cri.ContainerState{}
	var want []string
	for _, c := range p.members {
		want = append(want, c.id)
		states[c.id] = c.state
	}
	slices.Sort(want)
	for what, f := range map[string]*cri.ContainerFilter{
		"the pod":       {PodSandboxId: p.id},
		"the label":     {LabelSelector: map[string]string{"pod": p.name}},
		"label and pod": {PodSandboxId: p.id, LabelSelector: map[string]string{runLabel: w.run}},
		"nothing":       {PodSandboxId: p.id, LabelSelector: map[string]string{"name": "none"}},
	} {
		a, err := retry(ctx, w, "ListContainers", &cri.ListContainersRequest{Filter: f}, w.rt.ListContainers)
		if err != nil {
			return fmt.Errorf("ListContainers by %s: %w", what, err)
		}
		var got []string
		for _, c := range a.Containers {
			got = append(got, c.Id)
			if c.PodSandboxId != p.id {
				w.violate(ruleFilter, "container %s is listed for pod %s, not %s", c.Id, c.PodSandboxId, p.id)
			}
			if s := states[c.Id]; s == cri.ContainerState_CONTAINER_CREATED && c.State != s {
				w.violate(ruleState, "container %s was never started and is listed as %v", c.Id, c.State)
			}
		}
		slices.Sort(got)
		if what == "nothing" && len(got) != 0 || what != "nothing" && !slices.Equal(got, want) {
			w.violate(ruleFilter, "containers of pod %s by %s: %v, not %v", p.name, what, got, want)
		}
	}
	return nil
}

// endSome waits for those that end, stops some of the others, and removes some.
func (w *worker) endSome(ctx context.Context, p *pod) error {
	for _, c := range slices.Clone(p.members) {
		if c.kind == writes && c.state == cri.ContainerState_CONTAINER_RUNNING {
			if err := w.awaitExit(ctx, p, c); err != nil {
				return err
			}
		} else if w.rnd.IntN(2) == 0 && c.state != cri.ContainerState_CONTAINER_EXITED {
			if err := w.stop(ctx, p, c); err != nil {
				return err
			}
		}
		if c.state == cri.ContainerState_CONTAINER_EXITED && w.rnd.IntN(2) == 0 || w.rnd.IntN(8) == 0 {
			if err := w.remove(ctx, p, c); err != nil {
				return err
			}
		}
	}
	return nil
}

func (w *worker) awaitExit(ctx context.Context, p *pod, c *container) error {
	for end := time.Now().Add(w.o.Patience); ; time.Sleep(20 * time.Millisecond) {
		s, err := w.status(ctx, c)
		if err != nil {
			return err
		}
		if s.State == cri.ContainerState_CONTAINER_EXITED {
			return w.ended(ctx, p, c)
		}
		if time.Now().After(end) {
			return fmt.Errorf("container %s has not ended after %v: it is %v", c.name, w.o.Patience, s.State)
		}
	}
}

// ended checks the end of a container: code, times, log.
func (w *worker) ended(ctx context.Context, p *pod, c *container) error {
	ran := c.state == cri.ContainerState_CONTAINER_RUNNING
	c.state = cri.ContainerState_CONTAINER_EXITED
	s, err := w.status(ctx, c)
	if err != nil {
		return err
	}
	if err := w.checkContainer(ctx, p, c); err != nil {
		return err
	}
	unknown := w.o.UnknownExits && strings.Contains(s.Reason, "Unknown")
	want := []int32{c.code}
	switch {
	case !ran:
		want = nil // it never had a process of its own
	case c.stopped && c.kind == handles:
		want = []int32{c.code, 137, 143} // a signal may come before the handler is there
	case c.stopped && p.config.Linux.SecurityContext.NamespaceOptions.Pid == cri.NamespaceMode_POD:
		want = []int32{137, 143} // it is no PID 1, a signal without a handler ends it
	case c.stopped:
		want = []int32{137}
	}
	w.count(func(r *Report) {
		r.Exits++
		if unknown {
			r.Unknown++
		}
	})
	if want != nil && !unknown && !slices.Contains(want, s.ExitCode) {
		w.violate(ruleExit, "container %s of %s (%v) ended with %d (%s: %s), not %v", c.name, p.name, c.config.Command, s.ExitCode, s.Reason, s.Message, want)
	}
	if !ran || c.stopped {
		return nil
	}
	return w.checkLog(p, c)
}

func (w *worker) checkLog(p *pod, c *container) error {
	f, err := os.Open(filepath.Join(p.config.LogDirectory, c.config.LogPath))
	if err != nil {
		w.violate(ruleLog, "container %s of %s: %v", c.name, p.name, err)
		return nil
	}
	defer f.Close()
	last, err := numbered(f)
	w.count(func(r *Report) { r.Lines += last["stdout"] + last["stderr"] })
	if err != nil || last["stdout"] != c.lines || last["stderr"] != c.lines {
		w.violate(ruleLog, "container %s of %s wrote %d lines to each stream, the log has %v: %v", c.name, p.name, c.lines, last, err)
	}
	return nil
}

func (w *worker) stop(ctx context.Context, p *pod, c *container) error {
	q := &cri.StopContainerRequest{ContainerId: c.id, Timeout: int64(w.rnd.IntN(2))}
	c.stopped = true
	if _, err := several(ctx, w, "StopContainer", q, w.rt.StopContainer); err != nil {
		return fmt.Errorf("container %s: %w", c.name, err)
	}
	if err := w.ended(ctx, p, c); err != nil {
		return err
	}
	if _, err := retry(ctx, w, "StopContainer", q, w.rt.StopContainer); err != nil {
		w.violate(ruleIdempotent, "stop of container %s of %s, which has ended: %v", c.name, p.name, err)
	}
	return nil
}

func (w *worker) remove(ctx context.Context, p *pod, c *container) error {
	q := &cri.RemoveContainerRequest{ContainerId: c.id}
	if _, err := several(ctx, w, "RemoveContainer", q, w.rt.RemoveContainer); err != nil {
		return fmt.Errorf("container %s: %w", c.name, err)
	}
	p.members = slices.DeleteFunc(p.members, func(o *container) bool { return o == c })
	if _, err := retry(ctx, w, "RemoveContainer", q, w.rt.RemoveContainer); err != nil {
		w.violate(ruleIdempotent, "remove of container %s of %s, which is gone: %v", c.name, p.name, err)
	}
	return w.goneContainer(ctx, p, c)
}

func (w *worker) goneContainer(ctx context.Context, p *pod, c *container) error {
	a, err := retry(ctx, w, "ContainerStatus", &cri.ContainerStatusRequest{ContainerId: c.id}, w.rt.ContainerStatus)
	if status.Code(err) != codes.NotFound {
		w.violate(ruleGone, "container %s of %s was removed; its status: %v, %v", c.name, p.name, a, err)
	}
	return w.listMembers(ctx, p)
}

func (w *worker) stopPod(ctx context.Context, p *pod) error {
	q := &cri.StopPodSandboxRequest{PodSandboxId: p.id}
	if w.rnd.IntN(8) == 0 {
		return nil // removed while it runs
	}
	w.dropIP(p.name) // from here on another pod may get it
	if _, err := several(ctx, w, "StopPodSandbox", q, w.rt.StopPodSandbox); err != nil {
		return err
	}
	p.ready = false
	if err := w.checkPod(ctx, p); err != nil {
		return err
	}
	for _, c := range p.members {
		if c.state == cri.ContainerState_CONTAINER_EXITED {
			continue
		}
		c.stopped = true
		if err := w.ended(ctx, p, c); err != nil {
			return err
		}
	}
	if _, err := retry(ctx, w, "StopPodSandbox", q, w.rt.StopPodSandbox); err != nil {
		w.violate(ruleIdempotent, "stop of pod %s, which is stopped: %v", p.name, err)
	}
	return nil
}

func (w *worker) removePod(ctx context.Context, p *pod) error {
	w.dropIP(p.name)
	if p.ready && w.rnd.IntN(2) == 0 { // CRI lets a runtime refuse the removal of a pod that runs
		_, err := retry(ctx, w, "RemovePodSandbox", &cri.RemovePodSandboxRequest{PodSandboxId: p.id}, w.rt.RemovePodSandbox)
		p.ready = err != nil
	}
	if p.ready {
		if _, err := retry(ctx, w, "StopPodSandbox", &cri.StopPodSandboxRequest{PodSandboxId: p.id}, w.rt.StopPodSandbox); err != nil {
			return err
		}
	}
	q := &cri.RemovePodSandboxRequest{PodSandboxId: p.id}
	if _, err := several(ctx, w, "RemovePodSandbox", q, w.rt.RemovePodSandbox); err != nil {
		return err
	}
	if _, err := retry(ctx, w, "RemovePodSandbox", q, w.rt.RemovePodSandbox); err != nil {
		w.violate(ruleIdempotent, "remove of pod %s, which is gone: %v", p.name, err)
	}
	if a, err := retry(ctx, w, "PodSandboxStatus", &cri.PodSandboxStatusRequest{PodSandboxId: p.id}, w.rt.PodSandboxStatus); status.Code(err) != codes.NotFound {
		w.violate(ruleGone, "pod %s was removed; its status: %v, %v", p.name, a, err)
	}
	if _, err := retry(ctx, w, "StopContainer", &cri.StopContainerRequest{ContainerId: strings.Repeat("0", 64)}, w.rt.StopContainer); err != nil && status.Code(err) != codes.NotFound {
		w.violate(ruleIdempotent, "stop of an unknown container: %v", err)
	}
	members := p.members
	p.members = nil
	for _, c := range members {
		if err := w.goneContainer(ctx, p, c); err != nil {
			return err
		}
	}
	return nil
}
