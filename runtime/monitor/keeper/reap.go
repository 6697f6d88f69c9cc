package keeper

import (
	"bytes"
	"os"
	"strconv"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime/monitor/wire"
)

// siginfo is what waitid(2) fills in, on 64-bit Linux.
type siginfo struct {
	signo, errno, code int32
	_                  int32
	pid                int32
	uid                uint32
	status             int32
	_                  [100]byte
}

const (
	pAll, pPidfd = 0, 3 // P_ALL, P_PIDFD
	cldExited    = 1
)

// waitid never waits. pid is 0 when nobody is dead.
func waitid(idType, id, options int) (si siginfo, err error) {
	for {
		err = unix.Waitid(idType, id, (*unix.Siginfo)(unsafe.Pointer(&si)), options|unix.WEXITED|unix.WNOHANG|unix.WALL, nil)
		if err != unix.EINTR {
			return si, err
		}
	}
}

func (si *siginfo) exit(id string) *wire.Exit {
	x := &wire.Exit{ID: id, PID: int(si.pid), Time: time.Now().UnixNano()}
	if si.code == cldExited {
		x.Status = int(si.status)
	} else {
		x.Signal = int(si.status)
	}
	return x
}

// watch waits for the end of a container.
func (k *keeper) watch(e *entry) error {
	fd := e.fds[wire.FDPid]
	if e.Exit != nil || fd < 0 {
		return nil
	}
	k.pidfds[fd] = e
	if !e.Adopted {
		k.pids[e.PID] = e
	}
	// Edge-triggered: an adopted container's exit status may come after its end.
	return k.add(fd, unix.EPOLLIN|unix.EPOLLET, evContainer)
}

// exited deals with a container that is dead: its exit is written, announced,
// and only then is it reaped.
func (k *keeper) exited(e *entry) {
	if e.Exit != nil {
		return
	}
	pidfd := e.fds[wire.FDPid]
	var x *wire.Exit
	held := false
	if !e.Adopted {
		si, err := waitid(pPidfd, pidfd, unix.WNOWAIT)
		switch {
		case err == nil && si.pid == 0:
			if x, held = heldExit(e); !held {
				return // not dead
			}
		case err == nil:
			x = si.exit(e.ID)
		}
	}
	if x == nil { // adopted, or not our child after all
		if x = k.foreignExit(e); x == nil {
			return
		}
	}
	k.writeExit(x)
	e.Exit, e.recheck = x, time.Time{}
	k.tell(wire.KindExit, 0, x, nil)
	if !e.Adopted && !held {
		_, _ = waitid(pPidfd, pidfd, 0)
	}
	delete(k.pids, e.PID) // one that is held is reaped as an orphan when it is let go
	delete(k.pidfds, pidfd)
	k.remove(pidfd)
}

// heldExit finds how a child ended that is dead and yet not ours to reap: a
// process of its pod traces it, and the kernel keeps a zombie for its tracer
// first (ptrace(2)). The tracer may never wait for it.
func heldExit(e *entry) (*wire.Exit, bool) {
	pidfd := e.fds[wire.FDPid]
	p := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	if n, err := unix.Poll(p, 0); err != nil || n == 0 {
		return nil, false
	}
	ws, ok := zombieStatus(e.PID, pidfd)
	if !ok {
		return nil, false
	}
	return setWaitStatus(&wire.Exit{ID: e.ID, PID: e.PID, Time: time.Now().UnixNano()}, ws), true
}

// foreignPatience is how long a dead container that is not our child may wait
// for its parent to reap it, which is when the kernel tells its status.
const foreignPatience = 10 * time.Second

// foreignExit finds how a process that is not our child ended. nil: not yet
// known, or alive.
func (k *keeper) foreignExit(e *entry) *wire.Exit {
	pidfd := e.fds[wire.FDPid]
	p := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	if n, err := unix.Poll(p, 0); err == nil && n == 0 {
		return nil
	}
	x := &wire.Exit{ID: e.ID, PID: e.PID, Time: time.Now().UnixNano()}
	info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_EXIT}
	err := unix.IoctlPidfdInfo(pidfd, &info)
	if err == nil && info.Mask&unix.PIDFD_INFO_EXIT != 0 {
		return setWaitStatus(x, unix.WaitStatus(info.Exit_code))
	}
	if ws, ok := zombieStatus(e.PID, pidfd); ok {
		return setWaitStatus(x, ws)
	}
	if e.recheck.IsZero() {
		e.recheck = time.Now().Add(foreignPatience)
	}
	// ENOTTY: a kernel before 6.15 will never tell.
	if time.Now().Before(e.recheck) && err != unix.ENOTTY && err != unix.EINVAL {
		return nil
	}
	x.Unknown, x.Status = true, 255
	return x
}

func setWaitStatus(x *wire.Exit, ws unix.WaitStatus) *wire.Exit {
	if ws.Signaled() {
		x.Signal = int(ws.Signal())
	} else {
		x.Status = ws.ExitStatus()
	}
	return x
}

// zombieStatus reads the status of a dead process that nobody has reaped yet
// (proc_pid_stat(5), last field). That the pid was still its own is checked
// afterwards.
func zombieStatus(pid, pidfd int) (unix.WaitStatus, bool) {
	p, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, false
	}
	i := bytes.LastIndexByte(p, ')')
	f := bytes.Fields(p[max(i, 0):])
	if len(f) < 3 || string(f[1]) != "Z" {
		return 0, false
	}
	n, err := strconv.ParseUint(string(f[len(f)-1]), 10, 32)
	if err != nil || unix.PidfdSendSignal(pidfd, 0, nil, 0) != nil {
		return 0, false
	}
	return unix.WaitStatus(n), true
}

// writeExit writes the exit file. A folder that takes no file must not stop
// the node: the exit is announced all the same, and only lost with the keeper.
func (k *keeper) writeExit(x *wire.Exit) {
	tmp := "." + x.ID
	err := func() error {
		fd, err := unix.Openat(k.exits, tmp, unix.O_CREAT|unix.O_TRUNC|unix.O_WRONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return err
		}
		p := wire.ExitFile(x)
		n, err := unix.Write(fd, p)
		_ = unix.Close(fd)
		if err == nil && n != len(p) {
			err = unix.ENOSPC
		}
		if err != nil {
			return err
		}
		return unix.Renameat(k.exits, tmp, k.exits, x.ID)
	}()
	if err != nil {
		k.logf("write the exit file of %s: %v", x.ID, err)
	}
}

// reapOrphans reaps dead children that are nobody's: processes that containers
// left behind, first stages of two-stage starts, execs of a worker that died.
func (k *keeper) reapOrphans() {
	for {
		si, err := waitid(pAll, 0, unix.WNOWAIT)
		if err != nil || si.pid == 0 {
			clear(k.zombie)
			return
		}
		pid := int(si.pid)
		if !k.reapOne(pid) {
			return
		}
		delete(k.zombie, pid)
	}
}

// reapOne deals with the dead child pid. false: it must stay for now.
func (k *keeper) reapOne(pid int) bool {
	// An announced clone stands in the socket before its child exists.
	k.readSocket()
	if e := k.pids[pid]; e != nil {
		k.exited(e)
		return e.Exit != nil
	}
	if k.worker.pid == pid {
		k.workerDied()
		return k.worker.pid != pid
	}
	if k.upgrade != nil && k.upgrade.pid == pid {
		k.checked()
		return k.upgrade == nil || k.upgrade.pid != pid
	}
	seen, ok := k.zombie[pid]
	if !ok {
		seen = k.count
		k.zombie[pid] = seen
	}
	for _, at := range k.clones {
		if at <= seen {
			return false // it may be what that clone made
		}
	}
	_, err := waitid(1 /* P_PID */, pid, 0)
	return err == nil
}

// put adds a container that the worker has cloned.
func (k *keeper) put(p *wire.Packet) error {
	e := &entry{}
	if err := wire.Unmarshal(p.Body, &e.Entry); err != nil {
		return errs.Wrap(errs.Internal, err)
	}
	if !wire.ValidID(e.ID) {
		return errs.New(errs.InvalidArgument, "container ID %q cannot name a file", e.ID)
	}
	if k.entries[e.ID] != nil {
		return errs.New(errs.AlreadyExists, "container %s exists", e.ID)
	}
	if !e.fds.Fill(e.Mask, p.FDs) || e.fds[wire.FDPid] < 0 {
		return errs.New(errs.Internal, "container %s came with %d files for the mask %#x", e.ID, len(p.FDs), e.Mask)
	}
	e.Exit, e.Adopted = nil, false
	p.FDs = nil
	if err := k.watch(e); err != nil {
		wire.CloseAll(e.fds.List())
		delete(k.pidfds, e.fds[wire.FDPid])
		delete(k.pids, e.PID)
		return err
	}
	k.entries[e.ID] = e
	return nil
}

// forget drops a container that has ended, and its exit file. One that is not
// known is dropped already.
func (k *keeper) forget(id string) error {
	if !wire.ValidID(id) {
		return errs.New(errs.InvalidArgument, "container ID %q", id)
	}
	if e := k.entries[id]; e != nil {
		if e.Exit == nil {
			return errs.New(errs.FailedPrecondition, "container %s has not ended", id)
		}
		wire.CloseAll(e.fds.List())
		delete(k.entries, id)
	}
	if err := unix.Unlinkat(k.exits, id, 0); err != nil && err != unix.ENOENT {
		return errs.New(errs.Internal, "remove the exit file of %s: %w", id, err)
	}
	return nil
}
