package cni

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	"k8s.io/klog/v2"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/sys"
)

// Manager attaches pods to CNI networks and detaches them.
type Manager struct {
	cfg     Config
	runner  Runner
	lib     *libcni.CNIConfig
	folders map[string]*folder // by handler; "" is the default one
	changed func()             // told that a folder changed
	gate    gate
	status  atomic.Pointer[noted]
	poll    chan struct{} // asks for the status at once
	garbage chan struct{} // something may be there to collect
	checks  chan check

	mu       sync.Mutex
	attached map[string]bool // +checklocks:mu pods that have an attachment
}

// noted is the status of the default network, and of which configuration it is.
type noted struct {
	Status
	file   string
	config []byte
}

func (s *noted) of(n *Network) bool { return s.file == n.File && bytes.Equal(s.config, n.list.Bytes) }

// check is a pod whose attachment is to be checked.
type check struct{ id, name, netns string }

// New makes a Manager. changed is called whenever another configuration counts.
func New(cfg Config, r Runner, changed func()) *Manager {
	m := &Manager{
		cfg: cfg, runner: r, changed: changed, folders: map[string]*folder{},
		poll: make(chan struct{}, 1), garbage: make(chan struct{}, 1), checks: make(chan check, 4096),
		attached: map[string]bool{},
	}
	m.lib = libcni.NewCNIConfigWithCacheDir(cfg.BinDirs, cfg.StateDir, &plugins{m: m})
	dirs := maps.Clone(cfg.HandlerDirs)
	if dirs == nil {
		dirs = map[string]string{}
	}
	if cfg.ConfDir != "" {
		dirs[""] = cfg.ConfDir
	}
	for handler, dir := range dirs {
		m.folders[handler] = &folder{dir: filepath.Clean(dir), handler: handler}
	}
	m.status.Store(&noted{Status: Status{Reason: ReasonNoConfig, Message: "not looked for yet"}})
	return m
}

// Open reads the folders, and what a former process attached.
func (m *Manager) Open() error {
	ids, err := m.list()
	if err != nil {
		return err
	}
	m.mu.Lock()
	for _, id := range ids {
		m.attached[id] = true
	}
	m.mu.Unlock()
	for _, f := range m.folders {
		f.reload()
		m.note(f)
	}
	return nil
}

// Run does the background work until ctx ends. Attachments stay.
func (m *Manager) Run(ctx context.Context) {
	var wg sync.WaitGroup
	for _, f := range m.folders {
		wg.Go(func() { f.watch(ctx, func() { m.reload(f) }) })
	}
	wg.Go(func() { m.pollStatus(ctx) })
	wg.Go(func() { m.collect(ctx) })
	wg.Go(func() { m.checkAll(ctx) })
	wg.Wait()
}

// reload reads a folder again; if it has changed, everybody hears of it.
func (m *Manager) reload(f *folder) {
	if !f.reload() {
		return
	}
	m.note(f)
	m.changed()
	kick(m.poll)
	kick(m.garbage)
}

// note takes down what the folder alone tells.
func (m *Manager) note(f *folder) {
	found := f.now.Load()
	log := klog.Background().WithValues("folder", f.dir)
	if f.handler != "" {
		log = log.WithValues("handler", f.handler)
	}
	var s noted
	switch {
	case found.Err != nil:
		log.Error(found.Err, "CNI configuration cannot be used")
		s.Status = Status{Reason: ReasonBadConfig, Message: found.Err.Error()}
	case found.Network == nil:
		log.V(2).Info("No CNI configuration")
		s.Status = Status{Reason: ReasonNoConfig, Message: noConfig(f.dir)}
	default:
		n := found.Network
		log.Info("CNI configuration", "file", n.File, "network", n.Name(), "ignored", found.Files[1:])
		if m.status.Load().of(n) {
			return // what its plugins said still counts
		}
		s = noted{Status{Reason: ReasonPluginFailed, Message: describe(n) + ": its plugins have not been asked yet"}, n.File, n.list.Bytes}
	}
	if f.handler == "" {
		m.status.Store(&s)
	}
}

func noConfig(dir string) string {
	return "no CNI configuration (*.conflist, *.conf, *.json) in " + dir
}

func kick(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Own tells whether a handler has a folder of its own.
func (m *Manager) Own(handler string) bool { return handler != "" && m.folders[handler] != nil }

func (m *Manager) folder(handler string) *folder {
	if f := m.folders[handler]; f != nil {
		return f
	}
	return m.folders[""]
}

// Present tells whether there is a configuration, be it good or bad, and good.
func (m *Manager) Present() (present, good bool) {
	f := m.folders[""]
	if f == nil {
		return false, false
	}
	found := f.now.Load()
	return found != nil && (len(found.Files) > 0 || found.Err != nil), found != nil && found.Network != nil
}

// Reload reads the default folder again.
func (m *Manager) Reload() {
	if f := m.folders[""]; f != nil {
		m.reload(f)
	}
}

// Network is what new pods of a handler get. The folder is read once more: who
// writes a configuration and then makes a pod gets what he wrote.
func (m *Manager) Network(handler string) (*Network, error) {
	f := m.folder(handler)
	if f == nil {
		return nil, errs.New(errs.FailedPrecondition, "CNI is not configured")
	}
	m.reload(f)
	found := f.now.Load()
	switch {
	case found.Err != nil:
		return nil, found.Err
	case found.Network == nil:
		return nil, errs.New(errs.Unavailable, "%s", noConfig(f.dir))
	}
	return found.Network, nil
}

// Status says whether pods of the default network can be attached: from memory.
func (m *Manager) Status() Status { return m.status.Load().Status }

func describe(n *Network) string { return fmt.Sprintf("CNI network %q of %s", n.Name(), n.File) }

// pollStatus asks the plugins for their status, now and then. One that hangs is
// killed at its deadline; until then what it said before counts.
func (m *Manager) pollStatus(ctx context.Context) {
	for {
		m.askStatus(ctx)
		t := time.NewTimer(m.cfg.StatusEvery)
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-m.poll:
		case <-t.C:
			for _, f := range m.folders { // what inotify does not see: a link's target
				m.reload(f)
			}
		}
		t.Stop()
	}
}

func (m *Manager) askStatus(ctx context.Context) {
	f := m.folders[""]
	if f == nil {
		return
	}
	n := f.now.Load().Network
	if n == nil {
		return
	}
	s := Status{Ready: true, Message: describe(n)}
	if err := n.Missing(m.cfg.BinDirs); err != nil {
		s = Status{Reason: ReasonPluginMissing, Message: fmt.Sprintf("%s: %v", describe(n), err)}
	} else if err := m.lib.GetStatusNetworkList(ctx, n.list); err != nil {
		s = Status{Reason: ReasonPluginFailed, Message: fmt.Sprintf("%s: %v", describe(n), err)}
	}
	if now := f.now.Load().Network; ctx.Err() != nil || now == nil || now.File != n.File || !bytes.Equal(now.list.Bytes, n.list.Bytes) {
		return // it is another one by now, and will be asked
	}
	if old := m.status.Swap(&noted{s, n.File, n.list.Bytes}); old.Status != s {
		if s.Ready {
			klog.FromContext(ctx).Info("CNI network is ready", "network", n.Name(), "file", n.File)
		} else {
			klog.FromContext(ctx).Error(nil, "CNI network is not ready", "network", n.Name(), "file", n.File, "why", s.Message)
		}
	}
}

// Attached tells whether plugins may hold something of a pod.
func (m *Manager) Attached(id string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.attached[id]
}

// Pods are all that have an attachment.
func (m *Manager) Pods() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Collect(maps.Keys(m.attached))
}

// Attach gives a pod its network. Whatever comes of it, Detach takes it back.
func (m *Manager) Attach(ctx context.Context, n *Network, p *Pod) (*Attachment, error) {
	fail := func(err error) (*Attachment, error) { return nil, m.failed(ctx, n, p.Namespace+"/"+p.Name, err) }
	rt, err := n.runtimeConf(p)
	if err != nil {
		return nil, err
	}
	if len(p.Ports) > 0 && !n.can("portMappings") {
		klog.FromContext(ctx).Info("Host ports of the pod are left to others: no plugin of its CNI network has portMappings", "pod", p.Namespace+"/"+p.Name, "network", n.Name())
	}
	m.gate.enter()
	defer m.gate.leave()
	if err := m.keep(p.ID, &attachment{Version: attachmentVersion, File: n.File, Config: n.list.Bytes, Args: rt.Args, Capabilities: rt.CapabilityArgs}); err != nil {
		return fail(err)
	}
	r, err := m.lib.AddNetworkList(ctx, n.list, rt)
	if err != nil {
		return fail(err)
	}
	a, err := n.result(r)
	if err != nil {
		return fail(err)
	}
	return a, nil
}

// Detach takes back what plugins hold for a pod. netns is empty when the
// namespace is gone, after a reboot. A pod without an attachment is no error.
func (m *Manager) Detach(ctx context.Context, id, netns string) error {
	if !m.Attached(id) {
		return nil
	}
	n, rt, err := m.kept(id)
	if errors.Is(err, os.ErrNotExist) { // the administrator has given it up
		return errors.Join(m.forgetResult(id), m.forget(id))
	}
	if err != nil {
		return err
	}
	rt.NetNS = netns
	m.gate.enter()
	defer m.gate.leave()
	if err := m.lib.DelNetworkList(ctx, n.list, rt); err != nil {
		return m.failed(ctx, n, podOf(rt), fmt.Errorf("%w (it will be tried again; if its plugin is gone for good, remove %s)", err, m.attachmentFile(id)))
	}
	kick(m.garbage)
	return m.forget(id)
}

// failed is an error with the names of network and pod, and a class.
func (m *Manager) failed(ctx context.Context, n *Network, pod string, err error) error {
	class := errs.Of(err)
	if class == errs.Internal {
		class = errs.Unavailable // what libcni says has no class: a result that is no JSON, for one
	}
	if ctx.Err() != nil {
		class, err = errs.Of(ctx.Err()), fmt.Errorf("%w: %w", context.Cause(ctx), err)
	}
	return errs.New(class, "CNI network %q, pod %.320s: %w", n.Name(), pod, err)
}

// podOf is namespace/name, as it was told to plugins.
func podOf(rt *libcni.RuntimeConf) string {
	var parts []string
	for _, a := range rt.Args {
		if a[0] == "K8S_POD_NAMESPACE" || a[0] == "K8S_POD_NAME" {
			parts = append(parts, a[1])
		}
	}
	return strings.Join(parts, "/")
}

// CheckLater asks the plugins, in the background, whether a pod's network is
// still as they made it. What they say is logged; a pod is not ended for it.
func (m *Manager) CheckLater(id, name, netns string) {
	select {
	case m.checks <- check{id, name, netns}:
	default: // there are thousands to be checked already
	}
}

func (m *Manager) checkAll(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case c := <-m.checks:
			if err := m.Check(ctx, c.id, c.netns); err != nil && ctx.Err() == nil && m.Attached(c.id) {
				klog.FromContext(ctx).Error(err, "The network of a pod is not as its plugins made it; the pod goes on", "pod", c.name, "id", c.id)
			}
		}
	}
}

// Check asks the plugins whether a pod's network is still as they made it.
func (m *Manager) Check(ctx context.Context, id, netns string) error {
	if !m.Attached(id) {
		return nil
	}
	n, rt, err := m.kept(id)
	if err != nil {
		return err
	}
	rt.NetNS = netns
	m.gate.enter()
	defer m.gate.leave()
	if err := m.lib.CheckNetworkList(ctx, n.list, rt); err != nil && !errors.Is(err, libcni.ErrorCheckNotSupp) {
		return m.failed(ctx, n, podOf(rt), err)
	}
	return nil
}

// collect lets plugins collect garbage: at the start, when the configuration
// has changed, and some time after pods have gone.
func (m *Manager) collect(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-m.garbage:
		}
		if !sys.Pause(ctx, m.cfg.GCAfter) {
			return
		}
		done := m.gate.alone(ctx, func(ctx context.Context) {
			if err := m.GC(ctx); err != nil && ctx.Err() == nil {
				klog.FromContext(ctx).Error(err, "Let CNI plugins collect garbage")
			}
		})
		if !done {
			kick(m.garbage)
		}
	}
}

// GC tells the plugins which attachments there are; they free the rest.
func (m *Manager) GC(ctx context.Context) error {
	args := &libcni.GCArgs{ValidAttachments: []types.GCAttachment{}}
	for _, id := range m.Pods() {
		args.ValidAttachments = append(args.ValidAttachments, types.GCAttachment{ContainerID: id, IfName: Link})
	}
	var all []error
	seen := map[string]bool{}
	for _, f := range m.folders {
		n := f.now.Load().Network
		if n == nil || seen[n.Name()] {
			continue
		}
		seen[n.Name()] = true
		if err := m.lib.GCNetworkList(ctx, n.list, args); err != nil {
			all = append(all, fmt.Errorf("CNI network %q: %w", n.Name(), err))
		}
	}
	return errors.Join(all...)
}

// GCSoon asks for it.
func (m *Manager) GCSoon() { kick(m.garbage) }

// Info is what tools look for in a verbose status: the words of containerd.
func (m *Manager) Info() map[string]any {
	out := map[string]any{}
	config := map[string]any{"PluginDirs": m.cfg.BinDirs, "PluginConfDir": "", "PluginMaxConfNum": 1, "Prefix": "eth", "Networks": []any{}}
	for handler, f := range m.folders {
		found := f.now.Load()
		status := "OK"
		switch {
		case found == nil:
			continue
		case found.Err != nil:
			status = "cni config load failed: " + found.Err.Error()
		case found.Network == nil:
			status = "cni config load failed: no network config found in " + f.dir
		}
		if handler != "" {
			out["lastCNILoadStatus."+handler] = status
			continue
		}
		out["lastCNILoadStatus"], out["lastCNILoadStatus.default"] = status, status
		config["PluginConfDir"] = f.dir
		if found.Network != nil {
			config["Networks"] = []any{found.Network.info()}
		}
	}
	out["cniconfig"] = config
	return out
}

func (n *Network) info() map[string]any {
	var list []any
	for _, p := range n.list.Plugins {
		list = append(list, map[string]any{"Network": p.Network, "Source": string(p.Bytes)})
	}
	return map[string]any{
		"IFName": Link,
		"Config": map[string]any{
			"Name": n.Name(), "CNIVersion": n.list.CNIVersion, "Plugins": list, "Source": string(n.list.Bytes), "File": n.File,
		},
	}
}

// markFile is there when CNI was chosen for this node's pods.
func (m *Manager) markFile() string { return filepath.Join(m.cfg.StateDir, markName) }

const markName = "in-use"

// WasChosen tells whether CNI was chosen for this node's pods, by a Manager with
// that StateDir.
func WasChosen(stateDir string) bool {
	_, err := os.Stat(filepath.Join(stateDir, markName))
	return err == nil
}

// Chosen tells whether CNI was chosen for this node's pods before.
func (m *Manager) Chosen() bool { return WasChosen(m.cfg.StateDir) }

// Choose notes whether CNI is what pods of this node get.
func (m *Manager) Choose(on bool) error {
	if !on {
		if err := os.Remove(m.markFile()); err != nil && !errors.Is(err, os.ErrNotExist) {
			return errs.New(errs.Internal, "forget that CNI was in use: %w", err)
		}
		return nil
	}
	if m.Chosen() {
		return nil
	}
	err := os.MkdirAll(m.cfg.StateDir, 0o700)
	if err == nil {
		err = os.WriteFile(m.markFile(), []byte(mark), 0o600)
	}
	if err != nil {
		return errs.New(errs.Internal, "note that CNI is in use: %w", err)
	}
	return nil
}

const mark = `Pods of this node get their network by CNI, since a configuration was there.
When the configuration is gone they wait for it; they do not get the built-in
network. To go back to that, set network.plugin = "builtin" and restart naru.
`
