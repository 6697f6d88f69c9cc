package hooks

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
)

// folder makes a folder with these files, by their names.
func folder(t testing.TB, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// file is a hook with the condition and the stages.
func file(path, when, stages string) string {
	return fmt.Sprintf(`{"version": "1.0.0", "hook": {"path": %q, "args": ["a", "b"], "env": ["K=V"]}, "when": %s, "stages": [%s]}`, path, when, stages)
}

func spec() *specs.Spec { return &specs.Spec{Process: &specs.Process{Args: []string{"/bin/sh", "-c"}}} }

// Conditions, as oci-hooks(5) has them.
func TestWhen(t *testing.T) {
	c := Container{Annotations: map[string]string{"io.example/trace": "yes", "other": "no"}}
	for when, want := range map[string]bool{
		`{"always": true}`:  true,
		`{"always": false}`: false,
		`{"annotations": {"^io\\.example/trace$": "^(yes|true)$"}}`:                true,
		`{"annotations": {"^io\\.example/trace$": "^no$"}}`:                        false, // key and value of one annotation
		`{"annotations": {"trace": "yes", "absent": ""}}`:                          false, // all of them
		`{"commands": [".*/bash$", ".*/sh$"]}`:                                     true,
		`{"commands": ["^sh$"]}`:                                                   false,
		`{"always": true, "commands": ["^sh$"]}`:                                   false,
		`{"hasBindMounts": true}`:                                                  false,
		`{"hasBindMounts": false}`:                                                 false,
		`{"always": true, "annotations": {"other": "no"}, "commands": ["^/bin/"]}`: true,
	} {
		s := spec()
		if err := Add([]string{folder(t, map[string]string{"h.json": file("/bin/hook", when, `"poststop"`)})}, s, c); err != nil {
			t.Fatal(when, err)
		}
		if got := s.Hooks != nil; got != want || got != (s.Annotations != nil) {
			t.Errorf("%s: %v (annotations %v), want %v", when, got, s.Annotations, want)
		}
	}
	s := spec()
	c.BindMounts = true
	if err := Add([]string{folder(t, map[string]string{"h.json": file("/bin/hook", `{"hasBindMounts": true}`, `"poststop"`)})}, s, c); err != nil || s.Hooks == nil {
		t.Error(s.Hooks, err)
	}
	s = &specs.Spec{}
	if err := Add([]string{folder(t, map[string]string{"h.json": file("/bin/hook", `{"commands": [""]}`, `"poststop"`)})}, s, c); err != nil || s.Hooks != nil {
		t.Error("a container without a command", s.Hooks, err)
	}
}

func TestFolders(t *testing.T) {
	always := `{"always": true}`
	low := folder(t, map[string]string{
		"20-b.json": file("/low/b", always, `"createRuntime", "poststop"`), "10-A.json": file("/low/a", always, `"createRuntime"`),
		"30-c.json": file("/low/c", always, `"createRuntime"`), "readme.txt": "no hook", "x.json.off": "nor this",
	})
	high := folder(t, map[string]string{"20-b.json": file("/high/b", always, `"createRuntime"`)})
	s := spec()
	s.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/of/a/device"}}}
	if err := Add([]string{low, filepath.Join(low, "absent"), high}, s, Container{}); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, h := range s.Hooks.CreateRuntime {
		got = append(got, h.Path)
	}
	if want := []string{"/of/a/device", "/low/a", "/high/b", "/low/c"}; !slices.Equal(got, want) || len(s.Hooks.Poststop) > 0 {
		t.Errorf("%v and %v, want %v", got, s.Hooks.Poststop, want)
	}
	if h := s.Hooks.CreateRuntime[1]; *h.Timeout != DefaultTimeout || !slices.Equal(h.Args, []string{"a", "b"}) || !slices.Equal(h.Env, []string{"K=V"}) {
		t.Errorf("%+v", h)
	}
	if err := os.Remove(filepath.Join(high, "20-b.json")); err != nil { // the next create sees it
		t.Fatal(err)
	}
	s = spec()
	if err := Add([]string{low, high}, s, Container{}); err != nil || len(s.Hooks.Poststop) != 1 {
		t.Error(s.Hooks, err)
	}
}

// What cannot be used fails the create, and the error names file and reason.
func TestRefused(t *testing.T) {
	always := `{"always": true}`
	for text, want := range map[string]string{
		"": "EOF", "{": "EOF", "[]": "cannot unmarshal", "null": "version",
		strings.Replace(file("/x", always, `"poststop"`), "1.0.0", "0.1.0", 1): `version "0.1.0"`,
		file("x", always, `"poststop"`):                                        "not an absolute path",
		file("/x\u0000", always, `"poststop"`):                                 "invalid",
		file("/x", always, ``):                                                 "no stages",
		file("/x", always, `"precreate"`):                                      `stage "precreate"`,
		file("/x", `{}`, `"poststop"`):                                         "no condition",
		file("/x", `{"commands": ["("]}`, `"poststop"`):                        "missing closing",
		file("/x", `{"annotations": {"a": "["}}`, `"poststop"`):                "missing closing",
		file("/x", `{"allways": true}`, `"poststop"`):                          `unknown field "allways"`,
		file("/x", always, `"poststop"`) + "{}":                                "behind",
		`{"version":"1.0.0","hook":{"path":"/x","timeout":0},"when":{"always":true},"stages":["poststop"]}`:       "hook.timeout: 0",
		`{"version":"1.0.0","hook":{"path":"/x","args":["\u0000"]},"when":{"always":true},"stages":["poststop"]}`: "NUL",
		strings.Repeat(" ", maxFile+1): "larger than",
	} {
		dir := folder(t, map[string]string{"bad.json": text})
		s := spec()
		if err := Add([]string{dir}, s, Container{}); !errs.Is(err, errs.FailedPrecondition) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), dir+"/bad.json") {
			t.Errorf("%.100s: %v, want %q", text, err, want)
		}
	}
	good := map[string]string{"h.json": file("/x", always, `"poststop"`)}
	for name, change := range map[string]func(dir string) error{
		"a folder of another": func(d string) error { return os.Chown(d, 1000, 0) },
		"a writable folder":   func(d string) error { return os.Chmod(d, 0o777) },
		"a file of another":   func(d string) error { return os.Chown(d+"/h.json", 1000, 0) },
		"a writable file":     func(d string) error { return os.Chmod(d+"/h.json", 0o620) },
		"a FIFO":              func(d string) error { return unix.Mkfifo(d+"/i.json", 0o600) },
		"a folder as file":    func(d string) error { return os.Mkdir(d+"/i.json", 0o700) },
	} {
		dir := folder(t, good)
		if err := change(dir); err != nil {
			t.Fatal(err)
		}
		if err := Add([]string{dir}, spec(), Container{}); !errs.Is(err, errs.FailedPrecondition) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// No file makes the daemon end, and what is taken is whole.
func FuzzParse(f *testing.F) {
	f.Add([]byte(file("/bin/hook", `{"always": true, "annotations": {"a": "b"}, "commands": [".*"]}`, `"prestart", "poststop"`)))
	f.Add([]byte(`{"version":"1.0.0","hook":{"path":"/x","timeout":-1}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		h, err := parse(data)
		if err != nil {
			return
		}
		s := spec()
		h.matches(s, Container{Annotations: map[string]string{"a": "b"}})
		h.add(s)
		if !filepath.IsAbs(h.Hook.Path) || *h.Hook.Timeout <= 0 || s.Hooks == nil {
			t.Errorf("%+v", h)
		}
	})
}
