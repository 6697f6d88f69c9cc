package worker

import (
	"os"
	"strings"
	"testing"
)

func TestParseStatus(t *testing.T) {
	state, process, tracer := parseStatus([]byte("Name:\ta: b\nState:\tD (disk sleep)\nTgid:\t41\nTracerPid:\t42\n"))
	if state != "D (disk sleep)" || process != 41 || tracer != 42 {
		t.Errorf("%q %d %d", state, process, tracer)
	}
	if state, process, tracer := parseStatus(nil); state != "" || process != 0 || tracer != 0 {
		t.Errorf("%q %d %d", state, process, tracer)
	}
	if s := whatKeeps(os.Getpid()); !strings.Contains(s, " is in state ") {
		t.Errorf("of this process: %q", s)
	}
	if s := whatKeeps(1 << 30); !strings.Contains(s, "is gone by now") {
		t.Errorf("of none: %q", s)
	}
}

func FuzzParseStatus(f *testing.F) {
	f.Add([]byte("State:\tZ (zombie)\nTracerPid:\t1\n"))
	f.Fuzz(func(_ *testing.T, b []byte) { parseStatus(b) })
}
