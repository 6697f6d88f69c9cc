package ring

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/internal/testhost"
	"github.com/naru-project/naru/runtime/monitor"
)

// callTime bounds a single call of a test.
const callTime = 60 * time.Second

// Node is one keeper and one daemon on roots of their own.
type Node struct {
	t testing.TB

	Runtime criv1.RuntimeServiceClient
	Images  criv1.ImageServiceClient
	// Conn is what both use.
	Conn *grpc.ClientConn

	Dir      string // everything of the node
	RunDir   string
	Root     string
	LogDir   string // pods' log folders
	Socket   string
	Config   string // path of the configuration file
	Parent   string // cgroup of pods that name none
	NftTable string
	Links    string // prefix of host interfaces

	handler string // of pods that the node's methods run

	opts    options
	keeper  *process
	daemon  *process
	conn    *monitor.Client
	pods    map[string]*criv1.PodSandboxConfig
	names   atomic.Int64
	started time.Time
	dropper dropper // takes fields out of requests
}

type options struct {
	extra   string
	files   []*os.File
	env     []string
	binary  string
	monitor string
	podCIDR string
	handler string
	umask0  bool
	small   string
}

// Option changes how a node is started.
type Option func(*options)

// WithConfig appends lines to the configuration file.
func WithConfig(toml string) Option { return func(o *options) { o.extra += toml + "\n" } }

// WithInherited gives files to keeper and daemon, as descriptors 3 and up, not
// close-on-exec.
func WithInherited(f ...*os.File) Option { return func(o *options) { o.files = append(o.files, f...) } }

// WithEnv adds to the environment of keeper and daemon.
func WithEnv(env ...string) Option { return func(o *options) { o.env = append(o.env, env...) } }

// WithPrograms replaces the two programs.
func WithPrograms(naru, monitor string) Option {
	return func(o *options) { o.binary, o.monitor = naru, monitor }
}

// WithSmallRoot puts images, records and logs on a file system of that size.
func WithSmallRoot(size string) Option { return func(o *options) { o.small = size } }

// WithUmaskZero starts keeper and daemon with umask 0.
func WithUmaskZero() Option { return func(o *options) { o.umask0 = true } }

// WithPodCIDR replaces the ranges of pod addresses (TOML list).
func WithPodCIDR(list string) Option { return func(o *options) { o.podCIDR = list } }

// WithRuntime runs all pods by an OCI runtime, as handler "oci".
func WithRuntime(program string) Option {
	return func(o *options) {
		o.handler = "oci"
		o.extra += fmt.Sprintf("[handlers.oci]\nkind = \"oci\"\npath = %q\n", program)
	}
}

var nodes atomic.Int64

// StartNode starts a keeper and a daemon and loads the default image. At the
// end of the test everything is removed, and what is left is an error.
func StartNode(t testing.TB, opts ...Option) *Node {
	t.Helper()
	i := nodes.Add(1)
	n := &Node{
		t: t, Dir: filepath.Join(workDir, fmt.Sprintf("n%d", i)), Parent: fmt.Sprintf("/%s-%d", runName, i),
		NftTable: fmt.Sprintf("ring%d", i), Links: fmt.Sprintf("r%dx", i), pods: map[string]*criv1.PodSandboxConfig{}, started: time.Now(),
	}
	if systemdCgroups { // where a dash is another level
		n.Parent = fmt.Sprintf("/%s_%d.slice", runName, i)
	}
	n.RunDir, n.Root, n.LogDir = n.Dir+"/run", n.Dir+"/root", n.Dir+"/logs"
	n.Socket, n.Config = n.RunDir+"/naru.sock", n.Dir+"/config.toml"
	n.opts.monitor = monitorBin
	n.opts.podCIDR = fmt.Sprintf(`["10.%d.%d.0/24", "fd85:%x::/64"]`, 100+i/200, i%200, i)
	for _, o := range opts {
		o(&n.opts)
	}
	if p := os.Getenv("NARU_OCI"); p != "" && n.opts.handler == "" { // the whole ring by an OCI runtime
		WithRuntime(p)(&n.opts)
	}
	n.handler = n.opts.handler
	guard(t)
	if n.opts.small != "" {
		small := n.Dir + "/small"
		if err := os.MkdirAll(small, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount("small", small, "tmpfs", 0, "mode=0755,size="+n.opts.small); err != nil {
			t.Fatal(err)
		}
		n.Root, n.LogDir = small+"/root", small+"/logs"
	}
	for _, d := range []string{n.Dir, n.LogDir} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	n.writeConfig()
	t.Cleanup(n.finish)
	n.StartKeeper()
	n.StartDaemon()
	n.dial()
	if err := n.LoadArchive(t, busyboxArchive()); err != nil {
		t.Fatalf("load the default image: %v", err)
	}
	return n
}

func (n *Node) writeConfig() {
	n.t.Helper()
	text := fmt.Sprintf(`version = 1
root = %q
run = %q
socket = %q
log.verbosity = 4
network.pod_cidr = %s
network.nft_table = %q
network.link_prefix = %q
network.cni.conf_dir = %q
network.cni.bin_dirs = [%q, "/usr/lib/cni"]
network.cni.status_timeout = "2s"
network.cni.status_interval = "1s"
images.registry_dirs = []
cgroup.driver = %q
cgroup.default_parent = %q
runtime.monitor = %q
%s`, n.Root, n.RunDir, n.Socket, n.opts.podCIDR, n.NftTable, n.Links, n.Dir+"/net.d", n.Dir+"/bin", cgroupDriver(), n.Parent, n.opts.monitor, n.opts.extra)
	if err := os.WriteFile(n.Config, []byte(text), 0o600); err != nil {
		n.t.Fatal(err)
	}
}

func cgroupDriver() string {
	if systemdCgroups {
		return "systemd"
	}
	return "cgroupfs"
}

// Below is a cgroup below the node's own: of pods, or of pods' classes.
func (n *Node) Below(parts ...string) string {
	if !systemdCgroups {
		return n.Parent + "/" + strings.Join(parts, "/")
	}
	dir, slice := n.Parent, strings.TrimSuffix(path.Base(n.Parent), ".slice")
	for _, p := range parts {
		slice += "-" + strings.ReplaceAll(p, "-", "_")
		dir += "/" + slice + ".slice"
	}
	return dir
}

// cgroupName is what the cgroup of a container is called.
func cgroupName(id string) string {
	if systemdCgroups {
		return "naru-" + id + ".scope"
	}
	return id
}

func (n *Node) command(log string, args ...string) *exec.Cmd {
	n.t.Helper()
	f, err := os.OpenFile(filepath.Join(n.Dir, log), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { _ = f.Close() })
	if n.opts.umask0 {
		args = append([]string{"/bin/sh", "-c", `umask 0; exec "$@"`, "sh"}, args...)
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = f, f
	cmd.ExtraFiles = n.opts.files
	cmd.Env = append([]string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}, n.opts.env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Dir = "/"
	return cmd
}

// StartKeeper starts the keeper in place of one that ended.
func (n *Node) StartKeeper() {
	n.t.Helper()
	var err error
	if n.keeper, err = spawn(n.command("keeper.log", n.opts.monitor, "keeper", "--dir", n.RunDir+"/monitor")); err != nil {
		n.t.Fatal(err)
	}
	eventually(n.t, 20*time.Second, "the keeper", func() bool {
		if n.keeper.ended() {
			n.t.Fatalf("the keeper ended: %v\n%s", n.keeper.err, tail(n.Dir+"/keeper.log", 4000))
		}
		i, err := n.info() // an orphaned worker answers too
		return err == nil && i.KeeperPID == n.keeper.pid()
	})
}

// StartDaemon starts the daemon and waits until it answers.
func (n *Node) StartDaemon() {
	n.t.Helper()
	n.LaunchDaemon()
	n.WaitReady()
}

// LaunchDaemon starts the daemon and does not wait.
func (n *Node) LaunchDaemon() {
	n.t.Helper()
	bin := naruBin
	if n.opts.binary != "" {
		bin = n.opts.binary
	}
	var err error
	if n.daemon, err = spawn(n.command("naru.log", bin, "serve", "--config", n.Config)); err != nil {
		n.t.Fatal(err)
	}
}

// WaitReady waits until the daemon's Status says ready.
func (n *Node) WaitReady() {
	n.t.Helper()
	if n.Conn == nil {
		n.dial()
	}
	eventually(n.t, 60*time.Second, "the daemon", func() bool {
		if n.daemon.ended() {
			n.t.Fatalf("the daemon ended: %v\n%s", n.daemon.err, tail(n.Dir+"/naru.log", 4000))
		}
		ctx, cancel := context.WithTimeout(context.Background(), testhost.Limit(2*time.Second))
		defer cancel()
		s, err := n.Runtime.Status(ctx, &criv1.StatusRequest{})
		return err == nil && !slices.ContainsFunc(s.Status.Conditions, func(c *criv1.RuntimeCondition) bool { return !c.Status })
	})
}

func (n *Node) dial() {
	n.t.Helper()
	if n.Conn != nil {
		return
	}
	var err error
	n.Conn, err = grpc.NewClient("unix://"+n.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 10 * time.Millisecond, Multiplier: 1.5, MaxDelay: 200 * time.Millisecond}}),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true), grpc.MaxCallRecvMsgSize(64<<20)),
		grpc.WithUnaryInterceptor(n.dropper.unary), grpc.WithStreamInterceptor(n.dropper.stream))
	if err != nil {
		n.t.Fatal(err)
	}
	n.Runtime, n.Images = criv1.NewRuntimeServiceClient(n.Conn), criv1.NewImageServiceClient(n.Conn)
}

// KillDaemon ends the daemon with SIGKILL.
func (n *Node) KillDaemon() {
	n.t.Helper()
	if n.daemon != nil {
		n.daemon.end(syscall.SIGKILL, 10*time.Second)
	}
}

// StopDaemon ends the daemon with SIGTERM; it must end well.
func (n *Node) StopDaemon() {
	n.t.Helper()
	if n.daemon == nil || n.daemon.ended() {
		return
	}
	if !n.daemon.end(syscall.SIGTERM, 30*time.Second) {
		n.t.Error("the daemon did not end on SIGTERM")
	} else if n.daemon.err != nil {
		n.t.Errorf("the daemon ended on SIGTERM with %v", n.daemon.err)
	}
}

// RestartDaemon kills the daemon and starts another.
func (n *Node) RestartDaemon() {
	n.t.Helper()
	n.KillDaemon()
	n.StartDaemon()
}

// KillKeeper ends the keeper with SIGKILL; its worker stays until the next.
func (n *Node) KillKeeper() {
	n.t.Helper()
	n.keeper.end(syscall.SIGKILL, 10*time.Second)
}

// KillWorker ends the worker with SIGKILL and waits for the next one.
func (n *Node) KillWorker() {
	n.t.Helper()
	old := n.WorkerPID()
	if err := unix.Kill(old, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		n.t.Fatal(err)
	}
	eventually(n.t, 20*time.Second, "another worker", func() bool {
		i, err := n.info()
		return err == nil && i.WorkerPID != old && i.WorkerPID != 0
	})
}

// UpgradeKeeper has the keeper replace its program by what its path holds, and
// waits until that has happened.
func (n *Node) UpgradeKeeper() {
	n.t.Helper()
	if err := n.monitor().Upgrade(within(n.t, callTime), nil); err != nil {
		n.t.Fatalf("upgrade: %v", err)
	}
}

// monitor is the node's own connection with the monitor.
func (n *Node) monitor() *monitor.Client {
	n.t.Helper()
	if n.conn != nil {
		return n.conn
	}
	c, err := monitor.Connect(within(n.t, callTime), monitor.Socket(n.RunDir+"/monitor"))
	if err != nil {
		n.t.Fatalf("connect with the monitor: %v", err)
	}
	n.conn = c
	return c
}

func (n *Node) info() (monitor.Info, error) {
	ctx, cancel := context.WithTimeout(context.Background(), testhost.Limit(2*time.Second))
	defer cancel()
	if n.conn == nil {
		c, err := monitor.Connect(ctx, monitor.Socket(n.RunDir+"/monitor"))
		if err != nil {
			return monitor.Info{}, err
		}
		n.conn = c
	}
	return n.conn.Info(ctx)
}

// Info asks the monitor who it is.
func (n *Node) Info() monitor.Info {
	n.t.Helper()
	var i monitor.Info
	eventually(n.t, 20*time.Second, "the monitor's answer", func() (ok bool) {
		var err error
		i, err = n.info()
		return err == nil
	})
	return i
}

// DaemonPID, KeeperPID and WorkerPID are the node's processes.
func (n *Node) DaemonPID() int { return n.daemon.pid() }

// KeeperPID is the keeper's.
func (n *Node) KeeperPID() int { n.t.Helper(); return n.Info().KeeperPID }

// WorkerPID is the worker's.
func (n *Node) WorkerPID() int { n.t.Helper(); return n.Info().WorkerPID }

// guard checks at the end of the test that the machine is as it was.
func guard(t testing.TB) {
	t.Helper()
	files := []string{"/proc/sys/kernel/core_pattern", "/proc/sys/kernel/hostname", "/proc/sys/kernel/modprobe", "/proc/sys/kernel/domainname",
		"/proc/sys/net/ipv4/ip_unprivileged_port_start", "/proc/self/oom_score_adj", "/proc/self/uid_map"}
	read := func() (all []string) {
		for _, f := range files {
			b, err := os.ReadFile(f)
			all = append(all, fmt.Sprintf("%s: %q %v", f, b, err))
		}
		return all
	}
	mounts := mountsBelow("/")
	before := read()
	t.Cleanup(func() {
		for i, now := range read() {
			if now != before[i] {
				t.Errorf("the machine has changed: before %s; now %s", before[i], now)
			}
		}
		for _, m := range mountsBelow("/") { // one of another run may go, none may come
			if !slices.Contains(mounts, m) {
				t.Errorf("the machine has changed: new mount %s", m)
			}
		}
	})
}

// finish removes everything by the product's own means and checks that
// nothing is left.
func (n *Node) finish() {
	t := n.t
	if n.daemon != nil {
		n.removeAll()
	}
	for _, p := range n.leftovers() {
		t.Errorf("left after all pods were removed: %s", p)
	}
	if n.Conn != nil {
		_ = n.Conn.Close()
	}
	n.StopDaemon()
	if n.conn != nil {
		_ = n.conn.Close()
	}
	if n.keeper != nil && !n.keeper.ended() && !n.keeper.end(syscall.SIGTERM, 10*time.Second) {
		t.Error("the keeper did not end on SIGTERM though it keeps nothing")
	}
	n.endOtherKeepers()
	for _, name := range []string{"naru.log", "keeper.log"} {
		b, _ := os.ReadFile(filepath.Join(n.Dir, name))
		for _, bad := range []string{"DATA RACE", "panic:", "fatal error:", "goroutine 1 ["} {
			if strings.Contains(string(b), bad) {
				t.Errorf("%q in %s", bad, name)
			}
		}
		if t.Failed() {
			t.Logf("%s:\n%s", name, tail(filepath.Join(n.Dir, name), 12000))
		}
	}
	for _, p := range slices.Backward(mountsBelow(n.Dir)) {
		_ = unix.Unmount(p, unix.MNT_DETACH)
	}
	if systemdCgroups {
		_ = exec.Command("systemctl", "stop", path.Base(n.Parent)).Run()
	}
	removeCgroups(strings.TrimPrefix(n.Parent, "/"))
	deleteNftTable(n.NftTable)
	if err := os.RemoveAll(n.Dir); err != nil {
		t.Error(err)
	}
}

// endOtherKeepers ends a keeper that the daemon itself has started, as it does
// when none answers: after a test killed the node's own, say.
func (n *Node) endOtherKeepers() {
	dir := n.RunDir + "/monitor"
	running := func() (pids []int) {
		files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
		for _, f := range files {
			b, _ := os.ReadFile(f)
			args := strings.Split(string(b), "\x00")
			if len(args) > 2 && args[1] == "keeper" && slices.Contains(args, dir) {
				pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(f)))
				pids = append(pids, pid)
			}
		}
		return pids
	}
	for _, pid := range running() {
		_ = unix.Kill(pid, unix.SIGTERM)
	}
	for end := time.Now().Add(testhost.Limit(10 * time.Second)); len(running()) > 0 && time.Now().Before(end); {
		time.Sleep(20 * time.Millisecond)
	}
	if pids := running(); len(pids) > 0 {
		n.t.Errorf("keepers %v did not end on SIGTERM though they keep nothing", pids)
	}
}

// removeAll stops and removes every pod.
func (n *Node) removeAll() {
	if n.daemon.ended() {
		n.StartDaemon()
	}
	ctx, cancel := context.WithTimeout(context.Background(), testhost.Limit(callTime))
	defer cancel()
	list, err := n.Runtime.ListPodSandbox(ctx, &criv1.ListPodSandboxRequest{})
	if err != nil {
		n.t.Errorf("list pods at the end: %v", err)
		return
	}
	for _, p := range list.Items {
		if err := n.removePod(ctx, p.Id); err != nil {
			n.t.Errorf("remove pod %s at the end: %v", p.Id[:12], err)
		}
	}
}

func (n *Node) removePod(ctx context.Context, id string) error {
	if _, err := n.Runtime.StopPodSandbox(ctx, &criv1.StopPodSandboxRequest{PodSandboxId: id}); err != nil {
		return err
	}
	_, err := n.Runtime.RemovePodSandbox(ctx, &criv1.RemovePodSandboxRequest{PodSandboxId: id})
	return err
}

// leftovers lists what a node without pods must not have.
func (n *Node) leftovers() (left []string) {
	for end := time.Now().Add(testhost.Limit(5 * time.Second)); ; time.Sleep(20 * time.Millisecond) {
		if left = n.leftoversNow(); len(left) == 0 || time.Now().After(end) {
			return left
		}
	}
}

func (n *Node) leftoversNow() (left []string) {
	allowed := []string{n.RunDir + "/ns", n.RunDir + "/pods"} // the folders' own mounts
	for _, m := range mountsBelow(n.RunDir) {
		if !slices.Contains(allowed, m) {
			left = append(left, "mount "+m)
		}
	}
	for _, m := range mountsBelow(n.Root) {
		left = append(left, "mount "+m)
	}
	for _, d := range []string{n.RunDir + "/ns", n.RunDir + "/pods", n.RunDir + "/monitor/exits", n.RunDir + "/oci/root-oci", n.RunDir + "/oci/tty"} {
		l, _ := os.ReadDir(d)
		for _, e := range l {
			left = append(left, "file "+filepath.Join(d, e.Name()))
		}
	}
	bundles, _ := filepath.Glob(n.RunDir + "/oci/" + strings.Repeat("[0-9a-f]", 64))
	left = append(left, bundles...)
	for _, c := range cgroupDirs(strings.TrimPrefix(n.Parent, "/")) {
		_ = filepath.WalkDir(c, func(p string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() && p != c && !classSlice(p) {
				left = append(left, "cgroup "+p)
			}
			return nil
		})
	}
	for _, l := range linkNames() {
		if strings.HasPrefix(l, n.Links) {
			left = append(left, "link "+l)
		}
	}
	if n.conn != nil {
		ctx, cancel := context.WithTimeout(context.Background(), testhost.Limit(5*time.Second))
		defer cancel()
		list, err := n.conn.List(ctx)
		if err != nil {
			left = append(left, "the monitor's list: "+err.Error())
		}
		for _, e := range list {
			left = append(left, "kept container "+e.ID)
		}
	}
	return left
}

// classSlice tells whether systemd made the slice by itself, because it is above
// another: that stays, as the kubelet's do.
func classSlice(dir string) bool { return systemdCgroups && strings.HasSuffix(dir, "-burstable.slice") }

func nftTables() (names []string) {
	c, err := nftables.New()
	if err != nil {
		return nil
	}
	tables, err := c.ListTables()
	if err != nil {
		return nil
	}
	for _, t := range tables {
		names = append(names, t.Name)
	}
	return names
}

func deleteNftTable(name string) {
	if c, err := nftables.New(); err == nil {
		c.DelTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: name})
		_ = c.Flush()
	}
}
