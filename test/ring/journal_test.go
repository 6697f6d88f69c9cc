package ring

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// journald listens where the journal would, and keeps what comes as it comes.
type journald struct {
	conn *net.UnixConn
	mu   sync.Mutex
	all  []string
}

func listenJournal(t testing.TB, path string) *journald {
	t.Helper()
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	j := &journald{conn: conn}
	t.Cleanup(func() { _ = conn.Close() })
	go func() {
		buf := make([]byte, 256<<10)
		for {
			n, err := conn.Read(buf)
			if err != nil {
				return
			}
			j.mu.Lock()
			j.all = append(j.all, string(buf[:n]))
			j.mu.Unlock()
		}
	}()
	return j
}

// find returns the entry with this message.
func (j *journald) find(message string) (string, bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, e := range j.all {
		if strings.HasSuffix(e, "\x00"+message+"\n") {
			return e, true
		}
	}
	return "", false
}

// TestJournald: with the switch on, what containers of either kind write is in
// the journal, too, however often daemon, worker and journal are replaced.
func TestJournald(t *testing.T) {
	for _, kind := range []string{"native", "oci"} {
		t.Run(kind, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "j")
			j := listenJournal(t, path)
			opts := []Option{WithConfig(fmt.Sprintf("containers.log_to_journald = true\ncontainers.journald_socket = %q", path))}
			if kind == "oci" {
				opts = append(opts, WithRuntime(runc(t)))
			}
			n := StartNode(t, opts...)
			pod := n.Pod(t, nil)
			await := func(message string) string {
				t.Helper()
				var e string
				eventually(t, 30*time.Second, fmt.Sprintf("%q in the journal", message), func() (ok bool) { e, ok = j.find(message); return ok })
				return e
			}
			id := n.Run(t, pod, shell("echo from the container; i=0; while :; do sleep 0.1; i=$((i+1)); echo tick $i >&2; done"))
			e := await("from the container")
			name := fmt.Sprintf("k8s_%s_%s_ring_", n.Status(t, id).Metadata.Name, n.pods[pod].Metadata.Name)
			for _, want := range []string{"CONTAINER_ID_FULL\n", id + "\n", id[:12] + "\n", "CONTAINER_NAME\n", name, "SYSLOG_IDENTIFIER\n", "PRIORITY=6\n"} {
				if !strings.Contains(e, want) {
					t.Errorf("no %q in %q", want, e)
				}
			}
			if e := await("tick 1"); !strings.Contains(e, "PRIORITY=3\n") {
				t.Errorf("of stderr: %q", e)
			}
			last := n.ticks(t, id)
			n.KillDaemon()
			await(fmt.Sprintf("tick %d", last+5)) // nobody needs the daemon for that
			n.StartDaemon()
			if kind == "oci" {
				return
			}
			if err := j.conn.Close(); err != nil {
				t.Fatal(err)
			}
			if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
				t.Fatal(err)
			}
			j = listenJournal(t, path) // as when systemd makes the socket anew: found by itself
			eventually(t, 30*time.Second, "an entry in the new journal", func() bool {
				j.mu.Lock()
				defer j.mu.Unlock()
				return len(j.all) > 0 && strings.Contains(j.all[0], "tick ")
			})
		})
	}
}

// ticks is the number of the last tick in the log.
func (n *Node) ticks(t testing.TB, id string) (last int) {
	t.Helper()
	for _, l := range n.Log(t, id) {
		_, _ = fmt.Sscanf(l.Text, "tick %d", &last)
	}
	return last
}
