package ring

import (
	"cmp"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/dynamicpb"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

var update = flag.Bool("update", false, "write docs/fields.md anew")

const fieldsDoc = "../../docs/fields.md"

// fieldCheck is a test of what some fields of requests are for. It must pass,
// and must fail when any one of them is taken out of the requests.
type fieldCheck struct {
	name   string
	sees   string // what it looks at, for the document
	fields []string
	run    func(t testing.TB, n *Node)
}

// exception says why fields need no check. A star stands for anything.
type exception struct{ fields, reason string }

// under gives the paths of several fields of one message.
func under(at string, names ...string) (all []string) {
	for _, name := range names {
		all = append(all, at+"."+name)
	}
	return all
}

func fieldChecks() []fieldCheck {
	return slices.Concat(podChecks(), containerChecks(), callChecks())
}

// fieldPlan says of each field what becomes of it.
type fieldPlan struct {
	rpcs      []rpc
	checks    map[string]*fieldCheck // by field
	excused   map[string]*exception
	uncovered map[string]*exception
	fails     sync.Map // field → it was taken out and the check failed
}

// planFields matches fields, checks and exceptions; none may be left over.
func planFields(t testing.TB, checks []fieldCheck, uncovered []exception) *fieldPlan {
	t.Helper()
	p := &fieldPlan{rpcs: requestFields(t), checks: map[string]*fieldCheck{}}
	var all []string
	for _, r := range p.rpcs {
		all = append(all, r.fields...)
	}
	for i, c := range checks {
		for _, f := range c.fields {
			if !slices.Contains(all, f) {
				t.Errorf("the check %q names %s, which no request has", c.name, f)
			}
			if other := p.checks[f]; other != nil {
				t.Errorf("the checks %q and %q both name %s", c.name, other.name, f)
			}
			p.checks[f] = &checks[i]
		}
	}
	free := slices.DeleteFunc(slices.Clone(all), func(f string) bool { return p.checks[f] != nil })
	p.excused, free = match(t, exceptions, free)
	p.uncovered, free = match(t, uncovered, free)
	for _, f := range free {
		t.Errorf("nobody checks %s", f)
	}
	for f, e := range p.uncovered {
		t.Logf("not yet covered: %s: %s", f, e.reason)
	}
	if len(p.uncovered) > mostUncovered {
		t.Errorf("%d fields are not covered yet, more than the %d that there were", len(p.uncovered), mostUncovered)
	}
	return p
}

// match gives each field the first exception that fits it.
func match(t testing.TB, list []exception, fields []string) (found map[string]*exception, rest []string) {
	t.Helper()
	found = map[string]*exception{}
	used := make([]bool, len(list))
	for _, f := range fields {
		i := slices.IndexFunc(list, func(e exception) bool {
			return regexp.MustCompile("^" + strings.ReplaceAll(regexp.QuoteMeta(e.fields), `\*`, ".*") + "$").MatchString(f)
		})
		if i < 0 {
			rest = append(rest, f)
			continue
		}
		found[f], used[i] = &list[i], true
	}
	for i, e := range list {
		if !used[i] {
			t.Errorf("the exception %s fits no field that nobody checks", e.fields)
		}
	}
	return found, rest
}

// TestFields: every field of every request counts. Each check runs as it is,
// and once for each of its fields without that field; with -test.short without
// one of them.
func TestFields(t *testing.T) {
	checks := fieldChecks()
	plan := planFields(t, checks, notYetCovered)
	work := make(chan *fieldCheck, len(checks))
	for i := range checks {
		work <- &checks[i]
	}
	close(work)
	var wg sync.WaitGroup
	var idle *Node
	for range fieldNodes {
		n := startFieldNode(t)
		idle = n
		wg.Go(func() {
			for c := range work {
				t.Run(c.name, func(t *testing.T) { plan.prove(t, n, c) })
			}
		})
	}
	wg.Wait()
	t.Run("calls without an implementation", func(t *testing.T) { plan.wantUnimplemented(t, idle) })
	if !testing.Short() {
		plan.compare(t)
	}
}

// fieldNodes share the checks.
const fieldNodes = 3

// startFieldNode starts a node whose address ranges can be told, and whose
// checkpoints need no criu.
func startFieldNode(t testing.TB) *Node {
	t.Helper()
	n := StartNode(t)
	n.StopDaemon()
	ranges := strings.NewReplacer(`"`, "", "[", "", "]", "", " ", "").Replace(n.opts.podCIDR)
	n.opts.podCIDR = `["auto"]`
	WithConfig(fmt.Sprintf("runtime.criu = %q\ncdi.spec_dirs = [%q]", n.fakeCriu(t), n.cardSpec(t)))(&n.opts)
	n.writeConfig()
	n.LaunchDaemon()
	eventually(t, 30*time.Second, "the daemon to take the ranges", func() bool { return n.tellRanges(t, ranges) == nil })
	n.WaitReady()
	return n
}

// tellRanges is UpdateRuntimeConfig.
func (n *Node) tellRanges(t testing.TB, cidrs string) error {
	_, err := n.Runtime.UpdateRuntimeConfig(within(t, callTime), &criv1.UpdateRuntimeConfigRequest{
		RuntimeConfig: &criv1.RuntimeConfig{NetworkConfig: &criv1.NetworkConfig{PodCidr: cidrs}},
	})
	return err
}

func (p *fieldPlan) prove(t testing.TB, n *Node, c *fieldCheck) {
	if r := n.attempt(t, c); r.Failed() {
		t.Errorf("it fails as it is: %s%s", r.text(), r.panicked)
		return
	}
	fields := c.fields
	if testing.Short() && len(fields) > 0 {
		fields = []string{fields[rand.IntN(len(fields))]}
	}
	for _, f := range fields {
		began := time.Now()
		d := n.dropper.arm(f)
		r := n.attempt(t, c)
		switch {
		case r.panicked != "":
			t.Errorf("without %s: panic: %s", f, r.panicked)
		case d.hits.Load() == 0:
			t.Errorf("it never sends %s", f)
		case !r.Failed():
			t.Errorf("it passes without %s", f)
		default:
			p.fails.Store(f, true)
		}
		t.Logf("%5d ms without %s: %.300s", time.Since(began).Milliseconds(), f, r.text())
	}
}

// wantUnimplemented asks the calls whose fields are excused because of that.
func (p *fieldPlan) wantUnimplemented(t *testing.T, n *Node) {
	for _, r := range p.rpcs {
		if len(r.fields) == 0 || p.excused[r.fields[0]] == nil || p.excused[r.fields[0]].reason != unimplemented {
			continue
		}
		m := r.method
		err := n.Conn.Invoke(within(t, callTime), fmt.Sprintf("/%s/%s", m.Parent().FullName(), m.Name()), dynamicpb.NewMessage(m.Input()), dynamicpb.NewMessage(m.Output()))
		wantError(t, err, codes.Unimplemented, r.name)
	}
}

// attempt runs a check once and removes what it made.
func (n *Node) attempt(t testing.TB, c *fieldCheck) *recorder {
	r := &recorder{TB: t}
	r.run(func() { c.run(r, n) })
	n.dropper.disarm()
	after := &recorder{TB: t, cleanups: r.cleanups}
	after.clean()
	if after.Failed() && !r.Failed() {
		t.Errorf("when it cleaned up: %s%s", after.text(), after.panicked)
	}
	n.removeAll()
	return r
}

// compare checks docs/fields.md, which a run writes with -update.
func (p *fieldPlan) compare(t testing.TB) {
	t.Helper()
	for f := range p.checks {
		if _, ok := p.fails.Load(f); !ok && !t.Failed() {
			t.Logf("%s was not tried: some checks were left out, so %s is not compared", f, fieldsDoc)
			return
		}
	}
	doc := p.document()
	if *update && !t.Failed() {
		if err := os.WriteFile(fieldsDoc, []byte(doc), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if had, err := os.ReadFile(fieldsDoc); err != nil || string(had) != doc {
		t.Errorf("%s is not what this run found (%v); go test ./test/ring -run 'TestFields$' -update writes it", fieldsDoc, err)
	}
}

// document is the table of all fields.
func (p *fieldPlan) document() string {
	var b strings.Builder
	total := 0
	for _, r := range p.rpcs {
		total += len(r.fields)
	}
	fmt.Fprintf(&b, fieldsHead, total, len(p.checks), len(p.excused), len(p.uncovered))
	for _, r := range p.rpcs {
		fmt.Fprintf(&b, "\n## %s\n\n", r.name)
		if len(r.fields) == 0 {
			b.WriteString("The request has no fields.\n")
			continue
		}
		b.WriteString("| field | check | what it sees, or why there is none | without the field |\n|---|---|---|---|\n")
		told := map[*exception]bool{}
		for _, f := range r.fields {
			if c := p.checks[f]; c != nil {
				result := "passes"
				if _, ok := p.fails.Load(f); ok {
					result = "fails"
				}
				fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", strings.TrimPrefix(f, r.name+"."), c.name, c.sees, result)
				continue
			}
			kind, e := "–", p.excused[f]
			if e == nil {
				kind, e = "not yet", p.uncovered[f]
			}
			if e != nil && !told[e] {
				told[e] = true
				b.WriteString(p.exceptionRow(r, e, kind))
			}
		}
	}
	return b.String()
}

// exceptionRow is one row for all fields of a call that an exception is for.
func (p *fieldPlan) exceptionRow(r rpc, e *exception, kind string) string {
	var all []string
	for _, f := range r.fields {
		if cmp.Or(p.excused[f], p.uncovered[f]) == e {
			all = append(all, f)
		}
	}
	what := "`" + strings.TrimPrefix(all[0], r.name+".") + "`"
	if len(all) > 1 {
		what = fmt.Sprintf("`%s` (%d fields)", strings.TrimPrefix(e.fields, r.name+"."), len(all))
	}
	return fmt.Sprintf("| %s | %s | %s | |\n", what, kind, e.reason)
}

const fieldsHead = `# The fields of CRI's requests

Generated by ` + "`go test ./test/ring -run 'TestFields$' -update`" + `; every run compares it.

Each check runs on a real node: as it is, when it must pass, and once for each of
its fields with that field taken out of the requests on their way, when it must
fail. So every field with a check is one that something depends on. A list of
messages is written [], and the field is taken out of all of its elements.

Of %d fields %d are checked and %d need no check; not checked yet: %d.
`
