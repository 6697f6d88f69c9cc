package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/naru-project/naru/hack/e2e"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/util/exec"
)

// streamChecks are made once over SPDY and once over WebSocket.
func streamChecks(protocol string, websocket bool) []check {
	named := func(what string) string { return what + " over " + protocol }
	return []check{
		{named("exec: both outputs and the exit code"), func(ctx context.Context, s *suite) error {
			out, errOut, err := s.k.stream(ctx, stream{kind: "exec", pod: "streams", container: "web", websocket: websocket, command: []string{"sh", "-c", "echo to out; echo to err >&2; exit 7"}})
			var code exec.CodeExitError
			if !errors.As(err, &code) || code.Code != 7 {
				return fmt.Errorf("ended with %v, want exit code 7", err)
			}
			return errors.Join(e2e.Want("stdout", out, "to out\n"), e2e.Want("stderr", errOut, "to err\n"))
		}},
		{named("exec: 4 MiB in and out again"), func(ctx context.Context, s *suite) error {
			text := strings.Repeat("0123456789abcde\n", 4<<20/16)
			out, _, err := s.k.stream(ctx, stream{kind: "exec", pod: "streams", container: "web", websocket: websocket, command: []string{"cat"}, stdin: strings.NewReader(text)})
			if err == nil && out != text {
				err = fmt.Errorf("%d bytes came back of %d, or others", len(out), len(text))
			}
			return err
		}},
		{named("exec with a terminal and its size"), func(ctx context.Context, s *suite) error {
			out, _, err := s.k.stream(ctx, stream{kind: "exec", pod: "streams", container: "web", websocket: websocket, tty: true, size: &once{Height: 33, Width: 77}, stdin: strings.NewReader(""),
				command: []string{"sh", "-c", "i=0; until [ \"$(stty size)\" = '33 77' ] || [ $i = 50 ]; do i=$((i+1)); sleep 0.1; done; stty size"}})
			return errors.Join(err, e2e.Want("stty size", strings.TrimSpace(out), "33 77"))
		}},
		{named("attach: a line in, both outputs out"), func(ctx context.Context, s *suite) error {
			in, feed := io.Pipe()
			defer func() { _ = feed.Close() }()
			go func() { _, _ = io.WriteString(feed, protocol+"\n") }()
			_, _, err := s.k.stream(ctx, stream{kind: "attach", pod: "streams", container: "cat", websocket: websocket, stdin: in, until: "got " + protocol})
			return err
		}},
		{named("attach to a terminal"), func(ctx context.Context, s *suite) error {
			in, feed := io.Pipe()
			defer func() { _ = feed.Close() }()
			go func() { _, _ = io.WriteString(feed, "echo $((6*7))-"+protocol+"\n") }()
			_, _, err := s.k.stream(ctx, stream{kind: "attach", pod: "streams", container: "tty", websocket: websocket, tty: true, stdin: in, until: "42-" + protocol})
			return err
		}},
		{named("port-forward"), func(ctx context.Context, s *suite) error {
			return s.k.forward("streams", 80, websocket, func(local uint16) error {
				return s.greets(ctx, fmt.Sprintf("http://127.0.0.1:%d/", local))
			})
		}},
	}
}

// once is a terminal's size that never changes.
type once remotecommand.TerminalSize

// Next implements remotecommand.TerminalSizeQueue.
func (o *once) Next() *remotecommand.TerminalSize {
	if o.Height == 0 {
		return nil
	}
	size := remotecommand.TerminalSize(*o)
	o.Height = 0
	return &size
}
