package ring

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	goruntime "runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// What Naru's own processes offer to others: sockets and the streaming port.

// socketsOf are the inodes of a process's sockets.
func socketsOf(t testing.TB, pid int) map[string]bool {
	t.Helper()
	inodes := map[string]bool{}
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range list {
		to, _ := os.Readlink(dir + "/" + e.Name())
		if inode, ok := strings.CutPrefix(to, "socket:["); ok {
			inodes[strings.TrimSuffix(inode, "]")] = true
		}
	}
	return inodes
}

// listeners are the local addresses, as /proc spells them, of the TCP and UDP
// sockets of a process that wait for strangers.
func listeners(t testing.TB, pid int) (addrs []string) {
	t.Helper()
	own := socketsOf(t, pid)
	for _, kind := range []string{"tcp", "tcp6", "udp", "udp6", "raw", "raw6"} {
		for line := range strings.Lines(string(mustRead(t, fmt.Sprintf("/proc/%d/net/%s", pid, kind)))) {
			f := strings.Fields(line)
			if len(f) > 9 && own[f[9]] && (f[3] == "0A" || !strings.HasPrefix(kind, "tcp")) { // TCP_LISTEN
				addrs = append(addrs, kind+" "+f[1])
			}
		}
	}
	return addrs
}

func (n *Node) ownPIDs() map[string]int {
	n.t.Helper()
	return map[string]int{"daemon": n.DaemonPID(), "keeper": n.KeeperPID(), "worker": n.WorkerPID()}
}

func hostNetwork(c *criv1.PodSandboxConfig) {
	c.Linux.SecurityContext.NamespaceOptions.Network = criv1.NamespaceMode_NODE
}

// TestS01_StreamingPort: who has no token gets one and the same answer, and
// only from this machine.
func TestS01_StreamingPort(t *testing.T) {
	n := StartNode(t)
	pod := n.Pod(t, nil)
	id := n.Run(t, pod, nil)
	link := func() *url.URL {
		r, err := n.Runtime.Exec(within(t, callTime), &criv1.ExecRequest{ContainerId: id, Cmd: []string{"/bin/true"}, Stdout: true, Stderr: true})
		if err != nil {
			t.Fatal(err)
		}
		return must(url.Parse(r.Url))
	}
	u := link()
	if u.Hostname() != "127.0.0.1" {
		t.Errorf("the URL is %s", u)
	}
	for who, pid := range n.ownPIDs() {
		got := listeners(t, pid)
		if who != "daemon" && len(got) > 0 || who == "daemon" && (len(got) != 1 || !strings.HasPrefix(got[0], "tcp 0100007F:")) {
			t.Errorf("%s listens on %v", who, got)
		}
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	tried := 0
	for _, a := range addrs {
		ip := a.(*net.IPNet).IP
		if ip.IsLoopback() || ip.IsLinkLocalUnicast() {
			continue
		}
		tried++
		if c, err := net.DialTimeout("tcp", net.JoinHostPort(ip.String(), u.Port()), 2*time.Second); err == nil {
			_ = c.Close()
			t.Errorf("the port is open on %s", ip)
		}
	}
	if tried == 0 {
		t.Error("this machine has no other address to try")
	}
	inside := n.Run(t, n.Pod(t, hostNetwork), asUser(1000))
	token := u.Path[strings.LastIndexByte(u.Path, '/')+1:]
	var paths []string
	for _, k := range []string{"exec", "attach", "portforward"} {
		paths = append(paths, "/"+k, "/"+k+"/", "/"+k+"/x", "/"+k+"/"+strings.Repeat("A", len(token)), "/"+k+"/"+token[:len(token)-1])
	}
	paths = append(paths, "/", "/debug/pprof", "/debug/pprof/", "/metrics", "/attach/"+link().Path[len("/exec/"):]) // the last: a token of another kind
	answers := map[string]bool{}
	for _, method := range []string{"GET", "POST", "OPTIONS"} {
		script := ""
		for i, path := range paths { // all at once: the server keeps each connection for half a second
			script += fmt.Sprintf("printf '%s %s HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n' | timeout 10 nc 127.0.0.1 %s >/tmp/%d &\n", method, path, u.Port(), i)
		}
		n.Sh(t, inside, script+"wait")
		for i, path := range paths {
			out := strings.ReplaceAll(n.Sh(t, inside, fmt.Sprintf("cat /tmp/%d", i)), "\r", "")
			if !strings.HasPrefix(out, "HTTP/1.1 404 ") {
				t.Errorf("%s %s: %q", method, path, out)
			}
			answers[regexp.MustCompile(`(?m)^Date:.*$`).ReplaceAllString(out, "")] = true
		}
	}
	if len(answers) != 1 {
		t.Errorf("%d different answers: %v", len(answers), answers)
	}
	// A pod with a network of its own does not get as far.
	if r, err := n.ExecErr(t, id, "/bin/sh", "-c", "echo | timeout 2 nc 127.0.0.1 "+u.Port()); err != nil || r.ExitCode == 0 {
		t.Errorf("from a pod: %v %v", r, err)
	}
	if s := openStream(t, link().String(), streamOptions{}); s.exitCode() != 0 {
		t.Error("a good token does not work")
	}
}

// asNobody runs f on a thread of uid and gid 1000 that ends with it.
func asNobody(f func() error) error {
	done := make(chan error, 1)
	go func() {
		goruntime.LockOSThread() // never unlocked: the thread is thrown away
		_, _, e0 := unix.RawSyscall(unix.SYS_SETGROUPS, 0, 0, 0)
		_, _, e1 := unix.RawSyscall(unix.SYS_SETRESGID, 1000, 1000, 1000)
		_, _, e2 := unix.RawSyscall(unix.SYS_SETRESUID, 1000, 1000, 1000)
		if e0|e1|e2 != 0 {
			done <- fmt.Errorf("change identity: %v %v %v", e0, e1, e2)
			return
		}
		done <- f()
	}()
	return <-done
}

// connect connects to a unix socket of any type.
func connect(path string) error {
	for _, kind := range []int{unix.SOCK_STREAM, unix.SOCK_SEQPACKET, unix.SOCK_DGRAM} {
		fd, err := unix.Socket(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		err = unix.Connect(fd, &unix.SockaddrUnix{Name: path})
		_ = unix.Close(fd)
		if !errors.Is(err, unix.EPROTOTYPE) {
			return err
		}
	}
	return unix.EPROTOTYPE
}

// TestS13_Sockets: with umask 0, every socket that Naru's processes listen on
// has a path, is root's alone and lies in folders that only root writes to.
func TestS13_Sockets(t *testing.T) {
	n := StartNode(t, WithUmaskZero())
	n.Run(t, n.Pod(t, nil), nil)
	var paths []string
	for who, pid := range n.ownPIDs() {
		own := socketsOf(t, pid)
		for line := range strings.Lines(string(mustRead(t, fmt.Sprintf("/proc/%d/net/unix", pid)))) {
			f := strings.Fields(line) // Num RefCount Protocol Flags Type St Inode Path
			if len(f) < 8 || !own[f[6]] {
				continue
			}
			if strings.HasPrefix(f[7], "@") {
				t.Errorf("the %s has the abstract socket %s", who, f[7])
			}
		}
	}
	err := filepath.WalkDir(n.RunDir, func(p string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFSOCK:
			paths = append(paths, p)
			if st.Mode&0o7777 != 0o600 || st.Uid != 0 {
				t.Errorf("%s has mode %o, owner %d", p, st.Mode&0o7777, st.Uid)
			}
			var up unix.Stat_t
			if err := unix.Lstat(filepath.Dir(p), &up); err != nil || up.Uid != 0 || up.Mode&0o7777 != 0o700 && up.Mode&0o7777 != 0o711 {
				t.Errorf("the folder of %s has mode %o, owner %d, %v", p, up.Mode&0o7777, up.Uid, err)
			}
		case unix.S_IFDIR:
			if st.Mode&0o022 != 0 && !strings.Contains(p, "/shm") {
				t.Errorf("%s has mode %o", p, st.Mode&0o7777)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{n.Socket, n.RunDir + "/admin.sock", n.RunDir + "/monitor/monitor.sock"} {
		if !slices.Contains(paths, want) {
			t.Errorf("there is no socket %s among %v", want, paths)
		}
	}
	for _, p := range paths {
		if err := connect(p); err != nil {
			t.Errorf("root cannot connect to %s: %v", p, err)
		}
		if err := asNobody(func() error { return connect(p) }); !errors.Is(err, unix.EACCES) {
			t.Errorf("uid 1000 connects to %s: %v", p, err)
		}
	}
	if st, err := os.Stat(n.RunDir); err != nil || st.Mode().Perm()&0o066 != 0 {
		t.Errorf("%s: %v %v", n.RunDir, st.Mode(), err)
	}
	// A pod that shares the host's network and processes, as root and not: no
	// abstract name, and no way through the root of our processes.
	for _, uid := range []int64{0, 1000} {
		pod := n.Pod(t, func(c *criv1.PodSandboxConfig) {
			hostNetwork(c)
			c.Linux.SecurityContext.NamespaceOptions.Pid = criv1.NamespaceMode_NODE
		})
		id := n.Run(t, pod, asUser(uid))
		out := n.Sh(t, id, "grep ' @' /proc/net/unix || true")
		for line := range strings.Lines(out) {
			f := strings.Fields(line)
			for who, pid := range n.ownPIDs() {
				if len(f) > 6 && socketsOf(t, pid)[f[6]] {
					t.Errorf("uid %d: abstract socket of the %s: %s", uid, who, line)
				}
			}
		}
		for who, pid := range n.ownPIDs() {
			for _, p := range paths {
				if _, _, code := n.Exec(t, id, "/bin/ls", fmt.Sprintf("/proc/%d/root%s", pid, p)); code == 0 {
					t.Errorf("uid %d reaches %s through the root of the %s", uid, p, who)
				}
			}
			if out := n.Sh(t, id, fmt.Sprintf("for f in /proc/%d/fd/* /proc/%d/cwd /proc/%d/exe; do readlink $f; done; true", pid, pid, pid)); out != "" {
				t.Errorf("uid %d sees what the %s has open: %s", uid, who, out)
			}
		}
		n.RemovePod(t, pod)
	}
	// The stale socket of a daemon that was killed is replaced.
	n.RestartDaemon()
	var st unix.Stat_t
	if err := unix.Lstat(n.Socket, &st); err != nil || st.Mode != unix.S_IFSOCK|0o600 {
		t.Errorf("after a restart the socket has mode %o, %v", st.Mode, err)
	}
}

// TestS13_Places: something else stands where the daemon wants its socket.
func TestS13_Places(t *testing.T) {
	canary := NewCanary(t)
	n := StartNode(t)
	n.StopDaemon()
	for what, mk := range map[string]func(p string) error{
		"link to a file": func(p string) error { return os.Symlink(canary.Dir+"/f", p) }, "link to nothing": func(p string) error { return os.Symlink(canary.Dir+"/new", p) },
		"folder": func(p string) error { return os.Mkdir(p, 0o700) }, "file": func(p string) error { return os.WriteFile(p, []byte("x"), 0o600) },
		"FIFO": func(p string) error { return unix.Mkfifo(p, 0o600) },
	} {
		t.Run(what, func(t *testing.T) {
			_ = os.Remove(n.Socket)
			if err := mk(n.Socket); err != nil {
				t.Fatal(err)
			}
			n.LaunchDaemon()
			eventually(t, 20*time.Second, "the daemon to refuse", n.daemon.ended)
			if n.daemon.err == nil || !strings.Contains(tail(n.Dir+"/naru.log", 2000), n.Socket) {
				t.Errorf("the daemon ended with %v: %s", n.daemon.err, tail(n.Dir+"/naru.log", 2000))
			}
			canary.Check(t)
			if err := os.Remove(n.Socket); err != nil {
				t.Error(err)
			}
		})
	}
	n.StartDaemon()
}
