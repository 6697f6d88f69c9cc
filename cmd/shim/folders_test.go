package main

import (
	"context"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/config"
	"github.com/naru-project/naru/internal/errs"
)

// Two daemons must share neither root nor run folder.
func TestFoldersAreLocked(t *testing.T) {
	t.Cleanup(func() { unix.Umask(0o022) })
	dir := t.TempDir()
	prepare := func(root, run string) (*daemon, error) {
		d := &daemon{cfg: &config.Config{Root: filepath.Join(dir, root), Run: filepath.Join(dir, run)}}
		return d, d.prepareFolders(context.Background())
	}
	first, err := prepare("root", "run")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range [][2]string{{"root", "run"}, {"root", "other"}, {"other", "run"}, {"run", "third"}} {
		d, err := prepare(c[0], c[1])
		if !errs.Is(err, errs.FailedPrecondition) || !strings.Contains(err.Error(), "another naru uses") {
			t.Errorf("root %s, run %s: %v", c[0], c[1], err)
		}
		_ = d.close()
	}
	both, err := prepare("both", "both")
	if err != nil {
		t.Errorf("one folder for both: %v", err)
	}
	_ = both.close()
	_ = first.close()
	again, err := prepare("other", "run")
	if err != nil {
		t.Errorf("after the first has ended: %v", err)
	}
	_ = again.close()
}
