package main

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// entry is one name in a layer: a folder, a file, or a link.
type entry struct {
	mode     fs.FileMode // permission and type bits; setuid and sticky included
	uid, gid int
	symlink  string
	hardlink string // path of the entry it is another name of
	data     []byte
}

// tree is a layer in the making. Names are absolute and clean.
type tree map[string]entry

// dir adds folders, with the missing ones above them.
func (t tree) dir(names ...string) {
	for _, name := range names {
		for ; name != "/"; name = path.Dir(name) {
			if _, ok := t[name]; !ok {
				t[name] = entry{mode: fs.ModeDir | 0o755}
			}
		}
	}
}

func (t tree) file(name string, mode fs.FileMode, data []byte) {
	t.dir(path.Dir(name))
	t[name] = entry{mode: mode, data: data}
}

func (t tree) text(name, data string) { t.file(name, 0o644, []byte(data)) }

// copyIn adds a file of this machine as an executable or not, as it is there.
func (t tree) copyIn(name, from string) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	info, err := os.Stat(from)
	if err != nil {
		return err
	}
	t.file(name, info.Mode().Perm(), data)
	return nil
}

// link makes name another name of target. The entry carries the target's
// mode: a runtime applies it to the inode that both share.
func (t tree) link(name, target string) {
	t.dir(path.Dir(name))
	t[name] = entry{mode: t[target].mode, hardlink: target}
}

func (t tree) symlink(name, target string) {
	t.dir(path.Dir(name))
	t[name] = entry{mode: fs.ModeSymlink | 0o777, symlink: target}
}

// names returns the entries in an order in which each can be made: folders
// before what is in them, files before their other names.
func (t tree) names() []string {
	names := slices.Sorted(maps.Keys(t))
	slices.SortStableFunc(names, func(a, b string) int {
		return boolInt(t[a].hardlink != "") - boolInt(t[b].hardlink != "")
	})
	return names
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

// epoch is the time of every file: the same content gives the same digest.
var epoch = time.Unix(0, 0).UTC()

// tar writes the tree as a layer.
func (t tree) tar(w io.Writer) error {
	tw := tar.NewWriter(w)
	for _, name := range t.names() {
		e := t[name]
		h := &tar.Header{
			Name: strings.TrimPrefix(name, "/"), Mode: int64(e.mode.Perm()),
			Uid: e.uid, Gid: e.gid, ModTime: epoch, Format: tar.FormatPAX,
		}
		for bit, value := range map[fs.FileMode]int64{fs.ModeSetuid: 0o4000, fs.ModeSetgid: 0o2000, fs.ModeSticky: 0o1000} {
			if e.mode&bit != 0 {
				h.Mode |= value
			}
		}
		switch {
		case e.mode.IsDir():
			h.Typeflag, h.Name = tar.TypeDir, h.Name+"/"
		case e.symlink != "":
			h.Typeflag, h.Linkname = tar.TypeSymlink, e.symlink
		case e.hardlink != "":
			if _, ok := t[e.hardlink]; !ok {
				return fmt.Errorf("%s is a link to %s, which is not there", name, e.hardlink)
			}
			h.Typeflag, h.Linkname = tar.TypeLink, strings.TrimPrefix(e.hardlink, "/")
		default:
			h.Typeflag, h.Size = tar.TypeReg, int64(len(e.data))
		}
		if err := tw.WriteHeader(h); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if _, err := tw.Write(e.data); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return tw.Close()
}

// layer makes the gzipped OCI layer of the tree.
func (t tree) layer() (v1.Layer, error) {
	var b bytes.Buffer
	if err := t.tar(&b); err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(b.Bytes())), nil
	}, tarball.WithMediaType(types.OCILayer))
}
