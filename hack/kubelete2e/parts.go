package main

import (
	"context"
	"errors"
	"fmt"
	"syscall"
)

// usual is the kubelet as docs/install.md tells people to run it, and with lists
// in streams.
var usual = kubeletOptions{dropins: true, gates: map[string]bool{"CRIListStreaming": true}}

// unusedImage is of no pod.
const unusedImage = "localhost/kubelet/unused:1"

// parts are the run, in order.
var parts = []part{
	{"Pods, all at once", func(ctx context.Context, s *suite) error {
		if err := s.startNaru(ctx); err != nil {
			return err
		}
		if err := s.startKubelet(ctx, s.k, usual); err != nil {
			return err
		}
		if err := s.pull(ctx, unusedImage); err != nil {
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
		if err := s.stopKubelet(syscall.SIGTERM); err != nil {
			return err
		}
		if err := errors.Join(s.naru.stop(syscall.SIGTERM), s.holdSocket(ctx)); err != nil {
			return err
		}
		if err := s.startNaru(ctx); err != nil {
			return err
		}
		return s.restartKubelet(ctx, kubeletOptions{dropins: true, gates: map[string]bool{"EventedPLEG": true, "CRIListStreaming": true}, verbose: 4})
	}, eventedChecks},
	// The last one: it removes ended init containers, too, and a kubelet with
	// EventedPLEG would run them again.
	{"A kubelet without PodAndContainerStatsFromCRI, short of disk", func(ctx context.Context, s *suite) error {
		return s.restartKubelet(ctx, kubeletOptions{eviction: "99.9%"})
	}, plainChecks},
	{"The end", nil, endChecks},
	{"The kubelet's log", func(_ context.Context, s *suite) error { return s.stop() },
		[]check{{"no complaint of the kubelet about its runtime but those that are expected", judgeLog}}},
}

// want compares what was found with what was to be.
func want(what, got, expected string) error {
	if got != expected {
		return fmt.Errorf("%s: %q, want %q", what, got, expected)
	}
	return nil
}

// says runs a script in a container and compares its output.
func says(pod, container, script, expected string) func(context.Context, *suite) error {
	return func(ctx context.Context, s *suite) error {
		out, err := s.k.sh(ctx, pod, container, script)
		return errors.Join(err, want(script, out, expected))
	}
}
