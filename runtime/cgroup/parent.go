package cgroup

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/sys"
)

// marks remembers which folders Naru made itself, and in which hierarchies:
// kubelet makes the pods' cgroups where its own controllers are and removes
// them there, but the rest of them (the version 2 tree of a hybrid host, the
// parents of pods that do not come from kubelet) is ours to remove.
//
// A mark is written before its folder is made and removed after it, so that a
// crash leaves a mark too many, never a folder.
type marks struct {
	mu  sync.Mutex // also orders making and removing of parents
	dir string
	mem map[string][]string
}

// get returns the hierarchies in which path is ours. mu is held.
func (m *marks) get(path string) []string {
	if names, ok := m.mem[path]; ok || m.dir == "" {
		return names
	}
	b, err := os.ReadFile(m.file(path))
	if err != nil {
		return nil
	}
	head, rest, _ := strings.Cut(string(b), "\n")
	if head != path {
		return nil
	}
	names := strings.Fields(rest)
	m.mem[path] = names
	return names
}

// put notes the hierarchies of path; none removes the mark. mu is held.
func (m *marks) put(path string, names []string) error {
	if len(names) == 0 {
		delete(m.mem, path)
		if m.dir == "" {
			return nil
		}
		if err := os.Remove(m.file(path)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return errs.New(errs.Internal, "forget cgroup parent %s: %w", path, err)
		}
		return nil
	}
	m.mem[path] = names
	if m.dir == "" {
		return nil
	}
	// No rename and no fsync: the folder is on a tmpfs, and a mark that is cut
	// short is one that names no path.
	if err := os.MkdirAll(m.dir, 0o700); err != nil {
		return errs.New(errs.Internal, "note cgroup parent %s: %w", path, err)
	}
	text := path + "\n" + strings.Join(names, "\n") + "\n"
	if err := os.WriteFile(m.file(path), []byte(text), 0o600); err != nil {
		return errs.New(errs.Internal, "note cgroup parent %s: %w", path, err)
	}
	return nil
}

// all returns the paths of all marks. What is no mark any more, because a crash
// cut it short, is removed. mu is held.
func (m *marks) all() ([]string, error) {
	if m.dir == "" {
		return slices.Collect(maps.Keys(m.mem)), nil
	}
	list, err := os.ReadDir(m.dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, errs.New(errs.Internal, "list cgroup parents: %w", err)
	}
	var paths []string
	for _, e := range list {
		if e.IsDir() { // the ledger's
			continue
		}
		file := filepath.Join(m.dir, e.Name())
		b, err := os.ReadFile(file)
		if err != nil {
			return nil, errs.New(errs.Internal, "read the mark of a cgroup parent: %w", err)
		}
		path, rest, _ := strings.Cut(string(b), "\n")
		if m.file(path) != file || len(strings.Fields(rest)) == 0 || !strings.HasPrefix(path, "/") {
			_ = os.Remove(file)
			continue
		}
		paths = append(paths, path)
	}
	return paths, nil
}

func (m *marks) file(path string) string { return filepath.Join(m.dir, fileName(path)) }

// fileName is what the file of a cgroup is called.
func fileName(path string) string {
	sum := sha256.Sum256([]byte(path))
	return hex.EncodeToString(sum[:16])
}

// EnsurePod makes the cgroup parent of a pod, CRI's cgroup_parent, wherever it
// is missing.
func (d *Driver) EnsurePod(ctx context.Context, parent string) error {
	path, err := d.ParentPath(parent)
	if err != nil {
		return err
	}
	return d.ensureParent(ctx, path)
}

// ensureParent makes path and what is missing above it. Where all is there it
// costs one look per hierarchy; only a slice's account takes a lock.
func (d *Driver) ensureParent(ctx context.Context, path string) error {
	rel := path[1:]
	switch {
	case rel == "":
		return nil
	case d.systemd:
		if err := d.ensureSlice(ctx, path); err != nil {
			return err
		}
		return d.ledger.open(path)
	case len(d.missing(rel)) == 0:
		return nil
	}
	d.marks.mu.Lock()
	defer d.marks.mu.Unlock()
	for i := 0; i <= len(rel); i++ {
		if i < len(rel) && rel[i] != '/' {
			continue
		}
		if err := d.makeParent(rel[:i]); err != nil {
			return err
		}
	}
	return nil
}

func (d *Driver) missing(rel string) []*hierarchy {
	var m []*hierarchy
	for _, h := range d.hier {
		if !exists(h.fd, rel) {
			m = append(m, h)
		}
	}
	return m
}

// makeParent makes one folder where it is missing. marks.mu is held.
func (d *Driver) makeParent(rel string) error {
	missing := d.missing(rel)
	if len(missing) == 0 {
		return nil
	}
	names := slices.Clone(d.marks.get("/" + rel))
	before := len(names)
	for _, h := range missing {
		if !slices.Contains(names, h.name) {
			names = append(names, h.name)
		}
	}
	if err := d.marks.put("/"+rel, names); err != nil {
		return err
	}
	for i, h := range missing {
		err := h.mkdir(rel)
		if err == unix.EEXIST {
			err = nil // kubelet was faster; removing an empty folder of its is harmless
		}
		if err == nil && h.has("cpuset") {
			err = errors.Join(inherit(h, rel, "cpuset.mems"), inherit(h, rel, "cpuset.cpus"))
		}
		if err != nil {
			for _, made := range missing[:i] {
				_ = unix.Unlinkat(made.fd, rel, unix.AT_REMOVEDIR)
			}
			_ = d.marks.put("/"+rel, names[:before])
			return classify(err, "make cgroup parent /%s in hierarchy %s", rel, h.name)
		}
	}
	return nil
}

// removeWait bounds how long the removal of an empty folder waits for the
// kernel to take notice of processes that have exited.
const removeWait = 500 * time.Millisecond

// RemovePod removes the cgroup parent of a pod where Naru made it, and the
// parents above it that it made and that are empty by now. A parent that has
// other cgroups or processes in it is errs.FailedPrecondition; one that Naru
// did not make, or that is gone, is left alone without an error.
func (d *Driver) RemovePod(ctx context.Context, parent string) error {
	path, err := d.ParentPath(parent)
	if err != nil {
		return err
	}
	return d.removeParent(ctx, path)
}

func (d *Driver) removeParent(ctx context.Context, path string) error {
	if d.systemd {
		return d.removeSlice(ctx, path)
	}
	// Waiting, if need be, is done outside of the lock.
	deadline := time.Now().Add(removeWait)
	for {
		err := d.tryRemove(path)
		if err == nil || !errs.Is(err, errs.FailedPrecondition) || time.Now().After(deadline) || d.populated(path) {
			return err
		}
		if err := pause(ctx, 5*time.Millisecond); err != nil {
			return err
		}
	}
}

func (d *Driver) tryRemove(path string) error {
	d.marks.mu.Lock()
	defer d.marks.mu.Unlock()
	if err := d.removeMarked(path); err != nil {
		return err
	}
	for p := parentOf(path); p != "/"; p = parentOf(p) {
		if d.removeMarked(p) != nil {
			break // still in use by others
		}
	}
	return nil
}

// Sweep removes the parents that Naru made for pods that nobody knows any more.
// known are the parents of those that are, as CRI spells them. A parent with
// anything in it stays.
func (d *Driver) Sweep(ctx context.Context, known []string) error {
	keep := map[string]bool{}
	for _, parent := range known {
		path, err := d.ParentPath(parent)
		if err != nil {
			return err
		}
		for ; path != "/"; path = parentOf(path) {
			keep[path] = true
		}
	}
	d.marks.mu.Lock()
	paths, err := d.marks.all()
	d.marks.mu.Unlock()
	slices.Sort(paths)
	all := []error{err}
	for _, path := range slices.Backward(paths) { // what is below comes first
		if keep[path] {
			continue
		}
		if err := d.removeParent(ctx, path); err != nil && !errs.Is(err, errs.FailedPrecondition) {
			all = append(all, err)
		}
	}
	return errors.Join(all...)
}

// removeMarked removes one folder where it is ours. marks.mu is held.
func (d *Driver) removeMarked(path string) error {
	names := d.marks.get(path)
	if len(names) == 0 {
		return nil
	}
	var kept []string
	var last error
	for _, h := range d.hier {
		if !slices.Contains(names, h.name) {
			continue
		}
		err := unix.Unlinkat(h.fd, path[1:], unix.AT_REMOVEDIR)
		if err != nil && err != unix.ENOENT {
			kept = append(kept, h.name)
			last = err
		}
	}
	if len(kept) != len(names) {
		if err := d.marks.put(path, kept); err != nil {
			return err
		}
	}
	if last != nil {
		return classify(last, "remove cgroup parent %s (hierarchies %s)", path, strings.Join(kept, " "))
	}
	return nil
}

// populated reports whether path has cgroups below it, which no waiting helps.
func (d *Driver) populated(path string) bool {
	for _, h := range d.hier {
		if names, err := subdirs(h.fd, path[1:], 1); err == nil && len(names) > 0 {
			return true
		}
	}
	return false
}

func pause(ctx context.Context, d time.Duration) error {
	if !sys.Pause(ctx, d) {
		return errs.New(errs.Of(ctx.Err()), "wait for a cgroup: %w", context.Cause(ctx))
	}
	return nil
}
