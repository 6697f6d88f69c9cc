package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/naru-project/naru/internal/errs"
)

// The exit codes.
const (
	exitOK    = 0
	exitError = 1
	exitUsage = 2
)

// usageError is a command line that makes no sense.
type usageError struct{ error }

// Unwrap is for errors.As.
func (u usageError) Unwrap() error { return u.error }

func usageErrorf(format string, args ...any) error {
	return usageError{errs.New(errs.InvalidArgument, format, args...)}
}

// silentError ends a command with code 1 that has said all there is to say.
type silentError struct{}

func (silentError) Error() string { return "see above" }

func isSilent(err error) bool { return errors.As(err, &silentError{}) }

func exitCode(err error) int {
	var u usageError
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &u):
		return exitUsage
	}
	return exitError
}

// group makes c a command that only has others below it: alone it shows its
// help, with an unknown word it says so.
func group(c *cobra.Command) {
	c.Args = func(c *cobra.Command, args []string) error {
		if len(args) == 0 {
			return nil
		}
		hint := ""
		if s := c.SuggestionsFor(args[0]); len(s) > 0 {
			hint = fmt.Sprintf("; did you mean %s?", strings.Join(s, " or "))
		}
		return usageErrorf("%s has no command %q%s", c.CommandPath(), clean(args[0]), hint)
	}
	c.RunE = func(c *cobra.Command, _ []string) error {
		_ = c.Help()
		return usageError{silentError{}}
	}
	c.SuggestionsMinimumDistance = 2
}

func noArgs(c *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usageErrorf("%s takes no argument %q", c.CommandPath(), clean(args[0]))
	}
	return nil
}

// nArgs wants at least low and at most high arguments; high < 0 is any number.
func nArgs(low, high int, what string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) < low || (high >= 0 && len(args) > high) {
			return usageErrorf("%s wants %s", c.CommandPath(), what)
		}
		return nil
	}
}

// outputFlag adds -o.
func outputFlag(c *cobra.Command, to *string) {
	c.Flags().StringVarP(to, "output", "o", "table", "table or json")
}

func checkOutput(format string) error {
	if format != "table" && format != "json" {
		return usageErrorf("output %q: want table or json", format)
	}
	return nil
}

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return errs.New(errs.Internal, "write JSON: %w", err)
	}
	return nil
}

// table aligns columns. Cells come from images and pods: what would move the
// cursor is made visible.
type table struct{ w *tabwriter.Writer }

func newTable(w io.Writer, header ...string) *table {
	t := &table{w: tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)}
	t.row(header...)
	return t
}

func (t *table) row(cells ...string) {
	for i, c := range cells {
		cells[i] = clean(c)
	}
	fmt.Fprintln(t.w, strings.Join(cells, "\t"))
}

func (t *table) flush() { _ = t.w.Flush() }

// clean makes text from outside safe for a terminal and a table.
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '\uFFFD'
		}
		return r
	}, s)
}

// short is enough of an id to tell it from others.
func short(id string) string {
	id = strings.TrimPrefix(id, "sha256:")
	if len(id) > 13 {
		id = id[:13]
	}
	return id
}

// age is a duration as a person says it.
func age(d time.Duration) string {
	switch {
	case d < 0:
		return "0s"
	case d < 10*time.Second:
		return fmt.Sprintf("%.1fs", d.Seconds())
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

// size is a number of bytes as a person says it.
func size(n uint64) string {
	if n < 1000 {
		return fmt.Sprintf("%d B", n)
	}
	f, units := float64(n), "kMGTPE"
	for i := 0; ; i++ {
		f /= 1000
		if f < 999.5 || i == len(units)-1 {
			if f < 9.95 {
				return fmt.Sprintf("%.1f %cB", f, units[i])
			}
			return fmt.Sprintf("%.0f %cB", f, units[i])
		}
	}
}

// isTerminal reports whether w is a terminal.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// progress shows how far something is: one line that is rewritten on a
// terminal, plain lines, and not many of them, elsewhere.
type progress struct {
	w     io.Writer
	tty   bool
	last  string
	at    time.Time
	every time.Duration
}

func newProgress(w io.Writer) *progress {
	p := &progress{w: w, tty: isTerminal(w), every: 5 * time.Second}
	if p.tty {
		p.every = 100 * time.Millisecond
	}
	return p
}

// show shows text, unless it is too soon after the last one.
func (p *progress) show(text string) {
	text = clean(text)
	if text == p.last || time.Since(p.at) < p.every {
		return
	}
	p.last, p.at = text, time.Now()
	if p.tty {
		fmt.Fprintf(p.w, "\r\x1b[K%s", text)
	} else {
		fmt.Fprintln(p.w, text)
	}
}

// done clears the line.
func (p *progress) done() {
	if p.tty && p.last != "" {
		fmt.Fprint(p.w, "\r\x1b[K")
	}
}
