// Package sandbox is a pod's place on the host: its pinned namespaces, its
// network (built-in routed: veth, addresses, routes, masquerade, host ports; or
// by CNI plugins, see package cni), its hostname, hosts, resolv.conf and /dev/shm.
//
// It must not know about pods as records or about CRI: it is told a Spec and
// answers with a Handle. The leases of its address allocator are the Handles
// that the pod manager keeps in its records; nothing is stored here.
//
// What a pod of the built-in network can reach, and who reaches it: pods reach each other, the host and
// the world; there is no NetworkPolicy here, and no route to other nodes' pods:
// those are what a CNI plugin brings. A pod reaches sockets of the host that
// listen on an address of the host or on all of them, by the gateway's address
// 169.254.1.1 too; it never reaches those on the host's loopback, nor can it
// send from an address that is not its own, move a neighbour entry of others or
// make the host listen to a router. Traffic to destinations outside the node's
// pod CIDRs and the configured list leaves with an address of the host.
//
// Host ports work on the host's own addresses (those of a mapping's host IP
// exactly) from outside, from pods and from the host, by 127.0.0.1 too; not by
// [::1], which Linux cannot translate. Rules of a service proxy go first.
//
// Of the host's settings nothing is changed but net.ipv4.ip_forward, with IPv6
// pods net.ipv6.conf.all.forwarding, and accept_ra of links that listened to
// routers before (2 instead of 1, or forwarding would deafen them).
//
// Concurrency: every method of Manager may be called concurrently for
// different sandboxes; calls for one sandbox are serialised by the caller.
package sandbox

import (
	"net/netip"
	"time"

	"github.com/naru-project/naru/internal/namespaces"
)

// NamespaceMode says whose namespace a pod uses.
type NamespaceMode string

// The modes that a pod-level namespace can have.
const (
	ModePod  NamespaceMode = "pod"
	ModeNode NamespaceMode = "node"
)

// Protocol of a port mapping.
type Protocol string

// The protocols of CRI.
const (
	TCP  Protocol = "tcp"
	UDP  Protocol = "udp"
	SCTP Protocol = "sctp"
)

// PortMapping publishes a container port on the host. HostPort 0 = none.
type PortMapping struct {
	Protocol      Protocol   `json:"protocol"`
	ContainerPort uint16     `json:"container_port"`
	HostPort      uint16     `json:"host_port,omitempty"`
	HostIP        netip.Addr `json:"host_ip,omitempty"` // invalid or unspecified = every local address
}

// DNS is what goes into resolv.conf, verbatim. All empty = the host's own.
type DNS struct {
	Servers  []string `json:"servers,omitempty"`
	Searches []string `json:"searches,omitempty"`
	Options  []string `json:"options,omitempty"`
}

// Spec is what a sandbox is asked to be. Pure data.
type Spec struct {
	ID       string             `json:"id"`
	Name     string             `json:"name"` // namespace/name, for messages
	Pod      PodName            `json:"pod"`
	Handler  string             `json:"handler,omitempty"`
	Hostname string             `json:"hostname,omitempty"`
	Network  NamespaceMode      `json:"network"`
	IPC      NamespaceMode      `json:"ipc"`
	UTS      NamespaceMode      `json:"uts"` // node exactly when Network is node
	SharePID bool               `json:"share_pid,omitempty"`
	UIDMap   []namespaces.IDMap `json:"uid_map,omitempty"` // not empty = own user namespace
	GIDMap   []namespaces.IDMap `json:"gid_map,omitempty"`
	DNS      DNS                `json:"dns"`
	Ports    []PortMapping      `json:"ports,omitempty"`
	Sysctls  map[string]string  `json:"sysctls,omitempty"`
	ShmSize  int64              `json:"shm_size,omitempty"` // bytes; 0 = 64 MiB
	// Annotations of the pod; those of its bandwidth count, with CNI.
	Annotations map[string]string `json:"annotations,omitempty"`
}

// PodName is the pod's name in Kubernetes, which CNI plugins are told.
type PodName struct {
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name,omitempty"`
	UID       string `json:"uid,omitempty"`
}

// Handle is a sandbox that exists on the host. It is plain data that the pod
// record keeps: with it alone a sandbox can be verified and taken down, by
// another process, after a crash, more than once.
type Handle struct {
	ID         string            `json:"id"`
	Namespaces namespaces.Paths  `json:"namespaces"`          // pinned paths
	IPs        []netip.Addr      `json:"ips,omitempty"`       // primary first; none for host network
	HostLink   string            `json:"host_link,omitempty"` // name of the host end of the veth pair; built-in network only
	CNI        *Attached         `json:"cni,omitempty"`       // the network was made by CNI plugins
	Ports      []PortMapping     `json:"ports,omitempty"`
	EtcFiles   map[string]string `json:"etc_files"`     // container path → host file: /etc/hosts, /etc/hostname, /etc/resolv.conf
	Shm        string            `json:"shm,omitempty"` // host folder of the pod's /dev/shm ("/dev/shm" for host IPC)
	BootID     string            `json:"boot_id"`       // kernel boot the namespaces belong to
}

// Attached says which CNI network a pod is in.
type Attached struct {
	Network    string   `json:"network"`
	File       string   `json:"file"`                 // that its configuration came from
	Interfaces []string `json:"interfaces,omitempty"` // in the pod
}

// Interface is the traffic of one interface of a sandbox.
type Interface struct {
	Name                                    string
	RxBytes, RxPackets, RxErrors, RxDropped uint64
	TxBytes, TxPackets, TxErrors, TxDropped uint64
	Time                                    time.Time // of the counters
}

// NetworkStatus says whether pods with a network of their own can be started.
type NetworkStatus struct {
	Ready   bool
	Reason  string // CamelCase word, empty when ready
	Message string
}
