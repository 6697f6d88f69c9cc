//go:build failpoint

package failpoint

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// Built tells whether this build has failpoints.
const Built = true

// Env names the two files: PLAN:PASSED. The plan is one line
//
//	NUMBER ACTION POINT
//
// that a test writes anew, with another number each time, and that each process
// follows once. Passed gets a line for each point that a process passes, and
// one with "!" before it where the plan was followed. Both are opened at once:
// the worker leaves the host's file systems.
const Env = "NARU_FAILPOINTS"

var (
	plan, passed = open()
	done         atomic.Int64 // number of the last plan that was followed
)

func open() (plan, passed *os.File) {
	a, b, ok := strings.Cut(os.Getenv(Env), ":")
	if !ok {
		return nil, nil
	}
	plan, err := os.Open(a)
	if err != nil {
		panic(err)
	}
	passed, err = os.OpenFile(b, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		panic(err)
	}
	return plan, passed
}

// Environ is what a child needs to be under the same test.
func Environ() []string {
	if v := os.Getenv(Env); v != "" {
		return []string{Env + "=" + v}
	}
	return nil
}

// read returns the plan.
func read() (number int64, action, point string) {
	b := make([]byte, 512)
	n, _ := plan.ReadAt(b, 0)
	line, _, whole := strings.Cut(string(b[:n]), "\n")
	if f := strings.SplitN(line, " ", 3); whole && len(f) == 3 {
		number, _ = strconv.ParseInt(f[0], 10, 64)
		action, point = f[1], f[2]
	}
	return number, action, point
}

// Hit passes the point "area of: step". The error is the test's.
func Hit(area, of, step string) error {
	if plan == nil {
		return nil
	}
	if strings.HasPrefix(of, "/") { // a file: what matters is the folder
		of = filepath.Base(filepath.Dir(of))
	}
	point := area + " " + of + ": " + step
	number, action, want := read()
	if want != point || done.Swap(number) == number {
		_, _ = fmt.Fprintf(passed, "%s\n", point)
		return nil
	}
	_, _ = fmt.Fprintf(passed, "!%s\n", point)
	switch action {
	case "error":
		return errors.New("a failpoint's error")
	case "panic":
		panic("a failpoint's panic")
	case "delay":
		time.Sleep(300 * time.Millisecond)
	case "hold":
		for n := number; n == number; n, _, _ = read() {
			time.Sleep(time.Millisecond)
		}
	}
	return nil
}
