// Package config reads Naru's configuration: one TOML file and a folder of
// drop-ins beside it, merged in the order of their names. An unknown key is an
// error that suggests the nearest known one; every value is checked, and the
// message says which file, key and value.
//
// It is a leaf: it knows no other package of Naru but the error classes.
package config

import (
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sort"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/moby/sys/capability"
	"github.com/pelletier/go-toml/v2"

	"github.com/naru-project/naru/internal/errs"
)

// DefaultPath is where the daemon looks when it is told nothing.
const DefaultPath = "/etc/naru/config.toml"

// maxSocket is the longest path of a socket: the 107 bytes of sockaddr_un, less
// what is needed to replace it safely.
const maxSocket = 100

// maxSize bounds one configuration file, in bytes.
const maxSize = 1 << 20

// Duration is a time.Duration written as "30s" or "5m".
type Duration time.Duration

// UnmarshalText reads a duration (encoding.TextUnmarshaler).
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil {
		return fmt.Errorf("%q is not a duration; write \"90s\", \"5m\" or \"1h30m\"", b)
	}
	*d = Duration(v)
	return nil
}

// MarshalText writes a duration (encoding.TextMarshaler).
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// D is the duration as the standard library has it.
func (d Duration) D() time.Duration { return time.Duration(d) }

// Config is the whole configuration. The comments are those of the file that
// `naru config default` prints; "reload" says whether a running daemon takes a
// new value (live) or only a restart does (restart).
type Config struct {
	Version  int                `toml:"version" reload:"restart" comment:"Version of this file's format. Always 1."`
	Root     string             `toml:"root" reload:"restart" comment:"Folder for what lasts over a reboot: images, writable layers, records of pods."`
	Run      string             `toml:"run" reload:"restart" comment:"Folder for what belongs to one boot: namespaces, FIFOs, sockets."`
	Socket   string             `toml:"socket" reload:"restart" comment:"CRI socket, mode 0600. kubelet: --container-runtime-endpoint=unix://<socket>."`
	SyncRecs bool               `toml:"sync_records" reload:"live" comment:"fsync the record of a pod or container at each change. Off: a power loss may take the last few records with it, which costs nothing, for no container lives through one; a crash of naru never does."`
	Log      Log                `toml:"log"`
	Network  Network            `toml:"network"`
	Images   Images             `toml:"images"`
	Cgroup   Cgroup             `toml:"cgroup"`
	Runtime  Runtime            `toml:"runtime"`
	Default  Containers         `toml:"containers"`
	CDI      CDI                `toml:"cdi"`
	Stream   Streaming          `toml:"streaming"`
	Metrics  Metrics            `toml:"metrics"`
	Tracing  Tracing            `toml:"tracing"`
	Handlers map[string]Handler `toml:"handlers" reload:"live" comment:"Further runtime handlers for RuntimeClass, by name, each a table [handlers.NAME] with kind (native, oci), path and args; \"\" and \"naru\" are built in. For example [handlers.runc] with kind = 'oci' and path = '/usr/sbin/runc'."`
}

// Log of the daemon.
type Log struct {
	Verbosity int `toml:"verbosity" reload:"live" comment:"klog verbosity: 0 says what matters, 2 each change, 4 each request."`
}

// Network of pods.
type Network struct {
	Plugin            string   `toml:"plugin" reload:"restart" comment:"What makes the network of new pods: \"builtin\"; \"cni\", which waits until there is a CNI configuration; or \"auto\": builtin until the first CNI configuration appears, from then on cni, also after it is gone (back: set \"builtin\"). Pods that exist keep what they have. The keys from pod_cidr to pool are of the built-in network; CNI plugins that ask for them get pod_cidr (ipRanges) and host ports (portMappings)."`
	PodCIDR           []string `toml:"pod_cidr" reload:"restart" comment:"Ranges for pod addresses, IPv4 and IPv6, the primary family first. [\"auto\"] waits until kubelet tells them (UpdateRuntimeConfig); until then the network is not ready."`
	MTU               int      `toml:"mtu" reload:"live" comment:"MTU of pods' interfaces; 0 = that of the interface with the default route."`
	NonMasquerade     []string `toml:"non_masquerade" reload:"live" comment:"Destinations that see pods' own addresses: put the cluster's whole pod range here. This node's own range always is one."`
	HostPorts         bool     `toml:"host_ports" reload:"restart" comment:"Publish host ports."`
	UnprivilegedPorts bool     `toml:"unprivileged_ports" reload:"live" comment:"Let any process of a pod listen on ports below 1024 (net.ipv4.ip_unprivileged_port_start=0), unless the pod's own sysctls say otherwise."`
	UnprivilegedPing  bool     `toml:"unprivileged_ping" reload:"live" comment:"Let any process of a pod use ping without CAP_NET_RAW."`
	Table             string   `toml:"nft_table" reload:"restart" comment:"Name of the nftables table (family inet) that Naru owns."`
	LinkPrefix        string   `toml:"link_prefix" reload:"restart" comment:"Beginning of the names of pods' host interfaces; two daemons on one host need different ones."`
	Pool              int      `toml:"pool" reload:"restart" comment:"How many network namespaces are kept ready for the next pods."`
	CNI               CNI      `toml:"cni"`
}

// CNI plugins.
type CNI struct {
	ConfDir        string   `toml:"conf_dir" reload:"restart" comment:"Folder with the CNI configuration; the first file by name counts (*.conflist, *.conf, *.json). It is watched. Root must own folder and files, and nobody else may write to them. Pods of one runtime handler have another one by [network.cni.handler_conf_dirs] with NAME = \"/folder\"."`
	BinDirs        []string `toml:"bin_dirs" reload:"restart" comment:"Folders with the plugins, in this order; root's alone, too."`
	Timeout        Duration `toml:"timeout" reload:"restart" comment:"A plugin that takes longer for one step of one pod is killed with its process group."`
	StatusTimeout  Duration `toml:"status_timeout" reload:"restart" comment:"The same when it is asked for its status (CNI 1.1 STATUS)."`
	StatusInterval Duration `toml:"status_interval" reload:"restart" comment:"How often it is asked for its status. What CRI's Status says of the network may be so old."`

	HandlerConfDirs map[string]string `toml:"handler_conf_dirs" reload:"restart" comment:"Folders with the CNI configuration of single runtime handlers, by name: their pods get that network, whatever network.plugin says."`
}

// Images of the node.
type Images struct {
	RegistryDirs []string `toml:"registry_dirs" reload:"live" comment:"Folders with <host>/hosts.toml files, as containerd's certs.d; read again at each pull."`
	Pinned       []string `toml:"pinned" reload:"live" comment:"Images that are never collected as garbage: names, \"*\" stands for any text."`
	Layers       int      `toml:"concurrent_layers" reload:"restart" comment:"How many layers the node transfers and unpacks at once, in all pulls together; 0 = by the number of CPUs."`
	Progress     Duration `toml:"progress_timeout" reload:"live" comment:"A transfer that gets no byte for so long is given up."`
	PullTimeout  Duration `toml:"pull_timeout" reload:"live" comment:"A pull that takes longer is given up, whatever it does."`
}

// Cgroup settings.
type Cgroup struct {
	Driver        string `toml:"driver" reload:"restart" comment:"\"cgroupfs\", \"systemd\", or \"auto\": systemd where it is PID 1 and cgroup v2 is mounted. kubelet asks for it (RuntimeConfig)."`
	DefaultParent string `toml:"default_parent" reload:"restart" comment:"Parent of containers whose pod names none; empty = /naru, or naru.slice with systemd."`
}

// Runtime settings of the native executor.
type Runtime struct {
	Monitor        string   `toml:"monitor" reload:"restart" comment:"The naru-monitor binary; empty = beside naru, then PATH. It is started when no keeper answers."`
	MonitorDir     string   `toml:"monitor_dir" reload:"restart" comment:"Folder of the monitor's socket; empty = <run>/monitor."`
	UserNamespaces bool     `toml:"user_namespaces" reload:"restart" comment:"Offer user namespaces (hostUsers: false)."`
	CRIU           string   `toml:"criu" reload:"live" comment:"Absolute path of the criu program (3.17 or newer), for CheckpointContainer; empty = no checkpoints. A checkpoint holds the container's memory, with all secrets in it."`
	HookDirs       []string `toml:"hook_dirs" reload:"live" comment:"Folders with OCI hooks (*.json as oci-hooks(5) has them, version 1.0.0), such as /usr/share/containers/oci/hooks.d and /etc/containers/oci/hooks.d; a file of a later folder goes before its namesake of an earlier one. They are read at each create. Root must own folders and files, and nobody else may write to them: hooks run as root. A file that cannot be used fails every create. [] = no hooks."`
}

// Containers settings: what containers get that is not asked for.
type Containers struct {
	Capabilities    []string `toml:"default_capabilities" reload:"live" comment:"What a container may do unless its pod adds to it or drops from it; [] = the usual set of Docker and containerd. A shorter list is the safest change to make here."`
	Env             []string `toml:"default_env" reload:"live" comment:"NAME=VALUE for every container; the image's and the pod's go before it."`
	Ulimits         []Ulimit `toml:"default_ulimits" reload:"live" comment:"Resource limits in place of the built-in ones, NAME=SOFT:HARD or NAME=BOTH, as \"nofile=1024:524288\" or \"memlock=unlimited\" (getrlimit(2)); brought below what the host allows."`
	PidsLimit       int64    `toml:"pids_limit" reload:"live" comment:"Processes and threads of one container; 0 = no limit but the pod's, which is the kubelet's (podPidsLimit)."`
	LogToJournald   bool     `toml:"log_to_journald" reload:"live" comment:"Send what containers write to systemd's journal, too, line by line; their log files stay as they are. The journal may be slow or gone: nobody waits for it, what it does not take in time is missing there. For containers to come."`
	JournaldSocket  string   `toml:"journald_socket" reload:"live" comment:"Where the journal listens, for log_to_journald."`
	DeviceOwnership bool     `toml:"device_ownership_from_security_context" reload:"live" comment:"Give the devices that a container asks for to its user and group (runAsUser, runAsGroup), not to whom they belong on the host."`
}

func (c *Containers) validate(bad func(key, format string, args ...any)) {
	for _, name := range c.Capabilities {
		if !slices.Contains(capabilityNames(), name) {
			bad("containers.default_capabilities", "%q is no capability; write it as in capabilities(7), with CAP_", name)
		}
	}
	for _, e := range c.Env {
		if name, _, ok := strings.Cut(e, "="); !ok || name == "" || strings.ContainsRune(e, 0) {
			bad("containers.default_env", "%q is not NAME=VALUE", name)
		}
	}
	if !filepath.IsAbs(c.JournaldSocket) || len(c.JournaldSocket) > maxSocket {
		bad("containers.journald_socket", "%q is not an absolute path of at most %d bytes", c.JournaldSocket, maxSocket)
	}
	if c.PidsLimit < 0 {
		bad("containers.pids_limit", "%d is negative", c.PidsLimit)
	}
}

func capabilityNames() (all []string) {
	for _, c := range capability.ListKnown() {
		all = append(all, "CAP_"+strings.ToUpper(c.String()))
	}
	return all
}

// Ulimit is one resource limit, written as NAME=SOFT:HARD.
type Ulimit struct {
	Name       string // nofile
	Soft, Hard uint64 // as the kernel counts it; math.MaxUint64 is no limit
}

// ulimitNames are the limits of getrlimit(2).
var ulimitNames = []string{
	"as", "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc", "rss", "rtprio", "rttime", "sigpending", "stack",
}

// UnmarshalText reads a limit (encoding.TextUnmarshaler).
func (u *Ulimit) UnmarshalText(b []byte) error {
	name, value, ok := strings.Cut(string(b), "=")
	if !ok || !slices.Contains(ulimitNames, name) {
		return fmt.Errorf("%q is not NAME=SOFT:HARD with a NAME of %s", b, strings.Join(ulimitNames, ", "))
	}
	soft, hard, two := strings.Cut(value, ":")
	if !two {
		hard = soft
	}
	var err error
	if u.Soft, err = ulimitValue(soft); err == nil {
		u.Hard, err = ulimitValue(hard)
	}
	switch {
	case err != nil:
		return fmt.Errorf("%q: %w", b, err)
	case u.Soft > u.Hard:
		return fmt.Errorf("%q: the soft limit is above the hard one", b)
	}
	u.Name = name
	return nil
}

func ulimitValue(s string) (uint64, error) {
	if s == "unlimited" || s == "-1" {
		return math.MaxUint64, nil
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%q is neither a number nor unlimited", s)
	}
	return n, nil
}

// MarshalText writes a limit (encoding.TextMarshaler).
func (u Ulimit) MarshalText() ([]byte, error) {
	text := func(n uint64) string {
		if n == math.MaxUint64 {
			return "unlimited"
		}
		return strconv.FormatUint(n, 10)
	}
	return []byte(u.Name + "=" + text(u.Soft) + ":" + text(u.Hard)), nil
}

// CDI devices: the Container Device Interface.
type CDI struct {
	SpecDirs    []string `toml:"spec_dirs" reload:"live" comment:"Folders with the specification files (*.yaml, *.json) of CDI devices; a later folder goes before an earlier one. Root must own folders and files, and nobody else may write to them. [] switches CDI off."`
	Annotations bool     `toml:"annotations" reload:"live" comment:"Let containers name CDI devices in annotations (cdi.k8s.io/...), past any device plugin: whoever may create pods gets any device that a specification describes."`
}

// Streaming server for exec, attach and port-forward.
type Streaming struct {
	Address string `toml:"address" reload:"restart" comment:"Where the streaming server listens: loopback; port 0 = any free one. kubelet reaches it on the same host."`
}

// Metrics of Naru itself; those of containers go by CRI.
type Metrics struct {
	Address string `toml:"address" reload:"live" comment:"Where Prometheus may scrape /metrics: a loopback address as 127.0.0.1:9640, or unix:///path of a socket for root; empty = nowhere. Counts only: no pod, container or image is named."`
}

// Tracing sends OpenTelemetry traces.
type Tracing struct {
	Endpoint   string `toml:"endpoint" reload:"restart" comment:"Collector of OpenTelemetry traces (OTLP over gRPC): host:port, as the kubelet's own, or unix:///path of a socket; empty = no traces. On this host, without TLS; to any other host with TLS, by the authorities that this host trusts."`
	PerMillion int    `toml:"sampling_rate_per_million" reload:"restart" comment:"How many of a million calls are traced whose caller does not decide that. The kubelet decides for most of its own (its tracing.samplingRatePerMillion); 0 = those only."`
}

// Handler is one runtime handler.
type Handler struct {
	Kind string   `toml:"kind" comment:"\"native\", or \"oci\": an OCI runtime (runc, crun) by its command line."`
	Path string   `toml:"path,omitempty" comment:"oci: absolute path of the runtime's program."`
	Args []string `toml:"args,omitempty" comment:"oci: global options of the program, before its command. Naru itself gives --root, --log, --log-format and, with that cgroup driver, --systemd-cgroup."`
}

// String is for messages.
func (h Handler) String() string {
	return "{" + strings.Join(append(strings.Fields(h.Kind+" "+h.Path), h.Args...), " ") + "}"
}

// Default returns the configuration of an installation without a file.
func Default() *Config {
	return &Config{
		Version: 1, Root: "/var/lib/naru", Run: "/run/naru", Socket: "/run/naru/naru.sock", SyncRecs: false,
		Log: Log{Verbosity: 2},
		Network: Network{
			Plugin: "auto", PodCIDR: []string{"auto"}, HostPorts: true, Table: "naru", LinkPrefix: "naru", NonMasquerade: []string{},
			CNI: CNI{
				ConfDir: "/etc/cni/net.d", BinDirs: []string{"/opt/cni/bin", "/usr/lib/cni"},
				Timeout: Duration(time.Minute), StatusTimeout: Duration(5 * time.Second), StatusInterval: Duration(10 * time.Second),
			},
		},
		Images: Images{RegistryDirs: []string{"/etc/naru/certs.d"}, Pinned: []string{}, Progress: Duration(5 * time.Minute),
			PullTimeout: Duration(12 * time.Hour)},
		Cgroup:   Cgroup{Driver: "auto"},
		Runtime:  Runtime{UserNamespaces: true, HookDirs: []string{}},
		Default:  Containers{Capabilities: []string{}, Env: []string{}, Ulimits: []Ulimit{}, JournaldSocket: "/run/systemd/journal/socket"},
		CDI:      CDI{SpecDirs: []string{"/etc/cdi", "/var/run/cdi"}},
		Stream:   Streaming{Address: "127.0.0.1:0"},
		Handlers: map[string]Handler{},
	}
}

// DefaultFile is Default as a commented file.
func DefaultFile() string {
	var b strings.Builder
	b.WriteString("# Configuration of naru. Every key stands here with its default.\n")
	b.WriteString("# Drop-ins: *.toml in the folder config.d beside this file, in the order of their names;\n")
	b.WriteString("# what they set replaces what stands here. Check with: naru config check\n")
	b.WriteString("# What is marked [live] changes in the running daemon: naru config reload (or SIGHUP).\n")
	b.WriteString("# A reload that changes anything else is refused as a whole: restart naru for that.\n\n")
	text, err := Default().File()
	if err != nil {
		panic(err) // a constant
	}
	return b.String() + text
}

// File is c as a file, with the comments: the configuration in effect.
func (c *Config) File() (string, error) {
	var b strings.Builder
	e := toml.NewEncoder(&b)
	e.SetIndentTables(false)
	if err := e.Encode(c); err != nil {
		return "", errs.New(errs.Internal, "write the configuration: %w", err)
	}
	return markLive(b.String()), nil
}

// AdminSocket is the socket of Naru's own command line.
func (c *Config) AdminSocket() string { return filepath.Join(c.Run, "admin.sock") }

// Load reads path and its drop-ins. A missing file at DefaultPath means the
// defaults; any other missing file is an error.
func Load(path string) (*Config, error) {
	c := Default()
	if path == "" {
		path = DefaultPath
	}
	err := c.merge(path)
	if err != nil && (path != DefaultPath || !errors.Is(err, os.ErrNotExist)) {
		return nil, err
	}
	drops, err := filepath.Glob(filepath.Join(filepath.Dir(path), "config.d", "*.toml"))
	if err != nil {
		return nil, errs.New(errs.InvalidArgument, "read the drop-ins of %s: %w", path, err)
	}
	sort.Strings(drops)
	for _, d := range drops {
		if err := c.merge(d); err != nil {
			return nil, err
		}
	}
	if err := c.Validate(); err != nil {
		return nil, errs.New(errs.InvalidArgument, "configuration %s: %w", path, err)
	}
	return c, nil
}

func (c *Config) merge(path string) error {
	// A FIFO in the drop-in folder must not make the daemon wait for a writer.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return errs.New(errs.InvalidArgument, "read the configuration: %w", err)
	}
	defer func() { _ = f.Close() }()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return errs.New(errs.InvalidArgument, "configuration %s is not a regular file", path)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxSize+1))
	if err != nil {
		return errs.New(errs.InvalidArgument, "read the configuration: %w", err)
	}
	if len(b) > maxSize {
		return errs.New(errs.InvalidArgument, "configuration %s is larger than %d bytes", path, maxSize)
	}
	if err := c.Parse(b); err != nil {
		return errs.New(errs.InvalidArgument, "configuration %s: %w", path, err)
	}
	return nil
}

// Parse merges one file's content into c.
func (c *Config) Parse(b []byte) error {
	d := toml.NewDecoder(strings.NewReader(string(b)))
	d.DisallowUnknownFields()
	err := d.Decode(c)
	var strict *toml.StrictMissingError
	if errors.As(err, &strict) && len(strict.Errors) > 0 {
		return unknownKeys(strict)
	}
	var dec *toml.DecodeError
	if errors.As(err, &dec) {
		row, _ := dec.Position()
		return fmt.Errorf("line %d: %s", row, strings.TrimPrefix(dec.Error(), "toml: "))
	}
	return err
}

// unknownKeys names every unknown key of a file, the first few of many.
func unknownKeys(strict *toml.StrictMissingError) error {
	const most = 10
	var all []error
	for i := range strict.Errors {
		e := &strict.Errors[i]
		if i == most {
			all = append(all, fmt.Errorf("and %d more", len(strict.Errors)-most))
			break
		}
		row, _ := e.Position()
		key := strings.Join(e.Key(), ".")
		hint := ""
		if s := nearest(key); s != "" {
			hint = fmt.Sprintf("; did you mean %q?", s)
		}
		all = append(all, fmt.Errorf("line %d: unknown key %q%s", row, key, hint))
	}
	return errors.Join(all...)
}

// Validate checks every value.
func (c *Config) Validate() error {
	var all []error
	bad := func(key, format string, args ...any) {
		all = append(all, fmt.Errorf("%s: %w", key, fmt.Errorf(format, args...)))
	}
	if c.Version != 1 {
		bad("version", "%d is not known to this release, which reads version 1", c.Version)
	}
	for key, p := range map[string]string{"root": c.Root, "run": c.Run, "socket": c.Socket} {
		if !filepath.IsAbs(p) || filepath.Clean(p) == "/" {
			bad(key, "%q must be an absolute path and not /", p)
		}
	}
	if len(c.Socket) > maxSocket {
		bad("socket", "%q is longer than the 107 bytes that a unix socket's path may have, less what is needed to replace it safely", c.Socket)
	}
	c.validateNetwork(bad)
	if c.Images.Layers < 0 || c.Images.Layers > 256 {
		bad("images.concurrent_layers", "%d is not between 0 and 256", c.Images.Layers)
	}
	if c.Images.Progress < 0 || c.Images.PullTimeout < 0 {
		bad("images", "timeouts must not be negative")
	}
	if c.Runtime.CRIU != "" && !filepath.IsAbs(c.Runtime.CRIU) {
		bad("runtime.criu", "%q is not an absolute path", c.Runtime.CRIU)
	}
	switch c.Cgroup.Driver {
	case "auto", "cgroupfs", "systemd":
	default:
		bad("cgroup.driver", "%q is none of auto, cgroupfs, systemd", c.Cgroup.Driver)
	}
	if err := loopback(c.Stream.Address); err != nil {
		bad("streaming.address", "%w: whoever reaches it needs only a token", err)
	}
	if path, ok := strings.CutPrefix(c.Metrics.Address, "unix://"); ok {
		if !filepath.IsAbs(path) || len(path) > maxSocket {
			bad("metrics.address", "%q is not unix:// and an absolute path of at most %d bytes", c.Metrics.Address, maxSocket)
		}
	} else if err := loopback(c.Metrics.Address); err != nil && c.Metrics.Address != "" {
		bad("metrics.address", "%w: whoever reaches it is asked for nothing", err)
	}
	c.Default.validate(bad)
	for _, dir := range c.CDI.SpecDirs {
		if !filepath.IsAbs(dir) {
			bad("cdi.spec_dirs", "%q must be an absolute path", dir)
		}
	}
	if err := c.Tracing.check(); err != nil {
		bad("tracing.endpoint", "%w", err)
	}
	if c.Tracing.PerMillion < 0 || c.Tracing.PerMillion > 1e6 {
		bad("tracing.sampling_rate_per_million", "%d is not between 0 and 1000000", c.Tracing.PerMillion)
	}
	for _, dir := range c.Runtime.HookDirs {
		if !filepath.IsAbs(dir) {
			bad("runtime.hook_dirs", "%q must be an absolute path", dir)
		}
	}
	for name, h := range c.Handlers {
		validateHandler(name, &h, bad)
	}
	sort.Slice(all, func(i, j int) bool { return all[i].Error() < all[j].Error() })
	return errors.Join(all...)
}

func validateHandler(name string, h *Handler, bad func(key, format string, args ...any)) {
	key := "handlers." + name
	// The name is a folder's, and a label's in Kubernetes (RFC 1123).
	if name == "" || name == "naru" || len(name) > 63 || strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789-") != "" || strings.Trim(name, "-") != name {
		bad(key, "%q is no name for a handler: want lowercase letters, digits and '-', and not \"naru\", which is built in", name)
	}
	switch h.Kind {
	case "native":
		if name == "runc" || name == "crun" {
			bad(key, "the names runc and crun are reserved for handlers of kind oci")
		}
		if h.Path != "" || len(h.Args) > 0 {
			bad(key, "path and args are for kind \"oci\"")
		}
	case "oci":
		if !filepath.IsAbs(h.Path) {
			bad(key+".path", "%q is not the absolute path of an OCI runtime's program", h.Path)
		}
		for _, a := range h.Args {
			if !strings.HasPrefix(a, "-") || strings.ContainsRune(a, 0) {
				bad(key+".args", "%q is not an option; write --option=value", a)
			}
		}
	default:
		bad(key+".kind", "%q is none of native, oci", h.Kind)
	}
}

// check says why the endpoint is none.
func (t *Tracing) check() error {
	if t.Endpoint == "" {
		return nil
	}
	if path, ok := strings.CutPrefix(t.Endpoint, "unix://"); ok {
		if !filepath.IsAbs(path) || len(path) > maxSocket {
			return fmt.Errorf("%q is not unix:// and an absolute path of at most %d bytes", t.Endpoint, maxSocket)
		}
		return nil
	}
	host, port, err := net.SplitHostPort(t.Endpoint)
	if err != nil || host == "" {
		return fmt.Errorf("%q is neither host:port nor unix:///path", t.Endpoint)
	}
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return fmt.Errorf("%q has no port number", t.Endpoint)
	}
	return nil
}

// The names that the network may give to things of the kernel.
var (
	TableName  = regexp.MustCompile(`^[a-z][a-z0-9_-]{0,30}$`)
	LinkPrefix = regexp.MustCompile(`^[a-z][a-z0-9]{0,5}$`) // IFNAMSIZ, with what follows
)

// loopback says why address is not host:port of a loopback address.
func loopback(address string) error {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return fmt.Errorf("%q is not host:port", address)
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return fmt.Errorf("%q has no port number", address)
	}
	if ip, err := netip.ParseAddr(host); err != nil || !ip.IsLoopback() {
		return fmt.Errorf("%q must be a loopback address", address)
	}
	return nil
}

func (c *Config) validateNetwork(bad func(key, format string, args ...any)) {
	n := &c.Network
	switch n.Plugin {
	case "auto", "builtin", "cni":
	default:
		bad("network.plugin", "%q is none of auto, builtin, cni", n.Plugin)
	}
	if !filepath.IsAbs(n.CNI.ConfDir) {
		bad("network.cni.conf_dir", "%q is not an absolute path", n.CNI.ConfDir)
	}
	for _, dir := range n.CNI.BinDirs {
		if !filepath.IsAbs(dir) || strings.Contains(dir, ":") {
			bad("network.cni.bin_dirs", "%q is not an absolute path without a colon", dir)
		}
	}
	for name, dir := range n.CNI.HandlerConfDirs {
		if _, ok := c.Handlers[name]; !ok && name != "naru" {
			bad("network.cni.handler_conf_dirs", "there is no handler %q", name)
		}
		if !filepath.IsAbs(dir) {
			bad("network.cni.handler_conf_dirs."+name, "%q is not an absolute path", dir)
		}
	}
	if n.CNI.Timeout.D() < time.Second || n.CNI.StatusTimeout.D() < time.Second || n.CNI.StatusInterval.D() < time.Second {
		bad("network.cni", "timeout, status_timeout and status_interval must be at least a second")
	}
	if len(n.PodCIDR) == 0 {
		bad("network.pod_cidr", "is empty; write ranges or [\"auto\"]")
	}
	for _, s := range n.PodCIDR {
		if s == "auto" {
			if len(n.PodCIDR) > 1 {
				bad("network.pod_cidr", "\"auto\" stands alone")
			}
			continue
		}
		if _, err := netip.ParsePrefix(s); err != nil {
			bad("network.pod_cidr", "%q is not a range like 10.85.0.0/16", s)
		}
	}
	for _, s := range n.NonMasquerade {
		if _, err := netip.ParsePrefix(s); err != nil {
			bad("network.non_masquerade", "%q is not a range like 10.0.0.0/8", s)
		}
	}
	if n.MTU != 0 && (n.MTU < 1280 || n.MTU > 65535) { // RFC 8200 5: IPv6 needs 1280
		bad("network.mtu", "%d is not between 1280 and 65535", n.MTU)
	}
	if n.Pool < 0 || n.Pool > 64 {
		bad("network.pool", "%d is not between 0 and 64", n.Pool)
	}
	if !TableName.MatchString(n.Table) {
		bad("network.nft_table", "%q is not a lower-case letter and at most 30 more letters, digits, _ and -", n.Table)
	}
	if !LinkPrefix.MatchString(n.LinkPrefix) {
		bad("network.link_prefix", "%q is not a lower-case letter and at most 5 more letters and digits", n.LinkPrefix)
	}
}

// nearest finds the known key that a person may have meant.
func nearest(key string) string {
	const longest = 64 // the comparison costs the product of the lengths
	if len(key) > longest {
		return ""
	}
	var best string
	limit := len(key)/2 + 1
	for _, k := range Keys() {
		if d := distance(key, k); d < limit {
			best, limit = k, d
		}
	}
	return best
}

// Keys lists all known keys, with dots between tables.
func Keys() []string {
	b, err := toml.Marshal(Default())
	if err != nil {
		panic(err) // a constant
	}
	var m map[string]any
	if err := toml.Unmarshal(b, &m); err != nil {
		panic(err)
	}
	var out []string
	var walk func(prefix string, m map[string]any)
	walk = func(prefix string, m map[string]any) {
		for k, v := range m {
			if sub, ok := v.(map[string]any); ok && len(sub) > 0 {
				walk(prefix+k+".", sub)
				continue
			}
			out = append(out, prefix+k)
		}
	}
	walk("", m)
	sort.Strings(out)
	return out
}

// distance is the Levenshtein distance of two short strings.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		prev := row[0]
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := prev
			if a[i-1] != b[j-1] {
				cost++
			}
			prev, row[j] = row[j], min(cost, row[j]+1, row[j-1]+1)
		}
	}
	return row[len(b)]
}
