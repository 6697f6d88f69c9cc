package naru_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// pathStep is "file.go:Function" or "file.go:Type.Method" in backquotes.
var pathStep = regexp.MustCompile("`([a-zA-Z0-9_/.-]+\\.go):([A-Za-z0-9_.]+)`")

// functionsOf returns the functions of a Go file, methods as Type.Method.
func functionsOf(t *testing.T, file string) map[string]bool {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution)
	if err != nil {
		t.Errorf("docs/request-paths.md names %s: %v", file, err)
		return nil
	}
	names := map[string]bool{}
	for _, d := range f.Decls {
		fn, ok := d.(*ast.FuncDecl)
		if !ok {
			continue
		}
		name := fn.Name.Name
		if fn.Recv != nil && len(fn.Recv.List) == 1 {
			name = receiver(fn.Recv.List[0].Type) + "." + name
		}
		names[name] = true
	}
	return names
}

// receiver is the name of a method's type.
func receiver(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.StarExpr:
		return receiver(e.X)
	case *ast.IndexExpr:
		return receiver(e.X)
	case *ast.Ident:
		return e.Name
	}
	return "?"
}

// TestRequestPaths keeps docs/request-paths.md true: every function that it
// names must be in the file that it names.
func TestRequestPaths(t *testing.T) {
	text, err := os.ReadFile("docs/request-paths.md")
	if err != nil {
		t.Fatal(err)
	}
	steps := pathStep.FindAllStringSubmatch(string(text), -1)
	if len(steps) < 20 {
		t.Errorf("docs/request-paths.md names %d functions; the paths of the main requests have more", len(steps))
	}
	files := map[string]map[string]bool{}
	for _, s := range steps {
		file, name := s[1], s[2]
		if _, ok := files[file]; !ok {
			files[file] = functionsOf(t, file)
		}
		if files[file] != nil && !files[file][name] {
			t.Errorf("docs/request-paths.md: %s has no function %s", file, name)
		}
	}
}

var markdownLink = regexp.MustCompile(`\]\(([^)#\s]+)(#[^)\s]*)?\)`)

// TestLinks checks that the links between the documents lead somewhere.
func TestLinks(t *testing.T) {
	docs, _ := filepath.Glob("docs/*.md")
	for _, doc := range append(docs, "README.md", "CHANGELOG.md", "hack/README.md", "hack/vm/README.md", "hack/bench/README.md") {
		text, err := os.ReadFile(doc)
		if err != nil {
			t.Error(err)
			continue
		}
		for _, m := range markdownLink.FindAllStringSubmatch(string(text), -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			if _, err := os.Stat(filepath.Join(filepath.Dir(doc), m[1])); err != nil {
				t.Errorf("%s links to %s, which is not there", doc, m[1])
			}
		}
	}
}

var makeTarget = regexp.MustCompile("`make ([a-z][a-z0-9-]*)")

// TestMakeTargets checks that the documents name only targets that exist.
func TestMakeTargets(t *testing.T) {
	makefile, err := os.ReadFile("Makefile")
	if err != nil {
		t.Fatal(err)
	}
	docs, _ := filepath.Glob("docs/*.md")
	for _, doc := range append(docs, "README.md", "CHANGELOG.md") {
		text, err := os.ReadFile(doc)
		if err != nil {
			t.Error(err)
			continue
		}
		for _, m := range makeTarget.FindAllStringSubmatch(string(text), -1) {
			if !regexp.MustCompile(`(?m)^` + m[1] + `:`).Match(makefile) {
				t.Errorf("%s speaks of make %s, which is no target", doc, m[1])
			}
		}
	}
}

var (
	rpcName   = regexp.MustCompile(`\b[A-Z][a-z]+(?:[A-Z][a-z]+)+\b`)
	expectRPC = regexp.MustCompile(`"([A-Za-z]+)":\s*codes\.Unimplemented`)
)

// TestUnimplementedTable checks that the README's table names exactly the
// calls of which a test of the CRI edge demands Unimplemented.
func TestUnimplementedTable(t *testing.T) {
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, ok := strings.Cut(string(readme), "<!-- unimplemented -->")
	table, _, ok2 := strings.Cut(table, "<!-- /unimplemented -->")
	if !ok || !ok2 {
		t.Fatal("README.md has no marked table of unimplemented calls")
	}
	listed := map[string]bool{}
	for line := range strings.Lines(table) {
		calls := strings.Split(line, "|")
		if len(calls) > 1 {
			for _, name := range rpcName.FindAllString(calls[1], -1) {
				listed[name] = true
			}
		}
	}
	code, err := os.ReadFile("cri/all_rpcs_test.go")
	if err != nil {
		t.Fatal(err)
	}
	demanded := map[string]bool{}
	for _, m := range expectRPC.FindAllStringSubmatch(string(code), -1) {
		demanded[m[1]] = true
		if !listed[m[1]] {
			t.Errorf("README.md does not say that %s is not there yet", m[1])
		}
	}
	for name := range listed {
		if !demanded[name] {
			t.Errorf("README.md says that %s is not there yet, no test does", name)
		}
	}
}

var namedTest = regexp.MustCompile("`([a-z/]+)` `(Test[A-Za-z0-9_]+)(/[^`]+)?`")

// TestFeatureTable keeps docs/features.md true: each row that says yes names a
// test, and each test that is named exists.
func TestFeatureTable(t *testing.T) {
	text, err := os.ReadFile("docs/features.md")
	if err != nil {
		t.Fatal(err)
	}
	sources := map[string]string{}
	rows := 0
	for line := range strings.Lines(string(text)) {
		cells := strings.Split(line, " | ")
		if len(cells) != 4 || !regexp.MustCompile(`^\| [A-H][0-9]+$`).MatchString(cells[0]) {
			continue
		}
		rows++
		named := namedTest.FindAllStringSubmatch(cells[3], -1)
		if strings.HasPrefix(cells[2], "yes") && len(named) == 0 {
			t.Errorf("a yes without a test: %s", line)
		}
		for _, n := range named {
			src, ok := sources[n[1]]
			if !ok {
				files, _ := filepath.Glob(n[1] + "/*_test.go")
				for _, f := range files {
					b, err := os.ReadFile(f)
					if err != nil {
						t.Fatal(err)
					}
					src += string(b)
				}
				sources[n[1]] = src
			}
			if !strings.Contains(src, "func "+n[2]+"(") {
				t.Errorf("docs/features.md: %s has no %s", n[1], n[2])
			}
			if sub := strings.TrimPrefix(n[3], "/"); sub != "" && !strings.Contains(src, `t.Run("`+sub+`"`) {
				t.Errorf("docs/features.md: %s has no subtest %q", n[2], sub)
			}
		}
	}
	if rows < 100 {
		t.Errorf("docs/features.md has %d rows", rows)
	}
}

// floor are the rows of known attacks that a release must pass.
const floor = `N-01 N-02 N-03 N-04 N-05 N-06 N-07 N-09 N-10 N-11 N-12 N-14 X-01 X-02 X-03 X-04 X-05
M-01 M-04 M-05 M-06 M-07 M-08 M-09 M-12 M-13 M-17 I-01 I-02 I-03 I-04 I-05 I-06 I-07 I-15 I-16
U-01 U-02 U-03 U-04 S-01 S-02 S-13 S-14 S-15`

var (
	rowTest = regexp.MustCompile("`([a-z/]+):((?:Test|Fuzz)[A-Za-z0-9_]+)`")
	rowID   = regexp.MustCompile(`\b[A-Z]-[0-9]{2}\b`)
	rowName = regexp.MustCompile(`^Test(?:Row)?([A-Z])([0-9]{2})(?:_|[A-Z])`)
)

// testsOf gives the tests of a package and the rows that each names, in its own
// name or in its comment.
func testsOf(t *testing.T, dir string) map[string][]string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
	if err != nil || len(files) == 0 {
		t.Errorf("docs/security.md names the tests of %s, which has none", dir)
	}
	tests := map[string][]string{}
	for _, file := range files {
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution|parser.ParseComments)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range f.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil {
				rows := rowID.FindAllString(fn.Doc.Text(), -1)
				if m := rowName.FindStringSubmatch(fn.Name.Name); m != nil {
					rows = append(rows, m[1]+"-"+m[2])
				}
				tests[fn.Name.Name] = rows
			}
		}
	}
	return tests
}

// TestSecurityRows checks that the table of docs/security.md has every row of
// the floor once, with tests that exist and name the row.
func TestSecurityRows(t *testing.T) {
	text, err := os.ReadFile("docs/security.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, ok := strings.Cut(string(text), "<!-- rows -->")
	table, _, ok2 := strings.Cut(table, "<!-- /rows -->")
	if !ok || !ok2 {
		t.Fatal("docs/security.md has no marked table of rows")
	}
	packages := map[string]map[string][]string{}
	listed := map[string]int{}
	for line := range strings.Lines(table) {
		cells := strings.Split(line, "|")
		if len(cells) != 6 || !rowID.MatchString(cells[1]) {
			continue
		}
		row := strings.TrimSpace(cells[1])
		listed[row]++
		tests := rowTest.FindAllStringSubmatch(cells[3], -1)
		if len(tests) == 0 || strings.TrimSpace(cells[2]) == "" {
			t.Errorf("docs/security.md, row %s: no attack or no test", row)
		}
		for _, m := range tests {
			if packages[m[1]] == nil {
				packages[m[1]] = testsOf(t, m[1])
			}
			names, ok := packages[m[1]][m[2]]
			if !ok {
				t.Errorf("docs/security.md, row %s: %s has no %s", row, m[1], m[2])
			} else if !slices.Contains(names, row) {
				t.Errorf("docs/security.md, row %s: %s of %s names only the rows %v", row, m[2], m[1], names)
			}
		}
	}
	for _, row := range strings.Fields(floor) {
		if listed[row] != 1 {
			t.Errorf("docs/security.md has row %s %d times", row, listed[row])
		}
	}
}

// deadlineName are the names that constants for waits have.
var deadlineName = regexp.MustCompile(`(?i)(timeout|patience|grace|time|wait|limit)$`)

// pacing are durations with such a name for which nobody waits: when something
// is done again, or given back.
var pacing = []string{
	"images/registry maxRetryWait", "images/registry retryWait", "internal/metrics idleTime", "runtime/monitor/keeper tidyTime",
	"runtime/monitor/worker stuckTime", "runtime/monitor/worker tidyTime", "runtime/monitor/worker trimTime", "sandbox/cni settleTime",
}

// durationsOf returns the constants of a package that are durations, and the
// defaults of a configuration that are listed as {&c.Name, value}.
func durationsOf(t *testing.T, dir string, into map[string]time.Duration) {
	t.Helper()
	files, err := filepath.Glob(dir + "/*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(f, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.FuncDecl:
				return n.Name.Name == "defaults"
			case *ast.ValueSpec:
				for i, v := range n.Values {
					if d, ok := durationOf(v); ok {
						into[dir+" "+n.Names[i].Name] = d
					}
				}
			case *ast.CompositeLit:
				if len(n.Elts) != 2 {
					return true
				}
				if u, ok := n.Elts[0].(*ast.UnaryExpr); ok {
					if sel, ok := u.X.(*ast.SelectorExpr); ok {
						if d, ok := durationOf(n.Elts[1]); ok {
							into[dir+" "+sel.Sel.Name] = d
						}
					}
				}
			}
			return true
		})
	}
}

// durationOf reads time.Unit and N * time.Unit.
func durationOf(e ast.Expr) (time.Duration, bool) {
	n := 1
	if b, ok := e.(*ast.BinaryExpr); ok && b.Op == token.MUL {
		lit, ok := b.X.(*ast.BasicLit)
		if !ok {
			return 0, false
		}
		x, err := strconv.Atoi(lit.Value)
		if err != nil {
			return 0, false
		}
		n, e = x, b.Y
	}
	sel, ok := e.(*ast.SelectorExpr)
	if !ok {
		return 0, false
	}
	unit, ok := map[string]time.Duration{
		"Millisecond": time.Millisecond, "Second": time.Second, "Minute": time.Minute, "Hour": time.Hour,
	}[sel.Sel.Name]
	return time.Duration(n * int(unit)), ok
}

// TestDeadlines keeps docs/deadlines.md true: each row's name has its value in
// the source, and each constant with the name of a wait has a row.
func TestDeadlines(t *testing.T) {
	text, err := os.ReadFile("docs/deadlines.md")
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]time.Duration{}
	for _, top := range []string{"cmd", "cri", "pod", "sandbox", "runtime", "images", "internal"} {
		err := filepath.WalkDir(top, func(p string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() && d.Name() != "testdata" && !strings.HasSuffix(p, "test") {
				durationsOf(t, p, have)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	row := regexp.MustCompile("(?m)^\\| .+ \\| ([0-9]+) (ms|s|m) \\| `([a-z/]+)` ([A-Za-z]+) \\|$")
	listed := map[string]bool{}
	for _, m := range row.FindAllStringSubmatch(string(text), -1) {
		name := m[3] + " " + m[4]
		want, err := time.ParseDuration(m[1] + m[2])
		if got, ok := have[name]; err != nil || !ok || got != want {
			t.Errorf("docs/deadlines.md has %s for %s, the source %v (%v)", m[1]+m[2], name, got, ok)
		}
		if listed[name] {
			t.Errorf("docs/deadlines.md has %s twice", name)
		}
		listed[name] = true
	}
	for name := range have {
		if deadlineName.MatchString(name) && !listed[name] && !slices.Contains(pacing, name) {
			t.Errorf("docs/deadlines.md lacks %s", name)
		}
	}
	for _, name := range pacing {
		if _, ok := have[name]; !ok {
			t.Errorf("there is no %s any more", name)
		}
	}
}
