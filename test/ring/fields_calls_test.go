package ring

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming/portforward"
)

func callChecks() []fieldCheck {
	return slices.Concat(podCallChecks(), nodeCallChecks(), containerCallChecks(), updateChecks(), checkpointChecks(), execChecks(), listChecks(), imageChecks())
}

func podCallChecks() []fieldCheck {
	return []fieldCheck{
		{"stop of a pod", "PodSandboxStatus", under("StopPodSandbox", "pod_sandbox_id"), func(t testing.TB, n *Node) {
			pod := n.Pod(t, nil)
			if _, err := n.Runtime.StopPodSandbox(within(t, callTime), &criv1.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
				t.Fatal(err)
			}
			want(t, "state", n.PodStatus(t, pod).State, criv1.PodSandboxState_SANDBOX_NOTREADY)
		}},
		{"removal of a pod", "ListPodSandbox", under("RemovePodSandbox", "pod_sandbox_id"), func(t testing.TB, n *Node) {
			pod := n.Pod(t, nil)
			n.RemovePod(t, pod)
			want(t, "pods", podLists["ListPodSandbox"](t, n, nil), []string{})
		}},
		{"status of a pod", "the answer", under("PodSandboxStatus", "pod_sandbox_id", "verbose"), func(t testing.TB, n *Node) {
			pod := n.Pod(t, nil)
			r, err := n.Runtime.PodSandboxStatus(within(t, callTime), &criv1.PodSandboxStatusRequest{PodSandboxId: pod, Verbose: true})
			if err != nil || r.Status.Id != pod || r.Info["info"] == "" {
				t.Errorf("got %v, %v", r, err)
			}
		}},
		{"statistics of a pod", "the answer", under("PodSandboxStats", "pod_sandbox_id"), func(t testing.TB, n *Node) {
			pod := n.Pod(t, nil)
			r, err := n.Runtime.PodSandboxStats(within(t, callTime), &criv1.PodSandboxStatsRequest{PodSandboxId: pod})
			if err != nil || r.Stats.Attributes.Id != pod {
				t.Errorf("got %v, %v", r, err)
			}
		}},
		{
			"new resources of a pod", "PodSandboxStatus, verbose (kubelet itself sets the pod's cgroup)",
			slices.Concat(under("UpdatePodSandboxResources", "pod_sandbox_id"), limitFields("UpdatePodSandboxResources.overhead"), limitFields("UpdatePodSandboxResources.resources")),
			func(t testing.TB, n *Node) {
				pod := n.Pod(t, nil)
				if _, err := n.Runtime.UpdatePodSandboxResources(within(t, callTime), &criv1.UpdatePodSandboxResourcesRequest{
					PodSandboxId: pod, Overhead: limitsOfAll(), Resources: limitsOfAll(),
				}); err != nil {
					t.Fatal(err)
				}
				c := n.podConfigInfo(t, pod)
				wantJSON(t, "overhead", c["overhead"], limitsInfo)
				wantJSON(t, "resources", c["resources"], limitsInfo)
			},
		},
		{"forwarded port", "that no other port is forwarded", under("PortForward", "pod_sandbox_id", "port"), func(t testing.TB, n *Node) {
			pod := n.Pod(t, nil)
			n.speaking(t, pod, 81, "not this one")
			r, err := n.Runtime.PortForward(within(t, callTime), &criv1.PortForwardRequest{PodSandboxId: pod, Port: []int32{80}})
			if err != nil {
				t.Fatal(err)
			}
			c, err := dialSPDY(r.Url, portforward.ProtocolV1Name)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = c.Close() })
			_, errs := forwarded(t, c, 81, 0)
			text := make([]byte, 1000)
			k, _ := errs.Read(text)
			if !strings.Contains(string(text[:k]), "81") {
				t.Errorf("the error is %q", text[:k])
			}
		}},
	}
}

func nodeCallChecks() []fieldCheck {
	return []fieldCheck{
		{"status of the node", "the answer", under("Status", "verbose"), func(t testing.TB, n *Node) {
			r, err := n.Runtime.Status(within(t, callTime), &criv1.StatusRequest{Verbose: true})
			if err != nil || r.Info["config"] == "" {
				t.Errorf("got %v, %v", r, err)
			}
		}},
		{"ranges of addresses", "the address of a pod", under("UpdateRuntimeConfig", "runtime_config.network_config.pod_cidr"), func(t testing.TB, n *Node) {
			cidr := netip.MustParsePrefix(fmt.Sprintf("10.%d.%d.0/24", 60+nodeNumber(n), n.names.Add(1)%256))
			if err := n.tellRanges(t, cidr.String()); err != nil {
				t.Fatal(err)
			}
			if ips := n.IPs(t, n.Pod(t, nil)); len(ips) != 1 || !cidr.Contains(netip.MustParseAddr(ips[0])) {
				t.Errorf("addresses %v, want one of %v", ips, cidr)
			}
		}},
	}
}

// nodeNumber tells nodes of one run apart.
func nodeNumber(n *Node) (i int) {
	_, _ = fmt.Sscanf(n.NftTable, "ring%d", &i)
	return i % 20
}

func containerCallChecks() []fieldCheck {
	return []fieldCheck{
		{"start", "ContainerStatus", under("StartContainer", "container_id"), func(t testing.TB, n *Node) {
			id := n.Container(t, n.Pod(t, nil), nil)
			n.Start(t, id)
			want(t, "state", n.Status(t, id).State, criv1.ContainerState_CONTAINER_RUNNING)
		}},
		{"stop with a grace", "that the container could end by itself", under("StopContainer", "container_id", "timeout"), func(t testing.TB, n *Node) {
			id := n.box(t, shell("trap 'exit 5' TERM; echo ready; while :; do usleep 10000; done"))
			n.ready(t, id)
			n.stop(t, id, 10)
			want(t, "exit code", n.Status(t, id).ExitCode, 5)
		}},
		{"removal", "ListContainers", under("RemoveContainer", "container_id"), func(t testing.TB, n *Node) {
			n.Remove(t, n.box(t, nil))
			want(t, "containers", containerLists["ListContainers"](t, n, nil), []string{})
		}},
		{"status", "the answer", under("ContainerStatus", "container_id", "verbose"), func(t testing.TB, n *Node) {
			id := n.box(t, nil)
			r, err := n.Runtime.ContainerStatus(within(t, callTime), &criv1.ContainerStatusRequest{ContainerId: id, Verbose: true})
			if err != nil || r.Status.Id != id || r.Info["info"] == "" {
				t.Errorf("got %v, %v", r, err)
			}
		}},
		{"statistics", "the answer", under("ContainerStats", "container_id"), func(t testing.TB, n *Node) {
			id := n.box(t, nil)
			r, err := n.Runtime.ContainerStats(within(t, callTime), &criv1.ContainerStatsRequest{ContainerId: id})
			if err != nil || r.Stats.Attributes.Id != id {
				t.Errorf("got %v, %v", r, err)
			}
		}},
		{"rotation of the log", "a new file", under("ReopenContainerLog", "container_id"), func(t testing.TB, n *Node) {
			id := n.box(t, nil)
			log := n.Status(t, id).LogPath
			if err := os.Rename(log, log+".old"); err != nil {
				t.Fatal(err)
			}
			if _, err := n.Runtime.ReopenContainerLog(within(t, callTime), &criv1.ReopenContainerLogRequest{ContainerId: id}); err != nil {
				t.Fatal(err)
			}
			if _, err := os.Stat(log); err != nil {
				t.Error(err)
			}
		}},
	}
}

func updateChecks() []fieldCheck {
	at := "UpdateContainerResources.linux"
	update := func(n *Node, t testing.TB, id string, r *criv1.LinuxContainerResources) error {
		_, err := n.Runtime.UpdateContainerResources(within(t, callTime), &criv1.UpdateContainerResourcesRequest{ContainerId: id, Linux: r})
		return err
	}
	return []fieldCheck{
		{
			"new limits", "the cgroup",
			append(under(at, "cpu_period", "cpu_quota", "cpu_shares", "memory_limit_in_bytes", "memory_swap_limit_in_bytes"), "UpdateContainerResources.container_id"),
			func(t testing.TB, n *Node) {
				id := n.box(t, nil)
				if err := update(n, t, id, kernelLimits()); err != nil {
					t.Fatal(err)
				}
				n.wantKernelLimits(t, id)
			},
		},
		{"new OOM score", "ContainerStatus (processes keep the score that they began with)", under(at, "oom_score_adj"), func(t testing.TB, n *Node) {
			id := n.box(t, nil)
			want(t, "error", update(n, t, id, &criv1.LinuxContainerResources{OomScoreAdj: 321}), nil)
			want(t, "score", n.Status(t, id).Resources.Linux.OomScoreAdj, 321)
		}},
		{"new processors and memory nodes", "that those that are not there are refused", under(at, "cpuset_cpus", "cpuset_mems"), func(t testing.TB, n *Node) {
			id := n.box(t, nil)
			for _, r := range []*criv1.LinuxContainerResources{{CpusetCpus: "4095"}, {CpusetMems: "1023"}} {
				if err := update(n, t, id, r); err == nil {
					t.Errorf("%v was given out", r)
				}
			}
		}},
		{"new limits of huge pages", "ContainerStatus, and the cgroup where there is a controller", under(at+".hugepage_limits[]", "page_size", "limit"), func(t testing.TB, n *Node) {
			id := n.box(t, nil)
			if err := update(n, t, id, &criv1.LinuxContainerResources{HugepageLimits: []*criv1.HugepageLimit{{PageSize: "2MB", Limit: 4 << 20}}}); err != nil {
				t.Fatal(err)
			}
			n.wantHugeLimit(t, id)
		}},
		{"new files of cgroup version 2", "the file; with version 1, that they are refused", under(at, "unified"), func(t testing.TB, n *Node) {
			id := n.box(t, nil)
			err := update(n, t, id, &criv1.LinuxContainerResources{Unified: map[string]string{"memory.high": "33554432"}})
			if onV1(t) {
				wantError(t, err, codes.FailedPrecondition, "cgroup v2")
				return
			}
			want(t, "error", err, nil)
			n.wantLimit(t, id, limitFile{controller: "memory", v2: "memory.high"}, "", "33554432")
		}},
	}
}

// fakeCriu makes a program in place of criu that dumps nothing, and takes two
// seconds for it while there is a file beside it.
func (n *Node) fakeCriu(t testing.TB) string {
	t.Helper()
	p := n.Dir + "/criu"
	if err := os.WriteFile(p, []byte("#!/bin/sh\n[ ! -e $0.slow ] || exec sleep 2\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	return p
}

func checkpointChecks() []fieldCheck {
	checkpoint := func(n *Node, t testing.TB, location string, timeout int64) error {
		_, err := n.Runtime.CheckpointContainer(within(t, callTime), &criv1.CheckpointContainerRequest{ContainerId: n.box(t, nil), Location: location, Timeout: timeout})
		return err
	}
	return []fieldCheck{
		{"checkpoint", "the archive", under("CheckpointContainer", "container_id", "location"), func(t testing.TB, n *Node) {
			location := n.HostDir(t) + "/checkpoint.tar"
			want(t, "error", checkpoint(n, t, location, 0), nil)
			if _, err := os.Stat(location); err != nil {
				t.Error(err)
			}
		}},
		{"time of a checkpoint", "that it is over", under("CheckpointContainer", "timeout"), func(t testing.TB, n *Node) {
			mark := n.Dir + "/criu.slow"
			if err := os.WriteFile(mark, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = os.Remove(mark) })
			wantError(t, checkpoint(n, t, n.HostDir(t)+"/checkpoint.tar", 1), codes.DeadlineExceeded)
		}},
	}
}

// talk sends to a session and waits for what comes back.
func (n *Node) talk(s *stream, input, out, errOut string) error {
	if input != "" {
		s.send(input)
	}
	if !n.soon(func() bool { return strings.Contains(s.out.String(), out) && strings.Contains(s.err.String(), errOut) }) {
		return fmt.Errorf("stdout %q, stderr %q, status %q", s.out.String(), s.err.String(), s.status.String())
	}
	return nil
}

func execChecks() []fieldCheck {
	return []fieldCheck{
		{"exec and its output", "the answer", under("ExecSync", "container_id", "cmd"), func(t testing.TB, n *Node) {
			want(t, "output", n.Sh(t, n.box(t, nil), "echo output"), "output")
		}},
		{"time of an exec", "that it is over", under("ExecSync", "timeout"), func(t testing.TB, n *Node) {
			_, err := n.ExecTimeout(t, n.box(t, nil), 1, "/bin/sleep", "2")
			wantError(t, err, codes.DeadlineExceeded)
		}},
		{"exec", "its streams", under("Exec", "container_id", "cmd", "stdin", "stdout", "stderr"), func(t testing.TB, n *Node) {
			s := n.execStream(t, n.box(t, nil), streamOptions{stdin: true}, "/bin/sh", "-c", "read x; echo out=$x; echo err=$x >&2")
			want(t, "error", n.talk(s, "sent\n", "out=sent\n", "err=sent\n"), nil)
		}},
		{"exec with a terminal", "`tty`", under("Exec", "tty"), func(t testing.TB, n *Node) {
			s := n.execStream(t, n.box(t, nil), streamOptions{tty: true}, "/bin/tty")
			want(t, "error", n.talk(s, "", "/dev/pts/", ""), nil)
		}},
		{"attach", "the container's streams", under("Attach", "container_id", "stdin", "stdout", "stderr"), func(t testing.TB, n *Node) {
			id := n.box(t, each(shell("while read x; do echo out=$x; echo err=$x >&2; done"), func(c *criv1.ContainerConfig) { c.Stdin = true }))
			want(t, "error", n.talk(n.attachStream(t, id, streamOptions{stdin: true}), "sent\n", "out=sent\n", "err=sent\n"), nil)
		}},
		{"attach to a terminal", "its size", under("Attach", "tty"), func(t testing.TB, n *Node) {
			id := n.box(t, func(c *criv1.ContainerConfig) { c.Stdin, c.Tty, c.Command = true, true, []string{"/bin/sh"} })
			s := n.attachStream(t, id, streamOptions{stdin: true, tty: true})
			s.resize(77, 33)
			want(t, "error", n.talk(s, "usleep 100000; stty size\r", "33 77", ""), nil)
		}},
	}
}
