package atomicfile

import (
	"bytes"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

func TestWriteReplacesAndLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	p := filepath.Join(dir, "a.json")
	for i, c := range []string{"one", "two, longer", ""} {
		if err := Write(p, []byte(c), 0o640, i == 1); err != nil {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(p); err != nil || string(b) != c {
			t.Fatalf("read %q, %v", b, err)
		}
	}
	st, err := os.Stat(p)
	if err != nil || st.Mode().Perm() != 0o640 {
		t.Fatalf("mode %v, %v", st.Mode(), err)
	}
	if names, _ := os.ReadDir(dir); len(names) != 1 {
		t.Fatalf("left %v", names)
	}
}

func TestWriteErrorLeavesOldAndNoTemp(t *testing.T) {
	dir := t.TempDir()
	p := filepath.Join(dir, "d")
	if err := os.MkdirAll(filepath.Join(p, "sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := Write(p, []byte("x"), 0o600, false); err == nil { // rename over a folder
		t.Fatal("wrote over a folder")
	}
	if names, _ := os.ReadDir(dir); len(names) != 1 {
		t.Fatalf("left %v", names)
	}
}

func TestCleanTempAndRemove(t *testing.T) {
	dir := t.TempDir()
	for _, n := range []string{TempPrefix + "1", TempPrefix + "2", "keep"} {
		if err := os.WriteFile(filepath.Join(dir, n), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := CleanTemp(dir); err != nil {
		t.Fatal(err)
	}
	if names, _ := os.ReadDir(dir); len(names) != 1 || names[0].Name() != "keep" {
		t.Fatalf("left %v", names)
	}
	if err := Remove(filepath.Join(dir, "keep")); err != nil {
		t.Fatal(err)
	}
	if err := Remove(filepath.Join(dir, "keep")); err != nil {
		t.Fatal(err)
	}
}

func TestWriteByManyAtOnce(t *testing.T) {
	dir := t.TempDir()
	p := filepath.Join(dir, "a.json")
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 200 {
				if err := Write(p, bytes.Repeat([]byte{byte('a' + i)}, 100*(i+1)), 0o600, false); err != nil {
					t.Error(err)
					return
				}
				b, err := os.ReadFile(p)
				if err != nil || len(b) == 0 || len(b) != 100*int(b[0]-'a'+1) {
					t.Errorf("read %d bytes, %v", len(b), err)
					return
				}
			}
		})
	}
	wg.Wait()
	if names, _ := os.ReadDir(dir); len(names) != 1 {
		t.Fatalf("left %v", names)
	}
}

func TestRemove(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x")
	for what, plant := range map[string]func() error{
		"nothing":  func() error { return nil },
		"a file":   func() error { return os.WriteFile(path, nil, 0o600) },
		"a folder": func() error { return os.MkdirAll(filepath.Join(path, "in", "it"), 0o700) },
	} {
		if err := plant(); err != nil {
			t.Fatal(err)
		}
		if err := Remove(path); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if _, err := os.Lstat(path); err == nil {
			t.Errorf("%s is still there", what)
		}
	}
}
