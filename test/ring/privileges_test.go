package ring

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// defaultCaps is the set that a container has when nothing was said.
const defaultCaps = 0x00000000a80425fb

// fileCaps is the extended attribute for cap_net_raw, optionally permitted, with
// the inheritable flag as asked (linux/capability.h, VFS_CAP_REVISION_2).
func fileCaps(permitted, inheritable uint32) string {
	var b [20]byte
	binary.LittleEndian.PutUint32(b[0:], 0x02000001) // with the effective flag
	binary.LittleEndian.PutUint32(b[4:], permitted)
	binary.LittleEndian.PutUint32(b[8:], inheritable)
	return string(b[:])
}

func asUser(uid int64) func(*criv1.ContainerConfig) {
	return func(c *criv1.ContainerConfig) { c.Linux.SecurityContext.RunAsUser = &criv1.Int64Value{Value: uid} }
}

// everyWay runs evil with the arguments as a container's first process, and by
// ExecSync and Exec in a running container, and gives what it printed.
func (n *Node) everyWay(t *testing.T, pod string, mutate func(*criv1.ContainerConfig), program ...string) map[string]map[string]string {
	t.Helper()
	outputs := map[string]map[string]string{}
	out, _ := n.Output(t, pod, func(c *criv1.ContainerConfig) {
		if mutate != nil {
			mutate(c)
		}
		c.Command = program
	})
	outputs["create"] = facts(out)
	id := n.Run(t, pod, mutate)
	out, errOut, _ := n.Exec(t, id, program...)
	if !strings.Contains(out, "end") {
		t.Fatalf("exec of %v: %s%s", program, out, errOut)
	}
	outputs["exec"] = facts(out)
	s := n.execStream(t, id, streamOptions{}, program...)
	if code := s.exitCode(); code != 0 || !strings.Contains(s.out.String(), "end") {
		t.Fatalf("streamed exec of %v: %d, %s%s", program, code, s.out.String(), s.err.String())
	}
	outputs["stream"] = facts(s.out.String())
	s.close()
	if _, ok := outputs["create"]["end"]; !ok {
		t.Fatalf("%v as first process: %v", program, outputs["create"])
	}
	n.Remove(t, id)
	return outputs
}

// TestN09_InheritableIsEmpty: no process has inheritable or ambient
// capabilities, so that a program file with inheritable ones gains nothing.
func TestN09_InheritableIsEmpty(t *testing.T) {
	n := StartNode(t)
	evil := mustRead(t, evilBin)
	image := n.Image(t, ImageConfig{},
		Entry{Name: "bin/evil-ei", Mode: 0o755, Data: evil, PAX: map[string]string{"SCHILY.xattr.security.capability": fileCaps(0, 1<<unix.CAP_NET_RAW)}},
		Entry{Name: "bin/evil-ep", Mode: 0o755, Data: evil, PAX: map[string]string{"SCHILY.xattr.security.capability": fileCaps(1<<unix.CAP_NET_RAW, 0)}})
	plain, privileged := n.Pod(t, nil), n.Pod(t, privilegedPod)
	for _, uid := range []int64{0, 1000} {
		for _, kind := range []string{"plain", "privileged", "all"} {
			pod, bound := plain, uint64(defaultCaps)
			config := func(c *criv1.ContainerConfig) {
				c.Image.Image = image
				asUser(uid)(c)
				switch kind {
				case "privileged":
					c.Linux.SecurityContext.Privileged = true
				case "all":
					addCaps("ALL")(c)
				}
			}
			if kind == "privileged" {
				pod = privileged
			}
			if kind != "plain" {
				bound = ^uint64(0)
			}
			created := uint64(0)
			for way, m := range n.everyWay(t, pod, config, "/bin/evil", "ids") {
				what := fmt.Sprintf("uid %d, %s, %s", uid, kind, way)
				if inh, amb := capSet(t, m, "CapInh"), capSet(t, m, "CapAmb"); inh != 0 || amb != 0 {
					t.Errorf("%s: inheritable %x, ambient %x", what, inh, amb)
				}
				eff, prm, bnd := capSet(t, m, "CapEff"), capSet(t, m, "CapPrm"), capSet(t, m, "CapBnd")
				if uid != 0 && eff|prm != 0 {
					t.Errorf("%s: effective %x, permitted %x", what, eff, prm)
				}
				if uid == 0 && (eff == 0 || prm != eff) {
					t.Errorf("%s: effective %x, permitted %x", what, eff, prm)
				}
				if bnd&^bound != 0 || (created != 0 && created != bnd) {
					t.Errorf("%s: bounding set %x; allowed %x, of the other way %x", what, bnd, bound, created)
				}
				created = bnd
			}
			if uid == 0 {
				continue
			}
			for way, m := range n.everyWay(t, pod, config, "/bin/evil-ei", "ids") {
				if v := capSet(t, m, "CapPrm"); v != 0 {
					t.Errorf("uid 1000, %s, %s: a program with inheritable capabilities gained %x", kind, way, v)
				}
			}
			// Without this the test above would prove nothing.
			for way, m := range n.everyWay(t, pod, config, "/bin/evil-ep", "ids") {
				if v := capSet(t, m, "CapPrm"); v != 1<<unix.CAP_NET_RAW {
					t.Errorf("uid 1000, %s, %s: a program with permitted capabilities has %x: are file capabilities lost?", kind, way, v)
				}
			}
		}
	}
}

func privilegedPod(c *criv1.PodSandboxConfig) { c.Linux.SecurityContext.Privileged = true }

func mustRead(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestN10_NoAmbientCapabilities: who is not root has none of the added
// capabilities, unless ambient ones were asked for by name.
func TestN10_NoAmbientCapabilities(t *testing.T) {
	n := StartNode(t)
	pod := n.Pod(t, nil)
	for _, caps := range []*criv1.Capability{nil, {AddCapabilities: []string{"NET_BIND_SERVICE", "SYS_ADMIN"}}, {AddCapabilities: []string{"ALL"}}} {
		ways := n.everyWay(t, pod, func(c *criv1.ContainerConfig) {
			asUser(1000)(c)
			c.Linux.SecurityContext.Capabilities = caps
		}, "/bin/evil", "ids")
		for way, m := range ways {
			for _, set := range []string{"CapEff", "CapPrm", "CapAmb", "CapInh"} {
				if v := capSet(t, m, set); v != 0 {
					t.Errorf("%v, %s: %s is %x", caps, way, set, v)
				}
			}
			if caps != nil && capSet(t, m, "CapBnd")&(1<<unix.CAP_SYS_ADMIN) == 0 {
				t.Errorf("%v, %s: the bounding set lacks what was added: %x", caps, way, capSet(t, m, "CapBnd"))
			}
		}
	}
	ways := n.everyWay(t, pod, func(c *criv1.ContainerConfig) {
		asUser(1000)(c)
		c.Linux.SecurityContext.Capabilities = &criv1.Capability{AddCapabilities: []string{"NET_BIND_SERVICE"}, AddAmbientCapabilities: []string{"NET_BIND_SERVICE"}}
	}, "/bin/evil", "ids")
	for way, m := range ways {
		const want = 1 << unix.CAP_NET_BIND_SERVICE
		if e, a := capSet(t, m, "CapEff"), capSet(t, m, "CapAmb"); e != want || a != want {
			t.Errorf("ambient asked for, %s: effective %x, ambient %x", way, e, a)
		}
	}
}

// TestN11_NoNewPrivileges: with no_new_privs neither a set-user-ID program nor
// one with file capabilities gains anything; without it the seccomp filter is
// loaded all the same.
func TestN11_NoNewPrivileges(t *testing.T) {
	n := StartNode(t)
	evil := mustRead(t, evilBin)
	image := n.Image(t, ImageConfig{}, Entry{Name: "bin/evil-suid", Mode: 0o4755, Data: evil},
		Entry{Name: "bin/evil-ep", Mode: 0o755, Data: evil, PAX: map[string]string{"SCHILY.xattr.security.capability": fileCaps(1<<unix.CAP_NET_RAW, 0)}})
	pod := n.Pod(t, nil)
	for _, nnp := range []bool{true, false} {
		config := func(c *criv1.ContainerConfig) {
			c.Image.Image = image
			asUser(1000)(c)
			c.Linux.SecurityContext.NoNewPrivs = nnp
			c.Linux.SecurityContext.Seccomp = &criv1.SecurityProfile{ProfileType: criv1.SecurityProfile_RuntimeDefault}
		}
		want, uids, caps := "0", "1000 0 0", uint64(1<<unix.CAP_NET_RAW)
		if nnp {
			want, uids, caps = "1", "1000 1000 1000", 0
		}
		for way, m := range n.everyWay(t, pod, config, "/bin/evil", "ids") {
			if m["NoNewPrivs"] != want || m["Seccomp"] != "2" || m["uids"] != "1000 1000 1000" {
				t.Errorf("no_new_privs=%v, %s: %v", nnp, way, m)
			}
		}
		for way, m := range n.everyWay(t, pod, config, "/bin/evil-suid", "ids") {
			if m["uids"] != uids {
				t.Errorf("no_new_privs=%v, %s: the set-user-ID program runs as %s", nnp, way, m["uids"])
			}
		}
		for way, m := range n.everyWay(t, pod, config, "/bin/evil-ep", "ids") {
			if v := capSet(t, m, "CapPrm"); v != caps {
				t.Errorf("no_new_privs=%v, %s: the program with file capabilities has %x", nnp, way, v)
			}
		}
	}
}

// TestN12_DefaultSeccomp: the kernel interfaces that attacks begin with are
// refused by the default filter, in the container and in an exec.
func TestN12_DefaultSeccomp(t *testing.T) {
	n := StartNode(t)
	pod := n.Pod(t, nil)
	refused := map[string]string{
		"socket_alg": "EPERM", "socket_vsock": "EPERM", "socket_rxrpc": "EPERM", "socket_key": "EPERM", "socket_xfrm": "EPERM", "x32_getpid": "ENOSYS", "unshare_user": "EPERM", "unshare_ns": "EPERM", "clone_user": "EPERM", "clone_ns": "EPERM", "clone3": "ENOSYS",
		"bpf": "EPERM", "perf_event_open": "EPERM", "userfaultfd": "EPERM", "io_uring_setup": "EPERM", "io_uring_enter": "EPERM", "keyctl": "EPERM", "add_key": "EPERM",
		"request_key": "EPERM", "open_by_handle_at": "EPERM", "mount": "EPERM", "umount2": "EPERM", "pivot_root": "EPERM", "fsopen": "EPERM", "open_tree": "EPERM",
		"move_mount": "EPERM", "mount_setattr": "EPERM", "setns": "EPERM", "kexec_load": "EPERM", "init_module": "EPERM", "finit_module": "EPERM", "delete_module": "EPERM",
		"reboot": "EPERM", "swapon": "EPERM", "acct": "EPERM", "quotactl": "EPERM", "lookup_dcookie": "EPERM", "settimeofday": "EPERM",
		// These are not the filter's work but the kernel's, which must not be in the way of it.
		"ptrace_other_uid": "EPERM", "process_vm_readv_other_uid": "EPERM", "process_vm_writev_other_uid": "EPERM",
	}
	for _, family := range []int{unix.AF_ALG, unix.AF_VSOCK, unix.AF_RXRPC, unix.AF_KEY, unix.AF_XDP, 63} { // with families between that are allowed
		refused[fmt.Sprintf("socketfamily_%d", family)] = "EPERM"
	}
	allowed := map[string]string{"socketfamily_37": "EAFNOSUPPORT", "socket_inet": "OK", "socket_unix": "OK", "socket_route": "OK", "unknown_600": "ENOSYS", "unknown_4000": "ENOSYS"}
	ways := n.everyWay(t, pod, func(c *criv1.ContainerConfig) {
		c.Linux.SecurityContext.Seccomp = &criv1.SecurityProfile{ProfileType: criv1.SecurityProfile_RuntimeDefault}
	}, "/bin/evil", "probe")
	for way, m := range ways {
		for _, set := range []map[string]string{refused, allowed} {
			for call, want := range set {
				if m[call] != want {
					t.Errorf("%s: %s gives %s, want %s", way, call, m[call], want)
				}
			}
		}
	}
	// Without a filter the same program gets elsewhere: the probe is real.
	bare := n.everyWay(t, pod, func(c *criv1.ContainerConfig) {
		c.Linux.SecurityContext.Seccomp = &criv1.SecurityProfile{ProfileType: criv1.SecurityProfile_Unconfined}
	}, "/bin/evil", "probe")
	for way, m := range bare {
		if m["socket_vsock"] == "EPERM" || m["clone3"] == "ENOSYS" || m["unshare_user"] != "OK" {
			t.Errorf("%s, unconfined: vsock %s, clone3 %s, unshare_user %s", way, m["socket_vsock"], m["clone3"], m["unshare_user"])
		}
	}
}

// TestN14_SeccompProfiles: a profile that cannot be applied is an error, never
// a container without a filter.
func TestN14_SeccompProfiles(t *testing.T) {
	n := StartNode(t)
	pod := n.Pod(t, nil)
	dir := n.HostDir(t)
	write := func(name, text string) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return p
	}
	if err := unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	for what, ref := range map[string]string{
		"empty name": "", "missing file": filepath.Join(dir, "none"), "relative": "../../etc/passwd", "climbing": dir + "/../../../etc/passwd",
		"no JSON": write("text", "hello"), "half JSON": write("half", `{"defaultAction": "SCMP_ACT_ALLOW"`), "empty file": write("empty", ""),
		"64 MiB":         write("huge", `{"defaultAction":"SCMP_ACT_ERRNO","x":"`+strings.Repeat("x", 64<<20)+`"}`),
		"unknown action": write("action", `{"defaultAction":"SCMP_ACT_MAYBE"}`), "unknown arch": write("arch", `{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_TOASTER"]}`),
		"folder": dir, "fifo": filepath.Join(dir, "fifo"), "device": "/dev/zero", "no default": write("nodefault", `{"syscalls":[]}`),
	} {
		n.refused(t, pod, what, func(c *criv1.ContainerConfig) {
			c.Linux.SecurityContext.Seccomp = &criv1.SecurityProfile{ProfileType: criv1.SecurityProfile_Localhost, LocalhostRef: ref}
		})
	}
	// Nothing asked for is none, as docs/security.md says.
	for way, m := range n.everyWay(t, pod, nil, "/bin/evil", "ids") {
		if m["Seccomp"] != "0" {
			t.Errorf("no profile asked for, %s: Seccomp: %s", way, m["Seccomp"])
		}
	}
	good := write("good", `{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO","errnoRet":95}]}`)
	for what, p := range map[string]*criv1.SecurityProfile{
		"default":   {ProfileType: criv1.SecurityProfile_RuntimeDefault},
		"localhost": {ProfileType: criv1.SecurityProfile_Localhost, LocalhostRef: good},
	} {
		config := func(c *criv1.ContainerConfig) { c.Linux.SecurityContext.Seccomp = p }
		for way, m := range n.everyWay(t, pod, config, "/bin/evil", "ids") {
			if m["Seccomp"] != "2" {
				t.Errorf("%s, %s: Seccomp: %s", what, way, m["Seccomp"])
			}
		}
		if what == "localhost" {
			id := n.Run(t, pod, config)
			if _, errOut, code := n.Exec(t, id, "/bin/mkdir", "/x"); code == 0 || !strings.Contains(errOut, "not supported") {
				t.Errorf("mkdir under the profile: %d %q", code, errOut)
			}
		}
	}
}
