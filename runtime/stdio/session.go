package stdio

import (
	"context"
	"errors"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/sys"
	"github.com/naru-project/naru/runtime"
)

// Session holds both ends of an exec's streams.
type Session struct {
	Child  [3]*os.File // the process's ends: closed by Start, once it has them
	st     runtime.Streams
	stdin  *os.File
	output [2]*os.File
	master *os.File
	end    Ending
	wg     sync.WaitGroup // copies of output
	done   chan struct{}
}

// NewTerminal makes the session of a process that has slave as its terminal.
func NewTerminal(st runtime.Streams, master, slave *os.File) *Session {
	return &Session{st: st, done: make(chan struct{}), master: master, Child: [3]*os.File{slave, slave, slave}}
}

// NewSession makes the session of a process without a terminal, whose pipes
// belong to uid and gid.
func NewSession(st runtime.Streams, uid, gid int) (_ *Session, err error) {
	s := &Session{st: st, done: make(chan struct{})}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	null := func() (*os.File, error) { return os.OpenFile(os.DevNull, os.O_RDWR, 0) }
	if st.Stdin != nil {
		s.stdin, s.Child[0], err = sys.Pipe(false)
	} else {
		s.Child[0], err = null()
	}
	for i, w := range []io.Writer{st.Stdout, st.Stderr} {
		if err != nil {
			break
		}
		if w != nil {
			s.output[i], s.Child[i+1], err = sys.Pipe(true)
		} else {
			s.Child[i+1], err = null()
		}
	}
	if err != nil {
		return nil, errs.New(errs.Internal, "make the streams: %w", err)
	}
	for i, f := range s.Child {
		if (i == 0 && s.stdin != nil) || (i > 0 && s.output[i-1] != nil) {
			if err := f.Chown(uid, gid); err != nil {
				return nil, errs.New(errs.Internal, "chown a stream: %w", err)
			}
		}
	}
	return s, nil
}

// Start copies between the person and the process.
func (s *Session) Start(ctx context.Context) {
	s.closeChild()
	if s.master != nil {
		s.wg.Go(func() { s.end.Copy(s.st.Stdout, s.master) })
		if s.st.Stdin != nil {
			go func() { _, _ = io.Copy(s.master, s.st.Stdin) }()
		}
		go Resize(ctx, s.master, s.st.Resize, s.done)
		return
	}
	for i, w := range []io.Writer{s.st.Stdout, s.st.Stderr} {
		if s.output[i] != nil {
			s.wg.Go(func() { s.end.Copy(w, s.output[i]) })
		}
	}
	if s.stdin != nil {
		go func() {
			// Ends with the client's stream; what it closes is this end only.
			_, _ = io.Copy(s.stdin, s.st.Stdin)
			_ = s.stdin.Close()
		}()
	}
}

// CopyOutput copies all of a stream; w may be nil.
func CopyOutput(w io.Writer, r *os.File) {
	if w == nil {
		w = io.Discard
	}
	_, _ = io.Copy(w, r)
}

// Resize follows the size of the person's window.
func Resize(ctx context.Context, master *os.File, sizes <-chan runtime.Size, done <-chan struct{}) {
	if sizes == nil {
		return
	}
	for {
		select {
		case <-ctx.Done():
			return
		case <-done:
			return
		case z, ok := <-sizes:
			if !ok {
				return
			}
			if z.Width == 0 || z.Height == 0 {
				continue
			}
			_ = setSize(master, z)
		}
	}
}

func setSize(master *os.File, z runtime.Size) error {
	rc, err := master.SyscallConn()
	if err != nil {
		return err
	}
	var ierr error
	err = rc.Control(func(fd uintptr) {
		ierr = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: z.Height, Col: z.Width})
	})
	return errors.Join(err, ierr)
}

// Drain lets the output reach the person, when the process has ended.
func (s *Session) Drain() {
	s.end.Set(s.master, s.output[0], s.output[1])
	s.wg.Wait()
}

func (s *Session) closeChild() {
	for i, f := range s.Child {
		if f != nil {
			_ = f.Close()
			s.Child[i] = nil
		}
	}
}

// Close releases what is open.
func (s *Session) Close() {
	select {
	case <-s.done:
	default:
		close(s.done)
	}
	s.closeChild()
	for _, f := range []*os.File{s.stdin, s.output[0], s.output[1], s.master} {
		if f != nil {
			_ = f.Close()
		}
	}
	s.wg.Wait()
}
