package ocicli

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"

	"k8s.io/klog/v2"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime"
)

// Start lets the first process execute its program. What becomes of that, the
// runtime cannot tell any more: a program that cannot be executed is an exit.
// (One that is not there, Create has found out.)
func (o *Executor) Start(ctx context.Context, c *runtime.Container) error {
	id := c.ID
	h, err := o.maker(id)
	if err != nil {
		return err
	}
	if h == nil {
		return o.Executor.Start(ctx, c)
	}
	// Repeated after a crash, it may be running.
	if err := h.call(ctx, command{args: []string{"start", id}, limit: startTime, log: o.log(id)}); err != nil {
		if s, serr := h.state(ctx, id, o.log(id)); serr != nil || s == "created" || s == "" {
			return err
		}
	}
	return o.Started(ctx, id)
}

func (o *Executor) log(id string) string { return filepath.Join(o.folder(id), "log") }

// state asks the runtime: created, running, stopped, …
func (h *handler) state(ctx context.Context, id, log string) (string, error) {
	out, err := h.output(ctx, log, "state", id)
	if err != nil {
		return "", err
	}
	return parseState(out)
}

// parseState reads the document of `state` (runtime.md of the OCI runtime
// specification).
func parseState(b []byte) (string, error) {
	var s struct{ Status string }
	if err := json.Unmarshal(b, &s); err != nil {
		return "", errs.New(errs.Internal, "the runtime's state is no JSON document: %w", err)
	}
	return s.Status, nil
}

// Delete kills what is left of the container and removes its traces, those of
// its runtime too, whether that helps or not: what can be left is known.
func (o *Executor) Delete(ctx context.Context, c *runtime.Container) error {
	h, foreign, err := o.made(c.ID)
	if err != nil {
		return err
	}
	if !foreign {
		return o.Executor.Delete(ctx, c)
	}
	if h != nil {
		// By its runtime first: it knows more than the cgroup does, and runs hooks.
		err := h.call(ctx, command{args: []string{"delete", "--force", c.ID}, limit: deleteTime, log: o.log(c.ID)})
		if err != nil && !errs.Is(err, errs.NotFound) {
			klog.FromContext(ctx).Error(err, "a container is taken down without the help of its runtime", "id", c.ID)
		}
	}
	if err := o.Executor.Delete(ctx, c); err != nil {
		return err
	}
	all := []error{os.RemoveAll(o.folder(c.ID))}
	roots, _ := filepath.Glob(filepath.Join(o.dir, "root-*", c.ID))
	for _, r := range roots {
		all = append(all, os.RemoveAll(r))
	}
	if err := errors.Join(all...); err != nil {
		return errs.New(errs.Internal, "remove the folder of container %s: %w", short(c.ID), err)
	}
	return nil
}

// List tells what the monitor keeps. A daemon that was killed between a start
// and its note of it asks the runtime.
func (o *Executor) List(ctx context.Context) ([]runtime.State, error) {
	all, err := o.Executor.List(ctx)
	if err != nil {
		return nil, err
	}
	for i := range all {
		s := &all[i]
		if s.Started || s.Exit != nil {
			continue
		}
		h, foreign, err := o.made(s.ID)
		if err != nil || !foreign || h == nil {
			continue
		}
		status, err := h.state(ctx, s.ID, o.log(s.ID))
		if err != nil {
			klog.FromContext(ctx).Error(err, "whether a container was started is not known", "id", s.ID)
			continue
		}
		if status == "running" {
			s.Started = o.Started(ctx, s.ID) == nil
		}
	}
	return all, nil
}

// Checkpoint is not there for these containers.
func (o *Executor) Checkpoint(ctx context.Context, c *runtime.Container, dir string) error {
	h, err := o.maker(c.ID)
	if err != nil {
		return err
	}
	if h != nil {
		return errs.New(errs.Unimplemented, "checkpoint container %s: those of handler %q cannot be checkpointed, only native ones", short(c.ID), h.Name)
	}
	return o.Executor.Checkpoint(ctx, c, dir)
}
