package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/creack/pty"
	"github.com/naru-project/naru/hack/e2e"
)

func (c *cluster) streamChecks(ctx context.Context) {
	c.page.Part("Streams of kubectl", func() error { return c.begin(ctx, "streams", "streams") })
	c.page.Check(ctx, "logs -f: line by line, as they are written", func() error { return c.follows(ctx) })
	c.page.Check(ctx, "exec -it: a terminal of the size of one's own", func() error {
		out, err := c.typed(ctx, "ready", "6\n", "exec", "-it", "streams", "-c", "nginx", "--", "sh", "-c", "echo ready; read -r n; stty size; echo $((n * 7)); exit 3")
		var code *exec.ExitError
		if !errors.As(err, &code) || code.ExitCode() != 3 {
			return fmt.Errorf("ended with %w, want exit code 3; it says %q", err, out)
		}
		if !strings.Contains(out, "33 77\r\n42\r\n") {
			return fmt.Errorf("it says %q", out)
		}
		return nil
	})
	for _, target := range []string{"pod/streams", "service/web"} {
		c.page.Check(ctx, "port-forward to "+target, func() error { return c.forwards(ctx, target) })
	}
	c.page.Check(ctx, "cp: 8 MiB into a container and back", func() error {
		dir := c.opts.work
		data := strings.Repeat("0123456789abcde\n", 8<<20/16)
		there, back := filepath.Join(dir, "cp-there"), filepath.Join(dir, "cp-back")
		if err := os.WriteFile(there, []byte(data), 0o600); err != nil {
			return err
		}
		_, err := c.kubectl(ctx, "cp", "-c", "nginx", there, "streams:/tmp/copied")
		if err == nil {
			_, err = c.kubectl(ctx, "cp", "-c", "nginx", "streams:/tmp/copied", back)
		}
		if err != nil {
			return err
		}
		b, err := os.ReadFile(back)
		if err == nil && string(b) != data {
			err = fmt.Errorf("%d bytes came back of %d, or others", len(b), len(data))
		}
		return err
	})
	c.page.Check(ctx, "debug --target: another image among a container's processes", func() error {
		out, err := c.kubectl(ctx, "debug", "streams", "--image=localhost/demo/busybox:1", "--target=nginx", "--attach=true", "--quiet", "--",
			"sh", "-c", "pidof nginx | wc -w; wget -qO- http://127.0.0.1/; cat /proc/1/root/usr/share/nginx/html/index.html")
		return errors.Join(err, e2e.Want("output", out, "2\n"+greeting+"\n"+greeting))
	})
	c.page.Check(ctx, "attach: what a container says from now on", func() error {
		return c.until(ctx, "line ", "attach", "streams", "-c", "counts")
	})
}

// until runs a kubectl that goes on until a text has come.
func (c *cluster) until(ctx context.Context, text string, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	return c.reading(ctx, args, func(line string) bool { return strings.Contains(line, text) })
}

// reading runs a kubectl and hands over its lines until enough says so.
func (c *cluster) reading(ctx context.Context, args []string, enough func(line string) bool) error {
	cmd := exec.CommandContext(ctx, c.program("kubectl"), args...)
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	in := bufio.NewScanner(out)
	for in.Scan() {
		if enough(in.Text()) {
			return nil
		}
	}
	return errors.Join(in.Err(), fmt.Errorf("%s has ended, or nothing came", strings.Join(args, " ")))
}

// follows follows a log that gets five lines a second.
func (c *cluster) follows(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	next, wrong := -1, error(nil)
	begun := time.Now()
	err := c.reading(ctx, []string{"logs", "-f", "--tail=3", "streams", "-c", "counts"}, func(line string) bool {
		var number int
		if _, err := fmt.Sscanf(line, "line %d", &number); err != nil || (next >= 0 && number != next) {
			wrong = fmt.Errorf("%q, want line %d", line, next)
			return true
		}
		next = number + 1
		return time.Since(begun) > 3*time.Second
	})
	return errors.Join(err, wrong)
}

// typed runs a kubectl at a terminal, types into it once it shows something, and
// returns all that it has shown.
func (c *cluster) typed(ctx context.Context, once, text string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, c.program("kubectl"), args...)
	terminal, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 33, Cols: 77})
	if err != nil {
		return "", err
	}
	defer func() { _ = terminal.Close() }()
	var shown strings.Builder
	buf := make([]byte, 4096)
	for typed := false; err == nil; { // until EIO: the last one has closed the other end
		var n int
		n, err = terminal.Read(buf)
		shown.Write(buf[:n])
		if !typed && strings.Contains(shown.String(), once) {
			typed = true
			time.Sleep(500 * time.Millisecond) // the terminal's size comes after its start
			if _, err := io.WriteString(terminal, text); err != nil {
				return shown.String(), err
			}
		}
	}
	return shown.String(), cmd.Wait()
}

// forwards forwards a local port and asks through it.
func (c *cluster) forwards(ctx context.Context, target string) error {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	var wrong error
	err := c.reading(ctx, []string{"port-forward", target, ":80"}, func(line string) bool {
		var port int
		if _, err := fmt.Sscanf(line, "Forwarding from 127.0.0.1:%d", &port); err != nil {
			wrong = fmt.Errorf("it says %q", line)
			return true
		}
		for range 3 {
			wrong = errors.Join(wrong, fetch(ctx, fmt.Sprintf("http://127.0.0.1:%d/", port)))
		}
		return true
	})
	return errors.Join(err, wrong)
}
