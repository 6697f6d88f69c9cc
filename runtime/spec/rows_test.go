package spec

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	goruntime "runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/testhost"
	"github.com/naru-project/naru/runtime"
)

// The rows of docs/security.md about users and groups. Their end-to-end twins
// are in test/ring/users_test.go.

// hostileUsers are strings that look like numbers, and are or are not.
var hostileUsers = []string{
	"4294967296", "4294967295", "2147483648", "99999999999999999999", "-1", "-0", "00", "+0", "0x0", "1e3", "1000 ", " 1000", "１０００", "1000:4294967296",
	"1000:-1", "1000:00", "1000:+0", "18446744073709551616", "18446744073709552616", "+1000", "0001000", "--1", "+-1", "+", "-", "1000\t", "1000\n", "1_000", "0b0", "0o0", "٠",
}

var signedDigits = regexp.MustCompile(`^[+-]?[0-9]+$`)

// Row U-01: an image whose user and group files have each hostile string as the
// name of root. Whatever is a number, with or without a sign, is that number or
// an error.
func TestRowU01NumbersAreNoNames(t *testing.T) {
	for _, s := range hostileUsers {
		for _, user := range []string{s, "1000:" + s, s + ":" + s} {
			if strings.Count(user, ":") > 1 {
				continue
			}
			t.Run(fmt.Sprintf("%q", user), func(t *testing.T) {
				name := strings.TrimSpace(strings.ReplaceAll(s, ":", " "))
				root := files{"/etc/passwd": "root:x:0:0::/root:\n" + s + ":x:0:0::/:/bin/sh\n" + name + ":x:0:0::/:/bin/sh\n",
					"/etc/group": "root:x:0:\n" + s + ":x:0:\n" + name + ":x:0:\n"}
				in := ordinary()
				in.Root, in.Image.User, in.Env = root, user, nil
				_, u, err := Build(in)
				uid, gid, _ := strings.Cut(user, ":")
				for half, want := range map[string]string{"uid": uid, "gid": gid} {
					n, perr := strconv.ParseInt(want, 10, 64)
					digits := signedDigits.MatchString(want)
					switch {
					case want == "" && half == "gid":
					case digits && (perr != nil || n > MaxID || strings.HasPrefix(want, "-")):
						if !errs.Is(err, errs.InvalidArgument) {
							t.Errorf("%s %q: %+v %v", half, want, u, err)
						}
					case err != nil && !errs.Is(err, errs.InvalidArgument) && !errs.Is(err, errs.FailedPrecondition):
						t.Errorf("%v", err)
					case err == nil && digits && half == "uid" && int64(u.UID) != n, err == nil && digits && half == "gid" && int64(u.GID) != n:
						t.Errorf("%s %q became %+v", half, want, u)
					}
				}
			})
		}
		// As a name in the request it can only be a name.
		in := ordinary()
		in.Root = files{"/etc/passwd": "root:x:0:0::/root:\n" + s + ":x:0:0::/:/bin/sh\n"}
		in.Image.User, in.Security = "1000", runtime.Security{RunAsUsername: s}
		if _, _, err := Build(in); err == nil && !slices.Contains([]string{"0x0", "1e3", "--1", "+-1", "+", "-", "1_000", "0b0", "0o0"}, s) {
			t.Errorf("run_as_username %q is accepted", s)
		}
	}
}

// Row U-02: (uid_t)-1 in every place that can say it.
func TestRowU02MinusOne(t *testing.T) {
	n := func(v int64) *int64 { return &v }
	for _, v := range []int64{-1, 4294967295, 4294967296 - 1, 18446744073709551615 >> 32, -4294967296} {
		for what, sec := range map[string]runtime.Security{
			"run_as_user": {RunAsUser: n(v)}, "run_as_group": {RunAsUser: n(1000), RunAsGroup: n(v)}, "supplemental_groups": {SupplementalGroups: []int64{5, v}},
			"strict groups": {SupplementalGroups: []int64{v}, GroupsPolicyStrict: true},
		} {
			t.Run(fmt.Sprint(what, " ", v), func(t *testing.T) { refused(t, errs.InvalidArgument, func(in *Input) { in.Security = sec }) })
		}
	}
	for _, v := range []string{"4294967295", "-1"} {
		for what, root := range map[string]files{
			"uid of an account": {"/etc/passwd": "u:x:" + v + ":0::/:\n"}, "gid of an account": {"/etc/passwd": "u:x:0:" + v + "::/:\n"},
			"gid of a group":        {"/etc/passwd": "u:x:7:7::/:\n", "/etc/group": "g:x:" + v + ":\n"},
			"gid of a member group": {"/etc/passwd": "u:x:7:7::/:\n", "/etc/group": "h:x:" + v + ":u\ng:x:9:\n"},
		} {
			t.Run(what+" "+v, func(t *testing.T) {
				refused(t, errs.FailedPrecondition, func(in *Input) { in.Root, in.Image.User = root, "u:g" })
			})
		}
	}
}

// allocated is how many bytes f allocates, freed ones included: a bound of what
// it can hold at any time.
func allocated(f func()) uint64 {
	var before, after goruntime.MemStats
	goruntime.ReadMemStats(&before)
	f()
	goruntime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

// Row U-03: user and group files of any size, by the very opener that reads an
// image, twenty at a time.
func TestRowU03HugeFiles(t *testing.T) {
	repeat := func(line string, size int) func(f *os.File) error {
		return func(f *os.File) error {
			chunk := strings.Repeat(line, 1+(1<<20)/len(line))
			for n := 0; n < size; n += len(chunk) {
				if _, err := f.WriteString(chunk); err != nil {
					return err
				}
			}
			return nil
		}
	}
	sparse := func(f *os.File) error { return f.Truncate(1 << 30) }
	for name, c := range map[string]struct {
		file string
		fill func(*os.File) error
		fits bool // its size is below the limit
	}{
		"passwd of 1 GiB":          {"passwd", sparse, false},
		"group of 1 GiB":           {"group", sparse, false},
		"group of 10 MiB and 1":    {"group", func(f *os.File) error { return f.Truncate(10<<20 + 1) }, false},
		"passwd of 10 MiB and 1":   {"passwd", func(f *os.File) error { return f.Truncate(10<<20 + 1) }, false},
		"one line of 9 MiB":        {"passwd", func(f *os.File) error { return f.Truncate(9 << 20) }, true},
		"5 M lines with the user":  {"group", repeat("g:x:5:app\n", 50<<20), false},
		"every line with the user": {"group", repeat("g:x:5:app\n", 8<<20), true},
		"a million members":        {"group", repeat("app,", 4<<20), true},
		"a group of a million": {"group", func(f *os.File) error {
			_, err := f.WriteString("g:x:5:" + strings.Repeat("app,", 1_000_000))
			return err
		}, true},
		"a million lines of nobody": {"passwd", repeat("x:x:9:9::/:\n", 9<<20), true},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := errors.Join(os.Mkdir(dir+"/etc", 0o755), os.WriteFile(dir+"/etc/passwd", []byte("app:x:1000:1000::/:\n"), 0o644), os.WriteFile(dir+"/etc/group", []byte("app:x:1000:\n"), 0o644)); err != nil {
				t.Fatal(err)
			}
			f, err := os.Create(filepath.Join(dir, "etc", c.file))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := c.fill(f); err != nil {
				t.Fatal(err)
			}
			root, err := os.Open(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer root.Close()
			for _, user := range []string{"app", "12345"} {
				start := testhost.CPUTime()
				buildFrom(t, root, user, c.file, c.fits)
				if d := testhost.CPUTime() - start; d > testhost.Limit(2*time.Second) {
					t.Errorf("user %s took %v of processor time", user, d)
				}
			}
			mem := allocated(func() {
				var wg sync.WaitGroup
				for i := range 20 {
					wg.Go(func() {
						buildFrom(t, root, []string{"app", "1000", "1000:1000", "app:app", "12345"}[i%5], c.file, c.fits)
					})
				}
				wg.Wait()
			})
			if mem > 64<<20 {
				t.Errorf("%d MiB allocated", mem>>20)
			}
		})
	}
}

// buildFrom resolves one user. A file over the limit that is read is an error
// that names the limit.
func buildFrom(t *testing.T, dir *os.File, user, file string, fits bool) {
	in := ordinary()
	in.Root, in.Image.User = FDRoot{dir}, user
	_, _, err := Build(in)
	// The group file is only read for an account or a group's name.
	needed := file == "passwd" || user != "12345"
	if !fits && needed && (err == nil || !strings.Contains(err.Error(), "limit")) {
		t.Errorf("%s: %v", user, err)
	}
	if err != nil && !errs.Is(err, errs.FailedPrecondition) {
		t.Errorf("%s: %v", user, err)
	}
}

// Row U-04: what stands at /etc/passwd and /etc/group is no regular file of the
// image. Nothing of the host is read, nothing hangs.
func TestRowU04OddFiles(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to make devices")
	}
	host := t.TempDir()
	canary := filepath.Join(host, "shadow")
	if err := os.WriteFile(canary, []byte("app:x:0:0:canary:/:\nroot:x:0:0:canary:/:\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	link := func(to string) func(string) error { return func(p string) error { return os.Symlink(to, p) } }
	for name, c := range map[string]struct {
		make func(path string) error
		miss bool // as if the file were not there
	}{
		"/etc/shadow": {link("/etc/shadow"), true}, "the host's file": {link(canary), true}, "climbing": {link("../../../../../../../.." + canary), true},
		"/proc/kmsg": {link("/proc/kmsg"), true}, "/dev/zero": {link("/dev/zero"), true}, "/proc/self/fd/0": {link("/proc/self/fd/0"), true},
		"FIFO":      {func(p string) error { return syscall.Mkfifo(p, 0o644) }, false},
		"char 1:5":  {func(p string) error { return unix.Mknod(p, unix.S_IFCHR|0o644, int(unix.Mkdev(1, 5))) }, false},
		"char 5:0":  {func(p string) error { return unix.Mknod(p, unix.S_IFCHR|0o644, int(unix.Mkdev(5, 0))) }, false},
		"block":     {func(p string) error { return unix.Mknod(p, unix.S_IFBLK|0o644, int(unix.Mkdev(7, 0))) }, false},
		"folder":    {func(p string) error { return os.Mkdir(p, 0o755) }, false},
		"socket":    {func(p string) error { return unix.Mknod(p, unix.S_IFSOCK|0o644, 0) }, false},
		"to itself": {func(p string) error { return os.Symlink(filepath.Base(p), p) }, false},
		"41 links":  {linkChain(41), false},
		"to a FIFO": {func(p string) error {
			return errors.Join(syscall.Mkfifo(p+".fifo", 0o644), os.Symlink(filepath.Base(p)+".fifo", p))
		}, false},
	} {
		for _, file := range []string{"passwd", "group"} {
			for _, user := range []string{"app", "1000", "1000:app"} {
				t.Run(name+" "+file+" "+user, func(t *testing.T) {
					dir := t.TempDir()
					if err := os.Mkdir(dir+"/etc", 0o755); err != nil {
						t.Fatal(err)
					}
					other := map[string]string{"passwd": "group", "group": "passwd"}[file]
					text := map[string]string{"passwd": "app:x:1000:1000::/home:\n", "group": "app:x:1000:\n"}[other]
					if err := errors.Join(os.WriteFile(dir+"/etc/"+other, []byte(text), 0o644), c.make(dir+"/etc/"+file)); err != nil {
						t.Fatal(err)
					}
					checkOdd(t, dir, user, !c.miss || user == "app" && file == "passwd" || user == "1000:app" && file == "group")
				})
			}
		}
	}
	t.Run("/etc is a link out", func(t *testing.T) {
		dir := t.TempDir()
		if err := os.Symlink(host, dir+"/etc"); err != nil {
			t.Fatal(err)
		}
		checkOdd(t, dir, "app", true)
		checkOdd(t, dir, "1000", false)
	})
	t.Run("NixOS", func(t *testing.T) { // an absolute link inside works
		dir := t.TempDir()
		if err := errors.Join(os.MkdirAll(dir+"/nix/store/x/etc", 0o755), os.WriteFile(dir+"/nix/store/x/etc/passwd", []byte("app:x:1000:1000::/home:\n"), 0o644),
			os.Mkdir(dir+"/etc", 0o755), os.Symlink("/nix/store/x/etc/passwd", dir+"/etc/passwd")); err != nil {
			t.Fatal(err)
		}
		checkOdd(t, dir, "app", false)
	})
}

func linkChain(n int) func(string) error {
	return func(p string) error {
		var all []error
		for i := range n {
			all = append(all, os.Symlink(fmt.Sprintf("%s.%d", filepath.Base(p), i+1), strings.TrimSuffix(fmt.Sprintf("%s.%d", p, i), ".0")))
		}
		return errors.Join(append(all, os.WriteFile(fmt.Sprintf("%s.%d", p, n), []byte("app:x:1000:1000::/:\n"), 0o644))...)
	}
}

func checkOdd(t *testing.T, dir, user string, bad bool) {
	t.Helper()
	root, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	in := ordinary()
	in.Root, in.Image.User = FDRoot{root}, user
	type result struct {
		u   *runtime.User
		err error
	}
	done := make(chan result, 1)
	go func() {
		_, u, err := Build(in)
		done <- result{u, err}
	}()
	select {
	case r := <-done:
		if bad != (r.err != nil) || r.err != nil && !errs.Is(r.err, errs.FailedPrecondition) || r.err == nil && r.u.UID != 1000 {
			t.Errorf("%+v, %v", r.u, r.err)
		}
		if r.err != nil && strings.Contains(r.err.Error(), "canary") {
			t.Errorf("the error quotes the host: %v", r.err)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("it hangs")
	}
}
