package ring

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// fails runs a command that must fail, and with these words.
func (n *Node) fails(t testing.TB, id, script, words string) {
	t.Helper()
	out, errOut, code := n.Exec(t, id, "/bin/sh", "-c", script)
	if code == 0 || !strings.Contains(errOut, words) {
		t.Errorf("%q: exit code %d, %q %q; want a failure with %q", script, code, out, errOut, words)
	}
}

// mountTmpfs mounts a tmpfs on the host for as long as the test runs.
func mountTmpfs(t testing.TB, dir string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
}

func TestPodMounts(t *testing.T) {
	n := StartNode(t)
	pod := n.Pod(t, func(c *criv1.PodSandboxConfig) { c.Linux.SecurityContext.Privileged = true })
	// A folder with a mount in it, one that is shared, and a program.
	deep, shared := n.HostDir(t), n.SharedDir(t)
	t.Cleanup(func() { _ = unix.Unmount(shared, unix.MNT_DETACH) })
	mountTmpfs(t, deep+"/sub")
	for path, text := range map[string]string{deep + "/file": "on the host\n", deep + "/sub/file": "deep\n", deep + "/run.sh": "#!/bin/sh\necho ran\n"} {
		if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	vol := func(f func(m *criv1.Mount)) func(*criv1.ContainerConfig) {
		m := Volume(deep, "/vol")
		if f != nil {
			f(m)
		}
		return mounts(m)
	}
	t.Run("writable", func(t *testing.T) {
		id := n.Run(t, pod, vol(nil))
		if out := n.Sh(t, id, "cat /vol/file /vol/sub/file; /vol/run.sh; echo hello >/vol/new; echo hello >/vol/sub/new"); out != "on the host\ndeep\nran" {
			t.Errorf("got %q", out)
		}
		if b, err := os.ReadFile(deep + "/sub/new"); string(b) != "hello\n" {
			t.Errorf("on the host: %q, %v", b, err)
		}
	})
	t.Run("readonly", func(t *testing.T) {
		id := n.Run(t, pod, vol(func(m *criv1.Mount) { m.Readonly = true }))
		n.fails(t, id, "echo x >/vol/file", "Read-only")
		n.Sh(t, id, "cat /vol/file && echo x >/vol/sub/through") // not recursive: as documented in CRI
	})
	t.Run("recursive_read_only", func(t *testing.T) {
		id := n.Run(t, pod, vol(func(m *criv1.Mount) { m.Readonly, m.RecursiveReadOnly = true, true }))
		n.fails(t, id, "echo x >/vol/file", "Read-only")
		n.fails(t, id, "echo x >/vol/sub/file", "Read-only")
		for _, bad := range []func(*criv1.Mount){
			func(m *criv1.Mount) { m.RecursiveReadOnly = true },
			func(m *criv1.Mount) {
				m.HostPath, m.Readonly, m.RecursiveReadOnly, m.Propagation = shared, true, true, criv1.MountPropagation_PROPAGATION_HOST_TO_CONTAINER
			},
		} {
			_, err := n.TryContainer(t, pod, vol(bad))
			wantError(t, err, codes.InvalidArgument, "recursive_read_only")
		}
	})
	t.Run("mount_options", func(t *testing.T) {
		id := n.Run(t, pod, each(vol(func(m *criv1.Mount) { m.MountOptions = []string{"noexec", "nosuid", "nodev"} }),
			mounts(&criv1.Mount{HostPath: deep, ContainerPath: "/ro", Readonly: true, MountOptions: []string{"noexec"}})))
		n.fails(t, id, "/vol/run.sh", "Permission denied")
		n.fails(t, id, "/ro/run.sh", "Permission denied")
		n.fails(t, id, "echo x >/ro/x", "Read-only")
		n.Sh(t, id, "echo fine >/vol/x; sh /vol/run.sh; grep -E ' /vol [^ ]*nosuid[^ ]*nodev[^ ]*noexec' /proc/self/mountinfo")
		_, err := n.TryContainer(t, pod, vol(func(m *criv1.Mount) { m.MountOptions = []string{"suid"} }))
		wantError(t, err, codes.InvalidArgument, "suid")
	})
	t.Run("propagation", func(t *testing.T) {
		inside := func(p criv1.MountPropagation) func(*criv1.ContainerConfig) {
			return mounts(&criv1.Mount{HostPath: shared, ContainerPath: "/shared", Propagation: p})
		}
		private, slave := n.Run(t, pod, inside(criv1.MountPropagation_PROPAGATION_PRIVATE)), n.Run(t, pod, inside(criv1.MountPropagation_PROPAGATION_HOST_TO_CONTAINER))
		both := n.Run(t, pod, each(inside(criv1.MountPropagation_PROPAGATION_BIDIRECTIONAL), security(func(s *criv1.LinuxContainerSecurityContext) { s.Privileged = true })))
		mountTmpfs(t, shared+"/later")
		if err := os.WriteFile(shared+"/later/file", nil, 0o644); err != nil {
			t.Fatal(err)
		}
		for id, want := range map[string]string{private: "", slave: "file", both: "file"} {
			if out := n.Sh(t, id, "ls /shared/later"); out != want {
				t.Errorf("a mount made later on the host: %q, want %q", out, want)
			}
		}
		n.Sh(t, both, "mkdir /shared/from-inside && mount -t tmpfs tmpfs /shared/from-inside && touch /shared/from-inside/x")
		if _, err := os.Stat(shared + "/from-inside/x"); err != nil {
			t.Errorf("a mount made in the container does not reach the host: %v", err)
		}
		if out := n.Sh(t, slave, "ls /shared/from-inside"); out != "x" {
			t.Errorf("nor the other container: %q", out)
		}
		n.Sh(t, both, "umount /shared/from-inside")
		for _, p := range []criv1.MountPropagation{criv1.MountPropagation_PROPAGATION_HOST_TO_CONTAINER, criv1.MountPropagation_PROPAGATION_BIDIRECTIONAL} {
			_, err := n.TryContainer(t, pod, each(vol(func(m *criv1.Mount) { m.Propagation = p }), security(func(s *criv1.LinuxContainerSecurityContext) { s.Privileged = true })))
			wantError(t, err, codes.FailedPrecondition, "not shared", deep)
		}
	})
	t.Run("host paths", func(t *testing.T) {
		_, err := n.TryContainer(t, pod, vol(func(m *criv1.Mount) { m.HostPath = "/no/such/path" }))
		wantError(t, err, codes.FailedPrecondition, "/no/such/path does not exist", "/vol")
		link := n.HostDir(t) + "/link"
		if err := os.Symlink(deep, link); err != nil {
			t.Fatal(err)
		}
		id := n.Run(t, pod, each(mounts(Volume(link, "/by-link"), Volume(deep+"/file", "/etc/one-file"), Volume(deep, "/a/b/c"), Volume(deep+"/sub", "/a/b"))))
		if out := n.Sh(t, id, "cat /by-link/file /etc/one-file; ls /a/b/c/run.sh"); out != "on the host\non the host\n/a/b/c/run.sh" {
			t.Errorf("got %q", out)
		}
	})
	t.Run("status", func(t *testing.T) {
		id := n.Run(t, pod, vol(func(m *criv1.Mount) { m.Readonly, m.MountOptions = true, []string{"noexec"} }))
		m := n.Status(t, id).Mounts
		if len(m) != 1 || m[0].HostPath != deep || m[0].ContainerPath != "/vol" || !m[0].Readonly || len(m[0].MountOptions) != 1 {
			t.Errorf("status says %v", m)
		}
	})
}

func TestPodImageVolumes(t *testing.T) {
	n := StartNode(t)
	image := n.Image(t, ImageConfig{}, Dir("data"), Dir("data/deep"), File("data/deep/file", 0o644, "in the image\n"), File("data/run.sh", 0o755, "#!/bin/sh\necho ran\n"))
	st, err := n.Images.ImageStatus(within(t, callTime), &criv1.ImageStatusRequest{Image: &criv1.ImageSpec{Image: image}})
	if err != nil {
		t.Fatal(err)
	}
	volume := func(path, sub string) *criv1.Mount {
		return &criv1.Mount{ContainerPath: path, Image: &criv1.ImageSpec{Image: st.Image.Id}, ImageSubPath: sub}
	}
	for _, c := range []struct {
		name string
		pod  func(*criv1.PodSandboxConfig)
	}{{"plain pod", nil}, {"user namespace", userns(1 << 20)}} {
		t.Run(c.name, func(t *testing.T) {
			pod := n.Pod(t, c.pod)
			id := n.Run(t, pod, mounts(volume("/whole", ""), volume("/part", "data/deep")))
			if out := n.Sh(t, id, "cat /whole/data/deep/file /part/file; /whole/data/run.sh; stat -c %u:%g /part/file"); out != "in the image\nin the image\nran\n0:0" {
				t.Errorf("got %q", out)
			}
			n.fails(t, id, "echo x >/whole/x", "Read-only")
			n.fails(t, id, "echo x >/part/file", "Read-only")
			if m := n.Status(t, id).Mounts; len(m) != 2 || m[0].Image.GetImageRef() != st.Image.Id && !strings.Contains(fmt.Sprint(m[0].Image), strings.TrimPrefix(st.Image.Id, "sha256:")) {
				t.Errorf("status says %v", m)
			}
			_, err := n.TryContainer(t, pod, mounts(volume("/x", "no/such")))
			if err == nil || !strings.HasPrefix(messageOf(err), "ImageVolumeMountFailed") || !strings.Contains(err.Error(), "no/such") {
				t.Errorf("a sub-path that is not there: %v", err)
			}
		})
	}
	pod := n.Pod(t, nil)
	_, err = n.TryContainer(t, pod, mounts(&criv1.Mount{ContainerPath: "/x", Image: &criv1.ImageSpec{Image: "ring.test/absent:1"}}))
	if err == nil || !strings.HasPrefix(messageOf(err), "ImageVolumeMountFailed") {
		t.Errorf("an image that is not there: %v", err)
	}
	t.Run("in use", func(t *testing.T) {
		id := n.Run(t, pod, mounts(volume("/whole", "")))
		if _, err := n.Images.RemoveImage(within(t, callTime), &criv1.RemoveImageRequest{Image: &criv1.ImageSpec{Image: image}}); err != nil {
			t.Errorf("remove an image that is in use: %v", err)
		}
		n.RestartDaemon()
		if out := n.Sh(t, id, "cat /whole/data/deep/file"); out != "in the image" {
			t.Errorf("got %q", out)
		}
	})
}

func TestPodReadonlyRootfs(t *testing.T) {
	n := StartNode(t)
	pod := n.Pod(t, nil)
	image := n.Image(t, ImageConfig{Volumes: map[string]struct{}{"/var/data": {}, "/made": {}}}, Dir("var/data"), Entry{Name: "var/data/of-image", Mode: 0o640, UID: 1000, Data: []byte("kept\n")})
	readonly := security(func(s *criv1.LinuxContainerSecurityContext) { s.ReadonlyRootfs = true })
	id := n.Run(t, pod, each(readonly, func(c *criv1.ContainerConfig) { c.Image.Image = image }))
	for _, path := range []string{"/file", "/tmp/file", "/etc/passwd", "/etc/resolv.conf", "/etc/hosts", "/var/file"} {
		n.fails(t, id, "echo x >"+path, "Read-only")
	}
	if out := n.Sh(t, id, "cat /var/data/of-image; stat -c %u:%a /var/data/of-image; echo x >/var/data/x; echo y >/made/y; echo z >/dev/shm/z; cat /var/data/x /made/y"); out != "kept\n1000:640\nx\ny" {
		t.Errorf("got %q", out)
	}
	n.fails(t, n.Run(t, pod, readonly), "mount -o remount,rw /", "")
}

func TestPodPrivileged(t *testing.T) {
	n := StartNode(t)
	pod := n.Pod(t, func(c *criv1.PodSandboxConfig) { c.Linux.SecurityContext.Privileged = true })
	plain := n.Run(t, pod, nil)
	id := n.Run(t, pod, security(func(s *criv1.LinuxContainerSecurityContext) { s.Privileged = true }))
	status := func(id, field string) string {
		return strings.TrimSpace(n.Sh(t, id, "grep ^"+field+": /proc/self/status | cut -f2"))
	}
	bounding, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	if got := status(id, "CapEff"); !strings.Contains(string(bounding), "CapBnd:\t"+got) {
		t.Errorf("capabilities %s, this process may have\n%s", got, bounding)
	}
	for field, want := range map[string]string{"Seccomp": "0", "NoNewPrivs": "0"} {
		if got := status(id, field); got != want {
			t.Errorf("%s is %s, want %s", field, got, want)
		}
	}
	if got := status(plain, "CapEff"); got == status(id, "CapEff") {
		t.Errorf("an ordinary container has the same capabilities: %s", got)
	}
	t.Run("devices", func(t *testing.T) {
		entries, err := os.ReadDir("/dev")
		if err != nil {
			t.Fatal(err)
		}
		checked := 0
		for _, e := range entries {
			var st, in unix.Stat_t
			path := "/dev/" + e.Name()
			if unix.Lstat(path, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR && st.Mode&unix.S_IFMT != unix.S_IFBLK || e.Name() == "console" || e.Name() == "ptmx" {
				continue
			}
			if err := unix.Lstat(filepath.Join(fmt.Sprintf("/proc/%d/root", n.PID(t, id)), path), &in); err != nil || in.Rdev != st.Rdev || in.Mode&unix.S_IFMT != st.Mode&unix.S_IFMT {
				t.Errorf("%s: %v, %x, want %x", path, err, in.Rdev, st.Rdev)
			}
			checked++
		}
		n.Sh(t, id, "mknod /tmp/zero2 c 1 5 && head -c 1 /tmp/zero2 >/dev/null && mknod /tmp/kmsg c 1 11 && : </tmp/kmsg")
		n.Sh(t, plain, "mknod /tmp/zero2 c 1 5 && head -c 1 /tmp/zero2 >/dev/null")
		n.fails(t, plain, "mknod /tmp/kmsg c 1 11 && : </tmp/kmsg", "not permitted")
		if checked < 5 {
			t.Errorf("only %d devices were compared", checked)
		}
	})
	t.Run("sysfs", func(t *testing.T) {
		if out := n.Sh(t, id, "awk '$5 == \"/sys\" {print $6}' /proc/self/mountinfo"); !strings.HasPrefix(out, "rw") {
			t.Errorf("/sys is mounted %s", out)
		}
		if out := n.Sh(t, plain, "awk '$5 == \"/sys\" {print $6}' /proc/self/mountinfo"); !strings.HasPrefix(out, "ro") {
			t.Errorf("in an ordinary container /sys is mounted %s", out)
		}
		n.Sh(t, id, "echo 1 >/proc/sys/net/ipv4/ip_forward; mount -t tmpfs tmpfs /mnt")
		n.fails(t, plain, "echo 1 >/proc/sys/net/ipv4/ip_forward", "Read-only")
		n.fails(t, plain, "mount -t tmpfs tmpfs /mnt", "")
	})
	t.Run("a device", func(t *testing.T) {
		var host string
		for _, p := range []string{"/dev/fuse", "/dev/loop-control", "/dev/net/tun", "/dev/vsock", "/dev/hpet"} {
			if f, err := os.Open(p); err == nil {
				_ = f.Close()
				host = p
				break
			}
		}
		if host == "" {
			t.Skip("this machine has no device to give to a container")
		}
		give := func(perms string) string {
			return n.Run(t, pod, func(c *criv1.ContainerConfig) {
				c.Devices = []*criv1.Device{{HostPath: host, ContainerPath: "/dev/deep/mine", Permissions: perms}}
			})
		}
		dev := give("rwm")
		n.Sh(t, dev, ": </dev/deep/mine && : >/dev/deep/mine")
		var st unix.Stat_t
		if err := unix.Stat(host, &st); err != nil {
			t.Fatal(err)
		}
		node := fmt.Sprintf("mknod /tmp/x c %d %d && : </tmp/x", unix.Major(st.Rdev), unix.Minor(st.Rdev))
		n.Sh(t, dev, node)
		n.fails(t, plain, node, "not permitted")
		weak := give("r")
		n.Sh(t, weak, ": </dev/deep/mine")
		n.fails(t, weak, ": >/dev/deep/mine", "not permitted")
		n.fails(t, weak, node, "not permitted")
		_, err := n.TryContainer(t, pod, func(c *criv1.ContainerConfig) {
			c.Devices = []*criv1.Device{{HostPath: "/dev/no-such", ContainerPath: "/dev/mine", Permissions: "r"}}
		})
		if err == nil || !strings.Contains(err.Error(), "/dev/no-such") || codeOf(err) == codes.Internal || codeOf(err) == codes.Unknown {
			t.Errorf("a device that is not there: %v", err)
		}
	})
}
