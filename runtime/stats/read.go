package stats

import (
	"sort"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime"
	"github.com/naru-project/naru/runtime/cgroup"
)

// bufSize bounds what is read of one file; memory.stat has some 3 KiB.
const bufSize = 32 << 10

// layout is where the files of each controller are, found once.
type layout struct {
	v2                                              bool
	cpu, cpuacct, memory, blkio, pids, hugetlb, psi int // descriptors of hierarchies, -1 = none
	pages                                           []string
}

func newLayout(d *cgroup.Driver) layout {
	dir := func(controller string) int {
		fd, ok := d.Dir(controller)
		if !ok {
			return -1
		}
		return fd
	}
	l := layout{
		v2:  d.Mode() == cgroup.ModeV2,
		cpu: dir("cpu"), cpuacct: dir("cpuacct"), memory: dir("memory"), blkio: dir("blkio"), pids: dir("pids"),
		hugetlb: dir("hugetlb"), psi: dir("unified"), pages: d.HugePageSizes(),
	}
	sort.Strings(l.pages)
	return l
}

// block is a whole sample in one allocation.
type block struct {
	stats                 runtime.Stats
	cpu                   runtime.CPUStats
	memory                runtime.MemoryStats
	io                    runtime.IOStats
	pids                  runtime.PidsStats
	cpuPSI, memPSI, ioPSI runtime.PSI
}

// reader reads the files of one cgroup into one buffer.
type reader struct {
	layout *layout
	rel    string // path of the cgroup without the leading slash
	buf    []byte
}

// file returns the contents of a file of the cgroup until the next call, or nil.
func (r *reader) file(dir int, name string) []byte {
	if dir < 0 {
		return nil
	}
	return r.fileAt(dir, r.rel+"/"+name)
}

// fileAt reads one file, likewise. What does not fit into the buffer is cut off
// at a line.
func (r *reader) fileAt(dir int, name string) []byte {
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil
	}
	defer unix.Close(fd)
	n := 0
	for n < len(r.buf) {
		m, err := unix.Read(fd, r.buf[n:])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil
		}
		if m == 0 {
			return r.buf[:n]
		}
		n += m
	}
	for n > 0 && r.buf[n-1] != '\n' {
		n--
	}
	return r.buf[:n]
}

// read takes a sample. A cgroup that has none of the main files is gone.
func (r *reader) read(now time.Time) (*runtime.Stats, error) {
	b := &block{}
	b.stats.Time = now
	if r.layout.v2 {
		r.readV2(b)
	} else {
		r.readV1(b)
	}
	s := &b.stats
	if s.CPU == nil && s.Memory == nil && s.Pids == nil {
		return nil, errs.New(errs.NotFound, "read statistics: no cgroup /%s", r.rel)
	}
	r.readPSI(b)
	return s, nil
}

func (r *reader) readV2(b *block) {
	l, s := r.layout, &b.stats
	if f := r.file(l.psi, "cpu.stat"); f != nil { // there without the controller, too
		parseCPUStatV2(f, &b.cpu)
		if f := r.file(l.psi, "cpu.weight"); f != nil {
			w, _ := value(f)
			b.cpu.Shares = sharesOf(w)
		}
		if f := r.file(l.psi, "cpu.max"); f != nil {
			parseCPUMax(f, &b.cpu)
		}
		s.CPU = &b.cpu
	}
	if f := r.file(l.psi, "memory.current"); f != nil {
		r.readMemoryV2(b, f)
	}
	if f := r.file(l.psi, "io.stat"); f != nil {
		parseIOStatV2(f, &b.io)
		s.IO = &b.io
	}
	r.readPids(b, l.psi)
	r.readHugetlb(b, l.psi, ".current", "")
}

func (r *reader) readMemoryV2(b *block, current []byte) {
	l, m := r.layout, &b.memory
	m.Usage, _ = value(current)
	var st memStat
	parseMemoryStatV2(r.file(l.psi, "memory.stat"), &st)
	m.Swap, m.HasSwap = value(r.file(l.psi, "memory.swap.current"))
	m.Limit = limit(r.file(l.psi, "memory.max"))
	m.SwapLimit = limit(r.file(l.psi, "memory.swap.max"))
	m.MaxUsage, m.HasMaxUsage = value(r.file(l.psi, "memory.peak")) // from 5.19
	m.HasKernel = true
	if f := r.file(l.psi, "memory.events"); f != nil {
		m.Failcnt = keyed(f, "max")
		b.stats.OOMEvents = keyed(f, "oom_kill")
	}
	finishMemory(b, &st)
}

func (r *reader) readV1(b *block) {
	l, s := r.layout, &b.stats
	if f := r.file(l.cpuacct, "cpuacct.usage"); f != nil {
		b.cpu.Usage, _ = value(f)
		b.cpu.User, _ = value(r.file(l.cpuacct, "cpuacct.usage_user"))
		b.cpu.System, _ = value(r.file(l.cpuacct, "cpuacct.usage_sys"))
		parseCPUStatV1(r.file(l.cpu, "cpu.stat"), &b.cpu)
		b.cpu.Shares = signedValue(r.file(l.cpu, "cpu.shares"))
		b.cpu.Quota = signedValue(r.file(l.cpu, "cpu.cfs_quota_us"))
		b.cpu.Period = signedValue(r.file(l.cpu, "cpu.cfs_period_us"))
		s.CPU = &b.cpu
	}
	if f := r.file(l.memory, "memory.usage_in_bytes"); f != nil {
		r.readMemoryV1(b, f)
	}
	if f := r.file(l.blkio, "blkio.throttle.io_service_bytes_recursive"); f != nil {
		parseBlkio(f, &b.io, false)
		parseBlkio(r.file(l.blkio, "blkio.throttle.io_serviced_recursive"), &b.io, true)
		sumIO(&b.io)
		s.IO = &b.io
	}
	r.readPids(b, l.pids)
	r.readHugetlb(b, l.hugetlb, ".usage_in_bytes", ".max_usage_in_bytes")
}

func (r *reader) readMemoryV1(b *block, usage []byte) {
	l, m := r.layout, &b.memory
	m.Usage, _ = value(usage)
	var st memStat
	parseMemoryStatV1(r.file(l.memory, "memory.stat"), &st)
	st.kernel, m.HasKernel = value(r.file(l.memory, "memory.kmem.usage_in_bytes"))
	m.Swap, m.HasSwap = st.swap, st.hasSwap
	m.Limit = limit(r.file(l.memory, "memory.limit_in_bytes"))
	if m.Memsw = limit(r.file(l.memory, "memory.memsw.limit_in_bytes")); m.Memsw > m.Limit && m.Limit > 0 {
		m.SwapLimit = m.Memsw - m.Limit
	}
	m.MaxUsage, m.HasMaxUsage = value(r.file(l.memory, "memory.max_usage_in_bytes"))
	m.Failcnt, _ = value(r.file(l.memory, "memory.failcnt"))
	b.stats.OOMEvents = keyed(r.file(l.memory, "memory.oom_control"), "oom_kill")
	finishMemory(b, &st)
}

// finishMemory fills in what is derived. The working set, which kubelet evicts
// by, is all that is charged less the file pages that nobody used lately.
func finishMemory(b *block, st *memStat) {
	m := &b.memory
	m.RSS, m.Cache, m.MappedFile, m.Kernel = st.rss, st.cache, st.mapped, st.kernel
	m.PageFaults, m.MajorPageFaults = st.faults, st.majorFaults
	m.WorkingSet = m.Usage - min(st.inactiveFile, m.Usage)
	if m.Limit > 0 {
		m.Available = m.Limit - min(m.WorkingSet, m.Limit)
	}
	b.stats.Memory = m
}

func (r *reader) readPids(b *block, dir int) {
	f := r.file(dir, "pids.current")
	if f == nil {
		return
	}
	b.pids.Current, _ = value(f)
	b.pids.Limit = limit(r.file(dir, "pids.max"))
	b.stats.Pids = &b.pids
}

// readHugetlb reads usage and, where the version counts it, the highest usage.
func (r *reader) readHugetlb(b *block, dir int, usage, top string) {
	for _, size := range r.layout.pages {
		f := r.file(dir, "hugetlb."+size+usage)
		if f == nil {
			continue
		}
		h := runtime.HugetlbStats{PageSize: size}
		h.Usage, _ = value(f)
		if top != "" {
			h.Max, h.HasMax = value(r.file(dir, "hugetlb."+size+top))
		}
		b.stats.Hugetlb = append(b.stats.Hugetlb, h)
	}
}

// readPSI reads the pressure files, which the version 2 tree has without any
// controller, on a hybrid host too.
func (r *reader) readPSI(b *block) {
	dir, s := r.layout.psi, &b.stats
	if s.CPU != nil && parsePSI(r.file(dir, "cpu.pressure"), &b.cpuPSI) {
		s.CPU.PSI = &b.cpuPSI
	}
	if s.Memory != nil && parsePSI(r.file(dir, "memory.pressure"), &b.memPSI) {
		s.Memory.PSI = &b.memPSI
	}
	if s.IO != nil && parsePSI(r.file(dir, "io.pressure"), &b.ioPSI) {
		s.IO.PSI = &b.ioPSI
	}
}
