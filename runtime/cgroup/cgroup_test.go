package cgroup

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime"
)

// TestMain holds every test to leaving no descriptor and no cgroup behind.
func TestMain(m *testing.M) {
	before := countFDs()
	code := m.Run()
	if code == 0 {
		if left := leftovers(); len(left) > 0 {
			fmt.Fprintln(os.Stderr, "cgroups left behind:", left)
			code = 1
		}
		if after := countFDs(); after > before+2 { // +2: the runtime's poller
			fmt.Fprintf(os.Stderr, "descriptors: %d before, %d after\n", before, after)
			code = 1
		}
	}
	os.Exit(code)
}

func countFDs() int {
	e, _ := os.ReadDir("/proc/self/fd")
	return len(e)
}

func leftovers() []string {
	var all []string
	for _, pattern := range []string{DefaultRoot + "/naru-test-*", DefaultRoot + "/*/naru-test-*"} {
		m, _ := filepath.Glob(pattern)
		all = append(all, m...)
	}
	return all
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: cgroups are made")
	}
}

// hostDriver drives the machine's own hierarchies, with a parent of its own.
func hostDriver(t testing.TB) (*Driver, string) {
	t.Helper()
	needRoot(t)
	d, err := New(Config{Driver: DriverCgroupfs, StateDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	parent := fmt.Sprintf("/naru-test-%d-%d/pod", os.Getpid(), time.Now().UnixNano())
	t.Cleanup(func() { // runs before Close
		if err := d.RemovePod(context.Background(), parent); err != nil {
			t.Errorf("remove parent: %v", err)
		}
	})
	return d, parent
}

// unifiedDriver takes a folder of the version 2 tree for the root of a host
// with version 2 alone. On a hybrid host few controllers are there.
func unifiedDriver(t testing.TB) *Driver {
	t.Helper()
	needRoot(t)
	base := DefaultRoot
	var st unix.Statfs_t
	if err := unix.Statfs(base, &st); err != nil || st.Type != unix.CGROUP2_SUPER_MAGIC {
		base += "/unified"
		if err := unix.Statfs(base, &st); err != nil || st.Type != unix.CGROUP2_SUPER_MAGIC {
			t.Skip("needs a mounted cgroup v2 tree")
		}
	}
	root := fmt.Sprintf("%s/naru-test-v2-%d-%d", base, os.Getpid(), time.Now().UnixNano())
	if err := os.Mkdir(root, 0o755); err != nil {
		t.Fatal(err)
	}
	d, err := New(Config{Root: root, Driver: DriverCgroupfs, StateDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		d.Close()
		h, err := openHierarchy(base, "unified")
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(h.fd)
		if err := removeTree(context.Background(), h, filepath.Base(root), time.Now().Add(removeWait)); err != nil {
			t.Errorf("remove root: %v", err)
		}
	})
	return d
}

func mustPath(t testing.TB, d *Driver, parent, id string) string {
	t.Helper()
	p, err := d.ContainerPath(parent, id)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func wantClass(t testing.TB, err error, c errs.Class) {
	t.Helper()
	if !errs.Is(err, c) {
		t.Fatalf("got %v (%s), want class %s", err, errs.Of(err), c)
	}
}

// enter starts a command in the group, the way a container's child enters:
// CLONE_INTO_CGROUP, and "0" into each tasks file, written by a shell that then
// execs the command.
func enter(t testing.TB, clone *os.File, tasks []*os.File, script string) *exec.Cmd {
	t.Helper()
	var pre strings.Builder
	for i := range tasks {
		fmt.Fprintf(&pre, "echo 0 >&%d; ", 3+i)
	}
	cmd := exec.Command("/bin/bash", "-c", pre.String()+script) // dash has one-digit descriptors only
	cmd.ExtraFiles = tasks
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	if clone != nil {
		cmd.SysProcAttr.UseCgroupFD = true
		cmd.SysProcAttr.CgroupFD = int(clone.Fd())
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	// The script prints "in" once it is where it should be.
	buf := make([]byte, 2)
	if strings.Contains(script, "echo in") {
		if _, err := out.Read(buf); err != nil || string(buf) != "in" {
			t.Fatalf("child did not come up: %q %v", buf, err)
		}
	}
	return cmd
}

func killAndRemove(t testing.TB, g *Group) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := g.Kill(ctx); err != nil {
		t.Errorf("kill: %v", err)
	}
	if err := g.Remove(ctx); err != nil {
		t.Errorf("remove: %v", err)
	}
}

func fileOf(t testing.TB, g *Group, controller, file string) string {
	t.Helper()
	fd, ok := g.d.Dir(controller)
	if !ok {
		t.Fatalf("no controller %s", controller)
	}
	s, err := readStringAt(fd, g.rel+"/"+file)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestFoldersCanBeEntered: whatever the umask is, any user may pass through the
// folders of the version 2 tree. On older kernels (6.1) the root of a user
// namespace mounts cgroup2 only if it may, from the top down to its own cgroup.
func TestFoldersCanBeEntered(t *testing.T) {
	old := unix.Umask(0o077)
	defer unix.Umask(old)
	d := unifiedDriver(t)
	g := create(t, d, "/pod", "c1", runtime.Resources{})
	e, err := g.NewExec(bg)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	for _, rel := range []string{"pod", g.rel, e.own.rel} {
		var st unix.Stat_t
		if err := unix.Fstatat(d.unified.fd, rel, &st, 0); err != nil || st.Mode&0o7777 != 0o755 {
			t.Errorf("%s: mode %#o, %v", rel, st.Mode&0o7777, err)
		}
	}
	if err := e.Remove(bg); err != nil {
		t.Error(err)
	}
}
