package native

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/namespaces"
	"github.com/naru-project/naru/internal/testhost"
	"github.com/naru-project/naru/runtime"
	"github.com/naru-project/naru/runtime/stdio"
)

// openFiles counts this process's descriptors once nothing closes any more.
func openFiles(t *testing.T) int {
	t.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// sharedPID makes a PID namespace with an init.
func sharedPID(t *testing.T, r *ring) (sandbox, path string) {
	t.Helper()
	sandbox = newID()
	files, err := Maker{r.Executor}.Make(t.Context(), namespaces.Request{ID: sandbox, PID: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		files.Close()
		_ = Maker{r.Executor}.Release(context.Background(), sandbox)
	})
	return sandbox, "/proc/self/fd/" + itoa(int(files.PID.Fd()))
}

func TestTargetPID(t *testing.T) {
	r := newRing(t)
	target := r.container("sleep", "4712")
	r.run(target)
	c := r.container("sh", "-c", "ps; exec sleep 100")
	c.PIDMode, c.TargetID = runtime.PIDTarget, target.ID
	r.run(c)
	time.Sleep(300 * time.Millisecond)
	if got := r.log(c); !strings.Contains(got, "sleep 4712") {
		t.Errorf("the target's processes are not visible:\n%s", got)
	}
	// A target that ended is refused, whoever has its pid now.
	if err := r.Signal(t.Context(), target.ID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	r.exit(target)
	late := r.container("true")
	late.PIDMode, late.TargetID = runtime.PIDTarget, target.ID
	if err := r.create(late); !errs.Is(err, errs.FailedPrecondition) || !strings.Contains(err.Error(), "target container "+short(target.ID)) {
		t.Errorf("joined the namespace of a process that ended: %v", err)
	}
}

// TestFailedCreateLeavesNothing fails when the root file system is assembled:
// with a child, and with a builder in a PID namespace that is shared.
func TestFailedCreateLeavesNothing(t *testing.T) {
	r := newRing(t)
	sandbox, pid := sharedPID(t, r)
	for _, mode := range []runtime.PIDMode{runtime.PIDContainer, runtime.PIDPod} {
		try := func() *runtime.Container {
			c := r.container("true")
			c.PIDMode, c.SandboxID = mode, sandbox
			if mode == runtime.PIDPod {
				c.Namespaces.PID = pid
			}
			c.Mounts = []runtime.Mount{{ContainerPath: "/proc", HostPath: r.dir}}
			if err := r.create(c); !errs.Is(err, errs.InvalidArgument) || !strings.Contains(err.Error(), "/proc") {
				t.Fatalf("%s: %v", mode, err)
			}
			return c
		}
		try()
		before := openFiles(t)
		for range 5 {
			c := try()
			if _, err := os.Stat(r.ioDir(c.ID)); !os.IsNotExist(err) {
				t.Errorf("%s: FIFOs are left: %v", mode, err)
			}
			if g, err := r.cfg.Cgroups.Open(c.Cgroup); err == nil {
				g.Close()
				t.Errorf("%s: the cgroup is left", mode)
			}
		}
		if after := openFiles(t); after > before {
			t.Errorf("%s: %d descriptors before, %d after", mode, before, after)
		}
	}
}

// TestDeviceFolders: folders below /dev are the container's, whatever the
// daemon's umask is, and a path through a link of /dev never leads to the host.
func TestDeviceFolders(t *testing.T) {
	old := unix.Umask(0o077)
	defer unix.Umask(old)
	maps := []runtime.IDMap{{ContainerID: 0, HostID: 200000, Size: 65536}}
	c := &runtime.Container{UIDMap: maps, GIDMap: maps, Spec: &specs.Spec{Linux: &specs.Linux{
		Devices: []specs.LinuxDevice{{Path: "/dev/net/tun", Type: "c", Major: 10, Minor: 200}},
	}}}
	d, err := makeDevices(c)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"net", "pts", "shm", "mqueue", "net/tun"} {
		var st unix.Stat_t
		if err := unix.Fstatat(int(d.dev.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			t.Fatal(err)
		}
		want := uint32(0o755)
		if name == "net/tun" {
			want = 0o666
		}
		if st.Mode&0o7777 != want || st.Uid != 200000 || st.Gid != 200000 {
			t.Errorf("/dev/%s: mode %#o owner %d:%d", name, st.Mode&0o7777, st.Uid, st.Gid)
		}
	}
	d.close()
	host, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	for _, bad := range []string{"/dev/fd/" + itoa(int(host.Fd())) + "/evil", "/dev/null/x", "/dev/fd/x", "/dev/core/x"} {
		c.Spec.Linux.Devices[0].Path = bad
		if d, err := makeDevices(c); !errs.Is(err, errs.InvalidArgument) {
			t.Errorf("device %s: %v", bad, err)
			if err == nil {
				d.close()
			}
		}
	}
	if names, _ := host.Readdirnames(-1); len(names) > 0 {
		t.Errorf("made on the host: %v", names)
	}
}

// slow takes its time before it takes anything.
type slow struct {
	buf  bytes.Buffer // not embedded: its ReadFrom would be quick
	wait time.Duration
}

func (s *slow) Write(p []byte) (int, error) {
	time.Sleep(s.wait)
	return s.buf.Write(p)
}

func TestExecSlowReader(t *testing.T) {
	r := newRing(t)
	c := r.container("sleep", "100")
	r.run(c)
	w := &slow{wait: 2 * stdio.DrainTime}
	code, err := r.Exec(t.Context(), c, runtime.ExecSpec{Args: []string{"head", "-c", "150000", "/dev/zero"}}, runtime.Streams{Stdout: w})
	if err != nil || code != 0 || w.buf.Len() != 150000 {
		t.Errorf("%d bytes of 150000, code %d, %v", w.buf.Len(), code, err)
	}
	// What a process leaves behind is not waited for, however much it writes.
	began := time.Now()
	var out bytes.Buffer
	code, err = r.Exec(t.Context(), c, runtime.ExecSpec{Args: []string{"sh", "-c", "echo hi; yes & exit 4"}}, runtime.Streams{Stdout: &out})
	if err != nil || code != 4 || !strings.HasPrefix(out.String(), "hi\n") || time.Since(began) > testhost.Limit(5*time.Second) {
		t.Errorf("code %d, %v after %s", code, err, time.Since(began))
	}
}

func TestExecTerminal(t *testing.T) {
	r := newRing(t)
	c := r.container("sleep", "100")
	r.run(c)
	w := &slow{wait: stdio.DrainTime / 4}
	sizes := make(chan runtime.Size, 1)
	sizes <- runtime.Size{Width: 91, Height: 31}
	code, err := r.Exec(t.Context(), c, runtime.ExecSpec{Args: []string{"sh", "-c", "sleep .3; stty size; seq 3000; exit 5"}, TTY: true}, runtime.Streams{Stdout: w, Resize: sizes})
	got := w.buf.String()
	if err != nil || code != 5 || !strings.HasPrefix(got, "31 91\r\n1\r\n") || !strings.HasSuffix(got, "\n3000\r\n") {
		t.Errorf("code %d, %v, %d bytes: %.40q … %q", code, err, len(got), got, got[max(0, len(got)-20):])
	}
}

// TestAttachStdinUnread: input that the container does not read keeps neither
// the attach nor a thread of the daemon.
func TestAttachStdinUnread(t *testing.T) {
	r := newRing(t)
	c := r.container("sleep", "100")
	c.Stdin = true
	r.run(c)
	in, person := io.Pipe()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- r.Attach(ctx, c, runtime.Streams{Stdin: in, Stdout: io.Discard}) }()
	wrote := make(chan error, 1)
	go func() {
		_, err := io.Copy(person, io.LimitReader(zeros{}, 1<<20))
		wrote <- err
	}()
	time.Sleep(300 * time.Millisecond) // the FIFO is full
	cancel()
	select {
	case <-ended:
	case <-time.After(testhost.Limit(3 * time.Second)):
		t.Fatal("attach did not end")
	}
	_ = in.Close()
	<-wrote
	deadline := time.Now().Add(testhost.Limit(3 * time.Second))
	for {
		buf := make([]byte, 1<<20)
		all := string(buf[:goruntime.Stack(buf, true)])
		if !strings.Contains(all, "attachStdin") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the copy of the input is left:\n%s", all)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// TestOwnFilesStayInside: in a volume with bidirectional propagation nothing of
// ours is mounted, for it would appear on the host.
func TestOwnFilesStayInside(t *testing.T) {
	r := newRing(t)
	hosts := filepath.Join(r.dir, "hosts")
	if err := os.WriteFile(hosts, []byte("x\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for prop, want := range map[runtime.Propagation]bool{runtime.PropagationPrivate: true, runtime.PropagationBidirectional: false} {
		c := r.container("true")
		c.EtcFiles = map[string]string{"/etc/hosts": hosts}
		c.Mounts = []runtime.Mount{{ContainerPath: "/etc/", HostPath: r.dir, Propagation: prop}}
		if got := !inShared(c, "/etc/hosts"); got != want {
			t.Errorf("%s: mounted %t", prop, got)
		}
	}
}

// TestVolumeOnRoot: a link of the image makes a volume's place the root.
func TestVolumeOnRoot(t *testing.T) {
	r := newRing(t)
	if err := os.Symlink("/", filepath.Join(r.layer, "whole")); err != nil {
		t.Fatal(err)
	}
	c := r.container("true")
	c.Spec.Root.Readonly, c.Volumes = true, []string{"/whole"}
	if err := r.create(c); !errs.Is(err, errs.InvalidArgument) || !strings.Contains(err.Error(), "root of the container") {
		t.Errorf("VOLUME on the root: %v", err)
	}
	c = r.container("true")
	c.Mounts = []runtime.Mount{{ContainerPath: "/whole", HostPath: r.dir}}
	if err := r.create(c); !errs.Is(err, errs.InvalidArgument) {
		t.Errorf("volume on the root: %v", err)
	}
}
