package images

import (
	"fmt"
	"os"
	"strings"
	"syscall"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

type unixStat = syscall.Stat_t

// mountOf tells where the mount is that dir lies on, and what is mounted there:
// the longest mount point above it, the newest of several at one place
// (proc_pid_mountinfo(5)).
func mountOf(dir *os.File) (point, source string, err error) {
	if id, err := mountID(dir); err == nil {
		found, err := mountinfo.GetMounts(func(i *mountinfo.Info) (skip, stop bool) { return i.ID != id, i.ID == id })
		if err == nil && len(found) == 1 {
			return found[0].Mountpoint, found[0].Source, nil
		}
	}
	found, err := mountinfo.GetMounts(mountinfo.ParentsFilter(dir.Name()))
	if err != nil {
		return "", "", fmt.Errorf("read the mounts: %w", err)
	}
	for _, m := range found {
		if len(m.Mountpoint) >= len(point) && within(dir.Name(), m.Mountpoint) {
			point, source = m.Mountpoint, m.Source
		}
	}
	if point == "" {
		return "/", "", nil
	}
	return point, source, nil
}

func within(path, dir string) bool {
	return dir == "/" || path == dir || strings.HasPrefix(path, dir+"/")
}

func mountID(f *os.File) (int, error) {
	var st unix.Statx_t
	if err := unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &st); err != nil {
		return 0, err
	}
	if st.Mask&unix.STATX_MNT_ID == 0 {
		return 0, unix.ENOTSUP
	}
	return int(st.Mnt_id), nil
}
