package ring

import (
	"context"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/internal/testhost"
)

// fault is one thing that goes wrong at a point.
type fault struct {
	action string // of internal/failpoint
	kill   string // who is killed while the point is held
}

var faults = []fault{
	{"hold", "daemon"}, {"hold", "worker"}, {"hold", "both"}, {"error", ""}, {"delay", ""}, {"panic", ""},
}

func (f fault) String() string {
	if f.kill != "" {
		return "kill -9 of " + f.kill
	}
	return f.action
}

// crashCase is one point in a story's kind, broken by one fault. second is
// broken in the start that follows.
type crashCase struct {
	kind   int
	point  string
	fault  fault
	second string
}

func (c crashCase) String() string {
	s := fmt.Sprintf("%s at %q in a story of kind %d", c.fault, c.point, c.kind)
	if c.second != "" {
		s = fmt.Sprintf("kill -9 of daemon at %q, then %s at %q in the start", c.point, c.fault, c.second)
	}
	return s
}

func (r *crashRig) await(what string, limit time.Duration, f func() bool) bool {
	for end := time.Now().Add(testhost.Limit(limit)); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			r.t.Errorf("waited %v for %s", limit, what)
			return false
		}
	}
	return true
}

// try lives one story with a fault in it, and returns what was passed in the
// start after a kill.
func (r *crashRig) try(c crashCase) (recovery []string) {
	r.t.Helper()
	began := time.Now()
	r.forget()
	worker := r.n.WorkerPID()
	first := c.fault
	if c.second != "" {
		first = fault{"hold", "daemon"}
	}
	r.arm(first.action, c.point)
	s := r.newStory(c.kind)
	s.lenient = c.fault.kill == ""
	done := make(chan error, 1)
	go func() { done <- s.live() }()
	hit := func() bool { _, at := r.points(); return at != "" }
	switch {
	case first.kill != "":
		if !r.await(c.String(), 30*time.Second, hit) {
			break
		}
		recovery = r.killAt(c, worker)
	default:
		r.await(c.String(), 30*time.Second, func() bool { return hit() || r.n.daemon.ended() || len(done) > 0 })
		r.arm("", "") // a worker that comes after one that panicked would do as it did
		for len(done) == 0 && !r.t.Failed() && time.Since(began) < testhost.Limit(100*time.Second) {
			if r.n.daemon.ended() { // a panic outside of any request
				r.n.StartDaemon()
			}
			time.Sleep(2 * time.Millisecond)
		}
	}
	if err := <-done; err != nil {
		r.t.Errorf("%s: %v", c, err)
	}
	if r.n.daemon.ended() {
		r.n.StartDaemon()
	}
	r.check(c.String())
	if r.t.Failed() {
		r.t.Logf("%s failed; the daemon's log:\n%s", c, tail(r.n.Dir+"/naru.log", 6000))
		r.t.Logf("the keeper's log:\n%s", tail(r.n.Dir+"/keeper.log", 3000))
		return nil
	}
	r.quiet()
	return recovery
}

// killAt kills whom the fault names while the point is held, and starts the
// daemon again.
func (r *crashRig) killAt(c crashCase, worker int) (recovery []string) {
	who := c.fault.kill
	if c.second != "" {
		who = "daemon"
	}
	if who != "worker" {
		r.n.KillDaemon()
	}
	if who != "daemon" {
		killPID(worker)
	}
	r.forget()
	if c.second == "" {
		r.arm("", "")
		if who != "worker" {
			r.n.StartDaemon()
		}
		recovery, _ = r.points()
		return recovery
	}
	r.arm(c.fault.action, c.second)
	r.n.LaunchDaemon()
	if r.await(c.String(), 30*time.Second, func() bool { _, at := r.points(); return at != "" || r.n.daemon.ended() }) && c.fault.action == "hold" {
		r.n.KillDaemon()
	}
	r.arm("", "")
	ready := func() bool {
		ctx, cancel := context.WithTimeout(context.Background(), testhost.Limit(time.Second))
		defer cancel()
		_, err := r.n.Runtime.Status(ctx, &criv1.StatusRequest{})
		return err == nil
	}
	r.await("the daemon after "+c.String(), 60*time.Second, func() bool {
		if r.n.daemon.ended() { // a panic outside of any request
			r.n.LaunchDaemon()
		}
		return ready() && !r.n.daemon.ended()
	})
	return nil
}

// whole tells whether the matrix is run whole: NARU_CRASH=all (make crash).
func whole() bool { return os.Getenv("NARU_CRASH") == "all" }

// TestCrashMatrix breaks the daemon and the worker at every named step of
// everything that they do, in every way, and starts them again. The points are
// those that a story passes; that no step of the code is missing among them is
// held against the source.
func TestCrashMatrix(t *testing.T) {
	needGo(t)
	began := time.Now()
	programs, err := failing()
	if err != nil {
		t.Fatal(err)
	}
	seed := crashSeed(t)
	rnd := rand.New(rand.NewPCG(seed, 3))
	rig := func(t *testing.T) *crashRig { return newCrashRig(t, WithPrograms(programs[0], programs[1])) }
	var cases, starts []crashCase
	if !t.Run("nothing is broken", func(t *testing.T) { cases = rig(t).dryRun() }) {
		return
	}
	if only := os.Getenv("NARU_POINTS"); only != "" {
		cases = slices.DeleteFunc(cases, func(c crashCase) bool { return !strings.HasPrefix(c.point, only) })
	}
	all := len(cases)
	rnd.Shuffle(len(cases), func(i, j int) { cases[i], cases[j] = cases[j], cases[i] })
	if !whole() {
		cases = cases[:min(len(cases), 12)]
	}
	started := map[string]bool{} // points of a start
	first := survive(t, rig, cases, func(c crashCase, recovery []string) {
		for _, p := range recovery {
			if c.fault.kill == "daemon" && !started[p] {
				started[p] = true
				for _, f := range []fault{{"hold", "daemon"}, {"error", ""}, {"panic", ""}} {
					starts = append(starts, crashCase{c.kind, c.point, f, p})
				}
			}
		}
	})
	rnd.Shuffle(len(starts), func(i, j int) { starts[i], starts[j] = starts[j], starts[i] })
	possible := len(starts)
	if !whole() {
		starts = starts[:min(len(starts), 4)]
	}
	second := survive(t, rig, starts, func(crashCase, []string) {})
	t.Logf("%d of %d faults at named steps survived, and %d of %d faults in the start after a kill (%d points); %v",
		first, all, second, possible, len(started), time.Since(began).Round(time.Second))
}

// survive tries all cases, on one node for as long as nothing fails.
func survive(t *testing.T, rig func(*testing.T) *crashRig, cases []crashCase, after func(crashCase, []string)) (survived int) {
	for failed := 0; len(cases) > 0 && failed < 8; {
		before := len(cases)
		ok := t.Run("node", func(t *testing.T) {
			r := rig(t)
			for len(cases) > 0 && !t.Failed() {
				c := cases[0]
				cases = cases[1:]
				after(c, r.try(c))
				if !t.Failed() {
					survived++
				}
			}
			r.finish()
		})
		if !ok {
			failed++
		}
		if len(cases) == before { // -run has left it out
			break
		}
	}
	return survived
}

// crashSeed prints the seed of the run; NARU_SEED repeats one.
func crashSeed(t *testing.T) uint64 {
	seed, err := strconv.ParseUint(os.Getenv("NARU_SEED"), 10, 64)
	if err != nil {
		seed = uint64(time.Now().UnixNano())
	}
	t.Logf("seed %d", seed)
	return seed
}

// dryRun lives the story of each kind once, with nothing broken, and makes the
// cases: every point that was passed, with every fault.
func (r *crashRig) dryRun() (cases []crashCase) {
	t := r.t
	passed := map[string]int{}
	for kind := range 2 {
		r.forget()
		if err := r.newStory(kind).live(); err != nil {
			t.Fatal(err)
		}
		all, _ := r.points()
		for _, p := range all {
			if _, ok := passed[p]; !ok && !strings.Contains(p, ": sandbox: ") { // those are the sandbox's own
				passed[p] = kind
			}
		}
	}
	r.check("the dry run")
	steps := map[string]bool{}
	for p := range passed {
		area, rest, _ := strings.Cut(p, " ")
		_, step, _ := strings.Cut(rest, ": ")
		steps[area+" "+step] = true
	}
	code := codeSteps(t)
	for _, s := range code {
		if _, excused := notInStory[s]; !steps[s] && !excused && !strings.HasPrefix(s, "undo ") {
			t.Errorf("step %q of the code is not passed by the story: nobody would know whether it survives a kill", s)
		}
	}
	t.Logf("%d points passed, %d steps in the code", len(passed), len(code))
	for _, p := range slices.Sorted(maps.Keys(passed)) {
		for _, f := range faults {
			if strings.HasPrefix(p, "plan ") && f.action != "error" { // an operation of a plan: the child makes it, and who sent it waits
				continue
			}
			cases = append(cases, crashCase{kind: passed[p], point: p, fault: f})
		}
	}
	return cases
}

// notInStory are steps that the story does not pass, with the reason.
var notInStory = map[string]string{
	"pod processes": "a checkpoint needs criu",
	"pod archive":   "a checkpoint needs criu",
	"pod undo":      "passed under that name by removals only where the story fails",
	"file write":    "of files, by folder",
	"file rename":   "of files, by folder",
	"file remove":   "of files, by folder",
	"worker given":  "",
}

func needGo(t *testing.T) {
	t.Helper()
	cmd := exec.Command("go", "env", "GOVERSION")
	if err := cmd.Run(); err != nil {
		t.Skip("no Go toolchain here, to build the programs with failpoints")
	}
}

// codeSteps finds every named step in the source: "area step".
func codeSteps(t *testing.T) []string {
	t.Helper()
	steps := map[string]bool{}
	top := "../.."
	for _, dir := range []string{"pod", "sandbox", "runtime", "images", "internal"} {
		err := filepath.WalkDir(filepath.Join(top, dir), func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") || strings.Contains(path, "internal/failpoint") {
				return err
			}
			f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
			if err != nil {
				return err
			}
			for _, d := range f.Decls {
				if fn, ok := d.(*ast.FuncDecl); ok && fn.Body != nil {
					stepsOf(fn.Body, dir, steps)
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if len(steps) < 40 {
		t.Errorf("only %d steps were found in the code: %v", len(steps), steps)
	}
	return slices.Sorted(maps.Keys(steps))
}

func literal(e ast.Expr) (string, bool) {
	l, ok := e.(*ast.BasicLit)
	if !ok || l.Kind != token.STRING {
		return "", false
	}
	s, err := strconv.Unquote(l.Value)
	return s, err == nil
}

// stepsOf notes the steps in one function: what is named at failpoint.Hit, at
// an operation's do and enter, and in the lists of steps that a loop runs.
func stepsOf(body *ast.BlockStmt, dir string, steps map[string]bool) {
	area := "" // of a loop over a list of steps
	ast.Inspect(body, func(n ast.Node) bool {
		call, ok := n.(*ast.CallExpr)
		if !ok {
			return true
		}
		sel, ok := call.Fun.(*ast.SelectorExpr)
		if !ok {
			return true
		}
		switch x, _ := sel.X.(*ast.Ident); {
		case x != nil && x.Name == "failpoint" && sel.Sel.Name == "Hit":
			a, _ := literal(call.Args[0])
			if s, ok := literal(call.Args[2]); ok {
				steps[a+" "+s] = true
			} else if a == "sandbox" || a == "native" {
				area = a
			}
		case dir == "pod" && (sel.Sel.Name == "do" || sel.Sel.Name == "enter") && len(call.Args) > 1:
			if s, ok := literal(call.Args[1]); ok {
				steps["pod "+s] = true
			}
		}
		return true
	})
	ast.Inspect(body, func(n ast.Node) bool {
		lit, ok := n.(*ast.CompositeLit)
		if !ok || len(lit.Elts) == 0 {
			return true
		}
		if s, ok := literal(lit.Elts[0]); ok && area != "" && len(lit.Elts) == 2 {
			steps[area+" "+s] = true
		}
		if kv, ok := lit.Elts[0].(*ast.KeyValueExpr); ok && dir == "pod" {
			if key, _ := kv.Key.(*ast.Ident); key != nil && key.Name == "name" && len(lit.Elts) > 1 {
				if s, ok := literal(kv.Value); ok {
					steps["pod "+s] = true
				}
			}
		}
		return true
	})
}
