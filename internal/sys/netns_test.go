package sys

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	goruntime "runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func threadNamespaces(t *testing.T, kind string) map[string]int {
	t.Helper()
	seen := map[string]int{}
	links, err := filepath.Glob("/proc/self/task/*/ns/" + kind)
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if s, err := os.Readlink(l); err == nil {
			seen[s]++
		}
	}
	return seen
}

func TestNamespaceThreadLeavesNoThreadBehind(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: unshare(CLONE_NEWNET)")
	}
	for i := range 200 {
		err := NamespaceThread(func() error {
			if unix.Gettid() == unix.Getpid() {
				return errors.New("on the first thread")
			}
			if err := unix.Unshare(unix.CLONE_NEWUTS | unix.CLONE_NEWIPC); err != nil {
				return err
			}
			switch i % 3 {
			case 1:
				panic("boom")
			case 2:
				goruntime.Goexit()
			}
			return nil
		})
		if (err != nil) != (i%3 != 0) {
			t.Fatalf("run %d: %v", i, err)
		}
	}
	deadline := time.Now().Add(5 * time.Second)
	for len(threadNamespaces(t, "uts")) != 1 || len(threadNamespaces(t, "ipc")) != 1 {
		if time.Now().After(deadline) {
			t.Fatalf("threads in foreign namespaces: %v", threadNamespaces(t, "uts"))
		}
		time.Sleep(time.Millisecond)
	}
}

func TestNamespaceThreadFromTheFirstThread(t *testing.T) {
	// Hold goroutines on every thread in turn, so that some land on the first.
	for range 50 {
		if err := NamespaceThread(func() error {
			if unix.Gettid() == unix.Getpid() {
				return errors.New("on the first thread")
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	// The branch itself: called while locked to the first thread, if we are on it.
	done := make(chan error, 1)
	go onNamespaceThread(func() error { return fmt.Errorf("ran") }, done)
	if err := <-done; err == nil || err.Error() != "ran" {
		t.Fatal(err)
	}
}

func TestOpenNamespaceRefusesOthers(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink("/proc/self/ns/net", link); err != nil {
		t.Fatal(err)
	}
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{file, link, fifo, filepath.Join(dir, "none"), dir} {
		if f, err := OpenNamespace(p, unix.CLONE_NEWNET); err == nil {
			_ = f.Close()
			t.Errorf("%s taken for a namespace", p)
		}
	}
	if f, err := OpenNamespace("/proc/self/ns/ipc", unix.CLONE_NEWNET); err == nil {
		_ = f.Close()
		t.Error("an IPC namespace taken for a network namespace")
	}
	f, err := ThreadNamespace(unix.CLONE_NEWNET)
	if err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
}

func TestPinNamespaceIsExclusive(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts")
	}
	dir := t.TempDir()
	err := PrivateMounts(func() error {
		d, err := os.Open(dir)
		if err != nil {
			return err
		}
		defer func() { _ = d.Close() }()
		ns, err := ThreadNamespace(unix.CLONE_NEWUTS)
		if err != nil {
			return err
		}
		defer func() { _ = ns.Close() }()
		if err := os.Symlink("/etc/passwd", filepath.Join(dir, "net")); err != nil {
			return err
		}
		if err := PinNamespace(ns, d, "net"); !errors.Is(err, os.ErrExist) {
			return fmt.Errorf("pin over a symlink: %v", err)
		}
		if err := PinNamespace(ns, d, "uts"); err != nil {
			return err
		}
		if err := PinNamespace(ns, d, "uts"); !errors.Is(err, os.ErrExist) {
			return fmt.Errorf("pin twice: %v", err)
		}
		pin, err := OpenNamespace(filepath.Join(dir, "uts"), unix.CLONE_NEWUTS)
		if err != nil {
			return err
		}
		return pin.Close()
	})
	if err != nil {
		t.Fatal(err)
	}
}
