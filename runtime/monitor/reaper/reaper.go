// Package reaper is the parent of one exec in a container of an OCI runtime.
//
// A runtime's program starts the exec's process, tells its pid in a file, and
// ends: the process then is a child of the nearest subreaper, and only that one
// learns how it ends. It is not the keeper, which must not have to guess which
// of its many unknown children somebody waits for, but a process of its own,
// `naru-monitor exec`, for as long as the exec lasts.
//
// Concurrency: Run belongs to main. One goroutine waits for SIGTERM.
package reaper

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
)

// fdReport is where the reaper tells what happens: the lines of Report.
const fdReport = 3

// Report is what a reaper has told, line by line:
//
//	program 1     the program ended with this code, and nothing was started
//	process 4711  the exec's process
//	exit 0        how that one ended, 128 and more by a signal
type Report struct {
	Failed  int // code of the program that failed; 0 = it did not
	PID     int
	Exited  bool
	Code    int
	Problem string
}

// Parse reads a report as far as it goes.
func Parse(text []byte) (r Report) {
	for line := range bytes.Lines(text) {
		word, value, _ := strings.Cut(strings.TrimSpace(string(line)), " ")
		n, err := strconv.Atoi(value)
		switch {
		case word == "problem":
			r.Problem = strings.ToValidUTF8(value, "?")
		case err != nil || n < 0:
		case word == "program":
			r.Failed = n
		case word == "process":
			r.PID = n
		case word == "exit":
			r.Code, r.Exited = n, true
		}
	}
	return r
}

// reaper is the state of Run.
type reaper struct {
	out     io.Writer
	pidFile string

	mu      sync.Mutex
	killed  bool
	program int // running; 0 = it has been reaped
	process int // the same of the exec's process
}

// Run runs the program of args[1:], which leaves the pid of the process that it
// starts in the file args[0], and waits for that process. On SIGTERM it kills
// what there is of both. An error has been reported, too.
func Run(args []string) error {
	debug.SetGCPercent(-1) // nothing here grows
	r := &reaper{out: os.NewFile(fdReport, "report")}
	err := r.run(args)
	if err != nil {
		r.tell("problem %v", err)
	}
	return err
}

func (r *reaper) tell(format string, args ...any) { _, _ = fmt.Fprintf(r.out, format+"\n", args...) }

func (r *reaper) run(args []string) error {
	unix.CloseOnExec(fdReport)
	if len(args) < 2 {
		return errs.New(errs.InvalidArgument, "want a pid file and a program")
	}
	r.pidFile = args[0]
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return errs.New(errs.Internal, "become a subreaper: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return errs.New(errs.Internal, "become non-dumpable: %w", err)
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, unix.SIGTERM)
	runtime.LockOSThread() // the program dies with this thread
	r.mu.Lock()
	pid, err := syscall.ForkExec(args[1], args[1:], &syscall.ProcAttr{
		Env: os.Environ(), Files: []uintptr{0, 1, 2}, Sys: &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL},
	})
	r.program = pid
	r.mu.Unlock()
	if err != nil {
		return errs.New(errs.FailedPrecondition, "start %s: %w", args[1], err)
	}
	go func() {
		<-stop
		r.kill()
	}()
	r.letGo()
	exited := false
	defer func() {
		if !exited {
			r.endAll()
		}
	}()
	code, err := r.wait(&r.program)
	if err != nil {
		return err
	}
	if r.over() {
		code = 128 + int(unix.SIGKILL)
	}
	if code != 0 {
		r.tell("program %d", code)
		return nil
	}
	process, err := readPID(r.pidFile)
	if err != nil {
		return err
	}
	r.mu.Lock()
	r.process = process
	r.mu.Unlock()
	if r.over() { // a signal that came before it was known
		r.tell("program %d", 128+int(unix.SIGKILL))
		return nil
	}
	r.tell("process %d", process)
	if code, err = r.wait(&r.process); err != nil {
		return err
	}
	exited = true
	r.tell("exit %d", code)
	return nil
}

// letGo closes this process's copies of the exec's streams: their ends would
// not be seen otherwise.
func (r *reaper) letGo() {
	null, err := unix.Open(os.DevNull, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	for fd := range 3 {
		_ = unix.Dup3(null, fd, 0)
	}
	_ = unix.Close(null)
}

// wait waits for one of the two children and forgets it, both under the lock
// that kill takes: a pid that has been reaped may be another's.
func (r *reaper) wait(child *int) (code int, err error) {
	pid := *child
	for {
		// First without reaping, for that must not happen while kill looks.
		err := unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT|unix.WALL, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return 0, errs.New(errs.Internal, "process %d is no child of this one: %w", pid, err)
		}
		break
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	*child = 0
	var ws unix.WaitStatus
	if _, err := unix.Wait4(pid, &ws, unix.WALL, nil); err != nil {
		return 0, errs.New(errs.Internal, "wait for process %d: %w", pid, err)
	}
	if ws.Signaled() {
		return 128 + int(ws.Signal()), nil
	}
	return ws.ExitStatus(), nil
}

// kill ends the program, or the process, and what that has started and not sent
// away (setsid(2)).
func (r *reaper) kill() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.killed = true
	for _, pid := range []int{r.program, r.process} {
		if pid != 0 {
			killChild(pid)
		}
	}
}

// killChild kills a child that has not been reaped, and its session if it leads
// one of its own.
func killChild(pid int) {
	session, err := unix.Getsid(pid)
	_ = unix.Kill(pid, unix.SIGKILL) //nolint:forbidigo // a child that has not been reaped
	if err == nil && session == pid {
		killSession(session)
	}
}

// over reports whether this exec was to be ended.
func (r *reaper) over() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.killed
}

// endAll ends whatever the program has left: it may have started the process,
// and not told its pid.
func (r *reaper) endAll() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.program, r.process = 0, 0 // both are reaped here
	for {
		for _, pid := range children() {
			killChild(pid)
		}
		if _, err := unix.Wait4(-1, nil, unix.WALL, nil); err != nil && err != unix.EINTR {
			return // there is none left
		}
	}
}

// children lists the children of this process.
func children() (pids []int) {
	names, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	for _, n := range names {
		pid, err := strconv.Atoi(n.Name())
		if err != nil {
			continue
		}
		// proc_pid_stat(5): the fields behind the last ')' are state and parent.
		b, err := os.ReadFile("/proc/" + n.Name() + "/stat")
		if err != nil {
			continue
		}
		f := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
		if len(f) > 1 && string(f[1]) == strconv.Itoa(os.Getpid()) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// killSession kills the members of a session until there are no more: a member
// may fork while the others are found.
func killSession(session int) {
	const rounds = 16
	for range rounds {
		found := false
		names, err := os.ReadDir("/proc")
		if err != nil {
			return
		}
		for _, n := range names {
			pid, err := strconv.Atoi(n.Name())
			if err != nil || pid == session {
				continue
			}
			// The pidfd first: what getsid says is then of this very process.
			fd, err := unix.PidfdOpen(pid, 0)
			if err != nil {
				continue
			}
			if s, err := unix.Getsid(pid); err == nil && s == session && unix.PidfdSendSignal(fd, 0, nil, 0) == nil {
				found = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) == nil || found
			}
			_ = unix.Close(fd)
		}
		if !found {
			return
		}
	}
}

// readPID reads a file with a pid in it.
func readPID(path string) (int, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, errs.New(errs.Internal, "the runtime left no pid: %w", err)
	}
	pid, err := ParsePID(b)
	if err != nil {
		return 0, errs.New(errs.Internal, "the runtime's pid file: %w", err)
	}
	return pid, nil
}

// ParsePID reads the content of a runtime's pid file.
func ParsePID(b []byte) (int, error) {
	const longest = 32
	pid, err := strconv.ParseInt(strings.TrimSpace(string(b[:min(len(b), longest)])), 10, 32)
	if err != nil || pid <= 1 {
		return 0, errs.New(errs.Internal, "%q is no pid", b[:min(len(b), longest)])
	}
	return int(pid), nil
}
