package images

import (
	"archive/tar"
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/images/internal/regtest"
	"github.com/naru-project/naru/images/registry"
	"github.com/naru-project/naru/internal/errs"
)

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: owners of files, trusted.* attributes")
	}
}

func testConfig(t testing.TB) Config {
	return Config{
		Root: filepath.Join(t.TempDir(), "store"),
		Live: Live{Registry: registry.Config{
			HostDirs: []string{filepath.Join(t.TempDir(), "certs.d")}, HeaderTimeout: 5 * time.Second, ProgressTimeout: 5 * time.Second,
		}},
	}
}

func openStore(t testing.TB, cfg Config) *Store {
	t.Helper()
	needRoot(t)
	s, err := Open(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func mustPull(t testing.TB, s *Store, ref string) string {
	t.Helper()
	id, err := s.Pull(t.Context(), ref, nil)
	if err != nil {
		t.Fatalf("pull %s: %v", ref, err)
	}
	return id
}

func simple(files ...string) []byte {
	list := make([]tar.Header, 0, len(files))
	for _, f := range files {
		list = append(list, regtest.File(f, "content of "+f, 0o644))
	}
	return regtest.Tar(list...)
}

func TestPullListRemove(t *testing.T) {
	reg := regtest.New(t)
	img := reg.Build("app/web", "v1", nil,
		regtest.Gzip(simple("etc/a", "etc/b")), regtest.Zstd(simple("usr/c")), regtest.Uncompressed(simple("usr/d")))
	cfg := testConfig(t)
	s := openStore(t, cfg)
	ref := reg.Host() + "/app/web:v1"
	id := mustPull(t, s, ref)
	if id != img.ID.String() {
		t.Fatalf("id %s, want %s", id, img.ID)
	}
	got := s.List()
	if len(got) != 1 || !slices.Equal(got[0].RepoTags, []string{ref}) ||
		!slices.Equal(got[0].RepoDigests, []string{reg.Host() + "/app/web@" + img.Manifest.Digest.String()}) {
		t.Fatalf("list %+v", got)
	}
	if got[0].Size < 4*4096 || string(got[0].RawConfig) != string(img.Config) || len(got[0].Layers) != 3 {
		t.Fatalf("image %+v", got[0])
	}
	for _, name := range []string{ref, id, strings.TrimPrefix(id, "sha256:"), id[7 : 7+12], reg.Host() + "/app/web@" + img.Manifest.Digest.String(),
		ref + "@" + img.Manifest.Digest.String()} {
		if i, err := s.Resolve(name); err != nil || i.ID != id {
			t.Errorf("resolve %s: %v %v", name, i, err)
		}
	}
	for _, name := range []string{"busybox", reg.Host() + "/app/web:v2", id[7 : 7+11], "sha256:" + strings.Repeat("0", 64)} {
		if _, err := s.Resolve(name); !errs.Is(err, errs.NotFound) {
			t.Errorf("resolve %s: %v", name, err)
		}
	}
	dirs, err := s.Layers(t.Context(), id, "c1")
	if err != nil || len(dirs) != 3 {
		t.Fatal(dirs, err)
	}
	for i, f := range []string{"usr/d", "usr/c", "etc/a"} { // topmost first
		if data, err := os.ReadFile(filepath.Join(dirs[i], f)); err != nil || string(data) != "content of "+f {
			t.Errorf("layer %d: %q %v", i, data, err)
		}
	}
	before, _ := s.FsInfo()
	if err := s.Remove(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	if len(s.List()) != 0 {
		t.Fatal("still listed")
	}
	if _, err := os.Stat(filepath.Join(dirs[2], "etc/a")); err != nil {
		t.Fatal("held layer went away: ", err)
	}
	if err := s.Remove(t.Context(), ref); err != nil {
		t.Fatal("second remove: ", err)
	}
	if err := s.ReleaseOwner(t.Context(), "c1"); err != nil {
		t.Fatal(err)
	}
	after, _ := s.FsInfo()
	if before.Bytes == 0 || after.Bytes != 0 || after.Inodes != 0 || after.Mountpoint == "" {
		t.Fatalf("usage %+v then %+v", before, after)
	}
	waitEmpty(t, s)
}

// waitEmpty waits until nothing is left of any layer, pull or trash.
func waitEmpty(t testing.TB, s *Store) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		var left []string
		for _, d := range []string{"layers", "trash", "images", "holds", "writable"} {
			list, err := os.ReadDir(filepath.Join(s.cfg.Root, d))
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range list {
				if !strings.HasPrefix(f.Name(), sparePrefix) {
					left = append(left, d+"/"+f.Name())
				}
			}
		}
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("left behind: %v", left)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func TestDisk(t *testing.T) {
	cfg := testConfig(t)
	s := openStore(t, cfg)
	var st unix.Statfs_t
	must(t, unix.Statfs(cfg.Root, &st))
	d, err := s.Disk()
	if err != nil || d.Bytes != st.Blocks*uint64(st.Frsize) || d.Inodes != st.Files || d.InodesFree > d.Inodes || time.Since(d.Time) > time.Minute {
		t.Errorf("%+v, %v", d, err)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	if !strings.Contains(string(mounts), " "+s.mount+" ") || d.Device == "" || !strings.Contains(string(mounts), " "+d.Device+" ") {
		t.Errorf("no mount of %q at %q", d.Device, s.mount)
	}
}
