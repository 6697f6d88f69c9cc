package monitor_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/testhost"
	"github.com/naru-project/naru/runtime/monitor"
)

// successor waits until a keeper other than old answers.
func (n *node) successor(old int) (pid int) {
	n.t.Helper()
	n.eventually("the next keeper", func() bool {
		i, err := n.c.Info(n.ctx)
		pid = i.KeeperPID
		return err == nil && !i.Orphan && pid != old
	})
	return pid
}

// TestGuard: a killed keeper is followed by another, which takes over; the
// guard hands on signals and ends with the keeper.
func TestGuard(t *testing.T) {
	n := newNode(t)
	m := *n
	m.dir = filepath.Join(t.TempDir(), "m")
	m.startKeeper("--guard")
	m.connect()
	defer m.c.Close()
	guard, keeper := m.cmd.Process.Pid, m.successor(0)
	if keeper == guard || parentOf(t, keeper) != guard {
		t.Fatalf("keeper %d is a child of %d, not of the guard %d", keeper, parentOf(t, keeper), guard)
	}
	c := m.run(spec{args: []string{"read x; exit 9"}})
	for range 3 {
		_ = unix.Kill(keeper, unix.SIGKILL)
		keeper = m.successor(keeper)
		if parentOf(t, keeper) != guard || !alive(c.pid) {
			t.Fatal("the next keeper is not the guard's, or the container ended")
		}
	}
	out, err := exec.Command(binary, "keeper", "--dir", m.dir, "--guard").CombinedOutput()
	// By its words: the reaper of these tests may take the process before Wait does.
	if err == nil || !strings.Contains(string(out), "the keeper ended with status 3") {
		t.Errorf("a second guard with a second keeper: %v, %s", err, out)
	}
	_ = m.cmd.Process.Signal(unix.SIGTERM)
	m.eventually("the keeper to refuse to end", func() bool { return strings.Contains(m.keeperLog(), "the keeper stays") })
	_, _ = c.stdin.WriteString("\n")
	if x := m.wait(c.id)[c.id]; x.Status != 9 {
		t.Errorf("exit %+v", x)
	}
	_ = m.cmd.Process.Signal(unix.SIGTERM)
	if err := m.cmd.Wait(); err != nil {
		t.Errorf("the guard ended with %v", err)
	}
	if alive(keeper) {
		t.Error("the keeper lives")
	}
}

// Told to end at any moment, guard and keeper end.
func TestGuardEndsEarly(t *testing.T) {
	n := newNode(t)
	for i := range 12 {
		m := *n
		m.dir = filepath.Join(t.TempDir(), "m")
		m.startKeeper("--guard")
		time.Sleep(time.Duration(i*5) * time.Millisecond)
		_ = m.cmd.Process.Signal(unix.SIGTERM)
		done := make(chan struct{})
		go func() {
			_ = m.cmd.Wait() // the guard itself may not listen yet
			close(done)
		}()
		select {
		case <-done:
		case <-time.After(10 * time.Second):
			_ = m.cmd.Process.Kill()
			t.Fatalf("SIGTERM after %d ms: the guard does not end\n%s", i*5, m.keeperLog())
		}
	}
}

// A keeper that cannot even begin is not tried for ever.
func TestGuardGivesUp(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(binary, "keeper", "--dir", file, "--guard")
	done := make(chan error, 1)
	go func() {
		out, err := cmd.CombinedOutput()
		if !strings.Contains(string(out), "make the folder") {
			t.Errorf("output %q", out)
		}
		done <- err
	}()
	select {
	case err := <-done:
		if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || exit.ExitCode() != 1 {
			t.Errorf("ended with %v", err)
		}
	case <-time.After(10 * time.Second):
		_ = cmd.Process.Kill()
		t.Error("the guard does not give up")
	}
	if _, err := monitor.Ensure(t.Context(), monitor.EnsureOptions{Binary: binary, Dir: file}); err == nil {
		t.Error("a keeper in a file")
	}
}

// end ends a keeper that Ensure has started, and its guard.
func (n *node) end(c *monitor.Client) {
	n.t.Helper()
	i, err := c.Info(n.ctx)
	if err != nil {
		n.t.Fatal(err)
	}
	_ = c.Close()
	guard := parentOf(n.t, i.KeeperPID)
	_ = unix.Kill(i.KeeperPID, unix.SIGTERM)
	n.eventually("keeper and guard to end", func() bool { reapAll(); return !alive(i.KeeperPID) && !alive(guard) })
}

// A daemon that starts while the worker of a killed keeper answers leaves it to
// others to start the next one, and starts one only if nobody does.
func TestEnsureWaitsForSuccessor(t *testing.T) {
	n := newNode(t)
	old := n.cmd.Process.Pid
	_ = n.cmd.Process.Kill()
	_ = n.cmd.Wait()
	type result struct {
		c   *monitor.Client
		err error
	}
	ch := make(chan result, 1)
	ensure := func() {
		c, err := monitor.Ensure(n.ctx, monitor.EnsureOptions{Binary: binary, Dir: n.dir})
		ch <- result{c, err}
	}
	go ensure()
	time.Sleep(time.Second) // systemd's RestartSec
	n.startKeeper()
	r := <-ch
	if r.err != nil {
		t.Fatal(r.err)
	}
	if i, err := r.c.Info(n.ctx); err != nil || i.KeeperPID != n.cmd.Process.Pid || i.KeeperPID == old {
		t.Errorf("%+v, %v; want keeper %d", i, err, n.cmd.Process.Pid)
	}
	_ = r.c.Close()
	if _, err := os.Stat(filepath.Join(n.dir, "monitor.log")); err == nil {
		t.Error("a second keeper was started")
	}
	if s := n.keeperLog(); strings.Contains(s, "another keeper runs") {
		t.Error("the keeper of others had to fight for the lock")
	}

	// Nobody comes.
	c := n.run(spec{args: []string{"exec sleep 1000"}})
	_ = n.cmd.Process.Kill()
	_ = n.cmd.Wait()
	begin := time.Now()
	ensure()
	if r = <-ch; r.err != nil {
		t.Fatal(r.err)
	}
	if d := time.Since(begin); d < 2*time.Second || d > testhost.Limit(20*time.Second) {
		t.Errorf("took %v", d)
	}
	if err := r.c.Delete(n.ctx, c.id); err != nil {
		t.Error(err)
	}
	n.end(r.c)
	n.startKeeper() // for the end of the test
	n.successor(0)
}

// While somebody holds the lock, a keeper is there or about to be.
func TestEnsureHeedsTheLock(t *testing.T) {
	n := newNode(t)
	dir := filepath.Join(t.TempDir(), "m")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(dir, "lock"))
	if err != nil {
		t.Fatal(err)
	}
	l := unix.Flock_t{Type: unix.F_WRLCK}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &l); err != nil {
		t.Fatal(err)
	}
	ch := make(chan *monitor.Client, 1)
	go func() {
		c, err := monitor.Ensure(n.ctx, monitor.EnsureOptions{Binary: binary, Dir: dir})
		if err != nil {
			t.Error(err)
		}
		ch <- c
	}()
	time.Sleep(500 * time.Millisecond)
	if _, err := os.Stat(filepath.Join(dir, "monitor.log")); err == nil {
		t.Error("a keeper was started while another held the lock")
	}
	_ = f.Close()
	if c := <-ch; c != nil {
		n.end(c)
	}
}

// A worker without a keeper says so when it is asked whether all is well.
func TestPingWithoutKeeper(t *testing.T) {
	n := newNode(t)
	old := n.successor(0)
	if err := n.c.Ping(n.ctx); err != nil {
		t.Fatal(err)
	}
	_ = n.cmd.Process.Kill()
	_ = n.cmd.Wait()
	n.eventually("the worker to say that it is alone", func() bool { return errs.Is(n.c.Ping(n.ctx), errs.Unavailable) })
	n.startKeeper()
	n.successor(old)
	if err := n.c.Ping(n.ctx); err != nil {
		t.Error(err)
	}
}

// A worker that answers after its keeper's death says so at once, and never
// takes who inherited it for its keeper: that pid may be told to end.
func TestOrphanIsKnownAtOnce(t *testing.T) {
	n := newNode(t)
	for range 20 {
		old := n.cmd.Process.Pid
		// A worker that was stopped meanwhile has not read the end of the socket.
		worker := n.workerPID()
		_ = unix.Kill(worker, unix.SIGSTOP)
		_ = n.cmd.Process.Kill()
		_ = n.cmd.Wait()
		type answer struct {
			i   monitor.Info
			err error
		}
		ch := make(chan answer, 8)
		for range cap(ch) {
			go func() {
				c, err := monitor.Connect(n.ctx, monitor.Socket(n.dir))
				if err != nil {
					ch <- answer{err: err}
					return
				}
				i, err := c.Info(n.ctx)
				_ = c.Close()
				ch <- answer{i, err}
			}()
		}
		time.Sleep(5 * time.Millisecond)
		_ = unix.Kill(worker, unix.SIGCONT)
		for range cap(ch) {
			if a := <-ch; a.err != nil || !a.i.Orphan || a.i.KeeperPID != old {
				t.Errorf("%+v, %v; want an orphan of %d", a.i, a.err, old)
			}
		}
		n.startKeeper()
		n.successor(old)
		reapAll()
	}
}

// TestHungWorker: a worker that is stopped is replaced within bounded time; its
// containers and their logs go on.
func TestHungWorker(t *testing.T) {
	n := newNode(t)
	chat := n.run(chatter(t))
	old := n.workerPID()
	begin := time.Now()
	if err := unix.Kill(old, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	for end := begin.Add(40 * time.Second); n.workerPID() == old; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("a stopped worker is not replaced\n%s", n.keeperLog())
		}
	}
	t.Logf("replaced after %v", time.Since(begin))
	if alive(old) {
		t.Error("the old worker is there")
	}
	_, _ = chat.stdin.WriteString("\n")
	if x := n.wait(chat.id)[chat.id]; x.Status != 7 {
		t.Errorf("exit %+v", x)
	}
	checkChatter(t, chat)
	// One that works is left alone.
	now := n.workerPID()
	time.Sleep(12 * time.Second)
	if n.workerPID() != now || strings.Count(n.keeperLog(), "has not answered") != 1 {
		t.Errorf("a worker that works was replaced\n%s", n.keeperLog())
	}
}
