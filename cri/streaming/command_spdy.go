package streaming

import (
	"errors"
	"sync"
	"time"

	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
)

// offer is a stream that the client opened; replied is closed once our reply
// to it is on its way.
type offer struct {
	httpstream.Stream
	replied <-chan struct{}
}

// maxRefused streams may come on a connection before it is cut.
const maxRefused = 16

// gate takes streams in until it is shut, and refuses the rest. Its accept
// never blocks: it is called by the connection's own workers.
type gate struct {
	abuse func() // called when too many were refused

	mu      sync.Mutex
	offers  chan offer // never full for long; sent to under mu
	shut    bool
	refused int
}

var errRefused = errors.New("surplus stream refused")

func (g *gate) accept(s httpstream.Stream, replied <-chan struct{}) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.shut {
		select {
		case g.offers <- offer{s, replied}:
			return nil
		default:
		}
	}
	if g.refused++; g.refused > maxRefused {
		g.abuse()
	}
	return errRefused
}

// close refuses all further streams, and those that came too late.
func (g *gate) close() {
	g.mu.Lock()
	g.shut = true
	close(g.offers)
	g.mu.Unlock()
	for o := range g.offers {
		_ = o.Reset()
	}
}

// openSPDY upgrades to SPDY and waits for the streams the request calls for.
// It returns nil after having answered or cut the connection.
func (ses *session) openSPDY(c Command) *stdio {
	protocol, err := httpstream.Handshake(ses.r, ses.w, remotecommand.SupportedStreamingProtocols)
	if err != nil {
		return nil // Handshake has answered
	}
	v3 := protocol == remotecommand.StreamProtocolV3Name || protocol == remotecommand.StreamProtocolV4Name
	want := map[string]bool{
		remotecommand.StreamTypeError:  true,
		remotecommand.StreamTypeStdin:  c.Stdin,
		remotecommand.StreamTypeStdout: c.Stdout,
		remotecommand.StreamTypeStderr: c.Stderr,
		remotecommand.StreamTypeResize: c.TTY && v3,
	}
	g := &gate{offers: make(chan offer, 2*len(want)), abuse: func() { ses.cancel(errRefused) }}
	ses.w.spdy = true
	conn := spdy.NewResponseUpgrader().UpgradeResponse(ses.w, ses.r, g.accept)
	if conn == nil {
		return nil // the upgrader has answered
	}
	got, err := ses.collect(conn, g, want)
	g.close()
	if err != nil {
		ses.log.V(2).Info("Client did not open its streams", "err", err)
		ses.cancel(err)
		ses.w.abort()
		_ = conn.Close()
		return nil
	}
	st := &stdio{
		status: statusWriter(got[remotecommand.StreamTypeError], protocol == remotecommand.StreamProtocolV4Name),
		finish: func() { finishSPDY(conn, got) },
		release: func() {
			ses.w.abort() // frees a writer that holds the framer's lock
			_ = conn.Close()
		},
	}
	if s := got[remotecommand.StreamTypeStdin]; s != nil {
		st.stdin = s
	}
	if s := got[remotecommand.StreamTypeStdout]; s != nil {
		st.stdout = s
	}
	if s := got[remotecommand.StreamTypeStderr]; s != nil {
		st.stderr = s
	}
	if s := got[remotecommand.StreamTypeResize]; s != nil {
		st.resize = s
	}
	return st
}

// collect waits until every wanted stream is open and answered.
func (ses *session) collect(conn httpstream.Connection, g *gate, want map[string]bool) (map[string]httpstream.Stream, error) {
	missing := 0
	for _, wanted := range want {
		if wanted {
			missing++
		}
	}
	got := map[string]httpstream.Stream{}
	timeout := time.NewTimer(ses.s.cfg.CreationTimeout)
	defer timeout.Stop()
	for {
		var o offer
		select {
		case o = <-g.offers:
		case <-timeout.C:
			return nil, errors.New("time to open streams is over")
		case <-conn.CloseChan():
			return nil, errClientGone
		case <-ses.ctx.Done():
			return nil, errClientGone
		}
		name := o.Headers().Get(remotecommand.StreamType)
		if !want[name] || got[name] != nil {
			_ = o.Reset()
			continue
		}
		select {
		case <-o.replied:
		case <-conn.CloseChan():
			return nil, errClientGone
		case <-ses.ctx.Done():
			return nil, errClientGone
		}
		got[name] = o.Stream
		if missing--; missing == 0 {
			// From now on a closed connection ends the session: a client that
			// says goodbye need not close its socket.
			go func() {
				select {
				case <-conn.CloseChan():
					ses.cancel(errClientGone)
				case <-ses.ctx.Done():
				}
			}()
			return got, nil
		}
	}
}

// finishSPDY closes our side of every stream, gives the client a moment to
// read it all and hang up, then closes the connection. What the client still
// sends is dropped, or its goodbye would be stuck behind it.
func finishSPDY(conn httpstream.Connection, streams map[string]httpstream.Stream) {
	for name, s := range streams {
		if name == remotecommand.StreamTypeStdin || name == remotecommand.StreamTypeResize {
			_ = s.Reset()
		} else {
			_ = s.Close()
		}
	}
	select {
	case <-conn.CloseChan():
	case <-time.After(lingerTimeout):
	}
	_ = conn.Close()
}
