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

// tokenCache keeps requests under single-use random tokens for a short time.
// It holds at most max of them: memory stays flat whatever a caller does.
type tokenCache struct {
	max int
	ttl time.Duration
	now func() time.Time

	mu    sync.Mutex
	index map[string]*list.Element // of token
	order *list.List               // of *tokenEntry, oldest first
}

type tokenEntry struct {
	token   string
	kind    kind
	request any
	expires time.Time
}

func newTokenCache(limit int, ttl time.Duration, now func() time.Time) *tokenCache {
	return &tokenCache{max: limit, ttl: ttl, now: now, index: map[string]*list.Element{}, order: list.New()}
}

// insert keeps request under a fresh token.
func (c *tokenCache) insert(k kind, request any) (string, error) {
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
	e := &tokenEntry{token: token, kind: k, request: request, expires: now.Add(c.ttl)}
	c.index[token] = c.order.PushBack(e)
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
	e := c.order.Remove(el).(*tokenEntry)
	delete(c.index, token)
	if e.kind != k || c.now().After(e.expires) {
		return nil, false
	}
	return e.request, true
}

func (c *tokenCache) dropExpired(now time.Time) {
	for el := c.order.Front(); el != nil; el = c.order.Front() {
		e := el.Value.(*tokenEntry)
		if !now.After(e.expires) {
			return
		}
		c.order.Remove(el)
		delete(c.index, e.token)
	}
}
