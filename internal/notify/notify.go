// Package notify tells systemd how the daemon fares: ready, stopping, and,
// where the unit sets WatchdogSec, alive (sd_notify(3), sd_watchdog_enabled(3)).
// Without systemd every call does nothing.
package notify

import (
	"context"
	"os"
	"strconv"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
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
