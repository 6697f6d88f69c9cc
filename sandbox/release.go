package sandbox

import (
	"context"
	"errors"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"k8s.io/klog/v2"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/failpoint"
	"github.com/naru-project/naru/internal/sys"
	"github.com/naru-project/naru/sandbox/firewall"
	"github.com/naru-project/naru/sandbox/rtnl"
)

// Release gives back everything of a sandbox. h may be nil if none is known.
// Every step runs, whatever the others say; all can be repeated.
func (m *Manager) Release(ctx context.Context, id string, h *Handle) error {
	if !sandboxID.MatchString(id) {
		return errs.New(errs.InvalidArgument, "sandbox id %.80q is not 64 hex digits", id)
	}
	if h != nil && h.ID != "" && h.ID != id {
		return errs.New(errs.InvalidArgument, "handle of sandbox %.80q given for sandbox %s", h.ID, id)
	}
	strays := len(m.ips.Outside(m.ranges()))
	var all []error
	for _, st := range []struct {
		name string
		do   func() error
	}{
		{"detach from plugins", func() error { return m.detach(ctx, id) }},
		{"withdraw host ports", func() error { return m.withdraw(id, h) }},
		{"disconnect network", func() error { return m.disconnect(id, h) }},
		{"unpin namespaces", func() error { return m.unpinFree(id) }},
		{"remove files", func() error { return m.removeFiles(id) }},
		{"release made namespaces", func() error {
			if h != nil && h.Namespaces.User == "" && h.Namespaces.PID == "" {
				return nil
			}
			return m.releaseMade(ctx, id)
		}},
	} {
		err := failpoint.Hit("sandbox", "release", st.name)
		if err == nil {
			err = st.do()
		}
		all = append(all, err)
	}
	m.ips.Release(id)
	m.ports.Release(id)
	if strays > 0 && len(m.ips.Outside(m.ranges())) != strays {
		all = append(all, m.fw.SetSources(m.sources()))
	}
	if err := errors.Join(all...); err != nil {
		return errs.New(errs.Of(err), "release sandbox %.13s: %w", id, err)
	}
	return nil
}

// withdraw takes the host ports back, and lets UDP flows to the pod end.
func (m *Manager) withdraw(id string, h *Handle) error {
	var all []error
	known := slices.Contains(m.fw.Known(), id)
	if known {
		all = append(all, m.fw.Withdraw(id))
	}
	if h == nil || len(h.Ports) == 0 || h.BootID != m.boot || h.CNI != nil {
		return errors.Join(all...)
	}
	_, rules := m.mapped(h.Ports)
	if !known && len(rules) > 0 {
		all = append(all, m.fw.WithdrawStale(h.IPs, rules))
	}
	return errors.Join(append(all, firewall.FlushUDP(h.IPs, rules, nil))...)
}

func (m *Manager) releaseMade(ctx context.Context, id string) error {
	if m.deps.Namespaces == nil {
		return nil
	}
	return m.deps.Namespaces.Release(ctx, id)
}

func (m *Manager) doom(l rtnl.Link) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.doomed[l.Name] = doomed{l.Alias, time.Now()}
}

// Sweep removes what belongs to no known sandbox: pins, folders, links, leases,
// ports, elements of nftables, attachments to CNI networks. What is being created meanwhile, and what other
// owners have, stays. known must hold whatever was created before the call.
func (m *Manager) Sweep(ctx context.Context, known map[string]bool) error {
	m.mu.Lock()
	m.sweeps++
	m.mu.Unlock()
	defer func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.sweeps--; m.sweeps == 0 {
			clear(m.fresh)
		}
	}()
	strangers, all := m.strangers(known)
	log := klog.FromContext(ctx)
	for id := range strangers {
		log.Info("Remove a sandbox that no record knows", "id", id)
		if sandboxID.MatchString(id) {
			err := m.Release(ctx, id, nil)
			m.orphan(id, err != nil)
			all = append(all, err)
			continue
		}
		all = append(all, m.unpin(id), m.removeFiles(id)) // from a pool of before, or not ours in a folder of ours
	}
	all = append(all, m.sweepLinks(known))
	m.start.over.Store(true)
	m.cni.GCSoon()
	rebuilt, err := m.fw.Reconcile()
	if rebuilt {
		log.Info("Made the nftables table anew: it was not what it should be", "table", m.cfg.Table)
	}
	return errors.Join(append(all, err)...)
}

// orphan notes whether a stranger is still to be released.
func (m *Manager) orphan(id string, on bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if on {
		m.orphans[id] = true
	} else {
		delete(m.orphans, id)
	}
}

// retryOrphans releases strangers that Sweep could not.
func (m *Manager) retryOrphans(ctx context.Context) {
	for sys.Pause(ctx, retryEvery) {
		m.mu.Lock()
		ids := slices.Collect(maps.Keys(m.orphans))
		m.mu.Unlock()
		for _, id := range ids {
			err := m.Release(ctx, id, nil)
			if err != nil && ctx.Err() == nil {
				klog.FromContext(ctx).Error(err, "A sandbox that no record knows is still there", "id", id)
			}
			m.orphan(id, err != nil)
		}
	}
}

// strangers are the ids that something exists for, without being known.
func (m *Manager) strangers(known map[string]bool) (ids map[string]bool, all []error) {
	ids = map[string]bool{}
	add := func(id string) {
		if !m.excused(id, known) {
			ids[id] = true
		}
	}
	for _, dir := range []string{m.nsDir(), m.podsDir()} {
		names, err := os.ReadDir(dir)
		if err != nil {
			all = append(all, errs.New(errs.Internal, "list %s: %w", dir, err))
		}
		for _, n := range names {
			add(n.Name())
		}
	}
	for _, id := range slices.Concat(m.ips.IDs(), m.ports.IDs(), m.fw.Known(), m.cni.Pods()) {
		add(id)
	}
	return ids, all
}

func (m *Manager) excused(id string, known map[string]bool) bool {
	if known[id] || m.pool.has(id) {
		return true
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.creating[id] > 0 || m.fresh[id]
}

// sweepLinks removes host links whose sandbox is not known.
func (m *Manager) sweepLinks(known map[string]bool) error {
	c, err := rtnl.Open()
	if err != nil {
		return errs.New(errs.Internal, "%w", err)
	}
	defer c.Close()
	links, err := c.Veths()
	if err != nil {
		return errs.New(errs.Internal, "%w", err)
	}
	var left []int
	for _, l := range links {
		if m.ours(l) && !m.excused(strings.TrimPrefix(l.Alias, aliasPrefix), known) {
			left = append(left, l.Index)
		}
	}
	if err := m.deleteLinks(c, left); err != nil {
		return errs.New(errs.Internal, "%w", err)
	}
	return nil
}
