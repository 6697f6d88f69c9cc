package cri

import (
	"strconv"
	"time"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/pod"
)

// What a container's metrics are read from, and made of.
type (
	reading         = *pod.ContainerStats
	containerMetric = metric[reading]
)

// sampled is the time of a container's sample if has says that it holds what a
// group needs.
func sampled(has func(s *pod.Stats) bool) func(reading) time.Time {
	return func(r reading) time.Time {
		if r.Stats == nil || !has(r.Stats) {
			return time.Time{}
		}
		return r.Stats.Time
	}
}

func hasCPU(s *pod.Stats) bool    { return s.CPU != nil }
func hasMemory(s *pod.Stats) bool { return s.Memory != nil }

// containerMetrics are those of one container. Every figure is of its cgroup
// and what is below it: execs and what the container makes there itself.
func containerMetrics() []group[reading] {
	return []group[reading]{
		{at: sampled(func(*pod.Stats) bool { return true }), metrics: []containerMetric{
			gauge("container_last_seen", "When the container was last looked at, in seconds since 1970.", func(r reading) uint64 { return unix(r.Stats.Time) }),
			gauge("container_start_time_seconds", "When the container was started, in seconds since 1970.", func(r reading) uint64 { return unix(r.Container.StartedAt) }),
		}},
		{at: sampled(hasCPU), metrics: cpuMetrics()},
		{at: sampled(func(s *pod.Stats) bool { return s.CPU != nil && s.CPU.Quota > 0 }), metrics: quotaMetrics()},
		{at: sampled(hasMemory), metrics: memoryMetrics()},
		{at: sampled(func(s *pod.Stats) bool { return len(s.Hugetlb) > 0 }), metrics: hugetlbMetrics()},
		{at: sampled(func(s *pod.Stats) bool { return s.IO != nil && s.Details != nil }), metrics: ioMetrics()},
		{at: sampled(func(s *pod.Stats) bool { return s.CPU != nil && s.CPU.PSI != nil }), metrics: pressure("cpu", "the processor", func(s *pod.Stats) *pod.PSI { return s.CPU.PSI })},
		{at: sampled(func(s *pod.Stats) bool { return s.Memory != nil && s.Memory.PSI != nil }), metrics: pressure("memory", "memory", func(s *pod.Stats) *pod.PSI { return s.Memory.PSI })},
		{at: sampled(func(s *pod.Stats) bool { return s.IO != nil && s.IO.PSI != nil }), metrics: pressure("io", "disks", func(s *pod.Stats) *pod.PSI { return s.IO.PSI })},
		{at: sampled(func(s *pod.Stats) bool { return s.Pids != nil }), metrics: []containerMetric{
			gauge("container_threads", "Threads in the container.", func(r reading) uint64 { return r.Stats.Pids.Current }),
			gauge("container_threads_max", "Threads that the container may have; 0 for any number.", func(r reading) uint64 { return r.Stats.Pids.Limit }),
		}},
		{at: detailed, metrics: processMetrics()},
		{at: sampled(hasMemory), metrics: memorySpecs()},
		{at: func(r reading) time.Time { return r.Writable.Time }, metrics: []containerMetric{
			perDisk("container_fs_usage_bytes", "Bytes that the container has written to its root file system.", func(r reading) (uint64, bool) { return r.Writable.Bytes, true }),
		}},
		{at: func(r reading) time.Time { return r.Disk.Time }, metrics: []containerMetric{
			perDisk("container_fs_limit_bytes", "Size of the file system that the container's root file system is written to.", func(r reading) (uint64, bool) { return r.Disk.Bytes, true }),
			perDisk("container_fs_inodes_total", "Inodes of that file system.", func(r reading) (uint64, bool) { return r.Disk.Inodes, r.Disk.Inodes > 0 }),
			perDisk("container_fs_inodes_free", "Inodes of that file system that are free.", func(r reading) (uint64, bool) { return r.Disk.InodesFree, r.Disk.Inodes > 0 }),
		}},
	}
}

func detailed(r reading) time.Time {
	if r.Stats == nil || r.Stats.Details == nil {
		return time.Time{}
	}
	return r.Stats.Details.Time
}

func cpuMetrics() []containerMetric {
	cpu := func(value func(c *pod.CPUStats) uint64) func(reading) uint64 {
		return func(r reading) uint64 { return value(r.Stats.CPU) }
	}
	return []containerMetric{
		{name: "container_cpu_usage_seconds_total", help: "Processor time used, in seconds.", kind: criv1.MetricType_COUNTER, labels: []string{"cpu"},
			values: func(r reading, add adder) { add(wholeSeconds(r.Stats.CPU.Usage), "total") }},
		counter("container_cpu_user_seconds_total", "Processor time used by programs, in seconds.", cpu(func(c *pod.CPUStats) uint64 { return wholeSeconds(c.User) })),
		counter("container_cpu_system_seconds_total", "Processor time used by the kernel for programs, in seconds.", cpu(func(c *pod.CPUStats) uint64 { return wholeSeconds(c.System) })),
		known(func(r reading) bool { return r.Stats.CPU.Period > 0 },
			gauge("container_spec_cpu_period", "Period of the processor quota, in microseconds.", cpu(func(c *pod.CPUStats) uint64 { return uint64(c.Period) }))),
		// Version 2 keeps a weight, which is coarser than shares: what was asked for is exact.
		known(func(r reading) bool { return shares(r) > 0 },
			gauge("container_spec_cpu_shares", "Share of the processor against other containers, 1024 for one processor asked for.", func(r reading) uint64 { return uint64(shares(r)) })),
	}
}

func shares(r reading) int64 {
	if n := r.Container.Resources.CPUShares; n > 0 {
		return int64(n)
	}
	return r.Stats.CPU.Shares
}

// quotaMetrics are of containers that have a quota; others are never throttled.
func quotaMetrics() []containerMetric {
	cpu := func(value func(c *pod.CPUStats) uint64) func(reading) uint64 {
		return func(r reading) uint64 { return value(r.Stats.CPU) }
	}
	return []containerMetric{
		gauge("container_spec_cpu_quota", "Processor time that may be used in each period, in microseconds.", cpu(func(c *pod.CPUStats) uint64 { return uint64(c.Quota) })),
		counter("container_cpu_cfs_periods_total", "Periods of the processor quota that have passed.", cpu(func(c *pod.CPUStats) uint64 { return c.Periods })),
		counter("container_cpu_cfs_throttled_periods_total", "Periods in which the quota was used up.", cpu(func(c *pod.CPUStats) uint64 { return c.ThrottledPeriods })),
		counter("container_cpu_cfs_throttled_seconds_total", "Time spent waiting for the next period, in seconds.", cpu(func(c *pod.CPUStats) uint64 { return wholeSeconds(c.ThrottledTime) })),
	}
}

func memoryMetrics() []containerMetric {
	memory := func(value func(m *pod.MemoryStats) uint64) func(reading) uint64 {
		return func(r reading) uint64 { return value(r.Stats.Memory) }
	}
	return []containerMetric{
		gauge("container_memory_usage_bytes", "Memory in use, caches included.", memory(func(m *pod.MemoryStats) uint64 { return m.Usage })),
		gauge("container_memory_working_set_bytes", "Memory in use, less file pages that were not used lately.", memory(func(m *pod.MemoryStats) uint64 { return m.WorkingSet })),
		gauge("container_memory_rss", "Anonymous memory, in bytes.", memory(func(m *pod.MemoryStats) uint64 { return m.RSS })),
		gauge("container_memory_cache", "Memory that holds pages of files, in bytes.", memory(func(m *pod.MemoryStats) uint64 { return m.Cache })),
		gauge("container_memory_mapped_file", "Memory that holds mapped pages of files, in bytes.", memory(func(m *pod.MemoryStats) uint64 { return m.MappedFile })),
		known(func(r reading) bool { return r.Stats.Memory.HasKernel },
			gauge("container_memory_kernel_usage", "Memory of the kernel for the container, in bytes.", memory(func(m *pod.MemoryStats) uint64 { return m.Kernel }))),
		known(func(r reading) bool { return r.Stats.Memory.HasSwap },
			gauge("container_memory_swap", "Swap in use, in bytes.", memory(func(m *pod.MemoryStats) uint64 { return m.Swap }))),
		known(func(r reading) bool { return r.Stats.Memory.HasMaxUsage },
			gauge("container_memory_max_usage_bytes", "Most memory that was ever in use.", memory(func(m *pod.MemoryStats) uint64 { return m.MaxUsage }))),
		counter("container_memory_failcnt", "How often memory ran into its limit.", memory(func(m *pod.MemoryStats) uint64 { return m.Failcnt })),
		{name: "container_memory_failures_total", help: "Page faults, of both kinds.", kind: criv1.MetricType_COUNTER, labels: []string{"failure_type", "scope"}, values: func(r reading, add adder) {
			// The container is its cgroup and all below: the scopes are one.
			for _, scope := range []string{"container", "hierarchy"} {
				add(r.Stats.Memory.PageFaults, "pgfault", scope)
				add(r.Stats.Memory.MajorPageFaults, "pgmajfault", scope)
			}
		}},
		counter("container_oom_events_total", "Processes ended by the kernel for want of memory.", func(r reading) uint64 { return r.Stats.OOMEvents }),
	}
}

// memorySpecs are limits; as with cAdvisor 0 is none.
func memorySpecs() []containerMetric {
	return []containerMetric{
		gauge("container_spec_memory_limit_bytes", "Memory that the container may use; 0 for any amount.", func(r reading) uint64 { return r.Stats.Memory.Limit }),
		gauge("container_spec_memory_swap_limit_bytes", "Swap that the container may use, with cgroup version 1 memory and swap together; 0 for no such limit.", func(r reading) uint64 {
			// Version 1 has one limit for both, and so does the metric there.
			return max(r.Stats.Memory.Memsw, r.Stats.Memory.SwapLimit)
		}),
		known(func(r reading) bool { return r.Stats.Details != nil },
			gauge("container_spec_memory_reservation_limit_bytes", "Memory that is kept for the container; 0 for none.", func(r reading) uint64 { return r.Stats.Details.Reservation })),
	}
}

func hugetlbMetrics() []containerMetric {
	perSize := func(name, help string, value func(h pod.HugetlbStats) (uint64, bool)) containerMetric {
		return containerMetric{name: name, help: help, kind: criv1.MetricType_GAUGE, labels: []string{"pagesize"}, values: func(r reading, add adder) {
			for _, h := range r.Stats.Hugetlb {
				if n, ok := value(h); ok {
					add(n, h.PageSize)
				}
			}
		}}
	}
	return []containerMetric{
		perSize("container_hugetlb_usage_bytes", "Huge pages in use, in bytes.", func(h pod.HugetlbStats) (uint64, bool) { return h.Usage, true }),
		perSize("container_hugetlb_max_usage_bytes", "Most huge pages that were ever in use, in bytes; cgroup version 1 only.", func(h pod.HugetlbStats) (uint64, bool) { return h.Max, h.HasMax }),
	}
}

// ioMetrics name devices as in Details: they are of one sample.
func ioMetrics() []containerMetric {
	each := func(r reading, f func(d pod.IODevice, name string)) {
		for i, d := range r.Stats.IO.Devices {
			if i < len(r.Stats.Details.Devices) {
				f(d, r.Stats.Details.Devices[i])
			}
		}
	}
	perDevice := func(name, help string, value func(d pod.IODevice) uint64) containerMetric {
		return containerMetric{name: name, help: help, kind: criv1.MetricType_COUNTER, labels: []string{"device"}, values: func(r reading, add adder) {
			each(r, func(d pod.IODevice, name string) { add(value(d), name) })
		}}
	}
	return []containerMetric{
		perDevice("container_fs_reads_bytes_total", "Bytes read from the device.", func(d pod.IODevice) uint64 { return d.ReadBytes }),
		perDevice("container_fs_reads_total", "Reads from the device.", func(d pod.IODevice) uint64 { return d.Reads }),
		perDevice("container_fs_writes_bytes_total", "Bytes written to the device.", func(d pod.IODevice) uint64 { return d.WriteBytes }),
		perDevice("container_fs_writes_total", "Writes to the device.", func(d pod.IODevice) uint64 { return d.Writes }),
		{name: "container_blkio_device_usage_total", help: "Bytes moved from and to the device, by operation.", kind: criv1.MetricType_COUNTER,
			labels: []string{"device", "major", "minor", "operation"}, values: func(r reading, add adder) {
				each(r, func(d pod.IODevice, name string) {
					major, minor := strconv.FormatUint(d.Major, 10), strconv.FormatUint(d.Minor, 10)
					add(d.ReadBytes, name, major, minor, "Read")
					add(d.WriteBytes, name, major, minor, "Write")
					add(d.DiscardBytes, name, major, minor, "Discard")
				})
			}},
	}
}

// pressure is the time that threads lost for want of something: waiting is that
// of some, stalled that of all.
func pressure(what, word string, of func(s *pod.Stats) *pod.PSI) []containerMetric {
	return []containerMetric{
		counter("container_pressure_"+what+"_waiting_seconds_total", "Time in which some of the container waited for "+word+", in seconds.",
			func(r reading) uint64 { return wholeSeconds(of(r.Stats).Some.Total) }),
		counter("container_pressure_"+what+"_stalled_seconds_total", "Time in which all of the container waited for "+word+", in seconds.",
			func(r reading) uint64 { return wholeSeconds(of(r.Stats).Full.Total) }),
	}
}

func processMetrics() []containerMetric {
	details := func(value func(d *pod.Details) uint64) func(reading) uint64 {
		return func(r reading) uint64 { return value(r.Stats.Details) }
	}
	return []containerMetric{
		known(func(r reading) bool { return r.Stats.Details.HasProcesses },
			gauge("container_processes", "Processes in the container.", details(func(d *pod.Details) uint64 { return d.Processes }))),
		known(func(r reading) bool { return r.Stats.Details.HasDescriptors },
			gauge("container_file_descriptors", "Files that the container's processes have open.", details(func(d *pod.Details) uint64 { return d.Descriptors }))),
		known(func(r reading) bool { return r.Stats.Details.HasSockets },
			gauge("container_sockets", "Sockets among the open files.", details(func(d *pod.Details) uint64 { return d.Sockets }))),
		{name: "container_ulimits_soft", help: "Soft limit of the container's first process, by its name.", kind: criv1.MetricType_GAUGE, labels: []string{"ulimit"}, values: func(r reading, add adder) {
			if d := r.Stats.Details; d.HasOpenFiles {
				add(d.OpenFiles, "max_open_files") // the only one that cAdvisor has
			}
		}},
	}
}

// perDisk is a gauge of the file system that writable layers are on.
func perDisk(name, help string, value func(r reading) (uint64, bool)) containerMetric {
	return containerMetric{name: name, help: help, kind: criv1.MetricType_GAUGE, labels: []string{"device"}, values: func(r reading, add adder) {
		if n, ok := value(r); ok {
			add(n, r.Disk.Device)
		}
	}}
}
