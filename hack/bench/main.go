// Cribench measures container runtimes through their CRI socket, one by one
// or several in turn, and sums a comparison up against Naru's targets.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/signal"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const goarch = goruntime.GOARCH

var errUsage = errors.New("usage")

const usageText = `cribench measures container runtimes through their CRI socket.

  cribench MEASURE[,MEASURE...] --endpoint unix:///PATH --image REF [options]
  cribench all --endpoint unix:///PATH --image REF [options]
  cribench compare --run MEASURE,... --endpoint A=unix:///PATH --endpoint B=unix:///PATH [options]
  cribench cleanup --endpoint unix:///PATH      remove what killed runs left
  cribench report FILE.json                     a table of a compare run, against the targets

Measures:
`

// Options are the command line of a measuring command.
type Options struct {
	Targets     []*Target
	Counts      map[string]int // by measure, "" for all
	Pods        int
	BasePods    int // density: pods that run before the first weighing
	Containers  int
	Concurrency int
	Warmup      int
	Rounds      int
	ExecCmd     []string
	LogMB       int
	LineBytes   int
	SizeMB      float64
	Settle      time.Duration
	Timeout     time.Duration
	MaxTime     time.Duration
	JSON        string
	Pull        bool

	mu  sync.Mutex
	tty bool
}

func (o *Options) count(measure string) int {
	for _, k := range []string{measure, ""} {
		if n, ok := o.Counts[k]; ok {
			return n
		}
	}
	return defaultCount[measure]
}

func (o *Options) concurrency(def int) int {
	if o.Concurrency > 0 {
		return o.Concurrency
	}
	return def
}

// progress shows one line that replaces itself; an empty one clears it.
func (o *Options) progress(format string, args ...any) {
	if !o.tty {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	fmt.Fprintf(os.Stderr, "\r\033[K"+format, args...)
}

// stringList is a flag that can be repeated.
type stringList []string

func (s *stringList) String() string     { return strings.Join(*s, " ") }
func (s *stringList) Set(v string) error { *s = append(*s, v); return nil }

// parseOptions reads the flags of the measuring commands.
func parseOptions(command string, args []string) (o *Options, run string, err error) {
	o = &Options{}
	var t Target // the defaults of all targets
	var endpoints, procMatch, set stringList
	fs := flag.NewFlagSet(command, flag.ContinueOnError)
	fs.Var(&endpoints, "endpoint", "unix:///PATH of the CRI socket; for compare NAME=unix:///PATH, repeated")
	fs.StringVar(&t.Image, "image", "", "image with a busybox-like /bin/sh, as the runtime knows it")
	fs.StringVar(&t.Handler, "runtime-handler", "", "runtime handler of the pods")
	fs.StringVar(&t.CgroupParent, "cgroup-parent", "auto", "cgroup parent of the pods, or none; auto is /cribench, or cribench.slice where\nthe runtime reports the systemd driver")
	fs.StringVar(&t.Network, "network", "pod", "pod or host")
	fs.StringVar(&t.LogDir, "log-dir", "", "where to put the container logs (default the temporary directory)")
	fs.StringVar(&t.Seccomp, "seccomp", "runtime-default", "runtime-default or unconfined")
	fs.StringVar(&t.PullImage, "pull-image", "", "image that pull fetches and removes")
	fs.Var(&procMatch, "proc-match", "regexp of executable paths that belong to the runtime (repeatable;\ndefault the owner of the socket, and "+helperPattern+")")
	count := fs.String("count", "", "how many: N for all measures, or pod=N,exec=M")
	fs.IntVar(&o.Pods, "pods", 50, "pods of burst, density and list")
	fs.IntVar(&o.BasePods, "base-pods", 0, "pods of density that run before it first weighs: the figures are then the\nslope from --base-pods to --pods")
	fs.IntVar(&o.Containers, "containers", 1, "containers in each pod of list")
	fs.IntVar(&o.Concurrency, "concurrency", 0, "calls at a time (default burst 10, exec 1, others 2)")
	fs.IntVar(&o.Warmup, "warmup", 1, "unrecorded rounds before each measure")
	execCmd := fs.String("exec-cmd", "/bin/true", "command of exec, words split at spaces")
	fs.IntVar(&o.LogMB, "log-mb", 64, "MB of lines that log writes")
	fs.IntVar(&o.LineBytes, "line-bytes", 100, "bytes of each line, with its end")
	fs.Float64Var(&o.SizeMB, "size-mb", 0, "MB of --pull-image, to report a rate")
	fs.DurationVar(&o.Settle, "settle", 3*time.Second, "rest before density weighs")
	fs.DurationVar(&o.Timeout, "timeout", 60*time.Second, "limit of one CRI call")
	fs.DurationVar(&o.MaxTime, "max-time", 20*time.Minute, "limit of the whole run")
	fs.StringVar(&o.JSON, "json", "", "also write the results to this file")
	fs.BoolVar(&o.Pull, "pull", false, "pull --image if the runtime does not have it (and leave it there)")
	if command == "compare" {
		fs.StringVar(&run, "run", "pod,exec", "what to compare, comma-separated")
		fs.IntVar(&o.Rounds, "rounds", 5, "interleaved rounds; --count is for each of them")
		fs.Var(&set, "set", "NAME.OPTION=VALUE: one endpoint's own image, runtime-handler, cgroup-parent, network,\nlog-dir, seccomp, pull-image or proc-match (repeatable)")
	} else {
		run = command
	}
	bad := func(format string, args ...any) (*Options, string, error) {
		return nil, "", fmt.Errorf("%w: "+format, append([]any{errUsage}, args...)...)
	}
	if err := fs.Parse(args); errors.Is(err, flag.ErrHelp) {
		return nil, "", err
	} else if err != nil {
		return nil, "", errUsage // the flag package has said what
	}
	if fs.NArg() > 0 {
		return bad("unexpected argument %q", fs.Arg(0))
	}
	if o.Counts, err = parseCounts(*count); err != nil {
		return bad("%v", err)
	}
	for _, v := range []int{o.Pods, o.Containers, o.LogMB, o.LineBytes - 1} {
		if v < 1 {
			return bad("--pods, --containers, --log-mb must be at least 1, --line-bytes 2")
		}
	}
	if o.BasePods < 0 || o.BasePods >= o.Pods {
		return bad("--base-pods must be less than --pods")
	}
	if o.Warmup < 0 || o.Concurrency < 0 || o.Timeout <= 0 || o.MaxTime <= 0 || (command == "compare" && o.Rounds < 1) {
		return bad("--warmup, --concurrency, --timeout, --max-time or --rounds is out of range")
	}
	if o.ExecCmd = strings.Fields(*execCmd); len(o.ExecCmd) == 0 {
		return bad("--exec-cmd is empty")
	}
	t.ProcMatch = procMatch
	for _, e := range endpoints {
		own := t
		own.Endpoint, own.Name = e, "runtime"
		if name, rest, ok := strings.Cut(e, "="); ok {
			own.Name, own.Endpoint = name, rest
		} else if command == "compare" {
			return bad("--endpoint %q is not NAME=unix:///PATH", e)
		}
		if slices.ContainsFunc(o.Targets, func(x *Target) bool { return x.Name == own.Name }) {
			return bad("two endpoints are called %q", own.Name)
		}
		o.Targets = append(o.Targets, &own)
	}
	switch {
	case command == "compare" && len(o.Targets) < 2:
		return bad("compare needs two or more --endpoint NAME=unix:///PATH")
	case command != "compare" && len(o.Targets) != 1:
		return bad("one --endpoint is needed")
	}
	if err := applySets(o.Targets, set); err != nil {
		return bad("%v", err)
	}
	for _, t := range o.Targets {
		if t.Image == "" && command != "cleanup" {
			return bad("--image is needed")
		}
		if t.Network != "pod" && t.Network != "host" {
			return bad("--network %q is not pod or host", t.Network)
		}
		if t.Seccomp != "runtime-default" && t.Seccomp != "unconfined" {
			return bad("--seccomp %q is not runtime-default or unconfined", t.Seccomp)
		}
	}
	fi, err := os.Stderr.Stat()
	_, terr := unix.IoctlGetTermios(int(os.Stderr.Fd()), unix.TCGETS)
	o.tty = err == nil && fi.Mode()&os.ModeCharDevice != 0 && terr == nil
	return o, run, nil
}

func parseCounts(s string) (map[string]int, error) {
	counts := map[string]int{}
	for part := range strings.SplitSeq(s, ",") {
		if part == "" {
			continue
		}
		name, value, ok := strings.Cut(part, "=")
		if !ok {
			name, value = "", part
		} else if !isMeasure(name) {
			return nil, fmt.Errorf("--count: no measure is called %q", name)
		}
		n, err := strconv.Atoi(value)
		if err != nil || n < 1 {
			return nil, fmt.Errorf("--count: %q is not a positive number", value)
		}
		counts[name] = n
	}
	return counts, nil
}

// applySets changes single targets as --set NAME.OPTION=VALUE says.
func applySets(targets []*Target, set []string) error {
	fresh := map[string]bool{} // targets whose proc-match was replaced
	for _, s := range set {
		key, value, ok := strings.Cut(s, "=")
		name, option, ok2 := strings.Cut(key, ".")
		i := slices.IndexFunc(targets, func(t *Target) bool { return t.Name == name })
		if !ok || !ok2 || i < 0 {
			return fmt.Errorf("--set %q is not NAME.OPTION=VALUE of an endpoint", s)
		}
		t := targets[i]
		switch option {
		case "image":
			t.Image = value
		case "runtime-handler":
			t.Handler = value
		case "cgroup-parent":
			t.CgroupParent = value
		case "network":
			t.Network = value
		case "log-dir":
			t.LogDir = value
		case "seccomp":
			t.Seccomp = value
		case "pull-image":
			t.PullImage = value
		case "proc-match":
			if !fresh[name] {
				fresh[name], t.ProcMatch = true, nil
			}
			t.ProcMatch = append(t.ProcMatch, value)
		default:
			return fmt.Errorf("--set %q: no such option of an endpoint", s)
		}
	}
	return nil
}

func isMeasure(name string) bool {
	for _, m := range measures {
		if m.name == name {
			return true
		}
	}
	return false
}

// selected turns "pod,exec" or "all" into measure names.
func selected(run string, pullImage bool) ([]string, error) {
	if run == "all" {
		var all []string
		for _, m := range measures {
			if m.name != "pull" || pullImage {
				all = append(all, m.name)
			}
		}
		return all, nil
	}
	names := strings.Split(run, ",")
	for _, n := range names {
		if !isMeasure(n) {
			return nil, fmt.Errorf("%w: no measure or command is called %q", errUsage, n)
		}
	}
	return names, nil
}

// Report is what --json writes.
type Report struct {
	Tool     string           `json:"tool"`
	Started  time.Time        `json:"started"`
	Seconds  float64          `json:"seconds"`
	Host     map[string]any   `json:"host"`
	Runtimes []Target         `json:"runtimes"`
	Results  []RuntimeResult  `json:"results"`
	Compared []ComparedMetric `json:"compared,omitempty"`
	Error    string           `json:"error,omitempty"`
}

// RuntimeResult is one measurement of one runtime; Round counts from 1 in compare.
type RuntimeResult struct {
	Runtime string `json:"runtime"`
	Round   int    `json:"round,omitempty"`
	Result
}

func host() map[string]any {
	h := map[string]any{"cpus": goruntime.NumCPU(), "arch": goarch}
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		h["kernel"] = unix.ByteSliceToString(u.Release[:])
	}
	var st unix.Statfs_t
	if unix.Statfs("/sys/fs/cgroup", &st) == nil {
		h["cgroup"] = "v1"
		if st.Type == unix.CGROUP2_SUPER_MAGIC {
			h["cgroup"] = "v2"
		}
	}
	var si unix.Sysinfo_t
	if unix.Sysinfo(&si) == nil {
		h["memory_mib"] = uint64(si.Totalram) * uint64(si.Unit) >> 20
	}
	load, _ := os.ReadFile("/proc/loadavg")
	h["loadavg"] = strings.TrimSpace(string(load))
	return h
}

// interrupts makes two contexts: the first Ctrl-C ends soft (finish the
// running call, then clean up), the second ends hard (abandon the call); a
// third exits at once. The time limit ends soft, too.
func interrupts(limit time.Duration) (soft, hard context.Context) {
	hard, cancelHard := context.WithCancelCause(context.Background())
	soft, cancelSoft := context.WithCancelCause(hard)
	c := make(chan os.Signal, 3)
	signal.Notify(c, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	go func() {
		<-c
		fmt.Fprintln(os.Stderr, "\ninterrupted: finishing the running calls, then cleaning up")
		cancelSoft(errInterrupted)
		<-c
		fmt.Fprintln(os.Stderr, "\ninterrupted again: abandoning the running calls, still cleaning up")
		cancelHard(errInterrupted)
		<-c
		fmt.Fprintln(os.Stderr, "\ngiving up; 'cribench cleanup' removes what is left")
		os.Exit(130)
	}()
	time.AfterFunc(limit, func() { cancelSoft(fmt.Errorf("--max-time %s is over", limit)) })
	return soft, hard
}

var errInterrupted = errors.New("interrupted")

// runMeasure runs one measurement and removes whatever it left.
func runMeasure(soft context.Context, r *Runtime, o *Options, name string) (Result, error) {
	i := slices.IndexFunc(measures, func(m measure) bool { return m.name == name })
	start := time.Now()
	res, err := measures[i].run(soft, r, o)
	if soft.Err() != nil && (err == nil || errors.Is(err, context.Canceled)) {
		err = context.Cause(soft)
	}
	o.progress("%s clean up", r.Name)
	if _, cerr := r.cleanup(r.labels()); cerr != nil && r.hard.Err() == nil {
		err = errors.Join(err, fmt.Errorf("cleaning up: %w", cerr))
	}
	o.progress("")
	res.Measure, res.Seconds = name, time.Since(start).Seconds()
	if err != nil {
		err = fmt.Errorf("%s of %s: %w", name, r.Name, err)
		res.Error = err.Error()
	}
	return *res, err
}

// measureCommand runs the selected measures, or compares runtimes.
func measureCommand(command string, args []string) (err error) {
	o, run, err := parseOptions(command, args)
	if err != nil {
		return err
	}
	pullImage := !slices.ContainsFunc(o.Targets, func(t *Target) bool { return t.PullImage == "" })
	names, err := selected(run, pullImage)
	if err != nil {
		return err
	}
	report := &Report{Tool: "cribench", Started: time.Now().UTC().Truncate(time.Second), Host: host()}
	soft, hard := interrupts(o.MaxTime)
	var runtimes []*Runtime
	defer func() {
		for _, r := range runtimes {
			if cerr := r.close(); cerr != nil {
				err = errors.Join(err, fmt.Errorf("cleaning up %s: %w", r.Name, cerr))
			}
		}
		report.Seconds = time.Since(report.Started).Seconds()
		if err != nil {
			report.Error = err.Error()
		}
		if o.JSON != "" {
			b, jerr := json.MarshalIndent(report, "", "  ")
			if jerr == nil {
				jerr = os.WriteFile(o.JSON, append(b, '\n'), 0o644)
			}
			err = errors.Join(err, jerr)
		}
	}()
	for _, t := range o.Targets {
		r, err := connect(hard, *t, o.Timeout)
		if err != nil {
			return err
		}
		runtimes = append(runtimes, r)
		if err := r.prepare(o.Pull); err != nil {
			return fmt.Errorf("%s: %w", t.Name, err)
		}
		report.Runtimes = append(report.Runtimes, r.Target)
		fmt.Printf("%s: %s\n", r.Name, r.Software)
	}
	if command == "compare" {
		return compare(soft, runtimes, o, names, report)
	}
	for _, name := range names {
		res, merr := runMeasure(soft, runtimes[0], o, name)
		printResult(os.Stdout, runtimes[0].Name, res)
		report.Results = append(report.Results, RuntimeResult{runtimes[0].Name, 0, res})
		err = errors.Join(err, merr)
		if soft.Err() != nil {
			break
		}
	}
	return err
}

// cleanupCommand removes what runs left that were killed, and what runs that
// still go on have made.
func cleanupCommand(args []string) error {
	o, _, err := parseOptions("cleanup", args)
	if err != nil {
		return err
	}
	_, hard := interrupts(o.MaxTime)
	r, err := connect(hard, *o.Targets[0], o.Timeout)
	if err != nil {
		return err
	}
	defer r.conn.Close()
	n, err := r.cleanup(map[string]string{labelTool: "true"})
	fmt.Printf("removed %d pods\n", n)
	for _, dir := range cgroupMounts() {
		removeCgroup(filepath.Join(dir, ownCgroup))
	}
	base := r.LogDir
	if base == "" {
		base = os.TempDir()
	}
	logs, _ := filepath.Glob(filepath.Join(base, logPrefix+"*"))
	for _, dir := range logs {
		err = errors.Join(err, os.RemoveAll(dir))
	}
	return err
}

func printUsage() {
	fmt.Fprint(os.Stderr, usageText)
	for _, m := range measures {
		fmt.Fprintf(os.Stderr, "  %-8s %s, default %d\n", m.name, m.help, defaultCount[m.name])
	}
	fmt.Fprintf(os.Stderr, "\n'%s pod --help' lists the options.\n", filepath.Base(os.Args[0]))
}

func main() {
	if len(os.Args) < 2 || slices.Contains([]string{"help", "-h", "--help"}, os.Args[1]) {
		printUsage()
		os.Exit(2)
	}
	commands := map[string]func([]string) error{
		"report": reportCommand, "cleanup": cleanupCommand,
	}
	var err error
	if f, ok := commands[os.Args[1]]; ok {
		err = f(os.Args[2:])
	} else if strings.HasPrefix(os.Args[1], "-") {
		err = fmt.Errorf("%w: the first argument names a command or measures: %s", errUsage,
			strings.Join(slices.Sorted(maps.Keys(commands)), ", ")+", compare, all, ...")
	} else {
		err = measureCommand(os.Args[1], os.Args[2:])
	}
	switch {
	case err == nil:
	case errors.Is(err, flag.ErrHelp):
	case errors.Is(err, errInterrupted):
		fmt.Fprintln(os.Stderr, "cribench:", err)
		os.Exit(130)
	case errors.Is(err, errUsage):
		if err != errUsage { // else the flag package has printed it
			fmt.Fprintln(os.Stderr, "cribench:", err)
		}
		os.Exit(2)
	default:
		fmt.Fprintln(os.Stderr, "cribench:", err)
		os.Exit(1)
	}
}
