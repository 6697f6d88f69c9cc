package sandbox

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/sys"
	"github.com/naru-project/naru/sandbox/rtnl"
)

// poolPrefix starts the names of prepared namespaces, where else a sandbox id
// stands: in the folder of pins and in the alias of the host link. Sweep knows
// by it what a killed daemon left.
const poolPrefix = "pool-"

// The refill waits until no pod is being created, with which it would compete
// for the kernel's locks: it is looked for every refillAfter, and not for longer
// than refillTries times in a storm without end.
const (
	refillAfter = 5 * time.Millisecond
	refillTries = 400
)

// prepared are namespaces with a veth pair, pinned, of nobody yet. What is
// missing is a host name, addresses and routes.
type prepared struct {
	name string // of the folder of pins
	link string
	mtu  int
	pair pair
	ns   *opened
}

// pool keeps prepared namespaces. Making them costs some milliseconds of the
// kernel's time, which nobody has to wait for this way.
type pool struct {
	m    *Manager
	size int
	kick chan struct{}

	mu    sync.Mutex
	ready []*prepared     // +checklocks:mu
	names map[string]bool // +checklocks:mu ready or on their way
}

func newPool(m *Manager, size int) *pool {
	return &pool{m: m, size: size, kick: make(chan struct{}, 1), names: map[string]bool{}}
}

// run fills the pool until ctx ends.
func (p *pool) run(ctx context.Context) {
	if p.size == 0 {
		return
	}
	for ctx.Err() == nil {
		if !p.m.byCNI.Load() && p.m.builtin().Ready && p.missing() {
			for try := 0; try < refillTries && p.m.busy() && sys.Pause(ctx, refillAfter); try++ {
			}
			if ctx.Err() != nil {
				return
			}
			if err := p.add(); err != nil {
				klog.FromContext(ctx).Error(err, "Prepare namespaces")
				sys.Pause(ctx, retryEvery)
			}
			continue
		}
		select {
		case <-ctx.Done():
		case <-p.kick:
		case <-time.After(retryEvery): // the network may have become ready
		}
	}
}

func (p *pool) missing() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.ready) < p.size
}

// add prepares one.
func (p *pool) add() (err error) {
	e := &prepared{
		name: poolPrefix + strings.ToLower(rand.Text()), link: p.m.newLinkName(),
		ns: &opened{files: map[string]*os.File{}},
	}
	p.mu.Lock()
	p.names[e.name] = true
	p.mu.Unlock()
	defer func() {
		if err != nil {
			err = errors.Join(err, p.discard(e))
		}
	}()
	facts, err := p.m.hostFacts()
	if err != nil {
		return err
	}
	e.mtu = facts.mtu
	if err := os.Mkdir(filepath.Join(p.m.nsDir(), e.name), 0o700); err != nil {
		return errs.New(errs.Internal, "prepare namespaces: %w", err)
	}
	if err := p.m.unshare(e.ns, true, true, true, ""); err != nil {
		return err
	}
	if _, err := p.m.pin(e.name, e.ns); err != nil {
		return err
	}
	host, err := rtnl.Open()
	if err != nil {
		return errs.New(errs.Internal, "%w", err)
	}
	defer host.Close()
	if e.pair, err = p.m.makePair(host, e.ns, e.link, aliasPrefix+e.name); err != nil {
		return err
	}
	p.mu.Lock()
	p.ready = append(p.ready, e)
	p.mu.Unlock()
	return nil
}

// take hands out one, or nil.
func (p *pool) take() *prepared {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.ready) == 0 {
		return nil
	}
	e := p.ready[0]
	p.ready = p.ready[1:]
	select {
	case p.kick <- struct{}{}:
	default:
	}
	return e
}

// forget is called once an entry has another owner, or is gone.
func (p *pool) forget(e *prepared) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.names, e.name)
}

func (p *pool) has(name string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.names[name]
}

func (p *pool) discard(e *prepared) error {
	e.ns.close()
	err := p.m.unpin(e.name)
	p.forget(e)
	return err
}

// drain discards all that are ready.
func (p *pool) drain() error {
	p.mu.Lock()
	all := p.ready
	p.ready = nil
	p.mu.Unlock()
	var errList []error
	for _, e := range all {
		errList = append(errList, p.discard(e))
	}
	return errors.Join(errList...)
}

// takePrepared gives the sandbox namespaces of the pool, if it wants ordinary
// ones and there are some. The network is then connected as well.
func (c *creation) takePrepared() (ok bool, err error) {
	m, s := c.m, &c.spec
	net, ipc, uts, user := s.wanted()
	if !net || !ipc || !uts || user || s.SharePID || c.network != nil {
		return false, nil
	}
	e := m.pool.take()
	if e == nil {
		return false, nil
	}
	if facts, err := m.hostFacts(); err != nil || facts.mtu != e.mtu {
		return false, errors.Join(err, m.pool.discard(e))
	}
	// A rename takes the pins along, onto the empty folder that was reserved
	// (rename(2); that of package os refuses folders).
	if err := unix.Rename(filepath.Join(m.nsDir(), e.name), filepath.Join(m.nsDir(), s.ID)); err != nil {
		return false, errors.Join(errs.New(errs.Internal, "take prepared namespaces: %w", err), m.pool.discard(e))
	}
	defer m.pool.forget(e)
	c.ns = e.ns
	c.h.Namespaces = m.paths(s.ID, func(name string) bool { return e.ns.files[name] != nil })
	c.h.HostLink = e.link
	c.undo.Add("network", func(context.Context) error { return m.disconnect(s.ID, c.h) })
	host, err := rtnl.Open()
	if err != nil {
		return false, errs.New(errs.Internal, "%w", err)
	}
	defer host.Close()
	if err := host.SetAlias(e.pair.host, aliasPrefix+s.ID); err != nil {
		return false, errs.New(errs.Internal, "%w", err)
	}
	if s.Hostname != "" {
		err := m.inNamespaces(c.ns, unix.CLONE_NEWUTS, func() error {
			if err := unix.Sethostname([]byte(s.Hostname)); err != nil {
				return fmt.Errorf("set the host name: %w", err)
			}
			return nil
		})
		if err != nil {
			return false, err
		}
	}
	return true, m.address(host, c.ns, e.pair, e.link, c.h.IPs)
}
