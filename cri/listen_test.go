package cri

import (
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/sys"
)

// Row S-13: with umask 0, socket and folder are root's alone, and nothing else
// is left in the folder.
func TestListenMakesAPrivateSocket(t *testing.T) {
	old := syscall.Umask(0)
	defer syscall.Umask(old)
	path := filepath.Join(t.TempDir(), "new", "naru.sock")
	l, err := Listen(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	checkMode(t, path, fs.ModeSocket|0o600)
	checkMode(t, filepath.Dir(path), fs.ModeDir|0o700)
	if entries, _ := os.ReadDir(filepath.Dir(path)); len(entries) != 1 {
		t.Errorf("left behind: %v", entries)
	}
	if _, err := Listen(path, nil); !errs.Is(err, errs.FailedPrecondition) {
		t.Errorf("a second listener: %v", err)
	}
	_ = l.Close()
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("socket file after close: %v", err)
	}
}

func checkMode(t *testing.T, path string, want fs.FileMode) {
	t.Helper()
	info, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode() != want {
		t.Errorf("%s has mode %v, want %v", path, info.Mode(), want)
	}
}

// A socket that somebody holds open is taken over with whoever has connected
// meanwhile, whether the holder made it or an earlier Listen, and stays.
func TestListenTakesAHeldSocket(t *testing.T) {
	for _, name := range []string{"made by systemd", "given to systemd"} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "s")
			held := hold(t, path, name == "given to systemd")
			early, err := net.Dial("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			defer early.Close()
			l, err := Listen(path, nil, held)
			if err != nil {
				t.Fatal(err)
			}
			c, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			_ = c.Close()
			if err := l.Close(); err != nil {
				t.Error(err)
			}
			if _, err := os.Lstat(path); err != nil {
				t.Errorf("the socket after close: %v", err)
			}
			if _, err := held.Stat(); !errors.Is(err, os.ErrClosed) {
				t.Errorf("the descriptor is still open: %v", err)
			}
		})
	}
}

// hold returns a descriptor of a listening socket at path, as systemd would.
func hold(t *testing.T, path string, byListen bool) (held *os.File) {
	t.Helper()
	if !byListen {
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		defer l.Close()
		if held, err = l.File(); err != nil {
			t.Fatal(err)
		}
		return held
	}
	l, err := Listen(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	err = l.Hold(func(name string, f *os.File) error {
		fd, err := syscall.Dup(int(f.Fd()))
		held = os.NewFile(uintptr(fd), name)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return held
}

// A held socket whose file was removed is not taken for the one that has its
// place by now: nobody could connect to it.
func TestListenLeavesAHeldSocketWithoutAFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	held := hold(t, path, true)
	fd, err := syscall.Dup(int(held.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	again := os.NewFile(uintptr(fd), held.Name())
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	l, err := Listen(path, nil, held)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Hold(func(string, *os.File) error { return nil }); err != nil { // systemd does not say that it has no room
		t.Fatal(err)
	}
	_ = l.Close()
	if l, err = Listen(path, nil, again); err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	if c, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
}

// Descriptors that are not the socket at path are closed, and it is made anew.
func TestListenIgnoresOtherDescriptors(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	other := hold(t, filepath.Join(dir, "other"), false)
	file, err := os.Create(filepath.Join(dir, "file"))
	if err != nil {
		t.Fatal(err)
	}
	gone := hold(t, path, false)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	l, err := Listen(path, nil, other, file, gone)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	checkMode(t, path, fs.ModeSocket|0o600)
	for _, f := range []*os.File{other, file, gone} {
		if _, err := f.Stat(); !errors.Is(err, os.ErrClosed) {
			t.Errorf("%s is still open: %v", f.Name(), err)
		}
	}
}

// Row S-13: a stale socket is replaced.
func TestListenReplacesAStaleSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	_ = stale.Close()
	l, err := Listen(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
}

// Row S-13: links at the path, to whatever, and folders that are somebody
// else's. What a link leads to stays as it is.
func TestListenInHostilePlaces(t *testing.T) {
	old := syscall.Umask(0)
	defer syscall.Umask(old)
	dir := t.TempDir()
	live, err := net.Listen("unix", filepath.Join(dir, "live"))
	if err != nil {
		t.Fatal(err)
	}
	defer live.Close()
	for name, to := range map[string]string{
		"living socket": filepath.Join(dir, "live"), "nothing": filepath.Join(dir, "victim"), "folder": dir, "itself": filepath.Join(dir, "itself"), "device": "/dev/null",
	} {
		link := filepath.Join(dir, name)
		if name == "folder" {
			link = filepath.Join(dir, "link to a folder")
		}
		if err := os.Symlink(to, link); err != nil {
			t.Fatal(err)
		}
		if _, err := Listen(link, nil); !errs.Is(err, errs.FailedPrecondition) {
			t.Errorf("a link to %s: %v", name, err)
		}
		if now, err := os.Readlink(link); err != nil || now != to {
			t.Errorf("the link to %s has changed: %s %v", name, now, err)
		}
	}
	if _, err := os.Lstat(filepath.Join(dir, "victim")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("made through a link: %v", err)
	}
	if os.Getuid() != 0 {
		t.Skip("needs root for folders of others")
	}
	theirs, link := filepath.Join(dir, "theirs"), filepath.Join(dir, "their link")
	ours := filepath.Join(dir, "ours")
	if err := errors.Join(os.Mkdir(theirs, 0o700), os.Chown(theirs, 1000, 0), os.Mkdir(ours, 0o700), os.Symlink(ours, link), os.Lchown(link, 1000, 1000)); err != nil {
		t.Fatal(err)
	}
	for _, folder := range []string{theirs, link} {
		if _, err := Listen(filepath.Join(folder, "s"), nil); !errs.Is(err, errs.FailedPrecondition) || !strings.Contains(err.Error(), folder) {
			t.Errorf("%s: %v", folder, err)
		}
	}
	if err := os.Lchown(link, 0, 0); err != nil { // as /var/run is
		t.Fatal(err)
	}
	l, err := Listen(filepath.Join(link, "s"), nil)
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
}

// An old daemon that closes late must not take the new one's socket away.
func TestCloseLeavesASuccessorAlone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	first, err := Listen(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	_ = first.UnixListener.Close() // dead, its file stays
	second, err := Listen(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	_ = first.Close()
	if _, err := os.Lstat(path); err != nil {
		t.Error(err)
	}
}

// Row S-13: something else was made at the path before.
func TestListenRefusesWhatIsNoSocket(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	sub := filepath.Join(dir, "dir")
	if err := os.Mkdir(sub, 0o700); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{file, sub, link, fifo} {
		if _, err := Listen(path, nil); !errs.Is(err, errs.FailedPrecondition) {
			t.Errorf("%s: %v", path, err)
		}
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "precious" {
		t.Errorf("the file was touched: %q, %v", b, err)
	}
	open := filepath.Join(dir, "open")
	if err := os.Mkdir(open, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(open, 0o777); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(filepath.Join(open, "s"), nil); !errs.Is(err, errs.FailedPrecondition) {
		t.Errorf("folder for everybody: %v", err)
	}
	for _, path := range []string{"", "relative/s", "@abstract", "/a/../s", "/x/" + strings.Repeat("y", 120)} {
		if _, err := Listen(path, nil); !errs.Is(err, errs.InvalidArgument) {
			t.Errorf("%q: %v", path, err)
		}
	}
}

// Row S-13: who is let in.
func TestAdmit(t *testing.T) {
	tests := []struct {
		cred sys.PeerCred
		gids []uint32
		ok   bool
	}{
		{sys.PeerCred{UID: 0}, nil, true},
		{sys.PeerCred{UID: 1000}, nil, false},
		{sys.PeerCred{UID: 1000, GID: 0}, nil, false}, // group root is not root
		{sys.PeerCred{UID: 1000, GID: 50}, []uint32{50}, true},
		{sys.PeerCred{UID: 1000, GID: 51, Groups: []uint32{7, 50}}, []uint32{50}, true},
		{sys.PeerCred{UID: 1000, GID: 51, Groups: []uint32{7}}, []uint32{50}, false},
	}
	for _, tt := range tests {
		if err := admit(tt.cred, tt.gids); (err == nil) != tt.ok {
			t.Errorf("%+v with %v: %v", tt.cred, tt.gids, err)
		}
	}
}

// Row S-13, the second wall: somebody who can open the socket file, yet is not root.
func TestPeersAreAskedOfTheKernel(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, to connect as somebody else")
	}
	const group = 4242
	dir := t.TempDir()
	for d := dir; d != "/" && d != os.TempDir(); d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(dir, "s")
	l, err := Listen(path, []uint32{group})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	checkMode(t, path, fs.ModeSocket|0o660)
	if info, _ := os.Stat(path); info.Sys().(*syscall.Stat_t).Gid != group {
		t.Error("the socket does not belong to the group")
	}
	if err := os.Chmod(path, 0o666); err != nil { // the file got into wrong hands
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, "welcome")
			_ = c.Close()
		}
	}()
	for _, tt := range []struct {
		uid, gid uintptr
		want     string
	}{{0, 0, "welcome"}, {1000, 1000, ""}, {1000, group, "welcome"}, {1000, 0, ""}} {
		if got := readAs(t, path, tt.uid, tt.gid); got != tt.want {
			t.Errorf("uid %d gid %d read %q, want %q", tt.uid, tt.gid, got, tt.want)
		}
	}
}

// readAs connects with another identity, from a thread that ends with it.
func readAs(t *testing.T, path string, uid, gid uintptr) string {
	t.Helper()
	got := make(chan string, 1)
	go func() {
		goruntime.LockOSThread() // never unlocked: the thread is thrown away
		_, _, e0 := syscall.RawSyscall(syscall.SYS_SETGROUPS, 0, 0, 0)
		_, _, e1 := syscall.RawSyscall(syscall.SYS_SETRESGID, gid, gid, gid)
		_, _, e2 := syscall.RawSyscall(syscall.SYS_SETRESUID, uid, uid, uid)
		if e0 != 0 || e1 != 0 || e2 != 0 {
			got <- "cannot change identity"
			return
		}
		c, err := net.Dial("unix", path)
		if err != nil {
			got <- err.Error()
			return
		}
		defer c.Close()
		_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
		b, _ := io.ReadAll(c)
		got <- string(b)
	}()
	return <-got
}
