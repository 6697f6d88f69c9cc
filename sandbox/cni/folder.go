package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/utils"
	"github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/sys"
)

// Network is a configuration that was read.
type Network struct {
	File string
	list *libcni.NetworkConfigList
}

// Name of the network.
func (n *Network) Name() string { return n.list.Name }

// types are the programs that the configuration names, each once.
func (n *Network) types() []string {
	var out []string
	for _, p := range n.list.Plugins {
		for _, t := range []string{p.Network.Type, p.Network.IPAM.Type} {
			if t != "" && !slices.Contains(out, t) {
				out = append(out, t)
			}
		}
	}
	return out
}

// can tells whether a plugin of the network has a capability.
func (n *Network) can(capability string) bool {
	return slices.ContainsFunc(n.list.Plugins, func(p *libcni.PluginConfig) bool { return p.Network.Capabilities[capability] })
}

// Found is what a folder holds.
type Found struct {
	Files   []string // configurations, by name; the first counts
	Network *Network // of the first; nil if there is none, or it is bad
	Err     error    // why it is bad
}

// Look reads a folder. A folder that is not there is an empty one.
func Look(dir string) Found {
	files, err := confFiles(dir)
	f := Found{Files: files, Err: err}
	if err != nil || len(files) == 0 {
		return f
	}
	if f.Network, err = readNetwork(files[0]); err != nil {
		f.Err = errs.New(errs.FailedPrecondition, "CNI configuration %s: %w", files[0], err)
	}
	return f
}

// confFiles lists the configurations of a folder that only root can change.
func confFiles(dir string) ([]string, error) {
	fail := func(err error) ([]string, error) {
		return nil, errs.New(errs.FailedPrecondition, "CNI configuration folder %s: %w", dir, err)
	}
	d, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return fail(err)
	}
	defer func() { _ = d.Close() }()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return fail(err)
	}
	var out []string
	for _, n := range names {
		switch filepath.Ext(n) {
		case ".conf", ".conflist", ".json":
			out = append(out, filepath.Join(dir, n))
		}
	}
	if len(out) == 0 {
		return nil, nil
	}
	if _, err := sys.Guarded(d, unix.S_IFDIR); err != nil {
		return fail(err)
	}
	if len(out) > maxConfFiles {
		return fail(fmt.Errorf("%d configuration files, more than %d", len(out), maxConfFiles))
	}
	slices.Sort(out)
	return out, nil
}

// readNetwork reads a configuration file. A list that does not say
// loadOnlyInlinedPlugins has the plugins of the folder with its name, too.
func readNetwork(file string) (*Network, error) {
	data, err := sys.ReadGuarded(file, maxConf)
	if err != nil {
		return nil, err
	}
	list, err := parse(data)
	if err != nil {
		return nil, err
	}
	if list.LoadOnlyInlinedPlugins {
		return &Network{File: file, list: list}, nil
	}
	if err := validateName(list.Name); err != nil { // it is about to be part of a path
		return nil, err
	}
	more, err := confFiles(filepath.Join(filepath.Dir(file), list.Name))
	if err != nil {
		return nil, err
	}
	for _, path := range more {
		if filepath.Ext(path) != ".conf" {
			continue
		}
		data, err := sys.ReadGuarded(path, maxConf)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		p, err := libcni.NetworkPluginConfFromBytes(data)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		list.Plugins = append(list.Plugins, p)
	}
	if err := validate(list); err != nil {
		return nil, err
	}
	if len(more) > 0 { // what is kept of it must be all of it
		if list.Bytes, err = inlined(list); err != nil {
			return nil, err
		}
	}
	return &Network{File: file, list: list}, nil
}

// inlined is a list with all its plugins in one text.
func inlined(list *libcni.NetworkConfigList) ([]byte, error) {
	whole := map[string]json.RawMessage{}
	if err := json.Unmarshal(list.Bytes, &whole); err != nil {
		return nil, err
	}
	var plugins []json.RawMessage
	for _, p := range list.Plugins {
		plugins = append(plugins, p.Bytes)
	}
	var err error
	if whole["plugins"], err = json.Marshal(plugins); err != nil {
		return nil, err
	}
	whole["loadOnlyInlinedPlugins"] = json.RawMessage("true")
	return json.Marshal(whole)
}

// parse reads a list of plugins, or a single one, which is made a list.
func parse(data []byte) (*libcni.NetworkConfigList, error) {
	var shape struct {
		Plugins json.RawMessage `json:"plugins"`
		Type    string          `json:"type"`
	}
	if err := json.Unmarshal(data, &shape); err != nil {
		return nil, fmt.Errorf("it is no JSON object: %w", err)
	}
	if bytes.Equal(bytes.TrimSpace(data), []byte("null")) {
		return nil, errors.New("it is no JSON object")
	}
	if shape.Plugins == nil && shape.Type != "" {
		one, err := libcni.NetworkPluginConfFromBytes(data)
		if err != nil {
			return nil, err
		}
		list, err := libcni.ConfListFromConf(one) //nolint:staticcheck // files of a single plugin are deprecated, and there
		if err != nil {
			return nil, err
		}
		list.LoadOnlyInlinedPlugins = true
		return list, validate(list)
	}
	list, err := libcni.NetworkConfFromBytes(data)
	if err != nil {
		return nil, err
	}
	if !list.LoadOnlyInlinedPlugins && len(list.Plugins) == 0 {
		return list, nil // there may be more
	}
	return list, validate(list)
}

// pluginName is a file name: a type with a slash would be a program of another
// folder (CVE-2021-20206).
var pluginName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}$`)

// maxName bounds a network's name, which is part of file names.
const maxName = 128

func validateName(name string) error {
	if err := utils.ValidateNetworkName(name); err != nil || len(name) > maxName {
		return fmt.Errorf("name %.80q: it must have 1 to %d letters, digits and _ . - after a letter or digit", name, maxName)
	}
	return nil
}

func validate(list *libcni.NetworkConfigList) error {
	if err := validateName(list.Name); err != nil {
		return err
	}
	if _, _, _, err := version.ParseVersion(list.CNIVersion); err != nil {
		return fmt.Errorf("cniVersion %.80q is no version", list.CNIVersion)
	}
	if newer, err := version.GreaterThan(list.CNIVersion, version.Current()); err != nil || newer {
		return fmt.Errorf("cniVersion %.80q is newer than %s, which is all that Naru knows", list.CNIVersion, version.Current())
	}
	if len(list.Plugins) == 0 {
		return errors.New("it names no plugin")
	}
	for _, p := range list.Plugins {
		if !pluginName.MatchString(p.Network.Type) {
			return fmt.Errorf("plugin type %.80q is no name of a program in the folders of plugins", p.Network.Type)
		}
		if t := p.Network.IPAM.Type; t != "" && !pluginName.MatchString(t) {
			return fmt.Errorf("ipam type %.80q of plugin %q is no name of a program in the folders of plugins", t, p.Network.Type)
		}
	}
	return nil
}

// FindPlugin finds the program of a plugin: of that name, executable, and
// nobody's to change but root's.
func FindPlugin(name string, dirs []string) (string, error) {
	if !pluginName.MatchString(name) {
		return "", errs.New(errs.InvalidArgument, "CNI plugin %.80q is no name of a program", name)
	}
	for _, dir := range dirs {
		path := filepath.Join(dir, name)
		f, err := os.OpenFile(path, unix.O_PATH, 0) // of a link, what it leads to
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			_, err = sys.Guarded(f, unix.S_IFREG)
			_ = f.Close()
		}
		if err == nil {
			err = guardedDir(dir)
		}
		if err == nil && unix.Access(path, unix.X_OK) != nil {
			err = errors.New("it cannot be executed (chmod +x)")
		}
		if err != nil {
			return "", errs.New(errs.FailedPrecondition, "CNI plugin %s: %w", path, err)
		}
		return path, nil
	}
	return "", errs.New(errs.FailedPrecondition, "CNI plugin %q is in none of %s: install it there, or add its folder to network.cni.bin_dirs", name, strings.Join(dirs, ", "))
}

func guardedDir(dir string) error {
	d, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer func() { _ = d.Close() }()
	if _, err := sys.Guarded(d, unix.S_IFDIR); err != nil {
		return fmt.Errorf("its folder: %w", err)
	}
	return nil
}

// Missing says which plugin of a network cannot be run.
func (n *Network) Missing(binDirs []string) error {
	for _, t := range n.types() {
		if _, err := FindPlugin(t, binDirs); err != nil {
			return err
		}
	}
	return nil
}

// folder is one that is watched.
type folder struct {
	dir     string
	handler string // whose it is; "" = everybody else's
	looking sync.Mutex
	now     atomic.Pointer[Found] // read without a lock
}

// reload reads the folder again and reports whether it has changed. One look at
// a time: an older one must not take the place of a newer.
func (f *folder) reload() bool {
	f.looking.Lock()
	defer f.looking.Unlock()
	found := Look(f.dir)
	old := f.now.Swap(&found)
	return old == nil || !old.same(found)
}

const (
	watchMask = unix.IN_CLOSE_WRITE | unix.IN_MOVED_TO | unix.IN_MOVED_FROM | unix.IN_DELETE | unix.IN_ATTRIB |
		unix.IN_CREATE | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF
	settleTime = 20 * time.Millisecond // of a burst of changes
	retryAfter = 5 * time.Second
)

// watch calls changed whenever something may have changed in the folder, until
// ctx ends. A folder that is not there yet is waited for in the nearest one that is.
func (f *folder) watch(ctx context.Context, changed func()) {
	for ctx.Err() == nil {
		if err := f.watchOnce(ctx, changed); err != nil && ctx.Err() == nil {
			klog.FromContext(ctx).Error(err, "Watch the folder of CNI configurations; trying again", "folder", f.dir)
			sys.Pause(ctx, retryAfter)
		}
	}
}

// watchOnce waits for one burst of changes.
func (f *folder) watchOnce(ctx context.Context, changed func()) error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return fmt.Errorf("inotify: %w", err)
	}
	in := os.NewFile(uintptr(fd), "inotify")
	defer func() { _ = in.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = in.Close() })
	defer stop()
	for dir := f.dir; ; dir = filepath.Dir(dir) {
		_, err := unix.InotifyAddWatch(fd, dir, watchMask|unix.IN_ONLYDIR)
		if err == nil {
			break
		}
		if dir == "/" || !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENOTDIR) {
			return fmt.Errorf("inotify on %s: %w", dir, err)
		}
	}
	// What happened before the watch was there is seen now, and what happens
	// from now on is reported.
	changed()
	buf := make([]byte, 64<<10)
	if _, err := in.Read(buf); err != nil {
		return err
	}
	sys.Pause(ctx, settleTime)
	return nil
}

// same tells whether two looks saw the same.
func (f *Found) same(o Found) bool {
	if !slices.Equal(f.Files, o.Files) || (f.Network == nil) != (o.Network == nil) || fmt.Sprint(f.Err) != fmt.Sprint(o.Err) {
		return false
	}
	return f.Network == nil || bytes.Equal(f.Network.list.Bytes, o.Network.list.Bytes)
}
