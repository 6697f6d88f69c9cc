package monitor_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
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

// binary is naru-monitor, built by TestMain.
var binary string

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	if len(os.Args) > 1 && os.Args[1] == chatterArg {
		chatterProcess()
	}
	if os.Getuid() != 0 {
		fmt.Println("skipping: a monitor needs root (mount namespaces, CLONE_PARENT children of other users)")
		return 0
	}
	dir, err := os.MkdirTemp("", "naru-monitor-test-")
	if err != nil {
		fmt.Println(err)
		return 1
	}
	defer func() { _ = os.RemoveAll(dir) }()
	if err := os.Chmod(dir, 0o711); err != nil { // a test lets another user as far as the socket
		fmt.Println(err)
		return 1
	}
	binary = filepath.Join(dir, "naru-monitor")
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", binary, "github.com/naru-project/naru/cmd/monitor")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if race := os.Getenv("NARU_TEST_RACE_MONITOR"); race != "" {
		build.Args = append(build.Args[:2], append([]string{"-race"}, build.Args[2:]...)...)
		build.Env = append(os.Environ(), "CGO_ENABLED=1")
	}
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Printf("build naru-monitor: %v\n%s", err, out)
		return 1
	}
	// Orphans of killed keepers must come to somebody who reaps them.
	_ = unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
	_ = os.Setenv("TMPDIR", dir) // so that a mount of ours is known by its place; others may mount, too
	code := m.Run()
	if left := mounts(dir); code == 0 && left > 0 {
		fmt.Printf("leak: %d mounts below %s\n", left, dir)
		code = 1
	}
	if left := ownMonitors(); code == 0 && len(left) > 0 {
		fmt.Printf("leak: processes %v still run\n", left)
		code = 1
	}
	return code
}

func mounts(dir string) int {
	p, _ := os.ReadFile("/proc/self/mountinfo")
	return bytes.Count(p, []byte(" "+dir))
}

// ownMonitors lists descendants of this process that still run.
func ownMonitors() (pids []string) {
	kids, _ := os.ReadFile("/proc/self/task/" + strconv.Itoa(os.Getpid()) + "/children")
	for _, k := range strings.Fields(string(kids)) {
		stat, err := os.ReadFile("/proc/" + k + "/stat")
		if err == nil && !bytes.Contains(stat, []byte(") Z ")) {
			cmd, _ := os.ReadFile("/proc/" + k + "/cmdline")
			pids = append(pids, k+":"+strings.ReplaceAll(string(cmd), "\x00", " "))
		}
	}
	return pids
}

// node is one keeper with its folder.
type node struct {
	t   testing.TB
	dir string
	bin string
	cmd *exec.Cmd
	c   *monitor.Client
	ctx context.Context
	log *os.File
}

func newNode(t testing.TB) *node {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), testhost.Limit(5*time.Minute))
	t.Cleanup(cancel)
	n := &node{t: t, dir: filepath.Join(t.TempDir(), "monitor"), bin: binary, ctx: ctx}
	var err error
	if n.log, err = os.Create(filepath.Join(t.TempDir(), "keeper.log")); err != nil {
		t.Fatal(err)
	}
	n.startKeeper()
	n.connect()
	t.Cleanup(n.stop)
	return n
}

func (n *node) startKeeper(args ...string) {
	n.t.Helper()
	n.cmd = exec.Command(n.bin, append([]string{"keeper", "--dir", n.dir}, args...)...)
	n.cmd.Stderr = n.log
	if err := n.cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) connect() {
	n.t.Helper()
	n.c = n.client()
}

func (n *node) client() *monitor.Client {
	n.t.Helper()
	for end := time.Now().Add(testhost.Limit(20 * time.Second)); ; time.Sleep(5 * time.Millisecond) {
		c, err := monitor.Connect(n.ctx, monitor.Socket(n.dir))
		if err == nil {
			return c
		}
		if time.Now().After(end) {
			n.t.Fatalf("connect: %v\n%s", err, n.keeperLog())
		}
	}
}

func (n *node) keeperLog() string {
	p, _ := os.ReadFile(n.log.Name())
	return string(p)
}

// stop deletes every container and ends the keeper.
func (n *node) stop() {
	ctx, cancel := context.WithTimeout(context.Background(), testhost.Limit(30*time.Second))
	defer cancel()
	entries, err := n.c.List(ctx)
	if err != nil {
		n.t.Errorf("list at the end: %v", err)
	}
	for _, e := range entries {
		if err := n.c.Delete(ctx, e.ID); err != nil {
			n.t.Errorf("delete %s at the end: %v", e.ID[:8], err)
		}
	}
	_ = n.c.Close()
	_ = n.cmd.Process.Signal(unix.SIGTERM)
	done := make(chan error, 1)
	go func() { done <- n.cmd.Wait() }()
	select {
	case err := <-done:
		if err != nil {
			n.t.Errorf("keeper: %v", err)
		}
	case <-time.After(testhost.Limit(10 * time.Second)):
		n.t.Error("the keeper did not end on SIGTERM without containers")
		_ = n.cmd.Process.Kill()
	}
	for _, bad := range []string{"DATA RACE", "panic:", "fatal error:", "goroutine 1"} {
		if strings.Contains(n.keeperLog(), bad) {
			n.t.Errorf("%q in the log of the keeper or worker", bad)
		}
	}
	if n.t.Failed() {
		n.t.Logf("log of the keeper:\n%s", n.keeperLog())
	}
	_ = n.log.Close()
}

// container is one test container: a shell in the host's file systems.
type container struct {
	n       *node
	id      string
	pid     int
	pidfd   *os.File
	logPath string
	stdin   *os.File // our duplicate of the write end
	create  monitor.CreateRequest
}

type spec struct {
	breaks  string   // an operation of the plan that fails, of an exec
	args    []string // of a shell, if there is only one
	noLog   bool
	log     *os.File // in place of a regular file
	hold    bool     // create only
	second  bool     // two-stage plan
	program string   // execve this instead of args[0]
}

func newID() string {
	var b [32]byte
	_, _ = rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// program adds the steps of every test plan: descriptors on 0 to 2, the gate,
// execve in this process's mount namespace.
func program(b *plan.Builder, s spec, stdin, stdout, stderr, mnt, gate int) {
	b.Sys(plan.StageNamespaces, unix.SYS_SETNS, plan.Slot(mnt), plan.Int(unix.CLONE_NEWNS))
	for i, slot := range []int{stdin, stdout, stderr} {
		b.Sys(plan.StageStdio, unix.SYS_DUP3, plan.Slot(slot), plan.Int(i), plan.Int(0))
	}
	if gate >= 0 {
		b.Send(plan.StageCreated, b.Record(plan.Record{Kind: plan.KindCreated}))
		b.Sys(plan.StageGate, unix.SYS_READ, plan.Slot(gate), plan.Ptr(b.Data(make([]byte, 8))), plan.Int(1)).Expect(1)
	}
	b.Sys(plan.StageFDs, unix.SYS_CLOSE_RANGE, plan.Int(3), plan.Int(^uint32(0)), plan.Int(unix.CLOSE_RANGE_CLOEXEC))
	b.Sys(plan.StageSignals, unix.SYS_RT_SIGPROCMASK, plan.Int(unix.SIG_SETMASK), plan.Ptr(b.Data(make([]byte, 8))), plan.Int(0), plan.Int(8))
	args := s.args
	if len(args) == 1 {
		args = []string{"/bin/sh", "-c", args[0]}
	}
	path := args[0]
	if s.program != "" {
		path = s.program
	}
	b.Sys(plan.StageExec, unix.SYS_EXECVE, plan.Ptr(b.Str(path)), plan.Ptr(b.Strs(args)), plan.Ptr(b.Strs([]string{"PATH=/usr/bin:/bin"})))
}

func fifo(t testing.TB) (r, w *os.File) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	// Not by os.OpenFile, which would make it non-blocking: it is the container's.
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return r, os.NewFile(uintptr(fd), "fifo")
}

func pipe(t testing.TB) (r, w *os.File) {
	t.Helper()
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil { // blocking: a child uses one end
		t.Fatal(err)
	}
	return os.NewFile(uintptr(p[0]), "pipe"), os.NewFile(uintptr(p[1]), "pipe")
}

func hostMounts(t testing.TB) *os.File {
	t.Helper()
	f, err := os.Open("/proc/self/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// run creates a container and, unless s.hold, starts it.
func (n *node) run(s spec) *container {
	n.t.Helper()
	c, err := n.tryCreate(s)
	if err != nil {
		n.t.Fatalf("create: %v\n%s", err, n.keeperLog())
	}
	if !s.hold {
		if err := n.c.Start(n.ctx, c.id); err != nil {
			n.t.Fatalf("start: %v\n%s", err, n.keeperLog())
		}
	}
	return c
}

func (n *node) tryCreate(s spec) (*container, error) {
	t := n.t
	t.Helper()
	c := &container{n: n, id: newID()}
	b := plan.New("status", "gate", "stdin", "stdout", "stderr", "mounts")
	clone := plan.Clone{Parent: true, Cgroup: -1}
	if s.second {
		b.Clone(unix.CLONE_PARENT|unix.CLONE_NEWPID, 0)
	}
	program(b, s, 2, 3, 4, 5, 1)
	f, err := b.Memfd()
	if err != nil {
		t.Fatal(err)
	}
	sr, sw := pipe(t)
	gr, gw := pipe(t)
	ir, iw := pipe(t)
	or, ow := fifo(t)
	er, ew := fifo(t)
	mnt := hostMounts(t)
	log := s.log
	if log == nil && !s.noLog {
		c.logPath = filepath.Join(t.TempDir(), "0.log")
		if log, err = os.OpenFile(c.logPath, os.O_CREATE|os.O_WRONLY, 0o640); err != nil {
			t.Fatal(err)
		}
	}
	c.create = monitor.CreateRequest{
		ID: c.id, Plan: f, FDs: []*os.File{sw, gr, ir, ow, ew, mnt}, Clone: clone, TwoStage: s.second,
		Kept: monitor.Kept{Status: sr, Gate: gw, Stdin: iw, Stdout: or, Stderr: er, Log: log},
	}
	got, err := n.c.Create(n.ctx, c.create)
	for _, x := range []*os.File{f, sw, gr, ir, ow, ew, mnt, sr, gw, or, er} {
		_ = x.Close()
	}
	if log != nil && s.log == nil {
		_ = log.Close()
	}
	if err != nil {
		_ = iw.Close()
		return nil, err
	}
	c.pid, c.pidfd, c.stdin = got.PID, got.PIDFD, iw
	t.Cleanup(func() { _ = c.pidfd.Close(); _ = c.stdin.Close() })
	return c, nil
}

// wait waits for the container's exit on the client's channel.
func (n *node) wait(ids ...string) map[string]monitor.Exit {
	n.t.Helper()
	got := map[string]monitor.Exit{}
	want := map[string]bool{}
	for _, id := range ids {
		want[id] = true
	}
	timeout := time.After(testhost.Limit(60 * time.Second))
	for len(want) > 0 {
		select {
		case x, ok := <-n.c.Exits():
			if !ok {
				n.t.Fatal("the channel of exits was closed")
			}
			if old, ok := got[x.ID]; ok && old != x {
				n.t.Errorf("exit of %s changed from %+v to %+v", x.ID[:8], old, x)
			}
			got[x.ID] = x
			delete(want, x.ID)
		case <-timeout:
			n.t.Fatalf("%d exits are missing\n%s", len(want), n.keeperLog())
		}
	}
	return got
}

// logText returns the contents of all records of a stream, in order; P records
// are joined.
func (c *container) logText(stream string) string {
	c.n.t.Helper()
	return logText(c.n.t, c.logPath, stream)
}

// rawLog is the log as it is now: one that is being written may end in a half
// record, which logText would object to.
func (c *container) rawLog() []byte {
	c.n.t.Helper()
	p, err := os.ReadFile(c.logPath)
	if err != nil {
		c.n.t.Fatal(err)
	}
	return p
}

func logText(t testing.TB, path, stream string) string {
	t.Helper()
	p, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if len(p) > 0 && p[len(p)-1] != '\n' {
		t.Fatalf("the log ends in a half record: %q", p[max(0, len(p)-100):])
	}
	var out strings.Builder
	for line := range strings.Lines(string(p)) {
		f := strings.SplitN(strings.TrimSuffix(line, "\n"), " ", 4)
		if len(f) != 4 || (f[2] != "F" && f[2] != "P") || (f[1] != "stdout" && f[1] != "stderr") {
			t.Fatalf("record %.100q", line)
		}
		if _, err := time.Parse(time.RFC3339Nano, f[0]); err != nil {
			t.Fatalf("record %.100q: %v", line, err)
		}
		if f[1] != stream {
			continue
		}
		out.WriteString(f[3])
		if f[2] == "F" {
			out.WriteByte('\n')
		}
	}
	return out.String()
}

// workerPID returns the present worker.
func (n *node) workerPID() int {
	n.t.Helper()
	info, err := n.c.Info(n.ctx)
	if err != nil {
		n.t.Fatal(err)
	}
	return info.WorkerPID
}

// killWorker kills the worker and waits until the client has another.
func (n *node) killWorker() {
	n.t.Helper()
	old := n.workerPID()
	if err := unix.Kill(old, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		n.t.Fatal(err)
	}
	n.eventually("another worker", func() bool { return n.workerPID() != old })
}

func (n *node) eventually(what string, f func() bool) {
	n.t.Helper()
	for end := time.Now().Add(testhost.Limit(20 * time.Second)); !f(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			n.t.Fatalf("waited too long for %s\n%s", what, n.keeperLog())
		}
	}
}

func alive(pid int) bool { return unix.Kill(pid, 0) == nil }

func parentOf(t testing.TB, pid int) int {
	t.Helper()
	p, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return -1
	}
	f := strings.Fields(string(p[bytes.LastIndexByte(p, ')')+1:]))
	n, _ := strconv.Atoi(f[1])
	return n
}

// exec runs a shell command as an exec and returns its process.
func (n *node) exec(c *monitor.Client, s spec, hold bool, stdin, stdout *os.File) (*monitor.ExecProcess, error) {
	t := n.t
	t.Helper()
	b := plan.New("status", "stdin", "stdout", "mounts")
	if s.second {
		b.Clone(unix.CLONE_PARENT|unix.CLONE_NEWPID, 0)
	}
	program(b, s, 1, 2, 2, 3, -1)
	b.Sabotage(func(op string) bool { return op == s.breaks })
	f, err := b.Memfd()
	if err != nil {
		t.Fatal(err)
	}
	sr, sw := pipe(t)
	mnt := hostMounts(t)
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		for _, x := range []*os.File{f, sr, sw, mnt, null} {
			_ = x.Close()
		}
	}()
	if stdin == nil {
		stdin = null
	}
	if stdout == nil {
		stdout = null
	}
	return c.Exec(n.ctx, monitor.ExecRequest{
		Plan: f, FDs: []*os.File{sw, stdin, stdout, mnt}, Clone: plan.Clone{Cgroup: -1}, TwoStage: s.second, StatusR: sr, Hold: hold,
	})
}

func osexec(args ...string) (string, error) {
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	return string(out), err
}
