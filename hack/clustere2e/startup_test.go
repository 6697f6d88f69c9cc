package main

import (
	"testing"
	"time"
)

const observed = `I1201 03:20:00.123456    7 pod_startup_latency_tracker.go:144] "Observed pod startup duration" pod="e2e/web-5d4f-x2x9z" podStartSLOduration=1.25 podStartE2EDuration="2.5s" totalImagesPullingTime="1.25s" isStatefulPod=false podCreationTimestamp="2026-12-01 03:20:00 +0000 UTC"`

func TestParseStartup(t *testing.T) {
	s, ok := parseStartup(observed)
	if want := (startup{"e2e/web-5d4f-x2x9z", 2500 * time.Millisecond, 1250 * time.Millisecond}); !ok || s != want {
		t.Errorf("%+v, %t, want %+v", s, ok, want)
	}
	if s, ok := parseStartup(`I1201 03:20:00.123456    7 kubelet.go:1] "SyncLoop ADD" pods=["e2e/web"]`); ok {
		t.Errorf("another line is %+v", s)
	}
}

func FuzzParseStartup(f *testing.F) {
	f.Add(observed)
	f.Add(`"Observed pod startup duration" pod="a" podStartSLOduration=1e300 podStartE2EDuration="x"`)
	f.Fuzz(func(t *testing.T, line string) {
		if s, ok := parseStartup(line); ok && s.pod == "" {
			t.Errorf("a start of nobody: %+v", s)
		}
	})
}

func TestPercentile(t *testing.T) {
	var sorted []time.Duration
	for i := range 100 {
		sorted = append(sorted, time.Duration(i+1))
	}
	for p, want := range map[int]time.Duration{50: 50, 90: 90, 99: 99, 100: 100} {
		if got := percentile(sorted, p); got != want {
			t.Errorf("p%d is %d, want %d", p, got, want)
		}
	}
	if got := percentile(sorted[:1], 50); got != 1 {
		t.Errorf("p50 of one is %d", got)
	}
}
