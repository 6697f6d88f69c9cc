package cdi

import (
	"path"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	cdilib "tags.cncf.io/container-device-interface/pkg/cdi"
	cdispec "tags.cncf.io/container-device-interface/specs-go"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime"
)

// Edits are what some devices add to a container.
type Edits struct {
	names  []string
	edits  cdispec.ContainerEdits
	mounts []mount
}

// mount is a mount of the host's, and whether its ids are to be mapped in a
// user namespace.
type mount struct {
	runtime.Mount
	idmap bool
}

// newEdits joins the edits of the devices, in their order; those of a whole
// specification come once, before the first of its devices.
func newEdits(devices []*cdilib.Device) (*Edits, error) {
	e := &Edits{}
	seen := map[*cdilib.Spec]bool{}
	for _, d := range devices {
		name, spec := d.GetQualifiedName(), d.GetSpec()
		e.names = append(e.names, name)
		var parts []*cdispec.ContainerEdits
		if !seen[spec] {
			seen[spec] = true
			parts = append(parts, &spec.ContainerEdits)
		}
		for _, p := range append(parts, &d.ContainerEdits) {
			if err := e.add(p); err != nil {
				return nil, errs.New(errs.Of(err), "CDI device %q (%s): %w", name, spec.GetPath(), err)
			}
		}
	}
	return e, nil
}

// add checks a part and takes a copy: the library completes device nodes in
// place, and what is a device's number today may be another's tomorrow.
func (e *Edits) add(p *cdispec.ContainerEdits) error {
	if err := supported(p); err != nil {
		return err
	}
	for _, m := range p.Mounts {
		c, err := convert(m)
		if err != nil {
			return errs.New(errs.Of(err), "mount of %q: %w", m.HostPath, err)
		}
		e.mounts = append(e.mounts, c)
	}
	e.edits.Env = append(e.edits.Env, p.Env...)
	for _, d := range p.DeviceNodes {
		c := *d
		e.edits.DeviceNodes = append(e.edits.DeviceNodes, &c)
	}
	e.edits.Hooks = append(e.edits.Hooks, p.Hooks...)
	e.edits.AdditionalGIDs = append(e.edits.AdditionalGIDs, p.AdditionalGIDs...)
	return nil
}

// supported refuses what the executor does not do: a device that is there by
// half is worse than none.
func supported(p *cdispec.ContainerEdits) error {
	no := func(what string) error {
		return errs.New(errs.Unimplemented, "%s: Naru does not do this", what)
	}
	if p.IntelRdt != nil {
		return no("intelRdt")
	}
	if len(p.NetDevices) > 0 {
		return no("netDevices")
	}
	text := slices.Clone(p.Env)
	for _, d := range p.DeviceNodes {
		text = append(text, d.Path, d.HostPath)
	}
	for _, h := range p.Hooks {
		text = append(append(append(text, h.Path), h.Args...), h.Env...)
		switch {
		case !path.IsAbs(h.Path):
			return errs.New(errs.FailedPrecondition, "hook %q: want an absolute path", h.Path)
		case h.Timeout != nil && *h.Timeout <= 0:
			return errs.New(errs.FailedPrecondition, "hook %s: its timeout is %d seconds", h.Path, *h.Timeout)
		}
	}
	if slices.ContainsFunc(text, func(s string) bool { return strings.ContainsRune(s, 0) }) {
		return errs.New(errs.FailedPrecondition, "a text has a NUL byte")
	}
	return nil
}

// convert makes an ordinary volume of a mount. Its options are those of
// mount(8) that a volume can have.
func convert(m *cdispec.Mount) (mount, error) {
	out := mount{Mount: runtime.Mount{HostPath: m.HostPath, ContainerPath: m.ContainerPath, Propagation: runtime.PropagationPrivate}}
	if m.Type != "" && m.Type != "bind" && m.Type != "none" {
		return out, errs.New(errs.Unimplemented, "type %q: Naru mounts files and folders of the host only", m.Type)
	}
	out.idmap = m.Type == "bind"
	for _, o := range m.Options {
		switch o {
		case "bind", "rbind":
			out.idmap = true
		case "ro":
			out.Readonly = true
		case "rw":
			out.Readonly = false
		case "nosuid", "nodev", "noexec":
			out.Options = append(out.Options, o)
		case "private", "rprivate":
			out.Propagation = runtime.PropagationPrivate
		case "slave", "rslave":
			out.Propagation = runtime.PropagationHostToContainer
		case "shared", "rshared":
			out.Propagation = runtime.PropagationBidirectional
		case "defaults", "suid", "dev", "exec":
		default:
			return out, errs.New(errs.Unimplemented, "option %q: Naru does not do this", o)
		}
	}
	return out, nil
}

// Mounts are the volumes of the devices, for a container with these id
// mappings.
func (e *Edits) Mounts(uid, gid []runtime.IDMap) []runtime.Mount {
	out := make([]runtime.Mount, 0, len(e.mounts))
	for _, m := range e.mounts {
		if m.idmap {
			m.UIDMap, m.GIDMap = uid, gid
		}
		out = append(out, m.Mount)
	}
	return out
}

// Apply makes the other changes to a finished specification: environment,
// device nodes with their cgroup rules, groups and hooks. What it says goes
// before all that was there.
func (e *Edits) Apply(s *specs.Spec) error {
	edits := e.edits
	edits.DeviceNodes = make([]*cdispec.DeviceNode, 0, len(e.edits.DeviceNodes))
	for _, d := range e.edits.DeviceNodes {
		c := *d
		edits.DeviceNodes = append(edits.DeviceNodes, &c)
	}
	before := 0
	if s.Linux != nil && s.Linux.Resources != nil {
		before = len(s.Linux.Resources.Devices)
	}
	if err := (&cdilib.ContainerEdits{ContainerEdits: &edits}).Apply(s); err != nil {
		return errs.New(errs.FailedPrecondition, "CDI devices %s: %w", strings.Join(e.names, ", "), err)
	}
	if s.Linux == nil || s.Linux.Resources == nil {
		return nil
	}
	// A node with the permissions "none" comes with a rule without any access,
	// which in a rule stands for all.
	rules := s.Linux.Resources.Devices
	s.Linux.Resources.Devices = append(rules[:before:before], slices.DeleteFunc(slices.Clone(rules[before:]), func(r specs.LinuxDeviceCgroup) bool {
		return r.Access == ""
	})...)
	return nil
}
