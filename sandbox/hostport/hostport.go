// Package hostport knows which pod holds which port of the node.
//
// It is a registry in memory, pure and quick: a claim is checked before
// anything is done on the host. A port that a process of the host listens on
// is no conflict: the mapping wins for traffic from outside and for the host's
// own connections, as with every runtime that maps ports by NAT.
//
// Concurrency: all methods may be called concurrently; no IO under the lock.
package hostport

import (
	"fmt"
	"net/netip"
	"sync"

	"github.com/naru-project/naru/internal/errs"
)

// Key is one port of the node. An invalid IP stands for every local address.
type Key struct {
	Proto string // tcp, udp, sctp
	Port  uint16
	IP    netip.Addr
}

func (k Key) String() string {
	if k.IP.IsValid() {
		return fmt.Sprintf("%d/%s on %s", k.Port, k.Proto, k.IP)
	}
	return fmt.Sprintf("%d/%s", k.Port, k.Proto)
}

type owner struct{ id, name string }

type slot struct {
	proto string
	port  uint16
}

// Registry holds the claims of one node.
type Registry struct {
	mu   sync.Mutex
	used map[slot]map[netip.Addr]owner // +checklocks:mu
	byID map[string][]Key              // +checklocks:mu
}

// New returns an empty registry.
func New() *Registry {
	return &Registry{used: map[slot]map[netip.Addr]owner{}, byID: map[string][]Key{}}
}

// Claim gives all keys to id, or none. A repeated claim replaces the former
// one of the same id. name is for the messages of others.
func (r *Registry) Claim(id, name string, keys []Key) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, k := range keys {
		if o, taken := r.holder(k); taken && o.id != id {
			return errs.New(errs.FailedPrecondition, "host port %s is held by pod %s (%.13s)", k, o.name, o.id)
		}
	}
	r.release(id)
	for _, k := range keys {
		s := slot{k.Proto, k.Port}
		if r.used[s] == nil {
			r.used[s] = map[netip.Addr]owner{}
		}
		r.used[s][k.IP] = owner{id, name}
	}
	if len(keys) > 0 {
		r.byID[id] = append([]Key(nil), keys...)
	}
	return nil
}

// holder finds who stands in the way of k: every local address clashes with
// each single one of the same port.
func (r *Registry) holder(k Key) (owner, bool) {
	m := r.used[slot{k.Proto, k.Port}]
	if o, ok := m[k.IP]; ok {
		return o, true
	}
	if o, ok := m[netip.Addr{}]; ok {
		return o, true
	}
	if !k.IP.IsValid() {
		for _, o := range m {
			return o, true
		}
	}
	return owner{}, false
}

// Owner returns the id that holds exactly this key.
func (r *Registry) Owner(k Key) (id string, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	o, ok := r.used[slot{k.Proto, k.Port}][k.IP]
	return o.id, ok
}

// Release gives back what id holds. Safe to repeat.
func (r *Registry) Release(id string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.release(id)
}

func (r *Registry) release(id string) {
	for _, k := range r.byID[id] {
		s := slot{k.Proto, k.Port}
		delete(r.used[s], k.IP)
		if len(r.used[s]) == 0 {
			delete(r.used, s)
		}
	}
	delete(r.byID, id)
}

// IDs returns who holds ports.
func (r *Registry) IDs() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	out := make([]string, 0, len(r.byID))
	for id := range r.byID {
		out = append(out, id)
	}
	return out
}
