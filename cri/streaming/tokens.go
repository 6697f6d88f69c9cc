package streaming

import (
	"container/list"
	"crypto/rand"
	"encoding/base64"
	"sync"
	"time"

	"github.com/naru-project/naru/internal/errs"
)

// tokenBytes of randomness stand in one token.
const tokenBytes = 32

// maxHeld is how many bytes all requests with a token may have: a single
// command may have as many as fit in a message.
const maxHeld = 32 << 20

// tokenCache keeps requests under single-use random tokens for a short time.
// It holds at most max of them, and maxHeld bytes: memory stays flat whatever a
// caller does.
type tokenCache struct {
	max int
	ttl time.Duration
	now func() time.Time

	mu    sync.Mutex
	index map[string]*list.Element // of token
	order *list.List               // of *tokenEntry, oldest first
	held  int                      // bytes
}

type tokenEntry struct {
	token   string
	kind    kind
	request any
	size    int
	expires time.Time
}

func newTokenCache(limit int, ttl time.Duration, now func() time.Time) *tokenCache {
	return &tokenCache{max: limit, ttl: ttl, now: now, index: map[string]*list.Element{}, order: list.New()}
}

// insert keeps request, of that many bytes, under a fresh token.
func (c *tokenCache) insert(k kind, request any, size int) (string, error) {
	raw := make([]byte, tokenBytes)
	_, _ = rand.Read(raw) // documented never to fail
	token := base64.RawURLEncoding.EncodeToString(raw)

	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.now()
	c.dropExpired(now)
	if c.order.Len() >= c.max {
		return "", errs.New(errs.ResourceExhausted,
			"make %s URL: %d URLs are outstanding; they end after %s at the latest", k, c.order.Len(), c.ttl)
	}
	if size > maxHeld-c.held {
		return "", errs.New(errs.ResourceExhausted,
			"make %s URL: the requests of %d outstanding URLs have %d bytes, with this one more than %d; they end after %s at the latest", k, c.order.Len(), c.held, maxHeld, c.ttl)
	}
	e := &tokenEntry{token: token, kind: k, request: request, size: size, expires: now.Add(c.ttl)}
	c.index[token] = c.order.PushBack(e)
	c.held += size
	return token, nil
}

// take returns the request of token and forgets it. A token that is used for
// another kind than it was made for is spent and yields nothing.
func (c *tokenCache) take(k kind, token string) (any, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	el, ok := c.index[token]
	if !ok {
		return nil, false
	}
	e := c.forget(el)
	if e.kind != k || c.now().After(e.expires) {
		return nil, false
	}
	return e.request, true
}

func (c *tokenCache) dropExpired(now time.Time) {
	for el := c.order.Front(); el != nil; el = c.order.Front() {
		if !now.After(el.Value.(*tokenEntry).expires) {
			return
		}
		c.forget(el)
	}
}

func (c *tokenCache) forget(el *list.Element) *tokenEntry {
	e := c.order.Remove(el).(*tokenEntry)
	delete(c.index, e.token)
	c.held -= e.size
	return e
}
