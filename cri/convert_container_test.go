package cri

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/pod"
)

func fullContainer() *criv1.ContainerConfig {
	return &criv1.ContainerConfig{
		Metadata: &criv1.ContainerMetadata{Name: "app", Attempt: 3},
		Image:    &criv1.ImageSpec{Image: "sha256:1", UserSpecifiedImage: "busybox", Annotations: map[string]string{"i": "j"}},
		Command:  []string{"sh"}, Args: []string{"-c", "true"}, WorkingDir: "/w",
		Envs: []*criv1.KeyValue{{Key: "A", Value: []byte("b=c\xff")}, {Key: "E"}},
		Mounts: []*criv1.Mount{
			{
				ContainerPath: "/data", HostPath: "/srv", Readonly: true, RecursiveReadOnly: true, SelinuxRelabel: true,
				UidMappings:  []*criv1.IDMapping{{HostId: 65536, Length: 10}, {ContainerId: 10, HostId: 1, Length: 1}},
				GidMappings:  []*criv1.IDMapping{{HostId: 65536, Length: 65536}},
				MountOptions: []string{"noexec", "nosuid", "noexec"},
			},
			{ContainerPath: "/img", Image: &criv1.ImageSpec{Image: "sha256:2", UserSpecifiedImage: "data", Annotations: map[string]string{"k": "l"}}, ImageSubPath: "a/b"},
			{ContainerPath: "/bi", HostPath: "/bi", Propagation: criv1.MountPropagation_PROPAGATION_BIDIRECTIONAL},
		},
		Devices:    []*criv1.Device{{ContainerPath: "/dev/x", HostPath: "/dev/y", Permissions: "rw"}, {ContainerPath: "/dev/a", HostPath: "/dev/a"}},
		CDIDevices: []*criv1.CDIDevice{{Name: "vendor.com/class=dev"}},
		Labels:     map[string]string{"l": "m"}, Annotations: map[string]string{"n": "o"},
		LogPath: "app/3.log", Stdin: true, StdinOnce: true, Tty: true,
		StopSignal: criv1.Signal_SIGNAL_SIGRTMINPLUS3,
		Linux: &criv1.LinuxContainerConfig{
			Resources: &criv1.LinuxContainerResources{
				CpuPeriod: 100000, CpuQuota: -1, CpuShares: 512, MemoryLimitInBytes: 1 << 20, MemorySwapLimitInBytes: -1, OomScoreAdj: -997,
				CpusetCpus: "0-3,7", CpusetMems: "0",
				HugepageLimits: []*criv1.HugepageLimit{{PageSize: "2MB", Limit: 4}},
				Unified:        map[string]string{"memory.high": "max", "hugetlb.2MB.max": "5"},
			},
			SecurityContext: &criv1.LinuxContainerSecurityContext{
				Capabilities:       &criv1.Capability{AddCapabilities: []string{"NET_ADMIN"}, DropCapabilities: []string{"ALL"}, AddAmbientCapabilities: []string{"KILL"}},
				RunAsUsername:      "nobody",
				RunAsGroup:         &criv1.Int64Value{Value: 0},
				ReadonlyRootfs:     true,
				SupplementalGroups: []int64{4294967294},
				NoNewPrivs:         true,
				MaskedPaths:        []string{"/proc/kcore"},
				ReadonlyPaths:      []string{"/proc/sys"},
				Seccomp:            &criv1.SecurityProfile{ProfileType: criv1.SecurityProfile_Localhost, LocalhostRef: "/p/s.json"},
				Apparmor:           &criv1.SecurityProfile{ProfileType: criv1.SecurityProfile_Localhost, LocalhostRef: "localhost/prof"},
				ApparmorProfile:    "unconfined", // the new field wins
				SelinuxOptions:     &criv1.SELinuxOption{Level: "s0:c1"},
				NamespaceOptions:   &criv1.NamespaceOption{Pid: criv1.NamespaceMode_CONTAINER},
			},
		},
	}
}

func create(s *Server, t *testing.T, c *criv1.ContainerConfig) error {
	t.Helper()
	_, err := s.CreateContainer(t.Context(), &criv1.CreateContainerRequest{PodSandboxId: "p", Config: c})
	return err
}

func TestCreateContainer(t *testing.T) {
	s, pods, _ := newTestServer()
	if err := create(s, t, fullContainer()); err != nil {
		t.Fatal(err)
	}
	zero := int64(0)
	want := &pod.ContainerConfig{
		Metadata: pod.ContainerMetadata{Name: "app", Attempt: 3},
		Image:    "sha256:1", UserImage: "busybox", ImageAnnotations: map[string]string{"i": "j"},
		Command: []string{"sh"}, Args: []string{"-c", "true"}, WorkingDir: "/w",
		Env: []string{"A=b=c\xff", "E="},
		Mounts: []pod.Mount{
			{
				ContainerPath: "/data", HostPath: "/srv", Readonly: true, RecursiveReadonly: true, SelinuxRelabel: true, Propagation: "private",
				UIDMap:  []pod.IDMap{{HostID: 65536, Size: 10}, {ContainerID: 10, HostID: 1, Size: 1}},
				GIDMap:  []pod.IDMap{{HostID: 65536, Size: 65536}},
				Options: []string{"noexec", "nosuid"},
			},
			{
				ContainerPath: "/img", Image: "sha256:2", UserImage: "data", ImageAnnotations: map[string]string{"k": "l"},
				ImageSubPath: "a/b", Readonly: true, Propagation: "private",
			},
			{ContainerPath: "/bi", HostPath: "/bi", Propagation: "bidirectional"},
		},
		Devices:    []pod.Device{{ContainerPath: "/dev/x", HostPath: "/dev/y", Permissions: "rw"}, {ContainerPath: "/dev/a", HostPath: "/dev/a", Permissions: "rwm"}},
		CDIDevices: []string{"vendor.com/class=dev"},
		Labels:     map[string]string{"l": "m"}, Annotations: map[string]string{"n": "o"},
		LogPath: "app/3.log", Stdin: true, StdinOnce: true, TTY: true, StopSignal: "SIGRTMIN+3",
		Resources: pod.Resources{
			CPUPeriod: 100000, CPUQuota: -1, CPUShares: 512, Memory: 1 << 20, MemorySwap: -1, OOMScoreAdj: -997,
			CpusetCpus: "0-3,7", CpusetMems: "0",
			Hugepages: []pod.HugepageLimit{{PageSize: "2MB", Limit: 4}},
			Unified:   map[string]string{"memory.high": "max", "hugetlb.2MB.max": "5"},
		},
		Security: pod.Security{
			AddCaps: []string{"NET_ADMIN"}, DropCaps: []string{"ALL"}, AddAmbientCaps: []string{"KILL"},
			RunAsUsername: "nobody", RunAsGroup: &zero, ReadonlyRootfs: true, SupplementalGroups: []int64{4294967294}, NoNewPrivs: true,
			MaskedPaths: []string{"/proc/kcore"}, ReadonlyPaths: []string{"/proc/sys"}, DefaultPaths: true,
			Seccomp:  pod.Profile{Type: "Localhost", Ref: "/p/s.json"},
			AppArmor: pod.Profile{Type: "Localhost", Ref: "prof"},
			SELinux:  &pod.SELinux{Level: "s0:c1"},
			PIDMode:  "container",
		},
	}
	if diff := cmp.Diff(want, pods.container); diff != "" {
		t.Error(diff)
	}
}

func TestBadContainers(t *testing.T) {
	type config = criv1.ContainerConfig
	sc := func(c *config) *criv1.LinuxContainerSecurityContext { return c.Linux.SecurityContext }
	res := func(c *config) *criv1.LinuxContainerResources { return c.Linux.Resources }
	tests := []struct {
		name   string
		change func(*config)
		want   string
	}{
		{"no metadata", func(c *config) { c.Metadata = nil }, "metadata.name"},
		{"no image", func(c *config) { c.Image = nil }, "image.image"},
		{"empty image", func(c *config) { c.Image.Image = "" }, "image.image"},
		{"command", func(c *config) { c.Command[0] = "a\x00b" }, "command"},
		{"args", func(c *config) { c.Args[0] = "\x00" }, "args"},
		{"working dir", func(c *config) { c.WorkingDir = "/\x00" }, "working_dir"},
		{"log path absolute", func(c *config) { c.LogPath = "/etc/cron.d/x" }, "log_path"},
		{"log path climbs", func(c *config) { c.LogPath = "../../etc/cron.d/x" }, "log_path"},
		{"env without a name", func(c *config) { c.Envs[0].Key = "" }, "envs"},
		{"env name with =", func(c *config) { c.Envs[0].Key = "A=B" }, "envs"},
		{"env value", func(c *config) { c.Envs[0].Value = []byte{0} }, "value of A"},
		{"nil env", func(c *config) { c.Envs[0] = nil }, "envs"},
		{"nil mount", func(c *config) { c.Mounts[0] = nil }, "mounts"},
		{"mount target", func(c *config) { c.Mounts[0].ContainerPath = "data" }, "container_path"},
		{"mount target climbs", func(c *config) { c.Mounts[0].ContainerPath = "/a/../../b" }, "container_path"},
		{"mount without source", func(c *config) { c.Mounts[0].HostPath = "" }, "host_path"},
		{"relative source", func(c *config) { c.Mounts[0].HostPath = "srv" }, "host_path"},
		{"image and source", func(c *config) { c.Mounts[1].HostPath = "/x" }, "exclude"},
		{"image without name", func(c *config) { c.Mounts[1].Image.Image = "" }, "image.image"},
		{"sub path climbs", func(c *config) { c.Mounts[1].ImageSubPath = "../x" }, "image_sub_path"},
		{"sub path absolute", func(c *config) { c.Mounts[1].ImageSubPath = "/x" }, "image_sub_path"},
		{"propagation", func(c *config) { c.Mounts[0].Propagation = 8 }, "propagation 8"},
		{"RRO without readonly", func(c *config) { c.Mounts[0].Readonly = false }, "needs readonly"},
		{"RRO with propagation", func(c *config) {
			c.Mounts[0].Propagation = criv1.MountPropagation_PROPAGATION_HOST_TO_CONTAINER
		}, "PROPAGATION_PRIVATE"},
		{"mount option", func(c *config) { c.Mounts[0].MountOptions = []string{"dev"} }, "mount_options"},
		{"mount maps overlap", func(c *config) { c.Mounts[0].UidMappings[1].ContainerId = 9 }, "overlap"},
		{"mount maps overlap on the host", func(c *config) { c.Mounts[0].UidMappings[1].HostId = 65540 }, "overlap"},
		{"mount map overflow", func(c *config) { c.Mounts[0].GidMappings[0].Length = 4294967295 }, "beyond"},
		{"nil device", func(c *config) { c.Devices[0] = nil }, "devices"},
		{"device path", func(c *config) { c.Devices[0].HostPath = "y" }, "devices.host_path"},
		{"device permissions", func(c *config) { c.Devices[0].Permissions = "rx" }, "permissions"},
		{"CDI device", func(c *config) { c.CDIDevices[0].Name = "" }, "CDI_devices"},
		{"nil CDI device", func(c *config) { c.CDIDevices[0] = nil }, "CDI_devices"},
		{"stop signal", func(c *config) { c.StopSignal = 99 }, "stop_signal"},
		{"cpu_period", func(c *config) { res(c).CpuPeriod = -1 }, "cpu_period"},
		{"cpu_quota", func(c *config) { res(c).CpuQuota = -2 }, "cpu_quota"},
		{"cpu_shares", func(c *config) { res(c).CpuShares = -2 }, "cpu_shares"},
		{"memory", func(c *config) { res(c).MemoryLimitInBytes = -2 }, "memory_limit"},
		{"swap", func(c *config) { res(c).MemorySwapLimitInBytes = -2 }, "memory_swap"},
		{"oom", func(c *config) { res(c).OomScoreAdj = -1001 }, "oom_score_adj"},
		{"cpus", func(c *config) { res(c).CpusetCpus = "0-3;reboot" }, "cpuset_cpus"},
		{"mems", func(c *config) { res(c).CpusetMems = "-1" }, "cpuset_mems"},
		{"hugepage", func(c *config) { res(c).HugepageLimits[0].PageSize = "../2MB" }, "page size"},
		{"nil hugepage", func(c *config) { res(c).HugepageLimits[0] = nil }, "page size"},
		{"unified path", func(c *config) { res(c).Unified["../cgroup.procs"] = "1" }, "unified"},
		{"unified without a dot", func(c *config) { res(c).Unified["memory"] = "1" }, "unified"},
		{"privileged", func(c *config) { sc(c).Privileged = true }, "privileged"},
		{"user and name", func(c *config) { sc(c).RunAsUser = &criv1.Int64Value{Value: 1} }, "exclude"},
		{"group without user", func(c *config) { sc(c).RunAsUsername = "" }, "run_as_group"},
		{"name with colon", func(c *config) { sc(c).RunAsUsername = "a:b" }, "run_as_username"},
		{"name with line end", func(c *config) { sc(c).RunAsUsername = "a\nroot" }, "run_as_username"},
		{"group", func(c *config) { sc(c).RunAsGroup.Value = -1 }, "run_as_group"},
		{"supplemental group", func(c *config) { sc(c).SupplementalGroups[0] = 1 << 32 }, "supplemental_groups"},
		{"capability", func(c *config) { sc(c).Capabilities.AddCapabilities[0] = "" }, "capabilities"},
		{"masked path", func(c *config) { sc(c).MaskedPaths[0] = "proc" }, "masked_paths"},
		{"readonly path", func(c *config) { sc(c).ReadonlyPaths[0] = "/proc/../x" }, "readonly_paths"},
		{"seccomp without file", func(c *config) { sc(c).Seccomp.LocalhostRef = "" }, "localhost_ref"},
		{"seccomp relative", func(c *config) { sc(c).Seccomp.LocalhostRef = "p.json" }, "localhost_ref"},
		{"seccomp climbs", func(c *config) { sc(c).Seccomp.LocalhostRef = "/a/../b" }, "localhost_ref"},
		{"seccomp file for nothing", func(c *config) { sc(c).Seccomp.ProfileType = criv1.SecurityProfile_Unconfined }, "Localhost only"},
		{"apparmor type", func(c *config) { sc(c).Apparmor.ProfileType = 5 }, "apparmor.profile_type"},
		{"apparmor without name", func(c *config) { sc(c).Apparmor.LocalhostRef = "localhost/" }, "names no profile"},
		{"old apparmor", func(c *config) { sc(c).Apparmor = nil; sc(c).ApparmorProfile = "strange" }, "apparmor_profile"},
		{"old apparmor without name", func(c *config) { sc(c).Apparmor = nil; sc(c).ApparmorProfile = "localhost/" }, "names no profile"},
		{"host network", func(c *config) { sc(c).NamespaceOptions.Network = criv1.NamespaceMode_NODE }, "network NODE"},
		{"host ipc", func(c *config) { sc(c).NamespaceOptions.Ipc = criv1.NamespaceMode_NODE }, "ipc NODE"},
		{"network 9", func(c *config) { sc(c).NamespaceOptions.Network = 9 }, "network 9"},
		{"pid 9", func(c *config) { sc(c).NamespaceOptions.Pid = 9 }, "pid 9"},
		{"pid TARGET of nobody", func(c *config) { sc(c).NamespaceOptions.Pid = criv1.NamespaceMode_TARGET }, "target_id"},
		{"other userns", func(c *config) {
			m := []*criv1.IDMapping{{HostId: 7, Length: 7}}
			sc(c).NamespaceOptions.UsernsOptions = &criv1.UserNamespace{Uids: m, Gids: m}
		}, "differ from the pod's"},
	}
	s, pods, _ := newTestServer()
	for _, tt := range tests {
		c := fullContainer()
		tt.change(c)
		err := create(s, t, c)
		if !errs.Is(err, errs.InvalidArgument) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want InvalidArgument about %s", tt.name, err, tt.want)
		}
	}
	if pods.container != nil {
		t.Error("a bad request reached the manager")
	}
	s.host.MountOptions = false
	if err := create(s, t, fullContainer()); !errs.Is(err, errs.InvalidArgument) {
		t.Errorf("mount options on a host without: %v", err)
	}
	s.host.RecursiveReadOnlyMounts = false
	if err := create(s, t, fullContainer()); !errs.Is(err, errs.InvalidArgument) {
		t.Errorf("recursive read-only on a host without: %v", err)
	}
	if _, err := s.CreateContainer(t.Context(), &criv1.CreateContainerRequest{PodSandboxId: "absent", Config: fullContainer()}); !errs.Is(err, errs.NotFound) {
		t.Errorf("unknown pod: %v", err)
	}
}

// minimal is a container that says nothing about security.
func minimal() *criv1.ContainerConfig {
	return &criv1.ContainerConfig{Metadata: &criv1.ContainerMetadata{Name: "n"}, Image: &criv1.ImageSpec{Image: "i"}}
}

func TestDefaultPaths(t *testing.T) {
	s, pods, _ := newTestServer()
	userns := []pod.IDMap{{HostID: 65536, Size: 65536}}
	tests := []struct {
		name       string
		sandbox    pod.SandboxConfig
		privileged bool
		want       bool
	}{
		{"plain", pod.SandboxConfig{}, false, true},
		{"user namespace", pod.SandboxConfig{UIDMap: userns, GIDMap: userns}, false, false},
		{"privileged", pod.SandboxConfig{Security: pod.Security{Privileged: true}}, true, false},
		{"privileged pod, plain container", pod.SandboxConfig{Security: pod.Security{Privileged: true}}, false, true},
	}
	for _, tt := range tests {
		pods.pods["p"].Config = &tt.sandbox
		c := minimal()
		c.Linux = &criv1.LinuxContainerConfig{SecurityContext: &criv1.LinuxContainerSecurityContext{Privileged: tt.privileged}}
		if err := create(s, t, c); err != nil {
			t.Errorf("%s: %v", tt.name, err)
		} else if got := pods.container.Security; got.DefaultPaths != tt.want || got.MaskedPaths != nil || got.ReadonlyPaths != nil || got.Privileged != tt.privileged {
			t.Errorf("%s: %+v", tt.name, got)
		}
	}
}

func TestPIDModes(t *testing.T) {
	s, pods, _ := newTestServer()
	pods.containers["other"] = &pod.Container{ID: "other", PodID: "q", State: pod.StateRunning}
	pods.containers["dead"] = &pod.Container{ID: "dead", PodID: "p", State: pod.StateExited}
	userns := []pod.IDMap{{HostID: 65536, Size: 65536}}
	tests := []struct {
		name    string
		sandbox pod.SandboxConfig
		options *criv1.NamespaceOption
		want    pod.PIDMode
		class   errs.Class // of the error, if want is empty
	}{
		{"nothing said, shared", pod.SandboxConfig{PID: pod.PIDPod}, nil, pod.PIDPod, 0},
		{"nothing said, own", pod.SandboxConfig{PID: pod.PIDContainer}, nil, pod.PIDContainer, 0},
		{"nothing said, host", pod.SandboxConfig{PID: pod.PIDNode}, nil, pod.PIDNode, 0},
		{"own in a shared pod", pod.SandboxConfig{PID: pod.PIDPod}, &criv1.NamespaceOption{Pid: criv1.NamespaceMode_CONTAINER}, pod.PIDContainer, 0},
		{"host", pod.SandboxConfig{PID: pod.PIDNode}, &criv1.NamespaceOption{Pid: criv1.NamespaceMode_NODE}, pod.PIDNode, 0},
		{"host in userns", pod.SandboxConfig{UIDMap: userns}, &criv1.NamespaceOption{Pid: criv1.NamespaceMode_NODE}, "", errs.InvalidArgument},
		{"target", pod.SandboxConfig{}, &criv1.NamespaceOption{Pid: criv1.NamespaceMode_TARGET, TargetId: "c"}, pod.PIDTarget, 0},
		{"target elsewhere", pod.SandboxConfig{}, &criv1.NamespaceOption{Pid: criv1.NamespaceMode_TARGET, TargetId: "other"}, "", errs.InvalidArgument},
		{"target dead", pod.SandboxConfig{}, &criv1.NamespaceOption{Pid: criv1.NamespaceMode_TARGET, TargetId: "dead"}, "", errs.FailedPrecondition},
		{"target unknown", pod.SandboxConfig{}, &criv1.NamespaceOption{Pid: criv1.NamespaceMode_TARGET, TargetId: "nope"}, "", errs.NotFound},
		{"userns as the pod", pod.SandboxConfig{PID: pod.PIDContainer, UIDMap: userns}, &criv1.NamespaceOption{UsernsOptions: &criv1.UserNamespace{
			Uids: []*criv1.IDMapping{{HostId: 65536, Length: 65536}}, Gids: []*criv1.IDMapping{{HostId: 65536, Length: 65536}},
		}}, pod.PIDContainer, 0},
		{"no userns in a pod with one", pod.SandboxConfig{UIDMap: userns}, &criv1.NamespaceOption{
			UsernsOptions: &criv1.UserNamespace{Mode: criv1.NamespaceMode_NODE},
		}, "", errs.InvalidArgument},
		{"host network as the pod", pod.SandboxConfig{Network: pod.ModeNode, IPC: pod.ModeNode, PID: pod.PIDPod},
			&criv1.NamespaceOption{Network: criv1.NamespaceMode_NODE, Ipc: criv1.NamespaceMode_NODE}, pod.PIDPod, 0},
	}
	for _, tt := range tests {
		pods.pods["p"].Config = &tt.sandbox
		c := minimal()
		c.Linux = &criv1.LinuxContainerConfig{SecurityContext: &criv1.LinuxContainerSecurityContext{NamespaceOptions: tt.options}}
		err := create(s, t, c)
		if tt.want == "" {
			if !errs.Is(err, tt.class) {
				t.Errorf("%s: %v, want %v", tt.name, err, tt.class)
			}
			continue
		}
		if err != nil || pods.container.Security.PIDMode != tt.want {
			t.Errorf("%s: %v, %v", tt.name, pods.container.Security.PIDMode, err)
		}
	}
}

// The deprecated AppArmor string counts, the seccomp one does not.
func TestOldAppArmorField(t *testing.T) {
	for old, want := range map[string]pod.Profile{
		"":                {},
		"runtime/default": {Type: pod.ProfileRuntimeDefault},
		"unconfined":      {Type: pod.ProfileUnconfined},
		"localhost/mine":  {Type: pod.ProfileLocalhost, Ref: "mine"},
	} {
		got, err := containerSecurity(&criv1.LinuxContainerSecurityContext{ApparmorProfile: old, SeccompProfilePath: "runtime/default"}, &pod.SandboxConfig{})
		if err != nil || got.AppArmor != want || got.Seccomp != (pod.Profile{Type: pod.ProfileUnconfined}) {
			t.Errorf("%q: %+v, %v", old, got, err)
		}
	}
}

func TestContainerStatus(t *testing.T) {
	s, pods, _ := newTestServer()
	c := runtimeClient(t, s)
	if err := create(s, t, fullContainer()); err != nil {
		t.Fatal(err)
	}
	in, cfg := fullContainer(), pods.container
	cfg.Mounts[1].ImageRef = "sha256:resolved"
	pods.containers["c"] = &pod.Container{
		ID: "c", PodID: "p", Config: cfg, State: pod.StateExited,
		CreatedAt: time.Unix(1, 0), StartedAt: time.Unix(2, 0), FinishedAt: time.Unix(3, 0),
		ExitCode: 137, Reason: "OOMKilled", Message: "too much \xff",
		ImageID: "sha256:1", ImageRef: "repo@sha256:1", LogPath: "/var/log/x", User: &pod.User{UID: 1, GID: 2, Groups: []uint32{2, 4294967294}},
		Resources: cfg.Resources, Mounts: cfg.Mounts, StopSignal: "SIGRTMIN+3",
	}
	out, err := c.ContainerStatus(t.Context(), &criv1.ContainerStatusRequest{ContainerId: "c", Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	in.Mounts[0].MountOptions = in.Mounts[0].MountOptions[:2] // the doubled one is gone
	in.Mounts[1].Readonly = true
	in.Mounts[1].Image.ImageRef = "sha256:resolved"
	want := &criv1.ContainerStatus{
		Id: "c", Metadata: in.Metadata, State: criv1.ContainerState_CONTAINER_EXITED,
		CreatedAt: 1e9, StartedAt: 2e9, FinishedAt: 3e9, ExitCode: 137, Reason: "OOMKilled", Message: "too much \uFFFD",
		Image: in.Image, ImageRef: "repo@sha256:1", ImageId: "sha256:1",
		Labels: in.Labels, Annotations: in.Annotations, Mounts: in.Mounts, LogPath: "/var/log/x",
		Resources:  &criv1.ContainerResources{Linux: in.Linux.Resources},
		User:       &criv1.ContainerUser{Linux: &criv1.LinuxContainerUser{Uid: 1, Gid: 2, SupplementalGroups: []int64{2, 4294967294}}},
		StopSignal: in.StopSignal,
	}
	if diff := cmp.Diff(want, out.Status, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	if got := out.Info["info"]; got != `{"pid":42,"runtimeSpec":{"ociVersion":"1.3.0"}}` {
		t.Errorf("info %s", got)
	}
	item := containerItem(pods.containers["c"])
	if item.ImageId != "sha256:1" || item.ImageRef != "repo@sha256:1" || item.PodSandboxId != "p" || item.State != criv1.ContainerState_CONTAINER_EXITED {
		t.Errorf("%v", item)
	}
	bare := containerStatus(&pod.Container{ID: "x"})
	if bare.Metadata == nil || bare.State != criv1.ContainerState_CONTAINER_UNKNOWN || bare.CreatedAt != 0 || bare.User != nil {
		t.Errorf("%v", bare)
	}
}

func TestVerboseInfoThatCannotBeTold(t *testing.T) {
	s, pods, _ := newTestServer()
	pods.info = map[string]any{"bad": func() {}}
	out, err := s.ContainerStatus(t.Context(), &criv1.ContainerStatusRequest{ContainerId: "c", Verbose: true})
	if err != nil || out.Status == nil || len(out.Info) != 0 {
		t.Errorf("%v, %v", out, err)
	}
	pods.info = nil
	out, err = s.ContainerStatus(t.Context(), &criv1.ContainerStatusRequest{ContainerId: "c", Verbose: true})
	if err != nil || out.Info["info"] != "{}" {
		t.Errorf("%v, %v", out, err)
	}
	if out, _ = s.ContainerStatus(t.Context(), &criv1.ContainerStatusRequest{ContainerId: "c"}); len(out.Info) != 0 {
		t.Errorf("info without verbose: %v", out.Info)
	}
}

func TestContainerFilter(t *testing.T) {
	s, pods, _ := newTestServer()
	states := []pod.ContainerState{pod.StateCreated, pod.StateRunning, pod.StateExited, pod.StateUnknown}
	delete(pods.containers, "c")
	for i, st := range states {
		id := string(rune('d' - i)) // d is the oldest
		pods.containers[id] = &pod.Container{ID: id, PodID: "p" + id, State: st, CreatedAt: time.Unix(int64(i), 0),
			Config: &pod.ContainerConfig{Labels: map[string]string{"i": id}}}
	}
	list := func(f *criv1.ContainerFilter) string {
		out, err := s.ListContainers(t.Context(), &criv1.ListContainersRequest{Filter: f})
		if err != nil {
			t.Fatal(err)
		}
		ids := ""
		for _, c := range out.Containers {
			ids += c.Id
		}
		return ids
	}
	running := &criv1.ContainerStateValue{State: criv1.ContainerState_CONTAINER_RUNNING}
	for want, f := range map[string]*criv1.ContainerFilter{
		"dcba": nil,
		"c":    {State: running},
		"d":    {State: &criv1.ContainerStateValue{}}, // CREATED is zero
		"a":    {PodSandboxId: "pa"},
		"b":    {LabelSelector: map[string]string{"i": "b"}},
		"":     {State: running, Id: "a"},
	} {
		if got := list(f); got != want {
			t.Errorf("filter %v: %q, want %q", f, got, want)
		}
	}
}

func TestSignals(t *testing.T) {
	for n, name := range criv1.Signal_name {
		text, err := signalName("f", criv1.Signal(n))
		if err != nil {
			t.Fatal(err)
		}
		if got := criSignal(text); got != criv1.Signal(n) {
			t.Errorf("%s became %q became %v", name, text, got)
		}
	}
	for text, want := range map[string]criv1.Signal{
		"TERM": criv1.Signal_SIGNAL_SIGTERM, "15": criv1.Signal_SIGNAL_SIGTERM, "sigquit": criv1.Signal_SIGNAL_SIGQUIT, "9": criv1.Signal_SIGNAL_SIGKILL,
		"31": criv1.Signal_SIGNAL_SIGSYS, "34": criv1.Signal_SIGNAL_SIGRTMIN, "37": criv1.Signal_SIGNAL_SIGRTMINPLUS3, "49": criv1.Signal_SIGNAL_SIGRTMINPLUS15,
		"50": criv1.Signal_SIGNAL_SIGRTMAXMINUS14, "64": criv1.Signal_SIGNAL_SIGRTMAX, "32": 0, "0": 0, "-3": 0, "cheese": 0, "": 0,
	} {
		if got := criSignal(text); got != want {
			t.Errorf("%q: %v, want %v", text, got, want)
		}
	}
}

func TestStopTimeouts(t *testing.T) {
	s, pods, _ := newTestServer()
	for in, want := range map[int64]time.Duration{0: 0, 30: 30 * time.Second, 1 << 62: 9223372036 * time.Second} {
		if _, err := s.StopContainer(t.Context(), &criv1.StopContainerRequest{ContainerId: "c", Timeout: in}); err != nil || pods.grace != want {
			t.Errorf("%d: %v, %v", in, pods.grace, err)
		}
	}
	if _, err := s.StopContainer(t.Context(), &criv1.StopContainerRequest{ContainerId: "c", Timeout: -1}); !errs.Is(err, errs.InvalidArgument) {
		t.Errorf("negative: %v", err)
	}
}

// The kubelet sends the subPath of every volume in image_sub_path; on a host
// path it says nothing new.
func TestSubPathOfAHostPath(t *testing.T) {
	m := &criv1.Mount{ContainerPath: "/sub", HostPath: "/var/lib/kubelet/pods/uid/volumes/x/a", ImageSubPath: "a"}
	s, _, _ := newTestServer()
	got, err := s.mount(m)
	if err != nil {
		t.Fatal(err)
	}
	if got.HostPath != m.HostPath || got.ImageSubPath != "" {
		t.Errorf("%+v", got)
	}
}
