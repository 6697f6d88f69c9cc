// Package layers keeps the unpacked layers of a node: one folder each, with a
// short numeric name (mount options are short), shared by diff ID.
//
// A layer is there from the moment its content was verified and its folder
// renamed into place, and as long as somebody holds a reference. What a crash
// leaves behind (half-made folders, layers that no record names) Collect
// removes. Which images and containers use which layers is the caller's to
// remember.
//
// Concurrency: all methods may be called concurrently. mu guards the tables
// and is never held over IO.
package layers

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/images/internal/tree"
	"github.com/naru-project/naru/images/unpack"
	"github.com/naru-project/naru/internal/errs"
)

// Info describes a layer, for the records of its users.
type Info struct {
	Dir    int           `json:"dir"`
	DiffID digest.Digest `json:"diffID"`
	// Blob is the packed form that was seen to unpack to DiffID; empty when the
	// layer came without one.
	Blob       digest.Digest `json:"blob,omitempty"`
	Bytes      uint64        `json:"bytes"`
	Inodes     uint64        `json:"inodes"`
	RootOpaque bool          `json:"rootOpaque,omitempty"`
}

// Layer is one reference to a layer. The fields do not change.
type Layer struct {
	Info
	l *entry
}

type entry struct {
	info   Info
	blobs  map[digest.Digest]bool // guarded by Store.mu, as refs and synced
	refs   int
	synced bool
}

// Store is the set of layers below one folder.
type Store struct {
	root  string
	dir   *os.File
	trash *tree.Trash

	mu     sync.Mutex
	byDir  map[int]*entry
	byDiff map[digest.Digest]*entry
	making map[want]chan struct{}
	next   int
	sum    tree.Usage
}

type want struct{ diff, blob digest.Digest }

const tmpPrefix = "tmp-"

// Open opens the store below root; trash takes what is removed.
func Open(root string, trash *tree.Trash) (*Store, error) {
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, fmt.Errorf("make layers folder: %w", err)
	}
	dir, err := os.Open(root)
	if err != nil {
		return nil, fmt.Errorf("open layers folder: %w", err)
	}
	s := &Store{
		root: root, dir: dir, trash: trash, next: 1,
		byDir: map[int]*entry{}, byDiff: map[digest.Digest]*entry{}, making: map[want]chan struct{}{},
	}
	names, err := dir.Readdirnames(-1)
	if err != nil {
		_ = dir.Close()
		return nil, fmt.Errorf("read layers folder: %w", err)
	}
	for _, name := range names {
		if n, err := strconv.Atoi(name); err == nil && n >= s.next {
			s.next = n + 1
		}
	}
	return s, nil
}

// Close releases what the store holds open.
func (s *Store) Close() error { return s.dir.Close() }

// Restore takes up a layer from a record, with one reference.
func (s *Store) Restore(i Info) (*Layer, error) {
	if i.Dir <= 0 {
		return nil, errs.New(errs.FailedPrecondition, "restore layer %s: its folder number is %d", i.DiffID, i.Dir)
	}
	var st unix.Stat_t
	err := unix.Fstatat(int(s.dir.Fd()), strconv.Itoa(i.Dir), &st, unix.AT_SYMLINK_NOFOLLOW)
	if err == nil && st.Mode&unix.S_IFMT != unix.S_IFDIR {
		err = unix.ENOTDIR
	}
	if err != nil {
		return nil, errs.New(errs.NotFound, "restore layer %s: folder %d: %w", i.DiffID, i.Dir, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.byDir[i.Dir]
	switch {
	case e == nil:
		e = s.insert(i, true)
	case e.info.DiffID != i.DiffID:
		return nil, errs.New(errs.FailedPrecondition, "restore layer %s: folder %d is layer %s", i.DiffID, i.Dir, e.info.DiffID)
	}
	return s.ref(e, i.Blob), nil
}

// insert adds a layer to the tables. The caller holds mu.
func (s *Store) insert(i Info, synced bool) *entry {
	e := &entry{info: i, blobs: map[digest.Digest]bool{}, synced: synced}
	s.byDir[i.Dir] = e
	if s.byDiff[i.DiffID] == nil {
		s.byDiff[i.DiffID] = e
	}
	s.sum.Bytes += i.Bytes
	s.sum.Inodes += i.Inodes
	return e
}

// ref counts one more user. The caller holds mu.
func (s *Store) ref(e *entry, blob digest.Digest) *Layer {
	e.refs++
	if blob != "" {
		e.blobs[blob] = true
	}
	info := e.info
	info.Blob = blob
	return &Layer{Info: info, l: e}
}

// Has reports whether Ensure would find the layer.
func (s *Store) Has(diff, blob digest.Digest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.find(want{diff, blob}) != nil
}

// find returns the layer only when this very blob was seen to unpack to it:
// an image that names a diff ID it has no blob for does not get the layer of
// another image. The caller holds mu.
func (s *Store) find(w want) *entry {
	e := s.byDiff[w.diff]
	if e == nil || w.blob != "" && !e.blobs[w.blob] {
		return nil
	}
	return e
}

// Ensure returns a reference to the layer diff that comes as blob (empty: as
// any), after calling fill with a new empty folder when it is not there.
// Callers that want the same at the same time share one fill.
func (s *Store) Ensure(ctx context.Context, diff, blob digest.Digest, fill func(context.Context, *os.File) (unpack.Result, error)) (*Layer, error) {
	w := want{diff, blob}
	for {
		s.mu.Lock()
		if e := s.find(w); e != nil {
			defer s.mu.Unlock()
			return s.ref(e, blob), nil
		}
		busy := s.making[w]
		if busy == nil {
			busy = make(chan struct{})
			s.making[w] = busy
			s.mu.Unlock()
			l, err := s.make(ctx, w, fill)
			s.mu.Lock()
			delete(s.making, w)
			s.mu.Unlock()
			close(busy)
			return l, err
		}
		s.mu.Unlock()
		select {
		case <-busy: // there now, or the other one failed and it is our turn
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

func (s *Store) make(ctx context.Context, w want, fill func(context.Context, *os.File) (unpack.Result, error)) (_ *Layer, err error) {
	tmp, err := os.MkdirTemp(s.root, tmpPrefix)
	if err != nil {
		return nil, noSpace("make layer folder", err)
	}
	name := filepath.Base(tmp)
	kept := false
	defer func() {
		if !kept {
			err = errors.Join(err, s.trash.Put(int(s.dir.Fd()), name))
		}
	}()
	dir, err := os.Open(tmp)
	if err != nil {
		return nil, err
	}
	defer func() { _ = dir.Close() }()
	if err := dir.Chmod(0o755); err != nil { // when the layer has no entry for its root
		return nil, err
	}
	res, err := fill(ctx, dir)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	if e := s.byDiff[w.diff]; e != nil { // the same content, packed in another way
		defer s.mu.Unlock()
		return s.ref(e, w.blob), nil
	}
	n := s.next
	s.next++
	s.mu.Unlock()
	if err := unix.Renameat(int(s.dir.Fd()), name, int(s.dir.Fd()), strconv.Itoa(n)); err != nil {
		return nil, fmt.Errorf("put layer folder in place: %w", err)
	}
	name = strconv.Itoa(n)
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.byDiff[w.diff]; e != nil {
		return s.ref(e, w.blob), nil
	}
	kept = true
	e := s.insert(Info{Dir: n, DiffID: w.diff, Bytes: res.Bytes, Inodes: res.Inodes, RootOpaque: res.RootOpaque}, false)
	return s.ref(e, w.blob), nil
}

func noSpace(what string, err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return errs.New(errs.ResourceExhausted, "%s: %w", what, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// Share returns a further reference to a layer.
func (s *Store) Share(l *Layer) *Layer {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ref(l.l, l.Blob)
}

// Release gives references back. A layer without any is gone at once; its
// folder is removed in the background.
func (s *Store) Release(ls ...*Layer) error {
	var gone []int
	s.mu.Lock()
	for _, l := range ls {
		e := l.l
		if e.refs--; e.refs > 0 {
			continue
		}
		delete(s.byDir, e.info.Dir)
		if s.byDiff[e.info.DiffID] == e {
			delete(s.byDiff, e.info.DiffID)
		}
		s.sum.Bytes -= e.info.Bytes
		s.sum.Inodes -= e.info.Inodes
		gone = append(gone, e.info.Dir)
	}
	s.mu.Unlock()
	var all []error
	for _, n := range gone {
		all = append(all, s.trash.Put(int(s.dir.Fd()), strconv.Itoa(n)))
	}
	return errors.Join(all...)
}

// Sync has the layers on the disk when it returns, by one syncfs(2) for all
// of them, none when they already are.
func (s *Store) Sync(ls []*Layer) error {
	s.mu.Lock()
	need := false
	for _, l := range ls {
		need = need || !l.l.synced
	}
	s.mu.Unlock()
	if !need {
		return nil
	}
	if err := unix.Syncfs(int(s.dir.Fd())); err != nil {
		return noSpace("sync layers", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, l := range ls {
		l.l.synced = true
	}
	return nil
}

// Collect removes folders that no reference keeps, except those with a number
// in keep. It is called once, after the records were read.
func (s *Store) Collect(keep map[int]bool) error {
	names, err := os.ReadDir(s.root)
	if err != nil {
		return fmt.Errorf("read layers folder: %w", err)
	}
	var all []error
	for _, d := range names {
		n, err := strconv.Atoi(d.Name())
		s.mu.Lock()
		used := err == nil && (s.byDir[n] != nil || keep[n])
		s.mu.Unlock()
		if !used && (err == nil || strings.HasPrefix(d.Name(), tmpPrefix)) {
			all = append(all, s.trash.Put(int(s.dir.Fd()), d.Name()))
		}
	}
	return errors.Join(all...)
}

// Path is the folder of a layer.
func (s *Store) Path(i Info) string { return filepath.Join(s.root, strconv.Itoa(i.Dir)) }

// Usage is the sum over all layers, as counted when they were unpacked.
func (s *Store) Usage() (bytes, inodes uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.sum.Bytes, s.sum.Inodes
}

// Stack orders the layers of an image, given base first, as overlayfs takes
// them: topmost first. A layer that is there twice counts where it is topmost
// (below, everything it says is said again above, and overlayfs refuses a
// folder twice); below a layer that hides everything there is nothing.
func (s *Store) Stack(baseFirst []Info) []string {
	var out []string
	seen := map[int]bool{}
	for i := len(baseFirst) - 1; i >= 0; i-- {
		l := baseFirst[i]
		if !seen[l.Dir] {
			seen[l.Dir] = true
			out = append(out, s.Path(l))
		}
		if l.RootOpaque {
			break
		}
	}
	return out
}
