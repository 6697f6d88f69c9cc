package pod

import (
	"context"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/naru-project/naru/internal/errs"
)

// logPath joins a container's log path to its pod's folder; the result is
// inside that folder. Without both there is no log (CRI: PodSandboxConfig.log_directory).
func logPath(dir, rel string) (string, error) {
	if dir == "" || rel == "" {
		return "", nil
	}
	switch {
	case path.IsAbs(rel):
		return "", invalid("log path %q is not relative to the pod's log directory", clip(rel))
	case strings.IndexByte(rel, 0) >= 0:
		return "", invalid("log path holds a NUL byte")
	case slices.Contains(strings.Split(rel, "/"), ".."):
		return "", invalid("log path %q holds '..'", clip(rel))
	case path.Clean(rel) == "." || strings.HasSuffix(rel, "/"):
		return "", invalid("log path %q names no file", clip(rel))
	}
	return path.Join(dir, rel), nil
}

// makeLogFolders makes the folders above the log file, 0755 as kubelet makes
// its own. Inside the pod's log directory no link leads out (os.Root); the
// file itself is the executor's, which does not follow links.
func makeLogFolders(_ context.Context, dir, rel string) error {
	if dir == "" || rel == "" {
		return nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return errs.New(errs.FailedPrecondition, "make log directory: %w", err)
	}
	sub := filepath.Dir(filepath.Clean(rel))
	if sub == "." {
		return nil
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return errs.New(errs.FailedPrecondition, "open log directory: %w", err)
	}
	defer func() { _ = root.Close() }()
	if err := root.MkdirAll(sub, 0o755); err != nil {
		return errs.New(errs.FailedPrecondition, "make log folder: %w", err)
	}
	return nil
}
