package unpack

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"path"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/images/internal/tree"
)

const whiteoutPrefix = ".wh."

// file makes a regular file.
func (e *extractor) file(parent int, base string, hdr *tar.Header, r io.Reader) error {
	if err := e.size(hdr); err != nil {
		return err
	}
	const flags = unix.O_WRONLY | unix.O_CREAT | unix.O_EXCL | unix.O_NOFOLLOW | unix.O_CLOEXEC
	fd, err := unix.Openat(parent, base, flags, 0o600)
	if errors.Is(err, unix.EEXIST) {
		if err := e.replace(parent, base); err != nil {
			return err
		}
		fd, err = unix.Openat(parent, base, flags, 0o600)
	}
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	if isSparse(hdr) {
		err = e.copySparse(fd, r, hdr.Size)
	} else {
		err = e.copy(fd, r, hdr.Size)
	}
	if err != nil {
		return err
	}
	e.made(hdr.Size)
	if err := e.attributes(fd, hdr, unix.S_IFREG); err != nil {
		return err
	}
	ts := timesOf(hdr)
	return unix.UtimesNanoAt(fd, "", ts[:], unix.AT_EMPTY_PATH)
}

// size counts a file's apparent size against the limits before a byte is written.
func (e *extractor) size(hdr *tar.Header) error {
	if hdr.Size < 0 || hdr.Size > e.lim.MaxBytes-e.apparent {
		return limitf("the files of the layer have more than %d bytes", e.lim.MaxBytes)
	}
	e.apparent += hdr.Size
	if isSparse(hdr) {
		if hdr.Size > e.lim.MaxSparse-e.sparse {
			return limitf("the sparse files of the layer have more than %d bytes", e.lim.MaxSparse)
		}
		e.sparse += hdr.Size
	}
	return nil
}

// isSparse: archive/tar reads all three GNU sparse forms and fills the holes
// with zeros, so a small archive can hold a huge file.
func isSparse(hdr *tar.Header) bool {
	if hdr.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for k := range hdr.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return false
}

func (e *extractor) copy(fd int, r io.Reader, size int64) error {
	for done := int64(0); done < size; {
		n, err := io.ReadFull(r, e.buf[:min(int64(len(e.buf)), size-done)])
		if err != nil {
			return readError(err)
		}
		if err := e.write(fd, e.buf[:n]); err != nil {
			return err
		}
		done += int64(n)
	}
	return nil
}

func (e *extractor) write(fd int, p []byte) error {
	if err := e.checkFree(int64(len(p))); err != nil {
		return err
	}
	for len(p) > 0 {
		n, err := unix.Write(fd, p)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		p = p[n:]
	}
	return nil
}

// copySparse leaves the holes out.
func (e *extractor) copySparse(fd int, r io.Reader, size int64) error {
	for done := int64(0); done < size; {
		if e.ctx.Err() != nil {
			return e.ctx.Err()
		}
		n, err := io.ReadFull(r, e.buf[:min(blockSize*16, size-done)])
		if err != nil {
			return readError(err)
		}
		done += int64(n)
		if allZero(e.buf[:n]) {
			if _, err := unix.Seek(fd, int64(n), io.SeekCurrent); err != nil {
				return err
			}
			continue
		}
		if err := e.write(fd, e.buf[:n]); err != nil {
			return err
		}
	}
	return unix.Ftruncate(fd, size)
}

func allZero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

// symlink makes a link; where it points is of no interest here.
func (e *extractor) symlink(parent int, base string, hdr *tar.Header) error {
	if hdr.Linkname == "" || len(hdr.Linkname) >= pathMax || strings.ContainsRune(hdr.Linkname, 0) {
		return badf("its target is empty, too long or has a NUL byte")
	}
	err := unix.Symlinkat(hdr.Linkname, parent, base)
	if errors.Is(err, unix.EEXIST) {
		if err := e.replace(parent, base); err != nil {
			return err
		}
		err = unix.Symlinkat(hdr.Linkname, parent, base)
	}
	if err != nil {
		return err
	}
	e.made(0)
	return e.byPath(parent, base, hdr, unix.S_IFLNK)
}

// hardlink gives an object of this layer a second name. Owner, mode and times
// are the object's own: its first entry has set them, and a header here that
// says otherwise must not change them (CVE-2021-32760).
func (e *extractor) hardlink(parent int, base string, hdr *tar.Header) error {
	target, err := e.clean(hdr.Linkname)
	if err != nil {
		return err
	}
	if target == "/" {
		return badf("it is a hard link to the root folder")
	}
	from, err := e.existing(path.Dir(target))
	var st unix.Stat_t
	if err == nil {
		err = unix.Fstatat(from, path.Base(target), &st, unix.AT_SYMLINK_NOFOLLOW)
	}
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return badf("it is a hard link to %.200q, which this layer does not have", hdr.Linkname)
	}
	if err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFDIR || isWhiteout(&st) {
		return badf("it is a hard link to %.200q, which is a folder or was deleted", hdr.Linkname)
	}
	err = unix.Linkat(from, path.Base(target), parent, base, 0) // 0: links are not followed
	if errors.Is(err, unix.EEXIST) {
		var now unix.Stat_t
		if unix.Fstatat(parent, base, &now, unix.AT_SYMLINK_NOFOLLOW) == nil && now.Ino == st.Ino {
			return nil // the same object already
		}
		if err := e.replace(parent, base); err != nil {
			return err
		}
		err = unix.Linkat(from, path.Base(target), parent, base, 0)
	}
	return err
}

// node makes a device or FIFO, without ever opening it.
func (e *extractor) node(parent int, base string, hdr *tar.Header) error {
	mode, dev := uint32(unix.S_IFIFO), uint64(0)
	if hdr.Typeflag != tar.TypeFifo {
		// 12 bits of major and 20 of minor number: MINORBITS, linux/kdev_t.h.
		if hdr.Devmajor < 0 || hdr.Devmajor >= 1<<12 || hdr.Devminor < 0 || hdr.Devminor >= 1<<20 {
			return badf("its device number %d:%d is out of range", hdr.Devmajor, hdr.Devminor)
		}
		mode, dev = unix.S_IFBLK, unix.Mkdev(uint32(hdr.Devmajor), uint32(hdr.Devminor))
		if hdr.Typeflag == tar.TypeChar {
			mode = unix.S_IFCHR
			if dev == 0 {
				return badf("it is a 0:0 character device, which overlayfs takes as a deletion")
			}
		}
	}
	err := unix.Mknodat(parent, base, mode|0o600, int(dev))
	if errors.Is(err, unix.EEXIST) {
		if err := e.replace(parent, base); err != nil {
			return err
		}
		err = unix.Mknodat(parent, base, mode|0o600, int(dev))
	}
	if err != nil {
		return err
	}
	e.made(0)
	return e.byPath(parent, base, hdr, mode)
}

// byPath sets owner, mode and times of an object that must not be opened, on
// an O_PATH descriptor of it.
func (e *extractor) byPath(parent int, base string, hdr *tar.Header, kind uint32) error {
	fd, err := unix.Openat(parent, base, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	if err := unix.Fchownat(fd, "", hdr.Uid, hdr.Gid, unix.AT_EMPTY_PATH); err != nil {
		return err
	}
	if kind != unix.S_IFLNK {
		mode := uint32(hdr.Mode) & 0o7777
		err := unix.Fchmodat(fd, "", mode, unix.AT_EMPTY_PATH) // fchmodat2(2), kernel 6.6
		if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
			err = unix.Chmod("/proc/self/fd/"+strconv.Itoa(fd), mode) //nolint:forbidigo // through /proc/self/fd of a descriptor we hold
		}
		if err != nil {
			return err
		}
	}
	ts := timesOf(hdr)
	return unix.UtimesNanoAt(fd, "", ts[:], unix.AT_EMPTY_PATH)
}

// attributes sets owner, mode and extended attributes on an open file or
// folder, in this order: chown(2) takes away set-id bits and capabilities.
func (e *extractor) attributes(fd int, hdr *tar.Header, kind uint32) error {
	if err := unix.Fchown(fd, hdr.Uid, hdr.Gid); err != nil {
		return err
	}
	if err := unix.Fchmod(fd, uint32(hdr.Mode)&0o7777); err != nil {
		return err
	}
	total := 0
	for key, value := range hdr.PAXRecords {
		name, ok := strings.CutPrefix(key, "SCHILY.xattr.")
		if !ok {
			continue
		}
		if total += len(name) + len(value); total > e.lim.MaxXattr {
			return limitf("its attributes have more than %d bytes", e.lim.MaxXattr)
		}
		if err := setXattr(fd, name, []byte(value), kind); err != nil {
			return err
		}
	}
	return nil
}

// setXattr keeps file capabilities and user.*, and drops everything else:
// labels and ACLs belong to the host, trusted.overlay.* and user.overlay.*
// would steer overlayfs.
func setXattr(fd int, name string, value []byte, kind uint32) error {
	switch {
	case name == "security.capability" && kind == unix.S_IFREG:
		v, ok := capability(value)
		if !ok {
			return badf("its file capabilities cannot be read")
		}
		if err := unix.Fsetxattr(fd, name, v, 0); err != nil {
			return fmt.Errorf("set file capabilities: %w", err)
		}
	case strings.HasPrefix(name, "user.") && !strings.HasPrefix(name, "user.overlay."):
		err := unix.Fsetxattr(fd, name, value, 0)
		if err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
			return fmt.Errorf("set attribute %.100q: %w", name, err)
		}
	}
	return nil
}

// capability checks a vfs_cap_data (linux/capability.h). Revision 3 names the
// user id of the user namespace it was written in, an id of the builder's
// machine; the image means its own root, which is what revision 2 says.
func capability(v []byte) ([]byte, bool) {
	const rev1, rev2, rev3 = 0x01, 0x02, 0x03
	switch {
	case len(v) == 12 && v[3] == rev1, len(v) == 20 && v[3] == rev2:
		return v, true
	case len(v) == 24 && v[3] == rev3:
		v2 := append([]byte(nil), v[:20]...)
		v2[3] = rev2
		return v2, true
	}
	return nil, false
}

func timesOf(hdr *tar.Header) [2]unix.Timespec {
	m, a := hdr.ModTime, hdr.AccessTime
	if a.IsZero() {
		a = m
	}
	conv := func(sec int64, nsec int) unix.Timespec { return unix.Timespec{Sec: sec, Nsec: int64(nsec)} }
	return [2]unix.Timespec{conv(a.Unix(), a.Nanosecond()), conv(m.Unix(), m.Nanosecond())}
}

// whiteout deletes a name of the layers below, or all names of a folder. It
// says nothing about this layer's own entries (OCI image-spec, layer.md).
func (e *extractor) whiteout(hdr *tar.Header, name string) error {
	dir, base := path.Split(name)
	dir = path.Clean(dir)
	for _, c := range strings.Split(name[1:], "/") {
		switch c {
		case ".wh..wh.plnk", ".wh..wh.aufs", ".wh..wh.orph":
			return nil // AUFS kept its own data there
		}
	}
	if strings.Contains(dir+"/", "/"+whiteoutPrefix) {
		return badf("a folder of its name starts with %s", whiteoutPrefix)
	}
	if hdr.Typeflag != tar.TypeReg && hdr.Typeflag != tar.TypeLink {
		return badf("a whiteout must be a plain file")
	}
	target := strings.TrimPrefix(base, whiteoutPrefix)
	opaque := base == ".wh..wh..opq"
	if !opaque && (target == "" || target == "." || target == ".." || strings.HasPrefix(target, whiteoutPrefix)) {
		return badf("it is not the name of a whiteout")
	}
	parent, err := e.parent(dir, 0)
	if err != nil {
		return err
	}
	if !opaque {
		return e.delete(parent, target, path.Join(dir, target))
	}
	var now, root unix.Stat_t
	if err := errors.Join(unix.Fstat(parent, &now), unix.Fstat(e.root, &root)); err != nil {
		return err
	}
	if now.Ino == root.Ino { // also by way of a link
		e.res.RootOpaque = true
		return nil
	}
	return e.markOpaque(parent, ".", dir)
}

// delete hides name of the layers below.
func (e *extractor) delete(parent int, name, full string) error {
	err := unix.Mknodat(parent, name, unix.S_IFCHR, 0)
	if errors.Is(err, unix.EEXIST) {
		// This layer has the name too: its object hides what is below, a
		// folder only when it says so.
		var st unix.Stat_t
		if err := unix.Fstatat(parent, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
		if st.Mode&unix.S_IFMT == unix.S_IFDIR {
			return e.markOpaque(parent, name, full)
		}
		return nil
	}
	if err == nil {
		e.made(0)
	}
	return err
}

func (e *extractor) markOpaque(parent int, name, full string) error {
	fd, err := openDir(parent, name)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	return e.setOpaque(fd, full)
}

// isWhiteout: only whiteouts are 0:0 devices, the archive's own are refused.
func isWhiteout(st *unix.Stat_t) bool {
	return st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0
}

// replace removes what an earlier entry of the archive made under this name.
func (e *extractor) replace(parent int, base string) error {
	e.cache.flush()
	var st unix.Stat_t
	if err := unix.Fstatat(parent, base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		if st.Nlink == 1 {
			e.res.Inodes--
			e.res.Bytes -= min(e.res.Bytes, blocks(st.Size))
		}
		return unix.Unlinkat(parent, base, 0)
	}
	return tree.Remove(e.ctx, parent, base, e.root)
}
