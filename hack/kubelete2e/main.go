// Kubelete2e lets the real kubelet, without an API server, drive naru: static
// pods that together use what a kubelet asks of a runtime, restarts of both
// under them, and at the end a look at what the kubelet had to complain about.
//
// hack/kubelet-e2e.sh makes the place it runs in (a network namespace, a
// registry, folders) and looks for what is left behind. Inside of pods the same
// program is what they run, see agent.go.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/go-logr/logr"
	"k8s.io/klog/v2"
)

const usageText = `usage: kubelete2e run --work DIR --bin DIR --cgroup NAME --expected FILE --dropins DIR --results FILE
       kubelete2e grpc ADDRESS | lines COUNT DURATION | eat MEGABYTES   (inside of pods)
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	klog.SetLogger(logr.Discard()) // the streams' clients grumble when they are left
	if err := command(ctx, os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "kubelete2e: %v\n", err)
		os.Exit(1)
	}
}

func command(ctx context.Context, args []string) error {
	if len(args) == 0 {
		return errors.New(usageText)
	}
	switch args[0] {
	case "run":
		var o options
		fs := flag.NewFlagSet("run", flag.ContinueOnError)
		fs.StringVar(&o.work, "work", "", "folder of this run, with config.toml and kubelet.sh")
		fs.StringVar(&o.bin, "bin", "", "folder of naru, kubelet and this program")
		fs.StringVar(&o.cgroup, "cgroup", "", "cgroup that the kubelet's are below")
		fs.StringVar(&o.expected, "expected", "", "what the kubelet's log may hold")
		fs.StringVar(&o.dropins, "dropins", "", "the kubelet's drop-ins that naru ships")
		fs.StringVar(&o.results, "results", "", "page of results to write")
		if err := fs.Parse(args[1:]); err != nil {
			return err
		}
		return run(ctx, o)
	case "grpc", "lines", "eat":
		return agent(ctx, args)
	}
	return errors.New(usageText)
}
