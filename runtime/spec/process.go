package spec

import (
	"path"
	"slices"
	"strings"

	"github.com/naru-project/naru/internal/errs"
)

// DefaultPath is PATH where neither image nor container says, as in every
// other runtime.
const DefaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// command applies the Kubernetes rules for command and args: command replaces
// the image's entrypoint and drops its cmd, args replace cmd
// (kubernetes.io, "Define a Command and Arguments for a Container").
func (b *builder) command() error {
	in := b.in
	cmd, args := in.Command, in.Args
	if len(cmd) == 0 {
		cmd = in.Image.Entrypoint
		if len(args) == 0 {
			args = in.Image.Cmd
		}
	}
	argv := slices.Concat(cmd, args)
	if len(argv) == 0 || argv[0] == "" {
		return errs.New(errs.InvalidArgument, "no command to run: neither the request nor the image names one")
	}
	for i, a := range argv {
		if strings.ContainsRune(a, 0) {
			return errs.New(errs.InvalidArgument, "argument %d has a NUL byte", i)
		}
	}
	b.spec.Process.Args = argv
	return nil
}

// environ is an environment in order, one value for each key.
type environ struct {
	index map[string]int
	list  []string
}

func (e *environ) set(key, value string) {
	if i, ok := e.index[key]; ok {
		e.list[i] = key + "=" + value
		return
	}
	e.index[key] = len(e.list)
	e.list = append(e.list, key+"="+value)
}

func (e *environ) has(key string) bool {
	_, ok := e.index[key]
	return ok
}

// entry splits KEY=value. Values are bytes: anything but NUL.
func entry(s string) (key, value string, ok bool) {
	key, value, ok = strings.Cut(s, "=")
	return key, value, ok && key != "" && !strings.ContainsRune(s, 0)
}

// environment merges, from weak to strong: built-in values, the configuration,
// the image, the container. Malformed entries of the image are dropped: the
// container cannot be blamed for them.
func (b *builder) environment() error {
	in, e := b.in, &environ{index: map[string]int{}}
	e.set("PATH", DefaultPath)
	if in.Hostname != "" && !strings.ContainsRune(in.Hostname, 0) {
		e.set("HOSTNAME", in.Hostname)
	}
	if in.TTY {
		e.set("TERM", "xterm")
	}
	for _, list := range [][]string{in.Defaults.Env, in.Image.Env} {
		for _, s := range list {
			if k, v, ok := entry(s); ok {
				e.set(k, v)
			}
		}
	}
	for i, s := range in.Env {
		k, v, ok := entry(s)
		if !ok {
			// The value may be a secret: name the place only.
			return errs.New(errs.InvalidArgument, "environment entry %d: want KEY=value without NUL bytes", i)
		}
		e.set(k, v)
	}
	if !e.has("HOME") {
		e.set("HOME", b.who.home)
	}
	b.spec.Process.Env = e.list
	return nil
}

// workingDir takes the container's directory, else the image's, else "/".
// Nothing below /proc is accepted: /proc/self/fd/N and /proc/PID/root lead out
// of the container (CVE-2024-21626). The executor checks where it really is.
func (b *builder) workingDir() error {
	dir := b.in.WorkingDir
	if dir == "" {
		dir = b.in.Image.WorkingDir
	}
	switch {
	case strings.ContainsRune(dir, 0):
		return errs.New(errs.InvalidArgument, "working directory %q: has a NUL byte", clip(dir))
	case len(dir) >= maxPath:
		return errs.New(errs.InvalidArgument, "working directory %q: longer than %d bytes", clip(dir), maxPath)
	}
	dir = path.Clean("/" + dir)
	if within(dir, "/proc") {
		return errs.New(errs.InvalidArgument, "working directory %s: lies in /proc", clip(dir))
	}
	b.spec.Process.Cwd = dir
	return nil
}
