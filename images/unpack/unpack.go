// Package unpack turns a layer, a tar archive from strangers, into a folder
// that overlayfs takes as a lower layer.
//
// The folder is one layer and nothing else: it is not unpacked over its
// parents. A name in the archive therefore means what it means in the layer's
// own tree: when "d" is a symlink of a lower layer and this layer has "d/f",
// then "d" is a folder here and hides the link, as in any overlay diff. Links
// of the same layer are followed as if its root were "/" (openat2(2) with
// RESOLVE_IN_ROOT). Whiteouts become overlayfs' own: a 0:0 character device
// for a name, trusted.overlay.opaque for a folder.
//
// Folders that the archive has no entry for are made 0755 and root's. As the
// upper one of two merged folders gives the mode, an image whose tools leave
// such entries out gets these on folders of its lower layers too.
//
// Nothing is done by path: each object is made, and given its owner, mode,
// times and attributes, relative to a descriptor of its folder or on one of
// its own. Whatever names and links the archive has, nothing outside the
// folder can be reached, and no device or FIFO is ever opened.
//
// It must not know about registries or the store. A call uses the folder alone
// and waits for the goroutines that it starts.
package unpack

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
)

// Limits bound what one layer may cost. Zero fields get the default.
type Limits struct {
	MaxBytes    int64  // apparent bytes of all files, and of the unpacked archive; default 256 GiB
	MaxEntries  int    // objects made; default 2,000,000
	MaxDepth    int    // components of a name; default 1024
	MaxXattr    int    // bytes of the attributes of one object; default 64 KiB
	MaxSparse   int64  // apparent bytes of all sparse files; default 16 GiB
	MaxRatio    int64  // unpacked to packed, once past RatioFrom; default 200
	RatioFrom   int64  // default 64 MiB
	MaxWindow   uint64 // zstd window; default 128 MiB
	ReserveFree uint64 // bytes to leave free on the file system; default 64 MiB
}

func (l Limits) orDefault() Limits {
	def := func(v *int64, d int64) {
		if *v <= 0 {
			*v = d
		}
	}
	def(&l.MaxBytes, 256<<30)
	def(&l.MaxSparse, 16<<30)
	def(&l.MaxRatio, 200)
	def(&l.RatioFrom, 64<<20)
	if l.MaxEntries <= 0 {
		l.MaxEntries = 2_000_000
	}
	if l.MaxDepth <= 0 {
		l.MaxDepth = 1024
	}
	if l.MaxXattr <= 0 {
		l.MaxXattr = 64 << 10
	}
	if l.MaxWindow == 0 {
		l.MaxWindow = 128 << 20
	}
	if l.ReserveFree == 0 {
		l.ReserveFree = 64 << 20
	}
	return l
}

// Result tells what was made.
type Result struct {
	Bytes, Inodes uint64 // on the disk, in whole blocks of 4 KiB
	// RootOpaque: the layer hides everything below it. overlayfs does not look
	// for that on the root of a lower layer, so whoever mounts must leave the
	// layers below out.
	RootOpaque bool
}

const (
	pathMax     = 4096 // PATH_MAX, linux/limits.h
	blockSize   = 4096
	copyBuffer  = 256 << 10
	freeEvery   = 64 << 20 // bytes between two looks at the free space
	maxHops     = 40       // MAXSYMLINKS, as the kernel's
	namesBuffer = 64 << 20 // bytes of names of folders that something is still to be done for
)

// Tar reads the archive r and unpacks it into dir, an empty directory that
// nobody else uses. On error dir holds a part of the layer.
func Tar(ctx context.Context, dir *os.File, r io.Reader, lim Limits) (Result, error) {
	e := &extractor{ctx: ctx, root: int(dir.Fd()), lim: lim.orDefault(), buf: make([]byte, copyBuffer)}
	defer e.cache.close()
	if err := e.checkFree(0); err != nil {
		return Result{}, errs.New(errs.ResourceExhausted, "unpack layer: %w", err)
	}
	e.made(blockSize) // the root folder
	tr := tar.NewReader(r)
	for {
		if err := ctx.Err(); err != nil {
			return Result{}, context.Cause(ctx)
		}
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil && !errors.Is(err, tar.ErrInsecurePath) {
			return Result{}, readError(err)
		}
		if err := e.entry(hdr, tr); err != nil {
			return Result{}, e.explain(hdr, err)
		}
	}
	if err := e.dropWhiteouts(); err != nil {
		return Result{}, err
	}
	e.applyTimes()
	return e.res, nil
}

// readError classes an error that came up while reading the archive: those of
// its source have a class or are the context's, the rest is the archive's.
func readError(err error) error {
	if errs.Of(err) != errs.Internal {
		return err
	}
	return errs.New(errs.FailedPrecondition, "read layer archive: %w", err)
}

// extractor unpacks one archive; it belongs to one goroutine.
type extractor struct {
	ctx      context.Context
	root     int
	lim      Limits
	res      Result
	cache    dirCache
	buf      []byte
	entries  int
	apparent int64
	sparse   int64
	unseen   int64 // bytes written since the free space was looked at
	times    []dirTime
	opaque   []string // folders
	names    int      // bytes in the names of both
}

// entry makes one object.
func (e *extractor) entry(hdr *tar.Header, r io.Reader) error {
	e.cache.reap()
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	name, err := e.clean(hdr.Name)
	if err != nil {
		return err
	}
	if name == "/" {
		return e.rootEntry(hdr)
	}
	if err := e.count(); err != nil {
		return err
	}
	base := path.Base(name)
	if i := strings.Index(name, "/"+whiteoutPrefix); i >= 0 {
		return e.whiteout(hdr, name)
	}
	if err := checkIDs(hdr); err != nil {
		return err
	}
	parent, err := e.parent(path.Dir(name), 0)
	if err != nil {
		return err
	}
	switch hdr.Typeflag {
	case tar.TypeDir:
		return e.dir(parent, base, name, hdr)
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		return e.file(parent, base, hdr, r)
	case tar.TypeSymlink:
		return e.symlink(parent, base, hdr)
	case tar.TypeLink:
		return e.hardlink(parent, base, hdr)
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		return e.node(parent, base, hdr)
	}
	return badf("its type %q is not supported", hdr.Typeflag)
}

// clean gives a name the form "/a/b". ".." ends at the root, as in "/".
func (e *extractor) clean(name string) (string, error) {
	if len(name) > pathMax {
		return "", badf("its name has %d bytes, more than %d", len(name), pathMax)
	}
	if strings.ContainsRune(name, 0) {
		return "", badf("its name has a NUL byte")
	}
	c := path.Clean("/" + name)
	if n := strings.Count(c, "/"); n > e.lim.MaxDepth {
		return "", limitf("its name has %d components, more than %d", n, e.lim.MaxDepth)
	}
	return c, nil
}

// rootEntry sets owner, mode and attributes of the layer's root. Anything but
// a folder there would replace the root itself (CVE-2021-29136); a mode by
// which nobody could enter it says nothing.
func (e *extractor) rootEntry(hdr *tar.Header) error {
	if hdr.Typeflag != tar.TypeDir {
		return badf("it would replace the root folder")
	}
	if err := checkIDs(hdr); err != nil {
		return err
	}
	if hdr.Mode&0o111 == 0 {
		hdr.Mode = 0o755
	}
	if err := e.attributes(e.root, hdr, unix.S_IFDIR); err != nil {
		return err
	}
	e.later("/", hdr)
	return nil
}

func (e *extractor) count() error {
	if e.entries++; e.entries > e.lim.MaxEntries {
		return limitf("the layer has more than %d entries", e.lim.MaxEntries)
	}
	return nil
}

func (e *extractor) made(bytes int64) {
	e.res.Inodes++
	e.res.Bytes += blocks(bytes)
}

func blocks(n int64) uint64 {
	return uint64(n+blockSize-1) / blockSize * blockSize
}

// checkIDs refuses ids that do not fit, and (uid_t)-1, which chown(2) takes as
// "leave it".
func checkIDs(hdr *tar.Header) error {
	const top = 1<<32 - 2
	if hdr.Uid < 0 || int64(hdr.Uid) > top || hdr.Gid < 0 || int64(hdr.Gid) > top {
		return badf("its owner %d:%d is out of range", hdr.Uid, hdr.Gid)
	}
	return nil
}

// checkFree keeps a reserve on the file system, so that a big layer does not
// stop everything else on the node.
func (e *extractor) checkFree(more int64) error {
	if e.unseen += more; more > 0 && e.unseen < freeEvery {
		return nil
	}
	e.unseen = 0
	var st unix.Statfs_t
	if err := unix.Fstatfs(e.root, &st); err != nil {
		return fmt.Errorf("look at the free space: %w", err)
	}
	if free := st.Bavail * uint64(st.Bsize); free < e.lim.ReserveFree+uint64(max(more, 0)) {
		return limitf("%d MiB are left on the file system of the images, %d MiB are kept in reserve", free>>20, e.lim.ReserveFree>>20)
	}
	return nil
}

// errBad marks what is the archive's fault, errLimit what is over a limit.
var (
	errBad   = errors.New("bad layer")
	errLimit = errors.New("limit")
)

type entryError struct {
	kind error
	text string
}

func (e *entryError) Error() string { return e.text }
func (e *entryError) Unwrap() error { return e.kind }

func badf(format string, args ...any) error {
	return &entryError{errBad, fmt.Sprintf(format, args...)}
}

func limitf(format string, args ...any) error {
	return &entryError{errLimit, fmt.Sprintf(format, args...)}
}

// explain names the entry and gives the error its class.
func (e *extractor) explain(hdr *tar.Header, err error) error {
	class := errs.Of(err)
	var no unix.Errno
	switch {
	case errors.Is(err, errLimit):
		class = errs.ResourceExhausted
	case errors.Is(err, errBad):
		class = errs.FailedPrecondition
	case class != errs.Internal:
		return err // of the source or the context
	case errors.As(err, &no):
		switch no {
		case unix.ENOSPC, unix.EDQUOT, unix.EMLINK:
			class = errs.ResourceExhausted
		case unix.ENAMETOOLONG, unix.ELOOP, unix.ENOTDIR, unix.EINVAL, unix.ENOENT, unix.EILSEQ, unix.EXDEV, unix.EOVERFLOW:
			class = errs.FailedPrecondition
		}
	}
	return errs.New(class, "unpack %.200q: %w", hdr.Name, err)
}
