package sandbox

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
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/program"
)

// debianPlugins is where Debian's containernetworking-plugins are.
const debianPlugins = "/usr/lib/cni"

func needPlugins(t testing.TB) {
	t.Helper()
	needRoot(t)
	for _, p := range []string{"bridge", "ptp", "host-local", "portmap", "bandwidth"} {
		if _, err := os.Stat(filepath.Join(debianPlugins, p)); err != nil {
			t.Skip("needs Debian's package containernetworking-plugins: ", err)
		}
	}
}

// programs runs plugins as children of the test.
type programs struct {
	before func(r program.Request) error
	hang   *atomic.Bool // DEL does
}

func (p programs) RunProgram(ctx context.Context, r program.Request) (program.Result, error) {
	if p.hang != nil && p.hang.Load() && slices.Contains(r.Env, "CNI_COMMAND=DEL") {
		<-ctx.Done()
		return program.Result{}, context.Cause(ctx)
	}
	if p.before != nil {
		if err := p.before(r); err != nil {
			return program.Result{}, err
		}
	}
	cmd := exec.CommandContext(ctx, r.Path)
	var stdout, stderr bytes.Buffer
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = r.Env, bytes.NewReader(r.Stdin), &stdout, &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	err := cmd.Run()
	if ctx.Err() != nil {
		return program.Result{}, context.Cause(ctx)
	}
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return program.Result{}, err
	}
	return program.Result{Stdout: stdout.Bytes(), Stderr: stderr.Bytes(), Status: cmd.ProcessState.ExitCode()}, nil
}

const cniBridge = "cnitest0"

// bridged is a configuration of Debian's plugins, with all they can.
func bridged(dir string) string {
	return fmt.Sprintf(`{"cniVersion":"1.0.0","name":"podnet","plugins":[
		{"type":"bridge","bridge":%q,"isGateway":true,"ipMasq":true,"hairpinMode":true,"capabilities":{"ipRanges":true,"dns":true},
		 "ipam":{"type":"host-local","dataDir":%q,"routes":[{"dst":"0.0.0.0/0"},{"dst":"::/0"}]}},
		{"type":"portmap","capabilities":{"portMappings":true},"snat":true},
		{"type":"bandwidth","capabilities":{"bandwidth":true}}]}`, cniBridge, filepath.Join(dir, "leases"))
}

// cniConfig is a Config with CNI and that configuration.
func cniConfig(t testing.TB) Config {
	needPlugins(t)
	cfg := testConfig(t)
	cfg.CNI.BinDirs = []string{debianPlugins}
	cfg.CNI.GCAfter = time.Millisecond
	writeConf(t, cfg, "10-podnet.conflist", bridged(filepath.Dir(cfg.RunDir)))
	t.Cleanup(func() {
		_ = run("ip link del " + cniBridge)
		_ = run("nft delete table ip nat") // of the test's network namespace, as all here
		_ = run("nft delete table ip6 nat")
	})
	return cfg
}

func writeConf(t testing.TB, cfg Config, name, text string) {
	t.Helper()
	if err := os.MkdirAll(cfg.CNI.ConfDir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(cfg.CNI.ConfDir, name), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func leases(t testing.TB, cfg Config) []string {
	t.Helper()
	all, _ := filepath.Glob(filepath.Join(filepath.Dir(cfg.RunDir), "leases", "podnet", "*"))
	return slices.DeleteFunc(all, func(f string) bool {
		b := filepath.Base(f)
		return b == "lock" || strings.HasPrefix(b, "last_reserved_ip")
	})
}

// nothingAttached checks that plugins hold nothing any more.
func nothingAttached(t testing.TB, m *Manager) {
	t.Helper()
	nothingLeft(t, m)
	if l := leases(t, m.cfg); len(l) > 0 {
		t.Errorf("leases left: %v", l)
	}
	for _, dir := range []string{"attachments", "results"} {
		if names, _ := os.ReadDir(filepath.Join(m.cfg.CNI.StateDir, dir)); len(names) > 0 {
			t.Errorf("left in %s: %v", dir, names)
		}
	}
	if out := output(t, "iptables-save -t nat") + output(t, "ip6tables-save -t nat"); strings.Contains(out, "--to-destination") || strings.Contains(out, `name: \"podnet\"`) {
		t.Errorf("rules left:\n%s", out)
	}
}

// flushNAT drops what iptables translates in the test's network namespace.
func flushNAT(t testing.TB) {
	t.Helper()
	for _, c := range []string{"iptables", "ip6tables"} {
		if err := errors.Join(run(c+" -t nat -F"), run(c+" -t nat -X")); err != nil {
			t.Error(err)
		}
	}
}

func cniSpec(t testing.TB, name string, ports ...PortMapping) Spec {
	s := podSpec(t, name, ports...)
	s.Pod = PodName{Namespace: "ns", Name: name, UID: "uid-" + name}
	return s
}

// A pod by Debian's plugins: addresses of both families from the pod CIDRs,
// loopback, a host port, its bandwidth, statistics, port-forward, and nothing
// left behind.
func TestCNIPod(t *testing.T) {
	cfg := cniConfig(t)
	m := start(t, cfg, Deps{Programs: programs{}})
	eventually(t, "network is ready", func() bool { return m.NetworkStatus().Ready })
	if s := m.NetworkStatus(); !strings.Contains(s.Message, "podnet") || !strings.Contains(s.Message, "10-podnet.conflist") {
		t.Errorf("%+v", s)
	}
	s := cniSpec(t, "a", mapping(TCP, 8080, 80, ""), mapping(UDP, 5353, 53, hostIP4))
	s.Annotations = map[string]string{"kubernetes.io/ingress-bandwidth": "10M", "kubernetes.io/egress-bandwidth": "1G"}
	s.DNS = DNS{Servers: []string{"192.0.2.53"}}
	h := create(t, m, s)
	if len(h.IPs) != 2 || !netip.MustParsePrefix("10.77.0.0/24").Contains(h.IPs[0]) || !netip.MustParsePrefix("fd77::/112").Contains(h.IPs[1]) {
		t.Errorf("addresses %v", h.IPs)
	}
	if h.CNI == nil || h.CNI.Network != "podnet" || !slices.Contains(h.CNI.Interfaces, "eth0") || h.HostLink != "" {
		t.Errorf("handle %+v, %+v", h, h.CNI)
	}
	ns := netns(t, h)
	in(t, ns, func() error {
		if out := output(t, "ip -o addr show lo"); !strings.Contains(out, "127.0.0.1") {
			t.Errorf("loopback: %s", out)
		}
		return nil
	})
	serve(t, ns, "tcp4", "0.0.0.0:80", "a")
	serve(t, ns, "tcp6", "[::]:80", "a")
	serve(t, ns, "tcp4", "127.0.0.1:81", "inside")
	wantAnswer(t, nil, "tcp4", hostPort(pick(h, true), 80), "a", "")
	eventually(t, "the new bridge's address is not tentative", func() bool { return !strings.Contains(output(t, "ip -6 addr show "+cniBridge), "tentative") })
	wantAnswer(t, nil, "tcp6", hostPort(pick(h, false), 80), "a", "")
	wantAnswer(t, outsideNS, "tcp4", hostPort(hostIP4, 8080), "a", outIP4)
	if conn, err := m.Dial(t.Context(), h, 81); err != nil {
		t.Errorf("port-forward: %v", err)
	} else {
		_ = conn.Close()
	}
	hosts, err := os.ReadFile(h.EtcFiles["/etc/hosts"])
	if err != nil || !strings.Contains(string(hosts), h.IPs[0].String()+"\ta") {
		t.Errorf("hosts: %s, %v", hosts, err)
	}
	stats, err := m.Stats(t.Context(), h)
	if err != nil || len(stats) != 1 || stats[0].Name != "eth0" || stats[0].RxBytes == 0 || stats[0].TxBytes == 0 {
		t.Errorf("stats %+v, %v", stats, err)
	}
	if out := output(t, "tc qdisc show"); !strings.Contains(out, "rate 10Mbit") || !strings.Contains(out, "rate 1Gbit") {
		t.Errorf("bandwidth: %s", out)
	}
	// The port is taken, and the error says by whom.
	again := cniSpec(t, "b", mapping(TCP, 8080, 80, ""))
	if _, err := m.Create(t.Context(), again, nil); err == nil || !strings.Contains(err.Error(), "ns/a") {
		t.Errorf("second pod with the port: %v", err)
	}
	b := create(t, m, cniSpec(t, "b"))
	serve(t, netns(t, b), "tcp4", "0.0.0.0:80", "b")
	wantAnswer(t, ns, "tcp4", hostPort(pick(b, true), 80), "b", pick(h, true))
	release(t, m, b)
	release(t, m, h)
	release(t, m, h) // may be repeated
	nothingAttached(t, m)
}

// A pod with a user namespace of its own.
func TestCNIUserNamespace(t *testing.T) {
	cfg := cniConfig(t)
	m := start(t, cfg, Deps{Programs: programs{}, Namespaces: &fakeMaker{inits: map[string]*exec.Cmd{}}})
	s := cniSpec(t, "u")
	s.UIDMap, s.GIDMap = testMap, testMap
	h := create(t, m, s)
	serve(t, netns(t, h), "tcp4", "0.0.0.0:80", "u")
	wantAnswer(t, nil, "tcp4", hostPort(pick(h, true), 80), "u", "")
	release(t, m, h)
	nothingAttached(t, m)
}

// A configuration that appears takes over new pods; old ones keep what they
// have and are released by what made them, over a restart too. When it is gone
// again, nobody gets another network behind the administrator's back.
func TestCNITakesOver(t *testing.T) {
	cfg := cniConfig(t)
	conf := filepath.Join(cfg.CNI.ConfDir, "10-podnet.conflist")
	text, err := os.ReadFile(conf)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(cfg.CNI.ConfDir); err != nil { // not even the folder is there
		t.Fatal(err)
	}
	cfg.PoolSize = 2
	m := start(t, cfg, Deps{Programs: programs{}})
	if !m.NetworkStatus().Ready {
		t.Fatalf("%+v", m.NetworkStatus())
	}
	old := cniSpec(t, "old", mapping(TCP, 8080, 80, ""))
	oldH := create(t, m, old)
	if oldH.CNI != nil || oldH.HostLink == "" {
		t.Fatalf("%+v", oldH)
	}
	serve(t, netns(t, oldH), "tcp4", "0.0.0.0:80", "old")
	writeConf(t, cfg, filepath.Base(conf), string(text))
	eventually(t, "CNI took over", func() bool { return strings.Contains(m.NetworkStatus().Message, "podnet") && m.NetworkStatus().Ready })
	eventually(t, "the pool is empty", func() bool { return !strings.Contains(output(t, "ip -o link"), "alias naru pool-") })
	spec := cniSpec(t, "new")
	h := create(t, m, spec)
	if h.CNI == nil {
		t.Fatalf("%+v", h)
	}
	if slices.Contains(oldH.IPs, h.IPs[0]) {
		t.Errorf("both have %s", h.IPs[0])
	}
	serve(t, netns(t, h), "tcp4", "0.0.0.0:80", "new")
	wantAnswer(t, outsideNS, "tcp4", hostPort(hostIP4, 8080), "old", outIP4)
	wantAnswer(t, nil, "tcp4", hostPort(pick(oldH, true), 80), "old", "")

	if err := os.Remove(conf); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the configuration is missed", func() bool { return m.NetworkStatus().Reason == "CNIConfigMissing" })
	n := restart(t, m)
	if s := n.NetworkStatus(); s.Ready || s.Reason != "CNIConfigMissing" || !strings.Contains(s.Message, cfg.CNI.ConfDir) || !strings.Contains(s.Message, "builtin") {
		t.Errorf("after a restart: %+v", s)
	}
	for _, p := range []struct {
		s Spec
		h *Handle
	}{{old, oldH}, {spec, h}} {
		if alive, err := n.Adopt(t.Context(), p.s, p.h); err != nil || !alive {
			t.Errorf("adopt %s: %v, %v", p.s.Name, alive, err)
		}
	}
	if _, err := n.Create(t.Context(), cniSpec(t, "late"), nil); !errs.Is(err, errs.Unavailable) || !strings.Contains(err.Error(), cfg.CNI.ConfDir) {
		t.Errorf("a pod without a configuration: %v", err)
	}
	wantAnswer(t, outsideNS, "tcp4", hostPort(hostIP4, 8080), "old", outIP4)
	wantAnswer(t, nil, "tcp4", hostPort(pick(h, true), 80), "new", "")
	release(t, n, h) // its configuration is gone
	release(t, n, oldH)
	nothingAttached(t, n)

	// Only the administrator's word brings the built-in network back.
	n.cfg.Plugin = PluginBuiltin
	b := restart(t, n)
	if !b.NetworkStatus().Ready || b.byCNI.Load() {
		t.Errorf("%+v", b.NetworkStatus())
	}
	writeConf(t, cfg, filepath.Base(conf), string(text))
	oh := create(t, b, cniSpec(t, "back"))
	if oh.CNI != nil {
		t.Errorf("%+v", oh.CNI)
	}
	release(t, b, oh)
	if err := os.Remove(conf); err != nil {
		t.Fatal(err)
	}
	b.cfg.Plugin = PluginAuto
	if a := restart(t, b); a.byCNI.Load() {
		t.Error("the mark of before is still there")
	}
}

// After a reboot namespaces and records of the run folder are gone: plugins
// still take back what they hold. The same when the daemon died during ADD.
func TestCNIAfterReboot(t *testing.T) {
	cfg := cniConfig(t)
	m := start(t, cfg, Deps{Programs: programs{}})
	h := create(t, m, cniSpec(t, "a", mapping(TCP, 8080, 80, "")))
	if err := m.unpin(h.ID); err != nil { // what a reboot takes
		t.Fatal(err)
	}
	flushNAT(t)
	if len(leases(t, cfg)) != 2 {
		t.Errorf("leases %v", leases(t, cfg))
	}
	n := restart(t, m)
	n.boot = "another"
	if alive, err := n.Adopt(t.Context(), Spec{ID: h.ID}, h); alive || err != nil {
		t.Errorf("adopt: %v, %v", alive, err)
	}
	release(t, n, h)
	nothingAttached(t, n)

	n.boot = m.boot
	lost := create(t, n, cniSpec(t, "lost"))
	o := restart(t, n)
	if err := o.Sweep(t.Context(), nil); err != nil { // no record knows it
		t.Error(err)
	}
	if _, err := os.Stat(lost.Namespaces.Net); err == nil {
		t.Error("its namespace is still there")
	}
	nothingAttached(t, o)
}

// What a plugin did before it failed is taken back, also when taking back fails
// at first; until then the pod's namespace stays, for plugins need it.
func TestRowW07Failures(t *testing.T) {
	cfg := cniConfig(t)
	fail := map[string]error{}
	p := programs{before: func(r program.Request) error {
		for _, e := range r.Env {
			if c, ok := strings.CutPrefix(e, "CNI_COMMAND="); ok {
				if err := fail[filepath.Base(r.Path)+" "+c]; err != nil {
					return err
				}
			}
		}
		return nil
	}}
	m := start(t, cfg, Deps{Programs: p})
	fail["portmap ADD"] = errors.New("injected")
	_, err := m.Create(t.Context(), cniSpec(t, "a", mapping(TCP, 8080, 80, "")), nil)
	for _, want := range []string{`"podnet"`, `"portmap"`, "ns/a", "ADD", "injected"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("no %s in %v", want, err)
		}
	}
	nothingAttached(t, m)

	delete(fail, "portmap ADD")
	s := cniSpec(t, "b", mapping(TCP, 8080, 80, ""))
	h := create(t, m, s)
	fail["bridge DEL"] = errors.New("injected")
	for range 3 {
		if err := m.Release(t.Context(), h.ID, h); err == nil || !strings.Contains(err.Error(), "injected") || !strings.Contains(err.Error(), "ns/b") {
			t.Errorf("release: %v", err)
		}
	}
	if _, err := os.Stat(h.Namespaces.Net); err != nil || len(leases(t, cfg)) == 0 {
		t.Errorf("namespace: %v, leases %v", err, leases(t, cfg))
	}
	delete(fail, "bridge DEL")
	release(t, m, h)
	nothingAttached(t, m)

	// A create that was given up, and whose undo cannot reach the plugin.
	ctx, cancel := context.WithCancelCause(t.Context())
	fail["bridge DEL"] = errors.New("injected")
	s = cniSpec(t, "c")
	_, err = m.Create(ctx, s, func(step string) {
		if step == "set sysctls" {
			cancel(errs.New(errs.Canceled, "given up"))
		}
	})
	if err == nil || !m.cni.Attached(s.ID) {
		t.Errorf("%v; attached %v", err, m.cni.Attached(s.ID))
	}
	delete(fail, "bridge DEL")
	if err := m.Release(t.Context(), s.ID, nil); err != nil {
		t.Error(err)
	}
	nothingAttached(t, m)
}

// The pods of a handler with a folder of its own get that network, whatever
// the others have.
func TestCNIOfHandler(t *testing.T) {
	cfg := cniConfig(t)
	cfg.CNI.HandlerDirs = map[string]string{"fast": cfg.CNI.ConfDir}
	cfg.CNI.ConfDir = filepath.Join(filepath.Dir(cfg.CNI.ConfDir), "none")
	text := strings.Replace(strings.Replace(bridged(filepath.Dir(cfg.RunDir)), `"ipRanges":true,`, "", 1),
		`"routes"`, `"ranges":[[{"subnet":"10.78.0.0/24"}]],"routes"`, 1)
	if err := os.WriteFile(filepath.Join(cfg.CNI.HandlerDirs["fast"], "10-podnet.conflist"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	m := start(t, cfg, Deps{Programs: programs{}})
	h := create(t, m, cniSpec(t, "plain"))
	s := cniSpec(t, "fast")
	s.Handler = "fast"
	f := create(t, m, s)
	if h.CNI != nil || f.CNI == nil || !m.NetworkStatus().Ready {
		t.Errorf("%+v, %+v, %+v", h.CNI, f.CNI, m.NetworkStatus())
	}
	info := m.NetworkInfo()
	if info["lastCNILoadStatus.fast"] != "OK" || info["lastCNILoadStatus"] == "OK" {
		t.Errorf("%v", info)
	}
	if _, err := json.Marshal(info); err != nil {
		t.Error(err)
	}
	release(t, m, f)
	release(t, m, h)
	nothingAttached(t, m)
	host := cniSpec(t, "host")
	host.Network, host.UTS, host.Handler = ModeNode, ModeNode, "fast"
	hh := create(t, m, host)
	if hh.CNI != nil || len(hh.IPs) > 0 {
		t.Errorf("%+v", hh)
	}
	release(t, m, hh)
}

// The host's masquerading is of the built-in network's pods alone.
func TestCNIKeepsHostPlain(t *testing.T) {
	cfg := cniConfig(t)
	m := start(t, cfg, Deps{Programs: programs{}})
	if out := output(t, "nft list table inet "+cfg.Table); strings.Contains(out, "10.77.0.0") {
		t.Errorf("the pod CIDR is masqueraded:\n%s", out)
	}
	if s := m.sources(); len(s) > 0 {
		t.Errorf("sources %v", s)
	}
}

// Plugins that hang when the daemon starts, for their agent is not there yet:
// the start is not held up for long by all of the pods together, and what could
// not be taken back then is taken back later.
func TestRowW07HangAtStart(t *testing.T) {
	cfg := cniConfig(t)
	p := programs{hang: &atomic.Bool{}}
	m := start(t, cfg, Deps{Programs: p})
	for i := range 4 {
		create(t, m, cniSpec(t, fmt.Sprint("p", i)))
	}
	p.hang.Store(true)
	n := restart(t, m)
	began := time.Now()
	err := n.Sweep(t.Context(), nil)
	if d := time.Since(began); err == nil || d > 2*startupTime {
		t.Errorf("%v after %v", err, d)
	}
	if len(n.cni.Pods()) != 4 {
		t.Errorf("attached: %v", n.cni.Pods())
	}
	p.hang.Store(false)
	eventually(t, "all is taken back", func() bool { return len(n.cni.Pods()) == 0 })
	nothingAttached(t, n)
}

// An interface of a pod that somebody removed: the pod is not whole.
func TestCNIInterfaceGone(t *testing.T) {
	m := start(t, cniConfig(t), Deps{Programs: programs{}})
	s := cniSpec(t, "a")
	h := create(t, m, s)
	in(t, netns(t, h), func() error { return run("ip link del eth0") })
	n := restart(t, m)
	if alive, err := n.Adopt(t.Context(), s, h); alive || err != nil {
		t.Errorf("adopt: %v, %v", alive, err)
	}
	release(t, n, h)
	flushNAT(t) // Debian's bridge looks at the interface for what it had masqueraded
	nothingAttached(t, n)
}
