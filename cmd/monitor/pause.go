package main

import (
	"os/signal"
	"runtime/debug"

	"golang.org/x/sys/unix"
)

// pause is the first process of a PID namespace that containers share. It only
// exists: the kernel reaps its children, because SIGCHLD is ignored
// (sigaction(2), SIG_IGN), and ends the namespace with it.
//
// It stops on SIGKILL from outside and heeds no other signal: as process 1 it
// is not reached by those it does not handle, and it handles none.
func pause() {
	debug.SetGCPercent(-1)
	signal.Ignore(unix.SIGCHLD, unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2, unix.SIGPIPE)
	_ = unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
	for {
		// An ordinary system call, not a raw one: only then Go's monitor thread
		// sees that nothing runs, and sleeps too.
		_, _ = unix.Ppoll(nil, nil, nil)
	}
}
