package streaming

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync"
	"time"

	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
)

type netConn = net.Conn

func newSPDYServer(c net.Conn, accept httpstream.NewStreamHandler) (httpstream.Connection, error) {
	return spdy.NewServerConnection(c, accept)
}

func upgradeSPDY(ses *session, accept httpstream.NewStreamHandler) httpstream.Connection {
	ses.w.spdy = true
	return spdy.NewResponseUpgrader().UpgradeResponse(ses.w, ses.r, accept)
}

// pairs collects the two streams, error and data, that a client opens for each
// connection it forwards, and runs the connection once both are there.
type pairs struct {
	ses *session
	f   Forward

	mu      sync.Mutex
	conn    httpstream.Connection // set by serve
	open    map[string]*pair      // by request ID
	refused int
	ended   bool
	wg      sync.WaitGroup // added to under mu while not ended
}

// pair is one forwarded connection.
type pair struct {
	port        uint16
	data, error httpstream.Stream
	timer       *time.Timer // for the second stream to come
}

func newPairs(ses *session, f Forward) *pairs {
	return &pairs{ses: ses, f: f, open: map[string]*pair{}}
}

// accept takes in a stream. It is called by the connection's workers and must
// not block; an error refuses the stream.
func (p *pairs) accept(s httpstream.Stream, replied <-chan struct{}) error {
	err := p.add(s, replied)
	if err == nil {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.refused++; p.refused > maxRefused {
		p.ses.cancel(errRefused)
	}
	return err
}

func (p *pairs) add(s httpstream.Stream, replied <-chan struct{}) error {
	h := s.Headers()
	port, err := strconv.ParseUint(h.Get(portforward.PortHeader), 10, 16)
	if err != nil || port == 0 {
		return fmt.Errorf("header %s %.20q is not a port", portforward.PortHeader, h.Get(portforward.PortHeader))
	}
	id, err := requestID(s)
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended {
		return errClientGone
	}
	pr := p.open[id]
	if pr == nil {
		if len(p.open) >= maxForwards {
			return fmt.Errorf("more than %d connections at once", maxForwards)
		}
		pr = &pair{port: uint16(port)}
		pr.timer = time.AfterFunc(p.ses.s.cfg.CreationTimeout, func() { p.giveUp(id, pr) })
		p.open[id] = pr
	}
	if err := pr.put(s, uint16(port)); err != nil {
		return err
	}
	if pr.data != nil && pr.error != nil {
		pr.timer.Stop()
		p.wg.Go(func() { p.run(id, pr, replied) })
	}
	return nil
}

// put places a stream in its pair.
func (pr *pair) put(s httpstream.Stream, port uint16) error {
	slot := &pr.data
	if s.Headers().Get(portforward.StreamType) == portforward.StreamTypeError {
		slot = &pr.error
	}
	if *slot != nil || port != pr.port {
		return errors.New("stream does not fit the other one of its connection")
	}
	*slot = s
	return nil
}

// requestID tells which connection a stream belongs to. Clients older than the
// header open error and data stream one after the other: their numbers differ
// by two.
func requestID(s httpstream.Stream) (string, error) {
	offset := uint32(0)
	switch t := s.Headers().Get(portforward.StreamType); t {
	case portforward.StreamTypeError:
	case portforward.StreamTypeData:
		offset = 2
	default:
		return "", fmt.Errorf("header %s %.20q is no stream type", portforward.StreamType, t)
	}
	if id := s.Headers().Get(portforward.PortForwardRequestIDHeader); id != "" {
		return id, nil
	}
	return "stream " + strconv.FormatUint(uint64(s.Identifier()-offset), 10), nil
}

// giveUp drops a pair whose second stream did not come in time.
func (p *pairs) giveUp(id string, pr *pair) {
	p.mu.Lock()
	if p.open[id] != pr || (pr.data != nil && pr.error != nil) {
		p.mu.Unlock()
		return
	}
	delete(p.open, id)
	p.mu.Unlock()
	p.reset(pr)
}

// run forwards one connection from start to end.
func (p *pairs) run(id string, pr *pair, replied <-chan struct{}) {
	defer func() {
		p.mu.Lock()
		delete(p.open, id)
		p.mu.Unlock()
	}()
	select {
	case <-replied:
	case <-p.ses.ctx.Done():
	}
	clientDone, err := p.ses.connect(p.ses.ctx, p.f, pr.port, pr.data)
	if err != nil {
		p.ses.log.V(4).Info("Forwarded connection ended", "port", pr.port, "err", err)
		_, _ = io.WriteString(pr.error, forwardError(p.f, pr.port, err))
	}
	_ = pr.data.Close()
	_ = pr.error.Close()
	if err == nil {
		select {
		case <-clientDone:
		case <-time.After(lingerTimeout):
		case <-p.ses.ctx.Done():
		}
	}
	p.reset(pr)
	<-clientDone
}

// reset frees a pair's streams on both sides.
func (p *pairs) reset(pr *pair) {
	p.mu.Lock()
	conn := p.conn
	p.mu.Unlock()
	for _, s := range []httpstream.Stream{pr.data, pr.error} {
		if s == nil {
			continue
		}
		_ = s.Reset()
		if conn != nil {
			conn.RemoveStreams(s)
		}
	}
}

// serve waits for the end of the session and of all its connections.
func (p *pairs) serve(conn httpstream.Connection) {
	p.mu.Lock()
	p.conn = conn
	p.mu.Unlock()
	select {
	case <-conn.CloseChan():
		p.ses.cancel(errClientGone)
	case <-p.ses.ctx.Done():
	}
	p.mu.Lock()
	p.ended = true
	for _, pr := range p.open {
		pr.timer.Stop()
	}
	p.mu.Unlock()
	p.ses.w.abort()
	_ = conn.Close() // resets all streams: their readers return
	p.wg.Wait()
}
