package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// Process is a daemon that this run starts, perhaps several times; its output
// goes to one log.
type Process struct {
	Log  string
	cmd  *exec.Cmd
	done chan error
}

// NewProcess makes one that writes its log into a run's or a node's folder.
func NewProcess(work, name string) *Process {
	return &Process{Log: filepath.Join(work, "log", name)}
}

// Start starts it.
func (p *Process) Start(cmd *exec.Cmd) error {
	out, err := os.OpenFile(p.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = out.Close() }()
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		return err
	}
	p.cmd, p.done = cmd, make(chan error, 1)
	go func(done chan<- error) { done <- cmd.Wait() }(p.done)
	return nil
}

// Stop ends the process by a signal and waits for it.
func (p *Process) Stop(sig syscall.Signal) error {
	if p.cmd == nil {
		return nil
	}
	cmd, done := p.cmd, p.done
	p.cmd = nil
	if err := cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-done:
		return nil
	case <-time.After(30 * time.Second):
		_ = cmd.Process.Kill()
		<-done
		return fmt.Errorf("%s did not end within 30 s of %v", filepath.Base(p.Log), sig)
	}
}

// Ended says how the process has ended, if it has and should not.
func (p *Process) Ended() error {
	if p.cmd == nil {
		return nil
	}
	select {
	case err := <-p.done:
		p.done <- err
		return fmt.Errorf("%s has ended: %w; its log: %s", filepath.Base(p.Log), errors.Join(err, ErrEnded), p.Log)
	default:
		return nil
	}
}

// ErrEnded is of a daemon that has ended by itself: nothing more can be tried.
var ErrEnded = errors.New("nobody told it to")
