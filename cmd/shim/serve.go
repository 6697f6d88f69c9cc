package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"

	"github.com/naru-project/naru/cri"
	"github.com/naru-project/naru/cri/streaming"
	"github.com/naru-project/naru/images"
	"github.com/naru-project/naru/internal/config"
	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/metrics"
	"github.com/naru-project/naru/internal/notify"
	"github.com/naru-project/naru/internal/sys"
	"github.com/naru-project/naru/internal/tracing"
	"github.com/naru-project/naru/pod"
	"github.com/naru-project/naru/runtime/cgroup"
	"github.com/naru-project/naru/runtime/monitor"
	"github.com/naru-project/naru/runtime/native"
	"github.com/naru-project/naru/runtime/ocicli"
	"github.com/naru-project/naru/runtime/spec"
	"github.com/naru-project/naru/runtime/stats"
	"github.com/naru-project/naru/sandbox"
)

// shutdownTime is how long running requests may take to end after SIGTERM.
const shutdownTime = 20 * time.Second

// flushTime is how long the end of the daemon waits for a collector of traces.
const flushTime = 2 * time.Second

// healthTime bounds the question to the monitor that each Status call asks.
const healthTime = 2 * time.Second

// probeWait is how long the start waits for what OCI runtimes say of themselves.
const probeWait = 2 * time.Second

// daemon is everything that serves, in the order in which it is made.
type daemon struct {
	file    string                        // of the configuration
	cfg     *config.Config                // as it was at the start
	now     atomic.Pointer[config.Config] // as it is in effect
	reloads sync.Mutex                    // one at a time
	cgroups *cgroup.Driver
	monitor *monitor.Client
	given   spec.Host // what containers can get
	exec    *ocicli.Executor
	sandbox *sandbox.Manager
	images  *images.Store
	pods    *pod.Manager
	server  *cri.Server
	held    []*os.File // sockets that systemd has kept open since the daemon before
	metrics *metrics.Metrics
	scrapes *metrics.Server
	journal *journal
	tracing *tracing.Tracing           // nil: no traces
	found   atomic.Pointer[pod.Report] // by recovery; nil before
	closers []func() error
}

// runServe runs the daemon until ctx ends. What comes in on hup has it read its
// configuration again.
func runServe(ctx context.Context, file string, hup <-chan os.Signal) (err error) {
	cfg, err := config.Load(file)
	if err != nil {
		return err
	}
	d := &daemon{file: cmp.Or(file, config.DefaultPath), cfg: cfg}
	d.now.Store(cfg)
	d.metrics = metrics.New(version)
	if err := setVerbosity(cfg.Log.Verbosity); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.close()) }()
	for _, s := range []struct {
		name string
		do   func(context.Context) error
	}{
		{"take held sockets", d.takeHeld}, {"close inherited files", closeInherited}, {"relax timers", relaxTimers}, {"set oom_score_adj", shield}, {"prepare folders", d.prepareFolders},
		{"open cgroups", d.openCgroups}, {"reach the monitor", d.reachMonitor}, {"give up privileges", confine}, {"make the executor", d.openExecutor},
		{"open the image store", d.openImages}, {"set up the pod network", d.openSandboxes}, {"open the traces", d.openTracing}, {"load the pods", d.openPods}, {"make the CRI server", d.openServer}, {"open the metrics", d.openMetrics},
	} {
		if err := s.do(ctx); err != nil {
			return errs.New(errs.Of(err), "%s: %w", s.name, err)
		}
	}
	return d.serve(ctx, hup)
}

func (d *daemon) takeHeld(context.Context) error {
	d.held = notify.Held()
	return nil
}

func relaxTimers(context.Context) error {
	sys.RelaxTimers()
	return nil
}

// closeInherited closes what a careless parent left open: every descriptor but
// the standard ones that is not close-on-exec, as ours all are.
func closeInherited(context.Context) error {
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return errs.New(errs.Internal, "list the open files: %w", err)
	}
	for _, e := range list {
		fd, err := strconv.Atoi(e.Name())
		if err != nil || fd <= 2 {
			continue
		}
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil && flags&unix.FD_CLOEXEC == 0 {
			_ = unix.Close(fd)
		}
	}
	return nil
}

// prepareFolders makes the roots private and locks both: two daemons on one
// root or one run folder would undo each other's work.
func (d *daemon) prepareFolders(context.Context) error {
	unix.Umask(0o077)
	roots := []string{d.cfg.Root, d.cfg.Run}
	for _, dir := range roots {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return errs.New(errs.Internal, "make %s: %w", dir, err)
		}
		if err := os.Chmod(dir, 0o700); err != nil {
			return errs.New(errs.Internal, "tighten %s: %w", dir, err)
		}
	}
	var locked []os.FileInfo
	for _, dir := range roots {
		f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return errs.New(errs.Internal, "open the lock of %s: %w", dir, err)
		}
		d.closers = append(d.closers, f.Close)
		st, err := f.Stat()
		if err != nil {
			return errs.New(errs.Internal, "look at the lock of %s: %w", dir, err)
		}
		if slices.ContainsFunc(locked, func(x os.FileInfo) bool { return os.SameFile(x, st) }) {
			continue // one folder is both
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			return errs.New(errs.FailedPrecondition, "another naru uses %s; stop it first, or set another root and run folder", dir)
		}
		locked = append(locked, st)
	}
	return nil
}

func (d *daemon) openCgroups(context.Context) (err error) {
	d.cgroups, err = cgroup.New(cgroup.Config{Driver: d.cfg.Cgroup.Driver, DefaultParent: d.cfg.Cgroup.DefaultParent, StateDir: filepath.Join(d.cfg.Run, "cgroups")})
	if err == nil {
		d.closers = append(d.closers, func() error { d.cgroups.Close(); return nil })
	}
	return err
}

func (d *daemon) reachMonitor(ctx context.Context) (err error) {
	dir := d.cfg.Runtime.MonitorDir
	if dir == "" {
		dir = filepath.Join(d.cfg.Run, "monitor")
	}
	bin, err := monitorBinary(d.cfg.Runtime.Monitor)
	if err != nil {
		return err
	}
	if d.monitor, err = monitor.Ensure(ctx, monitor.EnsureOptions{Binary: bin, Dir: dir, Managed: notify.Managed()}); err != nil {
		return err
	}
	d.closers = append(d.closers, d.monitor.Close)
	d.journal = newJournal(d.monitor, d.metrics, liveOf(d.cfg).journal)
	info, err := d.monitor.Info(ctx)
	if err != nil {
		return err
	}
	if d.given, err = spec.ProbeHost(info.KeeperPID); err == nil && d.given.MinOOMScoreAdj > -1000 {
		klog.InfoS("Without CAP_SYS_RESOURCE a container's oom_score_adj is not set below the monitor's", "floor", d.given.MinOOMScoreAdj)
	}
	return err
}

func (d *daemon) openExecutor(context.Context) error {
	x, err := native.New(native.Config{
		RunDir: d.cfg.Run, Cgroups: d.cgroups, Monitor: d.monitor, Stats: stats.New(d.cgroups), OOMScoreFloor: d.given.MinOOMScoreAdj, CRIU: liveOf(d.cfg).criu,
	})
	if err != nil {
		return err
	}
	d.closers = append(d.closers, x.Close)
	d.exec, err = ocicli.New(x, ocicli.Config{RunDir: d.cfg.Run, Cgroups: d.cgroups, UserNamespaces: d.userNamespaces(), Live: liveOf(d.cfg).executors})
	return err
}

// monitorBinary finds naru-monitor: as configured, beside this program, or in PATH.
func monitorBinary(configured string) (string, error) {
	if configured != "" {
		return configured, nil
	}
	self, err := os.Executable()
	if err == nil {
		p := filepath.Join(filepath.Dir(self), "naru-monitor")
		if _, err := os.Stat(p); err == nil {
			return p, nil
		}
	}
	for dir := range strings.SplitSeq(os.Getenv("PATH"), ":") {
		if !filepath.IsAbs(dir) {
			continue // depends on where the daemon was started
		}
		p := filepath.Join(dir, "naru-monitor")
		if st, err := os.Stat(p); err == nil && st.Mode().IsRegular() {
			return p, nil
		}
	}
	return "", errs.New(errs.FailedPrecondition, "naru-monitor is neither beside naru nor in PATH; set runtime.monitor in the configuration")
}

func (d *daemon) openImages(ctx context.Context) (err error) {
	d.images, err = images.Open(ctx, images.Config{
		Root: filepath.Join(d.cfg.Root, "images"), MaxTransfers: d.cfg.Images.Layers, PullDone: d.pullDone, Live: liveOf(d.cfg).images,
	})
	if err == nil {
		d.closers = append(d.closers, d.images.Close)
	}
	return err
}

func (d *daemon) openSandboxes(ctx context.Context) (err error) {
	c, n := sandbox.DefaultConfig(), d.cfg.Network
	c.RunDir, c.StateFile = d.cfg.Run, filepath.Join(d.cfg.Root, "network.json")
	c.PodCIDRs, c.HostPorts, c.Live = n.PodCIDR, n.HostPorts, liveOf(d.cfg).network
	c.Table, c.LinkPrefix, c.PoolSize = n.Table, n.LinkPrefix, n.Pool
	c.Plugin = n.Plugin
	c.CNI.ConfDir, c.CNI.BinDirs, c.CNI.StateDir, c.CNI.HandlerDirs = n.CNI.ConfDir, n.CNI.BinDirs, filepath.Join(d.cfg.Root, "cni"), n.CNI.HandlerConfDirs
	c.CNI.Timeout, c.CNI.StatusTimeout, c.CNI.StatusEvery = n.CNI.Timeout.D(), n.CNI.StatusTimeout.D(), n.CNI.StatusInterval.D()
	if d.sandbox, err = sandbox.New(c, sandbox.Deps{Namespaces: native.Maker{X: d.exec.Executor}, Programs: d.exec}); err != nil {
		return err
	}
	if err := d.sandbox.Start(ctx); err != nil {
		return err
	}
	d.closers = append(d.closers, d.sandbox.Close)
	return nil
}

func (d *daemon) openPods(context.Context) (err error) {
	fs, err := d.images.FsInfo()
	if err != nil {
		return err
	}
	d.pods, err = pod.New(pod.Config{
		StateDir: filepath.Join(d.cfg.Root, "state"), RunDir: filepath.Join(d.cfg.Run, "state"), SpecHost: d.given,
		WritableMountpoint: fs.Mountpoint, Watch: watcher{d.metrics, d.tracing}, CheckHandler: d.exec.CheckHandler, Live: liveOf(d.cfg).pods,
	}, pod.Deps{Executor: d.exec, Sandboxes: d.sandbox, Images: d.images, Cgroups: d.cgroups})
	return err
}

func (d *daemon) openServer(context.Context) error {
	d.server = cri.New(cri.Config{
		Version: version, Handlers: liveOf(d.cfg).handlers, UserNamespaces: d.exec.UserNamespaces, Verbose: func() any { return d.now.Load() },
		Streaming: streaming.Config{Addr: d.cfg.Stream.Address},
		Health:    d.health, Metrics: d.metrics,
	}, d.pods, d.images, d.host())
	return d.server.Streams().Listen()
}

// openTracing reaches for no collector yet.
func (d *daemon) openTracing(ctx context.Context) (err error) {
	c := d.cfg.Tracing
	if c.Endpoint == "" {
		return nil
	}
	var told rate
	d.tracing, err = tracing.New(context.WithoutCancel(ctx), tracing.Config{
		Endpoint: c.Endpoint, PerMillion: c.PerMillion, Version: version,
		Failed: func(err error) {
			if told.allow(time.Now()) {
				klog.ErrorS(err, "Traces are lost", "collector", c.Endpoint)
			}
		},
	})
	d.closers = append(d.closers, func() error {
		ctx, cancel := context.WithTimeout(context.Background(), flushTime)
		defer cancel()
		if err := d.tracing.Close(ctx); err != nil {
			klog.ErrorS(err, "Traces are lost", "collector", c.Endpoint)
		}
		return nil
	})
	return err
}

// rate lets something be said once a minute.
type rate struct{ next atomic.Int64 }

func (r *rate) allow(now time.Time) bool {
	next := r.next.Load()
	return now.UnixNano() >= next && r.next.CompareAndSwap(next, now.Add(time.Minute).UnixNano())
}

// health asks the monitor: without it no container can be started.
func (d *daemon) health() error {
	ctx, cancel := context.WithTimeout(context.Background(), healthTime)
	defer cancel()
	return d.monitor.Ping(ctx)
}

// serve opens the socket at once, so that kubelet's calls wait instead of
// failing, recovers, and then answers. Where systemd holds the socket it was
// never closed, and calls wait since the daemon before this one has gone.
func (d *daemon) serve(ctx context.Context, hup <-chan os.Signal) error {
	l, err := cri.Listen(d.cfg.Socket, nil, d.held...)
	if err != nil {
		notify.Drop(d.held) // in case they are what stands in the way
		return err
	}
	if notify.Managed() {
		err := l.Hold(func(name string, f *os.File) error {
			notify.Drop(d.held) // systemd keeps one, and none of these was it
			return notify.Hold(name, f)
		})
		if err != nil {
			klog.ErrorS(err, "The CRI socket will not stay open over a restart", "socket", d.cfg.Socket)
		}
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var wg sync.WaitGroup
	wg.Go(func() { d.exec.Run(ctx) })
	g := cri.NewGRPCServer(d.server, d.tracing.ServerOptions()...)
	serveAdmin, stopAdmin, err := d.openAdmin()
	if err != nil {
		_ = l.Close()
		return err
	}
	served := make(chan error, 3)
	wg.Go(func() { served <- serveAdmin() })
	wg.Go(func() { served <- g.Serve(l) })
	wg.Go(func() { served <- d.server.Streams().Serve() })

	probed := make(chan struct{})
	wg.Go(func() {
		defer close(probed)
		d.exec.Probe(ctx)
	})
	wg.Go(func() { d.journal.run(ctx) })
	report := d.pods.Recover(ctx)
	d.found.Store(report)
	klog.InfoS("Recovered", "pods", report.Pods, "containers", report.Containers, "undone", report.Undone, "ended", report.Ended,
		"lost", report.Lost, "orphans", report.Orphans, "quarantined", report.Quarantined, "problems", report.Problems, "took", report.Took)
	wg.Go(func() { d.pods.Run(ctx) })
	select {
	case <-probed:
	case <-time.After(probeWait): // a runtime that hangs is told of by its handler
	}
	d.server.SetReady()
	klog.InfoS("Serving", "socket", d.cfg.Socket, "version", version)
	notify.Ready()
	wg.Go(func() { notify.Watch(ctx, d.selfTest) })
	wg.Go(func() { d.reloadOn(ctx, hup) })

	select {
	case err = <-served:
	case <-ctx.Done():
	}
	notify.Stopping()
	klog.InfoS("Stopping; pods go on")
	sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTime)
	defer cancel()
	all := []error{err, d.server.Close(sctx)}
	force := context.AfterFunc(sctx, g.Stop)
	g.GracefulStop()
	force()
	stopAdmin(sctx)
	stop()
	wg.Wait()
	return errors.Join(all...)
}

// selfTest asks the daemon's own socket for its status: what the watchdog
// vouches for is what kubelet sees.
func (d *daemon) selfTest(ctx context.Context) error {
	c, err := grpc.NewClient("unix://"+d.cfg.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return fmt.Errorf("dial our own socket: %w", err)
	}
	defer func() { _ = c.Close() }()
	_, err = criv1.NewRuntimeServiceClient(c).Status(ctx, &criv1.StatusRequest{})
	return err
}

func (d *daemon) close() error {
	var all []error
	for i := len(d.closers) - 1; i >= 0; i-- {
		all = append(all, d.closers[i]())
	}
	return errors.Join(all...)
}

// host tells the CRI edge what this node can do. The kernel is 5.12 or newer:
// openat2, clone3 and mount_setattr are needed to run any container at all.
func (d *daemon) host() cri.Host {
	userns := d.userNamespaces()
	return cri.Host{
		SystemdCgroups: d.cgroups.Systemd(), RecursiveReadOnlyMounts: true, MountOptions: true,
		UserNamespaces: userns, UserNamespacesHostNetwork: userns,
	}
}

func (d *daemon) userNamespaces() bool {
	return d.cfg.Runtime.UserNamespaces && userNamespacesAllowed()
}

func userNamespacesAllowed() bool {
	b, err := os.ReadFile("/proc/sys/user/max_user_namespaces")
	return err == nil && strings.TrimSpace(string(b)) != "0"
}
