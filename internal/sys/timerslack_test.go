package sys

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestRelaxTimersReachesEveryThread(t *testing.T) {
	RelaxTimers()
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		b, err := os.ReadFile(filepath.Join("/proc", task.Name(), "timerslack_ns"))
		if errors.Is(err, fs.ErrNotExist) {
			continue // the thread has ended
		}
		if os.Getuid() != 0 && errors.Is(err, fs.ErrPermission) {
			continue
		}
		if got := strings.TrimSpace(string(b)); err != nil || got != "500000" {
			t.Errorf("thread %s: slack %q, %v", task.Name(), got, err)
		}
	}
}
