package main

import (
	"context"
	"io"
	"os"
	goruntime "runtime"
	"time"

	"github.com/naru-project/naru/cri"
	"github.com/naru-project/naru/images"
	"github.com/naru-project/naru/internal/admin"
	"github.com/naru-project/naru/pod"
)

// adminBackend answers the command line from the daemon's parts.
type adminBackend struct {
	daemon  *daemon
	images  *images.Store
	pods    *pod.Manager
	started time.Time
}

// openAdmin listens on the admin socket, for root alone, and returns what
// serves it; see admin.Server.
func (d *daemon) openAdmin() (serve func() error, shutdown func(context.Context), err error) {
	l, err := cri.Listen(d.cfg.AdminSocket(), nil)
	if err != nil {
		return nil, nil, err
	}
	s := admin.New(&adminBackend{daemon: d, images: d.images, pods: d.pods, started: time.Now()})
	return func() error { return s.Serve(l) }, s.Shutdown, nil
}

// Operations implements admin.Backend.
func (b *adminBackend) Operations() []admin.Operation {
	var out []admin.Operation
	for _, o := range b.pods.Operations() {
		out = append(out, admin.Operation{ID: o.ID, Name: o.Name, Kind: o.Kind, Step: o.Step, Started: o.Started, StepAt: o.StepAt})
	}
	return out
}

// Pulls implements admin.Backend.
func (b *adminBackend) Pulls() []admin.Pull {
	var out []admin.Pull
	for _, p := range b.images.Progress() {
		out = append(out, admin.Pull{
			Ref: p.Ref, Stage: p.Stage, Bytes: p.Bytes, Total: p.Total, Layers: p.Layers, AllLayers: p.AllLayers, Waiting: p.Waiting, Started: p.Started,
		})
	}
	return out
}

// Version implements admin.Backend.
func (b *adminBackend) Version() admin.Version {
	return admin.Version{Version: version, Go: goruntime.Version(), PID: os.Getpid(), Started: b.started}
}

// Config implements admin.Backend.
func (b *adminBackend) Config() (string, error) { return b.daemon.now.Load().File() }

// Reload implements admin.Backend.
func (b *adminBackend) Reload() (admin.Reload, error) {
	changes, err := b.daemon.reload()
	out := admin.Reload{File: b.daemon.file, Changes: []admin.Change{}}
	for _, c := range changes {
		out.Changes = append(out.Changes, admin.Change{Key: c.Key, Old: c.Old, New: c.New})
	}
	return out, err
}

// LoadImage implements admin.Backend.
func (b *adminBackend) LoadImage(ctx context.Context, r io.Reader, name string) ([]string, error) {
	return b.images.Load(ctx, r, images.LoadOptions{Name: name})
}

// ImportImage implements admin.Backend.
func (b *adminBackend) ImportImage(ctx context.Context, path, name string) ([]string, error) {
	return b.images.LoadPath(ctx, path, images.LoadOptions{Name: name})
}
