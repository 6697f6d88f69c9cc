package worker

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// whatKeeps says, for an error, why a process that was killed is still there:
// a thread of it that sleeps in the kernel, or that is dead and traced by a
// process that does not wait for it. All of it is read at once and may be out
// of date at once.
func whatKeeps(pid int) string {
	dir := "/proc/" + strconv.Itoa(pid) + "/task"
	tasks, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Sprintf("process %d is gone by now", pid)
	}
	state := ""
	for _, t := range tasks {
		b, err := os.ReadFile(dir + "/" + t.Name() + "/status")
		if err != nil {
			continue
		}
		s, _, tracer := parseStatus(b)
		if tracer > 0 {
			// A thread of it; the process is what one can end.
			b, _ := os.ReadFile("/proc/" + strconv.Itoa(tracer) + "/status")
			if _, process, _ := parseStatus(b); process > 0 {
				tracer = process
			}
			comm, _ := os.ReadFile("/proc/" + strconv.Itoa(tracer) + "/comm")
			return fmt.Sprintf("its process %d (thread %s, state %s) is traced by process %d %q, which neither waits for it nor lets it go; end that one",
				pid, t.Name(), s, tracer, strings.TrimSpace(string(comm)))
		}
		if state == "" || !strings.HasPrefix(s, "Z") { // a thread that lives tells more than a dead one
			state = fmt.Sprintf("thread %s of its process %d is in state %s", t.Name(), pid, s)
		}
	}
	return state
}

// parseStatus takes the state ("D (disk sleep)"), the process of the thread,
// and the thread that traces it (0 for none) out of /proc/PID/status
// (proc_pid_status(5)).
func parseStatus(b []byte) (state string, process, tracer int) {
	for line := range bytes.Lines(b) {
		name, value, _ := bytes.Cut(bytes.TrimSpace(line), []byte(":"))
		switch v := string(bytes.TrimSpace(value)); string(name) {
		case "State":
			state = v
		case "Tgid":
			process, _ = strconv.Atoi(v)
		case "TracerPid":
			tracer, _ = strconv.Atoi(v)
		}
	}
	return state, process, tracer
}
