package spec

import (
	"errors"
	"os"
	"path"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime"
)

// maxDevices bounds what one folder of devices may bring.
const maxDevices = 4096

// DeviceSource finds device nodes of the host.
type DeviceSource interface {
	// Lookup gives the node that hostPath leads to, with Path = hostPath, or,
	// for a folder, all nodes below it, with their paths below hostPath.
	Lookup(hostPath string) ([]specs.LinuxDevice, error)
}

// defaultDevices may always be used: null, zero, full, random, urandom, tty,
// ptmx and the terminals of /dev/pts (devices.txt of the kernel).
var defaultDevices = [][2]int64{{1, 3}, {1, 5}, {1, 7}, {1, 8}, {1, 9}, {5, 0}, {5, 2}, {136, -1}}

// devices lists the nodes that the container gets beside the default ones, and
// the rules of the device cgroup: nothing but these; or all, when privileged.
func (b *builder) devices() error {
	in, res := b.in, b.spec.Linux.Resources
	nodes := in.Nodes
	if nodes == nil {
		nodes = HostDevices{}
	}
	rules := []specs.LinuxDeviceCgroup{{Allow: in.Security.Privileged, Access: "rwm"}}
	if !in.Security.Privileged {
		for _, d := range defaultDevices {
			rule := specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: new(d[0]), Access: "rwm"}
			if d[1] >= 0 {
				rule.Minor = new(d[1])
			}
			rules = append(rules, rule)
		}
	}
	have := map[string]bool{}
	give := func(d specs.LinuxDevice) {
		if !have[d.Path] {
			have[d.Path] = true
			b.spec.Linux.Devices = append(b.spec.Linux.Devices, d)
		}
	}
	for i := range in.Devices {
		found, perms, err := device(&in.Devices[i], nodes)
		if err != nil {
			return err
		}
		for _, d := range found {
			if in.Defaults.DeviceOwner {
				d.UID, d.GID = &b.who.UID, &b.who.GID
			}
			give(d)
			if !in.Security.Privileged {
				rules = append(rules, specs.LinuxDeviceCgroup{Allow: true, Type: d.Type, Major: &d.Major, Minor: &d.Minor, Access: perms})
			}
		}
	}
	if in.Security.Privileged {
		found, err := nodes.Lookup("/dev")
		if err != nil {
			return err
		}
		for _, d := range found {
			give(d)
		}
	}
	res.Devices = rules
	return nil
}

// device resolves one requested device.
func device(d *runtime.Device, nodes DeviceSource) ([]specs.LinuxDevice, string, error) {
	host, err := absolute("device host path", d.HostPath)
	if err != nil {
		return nil, "", err
	}
	target := d.ContainerPath
	if target == "" {
		target = host
	}
	if target, err = absolute("device container path", target); err != nil {
		return nil, "", err
	}
	if target == "/" || within(target, "/proc") || within(target, "/sys") {
		return nil, "", errs.New(errs.InvalidArgument, "device container path %q: no place for a device", clip(target))
	}
	perms, err := permissions(d.Permissions)
	if err != nil {
		return nil, "", err
	}
	found, err := nodes.Lookup(host)
	if err != nil {
		return nil, "", err
	}
	for i := range found {
		found[i].Path = path.Join(target, strings.TrimPrefix(found[i].Path, host))
	}
	return found, perms, nil
}

// permissions checks a subset of "rwm", without repeats. Nothing said means
// all, as in every other runtime.
func permissions(p string) (string, error) {
	if p == "" {
		return "rwm", nil
	}
	for i, c := range p {
		if !strings.ContainsRune("rwm", c) || strings.ContainsRune(p[i+1:], c) {
			return "", errs.New(errs.InvalidArgument, "device permissions %q: want some of r, w and m", clip(p))
		}
	}
	return p, nil
}

// HostDevices finds the device nodes of this host.
type HostDevices struct{}

// skipped folders and files of /dev belong to one process, namespace or
// container manager, not to the host's devices.
var skipped = []string{"pts", "shm", "fd", "mqueue", "console", ".lxc", ".lxd-mounts", ".udev"}

// Lookup follows links once, by opening the path, and looks at what it opened.
func (HostDevices) Lookup(hostPath string) ([]specs.LinuxDevice, error) {
	fd, err := unix.Open(hostPath, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, errs.New(errs.InvalidArgument, "device %s: %w", clip(hostPath), err)
	}
	f := os.NewFile(uintptr(fd), hostPath)
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, errs.New(errs.Internal, "device %s: %w", clip(hostPath), err)
	}
	if d, ok := node(hostPath, &st); ok {
		return []specs.LinuxDevice{d}, nil
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil, errs.New(errs.InvalidArgument, "device %s: neither a device nor a folder of devices", clip(hostPath))
	}
	if !within(path.Clean(hostPath), "/dev") {
		return nil, errs.New(errs.InvalidArgument, "device %s: a folder of devices must lie in /dev", clip(hostPath))
	}
	var out []specs.LinuxDevice
	if err := walk(f, hostPath, 0, &out); err != nil {
		return nil, err
	}
	slices.SortFunc(out, func(x, y specs.LinuxDevice) int { return strings.Compare(x.Path, y.Path) })
	return out, nil
}

// walk collects the nodes below an opened folder. Links are not followed: what
// they lead to is found by its own name or not meant.
func walk(dir *os.File, name string, depth int, out *[]specs.LinuxDevice) error {
	readable, err := os.OpenFile(fdPath(dir), os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return errs.New(errs.InvalidArgument, "device folder %s: %w", clip(name), errors.Unwrap(err))
	}
	defer readable.Close()
	names, err := readable.Readdirnames(-1)
	if err != nil {
		return errs.New(errs.Internal, "device folder %s: %w", clip(name), err)
	}
	for _, n := range names {
		if slices.Contains(skipped, n) {
			continue
		}
		var st unix.Stat_t
		if err := unix.Fstatat(int(readable.Fd()), n, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			continue // gone meanwhile
		}
		if d, ok := node(path.Join(name, n), &st); ok {
			*out = append(*out, d)
		}
		if len(*out) > maxDevices || depth > 16 {
			return errs.New(errs.InvalidArgument, "device folder %s: too many devices or levels", clip(name))
		}
		if st.Mode&unix.S_IFMT == unix.S_IFDIR {
			fd, err := unix.Openat(int(readable.Fd()), n, unix.O_PATH|unix.O_NOFOLLOW|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
			if err != nil {
				continue
			}
			sub := os.NewFile(uintptr(fd), n)
			err = walk(sub, path.Join(name, n), depth+1, out)
			sub.Close()
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// node makes a device of a stat, if it is one.
func node(p string, st *unix.Stat_t) (specs.LinuxDevice, bool) {
	var kind string
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFCHR:
		kind = "c"
	case unix.S_IFBLK:
		kind = "b"
	default:
		return specs.LinuxDevice{}, false
	}
	return specs.LinuxDevice{
		Path: p, Type: kind,
		Major: int64(unix.Major(uint64(st.Rdev))), Minor: int64(unix.Minor(uint64(st.Rdev))),
		FileMode: new(os.FileMode(st.Mode & 0o777)), UID: &st.Uid, GID: &st.Gid,
	}, true
}
