package main

import (
	"debug/elf"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// linkage is what a dynamic executable asks the loader for.
type linkage struct {
	interpreter string   // PT_INTERP; empty for libraries and static programs
	needed      []string // DT_NEEDED
}

func readLinkage(file string) (linkage, error) {
	f, err := elf.Open(file)
	if err != nil {
		return linkage{}, fmt.Errorf("read %s: %w", file, err)
	}
	defer f.Close()
	var l linkage
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		b := make([]byte, p.Filesz)
		if _, err := p.ReadAt(b, 0); err != nil {
			return linkage{}, fmt.Errorf("read interpreter of %s: %w", file, err)
		}
		l.interpreter = strings.TrimRight(string(b), "\x00")
	}
	if l.needed, err = f.ImportedLibraries(); err != nil {
		return linkage{}, fmt.Errorf("read libraries of %s: %w", file, err)
	}
	return l, nil
}

// findLibrary looks for a shared library by its file name below root, in the
// folders that Debian's loader searches. It returns the real file.
func findLibrary(root, name string) (string, bool) {
	for _, pattern := range []string{"lib/*", "usr/lib/*", "lib", "usr/lib", "lib64", "usr/lib64"} {
		matches, _ := filepath.Glob(filepath.Join(root, pattern, name))
		for _, m := range matches {
			if real, err := filepath.EvalSymlinks(m); err == nil && strings.HasPrefix(real, root+"/") {
				if info, err := os.Stat(real); err == nil && info.Mode().IsRegular() {
					return real, true
				}
			}
		}
	}
	return "", false
}
