package unpack

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/images/internal/regtest"
	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/testhost"
)

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: owners of files, devices, trusted.* attributes")
	}
}

// place is a folder to unpack into, with a canary tree beside it.
type place struct {
	t      testing.TB
	root   string
	canary string
	before string
}

func newPlace(t testing.TB) *place {
	t.Helper()
	needRoot(t)
	top := t.TempDir()
	p := &place{t: t, root: filepath.Join(top, "root"), canary: filepath.Join(top, "canary")}
	for _, d := range []string{p.root, p.canary, filepath.Join(p.canary, "sub")} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, mode := range map[string]os.FileMode{"f": 0o400, "suid": 0o755 | os.ModeSetuid, "sub/g": 0o640} {
		path := filepath.Join(p.canary, name)
		if err := errors.Join(os.WriteFile(path, []byte("canary "+name), 0o600), os.Chmod(path, mode)); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mkfifo(filepath.Join(p.canary, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	p.before = describe(t, p.canary)
	return p
}

func (p *place) unpack(archive []byte, lim Limits) (Result, error) {
	p.t.Helper()
	dir, err := os.Open(p.root)
	if err != nil {
		p.t.Fatal(err)
	}
	defer func() { _ = dir.Close() }()
	res, err := Tar(context.Background(), dir, bytes.NewReader(archive), lim)
	if now := describe(p.t, p.canary); now != p.before {
		p.t.Errorf("the canary changed:\n%s\nwas:\n%s", now, p.before)
	}
	if st, serr := os.Lstat(p.root); serr != nil || !st.IsDir() {
		p.t.Errorf("the root is no folder any more: %v", serr)
	}
	return res, err
}

// describe lists a tree with all that could change.
func describe(t testing.TB, root string) string {
	t.Helper()
	var lines []string
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, path)
		line := fmt.Sprintf("%s mode=%o %d:%d nlink=%d rdev=%d mtime=%d.%d", rel, st.Mode, st.Uid, st.Gid, st.Nlink, st.Rdev, st.Mtim.Sec, st.Mtim.Nsec)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %q", data)
		case unix.S_IFLNK:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			line += " -> " + to
		}
		lines = append(lines, line+xattrs(path))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	sort.Strings(lines)
	return strings.Join(lines, "\n")
}

func xattrs(path string) string {
	buf := make([]byte, 4096)
	n, err := unix.Llistxattr(path, buf)
	if err != nil {
		return ""
	}
	out := ""
	names := strings.Split(strings.Trim(string(buf[:n]), "\x00"), "\x00")
	sort.Strings(names)
	for _, name := range names {
		if name == "" || name == "security.selinux" {
			continue
		}
		v := make([]byte, 65536)
		k, err := unix.Lgetxattr(path, name, v)
		if err == nil {
			out += fmt.Sprintf(" %s=%x", name, v[:k])
		}
	}
	return out
}

func (p *place) path(name string) string { return filepath.Join(p.root, name) }

func (p *place) content(name, want string) {
	p.t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(p.path(name), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		p.t.Errorf("%s: mode %o, %v", name, st.Mode, err)
		return
	}
	if data, err := os.ReadFile(p.path(name)); err != nil || string(data) != want {
		p.t.Errorf("%s: %q %v, want %q", name, data, err, want)
	}
}

func (p *place) absent(name string) {
	p.t.Helper()
	if _, err := os.Lstat(p.path(name)); !errors.Is(err, fs.ErrNotExist) {
		p.t.Errorf("%s is there: %v", name, err)
	}
}

func (p *place) stat(name string) unix.Stat_t {
	p.t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(p.path(name), &st); err != nil {
		p.t.Errorf("%s: %v", name, err)
	}
	return st
}

func (p *place) same(a, b string) {
	p.t.Helper()
	if x, y := p.stat(a), p.stat(b); x.Ino != y.Ino {
		p.t.Errorf("%s and %s are different objects", a, b)
	}
}

func (p *place) whiteout(name string) {
	p.t.Helper()
	if st := p.stat(name); st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != 0 {
		p.t.Errorf("%s is no whiteout: %o %d", name, st.Mode, st.Rdev)
	}
}

func (p *place) opaque(name string, want bool) {
	p.t.Helper()
	if got := strings.Contains(xattrs(p.path(name)), " trusted.overlay.opaque=79"); got != want {
		p.t.Errorf("%s: opaque is %v", name, got)
	}
}

var (
	dir     = regtest.Dir
	file    = regtest.File
	symlink = regtest.Symlink
	link    = regtest.Link
)

// Rows I-01, I-02, I-03, I-04, I-05 and I-06, as they look from inside one
// layer. %C stands for the canary folder.
func TestBreakouts(t *testing.T) {
	etc := []tar.Header{dir("etc", 0o770), file("/etc/passwd", "inside", 0o644)}
	with := func(more ...tar.Header) []tar.Header { return append(append([]tar.Header{}, etc...), more...) }
	linked := func(p *place) { p.same("localpasswd", "etc/passwd"); p.content("etc/passwd", "inside") }
	cases := []struct {
		name  string
		list  []tar.Header
		bad   bool
		check func(*place)
	}{
		{"name goes up", []tar.Header{file("../../../x", "1", 0o644), file("a/../../y", "2", 0o644)}, false,
			func(p *place) { p.content("x", "1"); p.content("y", "2") }},
		{"absolute name", []tar.Header{file("%C/f", "evil", 0o644)}, false, nil},
		{"odd names", []tar.Header{file("./a//b/./c", "1", 0o644), file("back\\slash", "2", 0o644)}, false,
			func(p *place) { p.content("a/b/c", "1"); p.content("back\\slash", "2") }},
		{"symlink absolute", []tar.Header{dir("etc", 0o755), symlink("localetc", "/etc"), file("/localetc/unbroken", "ok", 0o644)}, false,
			func(p *place) { p.content("etc/unbroken", "ok") }},
		{"symlink up and out", []tar.Header{dir("etc", 0o755), dir("dummy", 0o755), symlink("localetc", "/dummy/../etc"), file("localetc/unbroken", "ok", 0o644)}, false,
			func(p *place) { p.content("etc/unbroken", "ok") }},
		{"symlink twice", []tar.Header{dir("etc", 0o755), dir("dummy", 0o755), symlink("/dummy/etc", "/etc"), symlink("localetc", "./dummy/etc"), file("localetc/unbroken", "ok", 0o644)}, false,
			func(p *place) { p.content("etc/unbroken", "ok") }},
		{"write through symlink", []tar.Header{symlink("d", "%C"), file("d/f", "evil", 0o644), file("d/new", "evil", 0o644)}, false, nil},
		{"write through relative symlink", []tar.Header{dir("a", 0o755), symlink("a/d", "../../canary"), file("a/d/f", "evil", 0o644)}, false,
			func(p *place) { p.content("canary/f", "evil") }},
		{"last component is a symlink", []tar.Header{symlink("f", "%C/f"), file("f", "evil", 0o644)}, false,
			func(p *place) { p.content("f", "evil") }},
		{"symlink to an emptied file", []tar.Header{dir("etc", 0o755), file("etc/emptied", "notempty", 0o644), symlink("localetc", "/etc"), file("localetc/emptied", "", 0o644)}, false,
			func(p *place) { p.content("etc/emptied", "") }},
		{"symlink chain of 41", chain(41), true, nil},
		{"symlink chain of 39", chain(39), false, func(p *place) { p.content("real/f", "x") }},
		{"dangling symlink loop", []tar.Header{symlink("a", "b"), symlink("b", "a"), file("a/f", "x", 0o644)}, true, nil},
		{"dangling symlink grows", []tar.Header{symlink("a", "a/x"), file("a/f", "x", 0o644)}, true, nil},
		{"dangling symlink is made inside", []tar.Header{dir("var", 0o755), symlink("var/run", "../run"), file("var/run/pid", "1", 0o644)}, false,
			func(p *place) { p.content("run/pid", "1") }},
		{"dangling symlink up", []tar.Header{symlink("r", "../../../x"), file("r/f", "1", 0o644)}, false,
			func(p *place) { p.content("x/f", "1") }},
		{"parent is a file", []tar.Header{file("a", "x", 0o644), file("a/b", "y", 0o644)}, true, nil},

		{"hardlink by symlink", with(dir("b", 0o755), symlink("b/d1", "../../etc"), link("localpasswd", "/b/d1/passwd")), false, linked},
		{"hardlink down and out", with(dir("b", 0o755), dir("down", 0o755), symlink("b/d1", "../down/../../etc"), link("localpasswd", "b/d1/passwd")), false, linked},
		{"hardlink by absolute symlink", with(symlink("l", "/etc"), link("localpasswd", "/l/passwd")), false, linked},
		{"hardlink by long symlink", with(symlink("l", "../../../../../../etc"), link("localpasswd", "/l/passwd")), false, linked},
		{"hardlink direct", with(link("localpasswd", "../../../../../etc/passwd")), false, linked},
		{"hardlink to the host", []tar.Header{link("x", "%C/f")}, true, nil},
		{"hardlink to the host by symlink", []tar.Header{symlink("d", "%C"), link("x", "d/f")}, true, nil},
		{"hardlink to a symlink", with(symlink("pl", "%C/f"), link("localpl", "pl")), false,
			func(p *place) { p.same("localpl", "pl") }},
		{"hardlink to a symlink, then its header", []tar.Header{symlink("s", "%C/f"), {Name: "h", Typeflag: tar.TypeLink, Linkname: "s", Mode: 0o777, Uid: 1234,
			PAXRecords: map[string]string{"SCHILY.xattr.user.x": "y"}}}, false, nil},
		{"hardlink to a symlink, then a file", []tar.Header{symlink("s", "%C/f"), link("h", "s"), file("h", "evil", 0o777)}, false,
			func(p *place) { p.content("h", "evil") }},
		{"hardlink before its target", []tar.Header{link("a", "b"), file("b", "x", 0o644)}, true, nil},
		{"hardlink to itself", []tar.Header{link("a", "a")}, true, nil},
		{"hardlink to a folder", []tar.Header{dir("d", 0o755), link("a", "d")}, true, nil},
		{"hardlink to the root", []tar.Header{link("a", "/")}, true, nil},
		{"hardlink to a whiteout", []tar.Header{file(".wh.a", "", 0), link("b", "a")}, true, nil},
		{"hardlink again", with(link("localpasswd", "etc/passwd"), link("localpasswd", "etc/passwd")), false, linked},

		{"folder over symlink", with(symlink("l", "/etc"), dir("l", 0o755), link("l/localpasswd", "etc/passwd")), false,
			func(p *place) {
				p.same("l/localpasswd", "etc/passwd")
				p.absent("etc/localpasswd")
				p.opaque("l", true)
			}},
		{"folder over symlink to the host", []tar.Header{symlink("l", "%C"), dir("l", 0o777), file("l/f", "x", 0o644)}, false,
			func(p *place) { p.content("l/f", "x") }},
		{"symlink over folder", []tar.Header{dir("foo", 0o755), dir("foo/tmp", 0o755), file("foo/tmp/x", "1", 0o644), symlink("foo", "/"),
			file("foo/tmp/x", "2", 0o644), dir("foo", 0o755), dir("foo/tmp", 0o755), file("foo/tmp/x", "3", 0o644)}, false,
			func(p *place) { p.content("tmp/x", "2"); p.content("foo/tmp/x", "3") }},
		{"file over folder", []tar.Header{dir("d", 0o755), file("d/f", "x", 0o644), file("d", "y", 0o644)}, false,
			func(p *place) { p.content("d", "y") }},
		{"stale cached folder", []tar.Header{dir("d", 0o755), file("d/f", "x", 0o644), symlink("d", "%C"), file("d/f", "evil", 0o644)}, false, nil},

		{"root is a symlink", []tar.Header{symlink("./", "%C"), file("f", "evil", 0o644)}, true, nil},
		{"root is a symlink, named .", []tar.Header{symlink(".", "%C")}, true, nil},
		{"root is a symlink, by ..", []tar.Header{symlink("a/..", "%C")}, true, nil},
		{"root is a hardlink", []tar.Header{file("a", "x", 0o644), link("/", "a")}, true, nil},
		{"root is a file", []tar.Header{file(".", "x", 0o644)}, true, nil},
		{"root is a fifo", []tar.Header{{Name: ".", Typeflag: tar.TypeFifo}}, true, nil},
		{"root without rights", []tar.Header{dir("./", 0), file("f", "x", 0o644)}, false,
			func(p *place) { p.content("f", "x") }},

		{"whiteout of ..", []tar.Header{file(".wh...", "", 0)}, true, nil},
		{"whiteout of .. below", []tar.Header{dir("etc", 0o755), file("etc/.wh...", "", 0)}, true, nil},
		{"whiteout of .", []tar.Header{file(".wh..", "", 0)}, true, nil},
		{"whiteout of nothing", []tar.Header{file(".wh.", "", 0)}, true, nil},
		{"whiteout of a whiteout", []tar.Header{file(".wh..wh.x", "", 0)}, true, nil},
		{"whiteout in a name", []tar.Header{file(".wh.etc/somefile", "x", 0o644)}, true, nil},
		{"whiteout is a folder", []tar.Header{dir(".wh.x", 0o755)}, true, nil},
		{"whiteout is a symlink", []tar.Header{symlink(".wh.x", "%C")}, true, nil},
		{"whiteout through symlink", []tar.Header{symlink("d", "%C"), file("d/.wh.f", "", 0)}, false, nil},
		{"opaque through symlink", []tar.Header{symlink("d", "%C"), file("d/.wh..wh..opq", "", 0)}, false, nil},
		{"whiteout of a link to the host", []tar.Header{symlink("d", "%C"), file(".wh.d", "", 0)}, false, nil},
		{"AUFS data", []tar.Header{file(".wh..wh.aufs", "", 0), dir(".wh..wh.plnk", 0o755), file(".wh..wh.plnk/1.2", "", 0o644), dir(".wh..wh.orph", 0o755)}, false,
			func(p *place) { p.absent(".wh..wh.aufs"); p.absent(".wh..wh.plnk") }},
		{"raw whiteout device", []tar.Header{{Name: "x", Typeflag: tar.TypeChar}}, true, nil},
		{"unknown type", []tar.Header{{Name: "x", Typeflag: 'Z'}}, true, nil},
		{"times on a link", []tar.Header{{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "%C/f", Uid: 99, Gid: 99, Mode: 0o777, ModTime: time.Unix(5, 0)}}, false,
			func(p *place) {
				if st := p.stat("l"); st.Uid != 99 || st.Mtim.Sec != 5 {
					p.t.Errorf("link has owner %d, time %d", st.Uid, st.Mtim.Sec)
				}
			}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			p := newPlace(t)
			list := append([]tar.Header{}, c.list...)
			for i := range list {
				list[i].Name = strings.ReplaceAll(list[i].Name, "%C", p.canary)
				list[i].Linkname = strings.ReplaceAll(list[i].Linkname, "%C", p.canary)
			}
			_, err := p.unpack(regtest.Tar(list...), Limits{})
			if (err != nil) != c.bad {
				t.Fatalf("error %v", err)
			}
			if err != nil && errs.Of(err) != errs.FailedPrecondition {
				t.Errorf("class %v: %v", errs.Of(err), err)
			}
			if c.check != nil {
				c.check(p)
			}
		})
	}
}

func chain(n int) []tar.Header {
	list := []tar.Header{dir("real", 0o755), symlink("l0", "real")}
	for i := 1; i < n; i++ {
		list = append(list, symlink(fmt.Sprintf("l%d", i), fmt.Sprintf("l%d", i-1)))
	}
	return append(list, file(fmt.Sprintf("l%d/f", n-1), "x", 0o644))
}

// Row I-06: what whiteouts are there for.
func TestWhiteouts(t *testing.T) {
	p := newPlace(t)
	res, err := p.unpack(regtest.Tar(
		dir("d", 0o755), file("d/.wh.gone", "", 0), dir("e", 0o755), file("e/.wh.gone", "", 0),
		file("d/.wh..wh..opq", "", 0), file("d/kept", "k", 0o644),
		file("first", "1", 0o644), file(".wh.first", "", 0), // this layer's own file stays
		file(".wh.second", "", 0), file("second", "2", 0o644),
		dir("dir1", 0o755), file("dir1/x", "x", 0o644), file(".wh.dir1", "", 0), // the folder hides what is below
		file(".wh.dir2", "", 0), dir("dir2", 0o755), file("dir2/y", "y", 0o644),
		file(".wh.dir3", "", 0), file("dir3/sub/z", "z", 0o644), // no entry for the folders
		file(".wh.f4", "", 0), symlink("f4", "x"),
		link(".wh.old", ".wh..wh.aufs"), // as AUFS wrote them
	), Limits{})
	if err != nil {
		t.Fatal(err)
	}
	p.absent("d/gone") // in an opaque folder it says nothing
	p.whiteout("e/gone")
	p.opaque("d", true)
	p.content("d/kept", "k")
	p.content("first", "1")
	p.content("second", "2")
	for d, want := range map[string]bool{"dir1": true, "dir2": true, "dir3": true, "dir3/sub": false} {
		p.opaque(d, want)
	}
	p.content("dir3/sub/z", "z")
	p.whiteout("old")
	if to, err := os.Readlink(p.path("f4")); err != nil || to != "x" {
		t.Error(to, err)
	}
	if res.RootOpaque {
		t.Error("root opaque")
	}
	p = newPlace(t)
	res, err = p.unpack(regtest.Tar(file("a", "a", 0o644), file(".wh..wh..opq", "", 0)), Limits{})
	if err != nil || !res.RootOpaque {
		t.Error(res, err)
	}
	p.content("a", "a")
}

func TestAttributes(t *testing.T) {
	p := newPlace(t)
	old := unix.Umask(0o077)
	defer unix.Umask(old)
	cap3 := "\x01\x00\x00\x03" + strings.Repeat("\x02\x00\x00\x00", 4) + "\xe8\x03\x00\x00"
	mtime := time.Unix(1_234_567_890, 123_456_789)
	x := func(h tar.Header, kv ...string) tar.Header {
		m := map[string]string{}
		for k, v := range h.PAXRecords {
			m[k] = v
		}
		for i := 0; i < len(kv); i += 2 {
			m["SCHILY.xattr."+kv[i]] = kv[i+1]
		}
		h.PAXRecords, h.ModTime = m, mtime
		return h
	}
	own := func(h tar.Header, uid, gid int) tar.Header { h.Uid, h.Gid = uid, gid; return h }
	_, err := p.unpack(regtest.Tar(
		own(dir("./", 0o751), 7, 8),
		x(own(dir("sg", 0o2775), 10, 20), "trusted.overlay.opaque", "y", "user.color", "red"),
		own(file("sg/in", "x", 0o666), 0, 0),
		x(own(file("suid", "x", 0o4755), 1000, 1001), "user.note", "n", "user.overlay.redirect", "/x", "trusted.overlay.metacopy", "",
			"trusted.x", "1", "system.posix_acl_access", "zz", "security.selinux", "u:r:t", "security.ima", "q"),
		x(file("caps", "x", 0o755), "security.capability", cap3),
		tar.Header{Name: "fifo", Typeflag: tar.TypeFifo, Mode: 0o622, Uid: 5, ModTime: mtime},
		tar.Header{Name: "null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3, Mode: 0o666, ModTime: mtime},
		tar.Header{Name: "blk", Typeflag: tar.TypeBlock, Devmajor: 254, Devminor: 0, Mode: 0o4660, ModTime: mtime},
		file("implicit/deep/f", "x", 0o644),
		file("big", "x", 0o600),
	), Limits{})
	if err != nil {
		t.Fatal(err)
	}
	check := func(name string, mode uint32, uid, gid uint32, attrs string) {
		t.Helper()
		st := p.stat(name)
		if st.Mode != mode || st.Uid != uid || st.Gid != gid {
			t.Errorf("%s: %o %d:%d, want %o %d:%d", name, st.Mode, st.Uid, st.Gid, mode, uid, gid)
		}
		if got := xattrs(p.path(name)); got != attrs {
			t.Errorf("%s: attributes %q, want %q", name, got, attrs)
		}
	}
	check(".", unix.S_IFDIR|0o751, 7, 8, "")
	check("sg", unix.S_IFDIR|0o2775, 10, 20, " user.color=726564")
	check("sg/in", unix.S_IFREG|0o666, 0, 0, "")
	check("suid", unix.S_IFREG|0o4755, 1000, 1001, " user.note=6e")
	check("caps", unix.S_IFREG|0o755, 0, 0, " security.capability="+fmt.Sprintf("%x", "\x01\x00\x00\x02"+strings.Repeat("\x02\x00\x00\x00", 4)))
	check("fifo", unix.S_IFIFO|0o622, 5, 0, "")
	check("null", unix.S_IFCHR|0o666, 0, 0, "")
	check("blk", unix.S_IFBLK|0o4660, 0, 0, "")
	check("implicit", unix.S_IFDIR|0o755, 0, 0, "")
	check("implicit/deep", unix.S_IFDIR|0o755, 0, 0, "")
	if st := p.stat("null"); st.Rdev != unix.Mkdev(1, 3) {
		t.Errorf("device %x", st.Rdev)
	}
	for _, name := range []string{"sg", "suid"} { // a folder keeps its time although files came into it
		if st := p.stat(name); st.Mtim.Sec != mtime.Unix() || st.Mtim.Nsec != int64(mtime.Nanosecond()) {
			t.Errorf("%s: time %d.%d", name, st.Mtim.Sec, st.Mtim.Nsec)
		}
	}
}

func TestRefusedValues(t *testing.T) {
	end := make([]byte, 1024)
	base256 := func(v ...byte) string { // GNU's binary numbers
		b := make([]byte, 8)
		b[0] = 0x80
		copy(b[8-len(v):], v)
		return string(b)
	}
	long := strings.Repeat("n", 256)
	cases := []struct {
		name  string
		raw   []byte
		class errs.Class
	}{
		{"uid 2^32", regtest.RawHeader("x", "", '0', map[string]string{"uid": base256(1, 0, 0, 0, 0)}), errs.FailedPrecondition},
		{"uid 2^32-1", regtest.RawHeader("x", "", '0', map[string]string{"uid": base256(255, 255, 255, 255)}), errs.FailedPrecondition},
		{"uid -1", regtest.RawHeader("x", "", '0', map[string]string{"uid": strings.Repeat("\xff", 8)}), errs.FailedPrecondition},
		{"gid 2^40", regtest.RawHeader("x", "", '0', map[string]string{"gid": base256(1, 0, 0, 0, 0, 0)}), errs.FailedPrecondition},
		{"folder uid 2^32", regtest.RawHeader("x/", "", '5', map[string]string{"uid": base256(1, 0, 0, 0, 0)}), errs.FailedPrecondition},
		{"root uid 2^32", regtest.RawHeader("./", "", '5', map[string]string{"uid": base256(1, 0, 0, 0, 0)}), errs.FailedPrecondition},
		{"char 0:0", regtest.RawHeader("x", "", '3', map[string]string{"devmajor": "0000000\x00", "devminor": "0000000\x00"}), errs.FailedPrecondition},
		{"device major", regtest.RawHeader("x", "", '4', map[string]string{"devmajor": "0777777\x00", "devminor": "0000000\x00"}), errs.FailedPrecondition},
		{"huge file", regtest.RawHeader("x", "", '0', map[string]string{"size": "\x80\x00\x00\x00\x7f\xff\xff\xff\xff\xff\xff\xff"}), errs.ResourceExhausted},
		{"truncated file", append(regtest.RawHeader("x", "", '0', map[string]string{"size": "00000007777\x00"}), "short"...), errs.FailedPrecondition},
		{"bad checksum", append([]byte("x"), regtest.RawHeader("", "", '0', nil)[1:]...), errs.FailedPrecondition},
		{"half a header", regtest.RawHeader("x", "", '0', nil)[:100], errs.FailedPrecondition},
		{"long component", regtest.Tar(file(long, "", 0o644)), errs.FailedPrecondition},
		{"long name", regtest.Tar(file(strings.Repeat("abc/", 1100)+"f", "", 0o644)), errs.FailedPrecondition},
		{"deep name", regtest.Tar(file(strings.Repeat("a/", 1500)+"f", "", 0o644)), errs.ResourceExhausted},
		{"empty target", regtest.RawHeader("l", "", '2', nil), errs.FailedPrecondition},
		{"long target", regtest.Tar(symlink("l", strings.Repeat("t", 5000))), errs.FailedPrecondition},
		{"big attributes", regtest.Tar(tar.Header{Name: "x", Typeflag: tar.TypeReg, PAXRecords: map[string]string{"SCHILY.xattr.user.a": strings.Repeat("v", 70<<10)}}), errs.ResourceExhausted},
		{"bad capability", regtest.Tar(tar.Header{Name: "x", Typeflag: tar.TypeReg, PAXRecords: map[string]string{"SCHILY.xattr.security.capability": "junk"}}), errs.FailedPrecondition},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			p := newPlace(t)
			raw := c.raw
			if len(raw) == 512 {
				raw = append(append([]byte{}, raw...), end...)
			}
			if _, err := p.unpack(raw, Limits{}); err == nil || errs.Of(err) != c.class {
				t.Fatalf("%v: %v", errs.Of(err), err)
			}
		})
	}
	// Odd, but right.
	p := newPlace(t)
	_, err := p.unpack(append(regtest.RawHeader("x", "", '0', map[string]string{"mtime": "\x80\x00\x00\x00\x7f\xff\xff\xff\xff\xff\xff\xff", "uid": base256(255, 255, 255, 254)}), end...), Limits{})
	if err != nil || p.stat("x").Uid != 1<<32-2 {
		t.Error(err)
	}
}

func TestLimits(t *testing.T) {
	many := make([]tar.Header, 60)
	for i := range many {
		many[i] = file(fmt.Sprintf("f%d", i), "0123456789", 0o644)
	}
	cases := []struct {
		name string
		list []tar.Header
		lim  Limits
	}{
		{"entries", many, Limits{MaxEntries: 50}},
		{"implicit folders", []tar.Header{file("a/b/c/d/e/f", "", 0o644)}, Limits{MaxEntries: 4}},
		{"bytes", many, Limits{MaxBytes: 500}},
		{"depth", []tar.Header{file("a/b/c/d/e", "", 0o644)}, Limits{MaxDepth: 4}},
		{"free space", many, Limits{ReserveFree: 1 << 60}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			p := newPlace(t)
			if _, err := p.unpack(regtest.Tar(c.list...), c.lim); errs.Of(err) != errs.ResourceExhausted {
				t.Fatal(err)
			}
		})
	}
}

// sparsePAX makes a GNU 1.0 sparse member by hand: a file of the given real
// size with no data.
func sparsePAX(realSize, regions string, mapBlock string) []byte {
	var b bytes.Buffer
	rec := func(k, v string) string {
		for n := len(k) + len(v) + 3; ; n++ {
			if s := fmt.Sprintf("%d %s=%s\n", n, k, v); len(s) == n {
				return s
			}
		}
	}
	pax := rec("GNU.sparse.major", "1") + rec("GNU.sparse.minor", "0") + rec("GNU.sparse.name", "sparse") + rec("GNU.sparse.realsize", realSize)
	b.Write(regtest.RawHeader("pax", "", 'x', map[string]string{"size": fmt.Sprintf("%011o\x00", len(pax))}))
	b.WriteString(pax)
	b.Write(make([]byte, (512-len(pax)%512)%512))
	body := regions + mapBlock
	body += strings.Repeat("\x00", (512-len(body)%512)%512)
	b.Write(regtest.RawHeader("sparse", "", '0', map[string]string{"size": fmt.Sprintf("%011o\x00", len(body))}))
	b.WriteString(body)
	b.Write(make([]byte, 1024))
	return b.Bytes()
}

func TestSparse(t *testing.T) {
	p := newPlace(t)
	// One region of no bytes at the end: 1 GiB of nothing.
	if _, err := p.unpack(sparsePAX("1073741824", "1\n1073741824\n0\n", ""), Limits{}); err != nil {
		t.Fatal(err)
	}
	if st := p.stat("sparse"); st.Size != 1<<30 || st.Blocks > 64 {
		t.Errorf("size %d, %d blocks", st.Size, st.Blocks)
	}
	p = newPlace(t)
	if _, err := p.unpack(sparsePAX("9223372036854775807", "1\n9223372036854775807\n0\n", ""), Limits{}); errs.Of(err) != errs.ResourceExhausted {
		t.Errorf("8 EiB: %v", err)
	}
	p = newPlace(t)
	if _, err := p.unpack(sparsePAX("34359738368", "1\n34359738368\n0\n", ""), Limits{}); errs.Of(err) != errs.ResourceExhausted {
		t.Errorf("32 GiB: %v", err)
	}
	// CVE-2025-58183: a map of a million regions.
	start := time.Now()
	p = newPlace(t)
	if _, err := p.unpack(sparsePAX("1", "1048576\n", strings.Repeat("0\n0\n", 1<<20)), Limits{}); err == nil {
		t.Error("a sparse map of 2^20 regions is accepted")
	}
	if time.Since(start) > testhost.Limit(5*time.Second) {
		t.Errorf("took %s", time.Since(start))
	}
}

func TestCancel(t *testing.T) {
	needRoot(t)
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = dir.Close() }()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Tar(ctx, dir, bytes.NewReader(regtest.Tar(file("a", "a", 0o644))), Limits{}); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
}

// A folder chain that grows by symlinks far beyond PATH_MAX is made and can be
// removed again.
func TestDeepBySymlinks(t *testing.T) {
	p := newPlace(t)
	var list []tar.Header
	name := "s"
	seg := strings.Repeat("d/", 500)
	list = append(list, file(seg+"f", "x", 0o644), symlink("s", strings.TrimSuffix(seg, "/")))
	for range 4 {
		list = append(list, file(name+"/"+seg+"f", "x", 0o644), symlink(name+"/s", strings.TrimSuffix(seg, "/")))
		name += "/s"
	}
	if _, err := p.unpack(regtest.Tar(list...), Limits{}); err != nil {
		t.Fatal(err)
	}
}

// memoryDir is a folder on a tmpfs if there is one: a disk that discards freed
// blocks at once makes each run cost a second.
func memoryDir(t testing.TB) string {
	t.Helper()
	d, err := os.MkdirTemp("/dev/shm", "naru-test")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { _ = os.RemoveAll(d) })
	return d
}

// rightSums gives each header block its checksum, so that a changed archive is
// read further than its first header.
func rightSums(data []byte) []byte {
	out := append([]byte{}, data...)
	for at := 0; at+512 <= len(out); {
		h := out[at : at+512]
		at += 512
		if bytes.Count(h, []byte{0}) == 512 {
			continue
		}
		copy(h[148:156], "        ")
		sum := 0
		for _, c := range h {
			sum += int(c)
		}
		copy(h[148:156], fmt.Sprintf("%06o\x00 ", sum))
		var size int
		if _, err := fmt.Sscanf(strings.Trim(string(h[124:136]), " \x00"), "%o", &size); err == nil && size > 0 && size < len(out) {
			at += (size + 511) / 512 * 512
		}
	}
	return out
}

// Row I-01: any bytes at all.
func FuzzTar(f *testing.F) {
	if os.Geteuid() != 0 {
		f.Skip("needs root")
	}
	f.Add(regtest.Tar(dir("a", 0o755), symlink("a/l", "../../x"), file("a/l/f", "x", 0o644), file(".wh.a", "", 0), link("h", "a/l/f")))
	f.Add(regtest.Tar(dir("./", 0o755), file("x/.wh..wh..opq", "", 0), symlink("x", "/"), file("x/y", "z", 0o4755)))
	f.Add(sparsePAX("1000", "1\n0\n10\n", "0123456789"))
	f.Add(append(regtest.RawHeader("x", "", '3', map[string]string{"devmajor": "0000001\x00"}), make([]byte, 1024)...))
	top := memoryDir(f)
	f.Fuzz(func(t *testing.T, data []byte) {
		base, err := os.MkdirTemp(top, "")
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = os.RemoveAll(base) }()
		root, canary := filepath.Join(base, "root"), filepath.Join(base, "canary")
		if err := errors.Join(os.Mkdir(root, 0o755), os.Mkdir(canary, 0o755), os.WriteFile(filepath.Join(canary, "f"), []byte("c"), 0o600)); err != nil {
			t.Fatal(err)
		}
		before := describe(t, canary)
		dir, err := os.Open(root)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = dir.Close() }()
		_, err = Tar(context.Background(), dir, bytes.NewReader(rightSums(data)), Limits{MaxBytes: 1 << 20, MaxEntries: 200, MaxSparse: 1 << 20})
		if err != nil && errs.Of(err) == errs.Internal {
			t.Errorf("error without a class: %v", err)
		}
		if describe(t, canary) != before {
			t.Error("the canary changed")
		}
		list, err := os.ReadDir(base)
		if err != nil || len(list) != 2 {
			t.Errorf("beside the root: %v %v", list, err)
		}
	})
}
