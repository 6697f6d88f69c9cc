package stats

import (
	"bytes"
	"math"

	"github.com/naru-project/naru/runtime"
)

// maxDevices bounds the lines taken of an IO file.
const maxDevices = 512

// line cuts the first line off.
func line(b []byte) (first, rest []byte) {
	if i := bytes.IndexByte(b, '\n'); i >= 0 {
		return b[:i], b[i+1:]
	}
	return b, nil
}

// word cuts the first word off.
func word(b []byte) (first, rest []byte) {
	for len(b) > 0 && b[0] == ' ' {
		b = b[1:]
	}
	if i := bytes.IndexByte(b, ' '); i >= 0 {
		return b[:i], b[i+1:]
	}
	return b, nil
}

// number reads an unsigned decimal; too large ones saturate.
func number(b []byte) (uint64, bool) {
	if len(b) == 0 {
		return 0, false
	}
	var n uint64
	for _, c := range b {
		if c < '0' || c > '9' {
			return 0, false
		}
		d := uint64(c - '0')
		if n > (math.MaxUint64-d)/10 {
			n = math.MaxUint64
			continue
		}
		n = n*10 + d
	}
	return n, true
}

// value reads a file of one number; "max" and other words are 0, false.
func value(b []byte) (uint64, bool) {
	first, _ := line(b)
	return number(bytes.TrimSpace(first))
}

// limit reads a file of one limit; "max", and the huge number that version 1
// has for it, are 0: none.
func limit(b []byte) uint64 {
	n, ok := value(b)
	if !ok || n >= 1<<62 {
		return 0
	}
	return n
}

// signedValue reads a number that may be -1 (cpu.cfs_quota_us).
func signedValue(b []byte) int64 {
	first, _ := line(b)
	first = bytes.TrimSpace(first)
	if len(first) > 0 && first[0] == '-' {
		n, _ := number(first[1:])
		return -int64(min(n, math.MaxInt64))
	}
	n, _ := number(first)
	return int64(min(n, math.MaxInt64))
}

// usec turns the microseconds of a file into nanoseconds.
func usec(n uint64) uint64 {
	if n > math.MaxUint64/1000 {
		return math.MaxUint64
	}
	return n * 1000
}

// parseCPUStatV2 reads version 2's cpu.stat. The bandwidth lines are only there
// with the controller on.
func parseCPUStatV2(b []byte, c *runtime.CPUStats) {
	for len(b) > 0 {
		var l []byte
		l, b = line(b)
		key, rest := word(l)
		n, ok := number(rest)
		if !ok {
			continue
		}
		switch string(key) {
		case "usage_usec":
			c.Usage = usec(n)
		case "user_usec":
			c.User = usec(n)
		case "system_usec":
			c.System = usec(n)
		case "nr_periods":
			c.Periods = n
		case "nr_throttled":
			c.ThrottledPeriods = n
		case "throttled_usec":
			c.ThrottledTime = usec(n)
		}
	}
}

// parseCPUStatV1 reads version 1's cpu.stat, whose times are nanoseconds.
func parseCPUStatV1(b []byte, c *runtime.CPUStats) {
	for len(b) > 0 {
		var l []byte
		l, b = line(b)
		key, rest := word(l)
		n, ok := number(rest)
		if !ok {
			continue
		}
		switch string(key) {
		case "nr_periods":
			c.Periods = n
		case "nr_throttled":
			c.ThrottledPeriods = n
		case "throttled_time":
			c.ThrottledTime = n
		}
	}
}

// parseCPUMax reads "max 100000" or "50000 100000".
func parseCPUMax(b []byte, c *runtime.CPUStats) {
	l, _ := line(b)
	quota, period := word(l)
	if n, ok := number(quota); ok {
		c.Quota = int64(min(n, math.MaxInt64))
	} else {
		c.Quota = -1
	}
	if n, ok := number(bytes.TrimSpace(period)); ok {
		c.Period = int64(min(n, math.MaxInt64))
	}
}

// sharesOf is the inverse of the conversion with which limits are set (see
// runtime/cgroup): CPU shares of a weight.
func sharesOf(weight uint64) int64 {
	if weight == 0 {
		return 0
	}
	e := math.Log10(float64(min(weight, 10000)))
	l := (math.Sqrt(125*125+4*612*(e+7.0/34.0)) - 125) / 2
	return int64(math.Round(math.Exp2(l)))
}

// memStat is what is used of memory.stat.
type memStat struct {
	rss, cache, mapped, inactiveFile uint64
	kernel, kernelParts, swap        uint64
	faults, majorFaults              uint64
	hasSwap                          bool // there is a line of it
}

// parseMemoryStatV2 reads version 2's memory.stat. "kernel" is there from 5.18;
// before, its parts are added up.
func parseMemoryStatV2(b []byte, m *memStat) {
	for len(b) > 0 {
		var l []byte
		l, b = line(b)
		key, rest := word(l)
		n, ok := number(rest)
		if !ok {
			continue
		}
		switch string(key) {
		case "anon":
			m.rss = n
		case "file":
			m.cache = n
		case "file_mapped":
			m.mapped = n
		case "inactive_file":
			m.inactiveFile = n
		case "kernel":
			m.kernel = n
		case "kernel_stack", "pagetables", "percpu", "slab":
			m.kernelParts += n
		case "pgfault":
			m.faults = n
		case "pgmajfault":
			m.majorFaults = n
		}
	}
	if m.kernel == 0 {
		m.kernel = m.kernelParts
	}
}

// parseMemoryStatV1 reads the hierarchical lines of version 1's memory.stat.
func parseMemoryStatV1(b []byte, m *memStat) {
	for len(b) > 0 {
		var l []byte
		l, b = line(b)
		key, rest := word(l)
		n, ok := number(rest)
		if !ok {
			continue
		}
		switch string(key) {
		case "total_rss":
			m.rss = n
		case "total_cache":
			m.cache = n
		case "total_mapped_file":
			m.mapped = n
		case "total_inactive_file":
			m.inactiveFile = n
		case "total_swap":
			m.swap, m.hasSwap = n, true
		case "total_pgfault":
			m.faults = n
		case "total_pgmajfault":
			m.majorFaults = n
		}
	}
}

// keyed finds "key number" in a flat keyed file.
func keyed(b []byte, want string) uint64 {
	for len(b) > 0 {
		var l []byte
		l, b = line(b)
		key, rest := word(l)
		if string(key) == want {
			n, _ := number(rest)
			return n
		}
	}
	return 0
}

// parsePSI reads a pressure file (Documentation/accounting/psi.rst). It
// reports whether there was a line of it.
func parsePSI(b []byte, p *runtime.PSI) bool {
	found := false
	for len(b) > 0 {
		var l []byte
		l, b = line(b)
		kind, rest := word(l)
		var to *runtime.PSILine
		switch string(kind) {
		case "some":
			to = &p.Some
		case "full":
			to = &p.Full
		default:
			continue
		}
		found = true
		for len(rest) > 0 {
			var w []byte
			w, rest = word(rest)
			i := bytes.IndexByte(w, '=')
			if i < 0 {
				continue
			}
			switch string(w[:i]) {
			case "avg10":
				to.Avg10 = percent(w[i+1:])
			case "avg60":
				to.Avg60 = percent(w[i+1:])
			case "avg300":
				to.Avg300 = percent(w[i+1:])
			case "total":
				n, _ := number(w[i+1:])
				to.Total = usec(n)
			}
		}
	}
	return found
}

// percent reads "12.34".
func percent(b []byte) float64 {
	whole, frac := b, []byte(nil)
	if i := bytes.IndexByte(b, '.'); i >= 0 {
		whole, frac = b[:i], b[i+1:]
	}
	w, ok := number(whole)
	if !ok {
		return 0
	}
	f, scale := 0.0, 1.0
	for i, c := range frac {
		if c < '0' || c > '9' || i > 8 {
			break
		}
		f = f*10 + float64(c-'0')
		scale *= 10
	}
	return float64(w) + f/scale
}

// device reads "8:16".
func device(b []byte) (major, minor uint64, ok bool) {
	i := bytes.IndexByte(b, ':')
	if i < 0 {
		return 0, 0, false
	}
	major, ok1 := number(b[:i])
	minor, ok2 := number(b[i+1:])
	return major, minor, ok1 && ok2
}

// parseIOStatV2 reads io.stat:
//
//	8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0
func parseIOStatV2(b []byte, s *runtime.IOStats) {
	for len(b) > 0 && len(s.Devices) < maxDevices {
		var l []byte
		l, b = line(b)
		name, rest := word(l)
		var d runtime.IODevice
		var ok bool
		if d.Major, d.Minor, ok = device(name); !ok {
			continue
		}
		for len(rest) > 0 {
			var w []byte
			w, rest = word(rest)
			i := bytes.IndexByte(w, '=')
			if i < 0 {
				continue
			}
			n, _ := number(w[i+1:])
			switch string(w[:i]) {
			case "rbytes":
				d.ReadBytes = n
			case "wbytes":
				d.WriteBytes = n
			case "rios":
				d.Reads = n
			case "wios":
				d.Writes = n
			case "dbytes":
				d.DiscardBytes = n
			}
		}
		s.Devices = append(s.Devices, d)
	}
	sumIO(s)
}

// parseBlkio reads one of version 1's blkio.throttle.*_recursive files,
// "8:0 Read 5" a line, into bytes or operations.
func parseBlkio(b []byte, s *runtime.IOStats, ops bool) {
	for len(b) > 0 {
		var l []byte
		l, b = line(b)
		name, rest := word(l)
		kind, rest := word(rest)
		n, ok := number(bytes.TrimSpace(rest))
		major, minor, dev := device(name)
		if !ok || !dev {
			continue // the total, and what is not understood
		}
		d := findDevice(s, major, minor)
		if d == nil {
			break
		}
		switch {
		case string(kind) == "Read" && ops:
			d.Reads = n
		case string(kind) == "Write" && ops:
			d.Writes = n
		case string(kind) == "Read":
			d.ReadBytes = n
		case string(kind) == "Write":
			d.WriteBytes = n
		case string(kind) == "Discard" && !ops:
			d.DiscardBytes = n
		}
	}
}

func findDevice(s *runtime.IOStats, major, minor uint64) *runtime.IODevice {
	for i := len(s.Devices) - 1; i >= 0; i-- { // lines of one device stand together
		if d := &s.Devices[i]; d.Major == major && d.Minor == minor {
			return d
		}
	}
	if len(s.Devices) >= maxDevices {
		return nil
	}
	s.Devices = append(s.Devices, runtime.IODevice{Major: major, Minor: minor})
	return &s.Devices[len(s.Devices)-1]
}

func sumIO(s *runtime.IOStats) {
	s.ReadBytes, s.WriteBytes, s.Reads, s.Writes = 0, 0, 0, 0
	for i := range s.Devices {
		d := &s.Devices[i]
		s.ReadBytes += d.ReadBytes
		s.WriteBytes += d.WriteBytes
		s.Reads += d.Reads
		s.Writes += d.Writes
	}
}
