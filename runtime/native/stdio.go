package native

import (
	"context"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime/stdio"
)

// makeStdio makes the container's standard streams and their other ends.
func (k *creation) makeStdio(context.Context) (err error) {
	dir := k.x.ioDir(k.c.ID)
	if err := os.MkdirAll(dir, 0o700); err != nil { //nolint:forbidigo // below our own run folder
		return errs.New(errs.Internal, "make %s: %w", dir, err)
	}
	k.undo.Add("remove the FIFOs", func(context.Context) error { return os.RemoveAll(dir) }) //nolint:forbidigo // below our own run folder
	if k.kept.Log, err = stdio.OpenLog(k.c.LogPath); err != nil {
		return err
	}
	k.later(k.kept.Log)
	uid, gid := hostID(k.c.UIDMap, k.process.user.UID), hostID(k.c.GIDMap, k.process.user.GID)
	if k.c.TTY {
		d := k.place.devices
		if err := d.slave.Chown(uid, hostID(k.c.GIDMap, 5)); err != nil {
			return errs.New(errs.Internal, "chown the terminal: %w", err)
		}
		k.kept.Pty, k.kept.Devpts = d.master, d.pts
		k.files.stdin, k.files.stdout, k.files.stderr = d.slave, d.slave, d.slave
		return nil
	}
	k.kept.Devpts = k.place.devices.pts
	f, err := stdio.NewFIFOs(dir, k.c.Stdin, uid, gid)
	if err != nil {
		return err
	}
	for _, x := range slices.Concat(f.Child[:], f.Kept[:]) {
		k.later(x)
	}
	k.kept.Stdin, k.kept.Stdout, k.kept.Stderr = f.Kept[0], f.Kept[1], f.Kept[2]
	k.files.stdin, k.files.stdout, k.files.stderr = f.Child[0], f.Child[1], f.Child[2]
	if !k.c.Stdin {
		if k.files.stdin, err = k.place.devices.null(unix.O_RDONLY); err != nil {
			return err
		}
		k.later(k.files.stdin)
	}
	return nil
}
