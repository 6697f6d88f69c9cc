package monitor

import (
	"context"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime/monitor/wire"
)

// Exec clones a process beside a container. It returns when the process
// executes its program (with Hold: when its pid is known), or the failure of
// the plan (*plan.Error).
func (c *Client) Exec(ctx context.Context, r ExecRequest) (*ExecProcess, error) {
	s, err := c.live(ctx)
	if err != nil {
		return nil, err
	}
	m := &wire.Exec{
		Container: r.ContainerID, Clone: wire.Clone{Flags: r.Clone.Flags, Cgroup: r.Clone.Cgroup},
		TwoStage: r.TwoStage, Hold: r.Hold, Slots: len(r.FDs), Status: r.StatusR != nil, Term: r.Term,
	}
	all := append([]*os.File{r.Plan}, r.FDs...)
	if r.StatusR != nil {
		all = append(all, r.StatusR)
	}
	if len(all) > wire.MaxFDs {
		return nil, errs.New(errs.InvalidArgument, "an exec needs %d descriptors, more than the %d that one message carries", len(all), wire.MaxFDs)
	}
	return s.exec(ctx, m, all)
}

func (s *session) exec(ctx context.Context, m *wire.Exec, files []*os.File) (*ExecProcess, error) {
	ended := make(chan wire.Exit, 1)
	var number uint64
	req, w, err := s.begin(wire.KindExec, m, files, func(n uint64) { number, s.execs[n] = n, ended })
	forget := func() {
		s.mu.Lock()
		delete(s.execs, number)
		s.mu.Unlock()
	}
	if err != nil {
		forget()
		return nil, err
	}
	a, err := s.await(ctx, req, w, func(a *answer) { // nobody waits for it: end it
		forget()
		if !a.Failed && len(a.fds) > 0 {
			sig := unix.SIGKILL
			if m.Term {
				sig = unix.SIGTERM
			}
			_ = unix.PidfdSendSignal(a.fds[0], sig, nil, 0)
		}
	})
	if err != nil {
		forget()
		return nil, err
	}
	var got wire.Created
	if err := wire.Unmarshal(a.Body, &got); err != nil || len(a.fds) != 1 {
		forget()
		wire.CloseAll(a.fds)
		return nil, errs.New(errs.Internal, "answer to exec with %d files: %w", len(a.fds), err)
	}
	return s.process(got.PID, a.file("pidfd"), ended, forget), nil
}

func (s *session) process(pid int, pidfd *os.File, ended chan wire.Exit, forget func()) *ExecProcess {
	var once sync.Once
	return &ExecProcess{
		PID: pid, PIDFD: pidfd,
		wait: func(ctx context.Context) (Exit, error) {
			var x wire.Exit
			select {
			case x = <-ended:
			case <-ctx.Done():
				return Exit{}, errs.New(errs.Of(ctx.Err()), "waiting for process %d: %w", pid, context.Cause(ctx))
			case <-s.done:
				select {
				case x = <-ended: // it came before the end
				default:
					return Exit{}, errs.New(errs.Unavailable, "the worker was lost, and with it how process %d ends", pid)
				}
			}
			ended <- x // for who asks again
			return exitFrom(&x), nil
		},
		done: func() {
			once.Do(func() {
				forget()
				_ = pidfd.Close()
			})
		},
	}
}

func exitFrom(x *wire.Exit) Exit {
	return Exit{ID: x.ID, PID: x.PID, Status: x.Status, Signal: x.Signal, Time: x.Time, Unknown: x.Unknown}
}
