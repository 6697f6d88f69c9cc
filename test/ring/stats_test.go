package ring

import (
	"io/fs"
	"maps"
	"math"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/reflect/protoreflect"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/internal/testhost"
)

// usageFigures are the amounts that the stats of containers and of pods have in
// common, beside what the kernel says of them.
func usageFigures() map[string]func(*kernel) float64 {
	// rest is what is left of a limit; without one there is no such field.
	rest := func(limit, used func(*kernel) float64) func(*kernel) float64 {
		return func(k *kernel) float64 {
			if l := limit(k); l > 0 {
				return l - used(k)
			}
			return math.NaN()
		}
	}
	usage := func(k *kernel) float64 { return k.number("memory", "memory.usage_in_bytes", "memory.current") }
	workingSet := func(k *kernel) float64 { return usage(k) - k.memory("total_inactive_file", "inactive_file") }
	all := map[string]func(*kernel) float64{
		"cpu.usage_core_nano_seconds": func(k *kernel) float64 {
			if k.v2 {
				return k.line("", "", "", "cpu.stat", "usage_usec") * 1e3
			}
			return k.number("cpuacct", "cpuacct.usage", "")
		},
		"memory.usage_bytes":       usage,
		"memory.working_set_bytes": workingSet,
		"memory.available_bytes": rest(func(k *kernel) float64 { return k.number("memory", "memory.limit_in_bytes", "memory.max") },
			workingSet),
		"memory.rss_bytes":         func(k *kernel) float64 { return k.memory("total_rss", "anon") },
		"memory.page_faults":       func(k *kernel) float64 { return k.memory("total_pgfault", "pgfault") },
		"memory.major_page_faults": func(k *kernel) float64 { return k.memory("total_pgmajfault", "pgmajfault") },
	}
	for _, what := range []string{"cpu", "memory", "io"} {
		for field, kind := range map[string]string{"Full": "full", "Some": "some"} {
			path := what + ".psi." + field + "."
			all[path+"Total"] = func(k *kernel) float64 { return k.pressure(what, kind, "total") * 1e3 } // µs
			for _, w := range []string{"10", "60", "300"} {
				all[path+"Avg"+w] = func(k *kernel) float64 { return k.pressure(what, kind, "avg"+w) }
			}
		}
	}
	return all
}

// containerFigures are those of a container.
func containerFigures() map[string]func(*kernel) float64 {
	all := usageFigures()
	swap := func(k *kernel) float64 {
		if k.v2 {
			return k.number("", "", "memory.swap.current")
		}
		return k.memory("total_swap", "")
	}
	all["swap.swap_usage_bytes"] = func(k *kernel) float64 { return max(0, swap(k)) }
	all["swap.swap_available_bytes"] = func(k *kernel) float64 {
		if k.v2 {
			return k.number("", "", "memory.swap.max") - swap(k)
		}
		return k.number("memory", "memory.memsw.limit_in_bytes", "") - k.number("memory", "memory.limit_in_bytes", "") - swap(k)
	}
	all["writable_layer.used_bytes"] = (*kernel).written
	all["writable_layer.inodes_used"] = (*kernel).inodes
	return all
}

// podFigures are those of a pod whose cgroup holds the kernel's container alone.
func podFigures() map[string]func(*kernel) float64 {
	all := map[string]func(*kernel) float64{"linux.process.process_count": func(k *kernel) float64 {
		return k.parent().number("pids", "pids.current", "pids.current")
	}}
	for path, of := range usageFigures() {
		all["linux."+path] = func(k *kernel) float64 { return of(k.parent()) }
	}
	for path, of := range containerFigures() {
		all["linux.containers."+path] = of
	}
	for i, field := range []string{"rx_bytes", "", "rx_errors", "", "", "", "", "", "tx_bytes", "", "tx_errors"} { // of /proc/net/dev
		if field != "" {
			all["linux.network.default_interface."+field] = func(k *kernel) float64 { return k.link(i) }
		}
	}
	return all
}

// parent is the cgroup above, the pod's.
func (k *kernel) parent() *kernel {
	p := *k
	p.groups = map[string]string{}
	for name, dir := range k.groups {
		p.groups[name] = filepath.Dir(dir)
	}
	return &p
}

// inodes are those of the container's writable folder.
func (k *kernel) inodes() float64 {
	seen := map[uint64]bool{}
	_ = filepath.WalkDir(k.upper, func(_ string, d fs.DirEntry, err error) error {
		if err == nil {
			if i, err := d.Info(); err == nil {
				seen[i.Sys().(*syscall.Stat_t).Ino] = true
			}
		}
		return nil
	})
	return float64(len(seen))
}

// unmoved are fields that no load of this test moves: a veth has no errors.
func unmoved(path string) bool {
	return strings.HasSuffix(path, "_errors") || strings.HasSuffix(path, "swap_usage_bytes") && !hasSwap()
}

// amounts lists the numbers of a message by their path, those that are not set
// as NaN. Elements of lists have the path of the list.
func amounts(m protoreflect.Message, prefix string, into map[string]float64) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		fd := fields.Get(i)
		path, v := prefix+string(fd.Name()), m.Get(fd)
		switch {
		case fd.Name() == "windows" || fd.Name() == "attributes" || fd.IsMap():
		case fd.IsList():
			for j := range v.List().Len() {
				amounts(v.List().Get(j).Message(), path+".", into)
			}
		case fd.Kind() == protoreflect.MessageKind && fd.Message().Name() == "UInt64Value":
			into[path] = math.NaN()
			if m.Has(fd) {
				into[path] = float64(v.Message().Interface().(*criv1.UInt64Value).Value)
			}
		case fd.Kind() == protoreflect.MessageKind:
			amounts(v.Message(), path+".", into)
		case fd.Kind() == protoreflect.StringKind:
		case !m.IsValid(): // of a message that is not set
			into[path] = math.NaN()
		case fd.Kind() == protoreflect.DoubleKind:
			into[path] = v.Float()
		case fd.Kind() == protoreflect.Uint64Kind:
			into[path] = float64(v.Uint())
		default:
			into[path] = float64(v.Int())
		}
	}
}

// statsWatch compares the stats of one pod and its one container with the kernel's
// files, and remembers which fields have moved.
type statsWatch struct {
	n       *Node
	pod, id string
	k       *kernel
	first   map[string]float64
	moved   map[string]bool
}

func (n *Node) watchStats(t testing.TB, pod, id string, k *kernel) *statsWatch {
	t.Helper()
	w := &statsWatch{n: n, pod: pod, id: id, k: k, moved: map[string]bool{}}
	w.first = w.look(t)
	return w
}

// look reads both messages: one map, since their paths differ.
func (w *statsWatch) look(t testing.TB) map[string]float64 {
	t.Helper()
	out := map[string]float64{}
	c, err := w.n.Runtime.ContainerStats(within(t, callTime), &criv1.ContainerStatsRequest{ContainerId: w.id})
	if err != nil {
		t.Fatal(err)
	}
	p, err := w.n.Runtime.PodSandboxStats(within(t, callTime), &criv1.PodSandboxStatsRequest{PodSandboxId: w.pod})
	if err != nil {
		t.Fatal(err)
	}
	if len(p.Stats.Linux.Containers) != 1 || p.Stats.Linux.Network.GetDefaultInterface().GetName() != "eth0" {
		t.Fatalf("%d containers, network %v", len(p.Stats.Linux.Containers), p.Stats.Linux.Network)
	}
	amounts(c.Stats.ProtoReflect(), "", out)
	amounts(p.Stats.ProtoReflect(), "", out)
	for path, v := range out {
		if w.first != nil && v != w.first[path] {
			w.moved[path] = true
		}
	}
	return out
}

// fresh waits until no kept sample is young enough to be given out again.
func (w *statsWatch) fresh() { time.Sleep(1100 * time.Millisecond) }

// check: every amount is what the kernel says, and has moved.
func (w *statsWatch) check(t *testing.T) {
	t.Helper()
	all := containerFigures()
	maps.Copy(all, podFigures())
	read := func() map[string]float64 {
		out := map[string]float64{}
		for path, of := range all {
			out[path] = of(w.k)
		}
		return out
	}
	w.fresh()
	before := read()
	got := w.look(t)
	now := time.Now()
	after := read()
	for _, path := range slices.Sorted(maps.Keys(got)) {
		v, b, a := got[path], before[path], after[path]
		_, known := all[path]
		switch {
		case strings.HasSuffix(path, "timestamp"):
			limit := testhost.Limit(5 * time.Second)
			if strings.Contains(path, "writable_layer") { // counted rarely
				limit = 90 * time.Second
			}
			if age := now.Sub(time.Unix(0, int64(v))); age < 0 || age > limit {
				t.Errorf("%s is %v old", path, age)
			}
		case strings.HasSuffix(path, "usage_nano_cores"): // see checkRates
		case !known:
			t.Errorf("%s is %v, and nothing here says what it should be", path, v)
		case math.IsNaN(v) || math.IsNaN(b) || math.IsNaN(a):
			if !math.IsNaN(v) || !math.IsNaN(b) {
				t.Errorf("%s is %v, the kernel says %v", path, v, b)
			}
		case !(figure{}).agrees(v, b, a):
			t.Errorf("%s is %v, the kernel says %v and then %v", path, v, b, a)
		case !unmoved(path) && !w.moved[path]:
			t.Errorf("%s was and is %v: the load did not move it", path, v)
		default:
			t.Logf("%s: %v, then %v; the kernel: %v", path, w.first[path], v, a)
		}
	}
	for path := range all {
		if _, ok := got[path]; !ok {
			t.Errorf("no %s in the stats", path)
		}
	}
}

// checkRates: the rate of the processor's use is that between the two samples.
func (w *statsWatch) checkRates(t *testing.T) {
	t.Helper()
	type reading struct{ lo, value, hi map[string]float64 }
	used := map[string]func(*kernel) float64{}
	for path, of := range containerFigures() {
		if strings.HasSuffix(path, "cpu.usage_core_nano_seconds") {
			used[path] = of
		}
	}
	for path, of := range podFigures() {
		if strings.HasSuffix(path, "cpu.usage_core_nano_seconds") {
			used[path] = of
		}
	}
	read := func() (r reading) {
		w.fresh()
		r.lo, r.hi = map[string]float64{}, map[string]float64{}
		for path, of := range used {
			r.lo[path] = of(w.k)
		}
		r.value = w.look(t)
		for path, of := range used {
			r.hi[path] = of(w.k)
		}
		return r
	}
	a, b := read(), read()
	for path := range used {
		prefix := strings.TrimSuffix(path, "usage_core_nano_seconds")
		took := (b.value[prefix+"timestamp"] - a.value[prefix+"timestamp"]) / 1e9
		got := b.value[prefix+"usage_nano_cores"]
		if lo, hi := (b.lo[path]-a.hi[path])/took*0.99, (b.hi[path]-a.lo[path])/took*1.01; got < lo || got > hi || got == 0 {
			t.Errorf("%susage_nano_cores is %v, the kernel says %v to %v", prefix, got, lo, hi)
		}
	}
}
