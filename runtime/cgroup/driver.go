package cgroup

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	cgroups "github.com/containerd/cgroups/v3"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
)

// Mode is how the host lays out its hierarchies.
type Mode int

// The modes.
const (
	ModeV1     Mode = iota + 1 // version 1 hierarchies only
	ModeHybrid                 // version 1 controllers, and a version 2 tree beside them
	ModeV2                     // the unified hierarchy only
)

// String returns "v1", "hybrid" or "v2".
func (m Mode) String() string {
	switch m {
	case ModeV1:
		return "v1"
	case ModeHybrid:
		return "hybrid"
	case ModeV2:
		return "v2"
	}
	return "unknown"
}

// The driver kinds of Config.Driver.
const (
	DriverAuto     = "auto" // systemd where it is pid 1 and the mode is v2, else cgroupfs
	DriverCgroupfs = "cgroupfs"
	DriverSystemd  = "systemd"
)

// DefaultRoot is where every distribution mounts the hierarchies.
const DefaultRoot = "/sys/fs/cgroup"

// Config of a Driver. The zero value serves.
type Config struct {
	Root          string // where the hierarchies are mounted; empty = DefaultRoot
	Driver        string // DriverAuto, DriverCgroupfs or DriverSystemd; empty = auto
	DefaultParent string // parent of containers whose pod names none; empty = "/naru" or "naru.slice"
	// StateDir remembers, over a restart of the daemon, which parents Naru made
	// itself, and whose OOM kills were whose. It must be cleared at boot, as the cgroups are (a folder of
	// /run). Empty = remembered in memory only.
	StateDir string
}

// trackingFirst puts the hierarchy by which a group is found at the beginning:
// a group is made there first and removed there last, so that whatever a crash
// leaves of it is found.
func (d *Driver) trackingFirst() {
	t := d.tracking()
	rest := slices.DeleteFunc(slices.Clone(d.hier), func(h *hierarchy) bool { return h == t })
	d.hier = append([]*hierarchy{t}, rest...)
}

// hierarchy is one mounted tree.
type hierarchy struct {
	name        string   // "memory", "cpu,cpuacct", "name=systemd", "unified"
	controllers []string // of version 1; empty for a named or a unified tree
	fd          int      // O_PATH of the mount point
	v2          bool
}

func (h *hierarchy) has(controller string) bool {
	for _, c := range h.controllers {
		if c == controller {
			return true
		}
	}
	return false
}

// mkdir makes a folder. In the version 2 tree everybody may pass through it,
// whatever the umask is: older kernels (6.1) do not mount cgroup2 in a user
// namespace whose root may not.
func (h *hierarchy) mkdir(rel string) error {
	const mode = 0o755
	if err := unix.Mkdirat(h.fd, rel, mode); err != nil || !h.v2 {
		return err
	}
	if err := unix.Fchmodat(h.fd, rel, mode, 0); err != nil {
		_ = unix.Unlinkat(h.fd, rel, unix.AT_REMOVEDIR)
		return err
	}
	return nil
}

// Driver makes groups. See the package comment.
type Driver struct {
	mode          Mode
	systemd       bool
	root          string
	defaultParent string
	hier          []*hierarchy // that of tracking first, which is the version 2 one, if any
	unified       *hierarchy   // nil in ModeV1
	control       map[string]*hierarchy
	hugePages     map[string]bool // sizes as in the file names, "2MB"
	want          []string        // version 2 controllers to enable below the root
	marks         marks
	ledger        ledger // systemd's driver alone

	units unitDialer
	mu    sync.Mutex
	conn  unitManager // guarded by mu; nil until first used
}

// New looks at the host once. Nothing is created.
func New(cfg Config) (*Driver, error) {
	d := &Driver{
		root:          cfg.Root,
		defaultParent: cfg.DefaultParent,
		control:       map[string]*hierarchy{},
		marks:         marks{dir: cfg.StateDir, mem: map[string][]string{}},
		units:         dialSystemd,
	}
	d.ledger = ledger{kills: d.oomKills, below: d.groupsBelow, slices: map[string]*account{}}
	if cfg.StateDir != "" {
		d.ledger.dir = filepath.Join(cfg.StateDir, "oom")
	}
	if d.root == "" {
		d.root = DefaultRoot
	}
	d.root = filepath.Clean(d.root)
	if err := d.detect(); err != nil {
		d.Close()
		return nil, err
	}
	d.trackingFirst()
	if err := d.chooseKind(cfg.Driver); err != nil {
		d.Close()
		return nil, err
	}
	if d.defaultParent == "" {
		d.defaultParent = "/naru"
		if d.systemd {
			d.defaultParent = "naru.slice"
		}
	}
	if _, err := d.ParentPath(d.defaultParent); err != nil {
		d.Close()
		return nil, errs.New(errs.InvalidArgument, "use default cgroup parent %q: %w", d.defaultParent, err)
	}
	return d, nil
}

// Close releases the descriptors of the hierarchies and the D-Bus connection.
func (d *Driver) Close() {
	for _, h := range d.hier {
		_ = unix.Close(h.fd)
	}
	d.hier = nil
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.conn != nil {
		d.conn.Close()
		d.conn = nil
	}
}

// Mode returns how the host lays out its hierarchies.
func (d *Driver) Mode() Mode { return d.mode }

// Systemd reports whether groups are systemd's scopes and slices.
func (d *Driver) Systemd() bool { return d.systemd }

// Dir returns an O_PATH descriptor of the tree that controller is mounted on,
// for reading files of groups relative to it. "unified" is the version 2 tree,
// which in ModeV2 is that of every controller. The descriptor stays the Driver's.
func (d *Driver) Dir(controller string) (fd int, ok bool) {
	if d.mode == ModeV2 || controller == "unified" {
		if d.unified == nil {
			return -1, false
		}
		return d.unified.fd, true
	}
	h := d.control[controller]
	if h == nil {
		return -1, false
	}
	return h.fd, true
}

// HugePageSizes returns the huge page sizes of the host as the cgroup files
// spell them; empty where no hugetlb controller is in use.
func (d *Driver) HugePageSizes() []string {
	if d.mode != ModeV2 && d.control["hugetlb"] == nil {
		return nil
	}
	var s []string
	for size := range d.hugePages {
		s = append(s, size)
	}
	return s
}

// Controllers lists the controllers that limits can use.
func (d *Driver) Controllers() []string {
	if d.mode == ModeV2 {
		return append([]string(nil), d.want...)
	}
	var s []string
	for _, h := range d.hier {
		s = append(s, h.controllers...)
	}
	return s
}

func (d *Driver) chooseKind(kind string) error {
	switch kind {
	case "", DriverAuto:
		d.systemd = d.mode == ModeV2 && d.root == DefaultRoot && systemdBooted()
	case DriverCgroupfs:
	case DriverSystemd:
		if d.mode != ModeV2 {
			return errs.New(errs.FailedPrecondition,
				"use the systemd cgroup driver: it needs cgroup v2 alone on %s, this host is %s", d.root, d.mode)
		}
		d.systemd = true
	default:
		return errs.New(errs.InvalidArgument, "unknown cgroup driver %q: want auto, cgroupfs or systemd", kind)
	}
	return nil
}

// systemdBooted is sd_booted(3): systemd makes this folder before anything else.
func systemdBooted() bool {
	fi, err := os.Lstat("/run/systemd/system")
	return err == nil && fi.IsDir()
}

func (d *Driver) detect() error {
	mode, err := rootMode(d.root)
	if err != nil {
		return err
	}
	if mode == cgroups.Unified {
		d.mode = ModeV2
		h, err := openHierarchy(d.root, "unified")
		if err != nil {
			return err
		}
		h.v2 = true
		d.hier, d.unified = []*hierarchy{h}, h
		return d.detectV2()
	}
	d.mode = ModeV1
	if err := d.detectV1(); err != nil {
		return err
	}
	if d.unified != nil {
		d.mode = ModeHybrid
	}
	d.hugePages = hostHugePages()
	return nil
}

// rootMode asks the library for the usual root (it looks once per process),
// and the kernel for any other.
func rootMode(root string) (cgroups.CGMode, error) {
	mode := cgroups.Mode()
	if root != DefaultRoot {
		var st unix.Statfs_t
		if err := unix.Statfs(root, &st); err != nil {
			return 0, errs.New(errs.FailedPrecondition, "look at cgroup root %s: %w", root, err)
		}
		mode = cgroups.Legacy
		if st.Type == unix.CGROUP2_SUPER_MAGIC {
			mode = cgroups.Unified
		}
	}
	if mode == cgroups.Unavailable {
		return 0, errs.New(errs.FailedPrecondition, "no cgroups at %s: mount cgroup2 there", root)
	}
	return mode, nil
}

func openHierarchy(dir, name string) (*hierarchy, error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, errs.New(errs.FailedPrecondition, "open cgroup hierarchy %s: %w", dir, err)
	}
	return &hierarchy{name: name, fd: fd}, nil
}

// usedV2 are the controllers that Naru limits or reports, in the order in
// which they are enabled (cpuset first: the others do not depend on it).
var usedV2 = []string{"cpuset", "cpu", "io", "memory", "hugetlb", "pids"}

func (d *Driver) detectV2() error {
	b, err := readAt(d.unified.fd, "cgroup.controllers")
	if err != nil {
		return errs.New(errs.FailedPrecondition, "read cgroup.controllers of %s: %w", d.root, err)
	}
	have := map[string]bool{}
	for _, c := range strings.Fields(string(b)) {
		have[c] = true
	}
	for _, c := range usedV2 {
		if have[c] {
			d.want = append(d.want, c)
			d.control[c] = d.unified
		}
	}
	d.hugePages = map[string]bool{}
	if have["hugetlb"] {
		d.hugePages = hostHugePages()
	}
	return nil
}

// detectV1 reads the mount table once. Trees mounted twice count once.
func (d *Driver) detectV1() error {
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		below := filepath.Dir(m.Mountpoint) == d.root
		return !below || (m.FSType != "cgroup" && m.FSType != "cgroup2"), false
	})
	if err != nil {
		return errs.New(errs.Internal, "read the mount table: %w", err)
	}
	for _, m := range mounts {
		if err := d.addV1(m); err != nil {
			return err
		}
	}
	if len(d.control) == 0 {
		return errs.New(errs.FailedPrecondition, "no cgroup hierarchy is mounted below %s", d.root)
	}
	return nil
}

func (d *Driver) addV1(m *mountinfo.Info) error {
	if m.FSType == "cgroup2" {
		if d.unified != nil {
			return nil
		}
		h, err := openHierarchy(m.Mountpoint, "unified")
		if err != nil {
			return err
		}
		h.v2 = true
		d.unified = h
		d.hier = append([]*hierarchy{h}, d.hier...)
		return nil
	}
	controllers, name := parseV1Options(m.VFSOptions)
	if name == "" {
		return nil
	}
	for _, h := range d.hier {
		if h.name == name {
			return nil
		}
	}
	h, err := openHierarchy(m.Mountpoint, name)
	if err != nil {
		return err
	}
	h.controllers = controllers
	d.hier = append(d.hier, h)
	for _, c := range controllers {
		d.control[c] = h
	}
	return nil
}

var v1Controllers = map[string]bool{
	"cpu": true, "cpuacct": true, "cpuset": true, "memory": true, "devices": true, "freezer": true,
	"blkio": true, "pids": true, "hugetlb": true, "net_cls": true, "net_prio": true, "perf_event": true,
	"rdma": true, "misc": true, "debug": false,
}

// parseV1Options picks the controllers, or the name, out of the super block
// options of a version 1 mount ("rw,xattr,cpu,cpuacct", "rw,name=systemd").
func parseV1Options(opts string) (controllers []string, name string) {
	for _, o := range strings.Split(opts, ",") {
		if v1Controllers[o] {
			controllers = append(controllers, o)
		}
		if strings.HasPrefix(o, "name=") && name == "" {
			name = o
		}
	}
	if len(controllers) > 0 {
		name = strings.Join(controllers, ",")
	}
	return controllers, name
}

// hostHugePages lists /sys/kernel/mm/hugepages, in the spelling of the cgroup
// files: hugepages-2048kB is "2MB".
func hostHugePages() map[string]bool {
	sizes := map[string]bool{}
	entries, err := os.ReadDir("/sys/kernel/mm/hugepages")
	if err != nil {
		return sizes
	}
	for _, e := range entries {
		if s, ok := hugePageName(e.Name()); ok {
			sizes[s] = true
		}
	}
	return sizes
}
