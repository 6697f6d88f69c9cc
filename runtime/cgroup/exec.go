package cgroup

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
)

// execPrefix starts the name of every exec's cgroup; 16 hex digits follow.
const execPrefix = "exec-"

// ExecGroup is where the process of one exec lives: a cgroup of its own below
// the container's, so that killing the exec kills whatever it started and
// nothing else, while all of it counts against the container's limits.
//
// On version 2 and hybrid hosts that cgroup is in the version 2 tree; on pure
// version 1 it is in the freezer's. A container that manages its own cgroup can
// forbid children (cgroup.max.descendants, threaded mode): the exec then enters
// the container's own cgroup, and Shared is true.
type ExecGroup struct {
	// Path of the cgroup: of the exec's own, or with Shared of the container's.
	Path string
	// Shared means that the exec has no cgroup of its own. Kill and Remove then
	// do nothing: the caller knows one process only, and must kill that.
	Shared bool

	own   *Group
	clone *os.File
	tasks []*os.File
}

// NewExec makes the cgroup of one exec and opens its entrances.
func (g *Group) NewExec(ctx context.Context) (*ExecGroup, error) {
	if err := ctx.Err(); err != nil {
		return nil, errs.New(errs.Of(err), "make the cgroup of an exec: %w", context.Cause(ctx))
	}
	if g.scope != nil {
		return nil, errs.New(errs.FailedPrecondition, "exec in cgroup %s: it has no process yet", g.Path)
	}
	e := &ExecGroup{Path: g.Path, Shared: true}
	name, err := g.makeExec()
	switch {
	case err == nil:
		e.Path, e.Shared = g.Path+"/"+name, false
		e.own = &Group{Path: e.Path, rel: e.Path[1:], d: g.d}
	case errors.Is(err, unix.ENOENT):
		return nil, errs.New(errs.NotFound, "no cgroup %s", g.Path)
	case !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EOPNOTSUPP):
		// EAGAIN is cgroup.max.depth or max.descendants.
		return nil, classify(err, "make the cgroup of an exec in %s", g.Path)
	}
	if err := e.open(g); err != nil {
		e.Close()
		if e.own != nil {
			_ = unix.Unlinkat(g.d.tracking().fd, e.own.rel, unix.AT_REMOVEDIR)
		}
		return nil, err
	}
	return e, nil
}

// makeExec makes a folder that nobody could have prepared: random, and mkdir
// says if it is there. In the version 2 tree it must be a domain, which the
// child of a threaded group is not.
func (g *Group) makeExec() (string, error) {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	name := execPrefix + hex.EncodeToString(b[:])
	h := g.d.tracking()
	if err := h.mkdir(g.rel + "/" + name); err != nil {
		return "", err
	}
	if !h.v2 {
		return name, nil
	}
	kind, err := readStringAt(h.fd, g.rel+"/"+name+"/cgroup.type")
	if err == nil && kind == "domain" {
		return name, nil
	}
	_ = unix.Unlinkat(h.fd, g.rel+"/"+name, unix.AT_REMOVEDIR)
	if err == nil {
		err = unix.EOPNOTSUPP
	}
	return "", err
}

func (e *ExecGroup) open(g *Group) error {
	track := g.d.tracking()
	rel := func(h *hierarchy) string {
		if h == track {
			return e.Path[1:]
		}
		return g.rel
	}
	for _, h := range g.d.hier {
		if h.v2 {
			f, err := openFile(h, rel(h), unix.O_RDONLY|unix.O_DIRECTORY)
			if err != nil {
				return err
			}
			e.clone = f
			continue
		}
		f, err := openFile(h, rel(h)+"/tasks", unix.O_WRONLY)
		if err != nil {
			return err
		}
		e.tasks = append(e.tasks, f)
	}
	return nil
}

// CloneFD is the exec's folder in the version 2 tree, nil where there is none.
func (e *ExecGroup) CloneFD() *os.File { return e.clone }

// TaskFDs are the version 1 entrances, as Group.TaskFDs.
func (e *ExecGroup) TaskFDs() []*os.File { return e.tasks }

// Close releases the descriptors.
func (e *ExecGroup) Close() {
	if e.clone != nil {
		_ = e.clone.Close()
		e.clone = nil
	}
	for _, f := range e.tasks {
		_ = f.Close()
	}
	e.tasks = nil
}

// Procs lists the processes of the exec; none when Shared.
func (e *ExecGroup) Procs() ([]int, error) {
	if e.own == nil {
		return nil, nil
	}
	return e.own.Procs()
}

// Kill ends every process of the exec.
func (e *ExecGroup) Kill(ctx context.Context) error {
	if e.own == nil {
		return nil
	}
	return e.own.Kill(ctx)
}

// Remove closes the descriptors and removes the exec's cgroup, once it is
// empty. Processes that outlive the exec are errs.FailedPrecondition; the
// container's removal takes care of what is left then.
func (e *ExecGroup) Remove(ctx context.Context) error {
	e.Close()
	if e.own == nil {
		return nil
	}
	return removeTree(ctx, e.own.d.tracking(), e.own.rel, time.Now().Add(removeWait))
}
