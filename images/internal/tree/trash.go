package tree

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

// Trash is a folder in which things wait to be removed. Putting something
// there is one rename; one goroutine, there only while there is work, removes
// what lies in it.
type Trash struct {
	dir    *os.File
	ctx    context.Context //nolint:containedctx // the life of the worker, ended by Close
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu      sync.Mutex
	next    uint64
	waiting []string
	working bool
}

// OpenTrash opens the folder path, making it when it is absent. What an
// earlier process left there is removed too.
func OpenTrash(ctx context.Context, path string) (*Trash, error) {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, fmt.Errorf("make trash folder: %w", err)
	}
	dir, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open trash folder: %w", err)
	}
	names, err := dir.Readdirnames(-1)
	if err != nil {
		_ = dir.Close()
		return nil, fmt.Errorf("read trash folder: %w", err)
	}
	t := &Trash{dir: dir}
	t.ctx, t.cancel = context.WithCancel(context.WithoutCancel(ctx))
	t.mu.Lock()
	defer t.mu.Unlock()
	t.waiting = names
	t.work()
	return t, nil
}

// Put moves name out of the directory dirfd, on the same file system, and has
// it removed soon. Absent is no error.
func (t *Trash) Put(dirfd int, name string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	for {
		t.next++
		to := strconv.Itoa(os.Getpid()) + "-" + strconv.FormatUint(t.next, 10)
		err := unix.Renameat2(dirfd, name, int(t.dir.Fd()), to, unix.RENAME_NOREPLACE)
		switch {
		case errors.Is(err, unix.EEXIST):
			continue
		case errors.Is(err, unix.ENOENT):
			return nil
		case err != nil:
			return fmt.Errorf("move %.100q to trash: %w", name, err)
		}
		t.waiting = append(t.waiting, to)
		t.work()
		return nil
	}
}

// work starts the worker unless it runs. The caller holds mu.
func (t *Trash) work() {
	if t.working || len(t.waiting) == 0 || t.ctx.Err() != nil {
		return
	}
	t.working = true
	t.wg.Go(func() {
		for {
			t.mu.Lock()
			if len(t.waiting) == 0 || t.ctx.Err() != nil {
				t.working = false
				t.mu.Unlock()
				return
			}
			name := t.waiting[0]
			t.waiting = t.waiting[1:]
			t.mu.Unlock()
			if err := Remove(t.ctx, int(t.dir.Fd()), name, int(t.dir.Fd())); err != nil && t.ctx.Err() == nil {
				klog.FromContext(t.ctx).Error(err, "Removed only a part of a folder, the next start tries again", "name", name)
			}
		}
	})
}

// Empty reports whether everything put so far is removed.
func (t *Trash) Empty() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return !t.working
}

// Close stops the worker and waits for it. What is left is removed by the
// next OpenTrash.
func (t *Trash) Close() error {
	t.cancel()
	t.wg.Wait()
	return t.dir.Close()
}
