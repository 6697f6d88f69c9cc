package stats

import (
	"context"
	goruntime "runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime"
	"github.com/naru-project/naru/runtime/cgroup"
)

// MaxAge is how old a sample that Get returns may be.
const MaxAge = time.Second

const (
	// minRate is the shortest distance of two samples that a rate is made of.
	minRate = 100 * time.Millisecond
	// forgetAfter drops cgroups that nobody asked for any more; sweepEvery says
	// after how many new ones that is looked at.
	forgetAfter = 10 * time.Minute
	sweepEvery  = 256
)

// Sampler reads and keeps samples. See the package comment.
type Sampler struct {
	layout layout
	now    func() time.Time
	// processes lists those of a cgroup and below.
	processes func(ctx context.Context, path string) ([]int, error)
	entries   sync.Map // path → *entry
	added     atomic.Uint32
	buffers   sync.Pool
}

// entry is one cgroup.
type entry struct {
	last  atomic.Pointer[runtime.Stats]
	asked atomic.Int64  // Unix nanoseconds
	turn  chan struct{} // one slot: the right to read; waiting for it honours ctx
	// The sample that the next rate starts from; guarded by turn.
	base *runtime.Stats
	rate uint64
}

// New returns a Sampler for the hierarchies of d.
func New(d *cgroup.Driver) *Sampler {
	s := &Sampler{layout: newLayout(d), now: time.Now, processes: d.Processes}
	s.buffers.New = func() any { b := make([]byte, bufSize); return &b }
	return s
}

// Get returns a sample of the cgroup at path that is at most MaxAge old; its
// Time says how old. A cgroup that is gone is errs.NotFound.
func (s *Sampler) Get(ctx context.Context, path string) (*runtime.Stats, error) {
	return s.sample(ctx, path, MaxAge)
}

// Read returns a sample taken after the call began.
func (s *Sampler) Read(ctx context.Context, path string) (*runtime.Stats, error) {
	return s.sample(ctx, path, 0)
}

// GetAll is Get for many cgroups: what is not fresh is read by several threads
// at once. A sample that could not be had is nil.
func (s *Sampler) GetAll(ctx context.Context, paths []string) []*runtime.Stats {
	out := make([]*runtime.Stats, len(paths))
	var stale []int
	now := s.now()
	for i, p := range paths {
		if st := s.fresh(p, now, MaxAge); st != nil {
			out[i] = st
		} else {
			stale = append(stale, i)
		}
	}
	if len(stale) == 0 {
		return out
	}
	var next atomic.Int32
	work := func() {
		for {
			n := int(next.Add(1)) - 1
			if n >= len(stale) || ctx.Err() != nil {
				return
			}
			i := stale[n]
			if st, err := s.Get(ctx, paths[i]); err == nil {
				out[i] = st
			}
		}
	}
	var wg sync.WaitGroup
	for range min(len(stale), goruntime.GOMAXPROCS(0), 4) - 1 {
		wg.Go(work)
	}
	work()
	wg.Wait()
	return out
}

// Forget drops what is kept of a cgroup that was removed.
func (s *Sampler) Forget(path string) { s.entries.Delete(path) }

// fresh returns the kept sample if it is young enough.
func (s *Sampler) fresh(path string, now time.Time, maxAge time.Duration) *runtime.Stats {
	v, ok := s.entries.Load(path)
	if !ok {
		return nil
	}
	e := v.(*entry)
	st := e.last.Load()
	if st == nil || now.Sub(st.Time) > maxAge {
		return nil
	}
	e.asked.Store(now.UnixNano())
	return st
}

func (s *Sampler) sample(ctx context.Context, path string, maxAge time.Duration) (*runtime.Stats, error) {
	now := s.now()
	if maxAge > 0 {
		if st := s.fresh(path, now, maxAge); st != nil {
			return st, nil
		}
	}
	if len(path) < 2 || path[0] != '/' || strings.Contains(path, "/../") || strings.HasSuffix(path, "/..") || strings.ContainsRune(path, 0) {
		return nil, errs.New(errs.InvalidArgument, "read statistics of %q: want the path of a cgroup", path)
	}
	e := s.entry(path, now)
	if err := e.lock(ctx, path); err != nil {
		return nil, err
	}
	defer e.unlock()
	// Somebody may have read while this one waited. His sample serves also a
	// Read that began before it.
	if st := e.last.Load(); st != nil && (st.Time.After(now) || (maxAge > 0 && s.now().Sub(st.Time) <= maxAge)) {
		return st, nil
	}
	st, err := s.read(path)
	if err != nil {
		if errs.Is(err, errs.NotFound) {
			s.entries.CompareAndDelete(path, e)
		}
		return nil, err
	}
	e.setRate(st)
	e.last.Store(st)
	return st, nil
}

func (e *entry) lock(ctx context.Context, path string) error {
	select {
	case e.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return errs.New(errs.Of(ctx.Err()), "wait for statistics of %s: %w", path, context.Cause(ctx))
	}
}

func (e *entry) unlock() { <-e.turn }

func (s *Sampler) read(path string) (*runtime.Stats, error) {
	buf := s.buffers.Get().(*[]byte)
	defer s.buffers.Put(buf)
	r := reader{layout: &s.layout, rel: path[1:], buf: *buf}
	return r.read(s.now())
}

// setRate works out UsageNanoCores. Samples that lie too close together for a
// rate keep the one before.
func (e *entry) setRate(st *runtime.Stats) {
	if st.CPU == nil {
		return
	}
	switch {
	case e.base == nil || st.CPU.Usage < e.base.CPU.Usage: // new, or another cgroup at this path
		e.base, e.rate = st, 0
	case st.Time.Sub(e.base.Time) >= minRate:
		e.rate = uint64(float64(st.CPU.Usage-e.base.CPU.Usage) / st.Time.Sub(e.base.Time).Seconds())
		e.base = st
	}
	st.CPU.UsageNanoCores = e.rate
}

func (s *Sampler) entry(path string, now time.Time) *entry {
	v, ok := s.entries.Load(path)
	if !ok {
		var loaded bool
		v, loaded = s.entries.LoadOrStore(path, &entry{turn: make(chan struct{}, 1)})
		if !loaded && s.added.Add(1)%sweepEvery == 0 {
			s.sweep(now)
		}
	}
	e := v.(*entry)
	e.asked.Store(now.UnixNano())
	return e
}

// sweep drops what nobody asked for in a while.
func (s *Sampler) sweep(now time.Time) {
	old := now.Add(-forgetAfter).UnixNano()
	s.entries.Range(func(k, v any) bool {
		if a := v.(*entry).asked.Load(); a != 0 && a < old {
			s.entries.CompareAndDelete(k, v)
		}
		return true
	})
}
