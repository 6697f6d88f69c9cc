package monitor_test

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/testhost"
	"github.com/naru-project/naru/runtime/monitor"
	"github.com/naru-project/naru/runtime/plan"
)

func TestRotation(t *testing.T) {
	n := newNode(t)
	c := n.run(chatter(t))
	logs := []string{c.logPath}
	for i := range 40 {
		path := filepath.Join(t.TempDir(), itoa(i+1)+".log")
		f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o640)
		if err != nil {
			t.Fatal(err)
		}
		if i%5 == 4 {
			n.killWorker()
		}
		if err := n.c.SetLog(n.ctx, c.id, f); err != nil {
			t.Fatal(err)
		}
		_ = f.Close()
		old, err := os.Stat(logs[len(logs)-1])
		if err != nil {
			t.Fatal(err)
		}
		logs = append(logs, path)
		time.Sleep(2 * time.Millisecond)
		if again, err := os.Stat(logs[len(logs)-2]); err != nil || again.Size() != old.Size() {
			t.Fatalf("the old log grew from %d to %d after the rotation", old.Size(), again.Size())
		}
	}
	_, _ = c.stdin.WriteString("\n")
	n.wait(c.id)
	all := filepath.Join(t.TempDir(), "all.log")
	var joined []byte
	for _, l := range logs {
		p, err := os.ReadFile(l)
		if err != nil {
			t.Fatal(err)
		}
		if len(p) > 0 && p[len(p)-1] != '\n' {
			t.Fatalf("%s ends in a half record", l)
		}
		joined = append(joined, p...)
	}
	if err := os.WriteFile(all, joined, 0o600); err != nil {
		t.Fatal(err)
	}
	c.logPath = all
	t.Logf("%d lines in %d files", checkChatter(t, c), len(logs))
}

// attach returns the reading ends.
func (n *node) attach(c *container, lossless bool) (out, err *os.File) {
	n.t.Helper()
	or, ow := pipe(n.t)
	er, ew := pipe(n.t)
	do := n.c.Attach
	if lossless {
		do = n.c.AttachLossless
	}
	if e := do(n.ctx, c.id, ow, ew); e != nil {
		n.t.Fatal(e)
	}
	_, _ = ow.Close(), ew.Close()
	n.t.Cleanup(func() { _, _ = or.Close(), er.Close() })
	return or, er
}

func TestAttach(t *testing.T) {
	n := newNode(t)
	c := n.run(spec{args: []string{"read x; echo got $x; echo err >&2; read x; echo bye; exit 0"}})
	a, ae := n.attach(c, false)
	b, be := n.attach(c, false)
	_, _ = c.stdin.WriteString("one\n")
	buf := make([]byte, 100)
	for _, f := range []*os.File{a, b} {
		if m, err := f.Read(buf); err != nil || string(buf[:m]) != "got one\n" {
			t.Errorf("%q %v", buf[:m], err)
		}
	}
	_, _ = c.stdin.WriteString("two\n")
	for _, f := range []*os.File{a, b} {
		if p, err := io.ReadAll(f); err != nil || string(p) != "bye\n" {
			t.Errorf("%q %v", p, err)
		}
	}
	for _, f := range []*os.File{ae, be} {
		if p, err := io.ReadAll(f); err != nil || string(p) != "err\n" {
			t.Errorf("%q %v", p, err)
		}
	}
	n.wait(c.id)
	// Attached to what has ended: the end comes at once.
	late, _ := n.attach(c, false)
	if p, err := io.ReadAll(late); err != nil || len(p) != 0 {
		t.Errorf("%q %v", p, err)
	}
}

// TestSlowAttacher: who does not read is dropped after a while, and slows
// neither the log nor others.
func TestSlowAttacher(t *testing.T) {
	n := newNode(t)
	total := (20 << 20) / testhost.Factor()
	c := n.run(spec{args: []string{fmt.Sprintf("read x; head -c %d /dev/zero | tr '\\0' x; echo; read x", total)}})
	slow, _ := n.attach(c, false)
	fast, _ := n.attach(c, true)
	start := time.Now()
	_, _ = c.stdin.WriteString("\n")
	var got int
	buf := make([]byte, 64<<10)
	for got < total+1 {
		m, err := fast.Read(buf)
		if err != nil {
			t.Fatalf("the fast reader after %d bytes: %v", got, err)
		}
		got += m
	}
	if d := time.Since(start); d > testhost.Limit(4*time.Second) {
		t.Errorf("the slow reader held up the fast one for %v", d)
	}
	n.eventually("the log", func() bool { return bytes.Count(c.rawLog(), []byte(" F ")) == 1 })
	if got := len(c.logText("stdout")); got != total+1 {
		t.Errorf("%d bytes are in the log, want %d", got, total+1)
	}
	if d := time.Since(start); d > testhost.Limit(4*time.Second) {
		t.Errorf("the slow reader held up the log for %v", d)
	}
	// Dropped: what was in its pipe is there, then the end.
	time.Sleep(6*time.Second - time.Since(start))
	p, err := io.ReadAll(slow)
	if err != nil || len(p) == 0 || len(p) > 400<<10 {
		t.Errorf("the slow reader got %d bytes, %v", len(p), err)
	}
	_, _ = c.stdin.WriteString("\n")
	n.wait(c.id)
}

// TestLosslessAttacher: everything arrives at one who reads slowly.
func TestLosslessAttacher(t *testing.T) {
	n := newNode(t)
	const total = 4 << 20
	c := n.run(spec{args: []string{fmt.Sprintf("read x; head -c %d /dev/zero | tr '\\0' y; echo", total)}})
	out, _ := n.attach(c, true)
	_, _ = c.stdin.WriteString("\n")
	var got int
	buf := make([]byte, 64<<10)
	for {
		m, err := out.Read(buf)
		got += m
		if err == io.EOF {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	if got != total+1 {
		t.Errorf("got %d bytes of %d", got, total+1)
	}
	n.wait(c.id)
	if len(c.logText("stdout")) != total+1 {
		t.Error("the log differs")
	}
	// One who stops reading is dropped, and the container goes on.
	c = n.run(spec{args: []string{fmt.Sprintf("read x; head -c %d /dev/zero | tr '\\0' y; echo", total)}})
	n.attach(c, true)
	_, _ = c.stdin.WriteString("\n")
	n.wait(c.id)
	if len(c.logText("stdout")) != total+1 {
		t.Error("the log differs")
	}
}

// TestHungLogs: logs that hang (FIFOs that nobody reads), more than the pool
// has places, hold up nobody else: not starts, execs, exits, other logs.
func TestHungLogs(t *testing.T) {
	n := newNode(t)
	var hung []*container
	var unblock []*os.File
	for range 8 {
		path := filepath.Join(t.TempDir(), "log")
		if err := unix.Mkfifo(path, 0o600); err != nil {
			t.Fatal(err)
		}
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(fd), "hung log")
		unblock = append(unblock, f)
		s := chatter(t)
		s.log = f
		hung = append(hung, n.run(s))
	}
	time.Sleep(200 * time.Millisecond) // all of them hang now
	start := time.Now()
	for i := range 10 {
		c := n.run(spec{args: []string{"echo hello; exit " + itoa(i)}})
		if x := n.wait(c.id)[c.id]; x.Status != i {
			t.Errorf("exit %+v", x)
		}
		if got := c.logText("stdout"); got != "hello\n" {
			t.Errorf("log %q", got)
		}
		p, err := n.exec(n.c, spec{args: []string{"exit 4"}}, false, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		if x, err := p.Wait(n.ctx); err != nil || x.Status != 4 {
			t.Errorf("%+v %v", x, err)
		}
		p.Close()
	}
	if d := time.Since(start); d > testhost.Limit(10*time.Second) {
		t.Errorf("10 containers and execs beside hung logs took %v", d)
	}
	// The exit of one with a hung log is told too, a drain time later.
	begin := time.Now()
	_ = unix.PidfdSendSignal(int(hung[0].pidfd.Fd()), unix.SIGKILL, nil, 0)
	n.wait(hung[0].id)
	if d := time.Since(begin); d > testhost.Limit(4*time.Second) {
		t.Errorf("exit with a hung log after %v", d)
	}
	begin = time.Now()
	if err := n.c.Delete(n.ctx, hung[0].id); err != nil {
		t.Errorf("delete with a hung log: %v", err)
	}
	if d := time.Since(begin); d > testhost.Limit(5*time.Second) {
		t.Errorf("delete with a hung log took %v", d)
	}
	// Unhang them, so that the test can end.
	stop := make(chan struct{})
	for _, f := range unblock {
		go func() {
			buf := make([]byte, 1<<20)
			for {
				if _, err := f.Read(buf); err != nil {
					return
				}
				select {
				case <-stop:
					return
				default:
				}
			}
		}()
	}
	for _, c := range hung[1:] {
		_, _ = c.stdin.WriteString("\n")
	}
	ids := []string{}
	for _, c := range hung[1:] {
		ids = append(ids, c.id)
	}
	for id, x := range n.wait(ids...) {
		if x.Status != 7 && id != hung[0].id {
			t.Errorf("exit %+v", x)
		}
	}
	close(stop)
	for _, f := range unblock { // a last byte ends the readers
		_, _ = f.Write([]byte{0})
	}
	time.Sleep(50 * time.Millisecond)
	for _, f := range unblock {
		_ = f.Close()
	}
}

func TestFullLogDisk(t *testing.T) {
	n := newNode(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=256k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	path := filepath.Join(dir, "0.log")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o640)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	c := n.run(spec{log: f, args: []string{"i=0; while [ $i -lt 20000 ]; do echo line $i of a container that fills the disk; i=$((i+1)); done; read x; echo after; exit 3"}})
	n.eventually("dropped bytes", func() bool {
		l, err := n.c.List(n.ctx)
		return err == nil && len(l) == 1 && l[0].Dropped > 500_000
	})
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_REMOUNT, "size=4m"); err != nil {
		t.Fatal(err)
	}
	n.killWorker()
	_, _ = c.stdin.WriteString("\n")
	if x := n.wait(c.id)[c.id]; x.Status != 3 {
		t.Errorf("exit %+v", x)
	}
	text := logText(t, path, "stdout") // whole records only
	if !strings.HasPrefix(text, "line 0 of") || !strings.HasSuffix(text, "after\n") {
		t.Errorf("log: %.60q … %q", text, text[max(0, len(text)-60):])
	}
	l, err := n.c.List(n.ctx)
	if err != nil || l[0].Dropped < 500_000 {
		t.Errorf("dropped after a restart of the worker: %+v, %v", l, err)
	}
}

func TestTerminal(t *testing.T) {
	n := newNode(t)
	mfd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Skipf("no /dev/ptmx here: %v", err)
	}
	master := os.NewFile(uintptr(mfd), "master")
	defer master.Close()
	if err := unix.IoctlSetPointerInt(mfd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	sfd, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(mfd), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
	if errno != 0 {
		t.Fatal(errno)
	}
	slave := os.NewFile(sfd, "slave")
	b := plan.New("status", "gate", "tty", "mounts")
	b.Sys(plan.StageSession, unix.SYS_SETSID)
	b.Sys(plan.StageTerminal, unix.SYS_IOCTL, plan.Slot(2), plan.Int(unix.TIOCSCTTY), plan.Int(0))
	program(b, spec{args: []string{"stty -echo; tty; read x; echo you said $x; i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i+1)); done; read x; exit 6"}}, 2, 2, 2, 3, 1)
	f, err := b.Memfd()
	if err != nil {
		t.Fatal(err)
	}
	sr, sw := pipe(t)
	gr, gw := pipe(t)
	mnt := hostMounts(t)
	c := &container{n: n, id: newID(), logPath: filepath.Join(t.TempDir(), "0.log")}
	log, err := os.Create(c.logPath)
	if err != nil {
		t.Fatal(err)
	}
	got, err := n.c.Create(n.ctx, monitor.CreateRequest{
		ID: c.id, Plan: f, FDs: []*os.File{sw, gr, slave, mnt}, Clone: plan.Clone{Cgroup: -1}, TTY: true,
		Kept: monitor.Kept{Status: sr, Gate: gw, Pty: master, Log: log},
	})
	for _, x := range []*os.File{f, sw, gr, slave, mnt, sr, gw, log} {
		_ = x.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer got.PIDFD.Close()
	if err := n.c.Start(n.ctx, c.id); err != nil {
		t.Fatal(err)
	}
	out, w := pipe(t)
	defer out.Close()
	if err := n.c.Attach(n.ctx, c.id, w, nil); err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	time.Sleep(50 * time.Millisecond)
	files, err := n.c.Files(n.ctx, c.id)
	if err != nil || files.Pty == nil || !files.TTY {
		t.Fatalf("%+v %v", files, err)
	}
	_, _ = files.Pty.WriteString("hello\n")
	n.eventually("the lines", func() bool { return bytes.HasSuffix(c.rawLog(), []byte("line 1999\r\n")) })
	n.killWorker()
	_, _ = files.Pty.WriteString("\n")
	files.Close()
	if x := n.wait(c.id)[c.id]; x.Status != 6 {
		t.Errorf("exit %+v", x)
	}
	text := c.logText("stdout")
	var want strings.Builder
	for i := range 2000 {
		fmt.Fprintf(&want, "line %d\r\n", i)
	}
	if !strings.Contains(text, "you said hello\r\n"+want.String()) {
		t.Errorf("log %.300q", text)
	}
	if p, _ := io.ReadAll(out); !strings.Contains(string(p), "you said hello\r\nline 0\r\n") {
		t.Errorf("attached: %.200q", p)
	}
}

// TestDescendantsAreLogged: what outlives the container's first process goes
// on being logged until the container is deleted.
func TestDescendantsAreLogged(t *testing.T) {
	n := newNode(t)
	dir := t.TempDir()
	script := "echo $$ > pid; while [ ! -e go ]; do sleep 0.01; done; echo late; exec sleep 1000"
	c := n.run(spec{args: []string{"cd " + dir + "; sh -c '" + script + "' & while [ ! -s pid ]; do sleep 0.01; done; printf 'no end'; exit 0"}})
	start := time.Now()
	n.wait(c.id)
	if d := time.Since(start); d > testhost.Limit(1500*time.Millisecond) {
		t.Errorf("the exit took %v although the pipe was empty", d)
	}
	if p, _ := os.ReadFile(c.logPath); !bytes.HasSuffix(p, []byte(" stdout P no end\n")) {
		t.Errorf("log at the exit %q", p)
	}
	p, err := os.ReadFile(filepath.Join(dir, "pid"))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(p)))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Kill(pid, unix.SIGKILL) }()
	if err := os.WriteFile(filepath.Join(dir, "go"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	n.eventually("the late line", func() bool { return bytes.HasSuffix(c.rawLog(), []byte(" F late\n")) })
	if got := c.logText("stdout"); got != "no endlate\n" {
		t.Errorf("log %q", got)
	}
	if parent := parentOf(t, pid); parent != n.cmd.Process.Pid {
		t.Errorf("the descendant's parent is %d, not the keeper", parent)
	}
}

// TestThroughput measures a container that writes lines of 100 bytes.
func TestThroughput(t *testing.T) {
	n := newNode(t)
	size := (512 << 20) / testhost.Factor()
	c := n.run(spec{args: []string{fmt.Sprintf("read x; yes %s | head -c %d", strings.Repeat("l", 99), size)}})
	start := time.Now()
	_, _ = c.stdin.WriteString("\n")
	n.wait(c.id)
	d := time.Since(start)
	st, err := os.Stat(c.logPath)
	if err != nil {
		t.Fatal(err)
	}
	rate := float64(size>>20) / d.Seconds()
	t.Logf("%.0f MB/s with yes and head before it, log of %d MB", rate, st.Size()>>20)
	if rate < 50/float64(testhost.Factor()) {
		t.Errorf("%.0f MB/s is slow even for a loaded machine", rate)
	}
}
