package cri

import (
	"time"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/images"
	"github.com/naru-project/naru/pod"
)

// containerStats converts one reading of a container. A container that does
// not run has only attributes and its writable layer.
func containerStats(s *pod.ContainerStats) *criv1.ContainerStats {
	out := &criv1.ContainerStats{}
	if s == nil {
		return out
	}
	if c := s.Container; c != nil {
		cfg := containerConfigOf(c)
		out.Attributes = &criv1.ContainerAttributes{
			Id: c.ID, Metadata: containerMetadata(cfg), Labels: cfg.Labels, Annotations: cfg.Annotations,
		}
	}
	if !s.Writable.Time.IsZero() {
		out.WritableLayer = criFsUsage(images.FsInfo{Mountpoint: s.WritableMountpoint, Usage: s.Writable})
	}
	out.Cpu, out.Memory, out.Io = usage(s.Stats)
	out.Swap = swapUsage(s.Stats)
	return out
}

// usage converts what containers and pods have in common. Parts that the
// kernel does not offer stay nil.
func usage(s *pod.Stats) (*criv1.CpuUsage, *criv1.MemoryUsage, *criv1.IoUsage) {
	if s == nil {
		return nil, nil, nil
	}
	at := nanos(s.Time)
	var cpu *criv1.CpuUsage
	if c := s.CPU; c != nil {
		cpu = &criv1.CpuUsage{
			Timestamp:            at,
			UsageCoreNanoSeconds: u64(c.Usage),
			UsageNanoCores:       u64(c.UsageNanoCores),
			Psi:                  psi(c.PSI),
		}
	}
	var memory *criv1.MemoryUsage
	if m := s.Memory; m != nil {
		memory = &criv1.MemoryUsage{
			Timestamp:       at,
			WorkingSetBytes: u64(m.WorkingSet),
			UsageBytes:      u64(m.Usage),
			RssBytes:        u64(m.RSS),
			PageFaults:      u64(m.PageFaults),
			MajorPageFaults: u64(m.MajorPageFaults),
			Psi:             psi(m.PSI),
		}
		if m.Limit > 0 { // without a limit "available" has no meaning; kubelet reads nil so
			memory.AvailableBytes = u64(m.Available)
		}
	}
	var io *criv1.IoUsage
	if s.IO != nil {
		io = &criv1.IoUsage{Timestamp: at, Psi: psi(s.IO.PSI)}
	}
	return cpu, memory, io
}

func swapUsage(s *pod.Stats) *criv1.SwapUsage {
	if s == nil || s.Memory == nil {
		return nil
	}
	out := &criv1.SwapUsage{Timestamp: nanos(s.Time), SwapUsageBytes: u64(s.Memory.Swap)}
	if limit := s.Memory.SwapLimit; limit > 0 {
		out.SwapAvailableBytes = u64(limit - min(limit, s.Memory.Swap))
	}
	return out
}

func psi(p *pod.PSI) *criv1.PsiStats {
	if p == nil {
		return nil
	}
	line := func(l pod.PSILine) *criv1.PsiData {
		return &criv1.PsiData{Total: l.Total, Avg10: l.Avg10, Avg60: l.Avg60, Avg300: l.Avg300}
	}
	return &criv1.PsiStats{Full: line(p.Full), Some: line(p.Some)}
}

// sandboxStats converts one reading of a pod.
func sandboxStats(s *pod.SandboxStats) *criv1.PodSandboxStats {
	out := &criv1.PodSandboxStats{Linux: &criv1.LinuxPodSandboxStats{}}
	if s == nil {
		return out
	}
	now := time.Now()
	if s.Pod != nil {
		c := configOf(s.Pod)
		out.Attributes = &criv1.PodSandboxAttributes{
			Id: s.Pod.ID, Metadata: sandboxMetadata(c), Labels: c.Labels, Annotations: c.Annotations,
		}
	}
	if s.Stats != nil {
		now = s.Stats.Time
	}
	out.Linux.Cpu, out.Linux.Memory, out.Linux.Io = usage(s.Stats)
	out.Linux.Network = networkUsage(now, s.Interfaces)
	out.Linux.Process = &criv1.ProcessUsage{Timestamp: nanos(now), ProcessCount: u64(s.Processes)}
	for _, c := range s.Containers {
		out.Linux.Containers = append(out.Linux.Containers, containerStats(c))
	}
	return out
}

// networkUsage: the first interface is the default one; the list is of the others.
func networkUsage(at time.Time, list []pod.Interface) *criv1.NetworkUsage {
	if len(list) == 0 {
		return nil // the host's network: not this pod's traffic
	}
	out := &criv1.NetworkUsage{Timestamp: nanos(at)}
	for i, n := range list {
		u := &criv1.NetworkInterfaceUsage{
			Name: n.Name, RxBytes: u64(n.RxBytes), RxErrors: u64(n.RxErrors), TxBytes: u64(n.TxBytes), TxErrors: u64(n.TxErrors),
		}
		if i == 0 {
			out.DefaultInterface = u
		} else {
			out.Interfaces = append(out.Interfaces, u)
		}
	}
	return out
}
