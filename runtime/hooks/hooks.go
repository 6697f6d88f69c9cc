// Package hooks reads folders of OCI hooks, as oci-hooks(5) and CRI-O have them,
// and adds those to a container whose conditions it meets.
//
// The files are the administrator's and are believed, yet only where nobody but
// root can write them: their programs run as root. They are read at each create:
// there are few, what they say now is what counts, and no container gets half of
// what a folder said a moment ago. A file that cannot be used fails the create.
// Which containers it is meant for is not known, and a hook may well be what
// keeps a container in bounds.
//
// It holds no state.
package hooks

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/sys"
)

const (
	maxFile  = 64 << 10
	maxFiles = 256
	// DefaultTimeout is the deadline, in seconds, of a hook that has none.
	DefaultTimeout = 10
	maxTimeout     = 3600
)

// Container is what conditions are about.
type Container struct {
	Annotations map[string]string // the container's and its pod's
	BindMounts  bool              // the request has mounts
}

// Add adds to a finished specification the hooks of these folders whose
// conditions the container meets, in the order of their files' names, and the
// annotations, which hooks find in the state. A file of a later folder goes
// before its namesake of an earlier one; a folder may be absent.
func Add(dirs []string, s *specs.Spec, c Container) error {
	files, err := list(dirs)
	if err != nil {
		return err
	}
	for _, name := range sorted(files) {
		data, err := sys.ReadGuarded(files[name], maxFile)
		if errors.Is(err, fs.ErrNotExist) {
			continue // gone meanwhile
		}
		var h *hook
		if err == nil {
			h, err = parse(data)
		}
		if err != nil {
			return errs.New(errs.FailedPrecondition, "OCI hook %s: %w; correct the file, or take it away", files[name], err)
		}
		if h.matches(s, c) {
			h.add(s)
			s.Annotations = maps.Clone(c.Annotations)
		}
	}
	return nil
}

// sorted gives the names as oci-hooks(5) has them: by their lower case.
func sorted(files map[string]string) []string {
	return slices.SortedFunc(maps.Keys(files), func(a, b string) int {
		if n := strings.Compare(strings.ToLower(a), strings.ToLower(b)); n != 0 {
			return n
		}
		return strings.Compare(a, b)
	})
}

// list finds the files by their names.
func list(dirs []string) (map[string]string, error) {
	files := map[string]string{}
	for _, dir := range dirs {
		names, err := jsonNames(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, errs.New(errs.FailedPrecondition, "folder of OCI hooks %s: %w", dir, err)
		}
		for _, n := range names {
			files[n] = filepath.Join(dir, n)
		}
	}
	if len(files) > maxFiles {
		return nil, errs.New(errs.FailedPrecondition, "folders of OCI hooks: %d files, more than %d", len(files), maxFiles)
	}
	return files, nil
}

func jsonNames(dir string) ([]string, error) {
	f, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	if _, err := sys.Guarded(f, unix.S_IFDIR); err != nil {
		return nil, err
	}
	names, err := f.Readdirnames(-1)
	return slices.DeleteFunc(names, func(n string) bool { return filepath.Ext(n) != ".json" }), err
}

// hook is a file of version 1.0.0.
type hook struct {
	Version string     `json:"version"`
	Hook    specs.Hook `json:"hook"`
	When    struct {
		Always        *bool             `json:"always"`
		Annotations   map[string]string `json:"annotations"`
		Commands      []string          `json:"commands"`
		HasBindMounts *bool             `json:"hasBindMounts"`
	} `json:"when"`
	Stages []string `json:"stages"`

	annotations [][2]*regexp.Regexp
	commands    []*regexp.Regexp
}

// parse reads a file and checks all of it. A key that is not known may be a
// condition: without it a hook would run where it must not.
func parse(data []byte) (*hook, error) {
	h := &hook{}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(h); err != nil {
		return nil, err
	}
	if d.More() {
		return nil, errors.New("there is something behind the JSON object")
	}
	if h.Version != "1.0.0" {
		return nil, fmt.Errorf("version %.20q is not known, want 1.0.0", h.Version)
	}
	if err := h.checkProgram(); err != nil {
		return nil, err
	}
	if len(h.Stages) == 0 {
		return nil, errors.New("it has no stages")
	}
	for _, s := range h.Stages {
		if stage(&specs.Hooks{}, s) == nil {
			return nil, fmt.Errorf("stage %.40q is none of prestart, createRuntime, createContainer, startContainer, poststart, poststop", s)
		}
	}
	return h, h.compile()
}

func (h *hook) checkProgram() error {
	p := &h.Hook
	switch {
	case !filepath.IsAbs(p.Path):
		return fmt.Errorf("hook.path %.100q is not an absolute path", p.Path)
	case p.Timeout != nil && (*p.Timeout <= 0 || *p.Timeout > maxTimeout):
		return fmt.Errorf("hook.timeout: %d seconds, want 1 to %d", *p.Timeout, maxTimeout)
	case slices.ContainsFunc(append(append([]string{p.Path}, p.Args...), p.Env...), func(s string) bool { return strings.ContainsRune(s, 0) }):
		return errors.New("hook: a text has a NUL byte")
	}
	if p.Timeout == nil {
		p.Timeout = new(DefaultTimeout)
	}
	return nil
}

// compile reads the patterns.
func (h *hook) compile() error {
	w := &h.When
	if w.Always == nil && w.HasBindMounts == nil && len(w.Annotations) == 0 && len(w.Commands) == 0 {
		return errors.New("when has no condition: it would never run")
	}
	var all []error
	re := func(s string) *regexp.Regexp {
		r, err := regexp.Compile(s)
		all = append(all, err)
		return r
	}
	for k, v := range w.Annotations {
		h.annotations = append(h.annotations, [2]*regexp.Regexp{re(k), re(v)})
	}
	for _, c := range w.Commands {
		h.commands = append(h.commands, re(c))
	}
	return errors.Join(all...)
}

// matches reports whether the container meets all conditions that there are. A
// condition that is false is never met (oci-hooks(5)).
func (h *hook) matches(s *specs.Spec, c Container) bool {
	w := &h.When
	if w.Always != nil && !*w.Always || w.HasBindMounts != nil && (!*w.HasBindMounts || !c.BindMounts) {
		return false
	}
	for _, re := range h.annotations {
		met := false
		for k, v := range c.Annotations {
			met = met || re[0].MatchString(k) && re[1].MatchString(v)
		}
		if !met {
			return false
		}
	}
	if len(h.commands) == 0 {
		return true
	}
	return s.Process != nil && len(s.Process.Args) > 0 &&
		slices.ContainsFunc(h.commands, func(re *regexp.Regexp) bool { return re.MatchString(s.Process.Args[0]) })
}

func (h *hook) add(s *specs.Spec) {
	if s.Hooks == nil {
		s.Hooks = &specs.Hooks{}
	}
	for _, name := range h.Stages {
		l := stage(s.Hooks, name)
		*l = append(*l, h.Hook)
	}
}

// stage finds the list of a stage; there is none with another name.
func stage(h *specs.Hooks, name string) *[]specs.Hook {
	switch name {
	case "prestart":
		return &h.Prestart //nolint:staticcheck // deprecated, not gone
	case "createRuntime":
		return &h.CreateRuntime
	case "createContainer":
		return &h.CreateContainer
	case "startContainer":
		return &h.StartContainer
	case "poststart":
		return &h.Poststart
	case "poststop":
		return &h.Poststop
	}
	return nil
}
