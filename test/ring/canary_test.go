package ring

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

// Canary is a tree of the host that nobody may see or change.
type Canary struct {
	Dir    string
	Secret string // what its files say
	before string
}

// canaryFile is the name of a file in the tree that is nowhere else.
const canaryFile = "set-user-id-of-the-canary"

var canaries atomic.Int64

// NewCanary makes the tree; at the end of the test it must be as it was. Call
// it before StartNode: the check comes last.
func NewCanary(t testing.TB) *Canary {
	t.Helper()
	c := &Canary{Dir: filepath.Join(workDir, fmt.Sprintf("canary%d", canaries.Add(1))), Secret: "canary-" + newID()[:24]}
	for _, err := range []error{
		os.MkdirAll(c.Dir+"/sub/deep", 0o755),
		os.WriteFile(c.Dir+"/f", []byte(c.Secret), 0o644),
		os.WriteFile(c.Dir+"/sub/passwd", []byte("root:x:0:0::/:/bin/"+c.Secret+"\n"), 0o644),
		os.WriteFile(c.Dir+"/"+canaryFile, []byte(c.Secret), 0o755),
		os.Chmod(c.Dir+"/"+canaryFile, 0o755|os.ModeSetuid),
		unix.Mkfifo(c.Dir+"/fifo", 0o600),
		os.Symlink("f", c.Dir+"/link"),
		unix.Setxattr(c.Dir+"/f", "user.mark", []byte("x"), 0),
		os.Chmod(workDir, 0o755),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	c.before = c.hash(t)
	t.Cleanup(func() {
		c.Check(t)
		_ = os.RemoveAll(c.Dir)
	})
	return c
}

// Check compares the tree with what it was.
func (c *Canary) Check(t testing.TB) {
	t.Helper()
	if now := c.hash(t); now != c.before {
		t.Errorf("the canary on the host has changed\nbefore:\n%safter:\n%s", c.before, now)
	}
}

// hash describes the whole tree; the change time tells of any change of an inode.
func (c *Canary) hash(t testing.TB) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(c.Dir, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		content := ""
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			data, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			sum := sha256.Sum256(data)
			content = hex.EncodeToString(sum[:8])
		case unix.S_IFLNK:
			content, _ = os.Readlink(p)
		}
		names := make([]byte, 1024)
		n, _ := unix.Llistxattr(p, names)
		fmt.Fprintf(&b, "%s %o %d:%d %d links %d mtime %d.%d ctime %d.%d %s %q\n", p, st.Mode, st.Uid, st.Gid, st.Size, st.Nlink,
			st.Mtim.Sec, st.Mtim.Nsec, st.Ctim.Sec, st.Ctim.Nsec, content, names[:max(n, 0)])
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// Up is a path that climbs from any folder of a container to the canary.
func (c *Canary) Up() string { return strings.Repeat("../", 16) + strings.TrimPrefix(c.Dir, "/") }
