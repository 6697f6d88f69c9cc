package monitor_test

import (
	"bufio"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime/monitor"
)

// orphan makes a process of which nobody but the keeper is the parent, as an
// OCI runtime does, and hands it to the keeper.
func (n *node) orphan(script string) (id string, pid int, log string, err error) {
	t := n.t
	t.Helper()
	r, w := pipe(t)
	p, xerr := n.exec(n.c, spec{args: []string{script + " & echo $!"}}, false, nil, w)
	_ = w.Close()
	if xerr != nil {
		t.Fatal(xerr)
	}
	line, rerr := bufio.NewReader(r).ReadString('\n')
	_ = r.Close()
	if _, werr := p.Wait(n.ctx); rerr != nil || werr != nil {
		t.Fatal(rerr, werr)
	}
	p.Close()
	if pid, err = strconv.Atoi(strings.TrimSpace(line)); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	pidfd := os.NewFile(uintptr(fd), "pidfd")
	defer func() { _ = pidfd.Close() }()
	log = filepath.Join(t.TempDir(), "0.log")
	f, err := os.OpenFile(log, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	or, ow := fifo(t)
	defer func() { _, _, _ = f.Close(), or.Close(), ow.Close() }()
	if _, err := ow.WriteString("said before\n"); err != nil {
		t.Fatal(err)
	}
	id = newID()
	return id, pid, log, n.c.Take(n.ctx, monitor.TakeRequest{ID: id, PID: pid, PIDFD: pidfd, Kept: monitor.Kept{Stdout: or, Log: f}})
}

func TestTake(t *testing.T) {
	n := newNode(t)
	flag := filepath.Join(t.TempDir(), "go")
	script := "(while [ ! -e " + flag + " ]; do sleep .02; done; exit 42) >/dev/null"
	id, pid, log, err := n.orphan(script)
	if err != nil {
		t.Fatal(err)
	}
	if parentOf(t, pid) != n.cmd.Process.Pid {
		t.Error("the keeper is not its parent")
	}
	started := func() bool {
		l, err := n.c.List(n.ctx)
		if err != nil || len(l) != 1 || l[0].ID != id || l[0].PID != pid {
			t.Fatalf("list %+v, %v", l, err)
		}
		return l[0].Started
	}
	if started() {
		t.Error("it counts as started before anybody said so")
	}
	for range 2 {
		if err := n.c.Start(n.ctx, id); err != nil {
			t.Fatal(err)
		}
	}
	n.killWorker()
	if !started() {
		t.Error("the next worker does not know that it was started")
	}
	if err := os.WriteFile(flag, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if x := n.wait(id)[id]; x.Status != 42 || x.PID != pid || x.Unknown {
		t.Errorf("exit %+v", x)
	}
	if got := logText(t, log, "stdout"); got != "said before\n" {
		t.Errorf("log %q", got)
	}
	if err := n.c.Delete(n.ctx, id); err != nil {
		t.Error(err)
	}
}

func TestTakeRefuses(t *testing.T) {
	n := newNode(t)
	null := mustOpen(t, os.DevNull)
	for _, r := range []monitor.TakeRequest{
		{ID: "../x", PID: 2, PIDFD: null}, {ID: newID(), PID: 1, PIDFD: null}, {ID: newID(), PID: 0, PIDFD: null},
		{ID: newID(), PID: 2, PIDFD: null, Kept: monitor.Kept{Gate: null}},
	} {
		if err := n.c.Take(n.ctx, r); !errs.Is(err, errs.InvalidArgument) {
			t.Errorf("%+v: %v", r, err)
		}
	}
}
