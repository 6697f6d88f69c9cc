package unpack

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/images/internal/regtest"
	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/testhost"
)

// The rows of docs/security.md that concern a single layer. TestBreakouts has
// their common cases; here are those that are easier told apart.

// raw makes an archive of header blocks as they are.
func raw(blocks ...[]byte) []byte {
	return append(bytes.Join(blocks, nil), make([]byte, 1024)...)
}

// pax is a PAX header with one record that no writer would make.
func pax(key, value string) []byte {
	var rec string
	for n := len(key) + len(value) + 3; ; n++ {
		if rec = fmt.Sprintf("%d %s=%s\n", n, key, value); len(rec) == n {
			break
		}
	}
	h := regtest.RawHeader("pax", "", 'x', map[string]string{"size": fmt.Sprintf("%011o\x00", len(rec))})
	return append(append(h, rec...), make([]byte, (512-len(rec)%512)%512)...)
}

// Row I-01: names that lead elsewhere, mean nothing or do not end.
func TestRowI01Names(t *testing.T) {
	hdr := regtest.RawHeader("x", "", '0', nil)
	for _, c := range []struct {
		name  string
		data  []byte
		class errs.Class // Internal: it is unpacked
		made  string
	}{
		{"up", raw(regtest.RawHeader("../../../../x", "", '0', nil)), errs.Internal, "x"},
		{"absolute", raw(regtest.RawHeader("/x", "", '0', nil)), errs.Internal, "x"},
		{"dot", raw(regtest.RawHeader("./x", "", '0', nil)), errs.Internal, "x"},
		{"many slashes", raw(regtest.RawHeader("//a///x", "", '0', nil)), errs.Internal, "a/x"},
		{"slash at the end", raw(regtest.RawHeader("x/", "", '0', nil)), errs.Internal, "x"},
		{"up behind a slash at the end", raw(regtest.RawHeader("../x/", "", '5', nil)), errs.Internal, "x"},
		{"backslashes", raw(regtest.RawHeader(`..\..\x`, "", '0', nil)), errs.Internal, `..\..\x`},
		{"empty", raw(regtest.RawHeader("", "", '0', nil)), errs.FailedPrecondition, ""},
		{"empty link", raw(regtest.RawHeader("", "/etc", '2', nil)), errs.FailedPrecondition, ""},
		{"NUL", raw(pax("path", "a\x00/../x"), hdr), errs.FailedPrecondition, ""},
		{"NUL in a target", raw(pax("linkpath", "a\x00b"), regtest.RawHeader("x", "t", '2', nil)), errs.FailedPrecondition, ""},
		{"4097 bytes", raw(pax("path", strings.Repeat("ab/", 1365)+"ab"), hdr), errs.FailedPrecondition, ""},
		{"10 000 components", raw(pax("path", strings.Repeat("a/", 10_000)+"x"), hdr), errs.FailedPrecondition, ""},
		{"2 000 components", raw(pax("path", strings.Repeat("a/", 2_000)+"x"), hdr), errs.ResourceExhausted, ""},
		{"1 000 times up", raw(pax("path", strings.Repeat("../", 1_000)+"x"), hdr), errs.Internal, "x"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPlace(t)
			_, err := p.unpack(c.data, Limits{})
			if c.class == errs.Internal && err != nil || c.class != errs.Internal && errs.Of(err) != c.class {
				t.Fatal(err)
			}
			if err == nil {
				p.stat(c.made)
			} else if list, lerr := os.ReadDir(p.root); lerr != nil || len(list) > 0 {
				t.Errorf("made although refused: %v %v", list, lerr)
			}
		})
	}
}

// Row I-03: hard links to what is not the layer's, and a great many of them.
func TestRowI03Hardlinks(t *testing.T) {
	shadow := func() uint64 {
		var st unix.Stat_t
		if err := unix.Stat("/etc/shadow", &st); err != nil {
			t.Fatal(err)
		}
		return uint64(st.Nlink)
	}
	before := shadow()
	for name, list := range map[string][]tar.Header{
		"/etc/shadow":           {link("x", "/etc/shadow")},
		"climbing":              {link("x", "../../canary/f")},
		"symlink to the canary": {symlink("s", "%C"), link("x", "s/f")},
		"to itself":             {link("x", "x")},
		"before its target":     {link("x", "later"), file("later", "x", 0o644)},
		"to a whiteout":         {file(".wh.gone", "", 0), link("x", "gone")},
		"to a folder":           {dir("d", 0o755), link("x", "d")},
		"to the folder above":   {link("x", "..")},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlace(t)
			if _, err := p.unpack(regtest.Tar(p.named(list)...), Limits{}); errs.Of(err) != errs.FailedPrecondition {
				t.Errorf("%v", err)
			}
			p.absent("y")
		})
	}
	if now := shadow(); now != before {
		t.Errorf("/etc/shadow had %d links, has %d", before, now)
	}
	// A chain of 100 000: ext4 ends it at 65 000, other file systems take it all.
	t.Run("chain", func(t *testing.T) {
		p := newPlace(t)
		list := make([]tar.Header, 1, 100_001)
		list[0] = file("l0", "x", 0o644)
		for i := range 100_000 {
			list = append(list, link(fmt.Sprint("l", i+1), fmt.Sprint("l", i)))
		}
		start := time.Now()
		if _, err := p.unpack(regtest.Tar(list...), Limits{}); err != nil && errs.Of(err) != errs.ResourceExhausted {
			t.Error(err)
		}
		if d := time.Since(start); d > testhost.Limit(30*time.Second) {
			t.Errorf("took %s", d)
		}
	})
}

// named puts the canary's path in place of %C.
func (p *place) named(list []tar.Header) []tar.Header {
	out := append([]tar.Header{}, list...)
	for i := range out {
		out[i].Name = strings.ReplaceAll(out[i].Name, "%C", p.canary)
		out[i].Linkname = strings.ReplaceAll(out[i].Linkname, "%C", p.canary)
	}
	return out
}

// Row I-04: a second header for the name of a link brings mode, owner, times
// and attributes, each of which would go through the link by path.
func TestRowI04AttributesThroughLinks(t *testing.T) {
	loud := func(h tar.Header) tar.Header {
		h.Mode, h.Uid, h.Gid, h.ModTime, h.AccessTime = 0o4777, 1234, 1235, time.Unix(77, 0), time.Unix(78, 0)
		records := map[string]string{"SCHILY.xattr.user.evil": "1", "SCHILY.xattr.security.capability": "\x01\x00\x00\x02" + strings.Repeat("\xff", 16)}
		for k, v := range h.PAXRecords {
			records[k] = v
		}
		h.PAXRecords = records
		return h
	}
	for _, to := range []string{"%C/f", "%C/sub", "%C", "../../../../../..%C/f"} {
		for name, list := range map[string][]tar.Header{
			"the link itself":          {loud(symlink("s", to))},
			"the link again":           {symlink("s", to), loud(symlink("s", to))},
			"a file":                   {symlink("s", to), loud(file("s", "x", 0))},
			"an empty file":            {symlink("s", to), loud(file("s", "", 0))},
			"a folder":                 {symlink("s", to), loud(dir("s", 0))},
			"a FIFO":                   {symlink("s", to), loud(tar.Header{Name: "s", Typeflag: tar.TypeFifo})},
			"a hard link":              {symlink("s", to), loud(link("h", "s"))},
			"a hard link, then a file": {symlink("s", to), link("h", "s"), loud(file("h", "x", 0))},
			"a folder below":           {symlink("s", to), loud(dir("s/new", 0))},
			"the folder, named with a slash and a dot": {symlink("s", to), loud(dir("s/.", 0))},
		} {
			t.Run(name+" "+to, func(t *testing.T) {
				p := newPlace(t)
				if _, err := p.unpack(regtest.Tar(p.named(list)...), Limits{}); err != nil && errs.Of(err) != errs.FailedPrecondition {
					t.Error(err)
				}
			})
		}
	}
}

// Row I-05: an entry for the root itself is no folder, or one that nobody may enter.
func TestRowI05RootEntry(t *testing.T) {
	for _, name := range []string{".", "./", "/", "//", "./.", "a/..", "../.."} {
		for kind, typeflag := range map[string]byte{"symlink": '2', "hard link": '1', "file": '0', "FIFO": '6', "char device": '3', "block device": '4'} {
			if kind == "file" && strings.HasSuffix(name, "/") {
				continue // to archive/tar a file whose name ends in a slash is a folder
			}
			t.Run(kind+" "+name, func(t *testing.T) {
				p := newPlace(t)
				to := map[byte]string{'2': p.canary, '1': "f"}[typeflag]
				data := raw(regtest.RawHeader("f", "", '0', nil), regtest.RawHeader(name, to, typeflag, map[string]string{"devmajor": "0000001\x00"}),
					regtest.RawHeader("g", "", '0', nil))
				if _, err := p.unpack(data, Limits{}); errs.Of(err) != errs.FailedPrecondition {
					t.Fatal(err)
				}
				p.content("f", "")
			})
		}
		for _, mode := range []int64{0, 0o600, 0o666} {
			p := newPlace(t)
			if _, err := p.unpack(regtest.Tar(dir(name, mode), file("f", "x", 0o644)), Limits{}); err != nil {
				t.Fatal(err)
			}
			if st := p.stat("."); st.Mode != unix.S_IFDIR|0o755 {
				t.Errorf("%q with mode %o made the root %o", name, mode, st.Mode)
			}
			p.content("f", "x")
		}
	}
}

// Row I-06: whiteouts that name what is not a name, or stand where links lead.
func TestRowI06Whiteouts(t *testing.T) {
	for _, name := range []string{".wh...", ".wh..", ".wh.", "a/.wh..", "a/.wh...", "a/.wh.", ".wh..wh.x", "a/.wh..wh..wh..opq", ".wh.a/.wh.b", ".wh.a/b"} {
		p := newPlace(t)
		if _, err := p.unpack(regtest.Tar(dir("a", 0o755), file("a/kept", "k", 0o644), file(name, "", 0)), Limits{}); errs.Of(err) != errs.FailedPrecondition {
			t.Errorf("%s: %v", name, err)
		}
		p.content("a/kept", "k")
	}
	for kind, h := range map[string]tar.Header{
		"folder": dir(".wh.x", 0o755), "symlink": symlink(".wh.x", "%C"), "FIFO": {Name: ".wh.x", Typeflag: tar.TypeFifo},
		"device": {Name: ".wh.x", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}, "0:0 device": {Name: "x", Typeflag: tar.TypeChar},
	} {
		p := newPlace(t)
		if _, err := p.unpack(regtest.Tar(p.named([]tar.Header{h})...), Limits{}); errs.Of(err) != errs.FailedPrecondition {
			t.Errorf("a whiteout that is a %s: %v", kind, err)
		}
	}
	p := newPlace(t)
	res, err := p.unpack(regtest.Tar(p.named([]tar.Header{
		symlink("abs", "%C"), file("abs/.wh.f", "", 0), file("abs/.wh..wh..opq", "", 0), // the folder of that name in the layer
		symlink("rel", "../../canary"), file("rel/.wh.sub", "", 0),
		symlink("top", "/"), file("top/.wh..wh..opq", "", 0), // the root, by a link
		link(".wh.old", "%C/f"), // AUFS made its whiteouts so: no link is made
		file(".wh..wh.plnk/1.2", "", 0), file("own", "o", 0o644), file(".wh.own", "", 0),
	})...), Limits{})
	if err != nil || !res.RootOpaque {
		t.Fatal(res, err)
	}
	p.content("own", "o")
	p.absent(".wh.old")
	p.absent(".wh..wh.plnk")
	p.opaque(strings.TrimPrefix(p.canary, "/"), true)
	p.whiteout("canary/sub")
}

// hooked is an archive that calls hook before byte at is read.
type hooked struct {
	r    io.Reader
	at   int
	hook func()
}

func (h *hooked) Read(b []byte) (int, error) {
	if h.at == 0 {
		h.hook()
	}
	if h.at > 0 && len(b) > h.at {
		b = b[:h.at]
	}
	n, err := h.r.Read(b)
	h.at -= n
	return n, err
}

// Row I-07: folders of the layer are exchanged for links while it is unpacked:
// between any two blocks of the archive, so after each check and before each use.
func TestRowI07SwappedBetweenBlocks(t *testing.T) {
	list := []tar.Header{dir("d", 0o755), file("d/a", "1", 0o644), dir("d/sub", 0o755), file("d/sub/b", strings.Repeat("2", 600), 0o644),
		symlink("d/l", "x"), link("d/h", "d/a"), file("d/.wh.f", "", 0), file("d/sub/.wh..wh..opq", "", 0), file("d/f", "evil", 0o4777), dir("d", 0o777)}
	archive := regtest.Tar(list...)
	swapped := 0
	for at := 512; at < len(archive); at += 512 {
		p := newPlace(t)
		dir, err := os.Open(p.root)
		if err != nil {
			t.Fatal(err)
		}
		r := &hooked{r: bytes.NewReader(archive), at: at, hook: func() {
			if os.Rename(p.path("d"), p.path("was")) == nil && os.Symlink(p.canary, p.path("d")) == nil {
				swapped++
			}
		}}
		_, err = Tar(context.Background(), dir, r, Limits{})
		_ = dir.Close()
		if err != nil && errs.Of(err) == errs.Internal && !errors.Is(err, unix.ENOENT) {
			t.Errorf("at %d: %v", at, err)
		}
		if now := describe(t, p.canary); now != p.before {
			t.Fatalf("at %d the canary changed:\n%s\nwas:\n%s", at, now, p.before)
		}
	}
	if swapped < 10 {
		t.Errorf("only %d exchanges", swapped)
	}
}

// Row I-07: the same as a race: somebody exchanges a folder and a link for ever.
func TestRowI07Race(t *testing.T) {
	var list []tar.Header
	for i := range 300 {
		list = append(list, dir("d/s", 0o755), file(fmt.Sprint("d/s/f", i), "evil", 0o4777), symlink(fmt.Sprint("d/l", i), "x"),
			file(fmt.Sprint("d/.wh.g", i), "", 0), dir(fmt.Sprint("d/n", i), 0o777), file("e", "", 0), link(fmt.Sprint("d/h", i), "e"))
	}
	archive := regtest.Tar(list...)
	p := newPlace(t)
	link := p.path("link")
	var stop atomic.Bool
	swaps := make(chan int)
	if err := os.Symlink(p.canary, link); err != nil {
		t.Fatal(err)
	}
	go func() {
		n := 0
		for !stop.Load() {
			if unix.Renameat2(unix.AT_FDCWD, p.path("d"), unix.AT_FDCWD, link, unix.RENAME_EXCHANGE) == nil {
				n++
			}
		}
		swaps <- n
	}()
	whole := 0
	for end := time.Now().Add(3 * time.Second); time.Now().Before(end); {
		if _, err := p.unpack(archive, Limits{}); err == nil {
			whole++
		}
		if t.Failed() {
			break
		}
	}
	stop.Store(true)
	if n := <-swaps; n < 1000 {
		t.Errorf("only %d exchanges", n)
	}
	t.Logf("%d runs came to their end", whole)
	if _, err := os.Stat(filepath.Join(p.canary, "s")); err == nil {
		t.Error("a folder was made outside")
	}
}
