package wire

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/testhost"
)

func bodies() map[Kind]Body {
	x := &Exit{ID: "a", PID: 1, Status: 2, Signal: 3, Time: 4, Unknown: true}
	return map[Kind]Body{
		KindHello: &Hello{1, 2}, KindTake: &Take{ID: "id", PID: 7, TTY: true, Kept: 1}, KindCreate: &Create{ID: "id", Clone: Clone{1, true, -1}, TwoStage: true, TTY: true, Slots: 7, Kept: 6},
		KindStart: &ID{"x"}, KindExec: &Exec{Container: "c", Clone: Clone{5, false, 3}, TwoStage: true, Hold: true, Slots: 2, Status: true, Term: true},
		KindAttach: &Attach{"id", true, false, true}, KindSetLog: &Flag{"id", true}, KindExit: x,
		KindEntry: &Entry{ID: "e", PID: 9, TTY: true, Started: true, Adopted: true, Exit: x, Mask: 0xfff, Dropped: 1 << 40},
		KindList:  &Entries{List: []Entry{{ID: "1"}, {ID: "2", Exit: x}}},
		KindReply: &Reply{Failed: true, Class: errs.NotFound, Text: "text", Record: []byte{1}, More: true, Body: []byte{2, 3}},
		KindPut:   &Created{5}, KindFiles: &Mask{3, true, 77}, KindSetFD: &FDChange{"id", FDLog},
		KindJournal: &Journal{1 << 40, true}, KindJournalFields: &JournalFields{"id", []byte("A=b\n")},
		KindPing: &HelloReply{Version: 1, Keeper: 2, WorkerPID: 3, Build: "b", Orphan: true},
	}
}

func TestRoundTrip(t *testing.T) {
	for kind, body := range bodies() {
		msg := Marshal(kind, 77, body)
		h, rest, err := ParseHeader(msg)
		if err != nil || h.Kind != kind || h.Req != 77 {
			t.Fatalf("%T: header %+v, %v", body, h, err)
		}
		got := reflect.New(reflect.TypeOf(body).Elem()).Interface().(Body)
		if err := Unmarshal(rest, got); err != nil || !reflect.DeepEqual(got, body) {
			t.Errorf("%T: got %+v, want %+v, %v", body, got, body, err)
		}
		// A later release may append fields.
		if err := Unmarshal(append(rest, 1, 2, 3), got); err != nil {
			t.Errorf("%T with more fields: %v", body, err)
		}
		if kind == KindExec { // those of version 1 end here
			rest = rest[:len(rest)-1]
			if err := Unmarshal(rest, got); err != nil || got.(*Exec).Term {
				t.Errorf("exec of version 1: %+v, %v", got, err)
			}
		}
		for cut := range rest {
			if err := Unmarshal(rest[:cut], got); err == nil {
				t.Errorf("%T cut at %d of %d is accepted", body, cut, len(rest))
			}
		}
	}
}

func FuzzDecode(f *testing.F) {
	var all []Body
	for kind, body := range bodies() {
		f.Add(Marshal(kind, 1, body))
		all = append(all, body)
	}
	f.Fuzz(func(t *testing.T, msg []byte) {
		_, rest, err := ParseHeader(msg)
		if err != nil {
			return
		}
		for _, b := range all {
			got := reflect.New(reflect.TypeOf(b).Elem()).Interface().(Body)
			if Unmarshal(rest, got) != nil {
				continue
			}
			again := reflect.New(reflect.TypeOf(b).Elem()).Interface().(Body)
			if err := Unmarshal(EncodeBody(got), again); err != nil || !reflect.DeepEqual(got, again) {
				t.Fatalf("%+v became %+v, %v", got, again, err)
			}
		}
	})
}

func FuzzExitFile(f *testing.F) {
	f.Add(ExitFile(&Exit{PID: 1, Status: 2, Signal: 3, Time: 4, Unknown: true}))
	f.Add([]byte(exitFileHead + "pid=x\n"))
	f.Fuzz(func(t *testing.T, p []byte) {
		x, err := ParseExitFile("id", p)
		if err != nil {
			return
		}
		y, err := ParseExitFile("id", ExitFile(x))
		if err != nil || *x != *y {
			t.Fatalf("%+v became %+v, %v", x, y, err)
		}
	})
}

func TestExitFile(t *testing.T) {
	x := &Exit{ID: "c", PID: 12, Status: 0, Signal: 9, Time: 1234567890123456789}
	p := ExitFile(x)
	if got, err := ParseExitFile("c", append(p, "oom=1\n"...)); err != nil || *got != *x {
		t.Errorf("%+v, %v", got, err)
	}
	for _, bad := range []string{"", "naru-exit 2\n", exitFileHead, exitFileHead + "pid=1", strings.Replace(string(p), "pid=12", "pid=zz", 1)} {
		if _, err := ParseExitFile("c", []byte(bad)); !errors.Is(err, ErrMalformed) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestValidID(t *testing.T) {
	for id, want := range map[string]bool{
		strings.Repeat("a", 64): true, "x-1_2.y": true, "": false, ".": false, "..": false, "a/b": false, "-x": false,
		".x": false, "a\x00": false, "a b": false, strings.Repeat("a", 129): false,
	} {
		if ValidID(id) != want {
			t.Errorf("%q: want %v", id, want)
		}
	}
}

func TestFDs(t *testing.T) {
	f := NoFDs()
	f[FDLog], f[FDPid] = 8, 9
	var g FDs
	if !g.Fill(f.Mask(), f.List()) || g != f {
		t.Errorf("%v became %v", f, g)
	}
	if g.Fill(1, nil) || g.Fill(0, []int{1}) || g.Fill(1<<NumFDs, []int{1}) {
		t.Error("wrong numbers are accepted")
	}
}

func pair(t *testing.T) (a, b *Conn) {
	t.Helper()
	p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if a, err = NewConn(p[0]); err != nil {
		t.Fatal(err)
	}
	if b, err = NewConn(p[1]); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = a.Close(), b.Close() })
	return a, b
}

func TestConn(t *testing.T) {
	a, b := pair(t)
	fds := make([]int, MaxFDs)
	for i := range fds {
		fds[i] = 0
	}
	buf := make([]byte, MaxMessage)
	if err := a.Send(Marshal(KindPing, 5, nil), fds, time.Second); err != nil {
		t.Fatal(err)
	}
	p, err := b.Recv(buf)
	if err != nil || p.Req != 5 || len(p.FDs) != MaxFDs {
		t.Fatalf("%+v %v", p.Header, err)
	}
	for _, fd := range p.FDs {
		if f, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || f&unix.FD_CLOEXEC == 0 {
			t.Fatalf("descriptor %d: flags %d, %v", fd, f, err)
		}
	}
	p.Close()
	if err := a.Send(Marshal(KindPing, 5, nil), append(fds, 0), time.Second); !errors.Is(err, unix.EMSGSIZE) {
		t.Errorf("too many descriptors: %v", err)
	}
	if err := a.Send(make([]byte, MaxMessage+1), nil, time.Second); !errors.Is(err, unix.EMSGSIZE) {
		t.Errorf("too long: %v", err)
	}
	if err := a.Send([]byte{1, 2, 3}, []int{0}, time.Second); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Recv(buf); !errors.Is(err, ErrMalformed) {
		t.Errorf("a message without a header: %v", err)
	}
	if err := a.Send(Marshal(KindPing, 5, &Reply{Body: make([]byte, 1000)}), nil, time.Second); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Recv(buf[:100]); !errors.Is(err, ErrMalformed) {
		t.Errorf("a cut message: %v", err)
	}
	_ = a.Close()
	if _, err := b.Recv(buf); !errors.Is(err, io.EOF) {
		t.Errorf("the end: %v", err)
	}
	if err := b.Send(Marshal(KindPing, 1, nil), nil, time.Second); !Gone(err) {
		t.Errorf("send after the end: %v", err)
	}
}

func TestSendHasPatienceOnly(t *testing.T) {
	a, b := pair(t)
	msg := Marshal(KindReply, 1, &Reply{Body: bytes.Repeat([]byte("x"), 30000)})
	var err error
	start := time.Now()
	n := 0
	for ; err == nil; n++ {
		err = a.Send(msg, nil, 100*time.Millisecond)
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(start) > testhost.Limit(5*time.Second) {
		t.Errorf("%v after %v", err, time.Since(start))
	}
	buf := make([]byte, MaxMessage)
	for range n - 1 {
		if _, err := b.Recv(buf); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.Send(msg, nil, time.Second); err != nil { // the deadline is not sticky
		t.Error(err)
	}
}

func TestDialLongPath(t *testing.T) {
	dir := t.TempDir()
	for range 6 {
		dir = filepath.Join(dir, strings.Repeat("d", 30))
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	d, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: "/proc/self/fd/" + itoa(int(d.Fd())) + "/s"}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 1); err != nil {
		t.Fatal(err)
	}
	c, err := Dial(filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	if _, err := Dial(filepath.Join(dir, "absent")); !errors.Is(err, unix.ENOENT) {
		t.Errorf("%v", err)
	}
}

// A call on a connection that this side has closed, before it or meanwhile,
// says that the peer is gone: clients repeat the call then.
func TestClosedConnectionIsGone(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[1])
	c, err := NewConn(pair[0])
	if err != nil {
		t.Fatal(err)
	}
	reading := make(chan error)
	go func() {
		_, err := c.Recv(make([]byte, 100))
		reading <- err
	}()
	time.Sleep(10 * time.Millisecond)
	_ = c.Close()
	if err := <-reading; !Gone(err) {
		t.Errorf("the waiting reader got %v", err)
	}
	if _, err := c.Recv(make([]byte, 100)); !Gone(err) {
		t.Errorf("receive: %v", err)
	}
	if err := c.Send([]byte("x"), nil, time.Second); !Gone(err) {
		t.Errorf("send: %v", err)
	}
}

// A peer that does not read is not gone.
func TestSendTimesOut(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[1])
	c, err := NewConn(pair[0])
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for err == nil {
		err = c.Send(make([]byte, 10000), nil, 10*time.Millisecond)
	}
	if Gone(err) || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("send to a peer that does not read: %v", err)
	}
}
