package cgroup

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime"
)

// Options of Create that are no limits.
type Options struct {
	// OOMGroup has the OOM killer end all of the container, not one process
	// (memory.oom.group). Version 1 cannot; it is ignored there.
	OOMGroup bool
}

// Group is one cgroup, in every hierarchy of the host.
type Group struct {
	// Path from the root of the hierarchies, "/kubepods/burstable/podX/<id>".
	Path string

	d     *Driver
	rel   string // Path without the leading slash
	clone *os.File
	tasks []*os.File
	scope *pendingScope // systemd: what AddPID has to do; nil after it
}

// pendingScope is what Create was asked for, kept until there is a process.
type pendingScope struct {
	limits  runtime.Resources
	devices *devicePolicy
	opts    Options
}

// Create makes the group at path, which ContainerPath returned, in every
// hierarchy, sets its limits and its device rules, and opens what a child needs
// to enter it. Missing parents are made too. On any error nothing is left.
//
// Left-overs of an earlier try at the same path are removed first; with
// processes in them the answer is errs.AlreadyExists.
func (d *Driver) Create(ctx context.Context, path string, r runtime.Resources, devices []specs.LinuxDeviceCgroup, o Options) (*Group, error) {
	if err := checkPath(path); err != nil {
		return nil, err
	}
	if err := Validate(&r); err != nil {
		return nil, err
	}
	policy, err := newDevicePolicy(devices)
	if err != nil {
		return nil, err
	}
	g := &Group{Path: path, d: d, rel: path[1:]}
	if d.systemd {
		if err := d.ensureParent(ctx, parentOf(path)); err != nil {
			return nil, err
		}
		g.scope = &pendingScope{limits: r, devices: policy, opts: o}
		return g, nil
	}
	if err := g.makeAll(ctx); err != nil {
		return nil, err
	}
	if err := g.fill(&r, policy, o); err != nil {
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		return nil, errors.Join(err, g.Remove(undo))
	}
	return g, nil
}

// Open returns the group at path, which a record kept over a restart. A path
// at which no group is, is errs.NotFound.
func (d *Driver) Open(path string) (*Group, error) {
	if err := checkPath(path); err != nil {
		return nil, err
	}
	g := &Group{Path: path, d: d, rel: path[1:]}
	if !exists(d.tracking().fd, g.rel) {
		return nil, errs.New(errs.NotFound, "no cgroup %s", path)
	}
	return g, nil
}

// tracking is the hierarchy that is asked for a group's processes.
func (d *Driver) tracking() *hierarchy {
	if d.unified != nil {
		return d.unified
	}
	for _, name := range []string{"freezer", "pids"} {
		if h := d.control[name]; h != nil {
			return h
		}
	}
	return d.hier[0]
}

// CloneFD is the group's folder in the version 2 tree, for CLONE_INTO_CGROUP;
// nil where there is none, and with the systemd driver before AddPID. It is
// the Group's until Close.
func (g *Group) CloneFD() *os.File { return g.clone }

// TaskFDs are the open "tasks" files of the version 1 trees. The child enters
// by writing "0" into each. They are the Group's until Close.
func (g *Group) TaskFDs() []*os.File { return g.tasks }

// Close releases the descriptors. The group itself stays, and all other
// methods still work.
func (g *Group) Close() {
	if g.clone != nil {
		_ = g.clone.Close()
		g.clone = nil
	}
	for _, f := range g.tasks {
		_ = f.Close()
	}
	g.tasks = nil
}

// OpenFDs opens CloneFD and TaskFDs again, of a group that Open returned.
func (g *Group) OpenFDs() (err error) {
	defer func() {
		if err != nil {
			g.Close()
		}
	}()
	g.Close()
	if g.d.unified != nil {
		if g.clone, err = openFile(g.d.unified, g.rel, unix.O_RDONLY|unix.O_DIRECTORY); err != nil {
			return err
		}
	}
	for _, h := range g.d.hier {
		if h.v2 {
			continue
		}
		f, err := openFile(h, g.rel+"/tasks", unix.O_WRONLY)
		if err != nil {
			return err
		}
		g.tasks = append(g.tasks, f)
	}
	return nil
}

func openFile(h *hierarchy, rel string, flags int) (*os.File, error) {
	fd, err := openAt(h.fd, rel, flags)
	if err != nil {
		return nil, classify(err, "open %s of cgroup hierarchy %s", rel, h.name)
	}
	return os.NewFile(uintptr(fd), rel), nil
}

// makeAll makes the folder everywhere. A parent may vanish meanwhile: another
// pod's RemovePod takes empty parents away.
func (g *Group) makeAll(ctx context.Context) error {
	made := make([]*hierarchy, 0, len(g.d.hier))
	undo := func() {
		for _, h := range slices.Backward(made) {
			_ = unix.Unlinkat(h.fd, g.rel, unix.AT_REMOVEDIR)
		}
	}
	const tries = 5
	for _, h := range g.d.hier {
		var err error
		for i := 0; i < tries; i++ {
			err = h.mkdir(g.rel)
			if err == unix.ENOENT {
				if e := g.d.ensureParent(ctx, parentOf(g.Path)); e != nil {
					undo()
					return e
				}
				continue
			}
			if err == unix.EEXIST {
				if e := g.clearLeftover(ctx, h); e != nil {
					undo()
					return e
				}
				continue
			}
			break
		}
		if err != nil {
			undo()
			return classify(err, "make cgroup %s in hierarchy %s", g.Path, h.name)
		}
		made = append(made, h)
	}
	return nil
}

// clearLeftover removes what a crash left at the path of a new group.
func (g *Group) clearLeftover(ctx context.Context, h *hierarchy) error {
	if pids, err := listPids(ctx, h, g.rel, true); err == nil && len(pids) > 0 {
		return errs.New(errs.AlreadyExists, "cgroup %s has processes in it (%d …)", g.Path, pids[0])
	}
	return removeTree(ctx, h, g.rel, time.Now().Add(removeWait))
}

// fill sets limits and device rules of a new group and opens its entrances.
func (g *Group) fill(r *runtime.Resources, p *devicePolicy, o Options) error {
	if g.d.mode == ModeV2 {
		if err := g.fillV2(r, p, o); err != nil {
			return err
		}
		return g.OpenFDs()
	}
	if err := g.initCpuset(r); err != nil {
		return err
	}
	if err := g.applyV1(&txn{}, r, false); err != nil {
		return err
	}
	if h := g.d.control["devices"]; h != nil {
		if err := applyDevicesV1(h.fd, g.rel, p); err != nil {
			return err
		}
	}
	return g.OpenFDs()
}

func (g *Group) fillV2(r *runtime.Resources, p *devicePolicy, o Options) error {
	g.enableControllers()
	w, err := writesV2(r, g.d.hugePages, nil)
	if err != nil {
		return err
	}
	if o.OOMGroup {
		w = append(w, write{"memory", "memory.oom.group", "1", false})
	}
	if err := g.apply(&txn{}, w); err != nil {
		return err
	}
	if p.unrestricted() {
		return nil
	}
	dir, err := openAt(g.d.unified.fd, g.rel, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return classify(err, "open cgroup %s", g.Path)
	}
	defer unix.Close(dir)
	return attachDevices(dir, p)
}

// enableControllers makes the group offer the controllers that Naru uses. Below
// kubelet's parents that is one read; elsewhere each parent must hand them on
// in cgroup.subtree_control, from the root down. What cannot be enabled (EBUSY:
// a parent has processes of its own) matters only to a limit that needs it, and
// then apply says so.
func (g *Group) enableControllers() {
	if g.hasControllers() {
		return
	}
	dirs := []string{"."}
	for i := range g.rel {
		if g.rel[i] == '/' {
			dirs = append(dirs, g.rel[:i])
		}
	}
	for _, dir := range dirs {
		file := dir + "/cgroup.subtree_control"
		if writeAt(g.d.unified.fd, file, "+"+strings.Join(g.d.want, " +")) == nil {
			continue
		}
		for _, c := range g.d.want { // the write was all or nothing: save what can be had
			_ = writeAt(g.d.unified.fd, file, "+"+c)
		}
	}
}

func (g *Group) hasControllers() bool {
	b, err := readAt(g.d.unified.fd, g.rel+"/cgroup.controllers")
	if err != nil {
		return false
	}
	have := strings.Fields(string(b))
	for _, c := range g.d.want {
		found := false
		for _, x := range have {
			found = found || x == c
		}
		if !found {
			return false
		}
	}
	return true
}

// initCpuset gives a version 1 cpuset what its parent has: a new one is empty,
// and no task can enter an empty one (cpuset(7)).
func (g *Group) initCpuset(r *runtime.Resources) error {
	h := g.d.control["cpuset"]
	if h == nil {
		return nil
	}
	if r.CpusetMems == "" {
		if err := inherit(h, g.rel, "cpuset.mems"); err != nil {
			return err
		}
	}
	if r.CpusetCpus == "" {
		return inherit(h, g.rel, "cpuset.cpus")
	}
	return nil
}

func inherit(h *hierarchy, rel, file string) error {
	parent := "."
	if i := strings.LastIndexByte(rel, '/'); i >= 0 {
		parent = rel[:i]
	}
	v, err := readStringAt(h.fd, parent+"/"+file)
	if err != nil {
		return classify(err, "read %s of the parent", file)
	}
	if v == "" && parent != "." {
		if err := inherit(h, parent, file); err != nil {
			return err
		}
		if v, err = readStringAt(h.fd, parent+"/"+file); err != nil {
			return classify(err, "read %s of the parent", file)
		}
	}
	if err := writeAt(h.fd, rel+"/"+file, v); err != nil {
		return classify(err, "hand %s on to cgroup %s", file, rel)
	}
	return nil
}

func parentOf(path string) string {
	if i := strings.LastIndexByte(path, '/'); i > 0 {
		return path[:i]
	}
	return "/"
}

// AddPID makes the systemd scope around a process that waits at its gate, and
// sets limits and device rules there. With the cgroupfs driver, where the child
// enters by itself, it does nothing.
func (g *Group) AddPID(ctx context.Context, pid int) error {
	if g.scope == nil {
		return nil
	}
	if err := g.d.startScope(ctx, g.Path, pid, &g.scope.limits); err != nil {
		return err
	}
	s := g.scope
	g.scope = nil
	return g.fill(&s.limits, s.devices, s.opts)
}
