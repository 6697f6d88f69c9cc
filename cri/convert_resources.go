package cri

import (
	"math"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/pod"
)

// resources converts and checks limits. Nil means that nothing is set.
func resources(field string, r *criv1.LinuxContainerResources) (pod.Resources, error) {
	for _, n := range []struct {
		name        string
		value       int64
		least, most int64
	}{
		{"cpu_period", r.GetCpuPeriod(), 0, math.MaxInt64},
		{"cpu_quota", r.GetCpuQuota(), -1, math.MaxInt64},
		{"cpu_shares", r.GetCpuShares(), 0, math.MaxInt64},
		{"memory_limit_in_bytes", r.GetMemoryLimitInBytes(), -1, math.MaxInt64},
		{"memory_swap_limit_in_bytes", r.GetMemorySwapLimitInBytes(), -1, math.MaxInt64},
		{"oom_score_adj", r.GetOomScoreAdj(), -1000, 1000},
	} {
		if err := checkRange(field+"."+n.name, n.value, n.least, n.most); err != nil {
			return pod.Resources{}, err
		}
	}
	for name, list := range map[string]string{"cpuset_cpus": r.GetCpusetCpus(), "cpuset_mems": r.GetCpusetMems()} {
		if list != "" && !cpuListPattern.MatchString(list) {
			return pod.Resources{}, invalid("%s.%s %q is not a list like 0-3,7", field, name, clip(list))
		}
	}
	out := pod.Resources{
		CPUPeriod:   r.GetCpuPeriod(),
		CPUQuota:    r.GetCpuQuota(),
		CPUShares:   r.GetCpuShares(),
		CpusetCpus:  r.GetCpusetCpus(),
		CpusetMems:  r.GetCpusetMems(),
		Memory:      r.GetMemoryLimitInBytes(),
		MemorySwap:  r.GetMemorySwapLimitInBytes(),
		OOMScoreAdj: r.GetOomScoreAdj(),
		Unified:     r.GetUnified(),
	}
	for _, h := range r.GetHugepageLimits() {
		if !pageSizePattern.MatchString(h.GetPageSize()) {
			return pod.Resources{}, invalid("%s.hugepage_limits: page size %q is not like 2MB", field, clip(h.GetPageSize()))
		}
		out.Hugepages = append(out.Hugepages, pod.HugepageLimit{PageSize: h.GetPageSize(), Limit: h.GetLimit()})
	}
	for file, value := range out.Unified {
		if !unifiedPattern.MatchString(file) {
			return pod.Resources{}, invalid("%s.unified: %q is not a cgroup file", field, clip(file))
		}
		if err := checkText(field+".unified."+file, value); err != nil {
			return pod.Resources{}, err
		}
	}
	return out, nil
}

// optionalResources is resources that keeps nil apart.
func optionalResources(field string, r *criv1.LinuxContainerResources) (*pod.Resources, error) {
	if r == nil {
		return nil, nil
	}
	out, err := resources(field, r)
	if err != nil {
		return nil, err
	}
	return &out, nil
}

// criResources is the reverse of resources.
func criResources(r pod.Resources) *criv1.LinuxContainerResources {
	out := &criv1.LinuxContainerResources{
		CpuPeriod:              r.CPUPeriod,
		CpuQuota:               r.CPUQuota,
		CpuShares:              r.CPUShares,
		MemoryLimitInBytes:     r.Memory,
		OomScoreAdj:            r.OOMScoreAdj,
		CpusetCpus:             r.CpusetCpus,
		CpusetMems:             r.CpusetMems,
		Unified:                r.Unified,
		MemorySwapLimitInBytes: r.MemorySwap,
	}
	for _, h := range r.Hugepages {
		out.HugepageLimits = append(out.HugepageLimits, &criv1.HugepageLimit{PageSize: h.PageSize, Limit: h.Limit})
	}
	return out
}
