package notify

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// listen stands in for systemd.
func listen(t *testing.T) *net.UnixConn {
	t.Helper()
	path := filepath.Join(t.TempDir(), "n")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	return c
}

func next(t *testing.T, c *net.UnixConn) string {
	t.Helper()
	b := make([]byte, 256)
	if err := c.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	n, err := c.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	return string(b[:n])
}

func TestMessages(t *testing.T) {
	c := listen(t)
	Ready()
	Status("3 pods")
	Extend(2 * time.Second)
	Stopping()
	for _, want := range []string{"READY=1", "STATUS=3 pods", "EXTEND_TIMEOUT_USEC=2000000", "STOPPING=1"} {
		if got := next(t, c); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

// A descriptor reaches systemd with its name, and can be used there.
func TestHold(t *testing.T) {
	c := listen(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := Hold("a", w); err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	text, oob := make([]byte, 256), make([]byte, 256)
	n, oobn, _, _, err := c.ReadMsgUnix(text, oob)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := string(text[:n]), "FDSTORE=1\nFDNAME=a"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	msgs, err := syscall.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(msgs) != 1 {
		t.Fatalf("%d control messages: %v", len(msgs), err)
	}
	fds, err := syscall.ParseUnixRights(&msgs[0])
	if err != nil || len(fds) != 1 {
		t.Fatalf("descriptors %v: %v", fds, err)
	}
	kept := os.NewFile(uintptr(fds[0]), "kept")
	if _, err := kept.WriteString("x"); err != nil {
		t.Error(err)
	}
	_ = kept.Close()
	if b, err := io.ReadAll(r); err != nil || string(b) != "x" {
		t.Errorf("read %q: %v", b, err)
	}
	Drop([]*os.File{r, w}) // open or closed
	for _, f := range []*os.File{r, w} {
		if got, want := next(t, c), "FDSTOREREMOVE=1\nFDNAME="+f.Name(); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	t.Setenv("NOTIFY_SOCKET", "")
	if err := Hold("x", r); err == nil {
		t.Error("held by nobody")
	}
}

func TestWithoutSystemd(t *testing.T) {
	t.Setenv("NOTIFY_SOCKET", "/somewhere")
	if !Managed() {
		t.Error("a socket is given, but nobody manages")
	}
	t.Setenv("NOTIFY_SOCKET", "")
	if Managed() {
		t.Error("managed without a socket")
	}
	Ready()
	Watch(t.Context(), func(context.Context) error { t.Error("checked without a watchdog"); return nil })
}

func TestWatchdogIsFed(t *testing.T) {
	c := listen(t)
	t.Setenv("WATCHDOG_USEC", "60000")
	t.Setenv("WATCHDOG_PID", strconv.Itoa(os.Getpid()))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); Watch(ctx, func(context.Context) error { return nil }) }()
	for range 3 {
		if got := next(t, c); got != "WATCHDOG=1" {
			t.Errorf("got %q", got)
		}
	}
	cancel()
	<-done
}

// TestWatch: a check that fails or hangs does not feed, and the next one may.
func TestWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var calls, fed atomic.Int32
		go watch(ctx, time.Second, func(ctx context.Context) error {
			switch calls.Add(1) {
			case 2:
				return errors.New("broken")
			case 3:
				<-ctx.Done() // hangs
				return ctx.Err()
			}
			return nil
		}, func() { fed.Add(1) })
		time.Sleep(1500 * time.Millisecond)
		synctest.Wait()
		if fed.Load() != 1 {
			t.Errorf("fed %d times after a good and a bad check", fed.Load())
		}
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if fed.Load() < 4 || calls.Load() < 6 {
			t.Errorf("fed %d times in %d checks", fed.Load(), calls.Load())
		}
		cancel()
		synctest.Wait()
	})
}
