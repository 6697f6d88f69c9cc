package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/program"
)

// pluginPath is where plugins look for the programs that they run themselves:
// iptables, for one.
const pluginPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// plugins runs them for libcni (invoke.Exec).
type plugins struct {
	version.PluginDecoder
	m *Manager
}

// FindInPath finds the program of a plugin.
func (plugins) FindInPath(name string, dirs []string) (string, error) { return FindPlugin(name, dirs) }

// ExecPlugin runs a plugin to its end, within the time that it has.
func (p plugins) ExecPlugin(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	command, env := "", []string{pluginPath}
	for _, e := range environ { // libcni adds the daemon's own environment
		if c, ok := strings.CutPrefix(e, "CNI_COMMAND="); ok {
			command = c
		}
		if strings.HasPrefix(e, "CNI_") {
			env = append(env, e)
		}
	}
	slices.Sort(env)
	limit := p.m.cfg.Timeout
	if command == "STATUS" {
		limit = p.m.cfg.StatusTimeout
	}
	ctx, cancel := context.WithTimeoutCause(ctx, limit, errs.New(errs.DeadlineExceeded, "it did not end within %s and was killed", limit))
	defer cancel()
	r, err := p.m.runner.RunProgram(ctx, program.Request{Path: path, Env: env, Stdin: stdin, MaxOutput: maxOutput})
	if err == nil {
		err = complaint(r)
	}
	if err == nil {
		return r.Stdout, nil
	}
	class := errs.Of(err)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
		class = errs.FailedPrecondition
	}
	return nil, errs.New(class, "CNI plugin %q: %s: %w", filepath.Base(path), command, err)
}

// complaint is what a plugin said of its failure, if it failed.
func complaint(r program.Result) error {
	if r.Signal != 0 {
		return errs.New(errs.Unavailable, "it was ended by signal %d%s", r.Signal, quoted(", it says ", r.Stderr))
	}
	if r.Status == 0 {
		return nil
	}
	var e types.Error
	if json.Unmarshal(r.Stdout, &e) != nil || e.Msg == "" && e.Details == "" {
		out := r.Stderr
		if len(out) == 0 {
			out = r.Stdout
		}
		return errs.New(errs.Unavailable, "it ended with status %d%s", r.Status, quoted(", it says ", out))
	}
	return errs.New(errs.Unavailable, "code %d%s%s", e.Code, quoted(": ", []byte(e.Msg)), quoted(", ", []byte(e.Details)))
}

// quoted is what a plugin says, short and without control characters; nothing
// if it says nothing.
func quoted(before string, said []byte) string {
	s := strings.TrimSpace(string(said[:min(len(said), maxMessage)]))
	if s == "" {
		return ""
	}
	return fmt.Sprintf("%s%q", before, s)
}
