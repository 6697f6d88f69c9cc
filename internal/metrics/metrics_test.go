package metrics

import (
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/naru-project/naru/internal/errs"
)

// node is a source with one of everything.
type node struct{}

func (node) Pods() map[string]int       { return map[string]int{"ready": 3, "broken": 1} }
func (node) Containers() map[string]int { return map[string]int{"running": 5} }
func (node) Operations() map[Place]Running {
	return map[Place]Running{{"RunPodSandbox", "sandbox"}: {Count: 2, Oldest: 1500 * time.Millisecond}}
}
func (node) Findings() map[string]int { return map[string]int{"lost": 2} }
func (node) Images() Images           { return Images{Count: 4, Pulls: 1, Bytes: 1 << 20, Inodes: 77} }
func (node) Addresses() map[string]Addresses {
	return map[string]Addresses{"ipv4": {Used: 3, Free: 250}, "ipv6": {Used: 3, Free: 1 << 63}}
}
func (node) NetworkReady() bool      { return true }
func (node) MonitorUp() bool         { return false }
func (node) MonitorRestarts() uint64 { return 6 }

// counted is a daemon to which everything happened once.
func counted() *Metrics {
	m := New("1.2.3")
	m.Watch(node{})
	m.ObserveRPC("Status", "OK", 3*time.Millisecond)
	m.Step("RunPodSandbox", "pod cgroup", 700*time.Microsecond)
	m.Exit("OOMKilled")
	m.Pull("ok", 2*time.Second, 1000)
	m.Pull("Unavailable", time.Second, -1)
	m.Reload("refused")
	return m
}

func scrape(t *testing.T, m *Metrics) string {
	t.Helper()
	w := httptest.NewRecorder()
	m.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	if w.Code != http.StatusOK {
		t.Fatalf("%d %s", w.Code, w.Body)
	}
	return w.Body.String()
}

func TestValues(t *testing.T) {
	text := scrape(t, counted())
	for _, want := range []string{
		`naru_build_info{go="go`, `version="1.2.3"} 1`,
		`naru_rpc_duration_seconds_count{code="OK",method="Status"} 1`,
		`naru_rpc_duration_seconds_bucket{code="OK",method="Status",le="0.0025"} 0`,
		`naru_rpc_duration_seconds_bucket{code="OK",method="Status",le="0.005"} 1`,
		`naru_step_duration_seconds_count{operation="RunPodSandbox",step="pod cgroup"} 1`,
		`naru_container_exits_total{reason="OOMKilled"} 1`,
		`naru_image_pull_duration_seconds_sum{result="ok"} 2`,
		`naru_image_pull_duration_seconds_count{result="Unavailable"} 1`,
		"naru_image_pull_bytes_total 1000",
		`naru_config_reloads_total{result="refused"} 1`,
		`naru_pods{phase="broken"} 1`, `naru_pods{phase="ready"} 3`, `naru_containers{phase="running"} 5`,
		`naru_operations{operation="RunPodSandbox",step="sandbox"} 2`,
		`naru_operation_step_age_seconds{operation="RunPodSandbox",step="sandbox"} 1.5`,
		`naru_recovery_findings{finding="lost"} 2`,
		"naru_images 4", "naru_image_pulls 1", "naru_layer_store_bytes 1.048576e+06", "naru_layer_store_inodes 77",
		`naru_network_addresses{family="ipv4",state="free"} 250`, `naru_network_addresses{family="ipv6",state="used"} 3`,
		"naru_network_ready 1", "naru_monitor_up 0", "# TYPE naru_monitor_restarts_total counter\nnaru_monitor_restarts_total 6",
		"go_goroutines ", "process_resident_memory_bytes ",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("%s is not in\n%s", want, text)
		}
	}
}

// TestTable: the page for operators has each metric with its type, labels and
// help, and every one of ours that a scrape shows is on it.
func TestTable(t *testing.T) {
	doc, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(doc), "<!-- metrics -->\n"+Table()+"<!-- /metrics -->\n") {
		t.Errorf("docs/operations.md is to have, between <!-- metrics --> and <!-- /metrics -->:\n%s", Table())
	}
	text := scrape(t, counted())
	for _, l := range regexp.MustCompile(`(?m)^# TYPE (naru_\S+) (\S+)$`).FindAllStringSubmatch(text, -1) {
		if !strings.Contains(Table(), "| `"+l[1]+"` | "+l[2]+" |") {
			t.Errorf("%s %s is not in the table", l[1], l[2])
		}
	}
	allowed := strings.Fields("version go method code operation step reason result phase finding family state le")
	for _, l := range regexp.MustCompile(`(?m)^naru_[a-z_]+\{(.*)\}`).FindAllStringSubmatch(text, -1) {
		for _, pair := range regexp.MustCompile(`([a-z]+)="`).FindAllStringSubmatch(l[1], -1) {
			if !slices.Contains(allowed, pair[1]) {
				t.Errorf("label %s: are its values few and known beforehand?", pair[1])
			}
		}
	}
}

func TestServer(t *testing.T) {
	dir, err := os.MkdirTemp("", "naru") // short: a socket's path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	at := func(name string) string { return filepath.Join(dir, name) }
	s := NewServer(counted().Handler(), func(address string) (net.Listener, error) {
		if address == "taken" {
			return nil, errs.New(errs.Unavailable, "in use")
		}
		return net.Listen("unix", address)
	})
	t.Cleanup(func() { _ = s.Close() })
	get := func(path string) error {
		c := http.Client{Transport: &http.Transport{DisableKeepAlives: true, Dial: func(string, string) (net.Conn, error) { return net.Dial("unix", path) }}}
		resp, err := c.Get("http://naru/metrics")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err == nil && !strings.Contains(string(b), "naru_pods") {
			t.Errorf("got %s", b)
		}
		return err
	}
	listen := func(address string) {
		t.Helper()
		if err := s.Listen(address); err != nil {
			t.Fatal(err)
		}
	}
	listen("")
	listen(at("a"))
	listen(at("a"))
	if err := get(at("a")); err != nil {
		t.Error(err)
	}
	if err := s.Listen("taken"); !errs.Is(err, errs.Unavailable) {
		t.Error(err)
	}
	if err := get(at("a")); err != nil {
		t.Errorf("after an address that was refused: %v", err)
	}
	listen(at("b"))
	if err := get(at("b")); err != nil {
		t.Error(err)
	}
	if get(at("a")) == nil {
		t.Error("the former address still answers")
	}
	listen("")
	if get(at("b")) == nil {
		t.Error("switched off, and answers")
	}
}

func BenchmarkObserveRPC(b *testing.B) {
	m := New("x")
	for b.Loop() {
		m.ObserveRPC("ContainerStatus", "OK", 300*time.Microsecond)
	}
}

func BenchmarkStep(b *testing.B) {
	m := New("x")
	for b.Loop() {
		m.Step("RunPodSandbox", "sandbox: connect network", 300*time.Microsecond)
	}
}
