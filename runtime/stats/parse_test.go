package stats

import (
	"math"
	"strings"
	"testing"

	"github.com/containerd/cgroups/v3/cgroup2"

	"github.com/naru-project/naru/runtime"
)

func TestNumbers(t *testing.T) {
	for in, want := range map[string]uint64{"0": 0, "42": 42, "18446744073709551615": math.MaxUint64, "99999999999999999999999": math.MaxUint64} {
		if n, ok := number([]byte(in)); !ok || n != want {
			t.Errorf("number %s: %d %v", in, n, ok)
		}
	}
	for _, in := range []string{"", "max", "-1", "1.5", "1 ", "0x1"} {
		if _, ok := number([]byte(in)); ok {
			t.Errorf("number accepted %q", in)
		}
	}
	for in, want := range map[string]uint64{"max\n": 0, "9223372036854771712\n": 0, "1048576\n": 1 << 20, "": 0, "x": 0} {
		if n := limit([]byte(in)); n != want {
			t.Errorf("limit %q: %d", in, n)
		}
	}
	for in, want := range map[string]int64{"-1\n": -1, "50000\n": 50000, "": 0, "-99999999999999999999": -math.MaxInt64} {
		if n := signedValue([]byte(in)); n != want {
			t.Errorf("signed %q: %d", in, n)
		}
	}
	for in, want := range map[string]float64{"0.00": 0, "12.34": 12.34, "100": 100, "x": 0, "1.": 1, "0.5z": 0.5} {
		if f := percent([]byte(in)); math.Abs(f-want) > 1e-9 {
			t.Errorf("percent %q: %v", in, f)
		}
	}
}

// TestSharesOf: kubelet's usual requests survive the way to a weight and back
// within what whole weights can tell apart.
func TestSharesOf(t *testing.T) {
	for _, shares := range []uint64{2, 10, 102, 256, 512, 1024, 2048, 4096, 65536, 262144} {
		w := cgroup2.ConvertCPUSharesToCgroupV2Value(shares)
		lo, hi := sharesOf(max(w, 2)-1), sharesOf(w+1)
		if got := sharesOf(w); got < 1 || uint64(lo) > shares || uint64(hi) < shares {
			t.Errorf("shares %d → weight %d → %d (%d…%d)", shares, w, got, lo, hi)
		}
	}
	if got := sharesOf(100); got != 1024 {
		t.Errorf("default weight: %d", got)
	}
}

func TestParseCPU(t *testing.T) {
	var c runtime.CPUStats
	parseCPUStatV2([]byte("usage_usec 100\nuser_usec 60\nsystem_usec 40\nnice_usec 0\nnr_periods 3\nnr_throttled 2\nthrottled_usec 7\nnr_bursts 0\n"), &c)
	if c != (runtime.CPUStats{Usage: 100000, User: 60000, System: 40000, Periods: 3, ThrottledPeriods: 2, ThrottledTime: 7000}) {
		t.Errorf("%+v", c)
	}
	c = runtime.CPUStats{}
	parseCPUStatV1([]byte("nr_periods 3\nnr_throttled 2\nthrottled_time 7\n"), &c)
	if c != (runtime.CPUStats{Periods: 3, ThrottledPeriods: 2, ThrottledTime: 7}) {
		t.Errorf("%+v", c)
	}
	parseCPUMax([]byte("max 100000\n"), &c)
	if c.Quota != -1 || c.Period != 100000 {
		t.Errorf("%+v", c)
	}
	parseCPUMax([]byte("5000 20000\n"), &c)
	if c.Quota != 5000 || c.Period != 20000 {
		t.Errorf("%+v", c)
	}
}

const psiText = "some avg10=0.86 avg60=12.50 avg300=0.45 total=8520754\nfull avg10=0.10 avg60=0.00 avg300=0.00 total=17\n"

func TestParsePSI(t *testing.T) {
	var p runtime.PSI
	if !parsePSI([]byte(psiText), &p) {
		t.Fatal("nothing found")
	}
	want := runtime.PSI{
		Some: runtime.PSILine{Total: 8520754000, Avg10: 0.86, Avg60: 12.5, Avg300: 0.45},
		Full: runtime.PSILine{Total: 17000, Avg10: 0.1},
	}
	if p != want {
		t.Errorf("%+v", p)
	}
	if parsePSI(nil, &p) || parsePSI([]byte("bla\n"), &p) {
		t.Error("found in nothing")
	}
}

func TestParseIO(t *testing.T) {
	var s runtime.IOStats
	parseIOStatV2([]byte("8:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\n253:1 rbytes=5 wbytes=6 rios=7 wios=8 dbytes=9 dios=9\n8:16 \nbla\n"), &s)
	if s.ReadBytes != 15 || s.WriteBytes != 26 || s.Reads != 8 || s.Writes != 10 || len(s.Devices) != 3 || s.Devices[1].Major != 253 || s.Devices[1].Minor != 1 || s.Devices[1].DiscardBytes != 9 {
		t.Errorf("%+v", s)
	}
	s = runtime.IOStats{}
	parseBlkio([]byte("8:0 Read 10\n8:0 Write 20\n8:0 Sync 1\n8:0 Discard 7\n8:0 Total 30\n8:16 Read 1\nTotal 31\n"), &s, false)
	parseBlkio([]byte("8:0 Read 3\n8:0 Write 4\n8:0 Discard 99\n8:16 Write 5\nTotal 12\n"), &s, true)
	sumIO(&s)
	if s.ReadBytes != 11 || s.WriteBytes != 20 || s.Reads != 3 || s.Writes != 9 || len(s.Devices) != 2 || s.Devices[0].DiscardBytes != 7 {
		t.Errorf("%+v", s)
	}
	s = runtime.IOStats{}
	var many strings.Builder
	for i := range 5000 {
		many.WriteString("8:" + strings.Repeat("1", i%9+1) + " rbytes=1\n")
	}
	parseIOStatV2([]byte(many.String()), &s)
	if len(s.Devices) > maxDevices {
		t.Errorf("%d devices", len(s.Devices))
	}
}

func TestParseMemory(t *testing.T) {
	var m memStat
	parseMemoryStatV2([]byte("anon 1\nfile 2\nkernel 3\nkernel_stack 9\nfile_mapped 4\ninactive_file 5\npgfault 6\npgmajfault 7\nanon_thp 99\n"), &m)
	want := memStat{rss: 1, cache: 2, kernel: 3, kernelParts: 9, mapped: 4, inactiveFile: 5, faults: 6, majorFaults: 7}
	if m != want {
		t.Errorf("%+v", m)
	}
	m = memStat{}
	parseMemoryStatV2([]byte("kernel_stack 1\npagetables 2\npercpu 3\nslab 4\n"), &m)
	if m.kernel != 10 {
		t.Errorf("kernel before 5.18: %d", m.kernel)
	}
	m = memStat{}
	parseMemoryStatV1([]byte("rss 99\ntotal_rss 1\ntotal_cache 2\ntotal_mapped_file 4\ntotal_inactive_file 5\ntotal_swap 8\ntotal_pgfault 6\ntotal_pgmajfault 7\n"), &m)
	want = memStat{rss: 1, cache: 2, mapped: 4, inactiveFile: 5, swap: 8, hasSwap: true, faults: 6, majorFaults: 7}
	if m != want {
		t.Errorf("%+v", m)
	}
}

func TestParsersDoNotAllocate(t *testing.T) {
	cpu := []byte("usage_usec 100\nuser_usec 60\nsystem_usec 40\nnr_periods 3\n")
	mem := []byte("anon 1\nfile 2\nkernel 3\ninactive_file 5\npgfault 6\n")
	psi := []byte(psiText)
	var c runtime.CPUStats
	var m memStat
	var p runtime.PSI
	if n := testing.AllocsPerRun(100, func() {
		parseCPUStatV2(cpu, &c)
		parseCPUStatV1(cpu, &c)
		parseMemoryStatV2(mem, &m)
		parseMemoryStatV1(mem, &m)
		parsePSI(psi, &p)
		keyed(cpu, "user_usec")
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func FuzzCPUStat(f *testing.F) {
	f.Add([]byte("usage_usec 100\nuser_usec 60\n"))
	f.Add([]byte("nr_periods 99999999999999999999\n\n \nthrottled_usec\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		var c runtime.CPUStats
		parseCPUStatV2(b, &c)
		parseCPUStatV1(b, &c)
		parseCPUMax(b, &c)
		if c.Period < 0 || c.Quota < -1 {
			t.Fatalf("%+v", c)
		}
	})
}

func FuzzMemoryStat(f *testing.F) {
	f.Add([]byte("anon 1\ninactive_file 5\nkernel 2"))
	f.Add([]byte("total_rss 1\ntotal_inactive_file 18446744073709551615\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		var m memStat
		parseMemoryStatV1(b, &m)
		parseMemoryStatV2(b, &m)
		bl := &block{}
		bl.memory.Usage, _ = value(b)
		bl.memory.Limit = limit(b)
		finishMemory(bl, &m)
		if bl.memory.WorkingSet > bl.memory.Usage || bl.memory.Available > bl.memory.Limit {
			t.Fatalf("%+v", bl.memory)
		}
	})
}

func FuzzIOStat(f *testing.F) {
	f.Add([]byte("8:0 rbytes=10 wbytes=20 rios=1 wios=2\n"))
	f.Add([]byte("8:0 Read 10\n8:0 Write 20\nTotal 30\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		var s, v1 runtime.IOStats
		parseIOStatV2(b, &s)
		parseBlkio(b, &v1, true)
		parseBlkio(b, &v1, false)
		sumIO(&v1)
		if len(s.Devices) > maxDevices || len(v1.Devices) > maxDevices {
			t.Fatal("too many devices")
		}
	})
}

func FuzzPSI(f *testing.F) {
	f.Add([]byte(psiText))
	f.Add([]byte("some avg10= total=x =\nfull"))
	f.Fuzz(func(t *testing.T, b []byte) {
		var p runtime.PSI
		parsePSI(b, &p)
		for _, v := range []float64{p.Some.Avg10, p.Some.Avg60, p.Some.Avg300, p.Full.Avg10, p.Full.Avg60, p.Full.Avg300} {
			if v < 0 || math.IsNaN(v) || math.IsInf(v, 0) {
				t.Fatalf("%+v", p)
			}
		}
	})
}

func FuzzValues(f *testing.F) {
	f.Add([]byte("max\n"))
	f.Add([]byte("-1\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		value(b)
		limit(b)
		signedValue(b)
		keyed(b, "oom_kill")
	})
}
