package main

import (
	"bytes"
	"strings"
	"testing"
)

func TestReport(t *testing.T) {
	f := func(v float64) *float64 { return &v }
	r := &Report{
		Host:     map[string]any{"cpus": 2, "kernel": "6", "cgroup": "v1"},
		Runtimes: []Target{{Name: "old", Software: "a 1"}, {Name: "new", Software: "b 2"}},
		Compared: []ComparedMetric{
			{Measure: "pod", Metric: "RunPodSandbox p50", Unit: "ms", Medians: []*float64{f(150), f(5)}, Ratios: []*Ratio{{Median: 1. / 30, Min: 1. / 40, Max: 1. / 20}}},
			{Measure: "pod", Metric: "CreateContainer p50", Unit: "ms", Medians: []*float64{f(10), f(9)}, Ratios: []*Ratio{{Median: .9, Min: .8, Max: 1}}},
			{Measure: "list", Metric: "ListContainers p50", Unit: "ms", Medians: []*float64{f(1), f(3.5)}, Ratios: []*Ratio{{Median: 3.5, Min: 3, Max: 4}}},
			{Measure: "log", Metric: "log-rate p50", Unit: "MB/s", Medians: []*float64{f(20), f(300)}, Ratios: []*Ratio{{Median: 15, Min: 14, Max: 16}}},
			{Measure: "pod", Metric: "first-output p50", Unit: "ms", Medians: []*float64{nil, f(1)}, Ratios: []*Ratio{nil}},
		},
	}
	var b bytes.Buffer
	missed := writeReport(&b, r, false)
	if want := len(targets) - 2; missed != want { // two of the four were met, the rest is not there
		t.Errorf("%d missed, want %d", missed, want)
	}
	for _, want := range []string{
		"| pod | RunPodSandbox p50 | ms | 150 | 5 | 1/30.0 (1/20.0–1/40.0) | ≤ 1/15: met |",
		"| 10 | 9 | 1/1.1 (1/1.0–1/1.2) | ≤ 1/3: **missed** |",
		"| 1 | 3.500 | 3.50 (3.00–4.00) | ≤ 3 ms: **missed** |",
		"| 20 | 300 | 15.00 (14.00–16.00) | ≥ 10 ×: met |",
		"density pss/pod",
	} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %q in\n%s", want, b.String())
		}
	}
	if strings.Contains(b.String(), "first-output") {
		t.Error("a metric without target is shown")
	}
	b.Reset()
	if writeReport(&b, r, true); !strings.Contains(b.String(), "| pod | first-output p50 | ms | n/a | 1 | n/a |  |") {
		t.Errorf("--all does not show the rest:\n%s", b.String())
	}
}
