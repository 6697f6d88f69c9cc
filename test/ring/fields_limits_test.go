package ring

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const containerLimits = containerConfig + ".linux.resources"

// limitFile is a file of a container's cgroup, under the name that it has in
// the version that this machine uses for the controller.
type limitFile struct{ controller, v1, v2 string }

// path is that of the container's cgroup, empty where this machine has no such
// file.
func (f limitFile) path(t testing.TB, id string, pid int) string {
	t.Helper()
	p := ""
	for controllers, group := range cgroupsOf(t, pid) {
		if i := strings.Index(group, id); i >= 0 {
			group = group[:i+len(id)] // with version 2 processes are in a folder of it
		}
		switch {
		case controllers == "" && f.v2 != "":
			p = filepath.Join("/sys/fs/cgroup", group, f.v2)
		case strings.Contains(","+controllers+",", ","+f.controller+","):
			return existing(filepath.Join("/sys/fs/cgroup", f.controller, group, f.v1))
		}
	}
	return existing(p)
}

func existing(p string) string {
	if _, err := os.Stat(p); err != nil {
		return ""
	}
	return p
}

// readLimit is the file's content; ok is false where there is no such file.
func (n *Node) readLimit(t testing.TB, id string, f limitFile) (value string, ok bool) {
	t.Helper()
	p := f.path(t, id, n.PID(t, id))
	if p == "" {
		return "", false
	}
	return strings.TrimSpace(string(mustRead(t, p))), true
}

// onV1 tells whether this machine has version 1 of the memory controller.
func onV1(t testing.TB) bool { return cgroupsOf(t, os.Getpid())["memory"] != "" }

// wantLimit compares the file, in the version that this machine has.
func (n *Node) wantLimit(t testing.TB, id string, f limitFile, v1, v2 string) {
	t.Helper()
	got, ok := n.readLimit(t, id, f)
	if !ok {
		t.Errorf("there is no file for %v", f)
	}
	if !onV1(t) {
		v1 = v2
	}
	want(t, fmt.Sprint(f), got, v1)
}

// The files that tell what became of a limit.
var (
	quotaFile  = limitFile{"cpu", "cpu.cfs_quota_us", "cpu.max"}
	periodFile = limitFile{"cpu", "cpu.cfs_period_us", "cpu.max"}
	sharesFile = limitFile{"cpu", "cpu.shares", "cpu.weight"}
	memoryFile = limitFile{"memory", "memory.limit_in_bytes", "memory.max"}
	swapFile   = limitFile{"memory", "memory.memsw.limit_in_bytes", "memory.swap.max"}
	cpusFile   = limitFile{"cpuset", "cpuset.cpus", "cpuset.cpus"}
	memsFile   = limitFile{"cpuset", "cpuset.mems", "cpuset.mems"}
	hugeFile   = limitFile{"hugetlb", "hugetlb.2MB.limit_in_bytes", "hugetlb.2MB.max"}
)

// kernelLimits are limits that every machine can keep, and wantKernelLimits
// looks for them in the kernel. The least value of shares is the same weight
// under both rules for turning shares into weights.
func kernelLimits() *criv1.LinuxContainerResources {
	return &criv1.LinuxContainerResources{
		CpuPeriod: 50000, CpuQuota: 20000, CpuShares: 2, MemoryLimitInBytes: 64 << 20, MemorySwapLimitInBytes: 96 << 20, CpusetCpus: "0", CpusetMems: "0",
	}
}

func (n *Node) wantKernelLimits(t testing.TB, id string) {
	t.Helper()
	n.wantLimit(t, id, quotaFile, "20000", "20000 50000")
	n.wantLimit(t, id, periodFile, "50000", "20000 50000")
	n.wantLimit(t, id, sharesFile, "2", "1")
	n.wantLimit(t, id, memoryFile, "67108864", "67108864")
	n.wantLimit(t, id, cpusFile, "0", "0")
	n.wantLimit(t, id, memsFile, "0", "0")
	if _, ok := n.readLimit(t, id, swapFile); ok {
		n.wantLimit(t, id, swapFile, "100663296", "33554432")
	} else { // a kernel that does not count swap
		want(t, "swap limit", n.Status(t, id).Resources.Linux.MemorySwapLimitInBytes, 96<<20)
	}
}

// wantHugeLimit: kubelet reads the limit in the status; the kernel has it
// where it has huge pages and a controller.
func (n *Node) wantHugeLimit(t testing.TB, id string) {
	t.Helper()
	want(t, "huge pages", n.Status(t, id).Resources.Linux.HugepageLimits, []*criv1.HugepageLimit{{PageSize: "2MB", Limit: 4 << 20}})
	if _, ok := n.readLimit(t, id, hugeFile); ok {
		n.wantLimit(t, id, hugeFile, "4194304", "4194304")
	}
}

func limitChecks() []fieldCheck {
	return []fieldCheck{
		{
			"limits", "the cgroup",
			under(containerLimits, "cpu_period", "cpu_quota", "cpu_shares", "memory_limit_in_bytes", "memory_swap_limit_in_bytes"),
			func(t testing.TB, n *Node) { n.wantKernelLimits(t, n.box(t, limits(kernelLimits()))) },
		},
		{"OOM score", "/proc/self/oom_score_adj in the container", under(containerLimits, "oom_score_adj"), func(t testing.TB, n *Node) {
			id := n.box(t, limits(&criv1.LinuxContainerResources{OomScoreAdj: 321}))
			want(t, "score", n.Sh(t, id, "cat /proc/1/oom_score_adj /proc/self/oom_score_adj"), "321\n321")
		}},
		{"processors and memory nodes", "that those that are not there are refused", under(containerLimits, "cpuset_cpus", "cpuset_mems"), func(t testing.TB, n *Node) {
			pod := n.Pod(t, nil)
			for _, r := range []*criv1.LinuxContainerResources{{CpusetCpus: "4095"}, {CpusetMems: "1023"}} {
				if _, err := n.TryContainer(t, pod, limits(r)); err == nil {
					t.Errorf("%v was given out", r)
				}
			}
		}},
		{"huge pages", "ContainerStatus, and the cgroup where there is a controller", under(containerLimits+".hugepage_limits[]", "page_size", "limit"), func(t testing.TB, n *Node) {
			n.wantHugeLimit(t, n.box(t, limits(&criv1.LinuxContainerResources{HugepageLimits: []*criv1.HugepageLimit{{PageSize: "2MB", Limit: 4 << 20}}})))
		}},
		{"files of cgroup version 2", "the file; with version 1, that they are refused", under(containerLimits, "unified"), func(t testing.TB, n *Node) {
			id, err := n.TryContainer(t, n.Pod(t, nil), limits(&criv1.LinuxContainerResources{Unified: map[string]string{"memory.high": "33554432"}}))
			if onV1(t) {
				wantError(t, err, codes.FailedPrecondition, "cgroup v2")
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			n.wantLimit(t, id, limitFile{controller: "memory", v2: "memory.high"}, "", "33554432")
		}},
	}
}
