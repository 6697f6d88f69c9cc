// Package testhost tells tests about the machine that they run on.
package testhost

import (
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Factor is by how much this machine is slower than the ones that the limits
// in tests are written for: NARU_SLOW, or 1. The emulated test machine of
// hack/vm sets it. Limits grow by this one factor, and where a test measures
// speed or fills a buffer, its work shrinks by it; what is asserted beside the
// time stays as it is.
func Factor() int {
	if n, err := strconv.Atoi(os.Getenv("NARU_SLOW")); err == nil && n > 1 {
		return n
	}
	return 1
}

// Limit stretches a time limit by Factor.
func Limit(d time.Duration) time.Duration { return d * time.Duration(Factor()) }

// CPUTime is the processor time that this process has used: what a limit on
// work is best measured by where other work shares the machine.
func CPUTime() time.Duration {
	var u unix.Rusage
	_ = unix.Getrusage(unix.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// TellsExits reports whether the kernel tells how a process ended that was
// somebody else's child and is reaped (PIDFD_INFO_EXIT, Linux 6.15).
func TellsExits(t testing.TB) bool {
	t.Helper()
	pidfd := -1
	cmd := exec.CommandContext(t.Context(), "true")
	cmd.SysProcAttr = &syscall.SysProcAttr{PidFD: &pidfd}
	if err := cmd.Run(); err != nil || pidfd < 0 {
		t.Fatalf("run true: %v, pidfd %d", err, pidfd)
	}
	defer func() { _ = unix.Close(pidfd) }()
	info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_EXIT}
	err := unix.IoctlPidfdInfo(pidfd, &info)
	return err == nil && info.Mask&unix.PIDFD_INFO_EXIT != 0
}
