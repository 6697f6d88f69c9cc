package native

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/namespaces"
	"github.com/naru-project/naru/internal/sys"
	"github.com/naru-project/naru/runtime"
)

// lowerPlus reports whether overlayfs takes its layers one option at a time
// (lowerdir+, kernel 6.7): a new-API string option is capped at 256 bytes, so
// without it many layers only fit through mount(2).
var lowerPlus = sync.OnceValue(func() bool {
	fd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return false
	}
	defer func() { _ = unix.Close(fd) }()
	// Before 6.5 overlayfs has the legacy parser, which takes any key and
	// refuses it only when the mount is made.
	if unix.FsconfigSetString(fd, "naru-no-such-key", "/") == nil {
		return false
	}
	return unix.FsconfigSetString(fd, "lowerdir+", "/") == nil
})

// MountRootfs makes the overlay of a container as a detached mount: it is
// attached nowhere on the host, so it cannot leak there.
func (x *Executor) MountRootfs(ctx context.Context, id string, r runtime.Rootfs, uid, gid []runtime.IDMap) (*os.File, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if len(uid) > 0 {
		return x.idmappedOverlay(ctx, r, uid, gid)
	}
	if lowerPlus() {
		m, err := overlay(r)
		if err != nil {
			return nil, errs.New(errs.Internal, "mount the root file system of %s: %w", short(id), err)
		}
		return m, nil
	}
	var m *os.File
	err := sys.PrivateMounts(func() (err error) {
		m, err = overlayByPath(r)
		return err
	})
	if err != nil {
		return nil, errs.New(errs.Internal, "mount the root file system of %s: %w", short(id), err)
	}
	return m, nil
}

// overlay makes a detached overlay by the new mount API.
func overlay(r runtime.Rootfs) (*os.File, error) {
	if r.Upper == "" && len(r.Lower) == 1 {
		return sys.CloneTree(unix.AT_FDCWD, r.Lower[0], false)
	}
	opts := make([]sys.FsOption, 0, len(r.Lower)+3)
	for _, l := range r.Lower {
		opts = append(opts, sys.FsOption{Key: "lowerdir+", Value: l})
	}
	if r.Upper != "" {
		// volatile: nobody needs the writable layer after a power loss, and
		// unmounting does not have to wait for the disk.
		opts = append(opts, sys.FsOption{Key: "upperdir", Value: r.Upper}, sys.FsOption{Key: "workdir", Value: r.Work}, sys.FsOption{Key: "volatile", Flag: true})
	}
	return sys.NewFs("overlay", 0, opts...)
}

// overlayByPath is for kernels before 6.7: mount(2) takes one page of options,
// so the layers are named relative to their common folder. The caller is on a
// thread with private mounts.
func overlayByPath(r runtime.Rootfs) (*os.File, error) {
	if r.Upper == "" && len(r.Lower) == 1 {
		return sys.CloneTree(unix.AT_FDCWD, r.Lower[0], false)
	}
	base := commonDir(r)
	if err := unix.Chdir(base); err != nil { //nolint:forbidigo // on a thread of its own (sys.OnThread)
		return nil, fmt.Errorf("enter %s: %w", base, err)
	}
	rel := func(p string) string {
		s, err := filepath.Rel(base, p)
		if err != nil {
			return p
		}
		return s
	}
	lower := make([]string, len(r.Lower))
	for i, l := range r.Lower {
		lower[i] = rel(l)
	}
	data := "lowerdir=" + strings.Join(lower, ":")
	if r.Upper != "" {
		data += ",upperdir=" + rel(r.Upper) + ",workdir=" + rel(r.Work) + ",volatile"
	}
	if len(data) >= os.Getpagesize() {
		return nil, errs.New(errs.FailedPrecondition, "%d layers do not fit into the mount options of this kernel; 6.7 and newer take them", len(r.Lower))
	}
	// Mounted over a folder that this private namespace does not need.
	const at = "/proc"
	if err := unix.Mount("overlay", at, "overlay", 0, data); err != nil { //nolint:forbidigo // in a private namespace, on a path of ours
		return nil, fmt.Errorf("mount overlay (%d layers below %s): %w", len(lower), base, err)
	}
	return sys.CloneTree(unix.AT_FDCWD, at, false)
}

// commonDir is the deepest folder above all of r's folders.
func commonDir(r runtime.Rootfs) string {
	all := append([]string{}, r.Lower...)
	if r.Upper != "" {
		all = append(all, r.Upper, r.Work)
	}
	base := filepath.Dir(all[0])
	for _, p := range all[1:] {
		for base != "/" && !strings.HasPrefix(p, base+"/") {
			base = filepath.Dir(base)
		}
	}
	return base
}

// idmappedOverlay mounts an overlay whose layers, the writable one included,
// are seen through an id mapping: files of the image's root belong to the
// container's root, and nothing on disk is changed. The folder above all
// layers is idmapped over itself in a private mount namespace.
func (x *Executor) idmappedOverlay(ctx context.Context, r runtime.Rootfs, uid, gid []runtime.IDMap) (*os.File, error) {
	userns, err := x.mappingNamespace(ctx, uid, gid)
	if err != nil {
		return nil, err
	}
	defer func() { _ = userns.Close() }()
	base := commonDir(r)
	var m *os.File
	err = sys.PrivateMounts(func() error {
		t, err := sys.CloneTree(unix.AT_FDCWD, base, false)
		if err != nil {
			return err
		}
		defer func() { _ = t.Close() }()
		if err := idmap(t, userns, false); err != nil {
			return err
		}
		d, err := os.OpenFile(base, unix.O_PATH|unix.O_DIRECTORY, 0) //nolint:forbidigo // a path of ours or of the host, not of the image
		if err != nil {
			return err
		}
		defer func() { _ = d.Close() }()
		if err := sys.Attach(t, d); err != nil {
			return err
		}
		// overlayfs makes files in the work folder with its mounter's ids,
		// which the mapping must know.
		if err := sys.ActAs(hostID(uid, 0), hostID(gid, 0)); err != nil {
			return err
		}
		if lowerPlus() {
			m, err = overlay(r)
		} else {
			m, err = overlayByPath(r)
		}
		return err
	})
	if err != nil {
		return nil, errs.New(errs.Internal, "mount an idmapped root file system: %w", err)
	}
	return m, nil
}

// idmap gives a detached mount the mapping of a user namespace. Not every file
// system can (kernel 6.1: ext4, xfs, btrfs yes; tmpfs, overlayfs no): the error
// says which.
func idmap(m, userns *os.File, recursive bool) error {
	err := sys.SetAttr(m, recursive, unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(userns.Fd())})
	if err == nil {
		return nil
	}
	if errors.Is(err, unix.EINVAL) {
		var fs unix.Statfs_t
		_ = unix.Fstatfs(int(m.Fd()), &fs)
		return errs.New(errs.FailedPrecondition, "%s cannot be mounted with mapped ids: its file system (type %#x) does not support idmapped mounts on this kernel", m.Name(), fs.Type)
	}
	return err
}

// namespaces that exist only to carry a mapping, kept because pods of one node
// use few mappings again and again (containers of one pod the same).
type mappingCache struct {
	mu sync.Mutex
	m  map[string]*os.File
}

// maxMappings bounds the cache; the namespaces beyond are made anew.
const maxMappings = 64

// mappingNamespace returns a user namespace with the given mapping, for
// mount_setattr. The caller closes it.
func (x *Executor) mappingNamespace(ctx context.Context, uid, gid []runtime.IDMap) (*os.File, error) {
	key := fmt.Sprint(uid, gid)
	c := &x.mappings
	c.mu.Lock()
	f := c.m[key]
	if f != nil { // under the lock: put may close it for another one's sake
		defer c.mu.Unlock()
		return dup(f)
	}
	c.mu.Unlock()
	n, err := x.makeNamespaces(ctx, namespaces.Request{User: true, UIDMap: uid, GIDMap: gid})
	if err != nil {
		return nil, err
	}
	return c.put(key, n.User)
}

// put keeps f under key, or closes it for the one that is there, and returns a
// duplicate.
func (c *mappingCache) put(key string, f *os.File) (*os.File, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if old := c.m[key]; old != nil {
		_ = f.Close()
		return dup(old)
	}
	if len(c.m) >= maxMappings {
		for k, old := range c.m {
			_ = old.Close()
			delete(c.m, k)
			break
		}
	}
	c.m[key] = f
	return dup(f)
}

func mapLines(m []runtime.IDMap) string {
	var b strings.Builder
	for _, x := range m {
		b.WriteString(strconv.FormatUint(uint64(x.ContainerID), 10))
		b.WriteByte(' ')
		b.WriteString(strconv.FormatUint(uint64(x.HostID), 10))
		b.WriteByte(' ')
		b.WriteString(strconv.FormatUint(uint64(x.Size), 10))
		b.WriteByte('\n')
	}
	return b.String()
}

// hostID maps an id of the container to the host's.
func hostID(m []runtime.IDMap, id uint32) int {
	if len(m) == 0 {
		return int(id)
	}
	for _, x := range m {
		if id >= x.ContainerID && id-x.ContainerID < x.Size {
			return int(x.HostID + (id - x.ContainerID))
		}
	}
	return 65534 // overflowuid: nobody's
}

func short(id string) string {
	if len(id) > 13 {
		return id[:13]
	}
	return id
}
