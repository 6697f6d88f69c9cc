package ring

import (
	"bytes"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// reload has the daemon read its configuration again, with extra lines.
func (n *Node) reload(t testing.TB, extra string) (out string, err error) {
	t.Helper()
	n.opts.extra = extra
	n.writeConfig()
	cmd := exec.Command(naruBin, "config", "reload", "--config", n.Config)
	var both bytes.Buffer
	cmd.Stdout, cmd.Stderr = &both, &both
	err = cmd.Run()
	return both.String(), err
}

// TestReload: what is live changes under running pods, by command and by
// signal; what is not is refused by name, with all that came with it.
func TestReload(t *testing.T) {
	n := StartNode(t)
	pod := n.Pod(t, nil)
	dir := t.TempDir()
	if err := os.WriteFile(dir+"/v.json", []byte(`{"cdiVersion":"0.6.0","kind":"v.com/x","devices":[{"name":"d","containerEdits":{"env":["CDI=yes"]}}]}`), 0o644); err != nil {
		t.Fatal(err)
	}
	_, err := n.TryContainer(t, pod, cdi("v.com/x=d"))
	wantError(t, err, codes.FailedPrecondition, "v.com/x=d")

	live := "cdi.spec_dirs = ['" + dir + "']\nimages.pinned = ['*/busybox*']\nnetwork.unprivileged_ports = true\nnetwork.non_masquerade = ['198.51.100.0/24']\nnetwork.mtu = 1400\nhandlers.fast.kind = 'native'\n"
	out, err := n.reload(t, live)
	if err != nil {
		t.Fatal(err, out)
	}
	for _, want := range []string{": reloaded\n", "network.mtu: 0 -> 1400\n", "images.pinned: [] -> [\"*/busybox*\"]\n", "handlers: map[] -> map[fast:{native}]\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in %s", want, out)
		}
	}
	id := n.Run(t, pod, cdi("v.com/x=d"))
	if out := n.Sh(t, id, "echo $CDI; cat /proc/sys/net/ipv4/ip_unprivileged_port_start /sys/class/net/eth0/mtu"); out == "" || strings.Fields(out)[0] != "yes" || strings.Fields(out)[2] == "1400" {
		t.Errorf("in a pod of before: %q", out)
	}
	pod2 := n.Pod(t, nil)
	if out := n.Sh(t, n.Run(t, pod2, nil), "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /sys/class/net/eth0/mtu"); strings.Join(strings.Fields(out), " ") != "0 1400" {
		t.Errorf("in a new pod: %q", out)
	}
	live += "containers.default_env = ['SITE=north', 'PATH=/never']\ncontainers.default_ulimits = ['nofile=100:200']\n" +
		"containers.default_capabilities = ['CAP_CHOWN']\ncontainers.pids_limit = 77\ncontainers.device_ownership_from_security_context = true\n"
	if out, err := n.reload(t, live); err != nil {
		t.Fatal(err, out)
	}
	id = n.Run(t, pod2, func(c *criv1.ContainerConfig) {
		c.Devices = []*criv1.Device{{HostPath: "/dev/full", ContainerPath: "/dev/mine", Permissions: "rw"}}
		c.Linux.SecurityContext.RunAsUser, c.Linux.SecurityContext.RunAsGroup = &criv1.Int64Value{Value: 1234}, &criv1.Int64Value{Value: 5678}
	})
	if out := n.Sh(t, id, "echo $SITE $PATH; stat -c '%u:%g' /dev/mine; ulimit -n; ulimit -Hn; grep CapBnd /proc/self/status"); strings.Join(strings.Fields(out), " ") != "north /bin 1234:5678 100 200 CapBnd: 0000000000000001" {
		t.Errorf("what containers get that is not asked for: %q", out)
	}
	if got := strings.TrimSpace(n.cgroupFile(t, id, "pids/pids.max", "pids.max")); got != "77" {
		t.Errorf("processes allowed: %s", got)
	}
	list, err := n.Images.ListImages(within(t, callTime), &criv1.ListImagesRequest{})
	if err != nil || len(list.GetImages()) == 0 || !list.GetImages()[0].GetPinned() {
		t.Errorf("pinned: %v %v", list, err)
	}

	// All or nothing.
	out, err = n.reload(t, "cdi.spec_dirs = []\nnetwork.host_ports = false\n")
	if err == nil || !strings.Contains(out, "network.host_ports: true -> false") || !strings.Contains(out, "only a restart") {
		t.Errorf("a change that needs a restart: %v %s", err, out)
	}
	if out, err = n.reload(t, "cdi.spec_dirs = []\nlog.colour = 3\n"); err == nil || !strings.Contains(out, "log.colour") {
		t.Errorf("a wrong key: %v %s", err, out)
	}
	if out := n.Sh(t, n.Run(t, pod2, cdi("v.com/x=d")), "echo $CDI"); out != "yes" {
		t.Errorf("after reloads that were refused: %q", out)
	}
	if out, err := n.reload(t, live); err != nil || !strings.Contains(out, "nothing changed") {
		t.Errorf("%v %s", err, out)
	}

	// By signal, many of them while pods come and go; the last one counts.
	for range 50 {
		_ = n.daemon.cmd.Process.Signal(syscall.SIGHUP)
		time.Sleep(time.Millisecond)
	}
	n.opts.extra = ""
	n.writeConfig()
	_ = n.daemon.cmd.Process.Signal(syscall.SIGHUP)
	eventually(t, 10*time.Second, "the reload by signal", func() bool {
		_, err := n.TryContainer(t, pod, cdi("v.com/x=d"))
		return err != nil && strings.Contains(err.Error(), "v.com/x=d")
	})
	if n.daemon.ended() {
		t.Error("the daemon ended")
	}

	// A signal in the middle of a start is no end.
	n.KillDaemon()
	before := len(tail(n.Dir+"/naru.log", 1<<20))
	n.LaunchDaemon()
	eventually(t, 10*time.Second, "a first line of the log", func() bool { return len(tail(n.Dir+"/naru.log", 1<<20)) > before })
	_ = n.daemon.cmd.Process.Signal(syscall.SIGHUP)
	n.WaitReady()
}
