package pod

import (
	"errors"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/naru-project/naru/pod/store"
	"github.com/naru-project/naru/runtime"
	"github.com/naru-project/naru/sandbox"
)

// recordSchema is raised when an older release would misread a record. New
// fields that an older release may ignore (and keeps) do not raise it.
const recordSchema = 1

// podRecord is the file of a pod. It says what was intended and who it is;
// whether that is still so, the kernel is asked.
type podRecord struct {
	ID        string          `json:"id"`
	BootID    string          `json:"boot_id"`
	Phase     Phase           `json:"phase"`
	CreatedAt time.Time       `json:"created_at"`
	Message   string          `json:"message,omitempty"`
	Released  bool            `json:"released,omitempty"` // nothing of the host is held any more
	Config    *SandboxConfig  `json:"config"`
	Handle    *sandbox.Handle `json:"handle,omitempty"`
}

// containerRecord is the file of a container.
type containerRecord struct {
	ID         string           `json:"id"`
	PodID      string           `json:"pod_id"`
	BootID     string           `json:"boot_id"`
	Phase      Phase            `json:"phase"`
	CreatedAt  time.Time        `json:"created_at"`
	StartedAt  time.Time        `json:"started_at,omitzero"`
	FinishedAt time.Time        `json:"finished_at,omitzero"`
	StopBy     time.Time        `json:"stop_by,omitzero"` // when a running stop ends its grace
	ExitCode   int32            `json:"exit_code,omitempty"`
	Reason     string           `json:"reason,omitempty"`
	Message    string           `json:"message,omitempty"`
	ImageID    string           `json:"image_id,omitempty"`
	ImageRef   string           `json:"image_ref,omitempty"`
	LogPath    string           `json:"log_path,omitempty"`
	StopSignal string           `json:"stop_signal,omitempty"`
	User       *User            `json:"user,omitempty"`
	Resources  Resources        `json:"resources"`
	Process    runtime.Process  `json:"process,omitzero"`
	Cgroup     string           `json:"cgroup,omitempty"`
	Config     *ContainerConfig `json:"config"`
	EnvBytes   [][]byte         `json:"env_bytes,omitempty"` // Config.Env, where JSON's text cannot hold it
	Mounts     []Mount          `json:"mounts,omitempty"`    // as resolved, where that differs from Config's
}

func (r *podRecord) check(id string) error {
	switch {
	case r.ID != id:
		return errors.New("record names another id")
	case r.Config == nil:
		return errors.New("record has no config")
	case !known(podArrows, r.Phase):
		return fmt.Errorf("phase %q does not exist", r.Phase)
	case r.Handle != nil && r.Handle.ID != id:
		return errors.New("handle names another id")
	}
	return nil
}

func (r *containerRecord) check(id string) error {
	switch {
	case r.ID != id:
		return errors.New("record names another id")
	case !store.ValidID(r.PodID):
		return errors.New("pod id is not an id")
	case r.Config == nil:
		return errors.New("record has no config")
	case !known(containerArrows, r.Phase):
		return fmt.Errorf("phase %q does not exist", r.Phase)
	}
	return nil
}

func (r *podRecord) snapshot() *Pod {
	return &Pod{
		ID: r.ID, Config: r.Config, Phase: r.Phase, CreatedAt: r.CreatedAt,
		Handle: r.Handle, Message: r.Message,
	}
}

func (r *containerRecord) snapshot() *Container {
	if r.EnvBytes != nil {
		r.Config.Env = envFromBytes(r.EnvBytes)
		r.EnvBytes = nil
	}
	c := &Container{
		ID: r.ID, PodID: r.PodID, Config: r.Config, Phase: r.Phase, State: stateOf(r.Phase),
		CreatedAt: r.CreatedAt, StartedAt: r.StartedAt, FinishedAt: r.FinishedAt,
		ExitCode: r.ExitCode, Reason: r.Reason, Message: r.Message,
		ImageID: r.ImageID, ImageRef: r.ImageRef, LogPath: r.LogPath,
		User: r.User, Resources: r.Resources, Mounts: r.Mounts, StopSignal: r.StopSignal,
	}
	if c.Mounts == nil {
		c.Mounts = r.Config.Mounts
	}
	if c.State == StateRunning || c.Phase == PhaseCreated || c.Phase == PhaseStarting {
		c.PID = r.Process.PID
	}
	return c
}

func newPodRecord(p *Pod, boot string, released bool) *podRecord {
	return &podRecord{
		ID: p.ID, BootID: boot, Phase: p.Phase, CreatedAt: p.CreatedAt, Message: p.Message,
		Released: released, Config: p.Config, Handle: p.Handle,
	}
}

func newContainerRecord(e *containerEntry, c *Container, boot string) *containerRecord {
	r := &containerRecord{
		ID: c.ID, PodID: c.PodID, BootID: boot, Phase: c.Phase,
		CreatedAt: c.CreatedAt, StartedAt: c.StartedAt, FinishedAt: c.FinishedAt, StopBy: e.stopBy,
		ExitCode: c.ExitCode, Reason: c.Reason, Message: c.Message,
		ImageID: c.ImageID, ImageRef: c.ImageRef, LogPath: c.LogPath, StopSignal: c.StopSignal,
		User: c.User, Resources: c.Resources, Process: e.proc, Cgroup: e.cgroup, Config: c.Config,
		EnvBytes: envBytes(c.Config.Env),
	}
	if !sameSlice(c.Mounts, c.Config.Mounts) {
		r.Mounts = c.Mounts
	}
	return r
}

// sameSlice reports whether two slices are one piece of memory.
func sameSlice[T any](a, b []T) bool {
	return len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0])
}

// envBytes returns the environment as bytes when text would damage it: CRI's
// values are bytes, JSON's strings are UTF-8.
func envBytes(env []string) [][]byte {
	for _, e := range env {
		if !utf8.ValidString(e) {
			out := make([][]byte, len(env))
			for i, e := range env {
				out[i] = []byte(e)
			}
			return out
		}
	}
	return nil
}

func envFromBytes(b [][]byte) []string {
	env := make([]string, len(b))
	for i, e := range b {
		env[i] = string(e)
	}
	return env
}

// containerName is a container in messages: namespace/pod/container.
func containerName(p *SandboxConfig, c ContainerMetadata) string {
	return podName(p) + "/" + c.Name
}

func podName(p *SandboxConfig) string { return p.Metadata.Namespace + "/" + p.Metadata.Name }

// short shortens an id for messages, as crictl does.
func short(id string) string {
	if len(id) > 13 && store.ValidID(id) {
		return id[:13]
	}
	return strings.Clone(id)
}
