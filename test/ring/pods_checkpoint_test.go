package ring

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// unpack extracts an archive's folders and regular files.
func unpack(t *testing.T, archive, dir string) (names []string) {
	t.Helper()
	f, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	for in := tar.NewReader(f); ; {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			return names
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, h.Name)
		to := filepath.Join(dir, filepath.FromSlash(h.Name))
		folder := filepath.Dir(to)
		if h.Typeflag == tar.TypeDir {
			folder = to
		}
		if err := os.MkdirAll(folder, 0o755); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeDir {
			continue
		}
		data, err := io.ReadAll(in)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(to, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func (n *Node) checkpoint(t *testing.T, id, location string) error {
	t.Helper()
	_, err := n.Runtime.CheckpointContainer(within(t, callTime), &criv1.CheckpointContainerRequest{ContainerId: id, Location: location})
	return err
}

func TestPodCheckpointOff(t *testing.T) {
	n := StartNode(t)
	id := n.Run(t, n.Pod(t, nil), nil)
	wantError(t, n.checkpoint(t, id, n.Dir+"/x.tar"), codes.Unimplemented, "runtime.criu")
	missing := StartNode(t, WithConfig(`runtime.criu = "/no/criu"`))
	id = missing.Run(t, missing.Pod(t, nil), nil)
	wantError(t, missing.checkpoint(t, id, missing.Dir+"/x.tar"), codes.FailedPrecondition, "/no/criu")
}

func TestPodCheckpoint(t *testing.T) {
	criu, err := exec.LookPath("criu")
	if err != nil {
		t.Skip("there is no criu on this machine")
	}
	if out, err := exec.Command(criu, "check").CombinedOutput(); err != nil {
		t.Skipf("criu does not work on this kernel: %.300s", out)
	}
	n := StartNode(t, WithConfig(fmt.Sprintf("runtime.criu = %q", criu)))
	pod := n.Pod(t, nil)
	vol := n.HostDir(t)
	id := n.Run(t, pod, each(mounts(Volume(vol, "/vol")), shell("echo of the container >/changed; i=0; while true; do i=$((i+1)); echo line $i; sleep 0.1; done")))
	lines := func() int { return strings.Count(n.LogText(t, id), "line ") }
	eventually(t, 10*time.Second, "some lines", func() bool { return lines() > 5 })
	at := filepath.Join(n.Dir, "checkpoint.tar")
	if err := n.checkpoint(t, id, at); err != nil {
		t.Fatal(err)
	}
	before := lines()
	if s := n.Status(t, id); s.State != criv1.ContainerState_CONTAINER_RUNNING {
		t.Errorf("afterwards it is %v", s.State)
	}
	eventually(t, 10*time.Second, "more lines", func() bool { return lines() > before })
	if out := n.Sh(t, id, "echo still"); out != "still" {
		t.Errorf("an exec says %q", out)
	}
	wantError(t, n.checkpoint(t, id, at), codes.AlreadyExists, at)

	dir := filepath.Join(n.Dir, "unpacked")
	names := strings.Join(unpack(t, at, dir), " ")
	for _, want := range []string{"config.dump", "spec.dump", "rootfs-diff.tar", "dump.log", "checkpoint/pages-1.img", "checkpoint/inventory.img"} {
		if !strings.Contains(names, want) {
			t.Errorf("the archive has %s, and not %s", names, want)
		}
	}
	var config struct{ ID, Name string }
	data, err := os.ReadFile(filepath.Join(dir, "config.dump"))
	if err != nil || json.Unmarshal(data, &config) != nil || config.ID != id {
		t.Errorf("config.dump: %s, %v", data, err)
	}
	unpack(t, filepath.Join(dir, "rootfs-diff.tar"), filepath.Join(dir, "diff"))
	if b, err := os.ReadFile(filepath.Join(dir, "diff/changed")); err != nil || string(b) != "of the container\n" {
		t.Errorf("the changed file is %q, %v", b, err)
	}
	n.restoreByHand(t, criu, id, pod, dir, vol)
}

// restoreByHand lets criu itself bring the processes back, beside naru: on a
// root file system put together from the image's layer and the changes, with
// the host's parts named.
func (n *Node) restoreByHand(t *testing.T, criu, id, pod, dir, vol string) {
	t.Helper()
	root := filepath.Join(dir, "root")
	for _, d := range []string{root, dir + "/work"} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	images := n.Root + "/images/"
	layers, _ := filepath.Glob(images + "layers/[0-9]*")
	opts := fmt.Sprintf("lowerdir=%s:%splaces,upperdir=%s/diff,workdir=%s/work", strings.Join(layers, ":"), images, dir, dir)
	if err := unix.Mount("overlay", root, "overlay", 0, opts); err != nil {
		t.Fatalf("mount %s: %v", opts, err)
	}
	defer func() { _ = unix.Unmount(root, unix.MNT_DETACH) }()
	var info struct {
		Netns string `json:"netns"`
	}
	n.podInfo(t, pod, &info)
	netns, err := os.Open(info.Netns)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = netns.Close() }()
	// criu sets the size of the pipe again, so its place is taken by another.
	if err := unix.Mkfifo(dir+"/output", 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := os.OpenFile(dir+"/output", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = out.Close() }()
	in, err := os.OpenFile(dir+"/output", os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	var output sink
	done := make(chan struct{})
	go func() { defer close(done); _, _ = io.Copy(&output, in) }()
	defer func() { _ = in.Close(); <-done }()
	args := []string{
		"restore", "--images-dir", dir + "/checkpoint", "--work-dir", dir, "--log-file", "restore.log", "-v4", "--root", root,
		"--restore-detached", "--pidfile", dir + "/pid", "--manage-cgroups=ignore", "--tcp-established", "--file-locks",
		"--inherit-fd", "fd[3]:pod",
	}
	for to, from := range map[string]string{"/vol": vol, "/dev/shm": n.RunDir + "/pods/" + pod + "/shm"} {
		args = append(args, "--external", "mnt["+to+"]:"+from)
	}
	for _, name := range []string{"hosts", "hostname", "resolv.conf"} {
		args = append(args, "--external", "mnt[/etc/"+name+"]:"+n.RunDir+"/pods/"+pod+"/"+name)
	}
	for i, name := range []string{"1", "2"} {
		var st unix.Statx_t
		if err := unix.Statx(unix.AT_FDCWD, n.RunDir+"/io/"+id+"/"+name, 0, unix.STATX_INO|unix.STATX_MNT_ID, &st); err != nil {
			t.Fatal(err)
		}
		args = append(args, "--inherit-fd", fmt.Sprintf("fd[%d]:file[%x:%x]", 4+i, st.Mnt_id, st.Ino))
	}
	cmd := exec.Command(criu, args...)
	cmd.ExtraFiles = []*os.File{netns, out, out}
	if msg, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("criu restore: %v\n%s\n%s", err, msg, tail(dir+"/restore.log", 3000))
	}
	b, err := os.ReadFile(dir + "/pid")
	if err != nil {
		t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Sscan(string(b), &pid); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Kill(pid, unix.SIGKILL) }()
	numbered := regexp.MustCompile(`line \d+`)
	eventually(t, 20*time.Second, "the restored process to write", func() bool {
		return len(numbered.FindAllString(output.String(), -1)) > 3
	})
}
