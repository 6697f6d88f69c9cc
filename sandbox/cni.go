package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/sys"
	"github.com/naru-project/naru/sandbox/cni"
	"github.com/naru-project/naru/sandbox/rtnl"
)

// Which network new pods get. A pod keeps what it got: its Handle says which
// that is, and its attachment how plugins take it back.
//
// Once a CNI configuration was there, CNI stays the network of the node, over
// restarts, until the administrator says otherwise (PluginBuiltin). A network
// add-on removes its configuration while it is upgraded, and a folder can be
// emptied by accident: pods that would get the built-in network then would be
// reached by nobody in the cluster, and no NetworkPolicy would hold for them.

// openCNI reads the folders.
func (m *Manager) openCNI() error {
	if m.cfg.Plugin == PluginBuiltin {
		if err := m.cni.Choose(false); err != nil {
			return err
		}
	}
	if err := m.cni.Open(); err != nil {
		return err
	}
	m.byCNI.Store(m.wantsCNI())
	return nil
}

// wantsCNI decides by what the folder holds, and held.
func (m *Manager) wantsCNI() bool {
	if m.cfg.Plugin != PluginAuto {
		return m.cfg.Plugin == PluginCNI
	}
	present, good := m.cni.Present()
	if good {
		if err := m.cni.Choose(true); err != nil {
			klog.Background().Error(err, "After a restart without CNI configuration, pods would get the built-in network")
		}
	}
	return present || m.cni.Chosen()
}

// networkChanged is called when a folder of configurations has changed.
func (m *Manager) networkChanged() {
	on := m.wantsCNI()
	if m.byCNI.Swap(on) == on {
		return
	}
	log := klog.Background()
	log.Info("New pods get another network, those that exist keep theirs", "cni", on)
	err := m.setUpNetwork(klog.NewContext(context.Background(), log))
	if on {
		err = errors.Join(err, m.pool.drain())
	}
	if err != nil {
		log.Error(err, "Set up the network of the host after the change")
	}
}

// NetworkStatus says whether pods with a network of their own can be started.
func (m *Manager) NetworkStatus() NetworkStatus {
	if !m.byCNI.Load() {
		return m.builtin()
	}
	s := m.cni.Status()
	if s.Reason == cni.ReasonNoConfig && m.cfg.Plugin == PluginAuto {
		s.Message += `; there was one before, and pods wait for it (network.plugin = "builtin" goes back to the built-in network)`
	}
	return NetworkStatus(s)
}

// NetworkInfo is what tools look for in a verbose status.
func (m *Manager) NetworkInfo() map[string]any {
	info := m.cni.Info()
	info["network"] = map[string]any{"plugin": m.cfg.Plugin, "cni": m.byCNI.Load(), "podCIDRs": m.ips.CIDRs()}
	return info
}

// chooseNetwork decides what makes the network of this pod.
func (c *creation) chooseNetwork(context.Context) error {
	if c.spec.Network == ModeNode {
		return nil
	}
	m := c.m
	if !m.cni.Own(c.spec.Handler) {
		if m.cfg.Plugin == PluginAuto {
			m.cni.Reload() // who writes a configuration and then makes a pod gets what he wrote
		}
		if !m.byCNI.Load() {
			return nil
		}
	}
	var err error
	c.network, err = m.cni.Network(c.spec.Handler)
	return err
}

// attach has plugins make the pod's network.
func (c *creation) attach(ctx context.Context) error {
	m, s := c.m, &c.spec
	if err := c.ns.route.LoopbackUp(); err != nil {
		return errs.New(errs.Internal, "%w", err)
	}
	p := &cni.Pod{
		ID: s.ID, Namespace: s.Pod.Namespace, Name: s.Pod.Name, UID: s.Pod.UID, NetNS: c.h.Namespaces.Net,
		Annotations: s.Annotations, CIDRs: m.ips.CIDRs(), DNS: cni.DNS(s.DNS),
	}
	if m.cfg.HostPorts {
		p.Ports = cniPorts(s.Ports)
	}
	c.undo.Add("CNI network", func(ctx context.Context) error { return m.detach(ctx, s.ID) })
	for try := 1; ; try++ {
		a, err := m.cni.Attach(ctx, c.network, p)
		if err == nil {
			err = m.notOurs(a)
		}
		if err == nil {
			c.h.IPs = a.IPs
			c.h.CNI = &Attached{Network: a.Network, File: a.File, Interfaces: a.Interfaces}
			return nil
		}
		if !errors.Is(err, errTaken) || try == takenTries {
			return err
		}
		if err := m.detach(ctx, s.ID); err != nil {
			return err
		}
	}
}

// errTaken is the error of an address that a pod of the built-in network has.
// When CNI takes over a node with pods, its plugins may give addresses of the
// same range and know nothing of those pods. They seldom give the same address
// twice in a row, so that it is tried again.
var errTaken = errors.New("a pod of the built-in network has that address")

const takenTries = 32

func (m *Manager) notOurs(a *cni.Attachment) error {
	for _, ip := range a.IPs {
		if holder := m.ips.Holder(ip); holder != "" {
			return errs.New(errs.Unavailable, "CNI network %q gave the pod address %s: %w (%.13s)", a.Network, ip, errTaken, holder)
		}
	}
	return nil
}

// cniPorts are the mappings that have a port of the node.
func cniPorts(ports []PortMapping) (out []cni.Port) {
	for _, p := range ports {
		if p.HostPort == 0 {
			continue
		}
		c := cni.Port{HostPort: p.HostPort, ContainerPort: p.ContainerPort, Protocol: string(p.Protocol)}
		if p.HostIP.IsValid() && !p.HostIP.IsUnspecified() {
			c.HostIP = p.HostIP.String()
		}
		out = append(out, c)
	}
	return out
}

// detach has the plugins that made a pod's network take it back. They get its
// namespace, if it is still there.
func (m *Manager) detach(ctx context.Context, id string) error {
	if !m.cni.Attached(id) {
		return nil
	}
	netns := filepath.Join(m.nsDir(), id, "net")
	f, err := sys.OpenNamespace(netns, unix.CLONE_NEWNET)
	if err != nil {
		netns = ""
	} else {
		_ = f.Close()
	}
	if m.start.over.Load() {
		return m.cni.Detach(ctx, id, netns)
	}
	return m.start.detach(ctx, func(ctx context.Context) error { return m.cni.Detach(ctx, id, netns) })
}

// startup is the time in which the daemon takes stock and serves nobody. After a
// reboot all pods of before are to be detached then, by plugins that may wait
// for an agent that may be a pod of this very node. So they have little time,
// and when one has used it up the others have none: all of it is tried again
// when the daemon serves.
type startup struct {
	over  atomic.Bool // after the first Sweep, or Create
	stuck atomic.Bool // a plugin has used up its time
}

const startupTime = 5 * time.Second

func (s *startup) detach(ctx context.Context, f func(context.Context) error) error {
	if s.stuck.Load() {
		return errs.New(errs.Unavailable, "CNI plugins do not answer during the start; it is tried again")
	}
	ctx, cancel := context.WithTimeoutCause(ctx, startupTime, errs.New(errs.DeadlineExceeded, "not done within %s of the start; it is tried again", startupTime))
	defer cancel()
	err := f(ctx)
	if ctx.Err() != nil {
		s.stuck.Store(true)
	}
	return err
}

// unpinFree takes a sandbox's pins away, unless plugins still have to take its
// network back: they need the namespace for that.
func (m *Manager) unpinFree(id string) error {
	if m.cni.Attached(id) {
		return nil // the error of that is told already
	}
	return m.unpin(id)
}

// adoptCNI takes over a sandbox with a network of plugins.
func (m *Manager) adoptCNI(s *Spec, h *Handle, alive bool) (bool, error) {
	keys, _ := m.mapped(h.Ports)
	if err := m.ports.Claim(h.ID, printable(s.Name), keys); err != nil {
		return false, err
	}
	if !alive {
		return false, nil
	}
	links, err := m.podLinks(h)
	if err != nil {
		return false, err
	}
	for _, name := range h.CNI.Interfaces {
		if !slices.ContainsFunc(links, func(l rtnl.Link) bool { return l.Name == name }) {
			klog.Background().Info("An interface of a pod is gone", "pod", printable(s.Name), "id", h.ID, "interface", name)
			return false, nil
		}
	}
	m.cni.CheckLater(h.ID, s.Name, h.Namespaces.Net)
	return true, nil
}

// podLinks lists the links in a pod's network namespace but its loopback, the
// default interface first.
func (m *Manager) podLinks(h *Handle) ([]rtnl.Link, error) {
	ns, err := m.open(h, unix.CLONE_NEWNET)
	if err != nil {
		return nil, err
	}
	if ns == nil {
		return nil, errs.New(errs.FailedPrecondition, "the pod has no network namespace")
	}
	defer func() { _ = ns.Close() }()
	var c *rtnl.Conn // stays in the namespace
	err = m.inNamespaces(&opened{files: map[string]*os.File{"net": ns}}, unix.CLONE_NEWNET, func() (err error) {
		c, err = rtnl.Open()
		return err
	})
	if err != nil {
		return nil, err
	}
	defer c.Close()
	links, err := c.Links()
	if err != nil {
		return nil, errs.New(errs.Internal, "%w", err)
	}
	links = slices.DeleteFunc(links, func(l rtnl.Link) bool { return l.Name == "lo" })
	slices.SortStableFunc(links, func(a, b rtnl.Link) int {
		if a.Name == rtnl.PodLink {
			return -1
		}
		if b.Name == rtnl.PodLink {
			return 1
		}
		return a.Index - b.Index
	})
	return links, nil
}

// cniStats reads the counters in the pod. Fixed links that a new namespace has
// by itself (tunl0 and the like, down) are nobody's.
func (m *Manager) cniStats(h *Handle) ([]Interface, error) {
	links, err := m.podLinks(h)
	if err != nil {
		return nil, fmt.Errorf("read network counters: %w", err)
	}
	now := time.Now()
	var out []Interface
	for _, l := range links {
		if !l.Up {
			continue
		}
		s := l.Stats
		out = append(out, Interface{
			Name: l.Name, Time: now,
			RxBytes: s.RxBytes, RxPackets: s.RxPackets, RxErrors: s.RxErrors, RxDropped: s.RxDropped,
			TxBytes: s.TxBytes, TxPackets: s.TxPackets, TxErrors: s.TxErrors, TxDropped: s.TxDropped,
		})
	}
	return out, nil
}
