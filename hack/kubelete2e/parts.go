package main

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/naru-project/naru/hack/e2e"
)

// usual is the kubelet as docs/install.md tells people to run it, and with lists
// in streams.
func (s *suite) usual() e2e.KubeletOptions {
	return e2e.KubeletOptions{Dropins: s.opts.dropins, Gates: map[string]bool{"CRIListStreaming": true}}
}

// standalone are the lines of a kubelet's configuration without an API server,
// after its node's folder.
const standalone = `staticPodPath: %s/manifests
fileCheckFrequency: 1s
registerNode: false
readOnlyPort: 10255
address: 127.0.0.1
containerLogMaxSize: 2Mi
containerLogMaxFiles: 100
containerLogMonitorInterval: 3s
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
`

func (s *suite) startKubelet(ctx context.Context, o e2e.KubeletOptions) error {
	o.Config = fmt.Sprintf(standalone, s.Work)
	o.Healthy = func(ctx context.Context) error {
		_, err := s.k.get(ctx, "http://127.0.0.1:10248/healthz")
		return err
	}
	return s.StartKubelet(ctx, o)
}

// unusedImage is of no pod.
const unusedImage = "localhost/kubelet/unused:1"

// parts are the run, in order.
var parts = []part{
	{"Pods, all at once", func(ctx context.Context, s *suite) error {
		if err := s.StartNaru(ctx); err != nil {
			return err
		}
		if err := s.startKubelet(ctx, s.usual()); err != nil {
			return err
		}
		if err := s.Pull(ctx, unusedImage); err != nil {
			return err
		}
		return s.addAll(ctx)
	}, nil},
	{"Life", nil, lifeChecks},
	{"Probes and hooks", nil, probeChecks},
	{"Network", nil, networkChecks},
	{"Volumes", nil, volumeChecks},
	{"Security and resources", nil, securityChecks},
	{"Streams", nil, append(streamChecks("SPDY", false), streamChecks("WebSocket", true)...)},
	{"Statistics", nil, statChecks},
	{"Logs", nil, logChecks},
	{"Restarts", nil, restartChecks},
	{"A kubelet with EventedPLEG, over a socket that is held open", func(ctx context.Context, s *suite) error {
		if err := s.StopKubelet(syscall.SIGTERM); err != nil {
			return err
		}
		if err := errors.Join(s.Naru.Stop(syscall.SIGTERM), s.HoldSocket(ctx)); err != nil {
			return err
		}
		if err := s.StartNaru(ctx); err != nil {
			return err
		}
		return s.restartKubelet(ctx, e2e.KubeletOptions{Dropins: s.opts.dropins, Gates: map[string]bool{"EventedPLEG": true, "CRIListStreaming": true}, Verbose: 4})
	}, eventedChecks},
	// The last one: it removes ended init containers, too, and a kubelet with
	// EventedPLEG would run them again.
	{"A kubelet without PodAndContainerStatsFromCRI, short of disk", func(ctx context.Context, s *suite) error {
		return s.restartKubelet(ctx, e2e.KubeletOptions{Eviction: "99.9%"})
	}, plainChecks},
	{"The end", nil, endChecks},
	{"The kubelet's log", func(_ context.Context, s *suite) error { return s.Stop() },
		[]check{{"no complaint of the kubelet about its runtime but those that are expected", func(_ context.Context, s *suite) error { return s.JudgeLog(s.opts.expected) }}}},
}

// says runs a script in a container and compares its output.
func says(pod, container, script, expected string) func(context.Context, *suite) error {
	return func(ctx context.Context, s *suite) error {
		out, err := s.k.sh(ctx, pod, container, script)
		return errors.Join(err, e2e.Want(script, out, expected))
	}
}
