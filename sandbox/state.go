package sandbox

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"

	"k8s.io/klog/v2"

	"github.com/naru-project/naru/internal/atomicfile"
	"github.com/naru-project/naru/internal/errs"
	"github.com/naru-project/naru/sandbox/ipam"
)

// stateVersion is the version of the file's form.
const stateVersion = 1

// networkState is what must last over restarts and is in no pod record.
type networkState struct {
	Version  int            `json:"version"`
	PodCIDRs []netip.Prefix `json:"pod_cidrs"`
}

const maxStateFile = 64 << 10

func (m *Manager) saveCIDRs(cidrs []netip.Prefix) error {
	data, err := json.Marshal(networkState{stateVersion, cidrs})
	if err == nil {
		err = os.MkdirAll(filepath.Dir(m.cfg.StateFile), 0o755)
	}
	if err == nil {
		err = atomicfile.Write(m.cfg.StateFile, append(data, '\n'), 0o600, true)
	}
	if err != nil {
		return errs.New(errs.Internal, "keep the pod CIDRs: %w", err)
	}
	return nil
}

// restoreCIDRs reads what saveCIDRs wrote. A file that cannot be used is set
// aside and told; the cluster tells the CIDRs again.
func (m *Manager) restoreCIDRs(ctx context.Context) {
	data, err := os.ReadFile(m.cfg.StateFile)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	var cidrs []netip.Prefix
	if err == nil {
		cidrs, err = parseState(data)
	}
	if err == nil {
		err = m.ips.SetCIDRs(cidrs)
	}
	if err != nil {
		aside := m.cfg.StateFile + ".bad"
		klog.FromContext(ctx).Error(err, "Read the pod CIDRs of before; set the file aside", "file", m.cfg.StateFile, "aside", aside,
			"renamed", os.Rename(m.cfg.StateFile, aside) == nil)
	}
}

func parseState(data []byte) ([]netip.Prefix, error) {
	if len(data) > maxStateFile {
		return nil, errs.New(errs.Internal, "network state has %d bytes", len(data))
	}
	var s networkState
	d := json.NewDecoder(bytes.NewReader(data))
	if err := d.Decode(&s); err != nil {
		return nil, errs.New(errs.Internal, "parse the network state: %w", err)
	}
	if s.Version != stateVersion {
		return nil, errs.New(errs.Internal, "network state has version %d, this is for %d", s.Version, stateVersion)
	}
	return ipam.Check(s.PodCIDRs)
}
