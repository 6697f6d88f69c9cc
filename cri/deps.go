// Package cri is the protocol edge: RuntimeService and ImageService of CRI v1,
// one file per RPC named noun_verb, one interceptor, the streaming server.
// Protobuf and gRPC end here.
//
// A handler validates, converts, calls one method and converts back; it has no
// locks, touches no files and runs no programs. It must not know about
// sandbox, runtime, golang.org/x/sys or os/exec.
package cri

import (
	"context"
	"io"
	"net/netip"
	"time"

	"github.com/naru-project/naru/images"
	"github.com/naru-project/naru/pod"
)

// Pods is the pod manager, as this package needs it.
type Pods interface {
	RunSandbox(ctx context.Context, c *pod.SandboxConfig) (id string, err error)
	StopSandbox(ctx context.Context, id string) error
	RemoveSandbox(ctx context.Context, id string) error
	// Sandbox and Container find by full id or unique prefix; NotFound otherwise.
	Sandbox(id string) (*pod.Pod, error)
	Sandboxes(f pod.Filter) []*pod.Pod
	UpdateSandbox(ctx context.Context, id string, overhead, resources *pod.Resources) error

	CreateContainer(ctx context.Context, podID string, c *pod.ContainerConfig) (id string, err error)
	StartContainer(ctx context.Context, id string) error
	StopContainer(ctx context.Context, id string, grace time.Duration) error
	RemoveContainer(ctx context.Context, id string) error
	Container(id string) (*pod.Container, error)
	Containers(f pod.Filter) []*pod.Container
	UpdateContainer(ctx context.Context, id string, r pod.Resources, annotations map[string]string) error
	ReopenLog(ctx context.Context, id string) error
	// Checkpoint writes a checkpoint archive to location, which must not exist.
	Checkpoint(ctx context.Context, id, location string, timeout time.Duration) error

	ExecSync(ctx context.Context, id string, cmd []string, timeout time.Duration) (pod.ExecResult, error)
	Exec(ctx context.Context, id string, cmd []string, tty bool, s pod.Streams) (exitCode int, err error)
	Attach(ctx context.Context, id string, s pod.Streams) error
	// Dial connects to a TCP port inside the sandbox (port-forward).
	Dial(ctx context.Context, podID string, port uint16) (io.ReadWriteCloser, error)

	ContainerStats(ctx context.Context, id string) (*pod.ContainerStats, error)
	ListContainerStats(ctx context.Context, f pod.Filter) []*pod.ContainerStats
	SandboxStats(ctx context.Context, id string) (*pod.SandboxStats, error)
	ListSandboxStats(ctx context.Context, f pod.Filter) []*pod.SandboxStats
	// ListSandboxMetrics is of all ready pods, with details.
	ListSandboxMetrics(ctx context.Context) []*pod.SandboxStats

	// Subscribe delivers events until ctx ends; a subscriber that falls behind
	// by more than the manager's bound is dropped: the channel is closed.
	Subscribe(ctx context.Context) <-chan pod.Event

	Operations() []pod.Operation
	NetworkStatus() (ready bool, reason, message string)
	// NetworkInfo is what a verbose Status shows of the network. Text stays as
	// it is, all else becomes JSON.
	NetworkInfo() map[string]any
	SetPodCIDRs(ctx context.Context, cidrs []netip.Prefix) error
	// Info is what verbose Status calls show of a pod or container, as JSON
	// values: pid, runtimeSpec, netns path, config, …
	Info(id string) map[string]any
}

// Images is the image store, as this package needs it.
type Images interface {
	Pull(ctx context.Context, ref string, auth *images.Auth) (imageID string, err error)
	Resolve(ref string) (*images.Image, error) // errs.NotFound when absent
	List() []*images.Image
	// Remove removes the image with all its names; absent is no error.
	Remove(ctx context.Context, ref string) error
	FsInfo() (images.FsInfo, error)
}

// Host tells facts of the machine and of how Naru uses it. They do not change
// while the daemon runs: kubelet asks for some of them only once.
type Host struct {
	SystemdCgroups            bool // cgroups are made through systemd, not directly
	RecursiveReadOnlyMounts   bool // mount_setattr(2) with AT_RECURSIVE works (Linux 5.12)
	UserNamespaces            bool // user namespaces and idmapped mounts work
	UserNamespacesHostNetwork bool // … also in pods on the host's network
	MountOptions              bool // noexec, nodev and nosuid can be set on volumes
}

// Metrics counts RPCs.
type Metrics interface {
	// ObserveRPC is called at the end of each RPC with the method's short
	// name, the gRPC code as text and how long it took.
	ObserveRPC(method, code string, took time.Duration)
}
