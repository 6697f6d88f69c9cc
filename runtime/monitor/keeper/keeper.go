// Package keeper is the one process per node that must not die: the parent of
// every container.
//
// It reaps, writes each exit to a file and then announces it, holds the
// descriptors without which a container's output or exit status would be lost,
// and keeps a worker running that does everything else. It parses nothing from
// outside but the worker's messages, opens nothing outside its own folder, and
// replaces its own program in place when told to.
//
//	keeper (Run) ── socketpair ── worker (package worker) ── monitor.sock ── daemon
//	  ├ table of containers: pid, pidfd, pipes, log state, exit
//	  └ parent of: the worker, every container (CLONE_PARENT), orphans (subreaper)
//
// # Who reaps whom
//
// A container in the table is reaped through its pidfd: look (WNOWAIT), write
// the exit file, tell the worker, only then reap: killed anywhere in between,
// the status is still there for the next one who looks. Other dead children are
// orphans of containers and are reaped at once, with one exception: while the
// worker has announced a clone ("begin") and not yet said which pid came of it
// ("put", "end"), a dead child that was first seen then stays a zombie, because
// it may be that very container.
//
// # Life and death
//
//   - SIGKILL of the worker: its successor gets the table and goes on. A worker
//     that gives no sign of life when asked (stopped, stuck) is killed.
//   - SIGKILL of the keeper: the worker goes on copying logs; the next keeper,
//     which an init system or a guard (Guard) starts, asks it for the table
//     (handover) and adopts the containers. It is not
//     their parent: their exits are then read from the pidfd (PIDFD_GET_INFO,
//     Linux 6.15), from the zombie in /proc, or reported as unknown.
//   - SIGTERM: with no living container the keeper ends; else it stays and says
//     so, unless it was started with KillOnExit: then it kills them, waits, and
//     ends. The systemd unit uses KillMode=process and SendSIGKILL=no.
//   - SIGHUP: the worker is replaced. SIGUSR2: keeper, then worker, are replaced
//     by what lies at the path of the binary now.
//
// # Concurrency
//
// One goroutine, one loop over epoll; a second one turns signals into wakeups
// of the loop. There are no locks, and no call that waits for anybody.
package keeper

import (
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime/monitor/wire"
)

// Options of a keeper.
type Options struct {
	Dir        string // its folder, 0700: monitor.sock, lock, exits/
	Binary     string // path of the program on disk, for SIGUSR2; found by itself
	KillOnExit bool   // SIGTERM kills the containers
	Resume     int    // descriptor of the table that the previous program left; 0 = none
}

// tidyTime is how long after some work the garbage is collected. Without it a
// quiet keeper would hold what it held at its busiest.
const tidyTime = 2 * time.Second

// What an event of epoll is about.
const (
	evWake = iota
	evSocket
	evWorker
	evContainer
	evHelper
)

type keeper struct {
	opts Options

	dir, exits, lock, listener, self int // descriptors
	ep, wake                         int

	entries map[string]*entry
	pidfds  map[int]*entry
	pids    map[int]*entry // not yet reaped

	worker workerProc
	clones map[uint64]uint64 // number of an announced clone → when, by count
	count  uint64            // of announced clones
	beats  uint64            // of signs of life that the worker was asked for
	zombie map[int]uint64    // unknown dead child → count when it was first seen

	upgrade  *upgrade
	stopping bool
	tidyAt   time.Time     // when to give memory back; zero = nothing happened
	signals  atomic.Uint32 // bits of pending signals
	buf      []byte
}

// entry is one container.
type entry struct {
	wire.Entry
	fds     wire.FDs
	recheck time.Time // adopted and dead: when to give up on its exit status
}

// Run is the life of a keeper.
func Run(o Options) error {
	k := &keeper{
		opts: o, dir: -1, exits: -1, lock: -1, listener: -1, self: -1, ep: -1, wake: -1,
		entries: map[string]*entry{}, pidfds: map[int]*entry{}, pids: map[int]*entry{},
		clones: map[uint64]uint64{}, zombie: map[int]uint64{}, buf: make([]byte, wire.MaxMessage),
	}
	k.worker.reset()
	k.watchSignals()
	if err := k.setUp(); err != nil {
		return err
	}
	k.logf("keeper runs, pid %d, %d containers", os.Getpid(), len(k.entries))
	return k.loop()
}

func (k *keeper) logf(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%s keeper: %s\n", time.Now().UTC().Format("2006-01-02T15:04:05.000Z"), fmt.Sprintf(format, args...))
}

func (k *keeper) setUp() error {
	ep, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return errs.New(errs.Internal, "make an epoll: %w", err)
	}
	k.ep = ep
	if err := k.add(k.wake, unix.EPOLLIN, evWake); err != nil {
		return err
	}
	if err := harden(); err != nil {
		return err
	}
	if k.opts.Resume > 0 {
		return k.resume(k.opts.Resume)
	}
	if k.self, err = openSelf(); err != nil {
		return err
	}
	if err := k.openFolder(); err != nil {
		return err
	}
	if err := k.takeOver(); err != nil {
		return err
	}
	k.loadExits()
	for _, e := range k.entries {
		if err := k.watch(e); err != nil {
			return err
		}
	}
	return k.startWorker()
}

func (k *keeper) add(fd int, events uint32, kind int32) error {
	ev := unix.EpollEvent{Events: events, Fd: int32(fd), Pad: kind}
	if err := unix.EpollCtl(k.ep, unix.EPOLL_CTL_ADD, fd, &ev); err != nil {
		return errs.New(errs.Internal, "watch descriptor %d: %w", fd, err)
	}
	return nil
}

func (k *keeper) remove(fd int) {
	_ = unix.EpollCtl(k.ep, unix.EPOLL_CTL_DEL, fd, nil)
}

// Bits of keeper.signals.
var signalBits = map[os.Signal]uint32{
	unix.SIGCHLD: 1, unix.SIGTERM: 2, unix.SIGINT: 2, unix.SIGHUP: 4, unix.SIGUSR2: 8,
}

// watchSignals turns signals into wakeups. It runs first: a keeper that was
// just replaced in place has signals pending.
func (k *keeper) watchSignals() {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		panic(err) // no descriptors at start: nothing can be done
	}
	k.wake = fd
	ch := make(chan os.Signal, 16)
	// SIGPIPE is received, not ignored: what is ignored stays so in children,
	// and a broken stderr must not kill.
	signal.Notify(ch, unix.SIGCHLD, unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGUSR2, unix.SIGPIPE)
	go func() {
		for s := range ch {
			if bit := signalBits[s]; bit != 0 {
				k.signals.Or(bit)
				_, _ = unix.Write(fd, []byte{1, 0, 0, 0, 0, 0, 0, 0})
			}
		}
	}()
}

func (k *keeper) loop() error {
	events := make([]unix.EpollEvent, 64)
	k.signals.Or(1) // children may have died before the loop
	_, _ = unix.Write(k.wake, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	for {
		n, err := unix.EpollWait(k.ep, events, k.timeout())
		if err != nil && err != unix.EINTR {
			return errs.New(errs.Internal, "wait for events: %w", err)
		}
		for i := range max(n, 0) {
			k.handle(&events[i])
		}
		if k.tick() {
			_ = unix.Unlinkat(k.dir, "monitor.sock", 0)
			k.logf("keeper ends")
			return nil
		}
	}
}

func (k *keeper) handle(ev *unix.EpollEvent) {
	fd := int(ev.Fd)
	switch ev.Pad {
	case evWake:
		var b [8]byte
		_, _ = unix.Read(k.wake, b[:])
		k.onSignals(k.signals.Swap(0))
	case evSocket:
		if fd == k.worker.sock {
			k.onSocket(ev.Events)
		}
	case evWorker:
		if fd == k.worker.pidfd {
			k.workerDied()
		}
	case evContainer:
		if e := k.pidfds[fd]; e != nil {
			k.exited(e)
		}
	case evHelper:
		if k.upgrade != nil && fd == k.upgrade.pidfd {
			k.checked()
		}
	}
}

func (k *keeper) onSignals(bits uint32) {
	if bits&1 != 0 {
		k.reapOrphans()
	}
	if bits&2 != 0 {
		k.terminate()
	}
	if bits&4 != 0 {
		k.logf("SIGHUP: replacing the worker")
		k.restartWorker()
	}
	if bits&8 != 0 {
		k.replaceFromPath()
	}
}

// timeout of the next wait in milliseconds.
func (k *keeper) timeout() int {
	var next time.Time
	earliest := func(t time.Time) {
		if !t.IsZero() && (next.IsZero() || t.Before(next)) {
			next = t
		}
	}
	earliest(k.worker.startAt)
	earliest(k.worker.killAt)
	earliest(k.worker.beatAt)
	earliest(k.tidyAt)
	if k.upgrade != nil {
		earliest(k.upgrade.deadline)
	}
	for _, e := range k.entries {
		if e.Adopted { // few, and only after a keeper was killed
			earliest(e.recheck)
		}
	}
	if next.IsZero() {
		return -1
	}
	return int(max(time.Until(next)/time.Millisecond+1, 0))
}

// tick does what is due and reports whether the keeper is to end.
func (k *keeper) tick() bool {
	now := time.Now()
	due := func(t time.Time) bool { return !t.IsZero() && !now.Before(t) }
	if due(k.worker.startAt) && !k.stopping {
		if err := k.startWorker(); err != nil {
			k.logf("start the worker: %v", err)
			k.worker.backOff()
		}
	}
	if due(k.tidyAt) {
		k.tidyAt = time.Time{}
		debug.FreeOSMemory() // under a millisecond, for a heap as small as this
	}
	if due(k.worker.killAt) {
		k.worker.killAt = time.Time{}
		k.worker.signal(unix.SIGKILL)
	}
	if due(k.worker.beatAt) {
		k.checkWorker(now)
	}
	if k.upgrade != nil && due(k.upgrade.deadline) {
		k.upgradeFailed(errs.New(errs.DeadlineExceeded, "the new program did not answer in time"))
	}
	for _, e := range k.entries {
		if e.Adopted && due(e.recheck) {
			k.exited(e)
		}
	}
	return k.stopping && k.living() == 0 && k.endWorker()
}

// living counts the containers that have not ended.
func (k *keeper) living() int {
	n := 0
	for _, e := range k.entries {
		if e.Exit == nil {
			n++
		}
	}
	return n
}

// terminate is SIGTERM.
func (k *keeper) terminate() {
	n := k.living()
	switch {
	case n == 0, k.opts.KillOnExit:
		k.stopping = true
		for _, e := range k.entries {
			if e.Exit == nil {
				_ = unix.PidfdSendSignal(e.fds[wire.FDPid], unix.SIGKILL, nil, 0)
			}
		}
		k.logf("SIGTERM: ending, %d containers killed", n)
	default:
		k.logf("SIGTERM: %d containers live, the keeper stays; start it with --kill-on-exit to end them with it", n)
	}
}

// cloexec sets or clears FD_CLOEXEC.
func cloexec(fd int, on bool) {
	flag := 0
	if on {
		flag = unix.FD_CLOEXEC
	}
	_, _ = unix.FcntlInt(uintptr(fd), unix.F_SETFD, flag)
}
