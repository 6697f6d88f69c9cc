package stats

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime"
)

func openProc(t testing.TB) *os.File {
	t.Helper()
	proc, err := os.Open("/proc")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = proc.Close() })
	return proc
}

// detailed is a Sampler of a fake cgroup with this test's process in it.
func detailed(t testing.TB, files map[string]string, pids ...int) (*Sampler, Subject) {
	t.Helper()
	_, fd := fakeTree(t, files)
	s := newFake(layout{v2: true, psi: fd})
	s.processes = func(context.Context, string) ([]int, error) { return pids, nil }
	return s, Subject{Cgroup: "/pod/c1", First: os.Getpid(), Proc: openProc(t)}
}

func TestDetailed(t *testing.T) {
	files := map[string]string{"memory.min": "4096\n"}
	for name, text := range v2Files {
		files[name] = text
	}
	blocks, err := os.ReadDir("/sys/class/block")
	if err != nil || len(blocks) == 0 {
		t.Fatalf("this machine has no disks: %v", err)
	}
	number, err := os.ReadFile(filepath.Join("/sys/class/block", blocks[0].Name(), "dev"))
	if err != nil {
		t.Fatal(err)
	}
	files["io.stat"] = strings.TrimSpace(string(number)) + " rbytes=1\n4095:77 rbytes=2\n"
	s, of := detailed(t, files, os.Getpid(), 1<<29) // and one that is gone
	before, err := s.Detailed(bg, of)
	if err != nil {
		t.Fatal(err)
	}
	d := before.Details
	if d.Processes != 2 || !d.HasProcesses || !d.HasDescriptors || d.Descriptors < 3 || d.Reservation != 4096 || d.Time.Before(before.Time) {
		t.Errorf("%+v", d)
	}
	var own unix.Rlimit
	if err := unix.Prlimit(os.Getpid(), unix.RLIMIT_NOFILE, nil, &own); err != nil || !d.HasOpenFiles || d.OpenFiles != own.Cur {
		t.Errorf("open files %d %v, want %d (%v)", d.OpenFiles, d.HasOpenFiles, own.Cur, err)
	}
	if want := []string{"/dev/" + strings.ReplaceAll(blocks[0].Name(), "!", "/"), "4095:77"}; !slices.Equal(d.Devices, want) {
		t.Errorf("devices %q, want %q", d.Devices, want)
	}
	again, err := s.Detailed(bg, of)
	if err != nil || again != before {
		t.Errorf("fresh details were read again: %v", err)
	}
	if st, err := s.Get(bg, of.Cgroup); err != nil || st != before {
		t.Errorf("Get does not share the sample: %v", err)
	}
	for range 5 {
		c, err := net.ListenPacket("udp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
	}
	s.Forget(of.Cgroup)
	after, err := s.Detailed(bg, of)
	if err != nil || after.Details.Sockets < d.Sockets+5 || after.Details.Descriptors < d.Descriptors+5 {
		t.Errorf("5 sockets more: %+v, then %+v, %v", d, after.Details, err)
	}
}

// TestDetailedShares: details are added to a fresh sample, whose cgroup files
// are not read again, and once however many ask.
func TestDetailedShares(t *testing.T) {
	s, of := detailed(t, v2Files, os.Getpid())
	plain, err := s.Get(bg, of.Cgroup)
	if err != nil || plain.Details != nil {
		t.Fatalf("%+v, %v", plain, err)
	}
	var wg sync.WaitGroup
	got := make([]*runtime.Stats, 20)
	for i := range got {
		wg.Go(func() { got[i], _ = s.Detailed(bg, of) })
	}
	wg.Wait()
	for _, st := range got {
		if st == nil || st != got[0] || st.CPU != plain.CPU || !st.Time.Equal(plain.Time) || st.Details == nil {
			t.Fatal("not one sample for all")
		}
	}
	if plain.Details != nil {
		t.Error("a sample that was handed out has changed")
	}
}

func TestDetailedBounds(t *testing.T) {
	many := slices.Repeat([]int{os.Getpid()}, maxProcesses+1)
	s, of := detailed(t, v2Files, many...)
	st, err := s.Detailed(bg, of)
	if err != nil || st.Details.Processes != maxProcesses+1 || st.Details.HasDescriptors || !st.Details.HasOpenFiles {
		t.Errorf("%d processes: %+v, %v", len(many), st, err)
	}
	s, of = detailed(t, v2Files)
	r := reader{buf: make([]byte, bufSize)}
	dir, err := os.Open("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = dir.Close() }()
	if n, _, err := r.lookAt(int(dir.Fd()), 1); err != unix.E2BIG {
		t.Errorf("%d descriptors of at most one, %v", n, err)
	}
	// Above the bound the kernel still tells how many there are, if it is new enough.
	d := runtime.Details{Descriptors: maxDescriptors, HasDescriptors: true, HasSockets: true}
	var fst unix.Stat_t
	if err := unix.Fstat(int(dir.Fd()), &fst); err != nil {
		t.Fatal(err)
	}
	r.descriptors(bg, int(of.Proc.Fd()), []int{os.Getpid()}, &d)
	if told := fst.Size > 0; d.HasSockets || d.HasDescriptors != told || told && d.Descriptors < maxDescriptors+3 {
		t.Errorf("above the bound: %+v", d)
	}
	s.processes = func(context.Context, string) ([]int, error) {
		return nil, errs.New(errs.ResourceExhausted, "more than a million")
	}
	if st, err = s.Detailed(bg, of); err != nil || st.Details.HasProcesses || st.Details.HasDescriptors || st.Details.HasOpenFiles {
		t.Errorf("more than can be listed: %+v, %v", st, err)
	}
	s.Forget(of.Cgroup)
	s.processes = func(context.Context, string) ([]int, error) { return nil, errs.New(errs.NotFound, "gone") }
	if _, err := s.Detailed(bg, of); !errs.Is(err, errs.NotFound) {
		t.Errorf("a cgroup that went meanwhile: %v", err)
	}
	if _, err := s.Detailed(bg, Subject{Cgroup: "/pod/none", Proc: of.Proc}); !errs.Is(err, errs.NotFound) {
		t.Errorf("no cgroup: %v", err)
	}
	// A pid that is not of the container says nothing of it.
	s, of = detailed(t, v2Files, os.Getppid())
	if st, err := s.Detailed(bg, of); err != nil || st.Details.HasOpenFiles {
		t.Errorf("%+v, %v", st, err)
	}
}

// TestDetailedHost: with real cgroups, processes below the container count.
func TestDetailedHost(t *testing.T) {
	s, paths := hostGroups(t, 1)
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	d := s.layout.psi
	if d < 0 {
		d = s.layout.pids
	}
	fd, err := unix.Openat(d, paths[0][1:]+"/cgroup.procs", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = unix.Write(fd, []byte(strconv.Itoa(cmd.Process.Pid)))
	_ = unix.Close(fd)
	if err != nil {
		t.Fatal(err)
	}
	st, err := s.Detailed(bg, Subject{Cgroup: paths[0], First: cmd.Process.Pid, Proc: openProc(t)})
	if err != nil || st.Details.Processes != 1 || !st.Details.HasDescriptors || st.Details.Descriptors < 3 || !st.Details.HasOpenFiles {
		t.Errorf("%+v, %v", st, err)
	}
}

const limitsText = `Limit                     Soft Limit           Hard Limit           Units     
Max processes             95970                unlimited            processes 
Max open files            1024                 524288               files     
Max locked memory         8388608              8388608              bytes     
`

func TestParseOpenFiles(t *testing.T) {
	for in, want := range map[string]uint64{
		limitsText: 1024, "Max open files            0                    0                    files\n": 0, "Max open files 7": 7,
	} {
		if n, ok := parseOpenFiles([]byte(in)); !ok || n != want {
			t.Errorf("%q: %d %v", in, n, ok)
		}
	}
	for _, in := range []string{"", "Max open files", "Max open files            unlimited            unlimited            files\n", "Max open files -1 2\n", "Max processes 5 5\n"} {
		if n, ok := parseOpenFiles([]byte(in)); ok {
			t.Errorf("%q: %d", in, n)
		}
	}
}

func FuzzOpenFiles(f *testing.F) {
	f.Add([]byte(limitsText))
	f.Add([]byte("Max open files 99999999999999999999999\nMax open files"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if n, ok := parseOpenFiles(b); !ok && n != 0 {
			t.Fatalf("%d of %q", n, b)
		}
	})
}

func BenchmarkDetailed(b *testing.B) {
	s, paths := hostGroups(b, 1)
	s.processes = func(context.Context, string) ([]int, error) { return []int{os.Getpid()}, nil }
	now := s.now()
	s.now = func() time.Time { now = now.Add(2 * MaxAge); return now }
	of := Subject{Cgroup: paths[0], First: os.Getpid(), Proc: openProc(b)}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.Detailed(bg, of); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkDescriptors1000 is the look at a process with a thousand sockets.
func BenchmarkDescriptors1000(b *testing.B) {
	for range 500 {
		p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			b.Fatal(err)
		}
		defer unix.Close(p[0])
		defer unix.Close(p[1])
	}
	r := reader{buf: make([]byte, bufSize)}
	proc := openProc(b)
	for b.Loop() {
		var d runtime.Details
		if r.descriptors(bg, int(proc.Fd()), []int{os.Getpid()}, &d); !d.HasSockets || d.Sockets < 1000 {
			b.Fatalf("%+v", d)
		}
	}
}
