package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/namespaces"
	"github.com/naru-project/naru/internal/sys"
	"github.com/naru-project/naru/sandbox/rtnl"
	"github.com/naru-project/naru/sandbox/sysctl"
)

// kinds of namespaces that can be pinned, by the name of their pin.
var kinds = []struct {
	name string
	flag int
}{
	{"net", unix.CLONE_NEWNET}, {"ipc", unix.CLONE_NEWIPC}, {"uts", unix.CLONE_NEWUTS},
	{"user", unix.CLONE_NEWUSER}, {"pid", unix.CLONE_NEWPID},
}

// opened are the namespaces of one pod, open.
type opened struct {
	files map[string]*os.File // by name of kind
	shm   *os.File            // detached, for pods with user namespace
	route *rtnl.Conn          // a socket in net
}

func (o *opened) close() {
	if o == nil {
		return
	}
	for _, f := range o.files {
		_ = f.Close()
	}
	if o.shm != nil {
		_ = o.shm.Close()
	}
	o.route.Close()
}

// wanted says which namespaces of their own a Spec asks for.
func (s *Spec) wanted() (net, ipc, uts, user bool) {
	return s.Network == ModePod, s.IPC == ModePod, s.UTS == ModePod, len(s.UIDMap) > 0
}

// makeNamespaces makes what the Spec asks for: on a thread of ours, or by the
// NamespaceMaker where that cannot be.
func (m *Manager) makeNamespaces(ctx context.Context, s *Spec) (*opened, error) {
	net, ipc, uts, user := s.wanted()
	o := &opened{files: map[string]*os.File{}}
	var err error
	if !user {
		err = m.unshare(o, net, ipc, uts, s.Hostname)
	}
	if err == nil && (user || s.SharePID) {
		err = m.makeElsewhere(ctx, o, s)
	}
	if err != nil {
		o.close()
		return nil, err
	}
	return o, nil
}

// unshare makes network, IPC and UTS namespaces on a thread of ours.
func (m *Manager) unshare(o *opened, net, ipc, uts bool, hostname string) error {
	flags := 0
	for i, want := range []bool{net, ipc, uts} {
		if want {
			flags |= kinds[i].flag
		}
	}
	if flags == 0 {
		return nil
	}
	err := sys.NamespaceThread(func() error {
		if err := unix.Unshare(flags); err != nil { //nolint:forbidigo // on a thread of its own (sys.NamespaceThread)
			return fmt.Errorf("unshare: %w", err)
		}
		for _, k := range kinds[:3] {
			if flags&k.flag == 0 {
				continue
			}
			f, err := sys.ThreadNamespace(k.flag)
			if err != nil {
				return err
			}
			o.files[k.name] = f
		}
		return m.furnish(o, hostname)
	})
	if err != nil {
		return errs.New(errs.Internal, "make namespaces: %w", err)
	}
	return nil
}

// furnish sets, on a thread that is in the new namespaces, what is best set
// before anything else is there: the host name, and that new links of the pod
// listen to no router (row W-01 of the attack table: a pod has one neighbour,
// the host, and its routes are given).
func (m *Manager) furnish(o *opened, hostname string) error {
	if hostname != "" && o.files["uts"] != nil {
		if err := unix.Sethostname([]byte(hostname)); err != nil {
			return fmt.Errorf("set the host name: %w", err)
		}
	}
	if o.files["net"] == nil {
		return nil
	}
	if m.ipv6 {
		if err := writeAbsent(m.proc, "net/ipv6/conf/default/accept_ra", "0"); err != nil {
			return err
		}
		if f := m.facts.Load(); f != nil && f.ipv6Off {
			for _, link := range []string{"all", "default", "lo"} {
				if err := writeAbsent(m.proc, "net/ipv6/conf/"+link+"/disable_ipv6", "0"); err != nil {
					return err
				}
			}
		}
	}
	var err error
	o.route, err = rtnl.Open()
	return err
}

// makeElsewhere asks the NamespaceMaker, and furnishes what came back.
func (m *Manager) makeElsewhere(ctx context.Context, o *opened, s *Spec) error {
	if m.deps.Namespaces == nil {
		return errs.New(errs.Unimplemented, "pods with user namespace or shared PID namespace are not configured")
	}
	net, ipc, uts, user := s.wanted()
	r := namespaces.Request{ID: s.ID, User: user, PID: s.SharePID}
	if user {
		r.Net, r.IPC, r.UTS, r.UIDMap, r.GIDMap = net, ipc, uts, s.UIDMap, s.GIDMap
		if ipc {
			r.ShmSize = s.shmSize()
		}
	}
	got, err := m.deps.Namespaces.Make(ctx, r)
	if err != nil {
		return err
	}
	o.shm = got.Shm
	for i, f := range []*os.File{got.Net, got.IPC, got.UTS, got.User, got.PID} {
		if f == nil {
			continue
		}
		if o.files[kinds[i].name] != nil {
			_ = f.Close()
			continue
		}
		o.files[kinds[i].name] = f
	}
	for i, want := range []bool{r.Net, r.IPC, r.UTS, r.User, r.PID} {
		f := o.files[kinds[i].name]
		if !want {
			continue
		}
		if f == nil {
			return errs.New(errs.Internal, "make namespaces: no %s namespace came back", kinds[i].name)
		}
		if err := sys.CheckNamespace(f, kinds[i].flag); err != nil {
			return errs.New(errs.Internal, "make namespaces: %w", err)
		}
	}
	if r.ShmSize > 0 && o.shm == nil {
		return errs.New(errs.Internal, "make namespaces: no file system for /dev/shm came back")
	}
	if !r.Net && !r.UTS {
		return nil
	}
	return m.inNamespaces(o, unix.CLONE_NEWNET|unix.CLONE_NEWUTS, func() error { return m.furnish(o, s.Hostname) })
}

// inNamespaces runs fn on a thread that joined those of o's namespaces that
// flags name.
func (m *Manager) inNamespaces(o *opened, flags int, fn func() error) error {
	err := sys.NamespaceThread(func() error {
		for _, k := range kinds[:3] {
			if f := o.files[k.name]; f != nil && flags&k.flag != 0 {
				if err := sys.Setns(f, k.flag); err != nil {
					return err
				}
			}
		}
		return fn()
	})
	if err != nil && errs.Of(err) == errs.Internal {
		return errs.New(errs.Internal, "in the pod's namespaces: %w", err)
	}
	return err
}

// pin binds the open namespaces into <run>/ns/<id>, which is there and empty.
func (m *Manager) pin(id string, o *opened) (namespaces.Paths, error) {
	var p namespaces.Paths
	dir := filepath.Join(m.nsDir(), id)
	fail := func(err error) (namespaces.Paths, error) {
		return p, errs.New(errs.Internal, "pin namespaces: %w", err)
	}
	d, err := os.Open(dir)
	if err != nil {
		return fail(err)
	}
	defer func() { _ = d.Close() }()
	for name, f := range o.files {
		if err := sys.PinNamespace(f, d, name); err != nil {
			return fail(err)
		}
	}
	return m.paths(id, func(name string) bool { return o.files[name] != nil }), nil
}

// paths are the pins of a sandbox.
func (m *Manager) paths(id string, have func(name string) bool) (p namespaces.Paths) {
	for i, to := range []*string{&p.Net, &p.IPC, &p.UTS, &p.User, &p.PID} {
		if have(kinds[i].name) {
			*to = filepath.Join(m.nsDir(), id, kinds[i].name)
		}
	}
	return p
}

// unpin takes the pins of a sandbox away; the kernel takes apart what nobody
// uses any more. What is not there is no error.
func (m *Manager) unpin(id string) error {
	dir := filepath.Join(m.nsDir(), id)
	names, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	all := []error{err}
	for _, n := range names {
		all = append(all, unmountAll(filepath.Join(dir, n.Name())))
	}
	if err := errors.Join(all...); err != nil {
		return errs.New(errs.Internal, "unpin namespaces: %w", err)
	}
	if err := os.RemoveAll(dir); err != nil {
		return errs.New(errs.Internal, "unpin namespaces: %w", err)
	}
	return nil
}

// unmountAll unmounts whatever is mounted on path, however often.
func unmountAll(path string) error {
	for range 16 {
		err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		switch {
		case err == nil:
		case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOENT):
			return nil // no mount, or gone
		default:
			return &os.PathError{Op: "unmount", Path: path, Err: err}
		}
	}
	return &os.PathError{Op: "unmount", Path: path, Err: errors.New("there is always one more mount")}
}

// open opens the pinned namespace of one kind, "" meaning that the pod has
// none. A path is only believed if it is the one we would have given.
func (m *Manager) open(h *Handle, kind int) (*os.File, error) {
	for i, path := range []string{h.Namespaces.Net, h.Namespaces.IPC, h.Namespaces.UTS, h.Namespaces.User, h.Namespaces.PID} {
		if kinds[i].flag != kind {
			continue
		}
		if path == "" {
			return nil, nil
		}
		if !sandboxID.MatchString(h.ID) || path != filepath.Join(m.nsDir(), h.ID, kinds[i].name) {
			return nil, errs.New(errs.FailedPrecondition, "namespace path %q does not belong to sandbox %.80q", path, h.ID)
		}
		f, err := sys.OpenNamespace(path, kind)
		if err != nil {
			return nil, errs.New(errs.FailedPrecondition, "the %s namespace of the pod is gone: %w", kinds[i].name, err)
		}
		return f, nil
	}
	return nil, errs.New(errs.Internal, "open a namespace of unknown kind %#x", kind)
}

// setSysctls writes the pod's kernel parameters, and the configured defaults
// that the pod does not set itself.
func (m *Manager) setSysctls(o *opened, s *Spec) error {
	type write struct{ path, value string }
	todo := map[sysctl.Scope][]write{}
	for _, kv := range m.sysctls(s) {
		path, scope, err := sysctl.Parse(kv[0])
		if err != nil {
			return err
		}
		value, err := sysctl.Value(kv[0], kv[1], s.GIDMap)
		if err != nil {
			return err
		}
		todo[scope] = append(todo[scope], write{path, value})
	}
	all := func(scope sysctl.Scope) func() error {
		return func() error {
			for _, w := range todo[scope] {
				if err := sysctl.Write(m.proc, w.path, w.value); err != nil {
					return err
				}
			}
			return nil
		}
	}
	if len(todo[sysctl.Net]) > 0 {
		if err := m.inNamespaces(o, unix.CLONE_NEWNET, all(sysctl.Net)); err != nil {
			return err
		}
	}
	if len(todo[sysctl.IPC]) == 0 {
		return nil
	}
	return m.inNamespaces(o, unix.CLONE_NEWIPC, func() error {
		if len(s.UIDMap) == 0 {
			return all(sysctl.IPC)()
		}
		return sysctl.AsOwner(hostID(s.UIDMap), all(sysctl.IPC))
	})
}

// hostID is the host's id for id 0 of the pod.
func hostID(ids []namespaces.IDMap) uint32 {
	for _, e := range ids {
		if e.ContainerID == 0 {
			return e.HostID
		}
	}
	return 0
}
