package spec

import (
	"cmp"
	"strings"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime"
	"github.com/naru-project/naru/runtime/seccomp"
)

// DefaultAppArmor is the profile of RuntimeDefault on hosts with AppArmor.
const DefaultAppArmor = "naru-default"

// seccomp chooses the filter. Nothing said means RuntimeDefault. A privileged
// container has none (api.proto, LinuxContainerSecurityContext.privileged).
func (b *builder) seccomp() (err error) {
	p, caps := b.in.Security.Seccomp, b.spec.Process.Capabilities.Bounding
	if b.in.Security.Privileged {
		return nil
	}
	switch p.Type {
	case runtime.ProfileRuntimeDefault, "":
		b.spec.Linux.Seccomp = seccomp.Default(caps, b.in.Host.Arch)
	case runtime.ProfileUnconfined:
	case runtime.ProfileLocalhost:
		b.spec.Linux.Seccomp, err = seccomp.Load(p.Ref, caps, b.in.Host.Arch)
	default:
		err = errs.New(errs.InvalidArgument, "seccomp profile type %q: unknown", clip(string(p.Type)))
	}
	return err
}

// lsm chooses AppArmor profile and SELinux label. What is asked for by name and
// cannot be had is an error, never silence.
func (b *builder) lsm() (err error) {
	if b.spec.Process.ApparmorProfile, err = b.appArmor(); err != nil {
		return err
	}
	return b.selinux()
}

func (b *builder) appArmor() (string, error) {
	p, host := b.in.Security.AppArmor, &b.in.Host
	switch p.Type {
	case runtime.ProfileUnconfined:
		return "", nil
	case runtime.ProfileRuntimeDefault, "":
		if !host.AppArmor || b.in.Security.Privileged && p.Type == "" {
			return "", nil
		}
		name := cmp.Or(b.in.Defaults.AppArmor, DefaultAppArmor)
		if host.ProfileLoaded != nil && !host.ProfileLoaded(name) {
			if p.Type == "" {
				return "", nil // not asked for
			}
			return "", errs.New(errs.FailedPrecondition, "AppArmor profile %q is not loaded; load the one that naru is installed with", name)
		}
		return name, nil
	case runtime.ProfileLocalhost:
	default:
		return "", errs.New(errs.InvalidArgument, "AppArmor profile type %q: unknown", clip(string(p.Type)))
	}
	name := strings.TrimPrefix(p.Ref, "localhost/")
	switch {
	case name == "" || len(name) > maxPath || strings.ContainsFunc(name, control):
		return "", errs.New(errs.InvalidArgument, "AppArmor profile %q: not a profile name", clip(p.Ref))
	case !host.AppArmor:
		return "", errs.New(errs.FailedPrecondition, "AppArmor profile %q: this host has no AppArmor", clip(name))
	case host.ProfileLoaded != nil && !host.ProfileLoaded(name):
		return "", errs.New(errs.FailedPrecondition, "AppArmor profile %q: not loaded on this host", clip(name))
	}
	return name, nil
}

func control(r rune) bool { return r < ' ' || r == 0x7f }

// selinux completes the label from the usual parts of container policies
// (container-selinux) and derives that of the mounts.
func (b *builder) selinux() error {
	s := b.in.Security.SELinux
	if s == nil || *s == (runtime.SELinux{}) {
		return nil
	}
	if !b.in.Host.SELinux {
		return errs.New(errs.FailedPrecondition, "SELinux label: this host has no SELinux")
	}
	for _, part := range []string{s.User, s.Role, s.Type, s.Level} {
		if len(part) > 256 || strings.Trim(part, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.,:-") != "" {
			return errs.New(errs.InvalidArgument, "SELinux label part %q: not a word of a label", clip(part))
		}
	}
	if strings.Contains(s.User+s.Role+s.Type, ":") {
		return errs.New(errs.InvalidArgument, "SELinux label: a colon in user, role or type")
	}
	user, level := cmp.Or(s.User, "system_u"), cmp.Or(s.Level, "s0")
	b.spec.Process.SelinuxLabel = strings.Join([]string{user, cmp.Or(s.Role, "system_r"), cmp.Or(s.Type, "container_t"), level}, ":")
	b.spec.Linux.MountLabel = strings.Join([]string{user, "object_r", "container_file_t", level}, ":")
	return nil
}
