package ring

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// facts reads "name value" lines of evil.
func facts(out string) map[string]string {
	m := map[string]string{}
	for line := range strings.Lines(out) {
		k, v, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		k = strings.TrimSuffix(k, ":")
		m[k] = strings.TrimSpace(v)
		if f := strings.Fields(line); len(f) == 2 && strings.HasSuffix(f[0], ":") {
			m[strings.TrimSuffix(f[0], ":")] = f[1]
		}
	}
	return m
}

// number is a decimal fact; the attack must have reported it.
func number(t testing.TB, m map[string]string, name string) int {
	t.Helper()
	v, err := strconv.Atoi(m[name])
	if err != nil {
		t.Fatalf("the attack did not report %q: %v", name, m)
	}
	return v
}

// capSet reads one of the Cap lines of /proc/self/status.
func capSet(t testing.TB, m map[string]string, name string) uint64 {
	t.Helper()
	v, err := strconv.ParseUint(m[name], 16, 64)
	if err != nil {
		t.Fatalf("no %s in %v", name, m)
	}
	return v
}

// stopAttack ends an attack that runs as a container and returns what it found.
func (n *Node) stopAttack(t testing.TB, id string) string {
	t.Helper()
	if _, err := n.Runtime.StopContainer(within(t, callTime), &criv1.StopContainerRequest{ContainerId: id, Timeout: 20}); err != nil {
		t.Fatal(err)
	}
	n.WaitExit(t, id)
	out := n.LogText(t, id)
	if !strings.Contains(out, "end\n") {
		t.Fatalf("the attack did not come to its end:\n%s", out)
	}
	return out
}

// awaitLog waits until the container has logged the text.
func (n *Node) awaitLog(t testing.TB, id, text string) {
	t.Helper()
	eventually(t, 20*time.Second, fmt.Sprintf("%q in the log", text), func() bool { return strings.Contains(n.LogText(t, id), text) })
}

// sharedPID makes a pod whose containers share one PID namespace.
func sharedPID(c *criv1.PodSandboxConfig) {
	c.Linux.SecurityContext.NamespaceOptions.Pid = criv1.NamespaceMode_POD
}

func addCaps(names ...string) func(*criv1.ContainerConfig) {
	return func(c *criv1.ContainerConfig) {
		c.Linux.SecurityContext.Capabilities = &criv1.Capability{AddCapabilities: names}
	}
}

// TestN01_JoinerInSharedPIDNamespace attacks processes that join a PID
// namespace, before they execute the container's program: with and without
// CAP_SYS_PTRACE, while another pod has a secret.
func TestN01_JoinerInSharedPIDNamespace(t *testing.T) {
	canary := NewCanary(t)
	n := StartNode(t)
	secret := "secret-" + newID()
	victimPod := n.Pod(t, nil)
	withSecret := func(c *criv1.ContainerConfig) {
		c.Envs = []*criv1.KeyValue{{Key: "SECRET", Value: []byte(secret)}}
		c.Args = []string{secret}
		c.Command = []string{"/bin/sh", "-c", "sleep 86400"}
	}
	victim := n.Run(t, victimPod, withSecret)
	n.Container(t, victimPod, withSecret) // one that waits for its start

	// The joiner's own environment is in its memory: that it is found shows
	// that the search works.
	control := "control-" + newID()
	withControl := func(c *criv1.ContainerConfig) {
		c.Envs = []*criv1.KeyValue{{Key: "CONTROL", Value: []byte(control)}}
	}
	for _, ptrace := range []bool{false, true} {
		t.Run(fmt.Sprintf("ptrace=%v", ptrace), func(t *testing.T) {
			pod := n.Pod(t, sharedPID)
			attacker := n.Run(t, pod, func(c *criv1.ContainerConfig) {
				if ptrace {
					addCaps("SYS_PTRACE")(c)
				}
				c.Command = []string{"/bin/evil", "watch", hidden(secret), hidden(control), canary.Dir}
			})
			n.awaitLog(t, attacker, "watching")
			sibling := n.Run(t, pod, nil)
			for i := range scaled(40, 500) {
				n.Sh(t, sibling, "true")
				n.Sh(t, attacker, "true")
				if i%4 == 0 { // secrets pass through daemon and worker all the time
					_, _, _ = n.Exec(t, victim, "/bin/true", secret)
				}
			}
			for range scaled(10, 200) {
				id := n.Container(t, pod, withControl) // created: the process waits, in view
				time.Sleep(10 * time.Millisecond)
				n.Start(t, id)
				n.Remove(t, id)
			}
			checkWatch(t, n.stopAttack(t, attacker), ptrace, canary)
			n.RemovePod(t, pod)
		})
	}
}

// ownStream is the name of a container's own stdin, stdout or stderr.
var ownStream = regexp.MustCompile(`/run/io/[0-9a-f]{64}/[0-2]$`)

// hidden encodes a pattern for evil watch.
func hidden(s string) string {
	b := []byte(s)
	for i := range b {
		b[i] ^= 0x5a
	}
	return hex.EncodeToString(b)
}

func checkWatch(t *testing.T, out string, ptrace bool, canary *Canary) {
	t.Helper()
	t.Log(out)
	m := facts(out)
	if number(t, m, "seen") == 0 {
		t.Error("the attacker saw no joining process: the attack proves nothing")
	}
	if ptrace && (number(t, m, "bytes") == 0 || m["control"] != "found") {
		t.Error("with CAP_SYS_PTRACE the joiner's own environment was not found: the search for the secret proves nothing")
	}
	if ptrace && number(t, m, "opened") == 0 {
		t.Error("no descriptor of a joiner was opened: the attack proves nothing")
	}
	if strings.Contains(out, "CANARY") {
		t.Error("the host was reached through what a joining process has open")
	}
	if !ptrace {
		if number(t, m, "mem_ok")+number(t, m, "seize_ok")+number(t, m, "opened") > 0 {
			t.Error("a joining process can be read, seized or its descriptors opened without CAP_SYS_PTRACE")
		}
		if number(t, m, "seize_no") == 0 {
			t.Error("no attempt was refused: the attack proves nothing")
		}
	}
	if strings.Contains(out, "canary-in") {
		t.Error("the secret of another pod is in the memory of a joining process")
	}
	// CAP_SYS_PTRACE comes on top of the default set; whatever a joiner has
	// must not be more.
	const allowed = 0x00000000a80425fb | 1<<unix.CAP_SYS_PTRACE
	for line := range strings.Lines(out) {
		f := strings.Fields(line)
		switch {
		case len(f) == 3 && f[0] == "joiner" && strings.HasPrefix(f[1], "Cap"):
			v, err := strconv.ParseUint(f[2], 16, 64)
			if err != nil || v&^uint64(allowed) != 0 {
				t.Errorf("a visible joining process has %s", strings.TrimSpace(line))
			}
		case len(f) >= 2 && (f[0] == "fd" || f[0] == "cwd" || f[0] == "root" || f[0] == "exe"):
			if ownStream.MatchString(strings.TrimSpace(line)) {
				continue // its standard streams are FIFOs with a name; that is all there is to see
			}
			if strings.Contains(line, workDir) || strings.Contains(line, canary.Dir) {
				t.Errorf("a joining process shows a path of the host: %s", strings.TrimSpace(line))
			}
		}
	}
}

func fileSum(t testing.TB, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(b)
	return fmt.Sprintf("%x mtime %v ctime %v", sum[:8], st.Mtim, st.Ctim)
}

// ourself matches what naru-monitor says when it is run as a program.
var ourself = regexp.MustCompile(`naru-monitor|unknown subcommand`)

// TestN02_RuntimeBinary tries to overwrite the program through the processes
// that join a container.
func TestN02_RuntimeBinary(t *testing.T) {
	n := StartNode(t)
	before := fileSum(t, naruBin) + fileSum(t, monitorBin)
	for _, pid := range []int{n.WorkerPID(), n.KeeperPID()} {
		exe := fmt.Sprintf("/proc/%d/exe", pid)
		if to, err := os.Readlink(exe); err != nil || !strings.HasPrefix(to, "/memfd:") {
			t.Errorf("%s is %q (%v), no memfd", exe, to, err)
		}
		f, err := os.Open(exe)
		if err != nil {
			t.Fatal(err)
		}
		seals, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0)
		const want = unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE
		if err != nil || seals&want != want {
			t.Errorf("seals of %s: %#x (%v)", exe, seals, err)
		}
		_ = f.Close()
	}
	image := n.Image(t, ImageConfig{}, File("bin/script", 0o755, "#!/proc/self/exe\n"), Symlink("bin/selflink", "/proc/self/exe"), File("bin/script2", 0o755, "#!/bin/selflink keeper\n"))
	pod := n.Pod(t, nil)
	// A container may execute the sealed copy, with its own privileges only,
	// as if its image held one. That it did is what makes the attack real.
	ran := false
	for _, program := range []string{"/bin/script", "/bin/script2", "/bin/selflink", "/proc/self/exe", "/proc/thread-self/exe", "/proc/1/exe"} {
		id, err := n.TryRun(t, pod, func(c *criv1.ContainerConfig) {
			c.Image.Image = image
			c.Command = []string{program}
		})
		if err == nil {
			n.WaitExit(t, id)
			ran = ran || ourself.MatchString(n.LogText(t, id))
		}
	}
	for _, caps := range [][]string{nil, {"SYS_PTRACE"}} {
		attacker := n.Run(t, pod, func(c *criv1.ContainerConfig) {
			addCaps(caps...)(c)
			c.Image.Image = image
			c.Command = []string{"/bin/evil", "grabexe"}
		})
		n.awaitLog(t, attacker, "watching")
		for range scaled(30, 200) {
			_, _, _ = n.Exec(t, attacker, "/bin/true")
			for _, program := range []string{"/bin/script", "/bin/selflink", "/proc/self/exe"} {
				r, err := n.ExecErr(t, attacker, program)
				ran = ran || err == nil && ourself.MatchString(string(r.Stdout)+string(r.Stderr))
			}
		}
		out := n.stopAttack(t, attacker)
		t.Log(out)
		m := facts(out)
		if number(t, m, "seen") == 0 {
			t.Error("no joining process was seen")
		}
		for line := range strings.Lines(out) {
			if exe, ok := strings.CutPrefix(line, "exe "); ok && !strings.HasPrefix(exe, "/memfd:") {
				t.Errorf("a joining process shows its program: %s", exe)
			}
		}
		if number(t, m, "wrote") > 0 {
			t.Error("the program was written to")
		}
	}
	if !ran {
		t.Log("no container could execute the runtime's own program at all")
	}
	if after := fileSum(t, naruBin) + fileSum(t, monitorBin); after != before {
		t.Errorf("the programs have changed: before %s, after %s", before, after)
	}
}

// fdPaths are the ways in which attacks of Leaky Vessels name a descriptor.
func fdPaths(fd int) []string {
	return []string{fmt.Sprintf("/proc/self/fd/%d", fd), fmt.Sprintf("/proc/1/fd/%d", fd), fmt.Sprintf("/proc/thread-self/fd/%d", fd)}
}

// TestN03_ExecuteLeakedFd names a descriptor as the program, at create and exec.
func TestN03_ExecuteLeakedFd(t *testing.T) {
	n := StartNode(t)
	var links []Entry
	last := scaled(40, 128)
	for fd := 3; fd <= last; fd++ {
		links = append(links, Symlink(fmt.Sprintf("x%d", fd), fmt.Sprintf("/proc/self/fd/%d", fd)))
	}
	image := n.Image(t, ImageConfig{}, links...)
	pod := n.Pod(t, nil)
	host := n.Run(t, pod, func(c *criv1.ContainerConfig) { c.Image.Image = image })
	ran := 0
	for fd := 3; fd <= last; fd++ {
		for i, program := range append(fdPaths(fd), fmt.Sprintf("/x%d", fd)) {
			if r, err := n.ExecErr(t, host, program, "--help"); err == nil && r.ExitCode != 126 && r.ExitCode != 127 {
				t.Errorf("exec of %s: exit code %d\n%s%s", program, r.ExitCode, r.Stdout, r.Stderr)
			}
			ran++
			if i == 1 || i == 2 || (fd > 16 && !full()) {
				continue // one spelling of each kind is enough for creates
			}
			id, err := n.TryRun(t, pod, func(c *criv1.ContainerConfig) {
				c.Image.Image = image
				c.Command = []string{program, "--help"}
			})
			if err == nil {
				t.Errorf("a container started with the program %s: %s", program, n.LogText(t, id))
			}
			if id != "" {
				n.Remove(t, id)
			}
		}
	}
	if ran < 4*(last-2) {
		t.Errorf("only %d attempts", ran)
	}
}

// TestN04_WorkingDirOverLeakedFd names descriptors and other magic links as
// the working directory.
func TestN04_WorkingDirOverLeakedFd(t *testing.T) {
	canary := NewCanary(t)
	n := StartNode(t)
	var links []Entry
	dirs := []string{"/proc/self/cwd", "/proc/1/root", "/proc/1/cwd", "/proc/self/root/../..", "/proc/self", "/proc/1/fd"}
	last := scaled(24, 128)
	for fd := 3; fd <= last; fd++ {
		links = append(links, Symlink(fmt.Sprintf("w%d", fd), fmt.Sprintf("/proc/self/fd/%d", fd)))
		dirs = append(dirs, fmt.Sprintf("/proc/self/fd/%d", fd), fmt.Sprintf("/w%d", fd))
		if fd < 16 {
			dirs = append(dirs, fmt.Sprintf("/proc/self/fd/%d/../../..", fd), fmt.Sprintf("/proc/1/fd/%d", fd), fmt.Sprintf("/w%d/new", fd))
		}
	}
	image := n.Image(t, ImageConfig{}, links...)
	pod := n.Pod(t, nil)
	started := 0
	for _, dir := range dirs {
		id, err := n.TryRun(t, pod, func(c *criv1.ContainerConfig) {
			c.Image.Image = image
			c.WorkingDir = dir
			c.Command = []string{"/bin/sh", "-c", "/bin/readlink /proc/self/cwd; /bin/pwd; /bin/ls " + canary.Up() + " /proc/self/cwd/" + canary.Up()}
		})
		if err == nil {
			started++
			n.WaitExit(t, id)
			out := n.LogText(t, id)
			if strings.Contains(out, canaryFile) || strings.Contains(out, "unreachable") || strings.Contains(out, workDir+"\n") {
				t.Errorf("with the working directory %s the container stands outside:\n%s", dir, out)
			}
		}
		if id != "" {
			n.Remove(t, id)
		}
	}
	t.Logf("%d working directories, %d containers started", len(dirs), started)
	// The image's own WORKDIR, which the runtime makes.
	id := n.Run(t, pod, func(c *criv1.ContainerConfig) { c.WorkingDir = "/a/b/c"; c.Command = []string{"/bin/pwd"} })
	n.WaitExit(t, id)
	if out := n.LogText(t, id); out != "/a/b/c\n" {
		t.Errorf("an ordinary working directory: %q", out)
	}
}

// TestN05_NoDescriptorLeaks gives the daemon and the keeper descriptors that
// they must not pass on, and counts what containers get.
func TestN05_NoDescriptorLeaks(t *testing.T) {
	var files []*os.File
	for _, name := range []string{"/etc/shadow", "/", "/proc/self/ns/mnt"} {
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = f.Close() }()
		files = append(files, f)
	}
	n := StartNode(t, WithInherited(files...))
	pod := n.Pod(t, nil)
	shared := n.Pod(t, sharedPID)
	for name, mutate := range map[string]func(*criv1.ContainerConfig){
		"plain":     func(*criv1.ContainerConfig) {},
		"stdin":     func(c *criv1.ContainerConfig) { c.Stdin = true },
		"tty":       func(c *criv1.ContainerConfig) { c.Tty, c.Stdin = true, true },
		"user":      func(c *criv1.ContainerConfig) { c.Linux.SecurityContext.RunAsUser = &criv1.Int64Value{Value: 1000} },
		"workdir":   func(c *criv1.ContainerConfig) { c.WorkingDir = "/tmp" },
		"read-only": func(c *criv1.ContainerConfig) { c.Linux.SecurityContext.ReadonlyRootfs = true },
	} {
		for _, p := range []string{pod, shared} {
			id := n.Container(t, p, func(c *criv1.ContainerConfig) {
				c.Command = []string{"/bin/sh", "-c", "/bin/evil fds; exec sleep 86400"}
				mutate(c)
			})
			checkCreatedFDs(t, name, n.PID(t, id))
			n.Start(t, id)
			n.awaitLog(t, id, "end")
			checkFDs(t, name+" init", n.LogText(t, id))
			for range 3 {
				out, _, _ := n.Exec(t, id, "/bin/evil", "fds")
				checkFDs(t, name+" exec", out)
			}
			for _, tty := range []bool{false, true} {
				s := n.execStream(t, id, streamOptions{tty: tty, stdin: tty}, "/bin/evil", "fds")
				s.out.waitFor(t, "end")
				checkFDs(t, fmt.Sprintf("%s streamed exec, tty %v", name, tty), s.out.String())
				s.close()
			}
			n.Remove(t, id)
		}
	}
	for _, pid := range []int{n.DaemonPID(), n.KeeperPID(), n.WorkerPID()} {
		links, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		for _, l := range links {
			if fd, _ := strconv.Atoi(l.Name()); fd > 2 && !closeOnExec(pid, fd) {
				to, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", pid, fd))
				t.Errorf("%s: descriptor %d (%s) is not close-on-exec", cmdline(pid), fd, to)
			}
			if to, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, l.Name())); to == "/etc/shadow" {
				t.Errorf("%s has kept an inherited descriptor: %s", cmdline(pid), to)
			}
		}
	}
}

// closeOnExec tells whether a descriptor of another process, if it is still
// open, is closed when it executes another program.
func closeOnExec(pid, fd int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%d", pid, fd))
	if err != nil {
		return true
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 2 && f[0] == "flags:" {
			flags, err := strconv.ParseInt(f[1], 8, 64)
			return err == nil && flags&unix.O_CLOEXEC != 0
		}
	}
	return false
}

// checkFDs demands 0, 1 and 2 and nothing else.
func checkFDs(t *testing.T, what, out string) {
	t.Helper()
	got := 0
	for line := range strings.Lines(strings.ReplaceAll(out, "\r", "")) {
		var fd int
		if k, _ := fmt.Sscanf(line, "fd %d ", &fd); k == 1 {
			got++
			if fd > 2 {
				t.Errorf("%s: %s", what, strings.TrimSpace(line))
			}
		}
	}
	if got < 3 || !strings.Contains(out, "end") {
		t.Errorf("%s: the count is not complete:\n%s", what, out)
	}
}

// checkCreatedFDs: what a created container holds may be pipes, sockets and
// anonymous files only, and its three streams.
func checkCreatedFDs(t *testing.T, what string, pid int) {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	list, err := os.ReadDir(dir)
	if err != nil || len(list) == 0 {
		t.Errorf("%s: descriptors of the created process %d: %v", what, pid, err)
	}
	ok := regexp.MustCompile(`^(pipe:|socket:|anon_inode:|/memfd:|/dev/null|/dev/pts/|/dev/console|/?.*/(stdin|stdout|stderr|in|out|err)$)`)
	for _, e := range list {
		to, _ := os.Readlink(dir + "/" + e.Name())
		if fd, _ := strconv.Atoi(e.Name()); fd > 2 && !ok.MatchString(to) {
			t.Errorf("%s: the created process holds %s → %s", what, e.Name(), to)
		}
	}
}

// refused demands that the container does not come to run.
func (n *Node) refused(t *testing.T, pod, what string, mutate func(*criv1.ContainerConfig)) {
	t.Helper()
	id, err := n.TryRun(t, pod, mutate)
	if err == nil {
		t.Errorf("%s: the container runs", what)
	} else {
		t.Logf("%s: %v", what, err)
	}
	if id != "" {
		n.Remove(t, id)
	}
}

// TestN06_FakeProc: what is no ordinary folder does not become /proc or /sys,
// and nobody covers them.
func TestN06_FakeProc(t *testing.T) {
	canary := NewCanary(t)
	n := StartNode(t)
	pod := n.Pod(t, nil)
	run := func(what, image string, mounts ...*criv1.Mount) {
		t.Helper()
		n.refused(t, pod, what, func(c *criv1.ContainerConfig) {
			c.Image.Image = image
			c.Mounts = mounts
			c.Command = []string{"/bin/sh", "-c", "exit 0"}
		})
	}
	for _, place := range []string{"proc", "sys"} {
		for _, to := range []string{"/tmp", "/" + canary.Up(), "../tmp", canary.Dir, "nowhere", place} {
			run(place+" is a link to "+to, n.Image(t, ImageConfig{}, Symlink(place, to)))
		}
		run(place+" is a file", n.Image(t, ImageConfig{}, File(place, 0o644, "")))
		run(place+" is a FIFO", n.Image(t, ImageConfig{}, Entry{Name: place, Type: '6', Mode: 0o644}))
	}
	for _, v := range []string{"/proc", "/proc/self", "/proc/sys/kernel", "/sys", "/sys/fs/cgroup", "/proc/../proc", "/tmp/../sys/kernel"} {
		id, err := n.TryRun(t, pod, func(c *criv1.ContainerConfig) {
			c.Image.Image = n.Image(t, ImageConfig{Volumes: map[string]struct{}{v: {}}})
			c.Command = []string{"/bin/sh", "-c", "grep -c ' /proc proc ' /proc/self/mounts; grep ' /sys[ /]' /proc/self/mounts"}
		})
		if err == nil { // left out is as good as refused, but nothing may cover it
			n.WaitExit(t, id)
			out := n.LogText(t, id)
			if !strings.HasPrefix(out, "1\n") || strings.Contains(out, "overlay") || strings.Contains(out, "ext4") {
				t.Errorf("VOLUME %s covers a kernel file system:\n%s", v, out)
			}
		}
	}
	for _, p := range []string{"/proc", "/proc/self/attr", "//proc/.", "/sys/fs/../../proc", "/proc/sys/net", "/proc/1"} {
		run("a mount on "+p, Busybox, Volume(canary.Dir, p))
	}
}

// TestN07_ProcWritesAreNotRedirected: what the runtime writes to /proc arrives
// there, or nowhere.
func TestN07_ProcWritesAreNotRedirected(t *testing.T) {
	canary := NewCanary(t)
	n := StartNode(t)
	pod := n.Pod(t, func(c *criv1.PodSandboxConfig) {
		c.Linux.Sysctls = map[string]string{"net.ipv4.ip_unprivileged_port_start": "7", "kernel.shm_rmid_forced": "1"}
	})
	vol := n.HostDir(t)
	if err := os.Symlink("/proc/sys/net", vol+"/link"); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/proc/self", vol+"/self"); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{"/proc/self/oom_score_adj", "/proc/sys/net", "/vol/link/ipv4", "/vol/link", "/vol/self/attr", "/proc/sysrq-trigger", "/proc/self/uid_map", "/proc/thread-self/attr/exec"} {
		source := canary.Dir
		if strings.Contains(p, "oom") || strings.Contains(p, "sysrq") || strings.Contains(p, "uid_map") || strings.HasSuffix(p, "exec") {
			source += "/f"
		}
		n.refused(t, pod, "a mount on "+p, func(c *criv1.ContainerConfig) {
			c.Mounts = []*criv1.Mount{Volume(vol, "/vol"), Volume(source, p)}
			c.Linux.Resources.OomScoreAdj = 500
		})
	}
	good := n.Run(t, pod, func(c *criv1.ContainerConfig) {
		c.Mounts = []*criv1.Mount{Volume(vol, "/vol")}
		c.Linux.Resources.OomScoreAdj = 500
	})
	if out := n.Sh(t, good, "cat /proc/1/oom_score_adj /proc/self/oom_score_adj /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shm_rmid_forced"); out != "500\n500\n7\n1" {
		t.Errorf("what was asked for is not set: %q", out)
	}
	t.Run("race", func(t *testing.T) {
		if err := os.MkdirAll(vol+"/a/deep", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink("/proc/sys/net", vol+"/b"); err != nil {
			t.Fatal(err)
		}
		swapper := n.Run(t, pod, func(c *criv1.ContainerConfig) {
			c.Mounts = []*criv1.Mount{Volume(vol, "/vol")}
			c.Command = []string{"/bin/evil", "swap", "/vol/a", "/vol/b"}
		})
		n.awaitLog(t, swapper, "swapping")
		started := 0
		for range scaled(60, 1000) {
			id, err := n.TryRun(t, pod, func(c *criv1.ContainerConfig) {
				c.Mounts = []*criv1.Mount{Volume(vol, "/vol"), Volume(canary.Dir, "/vol/a/ipv4")}
				c.Linux.Resources.OomScoreAdj = 500
				c.Command = []string{"/bin/sh", "-c", "grep -e ' /proc/sys/[^ ]* ext4' /proc/self/mounts; cat /proc/self/oom_score_adj"}
			})
			if err == nil {
				started++
				n.WaitExit(t, id)
				if out := n.LogText(t, id); out != "500\n" {
					t.Errorf("got %q", out)
				}
			}
			if id != "" {
				n.Remove(t, id)
			}
		}
		if m := facts(n.stopAttack(t, swapper)); number(t, m, "swaps") < 100 {
			t.Errorf("only %s swaps", m["swaps"])
		}
		t.Logf("%d containers started", started)
	})
}
