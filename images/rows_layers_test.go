package images

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/images/internal/regtest"
	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/sys"
)

// The rows of docs/security.md that need whole images, pulled and mounted.

// mounted is an image as a container sees it. Names are looked up in it as
// inside the container.
type mounted struct {
	t    *testing.T
	root *os.File
}

// mountImage pulls the image and mounts its layers as the executor does.
func mountImage(t *testing.T, s *Store, ref string) mounted {
	t.Helper()
	id := mustPull(t, s, ref)
	owner := "mount-" + id[7:19]
	dirs, err := s.Layers(t.Context(), id, owner)
	must(t, err)
	w, err := s.NewWritable(t.Context(), owner)
	must(t, err)
	at := t.TempDir()
	must(t, unix.Mount("overlay", at, "overlay", 0, fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", strings.Join(dirs, ":"), w.Upper, w.Work)))
	t.Cleanup(func() { must(t, unix.Unmount(at, unix.MNT_DETACH)) })
	root, err := os.Open(at)
	must(t, err)
	t.Cleanup(func() { _ = root.Close() })
	return mounted{t, root}
}

func (m mounted) open(name string, flags int) (*os.File, error) {
	return sys.OpenInRoot(m.root, name, flags)
}

func (m mounted) content(name, want string) {
	m.t.Helper()
	f, err := m.open(name, unix.O_RDONLY)
	if err != nil {
		m.t.Errorf("%s: %v", name, err)
		return
	}
	defer func() { _ = f.Close() }()
	if data, err := io.ReadAll(f); err != nil || string(data) != want {
		m.t.Errorf("%s: %q %v, want %q", name, data, err, want)
	}
}

func (m mounted) absent(name string) {
	m.t.Helper()
	f, err := m.open(name, unix.O_PATH|unix.O_NOFOLLOW)
	if err == nil {
		_ = f.Close()
	}
	if !errors.Is(err, fs.ErrNotExist) {
		m.t.Errorf("%s is there: %v", name, err)
	}
}

// same: both names lead to one object, links followed.
func (m mounted) same(a, b string, want bool) {
	m.t.Helper()
	var st [2]unix.Stat_t
	for i, name := range []string{a, b} {
		f, err := m.open(name, unix.O_PATH)
		if err != nil {
			m.t.Errorf("%s: %v", name, err)
			return
		}
		err = unix.Fstat(int(f.Fd()), &st[i])
		_ = f.Close()
		must(m.t, err)
	}
	if got := st[0].Ino == st[1].Ino && st[0].Dev == st[1].Dev; got != want {
		m.t.Errorf("%s and %s are one object: %v", a, b, got)
	}
}

// canary is a folder of the host, and what it holds.
func canary(t *testing.T) (dir string, check func()) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "canary")
	must(t, os.MkdirAll(dir+"/sub", 0o755))
	must(t, os.WriteFile(dir+"/f", []byte("canary"), 0o400))
	describe := func() string {
		out := ""
		must(t, filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
			var st unix.Stat_t
			err = errors.Join(err, unix.Lstat(p, &st))
			out += fmt.Sprintf("%s %o %d:%d %d links %d %v %v\n", p, st.Mode, st.Uid, st.Gid, st.Size, st.Nlink, st.Mtim, st.Ctim)
			return err
		}))
		return out
	}
	before := describe()
	return dir, func() {
		t.Helper()
		if now := describe(); now != before {
			t.Errorf("the canary changed:\n%swas:\n%s", now, before)
		}
	}
}

var (
	tdir  = func(name string) tar.Header { return regtest.Dir(name, 0o755) }
	tfile = func(name, content string) tar.Header { return regtest.File(name, content, 0o644) }
	tlink = regtest.Link
	tsym  = regtest.Symlink
	opq   = ".wh..wh..opq"
)

type breakout struct {
	name   string
	layers [][]tar.Header // base first; %C is the canary
	bad    bool           // the pull fails
	check  func(m mounted)
}

// breakouts are the cases of containerd's TestBreakouts under their names, and a
// few of our own. What that test finds in the folder is a layer below here. A
// name whose parent is a link of another layer makes a folder in its own
// layer, as in every overlay diff: those cases differ in where the file is,
// inside, from what one tree for all layers would give.
func breakouts() []breakout {
	etc := []tar.Header{tdir("etc"), tfile("etc/passwd", "inside")}
	in := func(more ...tar.Header) [][]tar.Header {
		return [][]tar.Header{append(append([]tar.Header{}, etc...), more...)}
	}
	plain := func(list ...tar.Header) [][]tar.Header { return [][]tar.Header{list} }
	below := func(lower []tar.Header, upper ...tar.Header) [][]tar.Header {
		return [][]tar.Header{append(append([]tar.Header{}, etc...), lower...), upper}
	}
	unbroken := func(m mounted) { m.content("etc/unbroken", "unbroken") }
	ub := func(name string) tar.Header { return tfile(name, "unbroken") }
	linked := func(name string) func(mounted) {
		return func(m mounted) { m.same(name, "etc/passwd", true); m.content("etc/passwd", "inside") }
	}
	kept := func(m mounted) { m.content("etc/passwd", "inside") }
	local := tsym("localetc", "/etc")
	hidden := func(m mounted) { m.content("localetc/localpasswd", "inside"); m.absent("etc/localpasswd") }
	pass := func(name string) tar.Header { return tfile(name, "inside") }
	return []breakout{
		{"SymlinkAbsolute", plain(tdir("etc"), local, ub("/localetc/unbroken")), false, unbroken},
		{"SymlinkUpAndOut", plain(tdir("etc"), tdir("dummy"), tsym("localetc", "/dummy/../etc"), ub("/localetc/unbroken")), false, unbroken},
		{"SymlinkMultipleAbsolute", plain(tdir("etc"), tdir("dummy"), tsym("/dummy/etc", "/etc"), tsym("localetc", "/dummy/etc"), ub("/dummy/etc/unbroken")), false, unbroken},
		{"SymlinkMultipleRelative", plain(tdir("etc"), tdir("dummy"), tsym("/dummy/etc", "/etc"), tsym("localetc", "./dummy/etc"), ub("/dummy/etc/unbroken")), false, unbroken},
		{"SymlinkEmptyFile", plain(tdir("etc"), tfile("etc/emptied", "notempty"), local, tfile("/localetc/emptied", "")), false, func(m mounted) { m.content("etc/emptied", "") }},
		{"HardlinkRelative", in(tdir("breakouts"), tsym("breakouts/d1", "../../etc"), tlink("breakouts/mypasswd", "/breakouts/d1/passwd")), false, linked("breakouts/mypasswd")},
		{"HardlinkDownAndOut", in(tdir("breakouts"), tdir("downandout"), tsym("breakouts/d1", "../downandout/../../etc"), tlink("breakouts/mypasswd", "/breakouts/d1/passwd")), false, linked("breakouts/mypasswd")},
		{"HardlinkAbsolute", in(local, tlink("localpasswd", "/localetc/passwd")), false, linked("localpasswd")},
		{"HardlinkRelativeLong", in(tsym("localetc", "../../../../../../../etc"), tlink("localpasswd", "/localetc/passwd")), false, linked("localpasswd")},
		{"HardlinkRelativeUpAndOut", in(tdir("upandout"), tsym("localetc", "upandout/../../../etc"), tlink("localpasswd", "/localetc/passwd")), false, linked("localpasswd")},
		{"HardlinkRelativeUpAndOut through nothing", in(tsym("localetc", "upandout/../../../etc"), tlink("localpasswd", "/localetc/passwd")), true, nil},
		{"HardlinkDirectRelative", in(tlink("localpasswd", "../../../../../etc/passwd")), false, linked("localpasswd")},
		{"HardlinkDirectAbsolute", in(tlink("localpasswd", "/etc/passwd")), false, linked("localpasswd")},
		{"SymlinkParentDirectory", in(tsym("..", "/etc/"), tlink("localpasswd", "/etc/passwd")), true, nil},
		{"SymlinkParentRelative", in(tsym("localetc/sub/..", "/etc/"), tlink("/localetc/localpasswd", "/etc/passwd")), false, linked("localetc/localpasswd")},
		{"SymlinkSlashEnded", in(tdir("localetc/"), tlink("/localetc/localpasswd", "/etc/passwd")), false, linked("localetc/localpasswd")},
		{"SymlinkOverrideDirectory", below([]tar.Header{tdir("localetc")}, local, pass("/localetc/localpasswd")), false, linkedThere},
		{"SymlinkOverrideDirectoryRelative", below([]tar.Header{tdir("localetc")}, tsym("localetc", "../../etc"), pass("/localetc/localpasswd")), false, linkedThere},
		{"DirectoryOverrideSymlink", below([]tar.Header{local}, tdir("/localetc/"), pass("/localetc/localpasswd")), false, hidden},
		{"DirectoryOverrideSymlinkAndHardlink", below([]tar.Header{tsym("localetc", "etc"), tlink("/localetc/localpasswd", "/etc/passwd")}, tdir("/localetc/"), tfile("/localetc/localpasswd", "different")),
			false, func(m mounted) { m.same("localetc/localpasswd", "etc/passwd", false); kept(m) }},
		{"WhiteoutRootParent", below(nil, tfile(".wh...", "")), true, nil},
		{"WhiteoutParent", below(nil, tfile("etc/.wh...", "")), true, nil},
		{"WhiteoutRoot", below(nil, tfile(".wh..", "")), true, nil},
		{"WhiteoutCurrentDirectory", below(nil, tfile("etc/.wh..", "")), true, nil},
		{"WhiteoutSymlink", below([]tar.Header{local}, tfile(".wh.localetc", "")), false, func(m mounted) { m.absent("localetc"); kept(m) }},
		{"WhiteoutSymlinkPath", below([]tar.Header{local, tfile("etc/whitedout", "w")}, tfile("localetc/.wh.whitedout", "")), false,
			func(m mounted) { m.absent("localetc/whitedout"); m.content("etc/whitedout", "w"); kept(m) }},
		{"WhiteoutSymlinkPath in one layer", in(local, tfile("localetc/.wh.whitedout", "")), false, kept},
		{"WhiteoutDirectoryName", below(nil, tfile(".wh.etc/somefile", "non-empty")), true, nil},
		{"WhiteoutDeadSymlinkParent", below([]tar.Header{tsym("localetc", "/dne")}, tfile("localetc/.wh.etc", "")), false, kept},
		{"WhiteoutRelativePath", below([]tar.Header{tsym("localetc", "/dne")}, tfile("dne/../.wh.etc", "")), false, func(m mounted) { m.absent("etc") }},
		{"WhiteoutOpaque", below([]tar.Header{tfile("etc/shadow", "s")}, tfile("etc/"+opq, ""), tfile("etc/group", "g")), false,
			func(m mounted) { m.absent("etc/passwd"); m.absent("etc/shadow"); m.content("etc/group", "g") }},
		{"WhiteoutOpaqueOutOfOrder", below(nil, tfile("etc/group", "g"), tfile("etc/"+opq, "")), false, func(m mounted) { m.absent("etc/passwd"); m.content("etc/group", "g") }},
		{"SymlinkOverridePath", plain(tdir("foo"), tdir("foo/tmp"), tfile("foo/tmp/x", "1"), tsym("foo", "/"), tfile("foo/tmp/x", "2"), tdir("foo"), tdir("foo/tmp"), tfile("foo/tmp/x", "3")),
			false, func(m mounted) { m.content("foo/tmp/x", "3") }},
		{"HardlinkSymlinkBeforeCreateTarget", plain(tdir("etc"), tsym("localpasswd", "/etc/passwd"), tlink("localpasswd-dup", "localpasswd"), tfile("/etc/passwd", "inside")), false, linked("localpasswd-dup")},
		{"HardlinkSymlinkRelative", in(tsym("passwdlink", "../../../../../etc/passwd"), tlink("localpasswd", "/passwdlink")), false, linked("localpasswd")},
		{"HardlinkSymlinkAbsolute", in(tsym("passwdlink", "/etc/passwd"), tlink("localpasswd", "/passwdlink")), false, linked("localpasswd")},
		{"HardlinkSymlinkChmod", plain(tsym("%C/also", "%C/f"), tlink("sketchylink", "%C/also"), regtest.File("sketchylink", "x", 0o777)), false, nil},
	}
}

// linkedThere: the upper layer's link is what counts, its file is in /etc.
func linkedThere(m mounted) {
	m.content("etc/localpasswd", "inside")
	m.content("localetc/localpasswd", "inside")
}

// layersOfOne is several layers as one.
func layersOfOne(layers [][]tar.Header) [][]tar.Header {
	var all []tar.Header
	for _, l := range layers {
		all = append(all, l...)
	}
	return [][]tar.Header{all}
}

// Rows I-01, I-02, I-03, I-06: whole images of the well-known breakouts.
func TestRowI01Breakouts(t *testing.T) {
	for _, b := range breakouts() {
		t.Run(b.name, func(t *testing.T) { tryBreakout(t, b) })
	}
}

func tryBreakout(t *testing.T, b breakout) {
	dir, check := canary(t)
	reg := regtest.New(t)
	s := openStore(t, testConfig(t))
	for i, layers := range [][][]tar.Header{b.layers, layersOfOne(b.layers)} {
		if i == 1 && len(b.layers) == 1 {
			continue
		}
		var packed []regtest.Layer
		for _, l := range layers {
			list := append([]tar.Header{}, l...)
			for i := range list {
				list[i].Name = strings.ReplaceAll(list[i].Name, "%C", dir)
				list[i].Linkname = strings.ReplaceAll(list[i].Linkname, "%C", dir)
			}
			packed = append(packed, regtest.Gzip(regtest.Tar(list...)))
		}
		ref := fmt.Sprint("v", i)
		reg.Build("app", ref, nil, packed...)
		switch {
		case b.bad:
			failPull(t, s, reg.Host()+"/app:"+ref, errs.FailedPrecondition)
			waitEmpty(t, s)
		default:
			m := mountImage(t, s, reg.Host()+"/app:"+ref)
			if b.check != nil && i == 0 {
				b.check(m)
			}
		}
		check()
	}
}

// Row I-02: a layer's link to the host, and a write through it by the same, the
// next or a later layer. %C in a check is a name inside the container.
func TestRowI02WriteThroughLink(t *testing.T) {
	evil := []tar.Header{tfile("d/f", "evil"), tfile("d/sub/deep/er/f", "evil"), tfile("d/../f2", "evil"), tdir("d/sub"), tfile("d/.wh.f3", "")}
	var chain []tar.Header
	chain = append(chain, tsym("d40", "%C"))
	for i := range 40 {
		chain = append(chain, tsym(fmt.Sprint("d", 39-i), fmt.Sprint("d", 40-i)))
	}
	ownFolder := func(m mounted) {
		m.content("d/f", "evil")
		m.content("d/sub/deep/er/f", "evil")
		m.content("f2", "evil")
	}
	for _, to := range []string{"%C", "../../../../../../..%C", "/proc/self/root%C", "/proc/1/cwd/%C"} {
		d := []tar.Header{tsym("d", to)}
		magic := strings.HasPrefix(to, "/proc") // nothing more than a name in the image
		for _, b := range []breakout{
			{"same layer", [][]tar.Header{append(append([]tar.Header{}, d...), evil...)}, false, func(m mounted) { m.content("d/f", "evil") }},
			{"next layer", [][]tar.Header{d, evil}, false, ownFolder},
			{"third layer", [][]tar.Header{d, {tfile("other", "x")}, evil}, false, ownFolder},
			{"removed between", [][]tar.Header{d, {tfile(".wh.d", "")}, evil}, false, ownFolder},
			{"opaque between", [][]tar.Header{d, {tfile(opq, "")}, evil}, false, ownFolder},
			{"a folder and then a link", [][]tar.Header{{tdir("d")}, d, {tfile("d/f", "evil")}}, false, func(m mounted) { m.content("d/f", "evil") }},
			{"hard link to the link", [][]tar.Header{append(append([]tar.Header{}, d...), tlink("e", "d"), tfile("e/f", "evil"))}, false, func(m mounted) { m.content("d/f", "evil") }},
		} {
			if magic && b.name == "same layer" {
				b.check = nil
			}
			t.Run(b.name+" "+to, func(t *testing.T) { tryBreakout(t, b) })
		}
	}
	t.Run("41 links in the same layer", func(t *testing.T) {
		tryBreakout(t, breakout{"", [][]tar.Header{append(append([]tar.Header{}, chain...), tfile("d0/f", "evil"))}, true, nil})
	})
	t.Run("41 links in the layer below", func(t *testing.T) {
		dir, check := canary(t)
		reg := regtest.New(t)
		s := openStore(t, testConfig(t))
		for i := range chain {
			chain[i].Linkname = strings.ReplaceAll(chain[i].Linkname, "%C", dir)
		}
		reg.Build("app", "v1", nil, regtest.Gzip(regtest.Tar(chain...)), regtest.Gzip(regtest.Tar(tfile("d0/f", "evil"))))
		mountImage(t, s, reg.Host()+"/app:v1").content("d0/f", "evil")
		check()
	})
}

// Row I-05: an image whose base says that the root is something else, and one
// that nobody may enter, with ordinary files above.
func TestRowI05RootOfAnImage(t *testing.T) {
	above := []tar.Header{tdir("etc"), tfile("etc/f", "x")}
	for _, name := range []string{".", "./", "/"} {
		tryBreakout(t, breakout{"", [][]tar.Header{{tsym(name, "%C")}, above}, true, nil})
		tryBreakout(t, breakout{"", [][]tar.Header{{tfile("a", ""), tlink(name, "a")}, above}, true, nil})
		tryBreakout(t, breakout{"", [][]tar.Header{{regtest.Dir(name, 0)}, above, {regtest.Dir(name, 0)}}, false, func(m mounted) {
			m.content("etc/f", "x")
			var st unix.Stat_t
			if err := unix.Fstat(int(m.root.Fd()), &st); err != nil || st.Mode != unix.S_IFDIR|0o755 {
				m.t.Errorf("the root has mode %o, %v", st.Mode, err)
			}
		}})
	}
}

// Row I-07: what is being unpacked is behind a folder that only root enters.
func TestRowI07PrivateWhileUnpacking(t *testing.T) {
	reg := regtest.New(t)
	cfg := testConfig(t)
	s := openStore(t, cfg)
	l := regtest.Uncompressed(regtest.Tar(regtest.File("suid", strings.Repeat("x", 1<<20), 0o4755)))
	reg.Build("app", "v1", nil, l)
	var seen atomic.Bool
	reg.SetHook(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasSuffix(r.URL.Path, digest.FromBytes(l.Packed).String()) {
			return false
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(l.Packed)))
		_, _ = w.Write(l.Packed[:1<<19])
		w.(http.Flusher).Flush()
		waitFor(t, func() bool {
			found, _ := filepath.Glob(cfg.Root + "/layers/tmp-*/suid")
			seen.Store(len(found) == 1)
			return seen.Load()
		})
		for _, d := range []string{cfg.Root, cfg.Root + "/layers"} {
			if st, err := os.Stat(d); err != nil || st.Mode() != fs.ModeDir|0o700 {
				t.Errorf("%s: %v %v", d, st.Mode(), err)
			}
		}
		_, _ = w.Write(l.Packed[1<<19:])
		return true
	})
	mustPull(t, s, reg.Host()+"/app:v1")
	if !seen.Load() {
		t.Error("the layer was not seen while it was unpacked")
	}
}
