// Package sysctl names and writes the kernel parameters that belong to a pod's
// own network and IPC namespaces.
//
// The kernel resolves /proc/sys/net and the IPC keys by the namespaces of the
// calling thread, so Write is called on a thread that has joined the pod's. It
// goes through a procfs mount of the caller's own, which nobody can have
// mounted over, and follows no link.
//
// Concurrency: pure functions; Write touches only what its arguments name.
package sysctl

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/namespaces"
	"github.com/naru-project/naru/internal/sys"
)

// Scope is the namespace that a key belongs to.
type Scope int

// The scopes that a pod can own.
const (
	Net Scope = iota + 1
	IPC
)

// ipcKeys are the parameters of an IPC namespace (ipc_namespaces(7)).
var ipcKeys = map[string]bool{
	"kernel.msgmax": true, "kernel.msgmnb": true, "kernel.msgmni": true,
	"kernel.sem": true, "kernel.shmall": true, "kernel.shmmax": true,
	"kernel.shmmni": true, "kernel.shm_rmid_forced": true,
}

// pingGroups is the one parameter whose value holds ids, which the kernel reads
// in the user namespace of the writer.
const pingGroups = "net.ipv4.ping_group_range"

const maxLen = 512

// Parse returns the path of key below /proc/sys, and whose namespace it is. A
// key is written with dots, or with slashes when a name in it has a dot
// (sysctl.d(5)); the first separator tells which.
func Parse(key string) (path string, scope Scope, err error) {
	bad := func(why string) (string, Scope, error) {
		return "", 0, errs.New(errs.InvalidArgument, "sysctl %.100q: %s", key, why)
	}
	if key == "" || len(key) > maxLen {
		return bad("bad length")
	}
	dots := key
	if i := strings.IndexAny(key, "./"); i >= 0 && key[i] == '/' {
		path = key
		dots = strings.ReplaceAll(key, "/", ".")
	} else {
		path = strings.Map(func(r rune) rune {
			switch r {
			case '.':
				return '/'
			case '/':
				return '.'
			}
			return r
		}, key)
	}
	for _, part := range strings.Split(path, "/") {
		if part == "" || part == "." || part == ".." || strings.ContainsFunc(part, notName) {
			return bad("not a name of a kernel parameter")
		}
	}
	switch {
	case strings.HasPrefix(path, "net/"):
		return path, Net, nil
	case ipcKeys[dots], strings.HasPrefix(path, "fs/mqueue/"):
		return path, IPC, nil
	}
	return bad("belongs to no namespace of a pod")
}

func notName(r rune) bool {
	return r <= ' ' || r > '~' || r == '\\'
}

// Value checks what is to be written, and translates group ids into the host's
// where the pod has a user namespace.
func Value(key, value string, gids []namespaces.IDMap) (string, error) {
	if len(value) > maxLen || strings.ContainsFunc(value, func(r rune) bool { return r != '\t' && (r < ' ' || r > '~') }) {
		return "", errs.New(errs.InvalidArgument, "sysctl %.100q: value is too long or not printable", key)
	}
	if len(gids) == 0 || strings.ReplaceAll(key, "/", ".") != pingGroups {
		return value, nil
	}
	f := strings.Fields(value)
	if len(f) != 2 {
		return "", errs.New(errs.InvalidArgument, "sysctl %s: want two group ids, got %q", key, value)
	}
	lo, err1 := strconv.ParseUint(f[0], 10, 32)
	hi, err2 := strconv.ParseUint(f[1], 10, 32)
	if err := errors.Join(err1, err2); err != nil {
		return "", errs.New(errs.InvalidArgument, "sysctl %s: %w", key, err)
	}
	if lo > hi { // the kernel's way to say nobody
		return "1 0", nil
	}
	for _, m := range gids {
		if lo >= uint64(m.ContainerID) && hi < uint64(m.ContainerID)+uint64(m.Size) {
			off := uint64(m.HostID) - uint64(m.ContainerID)
			return fmt.Sprintf("%d %d", uint32(lo+off), uint32(hi+off)), nil
		}
	}
	return "", errs.New(errs.InvalidArgument, "sysctl %s: groups %s are not mapped in the pod's user namespace", key, value)
}

// Write sets one parameter for the calling thread's namespaces. proc is the
// root of a procfs.
func Write(proc *os.File, path, value string) error {
	err := sys.WriteBeneath(proc, "sys/"+path, value)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENOENT):
		return errs.New(errs.InvalidArgument, "set sysctl %s: this kernel has none of that name in a namespace of its own", path)
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ERANGE), errors.Is(err, unix.EACCES):
		return errs.New(errs.InvalidArgument, "set sysctl %s: %w", path, err)
	}
	return errs.New(errs.Internal, "set sysctl %s: %w", path, err)
}

// Read returns the value of one parameter, without white space around it.
func Read(proc *os.File, path string) (string, error) {
	f, err := sys.OpenBeneath(proc, "sys/"+path, unix.O_RDONLY)
	if err != nil {
		return "", err
	}
	defer func() { _ = f.Close() }()
	buf := make([]byte, 4096)
	n, err := f.Read(buf)
	if err != nil {
		return "", err
	}
	return strings.TrimSpace(string(buf[:n])), nil
}

// AsOwner runs fn with the effective uid of the pod's root on the calling
// thread. The IPC keys of a namespace that a user namespace owns may be written
// by that uid only (ipc_permissions of the kernel knows no capability). Only on
// a thread that ends afterwards.
func AsOwner(uid uint32, fn func() error) error {
	// A change of ids resets the dumpable flag, which all threads share (prctl(2)).
	dumpable, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
	if err != nil {
		return fmt.Errorf("get dumpable: %w", err)
	}
	if err := setEUID(uid); err != nil {
		return fmt.Errorf("take the pod's root uid %d: %w", uid, err)
	}
	err = fn()
	if back := setEUID(0); back != nil {
		return errors.Join(err, fmt.Errorf("take uid 0 back: %w", back))
	}
	if dumpable == 1 {
		err = errors.Join(err, unix.Prctl(unix.PR_SET_DUMPABLE, 1, 0, 0, 0))
	}
	return err
}

// setEUID changes the calling thread alone; the function of the standard
// library would change all threads.
func setEUID(uid uint32) error {
	const keep = ^uintptr(0)
	if _, _, e := unix.RawSyscall(unix.SYS_SETRESUID, keep, uintptr(uid), keep); e != 0 {
		return e
	}
	return nil
}
