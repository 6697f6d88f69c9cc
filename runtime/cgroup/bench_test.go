package cgroup

import (
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/naru-project/naru/runtime"
)

// BenchmarkCreate is the daemon's share of a container's cgroups on this host:
// make, limit and open; the removal is not counted.
func BenchmarkCreate(b *testing.B) {
	d, parent := hostDriver(b)
	if err := d.EnsurePod(bg, parent); err != nil {
		b.Fatal(err)
	}
	path := mustPath(b, d, parent, strings.Repeat("ab", 32))
	rules := []specs.LinuxDeviceCgroup{{Access: "rwm"}, dev(true, "c", -1, -1, "m"), dev(true, "b", -1, -1, "m")}
	for _, minor := range []int64{3, 5, 7, 8, 9} {
		rules = append(rules, dev(true, "c", 1, minor, "rwm"))
	}
	rules = append(rules, dev(true, "c", 5, 0, "rwm"), dev(true, "c", 5, 2, "rwm"), dev(true, "c", 136, -1, "rwm"))
	r := runtime.Resources{CPUPeriod: 100000, CPUQuota: 50000, CPUShares: 512, Memory: 128 << 20}
	if d.mode == ModeV2 {
		r.Unified = map[string]string{"memory.high": "max"}
	}
	b.ReportAllocs()
	for b.Loop() {
		g, err := d.Create(bg, path, r, rules, Options{})
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := g.Remove(bg); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}

// BenchmarkCreateFiltered is Create in a version 2 tree, with the BPF program.
func BenchmarkCreateFiltered(b *testing.B) {
	d := unifiedDriver(b)
	rules := []specs.LinuxDeviceCgroup{{Access: "rwm"}}
	for i := range int64(12) {
		rules = append(rules, dev(true, "c", 1, i, "rwm"))
	}
	for b.Loop() {
		g, err := d.Create(bg, "/pod/c1", runtime.Resources{}, rules, Options{})
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := g.Remove(bg); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}

func BenchmarkRemove(b *testing.B) {
	d, parent := hostDriver(b)
	if err := d.EnsurePod(bg, parent); err != nil {
		b.Fatal(err)
	}
	path := mustPath(b, d, parent, strings.Repeat("ab", 32))
	for b.Loop() {
		b.StopTimer()
		g, err := d.Create(bg, path, runtime.Resources{}, nil, Options{})
		if err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
		if err := g.Remove(bg); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkNewExec(b *testing.B) {
	d, parent := hostDriver(b)
	g := create(b, d, parent, "c1", runtime.Resources{})
	for b.Loop() {
		e, err := g.NewExec(bg)
		if err != nil {
			b.Fatal(err)
		}
		if err := e.Remove(bg); err != nil {
			b.Fatal(err)
		}
	}
}
