package ocicli

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/internal/sys"
	"github.com/naru-project/naru/runtime/native"
	"github.com/naru-project/naru/runtime/plan"
)

// Handler is one configured runtime.
type Handler struct {
	Name string
	Path string   // of its program, absolute
	Args []string // global options, before the command
}

// handler runs the program of one runtime.
type handler struct {
	Handler
	run     *native.Executor
	systemd bool   // the cgroup driver is systemd, and the runtime is told so
	root    string // where the runtime has its state
	dir     string

	mu    sync.Mutex // guards what is below; never held while the program runs
	asked bool
	can   Features
}

// Features are what a runtime says that it can do.
type Features struct {
	UserNamespaces bool
	Version        string
	// Place: foreignRoot was as it must be when the runtime was asked.
	Place bool
}

// command is one run of a runtime's program.
type command struct {
	args   []string
	limit  time.Duration
	log    string // file for what it has to say
	stdio  [3]*os.File
	mounts []native.Attachment
}

// argv is the command line of a command.
func (h *handler) argv(log string, args ...string) []string {
	out := append([]string{h.Path}, h.Args...)
	out = append(out, "--root", h.root, "--log", log, "--log-format", "json")
	if h.systemd {
		out = append(out, "--systemd-cgroup")
	}
	return append(out, args...)
}

// call runs the program to its end. Its failure is told in its own words.
func (h *handler) call(ctx context.Context, c command) error {
	ctx, cancel := context.WithTimeoutCause(ctx, c.limit, errs.New(errs.DeadlineExceeded, "%s %s did not end within %s", h.Path, c.args[0], c.limit))
	defer cancel()
	_ = os.Remove(c.log)
	err := h.run.RunTool(ctx, programWait, native.Tool{Args: h.argv(c.log, c.args...), Stdio: c.stdio, Umask: 0o022, Mounts: c.mounts})
	return h.explain(c.args[0], c.log, err)
}

// explain makes an error of a program's failure out of what it has logged.
func (h *handler) explain(verb, log string, err error) error {
	var pe *plan.Error
	switch {
	case err == nil:
		return nil
	case errors.As(err, &pe) && pe.Stage == plan.StageExec:
		return errs.New(errs.FailedPrecondition, "runtime handler %q: %s cannot be executed: %w; install it, or correct handlers.%s.path", h.Name, h.Path, pe.Errno, h.Name)
	case errs.Is(err, errs.DeadlineExceeded), errs.Is(err, errs.Canceled), errs.Is(err, errs.Unavailable):
		return errs.New(errs.Of(err), "%s %s: %w", h.Path, verb, err)
	}
	said := lastError(log)
	if said == "" {
		return errs.New(errs.Internal, "%s %s: %w, and did not say why", h.Path, verb, err)
	}
	return errs.New(classOf(said), "%s %s: %s", h.Path, verb, said)
}

// classOf is the class of what a runtime says, which is text only. Most of it
// is nobody's fault but the host's.
func classOf(said string) errs.Class {
	for _, s := range []string{
		"executable file not found", "no such file or directory", "permission denied", "exec format error",
		"is a directory", "not a directory", "too many levels of symbolic links", "unable to find user", "memory limit too low", "chdir to cwd",
	} {
		if strings.Contains(said, s) {
			return errs.FailedPrecondition
		}
	}
	if strings.Contains(said, "does not exist") || strings.Contains(said, "container not running") {
		return errs.NotFound
	}
	return errs.Internal
}

// maxLog bounds what is read of a program's log or output.
const maxLog = 64 << 10

// lastError finds the last error in a log of JSON lines; of a program that
// writes something else, the last line.
func lastError(file string) string {
	f, err := os.Open(file)
	if err != nil {
		return ""
	}
	defer func() { _ = f.Close() }()
	if st, err := f.Stat(); err == nil && st.Size() > maxLog {
		_, _ = f.Seek(-maxLog, io.SeekEnd)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxLog))
	if err != nil {
		return ""
	}
	return parseLog(b)
}

// parseLog is lastError of a log's content.
func parseLog(b []byte) string {
	const longest = 1 << 10
	last, plain := "", ""
	for line := range strings.SplitSeq(string(b), "\n") {
		line = strings.TrimSpace(line)
		if line == "" {
			continue
		}
		var e struct{ Level, Msg string }
		if json.Unmarshal([]byte(line), &e) != nil {
			plain = line
			continue
		}
		if e.Level == "error" || e.Level == "fatal" {
			last = e.Msg
		}
	}
	if last == "" {
		last = plain
	}
	return strings.ToValidUTF8(last[:min(len(last), longest)], "?")
}

// known are the features as they are known without asking.
func (h *handler) known() Features {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.can
}

// features asks the program, unless it has answered before.
func (h *handler) features(ctx context.Context) (Features, error) {
	h.mu.Lock()
	asked, can := h.asked, h.can
	h.mu.Unlock()
	if asked {
		return can, nil
	}
	log := filepath.Join(h.dir, "probe-"+h.Name+".log")
	out, err := h.output(ctx, log, "features")
	if err == nil {
		can, err = parseFeatures(out)
	} else if !errs.Is(err, errs.FailedPrecondition) && !errs.Is(err, errs.DeadlineExceeded) {
		// Runtimes did not always have this command: one that tells its version
		// runs, at least.
		if out, verr := h.output(ctx, log, "--version"); verr == nil {
			first, _, _ := strings.Cut(string(out), "\n")
			can, err = Features{Version: strings.ToValidUTF8(first[:min(len(first), 100)], "?")}, nil
		}
	}
	if err != nil {
		return Features{}, errs.New(errs.Of(err), "runtime handler %q: ask what it can do: %w", h.Name, err)
	}
	can.Place = can.UserNamespaces && checkForeignRoot() == nil
	h.mu.Lock()
	defer h.mu.Unlock()
	h.asked, h.can = true, can
	return can, nil
}

// output runs the program for what it writes.
func (h *handler) output(ctx context.Context, log string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, probeTime, errs.New(errs.DeadlineExceeded, "%s %s did not end within %s", h.Path, args[0], probeTime))
	defer cancel()
	r, w, err := sys.Pipe(true)
	if err != nil {
		return nil, errs.Wrap(errs.Internal, err)
	}
	defer func() { _ = r.Close() }()
	read := make(chan []byte, 1)
	go func() {
		b, _ := io.ReadAll(io.LimitReader(r, maxLog))
		_, _ = io.Copy(io.Discard, r)
		read <- b
	}()
	_ = os.Remove(log)
	err = h.run.RunTool(ctx, programWait, native.Tool{Args: h.argv(log, args...), Stdio: [3]*os.File{1: w}, Umask: 0o077})
	_ = w.Close()
	_ = r.SetReadDeadline(time.Now().Add(programWait)) // a child of it may hold the pipe
	b := <-read
	return b, h.explain(args[0], log, err)
}

// parseFeatures reads the document of `features` (features.md of the OCI
// runtime specification).
func parseFeatures(b []byte) (Features, error) {
	var doc struct {
		OCIVersionMax string `json:"ociVersionMax"`
		Linux         struct{ Namespaces []string }
	}
	if err := json.Unmarshal(b, &doc); err != nil {
		return Features{}, errs.New(errs.Internal, "its features are no JSON document: %w", err)
	}
	if doc.OCIVersionMax == "" {
		return Features{}, errs.New(errs.Internal, "its features do not say which version of the OCI specification it knows")
	}
	return Features{
		Version: strings.ToValidUTF8(doc.OCIVersionMax[:min(len(doc.OCIVersionMax), 100)], "?"),
		// Ids of mounts it need not map: its mounts are mapped when it sees them.
		UserNamespaces: slices.Contains(doc.Linux.Namespaces, "user"),
	}, nil
}
