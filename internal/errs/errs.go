// Package errs holds the error classes of Naru.
//
// Every error that can reach a caller wraps exactly one class. The CRI edge
// maps a class to a gRPC code, once, in one interceptor; nobody else knows
// about codes. Messages are short verb phrases without "failed to": what was
// tried, on what, why it failed and what to do.
package errs

import (
	"context"
	"errors"
	"fmt"
)

// Class says what kind of failure an error is, from the caller's view.
type Class int

// The classes. Internal is what an error without a class counts as.
const (
	Internal           Class = iota // a bug or a host failure the caller cannot change
	InvalidArgument                 // the request can never work as it stands
	NotFound                        // the named thing does not exist
	AlreadyExists                   // the name is taken by something different
	FailedPrecondition              // right request, wrong state
	Unavailable                     // may work when tried again
	ResourceExhausted               // a limit of Naru or of the host was met
	DeadlineExceeded                // the time given by the caller or by Naru ran out
	Canceled                        // the caller gave up
	Unimplemented                   // Naru does not do this (yet)
)

var names = [...]string{
	"Internal", "InvalidArgument", "NotFound", "AlreadyExists", "FailedPrecondition",
	"Unavailable", "ResourceExhausted", "DeadlineExceeded", "Canceled", "Unimplemented",
}

// String returns the name of the class, as gRPC spells its codes.
func (c Class) String() string {
	if c < 0 || int(c) >= len(names) {
		return fmt.Sprintf("Class(%d)", int(c))
	}
	return names[c]
}

type classed struct {
	class Class
	err   error
}

func (e *classed) Error() string { return e.err.Error() }
func (e *classed) Unwrap() error { return e.err }

// New returns an error of class c. The format takes %w like fmt.Errorf.
func New(c Class, format string, args ...any) error {
	return &classed{class: c, err: fmt.Errorf(format, args...)}
}

// Wrap gives err the class c, in place of the one it had. Wrap of nil is nil.
func Wrap(c Class, err error) error {
	if err == nil {
		return nil
	}
	return &classed{class: c, err: err}
}

// Of returns the class of err: that of the outermost classed error in its
// chain; Canceled or DeadlineExceeded for bare context errors; else Internal.
func Of(err error) Class {
	var c *classed
	switch {
	case errors.As(err, &c):
		return c.class
	case errors.Is(err, context.DeadlineExceeded):
		return DeadlineExceeded
	case errors.Is(err, context.Canceled):
		return Canceled
	}
	return Internal
}

// Is reports whether err is an error of class c.
func Is(err error, c Class) bool { return err != nil && Of(err) == c }
