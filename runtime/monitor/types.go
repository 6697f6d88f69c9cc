// Package monitor keeps the containers' processes: the keeper (one per node,
// parent of every container; package keeper), the worker (runs plans, copies
// logs; package worker) and, in this package, the client with which the daemon
// speaks to them.
//
//	daemon: Client ── monitor.sock ── worker ── socketpair ── keeper ── containers
//
// The worker may be killed, restarted or upgraded at any moment; the client
// connects again by itself. Calls that can be repeated are repeated; exits are
// told again after each connect, until their containers are deleted. Only an
// exec is lost with its worker (errs.Unavailable).
//
// Concurrency: a Client may be used by many goroutines. One goroutine of its
// own keeps the connection, one reads it, one feeds Exits; Close ends them.
package monitor

import (
	"context"
	"os"

	"github.com/naru-project/naru/runtime/plan"
)

// CreateRequest asks the worker to clone the first process of a container.
// Files are duplicated into the worker and keeper; the caller keeps and closes its own.
type CreateRequest struct {
	ID    string
	Plan  *os.File   // sealed memfd, see package plan
	FDs   []*os.File // the plan's slots in order; FDs[0] is the write end of its status pipe
	Clone plan.Clone
	// TwoStage: the plan clones again and the container is that second child;
	// the worker waits for its plan.KindPID record before it answers.
	TwoStage bool
	Kept     Kept
	TTY      bool
}

// TakeRequest asks the keeper to take a process of its own that it does not
// know: one that an OCI runtime made. PID and PIDFD are that process's.
type TakeRequest struct {
	ID    string
	PID   int
	PIDFD *os.File
	Kept  Kept // without Status, Gate and Devpts
	TTY   bool
}

// Kept are the files that the keeper holds for a container's life. nil = not there.
type Kept struct {
	Status *os.File // read end of the status pipe; dropped after Start
	Gate   *os.File // write end of the start gate; Start writes the byte 1, then dropped
	Stdin  *os.File // write end of the stdin FIFO
	Stdout *os.File // read end of the stdout FIFO
	Stderr *os.File // read end of the stderr FIFO
	Pty    *os.File // master, in place of the three
	Devpts *os.File // directory of the container's devpts, for exec with a terminal
	Log    *os.File // log file, O_APPEND is not set
}

// Created is the answer to a CreateRequest.
type Created struct {
	PID   int
	PIDFD *os.File // the caller closes it
}

// Entry is what the monitor knows of a container.
type Entry struct {
	ID      string
	PID     int
	TTY     bool
	Started bool
	// Adopted: the keeper that cloned it was killed; the present one is not its
	// parent. Its exit status is exact on Linux 6.15 and later.
	Adopted bool
	Exit    *Exit
	Dropped uint64 // bytes of output that could not be logged (disk full, I/O error)
}

// Files are duplicates of what the keeper holds for a container. nil = not there.
type Files struct {
	PID    int // of the container's first process; 0 when it is not known to live
	PIDFD  *os.File
	Stdin  *os.File
	Pty    *os.File
	Devpts *os.File
	Log    *os.File
	TTY    bool
}

// Close closes all files.
func (f *Files) Close() {
	for _, x := range []*os.File{f.PIDFD, f.Stdin, f.Pty, f.Devpts, f.Log} {
		if x != nil {
			_ = x.Close()
		}
	}
}

// Info tells who answers.
type Info struct {
	Version   uint32 // of the protocol
	KeeperPID int
	WorkerPID int
	Build     string
	// Orphan: the keeper was killed. Logs go on, but nothing can be created
	// until the next keeper has taken over.
	Orphan bool
}

// Exit is how a child ended, as the keeper wrote it to the exit file before anybody was told.
type Exit struct {
	ID      string
	PID     int
	Status  int   // as waitid: exit status when Signal is 0
	Signal  int   // signal that killed it, else 0
	Time    int64 // Unix nanoseconds
	Unknown bool
}

// ExecRequest asks the worker to clone an exec process (its own child, not the keeper's).
type ExecRequest struct {
	ContainerID string
	Plan        *os.File
	FDs         []*os.File
	Clone       plan.Clone
	TwoStage    bool
	// StatusR is the read end of the status pipe whose write end is FDs[0]. It
	// is used with Hold only: otherwise the worker gives the child a pipe of its
	// own, which it reads until end of file (= execve done) or a failure record.
	StatusR *os.File
	// Hold: do not read the status pipe to its end; answer as soon as the (second) pid is known.
	// For children that do not execve at once (namespace makers).
	Hold bool
	// Term: should this client be gone, the process is asked to end, by SIGTERM,
	// before it is killed: it takes others with it.
	Term bool
}

// ExecProcess is a running child of the worker.
type ExecProcess struct {
	PID   int
	PIDFD *os.File
	wait  func(context.Context) (Exit, error)
	done  func()
}

// Wait returns how the process ended, after it was reaped. An error of class
// errs.Unavailable means that the worker was lost and the status with it.
func (p *ExecProcess) Wait(ctx context.Context) (Exit, error) { return p.wait(ctx) }

// Close releases the pidfd; it does not end the process. The worker ends a
// process whose client is gone.
func (p *ExecProcess) Close() { p.done() }
