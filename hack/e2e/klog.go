package e2e

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"
)

// line is one warning or error in the kubelet's log.
type line struct {
	at   time.Time
	file string // of the kubelet's source
	text string
}

// klog's header: severity and date, time, thread, file:line] (github.com/kubernetes/klog).
var header = regexp.MustCompile(`^([IWEF])(\d{4} \d\d:\d\d:\d\d\.\d{6})\s+\d+ ([a-z0-9_]+\.go):\d+\] (.*)$`)

// parseLine returns a warning or error, or nil. Klog's times have no year.
func parseLine(s string, year int) *line {
	m := header.FindStringSubmatch(s)
	if m == nil || m[1] == "I" {
		return nil
	}
	at, err := time.ParseInLocation("2006 0102 15:04:05.000000", fmt.Sprintf("%d %s", year, m[2]), time.Local)
	if err != nil {
		return nil
	}
	return &line{at: at, file: m[3], text: m[1] + " " + m[3] + ": " + m[4]}
}

// runtimeFiles are the kubelet's sources that speak to its runtime or judge
// what it says: the remote clients, PLEG, kuberuntime, statistics, image GC.
var runtimeFiles = regexp.MustCompile(`^(remote_(runtime|image)|generic|evented|kuberuntime_\w+|instrumented_services|logs?|container_log_manager|image_gc_manager|image_manager|cri_stats_provider\w*|runtime)\.go$`)

// expectation is a line of the list of what the log may hold.
type expectation struct {
	pattern *regexp.Regexp
	reason  string
}

// parseExpected reads PATTERN, two spaces, REASON; # begins a comment.
func parseExpected(text string) ([]expectation, error) {
	var out []expectation
	for l := range strings.Lines(text) {
		l = strings.TrimSpace(l)
		if l == "" || strings.HasPrefix(l, "#") {
			continue
		}
		pattern, reason, ok := strings.Cut(l, "  ")
		if !ok || strings.TrimSpace(reason) == "" {
			return nil, fmt.Errorf("%q has no reason", l)
		}
		re, err := regexp.Compile(pattern)
		if err != nil {
			return nil, err
		}
		out = append(out, expectation{re, strings.TrimSpace(reason)})
	}
	return out, nil
}

// ids are what differs between two complaints about the same.
var ids = regexp.MustCompile(`[0-9a-f]{13,}`)

// Window is a time within which the kubelet's log may hold anything.
type Window struct{ From, To time.Time }

// judge returns the complaints that nothing excuses, neither a restart nor the
// list, each once.
func judge(lines []*line, restarts []Window, expected []expectation) []string {
	var bad []string
	for _, l := range lines {
		excused := slices.ContainsFunc(restarts, func(w Window) bool { return l.at.After(w.From) && l.at.Before(w.To) }) ||
			slices.ContainsFunc(expected, func(e expectation) bool { return e.pattern.MatchString(l.text) })
		if !excused && runtimeFiles.MatchString(l.file) {
			bad = append(bad, l.at.Format(time.TimeOnly)+" "+ids.ReplaceAllString(l.text, "…"))
		}
	}
	slices.SortStableFunc(bad, func(a, b string) int { return strings.Compare(a[len(time.TimeOnly):], b[len(time.TimeOnly):]) })
	return slices.CompactFunc(bad, func(a, b string) bool { return a[len(time.TimeOnly):] == b[len(time.TimeOnly):] })
}

// EachLogLine hands over every line of the kubelet's log.
func (n *Node) EachLogLine(do func(string)) error {
	f, err := os.Open(n.Kubelet.Log)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	in := bufio.NewScanner(f)
	in.Buffer(nil, 4<<20)
	for in.Scan() {
		do(in.Text())
	}
	return in.Err()
}

// JudgeLog looks for complaints of the kubelet about its runtime that neither a
// restart nor the list in the file expected excuses.
func (n *Node) JudgeLog(expected string) error {
	text, err := os.ReadFile(expected)
	if err != nil {
		return err
	}
	list, err := parseExpected(string(text))
	if err != nil {
		return err
	}
	var found []*line
	if err := n.EachLogLine(func(text string) {
		if l := parseLine(text, n.begun.Year()); l != nil {
			found = append(found, l)
		}
	}); err != nil {
		return err
	}
	bad := judge(found, n.Restarts, list)
	if len(bad) == 0 {
		return nil
	}
	return errors.New(strings.Join(bad, "\n     "))
}
