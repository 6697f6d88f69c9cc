package ring

import (
	"bufio"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/testhost"
)

// traceEnv makes the test binary a tracer: PID:STOPS. It attaches to all
// threads of the process, says "attached", and kills it as it enters or leaves
// its STOPSth system call (0: never). On SIGTERM it says how many stops it has
// seen, and lets go.
const traceEnv = "NARU_RING_TRACE"

func traceMain(arg string) int {
	a, b, _ := strings.Cut(arg, ":")
	pid, err1 := strconv.Atoi(a)
	limit, err2 := strconv.ParseInt(b, 10, 64)
	if err := errors.Join(err1, err2); err != nil {
		fmt.Println(err)
		return 1
	}
	var stops atomic.Int64
	term := make(chan os.Signal, 1)
	signal.Notify(term, unix.SIGTERM)
	go func() {
		<-term
		fmt.Println(stops.Load())
		os.Exit(0)
	}()
	runtime.LockOSThread()
	if err := attachAll(pid); err != nil {
		fmt.Println("attach:", err)
		return 1
	}
	fmt.Println("attached")
	for {
		var ws unix.WaitStatus
		tid, err := unix.Wait4(-1, &ws, unix.WALL, nil)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil: // nobody is left
			fmt.Println("gone", stops.Load())
			return 0
		case !ws.Stopped():
			continue
		}
		sig := 0
		switch {
		case ws.StopSignal() == unix.SIGTRAP|0x80:
			if stops.Add(1) == limit {
				_ = unix.Kill(pid, unix.SIGKILL)
			}
		case int(ws)>>16 == 0:
			sig = int(ws.StopSignal())
		}
		_ = unix.PtraceSyscall(tid, sig)
	}
}

// attachAll seizes every thread, also those that come meanwhile.
func attachAll(pid int) error {
	seen := map[int]bool{}
	for more := true; more; {
		more = false
		tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		if err != nil {
			return err
		}
		for _, e := range tasks {
			tid, _ := strconv.Atoi(e.Name())
			if seen[tid] {
				continue
			}
			seen[tid], more = true, true
			if err := attach(tid); err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.EPERM) { // EPERM: a child of one that is traced
				return err
			}
		}
	}
	return nil
}

func attach(tid int) error {
	// PTRACE_SEIZE with options: x/sys's takes none.
	const options = unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_TRACECLONE
	if _, _, e := unix.Syscall6(unix.SYS_PTRACE, unix.PTRACE_SEIZE, uintptr(tid), 0, options, 0, 0); e != 0 {
		return e
	}
	if err := unix.PtraceInterrupt(tid); err != nil {
		return err
	}
	var ws unix.WaitStatus
	if _, err := unix.Wait4(tid, &ws, unix.WALL, nil); err != nil {
		return err
	}
	return unix.PtraceSyscall(tid, 0)
}

// tracer is a running traceMain.
type tracer struct {
	p   *process
	out *bufio.Reader
}

func trace(t *testing.T, pid int, stops int64) *tracer {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{fmt.Sprintf("%s=%d:%d", traceEnv, pid, stops)}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = w, w
	p, err := spawn(cmd)
	_ = w.Close()
	if err != nil {
		t.Fatal(err)
	}
	tr := &tracer{p, bufio.NewReader(r)}
	if line, err := tr.out.ReadString('\n'); line != "attached\n" {
		t.Fatalf("tracer: %q, %v", line, err)
	}
	return tr
}

// end lets go and returns how many stops there were.
func (tr *tracer) end() int64 {
	_ = tr.p.cmd.Process.Signal(syscall.SIGTERM)
	line, _ := tr.out.ReadString('\n')
	<-tr.p.done
	n, _ := strconv.ParseInt(strings.TrimSpace(strings.TrimPrefix(line, "gone ")), 10, 64)
	return n
}

// TestCrashSystemCalls kills the daemon or the worker as it enters or leaves a
// system call, any of those that it makes in a story, and starts it again.
// NARU_SYSCALLS says how often.
func TestCrashSystemCalls(t *testing.T) {
	kills, err := strconv.Atoi(os.Getenv("NARU_SYSCALLS"))
	if err != nil {
		kills = 6
	}
	rnd := rand.New(rand.NewPCG(crashSeed(t), 4))
	r := newCrashRig(t)
	stops := map[string]int64{}
	target := func(who string) int {
		if who == "worker" {
			return r.n.WorkerPID()
		}
		return r.n.DaemonPID()
	}
	for _, who := range []string{"daemon", "worker"} { // how many there are
		for kind := range 2 {
			tr := trace(t, target(who), 0)
			if err := r.newStory(kind).live(); err != nil {
				t.Fatal(err)
			}
			stops[fmt.Sprint(who, kind)] = tr.end()
		}
	}
	t.Logf("stops in a story: %v", stops)
	began := time.Now()
	done, missed := map[string]int{}, 0
	for done["daemon"]+done["worker"] < kills && !t.Failed() {
		who, kind := []string{"daemon", "worker"}[rnd.IntN(2)], rnd.IntN(2)
		at := 1 + rnd.Int64N(max(stops[fmt.Sprint(who, kind)], 1))
		if r.systemCall(who, kind, target(who), at) {
			done[who]++
		} else {
			missed++
		}
	}
	r.finish()
	took := time.Since(began)
	t.Logf("kill -9 at %d system calls of the daemon and %d of the worker survived (%d stories ended before theirs); %v, %.0f a minute",
		done["daemon"], done["worker"], missed, took.Round(time.Second), float64(done["daemon"]+done["worker"])/took.Minutes())
}

// systemCall lives a story in which a process dies at one of its stops. It
// reports false when it made fewer of them.
func (r *crashRig) systemCall(who string, kind, pid int, at int64) (killed bool) {
	t, n := r.t, r.n
	t.Helper()
	after := fmt.Sprintf("kill -9 of the %s at stop %d in a story of kind %d", who, at, kind)
	was := identityOf(pid)
	tr := trace(t, pid, at)
	done := make(chan error, 1)
	go func() { done <- r.newStory(kind).live() }()
	var err error
	ended := false
	for end := time.Now().Add(testhost.Limit(100 * time.Second)); !ended; time.Sleep(time.Millisecond) {
		select {
		case err = <-done:
			ended = true
		default:
		}
		if n.daemon.ended() {
			n.StartDaemon()
		}
		if time.Now().After(end) {
			t.Fatalf("%s: the story does not end\n%s", after, tail(n.Dir+"/naru.log", 6000))
		}
	}
	if err != nil {
		t.Errorf("%s: %v", after, err)
	}
	killed = identityOf(pid) != was
	tr.end()
	if n.daemon.ended() { // after its last answer
		n.StartDaemon()
	}
	r.check(after)
	if t.Failed() {
		t.Logf("%s failed; the daemon's log:\n%s", after, tail(n.Dir+"/naru.log", 6000))
	} else {
		r.quiet()
	}
	return killed
}
