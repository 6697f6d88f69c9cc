package main

import (
	"bufio"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

var logChecks = []check{
	{"400 000 lines in 15 s over rotated files: none lost, none twice", func(_ context.Context, s *suite) error {
		files, err := s.logFiles("logs", "main")
		if err != nil {
			return err
		}
		if len(files) < 3 {
			return fmt.Errorf("the kubelet has rotated into %d files, want 3 or more", len(files))
		}
		return inOrder(files, 400000)
	}},
}

// logFiles are the files of a container's log, the oldest first.
func (s *suite) logFiles(pod, container string) ([]string, error) {
	rotated, err := filepath.Glob(filepath.Join(s.Work, "podlogs", "default_"+pod+"-"+nodeName+"_*", container, "0.log.*"))
	if err != nil {
		return nil, err
	}
	slices.Sort(rotated) // their names end with a time
	now, err := filepath.Glob(filepath.Join(s.Work, "podlogs", "default_"+pod+"-"+nodeName+"_*", container, "0.log"))
	return append(rotated, now...), err
}

// inOrder reads log files in CRI's format whose lines begin with their numbers.
func inOrder(files []string, count int) error {
	next := 0
	for _, name := range files {
		if err := func() error {
			f, err := os.Open(name)
			if err != nil {
				return err
			}
			defer func() { _ = f.Close() }()
			var r io.Reader = f
			if strings.HasSuffix(name, ".gz") {
				if r, err = gzip.NewReader(f); err != nil {
					return err
				}
			}
			in := bufio.NewScanner(r)
			for in.Scan() {
				fields := strings.Fields(in.Text())
				if len(fields) < 4 || fields[2] != "F" {
					return fmt.Errorf("%s: a strange line: %q", name, in.Text())
				}
				if fields[3] != fmt.Sprint(next) {
					return fmt.Errorf("%s: line %s, want %d", filepath.Base(name), fields[3], next)
				}
				next++
			}
			return in.Err()
		}(); err != nil {
			return err
		}
	}
	if count > 0 && next != count {
		return fmt.Errorf("%d lines, want %d", next, count)
	}
	return nil
}
