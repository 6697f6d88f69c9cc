package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

const patience = 20 * time.Second

// slow is by what time limits grow on a machine that is slower, as in the Go tests.
var slow = func() time.Duration {
	n, _ := strconv.Atoi(os.Getenv("NARU_SLOW"))
	return time.Duration(max(n, 1))
}()

// Eventually tries do until it succeeds.
func Eventually(ctx context.Context, within time.Duration, do func() error) error {
	within *= slow
	end := time.Now().Add(within)
	for {
		err := do()
		if err == nil || errors.Is(err, ErrEnded) {
			return err
		}
		if time.Now().After(end) {
			return fmt.Errorf("not within %v: %w", within, err)
		}
		select {
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// Page is the page of results of a run, which also says them as they come.
type Page struct {
	alive  func() error // whether the run's daemons live
	begun  time.Time
	text   strings.Builder
	failed []error
	over   bool
}

// NewPage begins a page; target is what make is told to get it.
func NewPage(title, target string, alive func() error) *Page {
	p := &Page{alive: alive, begun: time.Now()}
	fmt.Fprintf(&p.text, "# %s\n\nMade by `make %s` on %s.\n", title, target, p.begun.UTC().Format(time.DateOnly))
	return p
}

// Part begins a part of the run with its set-up. Without it nothing of the run
// makes sense.
func (p *Page) Part(name string, begin func() error) {
	if p.over {
		return
	}
	fmt.Printf("     %6.2f s  -- %s\n", time.Since(p.begun).Seconds(), name)
	p.Table(name, "what", "", "seconds")
	if begin == nil {
		return
	}
	if err := begin(); err != nil {
		p.failed, p.over = append(p.failed, fmt.Errorf("%s: %w", name, err)), true
	}
}

// Table begins a table. Rows follow.
func (p *Page) Table(title string, columns ...string) {
	fmt.Fprintf(&p.text, "\n## %s\n\n| %s |\n%s|\n", title, strings.Join(columns, " | "), strings.Repeat("|---", len(columns)))
}

// Row adds a row to the table.
func (p *Page) Row(cells ...string) { fmt.Fprintf(&p.text, "| %s |\n", strings.Join(cells, " | ")) }

// Check tries one feature until it is there or patience ends.
func (p *Page) Check(ctx context.Context, feature string, do func() error) {
	if p.over {
		return
	}
	start := time.Now()
	err := Eventually(ctx, patience, func() error {
		if err := p.alive(); err != nil {
			return err
		}
		return do()
	})
	word := "ok  "
	if err != nil {
		word = "FAIL"
		p.failed = append(p.failed, fmt.Errorf("%s: %w", feature, err))
		p.over = ctx.Err() != nil || errors.Is(err, ErrEnded)
	}
	fmt.Printf("%s %6.2f s  %s\n", word, time.Since(p.begun).Seconds(), feature)
	if err != nil {
		fmt.Printf("     %v\n", err)
	}
	p.Row(feature, strings.TrimSpace(word), fmt.Sprintf("%.2f", time.Since(start).Seconds()))
}

// Write writes the page, if the run came to its end, and returns what failed.
func (p *Page) Write(file string) error {
	err := errors.Join(p.failed...)
	if p.over {
		return err
	}
	return errors.Join(err, os.WriteFile(file, []byte(p.text.String()), 0o644))
}

// Want compares what was found with what was to be.
func Want(what, got, expected string) error {
	if got != expected {
		return fmt.Errorf("%s: %q, want %q", what, got, expected)
	}
	return nil
}

// Limits is a shell command that prints a container's own limits of memory and
// processor: cgroup v2's files, or v1's.
const Limits = "cd /sys/fs/cgroup; cat memory.max memory/memory.limit_in_bytes 2>/dev/null; cat cpu.max cpu/cpu.cfs_quota_us 2>/dev/null | cut -d' ' -f1"
