package ring

import (
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/naru-project/naru/internal/testhost"
)

// Users and groups of hostile images, end to end. The rules themselves, with
// many more strings, are tested in runtime/spec/rows_test.go.

var signedDigits = regexp.MustCompile(`^[+-]?[0-9]+$`)

// hostIDs are the user and group IDs of a process as the host sees them.
func hostIDs(t testing.TB, pid int) (uid, gid string) {
	t.Helper()
	for line := range strings.Lines(string(mustRead(t, fmt.Sprintf("/proc/%d/status", pid)))) {
		f := strings.Fields(line)
		switch {
		case len(f) == 5 && f[0] == "Uid:":
			uid = strings.Join(f[1:], " ")
		case len(f) == 5 && f[0] == "Gid:":
			gid = strings.Join(f[1:], " ")
		}
	}
	return uid, gid
}

func fourTimes(n int64) string {
	s := strconv.FormatInt(n, 10)
	return strings.Join([]string{s, s, s, s}, " ")
}

// TestU01_NumbersAreNoNames: an image's USER that is a number, with a line in
// its passwd and group that makes the same string root.
func TestU01_NumbersAreNoNames(t *testing.T) {
	n := StartNode(t)
	pod := n.Pod(t, nil)
	for _, user := range []string{
		"4294967296", "4294967295", "2147483648", "99999999999999999999", "-1", "00", "+0", "0x0", "1e3", "1000 ", "１０００", "1000:4294967296", "1000:-1",
		"2147483647", "0001000", "+1000", "1000:2147483647", "1000:00",
	} {
		t.Run(user, func(t *testing.T) {
			line := strings.Split(user, ":")
			name := line[len(line)-1]
			image := n.Image(t, ImageConfig{User: user, Env: []string{"PATH=/bin"}},
				File("etc/passwd", 0o644, "root:x:0:0::/root:/bin/sh\n"+name+":x:0:0::/:/bin/sh\n"+strings.TrimSpace(name)+":x:0:0::/:/bin/sh\n"),
				File("etc/group", 0o644, "root:x:0:\n"+name+":x:0:\n"))
			id, err := n.TryRun(t, pod, func(c *criv1.ContainerConfig) { c.Image.Image = image })
			uid, gid, both := strings.Cut(user, ":")
			checkNumber(t, "uid", uid, err, func() string { u, _ := hostIDs(t, n.PID(t, id)); return u })
			if both {
				checkNumber(t, "gid", gid, err, func() string { _, g := hostIDs(t, n.PID(t, id)); return g })
			}
			if err == nil {
				out, _, _ := n.Exec(t, id, "/bin/evil", "ids")
				if init, _ := hostIDs(t, n.PID(t, id)); !strings.HasPrefix(init, facts(out)["uids"]) {
					t.Errorf("the container runs as %s, an exec as %s", init, facts(out)["uids"])
				}
				n.Remove(t, id)
			}
			// What kubelet decides runAsNonRoot by.
			s, err := n.Images.ImageStatus(within(t, callTime), &criv1.ImageStatusRequest{Image: &criv1.ImageSpec{Image: image}})
			if err != nil {
				t.Fatal(err)
			}
			v, perr := strconv.ParseInt(uid, 10, 64)
			if s.Image.Uid != nil && (perr != nil || v != s.Image.Uid.Value) || s.Image.Uid == nil && s.Image.Username == "" {
				t.Errorf("ImageStatus says uid %v, username %q", s.Image.Uid, s.Image.Username)
			}
			// The same as a user's name in the request.
			_, err = n.TryContainer(t, pod, func(c *criv1.ContainerConfig) {
				c.Image.Image = image
				c.Linux.SecurityContext.RunAsUsername = user
			})
			if user != "0x0" && user != "1e3" {
				wantError(t, err, codes.InvalidArgument, "run_as_username")
			}
		})
	}
}

// checkNumber: a string of digits is that number or InvalidArgument; anything
// else is a name of the image's, or an error.
func checkNumber(t *testing.T, what, s string, err error, is func() string) {
	t.Helper()
	v, perr := strconv.ParseInt(s, 10, 64)
	switch {
	case signedDigits.MatchString(s) && (perr != nil || v < 0 || v > 1<<31-1):
		wantError(t, err, codes.InvalidArgument, "USER")
	case signedDigits.MatchString(s) && err != nil && codeOf(err) != codes.InvalidArgument:
		t.Errorf("%s %q: %v", what, s, err)
	case signedDigits.MatchString(s) && err == nil:
		if got := is(); got != fourTimes(v) {
			t.Errorf("%s %q: the process has %s", what, s, got)
		}
	case err != nil && codeOf(err) != codes.InvalidArgument && codeOf(err) != codes.FailedPrecondition:
		t.Errorf("%s %q: %v", what, s, err)
	}
}

// TestU02_MinusOne: (uid_t)-1, by which setresuid leaves root as it is.
func TestU02_MinusOne(t *testing.T) {
	n := StartNode(t)
	pod := n.Pod(t, nil)
	value := func(v int64) *criv1.Int64Value { return &criv1.Int64Value{Value: v} }
	for _, v := range []int64{4294967295, -1, 4294967296, 1<<63 - 1, -1 << 63} {
		for what, f := range map[string]func(*criv1.LinuxContainerSecurityContext){
			"run_as_user":         func(s *criv1.LinuxContainerSecurityContext) { s.RunAsUser = value(v) },
			"run_as_group":        func(s *criv1.LinuxContainerSecurityContext) { s.RunAsUser, s.RunAsGroup = value(1000), value(v) },
			"supplemental_groups": func(s *criv1.LinuxContainerSecurityContext) { s.SupplementalGroups = []int64{v} },
		} {
			_, err := n.TryContainer(t, pod, security(f))
			wantError(t, err, codes.InvalidArgument, what)
		}
	}
	for _, v := range []string{"4294967295", "-1"} {
		for what, e := range map[string]Entry{
			"uid": File("etc/passwd", 0o644, "app:x:"+v+":0::/:/bin/sh\n"), "gid": File("etc/passwd", 0o644, "app:x:1000:"+v+"::/:/bin/sh\n"),
			"group": File("etc/group", 0o644, "app:x:1000:\nevil:x:"+v+":app\n"),
		} {
			image := n.Image(t, ImageConfig{User: "app"}, e)
			_, err := n.TryContainer(t, pod, func(c *criv1.ContainerConfig) { c.Image.Image = image })
			if codeOf(err) != codes.FailedPrecondition {
				t.Errorf("%s %s in the image's files: %v", what, v, err)
			}
		}
	}
}

// residentKiB is what a process has in memory.
func residentKiB(t testing.TB, pid int) int {
	t.Helper()
	for line := range strings.Lines(string(mustRead(t, fmt.Sprintf("/proc/%d/status", pid)))) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "VmRSS:" {
			v, _ := strconv.Atoi(f[1])
			return v
		}
	}
	t.Fatal("no VmRSS")
	return 0
}

// TestU03_HugeAccounts: user and group files beyond all sizes, by twenty
// creates at once. (Files of a gigabyte are in runtime/spec: they would only be
// slow to load here.)
func TestU03_HugeAccounts(t *testing.T) {
	n := StartNode(t)
	pod := n.Pod(t, nil)
	big := func(line string, size int) string { return strings.Repeat(line, size/len(line)+1) }
	images := map[string]string{}
	for what, e := range map[string]Entry{
		"passwd of 10 MiB and 1": File("etc/passwd", 0o644, big("x:x:9:9::/:\n", 10<<20)), "group of 10 MiB and 1": File("etc/group", 0o644, big("g:x:5:app\n", 10<<20)),
		"one line": File("etc/passwd", 0o644, big("a", 9<<20)), "a million members": File("etc/group", 0o644, "g:x:5:"+big("app,", 4_000_000)),
		"every group has the user": File("etc/group", 0o644, big("g:x:5:app\n", 9<<20)),
	} {
		images[what] = n.Image(t, ImageConfig{User: "app"}, e)
	}
	for what, image := range images {
		t.Run(what, func(t *testing.T) {
			before := residentKiB(t, n.DaemonPID())
			var wg sync.WaitGroup
			for i := range 20 {
				wg.Go(func() {
					begin := time.Now()
					id, err := n.TryContainer(t, pod, func(c *criv1.ContainerConfig) {
						c.Image.Image = image
						if i%2 == 0 {
							asUser([]int64{1000, 12345}[i/2%2])(c)
						}
					})
					if err != nil && codeOf(err) != codes.FailedPrecondition {
						t.Errorf("got %v", err)
					}
					if err == nil && i%2 == 1 {
						t.Error("a container of user app was created")
					}
					if took := time.Since(begin); took > testhost.Limit(10*time.Second) { // twenty on one or two processors
						t.Errorf("a create took %v", took)
					}
					if id != "" {
						n.Remove(t, id)
					}
				})
			}
			wg.Wait()
			if now := residentKiB(t, n.DaemonPID()); now > before+64<<10 {
				t.Errorf("the daemon has grown from %d to %d KiB", before, now)
			}
		})
	}
}

// TestU04_OddAccounts: what an image has at /etc/passwd and /etc/group is no
// file of its own.
func TestU04_OddAccounts(t *testing.T) {
	canary := NewCanary(t)
	n := StartNode(t)
	pod := n.Pod(t, nil)
	shadow := string(mustRead(t, "/etc/shadow"))
	device := func(f string, major, minor int64) Entry {
		return Entry{Name: f, Type: '3', Mode: 0o644, Major: major, Minor: minor}
	}
	for _, file := range []string{"etc/passwd", "etc/group"} {
		loop := []Entry{File("etc/l41", 0o644, "app:x:1000:1000::/:/bin/sh\n"), Symlink(file, "l0")}
		for i := range 41 {
			loop = append(loop, Symlink(fmt.Sprintf("etc/l%d", i), fmt.Sprintf("l%d", i+1)))
		}
		for what, entries := range map[string][]Entry{
			"/etc/shadow": {Symlink(file, "/etc/shadow")}, "canary": {Symlink(file, canary.Dir+"/sub/passwd")}, "climbing": {Symlink(file, "/"+canary.Up()+"/sub/passwd")},
			"/proc/kmsg": {Symlink(file, "/proc/kmsg")}, "/proc/1/root": {Symlink(file, "/proc/1/root/etc/passwd")}, "/dev/zero": {Symlink(file, "/dev/zero"), device("dev/zero", 1, 5)},
			"FIFO": {{Name: file, Type: '6', Mode: 0o644}}, "char 1:5": {device(file, 1, 5)}, "folder": {Dir(file)}, "loop": loop,
		} {
			image := n.Image(t, ImageConfig{User: "app"}, entries...)
			for _, user := range []int64{-1, 1000} {
				begin := time.Now()
				id, err := n.TryContainer(t, pod, func(c *criv1.ContainerConfig) {
					c.Image.Image = image
					if user >= 0 {
						asUser(user)(c)
					}
				})
				if took := time.Since(begin); took > testhost.Limit(10*time.Second) {
					t.Errorf("%s → %s: took %v", file, what, took)
				}
				if err != nil && (codeOf(err) != codes.FailedPrecondition || strings.Contains(err.Error(), canary.Secret) || strings.Contains(err.Error(), strings.SplitN(shadow, "\n", 2)[0])) {
					t.Errorf("%s → %s: %v", file, what, err)
				}
				if err == nil && user < 0 && file == "etc/passwd" {
					t.Errorf("%s → %s: a user app was found", file, what)
				}
				if id == "" {
					continue
				}
				n.Start(t, id)
				if uid, _ := hostIDs(t, n.PID(t, id)); uid != fourTimes(1000) {
					t.Errorf("%s → %s: the process has %s", file, what, uid)
				}
				n.Remove(t, id)
			}
		}
	}
	t.Run("/etc is a link", func(t *testing.T) {
		image := n.Image(t, ImageConfig{User: "app"}, Symlink("etc", canary.Dir+"/sub"))
		if _, err := n.TryContainer(t, pod, func(c *criv1.ContainerConfig) { c.Image.Image = image }); codeOf(err) != codes.FailedPrecondition {
			t.Errorf("got %v", err)
		}
	})
	t.Run("NixOS", func(t *testing.T) {
		image := n.Image(t, ImageConfig{User: "nix", Env: []string{"PATH=/bin"}}, File("nix/store/x/passwd", 0o644, "nix:x:1234:1235::/:/bin/sh\n"), Symlink("etc/passwd", "/nix/store/x/passwd"))
		id := n.Run(t, pod, func(c *criv1.ContainerConfig) { c.Image.Image = image })
		if uid, gid := hostIDs(t, n.PID(t, id)); uid != fourTimes(1234) || gid != fourTimes(1235) {
			t.Errorf("the process has %s, %s", uid, gid)
		}
	})
	if now, err := os.ReadFile("/etc/shadow"); err != nil || string(now) != shadow {
		t.Errorf("/etc/shadow has changed: %v", err)
	}
}
