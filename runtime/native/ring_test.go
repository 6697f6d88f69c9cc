package native

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"os"
	osexec "os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/namespaces"
	"github.com/naru-project/naru/internal/testhost"
	"github.com/naru-project/naru/runtime"
	"github.com/naru-project/naru/runtime/cgroup"
	"github.com/naru-project/naru/runtime/monitor"
	"github.com/naru-project/naru/runtime/stats"
	"github.com/naru-project/naru/runtime/stdio"
)

// ring is an executor on the real kernel, with a real monitor.
type ring struct {
	*Executor
	t      testing.TB
	dir    string
	parent string
	layer  string
}

// newRing builds naru-monitor, starts a keeper in a temporary folder and makes
// a layer with a static busybox.
func newRing(t testing.TB) *ring {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: namespaces, mounts, cgroups")
	}
	busybox, err := osexec.LookPath("busybox")
	if err != nil {
		t.Fatal("needs a static busybox (package busybox-static)")
	}
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(dir, "naru-monitor")
	build := osexec.Command("go", "build", "-o", bin, "github.com/naru-project/naru/cmd/monitor")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build naru-monitor: %v\n%s", err, out)
	}
	layer := filepath.Join(dir, "images", "layers", "1")
	for _, d := range []string{"bin", "etc", "tmp", "proc", "sys", "dev", "root"} {
		if err := os.MkdirAll(filepath.Join(layer, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(layer, "bin/busybox"), b, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, a := range []string{"sh", "cat", "ls", "sleep", "id", "echo", "env", "mount", "readlink", "true", "yes", "head", "hostname", "grep", "kill", "touch", "ps", "stty", "pwd", "mkdir", "dd", "seq"} {
		if err := os.Symlink("busybox", filepath.Join(layer, "bin", a)); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	keeper := osexec.Command(bin, "keeper", "--dir", filepath.Join(dir, "monitor"))
	if err := keeper.Start(); err != nil {
		t.Fatal(err)
	}
	mon, err := monitor.Ensure(ctx, monitor.EnsureOptions{Binary: bin, Dir: filepath.Join(dir, "monitor"), Managed: true})
	if err != nil {
		t.Fatal(err)
	}
	info, err := mon.Info(ctx)
	if err != nil {
		t.Fatal(err)
	}
	cg, err := cgroup.New(cgroup.Config{Driver: "cgroupfs", StateDir: filepath.Join(dir, "cgroups")})
	if err != nil {
		t.Fatal(err)
	}
	x, err := New(Config{RunDir: dir, Cgroups: cg, Monitor: mon, Stats: stats.New(cg), OOMScoreFloor: 0})
	if err != nil {
		t.Fatal(err)
	}
	r := &ring{Executor: x, t: t, dir: dir, parent: "/naru-test-" + hex8(), layer: layer}
	go x.Run(ctx)
	t.Cleanup(func() {
		cancel()
		_ = cg.RemovePod(context.Background(), r.parent)
		_ = x.Close()
		_ = mon.Close()
		cg.Close()
		_ = keeper.Process.Kill()
		_ = keeper.Wait()
		_ = unix.Kill(info.WorkerPID, unix.SIGKILL)
	})
	return r
}

func hex8() string {
	var b [4]byte
	_, _ = rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

func newID() string {
	var b [32]byte
	_, _ = rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// container is a plain one that runs args.
func (r *ring) container(args ...string) *runtime.Container {
	id := newID()
	caps := []string{"CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_SETGID"}
	return &runtime.Container{
		ID: id, SandboxID: newID(), Cgroup: r.parent + "/" + id, PIDMode: runtime.PIDContainer,
		LogPath: filepath.Join(r.dir, id+".log"),
		Spec: &specs.Spec{
			Root: &specs.Root{},
			Process: &specs.Process{
				Args: args, Env: []string{"PATH=/bin", "A=b"}, Cwd: "/", NoNewPrivileges: true,
				Capabilities: &specs.LinuxCapabilities{Bounding: caps, Permitted: caps, Effective: caps},
			},
			Linux: &specs.Linux{
				MaskedPaths:   []string{"/proc/kcore", "/proc/timer_list", "/proc/acpi", "/sys/firmware", "/absent"},
				ReadonlyPaths: []string{"/proc/sys", "/proc/sysrq-trigger"},
				Resources:     &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}},
			},
		},
	}
}

// rootfs mounts the layer with new writable folders.
func (r *ring) rootfs(c *runtime.Container) *os.File {
	r.t.Helper()
	up, work := filepath.Join(r.dir, "images", "containers", c.ID, "u"), filepath.Join(r.dir, "images", "containers", c.ID, "w")
	for _, d := range []string{up, work} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			r.t.Fatal(err)
		}
	}
	c.Rootfs = runtime.Rootfs{Lower: []string{r.layer}, Upper: up, Work: work}
	root, err := r.MountRootfs(r.t.Context(), c.ID, c.Rootfs, c.UIDMap, c.GIDMap)
	if err != nil {
		r.t.Fatal(err)
	}
	return root
}

func (r *ring) create(c *runtime.Container) error {
	r.t.Helper()
	root := r.rootfs(c)
	_, err := r.Create(r.t.Context(), c, root)
	if err == nil {
		r.t.Cleanup(func() {
			if err := r.Delete(context.Background(), c); err != nil {
				r.t.Errorf("delete: %v", err)
			}
		})
	}
	return err
}

func (r *ring) run(c *runtime.Container) {
	r.t.Helper()
	if err := r.create(c); err != nil {
		r.t.Fatalf("create: %v", err)
	}
	if err := r.Start(r.t.Context(), c); err != nil {
		r.t.Fatalf("start: %v", err)
	}
}

func (r *ring) exit(c *runtime.Container) runtime.Exit {
	r.t.Helper()
	for {
		select {
		case e := <-r.Exits():
			if e.ID == c.ID {
				return e
			}
		case <-time.After(testhost.Limit(10 * time.Second)):
			r.t.Fatal("no exit in time")
		}
	}
}

func (r *ring) log(c *runtime.Container) string {
	r.t.Helper()
	b, err := os.ReadFile(c.LogPath)
	if err != nil {
		r.t.Fatal(err)
	}
	var out []string
	for l := range strings.SplitSeq(strings.TrimSuffix(string(b), "\n"), "\n") {
		if f := strings.SplitN(l, " ", 4); len(f) == 4 {
			out = append(out, f[3])
		}
	}
	return strings.Join(out, "\n")
}

func TestContainerRuns(t *testing.T) {
	r := newRing(t)
	c := r.container("sh", "-c", "echo hello $A; id -u; ls /proc/self/fd | head -9; pwd; cat /proc/timer_list | head -1; ls /; exit 7")
	r.run(c)
	if e := r.exit(c); e.Code != 7 || e.Signal != 0 {
		t.Errorf("exit %+v", e)
	}
	if got := r.log(c); !strings.HasPrefix(got, "hello b\n0\n0\n1\n2\n3\n/\n") {
		t.Errorf("log:\n%s", got)
	}
}

func TestPosture(t *testing.T) {
	r := newRing(t)
	c := r.container("sh", "-c", "cat /proc/self/status; cat /proc/self/mountinfo; readlink /proc/self/exe /proc/self/cwd /proc/self/root; ls -la /dev; exec sleep 100")
	r.run(c)
	time.Sleep(300 * time.Millisecond)
	got := r.log(c)
	for _, want := range []string{"NoNewPrivs:\t1", "CapInh:\t0000000000000000", "CapBnd:\t00000000000000e1", "CapAmb:\t0000000000000000", "CapEff:\t00000000000000e1"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	if strings.Contains(got, r.dir+"/monitor") {
		t.Errorf("host paths are visible:\n%s", got)
	}
	res, err := r.ExecSync(t.Context(), c, runtime.ExecSpec{Args: []string{"cat", "/proc/self/status"}})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"NoNewPrivs:\t1", "CapInh:\t0000000000000000", "CapEff:\t00000000000000e1"} {
		if !strings.Contains(string(res.Stdout), want) {
			t.Errorf("exec: no %q in\n%s", want, res.Stdout)
		}
	}
}

func TestExecSync(t *testing.T) {
	r := newRing(t)
	c := r.container("sleep", "100")
	r.run(c)
	res, err := r.ExecSync(t.Context(), c, runtime.ExecSpec{Args: []string{"sh", "-c", "echo out; echo err >&2; exit 3"}})
	if err != nil || res.Code != 3 || string(res.Stdout) != "out\n" || string(res.Stderr) != "err\n" {
		t.Errorf("%+v %v", res, err)
	}
	if _, err := r.ExecSync(t.Context(), c, runtime.ExecSpec{Args: []string{"absent-command"}}); !errs.Is(err, errs.FailedPrecondition) || !errors.Is(err, unix.ENOENT) || !strings.Contains(err.Error(), "absent-command") {
		t.Errorf("absent command: %v", err)
	}
	began := time.Now()
	_, err = r.ExecSync(t.Context(), c, runtime.ExecSpec{Args: []string{"sh", "-c", "sleep 1000 & sleep 1000"}, Timeout: time.Second})
	if !errs.Is(err, errs.DeadlineExceeded) || time.Since(began) > testhost.Limit(3*time.Second) {
		t.Errorf("timeout: %v after %s", err, time.Since(began))
	}
	res, err = r.ExecSync(t.Context(), c, runtime.ExecSpec{Args: []string{"ps"}})
	if err != nil || bytes.Contains(res.Stdout, []byte("1000")) {
		t.Errorf("left after a timeout:\n%s %v", res.Stdout, err)
	}
	began = time.Now()
	res, err = r.ExecSync(t.Context(), c, runtime.ExecSpec{Args: []string{"sh", "-c", "sleep 1000 & echo hi"}})
	if err != nil || string(res.Stdout) != "hi\n" || time.Since(began) > testhost.Limit(3*time.Second) {
		t.Errorf("background child: %+v %v after %s", res, err, time.Since(began))
	}
	res, err = r.ExecSync(t.Context(), c, runtime.ExecSpec{Args: []string{"head", "-c", "20000000", "/dev/zero"}})
	if err != nil || len(res.Stdout) != stdio.MaxOutput || res.Code != 0 {
		t.Errorf("capped output: %d bytes, code %d, %v", len(res.Stdout), res.Code, err)
	}
}

func TestStartErrors(t *testing.T) {
	r := newRing(t)
	c := r.container("/bin/absent")
	if err := r.create(c); err != nil {
		t.Fatal(err)
	}
	if err := r.Start(t.Context(), c); !errs.Is(err, errs.FailedPrecondition) || !strings.Contains(err.Error(), "/bin/absent") {
		t.Errorf("got %v", err)
	}
}

func TestUserNamespace(t *testing.T) {
	r := newRing(t)
	maps := []runtime.IDMap{{ContainerID: 0, HostID: 200000, Size: 65536}}
	files, err := Maker{r.Executor}.Make(t.Context(), namespaces.Request{ID: newID(), User: true, Net: true, IPC: true, UTS: true, UIDMap: maps, GIDMap: maps})
	if err != nil {
		t.Fatal(err)
	}
	defer files.Close()
	c := r.container("sh", "-c", "id -u; cat /proc/self/uid_map; touch /new; ls -ln /new /bin/busybox /dev/null; mount | grep -c .; hostname; mount -t tmpfs t /tmp && echo mounted; exec sleep 100")
	c.UIDMap, c.GIDMap = maps, maps
	pin := func(f *os.File) string { return "/proc/self/fd/" + itoa(int(f.Fd())) }
	c.Namespaces = runtime.Namespaces{User: pin(files.User), Net: pin(files.Net), IPC: pin(files.IPC), UTS: pin(files.UTS)}
	caps := append(c.Spec.Process.Capabilities.Bounding, "CAP_SYS_ADMIN")
	c.Spec.Process.Capabilities = &specs.LinuxCapabilities{Bounding: caps, Permitted: caps, Effective: caps}
	r.run(c)
	time.Sleep(400 * time.Millisecond)
	got := r.log(c)
	for _, want := range []string{"0\n", "200000", "mounted"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	st, err := os.Stat(filepath.Join(c.Rootfs.Upper, "new"))
	if err != nil {
		t.Fatal(err, got)
	}
	if u := st.Sys().(*syscall.Stat_t).Uid; u != 0 {
		t.Errorf("a file of the container's root has uid %d on disk, want 0", u)
	}
	res, err := r.ExecSync(t.Context(), c, runtime.ExecSpec{Args: []string{"id", "-u"}})
	if err != nil || string(res.Stdout) != "0\n" {
		t.Errorf("exec: %+v %v", res, err)
	}
}

func TestSharedPID(t *testing.T) {
	r := newRing(t)
	sandbox := newID()
	files, err := Maker{r.Executor}.Make(t.Context(), namespaces.Request{ID: sandbox, PID: true})
	if err != nil {
		t.Fatal(err)
	}
	defer files.Close()
	t.Cleanup(func() { _ = Maker{r.Executor}.Release(context.Background(), sandbox) })
	first := r.container("sleep", "4711")
	second := r.container("sh", "-c", "ps; exec sleep 100")
	for _, c := range []*runtime.Container{first, second} {
		c.SandboxID, c.PIDMode = sandbox, runtime.PIDPod
		c.Namespaces.PID = "/proc/self/fd/" + itoa(int(files.PID.Fd()))
		r.run(c)
	}
	time.Sleep(300 * time.Millisecond)
	got := r.log(second)
	if !strings.Contains(got, "sleep 4711") || !strings.Contains(got, "pause") {
		t.Errorf("the pod's processes are not visible:\n%s", got)
	}
	if err := r.Signal(t.Context(), first.ID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if e := r.exit(first); e.Code != 137 {
		t.Errorf("exit %+v", e)
	}
}

// TestManyAtOnce creates, starts and removes containers side by side: no start
// may hang or fail because of another one's.
func TestManyAtOnce(t *testing.T) {
	r := newRing(t)
	var wg sync.WaitGroup
	for range 6 {
		wg.Go(func() {
			for range 25 {
				c := r.container("true")
				root := r.rootfs(c)
				if _, err := r.Create(t.Context(), c, root); err != nil {
					t.Error(err)
					return
				}
				if err := r.Start(t.Context(), c); err != nil {
					t.Error(err)
				}
				if err := r.Delete(t.Context(), c); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}
