package spec

import (
	"maps"
	"slices"
	"strings"

	"github.com/moby/sys/capability"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/naru-project/naru/internal/errs"
)

// DefaultCapabilities is the usual set of containers, as in Docker, containerd
// and the Kubernetes documentation.
func DefaultCapabilities() []string {
	return []string{
		"CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_MKNOD",
		"CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT",
	}
}

// capabilityNames are all that this build knows, "CAP_" spelled.
var capabilityNames = func() map[string]bool {
	m := map[string]bool{}
	for _, c := range capability.ListKnown() {
		m["CAP_"+strings.ToUpper(c.String())] = true
	}
	return m
}()

// capabilities computes the sets by the algebra of api.proto (message
// Capability): the defaults, all or nothing by "ALL", then what is added, then
// what is dropped, which leaves every set. "All" is what the host can give, its
// bounding set. The inheritable set is empty but for what the kernel demands of
// ambient ones (capabilities(7)): anything more would raise the permitted set
// of files with capabilities (CVE-2022-24769).
func (b *builder) capabilities() error {
	s, host := &b.in.Security, b.in.Host.Bounding
	set, ambient := map[string]bool{}, map[string]bool{}
	if s.Privileged {
		addAll(set, host)
	} else if err := b.unprivileged(set, ambient); err != nil {
		return err
	}
	all, amb := sorted(set), sorted(ambient)
	caps := &specs.LinuxCapabilities{Bounding: all, Effective: all, Permitted: all, Inheritable: amb, Ambient: amb}
	if b.who.UID != 0 {
		// What execve leaves to a user that is not root: the ambient set. A
		// process that never had more cannot lose track of it (CVE-2018-1000400).
		caps.Effective, caps.Permitted = amb, amb
	}
	b.spec.Process.Capabilities = caps
	return nil
}

func (b *builder) unprivileged(set, ambient map[string]bool) error {
	s, host := &b.in.Security, b.in.Host.Bounding
	add, addAllOf, err := capabilityList("add_capabilities", s.AddCaps)
	if err != nil {
		return err
	}
	amb, ambAll, err := capabilityList("add_ambient_capabilities", s.AddAmbientCaps)
	if err != nil {
		return err
	}
	drop, dropAll, err := capabilityList("drop_capabilities", s.DropCaps)
	if err != nil {
		return err
	}
	defaults := b.in.Defaults.Capabilities
	if defaults == nil {
		defaults = DefaultCapabilities()
	}
	switch {
	case dropAll:
	case addAllOf || ambAll:
		addAll(set, host)
	default:
		addAll(set, intersect(defaults, host))
	}
	if ambAll && !dropAll {
		addAll(ambient, host)
	}
	for _, c := range slices.Concat(add, amb) {
		if !slices.Contains(host, c) && !slices.Contains(drop, c) {
			return errs.New(errs.FailedPrecondition, "add capability %s: this host's runtime does not have it to give", c)
		}
	}
	addAll(set, add)
	addAll(set, amb)
	addAll(ambient, amb)
	for _, c := range drop {
		delete(set, c)
		delete(ambient, c)
	}
	return nil
}

// capabilityList normalises names: any case, with or without "CAP_".
func capabilityList(field string, in []string) (names []string, all bool, err error) {
	for _, c := range in {
		n := strings.ToUpper(c)
		if n == "ALL" || n == "CAP_ALL" {
			all = true
			continue
		}
		if !strings.HasPrefix(n, "CAP_") {
			n = "CAP_" + n
		}
		if !capabilityNames[n] {
			return nil, false, errs.New(errs.InvalidArgument, "%s: unknown capability %q", field, clip(c))
		}
		names = append(names, n)
	}
	return names, all, nil
}

func addAll(set map[string]bool, names []string) {
	for _, n := range names {
		set[n] = true
	}
}

func intersect(a, b []string) (out []string) {
	for _, x := range a {
		if slices.Contains(b, x) {
			out = append(out, x)
		}
	}
	return out
}

func sorted(set map[string]bool) []string { return slices.Sorted(maps.Keys(set)) }
