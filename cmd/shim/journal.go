package main

import (
	"context"
	"os"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/naru-project/naru/internal/config"
	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/metrics"
	"github.com/naru-project/naru/runtime/monitor"
)

// journalCheck is how often the journal's socket is looked at, and the worker
// asked what it could not send.
const journalCheck = 10 * time.Second

// journalUse says whether containers' output is sent to the journal, and where
// that listens.
type journalUse struct {
	on   bool
	path string
}

func journalOf(cfg *config.Config) journalUse {
	return journalUse{on: cfg.Default.LogToJournald, path: cfg.Default.JournaldSocket}
}

// journal sees to it that the monitor's worker, which sends containers' output
// to systemd's journal and can open nothing by itself, has a socket for that. It
// works as long as there is a need; containers of before go on as they began.
type journal struct {
	monitor *monitor.Client
	metrics *metrics.Metrics
	changed chan journalUse

	// Of run only.
	journalUse
	of      unix.Stat_t // the socket that the worker is connected to
	dropped uint64      // by the present worker, as far as it was told of
	failed  bool        // it was told of
}

func newJournal(m *monitor.Client, count *metrics.Metrics, u journalUse) *journal {
	return &journal{monitor: m, metrics: count, changed: make(chan journalUse, 1), journalUse: u}
}

// use changes what is used. It does not wait for anything.
func (j *journal) use(u journalUse) {
	select {
	case <-j.changed: // not taken up yet
	default:
	}
	j.changed <- u
}

func (j *journal) run(ctx context.Context) {
	t := time.NewTicker(journalCheck)
	defer t.Stop()
	for {
		if j.on {
			err := j.check(ctx)
			if err != nil && !j.failed && ctx.Err() == nil {
				klog.ErrorS(err, "The journal does not get what containers write; their log files do", "socket", j.path)
			}
			j.failed = err != nil
		}
		select {
		case <-ctx.Done():
			return
		case u := <-j.changed:
			if u != j.journalUse {
				j.journalUse, j.of, j.failed = u, unix.Stat_t{}, false
			}
		case <-t.C:
		}
	}
}

// check connects anew where the journal has another socket than before, and
// tells of lines that it did not take.
func (j *journal) check(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, journalCheck)
	defer cancel()
	s, err := j.monitor.Journal(ctx)
	if err != nil {
		return err
	}
	if s.Dropped < j.dropped {
		j.dropped = 0 // another worker
	}
	if n := s.Dropped - j.dropped; n > 0 {
		klog.InfoS("The journal did not take all that containers write; their log files have it", "lines", n, "socket", j.path)
		j.metrics.JournalDropped(n)
	}
	j.dropped = s.Dropped
	var st unix.Stat_t
	if err := unix.Stat(j.path, &st); err != nil {
		return errs.New(errs.Unavailable, "look at the journal's socket %s: %w; is systemd-journald installed?", j.path, err)
	}
	if !s.Broken && st.Dev == j.of.Dev && st.Ino == j.of.Ino {
		return nil
	}
	sock, err := connectJournal(j.path)
	if err != nil {
		return err
	}
	if err := j.monitor.UseJournal(ctx, sock); err != nil {
		return err
	}
	j.of = st
	return nil
}

func connectJournal(path string) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, errs.New(errs.Internal, "make a socket: %w", err)
	}
	if err := unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		_ = unix.Close(fd)
		return nil, errs.New(errs.Unavailable, "connect to the journal at %s: %w; is systemd-journald running?", path, err)
	}
	return os.NewFile(uintptr(fd), "journal"), nil
}
