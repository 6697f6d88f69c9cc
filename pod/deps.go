package pod

import (
	"context"
	"io"
	"net/netip"
	"os"
	"syscall"
	"time"

	"github.com/naru-project/naru/images"
	"github.com/naru-project/naru/runtime"
	"github.com/naru-project/naru/sandbox"
)

// Executor runs containers (runtime/native). All calls are safe to repeat.
type Executor interface {
	// MountRootfs makes the container's root file system as a detached mount,
	// so that its passwd and group files can be read before the spec is made.
	// The caller hands the file to Create, or closes it.
	MountRootfs(ctx context.Context, id string, r runtime.Rootfs, uid, gid []runtime.IDMap) (*os.File, error)
	// Create makes everything of the container but the last step, the execve;
	// its first process then waits for Start. It takes over root.
	Create(ctx context.Context, c *runtime.Container, root *os.File) (runtime.Process, error)
	// Start lets the first process go on. An error that the entrypoint itself
	// caused (missing, not executable) is errs.FailedPrecondition and names it.
	// After an error the caller kills what may run of it.
	Start(ctx context.Context, c *runtime.Container) error
	// Signal sends one signal to the first process, by pidfd. A process that
	// is gone already is no error.
	Signal(ctx context.Context, id string, sig syscall.Signal) error
	// Kill ends every process of the container (cgroup.kill, or SIGKILL to all
	// of its cgroup) and does not wait for their exit.
	Kill(ctx context.Context, c *runtime.Container) error
	// Delete kills what is left and removes cgroup and monitor entry. Unknown ids are no error.
	Delete(ctx context.Context, c *runtime.Container) error
	// Update changes the cgroup limits, all or nothing.
	Update(ctx context.Context, c *runtime.Container, r runtime.Resources) error
	// OOMKilled reports whether the kernel's OOM killer ended a process of the container's cgroup.
	OOMKilled(ctx context.Context, c *runtime.Container) (bool, error)
	// List tells what the monitor keeps, for recovery after a restart.
	List(ctx context.Context) ([]runtime.State, error)
	// Exits delivers each exit once it is known, those that happened while the
	// daemon was away included, until Delete of that container.
	Exits() <-chan runtime.Exit

	ExecSync(ctx context.Context, c *runtime.Container, e runtime.ExecSpec) (runtime.ExecResult, error)
	Exec(ctx context.Context, c *runtime.Container, e runtime.ExecSpec, s runtime.Streams) (exitCode int, err error)
	Attach(ctx context.Context, c *runtime.Container, s runtime.Streams) error
	ReopenLog(ctx context.Context, c *runtime.Container) error
	// Checkpoint writes the images of the container's processes into dir.
	Checkpoint(ctx context.Context, c *runtime.Container, dir string) error
	// EnsurePodCgroup makes the pod's cgroup parent if it is not there, and
	// RemovePodCgroup removes it if Naru made it and it is empty.
	// SweepPodCgroups does that with all parents but the known ones.
	EnsurePodCgroup(ctx context.Context, parent string) error
	RemovePodCgroup(ctx context.Context, parent string) error
	SweepPodCgroups(ctx context.Context, known []string) error
	// Stats reads from the shared sampler; see runtime/stats.
	Stats(ctx context.Context, cgroup string) (*runtime.Stats, error)
	// DetailedStats is Stats with Details; first is the pid of the container's first process.
	DetailedStats(ctx context.Context, cgroup string, first int) (*runtime.Stats, error)
}

// Watcher is told what happens, for metrics and traces. It does not block.
type Watcher interface {
	// StepDone is called at the end of each step, with the context that the step
	// had.
	StepDone(ctx context.Context, operation, step string, began, ended time.Time)
	ContainerExited(reason string)
}

// Sandboxes makes and removes the places of pods on the host (sandbox.Manager).
type Sandboxes interface {
	// Create makes the whole place or nothing. step is called with the name of each step as it begins.
	Create(ctx context.Context, s sandbox.Spec, step func(string)) (*sandbox.Handle, error)
	// Adopt takes over a Handle from a record after a restart: its leases,
	// ports and names count as used, and its host-side rules are put back if
	// somebody flushed them. It reports whether the sandbox is still whole.
	Adopt(ctx context.Context, s sandbox.Spec, h *sandbox.Handle) (alive bool, err error)
	// Release gives back network, ports and namespaces. Idempotent; works on a half-made or rebooted sandbox.
	Release(ctx context.Context, id string, h *sandbox.Handle) error
	// Stats of the sandbox's interfaces, the default one first.
	Stats(ctx context.Context, h *sandbox.Handle) ([]sandbox.Interface, error)
	// NetworkStatus is answered from memory.
	NetworkStatus() sandbox.NetworkStatus
	// NetworkInfo is what a verbose status shows of the network, from memory.
	NetworkInfo() map[string]any
	// SetPodCIDRs takes the ranges kubelet told (UpdateRuntimeConfig).
	SetPodCIDRs(ctx context.Context, cidrs []netip.Prefix) error
	// PortForward connects conn-like streams to a port inside the sandbox.
	Dial(ctx context.Context, h *sandbox.Handle, port uint16) (*os.File, error)
	// Sweep removes what belongs to no known sandbox id (after a crash).
	Sweep(ctx context.Context, known map[string]bool) error
}

// Images is what containers need of the image store (images.Store).
type Images interface {
	// Resolve finds an image by ID, ID prefix, tag or digest reference.
	Resolve(ref string) (*images.Image, error)
	// Layers returns the layer folders, topmost first, and holds them (against
	// removal) for owner until ReleaseOwner.
	Layers(ctx context.Context, imageID, owner string) ([]string, error)
	ReleaseOwner(ctx context.Context, owner string) error
	// NewWritable makes the writable folders of a container.
	NewWritable(ctx context.Context, containerID string) (images.Writable, error)
	RemoveWritable(ctx context.Context, containerID string) error
	// WritableUsage may be some seconds old; its Time says.
	WritableUsage(ctx context.Context, containerID string) (images.Usage, error)
	// WriteDiff writes the container's writable layer as a layer's tar archive.
	WriteDiff(ctx context.Context, containerID string, w io.Writer) error
	// Disk is the file system that writable folders are on.
	Disk() (images.Disk, error)
	// Sweep removes writable folders and holds of owners that are not known.
	Sweep(ctx context.Context, known map[string]bool) error
}
