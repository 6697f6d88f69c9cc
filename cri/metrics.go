package cri

import (
	"cmp"
	"time"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/pod"
)

// metric is one name of ListMetricDescriptors with the values that it has in a
// reading T. Names, types and units are cAdvisor's, which dashboards are made
// for. CRI's values are whole numbers: seconds are cut off, not rounded, so that
// a counter is never ahead of the kernel's.
type metric[T any] struct {
	name, help string
	kind       criv1.MetricType
	labels     []string // besides baseLabels
	values     func(r T, add adder)
}

// adder adds a value, with the values of the metric's own labels.
type adder func(value uint64, labels ...string)

// group is metrics that are read at one moment, which at tells. It is zero if
// there is nothing to read them from; then they have no values. What the kernel
// does not count is left out: 0 stands only for what was counted, and where
// cAdvisor has it for "none" (a limit).
type group[T any] struct {
	at      func(r T) time.Time
	metrics []metric[T]
}

func counter[T any](name, help string, value func(r T) uint64) metric[T] {
	return metric[T]{name: name, help: help, kind: criv1.MetricType_COUNTER, values: func(r T, add adder) { add(value(r)) }}
}

func gauge[T any](name, help string, value func(r T) uint64) metric[T] {
	m := counter(name, help, value)
	m.kind = criv1.MetricType_GAUGE
	return m
}

// known leaves a metric out where has says that there is no figure.
func known[T any](has func(r T) bool, m metric[T]) metric[T] {
	values := m.values
	m.values = func(r T, add adder) {
		if has(r) {
			values(r, add)
		}
	}
	return m
}

// describe makes the descriptors of metrics.
func describe[T any](groups []group[T]) []*criv1.MetricDescriptor {
	var out []*criv1.MetricDescriptor
	for _, g := range groups {
		for _, m := range g.metrics {
			out = append(out, &criv1.MetricDescriptor{Name: m.name, Help: m.help, LabelKeys: append(baseLabels(), m.labels...)})
		}
	}
	return out
}

// collect makes the values of metrics. base are those of baseLabels.
func collect[T any](groups []group[T], r T, base []string) []*criv1.Metric {
	var out []*criv1.Metric
	for _, g := range groups {
		at := nanos(g.at(r))
		if at == 0 {
			continue
		}
		for _, m := range g.metrics {
			m.values(r, func(value uint64, labels ...string) {
				all := base
				if len(labels) > 0 {
					all = append(base[:len(base):len(base)], labels...)
				}
				out = append(out, &criv1.Metric{Name: m.name, Timestamp: at, MetricType: m.kind, LabelValues: all, Value: u64(value)})
			})
		}
	}
	return out
}

// baseLabels are the keys that every metric has. kubelet adds none: what
// dashboards select by must come from here (kubernetes#140778).
func baseLabels() []string { return []string{"id", "image", "namespace", "pod", "container"} }

// podLabels are the values for a pod. Its interfaces have been those of a
// container "POD" since pods had one to hold their network.
func podLabels(p *pod.Pod) []string {
	m := configOf(p).Metadata
	return []string{p.ID, "", m.Namespace, m.Name, "POD"}
}

func containerLabels(p *pod.Pod, c *pod.Container) []string {
	m, cfg := configOf(p).Metadata, containerConfigOf(c)
	return []string{c.ID, cmp.Or(cfg.UserImage, cfg.Image, c.ImageRef), m.Namespace, m.Name, cfg.Metadata.Name}
}

func wholeSeconds(ns uint64) uint64 { return ns / uint64(time.Second) }

// unix is a time as metrics have it.
func unix(t time.Time) uint64 { return uint64(max(t.Unix(), 0)) }

// podMetrics are those of a pod itself: its interfaces. A pod on the host's
// network has none; the host's traffic is not its.
func podMetrics() []group[*pod.SandboxStats] {
	perInterface := func(name, help string, value func(i *pod.Interface) uint64) metric[*pod.SandboxStats] {
		return metric[*pod.SandboxStats]{name: name, help: help, kind: criv1.MetricType_COUNTER, labels: []string{"interface"}, values: func(r *pod.SandboxStats, add adder) {
			for i := range r.Interfaces {
				add(value(&r.Interfaces[i]), r.Interfaces[i].Name)
			}
		}}
	}
	return []group[*pod.SandboxStats]{{
		at: func(r *pod.SandboxStats) time.Time {
			if len(r.Interfaces) == 0 {
				return time.Time{}
			}
			return r.Interfaces[0].Time
		},
		metrics: []metric[*pod.SandboxStats]{
			perInterface("container_network_receive_bytes_total", "Bytes that the interface received.", func(i *pod.Interface) uint64 { return i.RxBytes }),
			perInterface("container_network_receive_errors_total", "Packets that arrived broken.", func(i *pod.Interface) uint64 { return i.RxErrors }),
			perInterface("container_network_receive_packets_dropped_total", "Packets for the pod that were dropped.", func(i *pod.Interface) uint64 { return i.RxDropped }),
			perInterface("container_network_receive_packets_total", "Packets that the interface received.", func(i *pod.Interface) uint64 { return i.RxPackets }),
			perInterface("container_network_transmit_bytes_total", "Bytes that the interface sent.", func(i *pod.Interface) uint64 { return i.TxBytes }),
			perInterface("container_network_transmit_errors_total", "Packets that could not be sent.", func(i *pod.Interface) uint64 { return i.TxErrors }),
			perInterface("container_network_transmit_packets_dropped_total", "Packets of the pod that were dropped.", func(i *pod.Interface) uint64 { return i.TxDropped }),
			perInterface("container_network_transmit_packets_total", "Packets that the interface sent.", func(i *pod.Interface) uint64 { return i.TxPackets }),
		},
	}}
}
