// Command crimodel is a reference model of CRI's semantics. It drives any
// runtime through its socket with concurrent, cancelled and duplicate requests,
// knows what each answer must be, and says where the runtime differs. It shares
// no code with the runtime that it judges.
//
// Every worker owns its pods, so what they must be is known at each moment,
// whatever the others do. A call that ends with Unavailable (the daemon was
// killed) or that its caller gave up on is made again, with the same arguments,
// as the kubelet does, until it comes through.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"time"
)

func main() {
	os.Exit(run(os.Args[1:]))
}

func run(args []string) int {
	f := flag.NewFlagSet("crimodel", flag.ExitOnError)
	var o options
	f.StringVar(&o.Endpoint, "endpoint", "", "the runtime's socket, unix:///PATH")
	f.StringVar(&o.Image, "image", "", "an image with sh, seq and sleep, in the runtime's store")
	f.StringVar(&o.LogDir, "logs", "", "folder for the logs of containers")
	f.StringVar(&o.CgroupParent, "cgroup-parent", "", "parent of the pods' cgroups")
	f.Uint64Var(&o.Seed, "seed", 0, "of the random choices; 0: a new one")
	f.IntVar(&o.Workers, "workers", 4, "pods at a time")
	f.IntVar(&o.Pods, "pods", 0, "end after so many pods; 0: by time alone")
	f.IntVar(&o.Lines, "lines", 2000, "log lines of a container, at most")
	f.DurationVar(&o.Duration, "duration", 10*time.Second, "how long new pods are begun")
	f.DurationVar(&o.Patience, "patience", 60*time.Second, "how long a call may be tried again")
	f.DurationVar(&o.Settle, "settle", 15*time.Second, "how long the host may take to be as it was")
	f.BoolVar(&o.UnknownExits, "unknown-exits", false, "an exit may be lost, if it says so: the parent of the containers is killed, on an older kernel")
	tolerate := f.String("tolerate", "", "texts, with | between them: a failure with one of them is tried again")
	f.StringVar(&o.Host.Folders, "folders", "", "the runtime's folders, with commas: no mount may be left below")
	f.StringVar(&o.Host.Links, "links", "", "prefix of the runtime's network links")
	f.StringVar(&o.Host.Cgroup, "cgroup", "", "name of the cgroup below which all pods are")
	f.StringVar(&o.Host.NftTable, "nft-table", "", "the runtime's nftables table (needs nft)")
	f.StringVar(&o.Host.PIDs, "pids", "", "the runtime's processes, with commas: their descriptors are counted")
	if err := f.Parse(args); err != nil {
		return 2
	}
	if *tolerate != "" {
		o.Tolerate = strings.Split(*tolerate, "|")
	}
	if o.Seed == 0 {
		o.Seed = uint64(time.Now().UnixNano())
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	fmt.Fprintf(os.Stderr, "crimodel: seed %d\n", o.Seed)
	r, err := Run(ctx, o)
	if err != nil {
		fmt.Fprintln(os.Stderr, "crimodel:", err)
		return 2
	}
	out, _ := json.MarshalIndent(r, "", "  ")
	fmt.Println(string(out))
	if len(r.Violations) > 0 {
		return 1
	}
	return 0
}
