package images

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/semaphore"
	"k8s.io/klog/v2"

	"github.com/naru-project/naru/images/manifest"
	"github.com/naru-project/naru/images/registry"
	"github.com/naru-project/naru/internal/errs"
)

// pull is one pull under way. It runs on the store's behalf; callers with the
// same reference and credentials wait for the same one.
type pull struct {
	key    string
	ref    string
	start  time.Time
	ctx    context.Context //nolint:containedctx // of the operation, which has several callers
	cancel context.CancelCauseFunc
	done   chan struct{}
	id     string // set before done is closed, as err
	err    error

	waiters int // guarded by Store.mu

	stage       atomic.Value // string
	bytes       atomic.Int64
	total       atomic.Int64
	layersDone  atomic.Int32
	layersTotal atomic.Int32
}

var errAbandoned = fmt.Errorf("every caller gave up: %w", context.Canceled)

// Pull gets an image and returns its ID. The registry is always asked, with
// these credentials, what the reference is; content that is here already is
// not transferred again. Callers of the same reference with the same
// credentials share one pull, which ends early only when all of them give up.
//
// The message of an error about a registry that cannot be reached starts with
// "RegistryUnavailable".
func (s *Store) Pull(ctx context.Context, ref string, auth *Auth) (imageID string, err error) {
	named, err := normalize(ref)
	if err != nil {
		return "", err
	}
	p, err := s.join(ctx, named, auth)
	if err != nil {
		return "", err
	}
	select {
	case <-p.done:
		return p.id, p.err
	case <-ctx.Done():
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if p.waiters--; p.waiters == 0 {
		if s.pulls[p.key] == p {
			delete(s.pulls, p.key)
		}
		p.cancel(errAbandoned)
	}
	return "", fmt.Errorf("pull %s: %w", named, context.Cause(ctx))
}

func (s *Store) join(ctx context.Context, named reference.Named, auth *Auth) (*pull, error) {
	key, err := pullKey(named, auth)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.pulls[key]; p != nil {
		p.waiters++
		return p, nil
	}
	p := &pull{key: key, ref: named.String(), start: time.Now(), done: make(chan struct{}), waiters: 1}
	p.stage.Store("resolve")
	// The life of the store, with the caller's logger.
	opctx := klog.NewContext(s.life, klog.FromContext(ctx))
	p.ctx, p.cancel = context.WithCancelCause(opctx)
	if !s.begin(func() { s.run(p, named, auth) }) {
		p.cancel(errClosed)
		return nil, errClosed
	}
	s.pulls[key] = p
	return p, nil
}

// pullKey tells pulls apart by reference and credentials. It is a hash, so
// that no secret lies about in a map key.
func pullKey(named reference.Named, auth *Auth) (string, error) {
	data, err := json.Marshal(struct {
		Ref  string
		Auth *Auth
	}{named.String(), auth})
	if err != nil {
		return "", fmt.Errorf("encode credentials: %w", err)
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:]), nil
}

func (s *Store) run(p *pull, named reference.Named, auth *Auth) {
	log := klog.FromContext(p.ctx).WithValues("image", p.ref)
	limit := s.live.Load().PullTimeout
	ctx, cancel := context.WithTimeoutCause(p.ctx, limit, errs.New(errs.DeadlineExceeded, "pull %s: not done in %s", p.ref, limit))
	defer cancel()
	p.id, p.err = guard(func() (string, error) { return s.pull(ctx, p, named, auth) })
	s.mu.Lock()
	if s.pulls[p.key] == p {
		delete(s.pulls, p.key)
	}
	s.mu.Unlock()
	p.cancel(nil)
	if s.cfg.PullDone != nil {
		s.cfg.PullDone(time.Since(p.start), p.bytes.Load(), p.err)
	}
	close(p.done)
	if p.err != nil {
		log.V(2).Info("Pull ended with an error", "after", time.Since(p.start), "err", p.err)
		return
	}
	log.V(2).Info("Pulled", "id", p.id, "after", time.Since(p.start), "bytes", p.bytes.Load())
}

// guard makes an error of a panic: what comes from a registry must not end the
// daemon, whatever it finds in a decoder.
func guard(fn func() (string, error)) (id string, err error) {
	defer func() {
		if v := recover(); v != nil {
			klog.Background().Error(nil, "Panic in a pull", "value", v, "stack", string(debug.Stack()))
			err = errs.New(errs.Internal, "pull: a bug in Naru: %v", v)
		}
	}()
	return fn()
}

func (s *Store) pull(ctx context.Context, p *pull, named reference.Named, auth *Auth) (string, error) {
	client, err := s.live.Load().Registry.Open(ctx, named, (*registry.Auth)(auth))
	if err != nil {
		return "", err
	}
	defer client.Close()
	object, tags := "", []string(nil)
	switch n := named.(type) {
	case reference.Digested: // also with a tag: the digest is what counts
		object = n.Digest().String()
	case reference.Tagged:
		object, tags = n.Tag(), []string{named.String()}
	}
	top, err := client.Resolve(ctx, object, s.known())
	if err != nil {
		return "", err
	}
	digests := []string{named.Name() + "@" + top.Digest.String()}
	if top.Data == nil {
		if here := s.snap.Load().byTarget[top.Digest]; here != nil {
			err := s.keep(ctx, made{id: digest.Digest(here.ID), tags: tags, digests: digests})
			if !errors.Is(err, errGone) {
				return here.ID, err
			}
		}
		if top, err = client.Resolve(ctx, top.Digest.String(), nil); err != nil {
			return "", err
		}
	}
	doc, raw, err := s.manifest(ctx, client, top)
	if err != nil {
		return "", named2(named, err)
	}
	img, err := s.describe(ctx, client, doc, raw)
	if err != nil {
		return "", named2(named, err)
	}
	img.tags, img.digests = tags, digests
	id, err := s.install(ctx, p, img)
	return id, named2(named, err)
}

// known reports to the registry client which manifests need no transfer.
func (s *Store) known() func(digest.Digest) bool {
	if n := s.snap.Load(); len(n.byTarget) == 0 {
		return nil
	}
	return func(d digest.Digest) bool { return s.snap.Load().byTarget[d] != nil }
}

// named2 puts the reference into an error that does not have it. The message
// about a registry that is away must keep its beginning.
func named2(named reference.Named, err error) error {
	if err == nil || strings.Contains(err.Error(), named.String()) {
		return err
	}
	return errs.New(errs.Of(err), "pull %s: %w", named, err)
}

// manifest goes down from what the reference names to the manifest for this
// node, and returns its bytes, too.
func (s *Store) manifest(ctx context.Context, c *registry.Client, top registry.Manifest) (*manifest.Document, []byte, error) {
	doc, err := manifest.Parse(top.Data, top.MediaType)
	for depth := 1; err == nil && doc.Manifest == nil; depth++ {
		if depth > manifest.MaxIndexDepth {
			return nil, nil, errs.New(errs.FailedPrecondition, "read index: more than %d indexes stand above the manifest", manifest.MaxIndexDepth)
		}
		d, serr := manifest.Select(doc.Index, s.platform)
		if serr != nil {
			return nil, nil, serr
		}
		next, ferr := c.Fetch(ctx, d)
		if ferr != nil {
			return nil, nil, ferr
		}
		top = next
		doc, err = manifest.Parse(next.Data, next.MediaType)
		if err == nil && doc.MediaType != d.MediaType {
			return nil, nil, errs.New(errs.FailedPrecondition, "read manifest %s: it is of type %q, the index says %q", d.Digest, doc.MediaType, d.MediaType)
		}
	}
	if err != nil {
		return nil, nil, err
	}
	return doc, top.Data, nil
}

// describe reads the config and says where each layer comes from.
func (s *Store) describe(ctx context.Context, c *registry.Client, doc *manifest.Document, raw []byte) (*image, error) {
	if doc.Artifact != nil {
		return s.newArtifact(doc.Artifact, raw, func(_ int, f manifest.File) func(context.Context, *slot) (io.ReadCloser, error) {
			return registrySource(c, f.Blob).open
		})
	}
	m := doc.Manifest
	img := &image{id: m.Config.Digest}
	if here := s.snap.Load().byID[m.Config.Digest.String()]; here != nil {
		img.raw = here.RawConfig
	} else {
		raw, err := c.Config(ctx, m.Config)
		if err != nil {
			return nil, err
		}
		img.raw = raw
	}
	for _, l := range m.Layers {
		img.sources = append(img.sources, registrySource(c, l))
	}
	return img, nil
}

// slot is a place in the node's budget. One goroutine at a time acquires it.
type slot struct {
	sem  *semaphore.Weighted
	mu   sync.Mutex
	held bool
}

// Acquire waits for a place, unless it is held.
func (l *slot) Acquire(ctx context.Context) error {
	l.mu.Lock()
	held := l.held
	l.mu.Unlock()
	if held {
		return nil
	}
	if err := l.sem.Acquire(ctx, 1); err != nil {
		return context.Cause(ctx)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.held = true
	return nil
}

// Release gives the place back, if it is held.
func (l *slot) Release() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.held {
		l.held = false
		l.sem.Release(1)
	}
}

// PullProgress tells how far a pull is.
type PullProgress struct {
	Ref               string
	Stage             string // resolve, layers, commit
	Bytes, Total      int64  // of the layers that are transferred
	Layers, AllLayers int
	Waiting           int // callers
	Started           time.Time
}

// Progress lists the pulls under way, the oldest first.
func (s *Store) Progress() []PullProgress {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]PullProgress, 0, len(s.pulls))
	for _, p := range s.pulls {
		stage, _ := p.stage.Load().(string)
		out = append(out, PullProgress{
			Ref: p.ref, Stage: stage, Bytes: p.bytes.Load(), Total: p.total.Load(),
			Layers: int(p.layersDone.Load()), AllLayers: int(p.layersTotal.Load()), Waiting: p.waiters, Started: p.start,
		})
	}
	slices.SortFunc(out, func(a, b PullProgress) int { return a.Started.Compare(b.Started) })
	return out
}
