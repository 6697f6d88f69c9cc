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
	// Limits bound what one layer may cost.
	Limits unpack.Limits
	// MaxTransfers is how many layers the node transfers and unpacks at once, in
	// all pulls together; default twice the CPUs, 4 to 12.
	MaxTransfers int
	// UsageInterval is how old the usage of a container's writable folder may
	// be before it is counted again; default 10 s.
	UsageInterval time.Duration
	// PullDone is told of each pull that ended, and of the bytes of layers that
	// came for it. Nil = nobody.
	PullDone func(took time.Duration, bytes int64, err error)

	Live
}

// Live is what Reconfigure changes while the store is open. Zero fields get the
// default.
type Live struct {
	// Registry says how registries are reached.
	Registry registry.Config
	// Pinned images are never offered for garbage collection: names, digests
	// or IDs, "*" stands for any text.
	Pinned []string
	// PullTimeout ends a pull whatever it is doing; default 12 hours. kubelet
	// itself sets no deadline.
	PullTimeout time.Duration
}

func (c Config) orDefault() Config {
	if c.MaxTransfers <= 0 {
		c.MaxTransfers = min(max(2*runtime.NumCPU(), 4), 12)
	}
	if c.UsageInterval <= 0 {
		c.UsageInterval = 10 * time.Second
	}
	return c
}

func (l Live) orDefault() *Live {
	if l.PullTimeout <= 0 {
		l.PullTimeout = 12 * time.Hour
	}
	if l.Registry.HostDirs == nil {
		l.Registry.HostDirs = []string{"/etc/naru/certs.d"}
	}
	return &l
}

// Reconfigure takes new settings: pulls that begin from now on go by them, and
// which images are pinned is said anew at once.
func (s *Store) Reconfigure(l Live) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.live.Store(l.orDefault())
	for _, st := range s.images {
		st.public = s.present(st) // readers keep the one they have
	}
	s.publish()
}
