package stats

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/sys"
	"github.com/naru-project/naru/runtime"
)

// What is looked at of one container, however many processes it starts and
// files it opens to make that slow.
const (
	maxProcesses   = 2048
	maxDescriptors = 8192
)

// Subject is a container whose details are asked for.
type Subject struct {
	Cgroup string   // as in Get
	First  int      // pid of its first process
	Proc   *os.File // root of the procfs in which that pid is meant
}

// Detailed is Get with the details that only metrics tell. They belong to the
// same sample: where it is fresh, only they are read.
func (s *Sampler) Detailed(ctx context.Context, of Subject) (*runtime.Stats, error) {
	st, err := s.Get(ctx, of.Cgroup)
	if err != nil || st.Details != nil {
		return st, err
	}
	e := s.entry(of.Cgroup, s.now())
	if err := e.lock(ctx, of.Cgroup); err != nil {
		return nil, err
	}
	defer e.unlock()
	// Whoever had the turn before may have read them.
	if last := e.last.Load(); last != nil {
		if st = last; st.Details != nil {
			return st, nil
		}
	}
	d, err := s.readDetails(ctx, of, st.IO)
	if err != nil {
		return nil, err
	}
	with := *st
	with.Details = d
	e.last.Store(&with)
	return &with, nil
}

func (s *Sampler) readDetails(ctx context.Context, of Subject, io *runtime.IOStats) (*runtime.Details, error) {
	buf := s.buffers.Get().(*[]byte)
	defer s.buffers.Put(buf)
	r := reader{layout: &s.layout, rel: of.Cgroup[1:], buf: *buf}
	d := &runtime.Details{Time: s.now()}
	if r.layout.v2 {
		d.Reservation = limit(r.file(r.layout.psi, "memory.min"))
	} else {
		d.Reservation = limit(r.file(r.layout.memory, "memory.soft_limit_in_bytes"))
	}
	if io != nil {
		for _, dev := range io.Devices {
			d.Devices = append(d.Devices, deviceName(dev.Major, dev.Minor))
		}
	}
	pids, err := s.processes(ctx, of.Cgroup)
	switch {
	case errs.Is(err, errs.ResourceExhausted): // too many to count
		return d, nil
	case err != nil:
		return nil, err
	}
	d.Processes, d.HasProcesses = uint64(len(pids)), true
	proc := sys.FD(of.Proc)
	r.descriptors(ctx, proc, pids, d)
	// The pid is known to be the container's: it is in its cgroup.
	if slices.Contains(pids, of.First) {
		d.OpenFiles, d.HasOpenFiles = parseOpenFiles(r.fileAt(proc, strconv.Itoa(of.First)+"/limits"))
	}
	return d, nil
}

// deviceName is the device's name in /dev, as sysfs has it: the last element of
// the link in /sys/dev/block, with "!" for "/". A device that is gone goes by
// its number.
func deviceName(major, minor uint64) string {
	number := strconv.FormatUint(major, 10) + ":" + strconv.FormatUint(minor, 10)
	var link [512]byte
	n, err := unix.Readlinkat(unix.AT_FDCWD, "/sys/dev/block/"+number, link[:])
	if err != nil || n <= 0 || n == len(link) {
		return number
	}
	return "/dev/" + strings.ReplaceAll(path.Base(string(link[:n])), "!", "/")
}

// descriptors counts what the processes have open, and how many of it are
// sockets. For that each must be looked at, some 5 µs a piece; beyond the bound
// the number of sockets is not known. A process that ends meanwhile has none, one
// that may not be looked at leaves both unknown.
func (r *reader) descriptors(ctx context.Context, proc int, pids []int, d *runtime.Details) {
	if len(pids) > maxProcesses {
		return
	}
	d.HasDescriptors, d.HasSockets = true, true
	for _, pid := range pids {
		err := ctx.Err()
		if err == nil {
			err = r.descriptorsOf(proc, pid, d)
		}
		if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ESRCH) {
			d.HasDescriptors, d.HasSockets = false, false
			return
		}
	}
}

func (r *reader) descriptorsOf(proc, pid int, d *runtime.Details) error {
	dir, err := unix.Openat(proc, strconv.Itoa(pid)+"/fd", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	var st unix.Stat_t
	if err := unix.Fstat(dir, &st); err != nil {
		return err
	}
	size := uint64(st.Size) // the number of descriptors from 6.2, else 0
	if !d.HasSockets || d.Descriptors+size > maxDescriptors {
		d.HasSockets = false
		d.HasDescriptors = d.HasDescriptors && size > 0
		d.Descriptors += size
		return nil
	}
	all, sockets, err := r.lookAt(dir, maxDescriptors-d.Descriptors)
	d.Descriptors, d.Sockets = d.Descriptors+all, d.Sockets+sockets
	return err
}

// lookAt counts the descriptors of a folder of /proc, at most most of them.
func (r *reader) lookAt(dir int, most uint64) (all, sockets uint64, err error) {
	var names []string
	for {
		n, err := unix.ReadDirent(dir, r.buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil || n <= 0 {
			return all, sockets, err
		}
		_, _, names = unix.ParseDirent(r.buf[:n], -1, names[:0])
		if all += uint64(len(names)); all > most {
			return all, sockets, unix.E2BIG
		}
		for _, name := range names {
			var link [8]byte // of "socket:[1234]" the beginning is enough
			if n, err := unix.Readlinkat(dir, name, link[:]); err == nil && bytes.HasPrefix(link[:n], []byte("socket:")) {
				sockets++
			}
		}
	}
}

// parseOpenFiles finds the soft limit of open files in /proc/PID/limits, whose
// columns are name, soft limit, hard limit, unit. "unlimited" is no number, and
// no kernel has it for open files.
func parseOpenFiles(b []byte) (uint64, bool) {
	for len(b) > 0 {
		var l []byte
		l, b = line(b)
		if rest, ok := bytes.CutPrefix(l, []byte("Max open files ")); ok {
			soft, _ := word(rest)
			return number(soft)
		}
	}
	return 0, false
}
