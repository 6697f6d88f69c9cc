package spec

import (
	"maps"
	"path"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime"
)

// harmless are the only places in procfs that may be covered: files that tools
// like lxcfs replace so that a container sees its own limits. Anything else
// there could stand in for what the runtime writes to or masks
// (CVE-2019-16884, CVE-2025-52881).
var harmless = []string{
	"/proc/cpuinfo", "/proc/diskstats", "/proc/loadavg", "/proc/meminfo", "/proc/net/dev", "/proc/slabinfo",
	"/proc/stat", "/proc/swaps", "/proc/uptime", "/proc/sys/crypto/fips_enabled", "/proc/sys/kernel/ns_last_pid",
}

// harmlessSys are places in sysfs that pods mount for good reasons (network
// plugins, cgroup readers, lxcfs). A privileged container, which may mount what
// it likes anyway, can have any.
var harmlessSys = []string{"/sys/fs/bpf", "/sys/fs/cgroup", "/sys/devices/system/cpu"}

// MountTarget checks a mount's container path and gives its clean form.
func MountTarget(p string, privileged bool) (string, error) {
	clean, err := absolute("mount target", p)
	switch {
	case err != nil:
		return "", err
	case clean == "/":
		return "", errs.New(errs.InvalidArgument, "mount target %q: is the root file system", p)
	case within(clean, "/proc") && !slices.Contains(harmless, clean):
		return "", errs.New(errs.InvalidArgument, "mount target %q: nothing may be mounted on or in /proc", clip(p))
	case within(clean, "/sys") && !privileged && !slices.ContainsFunc(harmlessSys, func(h string) bool { return within(clean, h) }):
		return "", errs.New(errs.InvalidArgument, "mount target %q: nothing may be mounted on or in /sys of a container that is not privileged", clip(p))
	}
	return clean, nil
}

// mounts validates the volumes, and lists everything that gets mounted, in the
// order in which it is.
func (b *builder) mounts() error {
	in := b.in
	list := b.standardMounts()
	for _, target := range slices.Sorted(maps.Keys(in.EtcFiles)) {
		list = append(list, specs.Mount{
			Destination: target, Type: "bind", Source: in.EtcFiles[target],
			Options: []string{"rbind", "rprivate", rw(in.Security.ReadonlyRootfs)},
		})
	}
	for i := range in.Mounts {
		m, err := volume(&in.Mounts[i], in.Security.Privileged)
		if err != nil {
			return err
		}
		list = append(list, m)
	}
	if _, err := Volumes(in.Image.Volumes, in.Mounts); err != nil {
		return err
	}
	b.spec.Mounts = list
	return nil
}

func rw(readonly bool) string {
	if readonly {
		return "ro"
	}
	return "rw"
}

// standardMounts are those of every container (config-linux.md, Default
// Filesystems). sysfs and cgroups are read-only unless privileged.
func (b *builder) standardMounts() []specs.Mount {
	sys := rw(!b.in.Security.Privileged)
	list := []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", sys}},
		{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "relatime", sys}},
	}
	if b.in.Shm != "" {
		list = append(list, specs.Mount{
			Destination: "/dev/shm", Type: "bind", Source: b.in.Shm, Options: []string{"rbind", "rprivate", "nosuid", "noexec", "nodev", "rw"},
		})
	}
	return list
}

var propagations = map[runtime.Propagation]string{
	"": "rprivate", runtime.PropagationPrivate: "rprivate",
	runtime.PropagationHostToContainer: "rslave", runtime.PropagationBidirectional: "rshared",
}

// volume checks one CRI mount and gives its entry for the list.
func volume(m *runtime.Mount, privileged bool) (out specs.Mount, err error) {
	bad := func(why string) error {
		return errs.New(errs.InvalidArgument, "mount on %q: %s", clip(m.ContainerPath), why)
	}
	out = specs.Mount{Type: "bind", UIDMappings: mappings(m.UIDMap), GIDMappings: mappings(m.GIDMap)}
	if out.Destination, err = MountTarget(m.ContainerPath, privileged); err != nil {
		return out, err
	}
	if (m.HostPath == "") == (m.Image == "") {
		return out, bad("needs either a host path or an image")
	}
	out.Source = m.ImageRef
	if m.Image == "" {
		if out.Source, err = absolute("mount source", m.HostPath); err != nil {
			return out, err
		}
		if m.ImageSubPath != "" {
			return out, bad("has an image sub path but no image")
		}
	}
	prop, ok := propagations[m.Propagation]
	switch {
	case !ok:
		return out, bad("unknown propagation")
	case m.RecursiveReadonly && (!m.Readonly || prop != "rprivate"):
		// api.proto, Mount.recursive_read_only
		return out, bad("recursive_read_only needs readonly and private propagation")
	}
	if err := ValidateIDMaps(m.UIDMap, m.GIDMap); err != nil {
		return out, err
	}
	out.Options = []string{"rbind", prop, rw(m.Readonly || m.Image != "")}
	if m.RecursiveReadonly {
		out.Options = append(out.Options, "rro")
	}
	for _, o := range m.Options {
		if !slices.Contains([]string{"noexec", "nodev", "nosuid"}, o) {
			return out, bad("option " + clip(o) + " is not one of noexec, nodev, nosuid")
		}
		out.Options = append(out.Options, o)
	}
	return out, nil
}

// Volumes gives the paths of an image's VOLUMEs that no mount covers, clean
// and sorted. They come from a stranger: nothing outside the root file system,
// the root itself or what the runtime mounts can be one (CVE-2022-23648).
func Volumes(image map[string]struct{}, mounts []runtime.Mount) ([]string, error) {
	if len(image) > maxPaths {
		return nil, errs.New(errs.InvalidArgument, "the image has %d volumes, more than %d", len(image), maxPaths)
	}
	var out []string
	for v := range image {
		if v == "" || strings.ContainsRune(v, 0) || len(v) >= maxPath || slices.Contains(strings.Split(v, "/"), "..") {
			return nil, errs.New(errs.InvalidArgument, "volume %q of the image: not a path in the container", clip(v))
		}
		p := path.Clean("/" + v)
		if p == "/" || within(p, "/proc") || within(p, "/sys") || within(p, "/dev") {
			return nil, errs.New(errs.InvalidArgument, "volume %q of the image: belongs to the runtime", clip(v))
		}
		if !slices.ContainsFunc(mounts, func(m runtime.Mount) bool { return path.Clean(m.ContainerPath) == p }) {
			out = append(out, p)
		}
	}
	slices.Sort(out)
	return slices.Compact(out), nil
}

// DefaultMaskedPaths are hidden from containers whose request does not list
// any: they show or do things of the host (CVE-2017-16539, CVE-2018-10892,
// CVE-2020-8694).
func DefaultMaskedPaths() []string {
	return []string{
		"/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
		"/proc/sched_debug", "/proc/scsi", "/proc/timer_list", "/proc/timer_stats",
		"/sys/devices/virtual/powercap", "/sys/firmware",
	}
}

// DefaultReadonlyPaths are read-only in containers whose request does not list any.
func DefaultReadonlyPaths() []string {
	return []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
}

// paths takes over the masked and read-only paths. A privileged container has none.
func (b *builder) paths() error {
	if b.in.Security.Privileged {
		return nil
	}
	var err error
	if b.spec.Linux.MaskedPaths, err = pathList("masked_paths", b.in.Security.MaskedPaths); err != nil {
		return err
	}
	b.spec.Linux.ReadonlyPaths, err = pathList("readonly_paths", b.in.Security.ReadonlyPaths)
	return err
}

func pathList(field string, in []string) ([]string, error) {
	if len(in) > maxPaths {
		return nil, errs.New(errs.InvalidArgument, "%s: more than %d", field, maxPaths)
	}
	for _, p := range in {
		clean, err := absolute(field, p)
		if err != nil {
			return nil, err
		}
		if clean != p || p == "/" {
			return nil, errs.New(errs.InvalidArgument, "%s: %q is not a clean path below /", field, clip(p))
		}
	}
	return slices.Clone(in), nil
}
