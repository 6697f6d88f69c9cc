package monitor_test

import (
	"fmt"
	"os"
	"path/filepath"
	goruntime "runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/testhost"
)

// trace seizes all threads of a process from a thread of this one. letGo waits
// for them, as a tracer should, and is called by then at the latest.
func trace(t *testing.T, pid int) (letGo func()) {
	t.Helper()
	ready, end, done := make(chan error), make(chan struct{}), make(chan struct{})
	go func() {
		goruntime.LockOSThread() // for good: only this thread is the tracer
		defer close(done)
		tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
		for _, task := range tasks {
			tid, _ := strconv.Atoi(filepath.Base(task))
			if err == nil {
				err = unix.PtraceSeize(tid)
			}
		}
		ready <- err
		<-end
		for range tasks {
			_, _ = unix.Wait4(-1, nil, unix.WNOHANG|unix.WALL|unix.WNOTHREAD, nil)
		}
	}()
	if err := <-ready; err != nil {
		t.Fatal(err)
	}
	once := false
	letGo = func() {
		if !once {
			once = true
			close(end)
			<-done
		}
	}
	t.Cleanup(letGo)
	return letGo
}

func stateOf(pid int) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	return strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))[0]
}

// TestTracedZombie: a container whose process is dead and kept by a tracer that
// does not wait for it has ended: its exit is told, and it can be deleted. The
// zombie is reaped when the tracer lets it go.
func TestTracedZombie(t *testing.T) {
	n := newNode(t)
	c := n.run(spec{args: []string{"exec sleep 1000"}})
	letGo := trace(t, c.pid)
	begin := time.Now()
	if err := unix.PidfdSendSignal(int(c.pidfd.Fd()), unix.SIGKILL, nil, 0); err != nil {
		t.Fatal(err)
	}
	if x := n.wait(c.id)[c.id]; x.Signal != 9 || x.Unknown {
		t.Errorf("exit %+v", x)
	}
	if err := n.c.Delete(n.ctx, c.id); err != nil {
		t.Errorf("delete: %v", err)
	}
	if d := time.Since(begin); d > testhost.Limit(5*time.Second) {
		t.Errorf("it took %v", d)
	}
	if s := stateOf(c.pid); s != "Z" {
		t.Fatalf("state %q: the test's tracer holds nothing", s)
	}
	letGo()
	n.eventually("the zombie to be reaped", func() bool { return stateOf(c.pid) == "" })
}

// Where even its threads are traced the kernel does not say that it is dead.
// The error says who traces whom.
func TestTracedThreads(t *testing.T) {
	n := newNode(t)
	c := n.run(chatter(t))
	n.eventually("threads", func() bool {
		l, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", c.pid))
		return len(l) > 2
	})
	letGo := trace(t, c.pid)
	err := n.c.Delete(n.ctx, c.id)
	if want := fmt.Sprintf("traced by process %d ", os.Getpid()); !errs.Is(err, errs.DeadlineExceeded) || !strings.Contains(err.Error(), want) {
		t.Errorf("delete: %v, want %q", err, want)
	}
	letGo()
	if x := n.wait(c.id)[c.id]; x.Signal != 9 {
		t.Errorf("exit %+v", x)
	}
}
