// Package cni gives pods their network by CNI plugins: programs that the
// administrator of the cluster puts on the node, with a configuration file that
// names them. What the specification asks of a runtime is libcni's, which is
// the CNI project's own; here is what libcni leaves to its caller: which
// configuration counts and when it changes, who may have written it, how long a
// plugin may take, what is believed of its answer, and that whatever was
// attached is detached again, over restarts and reboots.
//
// Plugins are programs of the administrator, run with all privileges, and yet
// they hang, crash, print nothing or too much. None of that may hang anybody
// but the pod that it is for: Status is answered from memory, every execution
// has a deadline, and nothing holds a lock while a plugin runs.
//
// An attachment is written to a file before the first plugin is run for it and
// is removed after the last has taken it back. The file holds the configuration
// as it was, so that a pod leaves the network that it came to, whatever the
// folder says by then.
//
// Concurrency: all methods of Manager may be called at the same time; those for
// one pod are serialised by the caller.
package cni

import (
	"context"
	"net/netip"
	"time"

	"github.com/naru-project/naru/internal/program"
)

// Link is the name of a pod's interface.
const Link = "eth0"

// Config of a Manager.
type Config struct {
	// ConfDir is the folder of configuration files; the first of them by name
	// counts. Empty: only pods of HandlerDirs get a network here.
	ConfDir string
	// HandlerDirs are further folders, for the pods of a runtime handler.
	HandlerDirs map[string]string
	// BinDirs are where plugins are looked for, in this order.
	BinDirs []string
	// StateDir keeps what must last over reboots: attachments and results.
	StateDir string
	// Timeout is of each execution of a plugin; StatusTimeout where it is asked
	// for its status, which is done every StatusEvery.
	Timeout, StatusTimeout, StatusEvery time.Duration
	// GCAfter is how long after a pod has gone plugins may collect garbage.
	GCAfter time.Duration
}

// Runner runs plugins. An error means that the program did not end by itself:
// it could not be started, or was killed at the end of ctx.
type Runner interface {
	RunProgram(ctx context.Context, r program.Request) (program.Result, error)
}

// Pod is what plugins are told of a pod.
type Pod struct {
	ID, Namespace, Name, UID string
	NetNS                    string
	Annotations              map[string]string // the kubernetes.io/*-bandwidth ones count
	Ports                    []Port
	DNS                      DNS
	CIDRs                    []netip.Prefix // of the node's pods
}

// Port is a mapping of a port of the node, in the words of the portMappings
// capability.
type Port struct {
	HostPort      uint16 `json:"hostPort"`
	ContainerPort uint16 `json:"containerPort"`
	Protocol      string `json:"protocol"`
	HostIP        string `json:"hostIP,omitempty"`
}

// DNS is that of the dns capability.
type DNS struct {
	Servers  []string `json:"servers,omitempty"`
	Searches []string `json:"searches,omitempty"`
	Options  []string `json:"options,omitempty"`
}

// Attachment is what came of it.
type Attachment struct {
	Network    string       // name
	File       string       // the configuration came from
	IPs        []netip.Addr // primary first
	Interfaces []string     // in the pod
}

// Status says whether pods can be attached.
type Status struct {
	Ready   bool
	Reason  string // CamelCase word, empty when ready
	Message string
}

// Reasons of a Status.
const (
	ReasonNoConfig      = "CNIConfigMissing"
	ReasonBadConfig     = "CNIConfigInvalid"
	ReasonPluginMissing = "CNIPluginMissing"
	ReasonPluginFailed  = "CNIPluginNotReady"
)

// Limits of what is believed.
const (
	maxConf       = 1 << 20 // bytes of a configuration file
	maxOutput     = 1 << 20 // bytes that a plugin prints
	maxConfFiles  = 256
	maxIPs        = 64
	maxInterfaces = 256
	maxMessage    = 512 // bytes quoted of what a plugin says
)
