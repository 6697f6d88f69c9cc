package doctor

import (
	"context"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/runtime/cgroup"
)

// TestRunChangesNothing runs every check on this machine: none breaks or hangs,
// and no folder, mount, namespace or descriptor is left.
func TestRunChangesNothing(t *testing.T) {
	root := t.TempDir()
	mounts, _ := os.ReadFile("/proc/self/mountinfo")
	fds, _ := os.ReadDir("/proc/self/fd")
	results := Run(t.Context(), Config{Root: root, Socket: filepath.Join(root, "none"), UserNS: true, Holder: []string{"/bin/cat"}, Table: "naru", CNIDirs: []string{filepath.Join(root, "net.d")}})
	seen := map[string]Status{}
	for _, r := range results {
		t.Logf("%-4s %-16s %s", r.Status, r.Name, r.Detail)
		if r.Detail == "" || strings.Contains(r.Detail, "itself broke") {
			t.Errorf("%+v", r)
		}
		if seen[r.Name] != Fail {
			seen[r.Name] = r.Status
		}
	}
	for _, c := range checks {
		if seen[c.name] == "" {
			t.Errorf("nothing is said of %s", c.name)
		}
	}
	if os.Geteuid() == 0 {
		for _, name := range []string{"system calls", "overlayfs", "cgroups", "seccomp", "kernel"} {
			if seen[name] == Fail {
				t.Errorf("%s fails on a machine that runs this project's tests", name)
			}
		}
	}
	if left, _ := os.ReadDir(root); len(left) != 0 {
		t.Errorf("left in the root folder: %v", left)
	}
	if after, _ := os.ReadFile("/proc/self/mountinfo"); string(after) != string(mounts) {
		t.Error("the mount table has changed")
	}
	if after, _ := os.ReadDir("/proc/self/fd"); len(after) > len(fds)+2 {
		t.Errorf("%d descriptors before, %d after", len(fds), len(after))
	}
}

func TestBrokenCheck(t *testing.T) {
	r := one(t.Context(), check{"x", func(context.Context, *Config) []Result { panic("oh") }}, &Config{})
	if len(r) != 1 || r[0].Status != Warn || !strings.Contains(r[0].Detail, "oh") {
		t.Errorf("%+v", r)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	stop := make(chan struct{})
	defer close(stop)
	r = one(ctx, check{"x", func(context.Context, *Config) []Result { <-stop; return nil }}, &Config{})
	if len(r) != 1 || r[0].Status != Warn {
		t.Errorf("%+v", r)
	}
}

func TestHandlers(t *testing.T) {
	program := func(script string) string {
		p := filepath.Join(t.TempDir(), "program")
		if err := os.WriteFile(p, []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
		return p
	}
	r := checkHandlers(t.Context(), &Config{Handlers: map[string]string{
		"a": "/no/such", "b": program("echo 'fine 1.0'; echo more"), "c": program("exit 1"), "d": program("exec sleep 100"),
	}})
	if len(r) != 4 || r[0].Status != Warn || r[1].Status != OK || r[1].Detail != "b: fine 1.0" || r[2].Status != Warn || r[3].Status != Warn || !strings.Contains(r[3].Detail, "no answer") {
		t.Errorf("%+v", r)
	}
	if r := checkHandlers(t.Context(), &Config{}); len(r) != 1 || r[0].Status != OK {
		t.Errorf("without handlers: %+v", r)
	}
}

func TestWorst(t *testing.T) {
	for _, c := range []struct {
		in   []Status
		want Status
	}{{nil, OK}, {[]Status{OK, Warn}, Warn}, {[]Status{Fail, Warn, OK}, Fail}, {[]Status{Warn, Fail}, Fail}} {
		var r []Result
		for _, s := range c.in {
			r = append(r, Result{Status: s})
		}
		if got := Worst(r); got != c.want {
			t.Errorf("%v: %s", c.in, got)
		}
	}
}

func TestJudgeKernel(t *testing.T) {
	for text, want := range map[string]Status{
		"6.18.44-fc-v669": OK, "6.1.0-18-amd64": OK, "5.15.0": Warn, "5.10.0-28-amd64": Fail, "4.18.0-553.el8": Fail, "7.3.0": OK, "strange": Warn, "10.0": OK,
	} {
		if got := judgeKernel(text)[0].Status; got != want {
			t.Errorf("%s: %s", text, got)
		}
	}
}

func TestJudgeCaps(t *testing.T) {
	all := ^uint64(0)
	if r := judgeCaps(all); Worst(r) != OK {
		t.Errorf("%+v", r)
	}
	if r := judgeCaps(all &^ (1 << unix.CAP_SYS_RESOURCE)); Worst(r) != Warn || len(r) != 1 {
		t.Errorf("%+v", r)
	}
	if r := judgeCaps(all &^ (1 << unix.CAP_NET_ADMIN)); Worst(r) != Fail {
		t.Errorf("%+v", r)
	}
}

func TestJudgeControllers(t *testing.T) {
	if r := judgeControllers(cgroup.ModeV2, []string{"cpuset", "cpu", "io", "memory", "pids"}); len(r) != 0 {
		t.Errorf("%+v", r)
	}
	if r := judgeControllers(cgroup.ModeV2, []string{"cpuset", "cpu", "pids"}); Worst(r) != Fail || len(r) != 2 {
		t.Errorf("%+v", r)
	}
	if r := judgeControllers(cgroup.ModeHybrid, []string{"cpuset", "cpu", "blkio", "memory", "pids"}); len(r) != 0 {
		t.Errorf("%+v", r)
	}
}

func TestJudgeSpace(t *testing.T) {
	const gib = 1 << 30
	for _, c := range []struct {
		free, total, freeInodes, inodes uint64
		want                            Status
	}{
		{100 * gib, 200 * gib, 10, 10, OK}, {4 * gib, 20 * gib, 10, 10, Warn}, {20 * gib, 200 * gib, 10, 10, Warn}, {gib / 2, 200 * gib, 10, 10, Fail},
		{100 * gib, 200 * gib, 1, 1000, Warn}, {100 * gib, 200 * gib, 0, 0, OK}, {0, 0, 0, 0, Fail},
	} {
		if got := judgeSpace("/x", c.free, c.total, c.freeInodes, c.inodes)[0].Status; got != c.want {
			t.Errorf("%+v: %s", c, got)
		}
	}
}

func TestSysctls(t *testing.T) {
	dir := t.TempDir()
	write := func(key, value string) {
		p := filepath.Join(dir, key)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(value+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("net/ipv4/ip_forward", "1")
	write("fs/inotify/max_user_instances", "8192")
	cfg := &Config{ProcSys: dir}
	if r := checkSysctls(t.Context(), cfg); Worst(r) != OK {
		t.Errorf("%+v", r)
	}
	write("user/max_user_namespaces", "0")
	write("net/ipv4/conf/all/rp_filter", "1")
	if r := checkSysctls(t.Context(), cfg); len(r) != 2 || Worst(r) != Warn {
		t.Errorf("%+v", r)
	}
}

func TestJudgeChains(t *testing.T) {
	drop, accept := nftables.ChainPolicyDrop, nftables.ChainPolicyAccept
	chain := func(table, name string, f nftables.TableFamily, hook *nftables.ChainHook, p *nftables.ChainPolicy) *nftables.Chain {
		return &nftables.Chain{Name: name, Table: &nftables.Table{Name: table, Family: f}, Hooknum: hook, Policy: p}
	}
	list := []*nftables.Chain{
		chain("filter", "FORWARD", nftables.TableFamilyIPv4, nftables.ChainHookForward, &drop),
		chain("filter", "INPUT", nftables.TableFamilyIPv4, nftables.ChainHookInput, &drop),
		chain("x", "forward", nftables.TableFamilyINet, nftables.ChainHookForward, &accept),
		chain("naru", "forward", nftables.TableFamilyINet, nftables.ChainHookForward, &drop),
		chain("br", "forward", nftables.TableFamilyBridge, nftables.ChainHookForward, &drop),
		chain("x", "plain", nftables.TableFamilyINet, nil, nil),
	}
	r := judgeChains(list, "naru")
	if len(r) != 1 || !strings.Contains(r[0].Detail, "Docker") {
		t.Errorf("%+v", r)
	}
}

// entry is the last rule of a chain, as the kernel lays it out.
func entry(at, targetOff, target int, verdict int32) []byte {
	b := make([]byte, at+target+targetLen+8)
	binary.NativeEndian.PutUint16(b[at+targetOff:], uint16(target))
	binary.NativeEndian.PutUint32(b[at+target+targetLen:], uint32(verdict))
	return b
}

func TestPolicyDrops(t *testing.T) {
	for _, c := range []struct {
		verdict int32
		want    bool
	}{{-1, true}, {-2, false}, {5, false}} {
		got, err := policyDrops(entry(152, entryTarget4, 112, c.verdict), 152, entryTarget4)
		if err != nil || got != c.want {
			t.Errorf("verdict %d: %v %v", c.verdict, got, err)
		}
	}
	if _, err := policyDrops(nil, 10, entryTarget4); err == nil {
		t.Error("no entries, no error")
	}
}

func FuzzPolicy(f *testing.F) {
	f.Add(entry(0, entryTarget4, 112, -1), 0)
	f.Add([]byte{1}, -5)
	f.Fuzz(func(_ *testing.T, b []byte, off int) {
		_, _ = policyDrops(b, off, entryTarget4)
		_, _ = policyDrops(b, off, entryTarget6)
	})
}

func FuzzRelease(f *testing.F) {
	f.Add("6.1.0-18-amd64")
	f.Add("..")
	f.Fuzz(func(t *testing.T, s string) {
		if r := judgeKernel(s); len(r) == 0 || r[0].Detail == "" && s != "" {
			t.Fatalf("%q: %+v", s, r)
		}
	})
}

func TestLegacyWord(t *testing.T) {
	if !hasWord("nat\nfilter\n", "filter") || hasWord("filters", "filter") {
		t.Error("hasWord")
	}
}
