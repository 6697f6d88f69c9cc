package ring

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// scrape reads /metrics at an address of the configuration.
func scrape(t testing.TB, address string) (map[string]float64, error) {
	t.Helper()
	network, at := "tcp", address
	if path, ok := strings.CutPrefix(address, "unix://"); ok {
		network, at = "unix", path
	}
	c := http.Client{Timeout: callTime, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, at)
	}}}
	resp, err := c.Get("http://naru/metrics")
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("%s %s: %w", resp.Status, b, err)
	}
	out := map[string]float64{}
	for _, l := range regexp.MustCompile(`(?m)^([a-z_]+(?:\{.*\})?) (\S+)$`).FindAllStringSubmatch(string(b), -1) {
		if out[l[1]], err = strconv.ParseFloat(l[2], 64); err != nil {
			return nil, fmt.Errorf("%s: %w", l[0], err)
		}
	}
	return out, nil
}

// TestOwnMetrics: what Prometheus is told of the daemon is what happened, it
// names nobody, and the address changes under way or, when it is taken, not.
func TestOwnMetrics(t *testing.T) {
	n := StartNode(t)
	pod := n.Pod(t, nil)
	id := n.Run(t, pod, nil)
	n.stop(t, n.Run(t, pod, nil), 0)
	if _, err := n.TryContainer(t, pod, func(c *criv1.ContainerConfig) { c.Image.Image = "none/none:1" }); err == nil {
		t.Fatal("a container without an image")
	}
	socket := "unix://" + n.RunDir + "/metrics.sock"
	if _, err := scrape(t, socket); err == nil {
		t.Error("metrics are not off by default")
	}
	if out, err := n.reload(t, "metrics.address = '"+socket+"'\n"); err != nil {
		t.Fatal(err, out)
	}
	got, err := scrape(t, socket)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]float64{
		`naru_pods{phase="ready"}`: 1, `naru_containers{phase="running"}`: 1, `naru_containers{phase="exited"}`: 1,
		`naru_rpc_duration_seconds_count{code="OK",method="RunPodSandbox"}`:                           1,
		`naru_rpc_duration_seconds_count{code="OK",method="StartContainer"}`:                          2,
		`naru_rpc_duration_seconds_count{code="NotFound",method="CreateContainer"}`:                   1,
		`naru_step_duration_seconds_count{operation="RunPodSandbox",step="sandbox: connect network"}`: 1,
		`naru_network_addresses{family="ipv4",state="used"}`:                                          1, "naru_network_ready": 1, "naru_monitor_up": 1, "naru_images": 1,
		"naru_monitor_restarts_total": 0, `naru_config_reloads_total{result="ok"}`: 1, `naru_recovery_findings{finding="quarantined"}`: 0,
	} {
		if v, ok := got[name]; !ok || v != want {
			t.Errorf("%s is %v (%v), want %v", name, v, ok, want)
		}
	}
	if got["naru_layer_store_bytes"] < 1<<16 || got[`naru_network_addresses{family="ipv4",state="free"}`] < 200 {
		t.Errorf("layers %v, addresses %v", got["naru_layer_store_bytes"], got[`naru_network_addresses{family="ipv4",state="free"}`])
	}
	ended := 0.0
	for name, v := range got {
		if strings.Contains(name, id[:12]) || strings.Contains(name, pod[:12]) || strings.Contains(name, "busybox") {
			t.Errorf("%s names somebody", name)
		}
		if strings.HasPrefix(name, "naru_container_exits_total") {
			ended += v
		}
	}
	if ended != 1 {
		t.Errorf("%v containers ended", ended)
	}

	// Another worker is noticed.
	n.KillWorker()
	eventually(t, 10*time.Second, "the worker that was started again to be counted", func() bool {
		got, err := scrape(t, socket)
		return err == nil && got["naru_monitor_restarts_total"] == 1 && got["naru_monitor_up"] == 1
	})

	// An address that is taken: nothing of the new configuration counts.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	taken := "metrics.address = '" + l.Addr().String() + "'\nimages.pinned = ['*']\n"
	if out, err := n.reload(t, taken); err == nil || !strings.Contains(out, "address already in use") {
		t.Errorf("an address that is taken: %v %s", err, out)
	}
	show, err := exec.Command(naruBin, "config", "show", "--running", "--config", n.Config).CombinedOutput()
	if err != nil || !strings.Contains(string(show), "pinned = []") || !strings.Contains(string(show), socket) {
		t.Errorf("%v\n%s", err, show)
	}
	if _, err := scrape(t, socket); err != nil {
		t.Errorf("after a reload that was refused: %v", err)
	}
	_ = l.Close()
	if out, err := n.reload(t, taken); err != nil {
		t.Fatal(err, out)
	}
	if _, err := scrape(t, l.Addr().String()); err != nil {
		t.Error(err)
	}
	if _, err := scrape(t, socket); err == nil {
		t.Error("the former address still answers")
	}
}
