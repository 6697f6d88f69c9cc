package manifest

import (
	"encoding/json"
	"runtime"
	"strings"
	"time"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/naru-project/naru/internal/errs"
)

// Config is what is used of an image's config.
type Config struct {
	Config   ocispec.ImageConfig
	Created  time.Time
	Platform ocispec.Platform
	DiffIDs  []digest.Digest
}

type configWire struct {
	SchemaVersion json.RawMessage     `json:"schemaVersion"`
	Created       json.RawMessage     `json:"created"`
	Architecture  string              `json:"architecture"`
	Variant       string              `json:"variant"`
	OS            string              `json:"os"`
	Config        ocispec.ImageConfig `json:"config"`
	RootFS        struct {
		Type    string          `json:"type"`
		DiffIDs []digest.Digest `json:"diff_ids"`
	} `json:"rootfs"`
}

// ParseConfig reads an image config.
func ParseConfig(data []byte) (*Config, error) {
	if len(data) > MaxConfigSize {
		return nil, errs.New(errs.ResourceExhausted, "read image config: larger than %d bytes", MaxConfigSize)
	}
	var w configWire
	if err := Unmarshal(data, &w); err != nil {
		return nil, errs.New(errs.FailedPrecondition, "read image config: %w", err)
	}
	if w.SchemaVersion != nil {
		// What the store knows by its digest is one or the other for good.
		return nil, errs.New(errs.FailedPrecondition, "read image config: it is a manifest")
	}
	if w.RootFS.Type != "" && w.RootFS.Type != "layers" {
		return nil, errs.New(errs.FailedPrecondition, "read image config: rootfs type %.50q is not supported", w.RootFS.Type)
	}
	if len(w.RootFS.DiffIDs) > MaxLayers {
		return nil, errs.New(errs.ResourceExhausted, "read image config: %d layers, more than %d", len(w.RootFS.DiffIDs), MaxLayers)
	}
	for _, d := range w.RootFS.DiffIDs {
		if err := CheckDigest(d); err != nil {
			return nil, err
		}
	}
	if err := checkStrings(&w.Config); err != nil {
		return nil, err
	}
	c := &Config{
		Config:   w.Config,
		Platform: ocispec.Platform{OS: w.OS, Architecture: w.Architecture, Variant: w.Variant},
		DiffIDs:  w.RootFS.DiffIDs,
	}
	var created time.Time
	if json.Unmarshal(w.Created, &created) == nil { // a bad date is no reason to refuse an image
		c.Created = created
	}
	return c, nil
}

// checkStrings refuses NUL, which no argument, path or variable can carry, and
// drops variables without "=", which execve(2) would pass on and every reader
// takes differently.
func checkStrings(c *ocispec.ImageConfig) error {
	one := func(list ...string) error {
		for _, s := range list {
			if strings.ContainsRune(s, 0) {
				return errs.New(errs.FailedPrecondition, "read image config: a string has a NUL byte")
			}
		}
		return nil
	}
	for _, list := range [][]string{c.Env, c.Entrypoint, c.Cmd, {c.User, c.WorkingDir, c.StopSignal}} {
		if err := one(list...); err != nil {
			return err
		}
	}
	env := c.Env[:0:0]
	for _, e := range c.Env {
		if strings.Index(e, "=") > 0 {
			env = append(env, e)
		}
	}
	c.Env = env
	return nil
}

// CheckPlatform refuses configs for another system than m accepts. Fields that
// the config leaves empty count as right.
func (c *Config) CheckPlatform(m platforms.Matcher) error {
	p := c.Platform
	if p.OS == "" {
		p.OS = "linux"
	}
	if p.Architecture == "" {
		p.Architecture = runtime.GOARCH
	}
	if m.Match(platforms.Normalize(p)) {
		return nil
	}
	return errs.New(errs.FailedPrecondition, "the image is for %.40s/%.40s, this node is %s/%s", p.OS, p.Architecture, "linux", runtime.GOARCH)
}

// Select picks the entry of an index that fits the node best. Entries without
// a platform are taken when no other fits.
func Select(index []ocispec.Descriptor, m platforms.MatchComparer) (ocispec.Descriptor, error) {
	var best, unnamed *ocispec.Descriptor
	for i := range index {
		d := &index[i]
		switch {
		case !IsManifest(d.MediaType):
		case d.Platform == nil:
			if unnamed == nil && d.Annotations["vnd.docker.reference.type"] == "" {
				unnamed = d
			}
		case m.Match(platforms.Normalize(*d.Platform)):
			if best == nil || m.Less(platforms.Normalize(*d.Platform), platforms.Normalize(*best.Platform)) {
				best = d
			}
		}
	}
	if best == nil {
		best = unnamed
	}
	if best == nil {
		return ocispec.Descriptor{}, errs.New(errs.NotFound, "the image has no variant for %s/%s", "linux", runtime.GOARCH)
	}
	return *best, nil
}
