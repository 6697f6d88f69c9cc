package cri

import (
	"net/netip"
	"slices"
	"strings"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/pod"
)

// maxHostname is HOST_NAME_MAX (sethostname(2)).
const maxHostname = 64

// sandboxConfig converts and checks what RunPodSandbox is given.
func (s *Server) sandboxConfig(c *criv1.PodSandboxConfig, handler string) (*pod.SandboxConfig, error) {
	if c == nil {
		return nil, invalid("config is missing")
	}
	if err := s.checkHandler(handler); err != nil {
		return nil, err
	}
	meta := c.GetMetadata()
	if meta.GetName() == "" {
		return nil, invalid("config.metadata.name is empty")
	}
	out := &pod.SandboxConfig{
		Metadata: pod.Metadata{
			Name: meta.GetName(), UID: meta.GetUid(), Namespace: meta.GetNamespace(), Attempt: meta.GetAttempt(),
		},
		Hostname:     c.GetHostname(),
		LogDirectory: c.GetLogDirectory(),
		Labels:       c.GetLabels(),
		Annotations:  c.GetAnnotations(),
		Handler:      handler,
		DNS: pod.DNS{
			Servers:  c.GetDnsConfig().GetServers(),
			Searches: c.GetDnsConfig().GetSearches(),
			Options:  c.GetDnsConfig().GetOptions(),
		},
	}
	if err := checkSandboxTexts(out); err != nil {
		return nil, err
	}
	var err error
	if out.Ports, err = portMappings(c.GetPortMappings()); err != nil {
		return nil, err
	}
	return out, s.sandboxLinux(c.GetLinux(), out)
}

// checkHandler refuses runtime handlers that are not configured.
func (s *Server) checkHandler(name string) error {
	if !slices.Contains(s.handlers(), name) {
		return invalid("runtime_handler %q is not configured", clip(name))
	}
	return nil
}

// handlers are the names of all runtime handlers; the empty one is the default.
func (s *Server) handlers() []string {
	return append([]string{"", runtimeName}, *s.named.Load()...)
}

func checkSandboxTexts(c *pod.SandboxConfig) error {
	for _, f := range []struct{ field, value string }{
		{"config.metadata.name", c.Metadata.Name},
		{"config.metadata.uid", c.Metadata.UID},
		{"config.metadata.namespace", c.Metadata.Namespace},
		{"config.hostname", c.Hostname},
	} {
		if err := checkLine(f.field, f.value); err != nil {
			return err
		}
	}
	if len(c.Hostname) > maxHostname {
		return invalid("config.hostname has %d bytes, the kernel takes %d", len(c.Hostname), maxHostname)
	}
	if c.LogDirectory != "" {
		if err := checkAbs("config.log_directory", c.LogDirectory); err != nil {
			return err
		}
	}
	if err := checkLines("config.dns_config.servers", c.DNS.Servers); err != nil {
		return err
	}
	if err := checkLines("config.dns_config.searches", c.DNS.Searches); err != nil {
		return err
	}
	return checkLines("config.dns_config.options", c.DNS.Options)
}

// sandboxLinux fills in what LinuxPodSandboxConfig says; nil means all defaults.
func (s *Server) sandboxLinux(l *criv1.LinuxPodSandboxConfig, out *pod.SandboxConfig) error {
	if parent := l.GetCgroupParent(); parent != "" {
		if hasDotDot(parent) {
			return invalid("config.linux.cgroup_parent %q climbs with ..", parent)
		}
		if err := checkLine("config.linux.cgroup_parent", parent); err != nil {
			return err
		}
		out.CgroupParent = parent
	}
	for name, value := range l.GetSysctls() {
		if !sysctlPattern.MatchString(name) {
			return invalid("config.linux.sysctls: %q is not a sysctl name", clip(name))
		}
		if err := checkLine("config.linux.sysctls."+name, value); err != nil {
			return err
		}
	}
	out.Sysctls = l.GetSysctls()
	var err error
	if out.Overhead, err = optionalResources("config.linux.overhead", l.GetOverhead()); err != nil {
		return err
	}
	if out.Resources, err = optionalResources("config.linux.resources", l.GetResources()); err != nil {
		return err
	}
	sc := l.GetSecurityContext()
	if out.Security, err = sandboxSecurity(sc); err != nil {
		return err
	}
	return s.sandboxNamespaces(sc.GetNamespaceOptions(), out)
}

// portMappings converts port mappings. Those without a host port publish nothing.
func portMappings(in []*criv1.PortMapping) ([]pod.PortMapping, error) {
	var out []pod.PortMapping
	for _, p := range in {
		if p == nil {
			return nil, invalid("config.port_mappings holds a nil entry")
		}
		proto, ok := protocols[p.GetProtocol()]
		if !ok {
			return nil, invalid("config.port_mappings: protocol %d is not known", p.GetProtocol())
		}
		if err := checkRange("config.port_mappings.container_port", int64(p.GetContainerPort()), 0, 65535); err != nil {
			return nil, err
		}
		if err := checkRange("config.port_mappings.host_port", int64(p.GetHostPort()), 0, 65535); err != nil {
			return nil, err
		}
		if p.GetHostPort() != 0 && p.GetContainerPort() == 0 {
			return nil, invalid("config.port_mappings: host_port %d has no container_port", p.GetHostPort())
		}
		m := pod.PortMapping{Protocol: proto, ContainerPort: uint16(p.GetContainerPort()), HostPort: uint16(p.GetHostPort())}
		if ip := p.GetHostIp(); ip != "" {
			addr, err := netip.ParseAddr(ip)
			if err != nil || addr.Zone() != "" {
				return nil, invalid("config.port_mappings.host_ip %q is not an IP address", clip(ip))
			}
			m.HostIP = addr.Unmap()
		}
		out = append(out, m)
	}
	return out, nil
}

// sandboxNamespaces converts the pod's namespace modes and user namespace.
func (s *Server) sandboxNamespaces(o *criv1.NamespaceOption, out *pod.SandboxConfig) error {
	var ok bool
	if out.Network, ok = podOrNode(o.GetNetwork()); !ok {
		return invalid("namespace_options.network %s is not POD or NODE", o.GetNetwork())
	}
	if out.IPC, ok = podOrNode(o.GetIpc()); !ok {
		return invalid("namespace_options.ipc %s is not POD or NODE", o.GetIpc())
	}
	if out.PID, ok = pidModes[o.GetPid()]; !ok || out.PID == pod.PIDTarget {
		return invalid("namespace_options.pid %s is not POD, CONTAINER or NODE", o.GetPid())
	}
	uids, gids, err := userNamespace(o.GetUsernsOptions())
	if err != nil || len(uids) == 0 {
		return err
	}
	out.UIDMap, out.GIDMap = uids, gids
	hostNetwork := out.Network == pod.ModeNode
	switch {
	case !s.host.UserNamespaces:
		return invalid("userns_options: this node cannot give pods a user namespace")
	case hostNetwork && !s.host.UserNamespacesHostNetwork:
		return invalid("userns_options: a user namespace with the host's network is not supported on this node")
	case out.PID == pod.PIDNode || out.IPC == pod.ModeNode:
		return invalid("userns_options: a user namespace cannot go with the host's PID or IPC namespace")
	}
	return nil
}

// userNamespace checks a user namespace as kubelet asks for it: one mapping,
// the same for users and groups, that maps root to somebody who is not root.
func userNamespace(u *criv1.UserNamespace) (uids, gids []pod.IDMap, err error) {
	if u == nil {
		return nil, nil, nil
	}
	switch u.GetMode() {
	case criv1.NamespaceMode_NODE:
		if len(u.GetUids())+len(u.GetGids()) > 0 {
			return nil, nil, invalid("userns_options: mode NODE goes without mappings")
		}
		return nil, nil, nil
	case criv1.NamespaceMode_POD:
	default:
		return nil, nil, invalid("userns_options.mode %s is not POD or NODE", u.GetMode())
	}
	if len(u.GetUids()) != 1 || len(u.GetGids()) != 1 {
		return nil, nil, invalid("userns_options needs exactly one mapping for uids and one for gids, got %d and %d", len(u.GetUids()), len(u.GetGids()))
	}
	if uids, err = idMaps("userns_options.uids", u.GetUids()); err != nil {
		return nil, nil, err
	}
	if gids, err = idMaps("userns_options.gids", u.GetGids()); err != nil {
		return nil, nil, err
	}
	switch {
	case uids[0] != gids[0]:
		return nil, nil, invalid("userns_options: the mappings of uids and gids differ")
	case uids[0].ContainerID != 0:
		return nil, nil, invalid("userns_options: the mapping does not begin with container ID 0")
	case uids[0].HostID == 0:
		return nil, nil, invalid("userns_options: container root is mapped to host root")
	}
	return uids, gids, nil
}

// idMaps checks mappings: none empty, none beyond the last valid ID, no
// overlaps (user_namespaces(7)).
func idMaps(field string, in []*criv1.IDMapping) ([]pod.IDMap, error) {
	const end = 1<<32 - 1 // the highest number is no ID
	var out []pod.IDMap
	for _, m := range in {
		if m == nil {
			return nil, invalid("%s holds a nil entry", field)
		}
		n := uint64(m.GetLength())
		if n == 0 {
			return nil, invalid("%s: a mapping has length 0", field)
		}
		if uint64(m.GetHostId())+n > end || uint64(m.GetContainerId())+n > end {
			return nil, invalid("%s: mapping of %d IDs from container %d to host %d goes beyond the last ID", field, n, m.GetContainerId(), m.GetHostId())
		}
		for _, o := range out {
			if overlap(m.GetContainerId(), o.ContainerID, m.GetLength(), o.Size) || overlap(m.GetHostId(), o.HostID, m.GetLength(), o.Size) {
				return nil, invalid("%s: mappings overlap", field)
			}
		}
		out = append(out, pod.IDMap{ContainerID: m.GetContainerId(), HostID: m.GetHostId(), Size: m.GetLength()})
	}
	return out, nil
}

func overlap(a, b, lenA, lenB uint32) bool {
	return uint64(a) < uint64(b)+uint64(lenB) && uint64(b) < uint64(a)+uint64(lenA)
}

// sandboxStatus converts a pod to CRI's PodSandboxStatus.
func sandboxStatus(p *pod.Pod) *criv1.PodSandboxStatus {
	c := configOf(p)
	return &criv1.PodSandboxStatus{
		Id:             p.ID,
		Metadata:       sandboxMetadata(c),
		State:          sandboxState(p),
		CreatedAt:      nanos(p.CreatedAt),
		Network:        sandboxNetwork(p),
		Linux:          &criv1.LinuxPodSandboxStatus{Namespaces: &criv1.Namespace{Options: namespaceOptions(c)}},
		Labels:         c.Labels,
		Annotations:    c.Annotations,
		RuntimeHandler: c.Handler,
	}
}

func sandboxItem(p *pod.Pod) *criv1.PodSandbox {
	c := configOf(p)
	return &criv1.PodSandbox{
		Id:             p.ID,
		Metadata:       sandboxMetadata(c),
		State:          sandboxState(p),
		CreatedAt:      nanos(p.CreatedAt),
		Labels:         c.Labels,
		Annotations:    c.Annotations,
		RuntimeHandler: c.Handler,
	}
}

// configOf never returns nil: a record read back in part has no config.
func configOf(p *pod.Pod) *pod.SandboxConfig {
	if p.Config == nil {
		return &pod.SandboxConfig{}
	}
	return p.Config
}

func sandboxMetadata(c *pod.SandboxConfig) *criv1.PodSandboxMetadata {
	m := c.Metadata
	return &criv1.PodSandboxMetadata{Name: m.Name, Uid: m.UID, Namespace: m.Namespace, Attempt: m.Attempt}
}

func sandboxState(p *pod.Pod) criv1.PodSandboxState {
	if p.Ready() {
		return criv1.PodSandboxState_SANDBOX_READY
	}
	return criv1.PodSandboxState_SANDBOX_NOTREADY
}

// sandboxNetwork tells the addresses of a pod that has its own and has them
// still: kubelet reports the node's address for pods on the host's network.
func sandboxNetwork(p *pod.Pod) *criv1.PodSandboxNetworkStatus {
	n := &criv1.PodSandboxNetworkStatus{}
	if p.Handle == nil || !p.Ready() || configOf(p).Network == pod.ModeNode {
		return n
	}
	for i, ip := range p.Handle.IPs {
		if i == 0 {
			n.Ip = ip.String()
		} else {
			n.AdditionalIps = append(n.AdditionalIps, &criv1.PodIP{Ip: ip.String()})
		}
	}
	return n
}

func namespaceOptions(c *pod.SandboxConfig) *criv1.NamespaceOption {
	o := &criv1.NamespaceOption{
		Network: nodeOrPod(c.Network),
		Ipc:     nodeOrPod(c.IPC),
		Pid:     criPID(c.PID),
	}
	o.UsernsOptions = &criv1.UserNamespace{Mode: criv1.NamespaceMode_NODE}
	if len(c.UIDMap) > 0 {
		o.UsernsOptions = &criv1.UserNamespace{Mode: criv1.NamespaceMode_POD, Uids: criIDMaps(c.UIDMap), Gids: criIDMaps(c.GIDMap)}
	}
	return o
}

func criIDMaps(in []pod.IDMap) []*criv1.IDMapping {
	var out []*criv1.IDMapping
	for _, m := range in {
		out = append(out, &criv1.IDMapping{HostId: m.HostID, ContainerId: m.ContainerID, Length: m.Size})
	}
	return out
}

// podCIDRs parses the comma list of UpdateRuntimeConfig.
func podCIDRs(list string) ([]netip.Prefix, error) {
	const most = 16
	var out []netip.Prefix
	for text := range strings.SplitSeq(list, ",") {
		p, err := netip.ParsePrefix(strings.TrimSpace(text))
		if err != nil || p.Addr().Is4In6() {
			return nil, invalid("runtime_config.network_config.pod_cidr: %q is not a CIDR", clip(text))
		}
		if out = append(out, p.Masked()); len(out) > most {
			return nil, invalid("runtime_config.network_config.pod_cidr holds more than %d CIDRs", most)
		}
	}
	return out, nil
}
