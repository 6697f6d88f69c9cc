package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/naru-project/naru/hack/e2e"
	v1 "k8s.io/api/core/v1"
)

func (c *cluster) nodeChecks(ctx context.Context) {
	c.page.Check(ctx, "both nodes are ready", func() error {
		for _, n := range c.nodes {
			var obj v1.Node
			if err := c.get(ctx, "/api/v1/nodes/"+n.Name, &obj); err != nil {
				return err
			}
			i := slices.IndexFunc(obj.Status.Conditions, func(c v1.NodeCondition) bool { return c.Type == v1.NodeReady })
			if i < 0 || obj.Status.Conditions[i].Status != v1.ConditionTrue {
				return fmt.Errorf("%s: %+v", n.Name, obj.Status.Conditions)
			}
			if !strings.HasPrefix(obj.Status.NodeInfo.ContainerRuntimeVersion, "naru://") {
				return fmt.Errorf("the runtime of %s is %s", n.Name, obj.Status.NodeInfo.ContainerRuntimeVersion)
			}
		}
		return nil
	})
	c.page.Check(ctx, "what naru can do is in the nodes' status", func() error {
		for _, n := range c.nodes {
			var obj v1.Node
			if err := c.get(ctx, "/api/v1/nodes/"+n.Name, &obj); err != nil {
				return err
			}
			i := slices.IndexFunc(obj.Status.RuntimeHandlers, func(h v1.NodeRuntimeHandler) bool { return h.Name == "naru" })
			if i < 0 {
				return fmt.Errorf("no handler naru on %s: %+v", n.Name, obj.Status.RuntimeHandlers)
			}
			if f := obj.Status.RuntimeHandlers[i].Features; f == nil || f.UserNamespaces == nil || !*f.UserNamespaces || f.RecursiveReadOnlyMounts == nil || !*f.RecursiveReadOnlyMounts {
				return fmt.Errorf("features on %s: %+v", n.Name, f)
			}
			if f := obj.Status.Features; f == nil || f.SupplementalGroupsPolicy == nil || !*f.SupplementalGroupsPolicy {
				return fmt.Errorf("features of %s: %+v", n.Name, f)
			}
		}
		return nil
	})
	c.page.Check(ctx, "pods have addresses of the ranges that the control plane gave to their nodes", func() error {
		if len(c.ranges) == 0 {
			if err := errors.Join(c.route(ctx), c.apply(ctx, "services")); err != nil {
				return err
			}
		}
		if err := c.rolledOut(ctx, "daemonset/client"); err != nil {
			return err
		}
		pods, err := c.pods(ctx, "client")
		if err != nil {
			return err
		}
		for i, n := range c.nodes {
			p := pods[slices.IndexFunc(pods, func(p v1.Pod) bool { return p.Spec.NodeName == n.Name })]
			ip, err := netip.ParseAddr(p.Status.PodIP)
			if err != nil {
				return err
			}
			if r := netip.MustParsePrefix(c.ranges[i]); !r.Contains(ip) || len(p.Status.PodIPs) != 2 {
				return fmt.Errorf("pod %s of %s has %+v, want one of %s, and one of IPv6", p.Name, n.Name, p.Status.PodIPs, r)
			}
		}
		return nil
	})
}

func (c *cluster) serviceChecks(ctx context.Context) {
	c.page.Part("Services", nil)
	c.page.Check(ctx, "a Deployment of three has pods on both nodes", func() error {
		if err := errors.Join(c.rolledOut(ctx, "deployment/web"), c.rolledOut(ctx, "deployment/single")); err != nil {
			return err
		}
		for _, n := range c.nodes {
			if _, err := c.on(ctx, n, "web"); err != nil {
				return err
			}
		}
		return nil
	})
	c.page.Check(ctx, "no bridge on the way, and so no bridge-nf-call-iptables", func() error {
		for _, n := range c.nodes {
			out, err := output(n.inside(ctx, "sh", "-c", "ip -o link show type bridge; cat /proc/sys/net/bridge/bridge-nf-call-iptables 2>/dev/null || echo 0"))
			if err := errors.Join(err, e2e.Want(n.Name, out, "0")); err != nil {
				return err
			}
		}
		return nil
	})
	for _, family := range []v1.IPFamily{v1.IPv4Protocol, v1.IPv6Protocol} {
		named := func(what string) string { return what + ", " + string(family) }
		c.page.Check(ctx, named("a Service from a pod of another node, of its own node, and from itself"), func() error {
			address, err := c.service(ctx, "single", family)
			if err != nil {
				return err
			}
			pods, err := c.pods(ctx, "single")
			if err != nil {
				return err
			}
			from := []string{pods[0].Name}
			for _, n := range c.nodes {
				client, err := c.on(ctx, n, "client")
				if err != nil {
					return err
				}
				from = append(from, client)
			}
			for _, pod := range from {
				if err := c.greets(ctx, pod, address); err != nil {
					return err
				}
			}
			return nil
		})
		c.page.Check(ctx, named("a pod of one node reaches a pod of the other by its address, and is seen by its own"), func() error { return c.unmasked(ctx, family) })
	}
	c.page.Check(ctx, "a Service spreads requests over its three pods", func() error {
		address, err := c.service(ctx, "web", v1.IPv4Protocol)
		if err != nil {
			return err
		}
		client, err := c.on(ctx, c.nodes[0], "client")
		if err != nil {
			return err
		}
		if out, err := c.sh(ctx, client, "for i in $(seq 40); do timeout 5 wget -qO- http://"+address+"/?spread; done | grep -c Hello"); err != nil || out != "40" {
			return errors.Join(err, e2e.Want("answers", out, "40"))
		}
		pods, err := c.pods(ctx, "web")
		if err != nil {
			return err
		}
		for _, p := range pods {
			if log, err := c.kubectl(ctx, "logs", p.Name); err != nil || !strings.Contains(log, "?spread") {
				return errors.Join(err, fmt.Errorf("%s has answered nothing", p.Name))
			}
		}
		return nil
	})
	c.page.Check(ctx, "a NodePort of each node from outside", func() error {
		for _, n := range c.nodes {
			for _, ip := range []string{n.ip4, bracketed(n.ip6)} {
				if err := fetch(ctx, "http://"+ip+":30080/"); err != nil {
					return err
				}
			}
		}
		return nil
	})
	c.page.Check(ctx, "a pod's own name and the cluster's DNS in its files", func() error {
		client, err := c.on(ctx, c.nodes[0], "client")
		if err != nil {
			return err
		}
		return c.says(ctx, client, "hostname; head -2 /etc/resolv.conf", client+"\nsearch e2e.svc.cluster.local svc.cluster.local cluster.local\nnameserver "+dnsService)
	})
	c.page.Check(ctx, "a pod reaches the API server by its Service", func() error {
		client, err := c.on(ctx, c.nodes[1], "client")
		if err != nil {
			return err
		}
		// It answers who does not speak TLS, too.
		return c.says(ctx, client, `printf 'GET / HTTP/1.0\r\n\r\n' | timeout 5 nc $KUBERNETES_SERVICE_HOST $KUBERNETES_SERVICE_PORT | head -1`, "HTTP/1.0 400 Bad Request")
	})
}

// inside is a command in a node's network namespace.
func (n *node) inside(ctx context.Context, args ...string) *exec.Cmd {
	args = append(slices.Clone(n.Enter), args...)
	return exec.CommandContext(ctx, args[0], args[1:]...)
}

// service returns the address of a Service with its port.
func (c *cluster) service(ctx context.Context, name string, family v1.IPFamily) (string, error) {
	var s v1.Service
	if err := c.get(ctx, "/api/v1/namespaces/e2e/services/"+name, &s); err != nil {
		return "", err
	}
	i := slices.Index(s.Spec.IPFamilies, family)
	if i < 0 {
		return "", fmt.Errorf("service %s has the families %v", name, s.Spec.IPFamilies)
	}
	return fmt.Sprintf("%s:%d", bracketed(s.Spec.ClusterIPs[i]), s.Spec.Ports[0].Port), nil
}

// unmasked lets the client on one node ask the nginx of single, on another, and looks
// into its log for who has asked.
func (c *cluster) unmasked(ctx context.Context, family v1.IPFamily) error {
	pods, err := c.pods(ctx, "single")
	if err != nil {
		return err
	}
	clients, err := c.pods(ctx, "client")
	if err != nil {
		return err
	}
	server := pods[0]
	client := clients[slices.IndexFunc(clients, func(p v1.Pod) bool { return p.Spec.NodeName != server.Spec.NodeName })]
	i := 0
	if family == v1.IPv6Protocol {
		i = 1
	}
	if err := c.greets(ctx, client.Name, bracketed(server.Status.PodIPs[i].IP)); err != nil {
		return err
	}
	log, err := c.kubectl(ctx, "logs", server.Name, "-c", "nginx")
	if err == nil && !strings.Contains(log, "\n"+client.Status.PodIPs[i].IP+" - - ") {
		err = fmt.Errorf("%s has not been asked by %s", server.Name, client.Status.PodIPs[i].IP)
	}
	return err
}

// fetch gets the page of the demo's nginx from outside.
func fetch(ctx context.Context, address string) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return err
	}
	req.Close = true // each time a connection of its own, which finds its way anew
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	return errors.Join(err, e2e.Want(address, strings.TrimSpace(string(b)), greeting))
}
