package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"

	"github.com/naru-project/naru/internal/atomicfile"
	"github.com/naru-project/naru/internal/errs"
)

// attachmentVersion is the version of the file's form.
const attachmentVersion = 1

// attachment is the file that is there as long as a plugin may hold something
// of a pod: all that the plugins have to be told to give it back.
type attachment struct {
	Version      int            `json:"version"`
	File         string         `json:"file"`   // that the configuration came from
	Config       []byte         `json:"config"` // as it was
	Args         [][2]string    `json:"args"`
	Capabilities map[string]any `json:"capabilities,omitempty"`
}

var podID = regexp.MustCompile(`^[0-9a-f]{64}$`)

func (m *Manager) attachmentsDir() string { return filepath.Join(m.cfg.StateDir, "attachments") }

func (m *Manager) attachmentFile(id string) string {
	return filepath.Join(m.attachmentsDir(), id+".json")
}

// list reads who has an attachment.
func (m *Manager) list() ([]string, error) {
	dir := m.attachmentsDir()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, errs.New(errs.Internal, "keep the attachments of pods: %w", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, errs.New(errs.Internal, "list the attachments of pods: %w", err)
	}
	var out []string
	for _, e := range entries {
		if id, ok := strings.CutSuffix(e.Name(), ".json"); ok && podID.MatchString(id) {
			out = append(out, id)
		}
	}
	return out, nil
}

// keep writes an attachment, on the disk before anything is attached: what a
// plugin keeps outlives a power loss, too.
func (m *Manager) keep(id string, a *attachment) error {
	data, err := json.Marshal(a)
	if err == nil {
		err = atomicfile.Write(m.attachmentFile(id), data, 0o600, true)
	}
	if err != nil {
		return errs.New(errs.Internal, "keep the attachment of pod %.13s: %w", id, err)
	}
	m.mu.Lock()
	m.attached[id] = true
	m.mu.Unlock()
	return nil
}

func (m *Manager) forget(id string) error {
	err := os.Remove(m.attachmentFile(id))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return errs.New(errs.Internal, "forget the attachment of pod %.13s: %w", id, err)
	}
	m.mu.Lock()
	delete(m.attached, id)
	m.mu.Unlock()
	return nil
}

// forgetResult removes what libcni keeps of a pod whose attachment is given up.
func (m *Manager) forgetResult(id string) error {
	files, err := filepath.Glob(filepath.Join(m.cfg.StateDir, "results", "*-"+id+"-"+Link))
	all := []error{err}
	for _, f := range files {
		all = append(all, os.Remove(f))
	}
	return errors.Join(all...)
}

// kept reads an attachment.
func (m *Manager) kept(id string) (*Network, *libcni.RuntimeConf, error) {
	path := m.attachmentFile(id)
	fail := func(err error) (*Network, *libcni.RuntimeConf, error) {
		return nil, nil, errs.New(errs.Internal, "read the attachment %s of a pod (remove the file to give up what plugins hold for it): %w", path, err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return fail(err)
	}
	a, list, err := parseAttachment(data)
	if err != nil {
		return fail(err)
	}
	return &Network{File: a.File, list: list}, &libcni.RuntimeConf{ContainerID: id, IfName: Link, Args: a.Args, CapabilityArgs: a.Capabilities}, nil
}

func parseAttachment(data []byte) (*attachment, *libcni.NetworkConfigList, error) {
	a := &attachment{}
	if err := json.Unmarshal(data, a); err != nil {
		return nil, nil, err
	}
	if a.Version != attachmentVersion {
		return nil, nil, fmt.Errorf("it has version %d, this is for %d", a.Version, attachmentVersion)
	}
	list, err := parse(a.Config)
	if err == nil {
		err = validate(list)
	}
	return a, list, err
}

// Annotations of a pod that say how much it may receive and send, in bit/s.
const (
	ingressAnnotation = "kubernetes.io/ingress-bandwidth"
	egressAnnotation  = "kubernetes.io/egress-bandwidth"
)

// runtimeConf is what plugins are told of a pod.
func (n *Network) runtimeConf(p *Pod) (*libcni.RuntimeConf, error) {
	rt := &libcni.RuntimeConf{ContainerID: p.ID, NetNS: p.NetNS, IfName: Link, CapabilityArgs: map[string]any{}}
	rt.Args = [][2]string{
		{"IgnoreUnknown", "1"},
		{"K8S_POD_NAMESPACE", p.Namespace}, {"K8S_POD_NAME", p.Name}, {"K8S_POD_INFRA_CONTAINER_ID", p.ID}, {"K8S_POD_UID", p.UID},
	}
	for _, a := range rt.Args {
		if strings.ContainsFunc(a[1], func(r rune) bool { return r == ';' || r < ' ' || r == 0x7f }) {
			return nil, errs.New(errs.InvalidArgument, "%s %.80q cannot be told to a CNI plugin: it has a semicolon or a control character", a[0], a[1])
		}
	}
	if len(p.Ports) > 0 {
		rt.CapabilityArgs["portMappings"] = p.Ports
	}
	if d := p.DNS; len(d.Servers)+len(d.Searches)+len(d.Options) > 0 {
		rt.CapabilityArgs["dns"] = d
	}
	var ranges [][]map[string]string
	for _, c := range p.CIDRs {
		ranges = append(ranges, []map[string]string{{"subnet": c.String()}})
	}
	if len(ranges) > 0 {
		rt.CapabilityArgs["ipRanges"] = ranges
	}
	if !n.can("bandwidth") {
		return rt, nil
	}
	limits, err := bandwidth(p.Annotations)
	if err != nil {
		return nil, err
	}
	if len(limits) > 0 {
		rt.CapabilityArgs["bandwidth"] = limits
	}
	return rt, nil
}

// Limits of a bandwidth, as the kubelet has them: 1k to 1P.
const (
	minRate = 1000
	maxRate = 1000 * 1000 * 1000 * 1000 * 1000
	// A burst is what may be sent at once: one second's worth, at least some
	// packets, at most what the plugin takes (32 bits).
	minBurst = 64 << 10 * 8
	maxBurst = 1<<32 - 1
)

// bandwidth is the capability of that name: rates and bursts in bits.
func bandwidth(annotations map[string]string) (map[string]uint64, error) {
	out := map[string]uint64{}
	for _, d := range []struct{ key, name string }{{ingressAnnotation, "ingress"}, {egressAnnotation, "egress"}} {
		text, ok := annotations[d.key]
		if !ok {
			continue
		}
		rate, err := quantity(text)
		if err != nil || rate < minRate || rate > maxRate {
			return nil, errs.New(errs.InvalidArgument, "annotation %s: %.40q is no rate of 1k to 1P bit/s, such as 10M", d.key, text)
		}
		out[d.name+"Rate"] = rate
		out[d.name+"Burst"] = min(max(rate, minBurst), maxBurst)
	}
	return out, nil
}

// suffixes of a Kubernetes quantity that make it larger.
var suffixes = []struct {
	text   string
	factor float64
}{
	{"Ki", 1 << 10}, {"Mi", 1 << 20}, {"Gi", 1 << 30}, {"Ti", 1 << 40}, {"Pi", 1 << 50}, {"Ei", 1 << 60},
	{"k", 1e3}, {"M", 1e6}, {"G", 1e9}, {"T", 1e12}, {"P", 1e15}, {"E", 1e18}, {"m", 1e-3}, {"u", 1e-6}, {"n", 1e-9},
}

var quantityNumber = regexp.MustCompile(`^[+]?([0-9]+[.]?[0-9]*|[.][0-9]+)([eE][+-]?[0-9]{1,2})?$`)

// quantity reads a Kubernetes quantity and rounds it up.
func quantity(text string) (uint64, error) {
	factor := 1.0
	for _, s := range suffixes {
		if cut, ok := strings.CutSuffix(text, s.text); ok {
			text, factor = cut, s.factor
			break
		}
	}
	bad := errors.New("it is no quantity")
	if len(text) > 40 || !quantityNumber.MatchString(text) {
		return 0, bad
	}
	v, err := strconv.ParseFloat(text, 64)
	if v *= factor; err != nil || v < 0 || v > 1<<62 {
		return 0, bad
	}
	n := uint64(v)
	if float64(n) < v {
		n++
	}
	return n, nil
}

// result takes of a plugin's answer what is believed: addresses that a pod can
// have, and names of interfaces that are in the pod. Its paths are not used.
func (n *Network) result(r types.Result) (*Attachment, error) {
	fail := func(format string, args ...any) (*Attachment, error) {
		return nil, errs.New(errs.Unavailable, "the result of CNI network %q: %w", n.Name(), fmt.Errorf(format, args...))
	}
	if r == nil {
		return fail("there is none")
	}
	res, err := types100.NewResultFromResult(r)
	if err != nil {
		return fail("%w", err)
	}
	if len(res.IPs) > maxIPs || len(res.Interfaces) > maxInterfaces {
		return fail("%d addresses and %d interfaces, more than %d and %d", len(res.IPs), len(res.Interfaces), maxIPs, maxInterfaces)
	}
	a := &Attachment{Network: n.Name(), File: n.File}
	for _, i := range res.Interfaces {
		if i == nil {
			return fail("an interface is null")
		}
		if i.Sandbox == "" {
			continue // of the host
		}
		if i.Name == "" || len(i.Name) > 15 || strings.ContainsFunc(i.Name, func(r rune) bool { return r <= ' ' || r > '~' || r == '/' }) {
			return fail("interface name %.40q", i.Name)
		}
		a.Interfaces = append(a.Interfaces, i.Name)
	}
	var others []netip.Addr
	for _, c := range res.IPs {
		if c == nil {
			return fail("an address is null")
		}
		ip, ok := netip.AddrFromSlice(c.Address.IP)
		ip = ip.Unmap()
		if !ok || ip.IsUnspecified() || ip.IsMulticast() || ip.IsLoopback() {
			return fail("address %.60q is none that a pod can have", c.Address.String())
		}
		if c.Interface != nil && (*c.Interface < 0 || *c.Interface >= len(res.Interfaces)) {
			return fail("address %s is of interface %d, of %d", ip, *c.Interface, len(res.Interfaces))
		}
		switch {
		case slices.Contains(a.IPs, ip) || slices.Contains(others, ip) || ip.IsLinkLocalUnicast() && ip.Is6():
		case c.Interface == nil || res.Interfaces[*c.Interface].Name == Link && res.Interfaces[*c.Interface].Sandbox != "":
			a.IPs = append(a.IPs, ip)
		case res.Interfaces[*c.Interface].Sandbox != "":
			others = append(others, ip)
		}
	}
	if a.IPs = append(a.IPs, others...); len(a.IPs) == 0 {
		return fail("it has no address of the pod")
	}
	return a, nil
}
