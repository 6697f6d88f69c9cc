package sandbox

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/namespaces"
	"github.com/naru-project/naru/internal/sys"
	"github.com/naru-project/naru/sandbox/sysctl"
)

// holdNamespaces is what the test binary does as the child of fakeMaker: it
// makes a tmpfs inside its user namespace, tells its descriptor, and waits.
func holdNamespaces() {
	fail := func(err error) {
		fmt.Println("error", err)
		os.Exit(1)
	}
	shm := -1
	if size := os.Getenv(envHolder); size != "0" {
		f, err := sys.NewFs("tmpfs", tmpfsAttrs, sys.FsOption{Key: "size", Value: size}, sys.FsOption{Key: "mode", Value: "1777"})
		if err != nil {
			fail(err)
		}
		shm = int(f.Fd())
	}
	fmt.Println("ready", shm)
	_, _ = os.Stdin.Read(make([]byte, 1))
	os.Exit(0)
}

// fakeMaker is a NamespaceMaker of ordinary child processes.
type fakeMaker struct {
	mu       sync.Mutex
	inits    map[string]*exec.Cmd
	released []string
	fail     error
}

func (f *fakeMaker) Make(ctx context.Context, r namespaces.Request) (*namespaces.Files, error) {
	if f.fail != nil {
		return nil, f.fail
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{envHolder + "=" + fmt.Sprint(r.ShmSize)}
	attr := &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS}
	for _, x := range []struct {
		want bool
		flag uintptr
	}{{r.User, unix.CLONE_NEWUSER}, {r.Net, unix.CLONE_NEWNET}, {r.IPC, unix.CLONE_NEWIPC}, {r.UTS, unix.CLONE_NEWUTS}, {r.PID, unix.CLONE_NEWPID}} {
		if x.want {
			attr.Cloneflags |= x.flag
		}
	}
	for _, m := range r.UIDMap {
		attr.UidMappings = append(attr.UidMappings, syscall.SysProcIDMap{ContainerID: int(m.ContainerID), HostID: int(m.HostID), Size: int(m.Size)})
	}
	for _, m := range r.GIDMap {
		attr.GidMappings = append(attr.GidMappings, syscall.SysProcIDMap{ContainerID: int(m.ContainerID), HostID: int(m.HostID), Size: int(m.Size)})
	}
	if r.User {
		attr.Credential = &syscall.Credential{NoSetGroups: true} // uid 0 of the new namespace
	}
	cmd.SysProcAttr = attr
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	end := func() {
		_ = stdin.Close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	fd := -1
	if _, serr := fmt.Sscanf(line, "ready %d", &fd); serr != nil || err != nil {
		end()
		return nil, fmt.Errorf("holder: %q, %w", line, errors.Join(err, serr))
	}
	out := &namespaces.Files{}
	open := func(want bool, name string, kind int, to **os.File) {
		if !want || err != nil {
			return
		}
		*to, err = sys.OpenNamespace(fmt.Sprintf("/proc/%d/ns/%s", cmd.Process.Pid, name), kind)
	}
	open(r.User, "user", unix.CLONE_NEWUSER, &out.User)
	open(r.Net, "net", unix.CLONE_NEWNET, &out.Net)
	open(r.IPC, "ipc", unix.CLONE_NEWIPC, &out.IPC)
	open(r.UTS, "uts", unix.CLONE_NEWUTS, &out.UTS)
	open(r.PID, "pid", unix.CLONE_NEWPID, &out.PID)
	if err == nil && fd >= 0 {
		var p int
		if p, err = unix.PidfdOpen(cmd.Process.Pid, 0); err == nil {
			pidfd := os.NewFile(uintptr(p), "pidfd")
			out.Shm, err = sys.Getfd(pidfd, fd, "shm")
			_ = pidfd.Close()
		}
	}
	if err != nil || !r.PID {
		end()
	} else {
		f.mu.Lock()
		f.inits[r.ID] = cmd
		f.mu.Unlock()
	}
	if err != nil {
		out.Close()
		return nil, err
	}
	return out, nil
}

func (f *fakeMaker) Release(_ context.Context, id string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.released = append(f.released, id)
	if cmd := f.inits[id]; cmd != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		delete(f.inits, id)
	}
	return nil
}

var testMap = []namespaces.IDMap{{ContainerID: 0, HostID: 300000, Size: 65536}}

func TestUserNamespacePod(t *testing.T) {
	maker := &fakeMaker{inits: map[string]*exec.Cmd{}}
	cfg := testConfig(t)
	cfg.UnprivilegedPing, cfg.UnprivilegedPorts = true, true
	m := start(t, cfg, Deps{Namespaces: maker})
	s := podSpec(t, "user", mapping(TCP, 8080, 80, ""))
	s.UIDMap, s.GIDMap, s.ShmSize = testMap, testMap, 1<<20
	s.Sysctls = map[string]string{"kernel.shmmni": "77", "net.ipv4.ip_local_port_range": "2000 3000", "fs.mqueue.msg_max": "11"}
	h := create(t, m, s)
	for _, p := range []string{h.Namespaces.Net, h.Namespaces.IPC, h.Namespaces.UTS, h.Namespaces.User} {
		if p == "" {
			t.Fatalf("paths %+v", h.Namespaces)
		}
	}
	serve(t, netns(t, h), "tcp", ":80", "user")
	wantAnswer(t, outsideNS, "tcp4", hostPort(hostIP4, 8080), "user", outIP4)
	wantAnswer(t, nil, "tcp6", hostPort(pick(h, false), 80), "user", "")
	ipc, err := sys.OpenNamespace(h.Namespaces.IPC, unix.CLONE_NEWIPC)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ipc.Close() }()
	got := map[string]string{}
	o := &opened{files: map[string]*os.File{"net": netns(t, h), "ipc": ipc}}
	if err := m.inNamespaces(o, unix.CLONE_NEWNET|unix.CLONE_NEWIPC, func() error {
		for _, p := range []string{"kernel/shmmni", "fs/mqueue/msg_max", "net/ipv4/ip_local_port_range", "net/ipv4/ip_unprivileged_port_start", "net/ipv6/conf/eth0/accept_ra"} {
			v, err := sysctl.Read(m.proc, p)
			if err != nil {
				return err
			}
			got[p] = v
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"kernel/shmmni": "77", "fs/mqueue/msg_max": "11", "net/ipv4/ip_local_port_range": "2000\t3000", "net/ipv4/ip_unprivileged_port_start": "0", "net/ipv6/conf/eth0/accept_ra": "0"}
	for k, v := range want {
		if got[k] != v {
			t.Errorf("%s = %q, want %q", k, got[k], v)
		}
	}
	if v, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0); err != nil || v != 1 {
		t.Errorf("dumpable %d, %v", v, err)
	}
	var st unix.Stat_t
	if err := unix.Stat(h.Shm, &st); err != nil || st.Uid != 300000 || st.Mode&0o7777 != 0o1777 {
		t.Errorf("shm: uid %d, mode %o, %v", st.Uid, st.Mode, err)
	}
	alive, err := m.Adopt(t.Context(), s, h)
	if err != nil || !alive {
		t.Errorf("adopt: %v %v", alive, err)
	}
	release(t, m, h)
	if len(maker.released) != 1 {
		t.Errorf("maker released %v", maker.released)
	}
}

func TestUserNamespaceWithHostNetwork(t *testing.T) {
	maker := &fakeMaker{inits: map[string]*exec.Cmd{}}
	m := start(t, testConfig(t), Deps{Namespaces: maker})
	s := podSpec(t, "user")
	s.Network, s.UTS, s.UIDMap, s.GIDMap = ModeNode, ModeNode, testMap, testMap
	h := create(t, m, s)
	if h.Namespaces.Net != "" || h.Namespaces.UTS != "" || h.Namespaces.User == "" || h.Namespaces.IPC == "" || len(h.IPs) != 0 {
		t.Fatalf("%+v", h)
	}
	if alive, err := m.Adopt(t.Context(), s, h); !alive || err != nil {
		t.Errorf("adopt: %v %v", alive, err)
	}
	release(t, m, h)
}

func TestSharedPIDNamespace(t *testing.T) {
	maker := &fakeMaker{inits: map[string]*exec.Cmd{}}
	m := start(t, testConfig(t), Deps{Namespaces: maker})
	s := podSpec(t, "shared")
	s.SharePID = true
	h := create(t, m, s)
	if h.Namespaces.PID == "" || h.Namespaces.User != "" || h.Namespaces.Net == "" || len(maker.inits) != 1 {
		t.Fatalf("%+v, %d inits", h.Namespaces, len(maker.inits))
	}
	f, err := m.open(h, unix.CLONE_NEWPID)
	if err != nil {
		t.Fatal(err)
	}
	_ = f.Close()
	release(t, m, h)
	if len(maker.inits) != 0 {
		t.Error("init lives on")
	}
}

func TestMakerFails(t *testing.T) {
	maker := &fakeMaker{inits: map[string]*exec.Cmd{}, fail: errs.New(errs.ResourceExhausted, "no more namespaces")}
	m := start(t, testConfig(t), Deps{Namespaces: maker})
	s := podSpec(t, "user")
	s.UIDMap, s.GIDMap = testMap, testMap
	_, err := m.Create(t.Context(), s, nil)
	if !errs.Is(err, errs.ResourceExhausted) || !strings.Contains(err.Error(), "make namespaces: no more") {
		t.Fatal(err)
	}
	if len(maker.released) != 1 || len(m.ips.IDs()) != 0 {
		t.Errorf("released %v, leases %v", maker.released, m.ips.IDs())
	}
	cfg := testConfig(t)
	cfg.Table, cfg.LinkPrefix = "other", "othr"
	none := start(t, cfg, Deps{})
	s.ID = newID(t)
	if _, err := none.Create(t.Context(), s, nil); !errs.Is(err, errs.Unimplemented) {
		t.Error(err)
	}
}
