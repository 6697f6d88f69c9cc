package images

import (
	"archive/tar"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
)

const (
	whiteoutPrefix = ".wh."
	opaqueMarker   = ".wh..wh..opq"
	// maxDiffDepth bounds the folders within folders that are written; each of
	// them is open meanwhile.
	maxDiffDepth = 512
)

// WriteDiff writes what a container changed in its root file system as a tar
// archive in the form of a layer: whiteouts and all (OCI image-spec, layer.md).
// The container may go on changing it; what vanishes meanwhile is left out.
func (s *Store) WriteDiff(ctx context.Context, containerID string, w io.Writer) error {
	if err := checkName("container", containerID); err != nil {
		return err
	}
	root, err := os.OpenRoot(filepath.Join(s.dirs.writable.Name(), containerID, upperName))
	if errors.Is(err, fs.ErrNotExist) {
		return errs.New(errs.NotFound, "container %s has no writable folder", containerID)
	}
	if err != nil {
		return errs.New(errs.Internal, "open writable folder: %w", err)
	}
	defer func() { _ = root.Close() }()
	d := &differ{out: tar.NewWriter(w), links: map[[2]uint64]string{}}
	if err := d.folder(ctx, root, ".", 0); err != nil {
		return errs.New(errs.Of(err), "write the changes of container %s: %w", containerID, err)
	}
	if err := d.out.Close(); err != nil {
		return noSpace("write the changes of a container", err)
	}
	return nil
}

// differ writes one tree. Names are resolved one at a time, in folders that are
// held open, whatever the container makes of them meanwhile.
type differ struct {
	out   *tar.Writer
	links map[[2]uint64]string // device and inode → first name
}

// folder writes the folder dir, whose name in the archive is name.
func (d *differ) folder(ctx context.Context, dir *os.Root, name string, depth int) error {
	if depth > maxDiffDepth {
		return errs.New(errs.ResourceExhausted, "folders lie more than %d deep", maxDiffDepth)
	}
	f, err := dir.Open(".")
	if err != nil {
		return vanished(err)
	}
	defer func() { _ = f.Close() }()
	if name != "." {
		if err := d.folderHeader(name, f); err != nil {
			return err
		}
	}
	for {
		list, err := f.ReadDir(256)
		for _, e := range list {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if err := d.entry(ctx, dir, e.Name(), path.Join(name, e.Name()), depth); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return vanished(err)
		}
	}
}

func (d *differ) folderHeader(name string, f *os.File) error {
	if has(f, "trusted.overlay.redirect") {
		return errs.New(errs.Unimplemented, "%s was renamed as a whole by overlayfs (redirect_dir), which a layer cannot say", name)
	}
	st, err := f.Stat()
	if err != nil {
		return err
	}
	h, err := header(name+"/", st, "", f)
	if err != nil {
		return err
	}
	if err := d.out.WriteHeader(h); err != nil {
		return noSpace("write "+name, err)
	}
	if !has(f, "trusted.overlay.opaque") {
		return nil
	}
	return d.marker(path.Join(name, opaqueMarker))
}

func (d *differ) marker(name string) error {
	return noSpaceOrNil(d.out.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o600, Format: tar.FormatPAX}))
}

// entry writes what is called base in dir, and name in the archive.
func (d *differ) entry(ctx context.Context, dir *os.Root, base, name string, depth int) error {
	st, err := dir.Lstat(base)
	if err != nil {
		return vanished(err)
	}
	raw, _ := st.Sys().(*syscall.Stat_t)
	switch mode := st.Mode(); {
	case mode.IsDir():
		sub, err := dir.OpenRoot(base)
		if err != nil {
			return vanished(err)
		}
		defer func() { _ = sub.Close() }()
		return d.folder(ctx, sub, name, depth+1)
	case mode&os.ModeCharDevice != 0 && raw != nil && raw.Rdev == 0:
		return d.marker(path.Join(path.Dir(name), whiteoutPrefix+path.Base(name)))
	case mode&os.ModeSocket != 0: // a layer has none
		return nil
	}
	if raw != nil && raw.Nlink > 1 {
		key := [2]uint64{raw.Dev, raw.Ino}
		if first, ok := d.links[key]; ok {
			return noSpaceOrNil(d.out.WriteHeader(&tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: first, Mode: int64(st.Mode().Perm()), Format: tar.FormatPAX}))
		}
		d.links[key] = name
	}
	if st.Mode().IsRegular() {
		return d.file(ctx, dir, base, name)
	}
	link := ""
	if st.Mode()&os.ModeSymlink != 0 {
		if link, err = dir.Readlink(base); err != nil {
			return vanished(err)
		}
	}
	h, err := header(name, st, link, nil)
	if err != nil {
		return err
	}
	return noSpaceOrNil(d.out.WriteHeader(h))
}

// file writes a regular file. One that shrinks meanwhile is filled with zeros,
// one that grows is cut.
func (d *differ) file(ctx context.Context, dir *os.Root, base, name string) error {
	// Not blocking: it may have become a FIFO.
	f, err := dir.OpenFile(base, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return vanished(err)
	}
	defer func() { _ = f.Close() }()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() {
		return nil
	}
	h, err := header(name, st, "", f)
	if err != nil {
		return err
	}
	if err := d.out.WriteHeader(h); err != nil {
		return noSpace("write "+name, err)
	}
	n, err := io.Copy(d.out, io.LimitReader(&cancelled{ctx, f}, h.Size))
	if err == nil && n < h.Size {
		_, err = io.CopyN(d.out, zeros{}, h.Size-n)
	}
	if err != nil {
		return noSpace("write "+name, err)
	}
	return nil
}

// header describes one entry. f, if any, has its extended attributes.
func header(name string, st fs.FileInfo, link string, f *os.File) (*tar.Header, error) {
	h, err := tar.FileInfoHeader(st, link)
	if err != nil {
		return nil, errs.New(errs.Internal, "describe %s: %w", name, err)
	}
	// Users by number alone: the node's names mean nothing in the container.
	h.Name, h.Uname, h.Gname, h.Format = name, "", "", tar.FormatPAX
	if f == nil {
		return h, nil
	}
	for _, key := range attributes(f) {
		if v, ok := attribute(f, key); ok {
			if h.PAXRecords == nil {
				h.PAXRecords = map[string]string{}
			}
			h.PAXRecords["SCHILY.xattr."+key] = v
		}
	}
	return h, nil
}

// attributes lists what a layer may carry: user's own and file capabilities.
func attributes(f *os.File) (keys []string) {
	n, err := unix.Flistxattr(int(f.Fd()), nil)
	if err != nil || n <= 0 {
		return nil
	}
	buf := make([]byte, n)
	if n, err = unix.Flistxattr(int(f.Fd()), buf); err != nil {
		return nil
	}
	for key := range strings.SplitSeq(string(buf[:n]), "\x00") {
		if strings.HasPrefix(key, "user.") || key == "security.capability" {
			keys = append(keys, key)
		}
	}
	return keys
}

func attribute(f *os.File, key string) (string, bool) {
	buf := make([]byte, 64<<10) // XATTR_SIZE_MAX
	n, err := unix.Fgetxattr(int(f.Fd()), key, buf)
	if err != nil {
		return "", false
	}
	return string(buf[:n]), true
}

func has(f *os.File, key string) bool {
	_, ok := attribute(f, key)
	return ok
}

// vanished turns the error of what is no longer there into none.
func vanished(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENOTDIR) {
		return nil
	}
	return errs.New(errs.Internal, "%w", err)
}

func noSpaceOrNil(err error) error {
	if err == nil {
		return nil
	}
	return noSpace("write the changes of a container", err)
}

// cancelled ends a long copy with its context.
type cancelled struct {
	ctx context.Context //nolint:containedctx // lives for one copy
	r   io.Reader
}

func (c *cancelled) Read(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	return c.r.Read(p)
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}
