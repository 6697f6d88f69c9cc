package main

import (
	"bufio"
	"bytes"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// /proc/stat and /proc/<pid>/stat count in USER_HZ, 100 on every Linux port
// that Go supports.
const tick = 10 * time.Millisecond

// helperPattern matches the helper processes of the common runtimes: shims,
// monitors, low-level runtimes that stay, and the pause process. Naru's monitor
// runs from a memfd.
const helperPattern = `/(containerd-shim[^/]*|conmon|conmonrs|runc|crun|youki|pause|(memfd:)?naru-monitor)$`

// Proc is one process as /proc shows it.
type Proc struct {
	PID      int
	Exe      string
	PSSKiB   int64
	AnonKiB  int64 // the anonymous part of PSSKiB
	Threads  int
	FDs      int
	Self     time.Duration // user + system time of its threads
	Children time.Duration // the same of the children it waited for
}

// procMatcher says which processes belong to a runtime, by executable path.
type procMatcher []*regexp.Regexp

func (m procMatcher) match(exe string) bool {
	for _, re := range m {
		if re.MatchString(exe) {
			return true
		}
	}
	return false
}

// scan reads all matching processes; memory and fds only when deep.
// Processes that end meanwhile are skipped.
func (m procMatcher) scan(deep bool) map[int]Proc {
	out := map[int]Proc{}
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil || pid == os.Getpid() {
			continue
		}
		exe, err := os.Readlink(dir + "/exe")
		if err != nil { // a kernel thread, or gone
			continue
		}
		exe = strings.TrimSuffix(exe, " (deleted)")
		if !m.match(exe) {
			continue
		}
		p, err := readStat(pid)
		if err != nil {
			continue
		}
		p.Exe = exe
		if deep {
			if p.PSSKiB, p.AnonKiB, err = readPSS(pid); err != nil {
				continue
			}
			fds, _ := os.ReadDir(dir + "/fd")
			p.FDs = len(fds)
		}
		out[pid] = p
	}
	return out
}

// readStat fills the times and the thread count from /proc/<pid>/stat.
func readStat(pid int) (Proc, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return Proc{}, err
	}
	return parseStat(pid, b)
}

func parseStat(pid int, b []byte) (Proc, error) {
	// The command name may hold spaces and parentheses: cut after the last ")".
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return Proc{}, fmt.Errorf("stat of %d: no command name", pid)
	}
	f := strings.Fields(string(b[i+1:]))
	if len(f) < 18 {
		return Proc{}, fmt.Errorf("stat of %d: %d fields", pid, len(f))
	}
	n := func(field int) int64 { // field as numbered in proc(5)
		v, _ := strconv.ParseInt(f[field-3], 10, 64)
		return v
	}
	return Proc{
		PID:      pid,
		Threads:  int(n(20)),
		Self:     time.Duration(n(14)+n(15)) * tick,
		Children: time.Duration(n(16)+n(17)) * tick,
	}, nil
}

func readPSS(pid int) (pss, anon int64, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, 0, err
	}
	pss, anon = parsePSS(b)
	return pss, anon, nil
}

func parsePSS(b []byte) (pss, anon int64) {
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		v, _ := strconv.ParseInt(f[1], 10, 64)
		switch f[0] {
		case "Pss:":
			pss = v
		case "Pss_Anon:":
			anon = v
		}
	}
	return pss, anon
}

// machineBusy is the time all CPUs spent working since boot, without idle,
// iowait and steal (guest time is already in user time).
func machineBusy() time.Duration {
	f, err := os.Open("/proc/stat")
	if err != nil {
		return 0
	}
	defer f.Close()
	line, _ := bufio.NewReader(f).ReadString('\n')
	return parseBusy(line)
}

func parseBusy(line string) time.Duration {
	f := strings.Fields(line)
	var sum int64
	for i, s := range f {
		switch i {
		case 1, 2, 3, 6, 7: // user nice system irq softirq
			v, _ := strconv.ParseInt(s, 10, 64)
			sum += v
		}
	}
	return time.Duration(sum) * tick
}

// ownCPU is what this process itself used.
func ownCPU() time.Duration {
	var ru unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &ru) != nil {
		return 0
	}
	return time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
}

func memAvailableKiB() int64 {
	b, _ := os.ReadFile("/proc/meminfo")
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "MemAvailable:" {
			v, _ := strconv.ParseInt(f[1], 10, 64)
			return v
		}
	}
	return 0
}

// cpuMeter measures the CPU cost of a stretch of work in three ways: by the
// cgroups of the runtime and of its pods, by the whole machine's busy time less
// an idle baseline, and by the runtime's processes.
type cpuMeter struct {
	match    procMatcher
	cgroups  []string // directories; none if the daemon has no cgroup of its own
	baseRate float64  // busy cores before the work
	start    time.Time
	busy     time.Duration
	own      time.Duration
	charged  time.Duration
	procs    map[int]Proc
}

const (
	baselineTime = time.Second
	unreliable   = "UNRELIABLE" // begins the note of a figure that compare ignores
)

func startCPU(r *Runtime) *cpuMeter {
	c := &cpuMeter{match: r.match}
	if r.daemonCgroup != "" {
		c.cgroups = []string{r.daemonCgroup}
		if pods := r.podCgroup(); pods != "" {
			c.cgroups = append(c.cgroups, pods)
		}
	}
	c.mark()
	time.Sleep(baselineTime)
	c.baseRate = c.machine().Seconds() / time.Since(c.start).Seconds()
	c.mark()
	return c
}

func (c *cpuMeter) mark() {
	c.procs = c.match.scan(false)
	c.start, c.busy, c.own, c.charged = time.Now(), machineBusy(), ownCPU(), cgroupCPU(c.cgroups)
}

func (c *cpuMeter) machine() time.Duration {
	return machineBusy() - c.busy - (ownCPU() - c.own)
}

// metrics gives the CPU milliseconds per operation. The figure by processes is
// left out unless procs: it is wrong where helper processes come and go.
func (c *cpuMeter) metrics(per string, n int, procs bool) (out []Metric) {
	elapsed := time.Since(c.start)
	cost := c.machine() - time.Duration(c.baseRate*float64(elapsed))
	if len(c.cgroups) > 0 {
		out = append(out, scalar("cpu-cgroup/"+per, "ms", "lower", ms(cgroupCPU(c.cgroups)-c.charged)/float64(n),
			"cgroups of the daemon and of its pods"))
	}
	note := fmt.Sprintf("busy time of the machine less a baseline of %.2f cores and this tool", c.baseRate)
	if c.baseRate > 0.1*float64(runtime.NumCPU()) {
		note = unreliable + ", other work was running: " + note
	}
	out = append(out, scalar("cpu-machine/"+per, "ms", "lower", ms(cost)/float64(n), note))
	if !procs {
		return out
	}
	var sum time.Duration
	for pid, p := range c.match.scan(false) {
		old := c.procs[pid] // zero for a new process
		sum += p.Self + p.Children - old.Self - old.Children
	}
	return append(out, scalar("cpu-procs/"+per, "ms", "lower", ms(sum)/float64(n),
		"runtime processes and the children they waited for"))
}

// cgroupCPU sums the CPU time that was ever charged to cgroups and to those
// below them, removed ones included. A missing cgroup counts as zero.
func cgroupCPU(dirs []string) (sum time.Duration) {
	for _, dir := range dirs {
		if b, err := os.ReadFile(dir + "/cpuacct.usage"); err == nil { // v1
			ns, _ := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
			sum += time.Duration(ns)
			continue
		}
		b, _ := os.ReadFile(dir + "/cpu.stat") // v2
		for line := range strings.Lines(string(b)) {
			if f := strings.Fields(line); len(f) == 2 && f[0] == "usage_usec" {
				us, _ := strconv.ParseInt(f[1], 10, 64)
				sum += time.Duration(us) * time.Microsecond
			}
		}
	}
	return sum
}

// cpuCgroup is the directory of the cgroup that accounts a process's CPU time:
// in the v1 cpuacct hierarchy, or else in v2. It is empty for the root cgroup.
func cpuCgroup(pid int) string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	for _, want := range []string{"cpuacct", ""} {
		root := cpuHierarchy(want)
		for line := range strings.Lines(string(b)) {
			f := strings.SplitN(strings.TrimSpace(line), ":", 3)
			if len(f) == 3 && root != "" && slices.Contains(strings.Split(f[1], ","), want) {
				if f[2] == "/" {
					return ""
				}
				return filepath.Join(root, f[2])
			}
		}
	}
	return ""
}

// cpuHierarchy is where a v1 controller is mounted, or v2 for "".
func cpuHierarchy(controller string) string {
	mounts, _ := os.ReadFile("/proc/self/mounts")
	for line := range strings.Lines(string(mounts)) {
		f := strings.Fields(line)
		if len(f) < 4 {
			continue
		}
		if controller == "" && f[2] == "cgroup2" || f[2] == "cgroup" && slices.Contains(strings.Split(f[3], ","), controller) {
			return f[1]
		}
	}
	return ""
}

// socketOwner is the process that listens on a unix socket.
func socketOwner(socket string) (pid int, exe string, err error) {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return 0, "", err
	}
	defer conn.Close()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, "", err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, "", err
	}
	if credErr != nil {
		return 0, "", credErr
	}
	exe, err = os.Readlink(fmt.Sprintf("/proc/%d/exe", cred.Pid))
	return int(cred.Pid), strings.TrimSuffix(exe, " (deleted)"), err
}

// firstLine waits, through inotify, for a file to hold a whole line.
type firstLine struct {
	inotify *os.File
	at      chan time.Time
}

func watchFirstLine(path string) (*firstLine, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("inotify: %w", err)
	}
	w := &firstLine{inotify: os.NewFile(uintptr(fd), "inotify"), at: make(chan time.Time, 1)}
	if _, err := unix.InotifyAddWatch(fd, filepath.Dir(path), unix.IN_CREATE|unix.IN_MODIFY|unix.IN_MOVED_TO); err != nil {
		w.close()
		return nil, fmt.Errorf("inotify %s: %w", filepath.Dir(path), err)
	}
	go func() {
		buf := make([]byte, 4096)
		for {
			now := time.Now()
			if hasLine(path) {
				w.at <- now
				return
			}
			// The deadline covers file systems that send no events.
			w.inotify.SetReadDeadline(now.Add(100 * time.Millisecond))
			if _, err := w.inotify.Read(buf); err != nil && !os.IsTimeout(err) {
				return
			}
		}
	}()
	return w, nil
}

func (w *firstLine) close() { w.inotify.Close() }

func hasLine(path string) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	buf := make([]byte, 4096)
	n, _ := f.Read(buf)
	return bytes.IndexByte(buf[:n], '\n') >= 0
}
