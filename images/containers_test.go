package images

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"testing"
	"time"

	"archive/tar"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/images/internal/regtest"
	"github.com/naru-project/naru/images/internal/tree"
	"github.com/naru-project/naru/internal/errs"
)

func TestWritable(t *testing.T) {
	cfg := testConfig(t)
	cfg.UsageInterval = time.Millisecond
	s := openStore(t, cfg)
	id := strings.Repeat("ab", 32)
	w, err := s.NewWritable(t.Context(), id)
	must(t, err)
	upper := w.Upper
	if again, err := s.NewWritable(t.Context(), id); err != nil || again != w {
		t.Error("not repeatable: ", again, err)
	}
	u, err := s.WritableUsage(t.Context(), id)
	if err != nil || u.Inodes != 1 || u.Time.IsZero() {
		t.Error(u, err)
	}
	// What a container may do to be measured wrongly.
	outside := filepath.Join(t.TempDir(), "big")
	must(t, os.WriteFile(outside, make([]byte, 8<<20), 0o600))
	must(t, os.WriteFile(filepath.Join(upper, "file"), make([]byte, 1<<20), 0o600))
	must(t, os.Link(filepath.Join(upper, "file"), filepath.Join(upper, "again")))
	must(t, os.Symlink(outside, filepath.Join(upper, "link")))
	must(t, os.Symlink(filepath.Dir(outside), filepath.Join(upper, "dirlink")))
	must(t, unix.Mkfifo(filepath.Join(upper, "fifo"), 0o600))
	deep(t, upper, 3000)
	must(t, os.MkdirAll(filepath.Join(upper, "wide"), 0o755))
	for i := range 300 {
		must(t, os.MkdirAll(filepath.Join(upper, "wide", fmt.Sprint(i), "x"), 0o755))
	}
	waitFor(t, func() bool {
		u, err := s.WritableUsage(t.Context(), id)
		must(t, err)
		return u.Inodes > 1
	})
	waitFor(t, func() bool {
		u, err = s.WritableUsage(t.Context(), id)
		must(t, err)
		return u.Inodes == 3000+600+6
	})
	if u.Bytes < 1<<20 || u.Bytes > 1<<20+(3000+620)*8192 {
		t.Error(u)
	}
	must(t, s.RemoveWritable(t.Context(), id))
	must(t, s.RemoveWritable(t.Context(), id))
	if _, err := s.WritableUsage(t.Context(), id); !errs.Is(err, errs.NotFound) {
		t.Error(err)
	}
	waitEmpty(t, s)
	if _, err := os.Stat(outside); err != nil {
		t.Error("removed what a link points to: ", err)
	}
	for _, bad := range []string{"", ".", "..", "../x", "a/b", "a\x00", strings.Repeat("a", 300), ".hid"} {
		if _, err := s.NewWritable(t.Context(), bad); errs.Of(err) != errs.InvalidArgument {
			t.Errorf("%q: %v", bad, err)
		}
		if err := s.RemoveWritable(t.Context(), bad); errs.Of(err) != errs.InvalidArgument {
			t.Errorf("%q: %v", bad, err)
		}
		if _, err := s.Layers(t.Context(), "x", bad); errs.Of(err) != errs.InvalidArgument {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

// deep makes a chain of n folders, far beyond PATH_MAX.
func deep(t testing.TB, dir string, n int) {
	t.Helper()
	fd, err := unix.Open(dir, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	must(t, err)
	for range n {
		must(t, unix.Mkdirat(fd, "d", 0o755))
		next, err := unix.Openat(fd, "d", unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		must(t, err)
		_ = unix.Close(fd)
		fd = next
	}
	_ = unix.Close(fd)
}

func TestMeasureWithoutChange(t *testing.T) {
	dir := t.TempDir()
	for i := range 50 {
		must(t, os.MkdirAll(filepath.Join(dir, fmt.Sprint(i), "a", "b"), 0o755))
		must(t, os.WriteFile(filepath.Join(dir, fmt.Sprint(i), "f"), make([]byte, 5000*i), 0o600))
	}
	f, err := os.Open(dir)
	must(t, err)
	defer func() { _ = f.Close() }()
	got, err := tree.Measure(t.Context(), int(f.Fd()))
	must(t, err)
	var want tree.Usage
	must(t, filepath.WalkDir(dir, func(p string, _ os.DirEntry, err error) error {
		var st unix.Stat_t
		must(t, unix.Lstat(p, &st))
		want.Inodes++
		want.Bytes += uint64(st.Blocks) * 512
		return err
	}))
	if got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}

func TestImmutableFilesGo(t *testing.T) {
	s := openStore(t, testConfig(t))
	w, err := s.NewWritable(t.Context(), "c")
	must(t, err)
	upper := w.Upper
	must(t, os.MkdirAll(filepath.Join(upper, "d"), 0o755))
	must(t, os.WriteFile(filepath.Join(upper, "d/f"), nil, 0o644))
	if out, err := exec.Command("chattr", "+i", filepath.Join(upper, "d/f"), filepath.Join(upper, "d")).CombinedOutput(); err != nil {
		t.Skipf("no immutable files here: %v %s", err, out)
	}
	must(t, s.RemoveWritable(t.Context(), "c"))
	waitEmpty(t, s)
}

func TestPinned(t *testing.T) {
	reg := regtest.New(t)
	cfg := testConfig(t)
	cfg.Pinned = []string{reg.Host() + "/pause:3", "*/keep/*", "docker.io/*"}
	s := openStore(t, cfg)
	for name, want := range map[string]bool{"pause:3": true, "pause:4": false, "x/keep/y:1": true, "other:1": false} {
		repo, tag, _ := strings.Cut(name, ":")
		reg.Build(repo, tag, func(i *ocispec.Image) { i.Author = name }, regtest.Gzip(simple("a")))
		id := mustPull(t, s, reg.Host()+"/"+name)
		if i, err := s.Resolve(id); err != nil || i.Pinned != want {
			t.Errorf("%s: pinned %v %v", name, i.Pinned, err)
		}
	}
	before := s.List()
	live := cfg.Live
	live.Pinned = []string{"*/other:*"}
	s.Reconfigure(live)
	for _, i := range s.List() {
		if want := strings.Contains(i.RepoTags[0], "/other:"); i.Pinned != want {
			t.Errorf("%s after the change: pinned %v", i.RepoTags, i.Pinned)
		}
	}
	if n := slices.IndexFunc(before, func(i *Image) bool { return strings.Contains(i.RepoTags[0], "/pause:3") }); !before[n].Pinned {
		t.Error("a list that was handed out changed")
	}
}

func TestNoLayers(t *testing.T) {
	reg := regtest.New(t)
	reg.Build("scratch", "v1", nil)
	s := openStore(t, testConfig(t))
	id := mustPull(t, s, reg.Host()+"/scratch:v1")
	dirs, err := s.Layers(t.Context(), id, "c")
	if err != nil || len(dirs) != 1 {
		t.Fatal(dirs, err)
	}
	if list, err := os.ReadDir(dirs[0]); err != nil || len(list) != 0 {
		t.Error(list, err)
	}
}

// The layers, mounted as the executor mounts them, are what applying one
// after the other would give.
func TestOverlayIsTheImage(t *testing.T) {
	for seed := range uint64(40) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { testOverlay(t, seed) })
	}
}

type model map[string]string // path to content; "/" at the end: a folder

func (m model) remove(p string) {
	for k := range m {
		if k == p || strings.HasPrefix(k, strings.TrimSuffix(p, "/")+"/") {
			delete(m, k)
		}
	}
}

func (m model) dirs() []string {
	out := []string{""}
	for k := range m {
		if strings.HasSuffix(k, "/") {
			out = append(out, k)
		}
	}
	sort.Strings(out)
	return out
}

func (m model) names() []string {
	var out []string
	for k := range m {
		out = append(out, k)
	}
	sort.Strings(out)
	return out
}

// change makes a layer at random and applies it to the model.
func (m model) change(rnd *rand.Rand, n int) []byte {
	var list []tar.Header
	mine := model{} // made by this layer; whiteouts do not touch that
	in := model{}   // folders with whiteouts
	pick := func(l []string) string { return l[rnd.IntN(len(l))] }
	for i := range 12 {
		switch rnd.IntN(6) {
		case 0, 1:
			d := fmt.Sprintf("%sd%d/", pick(m.dirs()), rnd.IntN(4))
			if _, file := m[strings.TrimSuffix(d, "/")]; file {
				continue
			}
			m[d], mine[d] = "", ""
			list = append(list, regtest.Dir(d, 0o755))
		case 2, 3:
			f := fmt.Sprintf("%sf%d", pick(m.dirs()), rnd.IntN(6))
			if _, dir := m[f+"/"]; dir {
				continue
			}
			c := fmt.Sprintf("%d.%d", n, i)
			m[f], mine[f] = c, c
			list = append(list, regtest.File(f, c, 0o644))
		case 4: // a whiteout of something below
			if len(m) == 0 {
				continue
			}
			p := pick(m.names())
			if anyBelow(mine, p) || anyBelow(in, p) { // a diff does not delete in what it deletes
				continue
			}
			m.remove(p)
			p = strings.TrimSuffix(p, "/")
			in[filepath.Dir(p)+"/x"] = "" // the folder itself may become opaque, those above not
			list = append(list, regtest.File(filepath.Join(filepath.Dir(p), ".wh."+filepath.Base(p)), "", 0))
		case 5: // an opaque folder, or, seldom, root
			d := pick(m.dirs())
			if d == "" && rnd.IntN(3) > 0 || anyBelow(mine, d) || deeper(in, d) {
				continue
			}
			for k := range m {
				if k != d && strings.HasPrefix(k, d) {
					delete(m, k)
				}
			}
			if d != "" {
				mine[d] = ""
				list = append(list, regtest.Dir(d, 0o755))
			}
			list = append(list, regtest.File(d+".wh..wh..opq", "", 0))
		}
	}
	return regtest.Tar(list...)
}

func anyBelow(m model, p string) bool {
	p = strings.TrimSuffix(p, "/")
	for k := range m {
		if p == "" || strings.TrimSuffix(k, "/") == p || strings.HasPrefix(k, p+"/") {
			return true
		}
	}
	return false
}

func deeper(in model, d string) bool {
	for k := range in {
		if strings.HasPrefix(k, d) && strings.Count(k, "/") > strings.Count(d, "/") {
			return true
		}
	}
	return false
}

func testOverlay(t *testing.T, seed uint64) {
	rnd := rand.New(rand.NewPCG(seed, 7))
	reg := regtest.New(t)
	m := model{}
	var ls []regtest.Layer
	for n := range 6 {
		ls = append(ls, regtest.Gzip(m.change(rnd, n)))
	}
	reg.Build("app", "v1", nil, ls...)
	s := openStore(t, testConfig(t))
	id := mustPull(t, s, reg.Host()+"/app:v1")
	dirs, err := s.Layers(t.Context(), id, "c")
	must(t, err)
	w, err := s.NewWritable(t.Context(), "c")
	must(t, err)
	upper, work := w.Upper, w.Work
	at := t.TempDir()
	opts := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", strings.Join(dirs, ":"), upper, work)
	if err := unix.Mount("overlay", at, "overlay", 0, opts); err != nil {
		t.Skipf("overlay mounts do not work here: %v", err)
	}
	got := model{}
	err = filepath.WalkDir(at, func(p string, d os.DirEntry, err error) error {
		if err != nil || p == at {
			return err
		}
		rel, _ := filepath.Rel(at, p)
		if d.IsDir() {
			got[rel+"/"] = ""
			return nil
		}
		data, err := os.ReadFile(p)
		got[rel] = string(data)
		return err
	})
	if uerr := unix.Unmount(at, 0); uerr != nil {
		t.Error(uerr)
	}
	must(t, err)
	if !slices.Equal(got.names(), m.names()) {
		t.Fatalf("mounted:\n%v\nwanted:\n%v", got.names(), m.names())
	}
	for k, v := range m {
		if got[k] != v {
			t.Errorf("%s: %q, want %q", k, got[k], v)
		}
	}
}
