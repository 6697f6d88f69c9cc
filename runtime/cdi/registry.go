// Package cdi finds devices of the Container Device Interface by their names
// (vendor.com/class=name) and says what each adds to a container.
//
// The specification files are the administrator's and are believed; yet one
// that is broken, huge, or that others than root may write, costs nothing but
// the devices in it. Whether a file changed is asked of the file system each
// time: a driver that writes its file right before the kubelet creates the
// container is never too early, and nothing runs while no device is asked for.
//
// Reading, validating and applying is the CDI project's own library. What the
// executor cannot do (see Edits) is refused here, by name.
//
// Concurrency: a Registry may be used by many goroutines; Edits do not change.
package cdi

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
	cdilib "tags.cncf.io/container-device-interface/pkg/cdi"
	"tags.cncf.io/container-device-interface/pkg/parser"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/sys"
)

// Limits of the folders. A specification with every partition of eight GPUs
// has some hundred KiB.
const (
	maxFile  = 8 << 20
	maxFiles = 1024
)

// Registry is the set of devices that the folders describe.
type Registry struct {
	mu    sync.Mutex
	dirs  []string         // guarded by mu
	files map[string]*file // by path; guarded by mu
}

// file is a specification file as it was last read.
type file struct {
	stamp stamp
	prio  int // of its folder
	spec  *cdilib.Spec
	err   error
}

// stamp changes when a file does.
type stamp struct {
	dev, ino     uint64
	size         int64
	mtime, ctime unix.Timespec
}

// New makes a registry of these folders; what is in a later one goes before
// what is in an earlier. A folder may be absent.
func New(dirs []string) *Registry {
	return &Registry{dirs: slices.Clone(dirs), files: map[string]*file{}}
}

// SetDirs changes the folders.
func (r *Registry) SetDirs(dirs []string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.dirs = slices.Clone(dirs)
}

// Resolve says what the devices with these names add to a container.
func (r *Registry) Resolve(names []string) (*Edits, error) {
	for _, name := range names {
		if !parser.IsQualifiedName(name) {
			return nil, errs.New(errs.InvalidArgument, "CDI device %q: want vendor.com/class=name", clip(name))
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.dirs) == 0 {
		return nil, errs.New(errs.FailedPrecondition, "CDI device %q: CDI is switched off on this node, cdi.spec_dirs is empty", names[0])
	}
	problems := r.refresh()
	devices := r.devices()
	var found []*cdilib.Device
	for _, name := range names {
		of := devices[name]
		switch len(of) {
		case 1:
			found = append(found, of[0])
		case 0:
			return nil, r.missing(name, problems)
		default:
			return nil, errs.New(errs.FailedPrecondition, "CDI device %q is in two files, %s and %s: remove one", name, of[0].GetSpec().GetPath(), of[1].GetSpec().GetPath())
		}
	}
	return newEdits(found)
}

// missing is the error of a device that no file describes.
func (r *Registry) missing(name string, problems []error) error {
	const most = 4
	hint := ""
	if len(problems) > most {
		problems = append(problems[:most:most], fmt.Errorf("and %d more", len(problems)-most))
	}
	if err := errors.Join(problems...); err != nil {
		hint = "; these cannot be used: " + strings.ReplaceAll(err.Error(), "\n", "; ")
	}
	return errs.New(errs.FailedPrecondition, "CDI device %q is in no specification file of %s%s", name, strings.Join(r.dirs, ", "), hint)
}

// devices are all that the files describe. A device of a later folder hides its
// namesakes of earlier ones; two in one folder are both listed.
func (r *Registry) devices() map[string][]*cdilib.Device {
	out := map[string][]*cdilib.Device{}
	for _, f := range r.files {
		if f.err != nil {
			continue
		}
		for i := range f.spec.Devices {
			d := f.spec.GetDevice(f.spec.Devices[i].Name)
			name := d.GetQualifiedName()
			have := out[name]
			switch {
			case len(have) == 0 || have[0].GetSpec().GetPriority() < f.prio:
				out[name] = []*cdilib.Device{d}
			case have[0].GetSpec().GetPriority() == f.prio:
				out[name] = append(have, d)
			}
		}
	}
	return out
}

// refresh reads what changed, and lists what cannot be used. The caller holds mu.
func (r *Registry) refresh() (problems []error) {
	files := map[string]*file{}
	for prio, dir := range r.dirs {
		names, err := specNames(dir)
		if err != nil {
			problems = append(problems, err)
		}
		for _, name := range names {
			path := filepath.Join(dir, name)
			f := r.load(path, prio)
			if errors.Is(f.err, fs.ErrNotExist) {
				continue // gone meanwhile
			}
			if f.err != nil {
				problems = append(problems, f.err)
			}
			files[path] = f
		}
	}
	r.files = files
	return problems
}

// specNames lists the specification files of a folder that only root can
// change.
func specNames(dir string) ([]string, error) {
	f, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if _, err := sys.Guarded(f, unix.S_IFDIR); err != nil {
		return nil, fmt.Errorf("folder %s: %w", dir, err)
	}
	all, err := f.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("folder %s: %w", dir, err)
	}
	all = slices.DeleteFunc(all, func(n string) bool {
		ext := filepath.Ext(n)
		return ext != ".json" && ext != ".yaml"
	})
	if len(all) > maxFiles {
		return nil, fmt.Errorf("folder %s: %d specification files, more than %d", dir, len(all), maxFiles)
	}
	slices.Sort(all)
	return all, nil
}

// load reads a file, unless it is as it was.
func (r *Registry) load(path string, prio int) *file {
	out := &file{prio: prio}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0) // a FIFO must not make us wait
	if err != nil {
		out.err = err
		return out
	}
	defer f.Close()
	st, err := sys.Guarded(f, unix.S_IFREG)
	if err == nil && st.Size > maxFile {
		err = fmt.Errorf("it has %d bytes, more than %d", st.Size, maxFile)
	}
	if err != nil {
		out.err = fmt.Errorf("%s: %w", path, err)
		return out
	}
	out.stamp = stamp{dev: st.Dev, ino: st.Ino, size: st.Size, mtime: st.Mtim, ctime: st.Ctim}
	if old := r.files[path]; old != nil && old.prio == prio && old.stamp == out.stamp {
		return old
	}
	out.spec, out.err = readSpec(path, prio)
	return out
}

// readSpec reads a file by the library. Some files make it panic (a list with
// an empty element).
func readSpec(path string, prio int) (spec *cdilib.Spec, err error) {
	defer func() {
		if v := recover(); v != nil {
			spec, err = nil, fmt.Errorf("%s: not a CDI specification", path)
		}
	}()
	if spec, err = cdilib.ReadSpec(path, prio); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return spec, nil
}

// clip keeps strings of a request short in messages.
func clip(s string) string {
	if len(s) > 128 {
		return s[:128] + "…"
	}
	return s
}
