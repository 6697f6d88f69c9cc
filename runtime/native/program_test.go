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
	"github.com/naru-project/naru/internal/program"
	"github.com/naru-project/naru/internal/testhost"
)

// A program of the host runs with the host's files, no environment but PATH,
// nothing inherited, and all that the worker may do.
func TestRunProgram(t *testing.T) {
	r := newRing(t)
	file := filepath.Join(t.TempDir(), "out")
	sh := func(script string) []string { return []string{"/bin/sh", "-c", script} }
	if err := r.RunTool(t.Context(), time.Second, Tool{Args: sh("{ env; ls /proc/self/fd; grep CapEff: /proc/self/status; grep SigIgn: /proc/self/status; } >" + file), Umask: 0o077}); err != nil {
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
	if err := r.RunTool(t.Context(), time.Second, Tool{Args: sh("exit 7"), Umask: 0o077}); err == nil || !strings.Contains(err.Error(), "status 7") {
		t.Errorf("exit 7: %v", err)
	}
	if err := r.RunTool(t.Context(), time.Second, Tool{Args: sh("kill -9 $$"), Umask: 0o077}); err == nil || !strings.Contains(err.Error(), "signal 9") {
		t.Errorf("killed: %v", err)
	}
	if err := r.RunTool(t.Context(), time.Second, Tool{Args: []string{"/no/program"}, Umask: 0o077}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("absent: %v", err)
	}
	for script, said := range map[string]bool{
		"trap 'echo term >" + file + "; exit' TERM; while :; do sleep 0.05; done": true,
		"trap '' TERM; echo $$ >" + file + "; while :; do sleep 0.05; done":       false,
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		began := time.Now()
		err := r.RunTool(ctx, time.Second, Tool{Args: sh(script), Umask: 0o077})
		cancel()
		b, _ := os.ReadFile(file)
		if !errs.Is(err, errs.DeadlineExceeded) || time.Since(began) > testhost.Limit(5*time.Second) || (string(b) == "term\n") != said {
			t.Errorf("%s: %v after %v; it said %q", script, err, time.Since(began), b)
		}
		if !said { // it was killed
			awaitGone(t, strings.TrimSpace(string(b)))
		}
	}
}

// What a tool has started ends with it when its time is over, whether the tool
// itself heeds SIGTERM or not.
func TestRunToolEndsItsChildren(t *testing.T) {
	r := newRing(t)
	file := filepath.Join(t.TempDir(), "pid")
	for _, script := range []string{"", "trap '' TERM; "} {
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		err := r.RunTool(ctx, 100*time.Millisecond, Tool{Args: []string{"/bin/sh", "-c", script + "sleep 3210 & echo $! >" + file + "; wait; wait"}, Umask: 0o077})
		cancel()
		if !errs.Is(err, errs.DeadlineExceeded) {
			t.Errorf("%q: %v", script, err)
		}
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		awaitGone(t, strings.TrimSpace(string(b)))
	}
}

func awaitGone(t *testing.T, pid string) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat("/proc/" + pid); err != nil {
			return
		}
		if time.Now().After(end) {
			t.Errorf("process %s lives", pid)
			return
		}
	}
}

// RunProgram: what goes in and comes out, its limits, and that the whole
// process group ends with the program.
func TestRowW07RunProgram(t *testing.T) {
	r := newRing(t)
	t.Setenv("SECRET_TOKEN", "s3cret")
	dir := t.TempDir()
	run := func(limit time.Duration, script string) (program.Result, error) {
		file := filepath.Join(dir, "program")
		if err := os.WriteFile(file, []byte("#!/bin/sh\n"+script), 0o755); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeoutCause(t.Context(), limit, errs.New(errs.DeadlineExceeded, "too late"))
		defer cancel()
		return r.RunProgram(ctx, program.Request{Path: file, Env: []string{"A=b", "PATH=/usr/bin:/bin"}, Stdin: []byte("in"), MaxOutput: 1 << 16})
	}
	got, err := run(10*time.Second, "cat; env; ls /proc/self/fd; cat /proc/self/oom_score_adj; readlink /proc/self/ns/net /proc/self/ns/mnt; umask; echo no >&2; exit 7")
	if err != nil || got.Status != 7 || string(got.Stderr) != "no\n" {
		t.Errorf("%+v, %v", got, err)
	}
	net, _ := os.Readlink("/proc/self/ns/net")
	mnt, _ := os.Readlink("/proc/self/ns/mnt")
	for _, want := range []string{"inA=b", net, mnt, "0022", "\n0\n"} {
		if !strings.Contains(string(got.Stdout), want) {
			t.Errorf("no %q in %s", want, got.Stdout)
		}
	}
	if strings.Contains(string(got.Stdout), "s3cret") || strings.Contains(string(got.Stdout), "\n4\n") {
		t.Errorf("inherited: %s", got.Stdout)
	}
	if got, err := run(10*time.Second, "kill -9 $$"); err != nil || got.Signal != 9 {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := r.RunProgram(t.Context(), program.Request{Path: "/no/program"}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("absent: %v", err)
	}
	child := filepath.Join(dir, "child")
	dead := func(what string) {
		t.Helper()
		b, _ := os.ReadFile(child)
		pid := strings.TrimSpace(string(b))
		for end := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			b, err := os.ReadFile("/proc/" + pid + "/stat")
			if err != nil || strings.Contains(string(b), ") Z ") {
				return
			}
			if time.Now().After(end) {
				t.Errorf("%s: process %s lives", what, pid)
				return
			}
		}
	}
	began := time.Now()
	if _, err := run(500*time.Millisecond, "trap '' TERM\nsleep 60 &\necho $! >"+child+"\necho working >&2\nsleep 60"); !errs.Is(err, errs.DeadlineExceeded) || !strings.Contains(err.Error(), "too late") || !strings.Contains(err.Error(), "working") {
		t.Errorf("hangs: %v", err)
	}
	dead("hangs")
	if _, err := run(time.Minute, "sleep 60 & echo $! >"+child+"; cat /dev/zero"); !errs.Is(err, errs.ResourceExhausted) {
		t.Errorf("prints no end: %v", err)
	}
	dead("prints no end")
	if got, err := run(20*time.Second, "head -c 100000000 /dev/zero >&2; echo out"); err != nil || len(got.Stderr) > 4096 || string(got.Stdout) != "out\n" {
		t.Errorf("%d bytes of %v, %v", len(got.Stderr), got.Status, err)
	}
	// A child that was left behind and holds the output is not waited for, and
	// not ended either: some plugins leave a daemon.
	if got, err := run(time.Minute, "sleep 30 & echo $! >"+child+"; echo out"); err != nil || string(got.Stdout) != "out\n" {
		t.Errorf("%+v, %v", got, err)
	}
	if d := time.Since(began); d > testhost.Limit(20*time.Second) {
		t.Errorf("all that took %v", d)
	}
	if b, err := os.ReadFile(child); err == nil {
		_, _ = r.RunProgram(t.Context(), program.Request{Path: "/bin/sh", Stdin: []byte("kill " + string(b)), MaxOutput: 1})
	}
}
