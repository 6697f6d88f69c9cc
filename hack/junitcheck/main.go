// Junitcheck sums up the JUnit report of a ginkgo run (critest): counts,
// failed specs, and whether those are exactly the ones that are known to fail.
package main

import (
	"bufio"
	"encoding/xml"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
)

func main() {
	err := run(os.Args[1:], os.Stdout)
	switch {
	case errors.Is(err, errUsage):
		fmt.Fprintln(os.Stderr, "usage: junitcheck [--expected FILE] [--least N] REPORT.xml")
		os.Exit(2)
	case err != nil:
		fmt.Fprintln(os.Stderr, "junitcheck:", err)
		os.Exit(1)
	}
}

var errUsage = errors.New("usage")

func run(args []string, out io.Writer) error {
	fs := flag.NewFlagSet("junitcheck", flag.ContinueOnError)
	expected := fs.String("expected", "", "file of the specs that are known to fail: NAME, two spaces or a tab, REASON")
	least := fs.Int("least", 1, "how many specs must pass")
	if err := fs.Parse(args); err != nil || fs.NArg() != 1 {
		return errUsage
	}
	f, err := os.Open(fs.Arg(0))
	if err != nil {
		return err
	}
	defer f.Close()
	specs, err := readReport(f)
	if err != nil {
		return fmt.Errorf("%s: %w", fs.Arg(0), err)
	}
	known := map[string]string{}
	if *expected != "" {
		f, err := os.Open(*expected)
		if err != nil {
			return err
		}
		defer f.Close()
		if known, err = readExpected(f); err != nil {
			return fmt.Errorf("%s: %w", *expected, err)
		}
	}
	return check(specs, known, *least, out)
}

// spec is one test case of the report.
type spec struct {
	name    string
	status  string
	message string
}

// failed reports whether the spec ended in any way but passed or skipped.
func (s spec) failed() bool {
	return s.status != "passed" && s.status != "skipped" && s.status != "pending"
}

// readReport reads the cases of all suites; set-up nodes that passed are left out.
func readReport(r io.Reader) ([]spec, error) {
	type detail struct {
		Message string `xml:"message,attr"`
		Text    string `xml:",chardata"`
	}
	var report struct {
		Suites []struct {
			Cases []struct {
				Name    string  `xml:"name,attr"`
				Status  string  `xml:"status,attr"`
				Failure *detail `xml:"failure"`
				Error   *detail `xml:"error"`
			} `xml:"testcase"`
		} `xml:"testsuite"`
	}
	if err := xml.NewDecoder(r).Decode(&report); err != nil {
		return nil, err
	}
	var specs []spec
	for _, suite := range report.Suites {
		for _, c := range suite.Cases {
			s := spec{name: strings.TrimPrefix(c.Name, "[It] "), status: c.Status}
			for _, d := range []*detail{c.Failure, c.Error} {
				if d != nil {
					s.message = firstLine(d.Message + "\n" + d.Text)
				}
			}
			if strings.HasPrefix(c.Name, "[It] ") || s.failed() {
				specs = append(specs, s)
			}
		}
	}
	if len(specs) == 0 {
		return nil, errors.New("no specs in the report")
	}
	return specs, nil
}

func firstLine(s string) string {
	for line := range strings.SplitSeq(s, "\n") {
		if line = strings.TrimSpace(line); line != "" {
			return line
		}
	}
	return ""
}

// readExpected reads "NAME  REASON" lines. Empty ones and # comments are skipped.
func readExpected(r io.Reader) (map[string]string, error) {
	known := map[string]string{}
	sc := bufio.NewScanner(r)
	for n := 1; sc.Scan(); n++ {
		line := strings.TrimSpace(strings.ReplaceAll(sc.Text(), "\t", "  "))
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		name, reason, ok := strings.Cut(line, "  ")
		if reason = strings.TrimSpace(reason); !ok || reason == "" {
			return nil, fmt.Errorf("line %d: a spec without a reason", n)
		}
		known[name] = reason
	}
	return known, sc.Err()
}

// check prints the summary. It is an error if a spec failed that is not known
// to, if one that is known to fail passed, or if too few passed.
func check(specs []spec, known map[string]string, least int, out io.Writer) error {
	count := map[string]int{}
	var surprises []string
	for _, s := range specs {
		status := s.status
		if s.failed() {
			status = "failed"
		}
		count[status]++
		reason, isKnown := known[s.name]
		switch {
		case s.failed() && isKnown:
			fmt.Fprintf(out, "known to fail: %s (%s)\n", s.name, reason)
		case s.failed():
			fmt.Fprintf(out, "FAILED: %s\n        %s: %s\n", s.name, s.status, s.message)
			surprises = append(surprises, s.name)
		case s.status == "passed" && isKnown:
			fmt.Fprintf(out, "passes, take it off the list: %s\n", s.name)
			surprises = append(surprises, s.name)
		}
	}
	for _, name := range sortedKeys(known) {
		if !slices.ContainsFunc(specs, func(s spec) bool { return s.name == name }) {
			fmt.Fprintf(out, "on the list, but there is no such spec: %s\n", name)
			surprises = append(surprises, name)
		}
	}
	fmt.Fprintf(out, "%d specs: %d passed, %d failed, %d skipped\n", len(specs), count["passed"], count["failed"], count["skipped"]+count["pending"])
	switch {
	case len(surprises) > 0:
		return fmt.Errorf("%d specs differ from what is expected", len(surprises))
	case count["passed"] < least:
		return fmt.Errorf("%d specs passed, fewer than %d", count["passed"], least)
	}
	return nil
}

func sortedKeys(m map[string]string) []string {
	var keys []string
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
