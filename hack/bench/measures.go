package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

type measure struct {
	name string
	run  func(context.Context, *Runtime, *Options) (*Result, error)
	help string
}

// measures are the things that can be measured, in the order of "all".
var measures = []measure{
	{"pod", measurePod, "sequential pod lifecycles, each call's latency (count: pods)"},
	{"burst", measureBurst, "start --pods at once, then stop them (count: rounds)"},
	{"exec", measureExec, "ExecSync in one container, latency and CPU (count: execs)"},
	{"density", measureDensity, "memory, threads, fds, processes per idle pod (count: rounds)"},
	{"list", measureList, "list and status calls with --pods pods present (count: calls of each)"},
	{"log", measureLog, "throughput of container output into the log file (count: rounds)"},
	{"pull", measurePull, "PullImage of --pull-image, removed in between (count: pulls)"},
}

// defaultCount is --count where it is not given.
var defaultCount = map[string]int{"pod": 20, "burst": 1, "exec": 100, "density": 1, "list": 50, "log": 3, "pull": 5}

// idle prints one line, then waits without using the CPU.
var idle = []string{"/bin/sh", "-c", "echo cribench; exec sleep 86400"}

// measurePod runs pods one after the other.
func measurePod(ctx context.Context, r *Runtime, o *Options) (*Result, error) {
	n := o.count("pod")
	res := &Result{Params: map[string]any{"count": n}}
	rec := &Recorder{}
	if err := warmup(ctx, r, o); err != nil {
		return res, err
	}
	cpu := startCPU(r)
	for i := range n {
		o.progress("%s pod %d/%d", r.Name, i+1, n)
		if err := lifecycle(ctx, r, rec); err != nil {
			return res, err
		}
	}
	res.Metrics = append(rec.metrics("ready", "first-output"), cpu.metrics("pod", n, false)...)
	return res, nil
}

func lifecycle(ctx context.Context, r *Runtime, rec *Recorder) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	p, err := r.newPod()
	if err != nil {
		return err
	}
	first, err := watchFirstLine(p.logPath(0))
	if err != nil {
		return err
	}
	defer first.close()
	start := time.Now()
	if err := r.runSandbox(p, rec); err != nil {
		return err
	}
	if err := r.startContainer(p, rec, idle...); err != nil {
		return err
	}
	rec.add("ready", time.Since(start))
	select {
	case at := <-first.at:
		rec.add("first-output", at.Sub(start))
	case <-time.After(r.timeout):
		return fmt.Errorf("no line in %s after %s", filepath.Base(p.logPath(0)), r.timeout)
	case <-r.hard.Done():
		return r.hard.Err()
	}
	down := time.Now()
	if err := r.teardown(p, rec); err != nil {
		return err
	}
	rec.add("teardown", time.Since(down))
	return nil
}

// startPods starts n pods with k idle containers each, limit at a time. It
// stops at the first error; what was started is left to cleanup.
func startPods(ctx context.Context, r *Runtime, o *Options, n, k, limit int, rec *Recorder) ([]*Pod, error) {
	pods := make([]*Pod, n)
	err := parallel(ctx, n, limit, func(i int) error {
		p, err := r.newPod()
		if err != nil {
			return err
		}
		start := time.Now()
		if err := r.runSandbox(p, rec); err != nil {
			return err
		}
		for range k {
			if err := r.startContainer(p, rec, idle...); err != nil {
				return err
			}
		}
		rec.add("ready", time.Since(start))
		pods[i] = p
		return nil
	}, func(done int) { o.progress("%s start %d/%d", r.Name, done, n) })
	return pods, err
}

func stopPods(ctx context.Context, r *Runtime, o *Options, pods []*Pod, limit int, rec *Recorder) error {
	return parallel(ctx, len(pods), limit, func(i int) error {
		start := time.Now()
		if err := r.teardown(pods[i], rec); err != nil {
			return err
		}
		rec.add("teardown", time.Since(start))
		return nil
	}, func(done int) { o.progress("%s stop %d/%d", r.Name, done, len(pods)) })
}

// parallel runs f(0..n-1), at most limit at a time, up to the first error.
func parallel(ctx context.Context, n, limit int, f func(int) error, done func(int)) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	var mu sync.Mutex
	finished := 0
	slots := make(chan struct{}, max(1, limit))
	for i := range n {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
		}
		if ctx.Err() != nil {
			break
		}
		wg.Go(func() {
			defer func() { <-slots }()
			if err := f(i); err != nil {
				cancel(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			finished++
			done(finished)
		})
	}
	wg.Wait()
	return context.Cause(ctx)
}

// measureBurst starts many pods at once and stops them again.
func measureBurst(ctx context.Context, r *Runtime, o *Options) (*Result, error) {
	rounds, n, limit := o.count("burst"), o.Pods, o.concurrency(10)
	res := &Result{Params: map[string]any{"rounds": rounds, "pods": n, "concurrency": limit}}
	if err := warmup(ctx, r, o); err != nil {
		return res, err
	}
	rec := &Recorder{}
	var up, down, upRate, downRate []float64
	cpu := startCPU(r)
	for range rounds {
		start := time.Now()
		pods, err := startPods(ctx, r, o, n, 1, limit, rec)
		if err != nil {
			return res, err
		}
		wall := time.Since(start)
		if err := allRunning(r, n); err != nil {
			return res, err
		}
		up = append(up, ms(wall))
		upRate = append(upRate, float64(n)/wall.Seconds())
		start = time.Now()
		if err := stopPods(ctx, r, o, pods, limit, rec); err != nil {
			return res, err
		}
		wall = time.Since(start)
		down = append(down, ms(wall))
		downRate = append(downRate, float64(n)/wall.Seconds())
	}
	res.Metrics = append(rec.metrics("ready", "teardown"), cpu.metrics("pod", n*rounds, false)...)
	res.Metrics = append(res.Metrics,
		scalar("start-wall", "ms", "lower", median(up), "until all containers run; median of rounds"),
		scalar("start-rate", "pods/s", "higher", median(upRate), ""),
		scalar("stop-wall", "ms", "lower", median(down), ""),
		scalar("stop-rate", "pods/s", "higher", median(downRate), ""))
	return res, nil
}

func warmup(ctx context.Context, r *Runtime, o *Options) error {
	for range o.Warmup {
		if err := lifecycle(ctx, r, nil); err != nil {
			return fmt.Errorf("warm-up: %w", err)
		}
	}
	return nil
}

// allRunning checks that n pods are ready and their containers run.
func allRunning(r *Runtime, n int) error {
	pods, containers, err := r.listed(r.labels())
	if err != nil {
		return err
	}
	if len(pods) != n {
		return fmt.Errorf("%d pods are listed instead of %d", len(pods), n)
	}
	for _, p := range pods {
		if p.State != cri.PodSandboxState_SANDBOX_READY {
			return fmt.Errorf("pod %s is %s", p.Metadata.GetName(), p.State)
		}
	}
	for _, c := range containers {
		if c.State != cri.ContainerState_CONTAINER_RUNNING {
			return fmt.Errorf("container %s of sandbox %s is %s", c.Metadata.GetName(), c.PodSandboxId, c.State)
		}
	}
	return nil
}

// measureExec runs a trivial command in a running container.
func measureExec(ctx context.Context, r *Runtime, o *Options) (*Result, error) {
	n, limit := o.count("exec"), o.concurrency(1)
	res := &Result{Params: map[string]any{"count": n, "concurrency": limit}}
	pods, err := startPods(ctx, r, o, 1, 1, 1, nil)
	if err != nil {
		return res, err
	}
	rec := &Recorder{}
	one := func(rec *Recorder) error {
		d, err := r.call("ExecSync", func(ctx context.Context) error {
			resp, err := r.ExecSync(ctx, &cri.ExecSyncRequest{
				ContainerId: pods[0].Containers[0], Cmd: o.ExecCmd, Timeout: int64(math.Ceil(r.timeout.Seconds()))})
			if err == nil && resp.ExitCode != 0 {
				err = fmt.Errorf("%q exited with %d: %s", o.ExecCmd, resp.ExitCode, bytes.TrimSpace(resp.Stderr))
			}
			return err
		})
		if err == nil {
			rec.add("ExecSync", d)
		}
		return err
	}
	for range 3 * o.Warmup {
		if err := one(nil); err != nil {
			return res, err
		}
	}
	cpu := startCPU(r)
	start := time.Now()
	if err := parallel(ctx, n, limit, func(int) error { return one(rec) },
		func(done int) { o.progress("%s exec %d/%d", r.Name, done, n) }); err != nil {
		return res, err
	}
	rate := float64(n) / time.Since(start).Seconds()
	cost := cpu.metrics("exec", n, true)
	res.Metrics = append(rec.metrics(), scalar("exec-rate", "1/s", "higher", rate, ""))
	res.Metrics = append(res.Metrics, cost...)
	return res, stopPods(ctx, r, o, pods, 1, nil)
}

// usage sums up a scan of processes.
type usage struct {
	pss, anon           int64
	procs, threads, fds int
}

func sumUp(procs map[int]Proc) (total usage, byExe map[string]usage) {
	byExe = map[string]usage{}
	for _, p := range procs {
		u := usage{p.PSSKiB, p.AnonKiB, 1, p.Threads, p.FDs}
		total = total.plus(u, 1)
		byExe[p.Exe] = byExe[p.Exe].plus(u, 1)
	}
	return total, byExe
}

func (a usage) plus(b usage, sign int) usage {
	s := int64(sign)
	return usage{a.pss + s*b.pss, a.anon + s*b.anon, a.procs + sign*b.procs, a.threads + sign*b.threads, a.fds + sign*b.fds}
}

// measureDensity starts idle pods and weighs the runtime's processes.
func measureDensity(ctx context.Context, r *Runtime, o *Options) (*Result, error) {
	rounds, n := o.count("density"), o.Pods-o.BasePods
	res := &Result{Params: map[string]any{"rounds": rounds, "pods": o.Pods, "base-pods": o.BasePods, "settle": o.Settle.String()}}
	if err := warmup(ctx, r, o); err != nil {
		return res, err
	}
	samples := map[string][]float64{}
	var order []string
	add := func(name string, v float64) {
		if _, ok := samples[name]; !ok {
			order = append(order, name)
		}
		samples[name] = append(samples[name], v)
	}
	settle := func() error {
		o.progress("%s settle", r.Name)
		select {
		case <-time.After(o.Settle):
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	for range rounds {
		base, err := startPods(ctx, r, o, o.BasePods, 1, o.concurrency(2), nil)
		if err != nil {
			return res, err
		}
		if err := settle(); err != nil {
			return res, err
		}
		before, beforeExe := sumUp(r.match.scan(true))
		if before.procs == 0 {
			return res, fmt.Errorf("no process matches --proc-match %q", r.ProcMatch)
		}
		mem := memAvailableKiB()
		pods, err := startPods(ctx, r, o, n, 1, o.concurrency(2), nil)
		if err != nil {
			return res, err
		}
		if err := allRunning(r, o.Pods); err != nil {
			return res, err
		}
		if err := settle(); err != nil {
			return res, err
		}
		after, afterExe := sumUp(r.match.scan(true))
		memAfter := memAvailableKiB()
		per := func(v float64) float64 { return v / float64(n) }
		d := after.plus(before, -1)
		add("pss/pod", per(float64(d.pss)))
		add("pss-anon/pod", per(float64(d.anon)))
		add("mem-available/pod", per(float64(mem-memAfter)))
		add("processes/pod", per(float64(d.procs)))
		add("threads/pod", per(float64(d.threads)))
		add("fds/pod", per(float64(d.fds)))
		exes := slices.Sorted(keys(afterExe))
		for _, exe := range exes {
			e := afterExe[exe].plus(beforeExe[exe], -1)
			add("pss/pod "+exe, per(float64(e.pss)))
			if e.procs != 0 {
				add("processes/pod "+exe, per(float64(e.procs)))
			}
		}
		add("pss-before", float64(before.pss))
		if err := stopPods(ctx, r, o, pods, o.concurrency(2), nil); err != nil {
			return res, err
		}
		if err := settle(); err != nil {
			return res, err
		}
		left, _ := sumUp(r.match.scan(true))
		d = left.plus(before, -1)
		add("pss-kept", float64(d.pss))
		add("processes-kept", float64(d.procs))
		add("threads-kept", float64(d.threads))
		add("fds-kept", float64(d.fds))
		if err := stopPods(ctx, r, o, base, o.concurrency(2), nil); err != nil {
			return res, err
		}
	}
	for _, name := range order {
		res.Metrics = append(res.Metrics, densityMetric(name, median(samples[name])))
	}
	return res, nil
}

func densityMetric(name string, v float64) Metric {
	unit, note := "KiB", ""
	switch name {
	case "pss/pod":
		note = "runtime processes, all of the below"
	case "mem-available/pod":
		note = "whole machine: kernel memory and the workload too"
	case "pss-before":
		note = "runtime processes at the first weighing"
	case "pss-kept":
		note = "growth that stayed after the pods were removed again"
	}
	for _, counted := range []string{"processes", "threads", "fds"} {
		if len(name) > len(counted) && name[:len(counted)] == counted {
			unit = "count"
		}
	}
	return scalar(name, unit, "lower", v, note)
}

// listBudget ends the repetitions of a slow call before their number is reached.
const listBudget = 15 * time.Second

// measureList times the calls that a kubelet repeats all the time.
func measureList(ctx context.Context, r *Runtime, o *Options) (*Result, error) {
	calls, n, k := o.count("list"), o.Pods, o.Containers
	res := &Result{Params: map[string]any{"calls": calls, "pods": n, "containers": k}}
	pods, err := startPods(ctx, r, o, n, k, o.concurrency(2), nil)
	if err != nil {
		return res, err
	}
	if err := allRunning(r, n); err != nil {
		return res, err
	}
	rec := &Recorder{}
	ops := []struct {
		name string
		f    func(ctx context.Context, i int) error
	}{
		{"Version", func(ctx context.Context, i int) error {
			_, err := r.Version(ctx, &cri.VersionRequest{})
			return err
		}},
		{"Status", func(ctx context.Context, i int) error {
			_, err := r.Status(ctx, &cri.StatusRequest{})
			return err
		}},
		{"ListPodSandbox", func(ctx context.Context, i int) error {
			resp, err := r.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
			return atLeast(err, len(resp.GetItems()), n)
		}},
		{"ListContainers", func(ctx context.Context, i int) error {
			resp, err := r.ListContainers(ctx, &cri.ListContainersRequest{})
			return atLeast(err, len(resp.GetContainers()), n*k)
		}},
		{"PodSandboxStatus", func(ctx context.Context, i int) error {
			_, err := r.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: pods[i%n].ID})
			return err
		}},
		{"ContainerStatus", func(ctx context.Context, i int) error {
			_, err := r.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: pods[i%n].Containers[i%k]})
			return err
		}},
		{"ListContainerStats", func(ctx context.Context, i int) error {
			resp, err := r.ListContainerStats(ctx, &cri.ListContainerStatsRequest{})
			return atLeast(err, len(resp.GetStats()), n*k)
		}},
		{"ListPodSandboxStats", func(ctx context.Context, i int) error {
			resp, err := r.ListPodSandboxStats(ctx, &cri.ListPodSandboxStatsRequest{})
			return atLeast(err, len(resp.GetStats()), n)
		}},
	}
	failed, spent := map[string]error{}, map[string]time.Duration{}
	for i := -o.Warmup; i < calls; i++ {
		o.progress("%s list %d/%d", r.Name, i+1, calls)
		for _, op := range ops {
			if err := ctx.Err(); err != nil {
				return res, err
			}
			if failed[op.name] != nil || spent[op.name] > listBudget {
				continue
			}
			d, err := r.call(op.name, func(ctx context.Context) error { return op.f(ctx, max(i, 0)) })
			spent[op.name] += d
			switch {
			case err != nil: // note it, measure the others
				failed[op.name] = err
			case i >= 0:
				rec.add(op.name, d)
			}
		}
	}
	if len(failed) == len(ops) {
		return res, failed[ops[0].name]
	}
	res.Metrics = rec.metrics()
	for _, op := range ops {
		if err := failed[op.name]; err != nil {
			res.Metrics = append(res.Metrics, scalar(op.name, "ms", "lower", math.NaN(), err.Error()))
		}
	}
	return res, stopPods(ctx, r, o, pods, o.concurrency(2), nil)
}

// atLeast makes a list that misses entries an error.
func atLeast(err error, got, want int) error {
	if err == nil && got < want {
		return fmt.Errorf("lists %d of %d", got, want)
	}
	return err
}

// measureLog has a container write lines as fast as it can and checks that
// all of them are in its log file.
func measureLog(ctx context.Context, r *Runtime, o *Options) (*Result, error) {
	rounds := o.count("log")
	line := bytes.Repeat([]byte("cribench"), o.LineBytes/8+1)[:o.LineBytes-1]
	perChunk := max(1, 1_000_000/o.LineBytes) // lines of about one MB
	lines := int64(perChunk) * int64(o.LogMB)
	size := lines * int64(o.LineBytes)
	res := &Result{Params: map[string]any{"rounds": rounds, "bytes": size, "line-bytes": o.LineBytes}}
	// One MB is made once and then copied: yes itself is too slow.
	script := `yes "$1" | head -c "$2" >/cribench.chunk; i=0; while [ $i -lt "$3" ]; do cat /cribench.chunk; i=$((i+1)); done`
	command := []string{"/bin/sh", "-c", script, "sh", string(line), strconv.Itoa(perChunk * o.LineBytes), strconv.Itoa(o.LogMB)}
	var whole, stream, cost []float64
	var lost, bad, split int64
	for i := range rounds {
		o.progress("%s log %d/%d", r.Name, i+1, rounds)
		if err := ctx.Err(); err != nil {
			return res, err
		}
		p, err := r.newPod()
		if err != nil {
			return res, err
		}
		if err := r.runSandbox(p, nil); err != nil {
			return res, err
		}
		start := time.Now()
		if err := r.startContainer(p, nil, command...); err != nil {
			return res, err
		}
		cpu, err := waitExit(ctx, r, p.Containers[0])
		if err != nil {
			return res, err
		}
		// The log may lag behind the exit: read again until it is complete
		// or has stopped growing for two seconds.
		var got logContent
		for idleSince := time.Now(); ; time.Sleep(50 * time.Millisecond) {
			last := got
			if got, err = readLog(p.logPath(0), line); err != nil {
				return res, err
			}
			if got != last {
				idleSince = time.Now()
			}
			if got.bytes >= size || time.Since(idleSince) > 2*time.Second {
				break
			}
		}
		whole = append(whole, mbps(got.bytes, got.end.Sub(start)))
		stream = append(stream, mbps(got.bytes, got.end.Sub(got.begin)))
		cost = append(cost, ms(cpu)/(float64(got.bytes)/1e6))
		lost += lines - got.lines
		bad += got.bad
		split += got.partial
		if err := r.teardown(p, nil); err != nil {
			return res, err
		}
	}
	res.Metrics = []Metric{
		distribution("log-rate", "MB/s", "higher", whole),
		distribution("log-stream-rate", "MB/s", "higher", stream),
		distribution("cpu-procs/MB", "ms", "lower", cost),
		scalar("lines-lost", "count", "lower", float64(lost), fmt.Sprintf("of %d in all rounds", lines*int64(rounds))),
		scalar("lines-bad", "count", "lower", float64(bad), "wrong text or not in the CRI format"),
		scalar("lines-split", "count", "", float64(split), "records tagged P (partial)"),
	}
	res.Metrics[0].Note = "payload, from CreateContainer to the last write"
	res.Metrics[1].Note = "payload, from the first line's time stamp to the last write"
	res.Metrics[2].Note = "runtime processes, without the container's"
	if lost != 0 || bad != 0 {
		return res, fmt.Errorf("%d lines lost, %d bad", lost, bad)
	}
	return res, nil
}

func mbps(n int64, d time.Duration) float64 { return float64(n) / 1e6 / d.Seconds() }

// waitExit polls until the container has ended. Meanwhile it follows the CPU
// time of the runtime's processes (some end with the container) and returns
// their sum.
func waitExit(ctx context.Context, r *Runtime, id string) (time.Duration, error) {
	first := r.match.scan(false)
	used := map[int]time.Duration{}
	deadline := time.Now().Add(5 * r.timeout)
	for {
		for pid, p := range first {
			if now, err := readStat(pid); err == nil {
				used[pid] = now.Self - p.Self
			}
		}
		var state *cri.ContainerStatus
		if _, err := r.call("ContainerStatus", func(ctx context.Context) error {
			resp, err := r.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: id})
			state = resp.GetStatus()
			return err
		}); err != nil {
			return 0, err
		}
		if state.GetState() == cri.ContainerState_CONTAINER_EXITED {
			if state.ExitCode != 0 {
				return 0, fmt.Errorf("the container that writes the log exited with %d: %s %s", state.ExitCode, state.Reason, state.Message)
			}
			var sum time.Duration
			for _, d := range used {
				sum += d
			}
			return sum, nil
		}
		if time.Now().After(deadline) {
			return 0, fmt.Errorf("the container that writes the log still runs after %s", 5*r.timeout)
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
}

// logContent is what a CRI log file holds.
type logContent struct {
	lines   int64 // complete lines with the right text
	bad     int64
	partial int64 // records tagged P
	bytes   int64 // payload, newlines included
	begin   time.Time
	end     time.Time // last write to the file
}

func readLog(path string, want []byte) (logContent, error) {
	f, err := os.Open(path)
	if err != nil {
		return logContent{}, err
	}
	defer f.Close()
	c, err := parseLog(f, want)
	if err != nil {
		return c, err
	}
	fi, err := f.Stat()
	if err != nil {
		return c, err
	}
	c.end = fi.ModTime()
	return c, nil
}

// parseLog reads records "TIME STREAM TAGS TEXT" and joins partial ones.
func parseLog(r io.Reader, want []byte) (logContent, error) {
	var c logContent
	var joined []byte
	br := bufio.NewReaderSize(r, 1<<20)
	for {
		record, err := br.ReadSlice('\n')
		if err == io.EOF { // an unfinished record does not count
			return c, nil
		}
		if err != nil {
			return c, err
		}
		f := bytes.SplitN(record[:len(record)-1], []byte(" "), 4)
		if len(f) != 4 || len(f[2]) == 0 {
			c.bad++
			continue
		}
		if c.begin.IsZero() {
			if c.begin, err = time.Parse(time.RFC3339Nano, string(f[0])); err != nil {
				c.bad++
			}
		}
		c.bytes += int64(len(f[3]))
		if f[2][0] == 'P' {
			c.partial++
			joined = append(joined, f[3]...)
			continue
		}
		c.bytes++
		text := f[3]
		if len(joined) > 0 {
			joined = append(joined, text...)
			text = joined
		}
		if bytes.Equal(text, want) {
			c.lines++
		} else {
			c.bad++
		}
		joined = joined[:0]
	}
}

// measurePull pulls an image again and again.
func measurePull(ctx context.Context, r *Runtime, o *Options) (*Result, error) {
	n := o.count("pull")
	res := &Result{Params: map[string]any{"count": n, "image": r.PullImage}}
	if r.PullImage == "" {
		return res, errors.New("pull needs --pull-image")
	}
	id, err := r.imageStatus(r.PullImage)
	if err != nil {
		return res, err
	}
	if id != "" && id == r.imageID {
		return res, errors.New("--pull-image is the image of --image: it would be removed")
	}
	present := id != "" // then it is left present
	if !present {
		r.dropImage = r.PullImage // by close, if a round fails half-way
	}
	if present {
		if _, err := r.removeImage(r.PullImage); err != nil {
			return res, err
		}
	}
	rec := &Recorder{}
	var rate []float64
	var cpu *cpuMeter
	for i := -o.Warmup; i < n; i++ {
		o.progress("%s pull %d/%d", r.Name, i+1, n)
		if err := ctx.Err(); err != nil {
			return res, err
		}
		if i == 0 {
			cpu = startCPU(r)
		}
		d, err := r.pull(r.PullImage)
		if err != nil {
			return res, err
		}
		if id, err := r.imageStatus(r.PullImage); err != nil || id == "" {
			return res, errors.Join(err, errors.New("the image is not there after PullImage"))
		}
		var gone time.Duration
		if i < n-1 || !present {
			if gone, err = r.removeImage(r.PullImage); err != nil {
				return res, err
			}
		}
		if i < 0 {
			continue
		}
		rec.add("PullImage", d)
		if gone != 0 {
			rec.add("RemoveImage", gone)
		}
		if o.SizeMB > 0 {
			rate = append(rate, o.SizeMB/d.Seconds())
		}
	}
	res.Metrics = rec.metrics()
	if o.SizeMB > 0 {
		res.Metrics = append(res.Metrics, distribution("pull-rate", "MB/s", "higher", rate))
	}
	res.Metrics = append(res.Metrics, cpu.metrics("pull", n, true)...)
	return res, nil
}
