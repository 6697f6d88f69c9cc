package pod_test

import (
	"archive/tar"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/naru-project/naru/internal/errs"
)

func TestCheckpoint(t *testing.T) {
	r := newRig(t)
	p := r.pod("p")
	id := r.running(p, "c", "SECRET=1")
	dir := t.TempDir()
	at := filepath.Join(dir, "c.tar")
	r.ok(r.m.Checkpoint(r.ctx(), id, at, 0))
	st, err := os.Stat(at)
	r.ok(err)
	if st.Mode().Perm() != 0o600 {
		t.Errorf("the archive has mode %v", st.Mode())
	}
	members := map[string][]byte{}
	f, err := os.Open(at)
	r.ok(err)
	defer func() { _ = f.Close() }()
	for in := tar.NewReader(f); ; {
		h, err := in.Next()
		if err == io.EOF {
			break
		}
		r.ok(err)
		members[h.Name], err = io.ReadAll(in)
		r.ok(err)
	}
	for _, want := range []string{"config.dump", "spec.dump", "rootfs-diff.tar", "checkpoint/core-1.img", "dump.log"} {
		if _, ok := members[want]; !ok {
			t.Errorf("the archive lacks %s", want)
		}
	}
	var config struct {
		ID, Name, RootfsImage string
		CheckpointedTime      time.Time
	}
	r.ok(json.Unmarshal(members["config.dump"], &config))
	if config.ID != id || config.Name != "c" || config.RootfsImage == "" || config.CheckpointedTime.IsZero() {
		t.Errorf("config.dump says %+v", config)
	}
	var spec struct{ Process struct{ Env []string } }
	r.ok(json.Unmarshal(members["spec.dump"], &spec))
	if !slices.Contains(spec.Process.Env, "SECRET=1") {
		t.Errorf("spec.dump says %+v", spec)
	}

	// A file that is there stays as it is, and nothing is left beside it.
	r.fails(r.m.Checkpoint(r.ctx(), id, at, 0), errs.AlreadyExists, at)
	for _, bad := range []string{"", "relative", "/", "/a/../b", "/a//b"} {
		r.fails(r.m.Checkpoint(r.ctx(), id, bad, 0), errs.InvalidArgument, "location")
	}
	other := filepath.Join(dir, "other.tar")
	r.fails(r.m.Checkpoint(r.ctx(), id, filepath.Join(dir, "no", "folder.tar"), 0), errs.FailedPrecondition, "folder.tar")
	r.w.FailOn("Executor.Checkpoint", 1, errs.New(errs.Internal, "criu says no"))
	r.fails(r.m.Checkpoint(r.ctx(), id, other, 0), errs.Internal, "criu says no")
	r.w.FailOn("Images.WriteDiff", 1, errs.New(errs.ResourceExhausted, "disk is full"))
	r.fails(r.m.Checkpoint(r.ctx(), id, other, 0), errs.ResourceExhausted, "disk is full")
	r.w.DelayOn("Executor.Checkpoint", time.Hour)
	r.fails(r.m.Checkpoint(r.ctx(), id, other, 20*time.Millisecond), errs.DeadlineExceeded, "20ms")
	r.w.DelayOn("Executor.Checkpoint", 0)
	if list, _ := os.ReadDir(dir); len(list) != 1 {
		t.Errorf("left beside the archive: %v", list)
	}
	if list, _ := os.ReadDir(filepath.Join(r.dir, "checkpoints")); len(list) != 0 {
		t.Errorf("left of the dumps: %v", list)
	}

	r.ok(r.m.StopContainer(r.ctx(), id, 0))
	r.fails(r.m.Checkpoint(r.ctx(), id, other, 0), errs.FailedPrecondition, "exited")
	r.fails(r.m.Checkpoint(r.ctx(), "nobody", other, 0), errs.NotFound)
}

// A killed daemon leaves no memory of containers behind.
func TestCheckpointsOfAKilledDaemonGo(t *testing.T) {
	r := newRig(t)
	left := filepath.Join(r.dir, "checkpoints", "x")
	r.ok(os.MkdirAll(left, 0o700))
	r.ok(os.WriteFile(filepath.Join(left, "pages-1.img"), []byte("memory"), 0o600))
	r.l.Kill()
	r.boot()
	if _, err := os.Stat(left); !os.IsNotExist(err) {
		t.Errorf("%s is still there: %v", left, err)
	}
}
