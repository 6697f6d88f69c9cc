package ring

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/testhost"
)

// crimodel builds the reference model (hack/model), once.
var crimodel = sync.OnceValues(func() (string, error) {
	path := filepath.Join(workDir, "crimodel")
	cmd := exec.Command("go", "build", "-o", path, "github.com/naru-project/naru/hack/model")
	cmd.Dir, cmd.Env = "../../hack", append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("build the model: %w\n%s", err, out)
	}
	return path, err
})

// modelReport is what the model prints.
type modelReport struct {
	Pods, Containers, Lines, Exits, Cancelled, Duplicates int

	Unknown    int `json:"unknown_exits"`
	Failed     int `json:"failed_starts"`
	Calls      map[string]int
	Retried    map[string]int
	Violations []struct{ Rule, What string }
	More       int `json:"more_violations"`
	Took       string
}

// model starts the reference model on a node; wait ends with its report.
func (n *Node) model(t *testing.T, args ...string) (wait func() modelReport, p *process) {
	t.Helper()
	bin, err := crimodel()
	if err != nil {
		t.Fatal(err)
	}
	args = append([]string{
		bin, "--endpoint=" + n.Socket, "--image=" + Busybox, "--logs=" + n.LogDir, "--cgroup-parent=" + n.Parent + "/model",
		"--folders=" + n.RunDir + "," + n.Root, "--links=" + n.Links, "--cgroup=" + strings.TrimPrefix(n.Parent, "/"),
	}, args...)
	if _, err := exec.LookPath("nft"); err == nil {
		args = append(args, "--nft-table="+n.NftTable)
	}
	var out, errout bytes.Buffer
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = &out, &errout
	if p, err = spawn(cmd); err != nil {
		t.Fatal(err)
	}
	return func() (r modelReport) {
		t.Helper()
		<-p.done
		t.Logf("%s", bytes.TrimSpace(errout.Bytes()))
		if err := json.Unmarshal(out.Bytes(), &r); err != nil {
			t.Fatalf("the model ended with %v and says %q", p.err, out.Bytes())
		}
		for _, v := range r.Violations {
			t.Errorf("%s: %s", v.Rule, v.What)
		}
		if r.More > 0 {
			t.Errorf("and %d violations more", r.More)
		}
		return r
	}, p
}

// TestModel lets the reference model judge Naru: concurrent, cancelled and
// duplicate requests, and every answer held against what CRI says.
func TestModel(t *testing.T) {
	n := StartNode(t)
	wait, _ := n.model(t, "--duration="+testhost.Limit(time.Duration(scaled(4, 60))*time.Second).String(), fmt.Sprintf("--seed=%d", crashSeed(t)),
		fmt.Sprintf("--pids=%d,%d,%d", n.DaemonPID(), n.KeeperPID(), n.WorkerPID()))
	r := wait()
	t.Logf("%+v", r)
	if r.Pods < 10 || r.Exits == 0 || r.Lines == 0 || r.Duplicates == 0 || r.Cancelled == 0 {
		t.Error("that is too little to tell anything")
	}
}

// usage is what a process holds.
type usage struct{ fds, threads, anonKB int }

func usageOf(pid int) (u usage) {
	l, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	u.fds = len(l)
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	field := func(name string) (n int) {
		if m := regexp.MustCompile(name + `:\s+(\d+)`).FindSubmatch(b); m != nil {
			n, _ = strconv.Atoi(string(m[1]))
		}
		return n
	}
	u.threads, u.anonKB = field("Threads"), field("RssAnon")
	return u
}

// soak is what happens to the node while the model drives it.
type soak struct {
	t      *testing.T
	n      *Node
	rnd    *rand.Rand
	counts map[string]int
}

// fill takes all space of the node's file system for a moment.
func (s *soak) fill() {
	f, err := os.Create(s.n.Dir + "/small/filler")
	if err != nil {
		return // it is full just now
	}
	b := make([]byte, 1<<20)
	for err == nil {
		_, err = f.Write(b)
	}
	for b = b[:512]; errors.Is(err, unix.ENOSPC) && len(b) > 0; { // the last pages
		if _, err = f.Write(b); err != nil {
			break
		}
	}
	time.Sleep(time.Duration(100+s.rnd.IntN(400)) * time.Millisecond)
	_ = f.Close()
	if err := os.Remove(f.Name()); err != nil {
		s.t.Error(err)
	}
}

func (s *soak) breakOne() {
	n := s.n
	switch i := s.rnd.IntN(20); {
	case i < 8:
		s.counts["kill daemon"]++
		n.KillDaemon()
		n.LaunchDaemon()
	case i < 14:
		s.counts["kill worker"]++
		if info, err := n.info(); err == nil {
			killPID(info.WorkerPID)
		}
	case i < 16:
		s.counts["kill both"]++
		info, err := n.info()
		n.KillDaemon()
		if err == nil {
			killPID(info.WorkerPID)
		}
		n.LaunchDaemon()
	case i < 17:
		s.counts["kill keeper"]++
		n.KillKeeper()
		n.StartKeeper()
	case i < 18:
		s.counts["restart daemon"]++
		n.StopDaemon()
		n.LaunchDaemon()
	default:
		s.counts["disk full"]++
		s.fill()
	}
}

// TestSoak churns 20 pods under the model's eyes on a small disk while daemon,
// worker and keeper are killed and the disk fills up. NARU_SOAK says how long
// (make soak).
func TestSoak(t *testing.T) {
	d, err := time.ParseDuration(os.Getenv("NARU_SOAK"))
	if err != nil {
		d = 5 * time.Second
	}
	seed := crashSeed(t)
	n := StartNode(t, WithSmallRoot("256m"))
	s := &soak{t: t, n: n, rnd: rand.New(rand.NewPCG(seed, 5)), counts: map[string]int{}}
	keeper, worker, daemon := usageOf(n.KeeperPID()), usageOf(n.WorkerPID()), usageOf(n.DaemonPID())
	args := []string{
		"--duration=" + d.String(), "--workers=20", fmt.Sprintf("--seed=%d", seed), "--patience=120s", "--settle=60s", "--lines=6000",
		"--tolerate=no space left|disk is full",
	}
	if !testhost.TellsExits(t) {
		args = append(args, "--unknown-exits")
	}
	wait, p := n.model(t, args...)
	began := time.Now()
	var most [3]usage
	for next := began; !p.ended() && time.Since(began) < d; {
		time.Sleep(time.Duration(50+s.rnd.IntN(1500)) * time.Millisecond)
		if n.daemon.ended() {
			t.Errorf("the daemon ended by itself: %v\n%s", n.daemon.err, tail(n.Dir+"/naru.log", 4000))
			break
		}
		s.breakOne()
		if time.Now().After(next) {
			next = time.Now().Add(time.Minute)
			if i, err := n.info(); err == nil {
				for k, pid := range []int{n.DaemonPID(), i.WorkerPID, i.KeeperPID} {
					u := usageOf(pid)
					most[k].fds, most[k].threads, most[k].anonKB = max(most[k].fds, u.fds), max(most[k].threads, u.threads), max(most[k].anonKB, u.anonKB)
				}
			}
		}
	}
	r := wait()
	n.WaitReady()
	if left := s.ownerless(); len(left) > 0 {
		t.Errorf("nobody owns %q", left)
	}
	t.Logf("%+v", r)
	t.Logf("broken: %v; seen at most (daemon, worker, keeper): %+v", s.counts, most)
	for _, x := range []struct {
		name   string
		pid    int
		before usage
	}{{"keeper", n.KeeperPID(), keeper}, {"worker", n.WorkerPID(), worker}, {"daemon", n.DaemonPID(), daemon}} {
		now := usageOf(x.pid)
		t.Logf("%s: %+v at the start, %+v at the end", x.name, x.before, now)
		if now.fds > x.before.fds+8 || now.threads > x.before.threads+16 || now.anonKB > 2*x.before.anonKB+16<<10 {
			t.Errorf("the %s has grown from %+v to %+v", x.name, x.before, now)
		}
	}
}

func (s *soak) ownerless() (left []string) {
	for end := time.Now().Add(testhost.Limit(15 * time.Second)); ; time.Sleep(50 * time.Millisecond) {
		if left = s.n.ownerless(s.t); len(left) == 0 || time.Now().After(end) {
			return left
		}
	}
}
