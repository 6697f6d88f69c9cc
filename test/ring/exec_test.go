package ring

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/internal/testhost"
)

// TestX01_SwappedWorkingDir makes a running container's working directory a
// link to descriptors of whoever joins, while execs join.
func TestX01_SwappedWorkingDir(t *testing.T) {
	canary := NewCanary(t)
	n := StartNode(t)
	pod := n.Pod(t, nil)
	id := n.Run(t, pod, func(c *criv1.ContainerConfig) {
		addCaps("SYS_PTRACE")(c) // or it could not look at where others stand
		c.WorkingDir = "/work"
		c.Command = []string{"/bin/evil", "swapwork", "/work", canary.Dir}
	})
	n.awaitLog(t, id, "swapping")
	entered, refused := 0, 0
	for range scaled(200, 1000) {
		r, err := n.ExecErr(t, id, "/bin/sh", "-c", "/bin/readlink /proc/self/cwd; /bin/ls "+canary.Up()+" /proc/self/cwd/"+canary.Up())
		if err != nil {
			refused++
			continue
		}
		entered++
		if out := string(r.Stdout); strings.Contains(out, canaryFile) || strings.Contains(out, "unreachable") || strings.Contains(out, workDir) {
			t.Fatalf("an exec stands outside of the container: %s", out)
		}
	}
	out := n.stopAttack(t, id)
	m := facts(out)
	t.Logf("%d execs entered, %d refused; %s swaps, %s looks", entered, refused, m["swaps"], m["looked"])
	if strings.Contains(out, "CANARY") {
		t.Errorf("the canary was seen:\n%s", out)
	}
	if number(t, m, "swaps") < 100 || number(t, m, "looked") < 100 || entered == 0 || refused == 0 {
		t.Error("the attack did not really run")
	}
	// The same without a race, for each descriptor.
	still := n.Run(t, pod, func(c *criv1.ContainerConfig) { c.WorkingDir = "/work" })
	n.Sh(t, still, "cd /; mv /work /w0")
	for fd := 3; fd <= scaled(20, 64); fd++ {
		if _, err := n.ExecErr(t, still, "/bin/true"); err == nil {
			t.Fatal("an exec started though its working directory is gone")
		}
		link := n.PID(t, still)
		if err := replaceLink(fmt.Sprintf("/proc/%d/root/work", link), fmt.Sprintf("/proc/self/fd/%d", fd)); err != nil {
			t.Fatal(err)
		}
		r, err := n.ExecErr(t, still, "/bin/ls", canary.Up())
		if err == nil && (r.ExitCode == 0 || strings.Contains(string(r.Stdout), canaryFile)) {
			t.Errorf("descriptor %d: an exec stands outside: %s", fd, r.Stdout)
		}
		_ = os.Remove(fmt.Sprintf("/proc/%d/root/work", link))
	}
}

func replaceLink(path, to string) error {
	_ = os.Remove(path)
	return os.Symlink(to, path)
}

// TestX02_ExecUser: every exec has the identity that was found at creation,
// whatever the container writes into its user files.
func TestX02_ExecUser(t *testing.T) {
	n := StartNode(t)
	pod := n.Pod(t, nil)
	for _, uid := range []int64{1, 1000, 65534} {
		id := n.Run(t, pod, asUser(uid))
		before := n.Sh(t, id, "id -u; id -g; id -G")
		if !strings.HasPrefix(before, fmt.Sprintf("%d\n", uid)) {
			t.Errorf("uid %d: %q", uid, before)
		}
	}
	config := func(c *criv1.ContainerConfig) { c.Linux.SecurityContext.RunAsUsername = "app" }
	id := n.Run(t, pod, func(c *criv1.ContainerConfig) {
		config(c)
		c.Linux.SecurityContext.SupplementalGroups = []int64{3000}
	})
	const want = "1000\n1000\n1000 2000 3000"
	if got := n.Sh(t, id, "id -u; id -g; id -G"); got != want {
		t.Errorf("user app: %q, want %q", got, want)
	}
	root := fmt.Sprintf("/proc/%d/root", n.PID(t, id))
	for name, text := range map[string]string{"passwd": "root:x:0:0::/:/bin/sh\napp:x:0:0::/:/bin/sh\n1000:x:0:0::/:/bin/sh\n", "group": "root:x:0:app\n1000:x:0:app\n"} {
		if err := os.WriteFile(root+"/etc/"+name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	check := func(when string) {
		t.Helper()
		out, _, _ := n.Exec(t, id, "/bin/evil", "ids")
		m := facts(out)
		if m["uids"] != "1000 1000 1000" || m["gids"] != "1000 1000 1000" || m["groups"] != "1000 2000 3000" || capSet(t, m, "CapEff") != 0 {
			t.Errorf("%s: an exec runs as %v", when, m)
		}
		s := n.execStream(t, id, streamOptions{}, "/bin/evil", "ids")
		s.exitCode()
		if m := facts(s.out.String()); m["uids"] != "1000 1000 1000" || m["gids"] != "1000 1000 1000" || m["groups"] != "1000 2000 3000" {
			t.Errorf("%s: a streamed exec runs as %v", when, m)
		}
		s.close()
	}
	check("after the files were rewritten")
	n.RestartDaemon()
	check("after a restart of the daemon")
	if err := os.Remove(root + "/etc/passwd"); err != nil {
		t.Fatal(err)
	}
	check("after the file was removed")
	n.refused(t, pod, "an unknown user", func(c *criv1.ContainerConfig) { c.Linux.SecurityContext.RunAsUsername = "nosuchuser" })
}

// TestX03_ExecPlacement: an exec is where its container is and has what it
// has, and its memory counts as the container's.
func TestX03_ExecPlacement(t *testing.T) {
	n := StartNode(t)
	for _, kind := range []string{"private", "shared", "userns"} {
		t.Run(kind, func(t *testing.T) {
			pod := n.Pod(t, func(c *criv1.PodSandboxConfig) {
				switch kind {
				case "shared":
					sharedPID(c)
				case "userns":
					ids := []*criv1.IDMapping{{ContainerId: 0, HostId: 400000, Length: 65536}}
					c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = &criv1.UserNamespace{Mode: criv1.NamespaceMode_POD, Uids: ids, Gids: ids}
				}
			})
			id := n.Run(t, pod, func(c *criv1.ContainerConfig) {
				c.Linux.SecurityContext.NoNewPrivs = true
				c.Linux.SecurityContext.Seccomp = &criv1.SecurityProfile{ProfileType: criv1.SecurityProfile_RuntimeDefault}
				c.Linux.Resources = &criv1.LinuxContainerResources{OomScoreAdj: 321, MemoryLimitInBytes: 64 << 20}
				addCaps("SYS_PTRACE")(c)
				c.Command = []string{"/bin/evil", "stay"}
			})
			n.awaitLog(t, id, "end")
			init := n.LogText(t, id)
			for range 3 {
				out, errOut, _ := n.Exec(t, id, "/bin/evil", "place")
				if out != init {
					t.Errorf("the container's first process:\n%san exec:\n%s%s", init, out, errOut)
				}
			}
			if !strings.Contains(init, "Seccomp:\t2") || !strings.Contains(init, "NoNewPrivs:\t1") || !strings.Contains(init, "oom_score_adj 321") {
				t.Errorf("the first process has not what was asked for:\n%s", init)
			}
			checkExecCgroup(t, n, id)
			n.RestartDaemon()
			if out, _, _ := n.Exec(t, id, "/bin/evil", "place"); out != init {
				t.Errorf("after a restart of the daemon, the first process:\n%san exec:\n%s", init, out)
			}
			// The first process is in a cgroup below its own meanwhile.
			moveDown(t, n.PID(t, id))
			checkExecCgroup(t, n, id)
			if out, _, _ := n.Exec(t, id, "/bin/evil", "place"); out != init {
				t.Errorf("the first process, moved:\n%san exec:\n%s", init, out)
			}
			// More than the limit: the kernel ends the hog, not the container.
			r, err := n.ExecErr(t, id, "/bin/evil", "hog", "512")
			if err != nil || r.ExitCode != 137 {
				t.Errorf("a hog in an exec: %v %v", r, err)
			}
			n.RemovePod(t, pod)
		})
	}
}

// moveDown puts a process into a new cgroup below its own, in every hierarchy
// that holds it, as it could do with a delegated tree.
func moveDown(t *testing.T, pid int) {
	t.Helper()
	moved := 0
	for controllers, path := range cgroupsOf(t, pid) {
		for _, top := range []string{"/sys/fs/cgroup/" + controllers, "/sys/fs/cgroup/unified", "/sys/fs/cgroup"} {
			dir := filepath.Join(top, path)
			if procs, err := os.ReadFile(dir + "/cgroup.procs"); path == "/" || err != nil || !slices.Contains(strings.Fields(string(procs)), strconv.Itoa(pid)) {
				continue
			}
			if err := os.Mkdir(dir+"/moved", 0o755); err != nil {
				t.Fatal(err)
			}
			for _, f := range []string{"cpuset.cpus", "cpuset.mems"} { // without, a cgroup v1 cpuset takes nobody
				if v, err := os.ReadFile(dir + "/" + f); err == nil {
					_ = os.WriteFile(dir+"/moved/"+f, v, 0o644)
				}
			}
			if err := os.WriteFile(dir+"/moved/cgroup.procs", []byte(strconv.Itoa(pid)), 0o644); err != nil {
				t.Fatal(err)
			}
			moved++
			break
		}
	}
	if moved == 0 {
		t.Error("the first process could not be moved")
	}
}

// checkExecCgroup compares, from the host, the cgroups of a running exec with
// the container's: the same or below, in every hierarchy.
func checkExecCgroup(t *testing.T, n *Node, id string) {
	t.Helper()
	init := cgroupsOf(t, n.PID(t, id))
	done := make(chan error, 1)
	mark := fmt.Sprintf("%d", 80000+time.Now().UnixNano()%10000)
	go func() {
		_, err := n.ExecTimeout(t, id, 2, "/bin/sleep", mark)
		done <- err
	}()
	var pid int
	eventually(t, 10*time.Second, "the exec", func() bool {
		for _, p := range allPIDs() {
			if strings.HasSuffix(cmdline(p), "/bin/sleep "+mark) {
				pid = p
			}
		}
		return pid != 0
	})
	for hierarchy, path := range cgroupsOf(t, pid) {
		own := init[hierarchy]
		if i := strings.Index(own, id); i >= 0 {
			own = own[:i+len(id)] // with version 2 both are in folders of the container's
		}
		if path != own && !strings.HasPrefix(path, own+"/") {
			t.Errorf("hierarchy %q: the container is in %s, an exec in %s", hierarchy, own, path)
		}
	}
	if c := init["memory"] + init[""]; !strings.Contains(c, id) {
		t.Errorf("the container is in no cgroup of its own: %v", init)
	}
	if err := <-done; status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("exec with a timeout: %v", err)
	}
}

func cgroupsOf(t testing.TB, pid int) map[string]string {
	t.Helper()
	m := map[string]string{}
	for line := range strings.Lines(string(mustRead(t, fmt.Sprintf("/proc/%d/cgroup", pid)))) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		m[f[1]] = f[2]
	}
	return m
}

// counts are what execs must not leave: descriptors of the daemon, the worker and
// the keeper, and processes of theirs.
func (n *Node) counts(t testing.TB) (fds int) {
	t.Helper()
	for _, pid := range []int{n.DaemonPID(), n.WorkerPID(), n.KeeperPID()} {
		l, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		if err != nil {
			t.Fatal(err)
		}
		fds += len(l)
	}
	for _, pid := range allPIDs() { // helpers that wait for something
		if running(pid) && strings.HasPrefix(cmdline(pid), "naru") {
			fds++
		}
	}
	return fds
}

// TestX04_BackgroundChildHoldsStdout: an exec whose command leaves a child that
// holds its output ends soon after the command.
func TestX04_BackgroundChildHoldsStdout(t *testing.T) {
	n := StartNode(t)
	pod := n.Pod(t, nil)
	id := n.Run(t, pod, nil)
	run := func(timeout int64) {
		begin := time.Now()
		r, err := n.ExecTimeout(t, id, timeout*int64(testhost.Factor()), "/bin/sh", "-c", "sleep 1000 & echo hi")
		if err != nil || string(r.Stdout) != "hi\n" || r.ExitCode != 0 {
			t.Errorf("timeout %d: %v %v", timeout, r, err)
		}
		if took := time.Since(begin); took > testhost.Limit(5*time.Second) {
			t.Errorf("timeout %d: the answer took %v", timeout, took)
		}
	}
	run(2)
	before := n.counts(t)
	begin := time.Now()
	rounds := scaled(40, 200)
	sem := make(chan struct{}, 8)
	for i := range rounds {
		sem <- struct{}{}
		go func() {
			defer func() { <-sem }()
			run(int64(2 * (i % 2)))
		}()
	}
	for range cap(sem) {
		sem <- struct{}{}
	}
	t.Logf("%d execs took %v", rounds, time.Since(begin))
	eventually(t, 10*time.Second, "descriptors to be closed", func() bool { return n.counts(t) <= before+6 })
	n.Sh(t, id, "echo still here")
}

// TestX05_ExecTimeout: when an exec's time is over, all of it ends and nothing
// else.
func TestX05_ExecTimeout(t *testing.T) {
	n := StartNode(t)
	pod := n.Pod(t, nil)
	id := n.Run(t, pod, nil)
	init := n.PID(t, id)
	for what, script := range map[string]string{
		"child and grandchild": "setsid sleep 4711 & sleep 4711",
		"double fork":          "(setsid sh -c 'sleep 4711 & sleep 4711 & exec sleep 4711' &); sleep 4711",
		"ignores SIGTERM":      "trap '' TERM INT HUP; while :; do sleep 4711; done",
		"stopped":              "sleep 4711 & kill -STOP $!; kill -STOP $$; sleep 4711",
		"closed output":        "exec >&- 2>&-; sleep 4711",
	} {
		for _, seconds := range []int64{1} {
			begin := time.Now()
			r, err := n.ExecTimeout(t, id, seconds, "/bin/sh", "-c", script)
			if status.Code(err) != codes.DeadlineExceeded {
				t.Errorf("%s: %v %v", what, r, err)
			}
			if took := time.Since(begin); took > time.Duration(seconds)*time.Second+testhost.Limit(3*time.Second) {
				t.Errorf("%s: took %v", what, took)
			}
			eventually(t, 5*time.Second, what+": the end of all its processes", func() bool {
				for _, p := range allPIDs() {
					if running(p) && strings.Contains(cmdline(p), "4711") {
						return false
					}
				}
				return true
			})
			if !running(init) || n.Status(t, id).State != criv1.ContainerState_CONTAINER_RUNNING {
				t.Fatalf("%s: the container ended with the exec", what)
			}
		}
	}
	n.Sh(t, id, "echo still here")
}
