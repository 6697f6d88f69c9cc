package cri

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"k8s.io/klog/v2"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/sys"
)

// maxSocketPath is what fits in sockaddr_un with its final zero (unix(7)).
const maxSocketPath = 107

// Listen makes the unix socket at path for root alone, or also for members of
// allowGIDs. Whoever can connect is root on this node, so:
//
//   - a missing parent folder is made with mode 0700, and one that others own
//     or may write to is refused;
//   - the socket is made in a private folder, given its mode and then renamed
//     to path, so that nobody finds it half made;
//   - a stale socket is replaced, a living one or anything else is an error;
//   - each connection's peer is asked of the kernel again (SO_PEERCRED), in
//     case the socket file gets into wrong hands.
//
// If one of the held descriptors is already the socket at path, kept open by
// systemd since the daemon before this one, it is taken, with whoever has
// connected meanwhile, and left in its place by Close. The others are closed.
func Listen(path string, allowGIDs []uint32, held ...*os.File) (*Listener, error) {
	defer closeAll(held)
	if err := checkSocketPath(path); err != nil {
		return nil, err
	}
	dir := filepath.Dir(path)
	if err := prepareFolder(dir); err != nil {
		return nil, err
	}
	for _, f := range held {
		if l := adopt(f, path); l != nil {
			return &Listener{UnixListener: l, path: path, gids: slices.Clone(allowGIDs)}, nil
		}
	}
	if err := checkStale(path); err != nil {
		return nil, err
	}
	l, info, err := bindAndRename(dir, path, allowGIDs)
	if err != nil {
		return nil, errs.New(errs.Internal, "make socket %s: %w", path, err)
	}
	return &Listener{UnixListener: l, path: path, info: info, gids: slices.Clone(allowGIDs)}, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}

// adopt returns the listener of a descriptor if it is the socket at path. It is
// bound to path if systemd has made it, and has the name of its file if Listen
// has: that binds to a passing path.
func adopt(f *os.File, path string) *net.UnixListener {
	info, err := os.Lstat(path)
	if err != nil || info.Mode().Type() != fs.ModeSocket {
		return nil
	}
	l, err := net.FileListener(f)
	if err != nil {
		return nil
	}
	if u, ok := l.(*net.UnixListener); ok && u.Addr().Network() == "unix" && (f.Name() == heldName(info) || u.Addr().String() == path) {
		u.SetUnlinkOnClose(false)
		return u
	}
	_ = l.Close()
	return nil
}

// heldName is what a held socket is called: by its file, which is nobody else's
// as long as the socket is open. At the same path there may be another by now.
func heldName(file fs.FileInfo) string {
	st, ok := file.Sys().(*syscall.Stat_t)
	if !ok {
		return ""
	}
	return fmt.Sprintf("cri-%d-%d", st.Dev, st.Ino)
}

func checkSocketPath(path string) error {
	switch {
	case !filepath.IsAbs(path) || filepath.Clean(path) != path:
		return invalid("socket path %q is not an absolute, clean path", path)
	case len(path) > maxSocketPath:
		return invalid("socket path %q is longer than %d bytes", path, maxSocketPath)
	case strings.ContainsRune(path, 0):
		return invalid("socket path %q holds a zero byte", path)
	}
	return nil
}

func prepareFolder(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return errs.New(errs.Internal, "make socket folder: %w", err)
	}
	link, lerr := os.Lstat(dir)
	info, err := os.Stat(dir)
	if err := errors.Join(lerr, err); err != nil {
		return errs.New(errs.Internal, "look at socket folder: %w", err)
	}
	for _, i := range []fs.FileInfo{link, info} { // their owner could put a socket of theirs in the place of ours
		if st, ok := i.Sys().(*syscall.Stat_t); ok && st.Uid != 0 && int(st.Uid) != os.Geteuid() {
			return errs.New(errs.FailedPrecondition, "socket folder %s belongs to user %d; run chown root on it", dir, st.Uid)
		}
	}
	if info.Mode().Perm()&0o022 != 0 && info.Mode()&fs.ModeSticky == 0 {
		return errs.New(errs.FailedPrecondition, "socket folder %s may be written by others (mode %04o); run chmod go-w on it", dir, info.Mode().Perm())
	}
	return nil
}

// checkStale makes sure that path is free or a socket that nobody serves.
func checkStale(path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return errs.New(errs.Internal, "look at socket path: %w", err)
	case info.Mode().Type() != fs.ModeSocket:
		return errs.New(errs.FailedPrecondition, "%s exists and is not a socket (%s); remove it or configure another path", path, info.Mode())
	}
	c, err := net.DialTimeout("unix", path, time.Second)
	if err == nil {
		_ = c.Close()
		return errs.New(errs.FailedPrecondition, "socket %s is served by another process", path)
	}
	return nil
}

func bindAndRename(dir, path string, gids []uint32) (*net.UnixListener, fs.FileInfo, error) {
	private, err := os.MkdirTemp(dir, ".n") // mode 0700
	if err != nil {
		return nil, nil, err
	}
	defer func() { _ = os.RemoveAll(private) }()
	temp := filepath.Join(private, "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: temp, Net: "unix"})
	if err != nil {
		return nil, nil, err
	}
	l.SetUnlinkOnClose(false) // it would unlink the old name; Close does it
	info, err := publish(temp, path, gids)
	if err != nil {
		_ = l.Close()
		return nil, nil, err
	}
	return l, info, nil
}

// publish gives the socket its owner and mode and then its name.
func publish(temp, path string, gids []uint32) (fs.FileInfo, error) {
	mode := fs.FileMode(0o600)
	if len(gids) > 0 {
		mode = 0o660
		if err := os.Chown(temp, -1, int(gids[0])); err != nil {
			return nil, err
		}
	}
	if err := os.Chmod(temp, mode); err != nil {
		return nil, err
	}
	info, err := os.Lstat(temp)
	if err != nil {
		return nil, err
	}
	return info, os.Rename(temp, path) // replaces a stale socket, never follows a link
}

// Listener is the CRI socket. It accepts only peers that may use it.
type Listener struct {
	*net.UnixListener
	path string
	info fs.FileInfo // of the socket file; nil if somebody holds it open
	gids []uint32
	once sync.Once
}

// Accept implements net.Listener.
func (l *Listener) Accept() (net.Conn, error) {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		if err := l.admit(c); err != nil {
			klog.InfoS("Refused a connection to the CRI socket", "err", err)
			_ = c.Close()
			continue
		}
		return c, nil
	}
}

func (l *Listener) admit(c *net.UnixConn) error {
	cred, err := sys.PeerCredentials(c)
	if err != nil {
		return err
	}
	return admit(cred, l.gids)
}

// admit lets in root and members of the given groups.
func admit(cred sys.PeerCred, gids []uint32) error {
	if cred.UID == 0 {
		return nil
	}
	for _, gid := range gids {
		if cred.GID == gid || slices.Contains(cred.Groups, gid) {
			return nil
		}
	}
	return fmt.Errorf("process %d of user %d is not allowed", cred.PID, cred.UID)
}

// Hold gives a descriptor of the socket to hold, and the name by which Listen
// will know it, unless somebody holds it already. From then on Close leaves the
// socket file in its place, for the next daemon.
func (l *Listener) Hold(hold func(name string, f *os.File) error) error {
	if l.info == nil {
		return nil
	}
	f, err := l.File()
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	if err := hold(heldName(l.info), f); err != nil {
		return err
	}
	l.info = nil
	return nil
}

// Close implements net.Listener. It removes the socket file unless another
// one has taken its place.
func (l *Listener) Close() error {
	err := l.UnixListener.Close()
	l.once.Do(func() {
		if l.info == nil {
			return
		}
		if now, statErr := os.Lstat(l.path); statErr == nil && os.SameFile(now, l.info) {
			_ = os.Remove(l.path)
		}
	})
	return err
}
