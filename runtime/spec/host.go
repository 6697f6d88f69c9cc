package spec

import (
	"bufio"
	"fmt"
	"os"
	goruntime "runtime"
	"strconv"
	"strings"

	"github.com/moby/sys/capability"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
)

// Host is what Build needs to know of the machine and of what containers can
// be given.
type Host struct {
	Arch     string   // GOARCH
	Bounding []string // capabilities that can be given: what "ALL" means
	AppArmor bool
	SELinux  bool
	CgroupV2 bool // the unified hierarchy alone

	// MaxRlimits are the highest hard limits that can be set, by type; a type
	// that is not there is not limited.
	MaxRlimits map[string]uint64
	// MinOOMScoreAdj is the lowest oom_score_adj that can be set.
	MinOOMScoreAdj int
	// ProfileLoaded, if not nil, tells whether an AppArmor profile is loaded.
	ProfileLoaded func(name string) bool
}

// ProbeHost looks at this machine and at the process from which containers
// inherit (0: this one): they cannot get what it lacks. The daemon itself has
// given up some of what they may have.
func ProbeHost(pid int) (Host, error) {
	h := Host{Arch: goruntime.GOARCH, MaxRlimits: map[string]uint64{}}
	caps, err := capability.NewPid2(pid)
	if err == nil {
		err = caps.Load()
	}
	if err != nil {
		return h, errs.New(errs.Internal, "read the capabilities of %s: %w", processName(pid), err)
	}
	for _, c := range capability.ListKnown() {
		if caps.Get(capability.BOUNDING, c) {
			h.Bounding = append(h.Bounding, "CAP_"+strings.ToUpper(c.String()))
		}
	}
	if err := h.limits(pid, caps.Get(capability.EFFECTIVE, capability.CAP_SYS_RESOURCE)); err != nil {
		return h, err
	}
	h.AppArmor = readWord("/sys/module/apparmor/parameters/enabled") == "Y"
	if h.AppArmor {
		h.ProfileLoaded = profileLoaded
	}
	var fs unix.Statfs_t
	h.SELinux = unix.Statfs("/sys/fs/selinux", &fs) == nil && fs.Type == unix.SELINUX_MAGIC
	h.CgroupV2 = unix.Statfs("/sys/fs/cgroup", &fs) == nil && fs.Type == unix.CGROUP2_SUPER_MAGIC
	return h, nil
}

// rlimitNumbers are all kinds of resource limits (getrlimit(2)).
var rlimitNumbers = map[string]int{
	"RLIMIT_AS": unix.RLIMIT_AS, "RLIMIT_CORE": unix.RLIMIT_CORE, "RLIMIT_CPU": unix.RLIMIT_CPU, "RLIMIT_DATA": unix.RLIMIT_DATA,
	"RLIMIT_FSIZE": unix.RLIMIT_FSIZE, "RLIMIT_LOCKS": unix.RLIMIT_LOCKS, "RLIMIT_MEMLOCK": unix.RLIMIT_MEMLOCK,
	"RLIMIT_MSGQUEUE": unix.RLIMIT_MSGQUEUE, "RLIMIT_NICE": unix.RLIMIT_NICE, "RLIMIT_NOFILE": unix.RLIMIT_NOFILE,
	"RLIMIT_NPROC": unix.RLIMIT_NPROC, "RLIMIT_RSS": unix.RLIMIT_RSS, "RLIMIT_RTPRIO": unix.RLIMIT_RTPRIO,
	"RLIMIT_RTTIME": unix.RLIMIT_RTTIME, "RLIMIT_SIGPENDING": unix.RLIMIT_SIGPENDING, "RLIMIT_STACK": unix.RLIMIT_STACK,
}

// limits finds the bounds of rlimits and oom_score_adj. Only CAP_SYS_RESOURCE
// raises a hard limit (setrlimit(2)) or lowers the score below its least value
// so far (proc_pid_oom_score_adj(5)); fs.nr_open bounds RLIMIT_NOFILE for all.
func (h *Host) limits(pid int, mayRaise bool) error {
	if !mayRaise {
		for name, nr := range rlimitNumbers {
			var r unix.Rlimit
			if err := unix.Prlimit(pid, nr, nil, &r); err != nil {
				return errs.New(errs.Internal, "read %s of %s: %w", name, processName(pid), err)
			}
			h.MaxRlimits[name] = r.Max
		}
	}
	if n, err := strconv.ParseUint(readWord("/proc/sys/fs/nr_open"), 10, 64); err == nil {
		if old, ok := h.MaxRlimits["RLIMIT_NOFILE"]; !ok || n < old {
			h.MaxRlimits["RLIMIT_NOFILE"] = n
		}
	}
	h.MinOOMScoreAdj = -1000
	if !mayRaise {
		n, err := strconv.Atoi(readWord("/proc/" + processName(pid) + "/oom_score_adj"))
		if err != nil {
			return errs.New(errs.Internal, "read oom_score_adj of %s: %w", processName(pid), err)
		}
		h.MinOOMScoreAdj = n
	}
	return nil
}

// processName is the process's name in /proc.
func processName(pid int) string {
	if pid == 0 {
		return "self"
	}
	return strconv.Itoa(pid)
}

func readWord(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// profileLoaded looks the name up in the kernel's list, "name (mode)" by line.
func profileLoaded(name string) bool {
	f, err := os.Open("/sys/kernel/security/apparmor/profiles")
	if err != nil {
		return false
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if i := strings.LastIndex(s.Text(), " ("); i >= 0 && s.Text()[:i] == name {
			return true
		}
	}
	return false
}

// fdPath is a path to an open file, by the host's own procfs.
func fdPath(f *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", f.Fd()) }
