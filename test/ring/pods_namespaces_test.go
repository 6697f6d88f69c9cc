package ring

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestPodNamespaces(t *testing.T) {
	n := StartNode(t)
	ns := func(t *testing.T, id, kind string) string {
		t.Helper()
		return n.Sh(t, id, "readlink /proc/self/ns/"+kind)
	}
	ps := func(t *testing.T, id string) []string {
		t.Helper()
		return strings.Fields(n.Sh(t, id, "for p in /proc/[0-9]*; do tr '\\0' '_' <$p/cmdline; echo; done"))
	}
	t.Run("alone", func(t *testing.T) {
		pod := n.Pod(t, nil)
		a, b := n.Run(t, pod, nil), n.Run(t, pod, shell("exec sleep 4242"))
		if ns(t, a, "pid") == ns(t, b, "pid") || ns(t, a, "mnt") == ns(t, b, "mnt") {
			t.Error("two containers share a PID or mount namespace")
		}
		for _, kind := range []string{"net", "ipc", "uts"} {
			if ns(t, a, kind) != ns(t, b, kind) || ns(t, a, kind) == nsOf(t, kind) {
				t.Errorf("%s: %s, %s, the host's %s", kind, ns(t, a, kind), ns(t, b, kind), nsOf(t, kind))
			}
		}
		if slices.Contains(ps(t, a), "sleep_4242_") {
			t.Error("a container sees another's processes")
		}
	})
	t.Run("shareProcessNamespace", func(t *testing.T) {
		pod := n.Pod(t, namespaces(func(o *criv1.NamespaceOption) { o.Pid = criv1.NamespaceMode_POD }))
		a, b := n.Run(t, pod, nil), n.Run(t, pod, shell("sleep 4243; exit 3"))
		if ns(t, a, "pid") != ns(t, b, "pid") {
			t.Error("the containers have PID namespaces of their own")
		}
		list := ps(t, a)
		if !slices.Contains(list, "sleep_4243_") || !slices.Contains(list, "/pause_pause_") && !strings.Contains(n.Sh(t, a, "cat /proc/1/cmdline"), "pause") {
			t.Errorf("processes: %q", list)
		}
		n.Sh(t, a, "kill $(pidof -s sleep 4243) 2>/dev/null; for p in /proc/[0-9]*; do grep -q 4243 $p/cmdline && grep -q ^sleep $p/cmdline && kill ${p#/proc/}; done; true")
		if s := n.WaitExit(t, b); s.ExitCode != 3 {
			t.Errorf("exit code %d after its child was killed from the other container, want 3", s.ExitCode)
		}
		n.RestartDaemon()
		c := n.Run(t, pod, nil)
		if ns(t, a, "pid") != ns(t, c, "pid") {
			t.Error("a container made after a restart is not in the pod's PID namespace")
		}
	})
	t.Run("TARGET", func(t *testing.T) {
		pod := n.Pod(t, nil)
		target := n.Run(t, pod, shell("exec sleep 4244"))
		into := func(id string) func(*criv1.ContainerConfig) {
			return security(func(s *criv1.LinuxContainerSecurityContext) {
				s.NamespaceOptions = &criv1.NamespaceOption{Pid: criv1.NamespaceMode_TARGET, TargetId: id}
			})
		}
		debug := n.Run(t, pod, into(target))
		if ns(t, debug, "pid") != ns(t, target, "pid") || n.Sh(t, debug, "tr '\\0' ' ' </proc/1/cmdline") != "sleep 4244 " {
			t.Errorf("processes that the debugger sees: %q", ps(t, debug))
		}
		if n.Sh(t, debug, "ls /proc/1/root/bin/busybox") == "" {
			t.Error("the debugger does not reach the target's files")
		}
		_, err := n.TryContainer(t, pod, into(strings.Repeat("a", 64)))
		wantError(t, err, codes.NotFound)
		elsewhere := n.Run(t, n.Pod(t, nil), nil)
		if _, err := n.TryContainer(t, pod, into(elsewhere)); err == nil {
			t.Error("a container may join the PID namespace of another pod's")
		}
	})
	t.Run("hostPID", func(t *testing.T) {
		pod := n.Pod(t, namespaces(func(o *criv1.NamespaceOption) { o.Pid = criv1.NamespaceMode_NODE }))
		id := n.Run(t, pod, nil)
		if ns(t, id, "pid") != nsOf(t, "pid") || n.Sh(t, id, fmt.Sprintf("cat /proc/%d/comm", n.DaemonPID())) != "naru" {
			t.Error("the container does not see the host's processes")
		}
	})
	t.Run("hostIPC", func(t *testing.T) {
		host, own := n.Pod(t, namespaces(func(o *criv1.NamespaceOption) { o.Ipc = criv1.NamespaceMode_NODE })), n.Pod(t, nil)
		if ns(t, n.Run(t, host, nil), "ipc") != nsOf(t, "ipc") {
			t.Error("the container is not in the host's IPC namespace")
		}
		if ns(t, n.Run(t, own, nil), "ipc") == nsOf(t, "ipc") {
			t.Error("an ordinary container is in the host's IPC namespace")
		}
	})
	t.Run("/dev/shm", func(t *testing.T) {
		pod, other := n.Pod(t, nil), n.Pod(t, nil)
		a, b, c := n.Run(t, pod, nil), n.Run(t, pod, nil), n.Run(t, other, nil)
		n.Sh(t, a, "echo shared >/dev/shm/file")
		if out := n.Sh(t, b, "cat /dev/shm/file; stat -c %a /dev/shm"); out != "shared\n1777" {
			t.Errorf("the pod's other container: %q", out)
		}
		if out := n.Sh(t, c, "ls /dev/shm"); out != "" {
			t.Errorf("another pod sees %q", out)
		}
		if out := n.Sh(t, a, "df -m /dev/shm | awk 'NR==2 {print $2}'"); out != "64" {
			t.Errorf("/dev/shm has %s MiB, want 64", out)
		}
	})
}

func TestPodFiles(t *testing.T) {
	n := StartNode(t)
	pod := n.Pod(t, func(c *criv1.PodSandboxConfig) {
		c.Hostname = "my-host"
		c.DnsConfig = &criv1.DNSConfig{Servers: []string{"192.0.2.53", "2001:db8::53"}, Searches: []string{"a.example", "b.example"}, Options: []string{"ndots:5", "edns0"}}
		c.Linux.Sysctls = map[string]string{
			"net.ipv4.ip_local_port_range": "20000 20999", "kernel.shm_rmid_forced": "1", "net.ipv4.tcp_syncookies": "0", "fs.mqueue.msg_max": "17",
		}
	})
	id := n.Run(t, pod, nil)
	t.Run("host name", func(t *testing.T) {
		if out := n.Sh(t, id, "hostname; cat /etc/hostname; echo $HOSTNAME"); out != "my-host\nmy-host\nmy-host" {
			t.Errorf("got %q", out)
		}
		hosts := n.Sh(t, id, "cat /etc/hosts")
		for _, ip := range n.IPs(t, pod) {
			if !strings.Contains(hosts, ip+"\tmy-host") && !strings.Contains(hosts, ip+" my-host") {
				t.Errorf("/etc/hosts does not have %s:\n%s", ip, hosts)
			}
		}
		if !strings.Contains(hosts, "localhost") {
			t.Errorf("/etc/hosts has no localhost:\n%s", hosts)
		}
	})
	t.Run("resolv.conf", func(t *testing.T) {
		want := []string{"nameserver 192.0.2.53", "nameserver 2001:db8::53", "options ndots:5 edns0", "search a.example b.example"}
		got := strings.Split(n.Sh(t, id, "sort /etc/resolv.conf"), "\n")
		if !slices.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
		host, err := os.ReadFile("/etc/resolv.conf")
		if err != nil {
			t.Skip("this machine has no /etc/resolv.conf")
		}
		plain := n.Run(t, n.Pod(t, nil), nil)
		if out := n.Sh(t, plain, "cat /etc/resolv.conf"); out != strings.TrimRight(string(host), "\n") {
			t.Errorf("without a dns_config: %q, the host has %q", out, host)
		}
	})
	t.Run("sysctls", func(t *testing.T) {
		out := n.Sh(t, id, "cat /proc/sys/net/ipv4/ip_local_port_range /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/tcp_syncookies /proc/sys/fs/mqueue/msg_max")
		if got := strings.Fields(out); !slices.Equal(got, []string{"20000", "20999", "1", "0", "17"}) {
			t.Errorf("got %q", got)
		}
		for name, want := range map[string]codes.Code{"kernel.modprobe": codes.InvalidArgument, "vm.swappiness": codes.InvalidArgument, "net/../kernel/modprobe": codes.InvalidArgument} {
			_, err := n.TryPod(t, func(c *criv1.PodSandboxConfig) { c.Linux.Sysctls = map[string]string{name: "1"} })
			wantError(t, err, want, "sysctl")
		}
		_, err := n.TryPod(t, func(c *criv1.PodSandboxConfig) {
			c.Linux.Sysctls = map[string]string{"net.ipv4.ip_forward": "1"}
			c.Linux.SecurityContext.NamespaceOptions.Network = criv1.NamespaceMode_NODE
		})
		wantError(t, err, codes.InvalidArgument, "net.ipv4.ip_forward")
	})
	t.Run("a host name that is too long", func(t *testing.T) {
		_, err := n.TryPod(t, func(c *criv1.PodSandboxConfig) { c.Hostname = strings.Repeat("x", 65) })
		wantError(t, err, codes.InvalidArgument, "hostname")
	})
}

// userns makes a pod with a user namespace of 65536 ids from base.
func userns(base uint32) func(*criv1.PodSandboxConfig) {
	return namespaces(func(o *criv1.NamespaceOption) {
		ids := []*criv1.IDMapping{{HostId: base, ContainerId: 0, Length: 65536}}
		o.UsernsOptions = &criv1.UserNamespace{Mode: criv1.NamespaceMode_POD, Uids: ids, Gids: ids}
	})
}

func ownerOf(t testing.TB, path string) [2]uint32 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatal(err)
	}
	return [2]uint32{st.Uid, st.Gid}
}

func TestPodUserNamespace(t *testing.T) {
	n := StartNode(t)
	const base = 1 << 20
	pod := n.Pod(t, userns(base))
	mapped := []*criv1.IDMapping{{HostId: base, Length: 65536}}
	idmapped := func(host, container string) *criv1.Mount {
		return &criv1.Mount{HostPath: host, ContainerPath: container, UidMappings: mapped, GidMappings: mapped}
	}
	vol, plain := n.HostDir(t), n.HostDir(t)
	if err := os.WriteFile(vol+"/of-app", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(vol+"/of-app", 1000, 1000); err != nil {
		t.Fatal(err)
	}
	image := n.Image(t, ImageConfig{}, Entry{Name: "app-file", Mode: 0o600, UID: 1000, GID: 2000, Data: []byte("x")})
	id := n.Run(t, pod, each(mounts(idmapped(vol, "/vol"), Volume(plain, "/plain")), func(c *criv1.ContainerConfig) { c.Image.Image = image }))
	t.Run("mappings", func(t *testing.T) {
		for _, f := range []string{"uid_map", "gid_map"} {
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", n.PID(t, id), f))
			if err != nil || fmt.Sprint(strings.Fields(string(b))) != fmt.Sprintf("[0 %d 65536]", base) {
				t.Errorf("%s: %q, %v", f, b, err)
			}
		}
		if out := strings.Fields(n.Sh(t, id, "cat /proc/self/uid_map; id -u")); !slices.Equal(out, []string{"0", fmt.Sprint(base), "65536", "0"}) {
			t.Errorf("inside: %q", out)
		}
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", n.PID(t, id)))
		if want := fmt.Sprintf("Uid:\t%d\t%d\t%d\t%d", base, base, base, base); !strings.Contains(string(b), want) {
			t.Errorf("seen from the host:\n%s", b)
		}
		o := n.PodStatus(t, pod).Linux.Namespaces.Options.UsernsOptions
		if o.Mode != criv1.NamespaceMode_POD || len(o.Uids) != 1 || o.Uids[0].HostId != base {
			t.Errorf("status says %v", o)
		}
	})
	t.Run("files of the image", func(t *testing.T) {
		if out := n.Sh(t, id, "stat -c '%u:%g' /bin/busybox /app-file /etc/resolv.conf /etc/hosts /dev/shm /dev/null /proc/self/status /tmp"); out != "0:0\n1000:2000\n0:0\n0:0\n0:0\n0:0\n0:0\n0:0" {
			t.Errorf("owners: %q", out)
		}
		n.Sh(t, id, "echo changed >>/etc/passwd && touch /root/new && chown 33:44 /root/new")
		var info struct {
			Rootfs struct{ Upper string }
		}
		n.containerInfo(t, id, &info)
		if got := ownerOf(t, filepath.Join(info.Rootfs.Upper, "root/new")); got != [2]uint32{33, 44} {
			t.Errorf("on the disk a new file belongs to %v, want 33:44, as seen in the container", got)
		}
		if got := ownerOf(t, filepath.Join(info.Rootfs.Upper, "etc/passwd")); got != [2]uint32{0, 0} {
			t.Errorf("on the disk a changed file belongs to %v, want 0:0", got)
		}
	})
	t.Run("idmapped volume", func(t *testing.T) {
		n.Sh(t, id, "touch /vol/mine && chown 5:6 /vol/mine")
		if got := ownerOf(t, vol+"/mine"); got != [2]uint32{5, 6} {
			t.Errorf("on the host the file belongs to %v, want 5:6", got)
		}
		if out := n.Sh(t, id, "stat -c %u:%g /vol/of-app"); out != "1000:1000" {
			t.Errorf("in the container a file of 1000:1000 belongs to %s", out)
		}
	})
	t.Run("volume without a mapping", func(t *testing.T) {
		if out := n.Sh(t, id, "stat -c %u:%g /plain"); out != "65534:65534" {
			t.Errorf("a folder of the host's root belongs to %s in the container", out)
		}
		if _, _, code := n.Exec(t, id, "/bin/touch", "/plain/file"); code == 0 {
			t.Error("root of the container writes into a folder of the host's root")
		}
	})
	t.Run("a file system that cannot", func(t *testing.T) {
		_, err := n.TryContainer(t, pod, mounts(idmapped("/proc/self/fd", "/vol")))
		if err == nil {
			t.Fatal("procfs was idmapped")
		}
		wantError(t, err, codes.FailedPrecondition, "/vol")
	})
	t.Run("users", func(t *testing.T) {
		user := n.Run(t, pod, security(func(s *criv1.LinuxContainerSecurityContext) {
			s.RunAsUser, s.RunAsGroup = &criv1.Int64Value{Value: 1000}, &criv1.Int64Value{Value: 1000}
			s.SupplementalGroups = []int64{2000}
		}))
		if out := n.Sh(t, user, "id -u; id -g; id -G"); out != "1000\n1000\n1000 2000" {
			t.Errorf("got %q", out)
		}
		_, err := n.TryRun(t, pod, security(func(s *criv1.LinuxContainerSecurityContext) { s.RunAsUser = &criv1.Int64Value{Value: 70000} }))
		wantError(t, err, codes.InvalidArgument, "70000")
	})
	t.Run("with a shared PID namespace and the host's network", func(t *testing.T) {
		for name, f := range map[string]func(*criv1.NamespaceOption){
			"pid": func(o *criv1.NamespaceOption) { o.Pid = criv1.NamespaceMode_POD },
			"net": func(o *criv1.NamespaceOption) { o.Network = criv1.NamespaceMode_NODE },
		} {
			p := n.Pod(t, each(userns(2<<20), namespaces(f)))
			if out := n.Sh(t, n.Run(t, p, nil), "id -u; cut -c1-30 /proc/self/uid_map | awk '{print $2}'"); out != fmt.Sprintf("0\n%d", 2<<20) {
				t.Errorf("%s: %q", name, out)
			}
		}
	})
	t.Run("after a restart", func(t *testing.T) {
		n.RestartDaemon()
		again := n.Run(t, pod, nil)
		if out := n.Sh(t, again, "readlink /proc/self/ns/user"); out != n.Sh(t, id, "readlink /proc/self/ns/user") {
			t.Error("a new container is not in the pod's user namespace")
		}
	})
}
