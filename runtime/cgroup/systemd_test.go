package cgroup

import (
	"context"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"
	"sync"
	"testing"

	sddbus "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime"
)

// fakeSystemd does with folders of the version 2 tree what systemd does.
type fakeSystemd struct {
	mu    sync.Mutex
	d     *Driver
	calls []string
	units map[string]string // unit → path
	fail  map[string]error  // by call
	job   string            // result of jobs, "" = done
}

func (f *fakeSystemd) note(call, unit string) error {
	f.calls = append(f.calls, call+" "+unit)
	return f.fail[call]
}

func props(p []sddbus.Property) map[string]any {
	m := map[string]any{}
	for _, x := range p {
		m[x.Name] = x.Value.Value()
	}
	return m
}

func (f *fakeSystemd) StartTransientUnitContext(_ context.Context, name, mode string, list []sddbus.Property, ch chan<- string) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.note("start", name); err != nil {
		return 0, err
	}
	if f.units[name] != "" {
		return 0, dbus.Error{Name: "org.freedesktop.systemd1.UnitExists"}
	}
	if mode != "replace" {
		return 0, fmt.Errorf("mode %s", mode)
	}
	p := props(list)
	var dir string
	if strings.HasSuffix(name, ".slice") {
		dir, _ = expandSlice(name)
	} else {
		slice, _ := expandSlice(p["Slice"].(string))
		dir = slice + "/" + name
		if p["Delegate"] != true {
			return 0, fmt.Errorf("a scope without Delegate")
		}
	}
	for i := 1; i <= len(dir); i++ {
		if i == len(dir) || dir[i] == '/' {
			if err := unix.Mkdirat(f.d.unified.fd, dir[1:i], 0o755); err != nil && err != unix.EEXIST {
				return 0, err
			}
		}
	}
	if pids, ok := p["PIDs"].([]uint32); ok {
		if err := writeAt(f.d.unified.fd, dir[1:]+"/cgroup.procs", fmt.Sprint(pids[0])); err != nil {
			return 0, err
		}
	}
	f.units[name] = dir
	f.finish(ch)
	return 1, nil
}

func (f *fakeSystemd) finish(ch chan<- string) {
	if f.job == "" {
		ch <- "done"
	} else {
		ch <- f.job
	}
}

func (f *fakeSystemd) StopUnitContext(_ context.Context, name, _ string, ch chan<- string) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.note("stop", name); err != nil {
		return 0, err
	}
	dir := f.units[name]
	if dir == "" {
		return 0, dbus.Error{Name: "org.freedesktop.systemd1.NoSuchUnit"}
	}
	_ = unix.Unlinkat(f.d.unified.fd, dir[1:], unix.AT_REMOVEDIR)
	delete(f.units, name)
	f.finish(ch)
	return 1, nil
}

func (f *fakeSystemd) ResetFailedUnitContext(_ context.Context, name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.units, name)
	return f.note("reset", name)
}

func (f *fakeSystemd) SetUnitPropertiesContext(_ context.Context, name string, runtime bool, list ...sddbus.Property) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.note("set", name+" "+fmt.Sprint(props(list)))
}

func (f *fakeSystemd) Connected() bool { return true }
func (f *fakeSystemd) Close()          {}

func systemdDriver(t *testing.T) (*Driver, *fakeSystemd) {
	d := unifiedDriver(t)
	f := &fakeSystemd{d: d, units: map[string]string{}, fail: map[string]error{}}
	d.systemd = true
	d.defaultParent = "naru.slice"
	d.units = func() (unitManager, error) { return f, nil }
	return d, f
}

func TestSystemdScope(t *testing.T) {
	d, f := systemdDriver(t)
	parent := "kubepods-burstable-podX.slice"
	g, err := d.Create(bg, mustPath(t, d, parent, "c1"), runtime.Resources{}, nil, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if g.CloneFD() != nil || len(g.TaskFDs()) != 0 {
		t.Error("a scope without a process has entrances")
	}
	wantClass(t, g.Update(bg, runtime.Resources{}), errs.FailedPrecondition)
	_, err = g.NewExec(bg)
	wantClass(t, err, errs.FailedPrecondition)

	cmd := enter(t, nil, nil, "echo in; exec sleep 100")
	if err := g.AddPID(bg, cmd.Process.Pid); err != nil {
		t.Fatal(err)
	}
	if pids, err := g.Procs(); err != nil || !slices.Equal(pids, []int{cmd.Process.Pid}) {
		t.Errorf("%v %v", pids, err)
	}
	if g.CloneFD() == nil {
		t.Error("no entrance after AddPID")
	}
	if err := g.Update(bg, runtime.Resources{}); err != nil {
		t.Error(err)
	}
	wantClass(t, d.RemovePod(bg, parent), errs.FailedPrecondition)
	wantClass(t, g.Remove(bg), errs.FailedPrecondition)
	if f.units[path.Base(g.Path)] == "" {
		t.Error("a scope with a process was stopped")
	}
	if err := g.Kill(bg); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if err := g.Remove(bg); err != nil {
		t.Fatal(err)
	}
	if err := g.Remove(bg); err != nil {
		t.Errorf("removing twice: %v", err)
	}
	if err := d.RemovePod(bg, parent); err != nil {
		t.Fatal(err)
	}
	if err := d.RemovePod(bg, parent); err != nil {
		t.Errorf("removing the pod twice: %v", err)
	}
	want := []string{"start kubepods-burstable-podX.slice", "start naru-c1.scope", "stop naru-c1.scope", "reset naru-c1.scope", "stop kubepods-burstable-podX.slice", "reset kubepods-burstable-podX.slice"}
	if !slices.Equal(f.calls, want) {
		t.Errorf("calls\n got %q\nwant %q", f.calls, want)
	}
}

// TestSystemdForeignSlice: kubelet's slice is left to kubelet.
func TestSystemdForeignSlice(t *testing.T) {
	d, f := systemdDriver(t)
	if err := unix.Mkdirat(d.unified.fd, "k.slice", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := d.EnsurePod(bg, "k.slice"); err != nil {
		t.Fatal(err)
	}
	if err := d.RemovePod(bg, "k.slice"); err != nil {
		t.Fatal(err)
	}
	if err := d.Sweep(bg, nil); err != nil {
		t.Fatal(err)
	}
	if len(f.calls) != 0 || !exists(d.unified.fd, "k.slice") {
		t.Errorf("touched: %q", f.calls)
	}
}

func TestSystemdLeftoverAndFailures(t *testing.T) {
	d, f := systemdDriver(t)
	cmd := enter(t, nil, nil, "echo in; exec sleep 100")
	newGroup := func() *Group {
		t.Helper()
		g, err := d.Create(bg, mustPath(t, d, "", "c1"), runtime.Resources{}, nil, Options{})
		if err != nil {
			t.Fatal(err)
		}
		return g
	}
	f.units["naru-c1.scope"] = "/naru.slice/naru-c1.scope" // failed earlier, still loaded
	g := newGroup()
	if err := g.AddPID(bg, cmd.Process.Pid); err != nil {
		t.Fatalf("a failed unit of the same name: %v", err)
	}
	f.fail["set"] = dbus.Error{Name: "org.freedesktop.DBus.Error.InvalidArgs"}
	if err := d.setScope(bg, g, &runtime.Resources{PidsLimit: 5}); !errs.Is(err, errs.InvalidArgument) {
		t.Errorf("got %v", err)
	}
	f.fail["set"] = nil
	if err := d.setScope(bg, g, &runtime.Resources{PidsLimit: 5}); err != nil {
		t.Error(err)
	}
	if last := f.calls[len(f.calls)-1]; last != "set naru-c1.scope map[TasksMax:5]" {
		t.Errorf("got %s", last)
	}
	killAndRemove(t, g)
	f.job = "failed"
	if err := newGroup().AddPID(bg, os.Getpid()); err == nil {
		t.Error("a failed job counted as done")
	}
	f.job = ""
	f.fail["start"] = dbus.ErrClosed
	wantClass(t, newGroup().AddPID(bg, os.Getpid()), errs.Unavailable)
	if err := writeAt(d.unified.fd, "../cgroup.procs", fmt.Sprint(os.Getpid())); err != nil {
		t.Fatal(err) // the failed job had moved this test
	}
	delete(f.fail, "start")
	(&Group{Path: g.Path, rel: g.rel, d: d}).Close()
	d.units = func() (unitManager, error) { return nil, errs.New(errs.Unavailable, "no bus") }
	d.conn = nil
	wantClass(t, newGroup().AddPID(bg, os.Getpid()), errs.Unavailable)
}

func TestSystemdNeedsV2(t *testing.T) {
	d, _ := hostDriver(t)
	if d.mode == ModeV2 {
		t.Skip("needs version 1 controllers")
	}
	_, err := New(Config{Driver: DriverSystemd})
	wantClass(t, err, errs.FailedPrecondition)
	_, err = New(Config{Driver: "x"})
	wantClass(t, err, errs.InvalidArgument)
	_, err = New(Config{DefaultParent: "/.."})
	wantClass(t, err, errs.InvalidArgument)
	_, err = New(Config{Root: t.TempDir()})
	wantClass(t, err, errs.FailedPrecondition)
}
