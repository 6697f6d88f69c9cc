package main

import (
	"context"
	"net"
	"strings"
	"time"

	"github.com/naru-project/naru/cri"
	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/metrics"
	"github.com/naru-project/naru/internal/tracing"
	"github.com/naru-project/naru/pod"
)

// openMetrics has the parts asked at scrapes, and scrapes answered where the
// configuration says.
func (d *daemon) openMetrics(context.Context) error {
	d.metrics.Watch(source{d})
	d.scrapes = metrics.NewServer(d.metrics.Handler(), listenForScrapes)
	d.closers = append(d.closers, d.scrapes.Close)
	return d.scrapes.Listen(liveOf(d.cfg).metrics)
}

func listenForScrapes(address string) (net.Listener, error) {
	if path, ok := strings.CutPrefix(address, "unix://"); ok {
		return cri.Listen(path, nil)
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, errs.New(errs.Unavailable, "%w", err)
	}
	return l, nil
}

// pullDone counts a pull.
func (d *daemon) pullDone(took time.Duration, bytes int64, err error) {
	result := "ok"
	if err != nil {
		result = errs.Of(err).String()
	}
	d.metrics.Pull(result, took, bytes)
}

// watcher counts what happens to pods, and traces it.
type watcher struct {
	m *metrics.Metrics
	t *tracing.Tracing
}

// StepDone implements pod.Watcher.
func (w watcher) StepDone(ctx context.Context, operation, step string, began, ended time.Time) {
	w.m.Step(operation, step, ended.Sub(began))
	w.t.Step(ctx, operation, step, began, ended)
}

// ContainerExited implements pod.Watcher.
func (w watcher) ContainerExited(reason string) { w.m.Exit(reason) }

// source answers scrapes from the daemon's parts.
type source struct{ d *daemon }

func named(m map[pod.Phase]int) map[string]int {
	out := make(map[string]int, len(m))
	for p, n := range m {
		out[string(p)] = n
	}
	return out
}

// Pods implements metrics.Source.
func (s source) Pods() map[string]int {
	pods, _ := s.d.pods.Phases()
	return named(pods)
}

// Containers implements metrics.Source.
func (s source) Containers() map[string]int {
	_, containers := s.d.pods.Phases()
	return named(containers)
}

// Operations implements metrics.Source.
func (s source) Operations() map[metrics.Place]metrics.Running {
	out := map[metrics.Place]metrics.Running{}
	for _, o := range s.d.pods.Operations() {
		at := metrics.Place{Operation: o.Kind, Step: o.Step}
		r := out[at]
		out[at] = metrics.Running{Count: r.Count + 1, Oldest: max(r.Oldest, time.Since(o.StepAt))}
	}
	return out
}

// Findings implements metrics.Source.
func (s source) Findings() map[string]int {
	r := s.d.found.Load()
	if r == nil {
		return nil
	}
	return map[string]int{
		"undone": r.Undone, "ended": r.Ended, "lost": r.Lost, "orphans": r.Orphans, "quarantined": r.Quarantined, "rebooted": r.Rebooted, "problems": len(r.Problems),
	}
}

// Images implements metrics.Source.
func (s source) Images() metrics.Images {
	out := metrics.Images{Count: len(s.d.images.List()), Pulls: len(s.d.images.Progress())}
	if fs, err := s.d.images.FsInfo(); err == nil {
		out.Bytes, out.Inodes = fs.Bytes, fs.Inodes
	}
	return out
}

// Addresses implements metrics.Source.
func (s source) Addresses() map[string]metrics.Addresses {
	out := map[string]metrics.Addresses{}
	for _, u := range s.d.sandbox.Addresses() {
		family := "ipv6"
		if u.IPv4 {
			family = "ipv4"
		}
		out[family] = metrics.Addresses{Used: u.Used, Free: u.Free}
	}
	return out
}

// NetworkReady implements metrics.Source.
func (s source) NetworkReady() bool { return s.d.sandbox.NetworkStatus().Ready }

// MonitorUp implements metrics.Source.
func (s source) MonitorUp() bool { return s.d.health() == nil }

// MonitorRestarts implements metrics.Source.
func (s source) MonitorRestarts() uint64 { return s.d.monitor.Restarts() }
