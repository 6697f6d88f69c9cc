package ring

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func limits(r *criv1.LinuxContainerResources) func(*criv1.ContainerConfig) {
	return func(c *criv1.ContainerConfig) { c.Linux.Resources = r }
}

func TestPodResources(t *testing.T) {
	n := StartNode(t)
	pod := n.Pod(t, nil)
	r := &criv1.LinuxContainerResources{
		CpuShares: 512, CpuQuota: 50000, CpuPeriod: 100000, MemoryLimitInBytes: 64 << 20, CpusetCpus: "1", CpusetMems: "0", OomScoreAdj: 321,
	}
	id := n.Run(t, pod, limits(proto.CloneOf(r)))
	// Where a limit stands and what it is there, with either version.
	type file struct{ v1, want1, v2, want2 string }
	check := func(t *testing.T, files ...file) {
		t.Helper()
		for _, f := range files {
			name, want := f.v1, f.want1
			if cgroupV2() {
				name, want = f.v2, f.want2
			}
			if got := n.cgroupFile(t, id, f.v1, f.v2); got != want {
				t.Errorf("%s is %s, want %s", name, got, want)
			}
		}
	}
	memory := func(mb int) file {
		return file{"memory/memory.limit_in_bytes", fmt.Sprint(mb << 20), "memory.max", fmt.Sprint(mb << 20)}
	}
	cpus := func(list string) file { return file{"cpuset/cpuset.cpus", list, "cpuset.cpus", list} }
	shares := func(v1, v2 string) file { return file{"cpu/cpu.shares", v1, "cpu.weight", v2} }
	quota := func(v1, v2 string) file { return file{"cpu/cpu.cfs_quota_us", v1, "cpu.max", v2 + " 100000"} }
	t.Run("as asked for", func(t *testing.T) {
		check(t,
			shares("512", "59"), quota("50000", "50000"), file{"cpu/cpu.cfs_period_us", "100000", "cpu.max", "50000 100000"},
			memory(64), cpus("1"), file{"cpuset/cpuset.mems", "0", "cpuset.mems", "0"},
		)
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", n.PID(t, id)))
		if err != nil || strings.TrimSpace(string(b)) != "321" {
			t.Errorf("oom_score_adj is %q, %v", b, err)
		}
		if got := n.Status(t, id).Resources.Linux; !proto.Equal(got, r) {
			t.Errorf("status says %v, want %v", got, r)
		}
		if out := n.Sh(t, id, "nproc; grep Cpus_allowed_list /proc/self/status | cut -f2"); out != "1\n1" {
			t.Errorf("an exec sees %q", out)
		}
	})
	t.Run("execs are in the container's cgroup", func(t *testing.T) {
		lines := []string{"[:,]memory[:,]", "[:,]cpu[:,]", "[:,]pids[:,]", "[:,]cpuset[:,]", "[:,]devices[:,]"}
		if cgroupV2() {
			lines = []string{"^0::"}
		}
		for _, l := range lines {
			own := n.Sh(t, id, "grep -E '"+l+"' /proc/1/cgroup")
			if out := n.Sh(t, id, "grep -E '"+l+"' /proc/self/cgroup"); !strings.HasPrefix(out, own) || strings.Contains(out, "..") {
				t.Errorf("exec is in %q, the container in %q", out, own)
			}
		}
	})
	update := func(r *criv1.LinuxContainerResources) error {
		_, err := n.Runtime.UpdateContainerResources(within(t, callTime), &criv1.UpdateContainerResourcesRequest{ContainerId: id, Linux: r})
		return err
	}
	t.Run("update", func(t *testing.T) {
		if err := update(&criv1.LinuxContainerResources{MemoryLimitInBytes: 128 << 20, CpuShares: 1024, CpusetCpus: "0-1"}); err != nil {
			t.Fatal(err)
		}
		check(t, memory(128), shares("1024", "100"), cpus("0-1"), quota("50000", "50000"))
		if s := n.Status(t, id).Resources.Linux; s.MemoryLimitInBytes != 128<<20 || s.CpuShares != 1024 || s.CpuQuota != 50000 || s.OomScoreAdj != 321 {
			t.Errorf("status says %v", s)
		}
		if err := update(&criv1.LinuxContainerResources{CpuQuota: -1}); err != nil {
			t.Fatal(err)
		}
		check(t, quota("-1", "max"))
	})
	t.Run("an update is whole or not at all", func(t *testing.T) {
		n.Sh(t, id, "dd if=/dev/zero of=/dev/shm/fill bs=1M count=40 2>/dev/null")
		before := n.Status(t, id).Resources
		err := update(&criv1.LinuxContainerResources{CpuShares: 2048, CpusetCpus: "999"})
		if err == nil {
			t.Fatal("processor 999 was given out")
		}
		if c := codeOf(err); c == codes.Internal || c == codes.Unknown {
			t.Errorf("got %v", err)
		}
		check(t, shares("1024", "100"), cpus("0-1"))
		if after := n.Status(t, id).Resources; !proto.Equal(before, after) {
			t.Errorf("status said %v, now %v", before, after)
		}
		n.Sh(t, id, "rm /dev/shm/fill")
	})
	t.Run("after a restart", func(t *testing.T) {
		before := n.Status(t, id).Resources
		n.RestartDaemon()
		if after := n.Status(t, id).Resources; !proto.Equal(before, after) {
			t.Errorf("status said %v, now %v", before, after)
		}
		if err := update(&criv1.LinuxContainerResources{MemoryLimitInBytes: 96 << 20}); err != nil {
			t.Fatal(err)
		}
		check(t, memory(96))
	})
	t.Run("pids", func(t *testing.T) {
		few, err := n.TryRun(t, pod, limits(&criv1.LinuxContainerResources{Unified: map[string]string{"pids.max": "10"}}))
		if !cgroupV2() { // no unified files; the pod's own limit is set by kubelet
			wantError(t, err, codes.FailedPrecondition, "cgroup v2")
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		if got := n.cgroupFile(t, few, "pids/pids.max", "pids.max"); got != "10" {
			t.Errorf("pids.max is %s", got)
		}
	})
	t.Run("cgroup parent", func(t *testing.T) {
		parent := n.Below("burstable", "pod-of-mine")
		p := n.Pod(t, func(c *criv1.PodSandboxConfig) { c.Linux.CgroupParent = parent })
		id := n.Run(t, p, nil)
		if dir := cgroupOf(t, n.PID(t, id), "memory"); dir != cgroupTop("memory")+parent+"/"+cgroupName(id) {
			t.Errorf("the container is in %s", dir)
		}
		n.RemovePod(t, p)
		if _, err := os.Stat(cgroupTop("memory") + parent); err == nil {
			t.Error("the parent that naru made is still there")
		}
	})
	t.Run("values that cannot be", func(t *testing.T) {
		for _, r := range []*criv1.LinuxContainerResources{
			{CpuPeriod: 5}, {CpuQuota: -7}, {MemoryLimitInBytes: 100}, {CpusetCpus: "banana"}, {OomScoreAdj: 1001},
			{MemoryLimitInBytes: 64 << 20, MemorySwapLimitInBytes: 32 << 20}, {Unified: map[string]string{"cgroup.procs": "1"}},
		} {
			_, err := n.TryContainer(t, pod, limits(r))
			wantError(t, err, codes.InvalidArgument)
		}
	})
}

// eater needs more memory than it is allowed.
const eater = "dd if=/dev/zero of=/dev/null bs=80M count=1"

func TestPodOOM(t *testing.T) {
	n := StartNode(t)
	pod := n.Pod(t, nil)
	small := limits(&criv1.LinuxContainerResources{MemoryLimitInBytes: 20 << 20})
	t.Run("the first process", func(t *testing.T) {
		id := n.Run(t, pod, each(small, shell("exec "+eater)))
		if s := n.WaitExit(t, id); s.ExitCode != 137 || s.Reason != "OOMKilled" {
			t.Errorf("exit code %d, reason %q", s.ExitCode, s.Reason)
		}
	})
	t.Run("another process", func(t *testing.T) {
		id := n.Run(t, pod, each(small, shell(eater+"; echo survived; exit 4")))
		if s := n.WaitExit(t, id); s.ExitCode == 4 && s.Reason == "Completed" || n.LogText(t, id) == "" && s.Reason != "OOMKilled" {
			t.Errorf("exit code %d, reason %q", s.ExitCode, s.Reason)
		}
	})
	// What the kubelet asks for on cgroup v2, unless it is told not to: the first
	// process is ended with the child that needed too much. Under load it counts who
	// looks first: the daemon, or systemd, which removes a scope that is empty.
	t.Run("all for a child, under load", func(t *testing.T) {
		n.Run(t, pod, shell("for i in 1 2 3 4 5 6; do (while :; do :; done) & done; wait"))
		group := limits(&criv1.LinuxContainerResources{MemoryLimitInBytes: 20 << 20, Unified: map[string]string{"memory.oom.group": "1"}})
		for range scaled(5, 50) {
			id, err := n.TryRun(t, pod, each(group, shell("("+eater+"); echo survived; exit 4")))
			if !cgroupV2() {
				wantError(t, err, codes.FailedPrecondition, "cgroup v2")
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if s := n.WaitExit(t, id); s.ExitCode != 137 || s.Reason != "OOMKilled" || n.LogText(t, id) != "" {
				t.Errorf("exit code %d, reason %q, log %q", s.ExitCode, s.Reason, n.LogText(t, id))
			}
		}
	})
	t.Run("while the daemon is down", func(t *testing.T) {
		ctl := n.HostDir(t)
		id := n.Run(t, pod, each(small, mounts(Volume(ctl, "/ctl")), shell("while [ ! -e /ctl/go ]; do usleep 5000; done; exec "+eater)))
		pid := n.PID(t, id)
		n.KillDaemon()
		if err := os.WriteFile(ctl+"/go", nil, 0o644); err != nil {
			t.Fatal(err)
		}
		eventually(t, 20*time.Second, "the end of the container", func() bool { return !running(pid) })
		n.StartDaemon()
		if s := n.WaitExit(t, id); s.ExitCode != 137 || s.Reason != "OOMKilled" {
			t.Errorf("exit code %d, reason %q", s.ExitCode, s.Reason)
		}
	})
	t.Run("killed, but not for memory", func(t *testing.T) {
		id := n.Run(t, pod, small)
		n.stop(t, id, 0)
		if s := n.Status(t, id); s.ExitCode != 137 || s.Reason == "OOMKilled" {
			t.Errorf("exit code %d, reason %q", s.ExitCode, s.Reason)
		}
	})
}

func TestPodStats(t *testing.T) {
	n := StartNode(t)
	pod := n.Pod(t, func(c *criv1.PodSandboxConfig) { c.Linux.CgroupParent = n.Below("stats") })
	idle := n.Run(t, pod, nil)
	busy := n.Run(t, pod, shell("while :; do :; done"))
	stats := func(id string) *criv1.ContainerStats {
		t.Helper()
		r, err := n.Runtime.ContainerStats(within(t, callTime), &criv1.ContainerStatsRequest{ContainerId: id})
		if err != nil {
			t.Fatal(err)
		}
		return r.Stats
	}
	podStats := func() *criv1.PodSandboxStats {
		t.Helper()
		r, err := n.Runtime.PodSandboxStats(within(t, callTime), &criv1.PodSandboxStatsRequest{PodSandboxId: pod})
		if err != nil {
			t.Fatal(err)
		}
		return r.Stats
	}
	n.Sh(t, idle, "dd if=/dev/zero of=/written bs=1M count=9 2>/dev/null") // first: usage of a disk is read rarely
	first, firstPod := stats(busy), podStats()
	n.Sh(t, idle, "dd if=/dev/zero of=/dev/shm/fill bs=1M count=30 2>/dev/null; ping -c 3 -i 0.1 -s 1000 "+nodeIP)
	t.Run("processor", func(t *testing.T) {
		eventually(t, 10*time.Second, "the rate", func() bool {
			s := stats(busy).Cpu
			return s.UsageCoreNanoSeconds.Value > first.Cpu.UsageCoreNanoSeconds.Value+200e6 && s.UsageNanoCores.Value > 200e6
		})
		s := stats(busy).Cpu
		if took := time.Duration(s.Timestamp - first.Cpu.Timestamp); took <= 0 || s.UsageCoreNanoSeconds.Value-first.Cpu.UsageCoreNanoSeconds.Value > 2*uint64(took) {
			t.Errorf("one process used %v ns more in %v", s.UsageCoreNanoSeconds.Value-first.Cpu.UsageCoreNanoSeconds.Value, took)
		}
		eventually(t, 5*time.Second, "the sleeping container's rate to be low", func() bool {
			return stats(idle).Cpu.UsageNanoCores.GetValue() < 300e6
		})
	})
	t.Run("memory", func(t *testing.T) {
		eventually(t, 10*time.Second, "30 MiB more", func() bool {
			m := stats(idle).Memory
			return m.UsageBytes.Value > 30<<20 && m.WorkingSetBytes.Value > 29<<20
		})
		if m := stats(busy).Memory; m.UsageBytes.Value > 30<<20 {
			t.Errorf("the other container uses %d bytes", m.UsageBytes.Value)
		}
	})
	t.Run("writable layer", func(t *testing.T) {
		eventually(t, 60*time.Second, "9 MiB more", func() bool { return stats(idle).WritableLayer.GetUsedBytes().GetValue() > 9<<20 })
		if used := stats(busy).WritableLayer.UsedBytes.Value; used > 1<<20 {
			t.Errorf("a container that wrote nothing has %d bytes", used)
		}
	})
	t.Run("pod", func(t *testing.T) {
		eventually(t, 10*time.Second, "the pod's counters", func() bool {
			s := podStats().Linux
			a, b := firstPod.Linux.Network.DefaultInterface, s.Network.DefaultInterface
			return b.RxBytes.Value >= a.RxBytes.Value+3000 && b.TxBytes.Value >= a.TxBytes.Value+3000 && s.Memory.UsageBytes.Value > 30<<20 &&
				s.Cpu.UsageCoreNanoSeconds.Value > firstPod.Linux.Cpu.UsageCoreNanoSeconds.Value
		})
		s := podStats().Linux
		if s.Network.DefaultInterface.Name != "eth0" || s.Process.ProcessCount.Value != 2 || len(s.Containers) != 2 {
			t.Errorf("interface %q, %d processes, %d containers", s.Network.DefaultInterface.Name, s.Process.ProcessCount.Value, len(s.Containers))
		}
	})
	t.Run("lists", func(t *testing.T) {
		other := n.Run(t, n.Pod(t, nil), nil)
		for _, c := range []struct {
			f    *criv1.ContainerStatsFilter
			want int
		}{{nil, 3}, {&criv1.ContainerStatsFilter{PodSandboxId: pod}, 2}, {&criv1.ContainerStatsFilter{Id: other}, 1}, {&criv1.ContainerStatsFilter{Id: strings.Repeat("f", 64)}, 0}} {
			r, err := n.Runtime.ListContainerStats(within(t, callTime), &criv1.ListContainerStatsRequest{Filter: c.f})
			if err != nil || len(r.Stats) != c.want {
				t.Errorf("filter %v: %d, %v, want %d", c.f, len(r.GetStats()), err, c.want)
			}
		}
		r, err := n.Runtime.ListPodSandboxStats(within(t, callTime), &criv1.ListPodSandboxStatsRequest{})
		if err != nil || len(r.Stats) != 2 {
			t.Errorf("pods: %v, %v", r, err)
		}
	})
	t.Run("a container that has ended", func(t *testing.T) {
		n.stop(t, busy, 0)
		if s := stats(busy); s.Attributes.Id != busy || s.Cpu != nil || s.Memory != nil {
			t.Errorf("got %v", s)
		}
	})
}
