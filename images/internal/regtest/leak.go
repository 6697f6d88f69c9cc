package regtest

import (
	"flag"
	"fmt"
	"os"
	"runtime"
	"runtime/pprof"
	"strings"
	"testing"
	"time"
)

// Main runs the tests of a package and fails when descriptors or goroutines
// are left over.
func Main(m *testing.M) int {
	fds, gs := descriptors(), runtime.NumGoroutine()
	code := m.Run()
	if f := flag.Lookup("test.fuzz"); code != 0 || f != nil && f.Value.String() != "" {
		return code // the fuzzing engine keeps goroutines of its own
	}
	for range 100 {
		if len(descriptors()) <= len(fds) && runtime.NumGoroutine() <= gs {
			return 0
		}
		time.Sleep(50 * time.Millisecond)
	}
	for fd, to := range descriptors() {
		if _, before := fds[fd]; !before {
			fmt.Fprintf(os.Stderr, "descriptor %s left over: %s\n", fd, to)
			code = 1
		}
	}
	if runtime.NumGoroutine() > gs {
		_ = pprof.Lookup("goroutine").WriteTo(os.Stderr, 1)
		code = 1
	}
	return code
}

func descriptors() map[string]string {
	out := map[string]string{}
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return nil
	}
	for _, f := range list {
		to, err := os.Readlink("/proc/self/fd/" + f.Name())
		if err == nil && !strings.HasPrefix(to, "/proc/") && !strings.HasPrefix(to, "anon_inode:") {
			out[f.Name()] = to
		}
	}
	return out
}
