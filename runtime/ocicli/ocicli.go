// Package ocicli runs containers by OCI runtimes (runc, crun), by their command
// line, for pods whose RuntimeClass names one.
//
// An Executor is the native one for everything that does not depend on who made
// a container: the root file system and the volumes, which arrive here opened
// and attached nowhere, standard streams, logs, exits, signals, cgroups,
// statistics. What is different is here: Create, Start, Delete and the execs.
//
//	worker ── runtime's program ── container     the program ends,
//	keeper ────────────────────── container      and the keeper is its parent
//
// The program is a child of the monitor's worker, in a mount namespace in which
// the container's root file system and volumes are attached; nothing of that is
// ever seen on the host, and it goes with the program. The container's first
// process then is an orphan, which falls to the keeper: the same one that is
// the parent of every other container, so exits are exact and containers live
// through restarts of daemon and worker alike. An exec has a parent of its own
// (package reaper).
//
// All of a container's own files are in <run>/oci/<id>; the runtime's are in
// <run>/oci/root-<handler>. A folder <id> exists from before a container is
// made until nothing of it is left, so a daemon that was killed finds it again.
//
// Concurrency: as package native.
package ocicli

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/klog/v2"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime"
	"github.com/naru-project/naru/runtime/cgroup"
	"github.com/naru-project/naru/runtime/native"
)

// How long a runtime's program may take. It is killed then.
const (
	createTime  = 30 * time.Second
	startTime   = 30 * time.Second
	deleteTime  = 15 * time.Second
	probeTime   = 5 * time.Second
	programWait = time.Second // from SIGTERM to SIGKILL
)

// Config of an Executor.
type Config struct {
	RunDir  string
	Cgroups *cgroup.Driver
	// UserNamespaces: the host offers them.
	UserNamespaces bool
	Live
}

// Live is what Reconfigure changes.
type Live struct {
	Handlers []Handler
	// Native are the names of the handlers that are not run here.
	Native []string
}

// Executor runs containers, by their handlers.
type Executor struct {
	*native.Executor
	cfg   Config
	dir   string
	table atomic.Pointer[table]
}

// table is who runs what. It is never written after it was stored.
type table struct {
	native   []string
	handlers map[string]*handler
}

// New makes the folders. The programs are asked for nothing yet.
func New(x *native.Executor, cfg Config) (*Executor, error) {
	o := &Executor{Executor: x, cfg: cfg, dir: filepath.Join(cfg.RunDir, "oci")}
	o.table.Store(&table{})
	o.Reconfigure(cfg.Live)
	// What is left of execs that ended with the daemon before this one, their
	// environments among it.
	left, _ := filepath.Glob(filepath.Join(o.dir, "*", "exec-*"))
	for _, f := range append(left, o.consoleDir()) {
		if err := os.RemoveAll(f); err != nil {
			return nil, errs.New(errs.Internal, "remove what is left of an exec: %w", err)
		}
	}
	for _, dir := range []string{o.dir, o.consoleDir()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, errs.New(errs.Internal, "make the folder of OCI runtimes: %w", err)
		}
	}
	return o, nil
}

// Reconfigure replaces the handlers. What is known of a runtime that stays as
// it was, stays.
func (o *Executor) Reconfigure(l Live) {
	was := o.table.Load()
	now := &table{native: l.Native, handlers: map[string]*handler{}}
	for _, h := range l.Handlers {
		if old := was.handlers[h.Name]; old != nil && old.Path == h.Path && slices.Equal(old.Args, h.Args) {
			now.handlers[h.Name] = old
			continue
		}
		now.handlers[h.Name] = &handler{
			Handler: h, systemd: o.cfg.Cgroups.Systemd(), root: filepath.Join(o.dir, "root-"+h.Name), run: o.Executor, dir: o.dir,
		}
	}
	o.table.Store(now)
}

// Probe asks all runtimes what they can do, at once. What they do not answer
// is logged here and told by CheckHandler.
func (o *Executor) Probe(ctx context.Context) {
	var wg sync.WaitGroup
	for _, h := range o.table.Load().handlers {
		wg.Go(func() {
			if _, err := h.features(ctx); err != nil {
				klog.FromContext(ctx).Error(err, "a runtime handler cannot be used", "handler", h.Name)
			}
		})
	}
	wg.Wait()
}

// CheckHandler reports why no pod can be run by this handler. A runtime that
// did not answer before is asked again.
func (o *Executor) CheckHandler(ctx context.Context, name string, userns bool) error {
	t := o.table.Load()
	if slices.Contains(t.native, name) {
		return nil
	}
	h := t.handlers[name]
	if h == nil {
		return errs.New(errs.InvalidArgument, "runtime handler %q is not configured", name)
	}
	f, err := h.features(ctx)
	if err != nil {
		return err
	}
	if !userns {
		return nil
	}
	if !f.UserNamespaces {
		return errs.New(errs.FailedPrecondition, "runtime handler %q has no user namespaces: %s does not say that it can make them; run the pod with hostUsers: true or by another handler", name, h.Path)
	}
	return checkForeignRoot()
}

// UserNamespaces reports whether pods with this handler can have one: from
// memory, for Status.
func (o *Executor) UserNamespaces(name string) bool {
	if !o.cfg.UserNamespaces {
		return false
	}
	if h := o.table.Load().handlers[name]; h != nil {
		return h.known().Place
	}
	return true
}

// of finds the handler that is to make container c; nil is the native one.
func (o *Executor) of(c *runtime.Container) (*handler, error) {
	t := o.table.Load()
	if slices.Contains(t.native, c.Handler) {
		return nil, nil
	}
	if h := t.handlers[c.Handler]; h != nil {
		return h, nil
	}
	return nil, errs.New(errs.FailedPrecondition, "runtime handler %q is not configured any more; put it back, or remove the pod", c.Handler)
}

// made finds the handler by which a container was made, from its folder; there
// is none where foreign is false. A handler that is not configured any more is
// nil.
func (o *Executor) made(id string) (h *handler, foreign bool, err error) {
	b, err := os.ReadFile(filepath.Join(o.folder(id), "handler"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, errs.New(errs.Internal, "find the handler of container %s: %w", short(id), err)
	}
	return o.table.Load().handlers[string(b)], true, nil
}

// maker finds the handler that a container that is there was made by, whatever
// its name means since a reload; nil is the native one.
func (o *Executor) maker(id string) (*handler, error) {
	h, foreign, err := o.made(id)
	if foreign && h == nil && err == nil {
		err = errs.New(errs.FailedPrecondition, "the runtime handler of container %s is not configured any more; put it back, or remove the pod", short(id))
	}
	return h, err
}

// folder is a container's own.
func (o *Executor) folder(id string) string { return filepath.Join(o.dir, id) }

// consoleDir has a short name: the path of a socket must not be long.
func (o *Executor) consoleDir() string { return filepath.Join(o.dir, "tty") }

func short(id string) string { return id[:min(len(id), 13)] }
