package native

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/naru-project/naru/internal/errs"
)

// A program of the host runs with the host's files, no environment but PATH,
// nothing inherited, and all that the worker may do.
func TestRunProgram(t *testing.T) {
	r := newRing(t)
	file := filepath.Join(t.TempDir(), "out")
	sh := func(script string) []string { return []string{"/bin/sh", "-c", script} }
	if err := r.runProgram(t.Context(), time.Second, sh("{ env; ls /proc/self/fd; grep CapEff: /proc/self/status; grep SigIgn: /proc/self/status; } >"+file)); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	status, _ := os.ReadFile("/proc/self/status")
	_, caps, _ := strings.Cut(string(status), "CapEff:")
	for _, want := range []string{"PATH=", "CapEff:" + strings.SplitN(caps, "\n", 2)[0], "SigIgn:\t0000000000000000"} {
		if !strings.Contains(string(b), want) {
			t.Errorf("no %q in\n%s", want, b)
		}
	}
	if strings.Contains(string(b), "HOME=") || strings.Contains(string(b), "\n4\n") {
		t.Errorf("inherited:\n%s", b)
	}
	if err := r.runProgram(t.Context(), time.Second, sh("exit 7")); err == nil || !strings.Contains(err.Error(), "status 7") {
		t.Errorf("exit 7: %v", err)
	}
	if err := r.runProgram(t.Context(), time.Second, sh("kill -9 $$")); err == nil || !strings.Contains(err.Error(), "signal 9") {
		t.Errorf("killed: %v", err)
	}
	if err := r.runProgram(t.Context(), time.Second, []string{"/no/program"}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("absent: %v", err)
	}
	for script, said := range map[string]bool{
		"trap 'echo term >" + file + "; exit' TERM; while :; do sleep 0.05; done": true,
		"trap '' TERM; echo $$ >" + file + "; while :; do sleep 0.05; done":       false,
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		began := time.Now()
		err := r.runProgram(ctx, time.Second, sh(script))
		cancel()
		b, _ := os.ReadFile(file)
		if !errs.Is(err, errs.DeadlineExceeded) || time.Since(began) > 5*time.Second || (string(b) == "term\n") != said {
			t.Errorf("%s: %v after %v; it said %q", script, err, time.Since(began), b)
		}
		if !said { // it was killed
			pid := strings.TrimSpace(string(b))
			for end := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
				if _, err := os.Stat("/proc/" + pid); err != nil {
					break
				}
				if time.Now().After(end) {
					t.Errorf("process %s lives", pid)
					break
				}
			}
		}
	}
}
