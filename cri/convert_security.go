package cri

import (
	"path/filepath"
	"strings"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/pod"
)

// sandboxSecurity converts the security context of a sandbox.
func sandboxSecurity(sc *criv1.LinuxSandboxSecurityContext) (pod.Security, error) {
	const field = "config.linux.security_context"
	out := pod.Security{
		Privileged:         sc.GetPrivileged(),
		ReadonlyRootfs:     sc.GetReadonlyRootfs(),
		SupplementalGroups: sc.GetSupplementalGroups(),
		SELinux:            selinux(sc.GetSelinuxOptions()),
	}
	var err error
	if out.GroupsPolicyStrict, err = groupsPolicy(field, sc.GetSupplementalGroupsPolicy()); err != nil {
		return out, err
	}
	if err := setUser(field, &out, sc.GetRunAsUser(), sc.GetRunAsGroup(), ""); err != nil {
		return out, err
	}
	if out.Seccomp, err = seccomp(field, sc.GetSeccomp()); err != nil {
		return out, err
	}
	out.AppArmor, err = appArmor(field, sc.GetApparmor(), "")
	return out, err
}

// containerSecurity converts the security context of a container, all but its
// namespaces.
//
// Masked and read-only paths: CRI says to take the lists as they are, and
// kubelet always sends both. An empty list has two meanings, which protobuf
// cannot tell apart: "procMount: Unmasked" and "not said" (crictl, critest).
// Kubernetes allows Unmasked only together with a user namespace, so an empty
// list means "nothing" in a pod with a user namespace and in a privileged
// container, and elsewhere stands for the default list (DefaultPaths).
func containerSecurity(sc *criv1.LinuxContainerSecurityContext, sandbox *pod.SandboxConfig) (pod.Security, error) {
	const field = "config.linux.security_context"
	caps := sc.GetCapabilities()
	out := pod.Security{
		Privileged:         sc.GetPrivileged(),
		AddCaps:            caps.GetAddCapabilities(),
		DropCaps:           caps.GetDropCapabilities(),
		AddAmbientCaps:     caps.GetAddAmbientCapabilities(),
		NoNewPrivs:         sc.GetNoNewPrivs(),
		ReadonlyRootfs:     sc.GetReadonlyRootfs(),
		SupplementalGroups: sc.GetSupplementalGroups(),
		MaskedPaths:        sc.GetMaskedPaths(),
		ReadonlyPaths:      sc.GetReadonlyPaths(),
		DefaultPaths:       !sc.GetPrivileged() && len(sandbox.UIDMap) == 0,
		SELinux:            selinux(sc.GetSelinuxOptions()),
	}
	if out.Privileged && !sandbox.Security.Privileged {
		return out, invalid("%s.privileged: the pod sandbox was not made for privileged containers", field)
	}
	for _, list := range [][]string{out.AddCaps, out.DropCaps, out.AddAmbientCaps} {
		for _, name := range list {
			if name == "" {
				return out, invalid("%s.capabilities holds an empty name", field)
			}
		}
	}
	for _, list := range [][]string{out.MaskedPaths, out.ReadonlyPaths} {
		for _, path := range list {
			if err := checkAbs(field+".masked_paths or readonly_paths", path); err != nil {
				return out, err
			}
		}
	}
	var err error
	if out.GroupsPolicyStrict, err = groupsPolicy(field, sc.GetSupplementalGroupsPolicy()); err != nil {
		return out, err
	}
	if err := setUser(field, &out, sc.GetRunAsUser(), sc.GetRunAsGroup(), sc.GetRunAsUsername()); err != nil {
		return out, err
	}
	// seccomp_profile_path is deprecated and ignored: kubelet has not set it
	// since 1.24, and "unconfined", its default, is what nil means.
	if out.Seccomp, err = seccomp(field, sc.GetSeccomp()); err != nil {
		return out, err
	}
	out.AppArmor, err = appArmor(field, sc.GetApparmor(), sc.GetApparmorProfile()) //nolint:staticcheck // deprecated, yet sent by older clients
	return out, err
}

// setUser checks and takes over who the process runs as.
func setUser(field string, out *pod.Security, uid, gid *criv1.Int64Value, name string) error {
	if uid != nil && name != "" {
		return invalid("%s: run_as_user and run_as_username exclude each other", field)
	}
	if gid != nil && uid == nil && name == "" {
		return invalid("%s: run_as_group needs run_as_user or run_as_username", field)
	}
	if strings.ContainsAny(name, ":\n\r\x00") {
		return invalid("%s.run_as_username is not a user name", field)
	}
	if uid != nil {
		if err := checkUID(field+".run_as_user", uid.GetValue()); err != nil {
			return err
		}
		v := uid.GetValue()
		out.RunAsUser = &v
	}
	if gid != nil {
		if err := checkUID(field+".run_as_group", gid.GetValue()); err != nil {
			return err
		}
		v := gid.GetValue()
		out.RunAsGroup = &v
	}
	out.RunAsUsername = name
	for _, g := range out.SupplementalGroups {
		if err := checkUID(field+".supplemental_groups", g); err != nil {
			return err
		}
	}
	return nil
}

func groupsPolicy(field string, p criv1.SupplementalGroupsPolicy) (strict bool, err error) {
	switch p {
	case criv1.SupplementalGroupsPolicy_Merge:
		return false, nil
	case criv1.SupplementalGroupsPolicy_Strict:
		return true, nil
	}
	return false, invalid("%s.supplemental_groups_policy %d is not known", field, p)
}

// seccomp converts a seccomp profile. Nil means unconfined: critest says so
// ("should support nil profile, which is unconfined"), and kubelet always sends
// one, RuntimeDefault for all pods where its seccompDefault is on.
func seccomp(field string, p *criv1.SecurityProfile) (pod.Profile, error) {
	field += ".seccomp"
	if p == nil {
		return pod.Profile{Type: pod.ProfileUnconfined}, nil
	}
	out, err := profile(field, p)
	if err == nil && out.Ref != "" {
		if filepath.Clean(out.Ref) != out.Ref {
			return out, invalid("%s.localhost_ref %q is not a clean path", field, out.Ref)
		}
		err = checkAbs(field+".localhost_ref", out.Ref)
	}
	return out, err
}

// appArmor converts an AppArmor profile: the new field, or where it is nil the
// deprecated string.
func appArmor(field string, p *criv1.SecurityProfile, old string) (pod.Profile, error) {
	const local = "localhost/"
	if p == nil {
		switch {
		case old == "":
			return pod.Profile{}, nil
		case old == "runtime/default":
			p = &criv1.SecurityProfile{ProfileType: criv1.SecurityProfile_RuntimeDefault}
		case old == "unconfined":
			p = &criv1.SecurityProfile{ProfileType: criv1.SecurityProfile_Unconfined}
		case strings.HasPrefix(old, local):
			p = &criv1.SecurityProfile{ProfileType: criv1.SecurityProfile_Localhost, LocalhostRef: old}
		default:
			return pod.Profile{}, invalid("%s.apparmor_profile %q is not known", field, clip(old))
		}
	}
	field += ".apparmor"
	out, err := profile(field, p)
	if err != nil {
		return out, err
	}
	out.Ref = strings.TrimPrefix(out.Ref, local)
	if out.Type == pod.ProfileLocalhost && out.Ref == "" {
		return out, invalid("%s.localhost_ref names no profile", field)
	}
	return out, checkLine(field+".localhost_ref", out.Ref)
}

// profile converts what seccomp and AppArmor have in common.
func profile(field string, p *criv1.SecurityProfile) (pod.Profile, error) {
	if p == nil {
		return pod.Profile{}, nil
	}
	t, ok := profileTypes[p.GetProfileType()]
	switch {
	case !ok:
		return pod.Profile{}, invalid("%s.profile_type %d is not known", field, p.GetProfileType())
	case t == pod.ProfileLocalhost && p.GetLocalhostRef() == "":
		return pod.Profile{}, invalid("%s.localhost_ref is empty", field)
	case t != pod.ProfileLocalhost && p.GetLocalhostRef() != "":
		return pod.Profile{}, invalid("%s.localhost_ref goes with profile_type Localhost only", field)
	}
	return pod.Profile{Type: t, Ref: p.GetLocalhostRef()}, nil
}

func selinux(o *criv1.SELinuxOption) *pod.SELinux {
	if o.GetUser() == "" && o.GetRole() == "" && o.GetType() == "" && o.GetLevel() == "" {
		return nil
	}
	return &pod.SELinux{User: o.GetUser(), Role: o.GetRole(), Type: o.GetType(), Level: o.GetLevel()}
}
