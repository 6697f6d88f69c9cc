package pod_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/pod"
	"github.com/naru-project/naru/pod/podtest"
)

// chaos is one of many clients that do anything at any time.
type chaos struct {
	r   *rig
	rnd *rand.Rand
}

func (c *chaos) somePod() string {
	if all := c.r.m.Sandboxes(pod.Filter{}); len(all) > 0 {
		return all[c.rnd.IntN(len(all))].ID
	}
	return ""
}

func (c *chaos) someContainer() string {
	if all := c.r.m.Containers(pod.Filter{}); len(all) > 0 {
		return all[c.rnd.IntN(len(all))].ID
	}
	return ""
}

func (c *chaos) step() error {
	ctx := context.Background()
	if c.rnd.IntN(4) == 0 { // an impatient caller
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(c.rnd.IntN(2000))*time.Millisecond)
		defer cancel()
	}
	m, envs := c.r.m, []string{"A=b", podtest.EnvIgnoreTERM, podtest.EnvExitThree, podtest.EnvStartError, podtest.EnvOOM}
	switch c.rnd.IntN(16) {
	case 0, 1:
		_, err := m.RunSandbox(ctx, podtest.SandboxConfig(fmt.Sprint("p", c.rnd.IntN(8))))
		return err
	case 2, 3, 4:
		cfg := podtest.ContainerConfig(fmt.Sprint("c", c.rnd.IntN(4)), envs[c.rnd.IntN(len(envs))])
		cfg.Metadata.Attempt = uint32(c.rnd.IntN(3))
		_, err := m.CreateContainer(ctx, c.somePod(), cfg)
		return err
	case 5, 6, 7:
		return m.StartContainer(ctx, c.someContainer())
	case 8:
		return m.StopContainer(ctx, c.someContainer(), time.Duration(c.rnd.IntN(3000))*time.Millisecond)
	case 9:
		return m.RemoveContainer(ctx, c.someContainer())
	case 10:
		return m.StopSandbox(ctx, c.somePod())
	case 11:
		return m.RemoveSandbox(ctx, c.somePod())
	case 12:
		_, err := m.ExecSync(ctx, c.someContainer(), []string{"true"}, time.Second)
		return err
	case 13:
		return m.UpdateContainer(ctx, c.someContainer(), pod.Resources{CPUShares: 3}, nil)
	case 14:
		c.r.w.Exit(c.someContainer(), c.rnd.IntN(3))
		m.ListSandboxStats(ctx, pod.Filter{})
	case 15:
		sub, cancel := context.WithCancel(ctx)
		events := m.Subscribe(sub)
		time.Sleep(time.Duration(c.rnd.IntN(100)) * time.Millisecond)
		cancel()
		for range events {
		}
		m.Operations()
		m.Info(c.someContainer())
	}
	return nil
}

// consistent checks what must hold at every moment.
func consistent(r *rig) {
	if r.Failed() {
		return
	}
	for _, c := range r.m.Containers(pod.Filter{}) {
		switch {
		case c.State == pod.StateExited && c.FinishedAt.IsZero():
			r.Errorf("exited without a time: %+v", c)
		case c.State == pod.StateRunning && (c.PID == 0 || c.StartedAt.IsZero() && c.Phase != pod.PhaseStopping):
			r.Errorf("running without a process: %+v", c)
		case c.State == pod.StateExited && c.PID != 0:
			r.Errorf("exited with a process: %+v", c)
		}
	}
	for _, p := range r.m.Sandboxes(pod.Filter{}) {
		if p.Ready() && p.Handle == nil {
			r.Errorf("ready without a place: %+v", p)
		}
	}
}

// TestChaos: a hundred clients, random calls, failures and delays everywhere;
// at the end everything can be removed and nothing is left.
func TestChaos(t *testing.T) {
	inBubble(t, func(r *rig) {
		calls := []string{
			"Sandboxes.Create", "Sandboxes.Release", "Executor.Create", "Executor.Delete", "Executor.Kill", "Executor.Signal",
			"Executor.Start", "Executor.EnsurePodCgroup", "Executor.RemovePodCgroup", "Executor.MountRootfs", "Executor.OOMKilled",
			"Images.Layers", "Images.ReleaseOwner", "Images.NewWritable", "Images.RemoveWritable",
		}
		var wg sync.WaitGroup
		var mu sync.Mutex
		outcomes := map[string]int{}
		seed := rand.Uint64()
		for i := range 100 {
			wg.Go(func() {
				c := &chaos{r, rand.New(rand.NewPCG(seed, uint64(i)))}
				for range 30 {
					if i < 4 { // the four that break things
						call := calls[c.rnd.IntN(len(calls))]
						r.w.FailOn(call, c.rnd.IntN(3), errors.New("injected"))
						r.w.DelayOn(call, time.Duration(c.rnd.IntN(3))*time.Second)
						time.Sleep(time.Second)
					}
					err := c.step()
					mu.Lock()
					if err == nil {
						outcomes["ok"]++
					} else {
						outcomes[errs.Of(err).String()]++
					}
					mu.Unlock()
					consistent(r)
					time.Sleep(time.Duration(c.rnd.IntN(1000)) * time.Millisecond)
				}
			})
		}
		wg.Wait()
		t.Logf("seed %d: %v", seed, outcomes)
		for _, want := range []string{"ok", "NotFound", "FailedPrecondition", "Internal"} {
			if outcomes[want] == 0 {
				t.Errorf("no call ended with %s", want)
			}
		}
		for _, call := range calls {
			r.w.FailOn(call, 0, nil)
			r.w.DelayOn(call, 0)
		}
		time.Sleep(10 * time.Minute) // creates nobody waits for, and the reaper
		synctest.Wait()
		consistent(r)
		r.owned()
		if ops := r.m.Operations(); len(ops) != 0 {
			t.Errorf("operations are left: %+v", ops)
		}
		r.restart()
		r.owned()
		for _, p := range r.m.Sandboxes(pod.Filter{}) {
			r.removePod(p.ID)
		}
		r.empty()
	})
}

// FuzzRecord puts damaged files among the records: a start-up always serves,
// and what the damaged record was about does not stay without an owner.
func FuzzRecord(f *testing.F) {
	f.Add(uint8(0), []byte(`{"schema":1}`))
	f.Add(uint8(1), []byte(""))
	f.Add(uint8(2), []byte("\x00\xff"))
	f.Add(uint8(4), []byte(`{"id":"ID","pod_id":"ID","boot_id":"boot-1","phase":"running","config":{},"created_at":"2026-01-01T00:00:00Z"}`))
	f.Add(uint8(3), []byte(`{"id":"ID","boot_id":"x","phase":"ready","config":{},"handle":{"id":"ID","ips":["1.2.3.4"]}}`))
	f.Add(uint8(4), []byte(`{"id":"ID","pod_id":"ID","phase":"stopping","stop_by":"0001-01-01T00:00:00Z","config":{"env":null},"mounts":[{}],"process":{"pid":-1}}`))
	f.Add(uint8(5), []byte(`{"container":{"id":"ID","spec":{}},"seccomp":"../../x"}`))
	f.Fuzz(func(t *testing.T, kind uint8, data []byte) {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t, func(c *pod.Config) { c.KillWait = time.Second })
			defer func() { r.stop() }()
			p := r.pod("web")
			c := r.running(p, "app")
			r.stop()
			r.damage(kind, p, c, data)
			r.boot()
			time.Sleep(5 * time.Minute)
			r.removePod(r.pod("other"))
			_, _ = r.m.ExecSync(t.Context(), c, []string{"true"}, time.Second)
			for _, s := range r.m.Containers(pod.Filter{}) {
				r.m.Info(s.ID)
				_ = r.m.StopContainer(t.Context(), s.ID, 0)
			}
			for _, s := range r.m.Sandboxes(pod.Filter{}) {
				r.m.Info(s.ID)
				_ = r.m.RemoveSandbox(t.Context(), s.ID)
			}
		})
	})
}
