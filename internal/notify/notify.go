// Package notify tells systemd how the daemon fares: ready, stopping, and,
// where the unit sets WatchdogSec, alive (sd_notify(3), sd_watchdog_enabled(3)).
// Without systemd every call does nothing.
package notify

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

// Managed reports whether systemd runs this process as a unit that notifies.
func Managed() bool { return os.Getenv("NOTIFY_SOCKET") != "" }

// Ready ends the start-up of the unit (Type=notify).
func Ready() { send(daemon.SdNotifyReady) }

// Stopping says that the daemon has begun to shut down.
func Stopping() { send(daemon.SdNotifyStopping) }

// Status shows one line in systemctl status.
func Status(text string) { send("STATUS=" + text) }

// Held returns the descriptors that systemd has kept for this process: those of
// a unit of type socket, and those given to Hold by the process before it
// (sd_listen_fds(3)). They are close-on-exec, and children are not told of them.
func Held() []*os.File { return activation.Files(true) }

// Hold gives systemd a descriptor to keep while this process is replaced by the
// next (FDSTORE, FileDescriptorStoreMax= of the unit). Systemd drops it when the
// unit is stopped.
func Hold(name string, f *os.File) error {
	address := os.Getenv("NOTIFY_SOCKET")
	if address == "" {
		return errors.New("systemd does not run this process")
	}
	raw, err := f.SyscallConn() // Fd would make the socket a blocking one
	if err != nil {
		return err
	}
	var sent error
	err = raw.Control(func(fd uintptr) { sent = sendWith(address, "FDSTORE=1\nFDNAME="+name, int(fd)) })
	if err := errors.Join(err, sent); err != nil {
		return fmt.Errorf("give systemd %s to keep: %w", name, err)
	}
	return nil
}

// Drop has systemd close what it has kept of Hold by these names. Without it,
// what is of no use any more would take the place of what is.
func Drop(held []*os.File) {
	for _, f := range held {
		send("FDSTOREREMOVE=1\nFDNAME=" + f.Name())
	}
}

// sendWith sends a message with a descriptor beside it, which
// [daemon.SdNotify] cannot.
func sendWith(address, message string, fd int) error {
	s, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer func() { _ = unix.Close(s) }()
	err = unix.Sendmsg(s, []byte(message), unix.UnixRights(fd), &unix.SockaddrUnix{Name: address}, unix.MSG_NOSIGNAL)
	return os.NewSyscallError("sendmsg", err)
}

// Extend asks for more time to start or stop, for a recovery that takes long
// (EXTEND_TIMEOUT_USEC).
func Extend(d time.Duration) {
	send("EXTEND_TIMEOUT_USEC=" + strconv.FormatInt(d.Microseconds(), 10))
}

// send keeps NOTIFY_SOCKET in the environment: all calls need it. A daemon that
// cannot reach systemd goes on.
func send(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		klog.InfoS("Could not notify systemd", "state", state, "err", err)
	}
}

// Watch feeds the watchdog until ctx ends, as long as check succeeds. It checks
// three times in each period of the watchdog's, so that one slow answer does not
// cost the daemon its life; when all fail systemd restarts it. Without a
// watchdog it returns at once.
func Watch(ctx context.Context, check func(context.Context) error) {
	period, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		klog.InfoS("The watchdog is not fed: its setting cannot be read", "err", err)
		return
	}
	if period <= 0 {
		return
	}
	watch(ctx, period/3, check, func() { send(daemon.SdNotifyWatchdog) })
}

func watch(ctx context.Context, every time.Duration, check func(context.Context) error, feed func()) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		cctx, cancel := context.WithTimeout(ctx, every)
		err := check(cctx)
		cancel()
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			klog.ErrorS(err, "The daemon does not answer itself; the watchdog is not fed", "next", every)
		default:
			feed()
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}
