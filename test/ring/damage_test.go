package ring

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/internal/testhost"
)

// TestDamagedStarts starts the real daemon on folders in which records of pods,
// containers, specs and images were damaged while containers run: it serves
// each time, knows every record that was not damaged, and none of their
// containers has noticed. NARU_STARTS=200 (make crash) tries it more often.
func TestDamagedStarts(t *testing.T) {
	rounds, err := strconv.Atoi(os.Getenv("NARU_STARTS"))
	if err != nil {
		rounds = 3
	}
	n := StartNode(t)
	d := &damagedNode{t: t, n: n, rnd: rand.New(rand.NewPCG(crashSeed(t), 9)), did: map[string]int{}}
	began := time.Now()
	for d.round = range rounds {
		d.fill()
		n.KillDaemon()
		hurt := d.damage()
		n.StartDaemon()
		d.check(hurt)
		if t.Failed() {
			t.Fatalf("start %d, damage %q\n%s", d.round, d.all, tail(n.Dir+"/naru.log", 6000))
		}
	}
	t.Logf("%d starts in %v, damage %v, %d containers kept", rounds, time.Since(began).Round(time.Millisecond), d.did, d.kept)
}

// damagedNode is a node of which some records are damaged again and again.
type damagedNode struct {
	t     *testing.T
	n     *Node
	rnd   *rand.Rand
	round int
	kept  int
	did   map[string]int
	all   []string // what was done in this round, for messages

	was      map[string]identity // by container
	pod      map[string]string   // of a container
	specless map[string]bool     // containers whose spec was damaged
}

// fill sees to three pods with two running containers each, and an image.
func (d *damagedNode) fill() {
	d.t.Helper()
	st, err := d.n.Images.ImageStatus(within(d.t, callTime), &criv1.ImageStatusRequest{Image: &criv1.ImageSpec{Image: Busybox}})
	if err != nil {
		d.t.Fatal(err)
	}
	if st.Image == nil {
		if err := d.n.LoadArchive(d.t, busyboxArchive()); err != nil {
			d.t.Fatal(err)
		}
	}
	if d.pod == nil {
		d.was, d.pod, d.specless = map[string]identity{}, map[string]string{}, map[string]bool{}
	}
	pods := map[string]bool{}
	for _, p := range d.pod {
		pods[p] = true
	}
	for i := len(pods); i < 3; i++ {
		p := d.n.Pod(d.t, func(c *criv1.PodSandboxConfig) {
			c.Metadata.Name = fmt.Sprintf("damaged-%d-%d", d.round, i)
			c.Metadata.Uid = c.Metadata.Name
			c.Linux.CgroupParent = d.n.Parent + "/" + c.Metadata.Name
		})
		for range 2 {
			id := d.n.Run(d.t, p, shell("while :; do sleep 1; done"))
			d.pod[id], d.was[id] = p, identityOf(d.n.PID(d.t, id))
		}
	}
}

// damage does something to one to three files and returns the pods and
// containers whose records are no longer whole.
func (d *damagedNode) damage() (hurt map[string]bool) {
	d.t.Helper()
	hurt, d.all = map[string]bool{}, nil
	for range 1 + d.rnd.IntN(3) {
		dir := []string{
			d.n.Root + "/state/pods", d.n.Root + "/state/containers", d.n.RunDir + "/state/specs", d.n.Root + "/images/images", d.n.Root + "/images/holds",
		}[d.rnd.IntN(5)]
		files, _ := filepath.Glob(dir + "/*.json")
		files = slices.DeleteFunc(files, func(f string) bool { st, err := os.Lstat(f); return err != nil || !st.Mode().IsRegular() })
		if len(files) == 0 {
			continue
		}
		path := files[d.rnd.IntN(len(files))]
		name, do := "a stray", func() error { return testhost.Stray(d.rnd, path) }
		if d.rnd.IntN(5) > 0 {
			x := testhost.Damages[d.rnd.IntN(len(testhost.Damages))]
			name, do = x.Name, func() error { return x.Do(d.rnd, path, files) }
			id := strings.TrimSuffix(filepath.Base(path), ".json")
			switch filepath.Base(dir) {
			case "pods", "containers":
				hurt[id] = true
			case "specs": // it runs on, but an exec would not know as whom
				d.specless[id] = true
			}
		}
		d.did[name]++
		d.all = append(d.all, name+": "+strings.TrimPrefix(path, d.n.Dir))
		if err := do(); err != nil {
			d.t.Fatal(err)
		}
	}
	return hurt
}

// check looks at what is whole, then removes what is not and every pod that lost
// something.
func (d *damagedNode) check(hurt map[string]bool) {
	d.t.Helper()
	m := d.n.remember(d.t)
	lost := map[string]bool{}
	for id, p := range d.pod {
		if hurt[id] || hurt[p] {
			lost[p] = true
			continue
		}
		d.kept++
		c := m.containers[id]
		if c == nil || c.State != criv1.ContainerState_CONTAINER_RUNNING || identityOf(d.was[id].pid) != d.was[id] {
			d.t.Errorf("container %s, whose records are whole, is %v; its process was %v, is %v", id, c, d.was[id], identityOf(d.was[id].pid))
		} else if out, err := d.n.ExecErr(d.t, id, "echo", "here"); string(out.GetStdout()) != "here\n" && !d.specless[id] {
			d.t.Errorf("an exec in it: %v, %v", out, err)
		}
		if s := m.pods[p]; s == nil || s.State != criv1.PodSandboxState_SANDBOX_READY {
			d.t.Errorf("pod %s, whose record is whole, is %v", p, s)
		}
	}
	for id := range m.pods {
		if lost[id] || !slices.Contains(mapsValues(d.pod), id) {
			d.n.RemovePod(d.t, id)
		}
	}
	for id, p := range d.pod {
		if lost[p] {
			delete(d.pod, id)
			delete(d.was, id)
		}
	}
	var left []string
	if !d.n.soon(func() bool { left = d.n.ownerless(d.t); return len(left) == 0 }) {
		d.t.Errorf("nobody owns %q", left)
	}
}
