package keeper

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	goruntime "runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
)

// ExitBusy is the exit status of a keeper whose folder belongs to another one
// that runs.
const ExitBusy = 3

// ExitError is how the guard's keeper ended.
type ExitError struct{ Status int }

func (e *ExitError) Error() string { return fmt.Sprintf("the keeper ended with status %d", e.Status) }

// Guard is what an init system is to a keeper that has none: it starts it, and
// starts it again when it was killed. It does nothing else and listens to
// nobody, so it can keep all the privileges that a keeper needs; the daemon,
// which gives them up, could not start another one.
//
// It ends with a keeper that ended on its own: at SIGTERM (status 0), because
// another one runs (ExitBusy), or because it could not even begin.
func Guard(o Options) error {
	goruntime.GOMAXPROCS(1)
	if err := quiet("naru-guard"); err != nil {
		return err
	}
	// All signals are for the keeper; it decides whether it ends.
	ch := make(chan os.Signal, 16)
	signal.Notify(ch, unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGUSR2)
	for first, failures, began := true, 0, time.Now(); ; first, began = false, time.Now() {
		p, err := o.spawn(first)
		if err != nil && first {
			return err
		}
		st := "not started: " + fmt.Sprint(err)
		if err == nil {
			s, werr := attend(p, ch)
			if werr != nil {
				return werr
			}
			if code := s.ExitCode(); code == 0 || code == ExitBusy || code == 1 && first && time.Since(began) < time.Second {
				return ended(code)
			}
			if ws, ok := s.Sys().(syscall.WaitStatus); ok && ws.Signal() == unix.SIGTERM {
				return nil // it was told to end before it could listen
			}
			st = s.String()
		}
		if time.Since(began) > 10*time.Second {
			failures = 0
		}
		delay := min(10*time.Millisecond<<min(failures, 10), 2*time.Second)
		failures++
		fmt.Fprintf(os.Stderr, "%s guard: the keeper ended (%s), starting another in %v\n", time.Now().UTC().Format("2006-01-02T15:04:05.000Z"), st, delay)
		select {
		case <-time.After(delay):
		case s := <-ch: // there is no keeper to ask
			if s == unix.SIGTERM || s == unix.SIGINT {
				return nil
			}
		}
	}
}

func ended(code int) error {
	if code == 0 {
		return nil
	}
	return &ExitError{Status: code}
}

// spawn starts a keeper in a session of its own: the first from the guard's
// own sealed program, whose memory they share, later ones from what the path
// of the binary holds then, because it may have been upgraded meanwhile.
func (o *Options) spawn(first bool) (*os.Process, error) {
	args := []string{"naru-monitor", "keeper", "--dir", o.Dir}
	if o.KillOnExit {
		args = append(args, "--kill-on-exit")
	}
	sealed := append(args[:len(args):len(args)], "--binary", o.Binary) // it cannot know where it came from
	attr := &os.ProcAttr{
		Dir: "/", Env: environ(), Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
		Sys: &syscall.SysProcAttr{Setsid: true},
	}
	if !first {
		if p, err := os.StartProcess(o.Binary, args, attr); err == nil {
			return p, nil
		}
	}
	p, err := os.StartProcess("/proc/self/exe", sealed, attr)
	if err != nil {
		return nil, errs.New(errs.Internal, "start the keeper: %w", err)
	}
	return p, nil
}

// attend hands signals on to the keeper until it ends.
func attend(p *os.Process, ch <-chan os.Signal) (*os.ProcessState, error) {
	type result struct {
		s   *os.ProcessState
		err error
	}
	done := make(chan result, 1)
	go func() {
		s, err := p.Wait()
		done <- result{s, err}
	}()
	for {
		select {
		case r := <-done:
			return r.s, r.err
		case s := <-ch:
			if err := p.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
				fmt.Fprintf(os.Stderr, "guard: hand on %v: %v\n", s, err)
			}
		}
	}
}
