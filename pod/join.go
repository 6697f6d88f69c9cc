package pod

import (
	"context"
	"sync"

	"github.com/naru-project/naru/internal/errs"
)

// podKey and containerKey name what a create makes: a second create of the
// same key is a retry of the first.
type podKey struct {
	uid, namespace, name string
	attempt              uint32
}

type containerKey struct {
	podID, name string
	attempt     uint32
}

func keyOf(m Metadata) podKey { return podKey{m.UID, m.Namespace, m.Name, m.Attempt} }

// call is one running create. Its callers wait for done; it outlives them.
type call struct {
	id     string // what it makes
	podID  string // the pod that is made, or in which
	name   string
	config any
	op     *operation
	cancel context.CancelCauseFunc
	done   chan struct{}
	err    error // valid after done
}

// joins are the running creates.
//
// Lock order: joins.mu before table.mu.
type joins struct {
	mu    sync.Mutex
	calls map[any]*call // guarded by mu
}

// begin returns the running create of key, or the finished one that alive
// knows, or puts fresh in their place. Exactly one of the results is set.
func (j *joins) begin(key any, alive func() (id string, config any, err error), fresh *call) (running *call, id string, config any, err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if c := j.calls[key]; c != nil {
		return c, "", nil, nil
	}
	if id, config, err = alive(); err != nil || id != "" {
		return nil, id, config, err
	}
	j.calls[key] = fresh
	return nil, "", nil, nil
}

func (j *joins) end(key any, c *call, err error) {
	c.err = err
	j.mu.Lock()
	delete(j.calls, key)
	j.mu.Unlock()
	close(c.done)
}

// cancel ends the creates that match, with a cause, and returns them.
func (j *joins) cancel(match func(*call) bool, cause error) []*call {
	j.mu.Lock()
	defer j.mu.Unlock()
	var out []*call
	for _, c := range j.calls {
		if match(c) {
			c.cancel(cause)
			out = append(out, c)
		}
	}
	return out
}

// find returns the running create of one id, or nil.
func (j *joins) find(id string) *call {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, c := range j.calls {
		if c.id == id {
			return c
		}
	}
	return nil
}

// wait waits for the result. A caller that gives up leaves the create running:
// its retry, with the same key and config, joins it here.
func (c *call) wait(ctx context.Context) (string, error) {
	select {
	case <-c.done:
		return c.result()
	default:
	}
	select {
	case <-c.done:
		return c.result()
	case <-ctx.Done():
		return "", waitError(ctx, "create "+c.name, c.op)
	}
}

func (c *call) result() (string, error) {
	if c.err != nil {
		return "", c.err
	}
	return c.id, nil
}

// sameConfig refuses a create whose key is taken by another config.
func sameConfig(what, id string, have, want any) error {
	if field := firstDifference(have, want); field != "" {
		return errs.New(errs.AlreadyExists,
			"create %s: %s has this name and attempt with another config: %s differs", what, short(id), field)
	}
	return nil
}
