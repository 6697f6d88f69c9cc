package images

import (
	"runtime"
	"time"

	"github.com/naru-project/naru/images/registry"
	"github.com/naru-project/naru/images/unpack"
)

// Config of a Store. Zero fields get the default.
type Config struct {
	// Root is the store's folder, which nobody else may write to. It and what
	// is below it is reachable for root only.
	Root string
	// Registry says how registries are reached.
	Registry registry.Config
	// Limits bound what one layer may cost.
	Limits unpack.Limits
	// Pinned images are never offered for garbage collection: names, digests
	// or IDs, "*" stands for any text.
	Pinned []string
	// MaxTransfers is how many layers the node transfers and unpacks at once, in
	// all pulls together; default twice the CPUs, 4 to 12.
	MaxTransfers int
	// PullTimeout ends a pull whatever it is doing; default 12 hours. kubelet
	// itself sets no deadline.
	PullTimeout time.Duration
	// UsageInterval is how old the usage of a container's writable folder may
	// be before it is counted again; default 10 s.
	UsageInterval time.Duration
}

func (c Config) orDefault() Config {
	if c.MaxTransfers <= 0 {
		c.MaxTransfers = min(max(2*runtime.NumCPU(), 4), 12)
	}
	if c.PullTimeout <= 0 {
		c.PullTimeout = 12 * time.Hour
	}
	if c.UsageInterval <= 0 {
		c.UsageInterval = 10 * time.Second
	}
	if c.Registry.HostDirs == nil {
		c.Registry.HostDirs = []string{"/etc/naru/certs.d"}
	}
	return c
}
