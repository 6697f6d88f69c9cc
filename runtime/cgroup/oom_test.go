package cgroup

import (
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
)

// counts stands in for a slice and its scopes: the kernel's counts by path.
type counts map[string]uint64

func (c counts) ledger(dir string) *ledger {
	return &ledger{dir: dir, slices: map[string]*account{}, kills: func(path string) (uint64, error) {
		if n, ok := c[path]; ok {
			return n, nil
		}
		return 0, classify(unix.ENOENT, "read %s", path)
	}, below: func(path string) (names []string, _ error) {
		for _, p := range slices.Sorted(maps.Keys(c)) {
			if name, ok := strings.CutPrefix(p, path+"/"); ok {
				names = append(names, name)
			}
		}
		return names, nil
	}}
}

// kill is what the kernel does.
func (c counts) kill(path string) {
	c[path]++
	c[parentOf(path)]++
}

func TestLedger(t *testing.T) {
	c := counts{"/p.slice": 7} // kills of before
	dir := t.TempDir()
	l := c.ledger(dir)
	ask := func(name string, want uint64) {
		t.Helper()
		path := "/p.slice/" + name
		n, err := l.kills(path)
		got, err := l.settle(path, n, err)
		if err != nil || got != want {
			t.Errorf("%s: %d kills, %v; want %d", name, got, err, want)
		}
	}
	start := func(name string) {
		t.Helper()
		if err := l.open("/p.slice"); err != nil {
			t.Fatal(err)
		}
		c["/p.slice/"+name] = 0
	}
	for _, name := range []string{"quick", "slow", "alive", "well"} {
		start(name)
	}
	c.kill("/p.slice/alive") // a child; its scope stays
	c.kill("/p.slice/slow")
	ask("slow", 1) // read before systemd removed it
	delete(c, "/p.slice/slow")
	delete(c, "/p.slice/well")
	ask("well", 0)
	c.kill("/p.slice/quick")
	c.kill("/p.slice/quick")
	delete(c, "/p.slice/quick") // systemd was faster
	l = c.ledger(dir)           // and the daemon was down
	ask("quick", 2)
	ask("quick", 2)
	ask("slow", 1)
	ask("well", 0)
	for _, name := range []string{"slow", "quick"} {
		if err := l.forget("/p.slice/"+name, 0); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.forget("/p.slice/alive", c["/p.slice/alive"]); err != nil {
		t.Fatal(err)
	}
	delete(c, "/p.slice/alive")
	start("next") // by the name of the same container or another
	delete(c, "/p.slice/next")
	ask("next", 0)
	if err := l.close("/p.slice"); err != nil {
		t.Fatal(err)
	}
	delete(c, "/p.slice")
	ask("next", 0)
	start("again")
	delete(c, "/p.slice/again")
	c["/p.slice"] = 1
	ask("again", 1)
}

func TestLedgerFailures(t *testing.T) {
	c := counts{"/p.slice": 0, "/p.slice/a": 0}
	dir := t.TempDir()
	l := c.ledger(dir)
	l.kills = func(string) (uint64, error) { return 0, classify(unix.EIO, "read") }
	if err := l.open("/p.slice"); err == nil {
		t.Error("an account was opened with a count that could not be read")
	}
	if _, err := l.settle("/p.slice/a", 0, classify(unix.EIO, "read")); err == nil {
		t.Error("a count that could not be read is none")
	}
	l = c.ledger(dir + "/file/below")
	if err := l.open("/p.slice"); err != nil {
		t.Errorf("the folder is made when it is needed: %v", err)
	}
	// A file that a crash cut short, or of another slice, is none.
	l = c.ledger(dir + "/file/below")
	for _, text := range []string{"{", `{"slice":"/other.slice","past":9}`} {
		if err := unix.Unlink(l.file("/p.slice")); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(l.file("/p.slice"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if l.get("/p.slice") != nil {
			t.Errorf("%s is an account", text)
		}
	}
	if n, err := l.settle("/p.slice/gone", 0, errs.New(errs.NotFound, "gone")); n != 0 || err != nil {
		t.Errorf("without an account: %d, %v", n, err)
	}
}

// The account of a slice begins with its pod: an OCI runtime makes scopes there
// of which nobody here hears.
func TestLedgerOfAPod(t *testing.T) {
	d, _ := systemdDriver(t)
	slice, err := d.ParentPath("kubepods-podY.slice")
	if err != nil {
		t.Fatal(err)
	}
	c := counts{slice: 0}
	l := c.ledger("")
	d.ledger.kills, d.ledger.below = l.kills, l.below
	if err := d.EnsurePod(t.Context(), "kubepods-podY.slice"); err != nil {
		t.Fatal(err)
	}
	scope := slice + "/naru-a.scope"
	c.kill(scope)
	delete(c, scope)
	if n, err := d.ledger.settle(scope, 0, classify(unix.ENOENT, "gone")); n != 1 || err != nil {
		t.Errorf("%d kills, %v", n, err)
	}
	if err := d.RemovePod(t.Context(), "kubepods-podY.slice"); err != nil {
		t.Fatal(err)
	}
	if d.ledger.get(slice) != nil {
		t.Error("the account is still there")
	}
}
