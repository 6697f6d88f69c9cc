package main

import (
	"context"
	"errors"
	"flag"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"k8s.io/klog/v2"

	"github.com/naru-project/naru/images"
	"github.com/naru-project/naru/images/registry"
	"github.com/naru-project/naru/internal/config"
	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/pod"
	"github.com/naru-project/naru/runtime/ocicli"
	"github.com/naru-project/naru/runtime/spec"
	"github.com/naru-project/naru/sandbox"
)

// live is what a running daemon takes of a configuration: the keys with
// reload:"live", by the part that they are for. The parts are opened with it,
// too.
type live struct {
	verbosity int
	images    images.Live
	network   sandbox.Live
	pods      pod.Live
	executors ocicli.Live
	handlers  []string
	criu      string
	metrics   string // address
	journal   journalUse
}

func liveOf(cfg *config.Config) live {
	handlers := slices.Sorted(maps.Keys(cfg.Handlers))
	return live{
		verbosity: cfg.Log.Verbosity,
		images: images.Live{
			Registry: registry.Config{HostDirs: cfg.Images.RegistryDirs, ProgressTimeout: cfg.Images.Progress.D()},
			Pinned:   cfg.Images.Pinned, PullTimeout: cfg.Images.PullTimeout.D(),
		},
		network: sandbox.Live{
			NonMasqueradeCIDRs: cfg.Network.NonMasquerade, MTU: cfg.Network.MTU,
			UnprivilegedPorts: cfg.Network.UnprivilegedPorts, UnprivilegedPing: cfg.Network.UnprivilegedPing,
		},
		pods: pod.Live{
			Sync: cfg.SyncRecs, Handlers: append([]string{"", "naru"}, handlers...), CDIDirs: cfg.CDI.SpecDirs, CDIAnnotations: cfg.CDI.Annotations,
			SpecDefaults: defaultsOf(&cfg.Default), PidsLimit: cfg.Default.PidsLimit,
			HookDirs: cfg.Runtime.HookDirs, LogToJournald: cfg.Default.LogToJournald,
		},
		executors: executorsOf(cfg),
		handlers:  handlers,
		criu:      cfg.Runtime.CRIU,
		metrics:   cfg.Metrics.Address,
		journal:   journalOf(cfg),
	}
}

// defaultsOf is what containers get that is not asked for.
func defaultsOf(c *config.Containers) spec.Defaults {
	d := spec.Defaults{Env: c.Env, DeviceOwner: c.DeviceOwnership}
	if len(c.Capabilities) > 0 {
		d.Capabilities = c.Capabilities
	}
	for _, u := range c.Ulimits {
		d.Rlimits = append(d.Rlimits, specs.POSIXRlimit{Type: "RLIMIT_" + strings.ToUpper(u.Name), Soft: u.Soft, Hard: u.Hard})
	}
	return d
}

// executorsOf sorts the runtime handlers by who runs them.
func executorsOf(cfg *config.Config) ocicli.Live {
	l := ocicli.Live{Native: []string{"", "naru"}}
	for name, h := range cfg.Handlers {
		if h.Kind == "native" {
			l.Native = append(l.Native, name)
			continue
		}
		l.Handlers = append(l.Handlers, ocicli.Handler{Name: name, Path: h.Path, Args: h.Args})
	}
	return l
}

// setting brings one part of the daemon to a new configuration. Setting it
// again, to the former one, is its undo.
type setting struct {
	part string
	set  func(live) error
}

// settings are all of them: what may fail comes first.
func (d *daemon) settings() []setting {
	sure := func(set func(live)) func(live) error {
		return func(l live) error { set(l); return nil }
	}
	return []setting{
		{"the pod network", func(l live) error { return d.sandbox.Reconfigure(l.network) }},
		{"the metrics", func(l live) error { return d.scrapes.Listen(l.metrics) }},
		{"the log", func(l live) error { return setVerbosity(l.verbosity) }},
		{"images", sure(func(l live) { d.images.Reconfigure(l.images) })},
		{"the journal", sure(func(l live) { d.journal.use(l.journal) })},
		{"pods", sure(func(l live) { d.pods.Reconfigure(l.pods) })},
		{"the executor", sure(func(l live) { d.exec.SetCRIU(l.criu); d.exec.Reconfigure(l.executors) })},
		{"the CRI server", sure(func(l live) { d.server.SetHandlers(l.handlers) })},
	}
}

// apply makes all settings, or puts those back that it made.
func apply(all []setting, from, to live) error {
	for i, s := range all {
		err := s.set(to)
		if err == nil {
			continue
		}
		failed := []error{errs.New(errs.Of(err), "reconfigure %s: %w", s.part, err)}
		for _, done := range slices.Backward(all[:i+1]) { // this one, too: it may have come half-way
			if err := done.set(from); err != nil {
				failed = append(failed, errs.New(errs.Internal, "put %s back as it was: %w", done.part, err))
			}
		}
		return errors.Join(failed...)
	}
	return nil
}

// reload reads the configuration again and takes all of it, or nothing.
func (d *daemon) reload() ([]config.Change, error) {
	d.reloads.Lock()
	defer d.reloads.Unlock()
	changes, err := d.tryReload()
	if err != nil {
		d.metrics.Reload("refused")
		klog.ErrorS(err, "The configuration was not reloaded; that of before goes on", "file", d.file)
		return nil, err
	}
	d.metrics.Reload("ok")
	texts := make([]string, len(changes))
	for i, c := range changes {
		texts[i] = c.String()
	}
	klog.InfoS("Reloaded the configuration", "file", d.file, "changes", texts)
	return changes, nil
}

func (d *daemon) tryReload() ([]config.Change, error) {
	was := d.now.Load()
	cfg, err := config.Load(d.file)
	if err != nil {
		return nil, err
	}
	changes := config.Diff(was, cfg)
	if err := config.CheckReload(changes); err != nil || len(changes) == 0 {
		return nil, err
	}
	if err := apply(d.settings(), liveOf(was), liveOf(cfg)); err != nil {
		return nil, err
	}
	d.now.Store(cfg)
	d.exec.Probe(context.Background()) // has its own deadlines
	return changes, nil
}

// reloadOn reloads at each signal until ctx ends; one that comes meanwhile is
// not lost.
func (d *daemon) reloadOn(ctx context.Context, hup <-chan os.Signal) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-hup:
			_, _ = d.reload() // logged there
		}
	}
}

func setVerbosity(v int) error {
	var f flag.FlagSet
	klog.InitFlags(&f)
	if err := f.Set("v", strconv.Itoa(v)); err != nil {
		return errs.New(errs.InvalidArgument, "log.verbosity: %w", err)
	}
	return nil
}
