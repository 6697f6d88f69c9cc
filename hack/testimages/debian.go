package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"strings"
)

// debian fetches packages with a private apt configuration: the machine's own
// archives, keys and proxy settings, but lists, caches and sources in a folder
// of our own. Nothing that the machine's apt uses is changed.
type debian struct {
	dir     string // everything below it is ours
	updated bool
	source  bool // ask for source packages, too
}

func (d *debian) path(name string) string { return filepath.Join(d.dir, name) }

// prepare writes the configuration and fetches the package lists, once.
func (d *debian) prepare(ctx context.Context, source bool) error {
	if d.updated && (d.source || !source) {
		return nil
	}
	for _, sub := range []string{"lists/partial", "cache/archives/partial", "sources.d", "debs", "root"} {
		if err := os.MkdirAll(d.path(sub), 0o700); err != nil {
			return err
		}
	}
	if err := d.writeSources(source); err != nil {
		return err
	}
	if err := d.writeConfig(ctx); err != nil {
		return err
	}
	if _, err := d.run(ctx, d.dir, "apt-get", "-qq", "update"); err != nil {
		return err
	}
	d.updated, d.source = true, source
	return nil
}

// distribution matches the archives of Debian (and of its children that keep
// its layout); other sources of the machine are of no use here and may be
// out of reach.
var distribution = regexp.MustCompile(`[a-z]+:\S*/(debian|debian-security|ubuntu|ubuntu-ports)/?(\s|$)`)

// writeSources copies the machine's package sources, in both formats.
func (d *debian) writeSources(source bool) error {
	files, _ := filepath.Glob("/etc/apt/sources.list.d/*")
	var lines, stanzas []string
	for _, name := range append([]string{"/etc/apt/sources.list"}, files...) {
		b, err := os.ReadFile(name)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		switch path.Ext(name) {
		case ".list":
			lines = append(lines, pickLines(string(b), source)...)
		case ".sources":
			stanzas = append(stanzas, pickStanzas(string(b), source)...)
		}
	}
	if len(lines)+len(stanzas) == 0 {
		return errors.New("/etc/apt names no Debian archive: test images are made from Debian packages")
	}
	return errors.Join(
		os.WriteFile(d.path("sources.d/own.list"), []byte(strings.Join(lines, "\n")+"\n"), 0o600),
		os.WriteFile(d.path("sources.d/own.sources"), []byte(strings.Join(stanzas, "\n")+"\n"), 0o600))
}

// pickLines picks from a one-line-style file; with source each deb line gets
// a deb-src twin.
func pickLines(text string, source bool) []string {
	var out []string
	for line := range strings.SplitSeq(text, "\n") {
		rest, ok := strings.CutPrefix(strings.TrimSpace(line), "deb ")
		if !ok || !distribution.MatchString(rest) {
			continue
		}
		out = append(out, "deb "+rest)
		if source {
			out = append(out, "deb-src "+rest)
		}
	}
	return out
}

var typesField = regexp.MustCompile(`(?m)^Types:.*$`)

// pickStanzas picks from a deb822-style file.
func pickStanzas(text string, source bool) []string {
	var out []string
	for stanza := range strings.SplitSeq(text, "\n\n") {
		if !distribution.MatchString(stanza) || !typesField.MatchString(stanza) || regexp.MustCompile(`(?mi)^Enabled:\s*no`).MatchString(stanza) {
			continue
		}
		types := "Types: deb"
		if source {
			types += " deb-src"
		}
		out = append(out, strings.TrimSpace(typesField.ReplaceAllString(stanza, types))+"\n")
	}
	return out
}

// writeConfig writes an apt.conf that takes over how the machine reaches its
// archives (Acquire::*), but none of its hooks.
func (d *debian) writeConfig(ctx context.Context) error {
	dump, err := exec.CommandContext(ctx, "apt-config", "dump").Output()
	if err != nil {
		return fmt.Errorf("apt-config dump: %w", err)
	}
	var b strings.Builder
	for line := range strings.SplitSeq(string(dump), "\n") {
		index := strings.HasPrefix(line, "Acquire::IndexTargets") // what else to fetch with the lists: nothing
		if !index && strings.HasPrefix(line, "Acquire::") || strings.HasPrefix(line, "APT::Architecture") {
			fmt.Fprintln(&b, line)
		}
	}
	fmt.Fprintf(&b, `Dir::Etc::Parts "/dev/null";
Dir::Etc::Main "/dev/null";
Dir::Etc::SourceList "/dev/null";
Dir::Etc::SourceParts "%[1]s/sources.d";
Dir::State::Lists "%[1]s/lists";
Dir::State::status "/var/lib/dpkg/status";
Dir::Cache "%[1]s/cache";
APT::Sandbox::User "root";
APT::Get::List-Cleanup "false";
Acquire::Languages "none";
Acquire::Retries "3";
`, d.dir)
	return os.WriteFile(d.path("apt.conf"), []byte(b.String()), 0o600)
}

// run runs a program with the private configuration; its output is shown in
// the error only.
func (d *debian) run(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "APT_CONFIG="+d.path("apt.conf"), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return nil, fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, lastLines(errs.String()+out.String(), 12))
	}
	return out.Bytes(), nil
}

func lastLines(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// unpack downloads a binary package and unpacks it under root. It returns
// the names of the packages it depends on.
func (d *debian) unpack(ctx context.Context, root, pkg string) (depends []string, err error) {
	if err := d.prepare(ctx, false); err != nil {
		return nil, err
	}
	debs := d.path("debs")
	// Names of files hold the version: an old one is never taken for a new one.
	before, _ := filepath.Glob(filepath.Join(debs, pkg+"_*.deb"))
	for _, old := range before {
		if err := os.Remove(old); err != nil {
			return nil, err
		}
	}
	if _, err := d.run(ctx, debs, "apt-get", "-qq", "download", pkg); err != nil {
		return nil, err
	}
	files, _ := filepath.Glob(filepath.Join(debs, pkg+"_*.deb"))
	if len(files) != 1 {
		return nil, fmt.Errorf("apt-get download %s gave %d files", pkg, len(files))
	}
	if _, err := d.run(ctx, debs, "dpkg-deb", "-x", files[0], root); err != nil {
		return nil, err
	}
	field, err := d.run(ctx, debs, "dpkg-deb", "-f", files[0], "Depends")
	if err != nil {
		return nil, err
	}
	return parseDepends(string(field)), nil
}

var packageName = regexp.MustCompile(`^[a-z0-9][a-z0-9+.-]+`)

// parseDepends returns the first alternative of each dependency.
func parseDepends(field string) []string {
	var out []string
	for dep := range strings.SplitSeq(field, ",") {
		if name := packageName.FindString(strings.TrimSpace(dep)); name != "" {
			out = append(out, name)
		}
	}
	return out
}

// program unpacks pkg and adds one of its programs, with its loader and every
// library that it needs, to the tree.
func (d *debian) program(ctx context.Context, t tree, pkg, file string) error {
	root := filepath.Join(d.path("root"), pkg)
	if err := os.RemoveAll(root); err != nil {
		return err
	}
	if err := os.MkdirAll(root, 0o700); err != nil {
		return err
	}
	depends, err := d.unpack(ctx, root, pkg)
	if err != nil {
		return err
	}
	tried := map[string]bool{pkg: true}
	// find looks for a library, fetching library packages until it is there.
	find := func(name string) (string, error) {
		for {
			if lib, ok := findLibrary(root, name); ok {
				return lib, nil
			}
			next := nextLibraryPackage(depends, tried, name)
			if next == "" {
				return "", fmt.Errorf("%s of %s: no package that it depends on has it", name, pkg)
			}
			tried[next] = true
			more, err := d.unpack(ctx, root, next)
			if err != nil {
				return "", err
			}
			depends = append(depends, more...)
		}
	}
	if err := t.copyIn(file, filepath.Join(root, file)); err != nil {
		return err
	}
	return addLibraries(t, filepath.Join(root, file), find)
}

// nextLibraryPackage chooses the package to look into next: library packages
// only, those whose name resembles the library first.
func nextLibraryPackage(depends []string, tried map[string]bool, library string) string {
	stem, _, _ := strings.Cut(strings.TrimPrefix(library, "lib"), ".so")
	best := ""
	for _, p := range depends {
		isLibrary := strings.HasPrefix(p, "lib") || strings.HasPrefix(p, "zlib")
		if tried[p] || !isLibrary {
			continue
		}
		if strings.Contains(p, strings.SplitN(stem, "-", 2)[0]) {
			return p
		}
		if best == "" {
			best = p
		}
	}
	return best
}

// addLibraries adds the loader and the libraries of an executable, and theirs.
func addLibraries(t tree, file string, find func(string) (string, error)) error {
	main, err := readLinkage(file)
	if err != nil {
		return err
	}
	if main.interpreter == "" {
		return nil // static
	}
	libDir := "/lib"
	queue := main.needed
	loader := path.Base(main.interpreter)
	from, err := find(loader)
	if err != nil {
		return err
	}
	// Debian's loader searches /lib/TRIPLET; take the triplet from where it lies itself.
	if triplet := path.Base(path.Dir(from)); strings.Contains(triplet, "-linux-") {
		libDir = "/lib/" + triplet
	}
	if err := t.copyIn(main.interpreter, from); err != nil {
		return err
	}
	done := map[string]bool{loader: true}
	for len(queue) > 0 {
		name := queue[0]
		queue = queue[1:]
		if done[name] {
			continue
		}
		done[name] = true
		from, err := find(name)
		if err != nil {
			return err
		}
		if err := t.copyIn(path.Join(libDir, name), from); err != nil {
			return err
		}
		l, err := readLinkage(from)
		if err != nil {
			return err
		}
		queue = append(queue, l.needed...)
	}
	return nil
}
