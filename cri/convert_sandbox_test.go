package cri

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/testing/protocmp"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/pod"
)

// fullSandbox is a config with everything set.
func fullSandbox() *criv1.PodSandboxConfig {
	return &criv1.PodSandboxConfig{
		Metadata:     &criv1.PodSandboxMetadata{Name: "web", Uid: "u-1", Namespace: "shop", Attempt: 2},
		Hostname:     "web-0",
		LogDirectory: "/var/log/pods/shop_web_u-1",
		DnsConfig:    &criv1.DNSConfig{Servers: []string{"10.0.0.10"}, Searches: []string{"svc"}, Options: []string{"ndots:5"}},
		PortMappings: []*criv1.PortMapping{
			{Protocol: criv1.Protocol_UDP, ContainerPort: 53, HostPort: 5353, HostIp: "127.0.0.1"},
			{ContainerPort: 80},
		},
		Labels:      map[string]string{"app": "web", "": "odd\x00 yet theirs"},
		Annotations: map[string]string{"a/b": "c\nd"},
		Linux: &criv1.LinuxPodSandboxConfig{
			CgroupParent: "/kubepods/pod1",
			Sysctls:      map[string]string{"net.core.somaxconn": "1024", "net/ipv4/ip_unprivileged_port_start": "0"},
			Overhead:     &criv1.LinuxContainerResources{MemoryLimitInBytes: 1},
			Resources:    &criv1.LinuxContainerResources{CpuShares: 2},
			SecurityContext: &criv1.LinuxSandboxSecurityContext{
				RunAsUser: &criv1.Int64Value{Value: 7}, RunAsGroup: &criv1.Int64Value{Value: 8},
				SupplementalGroups:       []int64{9},
				SupplementalGroupsPolicy: criv1.SupplementalGroupsPolicy_Strict,
				Seccomp:                  &criv1.SecurityProfile{ProfileType: criv1.SecurityProfile_RuntimeDefault},
				SeccompProfilePath:       "unconfined", // deprecated, not looked at
				NamespaceOptions: &criv1.NamespaceOption{
					Pid: criv1.NamespaceMode_CONTAINER,
					UsernsOptions: &criv1.UserNamespace{
						Uids: []*criv1.IDMapping{{HostId: 65536, Length: 65536}},
						Gids: []*criv1.IDMapping{{HostId: 65536, Length: 65536}},
					},
				},
			},
		},
	}
}

func TestRunPodSandbox(t *testing.T) {
	s, pods, _ := newTestServer()
	c := runtimeClient(t, s)
	in := fullSandbox()
	out, err := c.RunPodSandbox(t.Context(), &criv1.RunPodSandboxRequest{Config: in, RuntimeHandler: "naru"})
	if err != nil {
		t.Fatal(err)
	}
	if len(out.PodSandboxId) != 64 {
		t.Errorf("id %q", out.PodSandboxId)
	}
	u, g := int64(7), int64(8)
	idmap := []pod.IDMap{{HostID: 65536, Size: 65536}}
	want := &pod.SandboxConfig{
		Metadata: pod.Metadata{Name: "web", UID: "u-1", Namespace: "shop", Attempt: 2},
		Hostname: "web-0", LogDirectory: "/var/log/pods/shop_web_u-1",
		DNS: pod.DNS{Servers: []string{"10.0.0.10"}, Searches: []string{"svc"}, Options: []string{"ndots:5"}},
		Ports: []pod.PortMapping{
			{Protocol: "udp", ContainerPort: 53, HostPort: 5353, HostIP: netip.MustParseAddr("127.0.0.1")},
			{Protocol: "tcp", ContainerPort: 80},
		},
		Labels: in.Labels, Annotations: in.Annotations,
		CgroupParent: "/kubepods/pod1",
		Sysctls:      in.Linux.Sysctls,
		Overhead:     &pod.Resources{Memory: 1},
		Resources:    &pod.Resources{CPUShares: 2},
		Network:      "pod", IPC: "pod", PID: "container",
		UIDMap: idmap, GIDMap: idmap,
		Security: pod.Security{
			RunAsUser: &u, RunAsGroup: &g, SupplementalGroups: []int64{9}, GroupsPolicyStrict: true,
			Seccomp: pod.Profile{Type: "RuntimeDefault"},
		},
		Handler: "naru",
	}
	if diff := cmp.Diff(want, pods.sandbox, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Error(diff)
	}

	// And back: what kubelet compares must be what it sent.
	st := sandboxStatus(&pod.Pod{ID: "x", Config: pods.sandbox, Phase: pod.PhaseReady, CreatedAt: time.Unix(3, 4)})
	if diff := cmp.Diff(&criv1.PodSandboxStatus{
		Id: "x", Metadata: in.Metadata, State: criv1.PodSandboxState_SANDBOX_READY, CreatedAt: time.Unix(3, 4).UnixNano(),
		Network: &criv1.PodSandboxNetworkStatus{},
		Linux:   &criv1.LinuxPodSandboxStatus{Namespaces: &criv1.Namespace{Options: in.Linux.SecurityContext.NamespaceOptions}},
		Labels:  in.Labels, Annotations: in.Annotations, RuntimeHandler: "naru",
	}, st, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
}

func TestBareSandbox(t *testing.T) {
	s, pods, _ := newTestServer()
	_, err := s.RunPodSandbox(t.Context(), &criv1.RunPodSandboxRequest{Config: &criv1.PodSandboxConfig{Metadata: &criv1.PodSandboxMetadata{Name: "n"}}})
	if err != nil {
		t.Fatal(err)
	}
	want := &pod.SandboxConfig{
		Metadata: pod.Metadata{Name: "n"}, Network: "pod", IPC: "pod", PID: "pod",
		Security: pod.Security{Seccomp: pod.Profile{Type: pod.ProfileUnconfined}}, // critest: nil is unconfined
	}
	if diff := cmp.Diff(want, pods.sandbox); diff != "" {
		t.Error(diff)
	}
}

func TestBadSandboxes(t *testing.T) {
	type config = criv1.PodSandboxConfig
	ns := func(c *config) *criv1.NamespaceOption { return c.Linux.SecurityContext.NamespaceOptions }
	userns := func(c *config) *criv1.UserNamespace { return ns(c).UsernsOptions }
	tests := []struct {
		name   string
		change func(*config)
		want   string // in the error's text
	}{
		{"no metadata", func(c *config) { c.Metadata = nil }, "metadata.name"},
		{"no name", func(c *config) { c.Metadata.Name = "" }, "metadata.name"},
		{"name of two lines", func(c *config) { c.Metadata.Name = "a\nb" }, "metadata.name"},
		{"hostname of two lines", func(c *config) { c.Hostname = "a\n127.0.0.1 evil" }, "hostname"},
		{"long hostname", func(c *config) { c.Hostname = strings.Repeat("a", 65) }, "hostname"},
		{"relative log folder", func(c *config) { c.LogDirectory = "var/log" }, "log_directory"},
		{"climbing log folder", func(c *config) { c.LogDirectory = "/var/log/pods/../../etc" }, "log_directory"},
		{"DNS server of two lines", func(c *config) { c.DnsConfig.Servers[0] = "1.1.1.1\noptions debug" }, "dns_config.servers"},
		{"DNS search of two lines", func(c *config) { c.DnsConfig.Searches[0] = "a\rb" }, "dns_config.searches"},
		{"DNS option of two lines", func(c *config) { c.DnsConfig.Options[0] = "a\x00" }, "dns_config.options"},
		{"nil port", func(c *config) { c.PortMappings[0] = nil }, "port_mappings"},
		{"protocol", func(c *config) { c.PortMappings[0].Protocol = 9 }, "protocol 9"},
		{"container port", func(c *config) { c.PortMappings[0].ContainerPort = 65536 }, "container_port"},
		{"host port", func(c *config) { c.PortMappings[0].HostPort = -1 }, "host_port"},
		{"host port alone", func(c *config) { c.PortMappings[0].ContainerPort = 0 }, "container_port"},
		{"host IP", func(c *config) { c.PortMappings[0].HostIp = "localhost" }, "host_ip"},
		{"host IP with zone", func(c *config) { c.PortMappings[0].HostIp = "fe80::1%eth0" }, "host_ip"},
		{"cgroup parent", func(c *config) { c.Linux.CgroupParent = "/a/../../b" }, "cgroup_parent"},
		{"sysctl name", func(c *config) { c.Linux.Sysctls = map[string]string{"net/../../kernel": "1"} }, "sysctls"},
		{"sysctl without a dot", func(c *config) { c.Linux.Sysctls = map[string]string{"x": "1"} }, "sysctls"},
		{"sysctl value", func(c *config) { c.Linux.Sysctls = map[string]string{"net.a": "1\n2"} }, "sysctls"},
		{"overhead", func(c *config) { c.Linux.Overhead.CpuPeriod = -1 }, "overhead.cpu_period"},
		{"resources", func(c *config) { c.Linux.Resources.OomScoreAdj = 1001 }, "resources.oom_score_adj"},
		{"group without user", func(c *config) { c.Linux.SecurityContext.RunAsUser = nil }, "run_as_group"},
		{"user", func(c *config) { c.Linux.SecurityContext.RunAsUser.Value = 1<<32 - 1 }, "run_as_user"},
		{"supplemental group", func(c *config) { c.Linux.SecurityContext.SupplementalGroups[0] = -1 }, "supplemental_groups"},
		{"groups policy", func(c *config) { c.Linux.SecurityContext.SupplementalGroupsPolicy = 7 }, "supplemental_groups_policy"},
		{"seccomp type", func(c *config) { c.Linux.SecurityContext.Seccomp.ProfileType = 7 }, "seccomp.profile_type"},
		{"network CONTAINER", func(c *config) { ns(c).Network = criv1.NamespaceMode_CONTAINER }, "network CONTAINER"},
		{"network TARGET", func(c *config) { ns(c).Network = criv1.NamespaceMode_TARGET }, "network TARGET"},
		{"ipc CONTAINER", func(c *config) { ns(c).Ipc = criv1.NamespaceMode_CONTAINER }, "ipc CONTAINER"},
		{"pid TARGET", func(c *config) { ns(c).Pid = criv1.NamespaceMode_TARGET }, "pid TARGET"},
		{"pid 99", func(c *config) { ns(c).Pid = 99 }, "pid 99"},
		{"userns CONTAINER", func(c *config) { userns(c).Mode = criv1.NamespaceMode_CONTAINER }, "userns_options.mode"},
		{"userns TARGET", func(c *config) { userns(c).Mode = criv1.NamespaceMode_TARGET }, "userns_options.mode"},
		{"userns NODE with mappings", func(c *config) { userns(c).Mode = criv1.NamespaceMode_NODE }, "without mappings"},
		{"userns without gids", func(c *config) { userns(c).Gids = nil }, "exactly one"},
		{"userns two mappings", func(c *config) {
			userns(c).Uids = append(userns(c).Uids, &criv1.IDMapping{ContainerId: 65536, HostId: 300000, Length: 1})
		}, "exactly one"},
		{"userns nil mapping", func(c *config) { userns(c).Uids[0] = nil }, "nil entry"},
		{"userns length 0", func(c *config) { userns(c).Uids[0].Length = 0 }, "length 0"},
		{"userns overflow", func(c *config) { userns(c).Uids[0].HostId = 4294967295; userns(c).Uids[0].Length = 2 }, "beyond the last ID"},
		{"userns host ID -1", func(c *config) { userns(c).Uids[0].HostId = 4294967295; userns(c).Uids[0].Length = 1 }, "beyond the last ID"},
		{"userns whole range", func(c *config) { userns(c).Uids[0].HostId = 1; userns(c).Uids[0].Length = 4294967295 }, "beyond the last ID"},
		{"userns maps differ", func(c *config) { userns(c).Gids[0].HostId++ }, "differ"},
		{"userns root not mapped", func(c *config) { userns(c).Uids[0].ContainerId = 1; userns(c).Gids[0].ContainerId = 1 }, "container ID 0"},
		{"userns root is root", func(c *config) { userns(c).Uids[0].HostId = 0; userns(c).Gids[0].HostId = 0 }, "host root"},
		{"userns with hostPID", func(c *config) { ns(c).Pid = criv1.NamespaceMode_NODE }, "PID or IPC"},
		{"userns with hostIPC", func(c *config) { ns(c).Ipc = criv1.NamespaceMode_NODE }, "PID or IPC"},
	}
	s, pods, _ := newTestServer()
	for _, tt := range tests {
		c := fullSandbox()
		tt.change(c)
		_, err := s.RunPodSandbox(t.Context(), &criv1.RunPodSandboxRequest{Config: c})
		if !errs.Is(err, errs.InvalidArgument) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want InvalidArgument about %s", tt.name, err, tt.want)
		}
	}
	if pods.sandbox != nil {
		t.Error("a bad request reached the manager")
	}
	if _, err := s.RunPodSandbox(t.Context(), &criv1.RunPodSandboxRequest{Config: fullSandbox(), RuntimeHandler: "kata"}); !errs.Is(err, errs.InvalidArgument) {
		t.Errorf("unknown handler: %v", err)
	}
	s.host.UserNamespaces = false
	if _, err := s.RunPodSandbox(t.Context(), &criv1.RunPodSandboxRequest{Config: fullSandbox()}); !errs.Is(err, errs.InvalidArgument) {
		t.Errorf("userns on a host without: %v", err)
	}
	s.host.UserNamespaces, s.host.UserNamespacesHostNetwork = true, false
	c := fullSandbox()
	ns(c).Network = criv1.NamespaceMode_NODE
	if _, err := s.RunPodSandbox(t.Context(), &criv1.RunPodSandboxRequest{Config: c}); !errs.Is(err, errs.InvalidArgument) {
		t.Errorf("userns with the host's network on a host without: %v", err)
	}
}

func TestIdempotentStopAndRemove(t *testing.T) {
	s, pods, _ := newTestServer()
	c := runtimeClient(t, s)
	calls := map[string]func(id string) error{
		"StopPodSandbox": func(id string) error {
			_, err := c.StopPodSandbox(t.Context(), &criv1.StopPodSandboxRequest{PodSandboxId: id})
			return err
		},
		"RemovePodSandbox": func(id string) error {
			_, err := c.RemovePodSandbox(t.Context(), &criv1.RemovePodSandboxRequest{PodSandboxId: id})
			return err
		},
		"StopContainer": func(id string) error {
			_, err := c.StopContainer(t.Context(), &criv1.StopContainerRequest{ContainerId: id})
			return err
		},
		"RemoveContainer": func(id string) error {
			_, err := c.RemoveContainer(t.Context(), &criv1.RemoveContainerRequest{ContainerId: id})
			return err
		},
	}
	for name, call := range calls {
		if err := call("absent"); err != nil {
			t.Errorf("%s of an unknown ID: %v", name, err)
		}
	}
	pods.err["StopSandbox"] = errs.New(errs.Unavailable, "busy")
	pods.err["StopContainer"] = errs.New(errs.DeadlineExceeded, "slow")
	if err := calls["StopPodSandbox"]("p"); status.Code(err) != codes.Unavailable {
		t.Errorf("another error: %v", err)
	}
	if err := calls["StopContainer"]("c"); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("another error: %v", err)
	}
}

func TestSandboxStatusNetwork(t *testing.T) {
	ips := []netip.Addr{netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::2"), netip.MustParseAddr("fd00::3")}
	p := podWithIPs(ips)
	n := sandboxStatus(p).Network
	if n.Ip != "10.0.0.2" || len(n.AdditionalIps) != 2 || n.AdditionalIps[1].Ip != "fd00::3" {
		t.Errorf("%v", n)
	}
	host := podWithIPs(ips)
	host.Config = &pod.SandboxConfig{Network: pod.ModeNode}
	if n := sandboxStatus(host).Network; n.Ip != "" || len(n.AdditionalIps) != 0 {
		t.Errorf("host network: %v", n)
	}
	stopped := podWithIPs(ips)
	stopped.Phase = pod.PhaseStopped
	if st := sandboxStatus(stopped); st.Network.GetIp() != "" || st.State != criv1.PodSandboxState_SANDBOX_NOTREADY {
		t.Errorf("stopped: %v", st)
	}
	if st := sandboxStatus(&pod.Pod{ID: "x"}); st.Metadata == nil || st.Linux.Namespaces.Options == nil || st.Network == nil {
		t.Errorf("without config: %v", st)
	}
}

func TestSandboxListIsStableAndFiltered(t *testing.T) {
	s, pods, _ := newTestServer()
	c := runtimeClient(t, s)
	delete(pods.pods, "p")
	for i, id := range []string{"z", "y", "x", "w"} { // z is the oldest
		phase := pod.PhaseReady
		if i%2 == 1 {
			phase = pod.PhaseStopped
		}
		pods.pods[id] = &pod.Pod{ID: id, Phase: phase, CreatedAt: time.Unix(int64(i), 0), Config: &pod.SandboxConfig{Labels: map[string]string{"i": id}}}
	}
	list := func(f *criv1.PodSandboxFilter) string {
		out, err := c.ListPodSandbox(t.Context(), &criv1.ListPodSandboxRequest{Filter: f})
		if err != nil {
			t.Fatal(err)
		}
		st, err := c.StreamPodSandboxes(t.Context(), &criv1.StreamPodSandboxesRequest{Filter: f})
		if err != nil {
			t.Fatal(err)
		}
		var streamed []*criv1.PodSandbox
		for {
			m, err := st.Recv()
			if err != nil {
				break
			}
			streamed = append(streamed, m.PodSandboxes...)
		}
		if diff := cmp.Diff(out.Items, streamed, protocmp.Transform()); diff != "" && len(out.Items) > 0 {
			t.Errorf("list and stream differ: %s", diff)
		}
		var ids []string
		for _, p := range out.Items {
			ids = append(ids, p.Id)
		}
		return strings.Join(ids, "")
	}
	ready := &criv1.PodSandboxStateValue{State: criv1.PodSandboxState_SANDBOX_READY}
	notReady := &criv1.PodSandboxStateValue{State: criv1.PodSandboxState_SANDBOX_NOTREADY}
	for want, f := range map[string]*criv1.PodSandboxFilter{
		"zyxw": nil,
		"zx":   {State: ready},
		"yw":   {State: notReady},
		"y":    {LabelSelector: map[string]string{"i": "y"}},
		"":     {State: ready, LabelSelector: map[string]string{"i": "y"}},
		"x":    {Id: "x", State: ready},
	} {
		for range 3 {
			if got := list(f); got != want {
				t.Errorf("filter %v: %q, want %q", f, got, want)
			}
		}
	}
}
