package native

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/sys"
	"github.com/naru-project/naru/runtime"
)

const (
	dumpLog = "dump.log"
	// criuGrace is how long criu may take to thaw the processes after it was
	// told to end; killed, it would leave them with its code inside.
	criuGrace = 10 * time.Second
)

// Checkpoint dumps the processes of a running container into dir, by criu(8).
// They go on afterwards. What belongs to the pod or to the host, and not to
// the container (volumes, the network, the other ends of its streams), is
// named as external: who restores it must bring it.
func (x *Executor) Checkpoint(ctx context.Context, c *runtime.Container, dir string) error {
	fail := func(class errs.Class, format string, args ...any) error {
		return errs.New(class, "checkpoint container %s: %w", short(c.ID), fmt.Errorf(format, args...))
	}
	criu := *x.criu.Load()
	switch {
	case criu == "":
		return fail(errs.Unimplemented, "checkpoints are off; name the criu program in runtime.criu of the configuration")
	case c.TTY:
		return fail(errs.Unimplemented, "it has a terminal, whose other end criu cannot keep")
	case c.PIDMode != runtime.PIDContainer && c.PIDMode != "":
		return fail(errs.Unimplemented, "its PID namespace has processes that are not its own")
	}
	h, err := x.lookup(ctx, c.ID)
	if err != nil {
		return err
	}
	defer func() { _ = h.pidfd.Close() }()
	proc, err := x.procDir(h.pid, h.pidfd)
	if err != nil {
		return err
	}
	defer func() { _ = proc.Close() }()
	external, err := x.externals(c, proc)
	if err != nil {
		return fail(errs.Of(err), "%w", err)
	}
	args := []string{
		"dump", "--tree", itoa(h.pid), "--images-dir", dir, "--work-dir", dir, "--log-file", dumpLog, "-v2",
		"--leave-running", "--file-locks", "--tcp-established", "--manage-cgroups=ignore", "--ghost-limit", "64M",
	}
	for _, e := range external {
		args = append(args, "--external", e)
	}
	if err := x.RunTool(ctx, criuGrace, Tool{Args: append([]string{criu}, args...), Umask: 0o077}); err != nil {
		switch {
		case ctx.Err() != nil:
			return fail(errs.Of(ctx.Err()), "%w", context.Cause(ctx))
		case errors.Is(err, fs.ErrNotExist):
			return fail(errs.FailedPrecondition, "runtime.criu names %s, which is not there", criu)
		}
		return fail(errs.Internal, "criu dump: %w: %s", err, criuErrors(filepath.Join(dir, dumpLog)))
	}
	return nil
}

// externals are what criu(8) has to be told of, for it cannot see it or must
// not keep it: mounts of the host, the pod's network, the FIFOs of the
// container's streams, which lie outside of its mount namespace.
func (x *Executor) externals(c *runtime.Container, proc *os.File) ([]string, error) {
	out := []string{}
	if c.Namespaces.Net != "" {
		var st unix.Stat_t
		if err := unix.Fstatat(int(proc.Fd()), "ns/net", &st, 0); err != nil {
			return nil, errs.New(errs.FailedPrecondition, "its network namespace: %w", err)
		}
		out = append(out, fmt.Sprintf("net[%d]:pod", st.Ino))
	}
	mounts, err := externalMounts(c, proc)
	if err != nil {
		return nil, err
	}
	for _, m := range mounts {
		out = append(out, "mnt["+m+"]:"+m)
	}
	for _, name := range []string{"0", "1", "2"} {
		var st unix.Statx_t
		err := unix.Statx(unix.AT_FDCWD, filepath.Join(x.ioDir(c.ID), name), unix.AT_SYMLINK_NOFOLLOW, unix.STATX_INO|unix.STATX_MNT_ID, &st)
		switch {
		case errors.Is(err, unix.ENOENT):
		case err != nil:
			return nil, errs.New(errs.Internal, "its stream %s: %w", name, err)
		default:
			out = append(out, fmt.Sprintf("file[%x:%x]", st.Mnt_id, st.Ino))
		}
	}
	return out, nil
}

// externalMounts lists the mount points of the container that show something
// of the host or of the pod, sub-mounts included.
func externalMounts(c *runtime.Container, proc *os.File) ([]string, error) {
	tops := []string{"/dev/shm"}
	for _, m := range c.Mounts {
		tops = append(tops, path.Clean("/"+m.ContainerPath))
	}
	for to := range c.EtcFiles {
		tops = append(tops, to)
	}
	f, err := sys.OpenBeneath(proc, "mountinfo", unix.O_RDONLY)
	if err != nil {
		return nil, errs.New(errs.FailedPrecondition, "its mounts: %w", err)
	}
	defer func() { _ = f.Close() }()
	infos, err := mountinfo.GetMountsFromReader(f, func(i *mountinfo.Info) (skip, stop bool) {
		return !slices.ContainsFunc(tops, func(top string) bool {
			return i.Mountpoint == top || strings.HasPrefix(i.Mountpoint, top+"/")
		}), false
	})
	if err != nil {
		return nil, errs.New(errs.Internal, "its mounts: %w", err)
	}
	out := make([]string, 0, len(infos))
	for _, i := range infos {
		if !slices.Contains(out, i.Mountpoint) {
			out = append(out, i.Mountpoint)
		}
	}
	return out, nil
}

// criuErrors are the last errors in criu's log.
func criuErrors(file string) string {
	f, err := os.Open(file) //nolint:forbidigo // in a folder that the caller made
	if err != nil {
		return "it left no log"
	}
	defer func() { _ = f.Close() }()
	var last []string
	for s := bufio.NewScanner(f); s.Scan(); {
		if _, text, ok := strings.Cut(s.Text(), "Error "); ok {
			last = append(last, strings.ToValidUTF8(text[:min(len(text), 300)], "?"))
			last = last[max(0, len(last)-3):]
		}
	}
	if len(last) == 0 {
		return "its log has no error"
	}
	return strings.Join(last, "; ")
}
