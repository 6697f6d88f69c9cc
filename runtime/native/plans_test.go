package native

import (
	"flag"
	"github.com/naru-project/naru/internal/errs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

var update = flag.Bool("update", false, "write the golden files anew")

func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name+".plan")
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if string(want) != got {
		t.Errorf("%s differs from the golden file (run with -update after a change that is meant):\n%s", file, got)
	}
}

func testProcess() *process {
	adj := 500
	return &process{
		args: []string{"nginx", "-g", "daemon off;"}, env: []string{"PATH=/usr/sbin:/bin", "SECRET=hidden"}, cwd: "/srv",
		user:       specs.User{UID: 101, GID: 102, AdditionalGids: []uint32{102, 5}},
		caps:       capabilities{bounding: 0xa80425fb},
		noNewPrivs: true, umask: 0o022, oomScoreAdj: &adj, keyring: "_ses.x",
		rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 1024, Hard: 524288}},
		filter:  make([]byte, 16),
	}
}

// TestPlans pins the order of system calls. A difference here is a change of
// the executor's security: read it as such.
func TestPlans(t *testing.T) {
	f := os.Stdin // never used: a plan only counts its slots
	full := startShape{newPID: true, filesystems: childFilesystems[:3]}
	start := startFiles{status: f, proc: f, net: f, ipc: f, uts: f, tasks: []*os.File{f, f}, cgroup: f, stdin: f, stdout: f, stderr: f, mounts: f, gate: f}
	user := start
	user.user, user.tasks = f, nil
	tty := testProcess()
	tty.terminal, tty.noNewPrivs, tty.caps = true, false, capabilities{bounding: 1 << unix.CAP_CHOWN, permitted: 1, effective: 1}
	join := joinFiles{status: f, proc: f, target: f, cgroup: f, stdin: f, stdout: f, stderr: f}
	shared := join
	shared.pid, shared.gate = f, f
	spaces := unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWPID
	for name, l := range map[string]*launch{
		"start-v1":         startPlan(testProcess(), full, start),
		"start-userns-v2":  startPlan(testProcess(), startShape{newPID: true, cgroupNS: true, filesystems: childFilesystems}, user),
		"start-terminal":   startPlan(tty, full, start),
		"builder":          builderPlan(testProcess(), startShape{filesystems: childFilesystems[1:3]}, start),
		"start-shared-pid": joinPlan(testProcess(), spaces, shared),
		"exec":             joinPlan(testProcess(), spaces, join),
		"exec-userns":      joinPlan(testProcess(), spaces|unix.CLONE_NEWUSER, join),
		"init":             initPlan(f, f, f, nil),
		"hook":             hookPlan(&specs.Hook{Path: "/usr/bin/hook"}, hookFiles{status: f, proc: f, mnt: f, net: f, ipc: f, uts: f, host: f, tasks: []*os.File{f}, stdin: f, output: f}),
		"hook-userns":      hookPlan(&specs.Hook{Path: "/usr/bin/hook", Args: []string{"hook", "create"}, Env: []string{"SECRET=hidden"}}, hookFiles{status: f, proc: f, mnt: f, user: f, net: f, host: f, cgroup: f, stdin: f, output: f}),
		"program":          programPlan(&process{args: []string{"/opt/cni/bin/bridge"}, env: []string{"CNI_COMMAND=ADD"}, umask: 0o022, oomScoreAdj: new(0)}, programFiles{status: f, proc: f, mnt: f, net: f, stdio: [3]*os.File{f, f, f}}),
	} {
		t.Run(name, func(t *testing.T) {
			golden(t, name, l.Dump())
			if l.Slots() != len(l.files) {
				t.Errorf("%d slots and %d files", l.Slots(), len(l.files))
			}
			if _, err := l.Seal(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestSeccompIsLast: after the filter is loaded only execve may follow.
// Row N-07: no plan opens anything of /proc or /sys by its path; a procfs is
// always a descriptor. (init.plan is the exception: it mounts one in a root of
// our own that holds nothing of a container's.)
func TestRowN07NoPathsOfProc(t *testing.T) {
	plans, err := filepath.Glob("testdata/*.plan")
	if err != nil || len(plans) < 8 {
		t.Fatal(plans, err)
	}
	opened := 0
	for _, name := range plans {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			if (strings.Contains(line, `"/proc`) || strings.Contains(line, `"/sys`)) && filepath.Base(name) != "init.plan" {
				t.Errorf("%s: %s", name, line)
			}
			if strings.Contains(line, "openat") {
				opened++
				if !strings.Contains(line, "openat(<proc>, ") && !strings.Contains(line, "openat2(<proc>, ") {
					t.Errorf("%s: not by our own procfs: %s", name, line)
				}
			}
		}
	}
	if opened == 0 {
		t.Error("no plan opens anything: this test looks at the wrong thing")
	}
}

func TestSeccompIsLast(t *testing.T) {
	f := os.Stdin
	l := startPlan(testProcess(), startShape{newPID: true}, startFiles{status: f, proc: f, stdin: f, stdout: f, stderr: f, mounts: f, gate: f})
	seen := false
	for _, c := range l.Calls() {
		if seen && c != "execve" {
			t.Errorf("%s after the seccomp filter", c)
		}
		seen = seen || c == "seccomp"
	}
	if !seen {
		t.Error("no seccomp filter in the plan")
	}
}

func TestCandidates(t *testing.T) {
	for _, x := range []struct {
		name string
		env  []string
		want []string
	}{
		{"/bin/x", nil, []string{"/bin/x"}},
		{"./x", nil, []string{"./x"}},
		{"x", []string{"PATH=/a:/b/::rel"}, []string{"/a/x", "/b/x"}},
		{"x", []string{"PATH="}, []string{"/x"}},
	} {
		got := candidates(x.name, x.env)
		if len(got) != len(x.want) {
			t.Errorf("%s %v: %v", x.name, x.env, got)
			continue
		}
		for i := range got {
			if got[i] != x.want[i] {
				t.Errorf("%s %v: %v", x.name, x.env, got)
			}
		}
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add([]byte("1 (a b) c) S 1 1 1 0 -1 4194560 1 1 1 1 1 1 1 1 20 0 1 0 4242 1 1"))
	f.Add([]byte(")"))
	f.Fuzz(func(t *testing.T, p []byte) {
		_, _ = parseStat(p)
	})
}

func TestParseStat(t *testing.T) {
	v, err := parseStat([]byte("1 (a b) c) S 1 1 1 0 -1 4194560 1 1 1 1 1 1 1 1 20 0 1 0 4242 1 1"))
	if err != nil || v != (stat{parent: 1, start: 4242}) {
		t.Errorf("%+v %v", v, err)
	}
}

// TestPlanErrorKeepsTheClass: what is gone for a moment may be tried again, and
// the error says so.
func TestPlanErrorKeepsTheClass(t *testing.T) {
	for _, c := range []errs.Class{errs.Unavailable, errs.ResourceExhausted, errs.DeadlineExceeded, errs.Canceled} {
		if err := planError(errs.New(c, "the worker was lost")); !errs.Is(err, c) {
			t.Errorf("%v became %v", c, errs.Of(err))
		}
	}
	for _, c := range []errs.Class{errs.InvalidArgument, errs.NotFound, errs.Internal} { // nothing that the caller did
		if err := planError(errs.New(c, "the request is wrong")); !errs.Is(err, errs.Internal) {
			t.Errorf("%v became %v", c, errs.Of(err))
		}
	}
}
