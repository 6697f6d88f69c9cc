package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/program"
	"github.com/naru-project/naru/internal/testhost"
)

// The plugin of these tests is a shell script that writes down what it was told
// and then does what the file named by its command says, or the one named
// "default".
const script = `#!/bin/sh
dir=%s
{ echo "== $CNI_COMMAND $CNI_CONTAINERID"; env; cat; echo; } >>"$dir/log"
do=$dir/$CNI_COMMAND
[ -e "$do" ] || do=$dir/default
. "$do"
`

const goodResult = `echo '{"cniVersion":"1.1.0","interfaces":[{"name":"veth0"},{"name":"eth0","sandbox":"/any/path"}],"ips":[{"interface":1,"address":"10.1.2.3/24"}]}'`

// rig is a Manager with that plugin.
type rig struct {
	*Manager
	t   testing.TB
	dir string
}

// runner runs programs as children of the test.
type runner struct{}

func (runner) RunProgram(ctx context.Context, r program.Request) (program.Result, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	cmd := exec.CommandContext(ctx, r.Path)
	var stderr bytes.Buffer
	out := &bounded{limit: r.MaxOutput, over: func() { cancel(errs.New(errs.ResourceExhausted, "it printed more than %d bytes", r.MaxOutput)) }}
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = r.Env, bytes.NewReader(r.Stdin), out, &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 100 * time.Millisecond
	err := cmd.Run()
	if ctx.Err() != nil {
		return program.Result{}, context.Cause(ctx)
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) && !errors.Is(err, exec.ErrWaitDelay) {
		return program.Result{}, err
	}
	return program.Result{Stdout: out.b, Stderr: stderr.Bytes(), Status: max(cmd.ProcessState.ExitCode(), 0)}, nil
}

type bounded struct {
	b     []byte
	limit int
	over  func()
}

func (b *bounded) Write(p []byte) (int, error) {
	if len(b.b)+len(p) > b.limit {
		b.over()
	}
	b.b = append(b.b, p[:min(len(p), b.limit-len(b.b))]...)
	return len(p), nil
}

func newRig(t testing.TB) *rig {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: only files of root are configurations and plugins")
	}
	dir := t.TempDir()
	r := &rig{t: t, dir: dir}
	for _, d := range []string{"bin", "net.d", "do"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	r.write("bin/fake", fmt.Sprintf(script, filepath.Join(dir, "do")), 0o755)
	r.write("do/default", "exit 0", 0o644)
	r.write("do/ADD", goodResult, 0o644)
	r.write("net.d/10-fake.conflist", conflist("fakenet", "fake"), 0o644)
	r.Manager = r.manager(Config{})
	return r
}

func (r *rig) manager(cfg Config) *Manager {
	r.t.Helper()
	if cfg.ConfDir == "" {
		cfg.ConfDir = filepath.Join(r.dir, "net.d")
	}
	cfg.BinDirs, cfg.StateDir = []string{filepath.Join(r.dir, "none"), filepath.Join(r.dir, "bin")}, filepath.Join(r.dir, "state")
	cfg.Timeout, cfg.StatusTimeout, cfg.StatusEvery, cfg.GCAfter = 10*time.Second, 500*time.Millisecond, 50*time.Millisecond, time.Millisecond
	m := New(cfg, runner{}, func() {})
	if err := m.Open(); err != nil {
		r.t.Fatal(err)
	}
	return m
}

// run does the background work for the length of the test.
func (r *rig) run() {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { r.Run(ctx) })
	r.t.Cleanup(func() { cancel(); wg.Wait() })
}

func (r *rig) write(name, text string, mode os.FileMode) {
	r.t.Helper()
	path := filepath.Join(r.dir, name)
	_ = os.Remove(path)
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		r.t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) log() string {
	b, _ := os.ReadFile(filepath.Join(r.dir, "do", "log"))
	return string(b)
}

func (r *rig) clearLog() { _ = os.Remove(filepath.Join(r.dir, "do", "log")) }

func conflist(name string, types ...string) string {
	var plugins []string
	for _, t := range types {
		plugins = append(plugins, fmt.Sprintf(`{"type":%q,"capabilities":{"portMappings":true,"bandwidth":true,"dns":true,"ipRanges":true}}`, t))
	}
	return fmt.Sprintf(`{"cniVersion":"1.1.0","name":%q,"plugins":[%s]}`, name, strings.Join(plugins, ","))
}

const (
	idA = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	idB = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
)

func podA() *Pod {
	return &Pod{ID: idA, Namespace: "ns", Name: "a", UID: "u-1", NetNS: "/run/none/net"}
}

func (r *rig) attach(p *Pod) (*Attachment, error) {
	r.t.Helper()
	n, err := r.Network("")
	if err != nil {
		r.t.Fatal(err)
	}
	return r.Attach(r.t.Context(), n, p)
}

func (r *rig) eventually(what string, ok func() bool) {
	r.t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			r.t.Fatalf("not in time: %s", what)
		}
	}
}

// What a plugin is told, and no more: no variable of the daemon's.
func TestWhatPluginsAreTold(t *testing.T) {
	t.Setenv("SECRET_TOKEN", "s3cret")
	r := newRig(t)
	p := podA()
	p.Annotations = map[string]string{"kubernetes.io/ingress-bandwidth": "10M", "kubernetes.io/egress-bandwidth": "1G"}
	p.Ports = []Port{{HostPort: 8080, ContainerPort: 80, Protocol: "tcp", HostIP: "192.0.2.1"}}
	p.DNS = DNS{Servers: []string{"192.0.2.53"}, Searches: []string{"cluster.local"}, Options: []string{"ndots:5"}}
	p.CIDRs = []netip.Prefix{netip.MustParsePrefix("10.1.0.0/24"), netip.MustParsePrefix("fd01::/64")}
	a, err := r.attach(p)
	if err != nil {
		t.Fatal(err)
	}
	if a.Network != "fakenet" || !slices.Equal(a.IPs, []netip.Addr{netip.MustParseAddr("10.1.2.3")}) || !slices.Equal(a.Interfaces, []string{"eth0"}) {
		t.Errorf("%+v", a)
	}
	told := r.log()
	for _, want := range []string{
		"CNI_COMMAND=ADD\n", "CNI_CONTAINERID=" + idA, "CNI_NETNS=/run/none/net", "CNI_IFNAME=eth0",
		"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=a;K8S_POD_INFRA_CONTAINER_ID=" + idA + ";K8S_POD_UID=u-1\n",
		`"portMappings":[{"hostPort":8080,"containerPort":80,"protocol":"tcp","hostIP":"192.0.2.1"}]`,
		`"dns":{"servers":["192.0.2.53"],"searches":["cluster.local"],"options":["ndots:5"]}`,
		`"ipRanges":[[{"subnet":"10.1.0.0/24"}],[{"subnet":"fd01::/64"}]]`,
		`"ingressRate":10000000`, `"ingressBurst":10000000`, `"egressRate":1000000000`, `"egressBurst":1000000000`,
	} {
		if !strings.Contains(told, want) {
			t.Errorf("no %s in\n%s", want, told)
		}
	}
	if strings.Contains(told, "s3cret") || !strings.Contains(told, "PATH=/usr/local/sbin:") {
		t.Errorf("environment:\n%s", told)
	}
	// Taking it back tells the same, with the result, from another process and
	// with the configuration gone.
	if err := os.Remove(filepath.Join(r.dir, "net.d", "10-fake.conflist")); err != nil {
		t.Fatal(err)
	}
	r.clearLog()
	m := r.manager(Config{})
	if err := m.Check(t.Context(), idA, "/run/none/net"); err != nil {
		t.Error(err)
	}
	if err := m.Detach(t.Context(), idA, ""); err != nil {
		t.Fatal(err)
	}
	told = r.log()
	for _, want := range []string{"== CHECK " + idA, "== DEL " + idA, "CNI_NETNS=\n", "K8S_POD_NAME=a", `"hostPort":8080`, `"prevResult":{`, `"10.1.2.3/24"`} {
		if !strings.Contains(told, want) {
			t.Errorf("no %s in\n%s", want, told)
		}
	}
	if m.Attached(idA) || m.Detach(t.Context(), idA, "") != nil {
		t.Error("still attached")
	}
	for _, dir := range []string{"attachments", "results"} {
		if left, _ := os.ReadDir(filepath.Join(r.dir, "state", dir)); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	}
	for _, bad := range []Pod{{Namespace: "a;b"}, {Name: "a\nb"}, {UID: "a;K8S_POD_NAME=x"}, {Annotations: map[string]string{"kubernetes.io/egress-bandwidth": "fast"}}} {
		bad.ID = idB
		n := mustNetwork(t, conflist("fakenet", "fake"))
		if _, err := m.Attach(t.Context(), n, &bad); !errs.Is(err, errs.InvalidArgument) || m.Attached(idB) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}

func mustNetwork(t testing.TB, text string) *Network {
	t.Helper()
	list, err := parse([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return &Network{File: "test", list: list}
}

// Row W-07: whatever a plugin does, the pod that it is for gets an error in
// time that names plugin, network and pod, and DEL is still made.
func TestRowW07Misbehaviour(t *testing.T) {
	r := newRig(t)
	result := func(s string) string { return "echo '" + s + "'" }
	many := strings.Repeat(`{"address":"10.1.2.3/24"},`, 1000)
	for name, c := range map[string]struct{ do, want string }{
		"hangs":             {"sleep 3600", "did not end within 1s"},
		"ignores SIGTERM":   {"trap '' TERM; while :; do sleep 1; done", "did not end within 1s"},
		"prints no end":     {"cat /dev/zero", "printed more than"},
		"prints 64 MiB":     {"head -c 67108864 /dev/zero | tr '\\0' x", "printed more than"},
		"prints nothing":    {"exit 0", "unexpected end of JSON"},
		"prints garbage":    {`printf '\377\000{'`, "invalid character"},
		"prints null":       {"echo null", "no address"},
		"fails silently":    {"exit 3", "status 3"},
		"fails on stderr":   {`printf 'went\033[31m wrong' >&2; exit 1`, `"went\x1b[31m wrong"`},
		"fails as it shall": {`echo '{"code":11,"msg":"try later","details":"no lease"}'; exit 1`, `code 11: "try later", "no lease"`},
		"bad prefix":        {result(`{"cniVersion":"1.0.0","ips":[{"address":"1.2.3.4/99"}]}`), "1.2.3.4/99"},
		"too many":          {result(`{"cniVersion":"1.0.0","ips":[` + strings.TrimSuffix(many, ",") + `]}`), "1000 addresses"},
		"no interface":      {result(`{"cniVersion":"1.0.0","ips":[{"address":"10.0.0.1/8","interface":7}]}`), "interface 7"},
		"negative":          {result(`{"cniVersion":"1.0.0","ips":[{"address":"10.0.0.1/8","interface":-1}]}`), "interface -1"},
		"of the host":       {result(`{"cniVersion":"1.0.0","interfaces":[{"name":"eth0"}],"ips":[{"address":"10.0.0.1/8","interface":0}]}`), "no address"},
		"loopback":          {result(`{"cniVersion":"1.0.0","ips":[{"address":"127.0.0.1/8"}]}`), "none that a pod can have"},
		"multicast":         {result(`{"cniVersion":"1.0.0","ips":[{"address":"ff02::1/64"}]}`), "none that a pod can have"},
		"link name":         {result(`{"cniVersion":"1.0.0","interfaces":[{"name":"../../x","sandbox":"/etc/passwd"}],"ips":[{"address":"10.0.0.1/8"}]}`), "interface name"},
		"null interface":    {result(`{"cniVersion":"1.0.0","interfaces":[null],"ips":[{"address":"10.0.0.1/8"}]}`), "null"},
		"strange version":   {result(`{"cniVersion":"9.9.9","ips":[]}`), "9.9.9"},
	} {
		t.Run(name, func(t *testing.T) {
			r.t = t
			if r.cfg.Timeout = 20 * time.Second; strings.Contains(c.want, "did not end") {
				r.cfg.Timeout = time.Second
			}
			r.write("do/ADD", c.do, 0o644)
			r.clearLog()
			began := time.Now()
			a, err := r.attach(podA())
			if err == nil || time.Since(began) > testhost.Limit(8*time.Second) {
				t.Fatalf("%+v after %v", a, time.Since(began))
			}
			if len(err.Error()) > 2000 {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
			wants := []string{c.want, "fakenet"}
			if !strings.Contains(err.Error(), "result of CNI network") {
				wants = append(wants, "fake", "ns/a")
			}
			for _, want := range wants {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("no %s in: %v", want, err)
				}
			}
			if !r.Attached(idA) {
				t.Error("nobody knows that it has to be taken back")
			}
			if err := r.Detach(t.Context(), idA, ""); err != nil || !strings.Contains(r.log(), "== DEL "+idA) {
				t.Errorf("%v\n%s", err, r.log())
			}
		})
	}
}

// Row W-07: a child that keeps the output open does not keep the pod waiting.
func TestRowW07ChildHoldsOutput(t *testing.T) {
	r := newRig(t)
	r.write("do/ADD", goodResult+"\nsleep 60 & echo $! >"+r.dir+"/child", 0o644)
	began := time.Now()
	if _, err := r.attach(podA()); err != nil || time.Since(began) > testhost.Limit(5*time.Second) {
		t.Errorf("%v after %v", err, time.Since(began))
	}
	pid, _ := os.ReadFile(filepath.Join(r.dir, "child"))
	_ = exec.CommandContext(t.Context(), "kill", strings.TrimSpace(string(pid))).Run()
}

// Row W-05: what a configuration may name, and who may have written it.
func TestRowW05Configurations(t *testing.T) {
	r := newRig(t)
	victim := filepath.Join(r.dir, "victim")
	r.write("victim", "#!/bin/sh\ntouch "+victim+".ran\n", 0o755)
	for name, text := range map[string]string{
		"parent":         conflist("n", "../victim"),
		"path":           conflist("n", "a/b"),
		"absolute":       conflist("n", victim),
		"empty type":     conflist("n", ""),
		"dots":           conflist("n", ".."),
		"NUL":            `{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"a\u0000b"}]}`,
		"space":          conflist("n", "a b"),
		"ipam":           `{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"fake","ipam":{"type":"../victim"}}]}`,
		"version":        `{"cniVersion":"junk","name":"n","plugins":[{"type":"fake"}]}`,
		"future":         `{"cniVersion":"99.0.0","name":"n","plugins":[{"type":"fake"}]}`,
		"network name":   conflist("../../n", "fake"),
		"no name":        `{"cniVersion":"1.0.0","plugins":[{"type":"fake"}]}`,
		"no plugins":     `{"cniVersion":"1.0.0","name":"n","plugins":[]}`,
		"no plugins key": `{"cniVersion":"1.0.0","name":"n"}`,
		"null":           `null`,
		"list":           `[]`,
		"empty":          ``,
		"plugins null":   `{"cniVersion":"1.0.0","name":"n","plugins":[null]}`,
		"large":          conflist("n", "fake") + strings.Repeat(" ", maxConf),
	} {
		r.write("net.d/10-fake.conflist", text, 0o644)
		if n, err := r.Network(""); err == nil {
			t.Errorf("%s: %+v", name, n)
		} else if !strings.Contains(err.Error(), "10-fake.conflist") {
			t.Errorf("%s: the file is not named: %v", name, err)
		}
		if s := r.Status(); s.Ready || s.Reason != ReasonBadConfig {
			t.Errorf("%s: %+v", name, s)
		}
	}
	if _, err := os.Stat(victim + ".ran"); err == nil {
		t.Error("the victim was run")
	}
	good := conflist("n", "fake")
	conf := filepath.Join(r.dir, "net.d", "10-fake.conflist")
	r.write("net.d/10-fake.conflist", good, 0o644)
	if _, err := r.Network(""); err != nil {
		t.Fatal(err)
	}
	refused := func(what, want string) {
		t.Helper()
		if _, err := r.Network(""); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", what, err)
		}
	}
	r.write("net.d/10-fake.conflist", good, 0o666)
	refused("writable by all", "chmod")
	r.write("net.d/10-fake.conflist", good, 0o644)
	if err := os.Chown(conf, 1000, 0); err != nil {
		t.Fatal(err)
	}
	refused("of a user", "user 1000")
	r.write("theirs", good, 0o644)
	if err := errors.Join(os.Chown(filepath.Join(r.dir, "theirs"), 1000, 0), os.Remove(conf), os.Symlink("../theirs", conf)); err != nil {
		t.Fatal(err)
	}
	refused("a link to a user's", "user 1000")
	if err := errors.Join(os.Remove(conf), unix.Mkfifo(conf, 0o644)); err != nil {
		t.Fatal(err)
	}
	refused("a FIFO", "regular file")
	r.write("net.d/10-fake.conflist", good, 0o644)
	if err := os.Chmod(filepath.Join(r.dir, "net.d"), 0o777); err != nil {
		t.Fatal(err)
	}
	refused("a folder that all may write", "chmod")
	if err := os.Chmod(filepath.Join(r.dir, "net.d"), 0o755); err != nil {
		t.Fatal(err)
	}
	n, err := r.Network("")
	if err != nil {
		t.Fatal(err)
	}
	for what, change := range map[string]func(path string) error{
		"user 1000":  func(p string) error { return os.Chown(p, 1000, 0) },
		"chmod go-w": func(p string) error { return os.Chmod(p, 0o777) },
		"chmod +x":   func(p string) error { return os.Chmod(p, 0o644) },
		"none of":    os.Remove,
	} {
		plugin := filepath.Join(r.dir, "bin", "fake")
		if err := change(plugin); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Attach(t.Context(), n, podA()); err == nil || !strings.Contains(err.Error(), what) || strings.Contains(r.log(), "== ADD") {
			t.Errorf("%s: %v", what, err)
		}
		r.write("bin/fake", fmt.Sprintf(script, filepath.Join(r.dir, "do")), 0o755)
	}
	if err := r.Detach(t.Context(), idA, ""); err != nil {
		t.Error(err)
	}
}

// The first file by name counts, good or bad; a list's plugins can be in files
// of their own, and what is kept of it holds them all.
func TestWhichConfiguration(t *testing.T) {
	r := newRig(t)
	r.write("net.d/05-first.conf", `{"cniVersion":"0.4.0","name":"single","type":"fake"}`, 0o644)
	r.write("net.d/00-not.yaml", "x", 0o644)
	if n, err := r.Network(""); err != nil || n.Name() != "single" || !strings.HasSuffix(n.File, "05-first.conf") {
		t.Errorf("%+v, %v", n, err)
	}
	r.write("net.d/01-bad.conflist", "{", 0o644)
	if _, err := r.Network(""); err == nil {
		t.Error("a bad first file was passed over in silence")
	}
	for _, f := range []string{"01-bad.conflist", "05-first.conf"} {
		if err := os.Remove(filepath.Join(r.dir, "net.d", f)); err != nil {
			t.Fatal(err)
		}
	}
	r.write("net.d/02-split.conflist", `{"cniVersion":"1.1.0","name":"split"}`, 0o644)
	if err := os.Mkdir(filepath.Join(r.dir, "net.d", "split"), 0o755); err != nil {
		t.Fatal(err)
	}
	r.write("net.d/split/a.conf", `{"type":"fake"}`, 0o644)
	r.write("net.d/split/b.conf", `{"type":"fake","mark":"second"}`, 0o644)
	if _, err := r.attach(podA()); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(r.dir, "net.d", "split")); err != nil {
		t.Fatal(err)
	}
	r.clearLog()
	if err := r.manager(Config{}).Detach(t.Context(), idA, ""); err != nil || strings.Count(r.log(), "== DEL") != 2 || !strings.Contains(r.log(), `"mark":"second"`) {
		t.Errorf("%v\n%s", err, r.log())
	}
	r.write("net.d/split", "", 0o644) // no folder
	if _, err := r.Network(""); err == nil {
		t.Error("no plugins, no error")
	}
}

// Status is asked for in the background: a plugin that hangs there, or refuses,
// is told by the condition and keeps nobody waiting.
// Who writes a configuration and then makes a pod gets what he wrote, whoever
// else reads the folder meanwhile.
func TestLastConfigurationCounts(t *testing.T) {
	r := newRig(t)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			for ctx.Err() == nil {
				r.Reload()
			}
		})
	}
	defer wg.Wait()
	defer cancel()
	for i := range 300 {
		name := fmt.Sprint("net", i)
		r.write("tmp", conflist(name, "fake"), 0o644)
		if err := os.Rename(filepath.Join(r.dir, "tmp"), filepath.Join(r.dir, "net.d", "10-fake.conflist")); err != nil {
			t.Fatal(err)
		}
		if n, err := r.Network(""); err != nil || n.Name() != name {
			t.Fatalf("the pod gets network %q, %v; want %q", n.Name(), err, name)
		}
	}
}

func TestStatus(t *testing.T) {
	r := newRig(t)
	r.run()
	r.eventually("ready", func() bool { return r.Status().Ready })
	if s := r.Status(); !strings.Contains(s.Message, "fakenet") || !strings.Contains(s.Message, "10-fake.conflist") {
		t.Errorf("%+v", s)
	}
	r.write("do/STATUS", `echo '{"code":50,"msg":"the agent is down"}'; exit 1`, 0o644)
	r.eventually("not ready", func() bool {
		s := r.Status()
		return !s.Ready && s.Reason == ReasonPluginFailed && strings.Contains(s.Message, "the agent is down") && strings.Contains(s.Message, `"fake"`)
	})
	r.write("do/STATUS", "sleep 3600", 0o644)
	r.eventually("it hangs", func() bool { return strings.Contains(r.Status().Message, "did not end within 500ms") })
	began := time.Now()
	for range 1000 {
		_ = r.Status()
	}
	if _, err := r.attach(podA()); err != nil || time.Since(began) > testhost.Limit(3*time.Second) {
		t.Errorf("a pod beside a hanging STATUS: %v after %v", err, time.Since(began))
	}
	r.write("do/STATUS", "exit 0", 0o644)
	r.eventually("ready again", func() bool { return r.Status().Ready })
	if err := os.Rename(filepath.Join(r.dir, "bin", "fake"), filepath.Join(r.dir, "bin", "gone")); err != nil {
		t.Fatal(err)
	}
	r.eventually("plugin missing", func() bool { return r.Status().Reason == ReasonPluginMissing })
	if err := os.Rename(filepath.Join(r.dir, "bin", "gone"), filepath.Join(r.dir, "bin", "fake")); err != nil {
		t.Fatal(err)
	}
	r.eventually("ready once more", func() bool { return r.Status().Ready })
}

// The folder is watched, also before it is there, and by the name of a file
// that is moved into it.
func TestWatch(t *testing.T) {
	r := newRig(t)
	late := filepath.Join(r.dir, "not", "yet")
	changes := make(chan struct{}, 100)
	r.Manager = r.manager(Config{ConfDir: late})
	r.cfg.StatusEvery = time.Hour // inotify alone
	r.changed = func() { changes <- struct{}{} }
	r.run()
	if p, g := r.Present(); p || g {
		t.Error("present")
	}
	present := func(want bool) func() bool {
		return func() bool { _, good := r.Present(); return good == want }
	}
	for range 2 {
		if err := os.MkdirAll(late, 0o755); err != nil {
			t.Fatal(err)
		}
		r.write("tmp", conflist("late", "fake"), 0o644)
		if err := os.Rename(filepath.Join(r.dir, "tmp"), filepath.Join(late, "10.conflist")); err != nil {
			t.Fatal(err)
		}
		r.eventually("it is seen", present(true))
		if err := os.Remove(filepath.Join(late, "10.conflist")); err != nil {
			t.Fatal(err)
		}
		r.eventually("it is gone", present(false))
		if err := os.RemoveAll(filepath.Dir(late)); err != nil {
			t.Fatal(err)
		}
	}
	if len(changes) < 4 {
		t.Errorf("told of %d changes", len(changes))
	}
}

// Plugins are told which attachments there are; pods go first.
func TestGarbage(t *testing.T) {
	r := newRig(t)
	r.run()
	if _, err := r.attach(podA()); err != nil {
		t.Fatal(err)
	}
	b := podA()
	b.ID = idB
	if _, err := r.attach(b); err != nil {
		t.Fatal(err)
	}
	r.clearLog()
	if err := r.Detach(t.Context(), idB, ""); err != nil {
		t.Fatal(err)
	}
	r.eventually("GC", func() bool {
		_, gc, ok := strings.Cut(r.log(), "== GC")
		return ok && strings.Contains(gc, `"cni.dev/valid-attachments":[{"containerID":"`+idA+`","ifname":"eth0"}]`) && !strings.Contains(gc, `"containerID":"`+idB)
	})
	// One that hangs is ended by the next pod.
	r.write("do/GC", "sleep 3600", 0o644)
	r.clearLog()
	r.GCSoon()
	r.eventually("GC hangs", func() bool { return strings.Contains(r.log(), "== GC") })
	began := time.Now()
	if err := r.Detach(t.Context(), idA, ""); err != nil || time.Since(began) > testhost.Limit(3*time.Second) {
		t.Errorf("%v after %v", err, time.Since(began))
	}
}

// A pod whose plugin hangs keeps no other waiting.
func TestRowW07HangingPodIsAlone(t *testing.T) {
	r := newRig(t)
	r.write("do/ADD", `case $CNI_CONTAINERID in a*) sleep 3600;; esac; `+goodResult, 0o644)
	ctx, cancel := context.WithCancelCause(t.Context())
	n, err := r.Network("")
	if err != nil {
		t.Fatal(err)
	}
	hung := make(chan error, 1)
	go func() { _, err := r.Attach(ctx, n, podA()); hung <- err }()
	r.eventually("it hangs", func() bool { return strings.Contains(r.log(), "== ADD "+idA) })
	b := podA()
	b.ID = idB
	began := time.Now()
	if _, err := r.Attach(t.Context(), n, b); err != nil || time.Since(began) > testhost.Limit(3*time.Second) {
		t.Errorf("%v after %v", err, time.Since(began))
	}
	cancel(errs.New(errs.Canceled, "stopped while it was being created"))
	select {
	case err := <-hung:
		if !errs.Is(err, errs.Canceled) || !strings.Contains(err.Error(), "stopped while") {
			t.Errorf("%v", err)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("it is not ended")
	}
}

// Damaged files: a result that was torn is done without, an attachment is told
// with the way out.
func TestDamagedState(t *testing.T) {
	r := newRig(t)
	if _, err := r.attach(podA()); err != nil {
		t.Fatal(err)
	}
	r.write("state/results/fakenet-"+idA+"-eth0", `{"kind":"cniCac`, 0o600)
	if err := r.Detach(t.Context(), idA, ""); err != nil {
		t.Error(err)
	}
	if _, err := r.attach(podA()); err != nil {
		t.Fatal(err)
	}
	r.write("state/attachments/"+idA+".json", `{"ver`, 0o600)
	m := r.manager(Config{})
	err := m.Detach(t.Context(), idA, "")
	if err == nil || !strings.Contains(err.Error(), "remove the file") || !slices.Equal(m.Pods(), []string{idA}) {
		t.Errorf("%v, %v", err, m.Pods())
	}
	if err := os.Remove(r.attachmentFile(idA)); err != nil {
		t.Fatal(err)
	}
	if err := m.Detach(t.Context(), idA, ""); err != nil || m.Attached(idA) {
		t.Errorf("after the file was removed: %v", err)
	}
	if left, _ := os.ReadDir(filepath.Join(r.dir, "state", "results")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

func TestBandwidth(t *testing.T) {
	for text, want := range map[string]uint64{
		"1k": 1000, "10M": 10e6, "1G": 1e9, "1P": 1e15, "1Ki": 1024, "1.5M": 1.5e6, "1e6": 1e6, "2000": 2000, "1000.1": 1001, "+5k": 5000, "2000000m": 2000,
	} {
		got, err := bandwidth(map[string]string{ingressAnnotation: text})
		if err != nil || got["ingressRate"] != want || got["ingressBurst"] < minBurst || got["ingressBurst"] > maxBurst {
			t.Errorf("%s: %v, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "999", "2P", "-1M", "10Mbit", "1e99", "NaN", "0x10k", "1_000k", " 1M", "1M\n", strings.Repeat("9", 100)} {
		if got, err := bandwidth(map[string]string{egressAnnotation: text}); err == nil {
			t.Errorf("%q: %v", text, got)
		}
	}
	if got, err := bandwidth(nil); err != nil || len(got) > 0 {
		t.Errorf("%v, %v", got, err)
	}
}

// The primary address is the default interface's first.
func TestOrderOfAddresses(t *testing.T) {
	r := newRig(t)
	r.write("do/ADD", `echo '{"cniVersion":"1.1.0","interfaces":[{"name":"br0"},{"name":"net1","sandbox":"/n"},{"name":"eth0","sandbox":"/n"}],
		"ips":[{"interface":1,"address":"192.168.1.2/24"},{"interface":2,"address":"fd00::2/64"},{"interface":2,"address":"10.0.0.2/24"},{"interface":0,"address":"10.0.0.1/24"},{"interface":2,"address":"fe80::5/64"}]}'`, 0o644)
	a, err := r.attach(podA())
	if err != nil || fmt.Sprint(a.IPs) != "[fd00::2 10.0.0.2 192.168.1.2]" || fmt.Sprint(a.Interfaces) != "[net1 eth0]" {
		t.Errorf("%+v, %v", a, err)
	}
}

func TestGate(t *testing.T) {
	var g gate
	ran := make(chan struct{})
	ended := make(chan bool, 1)
	go func() {
		ended <- g.alone(t.Context(), func(ctx context.Context) { close(ran); <-ctx.Done() })
	}()
	<-ran
	if g.alone(t.Context(), func(context.Context) {}) {
		t.Error("two collections")
	}
	g.enter() // ends it
	if <-ended {
		t.Error("it was not told that it was cut short")
	}
	if g.alone(t.Context(), func(context.Context) {}) {
		t.Error("beside a pod")
	}
	g.leave()
	if !g.alone(t.Context(), func(context.Context) {}) {
		t.Error("nothing is done, and it may not")
	}
}

func FuzzConfiguration(f *testing.F) {
	f.Add([]byte(conflist("n", "fake", "other")))
	f.Add([]byte(`{"cniVersion":"0.3.1","name":"n","type":"fake","ipam":{"type":"x"}}`))
	f.Add([]byte(`{"cniVersions":["1.0.0","1.1.0"],"name":"n","plugins":[{"type":"fake","capabilities":{"x":true}}],"disableGC":"true"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		list, err := parse(b)
		if err != nil || len(list.Plugins) == 0 {
			return
		}
		n := &Network{list: list}
		for _, typ := range n.types() {
			if strings.ContainsAny(typ, "/\x00") || typ == ".." {
				t.Errorf("type %q", typ)
			}
		}
		if _, err := json.Marshal(n.info()); err != nil {
			t.Errorf("%v", err)
		}
		if _, err := n.runtimeConf(&Pod{ID: idA}); err != nil {
			t.Error(err)
		}
	})
}

func FuzzAttachment(f *testing.F) {
	config, _ := json.Marshal([]byte(conflist("n", "fake")))
	f.Add([]byte(`{"version":1,"config":` + string(config) + `,"args":[["a","b"]],"capabilities":{"dns":{}}}`))
	f.Fuzz(func(_ *testing.T, b []byte) { _, _, _ = parseAttachment(b) })
}

// answer is a plugin that prints itself.
type answer []byte

func (a answer) ExecPlugin(context.Context, string, []byte, []string) ([]byte, error) { return a, nil }
func (answer) FindInPath(string, []string) (string, error)                            { return "fake", nil }
func (answer) Decode([]byte) (version.PluginInfo, error)                              { return nil, nil }

func FuzzResult(f *testing.F) {
	for _, s := range []string{
		`{"cniVersion":"1.1.0","interfaces":[{"name":"eth0","sandbox":"/n"}],"ips":[{"interface":0,"address":"10.1.2.3/24"}]}`,
		`{"cniVersion":"0.2.0","ip4":{"ip":"10.1.2.3/24"},"ip6":{"ip":"fd00::1/64"}}`, `null`, `{"ips":[null]}`,
	} {
		f.Add([]byte(s))
	}
	list, err := parse([]byte(conflist("n", "fake")))
	if err != nil {
		f.Fatal(err)
	}
	n := &Network{list: list}
	f.Fuzz(func(t *testing.T, b []byte) {
		res, err := invoke.ExecPluginWithResult(t.Context(), "fake", list.Plugins[0].Bytes, &invoke.Args{}, answer(b))
		if err != nil {
			return
		}
		a, err := n.result(res)
		if err == nil && (len(a.IPs) == 0 || len(a.IPs) > maxIPs || !a.IPs[0].IsValid() || a.IPs[0].IsUnspecified()) {
			t.Errorf("%+v", a)
		}
	})
}

func FuzzQuantity(f *testing.F) {
	f.Add("10M")
	f.Add("1e3Ki")
	f.Fuzz(func(t *testing.T, s string) {
		if out, err := bandwidth(map[string]string{ingressAnnotation: s}); err == nil && (out["ingressRate"] < minRate || out["ingressRate"] > maxRate) {
			t.Errorf("%q: %v", s, out)
		}
	})
}
