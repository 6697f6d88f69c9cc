package monitor

import (
	"context"
	"os"
	"time"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/runtime/monitor/wire"
)

// JournalStatus tells how it goes with the journal.
type JournalStatus struct {
	Dropped uint64 // lines that this worker could not send
	Broken  bool   // the socket leads nowhere: it needs another one
}

// journalVersion is the version of the protocol from which on there is a journal.
const journalVersion = 3

// UseJournal gives the worker, and those that come after it, a socket that is
// connected to the journal. The client keeps the file; the one before is closed.
func (c *Client) UseJournal(ctx context.Context, sock *os.File) error {
	c.setJournal(sock)
	s, err := c.live(ctx)
	if err != nil {
		return err
	}
	return c.journalOn(ctx, s)
}

func (c *Client) setJournal(sock *os.File) {
	c.journalMu.Lock()
	defer c.journalMu.Unlock()
	if c.journal != nil {
		_ = c.journal.Close()
	}
	c.journal = sock
}

// journalOn gives a session the socket.
func (c *Client) journalOn(ctx context.Context, s *session) error {
	c.journalMu.Lock()
	defer c.journalMu.Unlock()
	if c.journal == nil || s.info.Version < journalVersion {
		return nil // Journal and JournalFields say so
	}
	_, err := s.call(ctx, wire.KindJournal, nil, []*os.File{c.journal}, nil)
	return err
}

// renewJournal is journalOn of a new session, on which nobody waits.
func (c *Client) renewJournal(s *session) {
	ctx, cancel := context.WithTimeout(c.ctx, 10*time.Second)
	defer cancel()
	_ = c.journalOn(ctx, s)
}

// Journal tells how it goes with the journal.
func (c *Client) Journal(ctx context.Context) (JournalStatus, error) {
	if err := c.journalKnown(ctx); err != nil {
		return JournalStatus{}, err
	}
	a, err := c.call(ctx, wire.KindJournal, nil)
	if err != nil {
		return JournalStatus{}, err
	}
	var m wire.Journal
	if err := wire.Unmarshal(a.Body, &m); err != nil {
		return JournalStatus{}, errs.New(errs.Internal, "answer about the journal: %w", err)
	}
	return JournalStatus{Dropped: m.Dropped, Broken: m.Broken}, nil
}

// JournalFields has the output of a container sent to the journal, too, each
// line with these fields, which are in its native protocol. It goes on so until
// the container is deleted.
func (c *Client) JournalFields(ctx context.Context, id string, fields []byte) error {
	if err := c.journalKnown(ctx); err != nil {
		return err
	}
	_, err := c.call(ctx, wire.KindJournalFields, &wire.JournalFields{ID: id, Fields: fields})
	return err
}

func (c *Client) journalKnown(ctx context.Context) error {
	s, err := c.live(ctx)
	if err != nil {
		return err
	}
	if s.info.Version < journalVersion {
		return errs.New(errs.FailedPrecondition, "the running naru-monitor is older than this naru and does not know the journal; upgrade it (SIGUSR2), or set containers.log_to_journald = false")
	}
	return nil
}
