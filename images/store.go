package images

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/platforms"
	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/images/internal/tree"
	"github.com/naru-project/naru/images/layers"
	"github.com/naru-project/naru/internal/atomicfile"
	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/sys"
)

// Store holds the images of a node and the writable folders of its containers.
//
//	<root>/images/<algorithm>-<hex>.json   one record per image, the last thing a pull writes
//	<root>/layers/<n>                      one unpacked layer
//	<root>/holds/<owner>.json              the layers that a container uses
//	<root>/writable/<container>/{upper,work}
//	<root>/places                          the mount points below all layers
//	<root>/quarantine                      records that could not be read
//	<root>/trash                           what waits to be removed
//	<root>/lock                            held while the store is open
//
// Locks: commit (a one-slot channel) serialises changes of records, with their
// IO; mu guards the tables below it and is never held over IO; commit is taken
// before mu. Readers take the snapshot and no lock.
type Store struct {
	cfg      Config
	live     atomic.Pointer[Live]
	platform platforms.MatchComparer
	mount    string // mount point of the file system of root
	device   string // what is mounted there
	trash    *tree.Trash
	layers   *layers.Store
	budget   *semaphore.Weighted
	dirs     dirs

	life context.Context //nolint:containedctx // of pulls, which outlive their callers' deadlines; ended by Close
	end  context.CancelCauseFunc
	work sync.WaitGroup

	snap   atomic.Pointer[snapshot]
	commit chan struct{}

	mu     sync.Mutex
	closed bool
	images map[string]*stored // by ID
	seq    uint64             // of the newest tag
	holds  map[string]*hold   // by owner
	pulls  map[string]*pull
	usage  map[string]*usage // by container
	meters chan struct{}     // bounds the measurements under way

	spare     chan string // writable folders that wait for a container
	spares    atomic.Uint64
	hasPlaces atomic.Bool
}

// dirs are the store's folders, held open.
type dirs struct {
	root, images, holds, writable, quarantine *os.File
	lock                                      *os.File
}

func (d *dirs) close() {
	for _, f := range []*os.File{d.images, d.holds, d.writable, d.quarantine, d.root, d.lock} {
		if f != nil {
			_ = f.Close()
		}
	}
}

var errClosed = errs.New(errs.Unavailable, "the image store is closing")

// Open opens the store, making it when it is absent. Records that cannot be
// read, and images with a layer missing, are moved to quarantine and logged;
// they never keep the others from being served.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	cfg = cfg.orDefault()
	s := &Store{
		cfg: cfg, platform: platforms.Only(platforms.DefaultSpec()),
		budget: semaphore.NewWeighted(int64(cfg.MaxTransfers)), commit: make(chan struct{}, 1),
		images: map[string]*stored{}, holds: map[string]*hold{}, pulls: map[string]*pull{},
		usage: map[string]*usage{}, meters: make(chan struct{}, 2), spare: make(chan string, maxSpare),
	}
	s.live.Store(cfg.Live.orDefault())
	s.cfg.Live = Live{} // read by s.live alone
	s.life, s.end = context.WithCancelCause(context.WithoutCancel(ctx))
	s.snap.Store(&snapshot{})
	if err := s.open(ctx); err != nil {
		_ = s.Close()
		return nil, fmt.Errorf("open image store: %w", err)
	}
	return s, nil
}

func (s *Store) open(ctx context.Context) error {
	if !filepath.IsAbs(s.cfg.Root) {
		return errs.New(errs.InvalidArgument, "root %q is not an absolute path", s.cfg.Root)
	}
	if err := s.openDirs(); err != nil {
		return err
	}
	var err error
	if s.trash, err = tree.OpenTrash(ctx, filepath.Join(s.cfg.Root, "trash")); err != nil {
		return err
	}
	if s.layers, err = layers.Open(filepath.Join(s.cfg.Root, "layers"), s.trash); err != nil {
		return err
	}
	for _, dir := range []*os.File{s.dirs.images, s.dirs.holds} {
		if err := atomicfile.CleanTemp(dir.Name()); err != nil {
			return fmt.Errorf("remove unfinished files: %w", err)
		}
	}
	if err := s.removeSpare(); err != nil {
		return fmt.Errorf("remove spare folders: %w", err)
	}
	if s.mount, s.device, err = mountOf(s.dirs.root); err != nil {
		return err
	}
	return s.recover(ctx)
}

// openDirs makes the folders and tightens them: nobody but root may get at
// set-uid programs and secrets in root file systems (CVE-2021-41103).
func (s *Store) openDirs() error {
	if err := os.MkdirAll(s.cfg.Root, 0o700); err != nil {
		return err
	}
	root, err := filepath.EvalSymlinks(s.cfg.Root)
	if err != nil {
		return err
	}
	s.cfg.Root = root
	for _, d := range []struct {
		name string
		file **os.File
	}{
		{"", &s.dirs.root}, {"images", &s.dirs.images}, {"holds", &s.dirs.holds}, {"writable", &s.dirs.writable},
		{"quarantine", &s.dirs.quarantine}, {"layers", nil}, {"trash", nil},
	} {
		path := filepath.Join(root, d.name)
		f, err := private(path)
		if err != nil {
			return err
		}
		if d.file == nil {
			_ = f.Close()
			continue
		}
		*d.file = f
	}
	s.dirs.lock, err = os.OpenFile(filepath.Join(root, "lock"), os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	if err := unix.Flock(int(s.dirs.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return errs.New(errs.FailedPrecondition, "another process uses %s: %w", root, err)
	}
	return nil
}

// private opens a folder, made if absent, with mode 0700 and owned by us.
func private(path string) (*os.File, error) {
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && st.Mode().Perm() != 0o700 {
		err = f.Chmod(0o700)
	}
	if err == nil {
		if sys, ok := st.Sys().(*unixStat); ok && (int(sys.Uid) != os.Geteuid()) {
			err = f.Chown(os.Geteuid(), os.Getegid())
		}
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("make %s private: %w", path, err)
	}
	return f, nil
}

// Close ends the pulls and measurements under way and waits for them. A second
// Close does nothing.
func (s *Store) Close() error {
	s.mu.Lock()
	again := s.closed
	s.closed = true
	s.mu.Unlock()
	if again {
		return nil
	}
	s.end(errClosed)
	s.work.Wait()
	all := []error{s.removeSpare()}
	if s.trash != nil {
		all = append(all, s.trash.Close())
	}
	if s.layers != nil {
		all = append(all, s.layers.Close())
	}
	s.dirs.close()
	return errors.Join(all...)
}

// begin starts a goroutine that Close waits for, unless the store is closing.
// The caller holds mu.
func (s *Store) begin(fn func()) bool {
	if s.closed {
		return false
	}
	s.work.Go(fn)
	return true
}

// lockCommit takes the right to change records; the returned function gives it
// back.
func (s *Store) lockCommit(ctx context.Context) (func(), error) {
	select {
	case s.commit <- struct{}{}:
		return func() { <-s.commit }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for another change of the image store: %w", context.Cause(ctx))
	}
}

// FsInfo is what images take, as counted when they were unpacked, and where.
func (s *Store) FsInfo() (FsInfo, error) {
	bytes, inodes := s.layers.Usage()
	return FsInfo{Mountpoint: s.mount, Usage: Usage{Bytes: bytes, Inodes: inodes, Time: time.Now()}}, nil
}

// Disk tells how large the file system is that images and writable folders live
// on, and what is left of it.
func (s *Store) Disk() (Disk, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(sys.FD(s.dirs.writable), &st); err != nil {
		return Disk{}, errs.New(errs.Internal, "ask for the size of the file system at %s: %w", s.mount, err)
	}
	return Disk{
		Device: strings.ToValidUTF8(s.device, "?"), Bytes: st.Blocks * uint64(st.Frsize), Inodes: st.Files, InodesFree: st.Ffree, Time: time.Now(),
	}, nil
}
