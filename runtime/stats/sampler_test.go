package stats

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime"
	"github.com/naru-project/naru/runtime/cgroup"
)

var bg = context.Background()

// fakeTree is a folder with the files of one cgroup, for layouts that this host
// may not have.
func fakeTree(t testing.TB, files map[string]string) (dir string, fd int) {
	t.Helper()
	dir = t.TempDir()
	for name, text := range files {
		p := filepath.Join(dir, "pod/c1", name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return dir, fd
}

func newFake(l layout) *Sampler {
	s := &Sampler{layout: l, now: time.Now}
	s.buffers.New = func() any { b := make([]byte, bufSize); return &b }
	return s
}

var v2Files = map[string]string{
	"cpu.stat":   "usage_usec 5000000\nuser_usec 3000000\nsystem_usec 2000000\nnr_periods 4\nnr_throttled 1\nthrottled_usec 9\n",
	"cpu.weight": "100\n", "cpu.max": "50000 100000\n", "cpu.pressure": psiText,
	"memory.current": "1000\n", "memory.stat": "anon 300\nfile 600\nkernel 50\nfile_mapped 20\ninactive_file 400\npgfault 11\npgmajfault 2\n",
	"memory.max": "4096\n", "memory.swap.current": "7\n", "memory.swap.max": "0\n", "memory.peak": "2000\n",
	"memory.events": "low 0\nhigh 0\nmax 3\noom 1\noom_kill 1\n", "memory.pressure": psiText,
	"io.stat": "8:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\n", "io.pressure": psiText,
	"pids.current": "5\n", "pids.max": "max\n",
	"hugetlb.2MB.current": "2097152\n", "hugetlb.2MB.max": "0\n",
}

func TestReadV2(t *testing.T) {
	_, fd := fakeTree(t, v2Files)
	s := newFake(layout{v2: true, cpu: fd, cpuacct: fd, memory: fd, blkio: fd, pids: fd, hugetlb: fd, psi: fd, pages: []string{"1GB", "2MB"}})
	st, err := s.Read(bg, "/pod/c1")
	if err != nil {
		t.Fatal(err)
	}
	wantCPU := runtime.CPUStats{Usage: 5e9, User: 3e9, System: 2e9, Periods: 4, ThrottledPeriods: 1, ThrottledTime: 9000, Shares: 1024, Quota: 50000, Period: 100000, PSI: st.CPU.PSI}
	if *st.CPU != wantCPU || st.CPU.PSI == nil || st.CPU.PSI.Full.Total != 17000 {
		t.Errorf("cpu %+v", *st.CPU)
	}
	wantMem := runtime.MemoryStats{
		Usage: 1000, WorkingSet: 600, RSS: 300, Cache: 600, MappedFile: 20, Kernel: 50, Limit: 4096, Swap: 7, MaxUsage: 2000, Failcnt: 3,
		PageFaults: 11, MajorPageFaults: 2, Available: 3496, HasKernel: true, HasSwap: true, HasMaxUsage: true, PSI: st.Memory.PSI,
	}
	if *st.Memory != wantMem || st.Memory.PSI == nil {
		t.Errorf("memory %+v", *st.Memory)
	}
	if st.IO == nil || st.IO.ReadBytes != 10 || st.IO.PSI == nil || *st.Pids != (runtime.PidsStats{Current: 5}) || st.OOMEvents != 1 {
		t.Errorf("%+v %+v", st, st.IO)
	}
	if len(st.Hugetlb) != 1 || st.Hugetlb[0] != (runtime.HugetlbStats{PageSize: "2MB", Usage: 2 << 20}) {
		t.Errorf("hugetlb %+v", st.Hugetlb)
	}
	_, err = s.Read(bg, "/pod/c2")
	if !errs.Is(err, errs.NotFound) {
		t.Errorf("a missing cgroup: %v", err)
	}
	for _, bad := range []string{"", "/", "pod/c1", "/pod/../pod/c1", "/pod/..", "/a\x00"} {
		if _, err := s.Get(bg, bad); !errs.Is(err, errs.InvalidArgument) {
			t.Errorf("path %q: %v", bad, err)
		}
	}
}

func TestReadV1(t *testing.T) {
	_, fd := fakeTree(t, map[string]string{
		"cpuacct.usage": "500\n", "cpuacct.usage_user": "300\n", "cpuacct.usage_sys": "200\n", "cpu.stat": "nr_periods 1\nnr_throttled 2\nthrottled_time 3\n",
		"cpu.shares": "512\n", "cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n",
		"memory.usage_in_bytes": "1000\n", "memory.stat": "rss 1\ntotal_rss 300\ntotal_cache 600\ntotal_inactive_file 5000\ntotal_swap 4\n",
		"memory.limit_in_bytes": "2000\n", "memory.memsw.limit_in_bytes": "2500\n", "memory.max_usage_in_bytes": "1500\n", "memory.failcnt": "6\n",
		"memory.kmem.usage_in_bytes": "44\n", "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
		"blkio.throttle.io_service_bytes_recursive": "8:0 Read 10\n8:0 Write 20\n8:0 Total 30\nTotal 30\n",
		"blkio.throttle.io_serviced_recursive":      "8:0 Read 1\n8:0 Write 2\nTotal 3\n",
		"pids.current":                              "5\n", "pids.max": "100\n",
		"hugetlb.2MB.usage_in_bytes": "0\n", "hugetlb.2MB.max_usage_in_bytes": "77\n",
	})
	s := newFake(layout{cpu: fd, cpuacct: fd, memory: fd, blkio: fd, pids: fd, hugetlb: fd, psi: -1, pages: []string{"2MB"}})
	st, err := s.Read(bg, "/pod/c1")
	if err != nil {
		t.Fatal(err)
	}
	if *st.CPU != (runtime.CPUStats{Usage: 500, User: 300, System: 200, Periods: 1, ThrottledPeriods: 2, ThrottledTime: 3, Shares: 512, Quota: -1, Period: 100000}) {
		t.Errorf("cpu %+v", *st.CPU)
	}
	if *st.Memory != (runtime.MemoryStats{
		Usage: 1000, RSS: 300, Cache: 600, Kernel: 44, Limit: 2000, SwapLimit: 500, Memsw: 2500, Swap: 4, MaxUsage: 1500, Failcnt: 6, Available: 2000,
		HasKernel: true, HasSwap: true, HasMaxUsage: true,
	}) { // the working set does not go below 0
		t.Errorf("memory %+v", *st.Memory)
	}
	if st.IO.ReadBytes != 10 || st.IO.Writes != 2 || *st.Pids != (runtime.PidsStats{Current: 5, Limit: 100}) || st.OOMEvents != 2 || st.Hugetlb[0] != (runtime.HugetlbStats{PageSize: "2MB", Max: 77, HasMax: true}) {
		t.Errorf("%+v %+v", st, st.IO)
	}
}

// TestReadLess: what a kernel does not count is told from 0.
func TestReadLess(t *testing.T) {
	_, fd := fakeTree(t, map[string]string{"cpuacct.usage": "500\n", "memory.usage_in_bytes": "1000\n", "memory.stat": "total_rss 300\n"})
	s := newFake(layout{cpu: fd, cpuacct: fd, memory: fd, blkio: -1, pids: -1, hugetlb: -1, psi: -1})
	st, err := s.Read(bg, "/pod/c1")
	if err != nil {
		t.Fatal(err)
	}
	if *st.Memory != (runtime.MemoryStats{Usage: 1000, WorkingSet: 1000, RSS: 300}) || st.CPU.PSI != nil || st.IO != nil || st.Pids != nil || st.Hugetlb != nil {
		t.Errorf("version 1: %+v %+v", st, st.Memory)
	}
	_, fd = fakeTree(t, map[string]string{"memory.current": "1000\n", "memory.stat": "anon 300\n"})
	s = newFake(layout{v2: true, psi: fd})
	if st, err = s.Read(bg, "/pod/c1"); err != nil || *st.Memory != (runtime.MemoryStats{Usage: 1000, WorkingSet: 1000, RSS: 300, HasKernel: true}) {
		t.Errorf("version 2: %+v, %v", st, err)
	}
}

// TestGet: fresh samples are shared, old ones read again, the rate is between
// the last two, and an overlong file is cut at a line.
func TestGet(t *testing.T) {
	dir, fd := fakeTree(t, v2Files)
	s := newFake(layout{v2: true, psi: fd})
	now := time.Unix(1000, 0)
	s.now = func() time.Time { return now }
	get := func() *runtime.Stats {
		t.Helper()
		st, err := s.Get(bg, "/pod/c1")
		if err != nil {
			t.Fatal(err)
		}
		return st
	}
	setUsage := func(usec int) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, "pod/c1/cpu.stat"), fmt.Appendf(nil, "usage_usec %d\n", usec), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	first := get()
	if first.CPU.UsageNanoCores != 0 || !first.Time.Equal(now) {
		t.Errorf("first %+v at %v", first.CPU, first.Time)
	}
	setUsage(6_000_000)
	now = now.Add(900 * time.Millisecond)
	if get() != first {
		t.Error("a fresh sample was read again")
	}
	now = now.Add(1100 * time.Millisecond) // 2 s after the first, one CPU second used
	second := get()
	if second == first || second.CPU.UsageNanoCores != 500_000_000 || !second.Time.Equal(now) {
		t.Errorf("second %+v", second.CPU)
	}
	now = now.Add(10 * time.Millisecond)
	setUsage(6_001_000)
	third, err := s.Read(bg, "/pod/c1")
	if err != nil || third.CPU.Usage != 6_001_000_000 || third.CPU.UsageNanoCores != 500_000_000 {
		t.Errorf("Read: %+v %v", third.CPU, err)
	}
	setUsage(1) // the cgroup was made anew
	now = now.Add(5 * time.Second)
	if st := get(); st.CPU.UsageNanoCores != 0 {
		t.Errorf("a counter that fell: %+v", st.CPU)
	}
	long := strings.Repeat("x 1\n", bufSize) + "anon 5\n"
	if err := os.WriteFile(filepath.Join(dir, "pod/c1/memory.stat"), []byte(long), 0o644); err != nil {
		t.Fatal(err)
	}
	if st, err := s.Read(bg, "/pod/c1"); err != nil || st.Memory.RSS != 0 {
		t.Errorf("%v %v", st, err)
	}
	s.Forget("/pod/c1")
	if s.fresh("/pod/c1", now, MaxAge) != nil {
		t.Error("forgotten, yet there")
	}
}

func TestSweep(t *testing.T) {
	_, fd := fakeTree(t, v2Files)
	s := newFake(layout{v2: true, psi: fd})
	now := time.Unix(1000, 0)
	s.now = func() time.Time { return now }
	if _, err := s.Get(bg, "/pod/c1"); err != nil {
		t.Fatal(err)
	}
	now = now.Add(forgetAfter + time.Second)
	for i := range sweepEvery {
		_, _ = s.Get(bg, fmt.Sprintf("/pod/none%d", i))
	}
	n := 0
	s.entries.Range(func(any, any) bool { n++; return true })
	if n != 0 {
		t.Errorf("%d entries kept", n)
	}
}

func TestConcurrentGet(t *testing.T) {
	_, fd := fakeTree(t, v2Files)
	s := newFake(layout{v2: true, psi: fd})
	var wg sync.WaitGroup
	got := make([]*runtime.Stats, 50)
	for i := range got {
		wg.Go(func() { got[i], _ = s.Get(bg, "/pod/c1") })
	}
	wg.Wait()
	for _, st := range got {
		if st == nil || st != got[0] {
			t.Fatal("not one sample for all")
		}
	}
	ctx, cancel := context.WithCancel(bg)
	cancel()
	v, _ := s.entries.Load("/pod/c1")
	v.(*entry).turn <- struct{}{} // somebody reads, and hangs
	if _, err := s.Read(ctx, "/pod/c1"); !errs.Is(err, errs.Canceled) {
		t.Errorf("got %v", err)
	}
	if _, err := s.Get(ctx, "/pod/c1"); err != nil {
		t.Errorf("a fresh sample had to wait: %v", err)
	}
}

// hostGroups makes n cgroups on this host.
func hostGroups(t testing.TB, n int) (*Sampler, []string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: cgroups are made")
	}
	d, err := cgroup.New(cgroup.Config{Driver: cgroup.DriverCgroupfs})
	if err != nil {
		t.Fatal(err)
	}
	parent := fmt.Sprintf("/naru-test-stats-%d-%d", os.Getpid(), time.Now().UnixNano())
	var groups []*cgroup.Group
	var paths []string
	t.Cleanup(func() {
		for _, g := range groups {
			if err := g.Remove(bg); err != nil {
				t.Error(err)
			}
		}
		if err := d.RemovePod(bg, parent); err != nil {
			t.Error(err)
		}
		d.Close()
	})
	for i := range n {
		p, err := d.ContainerPath(parent, fmt.Sprintf("c%d", i))
		if err != nil {
			t.Fatal(err)
		}
		g, err := d.Create(bg, p, runtime.Resources{Memory: 64 << 20, CPUQuota: 10000, PidsLimit: 7}, nil, cgroup.Options{})
		if err != nil {
			t.Fatal(err)
		}
		g.Close()
		groups = append(groups, g)
		paths = append(paths, p)
	}
	return New(d), paths
}

func TestReadHost(t *testing.T) {
	s, paths := hostGroups(t, 1)
	st, err := s.Get(bg, paths[0])
	if err != nil {
		t.Fatal(err)
	}
	if st.CPU == nil || st.Memory == nil || st.Pids == nil || st.IO == nil {
		t.Fatalf("%+v", st)
	}
	if st.Memory.Limit != 64<<20 || st.CPU.Quota != 10000 || st.Pids.Limit != 7 || st.CPU.Shares != 1024 || st.Memory.SwapLimit != 0 {
		t.Errorf("%+v %+v %+v", st.CPU, st.Memory, st.Pids)
	}
	if _, err := os.Stat("/proc/pressure"); err == nil && s.layout.psi >= 0 && (st.CPU.PSI == nil || st.Memory.PSI == nil || st.IO.PSI == nil) {
		t.Errorf("no PSI: %+v", st)
	}
}

func BenchmarkRead(b *testing.B) {
	s, paths := hostGroups(b, 1)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := s.Read(bg, paths[0]); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkList100Fresh is a List of 50 pods with a container each, from samples
// that are fresh.
func BenchmarkList100Fresh(b *testing.B) {
	s, paths := hostGroups(b, 100)
	s.GetAll(bg, paths)
	fixed := s.now()
	s.now = func() time.Time { return fixed }
	b.ReportAllocs()
	for b.Loop() {
		for _, st := range s.GetAll(bg, paths) {
			if st == nil {
				b.Fatal("no sample")
			}
		}
	}
}

func BenchmarkList100Stale(b *testing.B) {
	s, paths := hostGroups(b, 100)
	now := s.now()
	s.now = func() time.Time { now = now.Add(2 * MaxAge); return now }
	for b.Loop() {
		for _, p := range paths {
			if _, err := s.Get(bg, p); err != nil {
				b.Fatal(err)
			}
		}
	}
}
