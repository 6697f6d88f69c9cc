package sys

import (
	"os"
	"path/filepath"
	"strconv"
	"time"
)

// timerSlack is how late a timer of ours may fire. The Go runtime's monitor
// thread sleeps for 20 µs at a time while anything runs; with the kernel's
// default of 50 µs it wakes ten thousand times a second, in every process that
// has a part in starting a container, which is a tenth of all the work then.
const timerSlack = 500 * time.Microsecond

// DefaultTimerSlack is what the kernel gives its first process, in nanoseconds,
// and what every container is to have (init/init_task.c).
const DefaultTimerSlack = 50_000

// RelaxTimers lets the timers of this process fire late enough to share
// wake-ups. Threads made later inherit it, and so do children. It is a matter
// of speed alone: where the kernel refuses, nothing changes.
func RelaxTimers() {
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return
	}
	ns := []byte(strconv.FormatInt(int64(timerSlack), 10))
	for _, t := range tasks {
		_ = os.WriteFile(filepath.Join("/proc", t.Name(), "timerslack_ns"), ns, 0)
	}
}
