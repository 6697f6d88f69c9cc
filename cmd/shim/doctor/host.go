package doctor

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/runtime/cgroup"
)

func checkCgroups(_ context.Context, cfg *Config) []Result {
	d, err := cgroup.New(cgroup.Config{Driver: cfg.CgroupDriver})
	if err != nil {
		return result("cgroups", Fail, err.Error(), "no container can be limited, so none is started")
	}
	defer d.Close()
	driver := "cgroupfs"
	if d.Systemd() {
		driver = "systemd"
	}
	have := d.Controllers()
	detail := fmt.Sprintf("%s, driver %s, controllers %s", d.Mode(), driver, strings.Join(have, " "))
	out := []Result{{Name: "cgroups", Status: OK, Detail: detail}}
	if d.Mode() != cgroup.ModeV2 {
		out[0].Status = Warn
		out[0].Follows = "the kubelet refuses version 1 unless failCgroupV1 is false; boot with systemd.unified_cgroup_hierarchy=1"
	}
	if d.Mode() == cgroup.ModeV1 {
		out[0].Follows += "; without a version 2 tree killing a container is slower"
	}
	return append(out, judgeControllers(d.Mode(), have)...)
}

func judgeControllers(mode cgroup.Mode, have []string) []Result {
	io := "io"
	if mode != cgroup.ModeV2 {
		io = "blkio"
	}
	var out []Result
	for _, c := range []struct {
		name   string
		status Status
		why    string
	}{
		{"cpu", Fail, "CPU requests and limits cannot be set"},
		{"memory", Fail, "memory limits cannot be set (on some boards: boot with cgroup_enable=memory)"},
		{"pids", Fail, "a fork bomb in one pod takes the node"},
		{"cpuset", Warn, "the kubelet's static CPU and memory managers do not work"},
		{io, Warn, "there are no IO statistics"},
	} {
		if !slices.Contains(have, c.name) {
			out = append(out, Result{Name: "cgroups", Status: c.status, Detail: "no " + c.name + " controller", Follows: c.why})
		}
	}
	return out
}

// wanted are sysctls, and what follows when one is not so.
type wanted struct {
	key    string
	bad    func(v int64) bool
	status Status
	why    string
}

var sysctls = []wanted{
	{"net/ipv4/ip_forward", func(v int64) bool { return v != 1 }, Warn, "naru sets it to 1 when it starts; if it is set back later, pods lose the network"},
	{"user/max_user_namespaces", func(v int64) bool { return v == 0 }, Warn, "pods with hostUsers: false are refused"},
	{"user/max_net_namespaces", func(v int64) bool { return v < 512 }, Warn, "each pod needs one network namespace"},
	{"fs/inotify/max_user_instances", func(v int64) bool { return v < 512 }, Warn, "many containers watch files: raise it to 8192 (too many open files)"},
	{"fs/inotify/max_user_watches", func(v int64) bool { return v < 65536 }, Warn, "many containers watch files: raise it to 524288"},
	{"fs/file-max", func(v int64) bool { return v < 100000 }, Warn, "open files of the whole host: raise it"},
	{"kernel/pid_max", func(v int64) bool { return v < 32768 }, Warn, "few processes fit on this node"},
	{"kernel/keys/root_maxkeys", func(v int64) bool { return v < 1000 }, Warn, "the kubelet wants 1000000: session keyrings of containers run out"},
	{"net/bridge/bridge-nf-call-iptables", func(v int64) bool { return false }, OK, ""},
	{"vm/panic_on_oom", func(v int64) bool { return v != 0 }, Warn, "a container over its limit must not halt the node: the kubelet wants 0"},
}

func checkSysctls(_ context.Context, cfg *Config) []Result {
	var out []Result
	for _, w := range sysctls {
		v, err := readNumber(filepath.Join(cfg.ProcSys, w.key))
		if err != nil {
			continue // the kernel lacks what it belongs to
		}
		if w.bad(v) {
			out = append(out, Result{Name: "sysctls", Status: w.status, Detail: strings.ReplaceAll(w.key, "/", ".") + " = " + strconv.FormatInt(v, 10), Follows: w.why})
		}
	}
	out = append(out, checkReversePath(cfg)...)
	if out == nil {
		out = ok("sysctls", "as needed")
	}
	return out
}

// checkReversePath: the stricter of "all" and an interface's own counts. Strict
// drops what arrives by another link than the way back (net/ipv4/ip-sysctl.rst);
// pods are routed symmetrically, other interfaces of a node may not be.
func checkReversePath(cfg *Config) []Result {
	v, err := readNumber(filepath.Join(cfg.ProcSys, "net/ipv4/conf/all/rp_filter"))
	if err == nil && v == 1 {
		return result("sysctls", Warn, "net.ipv4.conf.all.rp_filter = 1 (strict)",
			"a node with several uplinks, or a network plugin with asymmetric routes, loses packets: 2 (loose) is safe")
	}
	return nil
}

func readNumber(path string) (int64, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
}

// existing is path, or the nearest folder above it that is there.
func existing(path string) string {
	for path != "/" {
		if _, err := os.Stat(path); err == nil {
			return path
		}
		path = filepath.Dir(path)
	}
	return path
}

// Bounds of free space; the kubelet begins to evict at 10 % (nodefs) and 15 %
// (imagefs).
const (
	leastBytes = 1 << 30
	fewBytes   = 5 << 30
	fewPercent = 15
)

func checkDisk(_ context.Context, cfg *Config) []Result {
	dir := existing(cfg.Root)
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return result("disk", Fail, dir+": "+err.Error(), "images cannot be stored")
	}
	out := judgeSpace(dir, st.Bavail*uint64(st.Bsize), st.Blocks*uint64(st.Bsize), st.Ffree, st.Files)
	if st.Flags&unix.ST_RDONLY != 0 {
		out = append(out, Result{Name: "disk", Status: Fail, Detail: dir + " is mounted read-only", Follows: "images cannot be stored"})
	}
	if st.Flags&unix.ST_NOEXEC != 0 {
		out = append(out, Result{Name: "disk", Status: Warn, Detail: dir + " is mounted noexec", Follows: "programs in containers may be refused: mount it without"})
	}
	if st.Flags&unix.ST_NODEV != 0 || st.Flags&unix.ST_NOSUID != 0 {
		out = append(out, Result{Name: "disk", Status: OK, Detail: dir + " is mounted nodev or nosuid: set-uid programs in containers have no effect there"})
	}
	return out
}

func judgeSpace(dir string, free, total, freeInodes, inodes uint64) []Result {
	detail := fmt.Sprintf("%s: %d of %d GiB free", dir, free>>30, total>>30)
	r := Result{Name: "disk", Status: OK, Detail: detail}
	switch {
	case free < leastBytes:
		r.Status, r.Follows = Fail, "there is no room for images"
	case free < fewBytes || (total > 0 && free*100/total < fewPercent):
		r.Status, r.Follows = Warn, "the kubelet removes images, and soon evicts pods, at this level"
	case inodes > 0 && freeInodes*100/inodes < 5:
		r.Status, r.Detail, r.Follows = Warn, fmt.Sprintf("%s: %d of %d inodes free", dir, freeInodes, inodes), "images have many small files: the file system is full long before its bytes are"
	}
	return []Result{r}
}

func checkLSM(context.Context, *Config) []Result {
	var on []string
	if b, err := os.ReadFile("/sys/module/apparmor/parameters/enabled"); err == nil && strings.TrimSpace(string(b)) == "Y" {
		on = append(on, "AppArmor")
	}
	if b, err := os.ReadFile("/sys/fs/selinux/enforce"); err == nil {
		mode := "permissive"
		if strings.TrimSpace(string(b)) == "1" {
			mode = "enforcing"
		}
		on = append(on, "SELinux ("+mode+")")
	}
	if len(on) == 0 {
		return ok("security modules", "neither AppArmor nor SELinux: a pod that names a profile of its own is refused")
	}
	return ok("security modules", "%s", strings.Join(on, ", "))
}

// checkDaemon: is it there, and its monitor?
func checkDaemon(ctx context.Context, cfg *Config) []Result {
	var out []Result
	if cfg.Monitor != nil {
		if p, err := cfg.Monitor(); err != nil {
			out = append(out, Result{Name: "daemon", Status: Fail, Detail: err.Error(), Follows: "no container can be started"})
		} else {
			out = append(out, Result{Name: "daemon", Status: OK, Detail: "naru-monitor is " + p})
		}
	}
	d := net.Dialer{Timeout: 2 * time.Second}
	c, err := d.DialContext(ctx, "unix", cfg.Socket)
	if err != nil {
		return append(out, Result{Name: "daemon", Status: Warn, Detail: "nobody serves " + cfg.Socket, Follows: "start it: systemctl start naru, or naru serve"})
	}
	_ = c.Close()
	return append(out, Result{Name: "daemon", Status: OK, Detail: "serves " + cfg.Socket})
}
