package pod

import (
	"cmp"
	"fmt"
	"maps"
	"syscall"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/images"
	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime"
	"github.com/naru-project/naru/runtime/hooks"
	"github.com/naru-project/naru/runtime/spec"
	"github.com/naru-project/naru/sandbox"
)

// This file is the only one that knows runtime/spec.

// buildContainer makes the OCI spec and with it all that the executor is told.
// It reads passwd and group through the open root file system.
func (m *Manager) buildContainer(w *containerWork) error {
	cfg, p, h := w.c.snap.Load().Config, w.pod.Config, w.pod.Handle
	if h == nil {
		return errs.New(errs.Internal, "the pod has no sandbox")
	}
	mode, t, err := m.pidMode(w.pod, cfg)
	if err != nil {
		return err
	}
	target, targetID := 0, ""
	if t != nil {
		target, targetID = t.PID, t.ID
	}
	security := cfg.Security
	security.PIDMode = mode
	if security.DefaultPaths {
		if len(security.MaskedPaths) == 0 {
			security.MaskedPaths = spec.DefaultMaskedPaths()
		}
		if len(security.ReadonlyPaths) == 0 {
			security.ReadonlyPaths = spec.DefaultReadonlyPaths()
		}
	}
	live, resources := m.live.Load(), cfg.Resources
	resources.PidsLimit = cmp.Or(resources.PidsLimit, live.PidsLimit)
	mounts, images := w.withDevices()
	in := spec.Input{
		ID: w.c.id, Command: cfg.Command, Args: cfg.Args, Env: cfg.Env, WorkingDir: cfg.WorkingDir, TTY: cfg.TTY,
		Image: w.image.Config, Security: security, Resources: resources, Devices: cfg.Devices,
		Hostname: p.Hostname, Mounts: mounts, EtcFiles: h.EtcFiles, Shm: h.Shm,
		Namespaces: h.Namespaces, TargetPID: target, UIDMap: p.UIDMap, GIDMap: p.GIDMap,
		CgroupPath: w.c.cgroup, RootPath: "rootfs", Host: m.cfg.SpecHost, Defaults: live.SpecDefaults,
	}
	if w.root != nil {
		in.Root = spec.FDRoot{Dir: w.root}
	}
	oci, user, err := spec.Build(in)
	if err != nil {
		return err
	}
	if err := w.applyDevices(oci, user); err != nil {
		return err
	}
	if err := m.addHooks(w, oci); err != nil {
		return err
	}
	volumes, err := spec.Volumes(w.image.Config.Volumes, mounts)
	if err != nil {
		return err
	}
	w.user = user
	w.rc = &runtime.Container{
		ID: w.c.id, Handler: w.pod.Config.Handler, SandboxID: w.pod.ID, Spec: oci, Resources: resources, Rootfs: w.rootfs, Mounts: mounts, Images: images,
		Namespaces: h.Namespaces, PIDMode: mode, TargetID: targetID, Cgroup: w.c.cgroup,
		UIDMap: p.UIDMap, GIDMap: p.GIDMap, Shm: h.Shm, EtcFiles: h.EtcFiles,
		LogPath: w.c.snap.Load().LogPath, TTY: cfg.TTY, Stdin: cfg.Stdin, StdinOnce: cfg.StdinOnce,
		Privileged: cfg.Security.Privileged, Volumes: volumes,
	}
	if m.live.Load().LogToJournald {
		w.rc.Journal = journalName(w.pod.Config.Metadata, cfg.Metadata)
	}
	return nil
}

// journalName is how CRI-O calls a container in the journal.
func journalName(p Metadata, c ContainerMetadata) string {
	return fmt.Sprintf("k8s_%s_%s_%s_%s_%d", c.Name, p.Name, p.Namespace, p.UID, c.Attempt)
}

// addHooks adds the hooks of the node's folders. Where the container's and the
// pod's annotations differ, the pod's count, as with CRI-O.
func (m *Manager) addHooks(w *containerWork, oci *specs.Spec) error {
	dirs := m.live.Load().HookDirs
	if len(dirs) == 0 {
		return nil
	}
	cfg := w.c.snap.Load().Config
	all := map[string]string{}
	maps.Copy(all, cfg.Annotations)
	maps.Copy(all, w.pod.Config.Annotations)
	return hooks.Add(dirs, oci, hooks.Container{Annotations: all, BindMounts: len(cfg.Mounts) > 0})
}

// pidMode says which PID namespace a container gets, and for mode target the
// container whose namespace that is.
func (m *Manager) pidMode(pod *Pod, c *ContainerConfig) (mode runtime.PIDMode, target *Container, err error) {
	switch c.Security.PIDMode {
	case "", runtime.PIDContainer:
		return runtime.PIDContainer, nil, nil
	case runtime.PIDPod:
		// "The pod's" is what its sandbox was given (CRI: NamespaceMode POD).
		switch {
		case pod.Config.PID == runtime.PIDNode:
			return runtime.PIDNode, nil, nil
		case pod.Handle == nil || pod.Handle.Namespaces.PID == "":
			return "", nil, errs.New(errs.FailedPrecondition,
				"the pod's PID namespace is asked for, but its sandbox was made without one")
		}
		return runtime.PIDPod, nil, nil
	case runtime.PIDTarget:
		t, err := m.Container(c.Security.PIDTarget)
		switch {
		case err != nil:
			return "", nil, errs.New(errs.InvalidArgument, "target container: %w", err)
		case t.PodID != pod.ID:
			return "", nil, errs.New(errs.InvalidArgument, "target container %s is in another pod", short(t.ID))
		case t.State != StateRunning || t.PID == 0:
			return "", nil, errs.New(errs.FailedPrecondition, "target container %s is %s, not running", short(t.ID), describe(t))
		}
		return runtime.PIDTarget, t, nil
	}
	return c.Security.PIDMode, nil, nil
}

func validSysctls(c *SandboxConfig) error {
	return spec.ValidateSysctls(c.Sysctls, c.Network == sandbox.ModePod, c.IPC == sandbox.ModePod, len(c.UIDMap) > 0)
}

func validSignal(name string) error {
	if name == "" {
		return nil
	}
	_, err := spec.ParseSignal(name)
	return err
}

func parseSignal(name string) (syscall.Signal, error) { return spec.ParseSignal(name) }

// stopSignal is the effective one, as CRI's status tells it.
func stopSignal(c *ContainerConfig, img *images.Image) string {
	sig, err := spec.StopSignal(c.StopSignal, img.Config.StopSignal)
	if err != nil { // the request's was checked by validateContainer
		sig = unix.SIGTERM
	}
	return signalName(sig)
}

// signalName spells real-time signals as signal(7) does, counted from the
// nearer end. The C library keeps 32 and 33 for itself.
func signalName(sig syscall.Signal) string {
	const rtMin, rtMax = 34, 64
	switch {
	case sig == rtMin:
		return "SIGRTMIN"
	case sig == rtMax:
		return "SIGRTMAX"
	case sig > rtMin && sig < rtMin+16:
		return fmt.Sprintf("SIGRTMIN+%d", sig-rtMin)
	case sig > rtMin:
		return fmt.Sprintf("SIGRTMAX-%d", rtMax-sig)
	}
	if name := unix.SignalName(sig); name != "" {
		return name
	}
	return fmt.Sprint(int(sig))
}
