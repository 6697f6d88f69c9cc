package cgroup

import (
	"path"
	"strconv"
	"strings"

	"github.com/containerd/cgroups/v3/cgroup2"

	"github.com/naru-project/naru/internal/errs"
)

// Bounds on what kubelet may send as a cgroup parent. Real ones are about 120
// bytes and 4 folders; the kernel's own bounds are NAME_MAX and PATH_MAX.
const (
	maxParent    = 2048
	maxComponent = 255
	maxDepth     = 32
)

// ContainerPath returns the cgroup of container id below parent, CRI's
// cgroup_parent, as a path from the root of the hierarchies:
//
//	cgroupfs  /kubepods/burstable/podX          → /kubepods/burstable/podX/<id>
//	systemd   kubepods-burstable-podX.slice     → /kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podX.slice/naru-<id>.scope
//	systemd   the expanded path, as kubelet sends it, or the cgroupfs form → the same
//
// An empty parent is the configured default. What cannot be a parent is
// errs.InvalidArgument.
func (d *Driver) ContainerPath(parent, id string) (string, error) {
	p, err := d.ParentPath(parent)
	if err != nil {
		return "", err
	}
	if !validID(id) {
		return "", errs.New(errs.InvalidArgument, "use %q as the name of a cgroup: want letters, digits, '.', '_' and '-'", clip(id))
	}
	return p + "/" + d.groupName(id), nil
}

// groupName is the folder of a container's group.
func (d *Driver) groupName(id string) string {
	if d.systemd {
		return "naru-" + id + ".scope"
	}
	return id
}

// ParentPath returns the path that ContainerPath puts containers in.
func (d *Driver) ParentPath(parent string) (string, error) {
	if parent == "" {
		parent = d.defaultParent
	}
	return resolveParent(parent, d.systemd)
}

// resolveParent is ParentPath without a host.
func resolveParent(parent string, systemd bool) (string, error) {
	parts, err := splitParent(parent)
	if err != nil {
		return "", err
	}
	if !systemd {
		if len(parts) == 1 && !strings.HasPrefix(parent, "/") && strings.HasSuffix(parts[0], ".slice") {
			return "", errs.New(errs.InvalidArgument,
				"cgroup parent %q is a systemd slice, but Naru uses the cgroupfs driver: set the same driver in kubelet and in Naru's config", parent)
		}
		return verified("/" + strings.Join(parts, "/"))
	}
	last := parts[len(parts)-1]
	if !strings.HasSuffix(last, ".slice") {
		// The cgroupfs spelling: kubelet's own translation escapes the dash,
		// which separates levels in slice names.
		for i, p := range parts {
			parts[i] = strings.ReplaceAll(p, "-", "_")
		}
		last = strings.Join(parts, "-") + ".slice"
		parts = parts[:1]
	}
	full, err := expandSlice(last)
	if err != nil {
		return "", err
	}
	if len(parts) > 1 && full != "/"+strings.Join(parts, "/") {
		return "", errs.New(errs.InvalidArgument, "cgroup parent %q is no path of slices: systemd has %s at %s", parent, last, full)
	}
	return verified(full)
}

// splitParent checks every component; the kernel would refuse some of this,
// but only after the folders above had been made.
func splitParent(parent string) ([]string, error) {
	bad := func(why string) ([]string, error) {
		return nil, errs.New(errs.InvalidArgument, "use cgroup parent %q: %s", clip(parent), why)
	}
	if len(parent) > maxParent {
		return bad("longer than " + strconv.Itoa(maxParent) + " bytes")
	}
	p := strings.TrimPrefix(parent, "/")
	if p == "" {
		return bad("containers cannot live in the root cgroup")
	}
	if path.Clean("/"+p) != "/"+p {
		return bad("not a clean path ('..', '.', '//' or '/' at the end)")
	}
	parts := strings.Split(p, "/")
	if len(parts) > maxDepth {
		return bad("more than " + strconv.Itoa(maxDepth) + " folders deep")
	}
	for _, c := range parts {
		if why := badComponent(c); why != "" {
			return bad(why)
		}
	}
	return parts, nil
}

func badComponent(c string) string {
	if len(c) > maxComponent {
		return "a component is longer than " + strconv.Itoa(maxComponent) + " bytes"
	}
	for i := 0; i < len(c); i++ {
		if !plain(c[i]) && c[i] != '@' && c[i] != '\\' && c[i] != '+' {
			return "character " + strconv.QuoteRune(rune(c[i])) + " is not allowed"
		}
	}
	// Interface files of the controllers live among the folders.
	if strings.HasPrefix(c, "cgroup.") || c == "tasks" || c == "notify_on_release" || c == "release_agent" {
		return "component " + c + " is a file of the kernel's"
	}
	return ""
}

// verified holds the result against the library's rule for group paths, and
// against the folder names that this package gives execs.
func verified(p string) (string, error) {
	if err := cgroup2.VerifyGroupPath(p); err != nil {
		return "", errs.New(errs.InvalidArgument, "use cgroup path %q: %w", clip(p), err)
	}
	return p, nil
}

// expandSlice returns the path of a slice, as systemd.slice(5) lays it out:
// a-b-c.slice lives in a.slice/a-b.slice.
func expandSlice(name string) (string, error) {
	stem, ok := strings.CutSuffix(name, ".slice")
	if !ok || stem == "" || stem == "-" || strings.Contains(name, "/") {
		return "", errs.New(errs.InvalidArgument, "%q is no name of a slice", clip(name))
	}
	if strings.HasPrefix(stem, "-") || strings.HasSuffix(stem, "-") || strings.Contains(stem, "--") {
		return "", errs.New(errs.InvalidArgument, "slice name %q has an empty level", clip(name))
	}
	levels := strings.Split(stem, "-")
	if len(levels) > maxDepth {
		return "", errs.New(errs.InvalidArgument, "slice name %q has more than %d levels", clip(name), maxDepth)
	}
	var b strings.Builder
	for i := range levels {
		b.WriteString("/" + strings.Join(levels[:i+1], "-") + ".slice")
	}
	return b.String(), nil
}

func plain(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '.' || c == '_' || c == '-'
}

func validID(id string) bool {
	if id == "" || len(id) > 128 || id[0] == '.' || strings.HasPrefix(id, "cgroup.") {
		return false
	}
	for i := 0; i < len(id); i++ {
		if !plain(id[i]) {
			return false
		}
	}
	return true
}

// checkPath guards the entrances that take a path back from a record.
func checkPath(p string) error {
	parts, err := splitParent(p)
	if err != nil {
		return err
	}
	if len(parts) < 2 || p[0] != '/' {
		return errs.New(errs.InvalidArgument, "use cgroup %q: want /parent/name", clip(p))
	}
	return nil
}

// hugePageName turns "hugepages-2048kB" into "2MB".
func hugePageName(dir string) (string, bool) {
	s, ok := strings.CutPrefix(dir, "hugepages-")
	if !ok {
		return "", false
	}
	s, ok = strings.CutSuffix(s, "kB")
	if !ok {
		return "", false
	}
	kb, err := strconv.ParseUint(s, 10, 32)
	if err != nil || kb == 0 {
		return "", false
	}
	switch {
	case kb%(1<<20) == 0:
		return strconv.FormatUint(kb>>20, 10) + "GB", true
	case kb%(1<<10) == 0:
		return strconv.FormatUint(kb>>10, 10) + "MB", true
	}
	return strconv.FormatUint(kb, 10) + "KB", true
}
