package cgroup

import (
	"context"
	"encoding/binary"
	"errors"
	"math"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/cgroups/v3/cgroup2"
	sddbus "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime"
)

// unitManager is what is used of systemd's manager object.
type unitManager interface {
	StartTransientUnitContext(ctx context.Context, name, mode string, props []sddbus.Property, ch chan<- string) (int, error)
	StopUnitContext(ctx context.Context, name, mode string, ch chan<- string) (int, error)
	ResetFailedUnitContext(ctx context.Context, name string) error
	SetUnitPropertiesContext(ctx context.Context, name string, runtime bool, props ...sddbus.Property) error
	Connected() bool
	Close()
}

type unitDialer func() (unitManager, error)

// jobWait bounds one job of systemd's when the caller sets no deadline.
const jobWait = 30 * time.Second

// dialSystemd connects for the daemon's life: the connection outlives the
// context of the call that happened to need it first.
func dialSystemd() (unitManager, error) {
	c, err := sddbus.NewWithContext(context.Background())
	if err != nil {
		return nil, errs.New(errs.Unavailable, "connect to systemd over D-Bus: %w", err)
	}
	return c, nil
}

func (d *Driver) manager() (unitManager, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.conn != nil && d.conn.Connected() {
		return d.conn, nil
	}
	if d.conn != nil {
		d.conn.Close()
		d.conn = nil
	}
	c, err := d.units()
	if err != nil {
		return nil, err
	}
	d.conn = c
	return c, nil
}

func property(name string, value any) sddbus.Property {
	return sddbus.Property{Name: name, Value: dbus.MakeVariant(value)}
}

// startScope makes the scope of a container around its first process. The scope
// is delegated (systemd.resource-control(5), Delegate=): what is below is
// ours, and systemd keeps its hands off it. The limits are given to systemd
// too, because a daemon-reload writes a unit's properties again.
func (d *Driver) startScope(ctx context.Context, cgroupPath string, pid int, r *runtime.Resources) error {
	slice := path.Base(parentOf(cgroupPath))
	limits := *r
	if limits.MemorySwap == 0 && limits.Memory > 0 {
		limits.MemorySwap = limits.Memory // no swap unless asked for, as swapMax
	}
	props := append([]sddbus.Property{
		sddbus.PropDescription("naru container " + strings.TrimSuffix(path.Base(cgroupPath), ".scope")),
		sddbus.PropSlice(slice),
		property("PIDs", []uint32{uint32(pid)}),
		property("Delegate", true),
		property("DefaultDependencies", false),
		property("CollectMode", "inactive-or-failed"),
	}, unitLimits(&limits)...)
	if err := d.startUnit(ctx, path.Base(cgroupPath), props); err != nil {
		return err
	}
	if !exists(d.unified.fd, cgroupPath[1:]) {
		return errs.New(errs.Internal, "systemd started %s, but not at %s", path.Base(cgroupPath), cgroupPath)
	}
	return nil
}

func (d *Driver) startUnit(ctx context.Context, unit string, props []sddbus.Property) error {
	m, err := d.manager()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, jobWait)
	defer cancel()
	for retried := false; ; retried = true {
		done := make(chan string, 1)
		_, err = m.StartTransientUnitContext(ctx, unit, "replace", props, done)
		if dbusError(err, "org.freedesktop.systemd1.UnitExists") && !retried {
			// A failed unit of an earlier try keeps its name until it is reset.
			_ = m.ResetFailedUnitContext(ctx, unit)
			continue
		}
		if err != nil {
			return unitErr(err, "start systemd unit "+unit)
		}
		return waitJob(ctx, done, "start systemd unit "+unit)
	}
}

func waitJob(ctx context.Context, done <-chan string, what string) error {
	select {
	case result := <-done:
		if result != "done" {
			return errs.New(errs.Internal, "%s: the job ended as %q", what, result)
		}
		return nil
	case <-ctx.Done():
		return errs.New(errs.Of(ctx.Err()), "%s: %w", what, context.Cause(ctx))
	}
}

func unitErr(err error, what string) error {
	class := errs.Internal
	switch {
	case errors.Is(err, dbus.ErrClosed):
		class = errs.Unavailable
	case dbusError(err, "org.freedesktop.systemd1.UnitExists"):
		class = errs.AlreadyExists
	case dbusError(err, "org.freedesktop.DBus.Error.InvalidArgs"):
		class = errs.InvalidArgument
	case errs.Of(err) != errs.Internal:
		class = errs.Of(err)
	}
	return errs.New(class, "%s: %w", what, err)
}

func dbusError(err error, name string) bool {
	var e dbus.Error
	if errors.As(err, &e) {
		return e.Name == name
	}
	var p *dbus.Error
	return errors.As(err, &p) && p.Name == name
}

func noSuchUnit(err error) bool {
	return dbusError(err, "org.freedesktop.systemd1.NoSuchUnit") || dbusError(err, "org.freedesktop.systemd1.LoadFailed")
}

// stopScope removes the scope of a container. systemd does that by itself when
// the last process goes; the call is for the other cases.
func (d *Driver) stopScope(ctx context.Context, cgroupPath string) error {
	if pids, err := listPids(ctx, d.unified, cgroupPath[1:], true); err == nil && len(pids) > 0 {
		if err := (&Group{Path: cgroupPath, rel: cgroupPath[1:], d: d}).awaitEmpty(ctx); err != nil {
			return err
		}
	}
	return d.stopUnit(ctx, cgroupPath)
}

// awaitEmpty waits removeWait for exiting processes.
func (g *Group) awaitEmpty(ctx context.Context) error {
	deadline := time.Now().Add(removeWait)
	for {
		pids, err := g.Procs()
		if err != nil || len(pids) == 0 {
			return err
		}
		if time.Now().After(deadline) {
			return errs.New(errs.FailedPrecondition, "remove cgroup %s: process %d is in it", g.Path, pids[0])
		}
		if err := pause(ctx, 5*time.Millisecond); err != nil {
			return err
		}
	}
}

func (d *Driver) stopUnit(ctx context.Context, cgroupPath string) error {
	if !exists(d.unified.fd, cgroupPath[1:]) {
		return nil
	}
	m, err := d.manager()
	if err != nil {
		return err
	}
	unit := path.Base(cgroupPath)
	ctx, cancel := context.WithTimeout(ctx, jobWait)
	defer cancel()
	done := make(chan string, 1)
	if _, err = m.StopUnitContext(ctx, unit, "replace", done); err != nil {
		if noSuchUnit(err) {
			return nil
		}
		return unitErr(err, "stop systemd unit "+unit)
	}
	if err := waitJob(ctx, done, "stop systemd unit "+unit); err != nil {
		return err
	}
	_ = m.ResetFailedUnitContext(ctx, unit) // it is no error that it had not failed
	return nil
}

// setScope tells systemd of the limits that were just changed by r; see
// startScope. Systemd rounds some and writes them again, so the caller then
// sets the exact values once more.
func (d *Driver) setScope(ctx context.Context, g *Group, r *runtime.Resources) error {
	limits := *r
	if r.CPUQuota != 0 || r.CPUPeriod != 0 {
		limits.CPUQuota, limits.CPUPeriod = g.bandwidth()
	}
	if r.MemorySwap > 0 && r.Memory == 0 {
		cur, err := g.current()
		if err != nil {
			return err
		}
		limits.Memory = cur.memory
	}
	props := unitLimits(&limits)
	if len(props) == 0 {
		return nil
	}
	m, err := d.manager()
	if err != nil {
		return err
	}
	unit := path.Base(g.Path)
	if err := m.SetUnitPropertiesContext(ctx, unit, true, props...); err != nil && !noSuchUnit(err) {
		return unitErr(err, "set limits of systemd unit "+unit)
	}
	return nil
}

// bandwidth reads cpu.max.
func (g *Group) bandwidth() (quota, period int64) {
	s, _ := readStringAt(g.d.unified.fd, g.rel+"/cpu.max")
	q, p, _ := strings.Cut(s, " ")
	period, _ = strconv.ParseInt(p, 10, 64)
	quota, err := strconv.ParseInt(q, 10, 64)
	if err != nil {
		quota = -1 // "max"
	}
	return quota, period
}

// ensureSlice makes a pod's slice, where kubelet has not.
func (d *Driver) ensureSlice(ctx context.Context, cgroupPath string) error {
	if exists(d.unified.fd, cgroupPath[1:]) {
		return nil
	}
	d.marks.mu.Lock()
	defer d.marks.mu.Unlock()
	if exists(d.unified.fd, cgroupPath[1:]) {
		return nil
	}
	if err := d.marks.put(cgroupPath, []string{"systemd"}); err != nil {
		return err
	}
	props := []sddbus.Property{
		sddbus.PropDescription("naru pod"),
		property("DefaultDependencies", false),
		property("CollectMode", "inactive-or-failed"),
		property("MemoryAccounting", true),
		property("CPUAccounting", true),
		property("IOAccounting", true),
		property("TasksAccounting", true),
	}
	err := d.startUnit(ctx, path.Base(cgroupPath), props)
	if errs.Is(err, errs.AlreadyExists) {
		err = nil
	}
	if err != nil {
		_ = d.marks.put(cgroupPath, nil)
	}
	return err
}

// removeSlice stops a slice that ensureSlice made. Stopping a slice stops what
// is in it, so it must be empty.
func (d *Driver) removeSlice(ctx context.Context, cgroupPath string) error {
	d.marks.mu.Lock()
	defer d.marks.mu.Unlock()
	used := d.populated(cgroupPath)
	if !used {
		if err := d.ledger.close(cgroupPath); err != nil {
			return err
		}
	}
	if !slices.Contains(d.marks.get(cgroupPath), "systemd") {
		return nil
	}
	if used {
		return errs.New(errs.FailedPrecondition, "remove slice %s: it is not empty", path.Base(cgroupPath))
	}
	if err := d.stopUnit(ctx, cgroupPath); err != nil {
		return err
	}
	if err := unix.Unlinkat(d.unified.fd, cgroupPath[1:], unix.AT_REMOVEDIR); err != nil && err != unix.ENOENT {
		return classify(err, "remove cgroup parent %s", cgroupPath)
	}
	return d.marks.put(cgroupPath, nil)
}

// unitLimits says the limits in systemd's words (org.freedesktop.systemd1(5)).
// What it has no property for (hugetlb, raw values) it leaves alone.
func unitLimits(r *runtime.Resources) []sddbus.Property {
	var p []sddbus.Property
	add := func(name string, v uint64) { p = append(p, property(name, v)) }
	orInfinity := func(n int64) uint64 {
		if n < 0 {
			return math.MaxUint64
		}
		return uint64(n)
	}
	if r.CPUShares != 0 {
		add("CPUWeight", cgroup2.ConvertCPUSharesToCgroupV2Value(uint64(clampShares(r.CPUShares))))
	}
	if r.CPUQuota != 0 {
		add("CPUQuotaPerSecUSec", quotaPerSecond(r.CPUQuota, r.CPUPeriod))
		if r.CPUPeriod != 0 {
			add("CPUQuotaPeriodUSec", uint64(r.CPUPeriod))
		}
	}
	if r.Memory != 0 {
		add("MemoryMax", orInfinity(r.Memory))
	}
	switch {
	case r.MemorySwap == -1:
		add("MemorySwapMax", math.MaxUint64)
	case r.MemorySwap > 0 && r.Memory > 0:
		add("MemorySwapMax", uint64(r.MemorySwap-r.Memory))
	}
	if r.PidsLimit != 0 {
		add("TasksMax", orInfinity(r.PidsLimit))
	}
	if b := bitmap(r.CpusetCpus); b != nil {
		p = append(p, property("AllowedCPUs", b))
	}
	if b := bitmap(r.CpusetMems); b != nil {
		p = append(p, property("AllowedMemoryNodes", b))
	}
	return p
}

// quotaPerSecond is rounded up to the 10 ms that systemd keeps (whole percent
// of a CPU), so that it never is below what is then written to cpu.max.
func quotaPerSecond(quota, period int64) uint64 {
	if quota < 0 {
		return math.MaxUint64
	}
	if period == 0 {
		period = 100000
	}
	perSec := uint64(math.Ceil(float64(quota) * 1e6 / float64(period)))
	return (perSec + 9999) / 10000 * 10000
}

// bitmap encodes a validated list as systemd's array of bytes, lowest CPU in
// the lowest bit of the first byte.
func bitmap(list string) []byte {
	if list == "" {
		return nil
	}
	var words [(maxCPU + 64) / 64]uint64
	top := 0
	for _, part := range strings.Split(list, ",") {
		lo, hi, ranged := strings.Cut(part, "-")
		a, _ := smallNumber(lo, maxCPU)
		b := a
		if ranged {
			b, _ = smallNumber(hi, maxCPU)
		}
		for i := a; i <= b; i++ {
			words[i/64] |= 1 << (i % 64)
		}
		top = max(top, b)
	}
	var out []byte
	for _, w := range words {
		out = binary.LittleEndian.AppendUint64(out, w)
	}
	return out[:top/8+1]
}
