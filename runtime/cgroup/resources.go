package cgroup

import (
	"strconv"
	"strings"

	"github.com/containerd/cgroups/v3/cgroup2"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime"
)

// Limits of the kernel, and one of ours.
const (
	minQuota  = 1000      // µs, min_cfs_quota_period in kernel/sched/core.c
	maxQuota  = 1<<44 - 1 // µs, max_bw_runtime_us there
	minPeriod = 1000      // µs
	maxPeriod = 1000000   // µs
	minShares = 2         // MIN_SHARES of the scheduler
	maxShares = 1 << 18   // MAX_SHARES
	minMemory = 512 << 10 // bytes: below it not even execve succeeds, the OOM killer comes first
	maxCPU    = 8191      // highest NR_CPUS of any distribution, less one
	maxNode   = 1023      // MAX_NUMNODES less one
	maxPids   = 4 << 20   // PID_MAX_LIMIT
	maxValue  = 4096      // bytes of one unified value
	maxUnifed = 64        // entries of the unified map
)

// Validate reports what can never work on any host, as errs.InvalidArgument.
// Zero means "not set" throughout. CPU shares outside 2…262144 are brought
// into that range, as the kernel does; everything else is refused.
func Validate(r *runtime.Resources) error {
	bad := func(format string, args ...any) error { return errs.New(errs.InvalidArgument, format, args...) }
	switch {
	case r.CPUPeriod != 0 && (r.CPUPeriod < minPeriod || r.CPUPeriod > maxPeriod):
		return bad("CPU period %d µs: want %d to %d", r.CPUPeriod, minPeriod, maxPeriod)
	case r.CPUQuota < -1 || r.CPUQuota > maxQuota || (r.CPUQuota > 0 && r.CPUQuota < minQuota):
		return bad("CPU quota %d µs: want -1 (none), or %d and more", r.CPUQuota, minQuota)
	case r.CPUShares < 0:
		return bad("CPU shares %d: want 2 to 262144", r.CPUShares)
	case r.Memory < -1 || (r.Memory > 0 && r.Memory < minMemory):
		return bad("memory limit %d bytes: want -1 (none), or %d and more", r.Memory, minMemory)
	case r.MemorySwap < -1:
		return bad("memory+swap limit %d bytes: want -1 (none) or a size", r.MemorySwap)
	case r.MemorySwap > 0 && r.Memory == -1:
		return bad("memory+swap limit %d bytes without a memory limit", r.MemorySwap)
	case r.MemorySwap > 0 && r.Memory > 0 && r.MemorySwap < r.Memory:
		return bad("memory+swap limit %d is below the memory limit %d: it counts both", r.MemorySwap, r.Memory)
	case r.OOMScoreAdj < -1000 || r.OOMScoreAdj > 1000:
		return bad("oom_score_adj %d: want -1000 to 1000", r.OOMScoreAdj)
	case r.PidsLimit < -1 || r.PidsLimit > maxPids:
		return bad("pids limit %d: want -1 (none) or 1 to %d", r.PidsLimit, maxPids)
	}
	if err := checkSet("cpuset cpus", r.CpusetCpus, maxCPU); err != nil {
		return err
	}
	if err := checkSet("cpuset mems", r.CpusetMems, maxNode); err != nil {
		return err
	}
	for _, h := range r.Hugepages {
		if !validPageSize(h.PageSize) {
			return bad("huge page size %q: want a number and KB, MB or GB", clip(h.PageSize))
		}
	}
	return checkUnified(r.Unified)
}

// checkSet parses a list of ranges like "0-3,8" (cpuset(7), List format).
func checkSet(what, s string, limit int) error {
	if s == "" {
		return nil
	}
	bad := errs.New(errs.InvalidArgument, "%s %q: want numbers up to %d and ranges, as in 0-3,8", what, clip(s), limit)
	if len(s) > maxValue {
		return bad
	}
	for _, part := range strings.Split(s, ",") {
		lo, hi, ranged := strings.Cut(part, "-")
		a, ok := smallNumber(lo, limit)
		if !ok {
			return bad
		}
		if ranged {
			b, ok := smallNumber(hi, limit)
			if !ok || b < a {
				return bad
			}
		}
	}
	return nil
}

func smallNumber(s string, limit int) (int, bool) {
	if s == "" || len(s) > 5 {
		return 0, false
	}
	n := 0
	for i := 0; i < len(s); i++ {
		if s[i] < '0' || s[i] > '9' {
			return 0, false
		}
		n = n*10 + int(s[i]-'0')
	}
	return n, n <= limit
}

func validPageSize(s string) bool {
	for _, unit := range []string{"KB", "MB", "GB"} {
		if n, ok := strings.CutSuffix(s, unit); ok {
			v, ok := smallNumber(n, 65536)
			return ok && v > 0
		}
	}
	return false
}

// checkUnified admits names of controllers' files only. The cgroup.* files
// move processes and hand out controllers: they are Naru's.
func checkUnified(m map[string]string) error {
	if len(m) > maxUnifed {
		return errs.New(errs.InvalidArgument, "more than %d unified cgroup values", maxUnifed)
	}
	for k, v := range m {
		if !validUnifiedKey(k) {
			return errs.New(errs.InvalidArgument, "unified cgroup key %q: want a file of a controller, like memory.high", clip(k))
		}
		if len(v) > maxValue || strings.ContainsRune(v, 0) {
			return errs.New(errs.InvalidArgument, "unified cgroup value of %s: longer than %d bytes, or with a NUL in it", k, maxValue)
		}
	}
	return nil
}

func validUnifiedKey(k string) bool {
	ctrl, file, ok := strings.Cut(k, ".")
	if !ok || ctrl == "" || file == "" || ctrl == "cgroup" || len(k) > 64 {
		return false
	}
	for i := 0; i < len(ctrl); i++ {
		if c := ctrl[i]; !(c >= 'a' && c <= 'z' || c == '_') {
			return false
		}
	}
	for _, part := range strings.Split(file, ".") {
		if part == "" {
			return false
		}
		for i := 0; i < len(part); i++ {
			if !plain(part[i]) {
				return false
			}
		}
	}
	return true
}

// write is one value for one file.
type write struct {
	controller string
	file       string
	value      string
	// optional: where the file is not there, what it would limit is not there
	// either (swap accounting off, huge page size unknown and limited to 0).
	optional bool
}

// current is what a group has already, where a partial update needs it.
type current struct {
	quota  string // first word of cpu.max
	memory int64  // memory limit, -1 = none
}

// writesV2 turns limits into the files of the unified hierarchy, in the order
// in which they are written. r has passed Validate; cur is nil at creation.
func writesV2(r *runtime.Resources, pages map[string]bool, cur *current) ([]write, error) {
	var w []write
	add := func(ctrl, file, value string) { w = append(w, write{ctrl, file, value, false}) }
	if r.CpusetMems != "" {
		add("cpuset", "cpuset.mems", r.CpusetMems)
	}
	if r.CpusetCpus != "" {
		add("cpuset", "cpuset.cpus", r.CpusetCpus)
	}
	if r.CPUShares != 0 {
		weight := cgroup2.ConvertCPUSharesToCgroupV2Value(uint64(clampShares(r.CPUShares)))
		add("cpu", "cpu.weight", strconv.FormatUint(weight, 10))
	}
	if v := cpuMax(r.CPUQuota, r.CPUPeriod, cur); v != "" {
		add("cpu", "cpu.max", v)
	}
	if r.PidsLimit != 0 {
		add("pids", "pids.max", orMax(r.PidsLimit))
	}
	if r.Memory != 0 {
		add("memory", "memory.max", orMax(r.Memory))
	}
	swap, err := swapMax(r, cur)
	if err != nil {
		return nil, err
	}
	if swap != "" {
		w = append(w, write{"memory", "memory.swap.max", swap, true})
	}
	huge, err := hugeWrites(r.Hugepages, pages, ".max", ".rsvd.max")
	if err != nil {
		return nil, err
	}
	w = append(w, huge...)
	return append(w, unifiedWrites(r.Unified)...), nil
}

// swapMax is the value of memory.swap.max, or "" to leave it. CRI counts
// memory and swap together, version 2 swap alone. A container with a memory
// limit gets no swap unless it is given some.
func swapMax(r *runtime.Resources, cur *current) (string, error) {
	memory := r.Memory
	if memory == 0 && cur != nil {
		memory = cur.memory
	}
	switch {
	case r.MemorySwap == -1:
		return "max", nil
	case r.MemorySwap > 0 && memory <= 0:
		return "", errs.New(errs.InvalidArgument, "memory+swap limit %d bytes without a memory limit", r.MemorySwap)
	case r.MemorySwap > 0 && r.MemorySwap < memory:
		return "", errs.New(errs.InvalidArgument, "memory+swap limit %d is below the memory limit %d: it counts both", r.MemorySwap, memory)
	case r.MemorySwap > 0:
		return itoa(r.MemorySwap - memory), nil
	case cur == nil && r.Memory > 0:
		return "0", nil
	}
	return "", nil
}

// writesV1 is writesV2 for version 1. Memory and CPU bandwidth, whose files
// bind each other, are left to applyMemoryV1 and applyBandwidthV1.
func writesV1(r *runtime.Resources, pages map[string]bool) ([]write, error) {
	if len(r.Unified) > 0 {
		return nil, errs.New(errs.FailedPrecondition, "unified cgroup values need cgroup v2: this host mounts version 1 controllers")
	}
	var w []write
	add := func(ctrl, file, value string) { w = append(w, write{ctrl, file, value, false}) }
	if r.CpusetMems != "" {
		add("cpuset", "cpuset.mems", r.CpusetMems)
	}
	if r.CpusetCpus != "" {
		add("cpuset", "cpuset.cpus", r.CpusetCpus)
	}
	if r.CPUShares != 0 {
		add("cpu", "cpu.shares", itoa(clampShares(r.CPUShares)))
	}
	if r.PidsLimit != 0 {
		add("pids", "pids.max", orMax(r.PidsLimit))
	}
	huge, err := hugeWrites(r.Hugepages, pages, ".limit_in_bytes", ".rsvd.limit_in_bytes")
	return append(w, huge...), err
}

// hugeWrites limits each page size twice: used pages, and reserved ones
// (kernel ≥ 5.7), without which mmap succeeds and the touch dies of SIGBUS.
// kubelet names every size of the host, most with 0; a size that the host
// lacks is an error only when somebody wants pages of it.
func hugeWrites(limits []runtime.HugepageLimit, pages map[string]bool, file, rsvd string) ([]write, error) {
	var w []write
	for _, h := range limits {
		if len(pages) > 0 && !pages[h.PageSize] {
			if h.Limit == 0 {
				continue
			}
			return nil, errs.New(errs.InvalidArgument, "huge pages of %s: this host has none of that size", h.PageSize)
		}
		v := strconv.FormatUint(h.Limit, 10)
		w = append(w, write{"hugetlb", "hugetlb." + h.PageSize + file, v, true},
			write{"hugetlb", "hugetlb." + h.PageSize + rsvd, v, true})
	}
	return w, nil
}

// unifiedWrites orders the raw values by name, and splits those with several
// lines (io.max takes one device a write).
func unifiedWrites(m map[string]string) []write {
	var w []write
	for _, k := range sortedKeys(m) {
		ctrl, _, _ := strings.Cut(k, ".")
		for _, line := range strings.Split(strings.TrimRight(m[k], "\n"), "\n") {
			w = append(w, write{ctrl, k, line, false})
		}
	}
	return w
}

// cpuMax is the value of cpu.max, or "" to leave it. The kernel keeps the
// period when only the first word is written, but not the other way round.
func cpuMax(quota, period int64, cur *current) string {
	if period == 0 {
		switch {
		case quota == 0:
			return ""
		case quota < 0:
			return "max"
		}
		return itoa(quota)
	}
	if quota == 0 && cur != nil {
		return cur.quota + " " + itoa(period)
	}
	p := uint64(period)
	if quota <= 0 {
		return string(cgroup2.NewCPUMax(nil, &p))
	}
	return string(cgroup2.NewCPUMax(&quota, &p))
}

func clampShares(n int64) int64 { return min(max(n, minShares), maxShares) }

func orMax(n int64) string {
	if n < 0 {
		return "max"
	}
	return itoa(n)
}

func itoa(n int64) string { return strconv.FormatInt(n, 10) }
