package images

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

func writables(t *testing.T, s *Store) (spare, named []string) {
	list, err := os.ReadDir(filepath.Join(s.cfg.Root, "writable"))
	must(t, err)
	for _, d := range list {
		if strings.HasPrefix(d.Name(), sparePrefix) {
			spare = append(spare, d.Name())
		} else {
			named = append(named, d.Name())
		}
	}
	return spare, named
}

// Many at once get folders of their own, empty ones, whether those were made
// before or not.
func TestWritableFoldersAreEachOnes(t *testing.T) {
	s := openStore(t, testConfig(t))
	var wg sync.WaitGroup
	for i := range 40 {
		wg.Go(func() {
			w, err := s.NewWritable(t.Context(), fmt.Sprintf("c%d", i))
			if err != nil {
				t.Error(err)
				return
			}
			if err := os.WriteFile(filepath.Join(w.Upper, "mine"), nil, 0o600); err != nil {
				t.Error(err)
			}
			if list, err := os.ReadDir(w.Upper); err != nil || len(list) != 1 {
				t.Errorf("folder of c%d has %v, %v", i, list, err)
			}
			if list, err := os.ReadDir(w.Work); err != nil || len(list) != 0 {
				t.Errorf("work folder of c%d has %v, %v", i, list, err)
			}
		})
	}
	wg.Wait()
	if _, named := writables(t, s); len(named) != 40 {
		t.Errorf("%d folders for 40 containers", len(named))
	}
	// Not swept while they wait, and gone with the store.
	waitFor(t, func() bool { spare, _ := writables(t, s); return len(spare) == maxSpare })
	must(t, s.Sweep(t.Context(), nil))
	if spare, _ := writables(t, s); len(spare) != maxSpare {
		t.Errorf("spare folders after a sweep: %v", spare)
	}
	must(t, s.Close())
	if spare, _ := writables(t, s); len(spare) != 0 {
		t.Errorf("spare folders after Close: %v", spare)
	}
}

// A killed daemon leaves spare folders; the next one starts its numbers anew.
func TestSpareFoldersOfAKilledDaemonGo(t *testing.T) {
	cfg := testConfig(t)
	s := openStore(t, cfg)
	must(t, s.Close())
	left := filepath.Join(cfg.Root, "writable", sparePrefix+"1", upperName)
	must(t, os.MkdirAll(left, 0o755))
	must(t, os.WriteFile(filepath.Join(left, "secret"), nil, 0o600))
	s = openStore(t, cfg)
	w, err := s.NewWritable(t.Context(), "c")
	must(t, err)
	if list, err := os.ReadDir(w.Upper); err != nil || len(list) != 0 {
		t.Errorf("a container was given %v, %v", list, err)
	}
}

// With the layer of places below, nothing is made in the writable folder for
// the mounts that every container has, and the image's own files win.
func TestPlacesAreBelowTheImage(t *testing.T) {
	s := openStore(t, testConfig(t))
	w, err := s.NewWritable(t.Context(), "c")
	must(t, err)
	image := t.TempDir()
	must(t, os.Mkdir(filepath.Join(image, "etc"), 0o750))
	must(t, os.WriteFile(filepath.Join(image, "etc/hosts"), []byte("image"), 0o600))
	must(t, os.Symlink("/nowhere", filepath.Join(image, "dev")))
	at := t.TempDir()
	opts := fmt.Sprintf("lowerdir=%s:%s,upperdir=%s,workdir=%s", image, w.Places, w.Upper, w.Work)
	if err := unix.Mount("overlay", at, "overlay", 0, opts); err != nil {
		t.Skipf("overlay mounts do not work here: %v", err)
	}
	defer func() { must(t, unix.Unmount(at, 0)) }()
	if b, err := os.ReadFile(filepath.Join(at, "etc/hosts")); err != nil || string(b) != "image" {
		t.Errorf("/etc/hosts: %q, %v", b, err)
	}
	st, err := os.Stat(filepath.Join(at, "etc"))
	if err != nil || st.Mode().Perm() != 0o750 {
		t.Errorf("/etc: %v, %v", st, err)
	}
	if to, err := os.Readlink(filepath.Join(at, "dev")); err != nil || to != "/nowhere" {
		t.Errorf("/dev: %q, %v", to, err)
	}
	for _, name := range []string{"etc/resolv.conf", "etc/hostname", "proc", "sys"} {
		if _, err := os.Stat(filepath.Join(at, name)); err != nil {
			t.Error(err)
		}
	}
	if list, err := os.ReadDir(w.Upper); err != nil || len(list) != 0 {
		t.Errorf("the writable folder has %v, %v", list, err)
	}
}

// A layer of places that could not be made is tried again.
func TestPlacesAreTriedAgain(t *testing.T) {
	cfg := testConfig(t)
	s := openStore(t, cfg)
	at := filepath.Join(cfg.Root, placesName)
	must(t, os.WriteFile(at, nil, 0o600))
	if _, err := s.NewWritable(t.Context(), "c"); err == nil {
		t.Fatal("a file is in the place of the layer, and nothing is said")
	}
	must(t, os.Remove(at))
	_, err := s.NewWritable(t.Context(), "c")
	must(t, err)
}
