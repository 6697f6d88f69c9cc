package spec

import (
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
)

// Real-time signals as programs see them: libc keeps the first two (signal(7)).
const (
	sigRTMin = 34
	sigRTMax = 64
)

// ParseSignal reads a signal: a number, a name with or without SIG, or a
// real-time one (RTMIN+3, RTMAX-1, and CRI's SIGRTMINPLUS3, SIGRTMAXMINUS1).
func ParseSignal(s string) (syscall.Signal, error) {
	bad := errs.New(errs.InvalidArgument, "signal %q: unknown", clip(s))
	if len(s) > 32 {
		return 0, bad
	}
	if n, err := strconv.ParseUint(s, 10, 8); err == nil {
		if n < 1 || n > sigRTMax {
			return 0, bad
		}
		return syscall.Signal(n), nil
	}
	name := strings.TrimPrefix(strings.ToUpper(s), "SIG")
	if sig := unix.SignalNum("SIG" + name); sig != 0 {
		return sig, nil
	}
	switch name {
	case "CLD":
		return unix.SIGCHLD, nil
	case "POLL":
		return unix.SIGIO, nil
	case "IOT":
		return unix.SIGABRT, nil
	}
	for _, f := range []struct {
		base string
		sign []string
		from int
		step int
	}{{"RTMIN", []string{"+", "PLUS"}, sigRTMin, 1}, {"RTMAX", []string{"-", "MINUS"}, sigRTMax, -1}} {
		rest, ok := strings.CutPrefix(name, f.base)
		if !ok {
			continue
		}
		if rest == "" {
			return syscall.Signal(f.from), nil
		}
		for _, sign := range f.sign {
			digits, ok := strings.CutPrefix(rest, sign)
			if n, err := strconv.ParseUint(digits, 10, 8); ok && err == nil && n <= sigRTMax-sigRTMin {
				return syscall.Signal(f.from + f.step*int(n)), nil
			}
		}
	}
	return 0, bad
}

// StopSignal is the signal that asks a container to end: the request's, else
// the image's, else SIGTERM. Nonsense in the image counts as nothing, nonsense
// in the request is an error.
func StopSignal(asked, image string) (syscall.Signal, error) {
	if asked != "" {
		return ParseSignal(asked)
	}
	if sig, err := ParseSignal(image); err == nil {
		return sig, nil
	}
	return unix.SIGTERM, nil
}
