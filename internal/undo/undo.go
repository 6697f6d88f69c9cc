// Package undo holds a list of things to take back when a longer procedure
// does not reach its end: a value that is filled step by step, and then either
// run or released.
//
// A List belongs to one goroutine.
package undo

import (
	"context"
	"errors"
	"fmt"

	"github.com/naru-project/naru/internal/failpoint"
)

// List is what is to be undone, in the order in which it was done.
type List struct {
	steps []step
}

type step struct {
	name string
	fn   func(context.Context) error
}

// Add puts a step on the list. fn must be safe to repeat, also when what it
// takes back was done by half only.
func (l *List) Add(name string, fn func(context.Context) error) {
	l.steps = append(l.steps, step{name, fn})
}

// Len tells how many steps are on the list.
func (l *List) Len() int { return len(l.steps) }

// Run undoes in reverse order. Every step runs, whatever the others say; the
// errors are joined, each with the name of its step. Steps that worked leave
// the list, so that Run can be called again for the others.
func (l *List) Run(ctx context.Context) error {
	var (
		failed []step
		all    []error
	)
	for i := len(l.steps) - 1; i >= 0; i-- {
		s := l.steps[i]
		err := failpoint.Hit("undo", "", s.name)
		if err == nil {
			err = s.fn(ctx)
		}
		if err != nil {
			all = append(all, fmt.Errorf("undo %s: %w", s.name, err))
			failed = append([]step{s}, failed...)
		}
	}
	l.steps = failed
	return errors.Join(all...)
}

// Release forgets all steps: what was done stays.
func (l *List) Release() { l.steps = nil }
