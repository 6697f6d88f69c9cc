package ring

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/internal/testhost"
)

const debianPlugins = "/usr/lib/cni"

// writeCNI puts a configuration into the node's folder.
func (n *Node) writeCNI(t testing.TB, text string) string {
	t.Helper()
	file := filepath.Join(n.Dir, "net.d", "10-ring.conflist")
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}

// bridgeCNI is a configuration of Debian's plugins. It has no CHECK: that of
// Debian's bandwidth panics for a pod without a limit.
func (n *Node) bridgeCNI(t testing.TB) string {
	t.Helper()
	if _, err := os.Stat(filepath.Join(debianPlugins, "bridge")); err != nil {
		t.Skip("needs Debian's package containernetworking-plugins: ", err)
	}
	t.Cleanup(func() { // of the tests' own network namespace
		for _, c := range []string{"ip link del cniring0", "nft delete table ip nat", "nft delete table ip6 nat"} {
			_ = exec.Command("/bin/sh", "-c", c+" 2>/dev/null").Run()
		}
	})
	return fmt.Sprintf(`{"cniVersion":"1.0.0","name":"ring","disableCheck":true,"plugins":[
		{"type":"bridge","bridge":"cniring0","isGateway":true,"ipMasq":true,"hairpinMode":true,"capabilities":{"ipRanges":true},
		 "ipam":{"type":"host-local","dataDir":%q,"routes":[{"dst":"0.0.0.0/0"},{"dst":"::/0"}]}},
		{"type":"portmap","capabilities":{"portMappings":true},"snat":true},
		{"type":"bandwidth","capabilities":{"bandwidth":true}}]}`, n.Dir+"/leases")
}

// cniLeases are the addresses that host-local has given.
func (n *Node) cniLeases() []string {
	all, _ := filepath.Glob(n.Dir + "/leases/ring/*")
	return slices.DeleteFunc(all, func(f string) bool {
		b := filepath.Base(f)
		return b == "lock" || strings.HasPrefix(b, "last_reserved_ip")
	})
}

func (n *Node) networkReady(t testing.TB) *criv1.RuntimeCondition {
	t.Helper()
	r, err := n.Runtime.Status(within(t, callTime), &criv1.StatusRequest{Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(r.Status.Conditions, func(c *criv1.RuntimeCondition) bool { return c.Type == "NetworkReady" })
	return r.Status.Conditions[i]
}

// Row B17, B22, B23, B24: a pod by Debian's plugins, through the daemon and its
// monitor: with addresses, a host port, statistics, over a restart of the
// daemon, and with nothing left.
func TestCNIPod(t *testing.T) {
	n := StartNode(t)
	old := n.Pod(t, nil) // of the built-in network
	oldIPs := n.IPs(t, old)
	n.writeCNI(t, n.bridgeCNI(t))
	pod := n.Pod(t, func(c *criv1.PodSandboxConfig) {
		c.PortMappings = []*criv1.PortMapping{{ContainerPort: 80, HostPort: 31090}}
		c.Annotations = map[string]string{"kubernetes.io/ingress-bandwidth": "100M"}
	})
	eventually(t, 10*time.Second, "NetworkReady names the configuration", func() bool {
		c := n.networkReady(t)
		return c.Status && strings.Contains(c.Message, "10-ring.conflist")
	})
	ips := n.IPs(t, pod)
	if len(ips) != 2 || slices.Contains(ips, oldIPs[0]) {
		t.Fatalf("addresses %v beside %v", ips, oldIPs)
	}
	var info struct {
		Handle struct {
			CNI struct {
				Network    string   `json:"network"`
				Interfaces []string `json:"interfaces"`
			} `json:"cni"`
		} `json:"handle"`
	}
	n.podInfo(t, pod, &info)
	if info.Handle.CNI.Network != "ring" || !slices.Contains(info.Handle.CNI.Interfaces, "eth0") {
		t.Errorf("info %+v", info)
	}
	n.speaking(t, pod, 80, "by-cni")
	out, err := fetch("127.0.0.1:31090")
	if strings.TrimSpace(out) != "by-cni" {
		t.Errorf("host port: %q, %v", out, err)
	}
	_, err = n.TryPod(t, func(c *criv1.PodSandboxConfig) {
		c.PortMappings = []*criv1.PortMapping{{ContainerPort: 80, HostPort: 31090}}
	})
	if err == nil || !strings.Contains(err.Error(), "31090") {
		t.Errorf("a second pod with the port: %v", err)
	}
	status, err := n.Runtime.Status(within(t, callTime), &criv1.StatusRequest{Verbose: true})
	if err != nil || status.Info["lastCNILoadStatus"] != "OK" || !strings.Contains(status.Info["cniconfig"], `"PluginConfDir"`) {
		t.Errorf("%v, %v", status.GetInfo(), err)
	}
	stats, err := n.Runtime.PodSandboxStats(within(t, callTime), &criv1.PodSandboxStatsRequest{PodSandboxId: pod})
	if d := stats.GetStats().GetLinux().GetNetwork().GetDefaultInterface(); err != nil || d.GetName() != "eth0" || d.GetRxBytes().GetValue() == 0 {
		t.Errorf("statistics %v, %v", d, err)
	}
	host := n.Pod(t, namespaces(func(o *criv1.NamespaceOption) { o.Network = criv1.NamespaceMode_NODE }))
	if got := n.IPs(t, host); len(got) > 0 {
		t.Errorf("a pod of the host's network has %v", got)
	}
	user := n.Pod(t, userns(1<<20))
	n.speaking(t, user, 80, "userns")

	n.RestartDaemon()
	n.WaitReady()
	if got := n.IPs(t, pod); !slices.Equal(got, ips) || n.PodStatus(t, pod).State != criv1.PodSandboxState_SANDBOX_READY {
		t.Errorf("after a restart: %v, %v", got, n.PodStatus(t, pod).State)
	}
	wantFetch(t, net.JoinHostPort(ips[0], "80"), "by-cni")
	for _, p := range []string{pod, old, host, user} {
		n.RemovePod(t, p)
	}
	if l := n.cniLeases(); len(l) > 0 {
		t.Errorf("leases left: %v", l)
	}
	if out, err := fetch("127.0.0.1:31090"); err == nil {
		t.Errorf("the host port still answers %q", out)
	}
}

// fakeCNI is a plugin that writes down what it is and does what the file named
// by its command says.
func (n *Node) fakeCNI(t testing.TB) (do func(command, script string), log func() string) {
	t.Helper()
	dir := n.Dir + "/bin"
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	do = func(command, script string) {
		t.Helper()
		if err := os.WriteFile(dir+"/do."+command, []byte(script), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	script := `#!/bin/sh
{ echo "== $CNI_COMMAND $CNI_ARGS"; grep -E '^(CapEff|Seccomp|NoNewPrivs):' /proc/self/status; ls -l /proc/self/fd; env; } >>` + dir + `/log
cat >/dev/null
[ ! -e ` + dir + `/do.$CNI_COMMAND ] || . ` + dir + `/do.$CNI_COMMAND
`
	if err := os.WriteFile(dir+"/fake", []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	do("ADD", fakeResult)
	return do, func() string {
		b, _ := os.ReadFile(dir + "/log")
		return string(b)
	}
}

const (
	fakeResult = `echo '{"cniVersion":"1.1.0","ips":[{"address":"10.250.0.9/24"}]}'`
	fakeList   = `{"cniVersion":"1.1.0","name":"ring","plugins":[{"type":"fake"}]}`
)

// Rows W-07 and N-05: what plugins get of the daemon, and that those that hang
// or print without end hurt the pod that they are for and nobody else; over a
// crash of the daemon, too.
func TestW07_PluginsHang(t *testing.T) {
	n := StartNode(t, WithConfig("network.cni.timeout = \"5s\""), WithEnv("SECRET_TOKEN=s3cret"))
	do, log := n.fakeCNI(t)
	n.writeCNI(t, fakeList)
	eventually(t, 10*time.Second, "ready", func() bool {
		c := n.networkReady(t)
		return c.Status && strings.Contains(c.Message, `"ring"`)
	})
	pod := n.Pod(t, nil)
	if ips := n.IPs(t, pod); !slices.Equal(ips, []string{"10.250.0.9"}) {
		t.Errorf("addresses %v", ips)
	}
	told := log()
	caps, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", n.KeeperPID()))
	_, eff, _ := strings.Cut(string(caps), "CapEff:")
	for _, want := range []string{"CapEff:" + strings.SplitN(eff, "\n", 2)[0], "Seccomp:\t0", "NoNewPrivs:\t0", "K8S_POD_NAME="} {
		if !strings.Contains(told, want) {
			t.Errorf("no %q in\n%s", want, told)
		}
	}
	if strings.Contains(told, "s3cret") {
		t.Error("the daemon's environment reaches plugins")
	}
	for line := range strings.Lines(told) { // 0 to 2, and the descriptor of the listing itself
		f := strings.Fields(line)
		if i := slices.Index(f, "->"); i > 0 {
			if fd, _ := strconv.Atoi(f[i-1]); fd > 2 && !strings.HasPrefix(f[i+1], "/proc/") {
				t.Errorf("a plugin inherits %s", line)
			}
		}
	}

	do("STATUS", "sleep 3600")
	do("ADD", "case $CNI_ARGS in *K8S_POD_NAME=hangs*) sleep 3600;; *K8S_POD_NAME=floods*) cat /dev/zero;; esac\n"+fakeResult)
	named := func(name string) func(*criv1.PodSandboxConfig) {
		return func(c *criv1.PodSandboxConfig) { c.Metadata.Name = name }
	}
	hung := make(chan error, 1)
	go func() { _, err := n.TryPod(t, named("hangs")); hung <- err }()
	eventually(t, 10*time.Second, "ADD hangs", func() bool { return strings.Contains(log(), "K8S_POD_NAME=hangs") })
	began := time.Now()
	for range 50 {
		_ = n.networkReady(t)
		if _, err := n.Runtime.ListPodSandbox(within(t, callTime), &criv1.ListPodSandboxRequest{}); err != nil {
			t.Error(err)
		}
	}
	if d := time.Since(began); d > testhost.Limit(3*time.Second) {
		t.Errorf("50 Status and List calls took %v", d)
	}
	other := n.Pod(t, nil)
	n.RemovePod(t, other)
	_, err := n.TryPod(t, named("floods"))
	wantError(t, err, codes.ResourceExhausted, `"ring"`, `"fake"`, "floods", "printed more than")
	wantError(t, <-hung, codes.DeadlineExceeded, `"ring"`, `"fake"`, "hangs", "did not end within 5s")
	eventually(t, 15*time.Second, "NetworkReady says that STATUS hangs", func() bool {
		c := n.networkReady(t)
		return !c.Status && c.Reason == "CNIPluginNotReady" && strings.Contains(c.Message, "did not end")
	})

	// The daemon dies while a plugin runs.
	do("STATUS", "exit 0")
	do("ADD", "echo $$ >"+n.Dir+"/bin/pid; case $CNI_ARGS in *K8S_POD_NAME=crash*) sleep 3600;; esac\n"+fakeResult)
	go func() { _, err := n.TryPod(t, named("crash")); hung <- err }()
	plugin := 0
	eventually(t, 10*time.Second, "ADD hangs again", func() bool {
		b, _ := os.ReadFile(n.Dir + "/bin/pid")
		plugin, _ = strconv.Atoi(strings.TrimSpace(string(b)))
		return plugin > 0
	})
	n.KillDaemon()
	<-hung
	n.StartDaemon()
	n.WaitReady()
	if running(plugin) {
		t.Errorf("the plugin %d outlives the daemon", plugin)
	}
	eventually(t, 10*time.Second, "DEL of the pod whose ADD was cut short", func() bool {
		_, after, _ := strings.Cut(log(), "K8S_POD_NAME=crash")
		return strings.Contains(after, "== DEL") && strings.Contains(after, "K8S_POD_NAME=crash")
	})
	eventually(t, 10*time.Second, "no attachment but the first pod's", func() bool {
		l, _ := os.ReadDir(filepath.Join(n.Root, "cni", "attachments"))
		return len(l) == 1
	})

	// DEL fails some times: the pod stays until it works.
	do("DEL", "exit 1")
	_, err = n.Runtime.StopPodSandbox(within(t, callTime), &criv1.StopPodSandboxRequest{PodSandboxId: pod})
	wantError(t, err, codes.Unavailable, "status 1", "attachments")
	do("DEL", "exit 0")
	n.RemovePod(t, pod)
	if l, _ := os.ReadDir(filepath.Join(n.Root, "cni", "attachments")); len(l) > 0 {
		t.Errorf("attachments left: %v", l)
	}
}
