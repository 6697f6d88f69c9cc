package sys

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// hostile is a root with a folder v/a, a link v/b to a canary outside, and the
// canary.
func hostile(t *testing.T) (root *os.File, dir, canary string) {
	t.Helper()
	top := t.TempDir()
	dir, canary = filepath.Join(top, "root"), filepath.Join(top, "canary")
	err := errors.Join(os.MkdirAll(dir+"/v/a/deep", 0o755), os.MkdirAll(canary+"/deep", 0o755), os.Symlink(canary, dir+"/v/b"))
	if err != nil {
		t.Fatal(err)
	}
	if root, err = os.Open(dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = root.Close() })
	return root, dir, canary
}

func exchange(dir string) error {
	return unix.Renameat2(unix.AT_FDCWD, dir+"/v/a", unix.AT_FDCWD, dir+"/v/b", unix.RENAME_EXCHANGE)
}

// Row M-06: the exchange falls exactly between the look-up of a mount point and
// the mount.
func TestRowM06SwapBeforeMount(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to mount")
	}
	_, dir, canary := hostile(t)
	for i, name := range []string{"/v/a/deep", "/v/a/new", "/v/a/new2/deep"} {
		err := PrivateMounts(func() error {
			root, err := os.Open(dir) // in this namespace
			if err != nil {
				return err
			}
			defer func() { _ = root.Close() }()
			at, err := EnsureInRoot(root, name, true)
			if err != nil {
				return err
			}
			defer func() { _ = at.Close() }()
			if err := exchange(dir); err != nil {
				return err
			}
			tree, err := NewFs("tmpfs", 0)
			if err != nil {
				return err
			}
			defer func() { _ = tree.Close() }()
			if err := Attach(tree, at); err != nil {
				return err
			}
			mounts, err := os.ReadFile("/proc/thread-self/mountinfo")
			if err != nil {
				return err
			}
			if strings.Contains(string(mounts), canary) {
				return fmt.Errorf("the canary is a mount point:\n%s", mounts)
			}
			if want := strings.Replace(dir+name, "/v/a/", "/v/b/", 1); !strings.Contains(string(mounts), " "+want+" ") {
				return fmt.Errorf("nothing is mounted on %s, where the folder is now", want)
			}
			return exchange(dir)
		})
		if err != nil {
			t.Fatalf("%d: %v", i, err)
		}
	}
	if list, err := os.ReadDir(canary); err != nil || len(list) != 1 {
		t.Errorf("the canary holds %v, %v", list, err)
	}
}

// Row M-07: mount points, and folders above them, are made while a folder and a
// link out are exchanged all the time.
func TestRowM07MakeWhileSwapped(t *testing.T) {
	root, dir, canary := hostile(t)
	var st, before unix.Stat_t
	if err := unix.Stat(canary, &before); err != nil {
		t.Fatal(err)
	}
	var stop atomic.Bool
	swaps := make(chan int)
	go func() {
		n := 0
		for !stop.Load() {
			if exchange(dir) == nil {
				n++
			}
		}
		swaps <- n
	}()
	made, refused := 0, 0
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); {
		n := made + refused
		f, err := EnsureInRoot(root, fmt.Sprintf("/v/a/new%d/deep/er", n), n%2 == 0)
		if err != nil {
			refused++
			continue
		}
		made++
		to, _ := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", FD(f)))
		_ = f.Close()
		if !strings.HasPrefix(to, dir+"/") {
			t.Fatalf("made %s", to)
		}
	}
	stop.Store(true)
	n := <-swaps
	t.Logf("%d made, %d refused, %d exchanges", made, refused, n)
	if n < 1000 || made == 0 {
		t.Error("the attack did not really run")
	}
	if err := unix.Stat(canary, &st); err != nil || st.Mtim != before.Mtim || st.Ctim != before.Ctim || st.Nlink != before.Nlink {
		t.Errorf("the canary has changed: %v", err)
	}
}
