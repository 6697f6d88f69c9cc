package native

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/namespaces"
	"github.com/naru-project/naru/internal/testhost"
	"github.com/naru-project/naru/runtime"
)

// hook writes a script of the host and returns it as a hook. $OUT is a file
// that anybody may write to.
func hook(t *testing.T, script string) (h specs.Hook, out string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "hook")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	out = filepath.Join(dir, "out")
	for name, mode := range map[string]os.FileMode{out: 0o666, filepath.Join(dir, "hook"): 0o755} {
		text := ""
		if mode == 0o755 {
			text = "#!/bin/sh\nOUT=" + out + "\n" + script
		}
		if err := os.WriteFile(name, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(name, mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return specs.Hook{Path: filepath.Join(dir, "hook"), Args: []string{"hook", "one arg"}, Env: []string{"ONLY=this"}}, out
}

func read(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

const hookScript = `
state=$(cat)
bundle=${state##*\"bundle\":\"}; bundle=${bundle%%\"*}
config=$(cat $bundle/config.json)
root=${config##*\"root\":\{\"path\":\"}; root=${root%%\"*}
{
	echo "state $state"
	echo "cwd $(readlink /proc/$$/cwd) args $0 $1 bundle $(ls $bundle | tr '\n' ' ')"
	echo "env $(tr '\0' ' ' </proc/$$/environ)end"
	for n in mnt net uts ipc pid; do
		readlink /proc/$$/ns/$n
	done
	ls $root
} >>$OUT 2>&1
echo made >$root/etc/made && mount -t tmpfs hooked $root/tmp && echo deep >$root/tmp/deep || exit 1
`

// K-01: a hook gets nothing of the image: not its environment, not its root as
// working directory; its program and its libraries are the host's.
func TestHookK01(t *testing.T) {
	r := newRing(t)
	maps := []runtime.IDMap{{ContainerID: 0, HostID: 200000, Size: 65536}}
	// In a user namespace a hook has the container's ids: let it through to the
	// bundle, as it is let through to /run/naru.
	for _, d := range []string{filepath.Dir(r.dir), r.dir} {
		if err := os.Chmod(d, 0o711); err != nil {
			t.Fatal(err)
		}
	}
	for name, userns := range map[string]bool{"plain": false, "user namespace": true} {
		t.Run(name, func(t *testing.T) {
			r.t = t
			h, out := hook(t, hookScript)
			c := r.container("sh", "-c", "cat /etc/made /tmp/deep; echo x >/rw; exec sleep 100")
			c.Spec.Process.Env = append(c.Spec.Process.Env, "LD_PRELOAD=./evil.so", "PATH=/bin:/evil")
			c.Spec.Root.Readonly = true
			plain := *c
			files, err := Maker{r.Executor}.Make(t.Context(), namespaces.Request{ID: newID(), User: userns, Net: true, IPC: true, UTS: true, UIDMap: maps, GIDMap: maps})
			if err != nil {
				t.Fatal(err)
			}
			defer files.Close()
			pin := func(f *os.File) string { return "/proc/self/fd/" + itoa(int(f.Fd())) }
			c.Namespaces = runtime.Namespaces{Net: pin(files.Net), IPC: pin(files.IPC), UTS: pin(files.UTS)}
			if userns {
				c.UIDMap, c.GIDMap, c.Namespaces.User = maps, maps, pin(files.User)
			}
			c.Spec.Hooks = &specs.Hooks{CreateContainer: []specs.Hook{h}}
			r.run(c)
			said := read(t, out)
			states, err := r.List(t.Context())
			if err != nil || len(states) != 1 {
				t.Fatal(states, err)
			}
			ns := func(pid int, name string) string {
				s, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, name))
				if err != nil {
					t.Fatal(err)
				}
				return s + "\n"
			}
			pid := states[0].Process.PID
			for _, want := range []string{
				fmt.Sprintf(`"pid":%d,`, pid), ns(pid, "mnt"), ns(pid, "net"), ns(pid, "uts"), ns(pid, "ipc"), ns(os.Getpid(), "pid"),
				`"id":"` + c.ID + `","status":"creating"`, `"bundle":"` + r.dir + `"`,
				"cwd / args " + h.Path + " one arg bundle config.json rootfs", "env ONLY=this end", "\nbin\n",
			} {
				if !strings.Contains(said, want) {
					t.Errorf("no %q in what the hook saw:\n%s", want, said)
				}
			}
			time.Sleep(300 * time.Millisecond)
			got := r.log(c)
			if !strings.HasPrefix(got, "made\ndeep\n") {
				t.Errorf("what the hook did is not in the container: %s", got)
			}
			if !strings.Contains(got, "Read-only") {
				t.Errorf("the root is writable after a hook: %s", got)
			}
			// Nothing of the host's tree is left in the mount namespace.
			res, err := r.ExecSync(t.Context(), c, runtime.ExecSpec{Args: []string{"cat", "/proc/self/mountinfo"}})
			if err != nil || strings.Contains(string(res.Stdout), r.dir+" ") || strings.Contains(string(res.Stdout), "/sys/rootfs") {
				t.Errorf("%v: mounts of the container\n%s", err, res.Stdout)
			}
			plain.ID = newID()
			plain.Cgroup, plain.LogPath, plain.Spec = r.parent+"/"+plain.ID, filepath.Join(r.dir, plain.ID+".log"), new(specs.Spec)
			*plain.Spec = *c.Spec
			plain.Spec.Hooks, plain.UIDMap, plain.GIDMap, plain.Namespaces = nil, c.UIDMap, c.GIDMap, c.Namespaces
			r.run(&plain)
			ref, err := r.ExecSync(t.Context(), &plain, runtime.ExecSpec{Args: []string{"cat", "/proc/self/mountinfo"}})
			if a, b := strings.Count(string(res.Stdout), "\n"), strings.Count(string(ref.Stdout), "\n"); err != nil || a != b+1 {
				t.Errorf("%v: %d mounts with a hook that makes one, %d without:\n%s", err, a, b, res.Stdout)
			}
		})
	}
}

// D-16: a hook that fails, hangs or floods fails its create, within its time,
// and leaves neither a process nor a container behind.
func TestHookFailuresD16(t *testing.T) {
	r := newRing(t)
	left := "sleep 98765 & echo $! >$OUT; "
	for _, x := range []struct {
		name, script string
		change       func(*specs.Hooks)
		class        errs.Class
		says         string
	}{
		{"fails", "echo 'no\x1b[2J card' >&2; exit 3", nil, errs.FailedPrecondition, `it ended with code 3, it says "no\x1b[2J card"`},
		{"is killed", left + "kill -9 $$", nil, errs.FailedPrecondition, "code 137"},
		{"hangs", left + "sleep 98765", func(h *specs.Hooks) { h.CreateContainer[0].Timeout = new(1) }, errs.DeadlineExceeded, "did not end within 1s"},
		{"floods", "exec yes", func(h *specs.Hooks) { h.CreateContainer[0].Timeout = new(1) }, errs.DeadlineExceeded, "did not end within 1s"},
		{"is missing", "", func(h *specs.Hooks) { h.CreateContainer[0].Path = "/no/such/hook" }, errs.FailedPrecondition, "no such file"},
		{"second of two", "[ -e $OUT.1 ] && exit 5; touch $OUT.1", func(h *specs.Hooks) { h.CreateContainer = append(h.CreateContainer, h.CreateContainer[0]) }, errs.FailedPrecondition, "code 5"},
	} {
		t.Run(x.name, func(t *testing.T) {
			r.t = t
			h, out := hook(t, x.script)
			c := r.container("true")
			c.Spec.Hooks = &specs.Hooks{CreateContainer: []specs.Hook{h}}
			if x.change != nil {
				x.change(c.Spec.Hooks)
			}
			began := time.Now()
			err := r.create(c)
			if err == nil || errs.Of(err) != x.class || !strings.Contains(err.Error(), x.says) {
				t.Errorf("%v (%v), want %v with %q", err, errs.Of(err), x.class, x.says)
			}
			if d := time.Since(began); d > testhost.Limit(8*time.Second) {
				t.Errorf("took %s", d)
			}
			gone(t, out)
			if states, err := r.List(t.Context()); err != nil || len(states) > 0 {
				t.Errorf("%v %v", states, err)
			}
			if _, err := os.Stat(r.ioDir(c.ID)); !os.IsNotExist(err) {
				t.Errorf("FIFOs are left: %v", err)
			}
		})
	}
	t.Run("leaves a process", func(t *testing.T) {
		r.t = t
		h, out := hook(t, left+"exit 0")
		c := r.container("true")
		c.Spec.Hooks = &specs.Hooks{CreateContainer: []specs.Hook{h}}
		if err := r.create(c); err != nil {
			t.Fatal(err)
		}
		gone(t, out)
	})
}

// In a shared PID namespace, others live: the hook is not seen there.
func TestHookSharedPID(t *testing.T) {
	r := newRing(t)
	id, path := sharedPID(t, r)
	h, out := hook(t, "readlink /proc/$$/ns/pid >$OUT; cat >>$OUT")
	c := r.container("sleep", "100")
	c.SandboxID, c.PIDMode, c.Namespaces = id, runtime.PIDPod, runtime.Namespaces{PID: path}
	c.Spec.Hooks = &specs.Hooks{CreateContainer: []specs.Hook{h}}
	r.run(c)
	own, err := os.Readlink("/proc/self/ns/pid")
	if said := read(t, out); err != nil || !strings.HasPrefix(said, own+"\n") || !strings.Contains(said, c.ID) {
		t.Errorf("%v: the hook saw %s, want %s", err, said, own)
	}
}

// gone checks that the process whose number is in a file has ended.
func gone(t *testing.T, file string) {
	t.Helper()
	pid := strings.TrimSpace(read(t, file))
	if pid == "" {
		return
	}
	cmd, err := os.ReadFile(fmt.Sprintf("/proc/%s/cmdline", pid))
	if err == nil && strings.Contains(string(cmd), "98765") {
		t.Errorf("process %s that a hook started is still there", pid)
	}
}

// stageHook is a hook that notes its stage, and what it sees, in a file.
func stageHook(t *testing.T, stage, script string) (specs.Hook, string) {
	t.Helper()
	h, out := hook(t, script)
	h.Args, h.Timeout = []string{"hook", stage}, new(5)
	return h, out
}

const stageScript = `
state=$(cat)
bundle=${state##*\"bundle\":\"}; bundle=${bundle%%\"*}
config=$(cat $bundle/config.json)
root=${config##*\"root\":\{\"path\":\"}; root=${root%%\"*}
echo "$1 $state mnt $(readlink /proc/$$/ns/mnt) net $(readlink /proc/$$/ns/net) env $(tr '\0' ' ' </proc/$$/environ)root $(ls -d $root/bin 2>&1)" >>$OUT
`

// Every stage runs in its place and in its order, with the state that it is due.
func TestHookStages(t *testing.T) {
	r := newRing(t)
	h, out := stageHook(t, "", stageScript)
	of := func(stage string) []specs.Hook {
		x := h
		x.Args = []string{"hook", stage}
		return []specs.Hook{x}
	}
	c := r.container("sh", "-c", "echo run; cat /inside; exec sleep 100")
	c.Spec.Annotations = map[string]string{"of.the": "pod"}
	inside := specs.Hook{Path: "/bin/sh", Args: []string{"sh", "-c", `cat >/inside; echo " $0 $A $ONLY pid $$ caps $(grep CapEff /proc/self/status)" >>/inside`}, Env: []string{"ONLY=this", "PATH=/bin"}}
	c.Spec.Hooks = &specs.Hooks{
		Prestart: of("prestart"), CreateRuntime: of("createRuntime"), StartContainer: []specs.Hook{inside}, Poststart: of("poststart"), Poststop: of("poststop"),
	}
	root := r.rootfs(c)
	p, err := r.Create(t.Context(), c, root)
	if err != nil {
		t.Fatal(err)
	}
	dir := r.hookDir(c.ID)
	lines := strings.Split(strings.TrimSpace(read(t, out)), "\n")
	if len(lines) != 2 || !strings.HasPrefix(lines[0], "prestart ") || !strings.HasPrefix(lines[1], "createRuntime ") {
		t.Fatalf("after the create: %q", lines)
	}
	host := func(n string) string {
		s, err := os.Readlink("/proc/self/ns/" + n)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	for _, l := range lines {
		for _, want := range []string{
			fmt.Sprintf(`"status":"creating","pid":%d,"bundle":%q`, p.PID, dir), `"annotations":{"of.the":"pod"}`, "mnt " + host("mnt"), "net " + host("net"),
			"env ONLY=this root /proc/", "/rootfs/bin",
		} {
			if !strings.Contains(l, want) {
				t.Errorf("no %q in %s", want, l)
			}
		}
	}
	if err := r.Start(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	lines = strings.Split(strings.TrimSpace(read(t, out)), "\n")
	if len(lines) != 3 || !strings.HasPrefix(lines[2], "poststart ") || !strings.Contains(lines[2], fmt.Sprintf(`"status":"running","pid":%d,`, p.PID)) {
		t.Errorf("after the start: %q", lines)
	}
	time.Sleep(300 * time.Millisecond)
	// Of the container: its program, its privileges, its process numbers.
	for _, want := range []string{"run\n", `"status":"created","pid":1,`, " sh  this pid ", "CapEff:\t00000000000000e1"} {
		if got := r.log(c); !strings.Contains(got, want) {
			t.Errorf("no %q in what the hook inside saw: %s", want, got)
		}
	}
	for range 2 { // the second time, nothing is left to be done
		if err := r.Delete(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}
	lines = strings.Split(strings.TrimSpace(read(t, out)), "\n")
	if len(lines) != 4 || !strings.HasPrefix(lines[3], "poststop ") || !strings.Contains(lines[3], `"status":"stopped",`) {
		t.Errorf("after the delete: %q", lines)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("the bundle is left: %v", err)
	}
}

// A hook that fails fails what it belongs to; one of poststop only warns, and
// those after it are run.
func TestHookStageFailures(t *testing.T) {
	r := newRing(t)
	fail := func(t *testing.T) specs.Hook {
		h, _ := stageHook(t, "", "echo no >&2; exit 3")
		return h
	}
	stop, out := stageHook(t, "last", "echo ran >>$OUT")
	for _, x := range []struct {
		stage   string
		hooks   specs.Hooks
		created bool
	}{
		{"prestart", specs.Hooks{Prestart: []specs.Hook{fail(t)}}, false},
		{"createRuntime", specs.Hooks{CreateRuntime: []specs.Hook{fail(t)}}, false},
		{"startContainer", specs.Hooks{StartContainer: []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "exit 3"}}}}, true},
		{"poststart", specs.Hooks{Poststart: []specs.Hook{fail(t)}}, true},
	} {
		t.Run(x.stage, func(t *testing.T) {
			r.t = t
			c := r.container("sh", "-c", "echo it ran; exec sleep 100")
			c.Spec.Hooks = &x.hooks
			c.Spec.Hooks.Poststop = []specs.Hook{fail(t), stop}
			err := r.create(c)
			if x.created && err == nil {
				err = r.Start(t.Context(), c)
			}
			if !errs.Is(err, errs.FailedPrecondition) || !strings.Contains(err.Error(), x.stage+" hook ") || !strings.Contains(err.Error(), "ended with code") {
				t.Errorf("%v", err)
			}
			if got := r.log(c); x.stage != "poststart" && strings.Contains(got, "it ran") {
				t.Error("the program was executed")
			}
			if err := r.Delete(t.Context(), c); err != nil {
				t.Error(err)
			}
			if got := read(t, out); got != "ran\n" {
				t.Errorf("poststop hooks: %q", got)
			}
			if err := os.Truncate(out, 0); err != nil {
				t.Fatal(err)
			}
		})
	}
	t.Run("hangs", func(t *testing.T) {
		r.t = t
		h, out := hook(t, "sleep 98765 & echo $! >$OUT; sleep 98765")
		h.Timeout = new(1)
		c := r.container("true")
		c.Spec.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{h}}
		if err := r.create(c); !errs.Is(err, errs.DeadlineExceeded) || !strings.Contains(err.Error(), "did not end within 1s") {
			t.Error(err)
		}
		gone(t, out)
		if err := r.Delete(t.Context(), c); err != nil {
			t.Error(err)
		}
	})
}
