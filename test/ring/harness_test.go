// Package ring tests Naru from outside: a real keeper and a real daemon, over
// the CRI socket, with images whose content is hostile.
//
// Everything runs in network, mount and PID namespaces of its own, on temporary
// roots. TestMain makes them and, at the end, checks that nothing is left.
//
// Names of tests carry the number of the attack that they try (N-04, X-01,
// M-13). NARU_FULL=1 runs races and loops at full length.
//
// NARU_CGROUP_DRIVER=systemd runs all nodes with that driver. It is for a machine
// where nothing else runs: systemd takes the machine's PIDs only, so there is no
// PID namespace then.
package ring

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/testhost"
)

// stageEnv tells the second run of the test binary, inside the namespaces.
const stageEnv = "NARU_RING_INSIDE"

var systemdCgroups = os.Getenv("NARU_CGROUP_DRIVER") == "systemd"

// What TestMain made for all tests.
var (
	workDir    string // temporary folder of the whole run
	naruBin    string
	monitorBin string
	evilBin    string // testdata/evil.c, static
	runName    string // unique on this machine; begins every cgroup's name
)

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	if os.Getuid() != 0 {
		fmt.Println("skipping: a daemon needs root (namespaces, mounts, cgroups)")
		return 0
	}
	if arg := os.Getenv(traceEnv); arg != "" {
		return traceMain(arg)
	}
	if os.Getenv(stageEnv) == "" {
		return runInside()
	}
	if err := prepareHost(); err != nil {
		fmt.Println("prepare:", err)
		return 1
	}
	defer func() { _ = os.RemoveAll(workDir) }()
	go reapStrangers()
	if err := build(); err != nil {
		fmt.Println("build:", err)
		return 1
	}
	before := takeStock()
	code := m.Run()
	if left := before.leaks(); len(left) > 0 {
		fmt.Printf("leak: %s\n", strings.Join(left, "\nleak: "))
		code = max(code, 1)
	}
	return code
}

// runInside runs this test binary again in namespaces of its own. The PID
// namespace, where there is one, ends every process with it, whatever a test did.
func runInside() int {
	runtime.LockOSThread() // the child dies with this thread
	dir, err := os.MkdirTemp("", "ring")
	if err != nil {
		fmt.Println(err)
		return 1
	}
	defer removeTree(dir)
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), stageEnv+"="+dir)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWPID, Pdeathsig: syscall.SIGKILL}
	if systemdCgroups {
		cmd.SysProcAttr.Cloneflags &^= unix.CLONE_NEWPID
	}
	err = cmd.Run()
	removeCgroups(filepath.Base(dir))
	if err == nil {
		return 0
	}
	if code := cmd.ProcessState.ExitCode(); code > 0 {
		return code
	}
	fmt.Println(err)
	return 1
}

// removeTree removes the folder of a run that may have been killed.
func removeTree(dir string) {
	if err := os.RemoveAll(dir); err != nil {
		fmt.Println("clean up:", err)
	}
}

// cgroupDirs lists the folders of that prefix below every hierarchy.
func cgroupDirs(prefix string) (dirs []string) {
	for _, pattern := range []string{"/sys/fs/cgroup/" + prefix + "*", "/sys/fs/cgroup/*/" + prefix + "*"} {
		list, _ := filepath.Glob(pattern)
		dirs = append(dirs, list...)
	}
	return dirs
}

func removeCgroups(prefix string) {
	for _, top := range cgroupDirs(prefix) {
		var all []string
		_ = filepath.WalkDir(top, func(p string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				all = append(all, p)
			}
			return nil
		})
		for _, d := range slices.Backward(all) {
			_ = os.Remove(d)
		}
	}
}

// prepareHost makes the namespaces a small node: private mounts, its own /proc,
// loopback, and an interface with a default route that leads nowhere.
func prepareHost() error {
	workDir = os.Getenv(stageEnv)
	runName = filepath.Base(workDir)
	if err := os.Chmod(workDir, 0o711); err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount proc: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil { // orphans are this process's, as PID 1 or not
		return fmt.Errorf("become a subreaper: %w", err)
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	var link netlink.Link = &netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: "uplink0"}}
	mask := "/24"
	if err := netlink.LinkAdd(link); err != nil { // no dummy driver: the address goes to lo
		link, mask = lo, "/32"
	}
	for _, a := range []string{nodeIP + mask, nodeIP6 + "/128"} {
		addr, err := netlink.ParseAddr(a)
		if err != nil {
			return err
		}
		addr.Flags = unix.IFA_F_NODAD
		if err := netlink.AddrAdd(link, addr); err != nil && addr.IP.To4() != nil {
			return fmt.Errorf("add %s: %w", a, err)
		}
	}
	if link == lo {
		return nil
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return err
	}
	return netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Scope: netlink.SCOPE_LINK, Dst: &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}})
}

// Addresses of the node that the tests run on.
const (
	nodeIP  = "192.0.2.10"
	nodeIP6 = "2001:db8::10"
)

// build makes the two programs and the hostile one, once.
func build() error {
	naruBin, monitorBin, evilBin = filepath.Join(workDir, "naru"), filepath.Join(workDir, "naru-monitor"), filepath.Join(workDir, "evil")
	cmds := [][]string{
		{"go", "build", "-trimpath", "-o", naruBin, "github.com/naru-project/naru/cmd/shim"},
		{"go", "build", "-trimpath", "-o", monitorBin, "github.com/naru-project/naru/cmd/monitor"},
		{"gcc", "-static", "-O1", "-Wall", "-Werror", "-o", evilBin, "testdata/evil.c", "-lpthread"},
	}
	if _, err := exec.LookPath("gcc"); err != nil { // the test machine: all programs are built outside
		cmds[2] = []string{"go", "build", "-o", evilBin, "github.com/naru-project/naru/test/ring/evil"}
	}
	var wg sync.WaitGroup
	all := make([]error, len(cmds))
	for i, args := range cmds {
		wg.Go(func() {
			cmd := exec.Command(args[0], args[1:]...)
			cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
			if out, err := cmd.CombinedOutput(); err != nil {
				all[i] = fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), err, out)
			}
		})
	}
	wg.Wait()
	return errors.Join(all...)
}

// full tells whether loops run at full length, and scaled gives their length.
func full() bool { return os.Getenv("NARU_FULL") == "1" }

func scaled(short, long int) int {
	if full() {
		return long
	}
	return short
}

// reapStrangers reaps orphans that came to this process. Its own children are reaped by who started them, and faster.
func reapStrangers() {
	seen := map[int]int{}
	for ; ; time.Sleep(100 * time.Millisecond) {
		next := map[int]int{}
		for _, pid := range allPIDs() {
			if state, ppid := procState(pid); state == 'Z' && ppid == os.Getpid() {
				if seen[pid] >= 4 {
					_, _ = unix.Wait4(pid, nil, unix.WNOHANG, nil)
					continue
				}
				next[pid] = seen[pid] + 1
			}
		}
		seen = next
	}
}

// allPIDs lists the processes of this PID namespace but this one. All of them
// are descendants of this one, unless the namespace is the machine's.
func allPIDs() (pids []int) {
	d, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer func() { _ = d.Close() }()
	names, _ := d.Readdirnames(-1)
	for _, n := range names {
		if pid, err := strconv.Atoi(n); err == nil && pid != os.Getpid() {
			pids = append(pids, pid)
		}
	}
	return pids
}

func procState(pid int) (state byte, ppid int) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0
	}
	f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	ppid, _ = strconv.Atoi(f[1])
	return f[0][0], ppid
}

// descends tells whether the process came from this one.
func descends(pid int) bool {
	for pid > 1 && pid != os.Getpid() {
		_, pid = procState(pid)
	}
	return pid == os.Getpid()
}

// running tells whether the process exists and is no zombie.
func running(pid int) bool {
	s, _ := procState(pid)
	return s != 0 && s != 'Z' && s != 'X'
}

func cmdline(pid int) string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return strings.TrimSpace(strings.ReplaceAll(string(b), "\x00", " "))
}

// stock is what a run must leave as it found it.
type stock struct {
	fds, goroutines int
	mounts          []string
	links           []string
}

func takeStock() stock {
	return stock{fds: countFDs(), goroutines: runtime.NumGoroutine(), mounts: mountsBelow("/"), links: linkNames()}
}

// leaks lists what there is now and was not there before. What only takes a
// moment to go gets that moment.
func (s stock) leaks() (left []string) {
	for end := time.Now().Add(testhost.Limit(3 * time.Second)); ; time.Sleep(50 * time.Millisecond) {
		runtime.GC() // a SPDY client that was refused leaves its connection to the collector
		left = s.leaksNow()
		if len(left) == 0 || time.Now().After(end) {
			return left
		}
	}
}

func (s stock) leaksNow() (left []string) {
	if n := countFDs(); n > s.fds {
		left = append(left, fmt.Sprintf("%d descriptors before, %d after", s.fds, n))
	}
	if n := runtime.NumGoroutine(); n > s.goroutines {
		buf := make([]byte, 1<<16)
		left = append(left, fmt.Sprintf("%d goroutines before, %d after:\n%s", s.goroutines, n, buf[:runtime.Stack(buf, true)]))
	}
	for _, m := range mountsBelow("/") {
		if !slices.Contains(s.mounts, m) {
			left = append(left, "mount "+m)
		}
	}
	for _, l := range linkNames() {
		if !slices.Contains(s.links, l) {
			left = append(left, "link "+l)
		}
	}
	for _, c := range cgroupDirs(runName) {
		left = append(left, "cgroup "+c)
	}
	for _, pid := range allPIDs() {
		if running(pid) && descends(pid) {
			left = append(left, fmt.Sprintf("process %d: %s", pid, cmdline(pid)))
		}
	}
	for _, t := range nftTables() {
		left = append(left, "nft table "+t)
	}
	return left
}

func countFDs() int {
	l, _ := os.ReadDir("/proc/self/fd")
	return len(l)
}

// mountsBelow lists the mount points at and below dir, in mount order.
func mountsBelow(dir string) (points []string) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil
	}
	defer func() { _ = f.Close() }()
	for s := bufio.NewScanner(f); s.Scan(); {
		p := strings.Fields(s.Text())[4]
		if dir == "/" || p == dir || strings.HasPrefix(p, dir+"/") {
			points = append(points, p)
		}
	}
	return points
}

func linkNames() (names []string) {
	links, err := netlink.LinkList()
	if err != nil {
		return []string{err.Error()}
	}
	for _, l := range links {
		names = append(names, l.Attrs().Name)
	}
	return names
}

func newID() string {
	var b [32]byte
	_, _ = rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// eventually polls until f holds.
func eventually(t testing.TB, limit time.Duration, what string, f func() bool) {
	t.Helper()
	limit = testhost.Limit(limit)
	for end := time.Now().Add(limit); !f(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited %v for %s", limit, what)
		}
	}
}

// process is a program that a test started and that is reaped at once.
type process struct {
	cmd  *exec.Cmd
	done chan struct{}
	err  error
}

func spawn(cmd *exec.Cmd) (*process, error) {
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &process{cmd: cmd, done: make(chan struct{})}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// end sends the signal and waits; false: it did not end in time and was killed.
func (p *process) end(sig os.Signal, limit time.Duration) bool {
	_ = p.cmd.Process.Signal(sig)
	select {
	case <-p.done:
		return true
	case <-time.After(testhost.Limit(limit)):
	}
	_ = p.cmd.Process.Signal(syscall.SIGQUIT) // stacks go to the log
	time.Sleep(200 * time.Millisecond)
	_ = p.cmd.Process.Kill()
	<-p.done
	return false
}

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// tail is the end of a file, for messages.
func tail(path string, n int64) string {
	f, err := os.Open(path)
	if err != nil {
		return err.Error()
	}
	defer func() { _ = f.Close() }()
	if st, err := f.Stat(); err == nil && st.Size() > n {
		_, _ = f.Seek(-n, io.SeekEnd)
	}
	b, _ := io.ReadAll(f)
	return string(b)
}

// within gives a context that ends with the test or after limit.
func within(t testing.TB, limit time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), testhost.Limit(limit))
	t.Cleanup(cancel)
	return ctx
}
