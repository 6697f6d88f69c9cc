package plan

import (
	"encoding/binary"
	"fmt"
	"syscall"

	"github.com/naru-project/naru/internal/errs"
)

// Kind of a status record.
type Kind uint32

// The kinds of status records.
const (
	KindFailed  Kind = 1 // an operation failed; the child has exited with status 127
	KindPID     Kind = 2 // Value is the pid of the second child, as the parent's PID namespace counts
	KindReady   Kind = 3 // the child waits for its mounts; FDs are descriptors to be fetched from it
	KindCreated Kind = 4 // all is done but the last steps; the child waits on the start gate
)

// RecordSize is the size of a record in bytes; far below PIPE_BUF, so a record
// is never torn.
const RecordSize = 64

const recordValue = 16 // offset of Value
const recordFDs = 24   // offset of FDs

// Record is what a child writes to its status pipe. It comes from a process
// that will run a container: read it as hostile input.
type Record struct {
	Kind  Kind
	Op    uint32
	Stage Stage
	Errno uint32
	Value int64
	FDs   [10]int32
}

func (r *Record) put(p []byte) {
	le := binary.LittleEndian
	le.PutUint32(p[0:], uint32(r.Kind))
	le.PutUint32(p[4:], r.Op)
	le.PutUint32(p[8:], uint32(r.Stage))
	le.PutUint32(p[12:], r.Errno)
	le.PutUint64(p[recordValue:], uint64(r.Value))
	for i, fd := range r.FDs {
		le.PutUint32(p[recordFDs+4*i:], uint32(fd))
	}
}

// Bytes returns the record as it goes through the pipe.
func (r Record) Bytes() []byte {
	p := make([]byte, RecordSize)
	r.put(p)
	return p
}

// ParseRecord reads one record.
func ParseRecord(p []byte) (Record, error) {
	if len(p) != RecordSize {
		return Record{}, errs.New(errs.Internal, "status record of %d bytes, want %d", len(p), RecordSize)
	}
	le := binary.LittleEndian
	r := Record{
		Kind:  Kind(le.Uint32(p[0:])),
		Op:    le.Uint32(p[4:]),
		Stage: Stage(le.Uint32(p[8:])),
		Errno: le.Uint32(p[12:]),
		Value: int64(le.Uint64(p[recordValue:])),
	}
	for i := range r.FDs {
		r.FDs[i] = int32(le.Uint32(p[recordFDs+4*i:]))
	}
	if r.Kind < KindFailed || r.Kind > KindCreated {
		return Record{}, errs.New(errs.Internal, "status record of unknown kind %d", r.Kind)
	}
	return r, nil
}

// FDOffset is where FDs[i] lies within a record, for Op.Store.
func FDOffset(i int) Ref { return Ref(recordFDs + 4*i) }

// ValueOffset is where Value lies within a record, for Op.Store.
const ValueOffset Ref = recordValue

// Err returns the failure that a KindFailed record tells of, else nil.
func (r Record) Err() error {
	if r.Kind != KindFailed {
		return nil
	}
	return &Error{Op: int(r.Op), Stage: r.Stage, Errno: syscall.Errno(r.Errno), Value: r.Value}
}

// Error is an operation of a plan that failed in the child.
type Error struct {
	Op    int
	Stage Stage
	Errno syscall.Errno // 0: the result was not the expected one
	Value int64         // the result
}

func (e *Error) Error() string {
	if e.Errno == 0 {
		return fmt.Sprintf("%s (operation %d): unexpected result %d", e.Stage, e.Op, e.Value)
	}
	return fmt.Sprintf("%s (operation %d): %s", e.Stage, e.Op, e.Errno.Error())
}

// Unwrap returns the errno, so that errors.Is(err, unix.ENOENT) works.
func (e *Error) Unwrap() error {
	if e.Errno == 0 {
		return nil
	}
	return e.Errno
}

// Stage says what part of a start an operation belongs to. It is the step name
// in errors, logs and metrics. Numbers are part of the plan format.
type Stage uint32

// The stages, in the order in which a start goes through them.
const (
	StageNone Stage = iota
	StageMap
	StageCgroup
	StageOOMScore
	StageUserNamespace
	StageClone
	StageNamespaces
	StageFilesystems
	StageMounts
	StageHostname
	StageSession
	StageStdio
	StageTerminal
	StageRlimits
	StageAttributes
	StageSignals
	StageKeyring
	StageWorkdir
	StageCapabilities
	StageUser
	StageNoNewPrivs
	StageFDs
	StageCreated
	StageGate
	StageLSM
	StageSeccomp
	StageExec
	numStages
)

var stageNames = [...]string{
	"none", "map the plan", "join the cgroup", "set oom_score_adj", "join the user namespace", "clone",
	"join namespaces", "make file systems", "wait for mounts", "set the hostname", "start a session", "set up stdio",
	"set the controlling terminal", "set rlimits", "set process attributes", "reset signals", "make a keyring",
	"enter the working directory", "set capabilities", "set user and groups", "set no_new_privs", "close descriptors",
	"report created", "wait for start", "set the LSM label", "load the seccomp filter", "execute",
}

// String returns the stage in words.
func (s Stage) String() string {
	if int(s) < len(stageNames) {
		return stageNames[s]
	}
	return fmt.Sprintf("stage %d", uint32(s))
}
