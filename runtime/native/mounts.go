package native

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"sort"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/sys"
	"github.com/naru-project/naru/runtime"
)

// Volume is a detached mount on its way to a place in the container.
type Volume struct {
	Path string // in the container, clean and absolute
	Tree *os.File
	Dir  bool
}

// place is everything that will be attached in a container's mount namespace,
// opened before the container exists.
type place struct {
	root    *os.File
	devices *devices
	volumes []Volume
	cgroups []Volume // cgroup v1 folders below /sys/fs/cgroup
	sys     *os.File // the host's /sys, where the container cannot have a sysfs of its own
	fs      map[string]*os.File
	hooks   *hooks // nil: none
}

func (p *place) close() {
	if p.root != nil {
		_ = p.root.Close()
	}
	if p.devices != nil {
		p.devices.close()
	}
	for _, v := range slices.Concat(p.volumes, p.cgroups) {
		_ = v.Tree.Close()
	}
	if p.sys != nil {
		_ = p.sys.Close()
	}
	if p.hooks != nil {
		p.hooks.close()
	}
	for _, f := range p.fs {
		_ = f.Close()
	}
}

// Volumes opens every volume of the container once, the pod's files and
// /dev/shm included, and keeps what was opened: nothing is looked up again by
// its path. Parents come first. The caller closes them (CloseVolumes).
func (x *Executor) Volumes(ctx context.Context, c *runtime.Container) (all []Volume, err error) {
	defer func() {
		if err != nil {
			CloseVolumes(all)
		}
	}()
	own := map[string]bool{}
	for i := range c.Mounts {
		m := &c.Mounts[i]
		v, err := x.openVolume(ctx, c, i, m)
		if err != nil {
			return all, err
		}
		v.Path = path.Clean("/" + m.ContainerPath)
		own[v.Path] = true
		all = append(all, *v)
	}
	names := make([]string, 0, len(c.EtcFiles))
	for to := range c.EtcFiles {
		if !own[to] && !inShared(c, to) {
			names = append(names, to)
		}
	}
	sort.Strings(names)
	for _, to := range names {
		t, err := sys.CloneTree(unix.AT_FDCWD, c.EtcFiles[to], false)
		if err != nil {
			return all, errs.New(errs.Internal, "open %s of the pod: %w", to, err)
		}
		all = append(all, Volume{Path: to, Tree: t})
		if err := sys.SetAttr(t, false, unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC | readonlyIf(c.Spec.Root != nil && c.Spec.Root.Readonly), Propagation: unix.MS_PRIVATE}); err != nil {
			return all, errs.New(errs.Internal, "prepare %s of the pod: %w", to, err)
		}
	}
	if c.Shm != "" && !own["/dev/shm"] && !inShared(c, "/dev/shm") {
		t, err := sys.CloneTree(unix.AT_FDCWD, c.Shm, false)
		if err != nil {
			return all, errs.New(errs.Internal, "open the pod's /dev/shm: %w", err)
		}
		all = append(all, Volume{Path: "/dev/shm", Tree: t, Dir: true})
		if err := sys.SetAttr(t, false, unix.MountAttr{Propagation: unix.MS_PRIVATE}); err != nil {
			return all, errs.New(errs.Internal, "prepare the pod's /dev/shm: %w", err)
		}
	}
	// Parents first; the order of the request among equals.
	slices.SortStableFunc(all, func(a, b Volume) int { return strings.Count(a.Path, "/") - strings.Count(b.Path, "/") })
	return all, nil
}

// inShared reports whether a place lies in a volume with bidirectional
// propagation: what is mounted there appears on the host, and the pod's
// resolv.conf or /dev/shm must not take the place of the host's.
func inShared(c *runtime.Container, to string) bool {
	return slices.ContainsFunc(c.Mounts, func(m runtime.Mount) bool {
		return m.Propagation == runtime.PropagationBidirectional && strings.HasPrefix(to+"/", strings.TrimSuffix(path.Clean("/"+m.ContainerPath), "/")+"/")
	})
}

// placeError gives the error of looking for a place in the container class c,
// unless it is the host's failure.
func placeError(c errs.Class, err error) error {
	for _, e := range []error{unix.ENOSPC, unix.EDQUOT, unix.EMFILE, unix.ENFILE} {
		if errors.Is(err, e) {
			return errs.Wrap(errs.ResourceExhausted, err)
		}
	}
	for _, e := range []error{unix.EIO, unix.ENOMEM, unix.ESTALE, unix.EAGAIN} {
		if errors.Is(err, e) {
			return errs.Wrap(errs.Internal, err)
		}
	}
	return errs.Wrap(c, err)
}

func readonlyIf(b bool) uint64 {
	if b {
		return unix.MOUNT_ATTR_RDONLY
	}
	return 0
}

func (x *Executor) openVolume(ctx context.Context, c *runtime.Container, i int, m *runtime.Mount) (_ *Volume, err error) {
	if iv, ok := c.Images[i]; ok {
		return x.openImageVolume(ctx, c, m, iv)
	}
	if err := checkPropagation(m, len(c.UIDMap) > 0); err != nil {
		return nil, err
	}
	t, err := sys.CloneTree(unix.AT_FDCWD, m.HostPath, true)
	if err != nil {
		if errors.Is(err, unix.ENOENT) {
			return nil, errs.New(errs.FailedPrecondition, "volume %s: host path %s does not exist", m.ContainerPath, m.HostPath)
		}
		return nil, errs.New(errs.Internal, "volume %s: open host path %s: %w", m.ContainerPath, m.HostPath, err)
	}
	defer func() {
		if err != nil {
			_ = t.Close()
		}
	}()
	var st unix.Stat_t
	if err := unix.Fstat(int(t.Fd()), &st); err != nil {
		return nil, errs.New(errs.Internal, "volume %s: stat %s: %w", m.ContainerPath, m.HostPath, err)
	}
	attr, err := volumeAttr(m)
	if err != nil {
		return nil, err
	}
	switch m.Propagation {
	case runtime.PropagationHostToContainer:
		attr.Propagation = unix.MS_SLAVE
	case runtime.PropagationBidirectional:
		attr.Propagation = unix.MS_SHARED
	default:
		attr.Propagation = unix.MS_PRIVATE
	}
	if err := x.applyVolumeAttr(ctx, c, m, t, attr); err != nil {
		return nil, err
	}
	return &Volume{Tree: t, Dir: st.Mode&unix.S_IFMT == unix.S_IFDIR}, nil
}

func (x *Executor) applyVolumeAttr(ctx context.Context, c *runtime.Container, m *runtime.Mount, t *os.File, attr unix.MountAttr) error {
	if len(m.UIDMap) > 0 || len(m.GIDMap) > 0 {
		ns, err := x.mappingNamespace(ctx, m.UIDMap, m.GIDMap)
		if err != nil {
			return err
		}
		defer func() { _ = ns.Close() }()
		if err := idmap(t, ns, true); err != nil {
			return errs.New(errs.Of(err), "volume %s: %w", m.ContainerPath, err)
		}
	}
	// Propagation goes for the whole tree, attributes for the top mount unless
	// the request says recursive.
	if err := sys.SetAttr(t, true, unix.MountAttr{Propagation: attr.Propagation}); err != nil {
		return errs.New(errs.Internal, "volume %s: set propagation: %w", m.ContainerPath, err)
	}
	attr.Propagation = 0
	if attr.Attr_set == 0 {
		return nil
	}
	if err := sys.SetAttr(t, m.RecursiveReadonly, attr); err != nil {
		return errs.New(errs.Internal, "volume %s: set mount flags: %w", m.ContainerPath, err)
	}
	return nil
}

// volumeAttr turns readonly, recursive_readonly and mount_options into
// attributes.
func volumeAttr(m *runtime.Mount) (unix.MountAttr, error) {
	var a unix.MountAttr
	a.Attr_set = readonlyIf(m.Readonly || m.RecursiveReadonly)
	if m.RecursiveReadonly && (!m.Readonly || (m.Propagation != runtime.PropagationPrivate && m.Propagation != "")) {
		return a, errs.New(errs.InvalidArgument, "volume %s: recursive_read_only needs readonly and private propagation", m.ContainerPath)
	}
	for _, o := range m.Options {
		switch o {
		case "noexec":
			a.Attr_set |= unix.MOUNT_ATTR_NOEXEC
		case "nodev":
			a.Attr_set |= unix.MOUNT_ATTR_NODEV
		case "nosuid":
			a.Attr_set |= unix.MOUNT_ATTR_NOSUID
		default:
			return a, errs.New(errs.InvalidArgument, "volume %s: unknown mount option %q; noexec, nodev and nosuid are known", m.ContainerPath, o)
		}
	}
	return a, nil
}

// checkPropagation refuses what the kernel would silently not do: propagation
// needs a source that is shared (or, for host-to-container, a slave).
func checkPropagation(m *runtime.Mount, userns bool) error {
	if m.Propagation == "" || m.Propagation == runtime.PropagationPrivate {
		return nil
	}
	if userns && m.Propagation == runtime.PropagationBidirectional {
		return errs.New(errs.InvalidArgument, "volume %s: bidirectional propagation is not possible in a user namespace", m.ContainerPath)
	}
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, m.HostPath, 0, unix.STATX_MNT_ID, &st); err != nil {
		if errors.Is(err, unix.ENOENT) {
			return errs.New(errs.FailedPrecondition, "volume %s: host path %s does not exist", m.ContainerPath, m.HostPath)
		}
		return errs.New(errs.Internal, "volume %s: stat %s: %w", m.ContainerPath, m.HostPath, err)
	}
	infos, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) {
		match := uint64(i.ID) == st.Mnt_id
		return !match, match
	})
	if err != nil {
		return errs.New(errs.Internal, "volume %s: find the mount of %s: %w", m.ContainerPath, m.HostPath, err)
	}
	if len(infos) == 0 {
		return errs.New(errs.Internal, "volume %s: the mount %d of %s is not in mountinfo", m.ContainerPath, st.Mnt_id, m.HostPath)
	}
	shared := strings.Contains(infos[0].Optional, "shared:")
	slave := strings.Contains(infos[0].Optional, "master:")
	if shared || (slave && m.Propagation == runtime.PropagationHostToContainer) {
		return nil
	}
	return errs.New(errs.FailedPrecondition, "volume %s: host path %s is on the mount %s, which is not shared; `mount --make-rshared` it first", m.ContainerPath, m.HostPath, infos[0].Mountpoint)
}

// openImageVolume mounts the layers of an image read-only.
func (x *Executor) openImageVolume(ctx context.Context, c *runtime.Container, m *runtime.Mount, iv runtime.ImageVolume) (*Volume, error) {
	fail := func(err error) error { return &runtime.ImageVolumeError{Path: m.ContainerPath, Err: err} }
	r := runtime.Rootfs{Lower: iv.Lower}
	var t *os.File
	var err error
	if iv.SubPath == "" {
		t, err = x.MountRootfs(ctx, c.ID, r, c.UIDMap, c.GIDMap)
	} else {
		t, err = x.imageSubPath(ctx, c, r, iv.SubPath)
	}
	if err != nil {
		return nil, fail(err)
	}
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV, Propagation: unix.MS_PRIVATE}
	if err := sys.SetAttr(t, true, attr); err != nil {
		_ = t.Close()
		return nil, fail(err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(t.Fd()), &st); err != nil {
		_ = t.Close()
		return nil, fail(err)
	}
	return &Volume{Tree: t, Dir: st.Mode&unix.S_IFMT == unix.S_IFDIR}, nil
}

// imageSubPath clones a folder of an image: attached for a moment in a private
// namespace, for older kernels clone nothing of a detached mount.
func (x *Executor) imageSubPath(ctx context.Context, c *runtime.Container, r runtime.Rootfs, sub string) (*os.File, error) {
	whole, err := x.MountRootfs(ctx, c.ID, r, c.UIDMap, c.GIDMap)
	if err != nil {
		return nil, err
	}
	defer func() { _ = whole.Close() }()
	var t *os.File
	err = sys.PrivateMounts(func() error {
		at, err := os.OpenFile("/proc", unix.O_PATH|unix.O_DIRECTORY, 0) //nolint:forbidigo // a path of ours or of the host, not of the image
		if err != nil {
			return err
		}
		defer func() { _ = at.Close() }()
		if err := sys.Attach(whole, at); err != nil {
			return err
		}
		f, err := sys.OpenInRoot(whole, sub, unix.O_PATH)
		if err != nil {
			if errors.Is(err, unix.ENOENT) {
				return errs.New(errs.NotFound, "the image has no %q", sub)
			}
			return err
		}
		defer func() { _ = f.Close() }()
		t, err = sys.CloneTree(int(f.Fd()), "", false)
		return err
	})
	return t, err
}

// assemble builds the container's tree. It runs on a thread inside the child's
// new mount namespace and ends with the old root gone: what is not attached
// here does not exist for the container.
func (p *place) assemble(c *runtime.Container) error {
	at, err := os.OpenFile("/rootfs", unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0) //nolint:forbidigo // a path of ours or of the host, not of the image
	if err != nil {
		return fmt.Errorf("open the place for the root file system: %w", err)
	}
	defer func() { _ = at.Close() }()
	if err := sys.Attach(p.root, at); err != nil {
		return err
	}
	steps := []struct {
		name string
		do   func(*runtime.Container) error
	}{
		{"mount /proc", p.mountProc}, {"mount /sys", p.mountSys}, {"mount /dev", p.mountDev},
		{"make image volumes", p.makeVolumes}, {"mount volumes", p.mountVolumes},
		{"make the working directory", p.makeWorkdir}, {"run hooks", p.runHooks}, {"mask paths", p.mask},
		{"make the root file system read-only", p.readonlyRoot}, {"pivot", p.pivot},
	}
	for _, s := range steps {
		if err := s.do(c); err != nil {
			return errs.New(errs.Of(err), "%s: %w", s.name, err)
		}
	}
	return nil
}

// mountOn attaches tree on a real directory of the root.
func (p *place) mountOn(name string, tree *os.File) error {
	d, err := sys.OpenRealDir(p.root, name)
	if err != nil {
		return placeError(errs.InvalidArgument, err)
	}
	defer func() { _ = d.Close() }()
	return sys.Attach(tree, d)
}

func (p *place) mountProc(*runtime.Container) error {
	if err := sys.CheckProc(p.fs["proc"]); err != nil {
		return err
	}
	return p.mountOn("/proc", p.fs["proc"])
}

func (p *place) mountSys(c *runtime.Container) error {
	s := p.fs["sysfs"]
	if s == nil {
		s = p.sys
	}
	if err := p.mountOn("/sys", s); err != nil {
		return err
	}
	if cg := p.fs["cgroup2"]; cg != nil {
		if err := p.mountOn("/sys/fs/cgroup", cg); err != nil {
			return err
		}
		if !c.Privileged {
			if err := sys.SetAttr(cg, false, unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
				return err
			}
		}
	} else if err := p.mountCgroupV1(); err != nil {
		return err
	}
	if c.Privileged {
		return nil
	}
	return sys.SetAttr(s, false, unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
}

// mountCgroupV1 shows the container its own folder of each hierarchy.
func (p *place) mountCgroupV1() error {
	if len(p.cgroups) == 0 || p.fs["sysfs"] == nil {
		return nil
	}
	t, err := sys.NewFs("tmpfs", unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC,
		sys.FsOption{Key: "mode", Value: "0755"}, sys.FsOption{Key: "size", Value: "64k"})
	if err != nil {
		return err
	}
	defer func() { _ = t.Close() }()
	if err := p.mountOn("/sys/fs/cgroup", t); err != nil {
		return err
	}
	for _, v := range p.cgroups {
		if err := unix.Mkdirat(int(t.Fd()), v.Path, 0o755); err != nil {
			return fmt.Errorf("make /sys/fs/cgroup/%s: %w", v.Path, err)
		}
		d, err := sys.OpenBeneath(t, v.Path, unix.O_PATH|unix.O_DIRECTORY)
		if err != nil {
			return err
		}
		err = sys.Attach(v.Tree, d)
		_ = d.Close()
		if err != nil {
			return err
		}
	}
	return sys.SetAttr(t, false, unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
}

func (p *place) mountDev(c *runtime.Container) error {
	if err := p.mountOn("/dev", p.devices.dev); err != nil {
		return err
	}
	if err := p.mountOn("/dev/pts", p.devices.pts); err != nil {
		return err
	}
	if q := p.fs["mqueue"]; q != nil {
		if err := p.mountOn("/dev/mqueue", q); err != nil {
			return err
		}
	}
	if !c.TTY {
		return nil
	}
	// O_EXCL on our own tmpfs, and the terminal bound by descriptor
	// (CVE-2025-52565: a console that is a link).
	if err := unix.Mknodat(int(p.devices.dev.Fd()), "console", unix.S_IFREG|0o600, 0); err != nil {
		return fmt.Errorf("make /dev/console: %w", err)
	}
	f, err := sys.OpenBeneath(p.devices.dev, "console", unix.O_PATH)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	t, err := sys.CloneTree(int(p.devices.slave.Fd()), "", false)
	if err != nil {
		return err
	}
	defer func() { _ = t.Close() }()
	return sys.Attach(t, f)
}

// makeVolumes makes the folders that the image declares as VOLUME. When the
// root is read-only they are shown through a second, writable mount of the
// same overlay: their content is there without a copy.
func (p *place) makeVolumes(c *runtime.Container) error {
	return p.eachVolume(c, func(_ string, d *os.File) error {
		if c.Spec.Root == nil || !c.Spec.Root.Readonly {
			return nil
		}
		t, err := sys.CloneTree(int(d.Fd()), "", false)
		if err != nil {
			return err
		}
		defer func() { _ = t.Close() }()
		return sys.Attach(t, d)
	})
}

// eachVolume makes the folder of each VOLUME of the image that no mount covers.
func (p *place) eachVolume(c *runtime.Container, f func(name string, d *os.File) error) error {
	own := map[string]bool{}
	for _, m := range c.Mounts {
		own[path.Clean("/"+m.ContainerPath)] = true
	}
	for _, v := range c.Volumes {
		if own[path.Clean(v)] {
			continue
		}
		d, err := sys.EnsureInRoot(p.root, v, true)
		if err != nil {
			return placeError(errs.InvalidArgument, fmt.Errorf("VOLUME %s of the image: %w", v, err))
		}
		if err = p.checkTarget(d, v, c); err == nil {
			err = f(v, d)
		}
		_ = d.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// PrepareRoot looks at a root file system that is attached nowhere yet before an
// OCI runtime mounts anything in it: what the runtime mounts on must not lead
// elsewhere (CVE-2019-19921; CVE-2026-41579 of runc, which follows a link in
// place of /dev to the host). It makes the folders that c's image declares as
// VOLUME, and lists them.
func PrepareRoot(root *os.File, c *runtime.Container) (volumes []string, err error) {
	err = sys.OnThread(func() error {
		unix.Umask(0o022) //nolint:forbidigo // on a thread of its own (sys.OnThread)
		if uid, gid := hostID(c.UIDMap, 0), hostID(c.GIDMap, 0); uid != 0 || gid != 0 {
			if err := sys.ActAs(uid, gid); err != nil {
				return err
			}
		}
		for _, name := range []string{"/proc", "/sys", "/dev"} {
			d, err := sys.OpenRealDir(root, name)
			if err != nil {
				return placeError(errs.InvalidArgument, err)
			}
			_ = d.Close()
		}
		p := &place{root: root}
		return p.eachVolume(c, func(name string, _ *os.File) error { volumes = append(volumes, name); return nil })
	})
	return volumes, err
}

// checkTarget refuses a mount point that turns out to lie in procfs, sysfs or
// a cgroup file system, whatever its path looked like (CVE-2025-52881,
// CVE-2015-3630).
//
// A privileged container may mount below /sys, for it could do so itself (CSI
// drivers and device plugins bind the host's); anybody may put the host's bpf
// file system on its usual place.
func (p *place) checkTarget(f *os.File, name string, c *runtime.Container) error {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		return fmt.Errorf("check the mount point %s: %w", name, err)
	}
	if fs.Type == unix.TMPFS_MAGIC {
		// The folder of the cgroup v1 hierarchies is a tmpfs of ours in sysfs.
		var up unix.Statfs_t
		if err := statfsParent(f, &up); err == nil && up.Type == unix.SYSFS_MAGIC {
			fs = up
		}
	}
	var at, root unix.Stat_t
	if err := errors.Join(unix.Fstat(int(f.Fd()), &at), unix.Fstat(int(p.root.Fd()), &root)); err != nil {
		return fmt.Errorf("check the mount point %s: %w", name, err)
	}
	if at.Dev == root.Dev && at.Ino == root.Ino {
		// By a link of the image. It would be another root beside the read-only one.
		return errs.New(errs.InvalidArgument, "cannot mount on %s: it is the root of the container", name)
	}
	switch fs.Type {
	case unix.SYSFS_MAGIC, unix.CGROUP_SUPER_MAGIC, unix.CGROUP2_SUPER_MAGIC:
		if c.Privileged || name == "/sys/fs/bpf" {
			return nil
		}
		fallthrough
	case unix.PROC_SUPER_MAGIC:
		return errs.New(errs.InvalidArgument, "cannot mount on %s: it lies in /proc or /sys", name)
	}
	return nil
}

// statfsParent asks for the file system of the folder above a folder; only its
// type is looked at.
func statfsParent(f *os.File, fs *unix.Statfs_t) error {
	up, err := unix.Openat(int(f.Fd()), "..", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(up) }()
	return unix.Fstatfs(up, fs)
}

func (p *place) mountVolumes(c *runtime.Container) error {
	for _, v := range p.volumes {
		if err := p.mountVolume(v, c); err != nil {
			return errs.New(errs.Of(err), "volume %s: %w", v.Path, err)
		}
	}
	return nil
}

func (p *place) mountVolume(v Volume, c *runtime.Container) error {
	if v.Path == "/" || v.Path == "/proc" {
		return errs.New(errs.InvalidArgument, "a volume cannot take the place of %s", v.Path)
	}
	at, err := sys.EnsureInRoot(p.root, v.Path, v.Dir)
	if err != nil {
		return placeError(errs.FailedPrecondition, err)
	}
	defer func() { _ = at.Close() }()
	if err := p.checkTarget(at, v.Path, c); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(at.Fd()), &st); err == nil && (st.Mode&unix.S_IFMT == unix.S_IFDIR) != v.Dir {
		return errs.New(errs.FailedPrecondition, "the source is %s and the place in the image is %s", kindName(v.Dir), kindName(!v.Dir))
	}
	return sys.Attach(v.Tree, at)
}

func kindName(dir bool) string {
	if dir {
		return "a directory"
	}
	return "a file"
}

func (p *place) makeWorkdir(c *runtime.Container) error {
	d, err := sys.EnsureInRoot(p.root, c.Spec.Process.Cwd, true)
	if err != nil {
		if errors.Is(err, unix.EROFS) {
			return errs.New(errs.FailedPrecondition, "working directory %s does not exist and cannot be made there", c.Spec.Process.Cwd)
		}
		return placeError(errs.InvalidArgument, fmt.Errorf("working directory: %w", err))
	}
	defer func() { _ = d.Close() }()
	var st unix.Stat_t
	if err := unix.Fstat(int(d.Fd()), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return errs.New(errs.InvalidArgument, "working directory %s is not a directory", c.Spec.Process.Cwd)
	}
	return nil
}

// mask hides the masked paths and makes the read-only ones so.
func (p *place) mask(c *runtime.Container) error {
	if c.Spec.Linux == nil {
		return nil
	}
	for _, name := range c.Spec.Linux.ReadonlyPaths {
		if err := p.readonlyPath(name); err != nil {
			return err
		}
	}
	var empty *os.File
	defer func() {
		if empty != nil {
			_ = empty.Close()
		}
	}()
	for _, name := range c.Spec.Linux.MaskedPaths {
		f, err := p.openMask(name)
		if err != nil {
			return err
		}
		if f == nil {
			continue
		}
		err = p.maskOne(f, &empty)
		_ = f.Close()
		if err != nil {
			return fmt.Errorf("mask %s: %w", name, err)
		}
	}
	return nil
}

// openMask opens a path to be masked; nil when it does not exist.
func (p *place) openMask(name string) (*os.File, error) {
	f, err := sys.OpenInRoot(p.root, name, unix.O_PATH)
	if err != nil {
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
			return nil, nil
		}
		return nil, err
	}
	return f, nil
}

func (p *place) maskOne(f *os.File, empty **os.File) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		null, err := p.devices.null(unix.O_PATH)
		if err != nil {
			return err
		}
		defer func() { _ = null.Close() }()
		t, err := sys.CloneTree(int(null.Fd()), "", false)
		if err != nil {
			return err
		}
		defer func() { _ = t.Close() }()
		return sys.Attach(t, f)
	}
	// One empty read-only tmpfs serves all directories.
	if *empty == nil {
		t, err := sys.NewFs("tmpfs", unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC,
			sys.FsOption{Key: "nr_inodes", Value: "2"}, sys.FsOption{Key: "size", Value: "4k"}, sys.FsOption{Key: "mode", Value: "0555"}, sys.FsOption{Key: "ro", Flag: true})
		if err != nil {
			return err
		}
		*empty = t
		return sys.Attach(t, f)
	}
	t, err := sys.CloneTree(int((*empty).Fd()), "", false)
	if err != nil {
		return err
	}
	defer func() { _ = t.Close() }()
	return sys.Attach(t, f)
}

func (p *place) readonlyPath(name string) error {
	f, err := p.openMask(name)
	if err != nil || f == nil {
		return err
	}
	defer func() { _ = f.Close() }()
	t, err := sys.CloneTree(int(f.Fd()), "", true)
	if err != nil {
		return err
	}
	defer func() { _ = t.Close() }()
	if err := sys.SetAttr(t, true, unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY, Propagation: unix.MS_PRIVATE}); err != nil {
		return err
	}
	return sys.Attach(t, f)
}

func (p *place) readonlyRoot(c *runtime.Container) error {
	if c.Spec.Root == nil || !c.Spec.Root.Readonly {
		return nil
	}
	return sys.SetAttr(p.root, false, unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
}

// pivot makes the container's root the root of the namespace, for the waiting
// child too, and lets go of the old one.
func (p *place) pivot(*runtime.Container) error {
	if err := unix.Fchdir(int(p.root.Fd())); err != nil { //nolint:forbidigo // on a thread of its own (sys.OnThread)
		// p.root is a mount descriptor without read permission on old kernels.
		if err := unix.Chdir("/rootfs"); err != nil { //nolint:forbidigo // on a thread of its own (sys.OnThread)
			return fmt.Errorf("enter the root file system: %w", err)
		}
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	// The old root lies on top of the new one now.
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("detach the old root: %w", err)
	}
	return nil
}
