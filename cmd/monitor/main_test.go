package main

import (
	"bytes"
	"strings"
	"testing"
)

func TestCommandLine(t *testing.T) {
	for _, c := range []struct {
		args string
		out  string // part of the output
		err  string // part of the error
	}{
		{"", "naru-monitor keeper --dir DIR", ""},
		{"--help", "SIGUSR2", ""},
		{"keeper --help", "SIGUSR2", ""},
		{"version", "naru-monitor dev", ""},
		{"version --protocol", "table 1 1", ""},
		{"bogus", "", "unknown subcommand"},
		{"keeper", "", "--dir must name"},
		{"keeper --dir relative", "", "--dir must name"},
		{"keeper --dir /x more", "", "unexpected argument"},
		{"keeper --dri /x", "", "flag provided but not defined"},
	} {
		var out bytes.Buffer
		err := run(strings.Fields(c.args), &out)
		if !strings.Contains(out.String(), c.out) {
			t.Errorf("%q: output %q", c.args, out.String())
		}
		if (err == nil) != (c.err == "") || err != nil && !strings.Contains(err.Error(), c.err) {
			t.Errorf("%q: error %v, want %q", c.args, err, c.err)
		}
	}
}
