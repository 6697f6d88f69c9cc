package sandbox

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/sys"
	"github.com/naru-project/naru/sandbox/etcfiles"
)

// The folder of a pod's files is a small tmpfs of its own: whoever may write
// to them in the pod cannot fill the host's /run by it.
const (
	fileSpace  = 1 << 20
	fileInodes = 64
)

// maxHostFile bounds what is copied of the host.
const maxHostFile = 512 << 10

const tmpfsAttrs = unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC

func makeFileDir(dir string) error {
	if err := os.Mkdir(dir, 0o711); err != nil {
		class := errs.Internal
		if errors.Is(err, fs.ErrExist) {
			class = errs.AlreadyExists
		}
		return errs.New(class, "make the pod's folder: %w", err)
	}
	return mountTmpfs(dir, fileSpace, sys.FsOption{Key: "mode", Value: "0711"}, sys.FsOption{Key: "nr_inodes", Value: strconv.Itoa(fileInodes)})
}

// mountTmpfs makes a tmpfs and attaches it to dir.
func mountTmpfs(dir string, size int64, opts ...sys.FsOption) error {
	opts = append(opts, sys.FsOption{Key: "source", Value: "naru"}, sys.FsOption{Key: "size", Value: strconv.FormatInt(size, 10)})
	fs, err := sys.NewFs("tmpfs", tmpfsAttrs, opts...)
	if err != nil {
		return errs.New(errs.Internal, "%w", err)
	}
	defer func() { _ = fs.Close() }()
	return attach(fs, dir)
}

func attach(m *os.File, dir string) error {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return errs.New(errs.Internal, "open %s: %w", dir, err)
	}
	target := os.NewFile(uintptr(fd), dir)
	defer func() { _ = target.Close() }()
	if err := sys.Attach(m, target); err != nil {
		return errs.New(errs.Internal, "%w", err)
	}
	return nil
}

// mountShm gives a pod its /dev/shm: the file system that was made inside its
// user namespace, or a new one.
func mountShm(path string, made *os.File, size int64) error {
	if err := os.Mkdir(path, 0o711); err != nil {
		return errs.New(errs.Internal, "make the folder for /dev/shm: %w", err)
	}
	if made != nil {
		return attach(made, path)
	}
	return mountTmpfs(path, size, sys.FsOption{Key: "mode", Value: "1777"})
}

// writeNew writes a file that must not exist yet, readable by all. It belongs
// to the root of the pod's user namespace, if it has one.
func writeNew(path string, data []byte, s *Spec) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o644)
	if err == nil {
		_, err = f.Write(data)
		err = errors.Join(err, f.Chmod(0o644)) // whatever the umask is
		if len(s.UIDMap) > 0 {
			err = errors.Join(err, f.Chown(int(hostID(s.UIDMap)), int(hostID(s.GIDMap))))
		}
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		return errs.New(errs.Internal, "write %s: %w", path, err)
	}
	return nil
}

// removeFiles unmounts and removes a pod's folder. What is not there is no error.
func (m *Manager) removeFiles(id string) error {
	dir := filepath.Join(m.podsDir(), id)
	if err := errors.Join(unmountAll(filepath.Join(dir, "shm")), unmountAll(dir)); err != nil {
		return errs.New(errs.Internal, "remove the pod's files: %w", err)
	}
	if err := os.RemoveAll(dir); err != nil {
		return errs.New(errs.Internal, "remove the pod's files: %w", err)
	}
	return nil
}

// etcFiles is the content of the files by their name below /etc.
func (m *Manager) etcFiles(s *Spec, ips []netip.Addr) (map[string][]byte, error) {
	hostname := s.Hostname
	if hostname == "" || s.UTS == ModeNode {
		var err error
		if hostname, err = os.Hostname(); err != nil {
			return nil, errs.New(errs.Internal, "read the host's name: %w", err)
		}
	}
	hosts := etcfiles.Hosts(hostname, ips)
	if s.Network == ModeNode {
		if copied, err := readHost(filepath.Join(m.cfg.HostEtc, "hosts")); err == nil {
			hosts = copied
		} else if !errors.Is(err, fs.ErrNotExist) {
			return nil, errs.New(errs.Internal, "copy the host's file: %w", err)
		}
	}
	resolv, err := m.resolvConf(s)
	if err != nil {
		return nil, err
	}
	return map[string][]byte{"hostname": []byte(hostname + "\n"), "hosts": hosts, "resolv.conf": resolv}, nil
}

// resolvConf is what the pod was given, verbatim, else the host's own; of that
// a pod with its own network gets no server on the loopback.
func (m *Manager) resolvConf(s *Spec) ([]byte, error) {
	if d := s.DNS; len(d.Servers)+len(d.Searches)+len(d.Options) > 0 {
		return etcfiles.Resolv(d.Servers, d.Searches, d.Options), nil
	}
	conf, err := readHost(filepath.Join(m.cfg.HostEtc, "resolv.conf"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, errs.New(errs.Internal, "copy the host's file: %w", err)
	}
	if s.Network == ModeNode {
		return conf, nil
	}
	out, servers := etcfiles.WithoutLoopback(conf)
	if servers == 0 && m.cfg.HostResolv != "" {
		if conf, err := readHost(m.cfg.HostResolv); err == nil {
			if other, n := etcfiles.WithoutLoopback(conf); n > 0 {
				return other, nil
			}
		}
	}
	return out, nil
}

func readHost(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	data, err := io.ReadAll(io.LimitReader(f, maxHostFile+1))
	if err == nil && len(data) > maxHostFile {
		err = fmt.Errorf("%s is larger than %d bytes", path, maxHostFile)
	}
	return data, err
}
