package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
)

// target is what Naru promises of one metric, against the first runtime of a
// comparison (ratio) or as it stands (limit).
type target struct {
	measure, metric string
	ratio           float64 // at most this times the first runtime's figure; for rates at least
	limit           float64 // at most this
}

// targets are those of the project's first milestone.
var targets = []target{
	{measure: "pod", metric: "RunPodSandbox p50", ratio: 1. / 15},
	{measure: "pod", metric: "CreateContainer p50", ratio: 1. / 3},
	{measure: "pod", metric: "StartContainer p50", ratio: 1. / 20},
	{measure: "pod", metric: "ready p50", ratio: 1. / 15},
	{measure: "pod", metric: "teardown p50", ratio: 1. / 8},
	{measure: "exec", metric: "ExecSync p50", ratio: 1. / 12},
	{measure: "exec", metric: "cpu-cgroup/exec", ratio: 1. / 12},
	{measure: "density", metric: "pss/pod", ratio: 1. / 20},
	{measure: "list", metric: "ListPodSandbox p50", limit: 3},
	{measure: "list", metric: "ListContainers p50", limit: 3},
	{measure: "list", metric: "PodSandboxStatus p50", limit: 3},
	{measure: "list", metric: "ContainerStatus p50", limit: 3},
	{measure: "list", metric: "ListContainerStats p50", limit: 3},
	{measure: "list", metric: "ListPodSandboxStats p50", limit: 3},
	{measure: "log", metric: "log-rate p50", ratio: 10},
}

// verdict of one row: the target in words, and whether it was met.
func (t target) verdict(row ComparedMetric) (want string, met bool) {
	if t.limit > 0 {
		last := row.Medians[len(row.Medians)-1]
		return fmt.Sprintf("≤ %s %s", number(t.limit), row.Unit), last != nil && *last <= t.limit
	}
	q := row.Ratios[len(row.Ratios)-1]
	if t.ratio > 1 {
		return fmt.Sprintf("≥ %s ×", number(t.ratio)), q != nil && q.Median >= t.ratio
	}
	return fmt.Sprintf("≤ 1/%s", number(1/t.ratio)), q != nil && q.Median <= t.ratio
}

func reportCommand(args []string) error {
	fs := flag.NewFlagSet("report", flag.ContinueOnError)
	all := fs.Bool("all", false, "every metric, not only those with a target")
	enforce := fs.Bool("enforce", false, "fail if a target is missed")
	if err := fs.Parse(args); err != nil {
		return errUsage
	}
	if fs.NArg() != 1 {
		return fmt.Errorf("%w: report needs one JSON file of a compare run", errUsage)
	}
	b, err := os.ReadFile(fs.Arg(0))
	if err != nil {
		return err
	}
	var r Report
	if err := json.Unmarshal(b, &r); err != nil {
		return fmt.Errorf("%s: %w", fs.Arg(0), err)
	}
	if len(r.Compared) == 0 || len(r.Runtimes) < 2 {
		return fmt.Errorf("%s is not the result of a compare run", fs.Arg(0))
	}
	missed := writeReport(os.Stdout, &r, *all)
	if *enforce && missed > 0 {
		return fmt.Errorf("%d targets missed", missed)
	}
	return nil
}

// writeReport writes the comparison as a Markdown table and counts the
// targets that were missed or not measured.
func writeReport(w io.Writer, r *Report, all bool) (missed int) {
	fmt.Fprintf(w, "Measured %s on %v CPUs, kernel %v, cgroup %v.\n\n", r.Started.Format("2006-01-02"), r.Host["cpus"], r.Host["kernel"], r.Host["cgroup"])
	head, line := "| measure | metric | unit |", "|---|---|---|"
	for _, t := range r.Runtimes {
		version := strings.TrimSuffix(strings.TrimPrefix(t.Software, t.Name+" "), " (CRI v1)")
		head += fmt.Sprintf(" %s %s |", t.Name, version)
		line += "---:|"
	}
	fmt.Fprintf(w, "%s ratio (range) | target |\n%s---:|---|\n", head, line)
	for _, row := range r.Compared {
		i := slices.IndexFunc(targets, func(t target) bool { return t.measure == row.Measure && t.metric == row.Metric })
		if i < 0 && !all {
			continue
		}
		cells := []string{row.Measure, row.Metric, row.Unit}
		for _, m := range row.Medians {
			cells = append(cells, optionalNumber(m))
		}
		cells = append(cells, ratioCell(row))
		want := ""
		if i >= 0 {
			text, met := targets[i].verdict(row)
			if want = text + ": met"; !met {
				want = text + ": **missed**"
				missed++
			}
		}
		fmt.Fprintf(w, "| %s | %s |\n", strings.Join(cells, " | "), want)
	}
	var absent []string
	for _, t := range targets {
		if !slices.ContainsFunc(r.Compared, func(row ComparedMetric) bool { return row.Measure == t.measure && row.Metric == t.metric }) {
			absent = append(absent, t.measure+" "+t.metric)
			missed++
		}
	}
	if len(absent) > 0 {
		fmt.Fprintf(w, "\nNot measured: %s.\n", strings.Join(absent, ", "))
	}
	if r.Error != "" {
		fmt.Fprintf(w, "\nThe run had errors: %s\n", r.Error)
	}
	return missed
}

func optionalNumber(v *float64) string {
	if v == nil {
		return "n/a"
	}
	return number(*v)
}

// ratioCell shows the last runtime against the first, as "1/N" where smaller
// is better and N is above one.
func ratioCell(row ComparedMetric) string {
	if len(row.Ratios) == 0 || row.Ratios[len(row.Ratios)-1] == nil {
		return "n/a"
	}
	q := row.Ratios[len(row.Ratios)-1]
	if q.Median > 0 && q.Median < 1 {
		return fmt.Sprintf("1/%.1f (1/%.1f–1/%.1f)", 1/q.Median, 1/q.Max, 1/q.Min)
	}
	return fmt.Sprintf("%.2f (%.2f–%.2f)", q.Median, q.Min, q.Max)
}
