package pod

import (
	"math"
	"path"
	"slices"
	"strings"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime"
	"github.com/naru-project/naru/sandbox"
)

// check is one named rule about a request. Rules are pure: what the host says
// comes later.
type check struct {
	field string
	ok    func() error
}

func runChecks(what string, checks []check) error {
	for _, c := range checks {
		if err := c.ok(); err != nil {
			return errs.New(errs.InvalidArgument, "%s: %s: %w", what, c.field, err)
		}
	}
	return nil
}

func invalid(format string, args ...any) error {
	return errs.New(errs.InvalidArgument, format, args...)
}

func (m *Manager) validateSandbox(c *SandboxConfig) error {
	return runChecks("run sandbox", []check{
		{"metadata", func() error {
			if c.Metadata.Name == "" {
				return invalid("the name is empty")
			}
			return noControl(c.Metadata.Name, c.Metadata.Namespace, c.Metadata.UID)
		}},
		{"runtime_handler", func() error {
			if !slices.Contains(m.live.Load().Handlers, c.Handler) {
				return invalid("no handler %q is configured", clip(c.Handler))
			}
			return nil
		}},
		{"hostname", func() error { return validHostname(c.Hostname) }},
		{"log_directory", func() error {
			if c.LogDirectory == "" {
				return nil
			}
			return absolute(c.LogDirectory)
		}},
		{"cgroup_parent", func() error { _, err := m.deps.Cgroups.ParentPath(c.CgroupParent); return err }},
		{"namespaces", func() error { return validModes(c) }},
		{"user namespace", func() error { return validMaps(c.UIDMap, c.GIDMap) }},
		{"sysctls", func() error { return validSysctls(c) }},
		{"port_mappings", func() error { return validPorts(c) }},
		{"overhead", func() error { return validResources(c.Overhead) }},
		{"resources", func() error { return validResources(c.Resources) }},
	})
}

func validateContainer(p *SandboxConfig, c *ContainerConfig) error {
	return runChecks("create container "+containerName(p, c.Metadata), []check{
		{"metadata", func() error {
			if c.Metadata.Name == "" {
				return invalid("the name is empty")
			}
			return noControl(c.Metadata.Name)
		}},
		{"image", func() error {
			if c.Image == "" {
				return invalid("it is empty")
			}
			return nil
		}},
		{"command", func() error { return noNUL(append(slices.Clone(c.Command), c.Args...)) }},
		{"env", func() error {
			for _, e := range c.Env {
				if k, _, ok := strings.Cut(e, "="); !ok || k == "" {
					return invalid("an entry is not KEY=value")
				}
			}
			return noNUL(c.Env)
		}},
		{"mounts", func() error { return validMounts(c.Mounts) }},
		{"devices", func() error { return validDevices(c.Devices) }},
		{"log_path", func() error { _, err := logPath(p.LogDirectory, c.LogPath); return err }},
		{"resources", func() error { return validResources(&c.Resources) }},
		{"stop_signal", func() error { return validSignal(c.StopSignal) }},
		{"namespace_options.pid", func() error { return validPIDMode(&c.Security) }},
	})
}

func noControl(all ...string) error {
	for _, s := range all {
		if len(s) > 1024 {
			return invalid("longer than 1024 bytes")
		}
		if strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f }) {
			return invalid("it holds control characters")
		}
	}
	return nil
}

func noNUL(all []string) error {
	for _, s := range all {
		if strings.IndexByte(s, 0) >= 0 {
			return invalid("an entry holds a NUL byte")
		}
	}
	return nil
}

// absolute wants a path as the kernel would print it. Anything else ("..")
// can only be a mistake or an attack.
func absolute(p string) error {
	switch {
	case len(p) >= 4096:
		return invalid("path is longer than 4095 bytes")
	case strings.IndexByte(p, 0) >= 0:
		return invalid("path holds a NUL byte")
	case !path.IsAbs(p):
		return invalid("path %q is not absolute", clip(p))
	case slices.Contains(strings.Split(p, "/"), ".."):
		return invalid("path %q holds '..'", clip(p))
	}
	return nil
}

// validHostname: sethostname(2) takes 64 bytes.
func validHostname(h string) error {
	if len(h) > 64 {
		return invalid("longer than 64 bytes")
	}
	for i := range len(h) {
		c := h[i]
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '-' && c != '.' && c != '_' {
			return invalid("character %q is not allowed", c)
		}
	}
	return nil
}

func validModes(c *SandboxConfig) error {
	for _, m := range []NamespaceMode{c.Network, c.IPC} {
		if m != sandbox.ModePod && m != sandbox.ModeNode {
			return invalid("mode %q is neither pod nor node", clip(string(m)))
		}
	}
	switch c.PID {
	case runtime.PIDPod, runtime.PIDContainer, runtime.PIDNode:
		return nil
	}
	return invalid("pid mode %q is not possible for a sandbox", clip(string(c.PID)))
}

func validPIDMode(s *Security) error {
	switch s.PIDMode {
	case "", runtime.PIDContainer, runtime.PIDPod, runtime.PIDNode:
		return nil
	case runtime.PIDTarget:
		if s.PIDTarget == "" {
			return invalid("mode target needs the id of a container")
		}
		return nil
	}
	return invalid("mode %q does not exist", clip(string(s.PIDMode)))
}

// validMaps: both kinds or none, container root mapped, no range twice
// (user_namespaces(7)).
func validMaps(uid, gid []IDMap) error {
	if (len(uid) == 0) != (len(gid) == 0) {
		return invalid("uid and gid mappings must both be given")
	}
	for _, maps := range [][]IDMap{uid, gid} {
		if len(maps) > 340 {
			return invalid("more than 340 mappings")
		}
		for i, a := range maps {
			if a.Size == 0 || uint64(a.ContainerID)+uint64(a.Size) > math.MaxUint32 || uint64(a.HostID)+uint64(a.Size) > math.MaxUint32 {
				return invalid("mapping %d is empty or leaves the range of ids", i)
			}
			for _, b := range maps[:i] {
				if overlap(a.ContainerID, a.Size, b.ContainerID, b.Size) || overlap(a.HostID, a.Size, b.HostID, b.Size) {
					return invalid("mapping %d overlaps another", i)
				}
			}
		}
		if _, ok := hostID(maps, 0); len(maps) > 0 && !ok {
			return invalid("root of the container is not mapped")
		}
	}
	return nil
}

func overlap(a, an, b, bn uint32) bool {
	return uint64(a) < uint64(b)+uint64(bn) && uint64(b) < uint64(a)+uint64(an)
}

// hostID maps an id of the container to the host's.
func hostID(maps []IDMap, id uint32) (uint32, bool) {
	if len(maps) == 0 {
		return id, true
	}
	for _, m := range maps {
		if id >= m.ContainerID && uint64(id) < uint64(m.ContainerID)+uint64(m.Size) {
			return m.HostID + (id - m.ContainerID), true
		}
	}
	return 0, false
}

func validPorts(c *SandboxConfig) error {
	for i, p := range c.Ports {
		if p.Protocol != sandbox.TCP && p.Protocol != sandbox.UDP && p.Protocol != sandbox.SCTP {
			return invalid("port %d: protocol %q does not exist", i, clip(string(p.Protocol)))
		}
		if p.HostPort != 0 && p.ContainerPort == 0 {
			return invalid("port %d: host port %d leads to no container port", i, p.HostPort)
		}
	}
	return nil
}

// validMounts knows the words of CRI's Mount; resolving is the executor's.
func validMounts(mounts []Mount) error {
	for i, mt := range mounts {
		if err := validMount(&mt); err != nil {
			return invalid("mount %d (%s): %w", i, clip(mt.ContainerPath), err)
		}
	}
	return nil
}

func validMount(m *Mount) error {
	if err := absolute(m.ContainerPath); err != nil {
		return err
	}
	if path.Clean(m.ContainerPath) == "/" {
		return invalid("the root itself cannot be a mount")
	}
	switch {
	case m.Image != "" && m.HostPath != "":
		return invalid("both an image and a host path are given")
	case m.Image == "" && m.HostPath == "":
		return invalid("neither an image nor a host path is given")
	case m.Image == "" && m.ImageSubPath != "":
		return invalid("a sub-path without an image")
	case m.HostPath != "" && !path.IsAbs(m.HostPath):
		return invalid("host path %q is not absolute", clip(m.HostPath))
	case strings.IndexByte(m.HostPath, 0) >= 0:
		return invalid("host path holds a NUL byte")
	}
	switch m.Propagation {
	case "", runtime.PropagationPrivate, runtime.PropagationHostToContainer, runtime.PropagationBidirectional:
	default:
		return invalid("propagation %q does not exist", clip(string(m.Propagation)))
	}
	// CRI, Mount.recursive_read_only: needs readonly and private propagation.
	if m.RecursiveReadonly {
		if !m.Readonly {
			return invalid("recursive_read_only needs readonly")
		}
		if m.Propagation != "" && m.Propagation != runtime.PropagationPrivate {
			return invalid("recursive_read_only needs private propagation")
		}
	}
	for _, o := range m.Options {
		if o != "noexec" && o != "nodev" && o != "nosuid" {
			return invalid("option %q is not one of noexec, nodev, nosuid", clip(o))
		}
	}
	if len(m.UIDMap) > 0 || len(m.GIDMap) > 0 {
		return validMaps(m.UIDMap, m.GIDMap)
	}
	return nil
}

func validDevices(devices []Device) error {
	for i, d := range devices {
		if err := absolute(d.HostPath); err != nil {
			return invalid("device %d: host %w", i, err)
		}
		if err := absolute(d.ContainerPath); err != nil {
			return invalid("device %d: container %w", i, err)
		}
		if d.Permissions == "" || strings.Trim(d.Permissions, "rwm") != "" || len(d.Permissions) > 3 {
			return invalid("device %d: permissions %q are not out of r, w, m", i, clip(d.Permissions))
		}
	}
	return nil
}

// validResources refuses what no kernel takes; runtime/cgroup knows the rest.
func validResources(r *Resources) error {
	if r == nil {
		return nil
	}
	switch {
	case r.CPUPeriod < 0:
		return invalid("cpu_period %d is negative", r.CPUPeriod)
	case r.CPUQuota < -1:
		return invalid("cpu_quota %d is below -1 (none)", r.CPUQuota)
	case r.CPUShares < 0:
		return invalid("cpu_shares %d is negative", r.CPUShares)
	case r.Memory < -1:
		return invalid("memory_limit %d is below -1 (none)", r.Memory)
	case r.MemorySwap < -1:
		return invalid("memory_swap_limit %d is below -1 (none)", r.MemorySwap)
	case r.Memory > 0 && r.MemorySwap > 0 && r.MemorySwap < r.Memory:
		return invalid("memory_swap_limit %d (memory and swap) is below the memory limit %d", r.MemorySwap, r.Memory)
	case r.OOMScoreAdj < -1000 || r.OOMScoreAdj > 1000:
		return invalid("oom_score_adj %d is outside -1000..1000", r.OOMScoreAdj)
	case r.PidsLimit < -1:
		return invalid("pids limit %d is below -1 (none)", r.PidsLimit)
	}
	for _, set := range []string{r.CpusetCpus, r.CpusetMems} {
		if strings.Trim(set, "0123456789,-") != "" {
			return invalid("cpuset %q is no list of numbers", clip(set))
		}
	}
	return nil
}

// merged lays an update over limits: what it does not mention (zero) stays.
func merged(old, update Resources) Resources {
	n := old
	for _, f := range []struct{ to, from *int64 }{
		{&n.CPUPeriod, &update.CPUPeriod},
		{&n.CPUQuota, &update.CPUQuota},
		{&n.CPUShares, &update.CPUShares},
		{&n.Memory, &update.Memory},
		{&n.MemorySwap, &update.MemorySwap},
		{&n.OOMScoreAdj, &update.OOMScoreAdj},
		{&n.PidsLimit, &update.PidsLimit},
	} {
		if *f.from != 0 {
			*f.to = *f.from
		}
	}
	n.CpusetCpus = cmpOr(update.CpusetCpus, old.CpusetCpus)
	n.CpusetMems = cmpOr(update.CpusetMems, old.CpusetMems)
	if len(update.Hugepages) > 0 {
		n.Hugepages = mergedHugepages(old.Hugepages, update.Hugepages)
	}
	if len(update.Unified) > 0 {
		n.Unified = make(map[string]string, len(old.Unified)+len(update.Unified))
		for _, m := range []map[string]string{old.Unified, update.Unified} {
			for k, v := range m {
				n.Unified[k] = v
			}
		}
	}
	return n
}

func mergedHugepages(old, update []HugepageLimit) []HugepageLimit {
	out := slices.Clone(old)
	for _, u := range update {
		if i := slices.IndexFunc(out, func(h HugepageLimit) bool { return h.PageSize == u.PageSize }); i >= 0 {
			out[i] = u
		} else {
			out = append(out, u)
		}
	}
	return out
}
