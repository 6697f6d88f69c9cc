package reaper

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/naru-project/naru/internal/testhost"
)

// A reaper changes its whole process: this test binary is one when it is told so.
func TestMain(m *testing.M) {
	if os.Getenv("BE_REAPER") != "" {
		if Run(os.Args[1:]) != nil {
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// start runs a reaper with a shell script in place of a runtime's program; $1
// is its pid file. signal is sent when the script has made the file "ready".
func start(t *testing.T, script string, signal os.Signal) Report {
	t.Helper()
	dir := t.TempDir()
	pid, ready := filepath.Join(dir, "pid"), filepath.Join(dir, "ready")
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", pid, "/bin/sh", "-c", script, "sh", pid, ready)
	cmd.Env = append(os.Environ(), "BE_REAPER=1")
	cmd.ExtraFiles = []*os.File{w}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	if signal != nil {
		for end := time.Now().Add(testhost.Limit(10 * time.Second)); ; time.Sleep(5 * time.Millisecond) {
			if _, err := os.Stat(ready); err == nil {
				break
			}
			if time.Now().After(end) {
				t.Fatal("the script is not ready")
			}
		}
		if err := cmd.Process.Signal(signal); err != nil {
			t.Fatal(err)
		}
	}
	text, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	return Parse(text)
}

func TestReaper(t *testing.T) {
	for _, c := range []struct {
		name, script string
		want         Report
	}{
		{"exit code", "(sleep .1; exit 7) & echo $! >$1", Report{Exited: true, Code: 7}},
		{"signal", "(sleep .1; kill -9 $(exec sh -c 'echo $PPID')) & echo $! >$1", Report{Exited: true, Code: 137}},
		{"lives longer than the program", "(sleep .3; exit 5) & echo $! >$1", Report{Exited: true, Code: 5}},
		{"program fails", "exit 3", Report{Failed: 3}},
		{"program is killed", "kill -9 $$", Report{Failed: 137}},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := start(t, c.script, nil)
			if got.Exited != (got.PID > 1) {
				t.Errorf("report %+v", got)
			}
			got.PID = 0
			if got != c.want {
				t.Errorf("report %+v, want %+v", got, c.want)
			}
		})
	}
	for name, script := range map[string]string{"no pid file": "exit 0", "garbage": "echo x >$1", "not a child": "echo 2147483646 >$1"} {
		t.Run(name, func(t *testing.T) {
			if got := start(t, script, nil); got.Problem == "" || got.Exited {
				t.Errorf("report %+v", got)
			}
		})
	}
}

func TestReaperKills(t *testing.T) {
	mark := fmt.Sprint(100000 + os.Getpid())
	t.Run("the process and its session", func(t *testing.T) {
		got := start(t, "setsid sh -c 'sleep "+mark+" & sleep "+mark+"; true' & echo $! >$1; sleep .2; touch $2", syscall.SIGTERM)
		if got.Code != 137 && got.Failed != 137 { // the program may still run
			t.Errorf("report %+v", got)
		}
	})
	t.Run("the process of a program that still runs", func(t *testing.T) {
		if got := start(t, "setsid sh -c 'sleep "+mark+"; true' & touch $2; sleep 10", syscall.SIGTERM); got.Failed != 137 {
			t.Errorf("report %+v", got)
		}
	})
	t.Run("the program", func(t *testing.T) {
		if got := start(t, "touch $2; exec sleep "+mark, syscall.SIGTERM); got.Failed != 137 {
			t.Errorf("report %+v", got)
		}
	})
	t.Run("what a program that fails has started", func(t *testing.T) {
		if got := start(t, "setsid sleep "+mark+" & exit 4", nil); got.Failed != 4 {
			t.Errorf("report %+v", got)
		}
		if got := start(t, "setsid sleep "+mark+" & exit 0", nil); got.Problem == "" { // and does not say what
			t.Errorf("report %+v", got)
		}
	})
	left := func() (n int) {
		files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
		for _, f := range files {
			if b, _ := os.ReadFile(f); strings.HasPrefix(string(b), "sleep\x00"+mark) {
				n++
			}
		}
		return n
	}
	for end := time.Now().Add(testhost.Limit(5 * time.Second)); left() > 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d processes are left", left())
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("process 4711\nexit 0\n"))
	f.Add([]byte("program 1\nproblem x"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if r := Parse(b); r.PID < 0 || r.Code < 0 {
			t.Errorf("%+v", r)
		}
		if pid, err := ParsePID(b); err == nil && pid <= 1 {
			t.Errorf("pid %d", pid)
		}
	})
}
