package cri

import (
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/images"
	"github.com/naru-project/naru/pod"
)

// expectedMetrics is what Kubernetes' CRI tests ask for: the name without
// "container_", the labels besides the common ones, and the values for
// metricsPod. "c" is a counter, "g" a gauge.
var expectedMetrics = map[string]string{
	"blkio_device_usage_total":               "c /dev/sda,8,0,Discard=35 /dev/sda,8,0,Read=31 /dev/sda,8,0,Write=33",
	"cpu_cfs_periods_total":                  "c 14",
	"cpu_cfs_throttled_periods_total":        "c 15",
	"cpu_cfs_throttled_seconds_total":        "c 16",
	"cpu_system_seconds_total":               "c 13",
	"cpu_usage_seconds_total":                "c total=11",
	"cpu_user_seconds_total":                 "c 12",
	"file_descriptors":                       "g 52",
	"fs_inodes_free":                         "g /dev/root=63",
	"fs_inodes_total":                        "g /dev/root=62",
	"fs_limit_bytes":                         "g /dev/root=61",
	"fs_reads_bytes_total":                   "c /dev/sda=31",
	"fs_reads_total":                         "c /dev/sda=32",
	"fs_usage_bytes":                         "g /dev/root=60",
	"fs_writes_bytes_total":                  "c /dev/sda=33",
	"fs_writes_total":                        "c /dev/sda=34",
	"hugetlb_max_usage_bytes":                "g 2MB=42",
	"hugetlb_usage_bytes":                    "g 2MB=41",
	"last_seen":                              "g 1000",
	"memory_cache":                           "g 24",
	"memory_failcnt":                         "c 29",
	"memory_failures_total":                  "c pgfault,container=71 pgfault,hierarchy=71 pgmajfault,container=72 pgmajfault,hierarchy=72",
	"memory_kernel_usage":                    "g 26",
	"memory_mapped_file":                     "g 25",
	"memory_max_usage_bytes":                 "g 28",
	"memory_rss":                             "g 23",
	"memory_swap":                            "g 27",
	"memory_usage_bytes":                     "g 21",
	"memory_working_set_bytes":               "g 22",
	"network_receive_bytes_total":            "c eth0=1",
	"network_receive_errors_total":           "c eth0=3",
	"network_receive_packets_dropped_total":  "c eth0=4",
	"network_receive_packets_total":          "c eth0=2",
	"network_transmit_bytes_total":           "c eth0=5",
	"network_transmit_errors_total":          "c eth0=7",
	"network_transmit_packets_dropped_total": "c eth0=8",
	"network_transmit_packets_total":         "c eth0=6",
	"oom_events_total":                       "c 73",
	"pressure_cpu_stalled_seconds_total":     "c 82",
	"pressure_cpu_waiting_seconds_total":     "c 81",
	"pressure_io_stalled_seconds_total":      "c 86",
	"pressure_io_waiting_seconds_total":      "c 85",
	"pressure_memory_stalled_seconds_total":  "c 84",
	"pressure_memory_waiting_seconds_total":  "c 83",
	"processes":                              "g 51",
	"sockets":                                "g 53",
	"spec_cpu_period":                        "g 100000",
	"spec_cpu_quota":                         "g 50000",
	"spec_cpu_shares":                        "g 512",
	"spec_memory_limit_bytes":                "g 91",
	"spec_memory_reservation_limit_bytes":    "g 93",
	"spec_memory_swap_limit_bytes":           "g 92",
	"start_time_seconds":                     "g 900",
	"threads":                                "g 55",
	"threads_max":                            "g 56",
	"ulimits_soft":                           "g max_open_files=54",
}

var sampleTime = time.Unix(1000, 5)

// metricsPod has every figure, and each another.
func metricsPod() *pod.SandboxStats {
	const s = 1_000_000_000
	psi := func(some, full uint64) *pod.PSI {
		return &pod.PSI{Some: pod.PSILine{Total: some*s + s - 1}, Full: pod.PSILine{Total: full * s}}
	}
	return &pod.SandboxStats{
		Pod: &pod.Pod{ID: "p", Phase: pod.PhaseReady, Config: &pod.SandboxConfig{Metadata: pod.Metadata{Name: "web", Namespace: "shop"}}},
		Interfaces: []pod.Interface{{
			Name: "eth0", RxBytes: 1, RxPackets: 2, RxErrors: 3, RxDropped: 4, TxBytes: 5, TxPackets: 6, TxErrors: 7, TxDropped: 8, Time: sampleTime.Add(1),
		}},
		Containers: []*pod.ContainerStats{{
			Container: &pod.Container{
				ID: "c", PodID: "p", State: pod.StateRunning, StartedAt: time.Unix(900, 0), ImageRef: "repo@sha256:1", Resources: pod.Resources{CPUShares: 512},
				Config: &pod.ContainerConfig{Metadata: pod.ContainerMetadata{Name: "front"}, Image: "sha256:2", UserImage: "nginx:1"},
			},
			Stats: &pod.Stats{
				Time:   sampleTime,
				CPU:    &pod.CPUStats{Usage: 11*s + s - 1, User: 12 * s, System: 13 * s, Periods: 14, ThrottledPeriods: 15, ThrottledTime: 16 * s, Shares: 500, Quota: 50000, Period: 100000, PSI: psi(81, 82)},
				Memory: &pod.MemoryStats{Usage: 21, WorkingSet: 22, RSS: 23, Cache: 24, MappedFile: 25, Kernel: 26, Swap: 27, MaxUsage: 28, Failcnt: 29, PageFaults: 71, MajorPageFaults: 72, Limit: 91, SwapLimit: 92, HasKernel: true, HasSwap: true, HasMaxUsage: true, PSI: psi(83, 84)},
				IO:     &pod.IOStats{Devices: []pod.IODevice{{Major: 8, ReadBytes: 31, Reads: 32, WriteBytes: 33, Writes: 34, DiscardBytes: 35}}, PSI: psi(85, 86)},
				Pids:   &pod.PidsStats{Current: 55, Limit: 56}, Hugetlb: []pod.HugetlbStats{{PageSize: "2MB", Usage: 41, Max: 42, HasMax: true}}, OOMEvents: 73,
				Details: &pod.Details{
					Time: sampleTime.Add(2), Processes: 51, Descriptors: 52, Sockets: 53, HasProcesses: true, HasDescriptors: true, HasSockets: true,
					OpenFiles: 54, HasOpenFiles: true, Reservation: 93, Devices: []string{"/dev/sda"},
				},
			},
			Writable: images.Usage{Bytes: 60, Inodes: 7, Time: sampleTime.Add(3)},
			Disk:     images.Disk{Device: "/dev/root", Bytes: 61, Inodes: 62, InodesFree: 63, Time: sampleTime.Add(4)},
		}},
	}
}

// metricsServer lists the given pods.
func metricsServer(list ...*pod.SandboxStats) *Server {
	s, pods, _ := newTestServer()
	pods.metrics = list
	return s
}

// values renders metrics as expectedMetrics has them.
func values(t *testing.T, metrics []*criv1.Metric, keys map[string][]string, base []string) map[string]string {
	t.Helper()
	lists := map[string][]string{}
	for _, m := range metrics {
		if len(m.LabelValues) != len(keys[m.Name]) || !slices.Equal(m.LabelValues[:len(base)], base) {
			t.Errorf("%s: labels %q of %q, want %q first", m.Name, m.LabelValues, keys[m.Name], base)
			continue
		}
		name, kind := strings.TrimPrefix(m.Name, "container_"), map[criv1.MetricType]string{criv1.MetricType_COUNTER: "c", criv1.MetricType_GAUGE: "g"}[m.MetricType]
		v := fmt.Sprint(m.Value.Value)
		if own := m.LabelValues[len(base):]; len(own) > 0 {
			v = strings.Join(own, ",") + "=" + v
		}
		if lists[name] == nil {
			lists[name] = []string{kind}
		}
		lists[name] = append(lists[name], v)
	}
	out := map[string]string{}
	for name, l := range lists {
		slices.Sort(l[1:])
		out[name] = strings.Join(l, " ")
	}
	return out
}

func descriptorKeys(t *testing.T, s *Server) map[string][]string {
	t.Helper()
	r, err := s.ListMetricDescriptors(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	keys := map[string][]string{}
	for _, d := range r.Descriptors {
		if keys[d.Name] != nil || len(d.Help) < 10 || !slices.Equal(d.LabelKeys[:5], []string{"id", "image", "namespace", "pod", "container"}) {
			t.Errorf("descriptor %v", d)
		}
		keys[d.Name] = d.LabelKeys
	}
	return keys
}

func TestPodMetrics(t *testing.T) {
	s := metricsServer(metricsPod())
	keys := descriptorKeys(t, s)
	for name := range expectedMetrics {
		if keys["container_"+name] == nil {
			t.Errorf("container_%s is not declared", name)
		}
	}
	r, err := s.ListPodSandboxMetrics(t.Context(), nil)
	if err != nil || len(r.PodMetrics) != 1 || r.PodMetrics[0].PodSandboxId != "p" || len(r.PodMetrics[0].ContainerMetrics) != 1 || r.PodMetrics[0].ContainerMetrics[0].ContainerId != "c" {
		t.Fatalf("%v, %v", r, err)
	}
	p := r.PodMetrics[0]
	got := values(t, p.Metrics, keys, []string{"p", "", "shop", "web", "POD"})
	for name, v := range values(t, p.ContainerMetrics[0].Metrics, keys, []string{"c", "nginx:1", "shop", "web", "front"}) {
		got[name] = v
	}
	for name, want := range expectedMetrics {
		if got[name] != want {
			t.Errorf("%s: %q, want %q", name, got[name], want)
		}
	}
	if len(got) != len(expectedMetrics) || len(keys) != len(expectedMetrics) {
		t.Errorf("%d metrics, %d descriptors, want %d", len(got), len(keys), len(expectedMetrics))
	}
	times := map[string]time.Time{"container_file_descriptors": sampleTime.Add(2), "container_fs_usage_bytes": sampleTime.Add(3), "container_fs_limit_bytes": sampleTime.Add(4), "container_network_receive_bytes_total": sampleTime.Add(1), "container_cpu_usage_seconds_total": sampleTime}
	for _, m := range append(p.Metrics, p.ContainerMetrics[0].Metrics...) {
		if want, ok := times[m.Name]; ok && m.Timestamp != want.UnixNano() {
			t.Errorf("%s is of %d, want %d", m.Name, m.Timestamp, want.UnixNano())
		}
		if m.Timestamp == 0 {
			t.Errorf("%s has no time", m.Name)
		}
	}
}

// TestMetricsLeftOut: what is not known has no value, however it is missing.
func TestMetricsLeftOut(t *testing.T) {
	cpu := []string{"cpu_system_seconds_total", "cpu_usage_seconds_total", "cpu_user_seconds_total", "spec_cpu_period", "spec_cpu_shares"}
	quota := []string{"cpu_cfs_periods_total", "cpu_cfs_throttled_periods_total", "cpu_cfs_throttled_seconds_total", "spec_cpu_quota"}
	processes := []string{"file_descriptors", "processes", "sockets", "ulimits_soft"}
	tests := map[string]struct {
		change func(p *pod.SandboxStats, c *pod.ContainerStats)
		gone   []string
	}{
		"no quota": {func(_ *pod.SandboxStats, c *pod.ContainerStats) { c.Stats.CPU.Quota = -1 }, quota},
		"no period, no shares": {func(_ *pod.SandboxStats, c *pod.ContainerStats) {
			c.Stats.CPU.Period, c.Stats.CPU.Shares, c.Container.Resources.CPUShares = 0, 0, 0
		}, []string{"spec_cpu_period", "spec_cpu_shares"}},
		"no processor": {func(_ *pod.SandboxStats, c *pod.ContainerStats) { c.Stats.CPU = nil }, slices.Concat(cpu, quota, prefixed("pressure_cpu"))},
		"no memory":    {func(_ *pod.SandboxStats, c *pod.ContainerStats) { c.Stats.Memory = nil }, slices.Concat(prefixed("memory_"), prefixed("spec_memory"), prefixed("pressure_memory"), prefixed("oom"))},
		"no swap, kernel, peak": {func(_ *pod.SandboxStats, c *pod.ContainerStats) {
			m := c.Stats.Memory
			m.HasSwap, m.HasKernel, m.HasMaxUsage = false, false, false
		}, []string{"memory_kernel_usage", "memory_max_usage_bytes", "memory_swap"}},
		"no PSI": {func(_ *pod.SandboxStats, c *pod.ContainerStats) {
			c.Stats.CPU.PSI, c.Stats.Memory.PSI, c.Stats.IO.PSI = nil, nil, nil
		}, prefixed("pressure")},
		"no IO": {func(_ *pod.SandboxStats, c *pod.ContainerStats) { c.Stats.IO = nil }, slices.Concat(prefixed("fs_reads"), prefixed("fs_writes"), prefixed("blkio"), prefixed("pressure_io"))},
		"no disk used yet": {func(_ *pod.SandboxStats, c *pod.ContainerStats) {
			c.Stats.IO.Devices, c.Stats.Details.Devices = nil, nil
		}, slices.Concat(prefixed("fs_reads"), prefixed("fs_writes"), prefixed("blkio"))},
		"no pids":              {func(_ *pod.SandboxStats, c *pod.ContainerStats) { c.Stats.Pids = nil }, prefixed("threads")},
		"no huge pages":        {func(_ *pod.SandboxStats, c *pod.ContainerStats) { c.Stats.Hugetlb = nil }, prefixed("hugetlb")},
		"cgroup v2 huge pages": {func(_ *pod.SandboxStats, c *pod.ContainerStats) { c.Stats.Hugetlb[0].HasMax = false }, prefixed("hugetlb_max")},
		"no details":           {func(_ *pod.SandboxStats, c *pod.ContainerStats) { c.Stats.Details = nil }, slices.Concat(processes, prefixed("fs_reads"), prefixed("fs_writes"), prefixed("blkio"), prefixed("spec_memory_reservation"))},
		"too many processes": {func(_ *pod.SandboxStats, c *pod.ContainerStats) {
			d := c.Stats.Details
			d.HasProcesses, d.HasDescriptors, d.HasSockets, d.HasOpenFiles = false, false, false, false
		}, processes},
		"too many sockets":      {func(_ *pod.SandboxStats, c *pod.ContainerStats) { c.Stats.Details.HasSockets = false }, []string{"sockets"}},
		"usage not counted yet": {func(_ *pod.SandboxStats, c *pod.ContainerStats) { c.Writable = images.Usage{} }, prefixed("fs_usage")},
		"no fixed inodes":       {func(_ *pod.SandboxStats, c *pod.ContainerStats) { c.Disk.Inodes, c.Disk.InodesFree = 0, 0 }, prefixed("fs_inodes")},
		"no disk":               {func(_ *pod.SandboxStats, c *pod.ContainerStats) { c.Disk = images.Disk{} }, slices.Concat(prefixed("fs_inodes"), prefixed("fs_limit"))},
		"the host's network":    {func(p *pod.SandboxStats, _ *pod.ContainerStats) { p.Interfaces = nil }, prefixed("network")},
		"no container":          {func(p *pod.SandboxStats, _ *pod.ContainerStats) { p.Containers = nil }, slices.DeleteFunc(prefixed(""), func(n string) bool { return strings.HasPrefix(n, "network") })},
		"no sample": {func(_ *pod.SandboxStats, c *pod.ContainerStats) { c.Stats = nil }, slices.DeleteFunc(prefixed(""), func(n string) bool {
			return strings.HasPrefix(n, "network") || strings.HasPrefix(n, "fs_inodes") || n == "fs_usage_bytes" || n == "fs_limit_bytes"
		})},
		"nothing missing": {func(*pod.SandboxStats, *pod.ContainerStats) {}, nil},
	}
	for name, tt := range tests {
		p := metricsPod()
		tt.change(p, p.Containers[0])
		have := map[string]bool{}
		for _, m := range metricsServer(p).sandboxMetrics(t.Context()) {
			for _, x := range m.Metrics {
				have[strings.TrimPrefix(x.Name, "container_")] = true
			}
			for _, c := range m.ContainerMetrics {
				for _, x := range c.Metrics {
					have[strings.TrimPrefix(x.Name, "container_")] = true
				}
			}
		}
		var gone []string
		for n := range expectedMetrics {
			if !have[n] {
				gone = append(gone, n)
			}
		}
		slices.Sort(gone)
		slices.Sort(tt.gone)
		if !slices.Equal(gone, slices.Compact(tt.gone)) {
			t.Errorf("%s: without %q, want %q", name, gone, tt.gone)
		}
	}
}

// prefixed are the expected names that begin so.
func prefixed(p string) (names []string) {
	for n := range expectedMetrics {
		if strings.HasPrefix(n, p) {
			names = append(names, n)
		}
	}
	return names
}

func TestSwapLimitOfVersion1(t *testing.T) {
	p := metricsPod()
	m := p.Containers[0].Stats.Memory
	m.SwapLimit, m.Memsw = 20, 111
	for _, x := range collect(containerMetrics(), p.Containers[0], nil) {
		if x.Name == "container_spec_memory_swap_limit_bytes" && x.Value.Value != 111 {
			t.Errorf("%v", x)
		}
	}
}

// TestStreamMetrics: many pods come in several messages, each once, and as List has them.
func TestStreamPodMetrics(t *testing.T) {
	var list []*pod.SandboxStats
	for i := range 400 {
		p := metricsPod()
		p.Pod.ID = fmt.Sprintf("p%d", i)
		list = append(list, p)
	}
	c := runtimeClient(t, metricsServer(list...))
	stream, err := c.StreamPodSandboxMetrics(t.Context(), &criv1.StreamPodSandboxMetricsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	messages := 0
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		messages++
		for _, p := range r.PodSandboxMetrics {
			ids = append(ids, p.PodSandboxId)
		}
	}
	all, err := c.ListPodSandboxMetrics(t.Context(), &criv1.ListPodSandboxMetricsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for _, p := range all.PodMetrics {
		want = append(want, p.PodSandboxId)
	}
	if !reflect.DeepEqual(ids, want) || len(ids) != 400 || messages < 2 {
		t.Errorf("%d pods in %d messages, %d listed", len(ids), messages, len(want))
	}
}

func BenchmarkMetrics100(b *testing.B) {
	var list []*pod.SandboxStats
	for range 100 {
		list = append(list, metricsPod())
	}
	s := metricsServer(list...)
	b.ReportAllocs()
	for b.Loop() {
		if len(s.sandboxMetrics(b.Context())) != 100 {
			b.Fatal("not all")
		}
	}
}
