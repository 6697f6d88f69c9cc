// Clustere2e runs a Kubernetes cluster of two nodes with naru beneath: etcd, the
// control plane, on each node naru, a kubelet and kube-proxy. It does with it what
// people do with a cluster, by kubectl, and looks at what comes of it.
//
// hack/cluster-e2e.sh makes the place it runs in (a network namespace for the
// control plane, which routes between those of the nodes, a registry, folders) and
// looks for what is left behind.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

// options are the command line.
type options struct {
	work, bin, expected, dropins, results, run, parts string
	replicas                                          int
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var o options
	flag.StringVar(&o.work, "work", "", "folder of this run, with a folder for each node")
	flag.StringVar(&o.bin, "bin", "", "folder of naru and of Kubernetes' programs")
	flag.StringVar(&o.run, "run", "", "name of this run, with which the names of its cgroups begin")
	flag.StringVar(&o.expected, "expected", "", "what the kubelets' logs may hold")
	flag.StringVar(&o.dropins, "dropins", "", "the kubelet's drop-ins that naru ships")
	flag.StringVar(&o.results, "results", "", "page of results to write")
	flag.IntVar(&o.replicas, "replicas", 100, "size of the Deployment whose start is measured; 0: none")
	flag.StringVar(&o.parts, "parts", "", "make these parts only, with commas: services, deployments, jobs, volumes, classes, resize, streams, drain, many")
	flag.Parse()
	if err := run(ctx, o); err != nil {
		fmt.Fprintf(os.Stderr, "clustere2e: %v\n", err)
		os.Exit(1)
	}
}
