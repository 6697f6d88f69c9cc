package ocicli

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
)

// console is the socket to which a runtime sends the other end of a terminal
// that it has made in the container (--console-socket).
type console struct {
	path string
	l    *net.UnixListener
}

func (o *Executor) newConsole() (*console, error) {
	var b [6]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	p := filepath.Join(o.consoleDir(), hex.EncodeToString(b[:]))
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: p, Net: "unix"})
	if err != nil {
		return nil, errs.New(errs.Internal, "listen for a terminal: %w", err)
	}
	l.SetUnlinkOnClose(true)
	return &console{path: p, l: l}, nil
}

func (c *console) close() { _ = c.l.Close() }

// lateTime is how long a terminal that was sent already is looked for when
// ctx has ended: a short command ends before its terminal was taken.
const lateTime = 200 * time.Millisecond

// receive takes the terminal. The runtime has sent it before its program ends.
func (c *console) receive(ctx context.Context) (*os.File, error) {
	stop := context.AfterFunc(ctx, func() { _ = c.l.SetDeadline(time.Now().Add(lateTime)) })
	defer stop()
	conn, err := c.l.AcceptUnix()
	if err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, errs.New(errs.Internal, "wait for the terminal: %w", err)
	}
	defer func() { _ = conn.Close() }()
	stopRead := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now().Add(lateTime)) })
	defer stopRead()
	oob := make([]byte, unix.CmsgSpace(4*4))
	_, n, _, _, err := conn.ReadMsgUnix(make([]byte, 4096), oob)
	if err != nil {
		return nil, errs.New(errs.Internal, "receive the terminal: %w", err)
	}
	return terminalOf(oob[:n])
}

// terminalOf takes the one terminal out of a control message.
func terminalOf(oob []byte) (*os.File, error) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, errs.New(errs.Internal, "receive the terminal: %w", err)
	}
	var fds []int
	for i := range msgs {
		if got, err := unix.ParseUnixRights(&msgs[i]); err == nil {
			fds = append(fds, got...)
		}
	}
	for _, fd := range fds {
		unix.CloseOnExec(fd)
	}
	ok := len(fds) == 1
	if ok {
		_, err := unix.IoctlGetWinsize(fds[0], unix.TIOCGWINSZ)
		ok = err == nil
	}
	if !ok {
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
		return nil, errs.New(errs.Internal, "the runtime sent %d descriptors where one terminal was expected", len(fds))
	}
	if err := syscall.SetNonblock(fds[0], true); err != nil {
		_ = unix.Close(fds[0])
		return nil, errs.New(errs.Internal, "use the terminal: %w", err)
	}
	return os.NewFile(uintptr(fds[0]), "ptmx"), nil
}
