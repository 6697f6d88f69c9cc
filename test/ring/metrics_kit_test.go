package ring

import (
	"bufio"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// kernel is what the kernel itself says of one container. A figure that it does
// not have is NaN. Nothing here is shared with what is tested.
type kernel struct {
	t      testing.TB
	pid    int
	v2     bool
	groups map[string]string // controller, or "unified" → the container's folder
	upper  string            // of its root file system
	shares float64           // as asked for
	host   string            // the host's end of the pod's link
}

func (n *Node) kernelOf(t testing.TB, pod, id string) *kernel {
	t.Helper()
	k := &kernel{t: t, pid: n.PID(t, id), groups: map[string]string{}}
	_, err := os.Stat("/sys/fs/cgroup/cgroup.controllers")
	k.v2 = err == nil
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", k.pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		switch {
		case f[1] != "":
			for name := range strings.SplitSeq(f[1], ",") {
				k.groups[name] = filepath.Join("/sys/fs/cgroup", name, f[2])
			}
		case k.v2:
			k.groups["unified"] = filepath.Join("/sys/fs/cgroup", f[2])
		default:
			k.groups["unified"] = filepath.Join("/sys/fs/cgroup/unified", f[2])
		}
	}
	var info struct {
		Rootfs struct{ Upper string }
	}
	n.containerInfo(t, id, &info)
	k.upper = info.Rootfs.Upper
	var p struct {
		Handle struct {
			HostLink string `json:"host_link"`
		}
	}
	n.podInfo(t, pod, &p)
	k.host = p.Handle.HostLink
	return k
}

// path of a file of the container's cgroup: that of version 1, or of version 2.
func (k *kernel) path(controller, v1, v2 string) string {
	if k.v2 || controller == "unified" {
		return filepath.Join(k.groups["unified"], v2)
	}
	if k.groups[controller] == "" || v1 == "" {
		return "/nowhere"
	}
	return filepath.Join(k.groups[controller], v1)
}

// number reads a file of one number. "max" is 0, as is version 1's huge number.
func (k *kernel) number(controller, v1, v2 string) float64 {
	b, err := os.ReadFile(k.path(controller, v1, v2))
	if err != nil {
		return math.NaN()
	}
	return limitOf(strings.TrimSpace(string(b)))
}

func limitOf(s string) float64 {
	n, err := strconv.ParseFloat(s, 64)
	if s == "max" || n > 1<<62 {
		return 0
	}
	if err != nil {
		return math.NaN()
	}
	return n
}

// line reads the number behind a key of a file: "key 7".
func (k *kernel) line(controller, v1, key1, v2, key2 string) float64 {
	key := key1
	if k.v2 {
		key = key2
	}
	b, err := os.ReadFile(k.path(controller, v1, v2))
	if err != nil {
		return math.NaN()
	}
	for l := range strings.Lines(string(b)) {
		if f := strings.Fields(l); len(f) == 2 && f[0] == key {
			return limitOf(f[1])
		}
	}
	return math.NaN()
}

// per divides by what one version counts a second in.
func (k *kernel) per(v1, v2, n float64) float64 {
	if k.v2 {
		return n / v2
	}
	return n / v1
}

func (k *kernel) memory(v1, v2 string) float64 {
	return k.line("memory", "memory.stat", v1, "memory.stat", v2)
}

// pressure is one number of a pressure file: total is in microseconds, an
// average in percent.
func (k *kernel) pressure(what, kind, key string) float64 {
	b, err := os.ReadFile(k.path("unified", "", what+".pressure"))
	if err != nil {
		return math.NaN()
	}
	for l := range strings.Lines(string(b)) {
		if f := strings.Fields(l); f[0] == kind {
			for _, w := range f[1:] {
				if v, ok := strings.CutPrefix(w, key+"="); ok {
					return limitOf(v)
				}
			}
		}
	}
	return math.NaN()
}

// io sums a column over all devices: v1 is file and operation, v2 the key.
func (k *kernel) io(v1, operation, v2 string) (sum float64) {
	b, err := os.ReadFile(k.path("blkio", v1, "io.stat"))
	if err != nil || len(b) == 0 {
		return math.NaN()
	}
	for l := range strings.Lines(string(b)) {
		f := strings.Fields(l)
		switch {
		case !k.v2 && len(f) == 3 && f[1] == operation:
			sum += limitOf(f[2])
		case k.v2:
			for _, w := range f[1:] {
				if n, ok := strings.CutPrefix(w, v2+"="); ok {
					sum += limitOf(n)
				}
			}
		}
	}
	return sum
}

// devices are the names in /dev of the devices that the container used.
func (k *kernel) devices() (names []string) {
	b, err := os.ReadFile(k.path("blkio", "blkio.throttle.io_service_bytes_recursive", "io.stat"))
	if err != nil {
		return nil
	}
	for l := range strings.Lines(string(b)) {
		number, _, _ := strings.Cut(l, " ")
		uevent, err := os.ReadFile("/sys/dev/block/" + number + "/uevent")
		if err != nil {
			continue
		}
		for l := range strings.Lines(string(uevent)) {
			if name, ok := strings.CutPrefix(strings.TrimSpace(l), "DEVNAME="); ok && !slices.Contains(names, "/dev/"+name) {
				names = append(names, "/dev/"+name)
			}
		}
	}
	return names
}

// procs are the processes of the container's cgroup and of those below.
func (k *kernel) procs() (pids []int) {
	root := k.groups["unified"]
	if root == "" {
		root = k.groups["pids"]
	}
	_ = filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.Name() == "cgroup.procs" {
			b, _ := os.ReadFile(p)
			for w := range strings.FieldsSeq(string(b)) {
				pid, _ := strconv.Atoi(w)
				pids = append(pids, pid)
			}
		}
		return nil
	})
	return pids
}

// open counts the descriptors of the container whose link begins with prefix.
func (k *kernel) open(prefix string) (n float64) {
	for _, pid := range k.procs() {
		links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
		for _, l := range links {
			if to, err := os.Readlink(l); err == nil && strings.HasPrefix(to, prefix) {
				n++
			}
		}
	}
	return n
}

// link reads a counter of the pod's eth0, as the pod sees it: the columns of
// /proc/net/dev. hostLink is the other end: what it could not send, the pod
// never sees.
func (k *kernel) link(column int) float64 { return k.netDev(k.pid, "eth0", column) }

func (k *kernel) hostLink(column int) float64 { return k.netDev(os.Getpid(), k.host, column) }

func (k *kernel) netDev(pid int, name string, column int) float64 {
	f, err := os.Open(fmt.Sprintf("/proc/%d/net/dev", pid))
	if err != nil {
		return math.NaN()
	}
	defer func() { _ = f.Close() }()
	for s := bufio.NewScanner(f); s.Scan(); {
		if rest, ok := strings.CutPrefix(strings.TrimSpace(s.Text()), name+":"); ok {
			return limitOf(strings.Fields(rest)[column])
		}
	}
	return math.NaN()
}

// written is what the container's writable folder takes.
func (k *kernel) written() (bytes float64) {
	_ = filepath.WalkDir(k.upper, func(_ string, d fs.DirEntry, err error) error {
		if err == nil {
			if i, err := d.Info(); err == nil {
				bytes += float64(i.Sys().(*syscall.Stat_t).Blocks) * 512
			}
		}
		return nil
	})
	return bytes
}

func (k *kernel) disk(f func(s unix.Statfs_t) uint64) float64 {
	var s unix.Statfs_t
	if err := unix.Statfs(k.upper, &s); err != nil {
		k.t.Fatal(err)
	}
	return float64(f(s))
}

func (k *kernel) openFiles() float64 {
	var l unix.Rlimit
	if err := unix.Prlimit(k.pid, unix.RLIMIT_NOFILE, nil, &l); err != nil {
		k.t.Fatal(err)
	}
	return float64(l.Cur)
}

// started is when the first process was, by its own clock ticks.
func (k *kernel) started() float64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", k.pid))
	if err != nil {
		k.t.Fatal(err)
	}
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	ticks, _ := strconv.ParseFloat(f[19], 64)
	var up unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &up); err != nil {
		k.t.Fatal(err)
	}
	return float64(time.Now().UnixNano()-up.Nano())/1e9 + ticks/100
}

// blockDevice makes a disk of a file, and returns its path and its number.
func blockDevice(t testing.TB, file string, size int64) (path, number string) {
	t.Helper()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = control.Close() }()
	back, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = back.Close() }()
	if err := back.Truncate(size); err != nil {
		t.Fatal(err)
	}
	for range 100 { // others look for a free one, too
		i, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			t.Fatal(err)
		}
		path = fmt.Sprintf("/dev/loop%d", i)
		dev, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		err = unix.IoctlSetInt(int(dev.Fd()), unix.LOOP_SET_FD, int(back.Fd()))
		if err == nil {
			t.Cleanup(func() {
				if err := unix.IoctlSetInt(int(dev.Fd()), unix.LOOP_CLR_FD, 0); err != nil {
					t.Error(err)
				}
				_ = dev.Close()
			})
			return path, fmt.Sprintf("7:%d", i)
		}
		_ = dev.Close()
	}
	t.Fatal("no loop device is free for long enough")
	return "", ""
}

// metricsOf are the metrics of one pod and its one container.
func (n *Node) metricsOf(t testing.TB, pod string) []*criv1.Metric {
	t.Helper()
	r, err := n.Runtime.ListPodSandboxMetrics(within(t, callTime), &criv1.ListPodSandboxMetricsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range r.PodMetrics {
		if p.PodSandboxId == pod {
			all := p.Metrics
			for _, c := range p.ContainerMetrics {
				all = append(all, c.Metrics...)
			}
			return all
		}
	}
	t.Fatalf("no metrics of pod %s", pod)
	return nil
}
