package metrics

import (
	"fmt"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
)

// desc describes one metric.
type desc struct {
	kind   string
	name   string
	labels []string
	help   string
}

// What is counted as it happens.
var (
	buildInfo      = desc{"gauge", "naru_build_info", []string{"version", "go"}, "Always 1; the labels tell the versions."}
	rpcs           = desc{"histogram", "naru_rpc_duration_seconds", []string{"method", "code"}, "CRI calls that ended, by name and gRPC code. Streams count when they end."}
	steps          = desc{"histogram", "naru_step_duration_seconds", []string{"operation", "step"}, "Steps of operations on pods and containers that ended, well or not."}
	exits          = desc{"counter", "naru_container_exits_total", []string{"reason"}, "Containers that ended: Completed, Error, OOMKilled, ContainerStatusUnknown."}
	pulls          = desc{"histogram", "naru_image_pull_duration_seconds", []string{"result"}, "Image pulls that ended: ok or a class of errors. Joined ones count once."}
	pulledBytes    = desc{"counter", "naru_image_pull_bytes_total", nil, "Bytes of layers that came from registries."}
	journalDropped = desc{"counter", "naru_journal_dropped_lines_total", nil, "Lines of containers that systemd's journal did not take in time (containers.log_to_journald)."}
	reloads        = desc{"counter", "naru_config_reloads_total", []string{"result"}, "Reloads of the configuration: ok, or refused and nothing changed."}
)

// gauge is asked for at a scrape.
type gauge struct {
	desc
	read func(s Source, tell tell)
}

// tell is called with a value and the values of the labels.
type tell func(value float64, labels ...string)

// each tells of every key of a map.
func each(m map[string]int, tell tell) {
	for k, v := range m {
		tell(float64(v), k)
	}
}

// gauges are all that are asked for.
var gauges = []gauge{
	{desc{"gauge", "naru_pods", []string{"phase"}, "Pods by phase. Broken ones could not be taken down yet; the reaper tries again."},
		func(s Source, t tell) { each(s.Pods(), t) }},
	{desc{"gauge", "naru_containers", []string{"phase"}, "Containers by phase."},
		func(s Source, t tell) { each(s.Containers(), t) }},
	{desc{"gauge", "naru_operations", []string{"operation", "step"}, "Operations on pods and containers that run now, by the step they are in."},
		func(s Source, t tell) {
			for at, o := range s.Operations() {
				t(float64(o.Count), at.Operation, at.Step)
			}
		}},
	{desc{"gauge", "naru_operation_step_age_seconds", []string{"operation", "step"}, "How long the oldest of these has been in its step."},
		func(s Source, t tell) {
			for at, o := range s.Operations() {
				t(o.Oldest.Seconds(), at.Operation, at.Step)
			}
		}},
	{desc{"gauge", "naru_recovery_findings", []string{"finding"}, "What the daemon found when it started: records that could not be read, half-made things it undid, containers that ended meanwhile, and so on."},
		func(s Source, t tell) { each(s.Findings(), t) }},
	{desc{"gauge", "naru_images", nil, "Images of the node."},
		func(s Source, t tell) { t(float64(s.Images().Count)) }},
	{desc{"gauge", "naru_image_pulls", nil, "Image pulls that run now."},
		func(s Source, t tell) { t(float64(s.Images().Pulls)) }},
	{desc{"gauge", "naru_layer_store_bytes", nil, "Bytes of all unpacked layers; shared ones count once."},
		func(s Source, t tell) { t(float64(s.Images().Bytes)) }},
	{desc{"gauge", "naru_layer_store_inodes", nil, "Inodes of all unpacked layers."},
		func(s Source, t tell) { t(float64(s.Images().Inodes)) }},
	{desc{"gauge", "naru_network_addresses", []string{"family", "state"}, "Pod addresses of the built-in network: used, and free in the present ranges."},
		func(s Source, t tell) {
			for family, a := range s.Addresses() {
				t(a.Used, family, "used")
				t(a.Free, family, "free")
			}
		}},
	{desc{"gauge", "naru_network_ready", nil, "1 when pods with a network can be started, else 0."},
		func(s Source, t tell) { t(flag(s.NetworkReady())) }},
	{desc{"gauge", "naru_monitor_up", nil, "1 when the monitor answers, else 0."},
		func(s Source, t tell) { t(flag(s.MonitorUp())) }},
	{desc{"counter", "naru_monitor_restarts_total", nil, "How often the daemon found a new worker of the monitor: it, or its keeper, was replaced or killed."},
		func(s Source, t tell) { t(float64(s.MonitorRestarts())) }},
}

func flag(v bool) float64 {
	if v {
		return 1
	}
	return 0
}

// Table is every metric of Naru's own, as docs/operations.md has it.
func Table() string {
	var b strings.Builder
	b.WriteString("| metric | type | labels | what it tells |\n|---|---|---|---|\n")
	all := []desc{buildInfo, rpcs, steps, exits, pulls, pulledBytes, reloads, journalDropped}
	for _, g := range gauges {
		all = append(all, g.desc)
	}
	for _, d := range all {
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", d.name, d.kind, strings.Join(d.labels, ", "), d.help)
	}
	return b.String()
}

// collector asks a Source at each scrape.
type collector struct{ source Source }

// Describe implements prometheus.Collector.
func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	for i := range gauges {
		ch <- gauges[i].prom()
	}
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	for i := range gauges {
		d, kind := gauges[i].prom(), prometheus.GaugeValue
		if gauges[i].kind == "counter" {
			kind = prometheus.CounterValue
		}
		gauges[i].read(c.source, func(v float64, labels ...string) { ch <- prometheus.MustNewConstMetric(d, kind, v, labels...) })
	}
}

func (d *desc) prom() *prometheus.Desc { return prometheus.NewDesc(d.name, d.help, d.labels, nil) }
