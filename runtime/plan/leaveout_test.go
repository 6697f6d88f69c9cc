//go:build !cgo

package plan

import (
	"bufio"
	"fmt"
	"os"
	goruntime "runtime"
	"strings"
	"sync"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// mapped tells how much anonymous memory a child of this process has before
// its execve, the program's own and what lies around the heap not counted.
func mapped(t *testing.T) (size uintptr) {
	t.Helper()
	gr, gw, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer gr.Close()
	b := New("status", "gate")
	b.Sys(StageGate, unix.SYS_READ, Slot(1), Ptr(b.Data(make([]byte, 8))), Int(1)).Expect(1)
	b.Sys(StageExec, unix.SYS_EXIT_GROUP, Int(0))
	f, err := b.Memfd()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	sr, sw, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer sr.Close()
	pid, pidfd, err := Start(f, []int{int(sw.Fd()), int(gr.Fd())}, Clone{Cgroup: -1})
	if err != nil {
		t.Fatal(err)
	}
	_, _ = sw.Close(), unix.Close(pidfd)
	maps, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer maps.Close()
	var here byte
	heap := uintptr(unsafe.Pointer(&here))
	for s := bufio.NewScanner(maps); s.Scan(); {
		if from, to, ok := anonymous(s.Text()); ok && from > 1<<32 && (to < heap-1<<30 || from > heap+1<<30) {
			size += to - from
		}
	}
	_, _ = gw.Write([]byte{1})
	_ = gw.Close()
	if ws := reap(t, pid); ws.ExitStatus() != 0 {
		t.Fatalf("exit %v", ws)
	}
	return size
}

// Children get less memory after LeaveOut, and start as well as before while
// the heap grows and is collected.
func TestLeaveOut(t *testing.T) {
	t.Logf("mapped in a child before: %d KiB", mapped(t)>>10)
	if err := LeaveOut(); err != nil {
		t.Fatal(err)
	}
	if after := mapped(t); after > 1<<20 {
		t.Errorf("mapped in a child after: %d KiB", after>>10)
	}
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		var keep [][]byte
		for {
			select {
			case <-stop:
				goruntime.KeepAlive(keep)
				return
			default:
				if keep = append(keep, make([]byte, 1<<20)); len(keep) > 100 { // beyond one arena
					keep = nil
				}
			}
		}
	}()
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			var deep func(n int)
			deep = func(n int) { // stacks that were not there before
				var frame [1 << 10]byte
				if n > 0 {
					deep(n - 1)
					goruntime.KeepAlive(&frame)
					return
				}
				b := New("status", "out")
				execPlan(b, "/bin/true")
				pid, status, out := start(t, b, Clone{Cgroup: -1})
				_, _ = status.Close(), out.Close()
				if ws := reap(t, pid); ws.ExitStatus() != 0 {
					t.Errorf("exit %v", ws)
				}
			}
			for i := range 10 {
				deep(i * 64)
			}
		})
	}
	wg.Wait()
	close(stop)
	<-done
}

func TestAnonymous(t *testing.T) {
	for line, want := range map[string]bool{
		"7f05f6110000-7f05f6300000 rw-p 00000000 00:00 0 ":                                  true,
		"7f05f6110000-7f05f6300000 rw-p 00000000 00:00 0          [anon: Go: page summary]": true,
		"7ffe87df6000-7ffe87e17000 rw-p 00000000 00:00 0          [stack]":                  false,
		"7f063ce1f000-7f063ce21000 r-xp 00000000 00:00 0          [vdso]":                   false,
		"00400000-0050c000 r-xp 00000000 00:01 1024               /memfd:x (deleted)":       false,
		"7f063c000000-7f063c001000 rw-s 00000000 00:01 7":                                   false,
		"": false, "x-y rw-p 0 0 0": false,
	} {
		if _, _, ok := anonymous(line); ok != want {
			t.Errorf("%q: %v", strings.TrimSpace(line), ok)
		}
	}
}
