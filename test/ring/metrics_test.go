package ring

import (
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// figure is one metric beside what the kernel says. The metric is the sum of
// the values that have the labels.
type figure struct {
	name   string
	labels string // key=value, separated by spaces
	kernel func(k *kernel) float64
	cut    bool    // to whole seconds
	within float64 // how far off it may be, for what is no amount
	fixed  bool    // no load moves it
}

func figures() []figure {
	page := func(v1, v2 string) func(*kernel) float64 {
		return func(k *kernel) float64 { return k.number("hugetlb", "hugetlb.2MB."+v1, "hugetlb.2MB."+v2) }
	}
	psi := func(what, kind string) func(*kernel) float64 {
		return func(k *kernel) float64 { return k.stalled(what, kind) }
	}
	io := func(file, operation, v2 string) func(*kernel) float64 {
		return func(k *kernel) float64 { return k.io("blkio.throttle."+file+"_recursive", operation, v2) }
	}
	faults := func(k *kernel) float64 { return k.memory("total_pgfault", "pgfault") }
	major := func(k *kernel) float64 { return k.memory("total_pgmajfault", "pgmajfault") }
	usage := func(k *kernel) float64 { return k.number("memory", "memory.usage_in_bytes", "memory.current") }
	net := func(column int) func(*kernel) float64 { return func(k *kernel) float64 { return k.link(column) } }
	other := func(column int) func(*kernel) float64 { return func(k *kernel) float64 { return k.hostLink(column) } }
	return []figure{
		{name: "container_blkio_device_usage_total", labels: "operation=Read", kernel: io("io_service_bytes", "Read", "rbytes")},
		{name: "container_blkio_device_usage_total", labels: "operation=Write", kernel: io("io_service_bytes", "Write", "wbytes")},
		{name: "container_blkio_device_usage_total", labels: "operation=Discard", kernel: io("io_service_bytes", "Discard", "dbytes")},
		{name: "container_cpu_cfs_periods_total", kernel: func(k *kernel) float64 { return k.line("cpu", "cpu.stat", "nr_periods", "cpu.stat", "nr_periods") }},
		{name: "container_cpu_cfs_throttled_periods_total", kernel: func(k *kernel) float64 { return k.line("cpu", "cpu.stat", "nr_throttled", "cpu.stat", "nr_throttled") }},
		{name: "container_cpu_cfs_throttled_seconds_total", cut: true, kernel: throttled},
		{name: "container_cpu_system_seconds_total", cut: true, kernel: systemTime},
		{name: "container_cpu_usage_seconds_total", labels: "cpu=total", cut: true, kernel: func(k *kernel) float64 {
			if k.v2 {
				return k.line("", "", "", "cpu.stat", "usage_usec") / 1e6
			}
			return k.number("cpuacct", "cpuacct.usage", "") / 1e9
		}},
		{name: "container_cpu_user_seconds_total", cut: true, kernel: userTime},
		{name: "container_file_descriptors", kernel: func(k *kernel) float64 { return k.open("") }},
		{name: "container_fs_inodes_free", kernel: func(k *kernel) float64 { return k.disk(func(s unix.Statfs_t) uint64 { return s.Ffree }) }},
		{name: "container_fs_inodes_total", fixed: true, kernel: func(k *kernel) float64 { return k.disk(func(s unix.Statfs_t) uint64 { return s.Files }) }},
		{name: "container_fs_limit_bytes", fixed: true, kernel: func(k *kernel) float64 {
			return k.disk(func(s unix.Statfs_t) uint64 { return s.Blocks * uint64(s.Frsize) })
		}},
		{name: "container_fs_reads_bytes_total", kernel: io("io_service_bytes", "Read", "rbytes")},
		{name: "container_fs_reads_total", kernel: io("io_serviced", "Read", "rios")},
		{name: "container_fs_usage_bytes", kernel: (*kernel).written},
		{name: "container_fs_writes_bytes_total", kernel: io("io_service_bytes", "Write", "wbytes")},
		{name: "container_fs_writes_total", kernel: io("io_serviced", "Write", "wios")},
		{name: "container_hugetlb_max_usage_bytes", labels: "pagesize=2MB", fixed: hugePages() == 0, kernel: page("max_usage_in_bytes", "no such file")},
		{name: "container_hugetlb_usage_bytes", labels: "pagesize=2MB", fixed: hugePages() == 0, kernel: page("usage_in_bytes", "current")},
		{name: "container_last_seen", within: 2, kernel: func(*kernel) float64 { return float64(time.Now().Unix()) }},
		{name: "container_memory_cache", kernel: func(k *kernel) float64 { return k.memory("total_cache", "file") }},
		{name: "container_memory_failcnt", kernel: func(k *kernel) float64 {
			if k.v2 {
				return k.line("", "", "", "memory.events", "max")
			}
			return k.number("memory", "memory.failcnt", "")
		}},
		{name: "container_memory_failures_total", labels: "failure_type=pgfault scope=container", kernel: faults},
		{name: "container_memory_failures_total", labels: "failure_type=pgfault scope=hierarchy", kernel: faults},
		{name: "container_memory_failures_total", labels: "failure_type=pgmajfault scope=container", kernel: major},
		{name: "container_memory_failures_total", labels: "failure_type=pgmajfault scope=hierarchy", kernel: major},
		{name: "container_memory_kernel_usage", kernel: func(k *kernel) float64 {
			if k.v2 {
				return k.memory("", "kernel")
			}
			return k.number("memory", "memory.kmem.usage_in_bytes", "")
		}},
		{name: "container_memory_mapped_file", kernel: func(k *kernel) float64 { return k.memory("total_mapped_file", "file_mapped") }},
		{name: "container_memory_max_usage_bytes", kernel: func(k *kernel) float64 { return k.number("memory", "memory.max_usage_in_bytes", "memory.peak") }},
		{name: "container_memory_rss", kernel: func(k *kernel) float64 { return k.memory("total_rss", "anon") }},
		{name: "container_memory_swap", fixed: !hasSwap(), kernel: func(k *kernel) float64 {
			if k.v2 {
				return k.number("memory", "", "memory.swap.current")
			}
			return k.memory("total_swap", "")
		}},
		{name: "container_memory_usage_bytes", kernel: usage},
		{name: "container_memory_working_set_bytes", kernel: func(k *kernel) float64 { return usage(k) - k.memory("total_inactive_file", "inactive_file") }},
		{name: "container_network_receive_bytes_total", labels: "interface=eth0", kernel: net(0)},
		{name: "container_network_receive_errors_total", labels: "interface=eth0", kernel: net(2), fixed: true}, // a veth has none
		{name: "container_network_receive_packets_dropped_total", labels: "interface=eth0", kernel: other(11)},
		{name: "container_network_receive_packets_total", labels: "interface=eth0", kernel: net(1)},
		{name: "container_network_transmit_bytes_total", labels: "interface=eth0", kernel: net(8)},
		{name: "container_network_transmit_errors_total", labels: "interface=eth0", kernel: net(10), fixed: true},
		{name: "container_network_transmit_packets_dropped_total", labels: "interface=eth0", kernel: other(3)},
		{name: "container_network_transmit_packets_total", labels: "interface=eth0", kernel: net(9)},
		{name: "container_oom_events_total", kernel: func(k *kernel) float64 {
			return k.line("memory", "memory.oom_control", "oom_kill", "memory.events", "oom_kill")
		}},
		{name: "container_pressure_cpu_stalled_seconds_total", cut: true, kernel: psi("cpu", "full")},
		{name: "container_pressure_cpu_waiting_seconds_total", cut: true, kernel: psi("cpu", "some")},
		{name: "container_pressure_io_stalled_seconds_total", cut: true, kernel: psi("io", "full")},
		{name: "container_pressure_io_waiting_seconds_total", cut: true, kernel: psi("io", "some")},
		{name: "container_pressure_memory_stalled_seconds_total", cut: true, kernel: psi("memory", "full")},
		{name: "container_pressure_memory_waiting_seconds_total", cut: true, kernel: psi("memory", "some")},
		{name: "container_processes", kernel: func(k *kernel) float64 { return float64(len(k.procs())) }},
		{name: "container_sockets", kernel: func(k *kernel) float64 { return k.open("socket:") }},
		{name: "container_spec_cpu_period", kernel: func(k *kernel) float64 { return k.quota("cpu.cfs_period_us", 1) }},
		{name: "container_spec_cpu_quota", kernel: func(k *kernel) float64 { return k.quota("cpu.cfs_quota_us", 0) }},
		{name: "container_spec_cpu_shares", kernel: func(k *kernel) float64 { return k.shares }},
		{name: "container_spec_memory_limit_bytes", kernel: func(k *kernel) float64 { return k.number("memory", "memory.limit_in_bytes", "memory.max") }},
		{name: "container_spec_memory_reservation_limit_bytes", kernel: func(k *kernel) float64 { return k.number("memory", reservation1, reservation2) }},
		{name: "container_spec_memory_swap_limit_bytes", kernel: func(k *kernel) float64 { return k.number("memory", "memory.memsw.limit_in_bytes", "memory.swap.max") }},
		{name: "container_start_time_seconds", within: 2, fixed: true, kernel: (*kernel).started},
		{name: "container_threads", kernel: func(k *kernel) float64 { return k.number("pids", "pids.current", "pids.current") }},
		{name: "container_threads_max", kernel: func(k *kernel) float64 { return k.number("pids", "pids.max", "pids.max") }},
		{name: "container_ulimits_soft", labels: "ulimit=max_open_files", kernel: (*kernel).openFiles},
	}
}

const reservation1, reservation2 = "memory.soft_limit_in_bytes", "memory.min"

func (k *kernel) quota(v1 string, column int) float64 {
	if !k.v2 {
		return k.number("cpu", v1, "")
	}
	b, err := os.ReadFile(k.path("cpu", "", "cpu.max"))
	if err != nil {
		return math.NaN()
	}
	return limitOf(strings.Fields(string(b))[column])
}

// stalled is how long a pressure has lasted in all, in seconds.
func (k *kernel) stalled(what, kind string) float64 { return k.pressure(what, kind, "total") / 1e6 }

func throttled(k *kernel) float64 {
	return k.per(1e9, 1e6, k.line("cpu", "cpu.stat", "throttled_time", "cpu.stat", "throttled_usec"))
}

func userTime(k *kernel) float64 {
	if k.v2 {
		return k.line("", "", "", "cpu.stat", "user_usec") / 1e6
	}
	return k.number("cpuacct", "cpuacct.usage_user", "") / 1e9
}

func systemTime(k *kernel) float64 {
	if k.v2 {
		return k.line("", "", "", "cpu.stat", "system_usec") / 1e6
	}
	return k.number("cpuacct", "cpuacct.usage_sys", "") / 1e9
}

// hugePages are those that the machine has to spare.
func hugePages() (n int) {
	b, _ := os.ReadFile("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
	_, _ = fmt.Sscan(string(b), &n)
	return n
}

func hasSwap() bool {
	b, _ := os.ReadFile("/proc/swaps")
	return strings.Count(string(b), "\n") > 1
}

// valueOf sums what a figure's metric has in a list; ok is false if it has none.
func (f figure) valueOf(keys map[string][]string, list []*criv1.Metric) (sum float64, ok bool) {
	for _, m := range list {
		if m.Name != f.name {
			continue
		}
		fits := true
		for want := range strings.FieldsSeq(f.labels) {
			key, value, _ := strings.Cut(want, "=")
			i := slices.Index(keys[f.name], key)
			fits = fits && i >= 0 && m.LabelValues[i] == value
		}
		if fits {
			sum, ok = sum+float64(m.Value.Value), true
		}
	}
	return sum, ok
}

// agrees compares with what the kernel said before and after.
func (f figure) agrees(got, before, after float64) bool {
	lo, hi := min(before, after), max(before, after)
	switch {
	case f.within > 0:
		return got >= lo-f.within && got <= hi+f.within
	case f.cut:
		return got >= math.Floor(lo*0.99) && got <= math.Floor(hi*1.01)
	}
	return got >= lo*0.99 && got <= hi*1.01
}

// TestMetrics: every metric, and every field of the stats, moves under a load
// made for it, and is what the kernel says.
func TestMetrics(t *testing.T) {
	n := StartNode(t)
	pod := n.Pod(t, func(c *criv1.PodSandboxConfig) {
		c.Metadata.Name, c.Linux.CgroupParent = "measured", n.Below("measured")
	})
	ctl := n.HostDir(t)
	res := &criv1.LinuxContainerResources{CpuShares: 512, CpuQuota: 25000, CpuPeriod: 100000, MemoryLimitInBytes: 64 << 20, MemorySwapLimitInBytes: 80 << 20}
	if hugePages() > 0 {
		res.HugepageLimits = []*criv1.HugepageLimit{{PageSize: "2MB", Limit: 4 << 20}}
	}
	disk, number := blockDevice(t, n.Dir+"/disk", 64<<20)
	id := n.Run(t, pod, each(limits(res), mounts(Volume(ctl, "/ctl")), func(c *criv1.ContainerConfig) {
		c.Metadata.Name, c.Devices = "load", []*criv1.Device{{HostPath: disk, ContainerPath: "/dev/disk", Permissions: "rw"}}
	},
		shell("head -c 8388608 /dev/zero >/mapped; sync; while [ ! -e /ctl/hold ]; do usleep 50000; done; exec /bin/evil hold /mapped 16")))
	k := n.kernelOf(t, pod, id)
	k.shares = 512
	d, err := n.Runtime.ListMetricDescriptors(within(t, callTime), &criv1.ListMetricDescriptorsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	keys := map[string][]string{}
	for _, d := range d.Descriptors {
		keys[d.Name] = d.LabelKeys
	}
	eventually(t, 10*time.Second, "the file", func() bool { return k.written() >= 8<<20 })
	first, watch := n.metricsOf(t, pod), n.watchStats(t, pod, id, k)
	if !k.v2 { // since Linux 6.10 version 1 counts for disks with a limit only
		path := k.path("blkio", "blkio.throttle.write_bps_device", "")
		if err := os.WriteFile(path, []byte(number+" 4000000000"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	n.load(t, pod, id, ctl, k, watch)
	time.Sleep(2500 * time.Millisecond) // the kernel sums up its statistics every two seconds
	eventually(t, 70*time.Second, "the usage of the disk, which is counted rarely", func() bool {
		got, ok := figure{name: "container_fs_usage_bytes"}.valueOf(keys, n.metricsOf(t, pod))
		return ok && math.Abs(got-k.written()) <= k.written()/100
	})
	all := figures()
	before, after := make([]float64, len(all)), make([]float64, len(all))
	for i, f := range all {
		before[i] = f.kernel(k)
	}
	last := n.metricsOf(t, pod)
	for i, f := range all {
		after[i] = f.kernel(k)
	}
	for i, f := range all {
		got, ok := f.valueOf(keys, last)
		was, had := f.valueOf(keys, first)
		switch {
		case math.IsNaN(before[i]):
			if ok {
				t.Errorf("%s{%s} is %v, the kernel does not count it", f.name, f.labels, got)
			}
			t.Logf("%s{%s} is left out: this kernel does not count it", f.name, f.labels)
		case !ok:
			t.Errorf("%s{%s} has no value, the kernel says %v", f.name, f.labels, before[i])
		case !f.agrees(got, before[i], after[i]):
			t.Errorf("%s{%s} is %v, the kernel says %v and then %v", f.name, f.labels, got, before[i], after[i])
		case !f.fixed && had && got == was:
			t.Errorf("%s{%s} was and is %v: the load did not move it", f.name, f.labels, got)
		default:
			t.Logf("%s{%s}: %v, then %v; the kernel: %v", f.name, f.labels, was, got, after[i])
		}
	}
	checkForm(t, d.Descriptors, last, map[string]bool{pod: true, id: true})
	devices := k.devices()
	if !slices.Contains(devices, disk) {
		t.Errorf("the kernel counts %v only", devices)
	}
	for _, name := range devices {
		if _, ok := (figure{name: "container_fs_reads_total", labels: "device=" + name}).valueOf(keys, last); !ok {
			t.Errorf("no reads of %s", name)
		}
	}
	n.checkStream(t)
	watch.check(t)
}

// load makes everything move that figures asks for, and leaves the container
// holding what it holds.
func (n *Node) load(t *testing.T, pod, id, ctl string, k *kernel, watch *statsWatch) {
	t.Helper()
	until := func(what string, of func(k *kernel) float64, script string) {
		t.Helper()
		start := of(k)
		if math.IsNaN(start) {
			return
		}
		eventually(t, 90*time.Second, what, func() bool { n.Sh(t, id, script); return of(k) > start+1.2 })
	}
	busy := "(timeout 1 sh -c 'while :; do :; done') & timeout 1 sh -c 'while :; do :; done'; wait"
	until("user time", userTime, busy)
	until("time of the kernel", systemTime, "timeout 1 dd if=/dev/zero of=/dev/null bs=64; true")
	until("waits for the processor's quota", throttled, busy)
	until("waits for the processor", func(k *kernel) float64 { return k.stalled("cpu", "some") }, busy)
	until("halts for the processor", func(k *kernel) float64 { return k.stalled("cpu", "full") }, busy)
	done := make(chan error, 1)
	go func() {
		_, err := n.ExecTimeout(t, id, 0, "/bin/sh", "-c", "while [ ! -e /idle ]; do :; done; rm /idle")
		done <- err
	}()
	watch.checkRates(t)
	n.Sh(t, id, ": >/idle")
	if err := <-done; err != nil {
		t.Error(err)
	}
	// More memory than is allowed, of a process: it is ended; of files: they are dropped.
	n.Sh(t, id, "dd if=/dev/zero of=/dev/null bs=90M count=1; true")
	n.Sh(t, id, "blkdiscard -o 0 -l 1048576 /dev/disk")
	direct := "timeout 1 dd if=/dev/zero of=/dev/disk bs=4k oflag=direct conv=notrunc 2>/dev/null; timeout 1 dd if=/dev/disk of=/dev/null bs=4k iflag=direct 2>/dev/null; true"
	until("waits for the disk", func(k *kernel) float64 { return k.stalled("io", "some") }, direct)
	until("halts for the disk", func(k *kernel) float64 { return k.stalled("io", "full") }, direct)
	thrash := "[ -e /big ] || dd if=/dev/zero of=/big bs=1M count=90 2>/dev/null; for i in 1 2 3 4; do cat /big >/dev/null; done; dd if=/dev/zero of=/big bs=1M count=90 conv=notrunc 2>/dev/null"
	until("waits for memory", func(k *kernel) float64 { return k.stalled("memory", "some") }, thrash)
	until("halts for memory", func(k *kernel) float64 { return k.stalled("memory", "full") }, thrash)
	watch.look(t) // averages of the pressure go down again
	n.Sh(t, id, "rm -f /big; for i in $(seq 200); do echo x >/file$i; done; sync")
	n.traffic(t, pod, id, k.host)
	n.changeLimits(t, id, k)
	if err := os.WriteFile(ctl+"/hold", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	n.awaitLog(t, id, "holding")
}

// traffic sends in both directions, also packets that are too large for the
// other end and dropped there.
func (n *Node) traffic(t *testing.T, pod, id, host string) {
	t.Helper()
	ip := n.IPs(t, pod)[0]
	n.Sh(t, id, "ping -c 5 -i 0.1 -s 1000 "+nodeIP)
	mtu := func(name string, size int) error {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		return netlink.LinkSetMTU(l, size)
	}
	send := func(to string) (err error) {
		c, err := net.Dial("udp", to)
		if err != nil {
			return err
		}
		defer func() { _ = c.Close() }()
		for range 9 {
			if _, err = io.WriteString(c, strings.Repeat("x", 1200)); errors.Is(err, unix.ECONNREFUSED) {
				err = nil
			}
		}
		return err
	}
	try := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	n.inPod(t, pod, func() error { return mtu("eth0", 600) })
	try("send to the pod", send(ip+":9"))
	n.inPod(t, pod, func() error { return mtu("eth0", 1500) })
	try("shrink the host's end", mtu(host, 600))
	n.inPod(t, pod, func() error { return send(nodeIP + ":9") })
	try("restore the host's end", mtu(host, 1500))
}

// changeLimits changes what the spec metrics show, through CRI where it has a
// word for it.
func (n *Node) changeLimits(t *testing.T, id string, k *kernel) {
	t.Helper()
	if _, err := n.Runtime.UpdateContainerResources(within(t, callTime), &criv1.UpdateContainerResourcesRequest{ContainerId: id, Linux: &criv1.LinuxContainerResources{
		CpuShares: 300, CpuQuota: 60000, CpuPeriod: 80000, MemoryLimitInBytes: 96 << 20, MemorySwapLimitInBytes: 120 << 20,
	}}); err != nil {
		t.Fatal(err)
	}
	k.shares = 300
	for path, value := range map[string]string{k.path("memory", reservation1, reservation2): "8388608", k.path("pids", "pids.max", "pids.max"): "777"} {
		if err := os.WriteFile(path, []byte(value), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Prlimit(k.pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 555, Max: 999}, nil); err != nil {
		t.Fatal(err)
	}
}

// checkForm: values and descriptors fit each other, and the labels are those by
// which dashboards select.
func checkForm(t *testing.T, descriptors []*criv1.MetricDescriptor, list []*criv1.Metric, ids map[string]bool) {
	t.Helper()
	byName := map[string]*criv1.MetricDescriptor{}
	for _, d := range descriptors {
		if byName[d.Name] != nil || d.Help == "" {
			t.Errorf("descriptor %v", d)
		}
		byName[d.Name] = d
	}
	if len(byName) != 56 {
		t.Errorf("%d descriptors", len(byName))
	}
	seen := map[string]bool{}
	for _, m := range list {
		d := byName[m.Name]
		if d == nil || len(d.LabelKeys) != len(m.LabelValues) {
			t.Errorf("%v does not fit %v", m, d)
			continue
		}
		labels := map[string]string{}
		for i, key := range d.LabelKeys {
			labels[key] = m.LabelValues[i]
		}
		network := strings.HasPrefix(m.Name, "container_network_")
		container, image := "load", Busybox
		if network {
			container, image = "POD", ""
		}
		if labels["namespace"] != "ring" || labels["pod"] != "measured" || labels["container"] != container || labels["image"] != image || !ids[labels["id"]] {
			t.Errorf("%s has labels %v", m.Name, labels)
		}
		if age := time.Since(time.Unix(0, m.Timestamp)); age < 0 || age > 90*time.Second || age > 10*time.Second && m.Name != "container_fs_usage_bytes" {
			t.Errorf("%s is %v old", m.Name, age)
		}
		if counts := strings.HasSuffix(m.Name, "_total") && m.Name != "container_fs_inodes_total" || m.Name == "container_memory_failcnt"; counts != (m.MetricType == criv1.MetricType_COUNTER) {
			t.Errorf("%s is a %v", m.Name, m.MetricType)
		}
		if one := fmt.Sprint(m.Name, m.LabelValues); seen[one] {
			t.Errorf("%s is there twice", one)
		} else {
			seen[one] = true
		}
	}
}

// checkStream: the stream has the same pods.
func (n *Node) checkStream(t *testing.T) {
	t.Helper()
	s, err := n.Runtime.StreamPodSandboxMetrics(within(t, callTime), &criv1.StreamPodSandboxMetricsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	pods := 0
	for {
		r, err := s.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range r.PodSandboxMetrics {
			pods++
			if len(p.Metrics) == 0 || len(p.ContainerMetrics) != 1 || len(p.ContainerMetrics[0].Metrics) < 40 {
				t.Errorf("pod %s has %d metrics, %d containers", p.PodSandboxId, len(p.Metrics), len(p.ContainerMetrics))
			}
		}
	}
	if pods != 1 {
		t.Errorf("%d pods", pods)
	}
}
