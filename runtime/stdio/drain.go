package stdio

import (
	"errors"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// MaxOutput is how much of each stream a Capture keeps; the rest is read and
	// thrown away (CRI: ExecSyncResponse; 16 MiB is the gRPC limit's worth).
	MaxOutput = 16 << 20
	// DrainTime is how long output is still read after the process has ended: a
	// child it left behind may hold the pipe open for ever.
	DrainTime = 250 * time.Millisecond
)

// maxTail bounds what is read of a stream after its process has ended: the
// largest that a pipe holds by default (fs.pipe-max-size).
const maxTail = 1 << 20

// Ending copies the output of a process, and its rest when the process has
// ended: what lies in the pipe then is delivered however slowly it is taken,
// what a process that was left behind goes on writing is not waited for.
type Ending struct{ at atomic.Pointer[time.Time] }

// Set says that the process has ended; files are those that are copied from.
func (e *Ending) Set(files ...*os.File) {
	t := time.Now().Add(DrainTime)
	e.at.Store(&t)
	for _, f := range files {
		if f != nil {
			_ = f.SetReadDeadline(t) // wakes who reads
		}
	}
}

// copyBuffers are for output on its way: an exec probe has two streams and
// hardly a byte in them.
var copyBuffers = sync.Pool{New: func() any { return new([32 << 10]byte) }}

// Copy copies until the stream or the time after the process's end is over.
func (e *Ending) Copy(w io.Writer, r *os.File) {
	if w == nil {
		w = io.Discard
	}
	b := copyBuffers.Get().(*[32 << 10]byte)
	defer copyBuffers.Put(b)
	buf := b[:]
	for tail := 0; ; {
		at := e.at.Load()
		if at != nil {
			now := time.Now()
			if tail > maxTail || (now.After(*at) && !readable(r)) {
				return
			}
			if now.After(*at) {
				_ = r.SetReadDeadline(now.Add(DrainTime)) // there is something, it will not wait
			} else {
				_ = r.SetReadDeadline(*at)
			}
		}
		n, err := r.Read(buf)
		if n > 0 {
			if _, werr := w.Write(buf[:n]); werr != nil {
				_ = r.Close() // nobody listens: the writer learns it as from any pipe
				return
			}
			if at != nil {
				tail += n
			}
		}
		if err != nil && !(errors.Is(err, os.ErrDeadlineExceeded) && e.at.Load() != nil) {
			return // the end of a terminal is EIO
		}
	}
}

// readable reports whether a read would find something at once. For a terminal
// poll(2) also sees what lies in its line discipline's buffers.
func readable(f *os.File) bool {
	rc, err := f.SyscallConn()
	if err != nil {
		return false
	}
	yes := false
	_ = rc.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, 0)
		yes = err == nil && n > 0 && fds[0].Revents&unix.POLLIN != 0
	})
	return yes
}
