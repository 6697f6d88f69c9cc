package cgroup

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime"
)

var bg = context.Background()

func needV1(t testing.TB, d *Driver) {
	t.Helper()
	if d.mode == ModeV2 {
		t.Skip("needs version 1 controllers")
	}
}

func create(t testing.TB, d *Driver, parent, id string, r runtime.Resources, dev ...specs.LinuxDeviceCgroup) *Group {
	t.Helper()
	if len(dev) == 0 {
		dev = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
	}
	g, err := d.Create(bg, mustPath(t, d, parent, id), r, dev, Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { killAndRemove(t, g) })
	return g
}

func TestCreateLimitsV1(t *testing.T) {
	d, parent := hostDriver(t)
	needV1(t, d)
	g := create(t, d, parent, "c1", runtime.Resources{
		CPUPeriod: 50000, CPUQuota: 25000, CPUShares: 512, CpusetCpus: "0", Memory: 64 << 20, PidsLimit: 50,
		Hugepages: []runtime.HugepageLimit{{PageSize: "2MB"}, {PageSize: "1GB"}},
	}, specs.LinuxDeviceCgroup{Access: "rwm"}, dev(true, "c", 1, 3, "rwm"), dev(true, "c", -1, -1, "m"))
	for file, want := range map[string]string{
		"cpu cpu.cfs_period_us":             "50000",
		"cpu cpu.cfs_quota_us":              "25000",
		"cpu cpu.shares":                    "512",
		"cpuset cpuset.cpus":                "0",
		"memory memory.limit_in_bytes":      "67108864",
		"pids pids.max":                     "50",
		"devices devices.list":              "c 1:3 rwm\nc *:* m",
		"memory memory.use_hierarchy":       "1",
		"cpuset cpuset.effective_mems":      fileOf(t, &Group{d: d, rel: "."}, "cpuset", "cpuset.mems"),
		"memory memory.memsw.failcnt":       "0",
		"cpuset cpuset.cpu_exclusive":       "0",
		"pids pids.current":                 "0",
		"memory memory.kmem.usage_in_bytes": "0",
	} {
		ctrl, name, _ := strings.Cut(file, " ")
		if got := fileOf(t, g, ctrl, name); got != want {
			t.Errorf("%s: got %q, want %q", name, got, want)
		}
	}
	if exists(d.control["memory"].fd, g.rel+"/"+memswV1) {
		if got := fileOf(t, g, "memory", memswV1); got != "67108864" {
			t.Errorf("memory without swap by default: got memsw %s", got)
		}
	}
	if len(g.TaskFDs()) != len(d.hier)-b2i(d.unified != nil) {
		t.Errorf("%d tasks files for %d hierarchies", len(g.TaskFDs()), len(d.hier))
	}
	cmd := enter(t, g.CloneFD(), g.TaskFDs(), "echo in; exec sleep 100")
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(strings.TrimSpace(string(b)), "\n") {
		if !strings.HasSuffix(line, ":"+g.Path) {
			t.Errorf("child is outside in %s", line)
		}
	}
	if pids, err := g.Procs(); err != nil || !slices.Contains(pids, cmd.Process.Pid) {
		t.Errorf("Procs: %v %v", pids, err)
	}
}

// A limit of memory and swap together says nothing of memory alone, and never
// that it is zero.
func TestCreateSwapLimitAloneV1(t *testing.T) {
	d, parent := hostDriver(t)
	needV1(t, d)
	g := create(t, d, parent, "c1", runtime.Resources{MemorySwap: -1})
	unlimited := fileOf(t, create(t, d, parent, "c2", runtime.Resources{}), "memory", limitV1)
	if got := fileOf(t, g, "memory", limitV1); got != unlimited {
		t.Errorf("%s is %s, want %s", limitV1, got, unlimited)
	}
	_, err := d.Create(bg, mustPath(t, d, parent, "c3"), runtime.Resources{MemorySwap: 64 << 20}, nil, Options{})
	wantClass(t, err, errs.InvalidArgument)
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

func dev(allow bool, kind string, major, minor int64, access string) specs.LinuxDeviceCgroup {
	return specs.LinuxDeviceCgroup{Allow: allow, Type: kind, Major: &major, Minor: &minor, Access: access}
}

func TestCreateFailureLeavesNothing(t *testing.T) {
	d, parent := hostDriver(t)
	needV1(t, d)
	path := mustPath(t, d, parent, "c1")
	for _, r := range []runtime.Resources{
		{CpusetCpus: "8000"}, // the kernel refuses it half way through
		{Unified: map[string]string{"memory.high": "max"}}, // no version 2
		{CPUQuota: 5},
	} {
		if _, err := d.Create(bg, path, r, nil, Options{}); err == nil {
			t.Fatalf("%+v was accepted", r)
		}
		for _, h := range d.hier {
			if exists(h.fd, path[1:]) {
				t.Errorf("%+v: left in %s", r, h.name)
			}
		}
	}
	_, err := d.Create(bg, path, runtime.Resources{CpusetCpus: "8000"}, nil, Options{})
	wantClass(t, err, errs.InvalidArgument)
	_, err = d.Create(bg, path, runtime.Resources{Unified: map[string]string{"memory.high": "max"}}, nil, Options{})
	wantClass(t, err, errs.FailedPrecondition)
	for _, bad := range []string{"", "/", "c1", "/../c1", "/a", "/a\x00/b", "/a/cgroup.x"} {
		_, err = d.Create(bg, bad, runtime.Resources{}, nil, Options{})
		wantClass(t, err, errs.InvalidArgument)
		_, err = d.Open(bad)
		wantClass(t, err, errs.InvalidArgument)
	}
	_, err = d.Open(path)
	wantClass(t, err, errs.NotFound)
}

// A removal that could not be finished, or that a crash cut short, can be
// taken up again: the group is found for as long as a part of it is there.
func TestRemoveCutShort(t *testing.T) {
	d, parent := hostDriver(t)
	needV1(t, d)
	g := create(t, d, parent, "c1", runtime.Resources{})
	for i := range g.TaskFDs() {
		if i > 0 { // Remove has taken the others away
			g = create(t, d, parent, "c1", runtime.Resources{})
		}
		cmd := enter(t, nil, g.TaskFDs()[i:i+1], "echo in; exec sleep 100") // in one hierarchy only
		if err := g.Remove(bg); err == nil {
			t.Fatal("a group with a process in it was removed")
		}
		again, err := d.Open(g.Path)
		if err != nil {
			t.Fatalf("a part of the group is there, but: %v", err)
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if err := again.Remove(bg); err != nil {
			t.Fatal(err)
		}
		for _, h := range d.hier {
			if exists(h.fd, g.rel) {
				t.Errorf("left in %s", h.name)
			}
		}
	}
}

func TestCreateAgain(t *testing.T) {
	d, parent := hostDriver(t)
	g := create(t, d, parent, "c1", runtime.Resources{})
	again := create(t, d, parent, "c1", runtime.Resources{}) // empty left-over: taken over
	cmd := enter(t, again.CloneFD(), again.TaskFDs(), "echo in; exec sleep 100")
	_, err := d.Create(bg, g.Path, runtime.Resources{}, nil, Options{})
	wantClass(t, err, errs.AlreadyExists)
	if err := syscall.Kill(cmd.Process.Pid, 0); err != nil {
		t.Errorf("the process in the way was hurt: %v", err)
	}
}

func TestKill(t *testing.T) {
	d, parent := hostDriver(t)
	for name, kill := range map[string]func(*Group, context.Context) error{"Kill": (*Group).Kill, "one by one": (*Group).killEach} {
		t.Run(name, func(t *testing.T) {
			g := create(t, d, parent, "c-"+strings.ReplaceAll(name, " ", ""), runtime.Resources{})
			cmd := enter(t, g.CloneFD(), g.TaskFDs(), "trap '' TERM HUP; for i in 1 2 3; do setsid sleep 100 & done; echo in; while :; do sleep 1; done")
			if err := g.Freeze(bg); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(bg, 5*time.Second)
			defer cancel()
			done := make(chan struct{})
			go func() { defer close(done); _ = cmd.Wait() }() // reap, or the zombie counts
			if err := kill(g, ctx); err != nil {
				t.Fatal(err)
			}
			<-done
			waitEmpty(t, g)
		})
	}
}

// A container whose record is lost is found where the kernel has its process,
// also if that made a group of its own.
func TestFind(t *testing.T) {
	d, parent := hostDriver(t)
	g := create(t, d, parent, "lost", runtime.Resources{})
	cmd := enter(t, g.CloneFD(), g.TaskFDs(), "echo in; exec sleep 100")
	check := func(id, want string) {
		t.Helper()
		if got := d.Find(cmd.Process.Pid, id); got != want {
			t.Errorf("container %s is found at %q, want %q", id, got, want)
		}
	}
	check("lost", g.Path)
	check("los", "")
	check("other", "")
	below := g.rel + "/lost/deeper"
	for _, dir := range []string{g.rel + "/lost", below} {
		if err := unix.Mkdirat(d.tracking().fd, dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := writeAt(d.tracking().fd, below+"/cgroup.procs", strconv.Itoa(cmd.Process.Pid)); err != nil {
		t.Fatal(err)
	}
	check("lost", g.Path)
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	check("lost", "")
}

func waitEmpty(t testing.TB, g interface{ Procs() ([]int, error) }) {
	t.Helper()
	for i := 0; ; i++ {
		pids, err := g.Procs()
		if err != nil {
			t.Fatal(err)
		}
		if len(pids) == 0 {
			return
		}
		if i > 500 {
			t.Fatalf("still there: %v", pids)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func TestFreezeThaw(t *testing.T) {
	d, parent := hostDriver(t)
	g := create(t, d, parent, "c1", runtime.Resources{})
	enter(t, g.CloneFD(), g.TaskFDs(), "echo in; while :; do :; done")
	if err := g.Freeze(bg); err != nil {
		t.Fatal(err)
	}
	pids, err := g.Procs()
	if err != nil || len(pids) != 1 {
		t.Fatalf("%v %v", pids, err)
	}
	before := cpuTicks(t, pids[0])
	time.Sleep(60 * time.Millisecond)
	if after := cpuTicks(t, pids[0]); after != before {
		t.Errorf("frozen, yet it used %d ticks", after-before)
	}
	if err := g.Thaw(bg); err != nil {
		t.Fatal(err)
	}
	for i := 0; cpuTicks(t, pids[0]) == before; i++ {
		if i > 500 {
			t.Fatal("thawed, yet it does not run")
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func cpuTicks(t testing.TB, pid int) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	u, _ := strconv.Atoi(f[11])
	s, _ := strconv.Atoi(f[12])
	return u + s
}

func TestExecGroup(t *testing.T) {
	for name, mk := range map[string]func(t *testing.T) (*Driver, string){
		"host":    func(t *testing.T) (*Driver, string) { return hostDriver(t) },
		"unified": func(t *testing.T) (*Driver, string) { return unifiedDriver(t), "/pod" },
		"v1": func(t *testing.T) (*Driver, string) { // the same machine, without its version 2 tree
			d, p := hostDriver(t)
			needV1(t, d)
			if d.unified != nil {
				d.hier = slices.DeleteFunc(slices.Clone(d.hier), func(h *hierarchy) bool { return h.v2 })
				unix.Close(d.unified.fd)
				d.unified = nil
				d.mode = ModeV1
			}
			return d, p
		},
	} {
		t.Run(name, func(t *testing.T) {
			d, parent := mk(t)
			testExecGroup(t, d, parent)
		})
	}
}

func testExecGroup(t *testing.T, d *Driver, parent string) {
	g := create(t, d, parent, "c1", runtime.Resources{})
	main := enter(t, g.CloneFD(), g.TaskFDs(), "echo in; exec sleep 100")
	e, err := g.NewExec(bg)
	if err != nil {
		t.Fatal(err)
	}
	if e.Shared || !strings.HasPrefix(e.Path, g.Path+"/exec-") {
		t.Fatalf("exec group %+v", e)
	}
	cmd := enter(t, e.CloneFD(), e.TaskFDs(), "setsid sleep 100 & setsid sleep 100 & echo in; wait")
	if pids, err := e.Procs(); err != nil || len(pids) != 3 {
		t.Errorf("exec's processes: %v %v", pids, err)
	}
	wantClass(t, e.Remove(bg), errs.FailedPrecondition)
	done := make(chan struct{})
	go func() { defer close(done); _ = cmd.Wait() }()
	ctx, cancel := context.WithTimeout(bg, 5*time.Second)
	defer cancel()
	if err := e.Kill(ctx); err != nil {
		t.Fatal(err)
	}
	<-done
	waitEmpty(t, e)
	if err := e.Remove(bg); err != nil {
		t.Error(err)
	}
	if err := syscall.Kill(main.Process.Pid, 0); err != nil {
		t.Errorf("killing the exec hurt the container: %v", err)
	}
	if pids, _ := g.Procs(); !slices.Equal(pids, []int{main.Process.Pid}) {
		t.Errorf("left in the container: %v, want %d", pids, main.Process.Pid)
	}
	gone := &Group{Path: g.Path + "x", rel: g.rel + "x", d: d}
	_, err = gone.NewExec(bg)
	wantClass(t, err, errs.NotFound)
}

// TestExecGroupShared: a container that forbids children below its cgroup, or
// makes it threaded, does not stop execs.
func TestExecGroupShared(t *testing.T) {
	d := unifiedDriver(t)
	g := create(t, d, "/pod", "c1", runtime.Resources{})
	if err := writeAt(d.unified.fd, g.rel+"/cgroup.max.descendants", "0"); err != nil {
		t.Fatal(err)
	}
	check := func() {
		t.Helper()
		e, err := g.NewExec(bg)
		if err != nil {
			t.Fatal(err)
		}
		defer e.Close()
		if !e.Shared || e.Path != g.Path || e.CloneFD() == nil {
			t.Fatalf("got %+v", e)
		}
		enter(t, e.CloneFD(), e.TaskFDs(), "echo in; exec sleep 100")
		if err := e.Kill(bg); err != nil {
			t.Error(err)
		}
		if pids, _ := g.Procs(); len(pids) == 0 {
			t.Error("Kill of a shared group reached the container's processes")
		}
		if err := e.Remove(bg); err != nil {
			t.Error(err)
		}
	}
	check()
	if err := writeAt(d.unified.fd, g.rel+"/cgroup.max.descendants", "max"); err != nil {
		t.Fatal(err)
	}
	pids, err := g.Procs()
	if err != nil {
		t.Fatal(err)
	}
	for _, pid := range pids { // not cgroup.kill: see the package comment
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	waitEmpty(t, g)
	// A container that runs in a sub-cgroup of its own and has made its root
	// the domain of threads.
	if err := unix.Mkdirat(d.unified.fd, g.rel+"/t", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := writeAt(d.unified.fd, g.rel+"/t/cgroup.type", "threaded"); err != nil {
		t.Fatal(err)
	}
	check()
	// Killing asks for threads as well; who counts processes wants each once.
	if pids, err = d.Processes(bg, g.Path); err != nil || len(pids) != 1 {
		t.Fatalf("processes %v, %v", pids, err)
	}
	if err := writeAt(d.unified.fd, g.rel+"/t/cgroup.threads", strconv.Itoa(pids[0])); err != nil {
		t.Fatal(err)
	}
	if counted, err := d.Processes(bg, g.Path); err != nil || !slices.Equal(counted, pids) {
		t.Errorf("processes %v, %v, want %v", counted, err, pids)
	}
	if all, err := g.Procs(); err != nil || len(all) != 2 {
		t.Errorf("processes and threads %v, %v", all, err)
	}
	if _, err := d.Processes(bg, g.Path+"none"); !errs.Is(err, errs.NotFound) {
		t.Errorf("no cgroup: %v", err)
	}
}

// TestExecManagedCgroup: a container that hands controllers to its own
// sub-cgroups; its root then refuses processes, a child does not.
func TestExecManagedCgroup(t *testing.T) {
	d := unifiedDriver(t)
	if len(d.want) == 0 {
		t.Skip("needs a controller in the cgroup v2 tree")
	}
	g := create(t, d, "/pod", "c1", runtime.Resources{})
	if err := writeAt(d.unified.fd, g.rel+"/cgroup.subtree_control", "+"+d.want[0]); err != nil {
		t.Fatal(err)
	}
	e, err := g.NewExec(bg)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	if e.Shared {
		t.Fatal("no cgroup of its own")
	}
	enter(t, e.CloneFD(), nil, "echo in; exec sleep 100")
}

func TestRemoveNested(t *testing.T) {
	d := unifiedDriver(t)
	g := create(t, d, "/pod", "c1", runtime.Resources{})
	// Deeper than a path name can say, and wide.
	fd, err := openAt(d.unified.fd, g.rel, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < 300; i++ {
		if err := unix.Mkdirat(fd, fmt.Sprintf("wide%d", i), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	name := strings.Repeat("d", 100)
	for i := 0; i < 120; i++ {
		if err := unix.Mkdirat(fd, name, 0o755); err != nil {
			t.Fatalf("level %d: %v", i, err)
		}
		next, err := openAt(fd, name, unix.O_RDONLY|unix.O_DIRECTORY)
		if err != nil {
			t.Fatal(err)
		}
		unix.Close(fd)
		fd = next
	}
	unix.Close(fd)
	if _, err := g.Procs(); err != nil {
		t.Errorf("Procs: %v", err)
	}
	if err := g.Remove(bg); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Open(g.Path); !errs.Is(err, errs.NotFound) {
		t.Errorf("still there: %v", err)
	}
	if err := g.Remove(bg); err != nil {
		t.Errorf("removing twice: %v", err)
	}
}

func TestRemoveBusy(t *testing.T) {
	d, parent := hostDriver(t)
	g := create(t, d, parent, "c1", runtime.Resources{})
	enter(t, g.CloneFD(), g.TaskFDs(), "echo in; exec sleep 100")
	wantClass(t, g.Remove(bg), errs.FailedPrecondition)
	ctx, cancel := context.WithCancel(bg)
	cancel()
	if err := g.Remove(ctx); err == nil {
		t.Error("removed with a process in it")
	}
}

func TestParentMarks(t *testing.T) {
	d, parent := hostDriver(t)
	base := parentOf(parent)
	// kubelet's part: it has made the pod in one hierarchy only.
	h := d.hier[len(d.hier)-1]
	foreign := []string{base, parent}
	if len(d.hier) == 1 {
		foreign = nil // version 2: there all is kubelet's, or all is ours
	}
	for _, p := range foreign {
		if err := unix.Mkdirat(h.fd, p[1:], 0o755); err != nil {
			t.Fatal(err)
		}
	}
	defer func() {
		_ = unix.Unlinkat(h.fd, parent[1:], unix.AT_REMOVEDIR)
		_ = unix.Unlinkat(h.fd, base[1:], unix.AT_REMOVEDIR)
	}()
	if err := d.EnsurePod(bg, parent); err != nil {
		t.Fatal(err)
	}
	if m := d.missing(parent[1:]); len(m) != 0 {
		t.Fatalf("missing in %s", m[0].name)
	}
	// A child of the pod keeps it, and a restarted daemon still knows what was made.
	if err := unix.Mkdirat(d.hier[0].fd, parent[1:]+"/other", 0o755); err != nil {
		t.Fatal(err)
	}
	again, err := New(Config{Driver: DriverCgroupfs, StateDir: d.marks.dir})
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	wantClass(t, again.RemovePod(bg, parent), errs.FailedPrecondition)
	if err := unix.Unlinkat(d.hier[0].fd, parent[1:]+"/other", unix.AT_REMOVEDIR); err != nil {
		t.Fatal(err)
	}
	if err := again.RemovePod(bg, parent); err != nil {
		t.Fatal(err)
	}
	for _, x := range d.hier {
		if got := exists(x.fd, parent[1:]); got != (x.name == h.name && foreign != nil) {
			t.Errorf("%s: pod's cgroup there: %v", x.name, got)
		}
	}
	if e, _ := os.ReadDir(d.marks.dir); len(e) != 0 {
		t.Errorf("%d marks left", len(e))
	}
	if err := again.RemovePod(bg, parent); err != nil {
		t.Errorf("removing twice: %v", err)
	}
	wantClass(t, again.EnsurePod(bg, "/../x"), errs.InvalidArgument)
}

// TestSweep: parents of pods that are not known any more go, with what was made
// above them; those of known pods, of others, and those with something in them
// stay.
func TestSweep(t *testing.T) {
	d, parent := hostDriver(t)
	base := parentOf(parent)
	lost, deep, busy, kept := base+"/lost", base+"/deep/er", base+"/busy", base+"/kept/below"
	for _, p := range []string{lost, deep, busy, kept} {
		if err := d.EnsurePod(bg, p); err != nil {
			t.Fatal(err)
		}
	}
	foreign, inside := base+"/foreign", busy+"/inside"
	for _, p := range []string{foreign, inside} {
		if err := unix.Mkdirat(d.hier[0].fd, p[1:], 0o755); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = unix.Unlinkat(d.hier[0].fd, p[1:], unix.AT_REMOVEDIR) }()
	}
	cut := d.marks.file("/cut")
	if err := os.WriteFile(cut, []byte("/cut"), 0o600); err != nil {
		t.Fatal(err)
	}
	again, err := New(Config{Driver: DriverCgroupfs, StateDir: d.marks.dir})
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if err := again.Sweep(bg, []string{kept, "/never/made"}); err != nil {
		t.Fatal(err)
	}
	for p, want := range map[string]bool{lost: false, deep: false, parentOf(deep): false, busy: true, inside: true, kept: true, parentOf(kept): true, foreign: true} {
		if got := exists(d.hier[0].fd, p[1:]); got != want {
			t.Errorf("%s is there: %v, want %v", p, got, want)
		}
	}
	if _, err := os.Stat(cut); err == nil {
		t.Error("a mark that was cut short is there")
	}
	for _, p := range []string{inside, foreign} {
		if err := unix.Unlinkat(d.hier[0].fd, p[1:], unix.AT_REMOVEDIR); err != nil {
			t.Fatal(err)
		}
	}
	if err := again.Sweep(bg, nil); err != nil {
		t.Fatal(err)
	}
	if e, _ := os.ReadDir(d.marks.dir); len(e) != 0 || len(d.missing(base[1:])) != len(d.hier) {
		t.Errorf("%d marks left, the base is there: %v", len(e), len(d.missing(base[1:])) != len(d.hier))
	}
	wantClass(t, again.Sweep(bg, []string{"/../x"}), errs.InvalidArgument)
}

// TestParentRace: pods come and go below one parent of ours.
func TestParentRace(t *testing.T) {
	d, parent := hostDriver(t)
	base := parentOf(parent)
	errc := make(chan error, 4)
	for i := 0; i < 4; i++ {
		go func() {
			for j := 0; j < 20; j++ {
				p := fmt.Sprintf("%s/p%d", base, i)
				path, _ := d.ContainerPath(p, "c")
				g, err := d.Create(bg, path, runtime.Resources{}, nil, Options{})
				if err == nil {
					err = g.Remove(bg)
				}
				if err == nil {
					err = d.RemovePod(bg, p)
				}
				if err != nil {
					errc <- err
					return
				}
			}
			errc <- nil
		}()
	}
	for i := 0; i < 4; i++ {
		if err := <-errc; err != nil {
			t.Error(err)
		}
	}
	if len(d.missing(base[1:])) != len(d.hier) {
		t.Error("the common parent is still there")
	}
}

func TestOpenAfterRestart(t *testing.T) {
	d, parent := hostDriver(t)
	g := create(t, d, parent, "c1", runtime.Resources{})
	g.Close()
	o, err := d.Open(g.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer o.Close()
	if o.CloneFD() != nil || len(o.TaskFDs()) != 0 {
		t.Error("Open holds descriptors")
	}
	if err := o.OpenFDs(); err != nil {
		t.Fatal(err)
	}
	enter(t, o.CloneFD(), o.TaskFDs(), "echo in; exec sleep 100")
	if pids, err := o.Procs(); err != nil || len(pids) != 1 {
		t.Errorf("%v %v", pids, err)
	}
}
