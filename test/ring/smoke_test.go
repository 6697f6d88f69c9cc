package ring

import (
	"testing"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestSmoke proves the harness: a pod, a container, exec, log, exit.
func TestSmoke(t *testing.T) {
	n := StartNode(t)
	pod := n.Pod(t, nil)
	id := n.Run(t, pod, nil)
	if out := n.Sh(t, id, "id -u; hostname; cat /proc/1/comm"); out != "0\npod1\nsleep" {
		t.Errorf("got %q", out)
	}
	out, code := n.Output(t, pod, func(c *criv1.ContainerConfig) { c.Command = []string{"sh", "-c", "echo one; exit 3"} })
	if out != "one\n" || code != 3 {
		t.Errorf("got %q, %d", out, code)
	}
	old := n.WorkerPID()
	n.RestartDaemon()
	n.KillWorker()
	n.UpgradeKeeper()
	if n.WorkerPID() == old || !running(n.KeeperPID()) || !running(n.DaemonPID()) || n.PID(t, id) == 0 {
		t.Errorf("worker %d, keeper %d, daemon %d, container %d", n.WorkerPID(), n.KeeperPID(), n.DaemonPID(), n.PID(t, id))
	}
	if out := n.Sh(t, id, "echo again"); out != "again" {
		t.Errorf("got %q", out)
	}
}
