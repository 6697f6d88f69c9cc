package crilog

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	if os.Getenv("CRILOG_COPIER") != "" {
		copierProcess()
		return
	}
	before := openFDs()
	code := m.Run()
	if after := openFDs(); code == 0 && after > before+3 { // the runtime's own poller may have been opened
		fmt.Printf("leak: %d descriptors before, %d after\n", before, after)
		code = 1
	}
	os.Exit(code)
}

func openFDs() int {
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return 0
	}
	return len(d)
}

type rig struct {
	t     testing.TB
	c     *Copier
	b     *Buffers
	files Files
	w     [2]*os.File
	log   *os.File
}

func newRig(t testing.TB) *rig {
	t.Helper()
	r := &rig{t: t}
	r.files = Files{In: [2]int{-1, -1}, Stage: [2]int{-1, -1}, Log: -1}
	for i := range r.w {
		rd, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { rd.Close(); w.Close() })
		r.w[i], r.files.In[i] = w, int(rd.Fd())
		if r.files.Stage[i], err = NewStage(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(r.files.Stage[i]) })
	}
	var err error
	if r.files.State, err = NewState(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(r.files.State) })
	r.setLog(filepath.Join(t.TempDir(), "0.log"))
	if r.b, err = NewBuffers(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.b.Close)
	r.restart(nil)
	return r
}

func (r *rig) setLog(path string) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o640)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { f.Close() })
	r.log, r.files.Log = f, int(f.Fd())
}

func (r *rig) restart(tap Tap) {
	r.c = New(r.files, tap)
	if err := r.c.Recover(r.b); err != nil {
		r.t.Fatal(err)
	}
}

// drain copies all that is there.
func (r *rig) drain() {
	r.t.Helper()
	for s := Stdout; s <= Stderr; s++ {
		for {
			_, err := r.c.Copy(s, r.b)
			if errors.Is(err, ErrNothing) || errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				r.t.Fatal(err)
			}
		}
	}
}

func (r *rig) content() []byte {
	r.t.Helper()
	p, err := os.ReadFile(r.log.Name())
	if err != nil {
		r.t.Fatal(err)
	}
	return p
}

func (r *rig) write(s Stream, text string) {
	r.t.Helper()
	if _, err := r.w[s].WriteString(text); err != nil {
		r.t.Fatal(err)
	}
}

func TestCopies(t *testing.T) {
	r := newRig(t)
	var tapped [2]bytes.Buffer
	r.c.tap = func(s Stream, p []byte) { tapped[s].Write(p) }
	r.write(Stdout, "one\ntwo\nthr")
	r.drain()
	r.write(Stderr, "err\n")
	r.write(Stdout, "ee")
	r.drain()
	r.write(Stdout, "\nrest")
	r.drain()
	got := parseLog(t, r.content())
	if string(got[0]) != "one\ntwo\nthree\n" || string(got[1]) != "err\n" {
		t.Fatalf("log %q", got)
	}
	r.w[0].Close()
	r.drain()
	got = parseLog(t, r.content())
	if string(got[0]) != "one\ntwo\nthree\nrest\n" || !r.c.Ended(Stdout) || r.c.Ended(Stderr) {
		t.Fatalf("log %q", got)
	}
	if tapped[0].String() != "one\ntwo\nthree\nrest" || tapped[1].String() != "err\n" {
		t.Errorf("tapped %q %q", tapped[0].String(), tapped[1].String())
	}
}

func TestFlushOfOpenStream(t *testing.T) {
	r := newRig(t)
	r.write(Stdout, "unfinished")
	r.drain()
	if err := r.c.Flush(Stdout, r.b, false); err != nil {
		t.Fatal(err)
	}
	if !bytes.HasSuffix(r.content(), []byte(" stdout P unfinished\n")) {
		t.Fatalf("log %q", r.content())
	}
	r.restart(nil)
	r.write(Stdout, "\nnext")
	r.w[0].Close()
	r.drain()
	r.restart(nil) // the end of the stream must not be written twice
	r.drain()
	if got := parseLog(t, r.content()); string(got[0]) != "unfinished\nnext\n" {
		t.Fatalf("log %q", got[0])
	}
}

func TestSingleBytesOfALongLine(t *testing.T) {
	r := newRig(t)
	var want bytes.Buffer
	for i := range 2*MaxContent + 10 {
		c := string(rune('a' + i%26))
		r.write(Stdout, c)
		want.WriteString(c)
		if _, err := r.c.Copy(Stdout, r.b); err != nil {
			t.Fatal(err)
		}
		if i%1000 == 0 {
			r.restart(nil)
		}
	}
	r.w[0].Close()
	r.drain()
	got := parseLog(t, r.content())
	if string(got[0]) != want.String()+"\n" {
		t.Fatal("the line changed")
	}
	if n := bytes.Count(r.content(), []byte(" P ")); n != 2 {
		t.Errorf("%d P records, want 2", n)
	}
}

func TestNewlinesOnly(t *testing.T) { // each byte becomes 41
	r := newRig(t)
	if _, err := unix.FcntlInt(r.w[0].Fd(), unix.F_SETPIPE_SZ, 1<<20); err != nil {
		t.Fatal(err)
	}
	r.c.grow(Stdout, r.b, 1<<20)
	r.write(Stdout, strings.Repeat("\n", 1<<20))
	r.drain()
	if got := parseLog(t, r.content()); len(got[0]) != 1<<20 {
		t.Errorf("%d lines", len(got[0]))
	}
}

func TestRotation(t *testing.T) {
	r := newRig(t)
	r.write(Stdout, "old\nunfini")
	r.drain()
	old := r.content()
	if err := r.c.LeaveLog(r.b); err != nil {
		t.Fatal(err)
	}
	r.setLog(filepath.Join(t.TempDir(), "1.log"))
	r.c.SetLog(r.files.Log)
	r.write(Stdout, "shed\nnew\n")
	r.drain()
	a, b := parseLog(t, old), parseLog(t, r.content())
	if string(a[0]) != "old\n" || string(b[0]) != "unfinished\nnew\n" {
		t.Errorf("old %q, new %q", a[0], b[0])
	}
}

func TestTruncatedBySomebody(t *testing.T) {
	r := newRig(t)
	r.write(Stdout, "one\n")
	r.drain()
	if err := r.log.Truncate(0); err != nil {
		t.Fatal(err)
	}
	r.write(Stdout, "two\n")
	r.drain()
	if got := parseLog(t, r.content()); string(got[0]) != "two\n" {
		t.Errorf("log %q", got[0])
	}
}

func TestNoLog(t *testing.T) {
	r := newRig(t)
	r.files.Log = -1
	var seen int
	r.restart(func(_ Stream, p []byte) { seen += len(p) })
	r.write(Stdout, "nobody keeps this\n")
	r.drain()
	if len(r.content()) != 0 || seen != 18 {
		t.Errorf("log %q, tapped %d", r.content(), seen)
	}
}

func TestFullDisk(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting a tmpfs needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	r := newRig(t)
	r.setLog(filepath.Join(dir, "0.log"))
	r.restart(nil)
	line := strings.Repeat("x", 99) + "\n"
	r.write(Stdout, "first\n")
	r.drain()
	start := time.Now()
	for range 4 {
		r.write(Stdout, strings.Repeat(line, 600))
		r.drain()
	}
	if d := time.Since(start); d < Patience || d > Patience+2*time.Second {
		t.Errorf("a full disk took %v, want one patience of %v", d, Patience)
	}
	if got := parseLog(t, r.content()); string(got[0]) != "first\n" {
		t.Errorf("log holds %d bytes, want only the first record", len(got[0]))
	}
	if got, want := r.c.Dropped(), uint64(4*600*100); got != want {
		t.Errorf("dropped %d, want %d", got, want)
	}
	r.restart(nil)
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_REMOUNT, "size=1m"); err != nil {
		t.Fatal(err)
	}
	r.write(Stdout, "last\n")
	r.drain()
	if got := parseLog(t, r.content()); string(got[0]) != "first\nlast\n" {
		t.Errorf("log %q", got[0])
	}
	if r.c.Dropped() != 4*600*100 {
		t.Error("the count of dropped bytes did not survive")
	}
}

func TestTerminal(t *testing.T) {
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("no /dev/ptmx here: %v", err)
	}
	defer master.Close()
	mfd := int(master.Fd())
	if err := unix.SetNonblock(mfd, false); err != nil { // as the daemon may have it
		t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(mfd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	sfd, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(mfd), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
	if errno != 0 {
		t.Fatal(errno)
	}
	slave := os.NewFile(sfd, "slave")
	defer slave.Close()
	r := newRig(t)
	r.files.In = [2]int{mfd, -1}
	r.files.TTY = true
	r.restart(nil)
	var want strings.Builder
	for i := range 500 {
		line := fmt.Sprintf("line %d of a terminal", i)
		if _, err := slave.WriteString(line + "\n"); err != nil {
			t.Fatal(err)
		}
		want.WriteString(line + "\r\n")
		if i%20 == 0 {
			r.drain()
		}
		if i%100 == 0 {
			r.restart(nil)
		}
	}
	if _, err := slave.WriteString("end"); err != nil {
		t.Fatal(err)
	}
	slave.Close()
	r.drain()
	want.WriteString("end\n")
	if got := parseLog(t, r.content()); string(got[0]) != want.String() {
		t.Errorf("log of %d bytes, want %d: %.100q", len(got[0]), want.Len(), got[0])
	}
}

// copierProcess is the victim of TestKill: descriptors 3 to 8 are stdout,
// stderr, their staging pipes, the state and the log.
func copierProcess() {
	b, err := NewBuffers()
	if err != nil {
		panic(err)
	}
	c := New(Files{In: [2]int{3, 4}, Stage: [2]int{5, 6}, State: 7, Log: 8}, nil)
	if err := c.Recover(b); err != nil {
		panic(err)
	}
	for {
		var ended, idle int
		for s := Stdout; s <= Stderr; s++ {
			switch _, err := c.Copy(s, b); {
			case errors.Is(err, io.EOF):
				ended++
			case errors.Is(err, ErrNothing):
				idle++
			case err != nil:
				panic(err)
			}
		}
		if ended == 2 {
			return
		}
		if idle+ended == 2 {
			_, _ = unix.Poll([]unix.PollFd{{Fd: 3, Events: unix.POLLIN}, {Fd: 4, Events: unix.POLLIN}}, 10)
		}
	}
}

// TestKill kills the copying process at random moments while both streams are
// written at full speed, and looks for each line exactly once.
func TestKill(t *testing.T) {
	kills := 300
	if testing.Short() {
		kills = 60
	}
	r := newRig(t)
	files := make([]*os.File, 0, 6)
	for _, fd := range []int{r.files.In[0], r.files.In[1], r.files.Stage[0], r.files.Stage[1], r.files.State, r.files.Log} {
		d, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, os.NewFile(uintptr(d), "shared"))
	}
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	stop := make(chan struct{})
	counts := make(chan int, 2)
	for s := range r.w {
		go func() {
			n := 0
			defer func() { r.w[s].Close(); counts <- n }()
			rnd := rand.New(rand.NewPCG(uint64(s), 1))
			for {
				select {
				case <-stop:
					return
				default:
				}
				line := fmt.Sprintf("%d %s\n", n, strings.Repeat("z", rnd.IntN(120)))
				if n%5000 == 4999 {
					line = fmt.Sprintf("%d %s\n", n, strings.Repeat("Z", 40000))
				}
				if _, err := r.w[s].WriteString(line); err != nil {
					t.Error(err)
					return
				}
				n++
			}
		}()
	}
	start := func() *exec.Cmd {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), "CRILOG_COPIER=1")
		cmd.ExtraFiles = files
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return cmd
	}
	for range kills {
		cmd := start()
		time.Sleep(time.Duration(rand.IntN(25000)) * time.Microsecond)
		_ = cmd.Process.Kill()
		if err := cmd.Wait(); err == nil {
			t.Fatal("the copier ended by itself")
		}
	}
	close(stop)
	last := start()
	total := <-counts + <-counts
	if err := last.Wait(); err != nil {
		t.Fatal(err)
	}
	got := parseLog(t, r.content())
	lines := 0
	for s := range got {
		for i, line := range strings.Split(strings.TrimSuffix(string(got[s]), "\n"), "\n") {
			num, text, ok := strings.Cut(line, " ")
			if !ok || num != strconv.Itoa(i) || strings.Trim(text, "zZ") != "" {
				t.Fatalf("%s: line %d is %.60q", Stream(s), i, line)
			}
			lines++
		}
	}
	if lines != total {
		t.Errorf("%d lines logged, %d written", lines, total)
	}
	t.Logf("%d kills, %d lines, %d MB", kills, lines, len(r.content())>>20)
}

func BenchmarkCopy(b *testing.B) {
	r := newRig(b)
	if _, err := unix.FcntlInt(r.w[0].Fd(), unix.F_SETPIPE_SZ, 1<<20); err != nil {
		b.Fatal(err)
	}
	r.c.grow(Stdout, r.b, 1<<20)
	block := bytes.Repeat([]byte(strings.Repeat("x", 99)+"\n"), 10000)
	b.SetBytes(int64(len(block)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := r.w[0].Write(block); err != nil {
			b.Fatal(err)
		}
		r.drain()
		if err := r.log.Truncate(0); err != nil {
			b.Fatal(err)
		}
	}
}
