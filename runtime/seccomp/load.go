package seccomp

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	moby "github.com/moby/profiles/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
)

// MaxProfile is the largest profile file that Load reads.
const MaxProfile = 1 << 20

// Load reads a Localhost profile: an absolute path of a regular file of at
// most MaxProfile bytes, in the format of Parse.
func Load(path string, caps []string, arch string) (*specs.LinuxSeccomp, error) {
	if !filepath.IsAbs(path) || strings.ContainsRune(path, 0) {
		return nil, errs.New(errs.InvalidArgument, "load seccomp profile %q: a Localhost profile needs an absolute path", path)
	}
	path = filepath.Clean(path)
	// O_NONBLOCK: opening a FIFO must not wait for a writer.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, errs.New(errs.InvalidArgument, "load seccomp profile: %w", err)
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, errs.New(errs.InvalidArgument, "load seccomp profile %s: not a regular file", path)
	}
	b, err := io.ReadAll(io.LimitReader(f, MaxProfile+1))
	if err != nil {
		return nil, errs.New(errs.InvalidArgument, "load seccomp profile: %w", err)
	}
	p, err := Parse(b, caps, arch)
	if err != nil {
		return nil, errs.New(errs.Of(err), "load seccomp profile %s: %w", path, err)
	}
	return p, nil
}

// document is the profile format of Docker and Podman, which is that of the
// OCI runtime specification plus archMap, includes, excludes and errnos by name.
type document struct {
	DefaultAction    specs.LinuxSeccompAction `json:"defaultAction"`
	DefaultErrnoRet  *uint                    `json:"defaultErrnoRet"`
	DefaultErrno     string                   `json:"defaultErrno"`
	Architectures    []specs.Arch             `json:"architectures"`
	ArchMap          []moby.Architecture      `json:"archMap"`
	Flags            []specs.LinuxSeccompFlag `json:"flags"`
	ListenerPath     string                   `json:"listenerPath"`
	ListenerMetadata string                   `json:"listenerMetadata"`
	Syscalls         []entry                  `json:"syscalls"`
}

type entry struct {
	Name     string                   `json:"name"`
	Names    []string                 `json:"names"`
	Action   specs.LinuxSeccompAction `json:"action"`
	ErrnoRet *uint                    `json:"errnoRet"`
	Errno    string                   `json:"errno"`
	Args     []specs.LinuxSeccompArg  `json:"args"`
	Comment  string                   `json:"comment"`
	Includes *moby.Filter             `json:"includes"`
	Excludes *moby.Filter             `json:"excludes"`
}

// Parse reads a profile and resolves its conditions on capabilities (the
// bounding set, "CAP_" names), architecture (a GOARCH) and kernel. Unknown
// fields, actions, architectures, operators and trailing bytes are errors of
// class InvalidArgument: a profile that is not understood must not protect less
// than its author meant.
func Parse(b []byte, caps []string, arch string) (*specs.LinuxSeccomp, error) {
	if len(b) > MaxProfile {
		return nil, errs.New(errs.InvalidArgument, "parse seccomp profile: larger than %d bytes", MaxProfile)
	}
	var d document
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&d); err != nil {
		return nil, errs.New(errs.InvalidArgument, "parse seccomp profile: %w", err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, errs.New(errs.InvalidArgument, "parse seccomp profile: bytes after its end")
	}
	p, err := d.resolve(environment{caps: caps, arch: arch, kernel: kernelRelease()})
	if err != nil {
		return nil, err
	}
	return p, Check(p, arch)
}

func (d *document) resolve(e environment) (*specs.LinuxSeccomp, error) {
	p := &specs.LinuxSeccomp{
		DefaultAction: d.DefaultAction, Architectures: d.Architectures, Flags: d.Flags,
		ListenerPath: d.ListenerPath, ListenerMetadata: d.ListenerMetadata,
	}
	var err error
	if p.DefaultErrnoRet, err = errnoOf(d.DefaultErrnoRet, d.DefaultErrno); err != nil {
		return nil, err
	}
	if len(d.Architectures) > 0 && len(d.ArchMap) > 0 {
		return nil, errs.New(errs.InvalidArgument, "parse seccomp profile: architectures and archMap exclude each other")
	}
	for _, m := range d.ArchMap {
		if !architectures[m.Arch] || slices.ContainsFunc(m.SubArches, func(a specs.Arch) bool { return !architectures[a] }) {
			return nil, errs.New(errs.InvalidArgument, "parse seccomp profile: unknown architecture in archMap of %q", m.Arch)
		}
		if na := defaultArchitectures[e.arch]; len(na) > 0 && m.Arch == na[0] {
			p.Architectures = append([]specs.Arch{m.Arch}, m.SubArches...)
		}
	}
	for i, s := range d.Syscalls {
		r, err := s.rule()
		if err != nil {
			return nil, errs.New(errs.Of(err), "parse seccomp profile: syscalls[%d]: %w", i, err)
		}
		// An entry that does not apply here must make sense, too.
		if _, err := readRule(r, 0); err != nil {
			return nil, errs.New(errs.Of(err), "parse seccomp profile: syscalls[%d]: %w", i, err)
		}
		if e.allows(s.Includes, s.Excludes) {
			p.Syscalls = append(p.Syscalls, r)
		}
	}
	return p, nil
}

func (s *entry) rule() (specs.LinuxSyscall, error) {
	r := specs.LinuxSyscall{Names: s.Names, Action: s.Action, Args: s.Args}
	if s.Name != "" {
		if len(s.Names) > 0 {
			return r, errs.New(errs.InvalidArgument, "name and names exclude each other")
		}
		r.Names = []string{s.Name}
	}
	var err error
	r.ErrnoRet, err = errnoOf(s.ErrnoRet, s.Errno)
	return r, err
}

// errnoOf takes an errno by number or by name; one of each must agree.
func errnoOf(nr *uint, name string) (*uint, error) {
	if name == "" {
		return nr, nil
	}
	v, ok := errnos()[name]
	if !ok || nr != nil && *nr != v {
		return nil, errs.New(errs.InvalidArgument, "parse seccomp profile: bad errno %q", name)
	}
	return &v, nil
}

var errnos = sync.OnceValue(func() map[string]uint {
	m := map[string]uint{}
	for i := syscall.Errno(1); i < 200; i++ {
		if n := unix.ErrnoName(i); n != "" {
			m[n] = uint(i)
		}
	}
	return m
})

// environment is what a profile's conditions ask for.
type environment struct {
	caps   []string
	arch   string // a GOARCH; for amd64 and arm64 profiles use the same word
	kernel moby.KernelVersion
}

// allows evaluates the includes and excludes of an entry: all of includes must
// be there (of arches one), none of excludes.
func (e *environment) allows(includes, excludes *moby.Filter) bool {
	if f := excludes; f != nil {
		if slices.Contains(f.Arches, e.arch) || slices.ContainsFunc(f.Caps, e.has) ||
			f.MinKernel != nil && e.atLeast(*f.MinKernel) {
			return false
		}
	}
	if f := includes; f != nil {
		if len(f.Arches) > 0 && !slices.Contains(f.Arches, e.arch) ||
			slices.ContainsFunc(f.Caps, func(c string) bool { return !e.has(c) }) ||
			f.MinKernel != nil && !e.atLeast(*f.MinKernel) {
			return false
		}
	}
	return true
}

func (e *environment) has(capability string) bool { return slices.Contains(e.caps, capability) }

func (e *environment) atLeast(v moby.KernelVersion) bool {
	return e.kernel.Kernel > v.Kernel || e.kernel.Kernel == v.Kernel && e.kernel.Major >= v.Major
}

// kernelRelease is the version of the running kernel; of an unreadable release
// 0.0, which fulfils no minimum.
var kernelRelease = sync.OnceValue(func() (v moby.KernelVersion) {
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		_, _ = fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &v.Kernel, &v.Major)
	}
	return v
})
