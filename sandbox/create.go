package sandbox

import (
	"context"
	"errors"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/failpoint"
	"github.com/naru-project/naru/internal/undo"
	"github.com/naru-project/naru/sandbox/cni"
	"github.com/naru-project/naru/sandbox/etcfiles"
	"github.com/naru-project/naru/sandbox/firewall"
	"github.com/naru-project/naru/sandbox/hostport"
	"github.com/naru-project/naru/sandbox/sysctl"
)

// defaultShm is the size of a pod's /dev/shm where none is asked for.
const defaultShm = 64 << 20

func (s *Spec) shmSize() int64 {
	if s.ShmSize > 0 {
		return s.ShmSize
	}
	return defaultShm
}

// creation is one Create on its way.
type creation struct {
	m    *Manager
	spec Spec
	h    *Handle
	ns   *opened
	undo undo.List

	network *cni.Network // nil = the built-in one
}

// Create makes the whole place of a pod, or nothing of it. step is called with
// the name of each step as it begins.
func (m *Manager) Create(ctx context.Context, s Spec, step func(string)) (*Handle, error) {
	c := &creation{m: m, spec: s, h: &Handle{ID: s.ID, BootID: m.boot, EtcFiles: map[string]string{}}}
	defer func() { c.ns.close() }()
	if step == nil {
		step = func(string) {}
	}
	m.start.over.Store(true)
	m.setCreating(s.ID, true)
	defer m.setCreating(s.ID, false)
	for _, st := range []struct {
		name string
		do   func(context.Context) error
	}{
		{"check sandbox", c.check},
		{"choose network", c.chooseNetwork},
		{"reserve folder", c.reserve},
		{"claim host ports", c.claimPorts},
		{"lease addresses", c.leaseAddresses},
		{"make namespaces", c.makeNamespaces},
		{"connect network", c.connect},
		{"set sysctls", c.setSysctls},
		{"write etc files", c.writeFiles},
		{"mount shm", c.mountShm},
		{"publish host ports", c.publish},
	} {
		step(st.name)
		err := context.Cause(ctx)
		if err == nil {
			err = failpoint.Hit("sandbox", "create", st.name)
		}
		if err == nil {
			err = st.do(ctx)
		}
		if err != nil {
			undoCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
			defer cancel()
			return nil, errs.New(errs.Of(err), "%s: %w", st.name, errors.Join(err, c.undo.Run(undoCtx)))
		}
	}
	c.undo.Release()
	return c.h, nil
}

// setCreating keeps Sweep away from ids on their way.
func (m *Manager) setCreating(id string, on bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if on {
		m.creating[id]++
		return
	}
	if m.creating[id]--; m.creating[id] == 0 {
		delete(m.creating, id)
	}
	if m.sweeps > 0 {
		m.fresh[id] = true // its record is younger than what Sweep was told
	}
}

// busy tells whether any sandbox is being created.
func (m *Manager) busy() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.creating) > 0
}

// check refuses what can never work, before anything is done.
func (c *creation) check(context.Context) error {
	s := &c.spec
	bad := func(format string, args ...any) error { return errs.New(errs.InvalidArgument, format, args...) }
	if !sandboxID.MatchString(s.ID) {
		return bad("sandbox id %.80q is not 64 hex digits", s.ID)
	}
	for what, mode := range map[string]NamespaceMode{"network": s.Network, "IPC": s.IPC, "UTS": s.UTS} {
		if mode != ModePod && mode != ModeNode {
			return bad("%s namespace mode %.40q is unknown", what, mode)
		}
	}
	if s.UTS != s.Network {
		return bad("network mode %s with UTS mode %s: they go together", s.Network, s.UTS)
	}
	if s.ShmSize < 0 {
		return bad("size of /dev/shm is negative")
	}
	if (len(s.UIDMap) == 0) != (len(s.GIDMap) == 0) {
		return bad("a user namespace needs mappings of both users and groups")
	}
	if err := errors.Join(etcfiles.CheckHostname(s.Hostname), etcfiles.CheckDNS(s.DNS.Servers, s.DNS.Searches, s.DNS.Options)); err != nil {
		return errs.Wrap(errs.InvalidArgument, err)
	}
	for key, value := range s.Sysctls {
		_, scope, err := sysctl.Parse(key)
		if err != nil {
			return err
		}
		if scope == sysctl.Net && s.Network == ModeNode || scope == sysctl.IPC && s.IPC == ModeNode {
			return bad("sysctl %q would change the host: the pod has no namespace of its own for it", key)
		}
		if _, err := sysctl.Value(key, value, s.GIDMap); err != nil {
			return err
		}
	}
	return s.checkPorts()
}

// reserve makes the folder of the pins: of two calls for one id, one goes on,
// and the other has done nothing that it would have to take back.
func (c *creation) reserve(context.Context) error {
	if err := os.Mkdir(filepath.Join(c.m.nsDir(), c.spec.ID), 0o700); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return errs.New(errs.AlreadyExists, "sandbox %s exists already", c.spec.ID)
		}
		return errs.New(errs.Internal, "%w", err)
	}
	c.undo.Add("pinned namespaces", func(context.Context) error { return c.m.unpinFree(c.spec.ID) })
	return nil
}

func (s *Spec) checkPorts() error {
	type target struct {
		key hostport.Key
		to  uint16
	}
	var seen []target
	for _, p := range s.Ports {
		if p.HostPort == 0 || s.Network == ModeNode {
			continue
		}
		k, err := p.key()
		if err != nil {
			return err
		}
		for _, o := range seen {
			overlap := o.key.Proto == k.Proto && o.key.Port == k.Port && (o.key.IP == k.IP || !o.key.IP.IsValid() || !k.IP.IsValid())
			if overlap && o != (target{k, p.ContainerPort}) {
				return errs.New(errs.InvalidArgument, "host port %s is mapped twice in one pod", k)
			}
		}
		seen = append(seen, target{k, p.ContainerPort})
	}
	return nil
}

// protocols by name, as IPPROTO_* numbers.
var protocols = map[Protocol]uint8{TCP: unix.IPPROTO_TCP, UDP: unix.IPPROTO_UDP, SCTP: unix.IPPROTO_SCTP}

// key validates a mapping and returns the port of the node that it takes.
func (p PortMapping) key() (hostport.Key, error) {
	bad := func(why string) (hostport.Key, error) {
		return hostport.Key{}, errs.New(errs.InvalidArgument, "map host port %d/%.10s to %d: %s", p.HostPort, p.Protocol, p.ContainerPort, why)
	}
	if protocols[p.Protocol] == 0 {
		return bad("the protocol is none of tcp, udp, sctp")
	}
	if p.ContainerPort == 0 {
		return bad("the container port is 0")
	}
	ip := p.HostIP.Unmap()
	switch {
	case !ip.IsValid() || ip.IsUnspecified():
		ip = netip.Addr{}
	case ip.Zone() != "" || ip.IsMulticast() || ip == netip.AddrFrom4([4]byte{255, 255, 255, 255}):
		return bad("the host IP " + ip.String() + " is no address of one host")
	case ip == netip.IPv6Loopback():
		return bad("Linux cannot translate connections to ::1; use 127.0.0.1")
	}
	return hostport.Key{Proto: string(p.Protocol), Port: p.HostPort, IP: ip}, nil
}

// mapped are the mappings that take a port of the node, for the registry and
// for nftables. They were checked before.
func (m *Manager) mapped(ports []PortMapping) (keys []hostport.Key, rules []firewall.Port) {
	if !m.cfg.HostPorts {
		return nil, nil
	}
	for _, p := range ports {
		if p.HostPort == 0 {
			continue
		}
		k, err := p.key()
		if err != nil {
			continue
		}
		keys = append(keys, k)
		rules = append(rules, firewall.Port{Proto: protocols[p.Protocol], HostIP: k.IP, HostPort: p.HostPort, PodPort: p.ContainerPort})
	}
	return keys, rules
}

func (c *creation) claimPorts(context.Context) error {
	if c.spec.Network == ModeNode {
		return nil
	}
	keys, _ := c.m.mapped(c.spec.Ports)
	if len(keys) == 0 {
		return nil
	}
	if err := c.m.ports.Claim(c.spec.ID, printable(c.spec.Name), keys); err != nil {
		return err
	}
	c.undo.Add("host port claim", func(context.Context) error {
		c.m.ports.Release(c.spec.ID)
		return nil
	})
	return nil
}

func (c *creation) leaseAddresses(ctx context.Context) error {
	if c.spec.Network == ModeNode || c.network != nil {
		return nil
	}
	if c.m.builtin().Reason == reasonFailed {
		if err := c.m.setUpNetwork(ctx); err != nil {
			return err
		}
	}
	ips, err := c.m.ips.Lease(c.spec.ID)
	if err != nil {
		return err
	}
	c.undo.Add("address lease", func(context.Context) error {
		c.m.ips.Release(c.spec.ID)
		return nil
	})
	c.h.IPs = ips
	return c.checkFamilies()
}

// checkFamilies refuses a mapping of an address that no address of the pod
// can answer for.
func (c *creation) checkFamilies() error {
	keys, _ := c.m.mapped(c.spec.Ports)
	for _, k := range keys {
		if k.IP.IsValid() && !slices.ContainsFunc(c.h.IPs, func(ip netip.Addr) bool { return ip.Is4() == k.IP.Is4() }) {
			return errs.New(errs.InvalidArgument, "host port %s: the pod has no address of that family", k)
		}
	}
	return nil
}

func (c *creation) makeNamespaces(ctx context.Context) error {
	net, ipc, uts, user := c.spec.wanted()
	if !net && !ipc && !uts && !user && !c.spec.SharePID {
		return nil
	}
	if ready, err := c.takePrepared(); ready || err != nil {
		return err
	}
	var err error
	if user || c.spec.SharePID {
		c.undo.Add("made namespaces", func(ctx context.Context) error { return c.m.releaseMade(ctx, c.spec.ID) })
	}
	if c.ns, err = c.m.makeNamespaces(ctx, &c.spec); err != nil {
		return err
	}
	c.h.Namespaces, err = c.m.pin(c.spec.ID, c.ns)
	return err
}

func (c *creation) setSysctls(context.Context) error { return c.m.setSysctls(c.ns, &c.spec) }

// sysctls are all that are to be written, in the order of their names, so that
// a failure is the same each time.
func (m *Manager) sysctls(s *Spec) [][2]string {
	all := map[string]string{}
	if s.Network == ModePod {
		live := m.live.Load()
		if live.UnprivilegedPorts {
			all["net.ipv4.ip_unprivileged_port_start"] = "0"
		}
		if live.UnprivilegedPing {
			all["net.ipv4.ping_group_range"] = pingRange(s)
		}
	}
	maps.Copy(all, s.Sysctls)
	out := make([][2]string, 0, len(all))
	for _, k := range slices.Sorted(maps.Keys(all)) {
		out = append(out, [2]string{k, all[k]})
	}
	return out
}

// printable makes a name fit for a message that others read.
func printable(name string) string {
	name = strings.Map(func(r rune) rune {
		if r <= ' ' || r > '~' {
			return '?'
		}
		return r
	}, name)
	return name[:min(len(name), 320)]
}

func (c *creation) publish(context.Context) error {
	if c.spec.Network == ModeNode {
		return nil
	}
	_, rules := c.m.mapped(c.spec.Ports)
	if len(rules) == 0 {
		return nil
	}
	c.h.Ports = slices.Clone(c.spec.Ports)
	if c.network != nil {
		return nil // a plugin did it
	}
	c.undo.Add("published host ports", func(context.Context) error { return c.m.fw.Withdraw(c.spec.ID) })
	if err := c.m.fw.Publish(c.spec.ID, c.h.IPs, rules); err != nil {
		return err
	}
	if err := c.m.routeLocalnet(c.h, rules); err != nil {
		return err
	}
	facts, err := c.m.hostFacts()
	if err != nil {
		return err
	}
	return firewall.FlushUDP(c.h.IPs, rules, facts.local)
}

func (c *creation) writeFiles(context.Context) error {
	dir := filepath.Join(c.m.podsDir(), c.spec.ID)
	c.undo.Add("files of the pod", func(context.Context) error { return c.m.removeFiles(c.spec.ID) })
	if err := makeFileDir(dir); err != nil {
		return err
	}
	files, err := c.m.etcFiles(&c.spec, c.h.IPs)
	if err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		path := filepath.Join(dir, name)
		if err := writeNew(path, files[name], &c.spec); err != nil {
			return err
		}
		c.h.EtcFiles["/etc/"+name] = path
	}
	return nil
}

func (c *creation) mountShm(context.Context) error {
	if c.spec.IPC == ModeNode {
		c.h.Shm = "/dev/shm"
		return nil
	}
	var made *os.File
	if c.ns != nil {
		made = c.ns.shm
	}
	path := filepath.Join(c.m.podsDir(), c.spec.ID, "shm")
	if err := mountShm(path, made, c.spec.shmSize()); err != nil {
		return err
	}
	c.h.Shm = path
	return nil
}
