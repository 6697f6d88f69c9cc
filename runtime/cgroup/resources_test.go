package cgroup

import (
	"fmt"
	"math"
	"strings"
	"testing"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime"
)

func TestValidate(t *testing.T) {
	type R = runtime.Resources
	good := []R{
		{},
		{CPUQuota: -1}, {CPUQuota: 1000, CPUPeriod: 1000}, {CPUPeriod: 1000000},
		{CPUShares: 1}, {CPUShares: math.MaxInt64},
		{Memory: -1}, {Memory: 512 << 10}, {Memory: math.MaxInt64},
		{Memory: 1 << 20, MemorySwap: 1 << 20}, {MemorySwap: -1}, {MemorySwap: 1 << 30},
		{CpusetCpus: "0-3,8", CpusetMems: "0"},
		{OOMScoreAdj: -1000}, {OOMScoreAdj: 1000},
		{PidsLimit: -1}, {PidsLimit: 100},
		{Hugepages: []runtime.HugepageLimit{{PageSize: "2MB"}, {PageSize: "1GB", Limit: 1 << 30}, {PageSize: "64KB"}}},
		{Unified: map[string]string{"memory.high": "max", "hugetlb.2MB.rsvd.max": "0", "io.max": "8:0 rbps=1\n8:1 wbps=2", "io.bfq.weight": "100"}},
	}
	for i, r := range good {
		if err := Validate(&r); err != nil {
			t.Errorf("good %d: %v", i, err)
		}
	}
	bad := []R{
		{CPUQuota: 1}, {CPUQuota: 999}, {CPUQuota: -2}, {CPUQuota: math.MaxInt64}, {CPUQuota: 1 << 44},
		{CPUPeriod: 1}, {CPUPeriod: 999}, {CPUPeriod: -1}, {CPUPeriod: 1000001},
		{CPUShares: -1}, {CPUShares: math.MinInt64},
		{Memory: 1}, {Memory: -2}, {Memory: 512<<10 - 1}, {Memory: math.MinInt64},
		{MemorySwap: -2}, {Memory: 1 << 30, MemorySwap: 1 << 20}, {Memory: -1, MemorySwap: 5},
		{CpusetCpus: "0-99999"}, {CpusetCpus: "a"}, {CpusetCpus: "3-1"}, {CpusetCpus: ","}, {CpusetCpus: "0-"},
		{CpusetCpus: "-1"}, {CpusetCpus: "0\n1"}, {CpusetMems: "2048"}, {CpusetCpus: "0-1-2"}, {CpusetCpus: strings.Repeat("1,", 4000) + "1"},
		{OOMScoreAdj: 1001}, {OOMScoreAdj: -1001},
		{PidsLimit: -2}, {PidsLimit: math.MaxInt64},
		{Hugepages: []runtime.HugepageLimit{{PageSize: "1GB/../"}}}, {Hugepages: []runtime.HugepageLimit{{PageSize: ""}}},
		{Hugepages: []runtime.HugepageLimit{{PageSize: "0MB"}}}, {Hugepages: []runtime.HugepageLimit{{PageSize: "MB"}}},
	}
	for _, k := range []string{"../memory.max", "cgroup.procs", "cgroup.subtree_control", "memory.max/../../x", "memory", ".max", "memory.", "memory..max", "", "a/b.c", "memory.max\x00", "Memory.max", "memory.max\n", strings.Repeat("a", 80) + ".x"} {
		bad = append(bad, R{Unified: map[string]string{k: "1"}})
	}
	bad = append(bad, R{Unified: map[string]string{"memory.max": "1\x00"}}, R{Unified: map[string]string{"memory.max": strings.Repeat("1", 5000)}})
	for i, r := range bad {
		if err := Validate(&r); !errs.Is(err, errs.InvalidArgument) {
			t.Errorf("bad %d %+v: got %v", i, r, err)
		}
	}
}

func show(w []write) string {
	var b strings.Builder
	for _, x := range w {
		opt := ""
		if x.optional {
			opt = "?"
		}
		fmt.Fprintf(&b, "%s%s=%s;", x.file, opt, x.value)
	}
	return b.String()
}

func TestWritesV2(t *testing.T) {
	pages := map[string]bool{"2MB": true, "1GB": true}
	type R = runtime.Resources
	for _, c := range []struct {
		name string
		r    R
		cur  *current
		want string
	}{
		{"nothing", R{}, nil, ""},
		{"all", R{
			CPUPeriod: 50000, CPUQuota: 25000, CPUShares: 1024, CpusetCpus: "0-1", CpusetMems: "0", Memory: 1 << 20, MemorySwap: 3 << 20, PidsLimit: 7,
			Hugepages: []runtime.HugepageLimit{{PageSize: "2MB", Limit: 4}, {PageSize: "32MB"}},
			Unified:   map[string]string{"memory.low": "5", "io.max": "8:0 rbps=1\n8:1 wbps=2\n"},
		}, nil, "cpuset.mems=0;cpuset.cpus=0-1;cpu.weight=100;cpu.max=25000 50000;pids.max=7;memory.max=1048576;memory.swap.max?=2097152;" +
			"hugetlb.2MB.max?=4;hugetlb.2MB.rsvd.max?=4;io.max=8:0 rbps=1;io.max=8:1 wbps=2;memory.low=5;"},
		{"no swap by default", R{Memory: 1 << 20}, nil, "memory.max=1048576;memory.swap.max?=0;"},
		{"swap left alone on update", R{Memory: 1 << 20}, &current{quota: "max", memory: -1}, "memory.max=1048576;"},
		{"swap alone on update", R{MemorySwap: 5 << 20}, &current{quota: "max", memory: 2 << 20}, "memory.swap.max?=3145728;"},
		{"unlimited", R{Memory: -1, MemorySwap: -1, CPUQuota: -1, PidsLimit: -1}, nil, "cpu.max=max;pids.max=max;memory.max=max;memory.swap.max?=max;"},
		{"period alone", R{CPUPeriod: 20000}, &current{quota: "9000"}, "cpu.max=9000 20000;"},
		{"period alone at creation", R{CPUPeriod: 20000}, nil, "cpu.max=max 20000;"},
		{"quota alone", R{CPUQuota: 20000}, &current{quota: "9000"}, "cpu.max=20000;"},
		{"least shares", R{CPUShares: 1}, nil, "cpu.weight=1;"},
		{"kubelet's best effort shares", R{CPUShares: 2}, nil, "cpu.weight=1;"},
		{"most shares", R{CPUShares: math.MaxInt64}, nil, "cpu.weight=10000;"},
		{"one CPU of shares is the default weight", R{CPUShares: 1024}, nil, "cpu.weight=100;"},
	} {
		w, err := writesV2(&c.r, pages, c.cur)
		if err != nil || show(w) != c.want {
			t.Errorf("%s:\n got %s %v\nwant %s", c.name, show(w), err, c.want)
		}
	}
	for _, r := range []R{
		{MemorySwap: 5},
		{Hugepages: []runtime.HugepageLimit{{PageSize: "32MB", Limit: 1}}},
	} {
		if _, err := writesV2(&r, pages, nil); !errs.Is(err, errs.InvalidArgument) {
			t.Errorf("%+v: got %v", r, err)
		}
	}
	if _, err := writesV2(&R{MemorySwap: 5}, pages, &current{memory: 10}); !errs.Is(err, errs.InvalidArgument) {
		t.Errorf("swap below the current limit: got %v", err)
	}
}

func TestWritesV1(t *testing.T) {
	r := runtime.Resources{CPUShares: 1, CpusetCpus: "1", PidsLimit: 3, Hugepages: []runtime.HugepageLimit{{PageSize: "2MB", Limit: 4}}}
	w, err := writesV1(&r, map[string]bool{"2MB": true})
	want := "cpuset.cpus=1;cpu.shares=2;pids.max=3;hugetlb.2MB.limit_in_bytes?=4;hugetlb.2MB.rsvd.limit_in_bytes?=4;"
	if err != nil || show(w) != want {
		t.Errorf("got %s %v, want %s", show(w), err, want)
	}
	_, err = writesV1(&runtime.Resources{Unified: map[string]string{"memory.high": "max"}}, nil)
	wantClass(t, err, errs.FailedPrecondition)
}

func TestNextMemsw(t *testing.T) {
	for _, c := range []struct{ curLimit, curMemsw, limit, want, next int64 }{
		{100, 100, 200, 0, 200}, {100, 150, 200, 0, 250}, {100, 150, 50, 0, 100},
		{-1, -1, 200, 0, -1}, {100, 150, -1, 0, -1}, {100, 150, 200, 400, 400}, {100, -1, 200, 0, -1},
	} {
		if got := nextMemsw(c.curLimit, c.curMemsw, c.limit, c.want); got != c.next {
			t.Errorf("%+v: got %d", c, got)
		}
	}
}

func FuzzCpuset(f *testing.F) {
	for _, s := range []string{"", "0-3,8", "a", "-", "1-", "0-99999", ",,", "8191"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if checkSet("cpus", s, maxCPU) != nil || s == "" {
			return
		}
		b := bitmap(s)
		if len(b) == 0 || len(b) > (maxCPU+8)/8 || b[len(b)-1] == 0 {
			t.Fatalf("%q: bitmap of %d bytes", s, len(b))
		}
	})
}

func FuzzUnifiedKey(f *testing.F) {
	for _, s := range []string{"memory.high", "cgroup.procs", "../x.y", "hugetlb.1GB.max", ".", "a.b/c"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, k string) {
		if validUnifiedKey(k) && (strings.ContainsAny(k, "/\x00\n ") || strings.HasPrefix(k, "cgroup.") || strings.Contains(k, "..")) {
			t.Fatalf("accepted %q", k)
		}
	})
}

func TestUnitLimits(t *testing.T) {
	r := runtime.Resources{CPUShares: 1024, CPUQuota: 12345, CPUPeriod: 100000, Memory: 10 << 20, MemorySwap: 12 << 20, PidsLimit: -1, CpusetCpus: "0,9", CpusetMems: "0"}
	got := map[string]string{}
	for _, p := range unitLimits(&r) {
		got[p.Name] = fmt.Sprint(p.Value.Value())
	}
	want := map[string]string{
		"CPUWeight": "100", "CPUQuotaPerSecUSec": "130000", "CPUQuotaPeriodUSec": "100000", "MemoryMax": "10485760",
		"MemorySwapMax": "2097152", "TasksMax": "18446744073709551615", "AllowedCPUs": "[1 2]", "AllowedMemoryNodes": "[1]",
	}
	for k, v := range want {
		if got[k] != v {
			t.Errorf("%s: got %s, want %s", k, got[k], v)
		}
	}
	if len(got) != len(want) {
		t.Errorf("got %v", got)
	}
	if p := unitLimits(&runtime.Resources{}); len(p) != 0 {
		t.Errorf("properties for nothing: %v", p)
	}
}
