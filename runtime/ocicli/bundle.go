package ocicli

import (
	"encoding/json"
	"errors"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime"
	"github.com/naru-project/naru/runtime/cgroup"
	"github.com/naru-project/naru/runtime/native"
)

// ociVersion is the version of the specification that bundles are written in:
// one that every runtime in use knows, with nothing newer in them.
const ociVersion = "1.0.2"

// foreignRoot is where the root file system of a container with a user namespace
// is attached, in the program's own mount namespace: a runtime goes there with
// the rights of the container's root, who must not pass through our run folder.
const foreignRoot = "/mnt"

// checkForeignRoot tells why foreignRoot is not what it must be.
func checkForeignRoot() error {
	st, err := os.Lstat(foreignRoot)
	if err == nil && (!st.IsDir() || st.Mode().Perm()&0o001 == 0) {
		err = errors.New("it is not a directory that everybody may pass")
	}
	if err != nil {
		return errs.New(errs.FailedPrecondition, "user namespaces by an OCI runtime need the directory %s of the host as a place to attach a root file system: %w", foreignRoot, err)
	}
	return nil
}

// bundle is a container's folder as a runtime is told of it.
type bundle struct {
	dir     string
	rootfs  string // where the program sees the root file system
	systemd bool
	cgroup2 bool
	shown   []shown // in the order in which they are mounted
}

// shown is a mount that the program finds in its mount namespace.
type shown struct {
	name   string // in the bundle
	target string // in the container
	dir    bool
	attach native.Attachment
}

// newBundle names what is shown to the program: the root file system, its
// volumes, and, where it is read-only, the VOLUMEs of its image once more.
func newBundle(dir, rootfs string, root *os.File, volumes []native.Volume, again []string) *bundle {
	b := &bundle{dir: dir, rootfs: rootfs}
	b.shown = append(b.shown, shown{dir: true, attach: native.Attachment{Tree: root, At: rootfs}})
	add := func(s shown) {
		s.attach.At = filepath.Join(dir, s.name)
		b.shown = append(b.shown, s)
	}
	for i, v := range again {
		add(shown{name: "image-" + strconv.Itoa(i), target: v, dir: true, attach: native.Attachment{Tree: root, Of: v}})
	}
	for i, v := range volumes {
		add(shown{name: "volume-" + strconv.Itoa(i), target: v.Path, dir: v.Dir, attach: native.Attachment{Tree: v.Tree}})
	}
	return b
}

// attachments are all that is shown.
func (b *bundle) attachments() []native.Attachment {
	out := make([]native.Attachment, len(b.shown))
	for i := range b.shown {
		out[i] = b.shown[i].attach
	}
	return out
}

// write makes the folder: the places of the mounts, and config.json, which
// holds the container's environment.
func (b *bundle) write(c *runtime.Container) error {
	for _, s := range b.shown {
		var err error
		if s.name == "" && b.rootfs == foreignRoot {
			continue
		}
		if s.dir {
			err = os.Mkdir(s.attach.At, 0o700)
		} else {
			err = os.WriteFile(s.attach.At, nil, 0o600)
		}
		if err != nil {
			return errs.New(errs.Internal, "make the bundle: %w", err)
		}
	}
	data, err := json.Marshal(b.spec(c))
	if err == nil {
		err = os.WriteFile(filepath.Join(b.dir, "config.json"), data, 0o600)
	}
	if err != nil {
		return errs.New(errs.Internal, "write the bundle: %w", err)
	}
	return nil
}

// spec is the container's specification for a runtime that shall make of it
// what the native executor makes.
func (b *bundle) spec(c *runtime.Container) *specs.Spec {
	s := *c.Spec
	s.Version = ociVersion
	// Runtimes take orders from annotations (org.systemd.property.*, run.oci.*),
	// and those of a pod are whoever's may create one.
	s.Annotations = nil
	s.Root = &specs.Root{Path: b.rootfs, Readonly: c.Spec.Root != nil && c.Spec.Root.Readonly}
	l := *c.Spec.Linux
	s.Linux = &l
	l.CgroupsPath = b.cgroupsPath(c.Cgroup)
	l.Resources = resources(c.Spec.Linux.Resources)
	l.RootfsPropagation = "rslave"
	if slices.ContainsFunc(c.Mounts, func(m runtime.Mount) bool { return m.Propagation == runtime.PropagationBidirectional }) {
		l.RootfsPropagation = "rshared" // else what the volume shares would end here
	}
	if !b.cgroup2 { // as the native executor does
		l.Namespaces = slices.DeleteFunc(slices.Clone(l.Namespaces), func(n specs.LinuxNamespace) bool { return n.Type == specs.CgroupNamespace })
	}
	s.Mounts = append(b.standard(c), b.binds(c)...)
	return &s
}

// standard are the file systems that every container has.
func (b *bundle) standard(c *runtime.Container) (out []specs.Mount) {
	userns := len(c.UIDMap) > 0
	for _, m := range c.Spec.Mounts {
		switch {
		case m.Type == "bind":
			continue // the volumes are shown in the bundle
		case userns && m.Type == "sysfs" && c.Namespaces.Net == "":
			// A sysfs belongs to the network namespace's owner.
			m = specs.Mount{Destination: m.Destination, Type: "bind", Source: "/sys", Options: []string{"rbind", "nosuid", "noexec", "nodev", "ro"}}
		case userns && m.Type == "mqueue" && c.Namespaces.IPC == "":
			continue
		case userns && m.Type == "cgroup" && !b.cgroup2:
			continue // the folders of version 1 are closed to the container's root
		}
		out = append(out, m)
	}
	return out
}

// binds are the mounts of what is shown. The trees have their attributes and
// id mappings already; a bind keeps them.
func (b *bundle) binds(c *runtime.Container) (out []specs.Mount) {
	for _, s := range b.shown {
		if s.target == "" {
			continue // the root
		}
		out = append(out, specs.Mount{
			Destination: s.target, Type: "bind", Source: s.attach.At, Options: []string{"rbind", propagation(c, s.target)},
		})
	}
	// Parents first.
	slices.SortStableFunc(out, func(x, y specs.Mount) int {
		return strings.Count(x.Destination, "/") - strings.Count(y.Destination, "/")
	})
	return out
}

func propagation(c *runtime.Container, target string) string {
	for i := range c.Mounts {
		if path.Clean("/"+c.Mounts[i].ContainerPath) != target {
			continue
		}
		switch c.Mounts[i].Propagation {
		case runtime.PropagationHostToContainer:
			return "rslave"
		case runtime.PropagationBidirectional:
			return "rshared"
		}
	}
	return "rprivate"
}

// resources are what the runtime itself has to know: which devices there are,
// and the limits that must hold while it works. The rest is set by the cgroup
// package, as for any container.
func resources(r *specs.LinuxResources) *specs.LinuxResources {
	if r == nil {
		return nil
	}
	return &specs.LinuxResources{Devices: r.Devices, Memory: r.Memory, CPU: r.CPU, Pids: r.Pids}
}

// cgroupsPath is a cgroup's path as the driver wants it: for systemd
// "slice:prefix:name", of which it makes prefix-name.scope.
func (b *bundle) cgroupsPath(p string) string {
	if !b.systemd {
		return p
	}
	name := strings.TrimSuffix(path.Base(p), ".scope")
	prefix, id, _ := strings.Cut(name, "-")
	return path.Base(path.Dir(p)) + ":" + prefix + ":" + id
}

// newBundleFor adds what the host decides.
func (o *Executor) newBundleFor(h *handler, root *os.File, c *runtime.Container, volumes []native.Volume) (*bundle, error) {
	names, err := native.PrepareRoot(root, c)
	if err != nil {
		return nil, err
	}
	if c.Spec.Root == nil || !c.Spec.Root.Readonly {
		names = nil // they lie in the root as they are
	}
	rootfs := filepath.Join(o.folder(c.ID), "rootfs")
	if len(c.UIDMap) > 0 {
		rootfs = foreignRoot
	}
	b := newBundle(o.folder(c.ID), rootfs, root, volumes, names)
	b.systemd, b.cgroup2 = h.systemd, o.cfg.Cgroups.Mode() == cgroup.ModeV2
	return b, nil
}
