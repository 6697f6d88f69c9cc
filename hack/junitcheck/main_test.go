package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const report = `<?xml version="1.0"?><testsuites><testsuite name="CRI validation">
<testcase name="[BeforeSuite]" status="passed"></testcase>
<testcase name="[It] pods run" status="passed"></testcase>
<testcase name="[It] pods stop" status="failed"><failure message="&#10; no such pod" type="failed">x</failure></testcase>
<testcase name="[It] pods hang" status="timedout"><failure message="too slow"></failure></testcase>
<testcase name="[It] apparmor" status="skipped"><skipped message="skipped"></skipped></testcase>
</testsuite></testsuites>`

func TestCheck(t *testing.T) {
	for name, c := range map[string]struct {
		expected string
		least    string
		want     []string
		err      string
	}{
		"unknown failures": {"", "1", []string{"FAILED: pods stop\n        failed: no such pod", "FAILED: pods hang\n        timedout: too slow", "4 specs: 1 passed, 2 failed, 1 skipped"}, "2 specs differ"},
		"known failures":   {"# c\n\npods stop  not yet\npods hang\tslow host\n", "1", []string{"known to fail: pods stop (not yet)"}, ""},
		"too few":          {"pods stop  not yet\npods hang  slow host\n", "2", nil, "fewer than 2"},
		"passes by now":    {"pods stop  a\npods hang  b\npods run  c\n", "1", []string{"take it off the list: pods run"}, "1 specs differ"},
		"misspelt":         {"pods stop  a\npods hang  b\npods stopp  c\n", "1", []string{"no such spec: pods stopp"}, "1 specs differ"},
		"without a reason": {"pods stop\n", "1", nil, "without a reason"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			file := func(name, text string) string {
				p := filepath.Join(dir, name)
				if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
				return p
			}
			var out bytes.Buffer
			err := run([]string{"--expected", file("e", c.expected), "--least", c.least, file("r.xml", report)}, &out)
			if (err == nil) != (c.err == "") || (err != nil && !strings.Contains(err.Error(), c.err)) {
				t.Errorf("got error %v, want %q", err, c.err)
			}
			for _, w := range c.want {
				if !strings.Contains(out.String(), w) {
					t.Errorf("no %q in\n%s", w, out.String())
				}
			}
		})
	}
}

func TestEmptyReport(t *testing.T) {
	if _, err := readReport(strings.NewReader("<testsuites></testsuites>")); err == nil {
		t.Error("a report without specs is accepted")
	}
	if _, err := readReport(strings.NewReader("<testsuites>")); err == nil {
		t.Error("half a report is accepted")
	}
}
