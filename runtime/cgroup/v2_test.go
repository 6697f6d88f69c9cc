package cgroup

import (
	"os/exec"
	"path"
	"slices"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime"
)

// needControllers skips where the machine's version 2 tree has no controllers
// of its own (a hybrid host).
func needControllers(t *testing.T, d *Driver) {
	t.Helper()
	if d.mode != ModeV2 || !slices.Contains(d.want, "memory") {
		t.Skip("needs a host with cgroup v2 alone")
	}
}

var limitsV2 = runtime.Resources{
	CPUPeriod: 50000, CPUQuota: 25000, CPUShares: 512, CpusetCpus: "0", Memory: 64 << 20, PidsLimit: 50,
	Hugepages: []runtime.HugepageLimit{{PageSize: "2MB"}, {PageSize: "1GB"}},
	Unified:   map[string]string{"memory.high": "max", "memory.low": "1048576"},
}

func checkLimitsV2(t *testing.T, g *Group) {
	t.Helper()
	for file, want := range map[string]string{
		"cpu.max": "25000 50000", "cpu.weight": "59", "cpuset.cpus": "0", "memory.max": "67108864", "memory.high": "max", "memory.low": "1048576", "pids.max": "50",
	} {
		if got := fileOf(t, g, "unified", file); got != want {
			t.Errorf("%s: got %q, want %q", file, got, want)
		}
	}
	if exists(g.d.unified.fd, g.rel+"/memory.swap.max") {
		if got := fileOf(t, g, "unified", "memory.swap.max"); got != "0" {
			t.Errorf("swap with a memory limit: %s", got)
		}
	}
}

func TestLimitsV2(t *testing.T) {
	d, parent := hostDriver(t)
	needControllers(t, d)
	g, err := d.Create(bg, mustPath(t, d, parent, "c1"), limitsV2, nil, Options{OOMGroup: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { killAndRemove(t, g) })
	checkLimitsV2(t, g)
	if got := fileOf(t, g, "unified", "memory.oom.group"); got != "1" {
		t.Errorf("memory.oom.group: %s", got)
	}
	if err := g.Update(bg, runtime.Resources{CPUPeriod: 10000, Memory: 128 << 20, MemorySwap: 160 << 20}); err != nil {
		t.Fatal(err)
	}
	if got := fileOf(t, g, "unified", "cpu.max"); got != "25000 10000" {
		t.Errorf("period alone: %s", got)
	}
	before := fileOf(t, g, "unified", "cpu.weight") + fileOf(t, g, "unified", "pids.max") + fileOf(t, g, "unified", "memory.max")
	err = g.Update(bg, runtime.Resources{CPUShares: 2048, PidsLimit: 9, Memory: 70 << 20, Unified: map[string]string{"memory.max": "nonsense"}})
	wantClass(t, err, errs.InvalidArgument)
	if after := fileOf(t, g, "unified", "cpu.weight") + fileOf(t, g, "unified", "pids.max") + fileOf(t, g, "unified", "memory.max"); after != before {
		t.Errorf("a failed update changed %s to %s", before, after)
	}
	wantClass(t, g.Update(bg, runtime.Resources{Unified: map[string]string{"nothing.max": "1"}}), errs.FailedPrecondition)
}

// TestSystemdReal walks a container through a scope of the machine's systemd.
func TestSystemdReal(t *testing.T) {
	needRoot(t)
	if !systemdBooted() {
		t.Skip("needs systemd as pid 1")
	}
	d, err := New(Config{Driver: DriverAuto, StateDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	if !d.Systemd() {
		t.Skip("needs cgroup v2 alone")
	}
	const parent = "narutest-podx.slice"
	deny := []specs.LinuxDeviceCgroup{{Access: "rwm"}, dev(true, "c", 1, 3, "rw")}
	g, err := d.Create(bg, mustPath(t, d, parent, "c1"), limitsV2, deny, Options{OOMGroup: true})
	if err != nil {
		t.Fatal(err)
	}
	cmd := enter(t, nil, nil, "echo in; read x </dev/null; for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 10; done")
	start := time.Now()
	if err := g.AddPID(bg, cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	t.Logf("AddPID took %v", time.Since(start))
	checkLimitsV2(t, g)
	// systemd writes the properties of its units again when it is reloaded.
	if out, err := exec.CommandContext(t.Context(), "systemctl", "daemon-reload").CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	for file, want := range map[string]string{"memory.max": "67108864", "pids.max": "50", "cpuset.cpus": "0", "cpu.weight": "59"} {
		if got := fileOf(t, g, "unified", file); got != want {
			t.Errorf("after daemon-reload, %s: got %s, want %s", file, got, want)
		}
	}
	if err := g.Update(bg, runtime.Resources{CPUQuota: 12345, CPUPeriod: 100000, Memory: 96 << 20}); err != nil {
		t.Fatal(err)
	}
	if got := fileOf(t, g, "unified", "cpu.max"); got != "12345 100000" {
		t.Errorf("exact quota: %s", got)
	}
	e, err := g.NewExec(bg)
	if err != nil {
		t.Fatal(err)
	}
	x := enter(t, e.CloneFD(), nil, "r=no; (exec 9</dev/zero) 2>/dev/null && r=yes; [ $r = no ] && echo in; exec sleep 100")
	if err := e.Kill(bg); err != nil {
		t.Error(err)
	}
	_ = x.Wait()
	if err := e.Remove(bg); err != nil {
		t.Error(err)
	}
	wantClass(t, d.RemovePod(bg, parent), errs.FailedPrecondition)
	if err := g.Kill(bg); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if err := g.Remove(bg); err != nil {
		t.Fatal(err)
	}
	if err := d.RemovePod(bg, parent); err != nil {
		t.Fatal(err)
	}
	out, _ := exec.CommandContext(t.Context(), "systemctl", "list-units", "--all", "--no-legend", "--plain", "naru-c1.scope", parent).Output()
	if strings.TrimSpace(string(out)) != "" || exists(d.unified.fd, "narutest.slice/"+parent) {
		t.Errorf("left: %s", out)
	}
	// Once more under the same names: nothing of the first run is in the way.
	g, err = d.Create(bg, path.Join("/narutest.slice", parent, "naru-c1.scope"), runtime.Resources{}, deny, Options{})
	if err != nil {
		t.Fatal(err)
	}
	cmd = enter(t, nil, nil, "echo in; exec sleep 100")
	if err := g.AddPID(bg, cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	killAndRemove(t, g)
	_ = cmd.Wait()
	if err := d.RemovePod(bg, parent); err != nil {
		t.Fatal(err)
	}
}
