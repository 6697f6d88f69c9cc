package ring

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/internal/testhost"
)

// The check for ownerless things sees one of each, or TestSurviveChurn would
// prove nothing.
func TestSurviveOwnerlessIsSeen(t *testing.T) {
	n := StartNode(t)
	pod := n.Pod(t, func(c *criv1.PodSandboxConfig) {
		c.Linux.CgroupParent = n.Below(c.Metadata.Name)
		c.PortMappings = []*criv1.PortMapping{{ContainerPort: 80, HostPort: 31999}}
		c.Linux.SecurityContext.NamespaceOptions.Pid = criv1.NamespaceMode_POD
	})
	n.Run(t, pod, nil)
	if left := n.ownerless(t); len(left) > 0 {
		t.Fatalf("nothing is ownerless, but: %q", left)
	}
	bogus := strings.Repeat("b", 64)
	mkdir := func(path string) string {
		t.Helper()
		if err := os.MkdirAll(path, 0o700); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.Remove(path) })
		return path
	}
	plant := map[string]func(){
		"file " + n.RunDir + "/io/" + bogus:             func() { mkdir(n.RunDir + "/io/" + bogus) },
		"file " + n.Root + "/images/writable/" + bogus:  func() { mkdir(n.Root + "/images/writable/" + bogus) },
		"file " + n.RunDir + "/monitor/exits/" + bogus:  func() { mkdir(n.RunDir + "/monitor/exits/" + bogus) },
		"file " + n.Root + "/state/containers/" + bogus: func() { mkdir(n.Root + "/state/containers/" + bogus) },
		"mount " + n.RunDir + "/ns/" + bogus: func() {
			mountTmpfs(t, mkdir(n.RunDir+"/ns/"+bogus))
		},
		"link " + n.Links + "bogus": func() {
			veth := netlink.NewVeth(netlink.NewLinkAttrs())
			veth.Name, veth.PeerName = n.Links+"bogus", n.Links+"peer"
			if err := netlink.LinkAdd(veth); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = netlink.LinkDel(veth) })
		},
		"nftables element": func() {
			c, err := nftables.New()
			if err != nil {
				t.Fatal(err)
			}
			s, err := c.GetSetByName(&nftables.Table{Family: nftables.TableFamilyINet, Name: n.NftTable}, "hairpin4")
			if err != nil {
				t.Fatal(err)
			}
			e := []nftables.SetElement{{Key: []byte{203, 0, 113, 1, 203, 0, 113, 1}}}
			if err := c.SetAddElements(s, e); err != nil {
				t.Fatal(err)
			}
			if err := c.Flush(); err != nil {
				t.Fatal(err)
			}
		},
		"cgroup /sys/fs/cgroup/": func() {
			var dir string
			for _, top := range cgroupDirs(strings.TrimPrefix(n.Parent, "/")) {
				if strings.Contains(top, "/memory/") || dir == "" {
					dir = top
				}
			}
			mkdir(filepath.Join(dir, "bogus"))
		},
		"process ": func() {
			// In a cgroup of its own: with version 2 none that has others below holds processes.
			dir := filepath.Join(filepath.Dir(cgroupOf(t, n.PID(t, n.Run(t, pod, nil)), "memory")), "strange")
			mkdir(dir)
			cmd := exec.Command("sleep", "1000")
			p, err := spawn(cmd)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { p.end(unix.SIGKILL, callTime) })
			if err := os.WriteFile(dir+"/cgroup.procs", []byte(strconv.Itoa(p.pid())), 0o644); err != nil {
				t.Fatal(err)
			}
		},
	}
	for _, f := range plant {
		f()
	}
	left := n.ownerless(t)
	for what := range plant {
		found := false
		for _, l := range left {
			found = found || strings.HasPrefix(l, what)
		}
		if !found {
			t.Errorf("%q is not seen; seen are %q", what, left)
		}
	}
}

// Records that were lost or damaged while the daemon was down: what they told
// of is taken down, the others are not touched, and the daemon serves.
func TestSurviveLostRecords(t *testing.T) {
	n := StartNode(t)
	type made struct {
		pod, id string
		pid     int
	}
	run := func(port int32, pid criv1.NamespaceMode) made {
		pod := n.Pod(t, func(c *criv1.PodSandboxConfig) {
			c.Linux.CgroupParent = n.Below(c.Metadata.Name)
			c.PortMappings = []*criv1.PortMapping{{ContainerPort: 80, HostPort: port}}
			c.Linux.SecurityContext.NamespaceOptions.Pid = pid
		})
		id := n.Run(t, pod, nil)
		return made{pod, id, n.PID(t, id)}
	}
	kept := run(31001, criv1.NamespaceMode_CONTAINER)
	both := run(31002, criv1.NamespaceMode_POD)        // pod and container are lost
	ofPod := run(31003, criv1.NamespaceMode_CONTAINER) // the pod's is damaged
	ofCtr := run(31004, criv1.NamespaceMode_CONTAINER) // the container's is damaged
	// One that never had a container: nothing but its cgroup tells of it.
	empty := n.Pod(t, func(c *criv1.PodSandboxConfig) { c.Linux.CgroupParent = n.Below(c.Metadata.Name) })
	record := func(kind, id string) string { return n.Root + "/state/" + kind + "/" + id + ".json" }
	n.KillDaemon()
	for _, p := range []string{record("pods", both.pod), record("containers", both.id), record("pods", empty)} {
		if err := os.Remove(p); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range []string{record("pods", ofPod.pod), record("containers", ofCtr.id)} {
		b, err := os.ReadFile(p)
		if err != nil {
			t.Fatal(err)
		}
		b[len(b)/2] ^= 1
		if err := os.WriteFile(p, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	n.StartDaemon()
	for _, m := range []made{both, ofPod, ofCtr} {
		eventually(t, callTime, "the end of a container without a record", func() bool { return !running(m.pid) })
	}
	if !running(kept.pid) || n.Sh(t, kept.id, "echo here") != "here" {
		t.Error("a container with a record was ended")
	}
	if s := n.PodStatus(t, ofCtr.pod); s.State != criv1.PodSandboxState_SANDBOX_READY {
		t.Errorf("the pod of a container whose record was damaged is %v", s.State)
	}
	var left []string
	for end := time.Now().Add(testhost.Limit(10 * time.Second)); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if left = n.ownerless(t); len(left) == 0 {
			break
		}
	}
	for _, l := range left {
		t.Errorf("nobody owns %s", l)
	}
	again := run(31002, criv1.NamespaceMode_CONTAINER) // its port is free
	n.RemovePod(t, again.pod)
	if q, _ := os.ReadDir(n.Root + "/state/quarantine"); len(q) != 2 {
		t.Errorf("quarantine holds %d records, want 2", len(q))
	}
}
