package monitor_test

import (
	"bytes"
	bin "encoding/binary"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/testhost"
)

// journald is a socket with the journal's native protocol.
type journald struct {
	path string
	conn *net.UnixConn

	mu      sync.Mutex
	entries []map[string]string
}

// listen makes one; it reads nothing before read is called.
func listenJournal(t testing.TB) *journald {
	t.Helper()
	j := &journald{path: filepath.Join(t.TempDir(), "socket")}
	var err error
	if j.conn, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: j.path, Net: "unixgram"}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = j.conn.Close() })
	return j
}

func (j *journald) read() {
	buf := make([]byte, 256<<10)
	for {
		n, err := j.conn.Read(buf)
		if err != nil {
			return
		}
		e, err := parseEntry(buf[:n])
		if err != nil {
			e = map[string]string{"MESSAGE": err.Error()}
		}
		j.mu.Lock()
		j.entries = append(j.entries, e)
		j.mu.Unlock()
	}
}

func (j *journald) all() []map[string]string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.entries
}

func (j *journald) socket(t testing.TB) *os.File {
	t.Helper()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err == nil {
		err = unix.Connect(fd, &unix.SockaddrUnix{Name: j.path})
	}
	if err != nil {
		t.Fatal(err)
	}
	return os.NewFile(uintptr(fd), "journal")
}

// parseEntry reads a datagram: fields as NAME=value, or as NAME, a length and a
// value that may hold anything.
func parseEntry(b []byte) (map[string]string, error) {
	out := map[string]string{}
	for len(b) > 0 {
		line, rest, ok := bytes.Cut(b, []byte("\n"))
		if !ok {
			return nil, fmt.Errorf("%q has no end", b)
		}
		if name, value, ok := strings.Cut(string(line), "="); ok {
			out[name], b = value, rest
			continue
		}
		if len(rest) < 8 {
			return nil, fmt.Errorf("%q has no length", line)
		}
		n := bin.LittleEndian.Uint64(rest)
		if rest = rest[8:]; n >= uint64(len(rest)) || rest[n] != '\n' {
			return nil, fmt.Errorf("%q is of %d bytes, not of %d", line, len(rest), n)
		}
		out[string(line)], b = string(rest[:n]), rest[n+1:]
	}
	return out, nil
}

var testFields = []byte("CONTAINER_NAME=test\n")

func (n *node) journalled(s spec) *container {
	n.t.Helper()
	c, err := n.tryCreate(s)
	if err != nil {
		n.t.Fatal(err)
	}
	if err := n.c.JournalFields(n.ctx, c.id, testFields); err != nil {
		n.t.Fatal(err)
	}
	if err := n.c.Start(n.ctx, c.id); err != nil {
		n.t.Fatal(err)
	}
	return c
}

// Each record of the log is an entry of the journal, with its stream as priority.
func TestJournal(t *testing.T) {
	n := newNode(t)
	j := listenJournal(t)
	go j.read()
	c := n.journalled(spec{args: []string{`echo out; echo err >&2; printf 'MESSAGE=not\001one\n'; head -c 20000 /dev/zero | tr '\0' x; echo; read x; printf last; exit 0`}})
	// What came before there was a socket waits for it.
	n.eventually("the first lines in the log", func() bool { return strings.Contains(c.logText("stdout"), "one") })
	if err := n.c.UseJournal(n.ctx, j.socket(t)); err != nil {
		t.Fatal(err)
	}
	n.eventually("five entries", func() bool { return len(j.all()) == 5 })
	n.killWorker() // the next one knows whose lines go to the journal, and has the socket
	_, _ = c.stdin.WriteString("\n")
	n.wait(c.id)
	n.eventually("the last entry", func() bool { return len(j.all()) == 6 })
	x := strings.Repeat("x", 20000)
	base := map[string]string{"CONTAINER_NAME": "test", "PRIORITY": "6"}
	for i, want := range []map[string]string{
		{"MESSAGE": "out"}, {"MESSAGE": "err", "PRIORITY": "3"}, {"MESSAGE": "MESSAGE=not\x01one"},
		{"MESSAGE": x[:16<<10], "CONTAINER_PARTIAL_MESSAGE": "true"}, {"MESSAGE": x[16<<10:]}, {"MESSAGE": "last"},
	} {
		all := maps.Clone(base)
		maps.Copy(all, want)
		found := false
		for _, e := range j.all() {
			found = found || maps.Equal(e, all)
		}
		if !found {
			t.Errorf("entry %d is missing: %.200v", i, all)
		}
	}
	if s, err := n.c.Journal(n.ctx); err != nil || s.Dropped != 0 || s.Broken {
		t.Errorf("%+v %v", s, err)
	}
}

// A journal that hangs, or that is gone, costs lines of its own, and neither the
// container nor its log anything.
func TestJournalHangs(t *testing.T) {
	n := newNode(t)
	j := listenJournal(t)
	if err := n.c.UseJournal(n.ctx, j.socket(t)); err != nil {
		t.Fatal(err)
	}
	const lines = 20000
	burst := spec{args: []string{fmt.Sprintf("i=0; while [ $i -lt %d ]; do echo line $i of a burst; i=$((i+1)); done; exit 0", lines)}}
	began := time.Now()
	c := n.journalled(burst)
	n.wait(c.id)
	took := time.Since(began)
	if got := strings.Count(c.logText("stdout"), "\n"); got != lines {
		t.Errorf("%d lines in the log, want %d", got, lines)
	}
	s, err := n.c.Journal(n.ctx)
	if err != nil || s.Dropped == 0 || s.Broken {
		t.Errorf("%+v %v", s, err)
	}
	plain := n.run(burst)
	began = time.Now()
	n.wait(plain.id)
	if d := time.Since(began); took > 3*d+testhost.Limit(time.Second) {
		t.Errorf("with a hung journal it took %s, without %s", took, d)
	}
	go j.read() // it goes on: what waits is sent, in its order
	n.eventually("what waited", func() bool { return len(j.all())+int(s.Dropped) == lines })
	for i, e := range j.all() {
		if e["MESSAGE"] != fmt.Sprintf("line %d of a burst", i) {
			t.Fatalf("entry %d is %v", i, e)
		}
	}
	_ = j.conn.Close()
	gone := n.journalled(spec{args: []string{"echo one; echo two; exit 0"}})
	n.wait(gone.id)
	if got := gone.logText("stdout"); got != "one\ntwo\n" {
		t.Errorf("log %q", got)
	}
	n.eventually("what was dropped", func() bool {
		now, err := n.c.Journal(n.ctx)
		return err == nil && now.Broken && now.Dropped == s.Dropped+2
	})
	again := listenJournal(t)
	go again.read()
	if err := n.c.UseJournal(n.ctx, again.socket(t)); err != nil {
		t.Fatal(err)
	}
	n.wait(n.journalled(spec{args: []string{"echo three; exit 0"}}).id)
	n.eventually("a line in the next one", func() bool { return len(again.all()) == 1 })
	if s, err := n.c.Journal(n.ctx); err != nil || s.Broken {
		t.Errorf("%+v %v", s, err)
	}
}
