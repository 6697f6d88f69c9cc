package keeper

import (
	"os/exec"
	"reflect"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime/monitor/wire"
)

func newKeeper() *keeper {
	k := &keeper{entries: map[string]*entry{}, clones: map[uint64]uint64{}, dir: -1, exits: -1, lock: -1, listener: -1, self: -1}
	k.worker.reset()
	return k
}

func table(t testing.TB) []byte {
	t.Helper()
	k := newKeeper()
	k.opts = Options{Dir: "/d", Binary: "/b", KillOnExit: true}
	k.dir, k.exits, k.lock, k.listener = 10, 11, 12, 13
	k.worker.pid, k.worker.pidfd, k.worker.sock, k.worker.version = 99, 14, 15, 1
	k.count = 7
	k.clones[3] = 6
	fds := wire.NoFDs()
	fds[wire.FDPid], fds[wire.FDLog] = 20, 21
	k.entries["x"] = &entry{Entry: wire.Entry{ID: "x", PID: 5, Started: true, Exit: &wire.Exit{ID: "x", PID: 5, Status: 1}}, fds: fds}
	fd, err := k.saveTable(&upgrade{program: 16, req: 42, worker: true})
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	p := make([]byte, 1<<16)
	n, err := unix.Pread(fd, p, 0)
	if err != nil {
		t.Fatal(err)
	}
	return p[:n]
}

func TestTable(t *testing.T) {
	p := table(t)
	k := newKeeper()
	req, worker, err := k.parseTable(p)
	if err != nil || req != 42 || !worker {
		t.Fatalf("%d %v %v", req, worker, err)
	}
	e := k.entries["x"]
	if e == nil || e.PID != 5 || !e.Started || e.Exit == nil || e.Exit.Status != 1 || e.fds[wire.FDPid] != 20 || e.fds[wire.FDLog] != 21 || e.fds[wire.FDPty] != -1 {
		t.Errorf("entry %+v", e)
	}
	if want := (Options{Dir: "/d", Binary: "/b", KillOnExit: true}); k.opts != want {
		t.Errorf("options %+v", k.opts)
	}
	if got := []int{k.dir, k.exits, k.lock, k.listener, k.self, k.worker.pid, k.worker.pidfd, k.worker.sock}; !reflect.DeepEqual(got, []int{10, 11, 12, 13, 16, 99, 14, 15}) {
		t.Errorf("descriptors %v", got)
	}
	if k.count != 7 || k.clones[3] != 6 {
		t.Errorf("clones %v %d", k.clones, k.count)
	}
	for cut := range p {
		if _, _, err := newKeeper().parseTable(p[:cut]); err == nil {
			t.Errorf("a table cut at %d is accepted", cut)
		}
	}
}

func FuzzTable(f *testing.F) {
	f.Add(table(f))
	f.Fuzz(func(_ *testing.T, p []byte) {
		_, _, _ = newKeeper().parseTable(p)
	})
}

func TestFits(t *testing.T) {
	for answer, want := range map[string]bool{
		Protocols():                               true,
		"client 5 9\nkeeper 1 2\ntable 1 3\nx\n":  true,
		"client 1 1\nkeeper 2 2\ntable 1 1\n":     false,
		"client 1 1\nkeeper 1 1\ntable 2 2\n":     false,
		"keeper 1 1\n":                            false,
		"":                                        false,
		"keeper 1 1 1\ntable 1 1\n":               false,
		"keeper one two\ntable 1 1\nkeeper 1 x\n": false,
	} {
		err := fits([]byte(answer), 1)
		if (err == nil) != want {
			t.Errorf("%q: %v", answer, err)
		}
		if err != nil && !errs.Is(err, errs.FailedPrecondition) {
			t.Errorf("%q: class of %v", answer, err)
		}
	}
}

// TestForeignExit: how a process ended that is not this keeper's child, before
// and after its parent has reaped it.
func TestForeignExit(t *testing.T) {
	for script, want := range map[string]unix.WaitStatus{"exit 7": 7 << 8, "kill -9 $$": 9} {
		cmd := exec.Command("/bin/sh", "-c", script)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		pid := cmd.Process.Pid
		pidfd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			t.Fatal(err)
		}
		p := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
		if n, err := unix.Poll(p, 5000); n != 1 {
			t.Fatalf("%d %v", n, err)
		}
		if ws, ok := zombieStatus(pid, pidfd); !ok || ws != want {
			t.Errorf("%s: status of the zombie %#x, %v", script, ws, ok)
		}
		_ = cmd.Wait()
		if _, ok := zombieStatus(pid, pidfd); ok {
			t.Errorf("%s: a reaped process has a status in /proc", script)
		}
		k := newKeeper()
		e := &entry{Entry: wire.Entry{ID: "x", PID: pid, Adopted: true}, fds: wire.NoFDs()}
		e.fds[wire.FDPid] = pidfd
		x := k.foreignExit(e)
		if x == nil {
			// Linux before 6.15 says ENOTTY at once; here it may still come.
			e.recheck = time.Now().Add(-time.Second)
			x = k.foreignExit(e)
		}
		ref := setWaitStatus(&wire.Exit{}, want)
		if x.Unknown && x.Status != 255 || !x.Unknown && (x.Status != ref.Status || x.Signal != ref.Signal) {
			t.Errorf("%s: %+v, want %+v", script, x, ref)
		}
		_ = unix.Close(pidfd)
	}
}

// beatWorker is a keeper whose worker is a child that does nothing, with the
// worker's end of its socket.
func beatWorker(t *testing.T, version uint32) (k *keeper, worker int) {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	k = newKeeper()
	k.buf = make([]byte, wire.MaxMessage)
	k.worker.pid, k.worker.sock, k.worker.version = cmd.Process.Pid, pair[0], version
	if k.worker.pidfd, err = unix.PidfdOpen(cmd.Process.Pid, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		for _, fd := range []int{pair[0], pair[1], k.worker.pidfd} {
			_ = unix.Close(fd)
		}
	})
	return k, pair[1]
}

func dead(t *testing.T, pidfd int) bool {
	t.Helper()
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, 200)
	if err != nil {
		t.Fatal(err)
	}
	return n == 1
}

func TestBeat(t *testing.T) {
	k, worker := beatWorker(t, beatVersion)
	buf := make([]byte, 1000)
	now := time.Now()
	k.worker.beatAt = now
	k.checkWorker(now)
	p, err := wire.RecvRaw(worker, buf)
	if err != nil || p.Kind != wire.KindBeat || p.Req == 0 {
		t.Fatalf("message %+v, %v", p, err)
	}
	if got := k.worker.beatAt.Sub(now); got != beatPatience {
		t.Errorf("looks again after %v", got)
	}
	// The answer lies in the socket when time is up: it counts.
	if err := wire.SendRaw(worker, wire.Marshal(wire.KindBeat, p.Req, nil), nil); err != nil {
		t.Fatal(err)
	}
	now = now.Add(beatPatience)
	k.checkWorker(now)
	if k.worker.beat != 0 || k.worker.beatAt.IsZero() || dead(t, k.worker.pidfd) || !k.tidyAt.IsZero() {
		t.Fatalf("after the answer: %+v, tidies at %v", k.worker, k.tidyAt)
	}
	// An old answer does not.
	now = k.worker.beatAt
	k.checkWorker(now)
	if err := wire.SendRaw(worker, wire.Marshal(wire.KindBeat, p.Req, nil), nil); err != nil {
		t.Fatal(err)
	}
	// Who looks much too late was stopped itself.
	now = k.worker.beatAt.Add(beatLate + time.Second)
	k.checkWorker(now)
	if k.worker.beat == 0 || dead(t, k.worker.pidfd) {
		t.Fatalf("killed too early: %+v", k.worker)
	}
	k.checkWorker(k.worker.beatAt)
	if !dead(t, k.worker.pidfd) {
		t.Error("a worker without a sign of life lives")
	}
}

// A worker of an older release does not know the question.
func TestBeatOldWorker(t *testing.T) {
	k, worker := beatWorker(t, beatVersion-1)
	k.worker.beatAt = time.Now()
	k.checkWorker(k.worker.beatAt)
	if _, err := wire.RecvRaw(worker, make([]byte, 100)); err != unix.EAGAIN {
		t.Errorf("it was asked: %v", err)
	}
	if !k.worker.beatAt.IsZero() {
		t.Error("it is looked at again")
	}
}
