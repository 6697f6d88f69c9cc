package sandbox

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/sys"
	"github.com/naru-project/naru/sandbox/cni"
	"github.com/naru-project/naru/sandbox/firewall"
	"github.com/naru-project/naru/sandbox/hostport"
	"github.com/naru-project/naru/sandbox/ipam"
)

// Manager makes, adopts and releases sandboxes. It keeps no records: what must
// last is in the Handles.
type Manager struct {
	cfg   Config
	live  atomic.Pointer[Live]
	deps  Deps
	auto  bool
	boot  string
	ips   *ipam.Allocator
	ports *hostport.Registry
	fw    *firewall.Firewall
	proc  *os.File // a procfs of our own
	ipv6  bool     // the kernel has IPv6
	pool  *pool
	cni   *cni.Manager
	byCNI atomic.Bool // new pods get their network by CNI
	start startup

	status atomic.Pointer[NetworkStatus]
	facts  atomic.Pointer[hostFacts]
	stats  statsCache

	cidrMu    sync.Mutex // one change of pod CIDRs, or of the host's settings, at a time
	inherited bool       // +checklocks:cidrMu the table of a former process was taken over

	mu       sync.Mutex
	creating map[string]int    // +checklocks:mu ids that Sweep leaves alone
	sweeps   int               // +checklocks:mu how many Sweeps are running
	fresh    map[string]bool   // +checklocks:mu ids that were made meanwhile
	doomed   map[string]doomed // +checklocks:mu host links whose namespace was dropped
	orphans  map[string]bool   // +checklocks:mu strangers that could not be released yet

	stop context.CancelFunc
	wg   sync.WaitGroup
}

// doomed is a link that should vanish by itself.
type doomed struct {
	alias string
	since time.Time
}

// Reasons of NetworkStatus.
const (
	reasonNotStarted = "NotStarted"
	reasonFailed     = "NetworkSetupFailed"
	reasonNoCIDR     = "NoPodCIDR"
)

// Periods of the background work.
const (
	factsEvery  = 30 * time.Second
	retryEvery  = 5 * time.Second
	doomedAfter = 3 * time.Second
	undoTimeout = 30 * time.Second
)

// New checks the configuration. Start does the rest.
func New(cfg Config, deps Deps) (*Manager, error) {
	p, err := cfg.check()
	if err != nil {
		return nil, err
	}
	plain, err := cfg.Live.check()
	if err != nil {
		return nil, err
	}
	m := &Manager{
		cfg: cfg, deps: deps, auto: p.auto,
		ips:      ipam.New(),
		ports:    hostport.New(),
		fw:       firewall.New(firewall.Config{Table: cfg.Table, Group: cfg.LinkGroup}, plain),
		creating: map[string]int{},
		fresh:    map[string]bool{},
		doomed:   map[string]doomed{},
		orphans:  map[string]bool{},
	}
	m.live.Store(&cfg.Live)
	m.cfg.Live = Live{} // read by m.live alone
	m.pool = newPool(m, cfg.PoolSize)
	if cfg.Plugin == PluginBuiltin {
		cfg.CNI.ConfDir = ""
	}
	m.cni = cni.New(cfg.CNI, deps.Programs, m.networkChanged)
	if err := m.ips.SetCIDRs(p.cidrs); err != nil {
		return nil, err
	}
	m.setStatus(NetworkStatus{Reason: reasonNotStarted, Message: "the network is not set up yet"})
	return m, nil
}

// Start makes the folders, takes over what a former process left in the
// kernel, sets the network of the host up and begins the background work,
// which Close ends. A network that cannot be set up is no error here: it is
// tried again, and NetworkStatus tells.
func (m *Manager) Start(ctx context.Context) (err error) {
	if m.boot, err = sys.BootID(); err != nil {
		return errs.New(errs.Internal, "read the boot id: %w", err)
	}
	for _, d := range []struct {
		path string
		mode os.FileMode
	}{{m.nsDir(), 0o700}, {m.podsDir(), 0o711}} {
		if err := privateDir(d.path, d.mode); err != nil {
			return err
		}
	}
	if m.proc, err = sys.OpenProc(); err != nil {
		return errs.New(errs.Internal, "%w", err)
	}
	if _, err := os.Stat("/proc/sys/net/ipv6"); err == nil {
		m.ipv6 = true
	}
	if m.auto {
		m.restoreCIDRs(ctx)
	}
	if err := m.openCNI(); err != nil {
		return err
	}
	if err := m.setUpNetwork(ctx); err != nil {
		klog.FromContext(ctx).Error(err, "Set up the network of the host; trying again")
	}
	run, cancel := context.WithCancel(context.WithoutCancel(ctx))
	m.stop = cancel
	m.wg.Go(func() { m.watchFirewall(run) })
	m.wg.Go(func() { m.keepHouse(run) })
	m.wg.Go(func() { m.pool.run(run) })
	m.wg.Go(func() { m.cni.Run(run) })
	m.wg.Go(func() { m.retryOrphans(run) })
	return nil
}

// Close ends the background work and drops the prepared namespaces. Sandboxes
// stay as they are.
func (m *Manager) Close() error {
	if m.stop == nil {
		return nil
	}
	m.stop()
	m.wg.Wait()
	return errors.Join(m.pool.drain(), m.proc.Close())
}

func (m *Manager) nsDir() string   { return filepath.Join(m.cfg.RunDir, "ns") }
func (m *Manager) podsDir() string { return filepath.Join(m.cfg.RunDir, "pods") }

// privateDir makes a folder a mount of its own without propagation, so that
// what is mounted below it is seen by no other mount namespace, and does not
// stay mounted there when it is unmounted here.
func privateDir(path string, mode os.FileMode) error {
	fail := func(err error) error { return errs.New(errs.Internal, "make folder %s: %w", path, err) }
	if err := os.MkdirAll(path, mode); err != nil {
		return fail(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		return fail(err)
	}
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_TYPE|unix.STATX_UID, &st); err != nil {
		return fail(err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || st.Uid != uint32(os.Geteuid()) {
		return fail(errors.New("it is not a folder of ours"))
	}
	if st.Attributes&unix.STATX_ATTR_MOUNT_ROOT == 0 {
		if err := unix.Mount(path, path, "", unix.MS_BIND, ""); err != nil {
			return fail(fmt.Errorf("bind it on itself: %w", err))
		}
	}
	if err := unix.Mount("", path, "", unix.MS_PRIVATE, ""); err != nil {
		return fail(fmt.Errorf("make it private: %w", err))
	}
	return nil
}

// builtin is the status of the built-in network.
func (m *Manager) builtin() NetworkStatus { return *m.status.Load() }

// Addresses tells how many addresses of each family are used and free.
func (m *Manager) Addresses() []ipam.Usage { return m.ips.Usage() }

func (m *Manager) setStatus(s NetworkStatus) { m.status.Store(&s) }

// SetPodCIDRs takes the ranges that UpdateRuntimeConfig told. They count for
// pods to come; pods that exist keep their addresses.
func (m *Manager) SetPodCIDRs(ctx context.Context, cidrs []netip.Prefix) error {
	log := klog.FromContext(ctx)
	if len(cidrs) == 0 {
		return nil
	}
	cidrs, err := ipam.Check(cidrs)
	if err != nil {
		return err
	}
	if !m.auto {
		log.V(2).Info("Pod CIDRs are set by the configuration, those told are not used", "told", cidrs, "used", m.ips)
		return nil
	}
	m.cidrMu.Lock()
	same := slices.Equal(m.ips.CIDRs(), cidrs)
	if !same {
		err = errors.Join(m.saveCIDRs(cidrs), m.ips.SetCIDRs(cidrs))
	}
	m.cidrMu.Unlock()
	if err != nil {
		return err
	}
	if same && m.builtin().Ready {
		return nil
	}
	log.Info("Pod CIDRs changed", "cidrs", cidrs)
	return m.setUpNetwork(ctx)
}

// ranges are those that new pods of the built-in network get addresses of: none
// when there will be no such pods.
func (m *Manager) ranges() []netip.Prefix {
	if m.byCNI.Load() {
		return nil
	}
	return m.ips.CIDRs()
}

// sources are all addresses that pods of the built-in network can have.
func (m *Manager) sources() []netip.Prefix {
	out := m.ranges()
	for _, ip := range m.ips.Outside(out) {
		out = append(out, netip.PrefixFrom(ip, ip.BitLen()))
	}
	return out
}

// setUpNetwork makes the host ready for pods, and notes whether it is.
func (m *Manager) setUpNetwork(ctx context.Context) error {
	m.cidrMu.Lock()
	defer m.cidrMu.Unlock()
	err := m.prepareHost(ctx)
	if err == nil {
		m.warnOverlap(ctx)
		if !m.inherited {
			err = m.fw.Inherit(m.sources())
			m.inherited = err == nil
		} else if err = m.fw.SetSources(m.sources()); err == nil {
			_, err = m.fw.Ensure()
		}
	}
	switch {
	case err != nil:
		m.setStatus(NetworkStatus{Reason: reasonFailed, Message: err.Error()})
		return errs.Wrap(errs.Unavailable, err)
	case len(m.ips.CIDRs()) == 0:
		m.setStatus(NetworkStatus{Reason: reasonNoCIDR,
			Message: "no pod CIDR is known: set one in the configuration, or let the cluster give this node one"})
	default:
		m.setStatus(NetworkStatus{Ready: true})
	}
	return nil
}

// watchFirewall puts the nftables table back whenever somebody removes it.
func (m *Manager) watchFirewall(ctx context.Context) {
	log := klog.FromContext(ctx)
	for ctx.Err() == nil {
		err := m.fw.Watch(ctx, func(rebuilt bool, err error) {
			if err != nil {
				log.Error(err, "Put the nftables table back")
				m.setStatus(NetworkStatus{Reason: reasonFailed, Message: err.Error()})
				return
			}
			log.Info("Put the nftables table back: somebody had removed it, or a part of it", "table", m.cfg.Table, "rebuilt", rebuilt)
		})
		if err != nil {
			log.Error(err, "Watch nftables; trying again")
			sys.Pause(ctx, retryEvery)
		}
	}
}

// keepHouse renews what is known of the host, tries a failed set-up again, and
// removes links that their namespace did not take along.
func (m *Manager) keepHouse(ctx context.Context) {
	log := klog.FromContext(ctx)
	last := time.Now()
	for sys.Pause(ctx, retryEvery) {
		if m.builtin().Reason == reasonFailed {
			if err := m.setUpNetwork(ctx); err != nil {
				log.V(2).Info("Network set-up still fails", "err", err)
			}
		}
		if time.Since(last) >= factsEvery {
			last = time.Now()
			if err := m.learnHost(); err != nil {
				log.Error(err, "Look at the host's network")
			}
		}
		if err := m.removeDoomed(); err != nil {
			log.Error(err, "Remove links that were left over")
		}
	}
}
