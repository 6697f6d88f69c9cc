package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

type options struct {
	Endpoint, Image, LogDir, CgroupParent string
	Seed                                  uint64
	Workers, Pods, Lines                  int
	Duration, Patience, Settle            time.Duration
	UnknownExits                          bool
	Tolerate                              []string
	Host                                  hostOptions
}

// Report is what a run found.
type Report struct {
	Seed       uint64         `json:"seed"`
	Pods       int            `json:"pods"`
	Containers int            `json:"containers"`
	Lines      int            `json:"lines"`
	Exits      int            `json:"exits"`
	Unknown    int            `json:"unknown_exits"`
	Calls      map[string]int `json:"calls"`
	Retried    map[string]int `json:"retried"`       // by status code
	Failed     int            `json:"failed_starts"` // after a call that was to be tried again
	Cancelled  int            `json:"cancelled"`
	Duplicates int            `json:"duplicates"`
	Violations []Violation    `json:"violations"`
	More       int            `json:"more_violations,omitempty"`
	Took       string         `json:"took"`
}

// Violation is one answer that is not what CRI says.
type Violation struct {
	Rule string `json:"rule"`
	What string `json:"what"`
}

// The rules, by the name with which a violation is reported.
const (
	ruleValid      = "a valid request succeeds"
	ruleSameID     = "a create that is repeated gives the same id"
	ruleOther      = "a create with another config under the same name is refused"
	ruleID         = "an id is 64 hex digits and given once"
	ruleState      = "a status tells the state that the calls led to"
	ruleTimes      = "created, started and finished are in order"
	ruleIdentity   = "metadata, labels and annotations come back as they were given"
	ruleIP         = "a ready pod has an address of its own"
	ruleFilter     = "a list has what its filter asks for, once, and nothing else"
	ruleExit       = "an exit code is that of the process"
	ruleExec       = "a command's output and exit code come back"
	ruleRestart    = "a container is started once"
	ruleIdempotent = "stop and remove may be repeated, and know no unknown ids"
	ruleGone       = "what was removed is not found"
	ruleLog        = "a log has each line once, in order"
	ruleEmpty      = "at the end nothing of ours is listed"
	ruleHost       = "at the end the host is as it was"
)

var idForm = regexp.MustCompile(`^[0-9a-f]{64}$`)

const runLabel = "crimodel-run"

// model is one run.
type model struct {
	o    options
	run  string
	conn *grpc.ClientConn
	rt   cri.RuntimeServiceClient

	mu  sync.Mutex
	r   Report            // guarded by mu
	ids map[string]string // guarded by mu: what each id was given to
	ips map[string]string // guarded by mu: pod of each address

	broken map[string]int // guarded by mu: how often, by rule
}

// Run drives the runtime and reports what it found.
func Run(ctx context.Context, o options) (*Report, error) {
	began := time.Now()
	conn, err := grpc.NewClient("unix://"+strings.TrimPrefix(o.Endpoint, "unix://"), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 10 * time.Millisecond, Multiplier: 1.5, MaxDelay: 200 * time.Millisecond}}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20)))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	if o.LogDir == "" {
		if o.LogDir, err = os.MkdirTemp("", "crimodel"); err != nil {
			return nil, err
		}
		defer os.RemoveAll(o.LogDir)
	}
	m := &model{
		o: o, run: fmt.Sprintf("%d-%x", os.Getpid(), o.Seed), conn: conn, rt: cri.NewRuntimeServiceClient(conn),
		r:   Report{Seed: o.Seed, Calls: map[string]int{}, Retried: map[string]int{}},
		ids: map[string]string{}, ips: map[string]string{}, broken: map[string]int{},
	}
	w := &worker{model: m, rnd: rand.New(rand.NewPCG(o.Seed, 0))}
	if _, err := retry(ctx, w, "Version", &cri.VersionRequest{}, m.rt.Version); err != nil {
		return nil, err
	}
	before, err := takeHost(o.Host)
	if err != nil {
		return nil, err
	}
	m.drive(ctx)
	m.finish(context.WithoutCancel(ctx), w, before)
	m.r.Took = time.Since(began).Round(time.Millisecond).String()
	return &m.r, nil
}

func (m *model) drive(ctx context.Context) {
	end := time.Now().Add(m.o.Duration)
	var wg sync.WaitGroup
	var begun sync.Mutex
	pods := 0
	more := func() bool {
		begun.Lock()
		defer begun.Unlock()
		pods++
		return ctx.Err() == nil && time.Now().Before(end) && (m.o.Pods == 0 || pods <= m.o.Pods)
	}
	for i := range m.o.Workers {
		wg.Go(func() {
			w := &worker{model: m, n: i, rnd: rand.New(rand.NewPCG(m.o.Seed, uint64(i)+1))}
			for more() {
				if err := w.pod(context.WithoutCancel(ctx)); err != nil {
					m.violate(ruleValid, "%v", err)
					w.cleanUp(context.WithoutCancel(ctx))
				}
				if m.tooMany() {
					return
				}
			}
		})
	}
	wg.Wait()
}

// finish looks for what is left when everything was removed.
func (m *model) finish(ctx context.Context, w *worker, before host) {
	pods, err := retry(ctx, w, "ListPodSandbox", &cri.ListPodSandboxRequest{Filter: &cri.PodSandboxFilter{LabelSelector: map[string]string{runLabel: m.run}}}, m.rt.ListPodSandbox)
	if err != nil {
		m.violate(ruleValid, "list pods at the end: %v", err)
	}
	for _, p := range pods.GetItems() {
		m.violate(ruleEmpty, "pod %s (%s) is %v", p.Metadata.GetName(), p.Id, p.State)
	}
	ctrs, err := retry(ctx, w, "ListContainers", &cri.ListContainersRequest{Filter: &cri.ContainerFilter{LabelSelector: map[string]string{runLabel: m.run}}}, m.rt.ListContainers)
	if err != nil {
		m.violate(ruleValid, "list containers at the end: %v", err)
	}
	for _, c := range ctrs.GetContainers() {
		m.violate(ruleEmpty, "container %s (%s) is %v", c.Metadata.GetName(), c.Id, c.State)
	}
	var left []string
	for end := time.Now().Add(m.o.Settle); ; { // the kernel takes a moment for links and cgroups
		var now host
		if now, err = takeHost(m.o.Host); err == nil {
			if left = now.beyond(before); len(left) == 0 {
				return
			}
		}
		if time.Now().After(end) {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	if err != nil {
		m.violate(ruleHost, "%v", err)
	}
	for _, l := range left {
		m.violate(ruleHost, "%s is left", l)
	}
}

const (
	maxViolations = 50 // then a run ends
	maxOfRule     = 10 // that are told
)

func (m *model) violate(rule, format string, args ...any) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.broken[rule]++; m.broken[rule] > maxOfRule {
		m.r.More++
		return
	}
	m.r.Violations = append(m.r.Violations, Violation{rule, fmt.Sprintf(format, args...)})
}

func (m *model) tooMany() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.r.Violations)+m.r.More >= maxViolations
}

func (m *model) count(f func(r *Report)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	f(&m.r)
}

// given notes an id. One name may get an id again; two names never share one.
func (m *model) given(id, name string) {
	if !idForm.MatchString(id) {
		m.violate(ruleID, "%s got the id %q", name, id)
	}
	m.mu.Lock()
	other, known := m.ids[id]
	m.ids[id] = name
	m.mu.Unlock()
	if known && other != name {
		m.violate(ruleID, "%s got the id %s, which %s has had", name, id, other)
	}
}

// takeIP notes that a pod has an address, until dropIP.
func (m *model) takeIP(ip, pod string) {
	m.mu.Lock()
	other := m.ips[ip]
	m.ips[ip] = pod
	m.mu.Unlock()
	if ip == "" || other != "" && other != pod {
		m.violate(ruleIP, "pod %s has the address %q, which pod %q has", pod, ip, other)
	}
}

func (m *model) dropIP(pod string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for ip, p := range m.ips {
		if p == pod {
			delete(m.ips, ip)
		}
	}
}

// again tells whether a failure says that the same call should be tried again.
func (m *model) again(err error) bool {
	switch status.Code(err) {
	case codes.Unavailable, codes.Canceled, codes.DeadlineExceeded:
		return true
	case codes.Unknown: // of a connection that ended in the middle of an answer
		if strings.Contains(err.Error(), "EOF") {
			return true
		}
	}
	return slices.ContainsFunc(m.o.Tolerate, func(t string) bool { return strings.Contains(err.Error(), t) })
}

type method[Q, A any] func(context.Context, Q, ...grpc.CallOption) (A, error)

const callTime = 30 * time.Second

// retry makes a call until it comes through, or fails with an error that means
// what it says.
func retry[Q, A any](ctx context.Context, w *worker, name string, q Q, f method[Q, A]) (a A, err error) {
	a, _, err = retried(ctx, w, name, q, f)
	return a, err
}

// retried tells also how often the call was cut short before: what it asks for
// may have been done then.
func retried[Q, A any](ctx context.Context, w *worker, name string, q Q, f method[Q, A]) (a A, cut int, err error) {
	for end := time.Now().Add(w.o.Patience); ; cut++ {
		w.count(func(r *Report) { r.Calls[name]++ })
		c, cancel := context.WithTimeout(ctx, callTime)
		a, err = f(c, q)
		cancel()
		if err == nil || ctx.Err() != nil || !w.again(err) || time.Now().After(end) {
			return a, cut, err
		}
		w.count(func(r *Report) { r.Retried[status.Code(err).String()]++ })
		time.Sleep(time.Duration(10+w.rnd.IntN(40)) * time.Millisecond)
	}
}

// impatient makes a call whose caller leaves after a random while. It reports
// the answer if there was one in time.
func impatient[Q, A any](ctx context.Context, w *worker, name string, q Q, f method[Q, A]) (a A, ok bool) {
	w.count(func(r *Report) { r.Calls[name]++; r.Cancelled++ })
	c, cancel := context.WithTimeout(ctx, time.Duration(w.rnd.IntN(30000))*time.Microsecond)
	defer cancel()
	a, err := f(c, q)
	return a, err == nil
}

// several makes the same call some times at once, one of them impatiently
// before, and returns all answers.
func several[Q, A any](ctx context.Context, w *worker, name string, q Q, f method[Q, A]) (answers []A, err error) {
	if w.rnd.IntN(3) == 0 {
		if a, ok := impatient(ctx, w, name, q, f); ok {
			answers = append(answers, a)
		}
	}
	n := 1
	if w.rnd.IntN(3) == 0 {
		n = 2 + w.rnd.IntN(2)
		w.count(func(r *Report) { r.Duplicates += n - 1 })
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	for range n {
		own := &worker{model: w.model, rnd: rand.New(rand.NewPCG(w.rnd.Uint64(), 0))}
		wg.Go(func() {
			a, e := retry(ctx, own, name, q, f)
			mu.Lock()
			defer mu.Unlock()
			if e != nil {
				err = errors.Join(err, fmt.Errorf("%s: %w", name, e))
				return
			}
			answers = append(answers, a)
		})
	}
	wg.Wait()
	return answers, err
}
