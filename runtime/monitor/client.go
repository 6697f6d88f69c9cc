package monitor

import (
	"context"
	"errors"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime/monitor/wire"
)

// Client speaks with the monitor of this node.
type Client struct {
	socket string
	stop   context.CancelFunc
	ctx    context.Context // the client's own life
	wg     sync.WaitGroup

	renewed atomic.Uint64 // sessions after the first

	mu      sync.Mutex
	session *session
	changed chan struct{} // closed when session changes
	failure error         // why there is no session

	exits     chan Exit
	queue     []Exit
	queued    chan struct{}
	subscribe bool

	journalMu sync.Mutex // held while the socket is sent
	journal   *os.File   // guarded by journalMu
}

// Connect connects to the monitor's socket. The connection is kept up until
// Close.
func Connect(ctx context.Context, socket string) (*Client, error) {
	c := &Client{socket: socket, changed: make(chan struct{}), exits: make(chan Exit), queued: make(chan struct{}, 1)}
	c.ctx, c.stop = context.WithCancel(context.WithoutCancel(ctx))
	s, err := open(ctx, socket, c.onExit)
	if err != nil {
		c.stop()
		return nil, err
	}
	c.session = s
	c.wg.Go(c.keepConnected)
	c.wg.Go(c.feedExits)
	return c, nil
}

// Restarts counts the workers that this client found in place of another.
func (c *Client) Restarts() uint64 { return c.renewed.Load() }

// Close ends the connection. Execs of this client are killed by the worker.
func (c *Client) Close() error {
	c.stop()
	c.mu.Lock()
	s := c.session
	c.mu.Unlock()
	if s != nil {
		s.close()
	}
	c.wg.Wait()
	c.setJournal(nil)
	return nil
}

// keepConnected opens a new session whenever the old one is lost.
func (c *Client) keepConnected() {
	delay := time.Duration(0)
	for {
		c.mu.Lock()
		s := c.session
		c.mu.Unlock()
		if s != nil {
			select {
			case <-s.done:
			case <-c.ctx.Done():
				s.close()
				<-s.done
				return
			}
			c.set(nil, errLost)
			delay = 0
		}
		select {
		case <-time.After(delay):
		case <-c.ctx.Done():
			return
		}
		// The listener outlives the worker: a new connection waits in its
		// backlog until the next worker takes it.
		ctx, cancel := context.WithTimeout(c.ctx, 10*time.Second)
		s, err := open(ctx, c.socket, c.onExit)
		cancel()
		c.set(s, err)
		delay = min(max(2*delay, 5*time.Millisecond), time.Second)
	}
}

func (c *Client) set(s *session, err error) {
	c.mu.Lock()
	c.session, c.failure = s, err
	if s != nil {
		c.renewed.Add(1)
	}
	close(c.changed)
	c.changed = make(chan struct{})
	subscribe := c.subscribe && s != nil
	c.mu.Unlock()
	if s != nil {
		c.renewJournal(s)
	}
	if subscribe {
		c.subscribeOn(s)
	}
}

// patience bounds the wait for a lost worker in a call whose context has no
// nearer end.
const patience = 30 * time.Second

// live waits for a session.
func (c *Client) live(ctx context.Context) (*session, error) {
	t := time.NewTimer(patience)
	defer t.Stop()
	for {
		c.mu.Lock()
		s, changed, failure := c.session, c.changed, c.failure
		c.mu.Unlock()
		if s != nil {
			select {
			case <-s.done: // keepConnected is about to notice
			default:
				return s, nil
			}
		}
		select {
		case <-changed:
		case <-c.ctx.Done():
			return nil, errs.New(errs.Unavailable, "the client is closed")
		case <-t.C:
			return nil, errs.New(errs.Unavailable, "the monitor does not answer: %w", failure)
		case <-ctx.Done():
			return nil, errs.New(errs.Of(ctx.Err()), "waiting for the monitor (%w): %w", errors.Join(failure), context.Cause(ctx))
		}
	}
}

// call makes a call that may be repeated, and repeats it while the worker or
// its keeper is being replaced.
func (c *Client) call(ctx context.Context, kind wire.Kind, body wire.Body, files ...*os.File) (*answer, error) {
	t := time.NewTimer(patience)
	defer t.Stop()
	for {
		s, err := c.live(ctx)
		if err != nil {
			return nil, err
		}
		a, err := s.call(ctx, kind, body, files, nil)
		switch {
		case errors.Is(err, errLost):
		case errs.Is(err, errs.Unavailable) && kind != wire.KindPing: // no keeper; the next one has a worker of its own
			select {
			case <-s.done:
			case <-t.C:
				return nil, err
			case <-ctx.Done():
				return nil, err
			}
		default:
			return a, err
		}
	}
}

// Info tells who answers at present.
func (c *Client) Info(ctx context.Context) (Info, error) {
	s, err := c.live(ctx)
	if err != nil {
		return Info{}, err
	}
	return s.info, nil
}

// Ping asks the worker for a sign of life. One without a keeper answers
// errs.Unavailable: it starts nothing.
func (c *Client) Ping(ctx context.Context) error {
	_, err := c.call(ctx, wire.KindPing, nil)
	return err
}

func kept(k *Kept) (uint32, []*os.File) {
	var mask uint32
	var files []*os.File
	for i, f := range listed(k) {
		if f != nil {
			mask |= 1 << (wire.FDStatus + i)
			files = append(files, f)
		}
	}
	return mask, files
}

// listed lists the kept files in the order of their indices from FDStatus on.
func listed(k *Kept) []*os.File {
	return []*os.File{k.Status, k.Gate, k.Stdin, k.Stdout, k.Stderr, k.Pty, k.Devpts, k.Log}
}

// Create clones the first process of a container. If the worker is lost on the
// way and the container is not there afterwards, the call fails with
// errs.Unavailable and must be repeated with a new plan and new pipes: a child
// of the first try may still wait at the old gate.
func (c *Client) Create(ctx context.Context, r CreateRequest) (Created, error) {
	mask, files := kept(&r.Kept)
	m := &wire.Create{
		ID: r.ID, Clone: wire.Clone{Flags: r.Clone.Flags, Parent: true, Cgroup: r.Clone.Cgroup},
		TwoStage: r.TwoStage, TTY: r.TTY, Slots: len(r.FDs), Kept: mask,
	}
	all := append(append([]*os.File{r.Plan}, r.FDs...), files...)
	if len(all) > wire.MaxFDs {
		return Created{}, errs.New(errs.InvalidArgument, "container %s needs %d descriptors, more than the %d that one message carries", r.ID, len(all), wire.MaxFDs)
	}
	s, err := c.live(ctx)
	if err != nil {
		return Created{}, err
	}
	a, err := s.call(ctx, wire.KindCreate, m, all, nil)
	if errors.Is(err, errLost) {
		return c.created(ctx, r.ID)
	}
	if err != nil {
		return Created{}, err
	}
	var got wire.Created
	if err := wire.Unmarshal(a.Body, &got); err != nil || len(a.fds) != 1 {
		wire.CloseAll(a.fds)
		return Created{}, errs.New(errs.Internal, "answer to create with %d files: %w", len(a.fds), err)
	}
	return Created{PID: got.PID, PIDFD: a.file("pidfd")}, nil
}

// Take makes a process of the keeper's known to it: from now on its end is
// told by Exits, and its streams are logged. The process has been started when
// Start says so. If the worker is lost on the way, the call fails with
// errs.Unavailable, and the process may or may not have been taken.
func (c *Client) Take(ctx context.Context, r TakeRequest) error {
	mask, files := kept(&r.Kept)
	s, err := c.live(ctx)
	if err != nil {
		return err
	}
	if s.info.Version < 2 {
		return errs.New(errs.FailedPrecondition, "the running naru-monitor is older than this naru and keeps no containers of OCI runtimes; upgrade it (SIGUSR2)")
	}
	m := &wire.Take{ID: r.ID, PID: r.PID, TTY: r.TTY, Kept: mask | 1<<wire.FDPid}
	a, err := s.call(ctx, wire.KindTake, m, append([]*os.File{r.PIDFD}, files...), nil)
	if err != nil {
		return err
	}
	wire.CloseAll(a.fds)
	return nil
}

// created finds out whether a container whose creator was lost exists.
func (c *Client) created(ctx context.Context, id string) (Created, error) {
	f, err := c.Files(ctx, id)
	if err != nil {
		if errs.Is(err, errs.NotFound) {
			return Created{}, errLost
		}
		return Created{}, err
	}
	r := Created{PID: f.PID, PIDFD: f.PIDFD}
	f.PIDFD = nil
	f.Close()
	return r, nil
}

// Start lets a created container execute its program. It returns when that has
// happened or failed (*plan.Error). Repeated, it does no harm.
func (c *Client) Start(ctx context.Context, id string) error {
	_, err := c.call(ctx, wire.KindStart, &wire.ID{ID: id})
	return err
}

// Attach copies the container's output, from now on, to the given write ends of
// pipes (nil: not wanted). The worker closes them at the end of the stream,
// when the container has ended, or when the reader is too slow: it gets five
// seconds to catch up, and the log does not wait for it.
func (c *Client) Attach(ctx context.Context, id string, stdout, stderr *os.File) error {
	return c.attach(ctx, id, stdout, stderr, false)
}

// AttachLossless is Attach for the one who drives the container: the copying of
// its output waits for this reader as long as it reads at all.
func (c *Client) AttachLossless(ctx context.Context, id string, stdout, stderr *os.File) error {
	return c.attach(ctx, id, stdout, stderr, true)
}

func (c *Client) attach(ctx context.Context, id string, stdout, stderr *os.File, lossless bool) error {
	var files []*os.File
	for _, f := range []*os.File{stdout, stderr} {
		if f != nil {
			files = append(files, f)
		}
	}
	if len(files) == 0 {
		return nil
	}
	_, err := c.call(ctx, wire.KindAttach, &wire.Attach{ID: id, Stdout: stdout != nil, Stderr: stderr != nil, Lossless: lossless}, files...)
	return err
}

// Files returns duplicates of what the keeper holds for the container. For a
// terminal or FIFO they share the open file with the monitor and every other
// holder: O_NONBLOCK set on one is set on all.
func (c *Client) Files(ctx context.Context, id string) (*Files, error) {
	a, err := c.call(ctx, wire.KindFiles, &wire.ID{ID: id})
	if err != nil {
		return nil, err
	}
	var m wire.Mask
	var fds wire.FDs
	if err := wire.Unmarshal(a.Body, &m); err != nil || !fds.Fill(m.Mask, a.fds) {
		wire.CloseAll(a.fds)
		return nil, errs.New(errs.Internal, "answer to files with %d files for the mask %#x: %w", len(a.fds), m.Mask, err)
	}
	file := func(i int, name string) *os.File {
		if fds[i] < 0 {
			return nil
		}
		return os.NewFile(uintptr(fds[i]), name)
	}
	f := &Files{
		PID: m.PID, TTY: m.TTY,
		PIDFD: file(wire.FDPid, "pidfd"), Stdin: file(wire.FDStdin, "stdin"), Pty: file(wire.FDPty, "terminal"),
		Devpts: file(wire.FDDevpts, "devpts"), Log: file(wire.FDLog, "log"),
	}
	return f, nil
}

// SetLog makes the container log to another file; nil: nowhere. When it
// returns, no byte goes to the old one any more.
func (c *Client) SetLog(ctx context.Context, id string, f *os.File) error {
	m := &wire.Flag{ID: id, On: f != nil}
	var err error
	if f == nil {
		_, err = c.call(ctx, wire.KindSetLog, m)
	} else {
		_, err = c.call(ctx, wire.KindSetLog, m, f)
	}
	return err
}

// CloseStdin closes the write end of the container's stdin that keeper and
// worker hold. The container sees the end of its input when no other
// duplicate (Files) is open.
func (c *Client) CloseStdin(ctx context.Context, id string) error {
	_, err := c.call(ctx, wire.KindCloseStdin, &wire.ID{ID: id})
	return err
}

// Delete drops a container with its exit file and log state. One that lives is
// killed first. Repeated, it does no harm.
func (c *Client) Delete(ctx context.Context, id string) error {
	_, err := c.call(ctx, wire.KindDelete, &wire.Flag{ID: id, On: true})
	return err
}

// DeleteEnded is Delete, but fails with errs.FailedPrecondition while the
// container lives.
func (c *Client) DeleteEnded(ctx context.Context, id string) error {
	_, err := c.call(ctx, wire.KindDelete, &wire.Flag{ID: id})
	return err
}

// List returns all containers that have not been deleted.
func (c *Client) List(ctx context.Context) ([]Entry, error) {
	for {
		s, err := c.live(ctx)
		if err != nil {
			return nil, err
		}
		l, err := s.list(ctx)
		if !errors.Is(err, errLost) {
			return l, err
		}
	}
}

func (s *session) list(ctx context.Context) ([]Entry, error) {
	req, w, err := s.begin(wire.KindList, nil, nil, nil)
	if err != nil {
		return nil, err
	}
	var all []Entry
	for {
		a, err := s.await(ctx, req, w, nil)
		if err != nil {
			return nil, err
		}
		var part wire.Entries
		if err := wire.Unmarshal(a.Body, &part); err != nil {
			return nil, errs.New(errs.Internal, "list of the monitor: %w", err)
		}
		for i := range part.List {
			e := &part.List[i]
			x := Entry{ID: e.ID, PID: e.PID, TTY: e.TTY, Started: e.Started, Adopted: e.Adopted, Dropped: e.Dropped}
			if e.Exit != nil {
				exit := exitFrom(e.Exit)
				x.Exit = &exit
			}
			all = append(all, x)
		}
		if !a.More {
			return all, nil
		}
	}
}

// Upgrade replaces the keeper's program in place, by that in f, or (nil) by
// what lies at its own path. Worker and containers do not notice. If the new
// program cannot take over, the old one stays and the error says why.
func (c *Client) Upgrade(ctx context.Context, f *os.File) error {
	s, err := c.live(ctx)
	if err != nil {
		return err
	}
	var files []*os.File
	if f != nil {
		files = append(files, f)
	}
	_, err = s.call(ctx, wire.KindUpgrade, &wire.Flag{On: f != nil}, files, nil)
	return err
}

// RestartWorker has the keeper start a new worker from its own program.
// Running execs are lost.
func (c *Client) RestartWorker(ctx context.Context) error {
	s, err := c.live(ctx)
	if err != nil {
		return err
	}
	if _, err = s.call(ctx, wire.KindRestartWorker, nil, nil, nil); err != nil && !errors.Is(err, errLost) {
		return err
	}
	select {
	case <-s.done:
		return nil
	case <-ctx.Done():
		return errs.New(errs.Of(ctx.Err()), "waiting for the worker to end: %w", context.Cause(ctx))
	}
}

// Binary returns the sealed memfd from which the monitor runs, for the pod
// init (`naru-monitor pause`).
func (c *Client) Binary(ctx context.Context) (*os.File, error) {
	a, err := c.call(ctx, wire.KindBinary, nil)
	if err != nil {
		return nil, err
	}
	f := a.file("naru-monitor")
	wire.CloseAll(a.fds)
	if f == nil {
		return nil, errs.New(errs.Internal, "answer to binary without a file")
	}
	return f, nil
}
