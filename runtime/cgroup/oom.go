package cgroup

import (
	"encoding/json"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"sync"

	"github.com/naru-project/naru/internal/errs"
)

// OOMKills returns how many processes of the group the OOM killer has ended.
// With the systemd driver it may be asked of a group that is gone; see ledger.
func (g *Group) OOMKills() (uint64, error) { return g.d.OOMKills(g.Path) }

// OOMKills is that of the group at path, whose processes have ended. A group
// that is gone without a trace has none.
func (d *Driver) OOMKills(path string) (uint64, error) {
	if err := checkPath(path); err != nil {
		return 0, err
	}
	n, err := d.oomKills(path)
	switch {
	case d.systemd:
		return d.ledger.settle(path, n, err)
	case errs.Is(err, errs.NotFound):
		return 0, nil
	}
	return n, err
}

// oomKills reads the kernel's count.
func (d *Driver) oomKills(path string) (uint64, error) {
	h := d.control["memory"]
	if h == nil {
		return 0, nil
	}
	file := "memory.events"
	if d.mode != ModeV2 {
		file = "memory.oom_control"
	}
	b, err := readAt(h.fd, path[1:]+"/"+file)
	if err != nil {
		return 0, classify(err, "read OOM kills of cgroup %s", path)
	}
	n, _ := keyed(b, "oom_kill")
	return n, nil
}

func (d *Driver) groupsBelow(path string) ([]string, error) {
	names, err := subdirs(d.unified.fd, path[1:], maxRemoved)
	if err != nil {
		return nil, classify(err, "list cgroups below %s", path)
	}
	return names, nil
}

// ledger accounts for the OOM kills below the slices that scopes are in.
//
// systemd removes a scope as soon as its last process has gone, and with it the
// count of its kills: under load before anybody can look, and always while the
// daemon is down. The slice stays, and its own count is that of all that is and
// was below it. So a kill there that nothing else accounts for was one of the
// scope that is gone.
//
// Two containers of one slice that end in the same moment, one of them for
// memory, cannot be told apart if both scopes are gone: the one that is asked for
// first gets the kill.
type ledger struct {
	kills func(path string) (uint64, error)
	below func(path string) ([]string, error)

	mu     sync.Mutex
	dir    string // one file for each slice; empty = remembered in memory only
	slices map[string]*account
}

// account is that of one slice.
type account struct {
	Slice string `json:"slice"`
	// Past is how many kills were those of groups that are no longer asked for.
	Past uint64 `json:"past"`
	// Ended has the kills of groups that have ended, by path, if there were any.
	Ended map[string]uint64 `json:"ended,omitempty"`
}

// open begins the account of a slice before anybody makes a scope there. What
// the kernel has counted until then is the past.
func (l *ledger) open(slice string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.get(slice) != nil {
		return nil
	}
	a := &account{Slice: slice}
	past, err := l.unaccounted(a)
	if err != nil && !errs.Is(err, errs.NotFound) {
		return err
	}
	a.Past = past
	return l.put(a)
}

// settle returns the kills of a group that has ended, of which n and err is what
// the kernel says.
func (l *ledger) settle(path string, n uint64, err error) (uint64, error) {
	if err != nil && !errs.Is(err, errs.NotFound) {
		return 0, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	a := l.get(parentOf(path))
	switch {
	case a == nil:
		return n, nil
	case err != nil && a.Ended[path] > 0:
		return a.Ended[path], nil
	case err != nil:
		if n, err = l.unaccounted(a); err != nil && !errs.Is(err, errs.NotFound) {
			return 0, err
		}
	}
	if n == 0 || a.Ended[path] == n {
		return n, nil
	}
	if a.Ended == nil {
		a.Ended = map[string]uint64{}
	}
	a.Ended[path] = n
	return n, l.put(a)
}

// forget ends the account of a group that is removed. Its kills are the past, or
// of nobody if it was never asked for: then the kernel's count, as long as there
// is one, tells.
func (l *ledger) forget(path string, n uint64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	a := l.get(parentOf(path))
	if a == nil {
		return nil
	}
	if n = max(n, a.Ended[path]); n == 0 {
		return nil
	}
	delete(a.Ended, path)
	a.Past += n
	return l.put(a)
}

// close ends the account of a slice that has no pods any more.
func (l *ledger) close(slice string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.slices, slice)
	if l.dir == "" {
		return nil
	}
	if err := os.Remove(l.file(slice)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return errs.New(errs.Internal, "forget the OOM kills of %s: %w", slice, err)
	}
	return nil
}

// unaccounted is what the slice has counted and nobody else has. mu is held.
func (l *ledger) unaccounted(a *account) (uint64, error) {
	total, err := l.kills(a.Slice) // first: what is killed meanwhile is not ours
	if err != nil || total == 0 {
		return 0, err
	}
	known := a.Past
	for n := range maps.Values(a.Ended) {
		known += n
	}
	names, err := l.below(a.Slice)
	if err != nil {
		return 0, err
	}
	for _, name := range names {
		path := a.Slice + "/" + name
		if _, ok := a.Ended[path]; ok {
			continue
		}
		if n, err := l.kills(path); err == nil {
			known += n
		} else if !errs.Is(err, errs.NotFound) {
			return 0, err
		}
	}
	return total - min(known, total), nil
}

// get returns the account of a slice, or nil. mu is held.
func (l *ledger) get(slice string) *account {
	if a := l.slices[slice]; a != nil || l.dir == "" {
		return a
	}
	b, err := os.ReadFile(l.file(slice))
	if err != nil {
		return nil
	}
	a := &account{}
	if json.Unmarshal(b, a) != nil || a.Slice != slice {
		return nil
	}
	l.slices[slice] = a
	return a
}

// put keeps an account: without fsync, as marks. mu is held.
func (l *ledger) put(a *account) error {
	l.slices[a.Slice] = a
	if l.dir == "" {
		return nil
	}
	b, err := json.Marshal(a)
	if err == nil {
		err = os.MkdirAll(l.dir, 0o700)
	}
	if err == nil {
		err = os.WriteFile(l.file(a.Slice), b, 0o600)
	}
	if err != nil {
		return errs.New(errs.Internal, "note the OOM kills of %s: %w", a.Slice, err)
	}
	return nil
}

func (l *ledger) file(slice string) string { return filepath.Join(l.dir, fileName(slice)) }
