package cgroup

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
)

// Bounds of a removal. A container with a writable cgroup can nest and name
// its own at will (row C-07 of the attack table: 10,000 of them).
const (
	maxRemoved = 1 << 20 // folders removed in one call
	dirBatch   = 512     // names held at a time
)

// Remove removes the group and all that the container made below it, in every
// hierarchy. It does not kill: processes in it are errs.FailedPrecondition,
// once a short wait for exiting ones is over. A group that is gone is no error.
func (g *Group) Remove(ctx context.Context) error {
	g.Close()
	if err := checkPath(g.Path); err != nil {
		return err
	}
	if g.d.systemd {
		kills, _ := g.d.oomKills(g.Path) // 0: it is gone
		if err := g.d.stopScope(ctx, g.Path); err != nil {
			return err
		}
		if err := g.d.ledger.forget(g.Path, kills); err != nil {
			return err
		}
	}
	var all []error
	deadline := time.Now().Add(removeWait)
	for i, h := range slices.Backward(g.d.hier) { // see trackingFirst
		if i == 0 && len(all) > 0 {
			break // it is to be found for the next try
		}
		if err := removeTree(ctx, h, g.rel, deadline); err != nil {
			all = append(all, err)
		}
	}
	return errors.Join(all...)
}

// removeTree removes rel and everything below, waiting until deadline for the
// kernel where a folder is busy for a moment only.
func removeTree(ctx context.Context, h *hierarchy, rel string, deadline time.Time) error {
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		err := unix.Unlinkat(h.fd, rel, unix.AT_REMOVEDIR)
		if err == nil || err == unix.ENOENT {
			return nil
		}
		if err == unix.EBUSY || err == unix.ENOTEMPTY {
			err = removeBelow(ctx, h.fd, rel)
			if err == nil {
				err = unix.Unlinkat(h.fd, rel, unix.AT_REMOVEDIR)
			}
			if err == nil || err == unix.ENOENT {
				return nil
			}
		}
		busy := errors.Is(err, unix.EBUSY) || errors.Is(err, unix.ENOTEMPTY)
		if !busy || time.Now().After(deadline) {
			return classify(err, "remove cgroup /%s in hierarchy %s", rel, h.name)
		}
		if err := pause(ctx, wait); err != nil {
			return err
		}
	}
}

// removeBelow removes all folders below rel, deepest first. It holds one
// descriptor and climbs by "..", because a tree can be deeper than descriptors
// and path names allow; cgroups cannot be moved to another parent, so ".." is
// where it came from.
func removeBelow(ctx context.Context, root int, rel string) error {
	fd, err := openAt(root, rel, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer func() { unix.Close(fd) }()
	move := func(to string) error {
		next, err := openAt(fd, to, unix.O_RDONLY|unix.O_DIRECTORY)
		if err == nil {
			unix.Close(fd)
			fd = next
		}
		return err
	}
	var stack []string // names between rel and fd
	for removed := 0; ; {
		if err := ctx.Err(); err != nil {
			return errs.New(errs.Of(err), "remove cgroups below /%s: %w", rel, context.Cause(ctx))
		}
		names, err := subdirs(fd, ".", dirBatch)
		if err != nil {
			return err
		}
		var busy string
		gone := 0
		for _, n := range names {
			if err := unix.Unlinkat(fd, n, unix.AT_REMOVEDIR); err == nil || err == unix.ENOENT {
				gone++
			} else {
				busy = n
			}
		}
		if removed += gone; removed > maxRemoved {
			return errs.New(errs.ResourceExhausted, "remove cgroups below /%s: more than %d", rel, maxRemoved)
		}
		switch {
		case busy != "" && gone > 0:
			continue // look again before going down
		case busy != "":
			if err := move(busy); err == unix.ENOENT {
				continue
			} else if err != nil {
				return err
			}
			stack = append(stack, busy)
			if below, err := subdirs(fd, ".", 1); err == nil && len(below) == 0 {
				return unix.EBUSY // it has no children, so it has processes
			}
		case len(stack) == 0:
			return nil
		default:
			if err := move(".."); err != nil {
				return err
			}
			stack = stack[:len(stack)-1]
		}
	}
}

// subdirs returns up to limit names of folders in rel.
func subdirs(dir int, rel string, limit int) ([]string, error) {
	fd, err := openAt(dir, rel, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var names []string
	buf := make([]byte, 8<<10)
	for {
		n, err := unix.ReadDirent(fd, buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n <= 0 {
			return names, err
		}
		if names = appendDirs(names, buf[:n]); len(names) >= limit {
			return names[:limit], nil
		}
	}
}

// appendDirs picks the folders out of a getdents64(2) buffer. cgroupfs fills
// in d_type.
func appendDirs(names []string, b []byte) []string {
	const headLen = 19 // d_ino 8, d_off 8, d_reclen 2, d_type 1
	for len(b) >= headLen {
		recLen := int(uint16(b[16]) | uint16(b[17])<<8) // both architectures are little-endian
		if recLen < headLen || recLen > len(b) {
			return names
		}
		if b[18] == unix.DT_DIR {
			name := string(b[headLen:recLen])
			if i := strings.IndexByte(name, 0); i >= 0 {
				name = name[:i]
			}
			if name != "." && name != ".." && name != "" {
				names = append(names, name)
			}
		}
		b = b[recLen:]
	}
	return names
}
