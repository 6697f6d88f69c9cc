package sys

import (
	"errors"
	"fmt"
	"os"
	goruntime "runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// NamespaceThread runs fn on an OS thread that ends afterwards, so that fn may
// unshare or join network, IPC and UTS namespaces.
//
// It is never the first thread of the process: the Go runtime cannot end that
// one, only park it, and /proc/<pid>/ns shows its namespaces as those of the
// whole process. It would pin a pod's namespaces for good.
func NamespaceThread(fn func() error) error {
	done := make(chan error, 1)
	go onNamespaceThread(fn, done)
	return <-done
}

func onNamespaceThread(fn func() error, done chan<- error) {
	goruntime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		// While this goroutine keeps the first thread, another one cannot get it.
		inner := make(chan struct{})
		go func() {
			defer close(inner)
			onNamespaceThread(fn, done)
		}()
		<-inner
		goruntime.UnlockOSThread() // nothing was changed on it
		return
	}
	// Locked for good from here: the thread ends with this goroutine.
	err := errors.New("namespace thread ended early")
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic on a namespace thread: %v", p)
		}
		done <- err
	}()
	err = fn()
}

// namespaceFiles are the names below /proc/<pid>/ns by CLONE_NEW* flag.
var namespaceFiles = map[int]string{
	unix.CLONE_NEWNET: "net", unix.CLONE_NEWIPC: "ipc", unix.CLONE_NEWUTS: "uts",
	unix.CLONE_NEWUSER: "user", unix.CLONE_NEWPID: "pid", unix.CLONE_NEWNS: "mnt",
}

// ThreadNamespace opens the calling thread's namespace of one kind (CLONE_NEW*).
func ThreadNamespace(kind int) (*os.File, error) {
	name, ok := namespaceFiles[kind]
	if !ok {
		return nil, fmt.Errorf("open a namespace of unknown kind %#x", kind)
	}
	return OpenNamespace("/proc/thread-self/ns/"+name, kind)
}

// OpenNamespace opens a namespace by the path of a pin (a bind mount of an nsfs
// file) or of a /proc link, and checks that it is one of that kind.
func OpenNamespace(path string, kind int) (*os.File, error) {
	flags := unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK | unix.O_NOCTTY
	if !strings.HasPrefix(path, "/proc/") {
		flags |= unix.O_NOFOLLOW
	}
	fd, err := unix.Open(path, flags, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open namespace", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	if err := CheckNamespace(f, kind); err != nil {
		_ = f.Close()
		return nil, err
	}
	return f, nil
}

// CheckNamespace verifies that f lies on nsfs and is a namespace of the given
// kind (ioctl_ns(2)). To be called before any setns: a pin can have lost its
// mount, or be something else altogether.
func CheckNamespace(f *os.File, kind int) error {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		return fmt.Errorf("check namespace %s: %w", f.Name(), err)
	}
	if fs.Type != unix.NSFS_MAGIC {
		return fmt.Errorf("%s is not a namespace (file system type %#x)", f.Name(), fs.Type)
	}
	got, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_NSTYPE)
	if err != nil {
		return fmt.Errorf("check namespace %s: %w", f.Name(), err)
	}
	if got != kind {
		return fmt.Errorf("%s is a namespace of kind %#x, not %#x", f.Name(), got, kind)
	}
	return nil
}

// PinNamespace keeps a namespace alive by binding it on a new file dir/name.
// The file must not exist: O_EXCL, so nothing that was put there is used.
func PinNamespace(ns, dir *os.File, name string) error {
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o400)
	if err != nil {
		return &os.PathError{Op: "create pin", Path: dir.Name() + "/" + name, Err: err}
	}
	target := os.NewFile(uintptr(fd), dir.Name()+"/"+name)
	defer func() { _ = target.Close() }()
	tree, err := CloneTree(int(ns.Fd()), "", false)
	if err != nil {
		return err
	}
	defer func() { _ = tree.Close() }()
	return Attach(tree, target)
}

// Setns moves the calling thread into a namespace. Only on a NamespaceThread.
func Setns(ns *os.File, kind int) error {
	if err := CheckNamespace(ns, kind); err != nil {
		return err
	}
	if err := unix.Setns(int(ns.Fd()), kind); err != nil {
		return fmt.Errorf("join namespace %s: %w", ns.Name(), err)
	}
	return nil
}

// BootID is the random name of this boot of the kernel (random(4)).
func BootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", err
	}
	return strings.TrimSpace(string(b)), nil
}
