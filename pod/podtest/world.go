// Package podtest has fakes of what the pod manager works with: one World that
// remembers what exists on the machine, and Lives, each the view of one daemon
// process. A Life can be killed at any call, as by SIGKILL, and another one
// started on the same World.
//
// What a container does is said by its environment: see the Env constants.
//
// Concurrency: everything may be called at the same time.
package podtest

import (
	"context"
	"maps"
	"os"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/naru-project/naru/images"
	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/pod"
	"github.com/naru-project/naru/runtime"
	"github.com/naru-project/naru/sandbox"
)

// What a container's environment makes it do.
const (
	EnvIgnoreTERM = "FAKE_IGNORE_TERM=1" // only SIGKILL ends it
	EnvStuck      = "FAKE_STUCK=1"       // nothing ends it, as if in state D
	EnvStartError = "FAKE_START_ERROR=1" // Start fails
	EnvExitZero   = "FAKE_EXIT=0"        // ends at once with 0, before Start returns
	EnvExitThree  = "FAKE_EXIT=3"        // ends at once with 3, before Start returns
	EnvOOM        = "FAKE_OOM=1"         // its end is the OOM killer's doing
)

// ImageID is the config digest of the image that every World has.
const ImageID = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"

// ImageName is its name.
const ImageName = "example.test/app:1"

// Process is one container's first process.
type Process struct {
	PID     int
	Cgroup  string
	Started bool
	Env     []string
	Exit    *runtime.Exit
	Signals []int
	// Silent: it is gone, and the monitor does not tell.
	Silent bool
}

// World is what exists.
type World struct {
	Dir string // has rootfs/, layers/

	mu        sync.Mutex
	boot      string
	lives     []*Life
	places    map[string]*sandbox.Handle // by sandbox id
	cgroups   map[string]bool            // pod cgroups that Naru made
	processes map[string]*Process        // by container id
	writables map[string]bool            // by container id
	holds     map[string]map[string]bool // owner → image ids
	images    map[string]*images.Image
	failures  map[string]*failure // by call
	delays    map[string]time.Duration
	nextPID   int
	nextIP    byte
	network   sandbox.NetworkStatus
}

type failure struct {
	err   error
	times int  // < 0: always
	late  bool // after the effect
}

// NewWorld makes an empty machine with one image. dir is a temporary folder.
func NewWorld(dir string) (*World, error) {
	w := &World{
		Dir: dir, boot: "boot-1", nextPID: 1000,
		places: map[string]*sandbox.Handle{}, cgroups: map[string]bool{}, processes: map[string]*Process{},
		writables: map[string]bool{}, holds: map[string]map[string]bool{}, images: map[string]*images.Image{},
		failures: map[string]*failure{}, delays: map[string]time.Duration{},
		network: sandbox.NetworkStatus{Ready: true},
	}
	etc := filepath.Join(dir, "rootfs", "etc")
	if err := os.MkdirAll(etc, 0o755); err != nil {
		return nil, err
	}
	for name, text := range map[string]string{
		"passwd": "root:x:0:0::/root:/bin/sh\nweb:x:33:33::/srv:/bin/false\n",
		"group":  "root:x:0:\nweb:x:33:\n",
	} {
		if err := os.WriteFile(filepath.Join(etc, name), []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	w.AddImage(ImageID, ImageName, ocispec.ImageConfig{Entrypoint: []string{"/bin/app"}, Env: []string{"PATH=/bin"}})
	return w, nil
}

// AddImage puts an image on the node.
func (w *World) AddImage(id, name string, c ocispec.ImageConfig) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.images[id] = &images.Image{ID: id, RepoTags: []string{name}, RepoDigests: []string{"example.test/app@" + id}, Config: c}
}

// AddArtifact puts an artifact of that type on the node.
func (w *World) AddArtifact(id, name, kind string) {
	w.AddImage(id, name, ocispec.ImageConfig{})
	w.mu.Lock()
	defer w.mu.Unlock()
	w.images[id].Artifact = kind
}

// FailOn makes the next calls of that name fail ("Sandboxes.Release");
// times < 0 means all of them, 0 ends it.
func (w *World) FailOn(call string, times int, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.failures[call] = &failure{err: err, times: times}
}

// FailAfter is FailOn, but for calls that fail after they had their effect.
func (w *World) FailAfter(call string, times int, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.failures[call] = &failure{err: err, times: times, late: true}
}

// DelayOn makes calls of that name take so long; they honour their context.
func (w *World) DelayOn(call string, d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.delays[call] = d
}

// Reboot ends everything that lives in the kernel.
func (w *World) Reboot() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.boot += "+"
	w.processes = map[string]*Process{}
	w.cgroups = map[string]bool{}
	// Leases of addresses last on disk: places stay until they are released.
}

// BreakSandbox takes a sandbox's namespaces away from under its pod.
func (w *World) BreakSandbox(id string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.places, id)
}

// ForgetProcess makes the monitor lose a container.
func (w *World) ForgetProcess(id string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.processes, id)
}

// Exit ends a container's process from inside.
func (w *World) Exit(id string, code int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.exit(id, code, 0)
}

// GoneSilently ends a container's process without anybody telling.
func (w *World) GoneSilently(id string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if p := w.processes[id]; p != nil {
		p.Silent = true
	}
}

// exit is called with mu held.
func (w *World) exit(id string, code, signal int) {
	p := w.processes[id]
	if p == nil || p.Exit != nil || p.Silent {
		return
	}
	p.Exit = &runtime.Exit{ID: id, PID: p.PID, Code: code, Signal: signal, Time: time.Now()}
	for _, l := range w.lives {
		l.announce(*p.Exit)
	}
}

// Process returns a copy of what runs, or nil.
func (w *World) Process(id string) *Process {
	w.mu.Lock()
	defer w.mu.Unlock()
	p := w.processes[id]
	if p == nil {
		return nil
	}
	c := *p
	c.Signals = slices.Clone(p.Signals)
	return &c
}

// Left names everything that exists and has no owner among the given ids.
func (w *World) Left(pods, containers map[string]bool) []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []string
	for id := range w.places {
		if !pods[id] {
			out = append(out, "sandbox "+id)
		}
	}
	for id := range w.processes {
		if !containers[id] {
			out = append(out, "process of "+id)
		}
	}
	for id := range w.writables {
		if !containers[id] {
			out = append(out, "writable layer of "+id)
		}
	}
	for id := range w.holds {
		if !containers[id] {
			out = append(out, "hold of "+id)
		}
	}
	if len(pods) == 0 {
		for parent := range w.cgroups {
			out = append(out, "pod cgroup "+parent)
		}
	}
	slices.Sort(out)
	return out
}

// Places is how many sandboxes exist.
func (w *World) Places() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.places)
}

// Holds returns the images that an owner holds.
func (w *World) Holds(owner string) []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Sorted(maps.Keys(w.holds[owner]))
}

// Life is one daemon process's view of a World. It implements what pod.Deps needs.
type Life struct {
	w     *World
	dead  atomic.Bool
	exits chan runtime.Exit
	hook  atomic.Pointer[func(point string)]
	// StatHang is a path that Stat never answers for.
	StatHang string
	// States are what Process tells beyond whether there is one.
	States map[int]pod.ProcessState
}

// NewLife starts a daemon: exits that were not deleted yet are told again.
func (w *World) NewLife() *Life {
	w.mu.Lock()
	defer w.mu.Unlock()
	l := &Life{w: w, exits: make(chan runtime.Exit, 1<<16)}
	w.lives = append(w.lives, l)
	w.holds = map[string]map[string]bool{} // were in the memory of the last life
	for _, p := range w.processes {
		if p.Exit != nil {
			l.announce(*p.Exit)
		}
	}
	return l
}

// Deps are the life's parts.
func (l *Life) Deps() pod.Deps {
	return pod.Deps{Executor: executor{l}, Sandboxes: sandboxes{l}, Images: store{l}, Cgroups: cgroups{}, Host: host{l}}
}

// Kill ends the life as SIGKILL would: from now on each goroutine that calls
// into the World ends there.
func (l *Life) Kill() { l.dead.Store(true) }

// Check ends the calling goroutine of a dead life. For Config.Observe.
func (l *Life) Check() {
	if l.dead.Load() {
		goruntime.Goexit()
	}
}

// SetHook sets what is called with "before X" and "after X" for each call X. It
// may call Kill; the calling goroutine then ends. nil: nothing.
func (l *Life) SetHook(f func(point string)) {
	if f == nil {
		l.hook.Store(nil)
		return
	}
	l.hook.Store(&f)
}

// Pass calls the hook.
func (l *Life) Pass(point string) {
	if f := l.hook.Load(); f != nil {
		(*f)(point)
	}
	l.Check()
}

func (l *Life) announce(e runtime.Exit) {
	if l.dead.Load() {
		return
	}
	select {
	case l.exits <- e:
	default:
		panic("podtest: nobody takes exits")
	}
}

// call is the frame of every fake call: hook, delay, injected failure, effect
// (with the World's lock held), hook.
func (l *Life) call(ctx context.Context, name string, effect func() error) error {
	l.Check()
	l.Pass("before " + name)
	l.w.mu.Lock()
	delay := l.w.delays[name]
	l.w.mu.Unlock()
	if delay > 0 {
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		l.Check()
	}
	l.w.mu.Lock()
	err := l.w.injected(name, false)
	if err == nil {
		err = effect()
	}
	if err == nil {
		err = l.w.injected(name, true)
	}
	l.w.mu.Unlock()
	l.Pass("after " + name)
	return err
}

// injected is called with mu held.
func (w *World) injected(name string, late bool) error {
	f := w.failures[name]
	if f == nil || f.times == 0 || f.late != late {
		return nil
	}
	if f.times > 0 {
		f.times--
	}
	return f.err
}

type cgroups struct{}

func (cgroups) ParentPath(parent string) (string, error) {
	if parent == "" {
		parent = "/default"
	}
	if parent == "/" || parent[0] != '/' {
		return "", errs.New(errs.InvalidArgument, "use cgroup parent %q", parent)
	}
	return parent, nil
}

func (c cgroups) ContainerPath(parent, id string) (string, error) {
	p, err := c.ParentPath(parent)
	return p + "/" + id, err
}

type host struct{ l *Life }

func (h host) BootID() (string, error) {
	h.l.w.mu.Lock()
	defer h.l.w.mu.Unlock()
	return h.l.w.boot, nil
}

func (h host) Process(pid int) (pod.ProcessState, bool) {
	h.l.w.mu.Lock()
	defer h.l.w.mu.Unlock()
	for _, p := range h.l.w.processes {
		if p.PID == pid && p.Exit == nil && !p.Silent {
			s := h.l.States[pid]
			if s.State == "" {
				s.State = "S"
			}
			s.StartTime = startTime(pid)
			return s, true
		}
	}
	return pod.ProcessState{}, false
}

func (h host) Stat(path string) error {
	if path == h.l.StatHang {
		select {}
	}
	_, err := os.Stat(path)
	return err
}

func startTime(pid int) uint64 { return uint64(pid) * 7 }

// ContainerConfig returns a config of the World's image.
func ContainerConfig(name string, env ...string) *pod.ContainerConfig {
	return &pod.ContainerConfig{
		Metadata: pod.ContainerMetadata{Name: name}, Image: ImageID, Env: env,
		Labels: map[string]string{"name": name},
		Security: pod.Security{
			Seccomp:  pod.Profile{Type: runtime.ProfileUnconfined},
			AppArmor: pod.Profile{Type: runtime.ProfileUnconfined},
		},
	}
}

// SandboxConfig returns a config of an ordinary pod.
func SandboxConfig(name string) *pod.SandboxConfig {
	return &pod.SandboxConfig{
		Metadata:     pod.Metadata{Name: name, Namespace: "default", UID: "uid-" + name},
		Hostname:     name,
		CgroupParent: "/kubepods/" + name,
		Network:      sandbox.ModePod, IPC: sandbox.ModePod, PID: runtime.PIDContainer,
		Labels: map[string]string{"pod": name},
	}
}

func unknown(what, id string) error {
	return errs.New(errs.NotFound, "%s %s is not known", what, id)
}

func mustErr(format string, args ...any) error {
	return errs.New(errs.Internal, "podtest: "+format, args...)
}
