package sandbox

import (
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"
)

func median(d []time.Duration) string {
	slices.Sort(d)
	us := time.Microsecond
	return fmt.Sprintf("min %v, median %v, p95 %v, max %v", d[0].Round(10*us), d[len(d)/2].Round(10*us), d[len(d)*95/100].Round(10*us), d[len(d)-1].Round(10*us))
}

// TestTiming prints what creating and releasing takes, in all and by step.
func TestTiming(t *testing.T) {
	for _, c := range []struct {
		name  string
		pool  int
		ports []PortMapping
		gap   time.Duration
	}{
		{"plain", 0, nil, 0},
		{"with a host port", 0, []PortMapping{mapping(TCP, 8080, 80, "")}, 0},
		{"plain, 20 ms apart", 0, nil, 20 * time.Millisecond},
		{"from the pool, 20 ms apart", 4, nil, 20 * time.Millisecond},
		{"from the pool, one after another", 4, nil, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := testConfig(t)
			cfg.PoolSize = c.pool
			m := start(t, cfg, Deps{})
			time.Sleep(50 * time.Millisecond)
			var create, remove []time.Duration
			steps := map[string][]time.Duration{}
			for i := range 50 {
				s := podSpec(t, fmt.Sprint("p", i), c.ports...)
				last, at := "", time.Now()
				began := at
				step := func(name string) {
					now := time.Now()
					if last != "" {
						steps[last] = append(steps[last], now.Sub(at))
					}
					last, at = name, now
				}
				h, err := m.Create(t.Context(), s, step)
				step("")
				if err != nil {
					t.Fatal(err)
				}
				create = append(create, time.Since(began))
				began = time.Now()
				if err := m.Release(t.Context(), h.ID, h); err != nil {
					t.Fatal(err)
				}
				remove = append(remove, time.Since(began))
				time.Sleep(c.gap)
			}
			t.Logf("create: %s", median(create))
			t.Logf("release: %s", median(remove))
			for name, d := range steps {
				t.Logf("  %-20s %s", name, median(d))
			}
		})
	}
}

func TestTimingConcurrent(t *testing.T) {
	for _, pool := range []int{0, 4} {
		cfg := testConfig(t)
		cfg.PoolSize = pool
		m := start(t, cfg, Deps{})
		began := time.Now()
		var wg sync.WaitGroup
		for w := range 8 {
			wg.Go(func() {
				for i := range 10 {
					h, err := m.Create(t.Context(), podSpec(t, fmt.Sprint("p", w, "-", i)), nil)
					if err != nil {
						t.Error(err)
						return
					}
					release(t, m, h)
				}
			})
		}
		wg.Wait()
		t.Logf("pool %d: 80 pods at 8 at once: %v a pod", pool, (time.Since(began) / 80).Round(10*time.Microsecond))
	}
}
