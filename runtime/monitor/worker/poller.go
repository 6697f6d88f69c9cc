package worker

import (
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
)

// poller waits for many descriptors with one goroutine. Its own epoll
// descriptor is in Go's poller, so even that goroutine needs no thread. All
// waits are edge-triggered: a callback hears of each change once.
type poller struct {
	fd int
	rc syscall.RawConn

	mu    sync.Mutex
	next  int32
	calls map[int32]func(events uint32)
}

func newPoller() (*poller, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, errs.New(errs.Internal, "make an epoll: %w", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, errs.New(errs.Internal, "make the epoll non-blocking: %w", err)
	}
	rc, err := os.NewFile(uintptr(fd), "epoll").SyscallConn()
	if err != nil {
		return nil, errs.New(errs.Internal, "use the epoll: %w", err)
	}
	p := &poller{fd: fd, rc: rc, calls: map[int32]func(uint32){}}
	go p.run()
	return p, nil
}

func (p *poller) run() {
	events := make([]unix.EpollEvent, 64)
	for {
		n := 0
		err := p.rc.Read(func(fd uintptr) bool {
			var err error
			n, err = unix.EpollWait(int(fd), events, 0)
			return n > 0 || err != nil && err != unix.EINTR
		})
		if err != nil || n < 0 {
			logf("poller ends: %v", err)
			os.Exit(1) // the next worker does better
		}
		for _, ev := range events[:n] {
			p.mu.Lock()
			call := p.calls[ev.Fd]
			p.mu.Unlock()
			if call != nil {
				call(ev.Events)
			}
		}
	}
}

// watch calls f, which must not block, at each change of fd. The result names
// the watch.
func (p *poller) watch(fd int, events uint32, f func(events uint32)) (int32, error) {
	p.mu.Lock()
	for {
		p.next++
		if _, taken := p.calls[p.next]; !taken && p.next > 0 {
			break
		}
		if p.next < 0 {
			p.next = 0
		}
	}
	token := p.next
	p.calls[token] = f
	p.mu.Unlock()
	// The token takes the place of the descriptor: numbers of descriptors are
	// used again while events of the old one are under way.
	ev := unix.EpollEvent{Events: events | unix.EPOLLET, Fd: token}
	if err := unix.EpollCtl(p.fd, unix.EPOLL_CTL_ADD, fd, &ev); err != nil {
		p.forget(token)
		return 0, errs.New(errs.Internal, "watch a descriptor: %w", err)
	}
	return token, nil
}

// unwatch ends a watch. It must come before fd is closed: other processes hold
// the file open too, so the kernel would go on reporting it.
func (p *poller) unwatch(fd int, token int32) {
	_ = unix.EpollCtl(p.fd, unix.EPOLL_CTL_DEL, fd, nil)
	p.forget(token)
}

func (p *poller) forget(token int32) {
	p.mu.Lock()
	delete(p.calls, token)
	p.mu.Unlock()
}

// wait waits until fd is readable. false: the deadline has passed.
func (p *poller) wait(fd int, deadline time.Time) (bool, error) {
	ch := make(chan struct{}, 1)
	token, err := p.watch(fd, unix.EPOLLIN, func(uint32) {
		select {
		case ch <- struct{}{}:
		default:
		}
	})
	if err != nil {
		return false, err
	}
	defer p.unwatch(fd, token)
	t := time.NewTimer(time.Until(deadline))
	defer t.Stop()
	select {
	case <-ch:
		return true, nil
	case <-t.C:
		return false, nil
	}
}
