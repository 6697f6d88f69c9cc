package ring

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const containerSecurity = containerConfig + ".linux.security_context"

type securityContext = criv1.LinuxContainerSecurityContext

// statusLine is a line of /proc/1/status in the container.
func (n *Node) statusLine(t testing.TB, id, name string) string {
	t.Helper()
	return strings.TrimSpace(n.Sh(t, id, "grep ^"+name+": /proc/1/status | cut -f2"))
}

// hasCap tells whether a capability set of the first process has a capability.
func (n *Node) hasCap(t testing.TB, id, set string, number int) bool {
	t.Helper()
	bits, err := strconv.ParseUint(n.statusLine(t, id, set), 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	return bits>>number&1 == 1
}

func capabilityChecks() []fieldCheck {
	at := containerSecurity + ".capabilities"
	const capChown, capNetBind, capNetAdmin = 0, 10, 12
	const sees = "/proc/1/status in the container"
	caps := func(n *Node, t testing.TB, c *criv1.Capability, f func(*securityContext)) string {
		return n.box(t, security(func(s *securityContext) {
			s.Capabilities = c
			if f != nil {
				f(s)
			}
		}))
	}
	return []fieldCheck{
		{"added capability", sees, under(at, "add_capabilities"), func(t testing.TB, n *Node) {
			want(t, "NET_ADMIN", n.hasCap(t, caps(n, t, &criv1.Capability{AddCapabilities: []string{"NET_ADMIN"}}, nil), "CapEff", capNetAdmin), true)
		}},
		{"dropped capability", sees, under(at, "drop_capabilities"), func(t testing.TB, n *Node) {
			want(t, "CHOWN", n.hasCap(t, caps(n, t, &criv1.Capability{DropCapabilities: []string{"CHOWN"}}, nil), "CapBnd", capChown), false)
		}},
		{"ambient capability", sees, under(at, "add_ambient_capabilities"), func(t testing.TB, n *Node) {
			id := caps(n, t, &criv1.Capability{AddAmbientCapabilities: []string{"NET_BIND_SERVICE"}}, func(s *securityContext) { s.RunAsUser = &criv1.Int64Value{Value: 1000} })
			want(t, "NET_BIND_SERVICE", n.hasCap(t, id, "CapAmb", capNetBind), true)
		}},
		{"privileged", "a mount made in the container", under(containerSecurity, "privileged"), func(t testing.TB, n *Node) {
			n.Sh(t, n.Run(t, n.Pod(t, privilegedPod), security(func(s *securityContext) { s.Privileged = true })), "mount -t tmpfs tmpfs /mnt")
		}},
		{"no new privileges", sees, under(containerSecurity, "no_new_privs"), func(t testing.TB, n *Node) {
			want(t, "NoNewPrivs", n.statusLine(t, n.box(t, security(func(s *securityContext) { s.NoNewPrivs = true })), "NoNewPrivs"), 1)
		}},
	}
}

func userChecks() []fieldCheck {
	const sees = "`id` in the container"
	who := func(f func(*securityContext), script, wanted string) func(testing.TB, *Node) {
		return func(t testing.TB, n *Node) { want(t, "id", n.Sh(t, n.box(t, security(f)), script), wanted) }
	}
	return []fieldCheck{
		{"user and group", sees, under(containerSecurity, "run_as_user.value", "run_as_group.value"), who(func(s *securityContext) {
			s.RunAsUser, s.RunAsGroup = &criv1.Int64Value{Value: 1234}, &criv1.Int64Value{Value: 2345}
		}, "id -u; id -g", "1234\n2345")},
		{"user by name", sees, under(containerSecurity, "run_as_username"), who(func(s *securityContext) { s.RunAsUsername = "app" }, "id -u", "1000")},
		{"groups", sees, under(containerSecurity, "supplemental_groups"), who(func(s *securityContext) { s.SupplementalGroups = []int64{3000} }, "id -G", "0 3000")},
		{"groups of the image", sees, under(containerSecurity, "supplemental_groups_policy"), who(func(s *securityContext) {
			s.RunAsUsername, s.SupplementalGroupsPolicy = "app", criv1.SupplementalGroupsPolicy_Strict
		}, "id -G", "1000")},
	}
}

func confinementChecks() []fieldCheck {
	local := func(ref string) *criv1.SecurityProfile {
		return &criv1.SecurityProfile{ProfileType: criv1.SecurityProfile_Localhost, LocalhostRef: ref}
	}
	refused := func(words string, f func(*securityContext)) func(testing.TB, *Node) {
		return func(t testing.TB, n *Node) {
			_, err := n.TryContainer(t, n.Pod(t, nil), security(f))
			if err == nil || !strings.Contains(err.Error(), words) {
				t.Errorf("got %v, want an error about %s", err, words)
			}
		}
	}
	selinux := func(name string, o *criv1.SELinuxOption) fieldCheck {
		return fieldCheck{
			"SELinux " + name, "that what cannot be had is refused", under(containerSecurity+".selinux_options", name),
			refused("SELinux", func(s *securityContext) { s.SelinuxOptions = o }),
		}
	}
	return []fieldCheck{
		{"read-only root", "that nothing can be written", under(containerSecurity, "readonly_rootfs"), func(t testing.TB, n *Node) {
			n.fails(t, n.box(t, security(func(s *securityContext) { s.ReadonlyRootfs = true })), "echo x >/file", "Read-only")
		}},
		{"masked paths", "a file that looks empty", under(containerSecurity, "masked_paths"), func(t testing.TB, n *Node) {
			want(t, "size", n.Sh(t, n.box(t, security(func(s *securityContext) { s.MaskedPaths = []string{"/etc/group"} })), "wc -c </etc/group"), 0)
		}},
		{"read-only paths", "that nothing can be written", under(containerSecurity, "readonly_paths"), func(t testing.TB, n *Node) {
			n.fails(t, n.box(t, security(func(s *securityContext) { s.ReadonlyPaths = []string{"/home"} })), "echo x >/home/file", "Read-only")
		}},
		{"seccomp", "a call that the profile refuses", under(containerSecurity+".seccomp", "profile_type", "localhost_ref"), func(t testing.TB, n *Node) {
			file := filepath.Join(n.HostDir(t), "profile.json")
			if err := os.WriteFile(file, []byte(`{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdir","mkdirat"],"action":"SCMP_ACT_ERRNO","errnoRet":95}]}`), 0o644); err != nil {
				t.Fatal(err)
			}
			n.fails(t, n.box(t, security(func(s *securityContext) { s.Seccomp = local(file) })), "mkdir /x", "not supported")
		}},
		{"AppArmor", "that an unknown profile is refused", under(containerSecurity+".apparmor", "profile_type", "localhost_ref"), func(t testing.TB, n *Node) {
			_, err := n.TryContainer(t, n.Pod(t, nil), security(func(s *securityContext) { s.Apparmor = local("no-such-profile") }))
			wantError(t, err, codes.FailedPrecondition, "no-such-profile")
		}},
		{
			"AppArmor, as it was", "that an unknown profile is refused", under(containerSecurity, "apparmor_profile"),
			refused("no-such-profile", func(s *securityContext) { s.ApparmorProfile = "localhost/no-such-profile" }),
		},
		selinux("user", &criv1.SELinuxOption{User: "no label!"}),
		selinux("role", &criv1.SELinuxOption{Role: "no label!"}),
		selinux("type", &criv1.SELinuxOption{Type: "no label!"}),
		selinux("level", &criv1.SELinuxOption{Level: "no label!"}),
	}
}

func containerNamespaceChecks() []fieldCheck {
	at := containerSecurity + ".namespace_options"
	options := func(o *criv1.NamespaceOption) func(*criv1.ContainerConfig) {
		return security(func(s *securityContext) { s.NamespaceOptions = o })
	}
	contradiction := func(field string, o *criv1.NamespaceOption) func(testing.TB, *Node) {
		return func(t testing.TB, n *Node) {
			_, err := n.TryContainer(t, n.Pod(t, nil), options(o))
			wantError(t, err, codes.InvalidArgument, field)
		}
	}
	mapping := func(uid, gid uint32) *criv1.NamespaceOption {
		return &criv1.NamespaceOption{Pid: criv1.NamespaceMode_CONTAINER, UsernsOptions: &criv1.UserNamespace{
			Uids: []*criv1.IDMapping{{HostId: 3 << 20, ContainerId: uid, Length: 65536}},
			Gids: []*criv1.IDMapping{{HostId: 3 << 20, ContainerId: gid, Length: 65536}},
		}}
	}
	const contradicts = "that what contradicts the pod is refused"
	return []fieldCheck{
		{"network namespace", contradicts, under(at, "network"), contradiction("network", &criv1.NamespaceOption{Network: criv1.NamespaceMode_NODE})},
		{"IPC namespace", contradicts, under(at, "ipc"), contradiction("ipc", &criv1.NamespaceOption{Ipc: criv1.NamespaceMode_NODE})},
		{"PID namespace", "/proc/1/cmdline in a pod that shares one", under(at, "pid"), func(t testing.TB, n *Node) {
			id := n.Run(t, n.Pod(t, sharedPID), options(&criv1.NamespaceOption{Pid: criv1.NamespaceMode_CONTAINER}))
			want(t, "process 1", n.commandLine(t, id), "/bin/sleep 86400")
		}},
		{"PID namespace of another container", "/proc/1/cmdline in the container", under(at, "target_id"), func(t testing.TB, n *Node) {
			pod := n.Pod(t, nil)
			target := n.Run(t, pod, shell("exec sleep 4321"))
			id := n.Run(t, pod, options(&criv1.NamespaceOption{Pid: criv1.NamespaceMode_TARGET, TargetId: target}))
			want(t, "process 1", n.commandLine(t, id), "sleep 4321")
		}},
		{"container without user namespace", "that mode NODE needs no mappings", under(at, "userns_options.mode"), func(t testing.TB, n *Node) {
			n.box(t, options(&criv1.NamespaceOption{Pid: criv1.NamespaceMode_CONTAINER, UsernsOptions: &criv1.UserNamespace{Mode: criv1.NamespaceMode_NODE}}))
		}},
		{
			"container's user namespace", "that the pod's mapping is accepted",
			under(at+".userns_options", "uids[].host_id", "uids[].length", "gids[].host_id", "gids[].length"),
			func(t testing.TB, n *Node) { n.Run(t, n.Pod(t, userns(3<<20)), options(mapping(0, 0))) },
		},
		{
			"container's user namespace without root", "that a mapping must begin with container ID 0",
			under(at+".userns_options", "uids[].container_id", "gids[].container_id"),
			func(t testing.TB, n *Node) {
				pod := n.Pod(t, userns(3<<20))
				for _, o := range []*criv1.NamespaceOption{mapping(1, 0), mapping(0, 1)} {
					_, err := n.TryContainer(t, pod, options(o))
					wantError(t, err, codes.InvalidArgument, "userns_options")
				}
			},
		},
	}
}
