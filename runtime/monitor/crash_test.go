package monitor_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/testhost"
	"github.com/naru-project/naru/runtime/monitor"
)

// chatter is a container program: this test binary, which writes numbered lines
// of changing length to stdout and stderr, as fast as it can, until a line
// comes in.
func chatter(t testing.TB) spec {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return spec{args: []string{exe, chatterArg}}
}

const chatterArg = "chatter-process"

func chatterProcess() {
	var stop atomic.Bool
	var wg sync.WaitGroup
	for _, fd := range []int{1, 2} {
		wg.Go(func() {
			var b []byte
			for i := 0; ; i++ {
				last := stop.Load()
				if last {
					b = append(b, "the end\n"...)
				} else {
					b = strconv.AppendInt(b, int64(i), 10)
					b = append(b, ' ')
					for range i % 97 {
						b = append(b, '.')
					}
					b = append(b, '\n')
				}
				if len(b) < 4000 && !last {
					continue
				}
				for len(b) > 0 {
					n, err := unix.Write(fd, b)
					if err != nil && err != unix.EINTR {
						os.Exit(99)
					}
					b = b[max(n, 0):]
				}
				if last {
					return
				}
			}
		})
	}
	_, _ = unix.Read(0, make([]byte, 10))
	stop.Store(true)
	wg.Wait()
	os.Exit(7)
}

func checkChatter(t *testing.T, c *container) (count int) {
	t.Helper()
	for _, stream := range []string{"stdout", "stderr"} {
		lines := strings.Split(strings.TrimSuffix(c.logText(stream), "\n"), "\n")
		last := len(lines) - 1
		for i, l := range lines {
			num, dots, _ := strings.Cut(l, " ")
			if i < last && (num != strconv.Itoa(i) || len(dots) != i%97 || strings.Trim(dots, ".") != "") {
				t.Fatalf("%s: line %d is %.120q", stream, i, l)
			}
		}
		if lines[last] != "the end" {
			t.Fatalf("%s: the last line is %.120q", stream, lines[last])
		}
		count += len(lines)
	}
	return count
}

// TestKillWorker kills the worker again and again while containers write at
// full speed, take input and exit.
func TestKillWorker(t *testing.T) {
	kills := 220
	if testing.Short() {
		kills = 25
	}
	n := newNode(t)
	var chat []*container
	for range 3 {
		chat = append(chat, n.run(chatter(t)))
	}
	echo := n.run(spec{args: []string{"exec cat"}})
	var said strings.Builder
	var quick []*container
	for i := range kills {
		time.Sleep(time.Duration(rand.IntN(10000)) * time.Microsecond)
		line := fmt.Sprintf("message %d\n", i)
		if _, err := echo.stdin.WriteString(line); err != nil {
			t.Fatal(err)
		}
		said.WriteString(line)
		if i%10 == 0 { // one that exits about when the worker dies
			quick = append(quick, n.run(spec{args: []string{"read x; exit " + itoa(i/10)}}))
			_ = quick[len(quick)-1].stdin.Close()
			_ = n.c.CloseStdin(n.ctx, quick[len(quick)-1].id)
		}
		n.killWorker()
	}
	for _, c := range append(chat, echo) {
		if !alive(c.pid) || parentOf(t, c.pid) != n.cmd.Process.Pid {
			t.Fatal("a container did not survive")
		}
	}
	ids := []string{echo.id}
	for _, c := range chat {
		if _, err := c.stdin.WriteString("\n"); err != nil {
			t.Fatal(err)
		}
		ids = append(ids, c.id)
	}
	for _, c := range quick {
		ids = append(ids, c.id)
	}
	if err := n.c.CloseStdin(n.ctx, echo.id); err != nil {
		t.Fatal(err)
	}
	_ = echo.stdin.Close()
	exits := n.wait(ids...)
	for i, c := range quick {
		if x := exits[c.id]; x.Status != i || x.Signal != 0 || x.Unknown {
			t.Errorf("exit of a quick one: %+v, want status %d", x, i)
		}
	}
	lines := 0
	for _, c := range chat {
		if x := exits[c.id]; x.Status != 7 {
			t.Errorf("exit %+v", x)
		}
		lines += checkChatter(t, c)
	}
	if got := echo.logText("stdout"); got != said.String() {
		t.Errorf("the echo differs: %d bytes, want %d", len(got), said.Len())
	}
	t.Logf("%d kills, %d lines", kills, lines)
}

// TestKillWorkerDuringCalls kills the worker while calls are under way: each
// call succeeds, or fails with a class that says "try again".
func TestKillWorkerDuringCalls(t *testing.T) {
	n := newNode(t)
	stop := make(chan struct{})
	killed := make(chan int)
	go func() {
		count := 0
		for {
			select {
			case <-stop:
				killed <- count
				return
			case <-time.After(testhost.Limit(time.Duration(5000+rand.IntN(30000)) * time.Microsecond)):
			}
			if info, err := n.c.Info(n.ctx); err == nil {
				_ = unix.Kill(info.WorkerPID, unix.SIGKILL)
				count++
			}
		}
	}()
	tries, lost, started := 0, 0, 0
	for end := time.Now().Add(testhost.Limit(4 * time.Second)); time.Now().Before(end); {
		tries++
		c, err := n.tryCreate(spec{args: []string{"exec sleep 1000"}, hold: true})
		if errs.Is(err, errs.Unavailable) {
			lost++
			continue
		}
		if err != nil {
			t.Fatalf("create: %v", err)
		}
		if err := n.c.Start(n.ctx, c.id); err != nil {
			t.Fatalf("start: %v", err)
		}
		if cmd, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", c.pid)); strings.HasPrefix(string(cmd), "naru") {
			t.Fatalf("started, but it runs %q", cmd)
		}
		started++
		if err := n.c.Delete(n.ctx, c.id); err != nil {
			t.Fatalf("delete: %v", err)
		}
		if alive(c.pid) {
			t.Fatal("deleted, but it lives")
		}
	}
	close(stop)
	t.Logf("%d creates, %d lost, %d started, %d kills", tries, lost, started, <-killed)
	if started == 0 {
		t.Error("nothing was started")
	}
	n.eventually("children of lost creates to end", func() bool {
		return strings.Count(psChildren(n.cmd.Process.Pid), "\n") == 1 // the worker
	})
}

func TestExecIsLostWithTheWorker(t *testing.T) {
	n := newNode(t)
	p, err := n.exec(n.c, spec{args: []string{"exec sleep 1000"}}, false, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	n.killWorker()
	if _, err := p.Wait(n.ctx); !errs.Is(err, errs.Unavailable) {
		t.Errorf("wait: %v", err)
	}
	if err := unix.PidfdSendSignal(int(p.PIDFD.Fd()), unix.SIGKILL, nil, 0); err != nil {
		t.Errorf("kill by the pidfd: %v", err)
	}
	n.eventually("the exec to be reaped by the keeper", func() bool { return !alive(p.PID) })
}

// TestUpgrade replaces the keeper's program in place while containers write
// and exit.
func TestUpgrade(t *testing.T) {
	n := newNode(t)
	chat := n.run(chatter(t))
	worker, keeper := n.workerPID(), n.cmd.Process.Pid
	want := map[string]int{}
	var ids []string
	for round := range 10 {
		var round1 []*container
		for i := range 5 {
			c := n.run(spec{args: []string{"read x; exit " + itoa(round*5+i)}})
			want[c.id] = round*5 + i
			ids = append(ids, c.id)
			round1 = append(round1, c)
		}
		for _, c := range round1 { // they exit while the program is replaced
			_, _ = c.stdin.WriteString("\n")
		}
		if round%2 == 0 {
			f := mustOpen(t, binary)
			if err := n.c.Upgrade(n.ctx, f); err != nil {
				t.Fatalf("upgrade %d: %v\n%s", round, err, n.keeperLog())
			}
		} else if err := n.c.Upgrade(n.ctx, nil); err != nil {
			t.Fatalf("upgrade %d: %v\n%s", round, err, n.keeperLog())
		}
	}
	exits := n.wait(ids...)
	for id, status := range want {
		if x := exits[id]; x.Status != status || x.Unknown {
			t.Errorf("exit %+v, want %d", x, status)
		}
	}
	if n.workerPID() != worker || !alive(keeper) || parentOf(t, worker) != keeper || parentOf(t, chat.pid) != keeper {
		t.Error("the worker or the container noticed")
	}
	began := func() int { return strings.Count(n.keeperLog(), "keeper runs, pid "+itoa(keeper)) }
	n.eventually("the keeper's eleventh beginning", func() bool { return began() >= 11 })
	if began() != 11 {
		t.Errorf("the keeper began %d times, want 11", began())
	}
	// The next worker comes from the new program and finds everything.
	if err := n.c.RestartWorker(n.ctx); err != nil {
		t.Fatal(err)
	}
	if err := n.cmd.Process.Signal(unix.SIGUSR2); err != nil { // keeper, then worker
		t.Fatal(err)
	}
	n.eventually("SIGUSR2", func() bool { return strings.Count(n.keeperLog(), "keeper runs") == 12 })
	second := n.workerPID()
	_ = n.cmd.Process.Signal(unix.SIGHUP)
	n.eventually("SIGHUP", func() bool { return n.workerPID() != second })
	_, _ = chat.stdin.WriteString("\n")
	if x := n.wait(chat.id)[chat.id]; x.Status != 7 {
		t.Errorf("exit %+v", x)
	}
	t.Logf("%d lines", checkChatter(t, chat))
	if fds := countFDs(t, keeper); fds > 40+12*len(ids) {
		t.Errorf("the keeper holds %d descriptors", fds)
	}
}

func countFDs(t testing.TB, pid int) int {
	t.Helper()
	d, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

// TestKillKeeper: containers and logs go on, the next keeper adopts them, and
// their exits are exact where the kernel tells them, else exact or unknown.
func TestKillKeeper(t *testing.T) {
	told := testhost.TellsExits(t)
	n := newNode(t)
	chat := n.run(chatter(t))
	late := n.run(spec{args: []string{"read x; exit 33"}})
	early := n.run(spec{args: []string{"read x; exit 34"}})
	held := n.run(spec{args: []string{"exit 35"}, hold: true})
	gone := n.run(spec{args: []string{"exit 36"}})
	n.wait(gone.id)
	size := func() int64 {
		st, err := os.Stat(chat.logPath)
		if err != nil {
			t.Fatal(err)
		}
		return st.Size()
	}
	for round := range 3 {
		_ = n.cmd.Process.Kill()
		_ = n.cmd.Wait()
		before := size()
		n.eventually("logs to go on without a keeper", func() bool { return size() > before })
		if _, err := n.tryCreate(spec{args: []string{"true"}}); !errs.Is(err, errs.Unavailable) {
			t.Errorf("create without a keeper: %v", err)
		}
		if round == 0 {
			_, _ = early.stdin.WriteString("\n") // it exits while there is no keeper
			time.Sleep(100 * time.Millisecond)
			reapAll()
		}
		n.startKeeper()
		n.eventually("the next keeper", func() bool {
			i, err := n.c.Info(n.ctx)
			return err == nil && !i.Orphan && i.KeeperPID == n.cmd.Process.Pid
		})
	}
	if err := n.c.Start(n.ctx, held.id); err != nil {
		t.Errorf("start of what the dead keeper created: %v", err)
	}
	_, _ = late.stdin.WriteString("\n")
	_, _ = chat.stdin.WriteString("\n")
	go func() { // as an init system does
		for range 200 {
			reapAll()
			time.Sleep(20 * time.Millisecond)
		}
	}()
	exits := n.wait(chat.id, late.id, early.id, held.id, gone.id)
	for c, status := range map[*container]int{chat: 7, late: 33, early: 34, held: 35, gone: 36} {
		x := exits[c.id]
		if unknown := x.Unknown && x.Status == 255 && c != gone; unknown && !told {
			continue
		}
		if x.Status != status || x.Unknown {
			t.Errorf("exit %+v, want %d (the kernel tells exits: %v)", x, status, told)
		}
	}
	t.Logf("%d lines", checkChatter(t, chat))
}

// TestCallsWaitForAKeeper: what may be repeated is, until there is a keeper
// again; a start in that moment is not a start that failed.
func TestCallsWaitForAKeeper(t *testing.T) {
	n := newNode(t)
	held := n.run(spec{args: []string{"exit 35"}, hold: true})
	gone := n.run(spec{args: []string{"exit 36"}})
	n.wait(gone.id)
	_ = n.cmd.Process.Kill()
	_ = n.cmd.Wait()
	n.eventually("the worker to say that it is alone", func() bool { return errs.Is(n.c.Ping(n.ctx), errs.Unavailable) })
	calls := make(chan error, 2)
	go func() { calls <- n.c.Start(n.ctx, held.id) }()
	go func() { calls <- n.c.Delete(n.ctx, gone.id) }()
	time.Sleep(100 * time.Millisecond)
	if len(calls) > 0 {
		t.Fatalf("a call without a keeper ended: %v", <-calls)
	}
	n.startKeeper()
	for range cap(calls) {
		if err := <-calls; err != nil {
			t.Error(err)
		}
	}
	if x := n.wait(held.id)[held.id]; x.Status != 35 && !x.Unknown {
		t.Errorf("exit %+v", x)
	}
}

// reapAll reaps what was re-parented to this test when a keeper was killed,
// but leaves the present keeper to who waits for it.
func reapAll() {
	kids, _ := os.ReadFile("/proc/self/task/" + strconv.Itoa(os.Getpid()) + "/children")
	tasks, _ := os.ReadDir("/proc/self/task")
	for _, task := range tasks {
		k, _ := os.ReadFile("/proc/self/task/" + task.Name() + "/children")
		kids = append(append(kids, ' '), k...)
	}
	for _, k := range strings.Fields(string(kids)) {
		comm, err := os.ReadFile("/proc/" + k + "/comm")
		if err != nil || bytes.HasPrefix(comm, []byte("naru-monitor")) {
			continue
		}
		pid, _ := strconv.Atoi(k)
		_, _ = unix.Wait4(pid, nil, unix.WNOHANG, nil)
	}
}

func TestKillBoth(t *testing.T) {
	n := newNode(t)
	c := n.run(spec{args: []string{"exit 12"}})
	n.wait(c.id)
	w := n.workerPID()
	_ = unix.Kill(w, unix.SIGSTOP)
	_ = n.cmd.Process.Kill()
	_ = n.cmd.Wait()
	_ = unix.Kill(w, unix.SIGKILL)
	n.eventually("the worker to die", func() bool { reapAll(); return !alive(w) })
	n.startKeeper()
	// The exit was written: it is told by the next keeper.
	if x := n.wait(c.id)[c.id]; x.Status != 12 {
		t.Errorf("exit %+v", x)
	}
	if err := n.c.DeleteEnded(n.ctx, c.id); err != nil {
		t.Error(err)
	}
}

func TestOneKeeperPerFolder(t *testing.T) {
	n := newNode(t)
	out, err := exec.Command(binary, "keeper", "--dir", n.dir).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "another keeper") {
		t.Errorf("a second keeper: %v, %s", err, out)
	}
	if err := n.c.Ping(n.ctx); err != nil {
		t.Errorf("the first one after that: %v", err)
	}
}

func TestSIGTERM(t *testing.T) {
	n := newNode(t)
	c := n.run(spec{args: []string{"exec sleep 1000"}})
	_ = n.cmd.Process.Signal(unix.SIGTERM)
	n.eventually("the keeper to refuse", func() bool { return strings.Contains(n.keeperLog(), "the keeper stays") })
	if !alive(c.pid) || n.c.Ping(n.ctx) != nil {
		t.Error("SIGTERM ended something")
	}
}

func TestKillOnExit(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "m")
	n := newNode(t)
	m := *n
	m.dir = dir
	m.startKeeper("--kill-on-exit")
	m.connect()
	c := m.run(spec{args: []string{"exec sleep 1000"}})
	_ = m.cmd.Process.Signal(unix.SIGTERM)
	if err := m.cmd.Wait(); err != nil {
		t.Errorf("keeper: %v", err)
	}
	_ = m.c.Close()
	if alive(c.pid) {
		t.Error("the container lives")
	}
	if p, err := os.ReadFile(filepath.Join(dir, "exits", c.id)); err != nil || !strings.Contains(string(p), "signal=9\n") {
		t.Errorf("exit file %q, %v", p, err)
	}
}

func TestEnsure(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "m")
	n := newNode(t)
	var clients []*monitor.Client
	type result struct {
		c   *monitor.Client
		err error
	}
	ch := make(chan result)
	for range 4 { // all at once: one keeper comes of it
		go func() {
			c, err := monitor.Ensure(n.ctx, monitor.EnsureOptions{Binary: binary, Dir: dir})
			ch <- result{c, err}
		}()
	}
	keepers := map[int]bool{}
	for range 4 {
		r := <-ch
		if r.err != nil {
			t.Fatal(r.err)
		}
		clients = append(clients, r.c)
		i, err := r.c.Info(n.ctx)
		if err != nil {
			t.Fatal(err)
		}
		keepers[i.KeeperPID] = true
	}
	if len(keepers) != 1 {
		t.Errorf("%d keepers", len(keepers))
	}
	for pid := range keepers {
		if sid, err := unix.Getsid(pid); err != nil || sid != pid {
			t.Errorf("session of the keeper: %d, %v", sid, err)
		}
		exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
		if err != nil || !strings.HasPrefix(exe, "/memfd:naru-monitor") {
			t.Errorf("the keeper runs from %q, %v", exe, err)
		}
		for _, c := range clients {
			_ = c.Close()
		}
	}
	// Those that were slower may take the place of the one that ends.
	n.eventually("all keepers and guards to end", func() bool {
		left := keepersOf(dir)
		for _, pid := range left {
			_ = unix.Kill(pid, unix.SIGTERM)
		}
		return len(left) == 0
	})
}

// keepersOf lists the processes that are told of a keeper's folder.
func keepersOf(dir string) (pids []int) {
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range files {
		b, _ := os.ReadFile(f)
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(f))); err == nil && bytes.Contains(b, []byte(dir+"\x00")) {
			pids = append(pids, pid)
		}
	}
	return pids
}
