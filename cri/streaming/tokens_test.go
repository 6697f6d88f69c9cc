package streaming

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/naru-project/naru/internal/errs"
)

func TestTokensAreUniqueAndLong(t *testing.T) {
	const n = 100_000
	c := newTokenCache(n, time.Minute, time.Now)
	seen := make(map[string]bool, n)
	for range n {
		token, err := c.insert(kindExec, 1)
		if err != nil {
			t.Fatal(err)
		}
		if len(token) != 43 { // 256 bits, six to a character
			t.Fatalf("token of %d characters", len(token))
		}
		if seen[token] {
			t.Fatal("token came twice")
		}
		seen[token] = true
	}
}

func TestTokenIsSingleUse(t *testing.T) {
	c := newTokenCache(10, time.Minute, time.Now)
	token, _ := c.insert(kindExec, "x")
	var wins atomic.Int32
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			if _, ok := c.take(kindExec, token); ok {
				wins.Add(1)
			}
		})
	}
	wg.Wait()
	if wins.Load() != 1 {
		t.Errorf("token was good %d times", wins.Load())
	}
}

func TestTokenIsBoundToItsKind(t *testing.T) {
	c := newTokenCache(10, time.Minute, time.Now)
	token, _ := c.insert(kindExec, "x")
	if _, ok := c.take(kindAttach, token); ok {
		t.Error("exec token was good for attach")
	}
	if _, ok := c.take(kindExec, token); ok {
		t.Error("token survived misuse")
	}
}

func TestTokensExpireAndAreBounded(t *testing.T) {
	now := time.Unix(1000, 0)
	c := newTokenCache(3, time.Minute, func() time.Time { return now })
	first, _ := c.insert(kindExec, 1)
	for range 2 {
		if _, err := c.insert(kindExec, 1); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.insert(kindExec, 1); !errs.Is(err, errs.ResourceExhausted) {
		t.Fatalf("fourth token: %v, want ResourceExhausted", err)
	}
	now = now.Add(time.Minute + time.Nanosecond)
	if _, ok := c.take(kindExec, first); ok {
		t.Error("token outlived its time")
	}
	if _, err := c.insert(kindExec, 1); err != nil {
		t.Errorf("after expiry: %v", err)
	}
	if len(c.index) != 1 || c.order.Len() != 1 {
		t.Errorf("%d in the index, %d in the list, want 1", len(c.index), c.order.Len())
	}
}
