package keeper

import (
	"bytes"
	"fmt"
	goruntime "runtime"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime/monitor/wire"
)

// upgrade is a replacement of the keeper's program under way: the new one is
// asked which protocols it speaks before anything depends on it.
type upgrade struct {
	program    int // sealed memfd
	pid, pidfd int // the new program, answering
	out        int // its answer
	deadline   time.Time
	req        uint64 // of the worker that waits for an answer; 0 = a signal
	worker     bool   // replace the worker too
}

const checkTime = 10 * time.Second

// Protocols is what `naru-monitor version --protocol` prints.
func Protocols() string {
	return fmt.Sprintf("client %d %d\nkeeper %d %d\ntable %d %d\n",
		wire.ClientMin, wire.ClientMax, wire.KeeperMin, wire.KeeperMax, wire.TableMin, wire.TableMax)
}

// fits reports whether a program that answered so can take over: it must read
// this keeper's table and speak with the running worker.
func fits(answer []byte, workerVersion uint32) error {
	want := map[string]int{"table": wire.TableMax, "keeper": int(workerVersion)}
	for line := range bytes.Lines(answer) {
		f := bytes.Fields(line)
		if len(f) != 3 {
			continue
		}
		v, ok := want[string(f[0])]
		lo, err1 := strconv.Atoi(string(f[1]))
		hi, err2 := strconv.Atoi(string(f[2]))
		if ok && err1 == nil && err2 == nil && lo <= v && v <= hi {
			delete(want, string(f[0]))
		}
	}
	if len(want) > 0 {
		return errs.New(errs.FailedPrecondition, "the new program does not speak what is needed here (%v); it answered %.200q", want, answer)
	}
	return nil
}

// replaceFromPath is SIGUSR2.
func (k *keeper) replaceFromPath() {
	fd, err := unix.Open(k.opts.Binary, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		k.logf("SIGUSR2: open %s: %v", k.opts.Binary, err)
		return
	}
	defer func() { _ = unix.Close(fd) }()
	if err := k.check(fd, 0, true); err != nil {
		k.logf("SIGUSR2: %v", err)
	}
}

// replaceFrom is the client's request.
func (k *keeper) replaceFrom(p *wire.Packet) {
	fd := -1
	var err error
	if len(p.FDs) > 0 {
		fd = p.FDs[0]
	} else if fd, err = unix.Open(k.opts.Binary, unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		k.ack(p.Req, errs.New(errs.FailedPrecondition, "open %s: %w", k.opts.Binary, err))
		return
	} else {
		defer func() { _ = unix.Close(fd) }()
	}
	if err := k.check(fd, p.Req, false); err != nil {
		k.ack(p.Req, err)
	}
}

// check starts the new program with the question what it speaks.
func (k *keeper) check(src int, req uint64, worker bool) error {
	if k.upgrade != nil {
		return errs.New(errs.Unavailable, "another upgrade is under way")
	}
	program, err := Seal(src)
	if err != nil {
		return err
	}
	var out [2]int
	if err := unix.Pipe2(out[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		_ = unix.Close(program)
		return errs.New(errs.Internal, "make a pipe: %w", err)
	}
	pidfd := -1
	pid, err := syscall.ForkExec(fdPath(program), []string{"naru-monitor", "version", "--protocol"}, &syscall.ProcAttr{
		Dir: "/", Env: environ(), Files: []uintptr{0, uintptr(out[1]), 2},
		Sys: &syscall.SysProcAttr{PidFD: &pidfd},
	})
	_ = unix.Close(out[1])
	u := &upgrade{program: program, pid: pid, pidfd: pidfd, out: out[0], deadline: time.Now().Add(checkTime), req: req, worker: worker}
	if err == nil {
		err = k.add(pidfd, unix.EPOLLIN, evHelper)
	}
	if err != nil {
		u.close()
		return errs.New(errs.FailedPrecondition, "start the new program: %w", err)
	}
	k.upgrade = u
	return nil
}

func (u *upgrade) close() {
	for _, fd := range []int{u.program, u.pidfd, u.out} {
		if fd >= 0 {
			_ = unix.Close(fd)
		}
	}
}

// checked is called when the new program has answered and ended.
func (k *keeper) checked() {
	u := k.upgrade
	si, err := waitid(pPidfd, u.pidfd, 0)
	if err == nil && si.pid == 0 {
		return
	}
	k.remove(u.pidfd)
	var answer [4096]byte
	n, _ := unix.Read(u.out, answer[:])
	switch {
	case err != nil:
		err = errs.New(errs.Internal, "wait for the new program: %w", err)
	case si.code != cldExited || si.status != 0:
		err = errs.New(errs.FailedPrecondition, "the new program ended with status %d", si.status)
	default:
		err = fits(answer[:max(n, 0)], k.worker.version)
	}
	if err == nil {
		err = k.replace(u) // returns only if it did not come to pass
	}
	k.upgrade = nil
	u.close()
	k.logf("upgrade: %v", err)
	k.ack(u.req, err)
}

// upgradeFailed gives up on a new program that does not answer.
func (k *keeper) upgradeFailed(err error) {
	u := k.upgrade
	_ = unix.PidfdSendSignal(u.pidfd, unix.SIGKILL, nil, 0)
	k.remove(u.pidfd)
	k.upgrade = nil
	u.close() // the killed one is reaped as an orphan
	k.logf("upgrade: %v", err)
	k.ack(u.req, err)
}

// replace executes the new program in place of this one: same pid, children,
// and descriptors. The worker's socket stays as it is.
func (k *keeper) replace(u *upgrade) error {
	k.flush()
	if len(k.worker.queue) > 0 {
		return errs.New(errs.Unavailable, "the worker is behind; try again")
	}
	table, err := k.saveTable(u)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(table) }()
	keep := append(k.allFDs(), u.program, table)
	for _, fd := range keep {
		cloexec(fd, false)
	}
	argv := []string{"naru-monitor", "keeper", "--dir", k.opts.Dir, "--resume", strconv.Itoa(table)}
	k.logf("replacing the program in place")
	// A signal that comes between the programs must wait, not kill.
	goruntime.LockOSThread()
	defer goruntime.UnlockOSThread()
	var set, old unix.Sigset_t
	for s := range signalBits {
		n := uint(s.(syscall.Signal)) - 1
		set.Val[n/64] |= 1 << (n % 64)
	}
	_ = unix.PthreadSigmask(unix.SIG_BLOCK, &set, &old)
	err = syscall.Exec(fdPath(u.program), argv, environ())
	_ = unix.PthreadSigmask(unix.SIG_SETMASK, &old, nil)
	for _, fd := range keep {
		cloexec(fd, true)
	}
	return errs.New(errs.FailedPrecondition, "execute the new program: %w", err)
}

// allFDs lists every descriptor that the next program must find.
func (k *keeper) allFDs() []int {
	fds := []int{k.dir, k.exits, k.lock, k.listener}
	if k.worker.pid != 0 {
		fds = append(fds, k.worker.pidfd, k.worker.sock)
	}
	for _, e := range k.entries {
		fds = append(fds, e.fds.List()...)
	}
	return fds
}

// saveTable writes what the next program must know into a memfd.
func (k *keeper) saveTable(u *upgrade) (int, error) {
	var e wire.Encoder
	e.U32(wire.TableMax)
	e.String(k.opts.Dir)
	e.String(k.opts.Binary)
	e.Bool(k.opts.KillOnExit)
	for _, fd := range []int{k.dir, k.exits, k.lock, k.listener, u.program} {
		e.Int(fd)
	}
	e.Int(k.worker.pid)
	e.Int(k.worker.pidfd)
	e.Int(k.worker.sock)
	e.U32(k.worker.version)
	e.U64(u.req)
	e.Bool(u.worker)
	e.U64(k.count)
	e.Int(len(k.clones))
	for req, at := range k.clones {
		e.U64(req)
		e.U64(at)
	}
	e.Int(len(k.entries))
	for _, x := range k.entries {
		e.Bytes(wire.EncodeBody(&x.Entry))
		for _, fd := range x.fds {
			e.Int(fd)
		}
	}
	fd, err := unix.MemfdCreate("naru-table", unix.MFD_CLOEXEC)
	if err != nil {
		return -1, errs.New(errs.Internal, "make a memfd for the table: %w", err)
	}
	for b := e.B; len(b) > 0; {
		n, err := unix.Write(fd, b)
		if err != nil {
			_ = unix.Close(fd)
			return -1, errs.New(errs.Internal, "write the table: %w", err)
		}
		b = b[n:]
	}
	return fd, nil
}

// resume goes on with the table of the previous program. An error here is the
// end of the keeper, so it reads what it can.
func (k *keeper) resume(table int) error {
	req, worker, err := k.loadTable(table)
	_ = unix.Close(table)
	if err != nil {
		return err
	}
	for _, fd := range append(k.allFDs(), k.self) {
		cloexec(fd, true)
	}
	for _, e := range k.entries {
		if err := k.watch(e); err != nil {
			k.logf("container %s: %v", e.ID, err)
		}
	}
	if k.worker.pid == 0 {
		return k.startWorker()
	}
	k.worker.started = time.Now()
	k.worker.beatAt = k.worker.started.Add(beatEvery)
	if err := k.watchWorker(); err != nil {
		return err
	}
	k.ack(req, nil)
	if worker {
		k.restartWorker()
	}
	return nil
}

func (k *keeper) loadTable(table int) (req uint64, worker bool, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(table, &st); err != nil {
		return 0, false, errs.New(errs.Internal, "look at the table: %w", err)
	}
	b := make([]byte, st.Size)
	if n, err := unix.Pread(table, b, 0); err != nil || int64(n) != st.Size {
		return 0, false, errs.New(errs.Internal, "read the table: %d of %d bytes, %w", n, st.Size, err)
	}
	return k.parseTable(b)
}

func (k *keeper) parseTable(b []byte) (req uint64, worker bool, err error) {
	d := wire.Decoder{B: b}
	if v := d.U32(); v < wire.TableMin || v > wire.TableMax {
		return 0, false, errs.New(errs.FailedPrecondition, "table of version %d", v)
	}
	k.opts.Dir, k.opts.Binary, k.opts.KillOnExit = d.String(), d.String(), d.Bool()
	for _, p := range []*int{&k.dir, &k.exits, &k.lock, &k.listener, &k.self} {
		*p = d.Int()
	}
	w := &k.worker
	w.pid, w.pidfd, w.sock, w.version = d.Int(), d.Int(), d.Int(), d.U32()
	req, worker = d.U64(), d.Bool()
	k.count = d.U64()
	for n := d.Int(); n > 0 && d.Err() == nil; n-- {
		r := d.U64()
		k.clones[r] = d.U64()
	}
	for n := d.Int(); n > 0 && d.Err() == nil; n-- {
		e := &entry{}
		if err := wire.Unmarshal(d.Bytes(), &e.Entry); err != nil {
			d.Fail()
		}
		for i := range e.fds {
			e.fds[i] = d.Int()
		}
		if d.Err() == nil {
			k.entries[e.ID] = e
		}
	}
	if d.Err() != nil {
		return 0, false, errs.New(errs.Internal, "read the table: %w", d.Err())
	}
	return req, worker, nil
}
