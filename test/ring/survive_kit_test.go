package ring

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"google.golang.org/protobuf/proto"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// identity tells a process from another one that got its number later.
type identity struct {
	pid   int
	start string // ticks since boot, proc_pid_stat(5) field 22
}

func identityOf(pid int) identity {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return identity{}
	}
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if f[0] == "Z" || f[0] == "X" {
		return identity{}
	}
	return identity{pid, f[19]}
}

// numbers checks that each stream of the logs, read one after the other, is
// 1, 2, 3 … without a gap or a repeat, and returns the last number of each.
func numbers(t testing.TB, paths ...string) map[string]int {
	t.Helper()
	last := map[string]int{}
	for _, path := range paths {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		r := bufio.NewReaderSize(f, 1<<20)
		for {
			line, err := r.ReadSlice('\n')
			if err != nil {
				if len(line) > 0 {
					t.Errorf("%s ends in a half record: %q", path, line)
				}
				break
			}
			// 2025-01-01T00:00:00.000000000Z stdout F 17
			part := bytes.SplitN(bytes.TrimSuffix(line, []byte("\n")), []byte(" "), 4)
			if len(part) != 4 || string(part[2]) != "F" {
				t.Fatalf("%s: record %q", path, line)
			}
			n, err := strconv.Atoi(string(part[3]))
			if name := string(part[1]); err != nil || n != last[name]+1 {
				_ = f.Close()
				t.Fatalf("%s: %s has %q after %d", path, name, part[3], last[name])
			}
			last[string(part[1])]++
		}
		_ = f.Close()
	}
	return last
}

// memory is everything that the daemon must know again after a restart.
type memory struct {
	pods       map[string]*criv1.PodSandboxStatus
	containers map[string]*criv1.ContainerStatus
}

func (n *Node) remember(t testing.TB) memory {
	t.Helper()
	m := memory{map[string]*criv1.PodSandboxStatus{}, map[string]*criv1.ContainerStatus{}}
	pods, err := n.Runtime.ListPodSandbox(within(t, callTime), &criv1.ListPodSandboxRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pods.Items {
		m.pods[p.Id] = n.PodStatus(t, p.Id)
	}
	list, err := n.Runtime.ListContainers(within(t, callTime), &criv1.ListContainersRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range list.Containers {
		m.containers[c.Id] = n.Status(t, c.Id)
	}
	return m
}

// compare holds what a new daemon knows against what the old one knew. Those
// containers that ended meanwhile may differ in how they ended.
func (m memory) compare(t testing.TB, now memory, ended ...string) {
	t.Helper()
	if len(m.pods) != len(now.pods) || len(m.containers) != len(now.containers) {
		t.Errorf("%d pods and %d containers before, %d and %d after the restart", len(m.pods), len(m.containers), len(now.pods), len(now.containers))
	}
	for id, p := range m.pods {
		if !proto.Equal(p, now.pods[id]) {
			t.Errorf("pod before the restart:\n%v\nafter:\n%v", p, now.pods[id])
		}
	}
	for id, c := range m.containers {
		have := now.containers[id]
		if have != nil && slices.Contains(ended, id) {
			c, have = proto.CloneOf(c), proto.CloneOf(have)
			for _, x := range []*criv1.ContainerStatus{c, have} {
				x.State, x.FinishedAt, x.ExitCode, x.Reason, x.Message = 0, 0, 0, "", ""
			}
		}
		if !proto.Equal(c, have) {
			t.Errorf("container before the restart:\n%v\nafter:\n%v", c, have)
		}
	}
}

// ownerless lists what is on the host and belongs to no pod and no container
// that the daemon lists. Pods of such a test have a cgroup parent of their own,
// /<node's parent>/<name>.
func (n *Node) ownerless(t testing.TB) (left []string) {
	t.Helper()
	m := n.remember(t)
	add := func(format string, args ...any) { left = append(left, fmt.Sprintf(format, args...)) }
	known := func(id string) bool {
		id = strings.TrimSuffix(id, ".json")
		return m.pods[id] != nil || m.containers[id] != nil || m.podOfInit(id)
	}
	for _, d := range []string{
		n.RunDir + "/ns", n.RunDir + "/pods", n.RunDir + "/io", n.RunDir + "/monitor/exits", n.Root + "/images/writable", n.Root + "/images/holds",
		n.Root + "/state/pods", n.Root + "/state/containers", n.RunDir + "/state/specs",
	} {
		entries, err := os.ReadDir(d)
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		spare := 0 // writable folders for the next containers, two at most
		for _, e := range entries {
			if strings.HasPrefix(e.Name(), ".spare-") && spare < 2 {
				spare++
			} else if !known(e.Name()) {
				add("file %s/%s", d, e.Name())
			}
		}
	}
	for _, p := range mountsBelow(n.RunDir) {
		rel, _ := filepath.Rel(n.RunDir, p)
		if f := strings.Split(rel, "/"); len(f) > 1 && !known(f[1]) {
			add("mount %s", p)
		}
	}
	for _, p := range mountsBelow(n.Root) {
		add("mount %s", p)
	}
	n.ownerlessKernel(t, m, known, add)
	return left
}

// podOfInit tells whether the id is that of the first process of a pod's shared
// PID namespace: the pod's own, but for the beginning.
func (m memory) podOfInit(id string) bool {
	for pod := range m.pods {
		if len(id) == len(pod) && id[:8] == "00000000" && pod[8:] == id[8:] {
			return true
		}
	}
	return false
}

// sameFile tells whether two paths lead to one file, or namespace.
func sameFile(a, b string) bool {
	x, err1 := os.Stat(a)
	y, err2 := os.Stat(b)
	return err1 == nil && err2 == nil && os.SameFile(x, y)
}

// ownerlessKernel looks at links, nftables, cgroups and processes.
func (n *Node) ownerlessKernel(t testing.TB, m memory, known func(string) bool, add func(string, ...any)) {
	t.Helper()
	links, err := netlink.LinkList()
	for errors.Is(err, netlink.ErrDumpInterrupted) { // a link came or went meanwhile
		links, err = netlink.LinkList()
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		a := l.Attrs()
		if strings.HasPrefix(a.Name, n.Links) && !known(strings.TrimPrefix(a.Alias, "naru ")) {
			add("link %s %q", a.Name, a.Alias)
		}
	}
	for _, e := range nftElements(t, n.NftTable) {
		ours := slices.ContainsFunc(mapsValues(m.pods), func(p *criv1.PodSandboxStatus) bool { return elementOf(e, p) })
		if !ours {
			add("nftables element %x", e)
		}
	}
	parents := map[string]bool{}
	for _, p := range m.pods {
		parents[path.Base(n.Below(p.Metadata.Name))] = true
	}
	for _, top := range cgroupDirs(strings.TrimPrefix(n.Parent, "/")) {
		entries, _ := os.ReadDir(top)
		for _, e := range entries {
			if !e.IsDir() {
				continue
			}
			if !parents[e.Name()] {
				add("cgroup %s/%s", top, e.Name())
			}
			below, _ := os.ReadDir(filepath.Join(top, e.Name()))
			for _, b := range below {
				if b.IsDir() && !known(strings.TrimSuffix(strings.TrimPrefix(b.Name(), "naru-"), ".scope")) {
					add("cgroup %s/%s/%s", top, e.Name(), b.Name())
				}
			}
		}
	}
	own := []int{n.DaemonPID(), n.KeeperPID(), n.WorkerPID()}
	for _, pid := range allPIDs() {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
		_, ppid := procState(pid)
		if slices.Contains(own, pid) || !running(pid) || !strings.Contains(string(b), n.Parent) && !slices.Contains(own, ppid) {
			continue
		}
		owned := false
		for id := range m.containers {
			owned = owned || strings.Contains(string(b), id)
		}
		for pod := range m.pods { // a pod's init
			owned = owned || sameFile(fmt.Sprintf("/proc/%d/ns/pid", pid), n.RunDir+"/ns/"+pod+"/pid")
		}
		if !owned {
			add("process %d (parent %d): %s in %q", pid, ppid, cmdline(pid), b)
		}
	}
}

func mapsValues[K comparable, V any](m map[K]V) (all []V) {
	for _, v := range m {
		all = append(all, v)
	}
	return all
}

// nftElements are the elements of the table's sets of single pods, key and
// value in one.
func nftElements(t testing.TB, table string) (all [][]byte) {
	t.Helper()
	c, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	sets, err := c.GetSets(&nftables.Table{Family: nftables.TableFamilyINet, Name: table})
	if err != nil {
		t.Fatalf("read the nftables table: %v", err)
	}
	for _, s := range sets {
		if !strings.HasPrefix(s.Name, "ports") && !strings.HasPrefix(s.Name, "hairpin") {
			continue
		}
		elements, err := c.GetSetElements(s)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range elements {
			all = append(all, append(slices.Clone(e.Key), e.Val...))
		}
	}
	return all
}

// elementOf tells whether an element names an address of the pod.
func elementOf(e []byte, p *criv1.PodSandboxStatus) bool {
	all := []string{p.GetNetwork().GetIp()}
	for _, a := range p.GetNetwork().GetAdditionalIps() {
		all = append(all, a.Ip)
	}
	for _, s := range all {
		if ip, err := netip.ParseAddr(s); err == nil && bytes.Contains(e, ip.AsSlice()) {
			return true
		}
	}
	return false
}
