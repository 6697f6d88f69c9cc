package ring

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/internal/testhost"
)

// kinds reads what evil kind printed: path → type, device, readable bytes.
func (n *Node) kinds(t testing.TB, id string, paths ...string) map[string]string {
	t.Helper()
	out, errOut, _ := n.Exec(t, id, append([]string{"/bin/evil", "kind"}, paths...)...)
	if !strings.Contains(out, "end") {
		t.Fatalf("evil kind: %s%s", out, errOut)
	}
	return facts(out)
}

// maskedFiles are those of the default list that this kernel may have.
var maskedFiles = []string{"/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/sched_debug", "/proc/latency_stats"}

// checkMasks demands that masked files are the null device and empty.
func (n *Node) checkMasks(t testing.TB, id, what string) {
	t.Helper()
	found := 0
	if out := n.Sh(t, id, "for f in "+strings.Join(maskedFiles, " ")+"; do test ! -e $f || { head -c 60 $f; echo x >$f; head -c 60 $f; }; done"); out != "" {
		t.Errorf("%s: masked files say %q", what, out)
	}
	for path, kind := range n.kinds(t, id, maskedFiles...) {
		switch {
		case path == "end" || kind == "ENOENT":
		case kind == "20000 1:3 0":
			found++
		case kind == "20000 1:3 -1" && path == "/proc/kcore" && profileLoaded(): // which denies to open it, too
			found++
		default:
			t.Errorf("%s: %s is not masked by the null device: %s", what, path, kind)
		}
	}
	if found == 0 {
		t.Errorf("%s: this kernel has none of the masked files: the test proves nothing", what)
	}
}

// profileLoaded tells whether containers run under Naru's AppArmor profile.
func profileLoaded() bool {
	b, _ := os.ReadFile("/sys/kernel/security/apparmor/profiles")
	return strings.HasPrefix(string(b), "naru-default ") || strings.Contains(string(b), "\nnaru-default ")
}

// TestM01_MaskIsTheRealNullDevice: /dev/null of a volume or an image does not
// become a mask. (runc 1.1.5 shows core_pattern in place of timer_list.)
func TestM01_MaskIsTheRealNullDevice(t *testing.T) {
	n := StartNode(t)
	pod := n.Pod(t, nil)
	plain := n.Run(t, pod, nil)
	n.checkMasks(t, plain, "plain")
	for what, mk := range map[string]func(p string) error{
		"link to core_pattern": func(p string) error { return os.Symlink("/proc/sys/kernel/core_pattern", p) },
		"absent":               func(string) error { return nil },
		"regular file":         func(p string) error { return os.WriteFile(p, []byte("fake"), 0o666) },
		"FIFO":                 func(p string) error { return unix.Mkfifo(p, 0o666) },
		"char 1:5":             func(p string) error { return unix.Mknod(p, unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5))) },
		"folder":               func(p string) error { return os.Mkdir(p, 0o755) },
	} {
		dir := n.HostDir(t)
		if err := mk(dir + "/null"); err != nil {
			t.Fatal(err)
		}
		id, err := n.TryRun(t, pod, func(c *criv1.ContainerConfig) { c.Mounts = []*criv1.Mount{Volume(dir, "/dev")} })
		if err != nil {
			t.Logf("%s: %v", what, err)
		} else {
			n.checkMasks(t, id, what)
		}
		if id != "" {
			n.Remove(t, id)
		}
		left, _ := os.ReadDir(dir)
		for _, e := range left { // shm, a mount point, is all that may come
			if e.Name() != "null" && (e.Name() != "shm" || !e.IsDir()) {
				t.Errorf("%s: the volume has got %v", what, e)
			}
		}
	}
	image := n.Image(t, ImageConfig{}, Symlink("dev/null", "/proc/sys/kernel/core_pattern"))
	id := n.Run(t, pod, func(c *criv1.ContainerConfig) { c.Image.Image = image })
	n.checkMasks(t, id, "image")
	t.Run("race", func(t *testing.T) {
		dir := n.HostDir(t)
		if err := unix.Mknod(dir+"/null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink("/proc/sys/kernel/core_pattern", dir+"/other"); err != nil {
			t.Fatal(err)
		}
		n.race(t, pod, dir, "null", "other", scaled(30, 1000), func(c *criv1.ContainerConfig) {
			c.Mounts = []*criv1.Mount{Volume(dir, "/dev")}
			c.Command = []string{"/bin/sh", "-c", "/bin/evil kind /proc/timer_list; exec /bin/sleep 1000"}
		}, func(id string) { n.checkMasks(t, id, "race") })
	})
}

// race exchanges two names of a folder that a container shares, while others
// are made as mutate says; check looks at each that started.
func (n *Node) race(t *testing.T, pod, dir, a, b string, rounds int, mutate func(*criv1.ContainerConfig), check func(id string)) {
	t.Helper()
	swapper := n.Run(t, pod, func(c *criv1.ContainerConfig) {
		c.Mounts = []*criv1.Mount{Volume(dir, "/swap")}
		c.Command = []string{"/bin/evil", "swap", "/swap/" + a, "/swap/" + b}
	})
	n.awaitLog(t, swapper, "swapping")
	started, failed := 0, 0
	for range rounds {
		id, err := n.TryRun(t, pod, mutate)
		if err == nil {
			started++
			if check != nil {
				check(id)
			}
		} else {
			failed++
		}
		if id != "" {
			n.Remove(t, id)
		}
	}
	m := facts(n.stopAttack(t, swapper))
	if number(t, m, "swaps") < 100*rounds/10 {
		t.Errorf("only %s swaps", m["swaps"])
	}
	t.Logf("%d containers started, %d were refused; %s swaps", started, failed, m["swaps"])
}

// TestM04_HostileTerminalPaths: with a terminal, nothing that an image put at
// /dev/pts or /dev/console is followed.
func TestM04_HostileTerminalPaths(t *testing.T) {
	canary := NewCanary(t)
	n := StartNode(t)
	pod := n.Pod(t, nil)
	pts := []Entry{Dir("dev"), Dir("dev/pts")}
	for i := range 21 {
		pts = append(pts, Symlink(fmt.Sprintf("dev/pts/%d", i), "/proc/sys/kernel/core_pattern"))
	}
	images := map[string][]Entry{
		"pts": pts, "pts is a link": {Symlink("dev/pts", canary.Dir)}, "ptmx": {Symlink("dev/ptmx", canary.Dir+"/f")},
		"console → sysrq": {Symlink("dev/console", "/proc/sysrq-trigger")}, "console → canary": {Symlink("dev/console", "/"+canary.Up()+"/f")},
		"console → new": {Symlink("dev/console", canary.Dir+"/new")}, "console is a folder": {Dir("dev/console")},
		"console is a FIFO": {{Name: "dev/console", Type: '6', Mode: 0o666}}, "console is a hung terminal": {{Name: "dev/console", Type: '3', Mode: 0o666, Major: 136, Minor: 4095}},
		"console is the host's": {{Name: "dev/console", Type: '3', Mode: 0o666, Major: 5, Minor: 1}}, "tty": {Symlink("dev/tty", canary.Dir+"/f")},
	}
	for what, entries := range images {
		image := n.Image(t, ImageConfig{}, entries...)
		for _, readonly := range []bool{false, true} {
			id, err := n.TryRun(t, pod, func(c *criv1.ContainerConfig) {
				c.Image.Image = image
				c.Tty, c.Stdin = true, true
				c.Linux.SecurityContext.ReadonlyRootfs = readonly
				c.Command = []string{"/bin/sh", "-c", "tty; ls -l /dev/console; echo hello >/dev/console; exec sleep 1000"}
			})
			if err != nil {
				t.Errorf("%s: %v", what, err) // /dev is always our own: nothing of the image's matters
				continue
			}
			n.awaitLog(t, id, "hello")
			if out := n.LogText(t, id); !strings.Contains(out, "/dev/pts/0") {
				t.Errorf("%s: the terminal is not /dev/pts/0: %q", what, out)
			}
			if k := n.kinds(t, id, "/dev/console", "/dev/ptmx", "/dev/tty"); !strings.HasPrefix(k["/dev/console"], "20000 ") || !strings.HasPrefix(k["/dev/tty"], "20000 5:0") {
				t.Errorf("%s: %v", what, k)
			}
			n.Remove(t, id)
		}
	}
	for _, p := range []string{"console", "pts", "ptmx"} { // the same from a volume that takes the place of /dev
		dir := n.HostDir(t)
		if err := os.Symlink(canary.Dir+"/f", dir+"/"+p); err != nil {
			t.Fatal(err)
		}
		id, err := n.TryRun(t, pod, func(c *criv1.ContainerConfig) {
			c.Tty, c.Stdin = true, true
			c.Mounts = []*criv1.Mount{Volume(dir, "/dev")}
			c.Command = []string{"/bin/sleep", "1000"}
		})
		t.Logf("volume with %s: %v", p, err)
		if id != "" {
			n.Remove(t, id)
		}
	}
}

// TestM05_DevIsALink: what an image has in place of /dev and its parts is not
// followed. (runc 1.1.5 makes links and replaces ptmx in the folder outside.)
func TestM05_DevIsALink(t *testing.T) {
	canary := NewCanary(t)
	n := StartNode(t)
	pod := n.Pod(t, nil)
	if err := os.WriteFile(canary.Dir+"/ptmx", []byte("marker"), 0o600); err != nil {
		t.Fatal(err)
	}
	canary.before = canary.hash(t)
	for what, e := range map[string]Entry{
		"dev, absolute": Symlink("dev", canary.Dir), "dev, climbing": Symlink("dev", canary.Up()), "dev/pts": Symlink("dev/pts", canary.Dir),
		"dev/shm": Symlink("dev/shm", canary.Dir), "dev/fd": Symlink("dev/fd", canary.Dir), "dev/ptmx": Symlink("dev/ptmx", canary.Dir+"/ptmx"),
		"dev/mqueue": Symlink("dev/mqueue", canary.Dir), "dev is a file": File("dev", 0o644, "x"), "sys/fs/cgroup": Symlink("sys/fs/cgroup", canary.Dir),
		"sys/fs": Symlink("sys/fs", canary.Dir), "dev/termination-log": Symlink("dev/termination-log", canary.Dir+"/f"),
	} {
		image := n.Image(t, ImageConfig{}, e)
		id, err := n.TryRun(t, pod, func(c *criv1.ContainerConfig) { c.Image.Image = image })
		switch {
		case err != nil:
			t.Logf("%s: %v", what, err)
			if strings.Contains(what, "/") {
				t.Errorf("%s: covered by our own mount, yet it stops the container: %v", what, err)
			}
		default:
			if out := n.Sh(t, id, "ls -d /dev/null /dev/pts/ptmx /dev/shm/. /dev/fd/0; grep -c ' /dev tmpfs ' /proc/self/mounts; ls -l /dev /sys/fs/cgroup"); strings.Contains(out, canaryFile) {
				t.Errorf("%s: the canary is in the container: %s", what, out)
			}
		}
		if id != "" {
			n.Remove(t, id)
		}
		canary.Check(t)
	}
}

// raceVolume makes a shared folder with a real folder a and a link b.
func (n *Node) raceVolume(t testing.TB, to string) string {
	t.Helper()
	dir := n.HostDir(t)
	if err := os.MkdirAll(dir+"/a/deep", 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(to, dir+"/b"); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestM06_MountTargetRace: mounts whose targets lie behind a folder that is
// exchanged with a link all the time, to places outside.
func TestM06_MountTargetRace(t *testing.T) {
	canary := NewCanary(t)
	n := StartNode(t)
	pod := n.Pod(t, nil)
	source := n.HostDir(t)
	if err := os.WriteFile(source+"/mine", []byte("mine"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, to := range []string{"/", canary.Dir, strings.Repeat("../", 20)} {
		dir := n.raceVolume(t, to)
		mounts := func() []*criv1.Mount {
			list := []*criv1.Mount{Volume(dir, "/v")}
			for i := range scaled(12, 50) {
				list = append(list, Volume(source, fmt.Sprintf("/v/a/x%d", i)))
			}
			return list
		}
		check := func(id string) {
			out := n.Sh(t, id, "cat /proc/self/mountinfo; ls / /v /v/a; ls "+canary.Dir+" 2>/dev/null || true")
			if strings.Contains(out, canaryFile) || strings.Contains(out, "boot\n") {
				t.Errorf("link to %s: the container sees the host:\n%s", to, out)
			}
		}
		n.race(t, pod, dir, "a", "b", scaled(25, 1000), func(c *criv1.ContainerConfig) { c.Mounts = mounts() }, check)
		canary.Check(t)
	}
}

// TestM07_MountPointCreationRace: folders and files that are made as mount
// points are made inside, whatever the links say meanwhile.
func TestM07_MountPointCreationRace(t *testing.T) {
	canary := NewCanary(t)
	n := StartNode(t)
	pod := n.Pod(t, nil)
	source := n.HostDir(t)
	if err := os.WriteFile(source+"/file", []byte("mine"), 0o644); err != nil {
		t.Fatal(err)
	}
	i := 0
	config := func(dir, at string) func(*criv1.ContainerConfig) {
		return func(c *criv1.ContainerConfig) {
			i++
			c.Mounts = []*criv1.Mount{Volume(dir, "/v"), Volume(source, fmt.Sprintf("/v/%s/new%d/deep/dir", at, i)), Volume(source+"/file", fmt.Sprintf("/v/%s/f%d", at, i))}
		}
	}
	for _, to := range []string{canary.Dir, canary.Up()} {
		dir := n.raceVolume(t, to)
		n.race(t, pod, dir, "a", "b", scaled(25, 1000), config(dir, "a"), nil)
		canary.Check(t)
		// Without a race: the link is simply there.
		if err := os.Symlink(to, dir+"/c"); err != nil {
			t.Fatal(err)
		}
		id, err := n.TryRun(t, pod, config(dir, "c"))
		t.Logf("link to %s: %v", to, err)
		if err == nil {
			if out := n.Sh(t, id, "ls "+canary.Dir+" /v/c"); strings.Contains(out, canaryFile) {
				t.Errorf("the link leads to the host: %s", out)
			}
		}
		canary.Check(t)
	}
}

// TestM08_MountIntoKernelFilesystems: no spelling of a target leads into /proc
// or /sys.
func TestM08_MountIntoKernelFilesystems(t *testing.T) {
	canary := NewCanary(t)
	n := StartNode(t)
	pod := n.Pod(t, nil)
	vol := n.HostDir(t)
	for name, to := range map[string]string{"proc": "/proc", "rel": "../proc", "sys": "/sys", "cgroup": "/sys/fs/cgroup", "self": "/proc/self", "two": "proc"} {
		if err := os.Symlink(to, filepath.Join(vol, name)); err != nil {
			t.Fatal(err)
		}
	}
	image := n.Image(t, ImageConfig{}, Symlink("l", "/proc"), Symlink("s", "sys"))
	for _, target := range []string{
		"/vol/proc/sys", "/vol/proc/sys/kernel", "/vol/rel/sys/net", "/vol/sys/kernel", "/vol/cgroup", "/vol/self/attr", "/vol/two/1", "/l/sys", "/s/kernel", "/s",
		"/proc/../proc/sys", "/proc/self/attr", "/proc/sysrq-trigger", "/proc/sys/kernel/core_pattern", "/sys/kernel", "/sys", "/sys/fs/cgroup", "/dev/../proc", "/./proc/sys", "/proc/1/ns",
	} {
		for _, source := range []string{canary.Dir, canary.Dir + "/f"} {
			n.refused(t, pod, "a mount on "+target, func(c *criv1.ContainerConfig) {
				c.Image.Image = image
				c.Mounts = []*criv1.Mount{Volume(vol, "/vol"), Volume(source, target)}
			})
		}
	}
	id := n.Run(t, pod, func(c *criv1.ContainerConfig) {
		c.Mounts = []*criv1.Mount{Volume(canary.Dir, "/vol/proc2"), Volume(canary.Dir, "/processes")}
	})
	if out := n.Sh(t, id, "cat /processes/f /vol/proc2/f"); out != canary.Secret+canary.Secret {
		t.Errorf("ordinary volumes: %q", out)
	}
}

// TestM09_ImageVolumes: the VOLUMEs of an image name places inside of it only.
func TestM09_ImageVolumes(t *testing.T) {
	canary := NewCanary(t)
	n := StartNode(t)
	pod := n.Pod(t, nil)
	layer := []Entry{Symlink("abs", canary.Dir), Symlink("rel", canary.Up()), Dir("ok"), File("ok/f", 0o644, "content\n"), Symlink("toproc", "/proc")}
	for _, v := range []string{
		"/../../../../../../../.." + canary.Dir, "../..", canary.Up(), "/etc/../../../../../.." + canary.Dir, "/abs", "/rel", "/abs/sub", "/rel/new", "", "/", "/proc", ".", "/toproc/sys", "/ok",
	} {
		for _, readonly := range []bool{false, true} {
			image, err := n.TryImage(t, ImageConfig{Volumes: map[string]struct{}{v: {}}}, layer...)
			if err != nil {
				t.Logf("VOLUME %q: %v", v, err)
				continue
			}
			id, err := n.TryRun(t, pod, func(c *criv1.ContainerConfig) {
				c.Image.Image = image
				c.Linux.SecurityContext.ReadonlyRootfs = readonly
			})
			if err == nil {
				if v == "" || v == "/" || v == "." || v == "/proc" || v == "/toproc/sys" {
					t.Errorf("VOLUME %q: the container runs", v)
				}
				out := n.Sh(t, id, "ls -R /abs/ /rel/ "+canary.Dir+" / 2>/dev/null | grep -v '^/proc' | head -5000; cat /abs/f /rel/f 2>/dev/null; cat /proc/1/comm")
				if strings.Contains(out, canary.Secret) || strings.Contains(out, canaryFile) {
					t.Errorf("VOLUME %q shows the host:\n%.2000s", v, out)
				}
				if out := n.Sh(t, id, "cat /ok/f"); out != "content" {
					t.Errorf("VOLUME %q: /ok/f says %q", v, out)
				}
			} else if v == "/ok" {
				t.Errorf("VOLUME %q: %v", v, err)
			} else {
				t.Logf("VOLUME %q: %v", v, err)
			}
			if id != "" {
				n.Remove(t, id)
			}
			canary.Check(t)
		}
	}
	many := map[string]struct{}{}
	for i := range 10000 {
		many[fmt.Sprintf("/many/%d", i)] = struct{}{}
	}
	begin := time.Now()
	image, err := n.TryImage(t, ImageConfig{Volumes: many})
	if err == nil {
		var id string
		id, err = n.TryRun(t, pod, func(c *criv1.ContainerConfig) { c.Image.Image = image })
		if id != "" {
			n.Remove(t, id)
		}
	}
	t.Logf("10000 VOLUMEs: %v, %v", time.Since(begin), err)
	if time.Since(begin) > testhost.Limit(20*time.Second) {
		t.Error("10000 VOLUMEs keep the runtime busy")
	}
}

// TestM12_EtcThroughLinks: the files that the runtime provides are not written
// through links of the image.
func TestM12_EtcThroughLinks(t *testing.T) {
	canary := NewCanary(t)
	n := StartNode(t)
	pod := n.Pod(t, func(c *criv1.PodSandboxConfig) {
		c.Hostname = "ringhost"
		c.DnsConfig = &criv1.DNSConfig{Servers: []string{"192.0.2.53"}}
	})
	hosts := filepath.Join(n.HostDir(t), "hosts")
	if err := os.WriteFile(hosts, []byte("127.0.0.1 managed\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	run := func(what string, entries ...Entry) {
		t.Helper()
		image := n.Image(t, ImageConfig{}, entries...)
		id, err := n.TryRun(t, pod, func(c *criv1.ContainerConfig) {
			c.Image.Image = image
			c.Mounts = []*criv1.Mount{Volume(hosts, "/etc/hosts"), Volume(hosts, "/dev/termination-log"), Volume(filepath.Dir(hosts), "/run/secrets/x")}
		})
		if err != nil {
			t.Logf("%s: %v", what, err)
		} else {
			out := n.Sh(t, id, "for f in hosts hostname resolv.conf mtab; do test -p /etc/$f || cat /etc/$f; done 2>/dev/null; ls -R /run /etc/ 2>/dev/null; true")
			if strings.Contains(out, canary.Secret) || strings.Contains(out, canaryFile) {
				t.Errorf("%s: the container sees the canary:\n%s", what, out)
			}
			if !strings.Contains(out, "managed") || !strings.Contains(out, "ringhost") || !strings.Contains(out, "192.0.2.53") {
				t.Errorf("%s: the files of the pod are not there:\n%s", what, out)
			}
		}
		if id != "" {
			n.Remove(t, id)
		}
		canary.Check(t)
	}
	run("/etc climbs", Symlink("etc", canary.Up()))
	run("/etc absolute", Symlink("etc", canary.Dir))
	run("/run", Symlink("run", canary.Dir))
	for _, f := range []string{"etc/mtab", "etc/hosts", "etc/hostname", "etc/resolv.conf", "etc/passwd", "dev/termination-log", "run/secrets", "run/.containerenv"} {
		run(f+" → file", Symlink(f, canary.Dir+"/f"))
		run(f+" → climbing", Symlink(f, "/"+canary.Up()+"/f"))
		run(f+" → folder", Symlink(f, canary.Dir+"/sub"))
		run(f+" → nothing", Symlink(f, canary.Dir+"/new"))
		run(f+" is a FIFO", Entry{Name: f, Type: '6', Mode: 0o644})
		run(f+" is a folder", Dir(f))
	}
	for _, f := range []string{"etc/passwd", "etc/group", "etc"} {
		to := canary.Dir + "/sub"
		if f != "etc" {
			to += "/passwd"
		}
		image := n.Image(t, ImageConfig{User: "root"}, Symlink(f, to))
		id, err := n.TryRun(t, pod, func(c *criv1.ContainerConfig) { c.Image.Image = image })
		t.Logf("user root with a link at %s: %v", f, err)
		if id != "" {
			n.Remove(t, id)
		}
		if err != nil && strings.Contains(err.Error(), canary.Secret) {
			t.Error("the error quotes the canary")
		}
	}
}

// TestM13_WorkdirThroughLinks: a working directory is made inside, never through
// a link that leads out.
func TestM13_WorkdirThroughLinks(t *testing.T) {
	canary := NewCanary(t)
	n := StartNode(t)
	pod := n.Pod(t, nil)
	for _, to := range []string{"/../../../../.." + canary.Dir, canary.Dir, canary.Up(), "/proc/1/root" + canary.Dir} {
		for _, dir := range []string{"/w/new/dir", "/w", "/w/sub/new"} {
			image := n.Image(t, ImageConfig{WorkingDir: dir}, Symlink("w", to))
			id, err := n.TryRun(t, pod, func(c *criv1.ContainerConfig) {
				c.Image.Image = image
				asUser(1000)(c)
			})
			if err == nil {
				if out := n.Sh(t, id, "pwd; ls; ls /w/"); strings.Contains(out, canaryFile) {
					t.Errorf("WORKDIR %s, /w → %s: %s", dir, to, out)
				}
			} else {
				t.Logf("WORKDIR %s, /w → %s: %v", dir, to, err)
			}
			if id != "" {
				n.Remove(t, id)
			}
			canary.Check(t)
		}
	}
	vol := n.raceVolume(t, canary.Dir)
	i := 0
	n.race(t, pod, vol, "a", "b", scaled(40, 1000), func(c *criv1.ContainerConfig) {
		i++
		c.Mounts = []*criv1.Mount{Volume(vol, "/v")}
		c.WorkingDir = fmt.Sprintf("/v/a/new%d/dir", i)
	}, func(id string) {
		if r, err := n.ExecErr(t, id, "/bin/sh", "-c", "ls ..; ls ../.."); err == nil && strings.Contains(string(r.Stdout), canaryFile) {
			t.Errorf("a container stands on the host: %s", r.Stdout)
		}
	})
	canary.Check(t)
}

// TestM17_PivotRoot: nothing of the old root can be reached, by no way that a
// process with CAP_SYS_CHROOT and CAP_SYS_PTRACE has.
func TestM17_PivotRoot(t *testing.T) {
	canary := NewCanary(t)
	n := StartNode(t)
	for _, mutate := range []func(*criv1.PodSandboxConfig){nil, sharedPID} {
		pod := n.Pod(t, mutate)
		id := n.Run(t, pod, func(c *criv1.ContainerConfig) {
			addCaps("SYS_CHROOT", "SYS_PTRACE", "DAC_READ_SEARCH")(c)
		})
		for range 3 {
			out, errOut, _ := n.Exec(t, id, "/bin/evil", "walk", canary.Dir)
			m := facts(out)
			if strings.Contains(out, "CANARY") {
				t.Errorf("the canary was reached:\n%s", out)
			}
			if m["chroot"] != "OK" || m["fchdir"] != "OK" || m["chroot2"] != "OK" || m["rootfs"] != "yes" || m["end"] != "" {
				t.Errorf("the walk did not run to the container's root: %s%s", out, errOut)
			}
		}
		for line := range strings.Lines(n.Sh(t, id, "cat /proc/1/mountinfo /proc/self/mountinfo")) {
			f := strings.Fields(line)
			if strings.Contains(f[4], workDir) || strings.Contains(f[4], "oldroot") || strings.HasPrefix(f[4], "/tmp") {
				t.Errorf("a mount of the host: %s", line)
			}
			if strings.Contains(line, "shared:") || strings.Contains(line, "master:") {
				t.Errorf("a mount that propagates: %s", line)
			}
		}
		out := n.Sh(t, id, "ls -a /proc/1/root/ /proc/self/root/../../..; cd /proc/self/root/../../.. && ls; ls -d /proc/1/root/.oldroot /proc/1/root/rootfs 2>/dev/null; true")
		if !strings.Contains(out, "bin") || strings.Contains(out, "boot") || strings.Contains(out, "oldroot") {
			t.Errorf("the root's content:\n%s", out)
		}
	}
}
