package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// process is a daemon that this run starts, perhaps several times; its output
// goes to one log.
type process struct {
	log  string
	cmd  *exec.Cmd
	done chan error
}

func newProcess(work, name string) *process {
	return &process{log: filepath.Join(work, "log", name)}
}

func (p *process) start(cmd *exec.Cmd) error {
	out, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
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

// stop ends the process by a signal and waits for it.
func (p *process) stop(sig syscall.Signal) error {
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
		return fmt.Errorf("%s did not end within 30 s of %v", filepath.Base(p.log), sig)
	}
}

// ended says how the process has ended, if it has and should not.
func (p *process) ended() error {
	if p.cmd == nil {
		return nil
	}
	select {
	case err := <-p.done:
		p.done <- err
		return fmt.Errorf("%s has ended: %w; its log: %s", filepath.Base(p.log), errors.Join(err, errEnded), p.log)
	default:
		return nil
	}
}

var errEnded = errors.New("nobody told it to")
