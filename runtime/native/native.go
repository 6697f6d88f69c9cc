// Package native is Naru's own executor: it makes a container from an OCI spec
// without any other program.
//
// Create: the root file system, /dev and the volumes are opened as detached
// mounts; a plan is made (plans.go) and sent to the monitor's worker, which
// clones the child that runs it; the child joins cgroups and namespaces, makes
// the file systems that are bound to them and waits; a thread of the daemon
// enters the child's mount namespace, attaches everything by descriptor, masks
// and pivots (mounts.go); the child goes on, drops its privileges and waits
// for Start. An exec is a plan as well.
//
// It must not know about pods, CRI or images. Everything inside the container,
// its files and its links are hostile: paths are only resolved inside the root,
// on descriptors, and every file that matters is checked after it was opened.
//
// Concurrency: all methods may be called concurrently; calls that change one
// container are serialised by the caller. The Executor remembers nothing that
// the monitor or the kernel does not know as well, but for caches.
package native

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"os"
	"path/filepath"
	goruntime "runtime"
	"sync"
	"sync/atomic"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/sys"
	"github.com/naru-project/naru/runtime"
	"github.com/naru-project/naru/runtime/cgroup"
	"github.com/naru-project/naru/runtime/monitor"
	"github.com/naru-project/naru/runtime/seccomp"
	"github.com/naru-project/naru/runtime/stats"
)

// Config of an Executor.
type Config struct {
	RunDir  string // FIFOs live in <RunDir>/io/<id>
	Cgroups *cgroup.Driver
	Monitor *monitor.Client
	Stats   *stats.Sampler
	// OOMScoreFloor is the lowest oom_score_adj that this daemon may give
	// (without CAP_SYS_RESOURCE: its own).
	OOMScoreFloor int
	// CRIU is the program that makes checkpoints; empty = there are none.
	CRIU string
}

// Executor runs containers.
type Executor struct {
	cfg   Config
	criu  atomic.Pointer[string]
	proc  *os.File // a procfs of our own, attached nowhere
	exits chan runtime.Exit

	mappings mappingCache
	holders  sync.Map // container id → *scopeHolder

	mu      sync.Mutex // guards what is below; no IO under it
	filters map[[32]byte]*filter
	known   map[*specs.LinuxSeccomp]*filter
	live    map[string]*handle
}

// handle caches what the monitor told of a container.
type handle struct {
	pid     int
	pidfd   *os.File
	command string // for messages; empty after a restart
}

type filter struct {
	prog  []byte
	flags uint32
}

// New returns an Executor. Close ends it; containers go on.
func New(cfg Config) (*Executor, error) {
	proc, err := sys.OpenProc()
	if err != nil {
		return nil, errs.New(errs.Internal, "make a procfs for the executor: %w", err)
	}
	x := &Executor{
		cfg:      cfg,
		proc:     proc,
		exits:    make(chan runtime.Exit, 64),
		mappings: mappingCache{m: map[string]*os.File{}},
		filters:  map[[32]byte]*filter{},
		known:    map[*specs.LinuxSeccomp]*filter{},
		live:     map[string]*handle{},
	}
	x.SetCRIU(cfg.CRIU)
	return x, nil
}

// SetCRIU names the program that makes checkpoints; empty = there are none.
func (x *Executor) SetCRIU(path string) { x.criu.Store(&path) }

// Run forwards exits until ctx ends.
func (x *Executor) Run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case e, ok := <-x.cfg.Monitor.Exits():
			if !ok {
				return
			}
			select {
			case x.exits <- exitOf(e):
			case <-ctx.Done():
				return
			}
		}
	}
}

// Close releases descriptors.
func (x *Executor) Close() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	for id, h := range x.live {
		_ = h.pidfd.Close()
		delete(x.live, id)
	}
	x.mappings.mu.Lock()
	defer x.mappings.mu.Unlock()
	for k, f := range x.mappings.m {
		_ = f.Close()
		delete(x.mappings.m, k)
	}
	return x.proc.Close()
}

// Exits delivers the exits of all containers.
func (x *Executor) Exits() <-chan runtime.Exit { return x.exits }

func exitOf(e monitor.Exit) runtime.Exit {
	r := runtime.Exit{ID: e.ID, PID: e.PID, Code: e.Status, Signal: e.Signal, Time: time.Unix(0, e.Time), Unknown: e.Unknown}
	if e.Signal != 0 {
		r.Code = 128 + e.Signal
	}
	if e.Unknown {
		r.Code = 255
	}
	return r
}

func (x *Executor) ioDir(id string) string { return filepath.Join(x.cfg.RunDir, "io", id) }

// filter compiles a seccomp profile, once for each distinct one.
func (x *Executor) filter(s *specs.LinuxSeccomp) (*filter, error) {
	if s == nil {
		return &filter{}, nil
	}
	// Containers share profiles by pointer, and a profile is never written: an
	// exec of a known container does not have to encode it.
	x.mu.Lock()
	f := x.known[s]
	x.mu.Unlock()
	if f != nil {
		return f, nil
	}
	f, err := x.compile(s)
	if err != nil {
		return nil, err
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if len(x.known) >= maxFilters {
		clear(x.known)
	}
	x.known[s] = f
	return f, nil
}

// compile compiles a profile unless an equal one has been.
func (x *Executor) compile(s *specs.LinuxSeccomp) (*filter, error) {
	b, err := json.Marshal(s)
	if err != nil {
		return nil, errs.New(errs.Internal, "encode the seccomp profile: %w", err)
	}
	key := sha256.Sum256(b)
	x.mu.Lock()
	f := x.filters[key]
	x.mu.Unlock()
	if f != nil {
		return f, nil
	}
	prog, flags, err := seccomp.Compile(s, goruntime.GOARCH, seccomp.Options{})
	if err != nil {
		return nil, err
	}
	f = &filter{prog: prog, flags: flags}
	x.mu.Lock()
	defer x.mu.Unlock()
	if len(x.filters) >= maxFilters {
		clear(x.filters)
	}
	x.filters[key] = f
	return f, nil
}

const maxFilters = 128

// process takes from an OCI spec what the end of every plan needs.
func (x *Executor) process(c *runtime.Container, args []string, terminal bool) (*process, error) {
	sp := c.Spec.Process
	if len(args) == 0 {
		return nil, errs.New(errs.InvalidArgument, "no command to run: neither the request nor the image names one")
	}
	p := &process{
		args: args, env: sp.Env, cwd: sp.Cwd, user: sp.User,
		noNewPrivs: sp.NoNewPrivileges, rlimits: sp.Rlimits, umask: 0o022,
		apparmor: sp.ApparmorProfile, selinux: sp.SelinuxLabel,
		terminal: terminal, keyring: "_ses." + c.ID,
	}
	if sp.User.Umask != nil {
		p.umask = *sp.User.Umask
	}
	if sp.OOMScoreAdj != nil {
		v := max(*sp.OOMScoreAdj, x.cfg.OOMScoreFloor)
		p.oomScoreAdj = &v
	}
	if caps := sp.Capabilities; caps != nil {
		p.caps = capabilities{capMask(caps.Bounding), capMask(caps.Permitted), capMask(caps.Effective), capMask(caps.Ambient)}
	}
	if c.Spec.Linux != nil {
		f, err := x.filter(c.Spec.Linux.Seccomp)
		if err != nil {
			return nil, err
		}
		p.filter, p.filterFlags = f.prog, f.flags
	}
	return p, nil
}
