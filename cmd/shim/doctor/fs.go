package doctor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/sys"
)

// fsNames are the magics of file systems that nodes have below /var.
var fsNames = map[int64]string{
	unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "xfs", unix.BTRFS_SUPER_MAGIC: "btrfs", unix.TMPFS_MAGIC: "tmpfs",
	unix.OVERLAYFS_SUPER_MAGIC: "overlay", unix.NFS_SUPER_MAGIC: "nfs", unix.F2FS_SUPER_MAGIC: "f2fs", 0x2fc12fc1: "zfs", unix.FUSE_SUPER_MAGIC: "fuse",
}

func fsName(dir string) string {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return "?"
	}
	if n := fsNames[st.Type]; n != "" {
		return n
	}
	return fmt.Sprintf("type %#x", st.Type)
}

// checkOverlay makes a small overlay on the file system of the root folder, as
// containers get it, writes through it, and looks where the write went. The
// mount stays detached: nobody sees it, and it goes with its descriptor.
func checkOverlay(_ context.Context, cfg *Config) []Result {
	base := existing(cfg.Root)
	kind := fsName(base)
	tmp, err := os.MkdirTemp(base, ".doctor-")
	if err != nil {
		return result("overlayfs", Fail, "make a folder in "+base+": "+err.Error(), "is it read-only, or are you not root?")
	}
	defer func() { _ = os.RemoveAll(tmp) }()
	if err := tryOverlay(tmp); err != nil {
		return result("overlayfs", Fail, fmt.Sprintf("on %s (%s): %v", base, kind, err),
			"container root file systems cannot be made there: set root to a folder on ext4, xfs or btrfs")
	}
	return ok("overlayfs", "works on %s (%s)", base, kind)
}

func tryOverlay(tmp string) error {
	for _, d := range []string{"lower", "upper", "work"} {
		if err := os.Mkdir(filepath.Join(tmp, d), 0o755); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(tmp, "lower", "a"), []byte("lower"), 0o644); err != nil {
		return err
	}
	if err := checkType(filepath.Join(tmp, "lower")); err != nil {
		return err
	}
	m, err := newOverlay(tmp)
	if err != nil {
		return err
	}
	defer func() { _ = m.Close() }()
	fd, err := unix.Openat(int(m.Fd()), "a", unix.O_WRONLY|unix.O_CLOEXEC|unix.O_APPEND, 0)
	if err != nil {
		return fmt.Errorf("open a file of the lower layer for writing: %w", err)
	}
	_, err = unix.Write(fd, []byte("+upper"))
	_ = unix.Close(fd)
	if err != nil {
		return fmt.Errorf("write through the overlay: %w", err)
	}
	if b, err := os.ReadFile(filepath.Join(tmp, "upper", "a")); err != nil || string(b) != "lower+upper" {
		return fmt.Errorf("the write is not in the upper layer: %q, %w", b, err)
	}
	// A whiteout is a character device 0:0 in the upper layer.
	if err := unix.Unlinkat(int(m.Fd()), "a", 0); err != nil {
		return fmt.Errorf("remove a file of the lower layer: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Lstat(filepath.Join(tmp, "upper", "a"), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR {
		return fmt.Errorf("removing a file leaves no whiteout (%w)", err)
	}
	return nil
}

// newOverlay uses the mount API of containers. One short path fits the 256 bytes
// that it allows an option on every kernel.
func newOverlay(tmp string) (*os.File, error) {
	p := func(d string) string { return filepath.Join(tmp, d) }
	m, err := sys.NewFs("overlay", 0,
		sys.FsOption{Key: "lowerdir", Value: p("lower")},
		sys.FsOption{Key: "upperdir", Value: p("upper")}, sys.FsOption{Key: "workdir", Value: p("work")})
	if errors.Is(err, unix.ENODEV) {
		return nil, fmt.Errorf("the kernel has no overlayfs: modprobe overlay (%w)", err)
	}
	return m, err
}

// checkType: overlayfs needs d_type, which XFS made with ftype=0 lacks.
func checkType(dir string) error {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	buf := make([]byte, 4096)
	n, err := unix.ReadDirent(fd, buf)
	if err != nil {
		return err
	}
	for b := buf[:n]; len(b) >= 19; {
		size := int(b[16]) | int(b[17])<<8
		if size < 19 || size > len(b) {
			break
		}
		if b[18] == unix.DT_UNKNOWN {
			return errors.New("folders do not tell the types of their entries (d_type); XFS needs ftype=1")
		}
		b = b[size:]
	}
	return nil
}

// checkUserNS makes a user namespace and tries on which file systems mounts can
// be mapped into it.
func checkUserNS(ctx context.Context, cfg *Config) []Result {
	if !cfg.UserNS {
		return ok("user namespaces", "switched off in the configuration")
	}
	if len(cfg.Holder) == 0 {
		return nil
	}
	ns, stop, err := newUserNS(ctx, cfg.Holder)
	if err != nil {
		return result("user namespaces", Warn, err.Error(), "pods with hostUsers: false are refused (sysctl user.max_user_namespaces?)")
	}
	defer stop()
	dir := existing(cfg.Root)
	var good, bad []string
	try := func(name string, tree *os.File, err error) {
		if err == nil {
			err = sys.SetAttr(tree, false, unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(ns.Fd())})
			_ = tree.Close()
		}
		if err != nil {
			bad = append(bad, name)
			return
		}
		good = append(good, name)
	}
	tree, err := sys.CloneTree(unix.AT_FDCWD, dir, false)
	try(fsName(dir)+" ("+dir+")", tree, err)
	tree, err = sys.NewFs("tmpfs", 0)
	try("tmpfs", tree, err)
	if len(bad) > 0 {
		return result("user namespaces", Warn, fmt.Sprintf("mounts can be mapped on %s, not on %s", orNone(good), strings.Join(bad, ", ")),
			"a pod with hostUsers: false and a volume there is refused; projected volumes and Secrets are tmpfs (kernel 6.3)")
	}
	overlay, done, err := scratchOverlay(dir)
	defer done()
	try("overlay", overlay, err)
	r := ok("user namespaces", "there, mounts can be mapped on %s", strings.Join(good, ", "))
	if len(bad) > 0 {
		r[0].Detail += "; not on overlay: volumes that lie on one, image volumes too, are refused for such pods"
	}
	return r
}

func orNone(s []string) string {
	if len(s) == 0 {
		return "nothing"
	}
	return strings.Join(s, ", ")
}

func scratchOverlay(base string) (m *os.File, done func(), err error) {
	tmp, err := os.MkdirTemp(base, ".doctor-")
	if err != nil {
		return nil, func() {}, err
	}
	done = func() { _ = os.RemoveAll(tmp) }
	for _, d := range []string{"lower", "upper", "work"} {
		if err := os.Mkdir(filepath.Join(tmp, d), 0o755); err != nil {
			return nil, done, err
		}
	}
	m, err = newOverlay(tmp)
	return m, done, err
}

// newUserNS starts holder in a new user namespace and opens that. stop ends it.
func newUserNS(ctx context.Context, holder []string) (ns *os.File, stop func(), err error) {
	cmd := exec.CommandContext(ctx, holder[0], holder[1:]...)
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, nil, err
	}
	cmd.Stdout, cmd.Stderr = io.Discard, io.Discard
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 100000, Size: 65536}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 100000, Size: 65536}},
	}
	if err := cmd.Start(); err != nil {
		return nil, nil, fmt.Errorf("make a user namespace: %w", err)
	}
	end := func() { _ = in.Close(); _ = cmd.Wait() }
	ns, err = os.Open(fmt.Sprintf("/proc/%d/ns/user", cmd.Process.Pid))
	if err != nil {
		end()
		return nil, nil, fmt.Errorf("open the user namespace: %w", err)
	}
	return ns, func() { _ = ns.Close(); end() }, nil
}
