package cri

import (
	"context"
	"errors"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/naru-project/naru/internal/errs"
)

// codeOf maps the error classes to gRPC codes. This is the only place that does.
var codeOf = map[errs.Class]codes.Code{
	errs.Internal:           codes.Internal,
	errs.InvalidArgument:    codes.InvalidArgument,
	errs.NotFound:           codes.NotFound,
	errs.AlreadyExists:      codes.AlreadyExists,
	errs.FailedPrecondition: codes.FailedPrecondition,
	errs.Unavailable:        codes.Unavailable,
	errs.ResourceExhausted:  codes.ResourceExhausted,
	errs.DeadlineExceeded:   codes.DeadlineExceeded,
	errs.Canceled:           codes.Canceled,
	errs.Unimplemented:      codes.Unimplemented,
}

// toStatus makes the error that goes over the wire. Its text is the error's
// own: kubelet looks at how some of them begin (RegistryUnavailable, …).
func toStatus(err error) error {
	if err == nil {
		return nil
	}
	if st, ok := status.FromError(err); ok && st.Code() != codes.Unknown {
		return err // from gRPC itself, as when a stream is sent to
	}
	class := errs.Of(err)
	if class == errs.Internal { // a class-less wrapper must not hide why
		switch {
		case errors.Is(err, context.DeadlineExceeded):
			class = errs.DeadlineExceeded
		case errors.Is(err, context.Canceled):
			class = errs.Canceled
		}
	}
	code, ok := codeOf[class]
	if !ok {
		code = codes.Internal
	}
	return status.Error(code, strings.ToValidUTF8(err.Error(), "\uFFFD"))
}

// invalid is the error for a bad request; the text says which field and why.
func invalid(format string, args ...any) error {
	return errs.New(errs.InvalidArgument, format, args...)
}

// ignoreNotFound is for calls that CRI wants to succeed on unknown IDs.
func ignoreNotFound(err error) error {
	if errs.Is(err, errs.NotFound) {
		return nil
	}
	return err
}
