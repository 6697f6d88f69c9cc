package spec

import (
	"cmp"
	"maps"
	"math"
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime/cgroup"
)

// unlimited is RLIM_INFINITY.
const unlimited = math.MaxUint64

// rlimits are the built-in resource limits, one for every kind that the kernel
// knows: nothing is left to what the daemon happens to run under. The values
// are the kernel's own for init (include/asm-generic/resource.h) with two
// exceptions: no core files unless the process raises the soft limit, and
// enough files for servers that do (a soft limit of 1024 keeps select(2) safe).
// Memory and processes are limited by the cgroup.
var rlimits = []specs.POSIXRlimit{
	{Type: "RLIMIT_AS", Soft: unlimited, Hard: unlimited},
	{Type: "RLIMIT_CORE", Soft: 0, Hard: unlimited},
	{Type: "RLIMIT_CPU", Soft: unlimited, Hard: unlimited},
	{Type: "RLIMIT_DATA", Soft: unlimited, Hard: unlimited},
	{Type: "RLIMIT_FSIZE", Soft: unlimited, Hard: unlimited},
	{Type: "RLIMIT_LOCKS", Soft: unlimited, Hard: unlimited},
	{Type: "RLIMIT_MEMLOCK", Soft: 8 << 20, Hard: 8 << 20},
	{Type: "RLIMIT_MSGQUEUE", Soft: 819200, Hard: 819200},
	{Type: "RLIMIT_NICE", Soft: 0, Hard: 0},
	{Type: "RLIMIT_NOFILE", Soft: 1024, Hard: 524288},
	{Type: "RLIMIT_NPROC", Soft: unlimited, Hard: unlimited},
	{Type: "RLIMIT_RSS", Soft: unlimited, Hard: unlimited},
	{Type: "RLIMIT_RTPRIO", Soft: 0, Hard: 0},
	{Type: "RLIMIT_RTTIME", Soft: unlimited, Hard: unlimited},
	{Type: "RLIMIT_SIGPENDING", Soft: 65536, Hard: 65536},
	{Type: "RLIMIT_STACK", Soft: 8 << 20, Hard: unlimited},
}

// limits sets what is not a cgroup's: rlimits, brought below what the host
// allows, and oom_score_adj.
func (b *builder) limits() error {
	set := map[string]specs.POSIXRlimit{}
	for _, r := range rlimits {
		set[r.Type] = r
	}
	for _, r := range b.in.Defaults.Rlimits {
		if _, ok := set[r.Type]; !ok {
			return errs.New(errs.InvalidArgument, "default rlimit %q: unknown", clip(r.Type))
		}
		if r.Soft > r.Hard {
			return errs.New(errs.InvalidArgument, "default rlimit %s: soft %d is above hard %d", r.Type, r.Soft, r.Hard)
		}
		set[r.Type] = r
	}
	list := slices.SortedFunc(maps.Values(set), func(x, y specs.POSIXRlimit) int { return cmp.Compare(x.Type, y.Type) })
	for i := range list {
		if top, ok := b.in.Host.MaxRlimits[list[i].Type]; ok {
			list[i].Hard = min(list[i].Hard, top)
		}
		list[i].Soft = min(list[i].Soft, list[i].Hard)
	}
	b.spec.Process.Rlimits = list
	b.spec.Process.OOMScoreAdj = new(max(int(b.in.Resources.OOMScoreAdj), b.in.Host.MinOOMScoreAdj))
	return nil
}

// resources translates the cgroup limits. Zero means "not set".
func (b *builder) resources() error {
	r := &b.in.Resources
	if err := cgroup.Validate(r); err != nil {
		return err
	}
	out := b.spec.Linux.Resources
	if r.CPUShares != 0 || r.CPUQuota != 0 || r.CPUPeriod != 0 || r.CpusetCpus != "" || r.CpusetMems != "" {
		out.CPU = &specs.LinuxCPU{
			Shares: set(uint64(r.CPUShares)), Quota: set(r.CPUQuota), Period: set(uint64(r.CPUPeriod)),
			Cpus: r.CpusetCpus, Mems: r.CpusetMems,
		}
	}
	if r.Memory != 0 || r.MemorySwap != 0 {
		out.Memory = &specs.LinuxMemory{Limit: set(r.Memory), Swap: set(r.MemorySwap)}
	}
	if r.PidsLimit != 0 {
		out.Pids = &specs.LinuxPids{Limit: &r.PidsLimit}
	}
	for _, h := range r.Hugepages {
		out.HugepageLimits = append(out.HugepageLimits, specs.LinuxHugepageLimit{Pagesize: h.PageSize, Limit: h.Limit})
	}
	out.Unified = maps.Clone(r.Unified)
	return nil
}

func set[T comparable](v T) *T {
	if v == *new(T) {
		return nil
	}
	return &v
}
