package worker

import (
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
)

// enterEmptyRoot makes a root of a tmpfs with three directories and detaches
// the host's file systems. The keeper has started this process in a mount
// namespace of its own.
//
//	/proc    procfs, fully visible: without one here, a container with a user
//	         namespace could not mount its own (mount_too_revealing in the kernel)
//	/sys     sysfs, for the same reason
//	/rootfs  empty: where a container's root gets mounted, in its own copy
func enterEmptyRoot() error {
	const locked = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	steps := []struct {
		name string
		do   func() error
	}{
		{"make mounts private", func() error { return unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "") }},
		// /proc is the one directory that exists on every host.
		{"mount the root", func() error { return unix.Mount("naru", "/proc", "tmpfs", locked, "size=64k,nr_inodes=16,mode=0755") }},
		{"make directories", func() error {
			for _, d := range []string{"/proc/proc", "/proc/sys", "/proc/rootfs"} {
				if err := unix.Mkdir(d, 0o755); err != nil {
					return err
				}
				if err := unix.Chmod(d, 0o755); err != nil { // the umask
					return err
				}
			}
			return nil
		}},
		{"mount procfs", func() error { return unix.Mount("proc", "/proc/proc", "proc", locked, "") }},
		{"mount sysfs", func() error { return unix.Mount("sysfs", "/proc/sys", "sysfs", locked, "") }},
		{"enter the root", func() error { return unix.Chdir("/proc") }},
		{"pivot to the root", func() error { return unix.PivotRoot(".", ".") }},
		{"detach the host's root", func() error { return unix.Unmount(".", unix.MNT_DETACH) }},
		{"enter /", func() error { return unix.Chdir("/") }},
		{"make the root read-only", func() error {
			return unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|locked, "")
		}},
	}
	for _, s := range steps {
		if err := s.do(); err != nil {
			return errs.New(errs.Internal, "%s: %w", s.name, err)
		}
	}
	return nil
}
