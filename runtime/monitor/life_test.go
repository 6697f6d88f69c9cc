package monitor_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/testhost"
	"github.com/naru-project/naru/runtime/monitor"
	"github.com/naru-project/naru/runtime/plan"
)

func TestLife(t *testing.T) {
	n := newNode(t)
	c := n.run(spec{args: []string{"echo out; echo err >&2; read line; echo got $line; exit 42"}, hold: true})
	if p := parentOf(t, c.pid); p != n.cmd.Process.Pid {
		t.Fatalf("parent of the container is %d, the keeper is %d", p, n.cmd.Process.Pid)
	}
	if l, err := n.c.List(n.ctx); err != nil || len(l) != 1 || l[0].ID != c.id || l[0].PID != c.pid || l[0].Started || l[0].Exit != nil {
		t.Fatalf("list before start: %+v, %v", l, err)
	}
	if _, err := n.c.Create(n.ctx, c.create); !errs.Is(err, errs.AlreadyExists) && !errs.Is(err, errs.InvalidArgument) {
		t.Errorf("second create: %v", err)
	}
	for range 3 { // repeated, it does no harm
		if err := n.c.Start(n.ctx, c.id); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.c.DeleteEnded(n.ctx, c.id); !errs.Is(err, errs.FailedPrecondition) {
		t.Errorf("delete of a living container: %v", err)
	}
	f, err := n.c.Files(n.ctx, c.id)
	if err != nil || f.PIDFD == nil || f.Stdin == nil || f.Log == nil || f.Pty != nil || f.PID != c.pid {
		t.Fatalf("files: %+v, %v", f, err)
	}
	if _, err := f.Stdin.WriteString("hello\n"); err != nil {
		t.Fatal(err)
	}
	f.Close()
	x := n.wait(c.id)[c.id]
	if x.Status != 42 || x.Signal != 0 || x.PID != c.pid || x.Unknown || time.Since(time.Unix(0, x.Time)) > time.Minute {
		t.Errorf("exit %+v", x)
	}
	// Complete as soon as the exit is told.
	if got := c.logText("stdout"); got != "out\ngot hello\n" {
		t.Errorf("stdout %q", got)
	}
	if got := c.logText("stderr"); got != "err\n" {
		t.Errorf("stderr %q", got)
	}
	p, err := os.ReadFile(filepath.Join(n.dir, "exits", c.id))
	if err != nil || !strings.Contains(string(p), "status=42\n") {
		t.Errorf("exit file: %q, %v", p, err)
	}
	for range 2 {
		if err := n.c.Delete(n.ctx, c.id); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(filepath.Join(n.dir, "exits", c.id)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("exit file after delete: %v", err)
	}
	if _, err := n.c.Files(n.ctx, c.id); !errs.Is(err, errs.NotFound) {
		t.Errorf("files after delete: %v", err)
	}
}

func TestStopsAtEndOfInput(t *testing.T) {
	n := newNode(t)
	c := n.run(spec{args: []string{"exec cat"}})
	if _, err := c.stdin.WriteString("last words"); err != nil {
		t.Fatal(err)
	}
	if err := n.c.CloseStdin(n.ctx, c.id); err != nil {
		t.Fatal(err)
	}
	_ = c.stdin.Close() // ours
	if x := n.wait(c.id)[c.id]; x.Status != 0 || x.Signal != 0 {
		t.Errorf("exit %+v", x)
	}
	if got := c.logText("stdout"); got != "last words\n" {
		t.Errorf("stdout %q", got)
	}
}

func TestTwoStages(t *testing.T) {
	n := newNode(t)
	c := n.run(spec{args: []string{"echo I am $$; kill -9 $$; echo alive; exit 5"}, second: true})
	x := n.wait(c.id)[c.id]
	if x.Status != 5 || x.PID != c.pid {
		t.Errorf("exit %+v", x) // the init of a PID namespace is not reached by its own SIGKILL
	}
	if got := c.logText("stdout"); got != "I am 1\nalive\n" {
		t.Errorf("stdout %q", got)
	}
	n.eventually("the first stage to be reaped", func() bool { return zombies(t, n.cmd.Process.Pid) == 0 })
}

// TestLostSecondStage: an exec's first child dies before it has told the pid of
// its own. That one may not stay as a zombie: it is in the container's PID
// namespace, whose init cannot end before it is reaped.
func TestLostSecondStage(t *testing.T) {
	n := newNode(t)
	for _, op := range []string{"clone pipe2", "clone clone3", "clone write", "clone read", "clone setpgid"} {
		if _, err := n.exec(n.c, spec{args: []string{"exit 0"}, second: true, breaks: op}, false, nil, nil); err == nil {
			t.Errorf("an exec whose %q fails succeeds", op)
		}
		n.eventually("the children of an exec whose "+op+" failed to be reaped", func() bool { return children(n.workerPID()) == 0 })
	}
}

// children counts the children of a process, zombies too.
func children(pid int) (n int) {
	lists, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, l := range lists {
		b, _ := os.ReadFile(l)
		n += len(strings.Fields(string(b)))
	}
	return n
}

func TestSignalledExit(t *testing.T) {
	n := newNode(t)
	c := n.run(spec{args: []string{"exec sleep 1000"}})
	if err := unix.PidfdSendSignal(int(c.pidfd.Fd()), unix.SIGTERM, nil, 0); err != nil {
		t.Fatal(err)
	}
	if x := n.wait(c.id)[c.id]; x.Signal != int(unix.SIGTERM) || x.Status != 0 {
		t.Errorf("exit %+v", x)
	}
}

func TestFailedStart(t *testing.T) {
	n := newNode(t)
	for _, second := range []bool{false, true} {
		c := n.run(spec{args: []string{"/absent/program", "x"}, hold: true, second: second})
		err := n.c.Start(n.ctx, c.id)
		var pe *plan.Error
		if !errors.As(err, &pe) || pe.Stage != plan.StageExec || !errors.Is(err, unix.ENOENT) {
			t.Errorf("start of an absent program: %v", err)
		}
		if x := n.wait(c.id)[c.id]; x.Status != 127 {
			t.Errorf("exit %+v", x)
		}
		if err := n.c.DeleteEnded(n.ctx, c.id); err != nil {
			t.Error(err)
		}
	}
	n.eventually("no zombies", func() bool { return zombies(t, n.cmd.Process.Pid) == 0 })
}

func zombies(t testing.TB, parent int) int {
	t.Helper()
	count := 0
	tasks, _ := os.ReadDir("/proc/" + itoa(parent) + "/task")
	for _, task := range tasks {
		kids, err := os.ReadFile("/proc/" + itoa(parent) + "/task/" + task.Name() + "/children")
		if err != nil {
			continue
		}
		for _, k := range strings.Fields(string(kids)) {
			if p, err := os.ReadFile("/proc/" + k + "/stat"); err == nil && strings.Contains(string(p), ") Z ") {
				count++
			}
		}
	}
	return count
}

func TestExec(t *testing.T) {
	n := newNode(t)
	for _, second := range []bool{false, true} {
		r, w := pipe(t)
		p, err := n.exec(n.c, spec{args: []string{"echo from exec; exit 3"}, second: second}, false, nil, w)
		_ = w.Close()
		if err != nil {
			t.Fatal(err)
		}
		text, _ := io.ReadAll(r)
		_ = r.Close()
		for range 2 {
			if x, err := p.Wait(n.ctx); err != nil || x.Status != 3 || x.PID != p.PID {
				t.Errorf("exec: %+v, %v", x, err)
			}
		}
		if string(text) != "from exec\n" {
			t.Errorf("output %q", text)
		}
		if alive(p.PID) {
			t.Error("the exec is told to have ended and was not reaped")
		}
		p.Close()
		_, err = n.exec(n.c, spec{args: []string{"/absent/program", "x"}, second: second}, false, nil, nil)
		var pe *plan.Error
		if !errors.As(err, &pe) || pe.Stage != plan.StageExec {
			t.Errorf("exec of an absent program: %v", err)
		}
	}
	w := n.workerPID()
	n.eventually("no zombies of the worker", func() bool { return zombies(t, w) == 0 })
}

func TestExecEndsWithItsClient(t *testing.T) {
	n := newNode(t)
	other := n.client()
	r, w := pipe(t)
	defer r.Close()
	defer w.Close()
	p, err := n.exec(other, spec{args: []string{"read never; sleep 1000"}}, true, r, nil)
	if err != nil {
		t.Fatal(err)
	}
	pid := p.PID
	p.Close()
	mine, err := n.exec(n.c, spec{args: []string{"exec sleep 1000"}}, false, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer mine.Close()
	_ = other.Close()
	n.eventually("the exec to be killed", func() bool { return !alive(pid) })
	if !alive(mine.PID) {
		t.Error("the exec of another client was killed")
	}
	_ = unix.PidfdSendSignal(int(mine.PIDFD.Fd()), unix.SIGKILL, nil, 0)
	if x, err := mine.Wait(n.ctx); err != nil || x.Signal != 9 {
		t.Errorf("%+v %v", x, err)
	}
}

func TestOrphansAreReaped(t *testing.T) {
	n := newNode(t)
	// A grandchild that outlives its parents comes to the keeper.
	c := n.run(spec{args: []string{"(sh -c 'sleep 0.2; exit 9' & echo $! ) ; exit 0"}})
	n.wait(c.id)
	n.eventually("the orphan to be reaped", func() bool {
		return zombies(t, n.cmd.Process.Pid) == 0 && !strings.Contains(psChildren(n.cmd.Process.Pid), "sleep")
	})
}

func psChildren(parent int) string {
	var b strings.Builder
	tasks, _ := os.ReadDir("/proc/" + itoa(parent) + "/task")
	for _, task := range tasks {
		kids, _ := os.ReadFile("/proc/" + itoa(parent) + "/task/" + task.Name() + "/children")
		for _, k := range strings.Fields(string(kids)) {
			p, _ := os.ReadFile("/proc/" + k + "/cmdline")
			b.WriteString(strings.ReplaceAll(string(p), "\x00", " ") + "\n")
		}
	}
	return b.String()
}

func TestTwoClients(t *testing.T) {
	n := newNode(t)
	other := n.client()
	defer func() { _ = other.Close() }()
	var ids []string
	for i := range 20 {
		c := n.run(spec{args: []string{"exit " + itoa(i)}})
		ids = append(ids, c.id)
	}
	for who, cl := range []*monitor.Client{n.c, other} {
		seen := map[string]monitor.Exit{}
		timeout := time.After(testhost.Limit(20 * time.Second))
		for len(seen) < len(ids) {
			select {
			case x := <-cl.Exits():
				seen[x.ID] = x
			case <-timeout:
				t.Fatalf("client %d saw %d exits of %d", who, len(seen), len(ids))
			}
		}
		for i, id := range ids {
			if seen[id].Status != i {
				t.Errorf("client %d: exit of %d is %+v", who, i, seen[id])
			}
		}
	}
}

func TestRefusesBadRequests(t *testing.T) {
	n := newNode(t)
	c := n.run(spec{args: []string{"exec sleep 1000"}})
	cases := []struct {
		name string
		err  error
		want errs.Class
	}{
		{"start of an unknown one", n.c.Start(n.ctx, "none"), errs.NotFound},
		{"attach to an unknown one", n.c.Attach(n.ctx, "none", os.Stdout, nil), errs.NotFound},
		{"a log for an unknown one", n.c.SetLog(n.ctx, "none", nil), errs.NotFound},
		{"an ID that is a path", n.c.Delete(n.ctx, "../lock"), errs.InvalidArgument},
		{"an upgrade to what is no program", n.c.Upgrade(n.ctx, mustOpen(t, "/etc/passwd")), errs.FailedPrecondition},
		{"an upgrade to another program", n.c.Upgrade(n.ctx, mustOpen(t, "/bin/true")), errs.FailedPrecondition},
	}
	for _, x := range cases {
		if !errs.Is(x.err, x.want) {
			t.Errorf("%s: %v, want %v", x.name, x.err, x.want)
		}
	}
	bad := c.create
	bad.ID = "../../etc/x"
	bad.Plan, bad.FDs, bad.Kept = mustOpen(t, "/etc/passwd"), nil, monitor.Kept{}
	if _, err := n.c.Create(n.ctx, bad); !errs.Is(err, errs.InvalidArgument) {
		t.Errorf("create with a path as ID: %v", err)
	}
	bad.ID = newID()
	if _, err := n.c.Create(n.ctx, bad); !errs.Is(err, errs.InvalidArgument) {
		t.Errorf("create with what is no plan: %v", err)
	}
	if l, err := n.c.List(n.ctx); err != nil || len(l) != 1 {
		t.Errorf("list: %+v, %v", l, err)
	}
}

func mustOpen(t testing.TB, path string) *os.File {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

func itoa(n int) string { return string(appendInt(nil, n)) }

func appendInt(b []byte, n int) []byte {
	if n >= 10 {
		b = appendInt(b, n/10)
	}
	return append(b, byte('0'+n%10))
}
