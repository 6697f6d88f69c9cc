// Package doctor looks at a host and says what it lacks for running pods, or has
// in an unusual way, and what follows from it.
//
// It tries things rather than compare versions where trying leaves no trace:
// mounts stay detached, system calls are made with arguments that cannot
// succeed, files are made below a temporary folder and removed. It changes
// nothing.
package doctor

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// Status of one check.
type Status string

// The statuses. Only FAIL means that pods cannot be run.
const (
	OK   Status = "OK"
	Warn Status = "WARN"
	Fail Status = "FAIL"
)

// Result is what one check found.
type Result struct {
	Name    string `json:"name"`
	Status  Status `json:"status"`
	Detail  string `json:"detail"`            // what is
	Follows string `json:"follows,omitempty"` // what follows, and what to do
}

// Config says what is looked at.
type Config struct {
	Root          string   // where images and writable layers live
	Run           string   // of one boot
	Socket        string   // CRI
	CgroupDriver  string   // as configured
	Table         string   // Naru's own nftables table
	Plugin        string   // that makes the network of pods, as configured
	CNIDirs       []string // folders of CNI configurations, the default one first
	CNIBinDirs    []string
	CNIState      string // folder of what Naru keeps of it
	UserNS        bool   // user namespaces are wanted
	Monitor       func() (string, error)
	Handlers      map[string]string // programs of OCI runtimes, by handler
	Holder        []string          // a program that reads standard input to its end, for a user namespace
	ProcSys, Proc string            // for tests; empty = /proc/sys, /proc
}

// checkTime bounds one check; a network file system that hangs must not hang
// the doctor.
const checkTime = 15 * time.Second

type check struct {
	name string
	run  func(context.Context, *Config) []Result
}

// checks in the order in which they are shown.
var checks = []check{
	{"kernel", checkKernel},
	{"system calls", checkCalls},
	{"privileges", checkPrivileges},
	{"cgroups", checkCgroups},
	{"overlayfs", checkOverlay},
	{"user namespaces", checkUserNS},
	{"nftables", checkNftables},
	{"firewall", checkFirewall},
	{"CNI", checkCNI},
	{"sysctls", checkSysctls},
	{"disk", checkDisk},
	{"security modules", checkLSM},
	{"seccomp", checkSeccomp},
	{"clock", checkClock},
	{"handlers", checkHandlers},
	{"daemon", checkDaemon},
	{"kubelet", checkKubelet},
}

// Run makes all checks, in parallel, and returns their results in order.
func Run(ctx context.Context, cfg Config) []Result {
	if cfg.Proc == "" {
		cfg.Proc = "/proc"
	}
	if cfg.ProcSys == "" {
		cfg.ProcSys = "/proc/sys"
	}
	all := make([][]Result, len(checks))
	var wg sync.WaitGroup
	for i, c := range checks {
		wg.Go(func() { all[i] = one(ctx, c, &cfg) })
	}
	wg.Wait()
	var out []Result
	for _, r := range all {
		out = append(out, r...)
	}
	return out
}

// one makes a check that may hang or panic on a strange host.
func one(ctx context.Context, c check, cfg *Config) []Result {
	ctx, cancel := context.WithTimeout(ctx, checkTime)
	defer cancel()
	done := make(chan []Result, 1)
	go func() { // not waited for when it hangs: the program is about to end
		defer func() {
			if p := recover(); p != nil {
				done <- []Result{{Name: c.name, Status: Warn, Detail: fmt.Sprintf("the check itself broke: %v", p), Follows: "please report this"}}
			}
		}()
		done <- c.run(ctx, cfg)
	}()
	select {
	case r := <-done:
		return r
	case <-ctx.Done():
		return []Result{{Name: c.name, Status: Warn, Detail: "no answer in " + checkTime.String(), Follows: "something on this host hangs; the daemon may hang there too"}}
	}
}

// Worst is the worst status among results.
func Worst(results []Result) Status {
	worst := OK
	for _, r := range results {
		if r.Status == Fail || (r.Status == Warn && worst == OK) {
			worst = r.Status
		}
	}
	return worst
}

func ok(name, format string, args ...any) []Result {
	return []Result{{Name: name, Status: OK, Detail: fmt.Sprintf(format, args...)}}
}

func result(name string, s Status, detail, follows string) []Result {
	return []Result{{Name: name, Status: s, Detail: detail, Follows: follows}}
}
