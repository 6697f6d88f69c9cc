package main

import (
	"math"
	"regexp"
	"slices"
	"strconv"
	"time"
)

// startup is how long a pod took to start, as its kubelet saw it: from its creation
// until the kubelet has seen it running, and the same without the pulling of images.
type startup struct {
	pod                string
	whole, withoutPull time.Duration
}

var (
	startupLine = regexp.MustCompile(`"Observed pod startup duration" pod="([^"]+)"`)
	startupSLO  = regexp.MustCompile(` podStartSLOduration=([0-9.e+-]+)`)
	startupE2E  = regexp.MustCompile(` podStartE2EDuration="([^"]+)"`)
)

// parseStartup reads a line of the kubelet's log; ok says whether it is of a pod's start.
func parseStartup(line string) (s startup, ok bool) {
	m, slo, whole := startupLine.FindStringSubmatch(line), startupSLO.FindStringSubmatch(line), startupE2E.FindStringSubmatch(line)
	if m == nil || slo == nil || whole == nil {
		return s, false
	}
	seconds, err := strconv.ParseFloat(slo[1], 64)
	if err != nil || math.Abs(seconds) > time.Hour.Seconds() {
		return s, false
	}
	s.whole, err = time.ParseDuration(whole[1])
	s.pod, s.withoutPull = m[1], time.Duration(seconds*float64(time.Second))
	return s, err == nil
}

// percentile returns the smallest of the durations that p percent are not above.
func percentile(sorted []time.Duration, p int) time.Duration {
	return sorted[max(0, (len(sorted)*p+99)/100-1)]
}

// startups returns what the kubelets have noted of all pods, the first of each: the
// log of a kubelet that was started again has them once more.
func (c *cluster) startups() (all []startup, err error) {
	for _, n := range c.nodes {
		err := n.EachLogLine(func(line string) {
			if s, ok := parseStartup(line); ok && !slices.ContainsFunc(all, func(o startup) bool { return o.pod == s.pod }) {
				all = append(all, s)
			}
		})
		if err != nil {
			return nil, err
		}
	}
	return all, nil
}
