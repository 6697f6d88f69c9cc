// Package pod holds the nouns Pod and Container: their configuration, their
// life cycle, and the only writer of their records.
//
// It must not know CRI, cri-api or gRPC. The manager owns all records; readers
// get immutable snapshots from memory and never wait for IO. What changes a pod
// or the set of its containers is serialised by that pod's operation lock, what
// changes one container by the container's own; see Manager.
package pod

import (
	"time"

	"github.com/naru-project/naru/images"
	"github.com/naru-project/naru/runtime"
	"github.com/naru-project/naru/sandbox"
)

// Names that the CRI edge needs without importing runtime and sandbox.
type (
	Mount         = runtime.Mount
	Device        = runtime.Device
	Resources     = runtime.Resources
	HugepageLimit = runtime.HugepageLimit
	Security      = runtime.Security
	Profile       = runtime.Profile
	SELinux       = runtime.SELinux
	IDMap         = runtime.IDMap
	User          = runtime.User
	ExecResult    = runtime.ExecResult
	Streams       = runtime.Streams
	Size          = runtime.Size
	PortMapping   = sandbox.PortMapping
	DNS           = sandbox.DNS
	NamespaceMode = sandbox.NamespaceMode
	Protocol      = sandbox.Protocol
	Interface     = sandbox.Interface
	Handle        = sandbox.Handle
	Propagation   = runtime.Propagation
	ProfileType   = runtime.ProfileType
	PIDMode       = runtime.PIDMode
	Stats         = runtime.Stats
	CPUStats      = runtime.CPUStats
	MemoryStats   = runtime.MemoryStats
	IOStats       = runtime.IOStats
	PSI           = runtime.PSI
	PSILine       = runtime.PSILine
	Details       = runtime.Details
	HugetlbStats  = runtime.HugetlbStats
	PidsStats     = runtime.PidsStats
	IODevice      = runtime.IODevice
)

// Values of those types, likewise.
const (
	ModePod  = sandbox.ModePod
	ModeNode = sandbox.ModeNode

	TCP  = sandbox.TCP
	UDP  = sandbox.UDP
	SCTP = sandbox.SCTP

	PIDContainer = runtime.PIDContainer
	PIDPod       = runtime.PIDPod
	PIDNode      = runtime.PIDNode
	PIDTarget    = runtime.PIDTarget

	PropagationPrivate         = runtime.PropagationPrivate
	PropagationHostToContainer = runtime.PropagationHostToContainer
	PropagationBidirectional   = runtime.PropagationBidirectional

	ProfileRuntimeDefault = runtime.ProfileRuntimeDefault
	ProfileUnconfined     = runtime.ProfileUnconfined
	ProfileLocalhost      = runtime.ProfileLocalhost
)

// Metadata names a pod: the key of joinable creates is (UID, Namespace, Name, Attempt).
type Metadata struct {
	Name      string `json:"name"`
	UID       string `json:"uid"`
	Namespace string `json:"namespace"`
	Attempt   uint32 `json:"attempt"`
}

// SandboxConfig is CRI's PodSandboxConfig without protobuf.
type SandboxConfig struct {
	Metadata     Metadata          `json:"metadata"`
	Hostname     string            `json:"hostname,omitempty"`
	LogDirectory string            `json:"log_directory,omitempty"`
	DNS          DNS               `json:"dns"`
	Ports        []PortMapping     `json:"ports,omitempty"`
	Labels       map[string]string `json:"labels,omitempty"`
	Annotations  map[string]string `json:"annotations,omitempty"`
	CgroupParent string            `json:"cgroup_parent,omitempty"`
	Sysctls      map[string]string `json:"sysctls,omitempty"`
	Overhead     *Resources        `json:"overhead,omitempty"`
	Resources    *Resources        `json:"resources,omitempty"`
	Network      NamespaceMode     `json:"network"`
	IPC          NamespaceMode     `json:"ipc"`
	PID          runtime.PIDMode   `json:"pid"`
	UIDMap       []IDMap           `json:"uid_map,omitempty"` // not empty = user namespace POD
	GIDMap       []IDMap           `json:"gid_map,omitempty"`
	Security     Security          `json:"security"` // of the sandbox: privileged, seccomp, …
	Handler      string            `json:"handler,omitempty"`
}

// ContainerMetadata names a container within its pod.
type ContainerMetadata struct {
	Name    string `json:"name"`
	Attempt uint32 `json:"attempt"`
}

// ContainerConfig is CRI's ContainerConfig without protobuf.
type ContainerConfig struct {
	Metadata         ContainerMetadata `json:"metadata"`
	Image            string            `json:"image"`                // ImageSpec.image as sent (an ID, usually)
	UserImage        string            `json:"user_image,omitempty"` // ImageSpec.user_specified_image
	ImageAnnotations map[string]string `json:"image_annotations,omitempty"`
	Command          []string          `json:"command,omitempty"`
	Args             []string          `json:"args,omitempty"`
	WorkingDir       string            `json:"working_dir,omitempty"`
	Env              []string          `json:"env,omitempty"` // KEY=value, values are bytes
	Mounts           []Mount           `json:"mounts,omitempty"`
	Devices          []Device          `json:"devices,omitempty"`
	CDIDevices       []string          `json:"cdi_devices,omitempty"`
	Labels           map[string]string `json:"labels,omitempty"`
	Annotations      map[string]string `json:"annotations,omitempty"`
	LogPath          string            `json:"log_path,omitempty"` // relative to the sandbox's LogDirectory
	Stdin            bool              `json:"stdin,omitempty"`
	StdinOnce        bool              `json:"stdin_once,omitempty"`
	TTY              bool              `json:"tty,omitempty"`
	Resources        Resources         `json:"resources"`
	Security         Security          `json:"security"`
	StopSignal       string            `json:"stop_signal,omitempty"` // "SIGTERM" style, empty = image's or SIGTERM
}

// Pod is an immutable snapshot of a pod.
type Pod struct {
	ID        string
	Config    *SandboxConfig // shared, never written
	Phase     Phase
	CreatedAt time.Time
	Handle    *sandbox.Handle // shared, never written; nil before it exists
	Message   string          // why it is not ready, if it is not
}

// Ready reports whether CRI calls this pod SANDBOX_READY.
func (p *Pod) Ready() bool { return p.Phase == PhaseReady }

// ContainerState is what CRI shows of a container.
type ContainerState string

// The container states of CRI.
const (
	StateCreated ContainerState = "created"
	StateRunning ContainerState = "running"
	StateExited  ContainerState = "exited"
	StateUnknown ContainerState = "unknown"
)

// Container is an immutable snapshot of a container.
type Container struct {
	ID                               string
	PodID                            string
	Config                           *ContainerConfig // shared, never written
	State                            ContainerState
	Phase                            Phase
	CreatedAt, StartedAt, FinishedAt time.Time
	ExitCode                         int32
	Reason, Message                  string // Completed, Error, OOMKilled, StartError, ContainerStatusUnknown, …
	ImageID                          string // config digest
	ImageRef                         string // repo@digest where known, else ImageID
	LogPath                          string // absolute
	User                             *User
	Resources                        Resources // as last applied
	Mounts                           []Mount
	StopSignal                       string // the effective one
	PID                              int    // of the first process; 0 when not running
}

// Filter selects pods or containers; empty fields match all, set ones AND.
type Filter struct {
	ID     string // exact or unique prefix
	PodID  string
	State  string // ContainerState, or "ready"/"notready" for pods
	Labels map[string]string
}

// EventType of a container event (CRI ContainerEventType).
type EventType string

// The event types.
const (
	EventCreated EventType = "created"
	EventStarted EventType = "started"
	EventStopped EventType = "stopped"
	EventDeleted EventType = "deleted"
)

// Event tells of a change to a container or, with ContainerID == PodID, a pod.
// Pod and Containers are the snapshots right after it.
type Event struct {
	Type        EventType
	ContainerID string
	PodID       string
	Time        time.Time
	Pod         *Pod
	Containers  []*Container
}

// Operation is one running mutation, for `naru ops` and error texts.
type Operation struct {
	ID      string    // of the pod or container
	Name    string    // what it is called: pod namespace/name[/container]
	Kind    string    // RunPodSandbox, CreateContainer, …
	Step    string    // current step
	Started time.Time // of the operation
	StepAt  time.Time // of the current step
}

// ContainerStats is one reading of a running container.
type ContainerStats struct {
	Container *Container
	Stats     *runtime.Stats // nil when it does not run
	Writable  images.Usage
	// WritableMountpoint is the mount point of the file system of the writable layer.
	WritableMountpoint string
	Disk               images.Disk // that file system; in metrics only
}

// SandboxStats is one reading of a pod: its cgroup, interfaces and containers.
type SandboxStats struct {
	Pod        *Pod
	Stats      *runtime.Stats // of the pod's cgroup; not in metrics, which are those of its parts
	Interfaces []sandbox.Interface
	Processes  uint64
	Containers []*ContainerStats
}
