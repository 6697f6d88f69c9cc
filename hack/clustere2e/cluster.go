package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/naru-project/naru/hack/e2e"
	v1 "k8s.io/api/core/v1"
)

// Addresses. The control plane's and the nodes' are those that hack/cluster-e2e.sh
// gives to their network namespaces.
const (
	controlIP  = "192.0.2.10"
	apiURL     = "https://" + controlIP + ":6443"
	podRange   = "10.244.0.0/16,fd00:10:244::/56"
	serviceNet = "10.96.0.0/16,fd00:10:96::/112"
	apiService = "10.96.0.1"
	dnsService = "10.96.0.10"
)

// cluster is the control plane and its nodes.
type cluster struct {
	opts    options
	page    *e2e.Page
	ca      *authority
	api     *http.Client
	daemons []*e2e.Process // in the order of their start
	nodes   []*node
	ranges  []string // of the pods, the first of each node
}

// node is a node with the address families apart.
type node struct {
	*e2e.Node
	ip4, ip6 string
	link     string // the control plane's end of the link to it
}

func newCluster(o options) *cluster {
	c := &cluster{opts: o}
	for i, name := range []string{"a", "b"} {
		n := &node{ip4: fmt.Sprintf("198.51.100.%d", 11+i), ip6: fmt.Sprintf("2001:db8::%d", 11+i), link: "to-" + name}
		n.Node = e2e.NewNode(e2e.Node{
			Name: "node-" + name, IP: n.ip4 + "," + n.ip6, Work: filepath.Join(o.work, name), Bin: o.bin,
			CgroupRoot: "/" + o.run + "-" + name + "-pods", Enter: []string{"nsenter", "--net=" + filepath.Join(o.work, "netns-"+name)},
		})
		c.nodes = append(c.nodes, n)
	}
	c.page = e2e.NewPage("A cluster on naru", "cluster-e2e", c.alive)
	return c
}

func (c *cluster) alive() error {
	var errs []error
	for _, d := range c.daemons {
		errs = append(errs, d.Ended())
	}
	for _, n := range c.nodes {
		errs = append(errs, n.Naru.Ended(), n.Kubelet.Ended())
	}
	return errors.Join(errs...)
}

// stop ends all daemons, the last one first.
func (c *cluster) stop() error {
	var errs []error
	for _, n := range c.nodes {
		errs = append(errs, n.Stop())
	}
	for _, d := range slices.Backward(c.daemons) {
		errs = append(errs, d.Stop(syscall.SIGTERM))
	}
	return errors.Join(errs...)
}

// start starts a daemon of the control plane, or of a node.
func (c *cluster) start(ctx context.Context, log string, args ...string) error {
	p := e2e.NewProcess(c.opts.work, log)
	c.daemons = append(c.daemons, p)
	return p.Start(exec.CommandContext(context.WithoutCancel(ctx), args[0], args[1:]...))
}

func (c *cluster) program(name string) string { return filepath.Join(c.opts.bin, name) }

// startControl starts the control plane as kubeadm would, but for what only
// several masters need.
func (c *cluster) startControl(ctx context.Context) (err error) {
	if c.ca, err = newAuthority(filepath.Join(c.opts.work, "pki")); err != nil {
		return err
	}
	admin, err := c.ca.kubeconfig("admin", "admin", "system:masters")
	if err != nil {
		return err
	}
	if err := errors.Join(os.Setenv("KUBECONFIG", admin), os.Setenv("KUBECACHEDIR", filepath.Join(c.opts.work, "kubectl")), c.connect()); err != nil {
		return err
	}
	manager, err := c.ca.kubeconfig("controller-manager", "system:kube-controller-manager")
	if err != nil {
		return err
	}
	scheduler, err := c.ca.kubeconfig("scheduler", "system:kube-scheduler")
	if err != nil {
		return err
	}
	if err := errors.Join(c.ca.client("to-kubelets", "kube-apiserver", "system:masters"),
		c.ca.server("apiserver", controlIP, apiService, "127.0.0.1", "kubernetes.default.svc"),
		c.ca.server("accounts")); err != nil { // only its key is used, to sign tokens with
		return err
	}
	const etcd = "http://127.0.0.1:2379"
	if err := c.start(ctx, "etcd", c.program("etcd"), "--data-dir="+filepath.Join(c.opts.work, "etcd"), "--unsafe-no-fsync",
		"--listen-client-urls="+etcd, "--advertise-client-urls="+etcd, "--listen-peer-urls=http://127.0.0.1:2380"); err != nil {
		return err
	}
	if err := c.start(ctx, "kube-apiserver", c.program("kube-apiserver"), "--etcd-servers="+etcd, "--bind-address="+controlIP, "--advertise-address="+controlIP,
		"--service-cluster-ip-range="+serviceNet, "--client-ca-file="+c.ca.file("ca.crt"),
		"--tls-cert-file="+c.ca.file("apiserver.crt"), "--tls-private-key-file="+c.ca.file("apiserver.key"),
		"--kubelet-client-certificate="+c.ca.file("to-kubelets.crt"), "--kubelet-client-key="+c.ca.file("to-kubelets.key"),
		"--kubelet-preferred-address-types=InternalIP",
		"--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file="+c.ca.file("accounts.crt"),
		"--service-account-signing-key-file="+c.ca.file("accounts.key"),
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged"); err != nil {
		return err
	}
	if err := e2e.Eventually(ctx, 2*time.Minute, func() error { return errors.Join(c.alive(), c.get(ctx, "/readyz", nil)) }); err != nil {
		return err
	}
	if err := c.start(ctx, "kube-controller-manager", c.program("kube-controller-manager"), "--kubeconfig="+manager, "--leader-elect=false",
		"--bind-address=127.0.0.1", "--use-service-account-credentials", "--service-account-private-key-file="+c.ca.file("accounts.key"),
		"--root-ca-file="+c.ca.file("ca.crt"), "--allocate-node-cidrs", "--cluster-cidr="+podRange, "--service-cluster-ip-range="+serviceNet); err != nil {
		return err
	}
	return c.start(ctx, "kube-scheduler", c.program("kube-scheduler"), "--kubeconfig="+scheduler, "--leader-elect=false", "--bind-address=127.0.0.1")
}

// clustered are the lines of the configuration of a kubelet in a cluster: the
// authority, the address of DNS.
const clustered = `authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: %q}}
authorization: {mode: Webhook}
clusterDNS: [%s]
clusterDomain: cluster.local
`

const proxyConfig = `apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
clientConnection: {kubeconfig: %q}
clusterCIDR: %q
hostnameOverride: %s
healthzBindAddress: 127.0.0.1:10256
metricsBindAddress: 127.0.0.1:10249
oomScoreAdj: 0
conntrack: {maxPerCore: 0, min: 0} # a setting of the whole machine
`

// startNode starts naru, the kubelet and kube-proxy of a node, and waits until the
// API server says that it is ready.
func (c *cluster) startNode(ctx context.Context, n *node) error {
	if err := n.StartNaru(ctx); err != nil {
		return err
	}
	config, err := c.ca.kubeconfig(n.Name, "system:node:"+n.Name, "system:nodes")
	if err != nil {
		return err
	}
	if err := n.StartKubelet(ctx, e2e.KubeletOptions{
		Dropins: c.opts.dropins, Gates: map[string]bool{"CRIListStreaming": true},
		Config: fmt.Sprintf(clustered, c.ca.file("ca.crt"), dnsService), Args: []string{"--kubeconfig", config},
		Healthy: func(ctx context.Context) error { return c.get(ctx, "/api/v1/nodes/"+n.Name, nil) },
	}); err != nil {
		return err
	}
	if config, err = c.ca.kubeconfig("proxy-"+n.Name, "system:kube-proxy"); err != nil {
		return err
	}
	file := filepath.Join(n.Work, "proxy.yaml")
	if err := os.WriteFile(file, fmt.Appendf(nil, proxyConfig, config, podRange, n.Name), 0o600); err != nil {
		return err
	}
	return c.start(ctx, "kube-proxy-"+n.Name, append(slices.Clone(n.Enter), c.program("kube-proxy"), "--config="+file)...)
}

// route tells the router between the nodes, which is the control plane's network
// namespace, where the pods of each are. It is what a cloud's route controller does.
func (c *cluster) route(ctx context.Context) error {
	for _, n := range c.nodes {
		var obj v1.Node
		if err := c.get(ctx, "/api/v1/nodes/"+n.Name, &obj); err != nil {
			return err
		}
		if len(obj.Spec.PodCIDRs) != 2 {
			return fmt.Errorf("the ranges of %s are %q, want two", n.Name, obj.Spec.PodCIDRs)
		}
		c.ranges = append(c.ranges, obj.Spec.PodCIDRs[0])
		for i, via := range []string{n.ip4, n.ip6} {
			if err := command(ctx, "ip", "route", "replace", obj.Spec.PodCIDRs[i], "via", via, "dev", n.link, "onlink"); err != nil {
				return err
			}
		}
	}
	return nil
}

func command(ctx context.Context, args ...string) error {
	_, err := output(exec.CommandContext(ctx, args[0], args[1:]...))
	return err
}

// output runs a command and returns what it says, or its complaint.
func output(cmd *exec.Cmd) (string, error) {
	var complaint bytes.Buffer
	cmd.Stderr = &complaint
	b, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args[1:], " "), err, bytes.TrimSpace(complaint.Bytes()))
	}
	return strings.TrimSpace(string(b)), err
}

// connect makes the client of the API server.
func (c *cluster) connect() error {
	pair, err := tls.LoadX509KeyPair(c.ca.file("admin.crt"), c.ca.file("admin.key"))
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	text, err := os.ReadFile(c.ca.file("ca.crt"))
	if err != nil {
		return err
	}
	roots.AppendCertsFromPEM(text)
	c.api = &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS13},
	}}
	return nil
}

// get asks the API server: cheaper than a kubectl for what is asked again and again.
func (c *cluster) get(ctx context.Context, path string, into any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, apiURL+path, nil)
	if err != nil {
		return err
	}
	resp, err := c.api.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", path, resp.Status, bytes.TrimSpace(body))
	}
	if err != nil || into == nil {
		return err
	}
	return json.Unmarshal(body, into)
}

// pods returns the pods of the label app, without those that are on their way out.
func (c *cluster) pods(ctx context.Context, app string) (pods []v1.Pod, err error) {
	var list v1.PodList
	err = c.get(ctx, "/api/v1/namespaces/e2e/pods?labelSelector=app%3D"+app, &list)
	return slices.DeleteFunc(list.Items, func(p v1.Pod) bool { return p.DeletionTimestamp != nil }), err
}

// pod returns a pod by its name.
func (c *cluster) pod(ctx context.Context, name string) (*v1.Pod, error) {
	var p v1.Pod
	return &p, c.get(ctx, "/api/v1/namespaces/e2e/pods/"+name, &p)
}

// kubectl runs kubectl in namespace e2e and returns what it says.
func (c *cluster) kubectl(ctx context.Context, args ...string) (string, error) {
	return c.kubectlWith(ctx, "", args...)
}

func (c *cluster) kubectlWith(ctx context.Context, stdin string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, c.program("kubectl"), args...)
	cmd.Stdin = strings.NewReader(stdin)
	return output(cmd)
}

// sh runs a shell command in the first container of a pod.
func (c *cluster) sh(ctx context.Context, pod, script string) (string, error) {
	return c.kubectl(ctx, "exec", pod, "--", "sh", "-c", script)
}

// says compares what a shell command in a pod says.
func (c *cluster) says(ctx context.Context, pod, script, expected string) error {
	out, err := c.sh(ctx, pod, script)
	return errors.Join(err, e2e.Want(script, out, expected))
}

// apply applies one of the manifests.
func (c *cluster) apply(ctx context.Context, name string) error {
	b, err := manifests.ReadFile("manifests/" + name + ".yaml")
	if err != nil {
		return err
	}
	_, err = c.kubectlWith(ctx, string(b), "apply", "-f", "-")
	return err
}

// begin applies one of the manifests and waits until pods of it are ready.
func (c *cluster) begin(ctx context.Context, manifest string, pods ...string) error {
	if err := c.apply(ctx, manifest); err != nil {
		return err
	}
	return c.ready(ctx, pods...)
}

// ready waits until pods are.
func (c *cluster) ready(ctx context.Context, names ...string) error {
	for i := range names {
		names[i] = "pod/" + names[i]
	}
	_, err := c.kubectl(ctx, append([]string{"wait", "--for=condition=Ready", "--timeout=60s"}, names...)...)
	return err
}

// rolledOut waits until a Deployment or DaemonSet is what it is to be.
func (c *cluster) rolledOut(ctx context.Context, name string) error {
	_, err := c.kubectl(ctx, "rollout", "status", name, "--timeout=180s")
	return err
}
