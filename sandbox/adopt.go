package sandbox

import (
	"context"
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/sandbox/rtnl"
)

// Adopt takes over a sandbox from a record after a restart: its addresses and
// ports count as used, and what somebody removed on the host's side is put
// back. alive tells whether it is still whole. One of a former boot is not,
// and holds nothing.
func (m *Manager) Adopt(ctx context.Context, s Spec, h *Handle) (alive bool, err error) {
	if h == nil || h.BootID != m.boot {
		return false, nil
	}
	if !sandboxID.MatchString(h.ID) || s.ID != h.ID {
		return false, errs.New(errs.InvalidArgument, "handle of sandbox %.80q for sandbox %.80q", h.ID, s.ID)
	}
	alive = m.whole(&s, h)
	if s.Network == ModeNode {
		return alive, nil
	}
	if h.CNI != nil {
		return m.adoptCNI(&s, h, alive)
	}
	if err := m.ips.Adopt(h.ID, h.IPs); err != nil {
		return false, err
	}
	keys, rules := m.mapped(h.Ports)
	if err := m.ports.Claim(h.ID, printable(s.Name), keys); err != nil {
		return false, err
	}
	connected, err := m.reconnect(h)
	alive = alive && connected
	all := []error{err, m.fw.SetSources(m.sources())}
	if _, err := m.fw.Ensure(); err != nil {
		all = append(all, err)
	}
	if len(rules) > 0 && connected {
		all = append(all, m.fw.Publish(h.ID, h.IPs, rules), m.routeLocalnet(h, rules))
	}
	if err := errors.Join(all...); err != nil {
		return alive, errs.New(errs.Of(err), "adopt sandbox %.13s: %w", h.ID, err)
	}
	return alive, nil
}

// whole checks the pins, files and mounts of a handle.
func (m *Manager) whole(s *Spec, h *Handle) bool {
	net, ipc, uts, user := s.wanted()
	for i, want := range []bool{net, ipc, uts, user, s.SharePID} {
		if !want {
			continue
		}
		f, err := m.open(h, kinds[i].flag)
		if err != nil || f == nil {
			return false
		}
		_ = f.Close()
	}
	for _, path := range h.EtcFiles {
		if st, err := os.Lstat(path); err != nil || !st.Mode().IsRegular() {
			return false
		}
	}
	if s.IPC == ModeNode {
		return true
	}
	var st unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, h.Shm, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_TYPE, &st)
	return err == nil && st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
}

// reconnect puts routes, neighbours and settings of the host end back. ok is
// false if the link itself is gone.
func (m *Manager) reconnect(h *Handle) (ok bool, err error) {
	facts, err := m.hostFacts()
	if err != nil {
		return false, err
	}
	c, err := rtnl.Open()
	if err != nil {
		return false, errs.New(errs.Internal, "%w", err)
	}
	defer c.Close()
	l, ok, err := m.findLink(c, h.ID, h)
	if err != nil {
		return false, errs.New(errs.Internal, "%w", err)
	}
	if !ok {
		return false, nil
	}
	_, podMAC := macs(h.HostLink)
	err = errors.Join(
		m.plainIPv6(h.HostLink, facts),
		c.ConfigureHost(rtnl.HostEnd{Index: l.Index, PodMAC: podMAC, IPs: h.IPs, OnlyAddress: facts.onlyAddress}))
	if err != nil {
		return true, errs.New(errs.Internal, "%w", err)
	}
	return true, nil
}
