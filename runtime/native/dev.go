package native

import (
	"errors"
	"os"
	"path"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/sys"
	"github.com/naru-project/naru/runtime"
)

// devices is a container's /dev: always a fresh tmpfs, filled before it is
// attached anywhere, and a devpts instance of its own.
type devices struct {
	dev, pts *os.File
	master   *os.File // terminal containers: both ends of /dev/pts/0
	slave    *os.File
	names    map[string]bool // what stands in /dev
	uid, gid int             // the host's ids of the container's root
}

func (d *devices) close() {
	for _, f := range []*os.File{d.dev, d.pts, d.master, d.slave} {
		if f != nil {
			_ = f.Close()
		}
	}
}

var defaultDevices = []struct {
	name         string
	major, minor uint32
}{{"null", 1, 3}, {"zero", 1, 5}, {"full", 1, 7}, {"random", 1, 8}, {"urandom", 1, 9}, {"tty", 5, 0}}

var devLinks = [][2]string{
	{"/proc/self/fd", "fd"}, {"/proc/self/fd/0", "stdin"}, {"/proc/self/fd/1", "stdout"},
	{"/proc/self/fd/2", "stderr"}, {"pts/ptmx", "ptmx"}, {"/proc/kcore", "core"},
}

// makeDevices makes /dev and /dev/pts. Nodes belong to the container's root.
func makeDevices(c *runtime.Container) (_ *devices, err error) {
	uid, gid := hostID(c.UIDMap, 0), hostID(c.GIDMap, 0)
	d := &devices{names: map[string]bool{}, uid: uid, gid: gid}
	defer func() {
		if err != nil {
			d.close()
		}
	}()
	own := []sys.FsOption{{Key: "uid", Value: itoa(uid)}, {Key: "gid", Value: itoa(gid)}}
	d.dev, err = sys.NewFs("tmpfs", unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_STRICTATIME,
		append(own, sys.FsOption{Key: "mode", Value: "0755"}, sys.FsOption{Key: "size", Value: "65536k"})...)
	if err != nil {
		return nil, errs.New(errs.Internal, "make /dev: %w", err)
	}
	tty := hostID(c.GIDMap, 5)
	d.pts, err = sys.NewFs("devpts", unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NOEXEC, sys.FsOption{Key: "newinstance", Flag: true},
		sys.FsOption{Key: "ptmxmode", Value: "0666"}, sys.FsOption{Key: "mode", Value: "0620"}, sys.FsOption{Key: "gid", Value: itoa(tty)})
	if err != nil {
		return nil, errs.New(errs.Internal, "make /dev/pts: %w", err)
	}
	for _, x := range defaultDevices {
		if err := d.node(x.name, unix.S_IFCHR|0o666, int(unix.Mkdev(x.major, x.minor)), uid, gid); err != nil {
			return nil, err
		}
	}
	for _, l := range devLinks {
		if err := unix.Symlinkat(l[0], int(d.dev.Fd()), l[1]); err != nil {
			return nil, errs.New(errs.Internal, "link /dev/%s: %w", l[1], err)
		}
		d.names[l[1]] = true
	}
	for _, dir := range []string{"pts", "shm", "mqueue"} {
		f, err := d.folder(d.dev, dir)
		if err != nil {
			return nil, err
		}
		_ = f.Close()
		d.names[dir] = true
	}
	if c.Spec.Linux != nil {
		for i := range c.Spec.Linux.Devices {
			if err := d.requested(&c.Spec.Linux.Devices[i], c); err != nil {
				return nil, err
			}
		}
	}
	if c.TTY {
		if d.master, d.slave, err = openPty(d.pts); err != nil {
			return nil, err
		}
	}
	return d, nil
}

func (d *devices) node(name string, mode uint32, dev, uid, gid int) error {
	dir, base, err := d.parent(name)
	if err != nil {
		return errs.New(errs.Of(err), "device /dev/%s: %w", name, err)
	}
	defer func() { _ = dir.Close() }()
	if err := unix.Mknodat(int(dir.Fd()), base, mode, dev); err != nil {
		if err == unix.EEXIST {
			return errs.New(errs.InvalidArgument, "device /dev/%s: its place is taken", name)
		}
		return errs.New(errs.Internal, "make device /dev/%s: %w", name, err)
	}
	// mknod obeys the umask and the caller's ids.
	if err := unix.Fchmodat(int(dir.Fd()), base, mode&0o7777, 0); err != nil {
		return errs.New(errs.Internal, "chmod /dev/%s: %w", name, err)
	}
	if err := unix.Fchownat(int(dir.Fd()), base, uid, gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return errs.New(errs.Internal, "chown /dev/%s: %w", name, err)
	}
	d.names[name] = true
	return nil
}

// requested makes one device of the spec. Only those below /dev are made here;
// the spec builder has refused /proc and /sys.
func (d *devices) requested(s *specs.LinuxDevice, c *runtime.Container) error {
	rel, ok := strings.CutPrefix(path.Clean(s.Path), "/dev/")
	if !ok {
		return errs.New(errs.InvalidArgument, "device %s: only paths below /dev can be given to a container", s.Path)
	}
	if d.names[rel] {
		return nil // a default one
	}
	mode := uint32(unix.S_IFCHR)
	switch s.Type {
	case "b":
		mode = unix.S_IFBLK
	case "p":
		mode = unix.S_IFIFO
	}
	perm := uint32(0o666)
	if s.FileMode != nil {
		perm = uint32(s.FileMode.Perm())
	}
	uid, gid := hostID(c.UIDMap, 0), hostID(c.GIDMap, 0)
	if s.UID != nil {
		uid = hostID(c.UIDMap, *s.UID)
	}
	if s.GID != nil {
		gid = hostID(c.GIDMap, *s.GID)
	}
	return d.node(rel, mode|perm, int(unix.Mkdev(uint32(s.Major), uint32(s.Minor))), uid, gid)
}

// parent opens the folder of name, making what is missing of it. It follows no
// link: those of /dev lead to the /proc of whoever looks, here the host's.
func (d *devices) parent(name string) (dir *os.File, base string, err error) {
	if dir, err = dup(d.dev); err != nil {
		return nil, "", err
	}
	for {
		first, rest, more := strings.Cut(name, "/")
		if !more {
			return dir, name, nil
		}
		next, err := d.folder(dir, first)
		_ = dir.Close()
		if err != nil {
			return nil, "", err
		}
		dir, name = next, rest
	}
}

// folder opens a folder in dir, which is made if it is not there. A new one is
// the container's root's and open to all, whatever the umask is.
func (d *devices) folder(dir *os.File, name string) (*os.File, error) {
	err := unix.Mkdirat(int(dir.Fd()), name, 0o755)
	if err != nil && err != unix.EEXIST {
		return nil, errs.New(errs.Internal, "make the folder %s in /dev: %w", name, err)
	}
	made := err == nil
	f, err := sys.OpenBeneath(dir, name, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil, errs.New(errs.InvalidArgument, "%s in /dev is not a folder: %w", name, err)
	}
	if made {
		if err := errors.Join(f.Chmod(0o755), f.Chown(d.uid, d.gid)); err != nil {
			_ = f.Close()
			return nil, errs.New(errs.Internal, "make the folder %s in /dev: %w", name, err)
		}
	}
	return f, nil
}

// null opens the container's own /dev/null and checks that it is the real one
// (character device 1:3), so that masks and closed streams never depend on a
// file that somebody else made (CVE-2025-31133).
func (d *devices) null(flags int) (*os.File, error) {
	f, err := sys.OpenBeneath(d.dev, "null", flags)
	if err != nil {
		return nil, errs.New(errs.Internal, "open /dev/null: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != unix.Mkdev(1, 3) {
		_ = f.Close()
		return nil, errs.New(errs.Internal, "/dev/null is not the null device")
	}
	return f, nil
}

// openPty opens a new pseudo terminal of a devpts instance: the master, and
// the slave by TIOCGPTPEER, never by its path.
func openPty(pts *os.File) (master, slave *os.File, err error) {
	// No mount is crossed: the container may have put a device of the host's there.
	fd, err := sys.Openat2(int(pts.Fd()), "ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK, 0, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS|unix.RESOLVE_NO_XDEV)
	if err != nil {
		return nil, nil, errs.New(errs.Internal, "open a terminal: %w", err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		_ = unix.Close(fd)
		return nil, nil, errs.New(errs.Internal, "unlock the terminal: %w", err)
	}
	// The argument of TIOCGPTPEER is a set of open flags.
	peer, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TIOCGPTPEER, uintptr(unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC))
	if errno != 0 {
		_ = unix.Close(fd)
		return nil, nil, errs.New(errs.Internal, "open the terminal's other end: %w", errno)
	}
	return os.NewFile(uintptr(fd), "ptmx"), os.NewFile(peer, "pts"), nil
}
