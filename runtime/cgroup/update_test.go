package cgroup

import (
	"fmt"
	"strings"
	"syscall"
	"testing"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime"
)

func TestUpdateV1(t *testing.T) {
	d, parent := hostDriver(t)
	needV1(t, d)
	g := create(t, d, parent, "c1", runtime.Resources{Memory: 64 << 20, CPUShares: 100, CPUPeriod: 100000, CPUQuota: 50000})
	must := func(r runtime.Resources) {
		t.Helper()
		if err := g.Update(bg, r); err != nil {
			t.Fatal(err)
		}
	}
	is := func(ctrl, file, want string) {
		t.Helper()
		if got := fileOf(t, g, ctrl, file); got != want {
			t.Errorf("%s: got %s, want %s", file, got, want)
		}
	}
	must(runtime.Resources{Memory: 128 << 20, CPUShares: 200, CPUPeriod: 10000, CPUQuota: 20000}) // raises both memory files
	is("memory", limitV1, "134217728")
	is("cpu", "cpu.shares", "200")
	is("cpu", "cpu.cfs_quota_us", "20000")
	must(runtime.Resources{Memory: 32 << 20}) // lowers both
	is("memory", limitV1, "33554432")
	is("cpu", "cpu.shares", "200")
	must(runtime.Resources{CPUQuota: -1})
	is("cpu", "cpu.cfs_quota_us", "-1")
	if exists(d.control["memory"].fd, g.rel+"/"+memswV1) {
		is("memory", memswV1, "33554432")
		must(runtime.Resources{MemorySwap: 48 << 20})
		is("memory", memswV1, "50331648")
		must(runtime.Resources{Memory: 40 << 20})
		is("memory", memswV1, "58720256")
		wantClass(t, g.Update(bg, runtime.Resources{MemorySwap: 1 << 20}), errs.InvalidArgument)
		must(runtime.Resources{Memory: -1})
		must(runtime.Resources{Memory: 32 << 20, MemorySwap: 32 << 20})
	}

	// All or nothing: the cpuset is refused by the kernel after others were set.
	before := snapshot(t, g)
	err := g.Update(bg, runtime.Resources{CPUShares: 999, PidsLimit: 5, CpusetMems: "0", CpusetCpus: "8000"})
	wantClass(t, err, errs.InvalidArgument)
	err = g.Update(bg, runtime.Resources{CPUShares: 999, PidsLimit: 5, CPUPeriod: 20000, Memory: 40 << 20, MemorySwap: 20 << 20})
	wantClass(t, err, errs.InvalidArgument)
	if after := snapshot(t, g); after != before {
		t.Errorf("a failed update changed\n%s\nto\n%s", before, after)
	}
	wantClass(t, (&Group{Path: g.Path + "x", rel: g.rel + "x", d: d}).Update(bg, runtime.Resources{}), errs.NotFound)
}

// TestUpdateRollsBack makes the kernel refuse the last of several writes: the
// quota of a child cannot exceed its parent's.
func TestUpdateRollsBack(t *testing.T) {
	d, parent := hostDriver(t)
	needV1(t, d)
	g := create(t, d, parent, "c1", runtime.Resources{CPUShares: 100, PidsLimit: 9})
	pod, err := d.ParentPath(parent)
	if err != nil {
		t.Fatal(err)
	}
	if err := writeAt(d.control["cpu"].fd, pod[1:]+"/cpu.cfs_quota_us", "100000"); err != nil {
		t.Fatal(err)
	}
	before := snapshot(t, g)
	err = g.Update(bg, runtime.Resources{CPUShares: 300, PidsLimit: 77, CPUQuota: 900000})
	wantClass(t, err, errs.InvalidArgument)
	if after := snapshot(t, g); after != before {
		t.Errorf("a failed update changed\n%s\nto\n%s", before, after)
	}
}

func snapshot(t testing.TB, g *Group) string {
	var b strings.Builder
	for _, f := range []string{"cpu cpu.shares", "cpu cpu.cfs_quota_us", "cpu cpu.cfs_period_us", "pids pids.max", "memory " + limitV1, "cpuset cpuset.cpus", "cpuset cpuset.mems"} {
		ctrl, name, _ := strings.Cut(f, " ")
		fmt.Fprintln(&b, name, fileOf(t, g, ctrl, name))
	}
	return b.String()
}

// hog allocates mb MiB of anonymous memory in a shell variable and stays.
func hog(mb int) string {
	return fmt.Sprintf("x=$(head -c %dM /dev/zero | tr '\\0' x); echo in; while :; do sleep 1; done", mb)
}

func TestUpdateMemoryBelowUsage(t *testing.T) {
	d, parent := hostDriver(t)
	g := create(t, d, parent, "c1", runtime.Resources{Memory: 256 << 20})
	cmd := enter(t, g.CloneFD(), g.TaskFDs(), hog(40))
	wantClass(t, g.Update(bg, runtime.Resources{Memory: 8 << 20}), errs.FailedPrecondition)
	if err := g.Update(bg, runtime.Resources{Memory: 200 << 20}); err != nil {
		t.Errorf("a limit above the use: %v", err)
	}
	if err := syscall.Kill(cmd.Process.Pid, 0); err != nil {
		t.Errorf("the process died: %v", err)
	}
	if n, err := g.OOMKills(); n != 0 || err != nil {
		t.Errorf("OOM kills: %d %v", n, err)
	}
}

func TestOOMKills(t *testing.T) {
	d, parent := hostDriver(t)
	g := create(t, d, parent, "c1", runtime.Resources{Memory: 16 << 20})
	if n, err := g.OOMKills(); n != 0 || err != nil {
		t.Fatalf("before: %d %v", n, err)
	}
	cmd := enter(t, g.CloneFD(), g.TaskFDs(), "head -c 100M /dev/zero | tail -c 100M >/dev/null") // keeps it all in memory
	_ = cmd.Wait()
	if n, err := g.OOMKills(); n == 0 || err != nil {
		t.Errorf("after: %d %v", n, err)
	}
}
