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

	"github.com/naru-project/naru/internal/testhost"
	"github.com/naru-project/naru/pod"
)

// TestDamagedStateFolders opens state folders in which records were damaged in
// every way, thousands of times with NARU_STORE: each start serves, and every
// container whose record and whose pod's record are whole runs on.
func TestDamagedStateFolders(t *testing.T) {
	rounds, err := strconv.Atoi(os.Getenv("NARU_STORE"))
	if err != nil {
		rounds = 150
	}
	if err != nil && testing.Short() {
		rounds = 15
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
			r.ok(testhost.Stray(rnd, path))
			continue
		}
		d := testhost.Damages[rnd.IntN(len(testhost.Damages))]
		did[d.Name]++
		all = append(all, d.Name+": "+path)
		r.ok(d.Do(rnd, path, others))
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
