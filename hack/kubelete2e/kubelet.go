package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
)

// nodeIP is the address that hack/lib.sh gives the node.
const nodeIP = "192.0.2.10"

const (
	secureURL = "https://127.0.0.1:10250"
	openURL   = "http://127.0.0.1:10255"
)

// kubelet speaks to the kubelet's ports, as the API server would.
type kubelet struct {
	client *http.Client
	config *rest.Config
}

func newKubelet() *kubelet {
	return &kubelet{
		client: &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
			TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, //nolint:gosec // its certificate is its own, and the network this run's
		}},
		config: &rest.Config{Host: secureURL, TLSClientConfig: rest.TLSClientConfig{Insecure: true}},
	}
}

func (k *kubelet) do(ctx context.Context, method, address string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, address, nil)
	if err != nil {
		return nil, err
	}
	resp, err := k.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", address, resp.Status, bytes.TrimSpace(body))
	}
	return body, err
}

func (k *kubelet) get(ctx context.Context, address string) ([]byte, error) {
	return k.do(ctx, http.MethodGet, address)
}

// pods returns the static pods by the names in their manifests.
func (k *kubelet) pods(ctx context.Context) (map[string]*v1.Pod, error) {
	body, err := k.get(ctx, openURL+"/pods")
	if err != nil {
		return nil, err
	}
	var list v1.PodList
	if err := json.Unmarshal(body, &list); err != nil {
		return nil, err
	}
	pods := map[string]*v1.Pod{}
	for i := range list.Items {
		pods[strings.TrimSuffix(list.Items[i].Name, "-"+nodeName)] = &list.Items[i]
	}
	return pods, nil
}

// path is where the kubelet serves a container of a static pod.
func path(kind, pod, container string) string {
	return fmt.Sprintf("%s/%s/default/%s-%s/%s", secureURL, kind, pod, nodeName, container)
}

// sh runs a shell command in a container and returns what it says.
func (k *kubelet) sh(ctx context.Context, pod, container, script string) (string, error) {
	out, errOut, err := k.stream(ctx, stream{kind: "exec", pod: pod, container: container, command: []string{"sh", "-c", script}})
	if err != nil && errOut != "" {
		err = fmt.Errorf("%w: %s", err, errOut)
	}
	return strings.TrimSpace(out), err
}

// logs returns what a container has said, or its run before this one.
func (k *kubelet) logs(ctx context.Context, pod, container string, previous bool) (string, error) {
	address := path("containerLogs", pod, container)
	if previous {
		address += "?previous=true"
	}
	b, err := k.get(ctx, address)
	return string(b), err
}

// stream is an exec or attach: kind says which.
type stream struct {
	kind, pod, container string
	command              []string
	websocket            bool
	stdin                io.Reader
	tty                  bool
	size                 remotecommand.TerminalSizeQueue
	until                string // what to wait for and then leave; without it the stream's end
}

func (k *kubelet) stream(ctx context.Context, s stream) (stdout, stderr string, err error) {
	q := url.Values{"command": s.command, "output": {"1"}}
	opts := remotecommand.StreamOptions{Stdin: s.stdin, Tty: s.tty, TerminalSizeQueue: s.size}
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	out, errOut := watched{until: s.until, found: cancel}, bytes.Buffer{}
	opts.Stdout = &out
	if s.stdin != nil {
		q.Set("input", "1")
	}
	if s.tty {
		q.Set("tty", "1")
	} else {
		q.Set("error", "1")
		opts.Stderr = &errOut
	}
	u, err := url.Parse(path(s.kind, s.pod, s.container) + "?" + q.Encode())
	if err != nil {
		return "", "", err
	}
	var x remotecommand.Executor
	if s.websocket {
		x, err = remotecommand.NewWebSocketExecutor(k.config, http.MethodGet, u.String())
	} else {
		x, err = remotecommand.NewSPDYExecutor(k.config, http.MethodPost, u)
	}
	if err != nil {
		return "", "", err
	}
	err = x.StreamWithContext(ctx, opts)
	out.mu.Lock() // whoever leaves before the end does not wait for the copying
	defer out.mu.Unlock()
	text := out.text.String()
	if s.until != "" && strings.Contains(text, s.until) {
		return text, "", nil
	}
	return text, errOut.String(), err
}

// watched keeps what is written and says when a text has come.
type watched struct {
	mu    sync.Mutex
	text  bytes.Buffer
	until string
	found func()
}

// Write implements io.Writer.
func (w *watched) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	n, err := w.text.Write(p)
	if w.until != "" && bytes.Contains(w.text.Bytes(), []byte(w.until)) {
		w.found()
	}
	return n, err
}

// forward opens a local port that leads to one of the pod and hands its number
// to use.
func (k *kubelet) forward(pod string, port int, websocket bool, use func(local uint16) error) error {
	u, err := url.Parse(fmt.Sprintf("%s/portForward/default/%s-%s", secureURL, pod, nodeName))
	if err != nil {
		return err
	}
	stop, ready, failed := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	defer close(stop)
	var f *portforward.PortForwarder
	ports := []string{fmt.Sprintf("0:%d", port)}
	if websocket {
		d, err := portforward.NewSPDYOverWebsocketDialer(u, k.config)
		if err != nil {
			return err
		}
		if f, err = portforward.New(d, ports, stop, ready, io.Discard, io.Discard); err != nil {
			return err
		}
	} else {
		transport, upgrader, err := spdy.RoundTripperFor(k.config)
		if err != nil {
			return err
		}
		d := spdy.NewDialer(upgrader, &http.Client{Transport: transport}, http.MethodPost, u)
		if f, err = portforward.New(d, ports, stop, ready, io.Discard, io.Discard); err != nil {
			return err
		}
	}
	go func() { failed <- f.ForwardPorts() }()
	select {
	case err := <-failed:
		return fmt.Errorf("forward to port %d of %s: %w", port, pod, err)
	case <-ready:
	case <-time.After(15 * time.Second):
		return fmt.Errorf("forward to port %d of %s: not ready within 15 s", port, pod)
	}
	local, err := f.GetPorts()
	if err != nil {
		return err
	}
	return use(local[0].Local)
}
