package keeper

import (
	"io"
	"os"
	"path/filepath"
	goruntime "runtime"
	"runtime/debug"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/failpoint"
	"github.com/naru-project/naru/runtime/monitor/wire"
)

const wantSeals = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE

// Sealed reports whether this program runs from a sealed memfd.
func Sealed() bool {
	fd, err := openSelf()
	if err != nil {
		return false
	}
	defer func() { _ = unix.Close(fd) }()
	seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	return err == nil && seals&wantSeals == wantSeals
}

func openSelf() (int, error) {
	fd, err := unix.Open("/proc/self/exe", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, errs.New(errs.Internal, "open the own program: %w", err)
	}
	return fd, nil
}

// Reexec replaces the process by the same program in a sealed memfd, so that
// no container can reach the file on disk through /proc/PID/exe
// (CVE-2019-5736). args follow the program's name. It returns only on failure.
func Reexec(args []string) error {
	src, err := openSelf()
	if err != nil {
		return err
	}
	fd, err := Seal(src)
	if err != nil {
		return err
	}
	// What a careless parent left open ends here.
	if err := unix.CloseRange(3, ^uint(0)>>32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return errs.New(errs.Internal, "close inherited descriptors: %w", err)
	}
	argv := append([]string{"naru-monitor"}, args...)
	err = syscall.Exec(fdPath(fd), argv, environ())
	return errs.New(errs.Internal, "execute the sealed program: %w", err)
}

// environ is all that keeper and worker get of the environment.
//
// asyncpreemptoff: the signal that preempts a goroutine leaves the registers
// with which output is being moved in its frame, on the Go heap, and so in the
// memory of the next container's first process. What the worker runs yields at
// function calls often enough. disablethp: where huge pages are the default
// (Debian), each heap would begin with one or two of 2 MiB.
func environ() []string {
	env := []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "GODEBUG=asyncpreemptoff=1,disablethp=1"}
	if v, ok := os.LookupEnv("GOCOVERDIR"); ok {
		env = append(env, "GOCOVERDIR="+v)
	}
	return append(env, failpoint.Environ()...)
}

func fdPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// Seal copies a program into a sealed memfd.
func Seal(src int) (int, error) {
	fd, err := unix.MemfdCreate("naru-monitor", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_EXEC)
	if err == unix.EINVAL { // MFD_EXEC is from Linux 6.3
		fd, err = unix.MemfdCreate("naru-monitor", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	}
	if err != nil {
		return -1, errs.New(errs.Internal, "make a memfd for the program: %w", err)
	}
	if err := copyProgram(fd, src); err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_EXEC); err != nil && err != unix.EINVAL {
		_ = unix.Close(fd)
		return -1, errs.New(errs.Internal, "seal the program: %w", err)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, wantSeals); err != nil {
		_ = unix.Close(fd)
		return -1, errs.New(errs.Internal, "seal the program: %w", err)
	}
	return fd, nil
}

func copyProgram(dst, src int) error {
	var off int64
	for {
		n, err := unix.Sendfile(dst, src, &off, 1<<30)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return errs.New(errs.Internal, "copy the program: %w", err)
		case n == 0 && off == 0:
			return errs.New(errs.InvalidArgument, "the program is empty")
		case n == 0:
			return nil
		}
	}
}

// harden makes the process a keeper's.
func harden() error {
	goruntime.GOMAXPROCS(2) // one loop and the signals; more would only cost memory
	if err := quiet("naru-monitor"); err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return errs.New(errs.Internal, "become a subreaper: %w", err)
	}
	return nil
}

// quiet sets what keeper and guard have in common: little memory, nothing for
// others to read, the last ones to be killed for memory.
func quiet(name string) error {
	debug.SetGCPercent(20)
	unix.Umask(0o077)
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return errs.New(errs.Internal, "become non-dumpable: %w", err)
	}
	// Run from a memfd, a process is otherwise called by the descriptor's number.
	_ = os.WriteFile("/proc/self/comm", []byte(name), 0)
	// Without CAP_SYS_RESOURCE a value below the inherited one is refused.
	_ = os.WriteFile("/proc/self/oom_score_adj", []byte("-999"), 0)
	return nil
}

// openFolder opens and locks the keeper's folder.
func (k *keeper) openFolder() error {
	dir := k.opts.Dir
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return errs.New(errs.Internal, "make the folder: %w", err)
	}
	var err error
	if k.dir, err = unix.Open(dir, unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		return errs.New(errs.Internal, "open %s: %w", dir, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(k.dir, &st); err != nil {
		return errs.New(errs.Internal, "look at %s: %w", dir, err)
	}
	if int(st.Uid) != os.Geteuid() {
		return errs.New(errs.FailedPrecondition, "%s belongs to uid %d, not to this user", dir, st.Uid)
	}
	if st.Mode&0o077 != 0 {
		if err := unix.Fchmod(k.dir, 0o700); err != nil {
			return errs.New(errs.Internal, "close %s to others: %w", dir, err)
		}
	}
	if err := unix.Mkdirat(k.dir, "exits", 0o700); err != nil && err != unix.EEXIST {
		return errs.New(errs.Internal, "make %s/exits: %w", dir, err)
	}
	if k.exits, err = unix.Openat(k.dir, "exits", unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0); err != nil {
		return errs.New(errs.Internal, "open %s/exits: %w", dir, err)
	}
	if k.lock, err = unix.Openat(k.dir, "lock", unix.O_CREAT|unix.O_RDWR|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600); err != nil {
		return errs.New(errs.Internal, "open %s/lock: %w", dir, err)
	}
	// A lock of the open file (F_OFD_SETLK, fcntl(2)): it goes with the program
	// that replaces this one, and others can ask for it without taking it.
	l := unix.Flock_t{Type: unix.F_WRLCK}
	if err := unix.FcntlFlock(uintptr(k.lock), unix.F_OFD_SETLK, &l); err != nil {
		return errs.New(errs.AlreadyExists, "lock %s: another keeper runs there (%w)", dir, err)
	}
	return nil
}

// takeOver gets listener and containers from the worker that a killed keeper
// left, or else makes a listener.
func (k *keeper) takeOver() error {
	conn, err := wire.Dial(filepath.Join(k.opts.Dir, "monitor.sock"))
	if err == nil {
		err = k.askWorker(conn)
		_ = conn.Close()
		if err != nil {
			k.logf("handover: %v", err)
		}
	}
	if k.listener >= 0 {
		return nil
	}
	return k.listen()
}

// askWorker speaks with the worker of a dead keeper. The containers that came
// over are kept even if it fails half-way; the worker ends in any case.
func (k *keeper) askWorker(conn *wire.Conn) error {
	pidfd := -1
	defer func() {
		if pidfd >= 0 {
			_ = conn.Close() // it waits for that
			waitDead(pidfd)
			_ = unix.Close(pidfd)
		}
	}()
	// A worker that hangs must not keep the node without a keeper.
	timer := time.AfterFunc(20*time.Second, func() { _ = conn.Close() })
	defer timer.Stop()
	if err := conn.Send(wire.Marshal(wire.KindHandover, 1, nil), nil, time.Second); err != nil {
		return err
	}
	for {
		p, err := conn.Recv(k.buf)
		if err != nil {
			return err
		}
		switch p.Kind {
		case wire.KindListener: // comes first, with the worker's own pidfd
			if len(p.FDs) == 2 && k.listener < 0 {
				k.listener, pidfd, p.FDs = p.FDs[0], p.FDs[1], nil
			}
		case wire.KindEntry:
			k.adopt(&p)
		case wire.KindEntriesEnd:
			k.logf("took over %d containers", len(k.entries))
			return nil
		case wire.KindReply:
			var r wire.Reply
			_ = wire.Unmarshal(p.Body, &r)
			p.Close()
			return errs.New(r.Class, "%s", r.Text)
		}
		p.Close()
	}
}

func waitDead(pidfd int) {
	p := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	if n, _ := unix.Poll(p, 5000); n == 1 {
		return
	}
	_ = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0)
	_, _ = unix.Poll(p, 5000)
}

// adopt takes one container of a dead keeper.
func (k *keeper) adopt(p *wire.Packet) {
	e := &entry{}
	if err := wire.Unmarshal(p.Body, &e.Entry); err != nil || !wire.ValidID(e.ID) || k.entries[e.ID] != nil || !e.fds.Fill(e.Mask, p.FDs) {
		k.logf("handover: a container could not be taken over")
		return
	}
	p.FDs = nil
	e.Adopted = true
	k.entries[e.ID] = e
}

// listen makes the socket under another name and moves it into place: a stale
// one is replaced, and nobody finds a socket that does not answer.
func (k *keeper) listen() error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return errs.New(errs.Internal, "make a socket: %w", err)
	}
	k.listener = fd
	const tmp = ".monitor.sock.new"
	_ = unix.Unlinkat(k.dir, tmp, 0)
	// Through the descriptor, because the folder's path may be too long for sun_path.
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: fdPath(k.dir) + "/" + tmp}); err != nil {
		return errs.New(errs.Internal, "bind the socket: %w", err)
	}
	if err := unix.Fchmodat(k.dir, tmp, 0o600, 0); err != nil {
		return errs.New(errs.Internal, "close the socket to others: %w", err)
	}
	if err := unix.Listen(fd, 128); err != nil {
		return errs.New(errs.Internal, "listen: %w", err)
	}
	if err := unix.Renameat(k.dir, tmp, k.dir, "monitor.sock"); err != nil {
		return errs.New(errs.Internal, "move the socket into place: %w", err)
	}
	return nil
}

// loadExits makes entries of the exits that an earlier keeper wrote and nobody
// has deleted yet.
func (k *keeper) loadExits() {
	fd, err := unix.Openat(k.exits, ".", unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		k.logf("read exits: %v", err)
		return
	}
	f := os.NewFile(uintptr(fd), "exits")
	defer func() { _ = f.Close() }()
	names, err := f.Readdirnames(-1)
	if err != nil {
		k.logf("read exits: %v", err)
	}
	for _, name := range names {
		if !wire.ValidID(name) {
			_ = unix.Unlinkat(k.exits, name, 0) // a temporary file
			continue
		}
		x, err := k.readExit(name)
		if err != nil {
			k.logf("exit file of %s: %v; reported as unknown", name, err)
			x = &wire.Exit{ID: name, Unknown: true, Status: 255, Time: time.Now().UnixNano()}
		}
		if e := k.entries[name]; e != nil {
			e.Exit = x
			continue
		}
		k.entries[name] = &entry{Entry: wire.Entry{ID: name, PID: x.PID, Started: true, Adopted: true, Exit: x}, fds: wire.NoFDs()}
	}
}

func (k *keeper) readExit(id string) (*wire.Exit, error) {
	fd, err := unix.Openat(k.exits, id, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), id)
	defer func() { _ = f.Close() }()
	p, err := io.ReadAll(io.LimitReader(f, 4096))
	if err != nil {
		return nil, err
	}
	return wire.ParseExitFile(id, p)
}
