package pod_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/naru-project/naru/pod"
)

// damages are what a disk, a power loss or a person does to a file.
var damages = []struct {
	name string
	do   func(rnd *rand.Rand, path string, others []string) error
}{
	{"random bytes", func(rnd *rand.Rand, path string, _ []string) error {
		b := make([]byte, rnd.IntN(2000))
		for i := range b {
			b[i] = byte(rnd.Uint32())
		}
		return os.WriteFile(path, b, 0o600)
	}},
	{"zeros", func(_ *rand.Rand, path string, _ []string) error {
		st, err := os.Stat(path)
		if err != nil {
			return err
		}
		return os.WriteFile(path, make([]byte, st.Size()), 0o600)
	}},
	{"truncated", func(rnd *rand.Rand, path string, _ []string) error {
		st, err := os.Stat(path)
		if err != nil {
			return err
		}
		return os.Truncate(path, rnd.Int64N(st.Size()))
	}},
	{"a bit flipped", func(rnd *rand.Rand, path string, _ []string) error {
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		b[rnd.IntN(len(b))] ^= 1 << rnd.IntN(8)
		return os.WriteFile(path, b, 0o600)
	}},
	{"missing", func(_ *rand.Rand, path string, _ []string) error { return os.Remove(path) }},
	{"another's content", func(rnd *rand.Rand, path string, others []string) error {
		b, err := os.ReadFile(others[rnd.IntN(len(others))])
		if err != nil {
			return err
		}
		return os.WriteFile(path, b, 0o600)
	}},
	{"a folder", func(_ *rand.Rand, path string, _ []string) error {
		if err := os.Remove(path); err != nil {
			return err
		}
		return os.MkdirAll(filepath.Join(path, "in", "it"), 0o700)
	}},
	{"a link", func(_ *rand.Rand, path string, others []string) error {
		if err := os.Remove(path); err != nil {
			return err
		}
		return os.Symlink(others[0], path)
	}},
}

// strays are files that belong to no record. They harm none.
func strays(rnd *rand.Rand, path string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	dir := filepath.Dir(path)
	name := []string{
		fmt.Sprintf("%064x.json", rnd.Uint64()), "README", ".tmp-1-1", filepath.Base(path) + "~", strings.Repeat("A", 64) + ".json", "x.json",
	}[rnd.IntN(6)]
	return os.WriteFile(filepath.Join(dir, name), b, 0o600)
}

// TestDamagedStateFolders opens state folders in which records were damaged in
// every way, thousands of times with NARU_STORE: each start serves, and every
// container whose record and whose pod's record are whole runs on.
func TestDamagedStateFolders(t *testing.T) {
	rounds, err := strconv.Atoi(os.Getenv("NARU_STORE"))
	if err != nil {
		rounds = 150
	}
	seed := uint64(time.Now().UnixNano())
	if s, err := strconv.ParseUint(os.Getenv("NARU_SEED"), 10, 64); err == nil {
		seed = s
	}
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 6))
	did, kept := map[string]int{}, 0
	for range rounds {
		synctest.Test(t, func(t *testing.T) {
			kept += damagedRound(t, rnd, did) // ends the whole test where it fails
		})
	}
	t.Logf("%d folders, damage %v, %d containers kept", rounds, did, kept)
}

func damagedRound(t *testing.T, rnd *rand.Rand, did map[string]int) (kept int) {
	r := newRig(t, func(c *pod.Config) { c.KillWait = time.Second })
	defer func() { r.stop() }()
	podOf := map[string]string{}
	for i := range 2 + rnd.IntN(2) {
		p := r.pod(fmt.Sprint("pod", i))
		for j := range 1 + rnd.IntN(2) {
			podOf[r.running(p, fmt.Sprint("c", j))] = p
		}
	}
	r.stop()
	hurt, all := map[string]bool{}, []string{} // ids; what was done, for messages
	defer func() {
		if t.Failed() {
			t.Logf("damage %q, report %+v", all, r.last)
		}
	}()
	for range 1 + rnd.IntN(3) {
		kind := []string{"pods", "containers", "specs"}[rnd.IntN(3)]
		files, _ := filepath.Glob(filepath.Join(r.dir, kind, "*.json"))
		files = slices.DeleteFunc(files, func(f string) bool { st, err := os.Lstat(f); return err != nil || !st.Mode().IsRegular() })
		if len(files) < 2 {
			continue
		}
		i := rnd.IntN(len(files))
		path, others := files[i], slices.Delete(slices.Clone(files), i, i+1)
		if rnd.IntN(5) == 0 {
			did["a stray file"]++
			all = append(all, "a stray beside "+path)
			r.ok(strays(rnd, path))
			continue
		}
		d := damages[rnd.IntN(len(damages))]
		did[d.name]++
		all = append(all, d.name+": "+path)
		r.ok(d.do(rnd, path, others))
		if kind != "specs" { // a container runs without its spec's file
			hurt[strings.TrimSuffix(filepath.Base(path), ".json")] = true
		}
	}
	if rnd.IntN(4) == 0 {
		did["the format file"]++
		r.ok(os.WriteFile(filepath.Join(r.dir, "format"), []byte("{"), 0o600))
	}
	r.boot()
	for c, p := range podOf {
		if hurt[c] || hurt[p] {
			continue
		}
		kept++
		if s := r.container(c); s.State != pod.StateRunning || r.w.Process(c) == nil || r.w.Process(c).Exit != nil {
			t.Errorf("a container with a whole record is %s", s.Phase)
		}
		if !r.sandbox(p).Ready() {
			t.Error("a pod with a whole record is not ready")
		}
	}
	time.Sleep(5 * time.Minute) // the reaper
	r.removePod(r.pod("new"))
	r.owned()
	for _, p := range r.m.Sandboxes(pod.Filter{}) {
		r.removePod(p.ID)
	}
	r.empty()
	return kept
}
