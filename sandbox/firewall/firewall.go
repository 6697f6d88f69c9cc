// Package firewall owns one nftables table: what masquerades the traffic of
// pods, maps ports of the node to pods, and keeps pods from speaking in
// others' names.
//
// Pods without host ports have no element in it: pod links are known by their
// link group, and whether a pod may use a source address is asked of the
// routing table (`fib saddr . iif`), where each pod address has exactly one
// route. So there is nothing to add per pod, and nothing to forget.
//
// Chains, with their priorities:
//
//	guard        prerouting  -300  before conntrack: spoofed sources, 127/8 and
//	                               router advertisements from pods are dropped
//	prerouting   prerouting   -95  host ports; behind -100, where kube-proxy and
//	output       output       -95  other service rules stand: the first NAT wins
//	postrouting  postrouting  105  masquerade; behind 100, for the same reason
//	redirects    output         0  no ICMP redirects to pods
//
// Nothing here accepts or drops what is not a pod's: another table's drop still
// drops (a FORWARD policy of DROP, for instance).
//
// All changes are one netlink transaction each. The table is made anew, at
// once and with all its elements, whenever it is not what it should be.
//
// Concurrency: all methods may be called concurrently. The lock is held over
// netlink transactions, of which the kernel runs one at a time anyhow; nothing
// that List or Status answers from takes it.
package firewall

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
)

// Config does not change during the life of a Firewall.
type Config struct {
	Table string // name of the table, family inet
	Group uint32 // link group of pod links
}

// Port is one mapping of a port of the node to one of a pod.
type Port struct {
	Proto    uint8      // IPPROTO_TCP, _UDP, _SCTP
	HostIP   netip.Addr // invalid = every local address
	HostPort uint16
	PodPort  uint16
}

type pod struct {
	ips   []netip.Addr
	ports []Port
}

// Firewall keeps the table in the kernel as it should be.
type Firewall struct {
	cfg   Config
	table *nftables.Table
	sets  sets
	tag   string // on every rule: which version of the rule set

	mu      sync.Mutex
	pods    map[string]pod // +checklocks:mu
	sources []netip.Prefix // +checklocks:mu
	// plain are destinations that see pods' addresses, beside the pods. // +checklocks:mu
	plain []netip.Prefix
	// inherited are elements of host ports that a former process left, of pods
	// that are not adopted yet. They live until Reconcile. // +checklocks:mu
	inherited map[*nftables.Set][]element
}

// New returns a Firewall that has not touched the kernel yet; plain is what
// SetPlain changes.
func New(cfg Config, plain []netip.Prefix) *Firewall {
	t := &nftables.Table{Name: cfg.Table, Family: nftables.TableFamilyINet}
	f := &Firewall{cfg: cfg, plain: plain, table: t, sets: newSets(t), pods: map[string]pod{}}
	sum := sha256.Sum256(fmt.Appendf(nil, "%d %d %s", rulesetVersion, cfg.Group, cfg.Table))
	f.tag = "naru " + hex.EncodeToString(sum[:6])
	return f
}

// SetSources tells which addresses pods have: they are masqueraded on their
// way out, and not among themselves.
func (f *Firewall) SetSources(sources []netip.Prefix) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	sources = slices.Clone(sources)
	if slices.Equal(f.sources, sources) {
		return nil
	}
	f.sources = sources
	return f.rebuild()
}

// SetPlain tells which destinations see pods' own addresses; pods always do.
func (f *Firewall) SetPlain(plain []netip.Prefix) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if slices.Equal(f.plain, plain) {
		return nil
	}
	f.plain = slices.Clone(plain)
	return f.rebuild()
}

// Inherit takes over the host ports that are in the kernel, made by a former
// process, so that they keep working until their pods are adopted, and starts
// from the given sources. It makes the table if it is missing or different.
func (f *Firewall) Inherit(sources []netip.Prefix) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sources = slices.Clone(sources)
	f.inherited = map[*nftables.Set][]element{}
	for _, set := range f.sets.ports() {
		have, err := f.read(set)
		if err != nil {
			continue // no such table or set: nothing to inherit
		}
		for _, e := range have {
			if len(e.key) == int(set.KeyType.Bytes) && len(e.val) == int(set.DataType.Bytes) {
				f.inherited[set] = append(f.inherited[set], e)
			}
		}
	}
	ok, err := f.whole()
	if err == nil && ok {
		ok, err = f.sameElements()
	}
	if err != nil || ok {
		return err
	}
	return f.rebuild()
}

// Ensure puts the table back if it, or any rule of it, is missing or not ours.
// It reports whether that was needed.
func (f *Firewall) Ensure() (rebuilt bool, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if ok, err := f.whole(); err != nil || ok {
		return false, err
	}
	return true, f.rebuild()
}

// Reconcile is Ensure that also compares every element, once all pods that
// exist are known: what was inherited and not adopted goes.
func (f *Firewall) Reconcile() (rebuilt bool, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.inherited = nil
	ok, err := f.whole()
	if err == nil && ok {
		ok, err = f.sameElements()
	}
	if err != nil || ok {
		return false, err
	}
	return true, f.rebuild()
}

// Publish maps the ports of a pod. Repeating it is harmless.
func (f *Firewall) Publish(id string, ips []netip.Addr, ports []Port) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	p := pod{slices.Clone(ips), slices.Clone(ports)}
	old, had := f.pods[id]
	f.pods[id] = p
	err := f.change(f.elements(map[string]pod{id: p}), true)
	if err != nil && (missing(err) || errors.Is(err, unix.EEXIST)) {
		err = f.rebuild() // flushed by somebody, or an element left by a crash
	}
	if err != nil {
		delete(f.pods, id)
		if had {
			f.pods[id] = old
		}
	}
	return err
}

// Withdraw takes the mappings of a pod back. Unknown ids are no error.
func (f *Firewall) Withdraw(id string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	p, ok := f.pods[id]
	if !ok {
		return nil
	}
	delete(f.pods, id)
	gone := f.elements(map[string]pod{id: p})
	f.disinherit(gone)
	err := f.change(gone, false)
	if err != nil && missing(err) {
		err = f.rebuild()
	}
	if err != nil {
		f.pods[id] = p
	}
	return err
}

// WithdrawStale removes elements of a pod that this process never published:
// those of ports that still lead to ips. What leads elsewhere by now is left.
func (f *Firewall) WithdrawStale(ips []netip.Addr, ports []Port) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	stale := f.elements(map[string]pod{"": {ips, ports}})
	f.disinherit(stale)
	if ok, err := f.whole(); err != nil || !ok {
		return err // nothing there; whoever puts the table back leaves these out
	}
	keep := f.elements(f.pods)
	for set, elems := range stale {
		if len(elems) == 0 {
			continue
		}
		have, err := f.read(set)
		if err != nil {
			return err
		}
		stale[set] = slices.DeleteFunc(elems, func(e element) bool {
			return !slices.Contains(have, e) || slices.Contains(keep[set], e)
		})
	}
	return f.change(stale, false)
}

func (f *Firewall) disinherit(gone map[*nftables.Set][]element) {
	for set, elems := range gone {
		if len(f.inherited[set]) == 0 {
			continue
		}
		f.inherited[set] = slices.DeleteFunc(f.inherited[set], func(e element) bool { return slices.Contains(elems, e) })
	}
}

// Known returns the ids that have published ports.
func (f *Firewall) Known() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make([]string, 0, len(f.pods))
	for id := range f.pods {
		out = append(out, id)
	}
	return out
}

// Delete removes the table.
func (f *Firewall) Delete() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.conn()
	c.AddTable(f.table) // so that deleting is never of something missing
	c.DelTable(f.table)
	return flush(c, "delete table "+f.cfg.Table)
}

// conn returns a connection for one transaction; its socket is opened by Flush
// in the namespace of the process.
func (f *Firewall) conn() *nftables.Conn {
	c, err := nftables.New(nftables.WithSockOptions(func(s *netlink.Conn) error {
		// A whole table goes out as one message, its acknowledgements come back at once.
		return errors.Join(s.SetWriteBuffer(4<<20), s.SetReadBuffer(4<<20))
	}))
	if err != nil {
		panic("nftables.New without a lasting connection failed: " + err.Error()) // cannot be: it does nothing yet
	}
	return c
}

func flush(c *nftables.Conn, what string) error {
	if err := c.Flush(); err != nil {
		return errs.New(errs.Internal, "%s in nftables: %w", what, err)
	}
	return nil
}

func missing(err error) bool { return errors.Is(err, unix.ENOENT) }

// change adds or deletes elements in one transaction.
func (f *Firewall) change(elems map[*nftables.Set][]element, add bool) error {
	c := f.conn()
	some := false
	for _, set := range f.sets.all() {
		for chunk := range slices.Chunk(elems[set], maxElements) {
			some = true
			var err error
			if add {
				err = c.SetAddElements(set, encode(chunk))
			} else {
				err = c.SetDeleteElements(set, encode(chunk))
			}
			if err != nil {
				return errs.New(errs.Internal, "encode elements of %s: %w", set.Name, err)
			}
		}
	}
	if !some {
		return nil
	}
	return flush(c, "change elements of table "+f.cfg.Table)
}

// rebuild replaces the table and everything in it by one transaction: packets
// see the old rules or the new ones.
func (f *Firewall) rebuild() error {
	c := f.conn()
	c.AddTable(f.table)
	c.DelTable(f.table)
	c.AddTable(f.table)
	elems := f.desired()
	for _, set := range f.sets.all() {
		if err := c.AddSet(set, nil); err != nil {
			return errs.New(errs.Internal, "encode set %s: %w", set.Name, err)
		}
		for chunk := range slices.Chunk(elems[set], maxElements) {
			if err := c.SetAddElements(set, encode(chunk)); err != nil {
				return errs.New(errs.Internal, "encode elements of %s: %w", set.Name, err)
			}
		}
	}
	for _, ch := range f.ruleset() {
		c.AddChain(ch.chain)
		for _, r := range ch.rules {
			c.AddRule(&nftables.Rule{Table: f.table, Chain: ch.chain, Exprs: r, UserData: comment(f.tag)})
		}
	}
	return flush(c, "make table "+f.cfg.Table)
}

// desired is every element that should be in the kernel.
func (f *Firewall) desired() map[*nftables.Set][]element {
	out := f.elements(f.pods)
	for set, elems := range f.inherited {
		for _, e := range elems {
			if !slices.ContainsFunc(out[set], func(o element) bool { return o.key == e.key }) {
				out[set] = append(out[set], e)
			}
		}
	}
	plain := append(slices.Clone(f.sources), f.plain...)
	out[f.sets.pods4], out[f.sets.pods6] = intervals(f.sources)
	out[f.sets.plain4], out[f.sets.plain6] = intervals(plain)
	return out
}

// whole tells whether all rules are there, with our tag and no others.
func (f *Firewall) whole() (bool, error) {
	c := f.conn()
	want := comment(f.tag)
	for _, ch := range f.ruleset() {
		rules, err := c.GetRules(f.table, ch.chain) // none and no error if the table is missing
		if err != nil {
			return false, errs.New(errs.Internal, "read table %s of nftables: %w", f.cfg.Table, err)
		}
		if len(rules) != len(ch.rules) {
			return false, nil
		}
		for _, r := range rules {
			if !slices.Equal(r.UserData, want) {
				return false, nil
			}
		}
	}
	return true, nil
}

func (f *Firewall) sameElements() (bool, error) {
	desired := f.desired()
	for _, set := range f.sets.all() {
		have, err := f.read(set)
		if err != nil {
			return false, err
		}
		want := slices.Clone(desired[set])
		slices.SortFunc(have, element.compare)
		slices.SortFunc(want, element.compare)
		// An interval set that starts behind zero may hold the end of nothing at zero.
		have = slices.DeleteFunc(have, func(e element) bool { return e.end && !slices.Contains(want, e) && zero(e.key) })
		if !slices.Equal(have, want) {
			return false, nil
		}
	}
	return true, nil
}

func (f *Firewall) read(set *nftables.Set) ([]element, error) {
	elems, err := f.conn().GetSetElements(set)
	if err != nil {
		return nil, errs.New(errs.Internal, "read set %s of nftables: %w", set.Name, err)
	}
	out := make([]element, len(elems))
	for i, e := range elems {
		out[i] = element{string(e.Key), string(e.Val), e.IntervalEnd}
	}
	return out, nil
}
