package pod

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/naru-project/naru/images"
	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/undo"
	"github.com/naru-project/naru/runtime"
	"github.com/naru-project/naru/runtime/cdi"
)

// CreateContainer makes a container in a ready pod. A call whose caller went
// away goes on; the same call again joins it, or gets the container that it
// made and that was not started yet. c belongs to the manager then.
func (m *Manager) CreateContainer(ctx context.Context, podID string, c *ContainerConfig) (string, error) {
	p, err := m.table.findPod(podID)
	if err != nil {
		return "", err
	}
	s := p.snap.Load()
	if err := m.acceptsContainers(p); err != nil {
		return "", fmt.Errorf("create container %s: %w", containerName(s.Config, c.Metadata), err)
	}
	if err := validateContainer(s.Config, c); err != nil {
		return "", err
	}
	key := containerKey{p.id, c.Metadata.Name, c.Metadata.Attempt}
	fresh := &call{
		id: newID(), podID: p.id, config: c, done: make(chan struct{}),
		name: "container " + containerName(s.Config, c.Metadata),
	}
	return m.create(ctx, key, fresh, m.aliveContainer(key), "CreateContainer", func(ctx context.Context, k *call) error {
		return m.createContainer(ctx, k, p)
	})
}

func (m *Manager) acceptsContainers(p *podEntry) error {
	if s := p.snap.Load(); !s.Ready() {
		return errs.New(errs.FailedPrecondition, "pod %s is %s, not ready", short(p.id), s.Phase)
	}
	if p.stops.Load() > 0 {
		return errs.New(errs.FailedPrecondition, "pod %s is being stopped", short(p.id))
	}
	return nil
}

// aliveContainer finds the container that an earlier call of this key made.
func (m *Manager) aliveContainer(key containerKey) func() (string, any, error) {
	return func() (string, any, error) {
		c := m.table.containerOfKey(key)
		if c == nil {
			return "", nil, nil
		}
		switch s := c.snap.Load(); s.Phase {
		case PhaseCreated:
			return c.id, s.Config, nil
		case PhaseStarting, PhaseRunning, PhaseStopping:
			return "", nil, errs.New(errs.AlreadyExists, "create container: %s attempt %d is %s already, as %s",
				key.name, key.attempt, s.Phase, short(c.id))
		}
		return "", nil, nil
	}
}

// containerWork is what the steps of CreateContainer hand on.
type containerWork struct {
	c      *containerEntry
	pod    *Pod
	image  *images.Image
	layers []string
	// volumes are the image volumes, by index in the mounts.
	volumes map[int]runtime.ImageVolume
	mounts  []Mount
	devices *cdi.Edits // nil: none
	rootfs  runtime.Rootfs
	root    *os.File // until the executor takes it over
	rc      *runtime.Container
	user    *User
	proc    runtime.Process
	stuck   bool // undo: the process could not be taken down
}

func (m *Manager) createContainer(ctx context.Context, k *call, p *podEntry) error {
	cfg := k.config.(*ContainerConfig)
	k.op.enter(ctx, "wait for the pod")
	if err := p.op.lock(ctx); err != nil {
		return fmt.Errorf("%s: %w", k.name, err)
	}
	defer p.op.unlock()
	pod := p.snap.Load()
	if err := m.acceptsContainers(p); err != nil {
		return fmt.Errorf("create %s: %w", k.name, err)
	}
	w := &containerWork{pod: pod, mounts: cfg.Mounts}
	w.c = newContainerEntry(&Container{
		ID: k.id, PodID: pod.ID, Config: cfg, Phase: PhaseCreating, State: StateCreated,
		CreatedAt: time.Now(), Resources: cfg.Resources, Mounts: cfg.Mounts,
	})
	var err error
	if w.c.cgroup, err = m.deps.Cgroups.ContainerPath(pod.Config.CgroupParent, k.id); err != nil {
		return createError(k.name, err)
	}
	var u undo.List
	if err := k.op.run(ctx, m.containerChecks(w), &u); err != nil { // nothing exists yet
		return createError(k.name, err)
	}
	m.table.addContainer(w.c)
	err = k.op.run(ctx, m.containerSteps(w), &u)
	if err == nil {
		err = k.op.run(ctx, []step{{name: "record created", do: func(ctx context.Context) error { return m.recordCreated(ctx, w) }}}, &u)
	}
	if err != nil {
		err = createError(k.name, err)
		_ = m.undoContainer(ctx, w.c, &u, k.op, err) // logged and kept there
		return err
	}
	m.log(ctx).V(2).Info("container is created", "container", containerName(pod.Config, cfg.Metadata), "id", k.id, "pod", pod.ID)
	return nil
}

func createError(name string, err error) error {
	var verbatim verbatim
	if errors.As(err, &verbatim) {
		return err
	}
	return fmt.Errorf("create %s: %w", name, err)
}

// containerChecks look at what must be there before anything is made.
func (m *Manager) containerChecks(w *containerWork) []step {
	cfg := w.c.snap.Load().Config
	return []step{
		{name: "image", do: func(context.Context) (err error) { w.image, err = m.rootImage(cfg.Image); return err }},
		{name: "pid namespace", do: func(context.Context) error { _, _, err := m.pidMode(w.pod, cfg); return err }},
		{name: "CDI devices", do: func(context.Context) error { return m.cdiDevices(w) }},
		{name: "host paths", do: func(ctx context.Context) error {
			mounts, _ := w.withDevices()
			for i, mt := range mounts {
				if mt.HostPath == "" {
					continue
				}
				if err := m.statter.check(ctx, mt.HostPath); err != nil {
					return fmt.Errorf("mount %d on %s: %w", i, mt.ContainerPath, err)
				}
			}
			return nil
		}},
	}
}

// rootImage finds the image that a container is made of.
func (m *Manager) rootImage(ref string) (*images.Image, error) {
	img, err := m.resolveImage(ref)
	if err == nil && img.Artifact != "" {
		return nil, errs.New(errs.InvalidArgument, "image %q is an artifact of type %q: it can be mounted as a volume, no container can be made of it", clip(ref), clip(img.Artifact))
	}
	return img, err
}

func (m *Manager) resolveImage(ref string) (*images.Image, error) {
	img, err := m.deps.Images.Resolve(ref)
	if errs.Is(err, errs.NotFound) {
		return nil, errs.New(errs.NotFound, "image %q is not on this node; pull it first", clip(ref))
	}
	return img, err
}

// containerSteps are all that a container has on the host, in order.
// CreateContainer does them; a failed create, RemoveContainer and recovery
// undo them.
func (m *Manager) containerSteps(w *containerWork) []step {
	id := w.c.id
	return []step{
		{
			name: "record",
			do:   func(ctx context.Context) error { return m.recordCreating(ctx, w) },
		},
		{
			name: "layers",
			do: func(ctx context.Context) (err error) {
				w.layers, err = m.deps.Images.Layers(ctx, w.image.ID, id)
				return err
			},
			undo: w.onceDead(func(ctx context.Context) error { return m.deps.Images.ReleaseOwner(ctx, id) }),
		},
		{
			name: "image volumes", // held for the same owner
			do:   func(ctx context.Context) error { return m.imageVolumes(ctx, w) },
		},
		{
			name: "log folder",
			do: func(ctx context.Context) error {
				return makeLogFolders(ctx, w.pod.Config.LogDirectory, w.c.snap.Load().Config.LogPath)
			},
		},
		{
			name: "writable layer",
			do:   func(ctx context.Context) error { return m.makeWritable(ctx, w) },
			undo: w.onceDead(func(ctx context.Context) error { return m.deps.Images.RemoveWritable(ctx, id) }),
		},
		{
			name: "root file system",
			do: func(ctx context.Context) (err error) {
				w.root, err = m.deps.Executor.MountRootfs(ctx, id, w.rootfs, w.pod.Config.UIDMap, w.pod.Config.GIDMap)
				return err
			},
			undo: func(context.Context) error { return w.closeRoot() },
		},
		{
			name: "spec",
			do:   func(context.Context) error { return m.buildContainer(w) },
		},
		{
			name: "process",
			do: func(ctx context.Context) (err error) {
				// Undoing this needs it, after a crash too: should that come
				// before the file is there, the id is enough (view).
				saved := make(chan error, 1)
				go func() { saved <- m.specs.save(w.rc) }()
				defer func() { err = errors.Join(err, <-saved) }()
				root := w.root
				w.root = nil // Create takes it over, come what may
				w.proc, err = m.deps.Executor.Create(ctx, w.rc, root)
				var volume *runtime.ImageVolumeError
				if errors.As(err, &volume) {
					return verbatim{volume}
				}
				return err
			},
			undo: func(ctx context.Context) error {
				err := m.deps.Executor.Delete(ctx, m.executorView(w.c, w.rc))
				w.stuck = err != nil
				return err
			},
		},
	}
}

// onceDead keeps folders for as long as a process that cannot be taken down
// may have them mounted.
func (w *containerWork) onceDead(f func(context.Context) error) func(context.Context) error {
	return func(ctx context.Context) error {
		if w.stuck {
			return errs.New(errs.FailedPrecondition, "kept while its process is there")
		}
		return f(ctx)
	}
}

func (w *containerWork) closeRoot() error {
	if w.root == nil {
		return nil
	}
	root := w.root
	w.root = nil
	return root.Close()
}

func (m *Manager) makeWritable(ctx context.Context, w *containerWork) error {
	// In a user namespace too: the executor shows the folders through a mapping.
	own, err := m.deps.Images.NewWritable(ctx, w.c.id)
	if err != nil {
		return err
	}
	w.rootfs = runtime.Rootfs{Lower: append(slices.Clip(w.layers), own.Places), Upper: own.Upper, Work: own.Work}
	return nil
}

// imageVolumes finds the layers of the images that are mounts. kubelet knows
// the failure by the first word of its text.
func (m *Manager) imageVolumes(ctx context.Context, w *containerWork) error {
	mounts := w.mounts
	for i, mt := range mounts {
		if mt.Image == "" {
			continue
		}
		img, err := m.resolveImage(mt.Image)
		var layers []string
		if err == nil {
			layers, err = m.deps.Images.Layers(ctx, img.ID, w.c.id)
		}
		if err != nil {
			return verbatim{fmt.Errorf("ImageVolumeMountFailed: mount %d on %s: %w", i, mt.ContainerPath, err)}
		}
		if w.volumes == nil { // the config is shared and stays as it was sent
			w.volumes = make(map[int]runtime.ImageVolume)
			w.mounts = append([]Mount(nil), mounts...)
		}
		w.mounts[i].ImageRef = img.ID
		w.volumes[i] = runtime.ImageVolume{Lower: layers, SubPath: mt.ImageSubPath}
	}
	return nil
}

func (m *Manager) recordCreating(ctx context.Context, w *containerWork) error {
	if err := w.c.state.lock(ctx); err != nil {
		return err
	}
	defer w.c.state.unlock()
	n := *w.c.snap.Load()
	n.ImageID, n.ImageRef = w.image.ID, imageRef(w.image)
	n.LogPath, _ = logPath(w.pod.Config.LogDirectory, n.Config.LogPath) // checked by validateContainer
	n.StopSignal = stopSignal(n.Config, w.image)
	return m.put(w.c, &n, false)
}

func (m *Manager) recordCreated(ctx context.Context, w *containerWork) error {
	if err := w.c.state.lock(ctx); err != nil {
		return err
	}
	defer w.c.state.unlock()
	w.c.proc = w.proc
	err := m.change(w.c, hapMade, true, func(n *Container) {
		n.User, n.Mounts, n.PID = w.user, w.mounts, w.proc.PID
	})
	if err != nil {
		return err
	}
	m.tell(EventCreated, w.c.podID, w.c.id)
	m.applyPending(ctx, w.c)
	return nil
}

// imageRef is how the image is known in the world: repo@digest, if it came
// from a registry.
func imageRef(img *images.Image) string {
	if len(img.RepoDigests) > 0 {
		return img.RepoDigests[0]
	}
	return img.ID
}

// undoContainer takes a container down that was not made, or that is removed,
// and forgets it. What cannot be undone makes it Broken: it is kept for the
// reaper, and its name is free.
func (m *Manager) undoContainer(ctx context.Context, c *containerEntry, u *undo.List, op *operation, why error) error {
	op.enter(ctx, "undo")
	ctx, cancel := detach(ctx, m.cfg.UndoTimeout, "undo container "+short(c.id))
	defer cancel()
	err := u.Run(ctx)
	if err == nil {
		err = errors.Join(m.specs.remove(c.id), m.containers.Remove(c.id))
	}
	if err == nil {
		m.table.removeContainer(c)
		return nil
	}
	m.log(ctx).Error(err, "container could not be taken down, it will be tried again", "id", c.id, "why", why)
	if lerr := c.state.lock(ctx); lerr != nil {
		return err
	}
	defer c.state.unlock()
	broken := func(n *Container) { n.Message = brokenMessage(why, err) }
	if perr := m.change(c, hapBroken, false, broken); perr != nil {
		n := *c.snap.Load()
		n.Phase, n.State = PhaseBroken, stateOf(PhaseBroken)
		broken(&n)
		c.snap.Store(&n) // the record says Creating or Removing: recovery undoes that too
	}
	return err
}

// executorView is what the executor is told of a container that it shall take
// down: the whole of it, or, where that was never written or is damaged, the
// least.
func (m *Manager) executorView(c *containerEntry, have *runtime.Container) *runtime.Container {
	if have != nil {
		return have
	}
	if rc, err := m.specs.get(c.id); err == nil {
		return rc
	}
	return c.view()
}

// view is enough to find the container's processes. It costs no file.
func (c *containerEntry) view() *runtime.Container {
	return &runtime.Container{ID: c.id, SandboxID: c.podID, Cgroup: c.cgroup, PIDMode: c.snap.Load().Config.Security.PIDMode}
}
