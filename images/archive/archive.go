// Package archive reads images from files: what "docker save" writes, an OCI
// image layout as a tar archive, or one as a folder.
//
// Archives come from strangers too. Nothing is unpacked: a tar archive is
// indexed by name and its members are read where they lie; in a folder, files
// are opened below it without following any link. Documents have the same
// limits as those of a registry.
//
// It must not know about registries or the store. An Archive may be used
// concurrently.
package archive

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/images/manifest"
	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/sys"
)

const (
	maxMembers = 100_000
	maxNames   = 64 << 20 // bytes of all names
	maxImages  = 256
)

// Archive is an opened archive or folder.
type Archive struct {
	files interface {
		open(name string) (io.ReadCloser, int64, error)
		has(name string) bool
		close() error
	}
}

// Close releases the archive.
func (a *Archive) Close() error { return a.files.close() }

// OpenTar indexes a tar archive that is not compressed. It takes over f.
func OpenTar(ctx context.Context, f *os.File) (*Archive, error) {
	t := &tarFiles{f: f, members: map[string]member{}}
	if err := t.index(ctx); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &Archive{t}, nil
}

// OpenDir opens an OCI image layout in a folder.
func OpenDir(path string) (*Archive, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, errs.New(errs.InvalidArgument, "open image layout: %w", err)
	}
	return &Archive{&dirFiles{f}}, nil
}

// read returns a small file as a whole.
func (a *Archive) read(name string, limit int64) ([]byte, error) {
	rc, size, err := a.files.open(name)
	if err != nil {
		return nil, err
	}
	defer func() { _ = rc.Close() }()
	if size > limit {
		return nil, errs.New(errs.ResourceExhausted, "read %.200q of the archive: %d bytes, more than %d", name, size, limit)
	}
	data, err := io.ReadAll(io.LimitReader(rc, limit+1))
	if err != nil {
		return nil, fmt.Errorf("read %.200q of the archive: %w", name, err)
	}
	if int64(len(data)) > limit {
		return nil, errs.New(errs.ResourceExhausted, "read %.200q of the archive: more than %d bytes", name, limit)
	}
	return data, nil
}

// blob returns a document and checks its digest.
func (a *Archive) blob(d digest.Digest, size, limit int64) ([]byte, error) {
	if err := manifest.CheckDigest(d); err != nil {
		return nil, err
	}
	data, err := a.read(blobPath(d), limit)
	if err != nil {
		return nil, err
	}
	if size >= 0 && int64(len(data)) != size {
		return nil, errs.New(errs.FailedPrecondition, "read %s of the archive: it has %d bytes, its descriptor says %d", d, len(data), size)
	}
	if got := d.Algorithm().FromBytes(data); got != d {
		return nil, errs.New(errs.FailedPrecondition, "read %s of the archive: its digest is %s", d, got)
	}
	return data, nil
}

func blobPath(d digest.Digest) string {
	return "blobs/" + d.Algorithm().String() + "/" + d.Encoded()
}

// member is a file in a tar archive, or a link to another name in it.
type member struct {
	off, size int64
	link      string
}

type tarFiles struct {
	f       *os.File
	members map[string]member
}

func (t *tarFiles) index(ctx context.Context) error {
	st, err := t.f.Stat()
	if err != nil {
		return fmt.Errorf("index archive: %w", err)
	}
	r := io.NewSectionReader(t.f, 0, st.Size())
	tr := tar.NewReader(r)
	names := 0
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil && !errors.Is(err, tar.ErrInsecurePath) {
			return errs.New(errs.InvalidArgument, "index archive: %w", err)
		}
		m, ok, err := memberOf(hdr, r)
		if err != nil {
			return err
		}
		if !ok {
			continue
		}
		name := strings.TrimPrefix(path.Clean("/"+hdr.Name), "/")
		if _, dup := t.members[name]; dup {
			return errs.New(errs.InvalidArgument, "index archive: %.200q is in it twice", name)
		}
		if names += len(name) + len(m.link); len(t.members) >= maxMembers || names > maxNames {
			return errs.New(errs.ResourceExhausted, "index archive: more than %d files", maxMembers)
		}
		t.members[name] = m
	}
}

func memberOf(hdr *tar.Header, r io.Seeker) (m member, ok bool, err error) {
	switch hdr.Typeflag {
	case tar.TypeReg:
	case tar.TypeSymlink, tar.TypeLink: // old "docker save" has a layer once and links to it
		to := path.Clean("/" + hdr.Linkname)
		if hdr.Typeflag == tar.TypeSymlink && !path.IsAbs(hdr.Linkname) {
			to = path.Join(path.Dir(path.Clean("/"+hdr.Name)), hdr.Linkname)
		}
		return member{link: strings.TrimPrefix(to, "/")}, true, nil
	default:
		return member{}, false, nil
	}
	for k := range hdr.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return member{}, false, errs.New(errs.InvalidArgument, "index archive: %.200q is a sparse file", hdr.Name)
		}
	}
	// archive/tar reads headers in whole blocks: it now stands at the data.
	off, err := r.Seek(0, io.SeekCurrent)
	if err != nil {
		return member{}, false, fmt.Errorf("index archive: %w", err)
	}
	return member{off: off, size: hdr.Size}, true, nil
}

func (t *tarFiles) has(name string) bool {
	m, ok := t.members[name]
	return ok && m.link == ""
}

// open follows one link, by name in the archive. Only layers may be links.
func (t *tarFiles) open(name string) (io.ReadCloser, int64, error) {
	clean := strings.TrimPrefix(path.Clean("/"+name), "/")
	m, ok := t.members[clean]
	if ok && m.link != "" && path.Base(clean) == "layer.tar" {
		m, ok = t.members[m.link]
	}
	if !ok || m.link != "" {
		return nil, 0, errs.New(errs.InvalidArgument, "the archive has no file %.200q", name)
	}
	return io.NopCloser(io.NewSectionReader(t.f, m.off, m.size)), m.size, nil
}

func (t *tarFiles) close() error { return t.f.Close() }

type dirFiles struct{ f *os.File }

func (d *dirFiles) openFile(name string) (*os.File, error) {
	const resolve = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS
	fd, err := sys.Openat2(int(d.f.Fd()), name, unix.O_RDONLY|unix.O_NONBLOCK, 0, resolve)
	if err != nil {
		return nil, errs.New(errs.InvalidArgument, "open %.200q of the image layout: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

func (d *dirFiles) open(name string) (io.ReadCloser, int64, error) {
	f, err := d.openFile(name)
	if err != nil {
		return nil, 0, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = errs.New(errs.InvalidArgument, "open %.200q of the image layout: it is not a file", name)
	}
	if err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	return f, st.Size(), nil
}

func (d *dirFiles) has(name string) bool {
	f, err := d.openFile(name)
	if err != nil {
		return false
	}
	_ = f.Close()
	return true
}

func (d *dirFiles) close() error { return d.f.Close() }
