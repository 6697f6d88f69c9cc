package spec

import (
	"cmp"
	"maps"
	"path"
	goruntime "runtime"
	"slices"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime"
)

// Input is everything that decides what a container is.
type Input struct {
	ID string // of the container, 64 lowercase hex digits

	Command, Args []string // CRI: override the image's entrypoint and cmd
	Env           []string // KEY=value, values are bytes
	WorkingDir    string
	TTY           bool
	Image         ocispec.ImageConfig

	Security  runtime.Security
	Resources runtime.Resources
	Devices   []runtime.Device

	Hostname   string            // the pod's, for HOSTNAME
	Mounts     []runtime.Mount   // validated and listed; the executor takes its own copy
	EtcFiles   map[string]string // container path → host file; listed
	Shm        string            // host folder for /dev/shm; listed
	Namespaces runtime.Namespaces
	TargetPID  int // PIDTarget: pid of the target's first process

	UIDMap, GIDMap []runtime.IDMap
	CgroupPath     string
	RootPath       string // listed as root.path; the executor has the real one
	Annotations    map[string]string

	Host     Host
	Defaults Defaults
	Root     Root         // of the container's root file system; nil = an empty one
	Nodes    DeviceSource // nil = the host's own
}

// Defaults come from Naru's configuration. Zero values mean the built-in ones.
type Defaults struct {
	Capabilities []string            // nil = DefaultCapabilities
	Env          []string            // below the image's
	Rlimits      []specs.POSIXRlimit // in place of the built-in value of the same type
	AppArmor     string              // profile of RuntimeDefault; empty = DefaultAppArmor
	DeviceOwner  bool                // requested devices belong to the container's user, not to whom they do on the host
}

// Limits on lists that a request or an image brings.
const (
	maxPath  = 4096 // PATH_MAX
	maxPaths = 1024 // masked, readonly and volume paths each
)

// builder carries one Build from step to step.
type builder struct {
	in   *Input
	spec *specs.Spec
	who  identity
}

// steps of Build, in their order: later ones use what earlier ones set.
var steps = []struct {
	name string
	do   func(*builder) error
}{
	{"id maps", (*builder).idMaps},
	{"user", (*builder).user},
	{"command", (*builder).command},
	{"environment", (*builder).environment},
	{"working directory", (*builder).workingDir},
	{"capabilities", (*builder).capabilities},
	{"namespaces", (*builder).namespaces},
	{"mounts", (*builder).mounts},
	{"paths", (*builder).paths},
	{"seccomp", (*builder).seccomp},
	{"lsm", (*builder).lsm},
	{"limits", (*builder).limits},
	{"resources", (*builder).resources},
	{"devices", (*builder).devices},
}

// Build makes the specification, and tells the identity of the first process
// so that it can be stored: it is never resolved again from files that the
// container may have changed meanwhile (CVE-2016-3697, CVE-2026-30892).
func Build(in Input) (*specs.Spec, *runtime.User, error) {
	in.Host.Arch = cmp.Or(in.Host.Arch, goruntime.GOARCH)
	b := &builder{in: &in, spec: &specs.Spec{
		Version:     specs.Version,
		Root:        &specs.Root{Path: in.RootPath, Readonly: in.Security.ReadonlyRootfs},
		Process:     &specs.Process{Terminal: in.TTY, NoNewPrivileges: in.Security.NoNewPrivs},
		Annotations: maps.Clone(in.Annotations),
		Linux:       &specs.Linux{CgroupsPath: in.CgroupPath, Resources: &specs.LinuxResources{}},
	}}
	for _, s := range steps {
		if err := s.do(b); err != nil {
			return nil, nil, err
		}
	}
	u := b.who.User
	u.Groups = slices.Clone(u.Groups)
	return b.spec, &u, nil
}

// absolute checks a path of a request and gives its clean form.
func absolute(what, p string) (string, error) {
	switch {
	case p == "" || p[0] != '/':
		return "", errs.New(errs.InvalidArgument, "%s %q: want an absolute path", what, clip(p))
	case strings.ContainsRune(p, 0):
		return "", errs.New(errs.InvalidArgument, "%s %q: has a NUL byte", what, clip(p))
	case len(p) >= maxPath:
		return "", errs.New(errs.InvalidArgument, "%s %q: longer than %d bytes", what, clip(p), maxPath)
	}
	return path.Clean(p), nil
}

// within reports whether the clean path p is dir or below it.
func within(p, dir string) bool {
	return p == dir || strings.HasPrefix(p, strings.TrimSuffix(dir, "/")+"/")
}

// clip keeps hostile strings short in messages.
func clip(s string) string {
	if len(s) > 128 {
		return s[:128] + "…"
	}
	return s
}
