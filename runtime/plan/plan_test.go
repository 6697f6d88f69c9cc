package plan

import (
	"errors"
	"io"
	"os"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

func TestLayout(t *testing.T) {
	if s := unsafe.Sizeof(op{}); s != opSize {
		t.Errorf("op is %d bytes, want %d", s, opSize)
	}
	if s := unsafe.Sizeof(header{}); s != headerSize {
		t.Errorf("header is %d bytes, want %d", s, headerSize)
	}
	if len(stageNames) != int(numStages) {
		t.Errorf("%d stage names for %d stages", len(stageNames), numStages)
	}
	r := Record{Kind: KindReady, Op: 7, Stage: StageExec, Errno: 2, Value: -5, FDs: [10]int32{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}}
	got, err := ParseRecord(r.Bytes())
	if err != nil || got != r {
		t.Errorf("record did not survive: %+v %v", got, err)
	}
}

// execPlan adds the last steps of every plan: stdout on slot 1, execve.
func execPlan(b *Builder, args ...string) {
	b.Sys(StageStdio, unix.SYS_DUP3, Slot(1), Int(1), Int(0))
	b.Sys(StageFDs, unix.SYS_CLOSE_RANGE, Int(3), Int(^uint32(0)), Int(unix.CLOSE_RANGE_CLOEXEC))
	b.Sys(StageSignals, unix.SYS_RT_SIGPROCMASK, Int(unix.SIG_SETMASK), Ptr(b.Data(make([]byte, 8))), Int(0), Int(8))
	b.Sys(StageExec, unix.SYS_EXECVE, Ptr(b.Str(args[0])), Ptr(b.Strs(args)), Ptr(b.Strs([]string{"A=b"})))
}

// start runs b with a status pipe in slot 0 and an output pipe in slot 1.
func start(t testing.TB, b *Builder, c Clone) (pid int, status, out *os.File) {
	t.Helper()
	f, err := b.Memfd()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	sr, sw, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	or, ow, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer sw.Close()
	defer ow.Close()
	pid, pidfd, err := Start(f, []int{int(sw.Fd()), int(ow.Fd())}, c)
	if err != nil {
		t.Fatal(err)
	}
	_ = unix.Close(pidfd)
	return pid, sr, or
}

func reap(t testing.TB, pid int) unix.WaitStatus {
	t.Helper()
	var ws unix.WaitStatus
	for {
		_, err := unix.Wait4(pid, &ws, 0, nil)
		if err == nil {
			return ws
		}
		if !errors.Is(err, unix.EINTR) {
			t.Fatal(err)
		}
	}
}

func TestStartExecs(t *testing.T) {
	b := New("status", "out")
	execPlan(b, "/bin/sh", "-c", "echo $A; exec ls /proc/self/fd")
	pid, status, out := start(t, b, Clone{Cgroup: -1})
	defer status.Close()
	defer out.Close()
	text, _ := io.ReadAll(out)
	if ws := reap(t, pid); ws.ExitStatus() != 0 {
		t.Fatalf("exit %v", ws)
	}
	if rec, _ := io.ReadAll(status); len(rec) != 0 {
		r, err := ParseRecord(rec)
		t.Fatalf("status: %+v %v", r.Err(), err)
	}
	// 0, 1, 2 and the directory that ls itself has open.
	if got := strings.Fields(string(text)); len(got) != 5 || got[0] != "b" || got[4] != "3" {
		t.Errorf("output %q: want the environment and descriptors 0 to 3 only", text)
	}
}

func TestFailureNamesOperation(t *testing.T) {
	b := New("status", "out")
	b.Sys(StageWorkdir, unix.SYS_CHDIR, Ptr(b.Str("/")))
	b.Sys(StageWorkdir, unix.SYS_CHDIR, Ptr(b.Str("/absent"))).MayFail(unix.ENOENT)
	b.Sys(StageWorkdir, unix.SYS_CHDIR, Ptr(b.Str("/absent/too")))
	execPlan(b, "/bin/true")
	pid, status, out := start(t, b, Clone{Cgroup: -1})
	defer status.Close()
	defer out.Close()
	rec, _ := io.ReadAll(status)
	r, err := ParseRecord(rec)
	if err != nil {
		t.Fatal(err)
	}
	var pe *Error
	if !errors.As(r.Err(), &pe) || pe.Op != 2 || pe.Stage != StageWorkdir || !errors.Is(r.Err(), unix.ENOENT) {
		t.Errorf("got %v", r.Err())
	}
	if ws := reap(t, pid); ws.ExitStatus() != 127 {
		t.Errorf("exit %v", ws)
	}
}

func TestUnexpectedResult(t *testing.T) {
	b := New("status", "out")
	b.Sys(StageUser, unix.SYS_GETUID).Expect(4711)
	execPlan(b, "/bin/true")
	pid, status, out := start(t, b, Clone{Cgroup: -1})
	defer status.Close()
	defer out.Close()
	rec, _ := io.ReadAll(status)
	r, err := ParseRecord(rec)
	if err != nil {
		t.Fatal(err)
	}
	if e := r.Err(); e == nil || !strings.Contains(e.Error(), "unexpected result") {
		t.Errorf("got %v", e)
	}
	reap(t, pid)
}

func TestSecondClone(t *testing.T) {
	b := New("status", "out")
	b.Clone(unix.CLONE_PARENT, 0)
	execPlan(b, "/bin/sh", "-c", "echo $$; exit 7")
	pid, status, out := start(t, b, Clone{Cgroup: -1})
	defer status.Close()
	defer out.Close()
	rec := make([]byte, RecordSize)
	if _, err := io.ReadFull(status, rec); err != nil {
		t.Fatal(err)
	}
	r, err := ParseRecord(rec)
	if err != nil || r.Kind != KindPID {
		t.Fatalf("%+v %v", r, err)
	}
	if ws := reap(t, pid); ws.ExitStatus() != 0 {
		t.Errorf("first child: %v", ws)
	}
	text, _ := io.ReadAll(out)
	// CLONE_PARENT with no exit signal: __WALL is needed to wait for it.
	var ws unix.WaitStatus
	if _, err := unix.Wait4(int(r.Value), &ws, unix.WALL, nil); err != nil || ws.ExitStatus() != 7 {
		t.Errorf("second child %d: %v %v", r.Value, ws, err)
	}
	if strings.TrimSpace(string(text)) == "" {
		t.Error("no output of the second child")
	}
}

// TestPIDComesFirst: whatever the second child says, its pid is told before.
func TestPIDComesFirst(t *testing.T) {
	for range 200 {
		b := New("status", "out")
		b.Clone(unix.CLONE_PARENT, 0)
		b.Send(StageCreated, b.Record(Record{Kind: KindCreated}))
		b.Sys(StageExec, unix.SYS_EXIT_GROUP, Int(0))
		pid, status, out := start(t, b, Clone{Cgroup: -1})
		rec, err := io.ReadAll(status)
		if err != nil || len(rec) != 2*RecordSize {
			t.Fatalf("%d bytes, %v", len(rec), err)
		}
		first, err := ParseRecord(rec[:RecordSize])
		if err != nil || first.Kind != KindPID {
			t.Fatalf("first record: %+v %v", first, err)
		}
		status.Close()
		out.Close()
		reap(t, pid)
		if _, err := unix.Wait4(int(first.Value), nil, unix.WALL, nil); err != nil {
			t.Fatal(err)
		}
	}
}

func TestStoreAndResult(t *testing.T) {
	b := New("status", "out")
	rec := b.Record(Record{Kind: KindReady})
	o := b.Sys(StageFilesystems, unix.SYS_OPENAT, Int(unix.AT_FDCWD), Ptr(b.Str("/dev/null")), Int(unix.O_RDONLY)).Store(rec+FDOffset(3), 4)
	b.Sys(StageFilesystems, unix.SYS_CLOSE, o.Result())
	b.Send(StageFilesystems, rec)
	execPlan(b, "/bin/true")
	pid, status, out := start(t, b, Clone{Cgroup: -1})
	defer status.Close()
	defer out.Close()
	got, _ := io.ReadAll(status)
	r, err := ParseRecord(got)
	if err != nil || r.Kind != KindReady || r.FDs[3] < 3 {
		t.Errorf("%+v %v", r, err)
	}
	reap(t, pid)
}

func TestConcurrentStarts(t *testing.T) {
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 40 {
				b := New("status", "out")
				execPlan(b, "/bin/true")
				pid, status, out := start(t, b, Clone{Cgroup: -1})
				if rec, _ := io.ReadAll(status); len(rec) != 0 {
					t.Error("a start failed")
				}
				status.Close()
				out.Close()
				if ws := reap(t, pid); ws.ExitStatus() != 0 {
					t.Error(ws)
				}
			}
		})
	}
	wg.Wait()
}

func TestRefusesForeignPlans(t *testing.T) {
	f, err := os.CreateTemp(t.TempDir(), "plan")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, p := range [][]byte{nil, make([]byte, 64), []byte("NPLN" + strings.Repeat("\xff", 60))} {
		if err := f.Truncate(0); err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt(p, 0); err != nil {
			t.Fatal(err)
		}
		if _, _, err := Start(f, []int{0}, Clone{Cgroup: -1}); err == nil {
			t.Errorf("plan % x was taken", p)
		}
	}
}

func FuzzParseRecord(f *testing.F) {
	f.Add(Record{Kind: KindPID, Value: 1}.Bytes())
	f.Fuzz(func(_ *testing.T, p []byte) {
		r, err := ParseRecord(p)
		if err == nil {
			_ = r.Err()
		}
	})
}

func BenchmarkStart(b *testing.B) {
	for b.Loop() {
		p := New("status", "out")
		execPlan(p, "/bin/true")
		pid, status, out := start(b, p, Clone{Cgroup: -1})
		_, _ = io.ReadAll(status)
		status.Close()
		out.Close()
		reap(b, pid)
	}
}
