package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/naru-project/naru/hack/e2e"
	batchv1 "k8s.io/api/batch/v1"
	v1 "k8s.io/api/core/v1"
)

func (c *cluster) deploymentChecks(ctx context.Context) {
	c.page.Part("Deployments", func() error {
		if err := c.rolledOut(ctx, "deployment/web"); err != nil {
			return err
		}
		return e2e.Eventually(ctx, 10*time.Second, func() error { // kube-proxy knows
			return errors.Join(fetch(ctx, "http://"+c.nodes[0].ip4+":30080/"), fetch(ctx, "http://"+c.nodes[1].ip4+":30080/"))
		})
	})
	c.page.Check(ctx, "a rollout under requests from outside: each is answered, until the old pods are gone", once(func() error {
		ctx, end := context.WithCancel(ctx)
		defer end()
		failed := make(chan []error)
		go func() { failed <- c.keepAsking(ctx) }()
		_, err := c.kubectl(ctx, "set", "env", "deployment/web", "ROUND="+strconv.FormatInt(time.Now().Unix(), 10))
		if err == nil {
			err = c.scale(ctx, "web", 3) // as it was; until the last of the old pods is gone
		}
		end()
		return errors.Join(append(<-failed, err)...)
	}))
	undo := once(func() error {
		_, err := c.kubectl(ctx, "rollout", "undo", "deployment/web")
		return err
	})
	c.page.Check(ctx, "the rollout undone", func() error {
		if err := undo(); err != nil {
			return err
		}
		if err := c.rolledOut(ctx, "deployment/web"); err != nil {
			return err
		}
		pods, err := c.pods(ctx, "web")
		if err != nil {
			return err
		}
		for _, p := range pods {
			if len(p.Spec.Containers[0].Env) > 0 {
				return fmt.Errorf("%s has %+v", p.Name, p.Spec.Containers[0].Env)
			}
		}
		return nil
	})
	c.page.Check(ctx, "scaled to 30: all ready, each with addresses of its own", func() error { return c.scale(ctx, "web", 30) })
	c.page.Check(ctx, "and back to 3", func() error { return c.scale(ctx, "web", 3) })
	c.page.Check(ctx, "a DaemonSet is restarted, one pod on each node", func() error {
		if _, err := c.kubectl(ctx, "rollout", "restart", "daemonset/client"); err != nil {
			return err
		}
		if err := c.rolledOut(ctx, "daemonset/client"); err != nil {
			return err
		}
		for _, n := range c.nodes {
			if _, err := c.on(ctx, n, "client"); err != nil {
				return err
			}
		}
		return nil
	})
}

// once makes of do what is done once, however often it is tried: a second time would
// be about something else, or hide what was wrong in the first.
func once(do func() error) func() error { return sync.OnceValue(do) }

// keepAsking asks the NodePort of web until ctx ends and returns what went wrong.
func (c *cluster) keepAsking(ctx context.Context) (failed []error) {
	for i := 0; ctx.Err() == nil; i++ {
		if err := fetch(ctx, "http://"+c.nodes[i%len(c.nodes)].ip4+":30080/"); err != nil && ctx.Err() == nil {
			failed = append(failed, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	return failed
}

// scale scales a Deployment and waits until there are exactly so many pods, ready,
// and gone are those that are too many.
func (c *cluster) scale(ctx context.Context, name string, count int) error {
	if _, err := c.kubectl(ctx, "scale", "deployment/"+name, fmt.Sprintf("--replicas=%d", count)); err != nil {
		return err
	}
	if err := c.rolledOut(ctx, "deployment/"+name); err != nil {
		return err
	}
	return e2e.Eventually(ctx, 2*time.Minute, func() error {
		var list v1.PodList
		if err := c.get(ctx, "/api/v1/namespaces/e2e/pods?labelSelector=app%3D"+name, &list); err != nil {
			return err
		}
		seen := map[netip.Addr]string{}
		for _, p := range list.Items {
			for _, ip := range p.Status.PodIPs {
				a, err := netip.ParseAddr(ip.IP)
				if err != nil {
					return err
				}
				if seen[a] != "" {
					return fmt.Errorf("%s and %s have %s", p.Name, seen[a], a)
				}
				seen[a] = p.Name
			}
		}
		if len(list.Items) != count || len(seen) != 2*count {
			return fmt.Errorf("%d pods with %d addresses, want %d with %d", len(list.Items), len(seen), count, 2*count)
		}
		return nil
	})
}

func (c *cluster) jobChecks(ctx context.Context) {
	c.page.Part("Jobs", func() error { return c.apply(ctx, "jobs") })
	c.page.Check(ctx, "a Job of four parts, two at a time", func() error {
		if _, err := c.kubectl(ctx, "wait", "--for=condition=Complete", "job/four", "--timeout=60s"); err != nil {
			return err
		}
		out, err := c.kubectl(ctx, "logs", "-l", "app=four")
		said := strings.Split(out, "\n")
		slices.Sort(said)
		return errors.Join(err, e2e.Want("logs", strings.Join(said, ", "), "did part 0, did part 1, did part 2, did part 3"))
	})
	c.page.Check(ctx, "a Job that fails by an exit code, with its last words", func() error {
		if _, err := c.kubectl(ctx, "wait", "--for=condition=Failed", "job/fails", "--timeout=60s"); err != nil {
			return err
		}
		var job batchv1.Job
		if err := c.get(ctx, "/apis/batch/v1/namespaces/e2e/jobs/fails", &job); err != nil {
			return err
		}
		pods, err := c.pods(ctx, "fails")
		if err != nil {
			return err
		}
		if len(pods) != 1 || pods[0].Status.ContainerStatuses[0].State.Terminated == nil {
			return fmt.Errorf("%d pods, %+v", len(pods), job.Status)
		}
		t := pods[0].Status.ContainerStatuses[0].State.Terminated
		return errors.Join(e2e.Want("exit code", strconv.Itoa(int(t.ExitCode)), "42"), e2e.Want("message", strings.TrimSpace(t.Message), "cannot"))
	})
	c.page.Check(ctx, "kubectl run --rm -i: what goes in comes out", func() error {
		out, err := c.kubectlWith(ctx, "in and out\n", "run", "once", "--rm", "-i", "--quiet", "--restart=Never", "--image=localhost/demo/busybox:1", "--", "cat")
		if err != nil {
			_, _ = c.kubectl(ctx, "delete", "pod", "once", "--ignore-not-found", "--now")
		}
		return errors.Join(err, e2e.Want("output", out, "in and out"))
	})
}

func (c *cluster) drainChecks(ctx context.Context) {
	c.page.Part("A node out of service", nil)
	c.page.Check(ctx, "drained: its pods go, and are ready on the other node", func() error {
		if _, err := c.kubectl(ctx, "drain", c.nodes[1].Name, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=120s"); err != nil {
			return err
		}
		for _, d := range []string{"web", "single"} {
			if err := c.rolledOut(ctx, "deployment/"+d); err != nil {
				return err
			}
			if pod, err := c.on(ctx, c.nodes[1], d); err == nil {
				return fmt.Errorf("%s is still on %s", pod, c.nodes[1].Name)
			}
		}
		return nil
	})
	c.page.Check(ctx, "and in service again: the Service from its pod", func() error {
		if _, err := c.kubectl(ctx, "uncordon", c.nodes[1].Name); err != nil {
			return err
		}
		address, err := c.service(ctx, "single", v1.IPv4Protocol)
		if err != nil {
			return err
		}
		client, err := c.on(ctx, c.nodes[1], "client")
		if err != nil {
			return err
		}
		return c.greets(ctx, client, address)
	})
}

func (c *cluster) manyChecks(ctx context.Context) {
	if c.opts.replicas == 0 {
		return
	}
	c.page.Part("Many", func() error { return c.apply(ctx, "many") })
	c.page.Check(ctx, fmt.Sprintf("a Deployment from nothing to %d", c.opts.replicas), func() error { return c.scale(ctx, "many", c.opts.replicas) })
	c.page.Check(ctx, "and back", func() error { return c.scale(ctx, "many", 0) })
}

func (c *cluster) endChecks(ctx context.Context) {
	c.page.Part("The end", nil)
	c.page.Check(ctx, "everything is deleted", func() error {
		_, err := c.kubectl(ctx, "delete", "namespace", "e2e", "--wait", "--timeout=180s", "--ignore-not-found")
		return err
	})
	for _, n := range c.nodes {
		// A kubelet looks for sandboxes that nobody needs once a minute.
		c.page.Check(ctx, "nothing is left of it on "+n.Name, func() error {
			return e2e.Eventually(ctx, 2*time.Minute, func() error { return n.empty(ctx) })
		})
	}
	c.page.Part("The kubelets' logs", c.stop)
	for _, n := range c.nodes {
		c.page.Check(ctx, "no complaint of "+n.Name+" about its runtime but those that are expected", func() error { return n.JudgeLog(c.opts.expected) })
	}
}
