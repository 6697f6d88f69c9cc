package pod

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime"
)

// checkpointTime is how long a checkpoint may take if its caller does not say.
const checkpointTime = 10 * time.Minute

// checkpointConfig is the member config.dump. Names and meaning are those that
// the tools for such archives read (checkpointctl, metadata.ContainerConfig).
type checkpointConfig struct {
	ID              string    `json:"id"`
	Name            string    `json:"name"`
	RootfsImage     string    `json:"rootfsImage,omitempty"`
	RootfsImageRef  string    `json:"rootfsImageRef,omitempty"`
	RootfsImageName string    `json:"rootfsImageName,omitempty"`
	OCIRuntime      string    `json:"runtime,omitempty"`
	CreatedTime     time.Time `json:"createdTime"`
	CheckpointedAt  time.Time `json:"checkpointedTime"`
	Restored        bool      `json:"restored"`
}

// Checkpoint writes an archive of a running container to location, a file
// that must not be there, and lets it go on: the images of its processes
// (checkpoint/), what it changed in its root file system (rootfs-diff.tar) and
// how it was made (config.dump, spec.dump). It holds all of the container's
// memory, so it is for root alone. timeout 0 is ten minutes.
func (m *Manager) Checkpoint(ctx context.Context, id, location string, timeout time.Duration) error {
	if !filepath.IsAbs(location) || filepath.Clean(location) != location || location == "/" {
		return errs.New(errs.InvalidArgument, "location %.200q is not the clean, absolute path of a file", location)
	}
	c, err := m.table.findContainer(id)
	if err != nil {
		return err
	}
	s, rc, err := m.running(c.id, "a checkpoint")
	if err != nil {
		return err
	}
	if _, err := os.Lstat(location); err == nil { // before anything is frozen for it
		return errs.New(errs.AlreadyExists, "checkpoint container %s: %s is there already", short(s.ID), location)
	}
	if timeout == 0 {
		timeout = checkpointTime
	}
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, errs.New(errs.DeadlineExceeded, "checkpoint container %s: not done after %s", short(s.ID), timeout))
	defer cancel()
	op := m.ops.begin("CheckpointContainer", s.ID, m.nameOf(c))
	defer op.end()
	dir, err := m.checkpointFolder()
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	if err := op.do(ctx, "processes", func(ctx context.Context) error { return m.deps.Executor.Checkpoint(ctx, rc, dir) }); err != nil {
		return err
	}
	err = op.do(ctx, "archive", func(ctx context.Context) error {
		return newFile(location, func(w io.Writer) error { return m.writeCheckpoint(ctx, w, s, rc, dir) })
	})
	if err != nil {
		return errs.New(errs.Of(err), "checkpoint container %s: %w", short(s.ID), err)
	}
	return nil
}

// checkpointsDir is below StateDir; what is in it when the manager starts is of
// one that was killed.
const checkpointsDir = "checkpoints"

// checkpointFolder makes a folder for the images of processes.
func (m *Manager) checkpointFolder() (string, error) {
	top := filepath.Join(m.cfg.StateDir, checkpointsDir)
	if err := os.MkdirAll(top, 0o700); err != nil {
		return "", errs.New(errs.Internal, "make a folder for a checkpoint: %w", err)
	}
	dir, err := os.MkdirTemp(top, "")
	if err != nil {
		return "", errs.New(errs.Internal, "make a folder for a checkpoint: %w", err)
	}
	return dir, nil
}

// newFile makes a file for root alone that has its name only once it is whole.
func newFile(path string, write func(io.Writer) error) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), ".naru-*")
	if err != nil {
		return errs.New(errs.FailedPrecondition, "make a file beside %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			_ = f.Close()
			_ = os.Remove(f.Name())
		}
	}()
	if err := write(f); err != nil {
		return err
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		return errs.New(errs.Internal, "write %s: %w", path, err)
	}
	if err := unix.Renameat2(unix.AT_FDCWD, f.Name(), unix.AT_FDCWD, path, unix.RENAME_NOREPLACE); err != nil {
		if errors.Is(err, unix.EEXIST) {
			return errs.New(errs.AlreadyExists, "%s is there already", path)
		}
		return errs.New(errs.Internal, "name %s: %w", path, err)
	}
	return nil
}

func (m *Manager) writeCheckpoint(ctx context.Context, w io.Writer, s *Container, rc *runtime.Container, dir string) error {
	out := tar.NewWriter(w)
	config := checkpointConfig{
		ID: s.ID, Name: s.Config.Metadata.Name, RootfsImage: s.Config.Image, RootfsImageRef: s.ImageID, RootfsImageName: s.ImageRef,
		OCIRuntime: "naru", CreatedTime: s.CreatedAt, CheckpointedAt: time.Now(),
	}
	for _, j := range []struct {
		name string
		v    any
	}{{"config.dump", config}, {"spec.dump", rc.Spec}} {
		data, err := json.MarshalIndent(j.v, "", "  ")
		if err != nil {
			return errs.New(errs.Internal, "encode %s: %w", j.name, err)
		}
		if err := member(out, j.name, data); err != nil {
			return err
		}
	}
	if err := m.diffMember(ctx, out, s.ID, dir); err != nil {
		return err
	}
	list, err := os.ReadDir(dir)
	if err != nil {
		return errs.New(errs.Internal, "read the images of processes: %w", err)
	}
	for _, e := range list {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		name := "checkpoint/" + e.Name()
		switch e.Name() {
		case diffName:
			continue
		case "dump.log", "stats-dump": // where tools look for them
			name = e.Name()
		}
		if err := fileMember(out, name, filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	if err := out.Close(); err != nil {
		return errs.New(errs.Internal, "end the archive: %w", err)
	}
	return nil
}

const diffName = "rootfs-diff.tar"

// diffMember writes the changes to a file first: a member's size comes before it.
func (m *Manager) diffMember(ctx context.Context, out *tar.Writer, id, dir string) error {
	path := filepath.Join(dir, diffName)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return errs.New(errs.Internal, "make %s: %w", diffName, err)
	}
	err = m.deps.Images.WriteDiff(ctx, id, f)
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return fileMember(out, diffName, path)
}

func member(out *tar.Writer, name string, data []byte) error {
	err := out.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o600, Size: int64(len(data)), ModTime: time.Now(), Format: tar.FormatPAX})
	if err == nil {
		_, err = out.Write(data)
	}
	if err != nil {
		return errs.New(errs.Internal, "write %s: %w", name, err)
	}
	return nil
}

func fileMember(out *tar.Writer, name, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return errs.New(errs.Internal, "write %s: %w", name, err)
	}
	defer func() { _ = f.Close() }()
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = &fs.PathError{Op: "archive", Path: path, Err: fs.ErrInvalid}
	}
	if err == nil {
		err = out.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o600, Size: st.Size(), ModTime: st.ModTime(), Format: tar.FormatPAX})
	}
	if err == nil {
		_, err = io.Copy(out, f)
	}
	if err != nil {
		return errs.New(errs.Internal, "write %s: %w", name, err)
	}
	return nil
}
