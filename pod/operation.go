package pod

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/failpoint"
	"github.com/naru-project/naru/internal/undo"
)

// step is one named part of a longer operation. undo must be safe when do was
// not reached, or broke off half-way, or was undone before.
type step struct {
	name string
	do   func(context.Context) error
	undo func(context.Context) error
}

// operation is one running mutation.
type operation struct {
	set *operations
	mu  sync.Mutex
	o   Operation       // guarded by mu
	in  context.Context //nolint:containedctx // of the step that runs, nil before the first; guarded by mu
}

// operations are the running mutations.
type operations struct {
	observe func(kind, step string)
	watch   Watcher // may be nil
	mu      sync.Mutex
	running map[*operation]struct{} // guarded by mu
}

func (s *operations) begin(kind, id, name string) *operation {
	o := s.prepare(kind, id, name)
	s.add(o)
	return o
}

// prepare makes an operation that is not listed yet.
func (s *operations) prepare(kind, id, name string) *operation {
	now := time.Now()
	return &operation{set: s, o: Operation{ID: id, Name: name, Kind: kind, Step: "begin", Started: now, StepAt: now}}
}

func (s *operations) add(o *operation) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.running[o] = struct{}{}
}

func (o *operation) end() {
	o.leave(time.Now())
	o.set.mu.Lock()
	defer o.set.mu.Unlock()
	delete(o.set.running, o)
}

// do runs one step.
func (o *operation) do(ctx context.Context, name string, f func(context.Context) error) error {
	if err := o.begin(ctx, name); err != nil {
		return err
	}
	return f(ctx)
}

// enter names the step that begins now, for steps that only wait.
func (o *operation) enter(ctx context.Context, name string) { _ = o.begin(ctx, name) }

// begin names the step that begins now. The error is a failpoint's.
func (o *operation) begin(ctx context.Context, name string) error {
	now := time.Now()
	o.leave(now)
	o.mu.Lock()
	o.o.Step, o.o.StepAt, o.in = name, now, ctx
	kind, id := o.o.Kind, o.o.ID
	o.mu.Unlock()
	if l := klog.FromContext(ctx).V(4); l.Enabled() {
		l.Info("step", "op", kind, "id", id, "step", name)
	}
	if o.set.observe != nil {
		o.set.observe(kind, name)
	}
	return failpoint.Hit("pod", kind, name)
}

// leave ends the present step, if there is one.
func (o *operation) leave(now time.Time) {
	o.mu.Lock()
	was, in := o.o, o.in
	o.in = nil
	o.mu.Unlock()
	if in != nil && o.set.watch != nil {
		o.set.watch.StepDone(in, was.Kind, was.Step, was.StepAt, now)
	}
}

func (o *operation) get() Operation {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.o
}

// where says which step the operation is in, and since when.
func (o *operation) where() string {
	g := o.get()
	return fmt.Sprintf("step %q has been running for %s", g.Step, time.Since(g.StepAt).Round(time.Millisecond))
}

func (s *operations) list() []Operation {
	s.mu.Lock()
	all := make([]*operation, 0, len(s.running))
	for o := range s.running {
		all = append(all, o)
	}
	s.mu.Unlock()
	out := make([]Operation, len(all))
	for i, o := range all {
		out[i] = o.get()
	}
	slices.SortFunc(out, func(a, b Operation) int {
		return cmp.Or(a.Started.Compare(b.Started), cmp.Compare(a.ID, b.ID))
	})
	return out
}

// of returns what runs for one pod or container, or nil.
func (s *operations) of(id string) *operation {
	s.mu.Lock()
	defer s.mu.Unlock()
	for o := range s.running {
		if o.get().ID == id {
			return o
		}
	}
	return nil
}

// run does the steps in order. Each step's undo is on the list before its do
// begins, because a do that breaks off may have done half.
func (o *operation) run(ctx context.Context, steps []step, u *undo.List) error {
	for _, s := range steps {
		if ctx.Err() != nil {
			return o.fail(ctx, s.name, nil)
		}
		if s.undo != nil {
			u.Add(s.name, s.undo)
		}
		if err := o.do(ctx, s.name, s.do); err != nil {
			return o.fail(ctx, s.name, err)
		}
	}
	return nil
}

// fail gives a step's error its place. When the operation was ended from
// outside, the reason for that comes first and decides the class.
func (o *operation) fail(ctx context.Context, name string, err error) error {
	if ctx.Err() != nil {
		cause := context.Cause(ctx)
		if err == nil || errors.Is(err, cause) {
			return errs.New(errs.Of(cause), "%w (before step %q was done)", cause, name)
		}
		return errs.New(errs.Of(cause), "%w (step %q had run for %s: %w)",
			cause, name, time.Since(o.get().StepAt).Round(time.Millisecond), err)
	}
	if errors.Is(err, errVerbatim) {
		return err
	}
	return fmt.Errorf("%s: %w", name, err)
}

// undoAll is the undo list of a procedure of which nobody knows how far it came.
func undoAll(steps []step) *undo.List {
	var u undo.List
	for _, s := range steps {
		if s.undo != nil {
			u.Add(s.name, s.undo)
		}
	}
	return &u
}

// errVerbatim marks errors whose text must begin as it does.
var errVerbatim = errors.New("verbatim")

type verbatim struct{ error }

func (v verbatim) Unwrap() error      { return v.error }
func (verbatim) Is(target error) bool { return target == errVerbatim }

// detach gives a mutation its own life: the values of ctx, not its end.
func detach(ctx context.Context, d time.Duration, what string) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(context.WithoutCancel(ctx), d,
		errs.New(errs.DeadlineExceeded, "%s: not done after %s", what, d))
}

// waitError is what a caller gets whose context ended while an operation goes on.
func waitError(ctx context.Context, what string, o *operation) error {
	where := "it goes on"
	if o != nil {
		where = o.where()
	}
	return errs.New(errs.Of(ctx.Err()), "%s: %w: %s", what, ctx.Err(), where)
}
