package ring

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/internal/testhost"
)

const containerConfig = "CreateContainer.config"

// box runs a container in a pod of its own.
func (n *Node) box(t testing.TB, mutate func(*criv1.ContainerConfig)) string {
	t.Helper()
	return n.Run(t, n.Pod(t, nil), mutate)
}

// soon polls and tells whether f held; without a field, for a second only.
func (n *Node) soon(f func() bool) bool {
	limit := 10 * time.Second
	if n.dropper.armed.Load() != nil {
		limit = time.Second
	}
	for end := time.Now().Add(testhost.Limit(limit)); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			return false
		}
	}
	return true
}

// commandLine is that of the container's first process.
func (n *Node) commandLine(t testing.TB, id string) string {
	t.Helper()
	return strings.TrimSpace(n.Sh(t, id, `tr '\0' ' ' </proc/1/cmdline`))
}

func containerChecks() []fieldCheck {
	return slices.Concat(containerNameChecks(), containerProcessChecks(), containerStreamChecks(), deviceChecks(), volumeChecks(), imageVolumeChecks(),
		capabilityChecks(), userChecks(), confinementChecks(), containerNamespaceChecks(), limitChecks())
}

func containerNameChecks() []fieldCheck {
	return []fieldCheck{
		{"container's pod", "ListContainers", under("CreateContainer", "pod_sandbox_id"), func(t testing.TB, n *Node) {
			pod := n.Pod(t, nil)
			n.Run(t, pod, nil)
			r, err := n.Runtime.ListContainers(within(t, callTime), &criv1.ListContainersRequest{})
			if err != nil || len(r.Containers) != 1 || r.Containers[0].PodSandboxId != pod {
				t.Errorf("got %v, %v", r, err)
			}
		}},
		{"container metadata", "ContainerStatus", under(containerConfig+".metadata", "name", "attempt"), func(t testing.TB, n *Node) {
			meta := &criv1.ContainerMetadata{Name: "app", Attempt: 4}
			id := n.box(t, func(c *criv1.ContainerConfig) { c.Metadata = meta })
			want(t, "metadata", n.Status(t, id).Metadata, meta)
		}},
		{"container labels", "ContainerStatus", under(containerConfig, "labels", "annotations"), func(t testing.TB, n *Node) {
			labels, notes := map[string]string{"tier": "fields"}, map[string]string{"note": "kept"}
			s := n.Status(t, n.box(t, func(c *criv1.ContainerConfig) { c.Labels, c.Annotations = labels, notes }))
			want(t, "labels", s.Labels, labels)
			want(t, "annotations", s.Annotations, notes)
		}},
		{"image", "a file of the image in the container", under(containerConfig+".image", "image"), func(t testing.TB, n *Node) {
			image := n.Image(t, ImageConfig{}, File("mark", 0o644, "of the image"))
			want(t, "file", n.Sh(t, n.box(t, func(c *criv1.ContainerConfig) { c.Image.Image = image }), "cat /mark"), "of the image")
		}},
		{"what is known of the image", "ContainerStatus", under(containerConfig+".image", "annotations", "user_specified_image"), func(t testing.TB, n *Node) {
			image := &criv1.ImageSpec{Image: Busybox, UserSpecifiedImage: "busybox", Annotations: map[string]string{"a": "b"}}
			want(t, "image", n.Status(t, n.box(t, func(c *criv1.ContainerConfig) { c.Image = image })).Image, image)
		}},
		{"image's runtime handler", "that an unknown one is refused", under(containerConfig+".image", "runtime_handler"), func(t testing.TB, n *Node) {
			_, err := n.TryContainer(t, n.Pod(t, nil), func(c *criv1.ContainerConfig) { c.Image.RuntimeHandler = "no-such-handler" })
			wantError(t, err, codes.InvalidArgument, "no-such-handler")
		}},
	}
}

func containerProcessChecks() []fieldCheck {
	return []fieldCheck{
		{"command line", "/proc/1/cmdline in the container", under(containerConfig, "command", "args"), func(t testing.TB, n *Node) {
			id := n.box(t, func(c *criv1.ContainerConfig) { c.Command, c.Args = []string{"/bin/sleep"}, []string{"4321"} })
			want(t, "command line", n.commandLine(t, id), "/bin/sleep 4321")
		}},
		{"working folder", "`pwd` in the container", under(containerConfig, "working_dir"), func(t testing.TB, n *Node) {
			want(t, "folder", n.Sh(t, n.box(t, func(c *criv1.ContainerConfig) { c.WorkingDir = "/usr" }), "pwd"), "/usr")
		}},
		{"environment", "a variable in the container", under(containerConfig, "envs[].key", "envs[].value"), func(t testing.TB, n *Node) {
			id := n.box(t, func(c *criv1.ContainerConfig) { c.Envs = []*criv1.KeyValue{{Key: "FIELD", Value: []byte("set")}} })
			want(t, "variable", n.Sh(t, id, "echo $FIELD"), "set")
		}},
		{"stop signal", "the signal that ends the container", under(containerConfig, "stop_signal"), func(t testing.TB, n *Node) {
			id := n.box(t, each(shell("trap 'exit 8' TERM; trap 'exit 9' USR1; echo ready; while :; do usleep 10000; done"),
				func(c *criv1.ContainerConfig) { c.StopSignal = criv1.Signal_SIGNAL_SIGUSR1 }))
			n.ready(t, id)
			n.stop(t, id, 10)
			want(t, "exit code", n.Status(t, id).ExitCode, 9)
		}},
	}
}

func containerStreamChecks() []fieldCheck {
	return []fieldCheck{
		{"log", "the file below the pod's log folder", under(containerConfig, "log_path"), func(t testing.TB, n *Node) {
			dir := n.HostDir(t)
			pod := n.Pod(t, func(c *criv1.PodSandboxConfig) { c.LogDirectory = dir })
			n.Run(t, pod, each(shell("echo logged; exec sleep 1000"), func(c *criv1.ContainerConfig) { c.LogPath = "app/0.log" }))
			if !n.soon(func() bool {
				b, _ := os.ReadFile(dir + "/app/0.log")
				return strings.HasSuffix(string(b), " stdout F logged\n")
			}) {
				t.Error("the line is not in the log")
			}
		}},
		{"stdin", "what is sent by Attach", under(containerConfig, "stdin"), func(t testing.TB, n *Node) {
			id := n.box(t, func(c *criv1.ContainerConfig) { c.Stdin, c.Command = true, []string{"/bin/cat"} })
			s := n.attachStream(t, id, streamOptions{stdin: true})
			s.send("sent\n")
			s.out.waitFor(t, "sent\n")
		}},
		{"stdin once", "that stdin ends with the first Attach", under(containerConfig, "stdin_once"), func(t testing.TB, n *Node) {
			id := n.box(t, each(shell("cat; exit 3"), func(c *criv1.ContainerConfig) { c.Stdin, c.StdinOnce = true, true }))
			s := n.attachStream(t, id, streamOptions{stdin: true})
			s.send("sent\n")
			s.out.waitFor(t, "sent\n")
			_ = s.stdin.Close()
			if !n.soon(func() bool { return n.Status(t, id).ExitCode == 3 }) {
				t.Error("the container still reads")
			}
		}},
		{"terminal", "/proc/1/fd/1 in the container", under(containerConfig, "tty"), func(t testing.TB, n *Node) {
			id := n.box(t, func(c *criv1.ContainerConfig) { c.Tty = true })
			if out := n.Sh(t, id, "readlink /proc/1/fd/1"); !strings.HasPrefix(out, "/dev/pts/") && out != "/dev/console" {
				t.Errorf("the container writes to %s", out)
			}
		}},
	}
}

func deviceChecks() []fieldCheck {
	at := containerConfig + ".devices[]"
	give := func(t testing.TB, n *Node, perms string) (id string, host unix.Stat_t) {
		for _, p := range []string{"/dev/fuse", "/dev/loop-control", "/dev/net/tun", "/dev/vsock", "/dev/hpet", "/dev/kmsg"} {
			if f, err := os.Open(p); err == nil {
				_ = f.Close()
				if err := unix.Stat(p, &host); err != nil {
					t.Fatal(err)
				}
				return n.box(t, func(c *criv1.ContainerConfig) {
					c.Devices = []*criv1.Device{{HostPath: p, ContainerPath: "/dev/deep/mine", Permissions: perms}}
				}), host
			}
		}
		t.Fatal("this machine has no device to give to a container")
		return "", host
	}
	return []fieldCheck{
		{"device", "its number in the container", under(at, "container_path", "host_path"), func(t testing.TB, n *Node) {
			id, host := give(t, n, "rwm")
			want(t, "number", n.Sh(t, id, "stat -c %t:%T /dev/deep/mine; : </dev/deep/mine"), fmt.Sprintf("%x:%x", unix.Major(host.Rdev), unix.Minor(host.Rdev)))
		}},
		{"CDI device", "what its specification puts into the container", under(containerConfig+".CDI_devices[]", "name"), func(t testing.TB, n *Node) {
			want(t, "variable", n.Sh(t, n.box(t, cdi("field.example/card=one")), "echo $CARD"), "one")
		}},
		{"permissions of a device", "that it cannot be written", under(at, "permissions"), func(t testing.TB, n *Node) {
			id, host := give(t, n, "r")
			n.fails(t, id, fmt.Sprintf("mknod /tmp/x c %d %d && : </tmp/x", unix.Major(host.Rdev), unix.Minor(host.Rdev)), "not permitted")
		}},
	}
}

// cardSpec makes a folder of CDI specifications with one device in it.
func (n *Node) cardSpec(t testing.TB) string {
	t.Helper()
	dir := n.HostDir(t)
	const spec = `{"cdiVersion":"0.6.0","kind":"field.example/card","devices":[{"name":"one","containerEdits":{"env":["CARD=one"]}}]}`
	if err := os.WriteFile(dir+"/card.json", []byte(spec), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

// hostFolder makes a folder on the host with a file of that owner.
func (n *Node) hostFolder(t testing.TB, owner int) string {
	t.Helper()
	dir := n.HostDir(t)
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("on the host"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(file, owner, owner); err != nil {
		t.Fatal(err)
	}
	return dir
}

func volumeChecks() []fieldCheck {
	at := containerConfig + ".mounts[]"
	with := func(n *Node, t testing.TB, dir string, change func(*criv1.Mount)) string {
		m := Volume(dir, "/vol")
		change(m)
		return n.box(t, mounts(m))
	}
	return []fieldCheck{
		{"volume", "a file of the host in the container", under(at, "container_path", "host_path"), func(t testing.TB, n *Node) {
			want(t, "file", n.Sh(t, n.box(t, mounts(Volume(n.hostFolder(t, 0), "/vol"))), "cat /vol/file"), "on the host")
		}},
		{"read-only volume", "that it cannot be written", under(at, "readonly"), func(t testing.TB, n *Node) {
			n.fails(t, with(n, t, n.hostFolder(t, 0), func(m *criv1.Mount) { m.Readonly = true }), "echo x >/vol/file", "Read-only")
		}},
		{"recursively read-only volume", "that a mount below it cannot be written", under(at, "recursive_read_only"), func(t testing.TB, n *Node) {
			dir := n.hostFolder(t, 0)
			mountTmpfs(t, dir+"/sub")
			n.fails(t, with(n, t, dir, func(m *criv1.Mount) { m.Readonly, m.RecursiveReadOnly = true, true }), "echo x >/vol/sub/file", "Read-only")
		}},
		{"propagation of a volume", "a later mount of the host in the container", under(at, "propagation"), func(t testing.TB, n *Node) {
			dir := n.SharedDir(t)
			t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
			id := with(n, t, dir, func(m *criv1.Mount) { m.Propagation = criv1.MountPropagation_PROPAGATION_HOST_TO_CONTAINER })
			mountTmpfs(t, dir+"/later")
			n.Sh(t, id, "grep ' /vol/later ' /proc/self/mountinfo")
		}},
		{"options of a volume", "that nothing in it can be executed", under(at, "mount_options"), func(t testing.TB, n *Node) {
			id := with(n, t, n.hostFolder(t, 0), func(m *criv1.Mount) { m.MountOptions = []string{"noexec"} })
			n.fails(t, id, "cp /bin/busybox /vol/true && /vol/true", "Permission denied")
		}},
		{"label of a volume", "ContainerStatus (files are not relabelled, see security.md)", under(at, "selinux_relabel"), func(t testing.TB, n *Node) {
			id := with(n, t, n.hostFolder(t, 0), func(m *criv1.Mount) { m.SelinuxRelabel = true })
			want(t, "selinux_relabel", n.Status(t, id).Mounts[0].SelinuxRelabel, true)
		}},
		{
			"mapped owners of a volume", "the owner of a file in the container",
			under(at, "uidMappings[].host_id", "uidMappings[].container_id", "uidMappings[].length", "gidMappings[].host_id", "gidMappings[].container_id", "gidMappings[].length"),
			func(t testing.TB, n *Node) {
				ids := func(to uint32) []*criv1.IDMapping {
					return []*criv1.IDMapping{{Length: 1, HostId: to}, {ContainerId: 10, HostId: to + 1000, Length: 10}}
				}
				id := with(n, t, n.hostFolder(t, 12), func(m *criv1.Mount) { m.UidMappings, m.GidMappings = ids(5000), ids(7000) })
				want(t, "owner", n.Sh(t, id, "stat -c %u:%g /vol/file"), "6002:8002")
			},
		},
	}
}

func imageVolumeChecks() []fieldCheck {
	at := containerConfig + ".mounts[]"
	return []fieldCheck{
		{"image volume", "a file of the image in the container", under(at, "image.image", "image_sub_path"), func(t testing.TB, n *Node) {
			image := n.Image(t, ImageConfig{}, Dir("data"), File("data/mark", 0o644, "of the image"))
			id := n.box(t, mounts(&criv1.Mount{ContainerPath: "/vol", Image: &criv1.ImageSpec{Image: image}, ImageSubPath: "data"}))
			want(t, "file", n.Sh(t, id, "cat /vol/mark"), "of the image")
		}},
		{"image volume's runtime handler", "that an unknown one is refused", under(at+".image", "runtime_handler"), func(t testing.TB, n *Node) {
			_, err := n.TryContainer(t, n.Pod(t, nil), mounts(&criv1.Mount{ContainerPath: "/vol", Image: &criv1.ImageSpec{Image: Busybox, RuntimeHandler: "no-such-handler"}}))
			wantError(t, err, codes.InvalidArgument, "no-such-handler")
		}},
		{"what is known of an image volume", "ContainerStatus", under(at+".image", "annotations", "user_specified_image"), func(t testing.TB, n *Node) {
			image := &criv1.ImageSpec{Image: Busybox, UserSpecifiedImage: "busybox", Annotations: map[string]string{"a": "b"}}
			got := n.Status(t, n.box(t, mounts(&criv1.Mount{ContainerPath: "/vol", Image: image}))).Mounts[0].Image
			want(t, "name", got.GetUserSpecifiedImage(), "busybox")
			want(t, "annotations", got.GetAnnotations(), image.Annotations)
		}},
	}
}
