// Package runtime is about running processes: what a container is asked to be
// (the types in this file), the pure builder that makes an OCI spec of it
// (runtime/spec), the native executor that turns the spec into a plan of
// system calls and runs it (runtime/native, runtime/plan), the one that has an
// OCI runtime do it (runtime/ocicli), the small monitor that keeps the
// processes (runtime/monitor), their streams, cgroups, statistics, seccomp
// filters and logs.
//
// It must not know about pods as records, CRI or images: a container arrives
// here with its layer folders and namespaces as paths and file descriptors.
//
// Where the standard library's runtime is needed too, import that as
// goruntime.
package runtime

import (
	"io"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/naru-project/naru/internal/namespaces"
)

// Propagation of a bind mount, as CRI's MountPropagation.
type Propagation string

// The propagation modes (mount_namespaces(7)).
const (
	PropagationPrivate         Propagation = "private"
	PropagationHostToContainer Propagation = "host-to-container" // slave
	PropagationBidirectional   Propagation = "bidirectional"     // shared
)

// IDMap is one line of a user namespace mapping.
type IDMap = namespaces.IDMap

// Mount is one volume of a container (CRI Mount).
type Mount struct {
	ContainerPath     string            `json:"container_path"`
	HostPath          string            `json:"host_path,omitempty"`
	Readonly          bool              `json:"readonly,omitempty"`
	RecursiveReadonly bool              `json:"recursive_readonly,omitempty"`
	Propagation       Propagation       `json:"propagation,omitempty"`
	SelinuxRelabel    bool              `json:"selinux_relabel,omitempty"`
	UIDMap            []IDMap           `json:"uid_map,omitempty"`
	GIDMap            []IDMap           `json:"gid_map,omitempty"`
	Options           []string          `json:"options,omitempty"`    // noexec, nodev, nosuid (CRI 0.37 mount_options)
	Image             string            `json:"image,omitempty"`      // image volume: the image's reference or ID
	UserImage         string            `json:"user_image,omitempty"` // what the user called it
	ImageAnnotations  map[string]string `json:"image_annotations,omitempty"`
	ImageSubPath      string            `json:"image_sub_path,omitempty"`
	ImageRef          string            `json:"image_ref,omitempty"` // what Image was resolved to (config digest)
}

// Device is a device node of the host offered to a container.
type Device struct {
	ContainerPath string `json:"container_path"`
	HostPath      string `json:"host_path"`
	Permissions   string `json:"permissions"` // subset of "rwm"
}

// HugepageLimit limits one page size, named as in the cgroup files ("2MB").
type HugepageLimit struct {
	PageSize string `json:"page_size"`
	Limit    uint64 `json:"limit"` // bytes
}

// Resources are the limits of a container or pod (CRI LinuxContainerResources).
// Zero means "not set", as in CRI.
type Resources struct {
	CPUPeriod   int64             `json:"cpu_period,omitempty"` // µs
	CPUQuota    int64             `json:"cpu_quota,omitempty"`  // µs per period, -1 = none
	CPUShares   int64             `json:"cpu_shares,omitempty"`
	CpusetCpus  string            `json:"cpuset_cpus,omitempty"`
	CpusetMems  string            `json:"cpuset_mems,omitempty"`
	Memory      int64             `json:"memory,omitempty"`      // bytes
	MemorySwap  int64             `json:"memory_swap,omitempty"` // bytes, memory+swap, -1 = unlimited
	OOMScoreAdj int64             `json:"oom_score_adj,omitempty"`
	Hugepages   []HugepageLimit   `json:"hugepages,omitempty"`
	Unified     map[string]string `json:"unified,omitempty"` // raw cgroup v2 files
	PidsLimit   int64             `json:"pids_limit,omitempty"`
}

// ProfileType of a seccomp or AppArmor profile.
type ProfileType string

// The profile types of CRI's SecurityProfile. The empty type is "not said".
const (
	ProfileRuntimeDefault ProfileType = "RuntimeDefault"
	ProfileUnconfined     ProfileType = "Unconfined"
	ProfileLocalhost      ProfileType = "Localhost"
)

// Profile names a seccomp or AppArmor profile.
type Profile struct {
	Type ProfileType `json:"type,omitempty"`
	Ref  string      `json:"ref,omitempty"` // Localhost: absolute file (seccomp) or profile name (AppArmor)
}

// SELinux is a process label in its four parts.
type SELinux struct {
	User, Role, Type, Level string
}

// PIDMode says which PID namespace a container runs in (CRI NamespaceMode).
type PIDMode string

// The PID modes.
const (
	PIDContainer PIDMode = "container"
	PIDPod       PIDMode = "pod"
	PIDNode      PIDMode = "node"
	PIDTarget    PIDMode = "target"
)

// Security is what CRI's LinuxContainerSecurityContext says.
type Security struct {
	Privileged         bool     `json:"privileged,omitempty"`
	AddCaps            []string `json:"add_caps,omitempty"`
	DropCaps           []string `json:"drop_caps,omitempty"`
	AddAmbientCaps     []string `json:"add_ambient_caps,omitempty"`
	NoNewPrivs         bool     `json:"no_new_privs,omitempty"`
	ReadonlyRootfs     bool     `json:"readonly_rootfs,omitempty"`
	RunAsUser          *int64   `json:"run_as_user,omitempty"`
	RunAsGroup         *int64   `json:"run_as_group,omitempty"`
	RunAsUsername      string   `json:"run_as_username,omitempty"`
	SupplementalGroups []int64  `json:"supplemental_groups,omitempty"`
	GroupsPolicyStrict bool     `json:"groups_policy_strict,omitempty"`
	MaskedPaths        []string `json:"masked_paths,omitempty"`   // verbatim; see DefaultPaths for an empty list
	ReadonlyPaths      []string `json:"readonly_paths,omitempty"` // verbatim; likewise
	DefaultPaths       bool     `json:"default_paths,omitempty"`  // an empty MaskedPaths or ReadonlyPaths stands for the default list of runtime/spec; false: empty is empty
	Seccomp            Profile  `json:"seccomp"`
	AppArmor           Profile  `json:"apparmor"`
	SELinux            *SELinux `json:"selinux,omitempty"`
	PIDMode            PIDMode  `json:"pid_mode,omitempty"`
	PIDTarget          string   `json:"pid_target,omitempty"` // container id
}

// User is the identity a container's first process really has.
type User struct {
	UID    uint32   `json:"uid"`
	GID    uint32   `json:"gid"`
	Groups []uint32 `json:"groups,omitempty"` // exactly the set given to setgroups
}

// Namespaces are the pinned namespaces of the pod that a container joins.
type Namespaces = namespaces.Paths

// Rootfs is a container's root file system: layer folders, topmost first,
// and the writable folders above them. All on one file system.
type Rootfs struct {
	Lower []string `json:"lower"` // absolute folders, topmost layer first
	Upper string   `json:"upper,omitempty"`
	Work  string   `json:"work,omitempty"`
}

// ImageVolume is a read-only image mounted as a volume: its layer folders.
type ImageVolume struct {
	Lower   []string `json:"lower"`
	SubPath string   `json:"sub_path,omitempty"`
}

// ImageVolumeError tells that an image volume cannot be mounted. kubelet knows
// it by the first word of its text (cri-api, pkg/errors).
type ImageVolumeError struct {
	Path string // in the container
	Err  error
}

// Error implements error.
func (e *ImageVolumeError) Error() string {
	return "ImageVolumeMountFailed: volume " + e.Path + ": " + e.Err.Error()
}

// Unwrap gives the reason, which has the class.
func (e *ImageVolumeError) Unwrap() error { return e.Err }

// Container is everything the executor needs to create one container. Spec is
// an ordinary OCI runtime spec made by runtime/spec; the fields beside it are
// what OCI has no place for.
type Container struct {
	ID         string              `json:"id"`                // 64 lowercase hex digits
	Handler    string              `json:"handler,omitempty"` // the pod's runtime handler
	Spec       *specs.Spec         `json:"spec"`
	Rootfs     Rootfs              `json:"rootfs"`
	Mounts     []Mount             `json:"mounts,omitempty"`        // CRI volumes, in order; not repeated in Spec's execution
	Images     map[int]ImageVolume `json:"image_volumes,omitempty"` // by index in Mounts
	Namespaces Namespaces          `json:"namespaces"`
	PIDMode    PIDMode             `json:"pid_mode"`
	TargetID   string              `json:"target_id,omitempty"` // PIDTarget: id of the target, by which the executor finds it
	SandboxID  string              `json:"sandbox_id"`
	Cgroup     string              `json:"cgroup"` // path of the cgroup, see runtime/cgroup
	Resources  Resources           `json:"resources"`
	UIDMap     []IDMap             `json:"uid_map,omitempty"`
	GIDMap     []IDMap             `json:"gid_map,omitempty"`
	Shm        string              `json:"shm,omitempty"`       // folder to bind on /dev/shm (the pod's)
	EtcFiles   map[string]string   `json:"etc_files,omitempty"` // container path → host file (hosts, hostname, resolv.conf)
	LogPath    string              `json:"log_path,omitempty"`  // absolute; empty = no log
	Journal    string              `json:"journal,omitempty"`   // name under which the journal gets the log, too; empty = it does not
	TTY        bool                `json:"tty,omitempty"`
	Stdin      bool                `json:"stdin,omitempty"`
	StdinOnce  bool                `json:"stdin_once,omitempty"`
	Privileged bool                `json:"privileged,omitempty"`
	Volumes    []string            `json:"volumes,omitempty"` // image-config VOLUME paths: made, and writable even when the rootfs is not
}

// Exit tells how a container's first process ended.
type Exit struct {
	ID     string    `json:"id"`
	PID    int       `json:"pid"`
	Code   int       `json:"code"`   // exit status, or 128+signal
	Signal int       `json:"signal"` // 0 when it exited by itself
	Time   time.Time `json:"time"`
	// Unknown is true when nobody could see the status (the keeper was killed
	// on a kernel before 6.15); Code is then 255 and must be reported as unknown.
	Unknown bool `json:"unknown,omitempty"`
}

// ExecSpec is a process to run in a running container, beside its first one.
// User, capabilities, seccomp and the rest are those of the container.
type ExecSpec struct {
	Args    []string
	TTY     bool
	Stdin   bool
	Timeout time.Duration // ExecSync only; 0 = none
}

// ExecResult is what ExecSync returns. Each stream is cut at 16 MiB.
type ExecResult struct {
	Stdout, Stderr []byte
	Code           int
}

// Size of a terminal in characters.
type Size struct{ Width, Height uint16 }

// Streams connect a person to a process (Exec, Attach). Nil streams are closed
// or not wanted. Resize may be nil.
type Streams struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Resize         <-chan Size
}

// Process identifies a live process by pid and start time, so that a reused
// pid is never mistaken for it.
type Process struct {
	PID       int    `json:"pid"`
	StartTime uint64 `json:"start_time"` // clock ticks since boot, /proc/PID/stat field 22
}

// Stats of one cgroup at Time, in the kernel's own units made plain: bytes,
// nanoseconds, counts. A nil part means that the kernel does not offer it.
type Stats struct {
	Time      time.Time
	CPU       *CPUStats
	Memory    *MemoryStats
	IO        *IOStats
	Pids      *PidsStats
	Hugetlb   []HugetlbStats
	OOMEvents uint64
	Details   *Details // only where they were asked for
}

// Details are what metrics tell beyond Stats. They cost a look at every process
// of the container, so nobody else asks for them.
type Details struct {
	Time time.Time // of these, not before that of the Stats they belong to
	// Processes of the cgroup and below, their descriptors, and the sockets
	// among those, as far as there are not too many to count.
	Processes, Descriptors, Sockets          uint64
	HasProcesses, HasDescriptors, HasSockets bool
	// OpenFiles is the soft limit of the first process's open files.
	OpenFiles    uint64
	HasOpenFiles bool
	Reservation  uint64   // of memory, bytes; 0 = none
	Devices      []string // the names of Stats.IO.Devices, in their order
}

// PSI is one line pair of a pressure file. Totals are nanoseconds, averages percent.
type PSI struct{ Some, Full PSILine }

// PSILine is "some" or "full" of a pressure file.
type PSILine struct {
	Total                uint64 // nanoseconds
	Avg10, Avg60, Avg300 float64
}

// CPUStats in nanoseconds.
type CPUStats struct {
	Usage, User, System                      uint64
	UsageNanoCores                           uint64 // rate over the last sample pair; 0 until two samples exist
	Periods, ThrottledPeriods, ThrottledTime uint64
	Shares, Quota, Period                    int64
	PSI                                      *PSI
}

// MemoryStats in bytes.
type MemoryStats struct {
	Usage, WorkingSet, RSS, Cache, MappedFile, Kernel uint64
	Limit, SwapLimit                                  uint64 // 0 = none
	Memsw                                             uint64 // cgroup version 1: limit of memory and swap together, 0 = none
	Swap, MaxUsage, Failcnt                           uint64
	PageFaults, MajorPageFaults                       uint64
	Available                                         uint64
	// Kernels differ in what they count; without these the figure is no figure.
	HasKernel, HasSwap, HasMaxUsage bool
	PSI                             *PSI
}

// IOStats summed over devices, and by device.
type IOStats struct {
	ReadBytes, WriteBytes, Reads, Writes uint64
	Devices                              []IODevice
	PSI                                  *PSI
}

// IODevice is one line of io.stat.
type IODevice struct {
	Major, Minor                         uint64
	ReadBytes, WriteBytes, Reads, Writes uint64
	DiscardBytes                         uint64
}

// PidsStats counts tasks.
type PidsStats struct{ Current, Limit uint64 }

// HugetlbStats of one page size, bytes. cgroup version 2 keeps no highest usage.
type HugetlbStats struct {
	PageSize   string
	Usage, Max uint64
	HasMax     bool
}

// State is what the monitor and the kernel say of a container, for recovery.
type State struct {
	ID      string
	Process Process
	Cgroup  string // where the kernel has it; "" once it ended
	Started bool   // past the start gate
	Exit    *Exit  // not nil once it ended
}
