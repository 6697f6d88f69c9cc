package sandbox

import (
	"context"
	"sync"
	"time"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/sandbox/rtnl"
)

// statsAge is how old counters may be. One look at the host's links serves all
// pods, so asking for each of them costs one dump a second at most.
const statsAge = time.Second

type statsCache struct {
	mu    sync.Mutex
	at    time.Time            // +checklocks:mu
	links map[string]rtnl.Link // +checklocks:mu
}

// Stats returns the traffic of a sandbox's interfaces. In the built-in network
// the counters are those of the host end of the veth pair, mirrored: what it
// sent the pod received, and no namespace is entered. What CNI plugins made is
// looked at in the pod. Pods of the host's network have none.
func (m *Manager) Stats(_ context.Context, h *Handle) ([]Interface, error) {
	switch {
	case h != nil && h.CNI != nil:
		return m.cniStats(h)
	case h == nil || h.HostLink == "":
		return nil, nil
	}
	l, at, ok, err := m.stats.get(h.HostLink)
	if err != nil {
		return nil, errs.New(errs.Internal, "read network counters: %w", err)
	}
	if !ok || l.Alias != aliasPrefix+h.ID {
		return nil, errs.New(errs.NotFound, "link %s of sandbox %.13s is gone", h.HostLink, h.ID)
	}
	s := l.Stats
	return []Interface{{
		Name: rtnl.PodLink, Time: at,
		RxBytes: s.TxBytes, RxPackets: s.TxPackets, RxErrors: s.TxErrors, RxDropped: s.TxDropped,
		TxBytes: s.RxBytes, TxPackets: s.RxPackets, TxErrors: s.RxErrors, TxDropped: s.RxDropped,
	}}, nil
}

func (s *statsCache) get(name string) (rtnl.Link, time.Time, bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Since(s.at) < statsAge {
		if l, ok := s.links[name]; ok {
			return l, s.at, true, nil
		} // made since the last look, or gone
	}
	c, err := rtnl.Open()
	if err != nil {
		return rtnl.Link{}, time.Time{}, false, err
	}
	defer c.Close()
	links, err := c.Veths()
	if err != nil {
		return rtnl.Link{}, time.Time{}, false, err
	}
	s.at, s.links = time.Now(), make(map[string]rtnl.Link, len(links))
	for _, l := range links {
		s.links[l.Name] = l
	}
	l, ok := s.links[name]
	return l, s.at, ok, nil
}
