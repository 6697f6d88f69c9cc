package pod

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// ProcessState is what the kernel says of a process.
type ProcessState struct {
	State     string // of proc_pid_stat(5): R, S, D, Z, T, …
	StartTime uint64 // clock ticks since boot
	Wchan     string // kernel function it sleeps in, if the kernel tells
}

// Host is what the manager asks the machine itself.
type Host interface {
	// BootID tells one boot of the machine from another.
	BootID() (string, error)
	// Process looks a process up; ok is false when there is none of that pid.
	Process(pid int) (s ProcessState, ok bool)
	// Stat follows links and reports whether the path exists. On a dead
	// network file system it may never return.
	Stat(path string) error
}

// osHost is the real one.
type osHost struct{}

func (osHost) BootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read boot id: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

func (osHost) Process(pid int) (ProcessState, bool) {
	dir := "/proc/" + strconv.Itoa(pid)
	b, err := os.ReadFile(dir + "/stat")
	if err != nil {
		return ProcessState{}, false
	}
	s, err := parseStat(b)
	if err != nil {
		return ProcessState{}, false
	}
	if w, err := os.ReadFile(dir + "/wchan"); err == nil && !bytes.Equal(w, []byte("0")) {
		s.Wchan = string(w)
	}
	return s, true
}

func (osHost) Stat(path string) error {
	_, err := os.Stat(path)
	return err
}

// parseStat reads /proc/PID/stat. The second field is the program's name in
// parentheses and may hold anything, parentheses too: count from the last one.
func parseStat(b []byte) (ProcessState, error) {
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return ProcessState{}, errors.New("no name in stat")
	}
	f := bytes.Fields(b[i+1:])
	const stateAt, startAt = 0, 19 // fields 3 and 22 of the file
	if len(f) <= startAt || len(f[stateAt]) != 1 {
		return ProcessState{}, errors.New("stat is too short")
	}
	start, err := strconv.ParseUint(string(f[startAt]), 10, 64)
	if err != nil {
		return ProcessState{}, err
	}
	return ProcessState{State: string(f[stateAt]), StartTime: start}, nil
}
