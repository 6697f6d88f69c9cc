package registry

import (
	"context"
	"errors"
	"io"
	"net/http"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/naru-project/naru/images/manifest"
	"github.com/naru-project/naru/internal/errs"
)

// Manifest is a manifest or index as a registry sent it, its digest checked.
type Manifest struct {
	Digest    digest.Digest
	MediaType string // what the registry called it
	Data      []byte // nil when known said that it is here already
}

// Resolve asks what a tag or digest points to. It always asks, with the
// credentials given: who may not read the repository gets nothing, also when
// the node has it all. known reports whether the content of a digest is
// already here; it is then not transferred again. nil: nothing is here.
func (c *Client) Resolve(ctx context.Context, object string, known func(digest.Digest) bool) (Manifest, error) {
	caps := docker.HostCapabilityPull
	want := digest.Digest(object)
	byDigest := want.Validate() == nil
	if byDigest {
		if err := manifest.CheckDigest(want); err != nil {
			return Manifest{}, err
		}
	} else {
		want = ""
		caps |= docker.HostCapabilityResolve
	}
	hosts := c.with(caps)
	var failed []*hostError
	for i, h := range hosts {
		m, err := c.resolveAt(ctx, h, object, want, known, i == len(hosts)-1)
		if err == nil {
			return m, nil
		}
		if ctx.Err() != nil {
			return Manifest{}, context.Cause(ctx)
		}
		failed = append(failed, asHostError(h, err))
	}
	return Manifest{}, c.failure("resolve it", failed)
}

func asHostError(h *host, err error) *hostError {
	var he *hostError
	if errors.As(err, &he) {
		return he
	}
	return &hostError{host: h.Host, reason: refused, text: h.client.hide.clean(err.Error())}
}

func (c *Client) resolveAt(ctx context.Context, h *host, object string, want digest.Digest, known func(digest.Digest) bool, last bool) (Manifest, error) {
	if known == nil {
		return c.get(ctx, h, object, want, last)
	}
	r := request{method: http.MethodHead, path: []string{"manifests", object}, accept: manifest.Accept}
	hctx, cancel := context.WithTimeoutCause(ctx, 3*c.cfg.HeaderTimeout, errSlow)
	defer cancel()
	resp, err := h.do(hctx, r, last)
	var he *hostError
	switch {
	case err == nil:
		_ = resp.Body.Close()
		told := digest.Digest(resp.Header.Get("Docker-Content-Digest"))
		if told != "" {
			if err := manifest.CheckDigest(told); err != nil {
				return Manifest{}, h.refuse("its Docker-Content-Digest is not a digest")
			}
			if want != "" && told != want && told.Algorithm() == want.Algorithm() {
				return Manifest{}, h.refuse("it has %s where %s was asked for", told, want)
			}
		} else {
			told = want
		}
		if told != "" && known(told) {
			return Manifest{Digest: told}, nil
		}
	case errors.As(err, &he) && he.reason != refused:
		return Manifest{}, err
	}
	// Not here, or the host does not speak HEAD.
	return c.get(ctx, h, object, want, last)
}

// Fetch gets the manifest or index that a descriptor names.
func (c *Client) Fetch(ctx context.Context, d ocispec.Descriptor) (Manifest, error) {
	hosts := c.with(docker.HostCapabilityPull)
	var failed []*hostError
	for i, h := range hosts {
		m, err := c.get(ctx, h, d.Digest.String(), d.Digest, i == len(hosts)-1)
		if err == nil {
			if d.Size != int64(len(m.Data)) {
				err = h.refuse("manifest %s has %d bytes, the index says %d", d.Digest, len(m.Data), d.Size)
			} else {
				return m, nil
			}
		}
		if ctx.Err() != nil {
			return Manifest{}, context.Cause(ctx)
		}
		failed = append(failed, asHostError(h, err))
	}
	return Manifest{}, c.failure("give manifests", failed)
}

func (c *Client) get(ctx context.Context, h *host, object string, want digest.Digest, last bool) (Manifest, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, c.cfg.ProgressTimeout, errSlow)
	defer cancel()
	resp, err := h.do(ctx, request{method: http.MethodGet, path: []string{"manifests", object}, accept: manifest.Accept}, last)
	if err != nil {
		return Manifest{}, err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return Manifest{}, h.refuse("asked for a manifest, it answers %s", resp.Status)
	}
	if resp.ContentLength > manifest.MaxManifestSize {
		return Manifest{}, h.refuse("the manifest has %d bytes, more than %d", resp.ContentLength, manifest.MaxManifestSize)
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, manifest.MaxManifestSize+1))
	if err != nil {
		return Manifest{}, h.transport(ctx, err)
	}
	if len(data) > manifest.MaxManifestSize {
		return Manifest{}, h.refuse("the manifest has more than %d bytes", manifest.MaxManifestSize)
	}
	told := digest.Digest(resp.Header.Get("Docker-Content-Digest"))
	if told != "" {
		if err := manifest.CheckDigest(told); err != nil {
			return Manifest{}, h.refuse("its Docker-Content-Digest is not a digest")
		}
	}
	if want == "" {
		want = told
	}
	if want == "" {
		want = digest.FromBytes(data)
	}
	if got := want.Algorithm().FromBytes(data); got != want {
		return Manifest{}, h.refuse("the manifest's digest is %s, it should be %s", got, want)
	}
	return Manifest{Digest: want, MediaType: resp.Header.Get("Content-Type"), Data: data}, nil
}

// Config gets a small blob as a whole.
func (c *Client) Config(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	if d.Size > manifest.MaxConfigSize {
		return nil, errs.New(errs.ResourceExhausted, "read image config: %d bytes, more than %d", d.Size, manifest.MaxConfigSize)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, 2*c.cfg.ProgressTimeout, errSlow)
	defer cancel()
	b, err := c.Blob(ctx, d, nil)
	if err != nil {
		return nil, err
	}
	defer func() { _ = b.Close() }()
	data, err := io.ReadAll(io.LimitReader(b, d.Size+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) != d.Size {
		return nil, errs.New(errs.FailedPrecondition, "pull %s: the config has not the %d bytes that the manifest says", c.ref, d.Size)
	}
	if got := d.Digest.Algorithm().FromBytes(data); got != d.Digest {
		return nil, errs.New(errs.FailedPrecondition, "pull %s: the config's digest is %s, the manifest says %s", c.ref, got, d.Digest)
	}
	return data, nil
}
