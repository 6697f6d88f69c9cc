package cri

import (
	"net/netip"
	"time"

	"github.com/naru-project/naru/pod"
)

// What several tests need.

func podWithIPs(ips []netip.Addr) *pod.Pod {
	return &pod.Pod{ID: "x", Phase: pod.PhaseReady, Config: &pod.SandboxConfig{}, Handle: &pod.Handle{IPs: ips}}
}

func fullStats(at time.Time, p *pod.PSI) *pod.Stats {
	return &pod.Stats{
		Time: at,
		CPU:  &pod.CPUStats{Usage: 1, UsageNanoCores: 2, PSI: p},
		Memory: &pod.MemoryStats{
			WorkingSet: 3, Available: 4, Usage: 5, RSS: 6, PageFaults: 7, MajorPageFaults: 8, Swap: 9, SwapLimit: 10, Limit: 100, PSI: p,
		},
		IO: &pod.IOStats{PSI: p},
	}
}
