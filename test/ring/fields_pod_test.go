package ring

import (
	"encoding/json"
	"fmt"
	"maps"
	"net"
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

const (
	podConfig   = "RunPodSandbox.config"
	podLinux    = podConfig + ".linux"
	podSecurity = podLinux + ".security_context"
)

// want compares what two values print.
func want(t testing.TB, what string, got, want any) {
	t.Helper()
	if g, w := fmt.Sprint(got), fmt.Sprint(want); g != w {
		t.Errorf("%s: %s, want %s", what, g, w)
	}
}

// wantJSON compares a value of a verbose answer.
func wantJSON(t testing.TB, what string, got json.RawMessage, want string) {
	t.Helper()
	var v any
	if err := json.Unmarshal(got, &v); err != nil {
		t.Errorf("%s: %v in %q", what, err, got)
		return
	}
	if b := must(json.Marshal(v)); string(b) != want {
		t.Errorf("%s: %s, want %s", what, b, want)
	}
}

// podConfigInfo is the configuration in the pod's verbose status, by key.
func (n *Node) podConfigInfo(t testing.TB, pod string) map[string]json.RawMessage {
	t.Helper()
	var info struct{ Config map[string]json.RawMessage }
	n.podInfo(t, pod, &info)
	return info.Config
}

// limitsOfAll sets every field; limitsInfo is how a verbose status shows them.
func limitsOfAll() *criv1.LinuxContainerResources {
	return &criv1.LinuxContainerResources{
		CpuPeriod: 50000, CpuQuota: 20000, CpuShares: 300, MemoryLimitInBytes: 64 << 20, OomScoreAdj: 77, CpusetCpus: "0", CpusetMems: "0",
		HugepageLimits: []*criv1.HugepageLimit{{PageSize: "2MB", Limit: 4 << 20}}, Unified: map[string]string{"memory.high": "max"}, MemorySwapLimitInBytes: 96 << 20,
	}
}

const limitsInfo = `{"cpu_period":50000,"cpu_quota":20000,"cpu_shares":300,"cpuset_cpus":"0","cpuset_mems":"0",` +
	`"hugepages":[{"limit":4194304,"page_size":"2MB"}],"memory":67108864,"memory_swap":100663296,"oom_score_adj":77,"unified":{"memory.high":"max"}}`

func limitFields(at string) []string {
	return under(at, "cpu_period", "cpu_quota", "cpu_shares", "memory_limit_in_bytes", "oom_score_adj", "cpuset_cpus", "cpuset_mems",
		"hugepage_limits[].page_size", "hugepage_limits[].limit", "unified", "memory_swap_limit_in_bytes")
}

func podChecks() []fieldCheck {
	return slices.Concat(podPlaceChecks(), podPortChecks(), podNamespaceChecks(), podSecurityChecks())
}

func podPlaceChecks() []fieldCheck {
	return []fieldCheck{
		{"pod metadata", "PodSandboxStatus", under(podConfig+".metadata", "name", "uid", "namespace", "attempt"), func(t testing.TB, n *Node) {
			meta := &criv1.PodSandboxMetadata{Name: "fields", Uid: "9b1e", Namespace: "ring", Attempt: 7}
			s := n.PodStatus(t, n.Pod(t, func(c *criv1.PodSandboxConfig) { c.Metadata = meta }))
			want(t, "metadata", s.Metadata, meta)
		}},
		{"pod labels", "PodSandboxStatus and a selector", under(podConfig, "labels", "annotations"), func(t testing.TB, n *Node) {
			labels, notes := map[string]string{"tier": "fields"}, map[string]string{"note": "kept"}
			pod := n.Pod(t, func(c *criv1.PodSandboxConfig) { c.Labels, c.Annotations = labels, notes })
			s := n.PodStatus(t, pod)
			want(t, "labels", s.Labels, labels)
			want(t, "annotations", s.Annotations, notes)
			r, err := n.Runtime.ListPodSandbox(within(t, callTime), &criv1.ListPodSandboxRequest{Filter: &criv1.PodSandboxFilter{LabelSelector: labels}})
			if err != nil || len(r.Items) != 1 || !maps.Equal(r.Items[0].Annotations, notes) {
				t.Errorf("list: %v, %v", r, err)
			}
		}},
		{"host name", "`hostname` in a container", under(podConfig, "hostname"), func(t testing.TB, n *Node) {
			id := n.Run(t, n.Pod(t, func(c *criv1.PodSandboxConfig) { c.Hostname = "named" }), nil)
			want(t, "host name", n.Sh(t, id, "hostname"), "named")
		}},
		{"log folder", "where a container's log is", under(podConfig, "log_directory"), func(t testing.TB, n *Node) {
			dir := n.HostDir(t)
			pod := n.Pod(t, func(c *criv1.PodSandboxConfig) { c.LogDirectory = dir })
			id := n.Run(t, pod, func(c *criv1.ContainerConfig) { c.LogPath = "x.log" })
			want(t, "log path", n.Status(t, id).LogPath, filepath.Join(dir, "x.log"))
		}},
		{"resolv.conf", "/etc/resolv.conf in a container", under(podConfig+".dns_config", "servers", "searches", "options"), func(t testing.TB, n *Node) {
			id := n.Run(t, n.Pod(t, func(c *criv1.PodSandboxConfig) {
				c.DnsConfig = &criv1.DNSConfig{Servers: []string{"192.0.2.53"}, Searches: []string{"a.example"}, Options: []string{"ndots:5"}}
			}), nil)
			want(t, "resolv.conf", n.Sh(t, id, "sort /etc/resolv.conf"), "nameserver 192.0.2.53\noptions ndots:5\nsearch a.example")
		}},
		{"pod cgroup", "/proc/PID/cgroup of a container", under(podLinux, "cgroup_parent"), func(t testing.TB, n *Node) {
			parent := n.Below("burstable", "pod-of-fields")
			id := n.Run(t, n.Pod(t, func(c *criv1.PodSandboxConfig) { c.Linux.CgroupParent = parent }), nil)
			if groups := fmt.Sprint(cgroupsOf(t, n.PID(t, id))); !strings.Contains(groups, parent+"/"+cgroupName(id)) {
				t.Errorf("the container is in %s", groups)
			}
		}},
		{"pod sysctls", "/proc/sys in a container", under(podLinux, "sysctls"), func(t testing.TB, n *Node) {
			id := n.Run(t, n.Pod(t, func(c *criv1.PodSandboxConfig) {
				c.Linux.Sysctls = map[string]string{"net.ipv4.ip_local_port_range": "20000 20999"}
			}), nil)
			want(t, "ports", strings.Fields(n.Sh(t, id, "cat /proc/sys/net/ipv4/ip_local_port_range")), "[20000 20999]")
		}},
		{"pod resources", "PodSandboxStatus, verbose (kubelet itself sets the pod's cgroup)", slices.Concat(limitFields(podLinux+".overhead"), limitFields(podLinux+".resources")), func(t testing.TB, n *Node) {
			c := n.podConfigInfo(t, n.Pod(t, func(c *criv1.PodSandboxConfig) { c.Linux.Overhead, c.Linux.Resources = limitsOfAll(), limitsOfAll() }))
			wantJSON(t, "overhead", c["overhead"], limitsInfo)
			wantJSON(t, "resources", c["resources"], limitsInfo)
		}},
		{"runtime handler", "PodSandboxStatus, and that an unknown one is refused", under("RunPodSandbox", "runtime_handler"), func(t testing.TB, n *Node) {
			run := func(handler string) (string, error) {
				r, err := n.Runtime.RunPodSandbox(within(t, callTime), &criv1.RunPodSandboxRequest{Config: n.PodConfig(), RuntimeHandler: handler})
				return r.GetPodSandboxId(), err
			}
			_, err := run("no-such-handler")
			wantError(t, err, codes.InvalidArgument, "no-such-handler")
			pod, err := run("naru")
			if err != nil {
				t.Fatal(err)
			}
			want(t, "handler", n.PodStatus(t, pod).RuntimeHandler, "naru")
		}},
	}
}

// speaking runs a server in a pod and waits until it answers.
func (n *Node) speaking(t testing.TB, pod string, port int, word string) {
	t.Helper()
	n.Run(t, pod, speaker(port, word))
	wantFetch(t, net.JoinHostPort(n.IPs(t, pod)[0], strconv.Itoa(port)), word)
}

func podPortChecks() []fieldCheck {
	ports := podConfig + ".port_mappings[]"
	return []fieldCheck{
		{"host port", "an answer by the host's port", under(ports, "container_port", "host_port"), func(t testing.TB, n *Node) {
			pod := n.Pod(t, func(c *criv1.PodSandboxConfig) {
				c.PortMappings = []*criv1.PortMapping{{ContainerPort: 80, HostPort: 31080}}
			})
			n.speaking(t, pod, 80, "by-host-port")
			out, err := fetch("127.0.0.1:31080")
			want(t, "answer", strings.TrimSpace(out), "by-host-port")
			want(t, "error", err, nil)
		}},
		{"host address of a port", "that another address does not answer", under(ports, "host_ip"), func(t testing.TB, n *Node) {
			pod := n.Pod(t, func(c *criv1.PodSandboxConfig) {
				c.PortMappings = []*criv1.PortMapping{{ContainerPort: 80, HostPort: 31081, HostIp: nodeIP}}
			})
			n.speaking(t, pod, 80, "by-address")
			out, err := fetch(nodeIP + ":31081")
			if strings.TrimSpace(out) != "by-address" {
				t.Errorf("%q, %v", out, err)
			}
			if out, err := fetch("127.0.0.1:31081"); err == nil {
				t.Errorf("the loopback answers %q", out)
			}
		}},
		{"protocol of a port", "an answer by UDP", under(ports, "protocol"), func(t testing.TB, n *Node) {
			pod := n.Pod(t, func(c *criv1.PodSandboxConfig) {
				c.PortMappings = []*criv1.PortMapping{{Protocol: criv1.Protocol_UDP, ContainerPort: 53, HostPort: 31053}}
			})
			n.echoUDP(t, pod, 53)
			want(t, "UDP", askOnce("127.0.0.1:31053"), nil)
		}},
	}
}

// askOnce asks a UDP server of echoUDP one time.
func askOnce(addr string) error {
	c, err := net.Dial("udp", addr)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(testhost.Limit(2 * time.Second)))
	if _, err := c.Write([]byte("hello")); err != nil {
		return err
	}
	_, err = c.Read(make([]byte, 100))
	return err
}

func podNamespaceChecks() []fieldCheck {
	at := podSecurity + ".namespace_options"
	node := func(set func(*criv1.NamespaceOption), kind string) func(testing.TB, *Node) {
		return func(t testing.TB, n *Node) {
			pod := n.Pod(t, namespaces(set))
			id := n.Run(t, pod, security(func(s *criv1.LinuxContainerSecurityContext) { s.NamespaceOptions = &criv1.NamespaceOption{} }))
			want(t, "namespace", n.Sh(t, id, "readlink /proc/self/ns/"+kind), nsOf(t, kind))
		}
	}
	const sees = "/proc/self/ns in a container"
	return []fieldCheck{
		{"host network", sees, under(at, "network"), node(func(o *criv1.NamespaceOption) { o.Network = criv1.NamespaceMode_NODE }, "net")},
		{"host IPC", sees, under(at, "ipc"), node(func(o *criv1.NamespaceOption) { o.Ipc = criv1.NamespaceMode_NODE }, "ipc")},
		{"host PID", sees, under(at, "pid"), node(func(o *criv1.NamespaceOption) { o.Pid = criv1.NamespaceMode_NODE }, "pid")},
		{"no user namespace", "that mode NODE needs no mappings", under(at, "userns_options.mode"), func(t testing.TB, n *Node) {
			pod := n.Pod(t, namespaces(func(o *criv1.NamespaceOption) { o.UsernsOptions = &criv1.UserNamespace{Mode: criv1.NamespaceMode_NODE} }))
			want(t, "namespace", n.Sh(t, n.Run(t, pod, nil), "readlink /proc/self/ns/user"), nsOf(t, "user"))
		}},
		{
			"user namespace", "/proc/self/uid_map and gid_map in a container",
			under(at+".userns_options", "uids[].host_id", "uids[].length", "gids[].host_id", "gids[].length"),
			func(t testing.TB, n *Node) {
				id := n.Run(t, n.Pod(t, userns(3<<20)), nil)
				want(t, "maps", strings.Fields(n.Sh(t, id, "cat /proc/self/uid_map /proc/self/gid_map")), "[0 3145728 65536 0 3145728 65536]")
			},
		},
		{
			"user namespace without root", "that a mapping must begin with container ID 0",
			under(at+".userns_options", "uids[].container_id", "gids[].container_id"),
			func(t testing.TB, n *Node) {
				for _, ids := range [][2]uint32{{1, 0}, {0, 1}} {
					_, err := n.TryPod(t, namespaces(func(o *criv1.NamespaceOption) {
						o.UsernsOptions = &criv1.UserNamespace{
							Uids: []*criv1.IDMapping{{HostId: 3 << 20, ContainerId: ids[0], Length: 65536}},
							Gids: []*criv1.IDMapping{{HostId: 3 << 20, ContainerId: ids[1], Length: 65536}},
						}
					}))
					wantError(t, err, codes.InvalidArgument, "userns_options")
				}
			},
		},
	}
}

func podSecurityChecks() []fieldCheck {
	const kept = "PodSandboxStatus, verbose (a sandbox has no process that it could be for)"
	secure := func(f func(*criv1.LinuxSandboxSecurityContext)) func(*criv1.PodSandboxConfig) {
		return func(c *criv1.PodSandboxConfig) { f(c.Linux.SecurityContext) }
	}
	return []fieldCheck{
		{"privileged pod", "that a privileged container may be in it", under(podSecurity, "privileged"), func(t testing.TB, n *Node) {
			id := n.Run(t, n.Pod(t, privilegedPod), security(func(s *criv1.LinuxContainerSecurityContext) { s.Privileged = true }))
			n.Sh(t, id, "mount -t tmpfs tmpfs /mnt")
		}},
		{
			"pod security", kept,
			append(under(podSecurity, "run_as_user.value", "run_as_group.value", "readonly_rootfs", "supplemental_groups", "supplemental_groups_policy",
				"seccomp.profile_type", "seccomp.localhost_ref", "apparmor.profile_type", "apparmor.localhost_ref"),
				under(podSecurity+".selinux_options", "user", "role", "type", "level")...),
			func(t testing.TB, n *Node) {
				pod := n.Pod(t, secure(func(s *criv1.LinuxSandboxSecurityContext) {
					s.RunAsUser, s.RunAsGroup, s.ReadonlyRootfs = &criv1.Int64Value{Value: 5}, &criv1.Int64Value{Value: 6}, true
					s.SupplementalGroups, s.SupplementalGroupsPolicy = []int64{7, 8}, criv1.SupplementalGroupsPolicy_Strict
					s.Seccomp = &criv1.SecurityProfile{ProfileType: criv1.SecurityProfile_Localhost, LocalhostRef: "/seccomp.json"}
					s.Apparmor = &criv1.SecurityProfile{ProfileType: criv1.SecurityProfile_Localhost, LocalhostRef: "profile"}
					s.SelinuxOptions = &criv1.SELinuxOption{User: "u", Role: "r", Type: "t", Level: "l"}
				}))
				wantJSON(t, "security", n.podConfigInfo(t, pod)["security"], `{"apparmor":{"ref":"profile","type":"Localhost"},"groups_policy_strict":true,`+
					`"readonly_rootfs":true,"run_as_group":6,"run_as_user":5,"seccomp":{"ref":"/seccomp.json","type":"Localhost"},`+
					`"selinux":{"Level":"l","Role":"r","Type":"t","User":"u"},"supplemental_groups":[7,8]}`)
			},
		},
	}
}
