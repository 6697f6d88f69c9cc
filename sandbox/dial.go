package sandbox

import (
	"context"
	"errors"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
)

// Dial connects to a TCP port on the loopback of a sandbox, IPv4 first. The
// socket belongs to the pod's network namespace from birth; only making it
// takes a thread there.
func (m *Manager) Dial(ctx context.Context, h *Handle, port uint16) (*os.File, error) {
	if port == 0 {
		return nil, errs.New(errs.InvalidArgument, "connect to port 0 of the pod")
	}
	socks, err := m.sockets(h)
	if err != nil {
		return nil, err
	}
	defer func() {
		for _, s := range socks {
			_ = s.file.Close() // the one that is handed on was taken out
		}
	}()
	var all []error
	for i, s := range socks {
		if err := connect(ctx, s.file, s.loopback(int(port))); err != nil {
			all = append(all, err)
			continue
		}
		socks = append(socks[:i:i], socks[i+1:]...)
		return s.file, nil
	}
	err = errors.Join(all...)
	class := errs.Unavailable
	if c := errs.Of(context.Cause(ctx)); c == errs.Canceled || c == errs.DeadlineExceeded {
		class = c
	}
	return nil, errs.New(class, "connect to port %d of the pod: %w", port, err)
}

type sock struct {
	file *os.File
	v6   bool
}

func (s sock) loopback(port int) unix.Sockaddr {
	if s.v6 {
		return &unix.SockaddrInet6{Port: port, Addr: [16]byte{15: 1}}
	}
	return &unix.SockaddrInet4{Port: port, Addr: [4]byte{127, 0, 0, 1}}
}

// sockets makes a socket of each family in the pod's network namespace.
func (m *Manager) sockets(h *Handle) (out []sock, err error) {
	if h == nil {
		return nil, errs.New(errs.FailedPrecondition, "connect to a pod that is not there")
	}
	open := func() error {
		for _, fam := range []int{unix.AF_INET, unix.AF_INET6} {
			fd, err := unix.Socket(fam, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
			if errors.Is(err, unix.EAFNOSUPPORT) {
				continue
			}
			if err != nil {
				return errs.New(errs.Internal, "make a socket: %w", err)
			}
			out = append(out, sock{os.NewFile(uintptr(fd), "port-forward"), fam == unix.AF_INET6})
		}
		return nil
	}
	if h.Namespaces.Net == "" {
		// A pod of the host's network; but never one whose record lost its path.
		if len(h.IPs) > 0 || h.HostLink != "" {
			return nil, errs.New(errs.FailedPrecondition, "the pod has addresses and no network namespace")
		}
		err = open()
	} else {
		if h.BootID != m.boot {
			return nil, errs.New(errs.FailedPrecondition, "the pod is of a former boot")
		}
		var ns *os.File
		if ns, err = m.open(h, unix.CLONE_NEWNET); err != nil {
			return nil, err
		}
		defer func() { _ = ns.Close() }()
		err = m.inNamespaces(&opened{files: map[string]*os.File{"net": ns}}, unix.CLONE_NEWNET, open)
	}
	if err != nil {
		for _, s := range out {
			_ = s.file.Close()
		}
		return nil, err
	}
	return out, nil
}

// connect connects a non-blocking socket, until ctx ends.
func connect(ctx context.Context, f *os.File, to unix.Sockaddr) error {
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = f.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	started, result := false, error(nil)
	err = rc.Write(func(fd uintptr) bool {
		if !started {
			started = true
			result = unix.Connect(int(fd), to)
			return !errors.Is(result, unix.EINPROGRESS)
		}
		n, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
		if err != nil {
			result = err
			return true
		}
		if n != 0 {
			result = unix.Errno(n)
			return true
		}
		if _, err := unix.Getpeername(int(fd)); err != nil {
			return false // woken early
		}
		result = nil
		return true
	})
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	if err = errors.Join(err, result); err != nil {
		return os.NewSyscallError("connect "+addrText(to), err)
	}
	return nil
}

func addrText(to unix.Sockaddr) string {
	switch a := to.(type) {
	case *unix.SockaddrInet4:
		return "127.0.0.1:" + strconv.Itoa(a.Port)
	case *unix.SockaddrInet6:
		return "[::1]:" + strconv.Itoa(a.Port)
	}
	return "loopback"
}
