package plan

import (
	"encoding/binary"
	"os"
	goruntime "runtime"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/sys"
)

// Clone says how the child is cloned.
type Clone struct {
	Flags  uint64 // CLONE_*; CLONE_PIDFD and CLONE_CLEAR_SIGHAND are always added
	Parent bool   // CLONE_PARENT: the child becomes a sibling of the caller (exit signal 0)
	Cgroup int    // slot of a cgroup v2 folder for CLONE_INTO_CGROUP, or -1
}

// struct clone_args of clone3(2), up to cgroup.
const (
	cloneArgsSize       = 88
	cloneArgsExitSignal = 32
)

type cloneArgs struct {
	flags, pidfd, childTID, parentTID, exitSignal, stack, stackSize, tls, setTID, setTIDSize, cgroup uint64
}

// maxSlots bounds the descriptors of one plan (SCM_MAX_FD of the kernel is 253).
const maxSlots = 250

// child is what the child needs to know: prepared before the clone, in the
// parent's memory, with nothing secret in it.
type child struct {
	plan   int32
	nfds   int32
	ngaps  int32
	size   uint64
	fds    [maxSlots]int32
	gaps   [maxSlots + 2][2]uint32 // ranges of descriptors to close
	record [RecordSize]byte
}

// Start clones a child that maps the plan and makes its calls. fds are the
// descriptors of the slots; all others but 0, 1 and 2 are closed in the child
// first. It returns as soon as the child exists. The caller closes pidfd, and
// reaps the child unless c.Parent is set.
func Start(plan *os.File, fds []int, c Clone) (pid, pidfd int, err error) {
	ch, err := prepare(plan, fds)
	if err != nil {
		return 0, -1, err
	}
	pfd := int32(-1)
	ca := &cloneArgs{
		flags:      c.Flags | unix.CLONE_PIDFD | unix.CLONE_CLEAR_SIGHAND,
		pidfd:      uint64(uintptr(unsafe.Pointer(&pfd))),
		exitSignal: uint64(unix.SIGCHLD),
	}
	if c.Parent {
		ca.flags |= unix.CLONE_PARENT
		ca.exitSignal = 0
	}
	if c.Cgroup >= 0 {
		if c.Cgroup >= len(fds) {
			return 0, -1, errs.New(errs.Internal, "cgroup slot %d of a plan with %d slots", c.Cgroup, len(fds))
		}
		ca.flags |= unix.CLONE_INTO_CGROUP
		ca.cgroup = uint64(fds[c.Cgroup])
	}
	// All signals are blocked over the clone: the child must never run a Go
	// signal handler. The plan unblocks them as its last act before execve.
	goruntime.LockOSThread()
	all, old := ^uint64(0), uint64(0)
	unix.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&all)), uintptr(unsafe.Pointer(&old)), 8, 0, 0)
	// The slack of this thread becomes the one that the child falls back to when
	// it asks for the default (PR_SET_TIMERSLACK(2const)): not ours.
	slack, _, _ := unix.RawSyscall6(unix.SYS_PRCTL, unix.PR_GET_TIMERSLACK, 0, 0, 0, 0, 0)
	unix.RawSyscall6(unix.SYS_PRCTL, unix.PR_SET_TIMERSLACK, sys.DefaultTimerSlack, 0, 0, 0, 0)
	n, errno := cloneAndRun(ca, ch)
	unix.RawSyscall6(unix.SYS_PRCTL, unix.PR_SET_TIMERSLACK, slack, 0, 0, 0, 0)
	unix.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&old)), 0, 8, 0, 0)
	goruntime.UnlockOSThread()
	goruntime.KeepAlive(plan)
	goruntime.KeepAlive(ca)
	goruntime.KeepAlive(&pfd)
	if errno != 0 {
		return 0, -1, errs.New(errs.Internal, "clone the child (flags %#x): %w", ca.flags, errno)
	}
	return int(n), int(pfd), nil
}

// prepare checks the plan's header and computes which descriptors to close.
func prepare(plan *os.File, fds []int) (*child, error) {
	var h [headerSize]byte
	if _, err := unix.Pread(int(plan.Fd()), h[:], 0); err != nil {
		return nil, errs.New(errs.Internal, "read the plan's header: %w", err)
	}
	le := binary.LittleEndian
	size, nops, slots := le.Uint64(h[32:]), le.Uint32(h[8:]), le.Uint32(h[40:])
	switch {
	case le.Uint32(h[0:]) != magic:
		return nil, errs.New(errs.InvalidArgument, "not a plan")
	case le.Uint32(h[4:]) != Version:
		return nil, errs.New(errs.FailedPrecondition, "plan of version %d, this monitor runs version %d; restart the older of naru and naru-monitor", le.Uint32(h[4:]), Version)
	case size > MaxSize || uint64(nops)*opSize > size || nops == 0:
		return nil, errs.New(errs.InvalidArgument, "plan with %d operations in %d bytes", nops, size)
	case int(slots) != len(fds) || len(fds) == 0 || len(fds) > maxSlots:
		return nil, errs.New(errs.InvalidArgument, "plan wants %d descriptors, got %d", slots, len(fds))
	}
	ch := &child{plan: int32(plan.Fd()), nfds: int32(len(fds)), size: size}
	keep := []int{0, 1, 2, int(plan.Fd())}
	for i, fd := range fds {
		if fd < 0 {
			return nil, errs.New(errs.InvalidArgument, "slot %d of the plan is not open", i)
		}
		ch.fds[i] = int32(fd)
		keep = append(keep, fd)
	}
	slices.Sort(keep)
	keep = slices.Compact(keep)
	for i, fd := range keep {
		first, last := uint32(fd)+1, ^uint32(0)
		if i+1 < len(keep) {
			last = uint32(keep[i+1]) - 1
		}
		if first <= last {
			ch.gaps[ch.ngaps] = [2]uint32{first, last}
			ch.ngaps++
		}
	}
	return ch, nil
}

// cloneAndRun clones without CLONE_VM, so it returns twice, like fork: in the
// parent with the pid, and in the child, on a copy of the memory, where it
// never returns. Everything below it is nosplit and makes raw system calls
// only: the child has one thread, no scheduler and no garbage collector.
//
//go:nosplit
//go:norace
//go:nocheckptr
func cloneAndRun(ca *cloneArgs, ch *child) (uintptr, unix.Errno) {
	pid, _, e := unix.RawSyscall6(unix.SYS_CLONE3, uintptr(unsafe.Pointer(ca)), cloneArgsSize, 0, 0, 0, 0)
	if e != 0 || pid != 0 {
		return pid, e
	}
	run(ch)
	return 0, 0
}

//go:nosplit
//go:norace
//go:nocheckptr
func run(ch *child) {
	for i := int32(0); i < ch.ngaps; i++ {
		unix.RawSyscall6(unix.SYS_CLOSE_RANGE, uintptr(ch.gaps[i][0]), uintptr(ch.gaps[i][1]), 0, 0, 0, 0)
	}
	base, _, e := unix.RawSyscall6(unix.SYS_MMAP, 0, uintptr(ch.size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE, uintptr(ch.plan), 0)
	if e != 0 {
		fail(ch, 0, uint32(StageMap), uint32(e), 0)
	}
	unix.RawSyscall6(unix.SYS_CLOSE, uintptr(ch.plan), 0, 0, 0, 0, 0)
	h := (*header)(unsafe.Add(unsafe.Pointer(nil), base))
	for i := uint32(0); i < h.nrelocs; i++ {
		at := *(*uint64)(unsafe.Add(unsafe.Pointer(nil), base+uintptr(h.relocs)+uintptr(i)*8))
		*(*uint64)(unsafe.Add(unsafe.Pointer(nil), base+uintptr(at))) += uint64(base)
	}
	ops := unsafe.Add(unsafe.Pointer(nil), base+uintptr(h.ops))
	for i := uint32(0); i < h.nops; {
		i = step(ch, base, ops, i)
	}
	unix.RawSyscall6(unix.SYS_EXIT_GROUP, 126, 0, 0, 0, 0, 0)
}

// step makes one call and returns the number of the next operation.
//
//go:nosplit
//go:norace
//go:nocheckptr
func step(ch *child, base uintptr, ops unsafe.Pointer, i uint32) uint32 {
	o := (*op)(unsafe.Add(ops, uintptr(i)*opSize))
	var a [6]uintptr
	for j := 0; j < 6; j++ {
		v := uintptr(o.args[j])
		switch o.kind[j] {
		case argPtr:
			v += base
		case argSlot:
			v = uintptr(ch.fds[v%maxSlots])
		case argResult:
			v = uintptr((*op)(unsafe.Add(ops, v*opSize)).result)
		case argLoad:
			v = uintptr(*(*uint32)(unsafe.Add(unsafe.Pointer(nil), base+v)))
		}
		a[j] = v
	}
	r, _, e := unix.RawSyscall6(uintptr(o.nr), a[0], a[1], a[2], a[3], a[4], a[5])
	o.result = int64(r)
	if e != 0 {
		if !allowed(o, uint16(e)) {
			fail(ch, i, o.stage, uint32(e), int64(r))
		}
		return i + 1
	}
	if o.flags&flagExpect != 0 && int64(r) != o.expect {
		fail(ch, i, o.stage, 0, int64(r))
	}
	if o.flags&flagStore4 != 0 {
		*(*uint32)(unsafe.Add(unsafe.Pointer(nil), base+uintptr(o.store))) = uint32(r)
	}
	if o.flags&flagStore8 != 0 {
		*(*uint64)(unsafe.Add(unsafe.Pointer(nil), base+uintptr(o.store))) = uint64(r)
	}
	if o.flags&flagReslot != 0 {
		ch.fds[o.jump%maxSlots] = int32(r)
	}
	if o.flags&flagJumpPos != 0 && int64(r) > 0 {
		return o.jump
	}
	return i + 1
}

//go:nosplit
//go:norace
//go:nocheckptr
func allowed(o *op, e uint16) bool {
	if o.flags&flagMayFail == 0 {
		return false
	}
	if o.allow[0] == 0 {
		return true
	}
	for j := 0; j < 4; j++ {
		if o.allow[j] == e {
			return true
		}
	}
	return false
}

// fail reports a failure and ends the child. The record is built by hand: the
// words are those of Record.
//
//go:nosplit
//go:norace
//go:nocheckptr
func fail(ch *child, op, stage, errno uint32, value int64) {
	p := unsafe.Pointer(&ch.record)
	*(*uint32)(p) = uint32(KindFailed)
	*(*uint32)(unsafe.Add(p, 4)) = op
	*(*uint32)(unsafe.Add(p, 8)) = stage
	*(*uint32)(unsafe.Add(p, 12)) = errno
	*(*int64)(unsafe.Add(p, recordValue)) = value
	unix.RawSyscall6(unix.SYS_WRITE, uintptr(ch.fds[0]), uintptr(p), RecordSize, 0, 0, 0)
	unix.RawSyscall6(unix.SYS_EXIT_GROUP, 127, 0, 0, 0, 0, 0)
}
