package streaming

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync"

	"k8s.io/cri-streaming/pkg/streaming/remotecommand"

	"github.com/naru-project/naru/pod"
)

// stdio is what a transport makes of a client's streams. Streams that were not
// asked for are nil.
type stdio struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	resize         io.Reader
	status         func(status) error // tells the client how it went
	finish         func()             // ends the streams in good order
	release        func()             // frees everything, whatever state it is in; called last, always
}

// command runs an exec or attach over the streams the client opens.
func (ses *session) command(k kind, c Command) {
	var st *stdio
	if isWebSocket(ses.r) {
		st = ses.openWebSocket(c)
	} else {
		st = ses.openSPDY(c)
	}
	if st == nil {
		return // answered already
	}
	ctx, cancel := context.WithCancel(ses.ctx)
	sizes, wait := watchSize(ctx, st.resize)
	defer func() { // also when the backend panics
		cancel()
		st.release()
		wait()
	}()
	result := ses.run(ctx, k, c, pod.Streams{Stdin: st.stdin, Stdout: st.stdout, Stderr: st.stderr, Resize: sizes})
	if ses.ctx.Err() != nil {
		return // nobody is there to be told
	}
	if err := st.status(result); err != nil {
		ses.log.V(4).Info("Status did not reach the client", "err", err)
	}
	st.finish()
}

// run calls the backend and makes a status of its answer.
func (ses *session) run(ctx context.Context, k kind, c Command, s pod.Streams) status {
	if k == kindAttach {
		return statusOf(0, ses.s.backend.Attach(ctx, c.ContainerID, s))
	}
	code, err := ses.s.backend.Exec(ctx, c.ContainerID, c.Cmd, c.TTY, s)
	return statusOf(code, err)
}

// status is the part of metav1.Status that clients of exec and attach read.
type status struct {
	Status  string         `json:"status"`
	Message string         `json:"message,omitempty"`
	Reason  string         `json:"reason,omitempty"`
	Details *statusDetails `json:"details,omitempty"`
	Code    int            `json:"code,omitempty"`
}

type statusDetails struct {
	Causes []statusCause `json:"causes,omitempty"`
}

type statusCause struct {
	Type    string `json:"reason,omitempty"`
	Message string `json:"message,omitempty"`
}

const statusSuccess, statusFailure = "Success", "Failure"

// statusOf tells an exit code the way that client-go makes a CodeExitError of.
func statusOf(code int, err error) status {
	switch {
	case err != nil:
		return status{Status: statusFailure, Reason: "InternalError", Code: http.StatusInternalServerError, Message: err.Error()}
	case code != 0:
		return status{
			Status:  statusFailure,
			Reason:  remotecommand.NonZeroExitCodeReason,
			Message: fmt.Sprintf("command terminated with exit code %d", code),
			Details: &statusDetails{Causes: []statusCause{
				{Type: remotecommand.ExitCodeCauseType, Message: strconv.Itoa(code)},
			}},
		}
	}
	return status{Status: statusSuccess}
}

// statusWriter writes a status on the error stream: as JSON from protocol v4
// on, before that as plain text and only when something went wrong.
func statusWriter(w io.Writer, asJSON bool) func(status) error {
	return func(s status) error {
		if !asJSON {
			if s.Status == statusSuccess {
				return nil
			}
			_, err := io.WriteString(w, s.Message)
			return err
		}
		b, err := json.Marshal(s)
		if err != nil {
			return err
		}
		_, err = w.Write(b)
		return err
	}
}

// maxSizeMessage bounds one terminal size as JSON ({"Width":80,"Height":24}).
const maxSizeMessage = 1 << 10

// watchSize reads terminal sizes and delivers the newest one; sizes that
// nobody takes are replaced, so a client that sends many cannot hold anything
// up. The channel is closed at the end of the stream. wait waits for the
// reader, which ends when r does. A nil r gives a nil channel.
func watchSize(ctx context.Context, r io.Reader) (sizes <-chan pod.Size, wait func()) {
	if r == nil {
		return nil, func() {}
	}
	ch := make(chan pod.Size, 1)
	var wg sync.WaitGroup
	wg.Go(func() {
		readSizes(ctx, r, ch)
		close(ch)
		_, _ = io.Copy(io.Discard, r) // or the connection's reader would stall on it
	})
	return ch, wg.Wait
}

func readSizes(ctx context.Context, r io.Reader, ch chan pod.Size) {
	limited := &io.LimitedReader{R: r}
	decoder := json.NewDecoder(limited)
	for ctx.Err() == nil {
		limited.N = maxSizeMessage
		var size struct{ Width, Height int64 }
		if err := decoder.Decode(&size); err != nil {
			return
		}
		const top = 1<<16 - 1 // winsize(ioctl_tty(2)) holds 16 bits
		if size.Width <= 0 || size.Height <= 0 || size.Width > top || size.Height > top {
			continue
		}
		next := pod.Size{Width: uint16(size.Width), Height: uint16(size.Height)}
		select {
		case ch <- next:
		default:
			select {
			case <-ch: // the old one
			default:
			}
			ch <- next // there is room: this is the only sender
		}
	}
}
