package monitor_test

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	goruntime "runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/runtime/monitor"
	"github.com/naru-project/naru/runtime/monitor/wire"
	"github.com/naru-project/naru/runtime/plan"
)

// TestMemory is the budget: keeper and worker with 200 containers.
func TestMemory(t *testing.T) {
	if os.Getenv("NARU_TEST_RACE_MONITOR") != "" {
		t.Skip("the race detector's memory is not the monitor's")
	}
	n := newNode(t)
	report := func(when string) int {
		k, w := pss(t, n.cmd.Process.Pid), pss(t, n.workerPID())
		t.Logf("%-28s keeper %4d KiB, worker %4d KiB, together %5d KiB PSS; RSS %d + %d KiB; threads %d + %d; descriptors %d + %d", when, k, w, k+w,
			field(t, n.cmd.Process.Pid, "VmRSS"), field(t, n.workerPID(), "VmRSS"),
			field(t, n.cmd.Process.Pid, "Threads"), field(t, n.workerPID(), "Threads"),
			countFDs(t, n.cmd.Process.Pid), countFDs(t, n.workerPID()))
		return k + w
	}
	report("no containers")
	var all []*container
	for range 200 {
		all = append(all, n.run(spec{args: []string{"echo hello; echo world >&2; read x; while [ $x -gt 0 ]; do echo some words in a line; x=$((x-1)); done; read x; exit 0"}}))
	}
	report("200 started")
	time.Sleep(3 * time.Second)
	idle := report("200 idle")
	for _, c := range all {
		_, _ = c.stdin.WriteString("1000\n")
	}
	time.Sleep(1 * time.Second)
	report("200 writing")
	time.Sleep(4 * time.Second)
	report("200 idle again")
	if idle > 7<<10 {
		t.Errorf("%d KiB for 200 containers are over the budget", idle)
	}
	for _, c := range all {
		_, _ = c.stdin.WriteString("\n")
	}
	ids := []string{}
	for _, c := range all {
		ids = append(ids, c.id)
	}
	n.wait(ids...)
	for _, c := range all {
		if err := n.c.Delete(n.ctx, c.id); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(2 * time.Second)
	report("all deleted")
	if k, w := countFDs(t, n.cmd.Process.Pid), countFDs(t, n.workerPID()); k > 20 || w > 40 {
		t.Errorf("descriptors left: keeper %d, worker %d", k, w)
	}
}

// A child that waits for its start has little of the worker's memory: the
// program, its variables, the heap.
func TestChildrenGetLittleMemory(t *testing.T) {
	if os.Getenv("NARU_TEST_RACE_MONITOR") != "" {
		t.Skip("with cgo all is copied (plan.LeaveOut)")
	}
	n := newNode(t)
	c := n.run(spec{args: []string{"true"}, hold: true})
	if w, child := field(t, n.workerPID(), "VmSize"), field(t, c.pid, "VmSize"); child > 256<<10 || child > w/4 {
		t.Errorf("the worker maps %d KiB, its child %d KiB", w, child)
	}
}

func pss(t testing.TB, pid int) int {
	t.Helper()
	p, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^Pss:\s+(\d+) kB`).FindSubmatch(p)
	v, _ := strconv.Atoi(string(m[1]))
	return v
}

func field(t testing.TB, pid int, name string) int {
	t.Helper()
	p, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^` + name + `:\s+(\d+)`).FindSubmatch(p)
	v, _ := strconv.Atoi(string(m[1]))
	return v
}

// TestPosture looks at keeper and worker as an attacker would.
func TestPosture(t *testing.T) {
	n := newNode(t)
	c := n.run(spec{args: []string{"exec sleep 1000"}})
	w := n.workerPID()
	for name, pid := range map[string]int{"keeper": n.cmd.Process.Pid, "worker": w} {
		exe, err := os.Open(fmt.Sprintf("/proc/%d/exe", pid))
		if err != nil {
			t.Fatal(err)
		}
		seals, err := unix.FcntlInt(exe.Fd(), unix.F_GET_SEALS, 0)
		_ = exe.Close()
		const want = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE
		if err != nil || seals&want != want {
			t.Errorf("%s: seals %#x, %v", name, seals, err)
		}
		var st unix.Stat_t
		if err := unix.Stat(fmt.Sprintf("/proc/%d/environ", pid), &st); err != nil || st.Uid != 0 {
			t.Errorf("%s: %v, uid %d", name, err, st.Uid)
		}
		env, _ := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
		if got := strings.TrimRight(string(env), "\x00"); got != "PATH=/usr/sbin:/usr/bin:/sbin:/bin\x00GODEBUG=asyncpreemptoff=1,disablethp=1" {
			t.Errorf("%s: environment %q", name, got)
		}
	}
	root, err := os.ReadDir(fmt.Sprintf("/proc/%d/root", w))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range root {
		names = append(names, e.Name())
	}
	if strings.Join(names, " ") != "proc rootfs sys" {
		t.Errorf("root of the worker: %q", names)
	}
	mi, _ := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", w))
	if got := bytes.Count(mi, []byte("\n")); got != 3 {
		t.Errorf("mounts of the worker:\n%s", mi)
	}
	for path, mode := range map[string]os.FileMode{"": 0o700, "monitor.sock": 0o600, "lock": 0o600, "exits": 0o700} {
		st, err := os.Stat(filepath.Join(n.dir, path))
		if err != nil || st.Mode().Perm() != mode {
			t.Errorf("%q: mode %v, %v", path, st.Mode(), err)
		}
	}
	// The dynamic loader of the container's program has a fourth for a moment.
	n.eventually("the container to have three descriptors", func() bool {
		fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", c.pid))
		return err == nil && len(fds) == 3
	})
}

// TestNothingLeaksIntoChildren looks for the output of one container in the
// memory of the copies of the worker that others begin as: while it is copied,
// and afterwards. In between the worker's threads get signals, whose frames hold
// the registers that bytes are moved with.
func TestNothingLeaksIntoChildren(t *testing.T) {
	n := newNode(t)
	// Eight bytes again and again: any 16 bytes of the line hold them whole, so
	// that what a single vector register held is found.
	word := rand.Text()[:8]
	canary := strings.Repeat(word, 9)
	first := n.run(spec{args: []string{"i=0; while [ $i -lt 3000 ]; do echo " + canary + "; echo " + canary + " >&2; i=$((i+1)); done; printf " + canary + "; read x"}})
	busy := n.run(spec{args: []string{"exec yes " + canary}, noLog: true})
	slow, _ := n.attach(first, false)
	_ = slow
	look := func(when string) {
		t.Helper()
		child := n.run(spec{args: []string{"true"}, hold: true})
		// Is it really a copy? The worker's own words must be found.
		if findInMemory(t, child.pid, "the keeper is gone; logs go on") == "" {
			t.Fatal("the search does not find what must be there")
		}
		if where := findInMemory(t, child.pid, word); where != "" {
			t.Errorf("%s, output of one container is in the memory of another: %s", when, where)
		}
	}
	for range 5 {
		look("while it is copied")
	}
	if err := n.c.Delete(n.ctx, busy.id); err != nil {
		t.Fatal(err)
	}
	n.eventually("the output", func() bool { return bytes.Count(first.rawLog(), []byte(" stdout F ")) == 3000 })
	look("afterwards")
}

// findInMemory returns the mapping and the bytes around what, or "".
func findInMemory(t testing.TB, pid int, what string) string {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	for line := range strings.Lines(string(maps)) {
		f := strings.Fields(line)
		lo, hi, _ := strings.Cut(f[0], "-")
		a, _ := strconv.ParseUint(lo, 16, 64)
		b, _ := strconv.ParseUint(hi, 16, 64)
		if f[1][0] != 'r' || b-a > 1<<30 {
			continue
		}
		p := make([]byte, b-a)
		m, _ := mem.ReadAt(p, int64(a))
		if i := bytes.Index(p[:m], []byte(what)); i >= 0 {
			return fmt.Sprintf("at %#x in %s: %q", a+uint64(i), strings.TrimSpace(line), p[max(0, i-200):min(m, i+len(what)+200)])
		}
	}
	return ""
}

// TestPause runs the pod init from the monitor's own memfd.
func TestPause(t *testing.T) {
	if os.Getenv("NARU_TEST_RACE_MONITOR") != "" {
		t.Skip("a program with the race detector is not static: no loader in the worker's empty root")
	}
	n := newNode(t)
	bin, err := n.c.Binary(n.ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer bin.Close()
	b := plan.New("status", "gate", "binary", "null", "mounts")
	rec := b.Record(plan.Record{Kind: plan.KindCreated})
	b.Send(plan.StageCreated, rec)
	b.Sys(plan.StageGate, unix.SYS_READ, plan.Slot(1), plan.Ptr(b.Data(make([]byte, 8))), plan.Int(1)).Expect(1)
	for i := range 3 {
		b.Sys(plan.StageStdio, unix.SYS_DUP3, plan.Slot(3), plan.Int(i), plan.Int(0))
	}
	b.Sys(plan.StageStdio, unix.SYS_FCNTL, plan.Slot(0), plan.Int(unix.F_SETFD), plan.Int(unix.FD_CLOEXEC))
	b.Sys(plan.StageStdio, unix.SYS_FCNTL, plan.Slot(2), plan.Int(unix.F_SETFD), plan.Int(unix.FD_CLOEXEC))
	b.Sys(plan.StageSignals, unix.SYS_RT_SIGPROCMASK, plan.Int(unix.SIG_SETMASK), plan.Ptr(b.Data(make([]byte, 8))), plan.Int(0), plan.Int(8))
	b.Sys(plan.StageExec, unix.SYS_EXECVEAT, plan.Slot(2), plan.Ptr(b.Str("")), plan.Ptr(b.Strs([]string{"pause", "pause"})), plan.Ptr(b.Strs(nil)), plan.Int(unix.AT_EMPTY_PATH))
	f, err := b.Memfd()
	if err != nil {
		t.Fatal(err)
	}
	sr, sw := pipe(t)
	gr, gw := pipe(t)
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	mnt := hostMounts(t)
	id := newID()
	got, err := n.c.Create(n.ctx, monitor.CreateRequest{
		ID: id, Plan: f, FDs: []*os.File{sw, gr, bin, null, mnt}, Clone: plan.Clone{Flags: unix.CLONE_NEWPID, Cgroup: -1},
		Kept: monitor.Kept{Status: sr, Gate: gw},
	})
	for _, x := range []*os.File{f, sw, gr, null, mnt, sr, gw} {
		_ = x.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer got.PIDFD.Close()
	if err := n.c.Start(n.ctx, id); err != nil {
		t.Fatal(err)
	}
	time.Sleep(300 * time.Millisecond)
	t.Logf("pause: %d KiB PSS, %d KiB RSS, %d threads", pss(t, got.PID), field(t, got.PID, "VmRSS"), field(t, got.PID, "Threads"))
	before := cpuTicks(t, got.PID)
	pid := itoa(got.PID)
	// An orphan in its PID namespace is reaped without anybody waiting.
	out, err := osexec("nsenter", "-t", pid, "-p", "sh", "-c", "(sleep 0.1 & ) ; exit 0")
	if err != nil {
		t.Fatalf("nsenter: %v %s", err, out)
	}
	time.Sleep(400 * time.Millisecond)
	if z := zombies(t, got.PID); z != 0 {
		t.Errorf("%d zombies in the pod's PID namespace", z)
	}
	for _, s := range []unix.Signal{unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGUSR1} {
		_ = unix.Kill(got.PID, s)
	}
	time.Sleep(500 * time.Millisecond)
	if !alive(got.PID) {
		t.Fatal("a signal ended the pod's init")
	}
	if after := cpuTicks(t, got.PID); after > before+1 {
		t.Errorf("it used %d ticks of CPU while it slept", after-before)
	}
	if err := n.c.Delete(n.ctx, id); err != nil {
		t.Fatal(err)
	}
	if alive(got.PID) {
		t.Error("it outlived its deletion")
	}
}

func cpuTicks(t testing.TB, pid int) int {
	t.Helper()
	p, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	f := strings.Fields(string(p[bytes.LastIndexByte(p, ')')+1:]))
	u, _ := strconv.Atoi(f[11])
	s, _ := strconv.Atoi(f[12])
	return u + s
}

// TestOtherUsersAreTurnedAway: even where the modes of folder and socket were
// changed, only root is served.
func TestOtherUsersAreTurnedAway(t *testing.T) {
	n := newNode(t)
	if err := os.Chmod(n.dir, 0o711); err != nil {
		t.Fatal(err)
	}
	for dir := filepath.Dir(n.dir); len(dir) > len(os.TempDir()); dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o711); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(monitor.Socket(n.dir), 0o666); err != nil {
		t.Fatal(err)
	}
	try := func(uid uintptr) error {
		ch := make(chan error)
		go func() {
			goruntime.LockOSThread() // and never unlocked: the thread ends with the goroutine
			if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, uid, uid, uid); e != 0 {
				ch <- e
				return
			}
			fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
			if err == nil {
				err = unix.Connect(fd, &unix.SockaddrUnix{Name: monitor.Socket(n.dir)})
			}
			if err == nil {
				_, _ = unix.Write(fd, wire.Marshal(wire.KindHello, 1, &wire.Hello{Min: 1, Max: 1}))
				var m int
				if m, err = unix.Read(fd, make([]byte, 1000)); err == nil && m == 0 {
					err = io.EOF
				}
			}
			_ = unix.Close(fd)
			ch <- err
		}()
		return <-ch
	}
	if err := try(0); err != nil {
		t.Fatalf("root: %v", err)
	}
	if err := try(65534); err != io.EOF && err != unix.ECONNRESET && err != unix.EPIPE {
		t.Errorf("another user: %v, want the end of the connection", err)
	}
}
