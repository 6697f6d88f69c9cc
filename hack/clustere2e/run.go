package main

import (
	"cmp"
	"context"
	"embed"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/naru-project/naru/hack/e2e"
)

//go:embed manifests/*.yaml
var manifests embed.FS

func run(ctx context.Context, o options) (err error) {
	c := newCluster(o)
	defer func() { err = errors.Join(err, c.stop()) }()
	c.page.Part("A cluster", func() error {
		if err := c.startControl(ctx); err != nil {
			return err
		}
		for _, n := range c.nodes {
			if err := c.startNode(ctx, n); err != nil {
				return err
			}
		}
		_, err := c.kubectl(ctx, "create", "namespace", "e2e")
		return err
	})
	c.nodeChecks(ctx)
	for _, part := range []struct {
		name   string
		checks func(context.Context)
	}{
		{"services", c.serviceChecks}, {"deployments", c.deploymentChecks}, {"jobs", c.jobChecks}, {"volumes", c.volumeChecks}, {"classes", c.classChecks},
		{"resize", c.resizeChecks}, {"streams", c.streamChecks}, {"drain", c.drainChecks}, {"many", c.manyChecks},
	} {
		if o.parts == "" || slices.Contains(strings.Split(o.parts, ","), part.name) {
			part.checks(ctx)
		}
	}
	c.endChecks(ctx)
	if err := c.table(); err != nil {
		return errors.Join(err, c.page.Write(o.results))
	}
	return c.page.Write(o.results)
}

// table adds how long pods took to start, as their kubelets saw it.
func (c *cluster) table() error {
	all, err := c.startups()
	if err != nil {
		return err
	}
	slices.SortFunc(all, func(a, b startup) int { return cmp.Compare(a.pod, b.pod) })
	var many []startup
	c.page.Table("From a pod's creation to where its kubelet has seen it run", "pod", "seconds", "without pulling of images")
	for _, s := range all {
		if strings.HasPrefix(s.pod, "e2e/many-") {
			many = append(many, s)
			continue
		}
		c.page.Row(strings.TrimPrefix(s.pod, "e2e/"), seconds(s.whole), seconds(s.withoutPull))
	}
	if len(many) == 0 {
		return nil
	}
	c.page.Table(fmt.Sprintf("The same of a Deployment of %d, scaled up from nothing", len(many)), "", "p50", "p90", "p99", "slowest")
	for _, row := range []struct {
		name string
		of   func(startup) time.Duration
	}{{"seconds", func(s startup) time.Duration { return s.whole }}, {"without pulling of images", func(s startup) time.Duration { return s.withoutPull }}} {
		var took []time.Duration
		for _, s := range many {
			took = append(took, row.of(s))
		}
		slices.Sort(took)
		cells := []string{row.name}
		for _, p := range []int{50, 90, 99, 100} {
			cells = append(cells, seconds(percentile(took, p)))
		}
		fmt.Printf("     start of %d pods, %s: p50 %s, p90 %s, p99 %s, slowest %s\n", len(took), cells[0], cells[1], cells[2], cells[3], cells[4])
		c.page.Row(cells...)
	}
	return nil
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.2f", d.Seconds()) }

const greeting = "<h1>Hello from a pod</h1>"

// on returns a node's pod of the label app.
func (c *cluster) on(ctx context.Context, n *node, app string) (string, error) {
	pods, err := c.pods(ctx, app)
	for _, p := range pods {
		if p.Spec.NodeName == n.Name {
			return p.Name, err
		}
	}
	return "", errors.Join(err, fmt.Errorf("%s has no pod of %s", n.Name, app))
}

// greets says whether a pod gets the page of the demo's nginx from an address.
func (c *cluster) greets(ctx context.Context, from, address string) error {
	out, err := c.sh(ctx, from, "timeout 5 wget -qO- http://"+address+"/")
	return errors.Join(err, e2e.Want(from+" asks "+address, out, greeting))
}

// bracketed is an address as URLs have it.
func bracketed(ip string) string {
	if strings.Contains(ip, ":") {
		return "[" + ip + "]"
	}
	return ip
}
