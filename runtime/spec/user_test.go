package spec

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/testhost"
	"github.com/naru-project/naru/runtime"
)

func TestUser(t *testing.T) {
	n := func(v int64) *int64 { return &v }
	for name, c := range map[string]struct {
		image    string
		sec      runtime.Security
		uid, gid uint32
		groups   []uint32
		home     string
	}{
		"nothing":            {"", runtime.Security{}, 0, 0, []uint32{0, 6}, "/root"},
		"name":               {"app", runtime.Security{}, 1000, 1001, []uint32{1001, 29, 33, 50000}, "/home/app"},
		"uid of an account":  {"1000", runtime.Security{}, 1000, 1001, []uint32{1001, 29, 33, 50000}, "/home/app"},
		"second of a uid":    {"twin", runtime.Security{}, 1000, 5, []uint32{5}, "/twin"},
		"uid alone":          {"1234", runtime.Security{}, 1234, 0, []uint32{0}, "/"},
		"uid and gid":        {"1003:1004", runtime.Security{}, 1003, 1004, []uint32{1004}, "/"},
		"uid and group":      {"1003:audio", runtime.Security{}, 1003, 29, []uint32{29}, "/"},
		"name and gid":       {"www-data:1004", runtime.Security{}, 33, 1004, []uint32{1004}, "/var/www"},
		"name and group":     {"app:video", runtime.Security{}, 1000, 44, []uint32{44, 29, 33, 50000}, "/home/app"},
		"empty group":        {"app:", runtime.Security{}, 1000, 1001, []uint32{1001, 29, 33, 50000}, "/home/app"},
		"zeros":              {"00", runtime.Security{}, 0, 0, []uint32{0, 6}, "/root"},
		"plus":               {"+0", runtime.Security{}, 0, 0, []uint32{0, 6}, "/root"},
		"leading zeros":      {"0033", runtime.Security{}, 33, 33, []uint32{33}, "/var/www"},
		"no home":            {"nohome", runtime.Security{}, 70, 70, []uint32{70}, "/"},
		"number with a twin": {"65537", runtime.Security{}, 65537, 0, []uint32{0}, "/"},
		"largest":            {"2147483647", runtime.Security{}, 2147483647, 0, []uint32{0}, "/"},
		"asked uid":          {"app", runtime.Security{RunAsUser: n(33)}, 33, 33, []uint32{33}, "/var/www"},
		"asked uid and gid":  {"app", runtime.Security{RunAsUser: n(1000), RunAsGroup: n(7)}, 1000, 7, []uint32{7, 29, 33, 50000}, "/home/app"},
		"asked root":         {"app", runtime.Security{RunAsUser: n(0)}, 0, 0, []uint32{0, 6}, "/root"},
		"asked name":         {"", runtime.Security{RunAsUsername: "app"}, 1000, 1001, []uint32{1001, 29, 33, 50000}, "/home/app"},
		"asked name, group":  {"", runtime.Security{RunAsUsername: "app", RunAsGroup: n(9)}, 1000, 9, []uint32{9, 29, 33, 50000}, "/home/app"},
		"merge":              {"app", runtime.Security{SupplementalGroups: []int64{7, 29, 1001}}, 1000, 1001, []uint32{1001, 7, 29, 33, 50000}, "/home/app"},
		"strict":             {"app", runtime.Security{SupplementalGroups: []int64{7, 7}, GroupsPolicyStrict: true}, 1000, 1001, []uint32{1001, 7}, "/home/app"},
		"strict, none":       {"app", runtime.Security{GroupsPolicyStrict: true}, 1000, 1001, []uint32{1001}, "/home/app"},
		"strict, named":      {"app:audio", runtime.Security{GroupsPolicyStrict: true}, 1000, 29, []uint32{29}, "/home/app"},
	} {
		t.Run(name, func(t *testing.T) {
			in := ordinary()
			in.Image.User, in.Security, in.Env = c.image, c.sec, nil
			s, u, err := Build(in)
			if err != nil {
				t.Fatal(err)
			}
			if u.UID != c.uid || u.GID != c.gid || !slices.Equal(u.Groups, c.groups) || !slices.Contains(s.Process.Env, "HOME="+c.home) {
				t.Errorf("%+v %q", u, s.Process.Env)
			}
			p := s.Process.User
			if p.UID != u.UID || p.GID != u.GID || !slices.Equal(p.AdditionalGids, u.Groups) || *p.Umask != 0o022 {
				t.Errorf("the spec says %+v", p)
			}
		})
	}
}

// Row U-01, among others.
func TestUserRefused(t *testing.T) {
	n := func(v int64) *int64 { return &v }
	many := make([]int64, 65537)
	for i := range many {
		many[i] = int64(i)
	}
	for name, c := range map[string]struct {
		image string
		sec   runtime.Security
		class errs.Class
	}{
		"2^32":                {"4294967296", runtime.Security{}, errs.InvalidArgument}, // passwd has a user of that name, uid 0
		"2^32-1":              {"4294967295", runtime.Security{}, errs.InvalidArgument},
		"2^31":                {"2147483648", runtime.Security{}, errs.InvalidArgument},
		"10^20":               {"99999999999999999999", runtime.Security{}, errs.InvalidArgument},
		"-1":                  {"-1", runtime.Security{}, errs.InvalidArgument},
		"-0":                  {"-0", runtime.Security{}, errs.InvalidArgument},
		"gid 2^32":            {"1000:4294967296", runtime.Security{}, errs.InvalidArgument},
		"gid -1":              {"1000:-1", runtime.Security{}, errs.InvalidArgument},
		"hex":                 {"0x0", runtime.Security{}, errs.FailedPrecondition},
		"exponent":            {"1e3", runtime.Security{}, errs.FailedPrecondition},
		"trailing blank":      {"1000 ", runtime.Security{}, errs.InvalidArgument},
		"wide digits":         {"１０００", runtime.Security{}, errs.InvalidArgument},
		"line break":          {"a\nroot", runtime.Security{}, errs.InvalidArgument},
		"NUL":                 {"app\x00", runtime.Security{}, errs.InvalidArgument},
		"three parts":         {"a:b:c", runtime.Security{}, errs.InvalidArgument},
		"no user":             {":5", runtime.Security{}, errs.InvalidArgument},
		"long":                {strings.Repeat("a", 9999), runtime.Security{}, errs.InvalidArgument},
		"unknown":             {"ghost", runtime.Security{}, errs.FailedPrecondition},
		"unknown group":       {"app:ghosts", runtime.Security{}, errs.FailedPrecondition},
		"account with -1":     {"bad", runtime.Security{}, errs.FailedPrecondition},
		"account with 2^32-1": {"huge", runtime.Security{}, errs.FailedPrecondition},
		"account with word":   {"word", runtime.Security{}, errs.FailedPrecondition},
		"group with word":     {"0:broken", runtime.Security{}, errs.FailedPrecondition},
		"uid_t -1":            {"", runtime.Security{RunAsUser: n(4294967295)}, errs.InvalidArgument},
		"negative uid":        {"", runtime.Security{RunAsUser: n(-1)}, errs.InvalidArgument},
		"gid_t -1":            {"", runtime.Security{RunAsUser: n(1), RunAsGroup: n(4294967295)}, errs.InvalidArgument},
		"group -1":            {"", runtime.Security{SupplementalGroups: []int64{4294967295}}, errs.InvalidArgument},
		"group alone":         {"app", runtime.Security{RunAsGroup: n(5)}, errs.InvalidArgument},
		"uid and name":        {"", runtime.Security{RunAsUser: n(5), RunAsUsername: "app"}, errs.InvalidArgument},
		"asked unknown":       {"", runtime.Security{RunAsUsername: "ghost"}, errs.FailedPrecondition},
		"asked number":        {"", runtime.Security{RunAsUsername: "1000"}, errs.InvalidArgument},
		"asked big number":    {"", runtime.Security{RunAsUsername: "4294967296"}, errs.InvalidArgument},
		"asked with colon":    {"", runtime.Security{RunAsUsername: "a:b"}, errs.InvalidArgument},
		"asked line break":    {"", runtime.Security{RunAsUsername: "a\nroot"}, errs.InvalidArgument},
		"too many groups":     {"", runtime.Security{SupplementalGroups: many}, errs.InvalidArgument},
		"one group too many":  {"", runtime.Security{SupplementalGroups: many[1:]}, errs.InvalidArgument},
	} {
		t.Run(name, func(t *testing.T) {
			refused(t, c.class, func(in *Input) { in.Image.User, in.Security = c.image, c.sec })
		})
	}
}

func TestUserWithoutAccounts(t *testing.T) {
	for _, root := range []Root{nil, files{}} {
		in := ordinary()
		in.Root, in.Image.User = root, "5:6"
		s, u, err := Build(in)
		if err != nil || u.UID != 5 || u.GID != 6 || !slices.Contains(s.Process.Env, "HOME=/") {
			t.Errorf("%+v, %v", u, err)
		}
		refused(t, errs.FailedPrecondition, func(in *Input) { in.Root, in.Image.User = root, "root" })
		refused(t, errs.FailedPrecondition, func(in *Input) { in.Root, in.Image.User = root, "5:staff" })
	}
}

func TestUserInNamespace(t *testing.T) {
	m := []runtime.IDMap{{ContainerID: 0, HostID: 100000, Size: 65536}}
	refused(t, errs.InvalidArgument, func(in *Input) { in.UIDMap, in.GIDMap, in.Image.User = m, m, "65536" })
	refused(t, errs.InvalidArgument, func(in *Input) { in.UIDMap, in.GIDMap, in.Security.SupplementalGroups = m, m, []int64{70000} })
	for name, maps := range map[string][]runtime.IDMap{
		"empty":     {{ContainerID: 0, HostID: 5, Size: 0}},
		"host root": {{ContainerID: 0, HostID: 0, Size: 5}},
		"overflow":  {{ContainerID: 0, HostID: 4294967295, Size: 1}},
		"overflow2": {{ContainerID: 4294967290, HostID: 5, Size: 10}},
		"overlap":   {{ContainerID: 0, HostID: 5, Size: 5}, {ContainerID: 4, HostID: 50, Size: 1}},
		"overlap2":  {{ContainerID: 0, HostID: 5, Size: 5}, {ContainerID: 50, HostID: 9, Size: 1}},
		"many":      slices.Repeat([]runtime.IDMap{{HostID: 1, Size: 1}}, 341),
	} {
		if err := ValidateIDMaps(maps, m); !errs.Is(err, errs.InvalidArgument) {
			t.Errorf("%s: %v", name, err)
		}
	}
	lines := make([]runtime.IDMap, 340)
	for i := range lines {
		lines[i] = runtime.IDMap{ContainerID: uint32(i), HostID: uint32(1000 + i), Size: 1}
	}
	if err := ValidateIDMaps(lines, m); err != nil {
		t.Error(err)
	}
}

// Hostile sizes: bounded memory and time, and an error that names the limit.
func TestAccountsTooLarge(t *testing.T) {
	for name, c := range map[string]struct{ passwd, group string }{
		"long line":    {"root:x:0:0:" + strings.Repeat("x", maxAccountLine), ""},
		"long passwd":  {strings.Repeat("x:x:9:9::/:\n", maxAccountFile/12+1), ""},
		"long group":   {passwd, strings.Repeat("x:x:9:\n", maxAccountFile/7+1)},
		"long members": {passwd, "g:x:9:" + strings.Repeat("a,", maxAccountLine)},
		"many groups": {passwd, func() string {
			var b strings.Builder
			for i := range 70000 {
				fmt.Fprintf(&b, "g:x:%d:app\n", i)
			}
			return b.String()
		}()},
	} {
		t.Run(name, func(t *testing.T) {
			start := testhost.CPUTime()
			refused(t, errs.FailedPrecondition, func(in *Input) { in.Root = writeRoot(t, c.passwd, c.group) })
			if d := testhost.CPUTime() - start; d > testhost.Limit(2*time.Second) {
				t.Errorf("took %v of processor time", d)
			}
		})
	}
}

// writeRoot makes a root file system with the two files.
func writeRoot(t *testing.T, passwd, group string) Root {
	t.Helper()
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "etc"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"passwd": passwd, "group": group} {
		if err := os.WriteFile(filepath.Join(dir, "etc", name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	// Not FDRoot's own limit on the size, but the parser's.
	return unlimitedRoot{f}
}

type unlimitedRoot struct{ dir *os.File }

func (r unlimitedRoot) Open(path string) (*os.File, error) {
	return os.Open(filepath.Join(r.dir.Name(), path))
}

func TestFDRoot(t *testing.T) {
	dir := t.TempDir()
	canary := filepath.Join(dir, "shadow")
	root := filepath.Join(dir, "root")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.WriteFile(canary, []byte("secret"), 0o600))
	must(os.MkdirAll(filepath.Join(root, "nix/store"), 0o755))
	must(os.WriteFile(filepath.Join(root, "nix/store/passwd"), []byte(passwd), 0o644))
	for name, to := range map[string]string{
		"absolute": "/nix/store/passwd", "relative": "nix/../nix/store/passwd", "above": "../../../../nix/store/passwd",
		"host": canary, "hostrel": "../shadow", "loop": "loop", "toproc": "/proc/self/exe", "todev": "/dev/zero",
	} {
		must(os.Symlink(to, filepath.Join(root, name)))
	}
	for i := range 41 {
		must(os.Symlink(fmt.Sprintf("chain%d", i+1), filepath.Join(root, fmt.Sprintf("chain%d", i))))
	}
	must(os.Symlink("/nix/store", filepath.Join(root, "etc")))
	must(syscall.Mkfifo(filepath.Join(root, "fifo"), 0o644))
	must(os.WriteFile(filepath.Join(root, "big"), nil, 0o644))
	must(os.Truncate(filepath.Join(root, "big"), 1<<30))
	sock, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	must(err)
	defer unix.Close(sock)
	must(unix.Bind(sock, &unix.SockaddrUnix{Name: filepath.Join(root, "sock")}))
	f, err := os.Open(root)
	must(err)
	defer f.Close()
	r := FDRoot{f}
	for _, p := range []string{"/nix/store/passwd", "/absolute", "/relative", "/above", "/etc/passwd", "absolute"} {
		g, err := r.Open(p)
		if err != nil {
			t.Errorf("%s: %v", p, err)
			continue
		}
		if acc, err := findAccount(g, "app", 0); err != nil || acc == nil || acc.uid != 1000 {
			t.Errorf("%s: %v, %v", p, acc, err)
		}
		g.Close()
	}
	refusals := map[string]error{
		"/missing": unix.ENOENT, "/host": unix.ENOENT, "/hostrel": unix.ENOENT, "/loop": unix.ELOOP, "/chain0": unix.ELOOP,
		"/toproc": unix.ENOENT, "/todev": unix.ENOENT, "/nix/store/passwd/x": unix.ENOTDIR,
		"/fifo": nil, "/sock": nil, "/nix": nil, "/big": nil,
	}
	if err := unix.Mknod(filepath.Join(root, "zero"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5))); err == nil {
		refusals["/zero"] = nil
	} else if os.Getuid() == 0 {
		t.Error("mknod:", err)
	}
	for p, want := range refusals {
		g, err := r.Open(p)
		if err == nil {
			g.Close()
		}
		if want != nil && !errors.Is(err, want) || want == nil && !errs.Is(err, errs.FailedPrecondition) {
			t.Errorf("%s: %v, want %v", p, err, want)
		}
		if err != nil && strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v", p, err)
		}
	}
}

// What cannot be read is no reason to guess: a container whose passwd is a
// FIFO, a folder or a loop does not start, numeric user or not.
func TestUserFromOddFiles(t *testing.T) {
	for name, make := range map[string]func(path string) error{
		"FIFO":   func(p string) error { return syscall.Mkfifo(p, 0o644) },
		"folder": func(p string) error { return os.Mkdir(p, 0o755) },
		"loop":   func(p string) error { return os.Symlink("passwd", p) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := errors.Join(os.Mkdir(filepath.Join(dir, "etc"), 0o755), make(filepath.Join(dir, "etc/passwd"))); err != nil {
				t.Fatal(err)
			}
			f, err := os.Open(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			refused(t, errs.FailedPrecondition, func(in *Input) { in.Root, in.Image.User = FDRoot{f}, "1000" })
		})
	}
}

// The root file system arrives as a detached mount.
func TestFDRootDetached(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to make a mount")
	}
	fsfd, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fsfd)
	if err := unix.FsconfigCreate(fsfd); err != nil {
		t.Fatal(err)
	}
	mfd, err := unix.Fsmount(fsfd, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	root := os.NewFile(uintptr(mfd), "root")
	defer root.Close()
	if err := unix.Mkdirat(mfd, "etc", 0o755); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Openat(mfd, "etc/passwd", unix.O_CREAT|unix.O_WRONLY|unix.O_CLOEXEC, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Write(fd, []byte("me:x:7:8::/me:\n")); err != nil {
		t.Fatal(err)
	}
	unix.Close(fd)
	in := ordinary()
	in.Root, in.Image.User = FDRoot{root}, "me"
	if _, u, err := Build(in); err != nil || u.UID != 7 || u.GID != 8 {
		t.Errorf("%+v, %v", u, err)
	}
}

func FuzzAccounts(f *testing.F) {
	f.Add(passwd, group, "app")
	f.Add("a:x:1:2:::\n", "g:x:5:a,b\n", "a:g")
	f.Add("::::", ":::", "0:0")
	f.Fuzz(func(t *testing.T, passwd, group, user string) {
		r, err := imageUser(user)
		if err != nil {
			return
		}
		acc, err := findAccount(strings.NewReader(passwd), r.name, 1000)
		if err == nil && acc != nil && (acc.uid > MaxID || acc.gid > MaxID) {
			t.Fatalf("%+v", acc)
		}
		gid, of, err := findGroups(strings.NewReader(group), r.group, "app")
		if err == nil && (gid != nil && *gid > MaxID || slices.ContainsFunc(of, func(g uint32) bool { return g > MaxID })) {
			t.Fatal(gid, of)
		}
	})
}

func FuzzImageUser(f *testing.F) {
	for _, s := range []string{"", "app", "0", "1000:1000", "a:5", "4294967296", "+1", "-1", "0x0", "１"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := imageUser(s)
		if err != nil {
			if !errs.Is(err, errs.InvalidArgument) {
				t.Fatal(err)
			}
			return
		}
		if (r.uid == nil) == (r.name == "") || r.uid != nil && *r.uid > MaxID || r.gid != nil && (*r.gid > MaxID || r.group != "") {
			t.Fatalf("%q: %+v", s, r)
		}
		for _, name := range []string{r.name, r.group} {
			if strings.Trim(name, "0123456789") == "" && name != "" || strings.ContainsAny(name, ":\n\x00 ,") {
				t.Fatalf("%q: name %q", s, name)
			}
		}
	})
}
