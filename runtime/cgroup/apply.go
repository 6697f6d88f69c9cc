package cgroup

import (
	"context"
	"errors"
	"sort"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime"
)

// txn is a series of writes that can be taken back.
type txn struct {
	keep bool // read each old value first
	old  []oldValue
}

type oldValue struct {
	h          *hierarchy
	file, text string
}

// set writes one file, or records why not.
func (t *txn) set(h *hierarchy, file, value string) error {
	if t.keep {
		old, err := readStringAt(h.fd, file)
		if err != nil {
			return err
		}
		if old == value {
			return nil
		}
		t.old = append(t.old, oldValue{h, file, old})
	}
	err := writeAt(h.fd, file, value)
	if err != nil && t.keep {
		t.old = t.old[:len(t.old)-1]
	}
	return err
}

// rollback writes the old values back, last first. That order is as valid as
// the first one was.
func (t *txn) rollback() error {
	var all []error
	for i := len(t.old) - 1; i >= 0; i-- {
		o := t.old[i]
		if err := writeAt(o.h.fd, o.file, o.text); err != nil {
			all = append(all, err)
		}
	}
	t.old = nil
	return errors.Join(all...)
}

// apply performs writes in order.
func (g *Group) apply(t *txn, list []write) error {
	for _, w := range list {
		h := g.d.control[w.controller]
		if h == nil && g.d.mode == ModeV2 {
			h = g.d.unified // a unified key of a controller that Naru does not use itself
		}
		if h == nil {
			if w.controller == "hugetlb" {
				continue // kubelet sets every size on every node
			}
			return errs.New(errs.FailedPrecondition, "set %s: this host has no %s cgroup controller", w.file, w.controller)
		}
		err := t.set(h, g.rel+"/"+w.file, w.value)
		if errors.Is(err, unix.ENOENT) {
			if w.optional {
				continue
			}
			return errs.New(errs.FailedPrecondition,
				"set %s of cgroup %s: the %s controller is not enabled there (see cgroup.subtree_control of its parents)", w.file, g.Path, w.controller)
		}
		if err != nil {
			return classify(err, "limit cgroup %s", g.Path)
		}
	}
	return nil
}

// applyV1 sets all limits in the version 1 trees.
func (g *Group) applyV1(t *txn, r *runtime.Resources, update bool) error {
	list, err := writesV1(r, g.d.hugePages)
	if err != nil {
		return err
	}
	if err := g.apply(t, list); err != nil {
		return err
	}
	if err := g.applyBandwidthV1(t, r); err != nil {
		return err
	}
	if r.Memory == 0 && r.MemorySwap == 0 {
		return nil
	}
	h := g.d.control["memory"]
	if h == nil {
		return errs.New(errs.FailedPrecondition, "limit memory: this host has no memory cgroup controller")
	}
	if err := g.applyMemoryV1(t, h, r, update); err != nil {
		return classify(err, "limit memory of cgroup %s", g.Path)
	}
	return nil
}

// applyBandwidthV1 sets period and quota. The kernel holds their ratio against
// the parent's after each of the two writes, so one order may be refused where
// the other one passes.
func (g *Group) applyBandwidthV1(t *txn, r *runtime.Resources) error {
	var w []write
	if r.CPUPeriod != 0 {
		w = append(w, write{"cpu", "cpu.cfs_period_us", itoa(r.CPUPeriod), false})
	}
	if r.CPUQuota != 0 {
		w = append(w, write{"cpu", "cpu.cfs_quota_us", itoa(r.CPUQuota), false})
	}
	err := g.apply(t, w)
	if err == nil || len(w) < 2 || !errors.Is(err, unix.EINVAL) {
		return err
	}
	return g.apply(t, []write{w[1], w[0]})
}

const (
	limitV1 = "memory.limit_in_bytes"
	memswV1 = "memory.memsw.limit_in_bytes"
)

// applyMemoryV1 sets limit and memory+swap limit, which must never be below it,
// in the order that keeps that true. Without swap accounting only the first
// exists.
func (g *Group) applyMemoryV1(t *txn, h *hierarchy, r *runtime.Resources, update bool) error {
	limitFile, memswFile := g.rel+"/"+limitV1, g.rel+"/"+memswV1
	swapped := exists(h.fd, memswFile)
	limit, memsw := r.Memory, r.MemorySwap
	raise := false
	if update {
		curLimit, err := readUintAt(h.fd, limitFile)
		if err != nil {
			return err
		}
		if limit == 0 {
			limit = signed(curLimit)
		}
		if swapped {
			curMemsw, err := readUintAt(h.fd, memswFile)
			if err != nil {
				return err
			}
			memsw = nextMemsw(signed(curLimit), signed(curMemsw), limit, memsw)
			raise = memsw == -1 || uint64(memsw) > curMemsw
		}
	} else if memsw == 0 {
		memsw = limit // no swap unless asked for
	} else if limit == 0 {
		limit = -1 // not said: a new cgroup has none
	}
	if memsw != -1 && limit == -1 {
		return errs.New(errs.InvalidArgument, "memory+swap limit %d bytes without a memory limit", memsw)
	}
	if memsw != -1 && memsw < limit {
		return errs.New(errs.InvalidArgument, "memory+swap limit %d is below the memory limit %d: it counts both", memsw, limit)
	}
	order := []write{{file: limitFile, value: itoa(limit)}}
	if swapped && memsw != 0 {
		m := write{file: memswFile, value: itoa(memsw)}
		if raise {
			order = []write{m, order[0]}
		} else {
			order = append(order, m)
		}
	}
	for _, w := range order {
		if err := t.set(h, w.file, w.value); err != nil {
			return err
		}
	}
	return nil
}

// nextMemsw keeps the swap that a container has when only its memory limit
// changes.
func nextMemsw(curLimit, curMemsw, limit, want int64) int64 {
	switch {
	case want != 0:
		return want
	case limit == -1 || curMemsw == -1:
		return -1
	case curLimit == -1:
		return limit
	}
	return limit + curMemsw - curLimit
}

// signed reads version 1's "no limit", the largest multiple of the page size
// that an int64 holds, as -1.
func signed(n uint64) int64 {
	if n >= 1<<62 {
		return -1
	}
	return int64(n)
}

// Update changes the limits that r sets and leaves the others: all of them, or,
// on an error, none. A memory limit below what is in use and cannot be reclaimed
// is refused with errs.FailedPrecondition, and no process dies of it.
func (g *Group) Update(ctx context.Context, r runtime.Resources) error {
	if err := Validate(&r); err != nil {
		return err
	}
	if g.scope != nil {
		return errs.New(errs.FailedPrecondition, "update cgroup %s: it has no process yet", g.Path)
	}
	if !exists(g.d.tracking().fd, g.rel) {
		return errs.New(errs.NotFound, "no cgroup %s", g.Path)
	}
	if err := g.roomForMemory(&r); err != nil {
		return err
	}
	t := &txn{keep: true}
	err := g.update(t, &r)
	if err == nil && g.d.systemd {
		if err = g.d.setScope(ctx, g, &r); err == nil {
			err = g.update(&txn{}, &r)
		}
	}
	if err != nil {
		if back := t.rollback(); back != nil {
			return errors.Join(err, errs.New(errs.Internal, "put the old limits back: %w", back))
		}
	}
	return err
}

func (g *Group) update(t *txn, r *runtime.Resources) error {
	if g.d.mode != ModeV2 {
		return g.applyV1(t, r, true)
	}
	cur, err := g.current()
	if err != nil {
		return err
	}
	w, err := writesV2(r, g.d.hugePages, cur)
	if err != nil {
		return err
	}
	return g.apply(t, w)
}

// current reads what partial updates are completed with.
func (g *Group) current() (*current, error) {
	c := &current{quota: "max", memory: -1}
	if s, err := readStringAt(g.d.unified.fd, g.rel+"/cpu.max"); err == nil {
		c.quota, _, _ = strings.Cut(s, " ")
	}
	n, err := readUintAt(g.d.unified.fd, g.rel+"/memory.max")
	if err == nil && n < 1<<62 {
		c.memory = int64(n)
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return nil, classify(err, "read the memory limit of %s", g.Path)
	}
	return c, nil
}

// roomForMemory refuses a limit that would have the OOM killer make room.
// Version 2 kills when a lowered memory.max cannot be met, so what must go is
// reclaimed first (memory.reclaim, kernel ≥ 5.19); version 1 refuses by itself
// with EBUSY, and this check only words it better.
func (g *Group) roomForMemory(r *runtime.Resources) error {
	limit := r.Memory
	if n, err := strconv.ParseInt(r.Unified["memory.max"], 10, 64); err == nil {
		limit = n
	}
	if limit <= 0 {
		return nil
	}
	usage, inactive, err := g.memoryUse()
	if err != nil || usage <= uint64(limit) {
		return err
	}
	refuse := func(n uint64) error {
		return errs.New(errs.FailedPrecondition,
			"memory limit %d bytes of cgroup %s: %d bytes are in use, and the kernel would kill to make room", limit, g.Path, n)
	}
	if usage-min(inactive, usage) > uint64(limit) {
		return refuse(usage - inactive)
	}
	if g.d.mode != ModeV2 {
		return nil
	}
	err = writeAt(g.d.unified.fd, g.rel+"/memory.reclaim", itoa(int64(usage)-limit))
	if errors.Is(err, unix.EAGAIN) {
		// Less was reclaimed than asked for; what counts is what is left.
		if usage, _, e := g.memoryUse(); e == nil && usage > uint64(limit) {
			return refuse(usage)
		}
	}
	return nil
}

// memoryUse returns the bytes charged and how many of them are file pages that
// nobody has used lately.
func (g *Group) memoryUse() (usage, inactive uint64, err error) {
	h, usageFile, key := g.d.control["memory"], "memory.current", "inactive_file"
	if h == nil {
		return 0, 0, nil
	}
	if g.d.mode != ModeV2 {
		usageFile, key = "memory.usage_in_bytes", "total_inactive_file"
	}
	usage, err = readUintAt(h.fd, g.rel+"/"+usageFile)
	if errors.Is(err, unix.ENOENT) {
		return 0, 0, nil // no memory controller here; apply says so
	}
	if err != nil {
		return 0, 0, classify(err, "read the memory use of %s", g.Path)
	}
	stat, err := readAt(h.fd, g.rel+"/memory.stat")
	if err != nil {
		return 0, 0, classify(err, "read the memory use of %s", g.Path)
	}
	inactive, _ = keyed(stat, key)
	return usage, inactive, nil
}

func sortedKeys(m map[string]string) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	return keys
}
