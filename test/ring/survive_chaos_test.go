package ring

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/internal/testhost"
)

// survivor is the set of containers that TestSurvive watches.
type survivor struct {
	t                                        *testing.T
	n                                        *Node
	ctl                                      string // folder of the host, /ctl in every container
	pod                                      string
	flood, both, echo, tty, created, patient string
	alive                                    map[string]identity
	checks                                   int
}

// Writers, at full speed but for short breaks that keep the logs small. They
// end when told to, and say how far they came.
const (
	floodScript = `i=0; while [ ! -e /ctl/stop ]; do seq $((i*20000+1)) $(((i+1)*20000)); i=$((i+1)); usleep 150000; done; echo $((i*20000)) >/ctl/flood; exit 6`
	bothScript  = `i=0; while [ ! -e /ctl/stop ]; do n=0; while [ $n -lt 2000 ]; do i=$((i+1)); echo $i; echo $i >&2; n=$((n+1)); done; usleep 20000; done; echo $i >/ctl/both; exit 7`
)

func newSurvivor(t *testing.T) *survivor {
	n := StartNode(t)
	s := &survivor{t: t, n: n, ctl: n.HostDir(t), alive: map[string]identity{}}
	s.pod = n.Pod(t, nil)
	ctl := mounts(Volume(s.ctl, "/ctl"))
	interactive := func(tty bool, cmd ...string) func(*criv1.ContainerConfig) {
		return func(c *criv1.ContainerConfig) { c.Stdin, c.Tty, c.Command = true, tty, cmd }
	}
	s.flood = n.Run(t, s.pod, each(ctl, shell(floodScript)))
	s.both = n.Run(t, s.pod, each(ctl, shell(bothScript)))
	s.echo = n.Run(t, s.pod, interactive(false, "/bin/cat"))
	s.tty = n.Run(t, s.pod, interactive(true, "/bin/sh"))
	s.created = n.Container(t, s.pod, shell("echo started late; exit 9"))
	s.patient = n.Run(t, s.pod, each(ctl, shell(`trap 'n=0; while [ ! -e /ctl/go ] && [ $n -lt 500 ]; do usleep 10000; n=$((n+1)); done; echo bye; exit 33' TERM; echo ready; while :; do usleep 10000; done`)))
	for _, id := range []string{s.flood, s.both, s.echo, s.tty, s.created, s.patient} {
		s.alive[id] = identityOf(n.PID(t, id))
		if s.alive[id].pid == 0 {
			t.Fatalf("container %s has no process", id[:12])
		}
	}
	return s
}

// die starts a container that ends with code 42 as soon as its file is there.
func (s *survivor) die(name string) string {
	return s.n.Run(s.t, s.pod, each(mounts(Volume(s.ctl, "/ctl")), shell(fmt.Sprintf("while [ ! -e /ctl/%s ]; do usleep 5000; done; echo last words of %s; exit 42", name, name))))
}

func (s *survivor) touch(name string) {
	s.t.Helper()
	if err := os.WriteFile(filepath.Join(s.ctl, name), nil, 0o644); err != nil {
		s.t.Fatal(err)
	}
}

// check is what must hold at any moment.
func (s *survivor) check(after string) {
	s.t.Helper()
	s.checks++
	for id, was := range s.alive {
		if now := identityOf(was.pid); now != was {
			s.t.Fatalf("after %s: container %s was process %v, now %v", after, id[:12], was, now)
		}
		if st := s.n.Status(s.t, id); st.State != criv1.ContainerState_CONTAINER_RUNNING && (id != s.created || st.State != criv1.ContainerState_CONTAINER_CREATED) {
			s.t.Fatalf("after %s: container %s is %v (%s, %s)", after, id[:12], st.State, st.Reason, st.Message)
		}
		if pid := s.n.PID(s.t, id); pid != was.pid {
			s.t.Errorf("after %s: the daemon says process %d, it is %d", after, pid, was.pid)
		}
	}
	word := fmt.Sprintf("round-%d", s.checks)
	if out := s.n.Sh(s.t, s.both, "echo "+word); out != word {
		s.t.Errorf("after %s: exec says %q", after, out)
	}
	a := s.n.attachStream(s.t, s.echo, streamOptions{stdin: true})
	a.send(word + "\n")
	a.out.waitFor(s.t, word+"\n")
	a.close()
	a = s.n.attachStream(s.t, s.tty, streamOptions{stdin: true, tty: true})
	a.send(fmt.Sprintf("echo =$((%d+1000))=; tty\r", s.checks))
	a.out.waitFor(s.t, fmt.Sprintf("=%d=", s.checks+1000))
	a.out.waitFor(s.t, "/dev/")
	a.close()
}

// Every way to lose a part of Naru, in random order, while containers run and
// write.
func TestSurvive(t *testing.T) {
	s := newSurvivor(t)
	n := s.n
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 1))
	keeper := identityOf(n.KeeperPID())
	ended := map[string]int32{}
	round := 0
	steps := map[string]func(){
		"kill -9 of the daemon": func() {
			round++
			code, sig := s.die(fmt.Sprintf("exit%d", round)), n.Run(t, s.pod, shell("echo last words of exit; exec sleep 1000"))
			before := n.remember(t)
			pids := []int{n.PID(t, code), n.PID(t, sig)}
			n.KillDaemon()
			s.touch(fmt.Sprintf("exit%d", round))
			eventually(t, 10*time.Second, "the sleep", func() bool { return cmdline(pids[1]) == "sleep 1000" })
			if err := unix.Kill(pids[1], unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			for _, pid := range pids {
				eventually(t, 10*time.Second, "the end of a container", func() bool { return !running(pid) })
			}
			n.StartDaemon()
			ended[code], ended[sig] = 42, 137
			before.compare(t, n.remember(t), code, sig)
		},
		"kill -9 of the worker":         func() { n.KillWorker() },
		"execve of the keeper in place": func() { n.UpgradeKeeper() },
		"SIGUSR2 to the keeper": func() {
			old := n.WorkerPID()
			if err := unix.Kill(n.KeeperPID(), unix.SIGUSR2); err != nil {
				t.Fatal(err)
			}
			eventually(t, 20*time.Second, "another worker", func() bool { i, err := n.info(); return err == nil && i.WorkerPID != old })
		},
		"kill -9 of daemon and worker": func() {
			before := n.remember(t)
			n.KillDaemon()
			n.KillWorker()
			n.StartDaemon()
			before.compare(t, n.remember(t))
		},
	}
	var order []string
	for name := range steps {
		for range scaled(7, 40) {
			order = append(order, name)
		}
	}
	rnd.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
	s.check("the start")
	for _, name := range order {
		time.Sleep(time.Duration(rnd.IntN(60)) * time.Millisecond)
		steps[name]()
		s.check(name)
		if now := identityOf(keeper.pid); now != keeper || n.KeeperPID() != keeper.pid {
			t.Fatalf("after %s: the keeper was process %v, now %v", name, keeper, now)
		}
		for id, code := range ended {
			if st := n.Status(t, id); st.State != criv1.ContainerState_CONTAINER_EXITED || st.ExitCode != code || st.Reason != "Error" || st.FinishedAt == 0 {
				t.Errorf("after %s: a container that ended with %d is %v, %d, %q", name, code, st.State, st.ExitCode, st.Reason)
			}
		}
	}
	s.finish(ended)
}

// finish ends everything and holds the logs against what was written.
func (s *survivor) finish(ended map[string]int32) {
	t, n := s.t, s.n
	for id := range ended {
		if text := n.LogText(t, id); !strings.HasPrefix(text, "last words of exit") {
			t.Errorf("log of a container that ended while the daemon was down: %q", text)
		}
	}
	n.Start(t, s.created)
	if st := n.WaitExit(t, s.created); st.ExitCode != 9 || n.LogText(t, s.created) != "started late\n" {
		t.Errorf("the container that was created before: exit code %d, log %q", st.ExitCode, n.LogText(t, s.created))
	}
	s.touch("stop")
	for _, c := range []struct {
		id, file string
		code     int32
		streams  []string
	}{{s.flood, "flood", 6, []string{"stdout"}}, {s.both, "both", 7, []string{"stdout", "stderr"}}} {
		st := n.WaitExit(t, c.id)
		b, err := os.ReadFile(filepath.Join(s.ctl, c.file))
		if err != nil || st.ExitCode != c.code {
			t.Errorf("%s: exit code %d, %v", c.file, st.ExitCode, err)
		}
		got := numbers(t, st.LogPath)
		for _, stream := range c.streams {
			if fmt.Sprint(got[stream]) != strings.TrimSpace(string(b)) {
				t.Errorf("%s: %s has lines up to %d, written were %s", c.file, stream, got[stream], b)
			}
		}
		t.Logf("%s: %v lines", c.file, got)
	}
	for i, text := 1, n.LogText(t, s.echo); i <= s.checks; i++ {
		if strings.Count(text, fmt.Sprintf("round-%d\n", i)) != 1 {
			t.Errorf("what was typed in round %d is not once in the log", i)
		}
	}
	for i, text := 1, n.LogText(t, s.tty); i <= s.checks; i++ {
		if strings.Count(text, fmt.Sprintf("=%d=", i+1000)) != 1 {
			t.Errorf("what the shell answered in round %d is not once in the log", i)
		}
	}
	s.stopped()
}

// stopped: a stop goes on over a kill of the daemon, with its grace.
func (s *survivor) stopped() {
	t, n := s.t, s.n
	stop := func() error {
		_, err := n.Runtime.StopContainer(within(t, callTime), &criv1.StopContainerRequest{ContainerId: s.patient, Timeout: 30})
		return err
	}
	first := make(chan error, 1)
	go func() { first <- stop() }()
	eventually(t, 10*time.Second, "the stop", func() bool { out, _ := n.naru(t, "ops"); return strings.Contains(out, "grace") })
	n.RestartDaemon()
	if err := <-first; err == nil {
		t.Error("a stop ended well though the daemon was killed")
	}
	if identityOf(s.alive[s.patient].pid) != s.alive[s.patient] {
		t.Fatal("the restart ended a container in its grace")
	}
	second := make(chan error, 1)
	go func() { second <- stop() }()
	time.Sleep(50 * time.Millisecond)
	s.touch("go")
	if err := <-second; err != nil {
		t.Errorf("the repeated stop: %v", err)
	}
	if st := n.Status(t, s.patient); st.ExitCode != 33 || n.LogText(t, s.patient) != "ready\nbye\n" {
		t.Errorf("a container that was told to end: exit code %d (%s), log %q", st.ExitCode, st.Reason, n.LogText(t, s.patient))
	}
}

// A stop whose caller and daemon are gone is finished by the next daemon.
func TestSurviveStopUnderWay(t *testing.T) {
	n := StartNode(t)
	pod := n.Pod(t, nil)
	id := n.Run(t, pod, shell("trap '' TERM; echo ready; while :; do usleep 10000; done"))
	eventually(t, 10*time.Second, "the trap", func() bool { return n.LogText(t, id) != "" })
	done := make(chan error, 1)
	go func() {
		_, err := n.Runtime.StopContainer(within(t, callTime), &criv1.StopContainerRequest{ContainerId: id, Timeout: 2})
		done <- err
	}()
	eventually(t, 10*time.Second, "the stop", func() bool { out, _ := n.naru(t, "ops"); return strings.Contains(out, "grace") })
	began := time.Now()
	n.RestartDaemon()
	<-done
	st := n.WaitExit(t, id)
	if took := time.Since(began); st.ExitCode != 137 || took > testhost.Limit(10*time.Second) {
		t.Errorf("exit code %d after %v, want 137 after the grace", st.ExitCode, took)
	}
}

// The keeper itself is killed: containers and logs go on, the next keeper takes
// over, and where the kernel tells it exit codes are exact.
func TestSurviveKeeperKilled(t *testing.T) {
	told := testhost.TellsExits(t)
	exited := func(st *criv1.ContainerStatus, want int32) {
		t.Helper()
		unknown := st.ExitCode == 255 && st.Reason == "ContainerStatusUnknown"
		if st.ExitCode != want && (told || !unknown) {
			t.Errorf("exit code %d (%s: %s), want %d (the kernel tells exits: %v)", st.ExitCode, st.Reason, st.Message, want, told)
		}
	}
	n := StartNode(t)
	ctl := n.HostDir(t)
	pod := n.Pod(t, nil)
	vol := mounts(Volume(ctl, "/ctl"))
	both := n.Run(t, pod, each(vol, shell(bothScript)))
	before := identityOf(n.PID(t, both))
	for i := range scaled(2, 10) {
		name := fmt.Sprintf("end%d", i)
		dies := n.Run(t, pod, each(vol, shell(fmt.Sprintf("while [ ! -e /ctl/%s ]; do usleep 5000; done; exit 42", name))))
		pid := n.PID(t, dies)
		n.KillKeeper()
		if i%2 == 0 {
			n.KillDaemon()
		}
		if err := os.WriteFile(filepath.Join(ctl, name), nil, 0o644); err != nil {
			t.Fatal(err)
		}
		eventually(t, 10*time.Second, "the end of a container", func() bool { return !running(pid) })
		n.StartKeeper()
		// Until it takes over, the orphaned worker answers; a daemon that came now
		// would start a keeper of its own.
		eventually(t, 20*time.Second, "the keeper", func() bool { i, err := n.info(); return err == nil && !i.Orphan })
		if i%2 == 0 {
			n.StartDaemon()
		}
		exited(n.WaitExit(t, dies), 42)
		if now := identityOf(before.pid); now != before {
			t.Fatalf("the container was process %v, now %v", before, now)
		}
		if out := n.Sh(t, both, "echo here"); out != "here" {
			t.Errorf("exec says %q", out)
		}
	}
	if err := os.WriteFile(filepath.Join(ctl, "stop"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	st := n.WaitExit(t, both)
	exited(st, 7)
	got := numbers(t, st.LogPath)
	b, _ := os.ReadFile(filepath.Join(ctl, "both"))
	if want := strings.TrimSpace(string(b)); fmt.Sprint(got["stdout"]) != want || fmt.Sprint(got["stderr"]) != want {
		t.Errorf("lines %v, written %s", got, want)
	}
}
