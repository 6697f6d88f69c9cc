package spec

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
)

// Bounds on passwd and group files of images (CVE-2026-47262).
const (
	maxAccountFile = 10 << 20
	maxAccountLine = 64 << 10
	// maxAccountFields is one more than passwd(5) has; the rest is nobody's.
	maxAccountFields = 8
)

// MaxID is the highest uid and gid that a container may name. Kubernetes has
// the same bound (IsValidUserID), and it keeps (uid_t)-1 away from setresuid,
// for which that means "leave as is".
const MaxID = 1<<31 - 1

// Root reads files of a container's root file system. path is absolute as the
// container sees it; links never lead out.
type Root interface {
	Open(path string) (*os.File, error)
}

// FDRoot is a Root by the directory that it lies in, which may be a detached mount.
type FDRoot struct{ Dir *os.File }

// Open opens a regular file of at most 10 MiB. Everything else is refused
// without being opened: a FIFO would block, a device act.
func (r FDRoot) Open(path string) (*os.File, error) {
	how := unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	}
	var fd int
	var err error
	for range 64 { // EAGAIN: something was renamed meanwhile, openat2(2)
		if fd, err = unix.Openat2(int(r.Dir.Fd()), path, &how); err != unix.EAGAIN && err != unix.EINTR {
			break
		}
	}
	if err != nil {
		return nil, &os.PathError{Op: "openat2", Path: path, Err: err}
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, &os.PathError{Op: "fstat", Path: path, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, errs.New(errs.FailedPrecondition, "open %s of the image: not a regular file", path)
	}
	if st.Size > maxAccountFile {
		return nil, errs.New(errs.FailedPrecondition, "open %s of the image: %d bytes exceed the limit of %d", path, st.Size, maxAccountFile)
	}
	// The very file that was looked at, by the host's own procfs.
	f, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", fd), os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: errors.Unwrap(err)}
	}
	return f, nil
}

// account is a line of /etc/passwd.
type account struct {
	name     string
	uid, gid uint32
	home     string
}

// openAccounts opens /etc/passwd or /etc/group; nil when the image has none.
func openAccounts(root Root, path string) (io.ReadCloser, error) {
	if root == nil {
		return nil, nil
	}
	f, err := root.Open(path)
	switch {
	case errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR):
		return nil, nil
	case err != nil && errs.Of(err) == errs.Internal:
		return nil, errs.New(errs.FailedPrecondition, "read the image's accounts: %w", err)
	case err != nil:
		return nil, err
	}
	return f, nil
}

// lines gives each line's fields to each until that says stop; they are good
// until the next line. Comments, lines with NUL bytes and NIS entries are left
// out. Nothing is allocated per line: the image decides how many there are.
func lines(r io.Reader, path string, each func(fields [][]byte) (stop bool, err error)) error {
	in := bufio.NewReaderSize(r, maxAccountLine)
	var fields [maxAccountFields][]byte
	for total := 0; ; {
		line, err := in.ReadSlice('\n')
		total += len(line)
		if errors.Is(err, bufio.ErrBufferFull) {
			return errs.New(errs.FailedPrecondition, "read %s of the image: a line exceeds the limit of %d bytes", path, maxAccountLine)
		}
		if total > maxAccountFile {
			return errs.New(errs.FailedPrecondition, "read %s of the image: exceeds the limit of %d bytes", path, maxAccountFile)
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return errs.New(errs.FailedPrecondition, "read %s of the image: %w", path, err)
		}
		l := bytes.TrimSuffix(line, []byte("\n"))
		if len(l) > 0 && !bytes.ContainsRune([]byte("#+-"), rune(l[0])) && bytes.IndexByte(l, 0) < 0 {
			if stop, err := each(split(l, fields[:0])); stop || err != nil {
				return err
			}
		}
		if err != nil {
			return nil //nolint:nilerr // the end of the file
		}
	}
}

// split appends the fields of a line to into, as many as fit.
func split(line []byte, into [][]byte) [][]byte {
	for more := true; more && len(into) < cap(into); {
		var field []byte
		field, line, more = bytes.Cut(line, []byte(":"))
		into = append(into, field)
	}
	return into
}

// findAccount gives the first account with the name, or (name empty) the uid.
func findAccount(r io.Reader, name string, uid uint32) (found *account, err error) {
	want := significant([]byte(strconv.FormatUint(uint64(uid), 10)))
	err = lines(r, "/etc/passwd", func(f [][]byte) (bool, error) {
		if len(f) < 4 || name != "" && string(f[0]) != name || name == "" && !bytes.Equal(significant(f[2]), want) {
			return false, nil
		}
		id, numeric, idErr := ParseID(string(f[2]))
		if name == "" && (!numeric || idErr != nil || id != uid) {
			return false, nil //nolint:nilerr // not the one; its faults are nobody's
		}
		gid, gidNumeric, gidErr := ParseID(string(f[3]))
		if !numeric || idErr != nil || !gidNumeric || gidErr != nil {
			return true, errs.New(errs.FailedPrecondition, "read /etc/passwd of the image: user %q has no valid uid and gid", clip(string(f[0])))
		}
		found = &account{name: string(f[0]), uid: id, gid: gid}
		if len(f) > 5 {
			found.home = string(f[5])
		}
		return true, nil
	})
	return found, err
}

// significant is a number as text without what may stand before it.
func significant(digits []byte) []byte { return bytes.TrimLeft(digits, "+0") }

// findGroups gives the gid of the group called name (if name is not empty) and
// the gids of all groups that have member (if that is not empty).
func findGroups(r io.Reader, name, member string) (gid *uint32, of []uint32, err error) {
	seen, lists := map[uint32]bool{}, 0
	err = lines(r, "/etc/group", func(f [][]byte) (bool, error) {
		if len(f) < 3 {
			return false, nil
		}
		named := name != "" && gid == nil && string(f[0]) == name
		in := member != "" && len(f) > 3 && hasMember(f[3], member)
		if !named && !in {
			return false, nil
		}
		if in {
			if lists++; lists > maxGroups {
				return true, errs.New(errs.FailedPrecondition, "read /etc/group of the image: user %q is in more than %d groups", clip(member), maxGroups)
			}
		}
		id, numeric, idErr := ParseID(string(f[2]))
		if !numeric || idErr != nil {
			return true, errs.New(errs.FailedPrecondition, "read /etc/group of the image: group %q has no valid gid", clip(string(f[0])))
		}
		if named {
			gid = &id
		}
		if in && !seen[id] {
			seen[id] = true
			of = append(of, id)
		}
		return false, nil
	})
	return gid, of, err
}

// hasMember reports whether a comma-separated list has the name.
func hasMember(list []byte, name string) bool {
	for len(list) > 0 {
		m, rest, _ := bytes.Cut(list, []byte(","))
		if string(m) == name {
			return true
		}
		list = rest
	}
	return false
}

// ParseID reads a uid or gid. A string of digits, with or without a sign, is
// numeric, whether or not its value is one that a container may have (err):
// such a string is never looked up as a name, so that an image cannot make
// user 4294967296 of its own and let it be root (CVE-2024-40635).
func ParseID(s string) (id uint32, numeric bool, err error) {
	digits := strings.TrimLeft(s, "+-")
	if len(s)-len(digits) > 1 || digits == "" || strings.Trim(digits, "0123456789") != "" {
		return 0, false, nil
	}
	n, err := strconv.ParseUint(digits, 10, 64)
	if err != nil || s[0] == '-' || n > MaxID {
		return 0, true, errs.New(errs.InvalidArgument, "id %s: want 0 to %d", clip(s), MaxID)
	}
	return uint32(n), true, nil
}
