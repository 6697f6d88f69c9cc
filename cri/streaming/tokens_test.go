package streaming

import (
	"encoding/base64"
	"net/http"
	goruntime "runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/naru-project/naru/internal/errs"
)

// Row S-02: 100 000 tokens, all different, every bit of them as often 0 as 1.
func TestTokensAreUniqueAndLong(t *testing.T) {
	const n = 100_000
	c := newTokenCache(n, time.Minute, time.Now)
	seen := make(map[string]bool, n)
	for range n {
		token, err := c.insert(kindExec, 1, 1)
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
	var ones [tokenBytes * 8]int
	for token := range seen {
		b, err := base64.RawURLEncoding.DecodeString(token)
		if err != nil || len(b) != tokenBytes {
			t.Fatalf("%q: %v", token, err)
		}
		for i := range ones {
			ones[i] += int(b[i/8]>>(i%8)) & 1
		}
	}
	for i, k := range ones { // n/2 ± eight standard deviations
		if k < n/2-1265 || k > n/2+1265 {
			t.Errorf("bit %d is set in %d of %d tokens", i, k, n)
		}
	}
}

// Row S-02: a token that many use at once is good for one.
func TestTokenIsSingleUse(t *testing.T) {
	c := newTokenCache(10, time.Minute, time.Now)
	token, _ := c.insert(kindExec, "x", 1)
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

// Row S-02: a token is good for what it was made for.
func TestTokenIsBoundToItsKind(t *testing.T) {
	c := newTokenCache(10, time.Minute, time.Now)
	token, _ := c.insert(kindExec, "x", 1)
	if _, ok := c.take(kindAttach, token); ok {
		t.Error("exec token was good for attach")
	}
	if _, ok := c.take(kindExec, token); ok {
		t.Error("token survived misuse")
	}
}

// Row S-02: a token ends after its time, and there are only so many.
func TestTokensExpireAndAreBounded(t *testing.T) {
	now := time.Unix(1000, 0)
	c := newTokenCache(3, time.Minute, func() time.Time { return now })
	first, _ := c.insert(kindExec, 1, 1)
	for range 2 {
		if _, err := c.insert(kindExec, 1, 1); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.insert(kindExec, 1, 1); !errs.Is(err, errs.ResourceExhausted) {
		t.Fatalf("fourth token: %v, want ResourceExhausted", err)
	}
	now = now.Add(time.Minute + time.Nanosecond)
	if _, ok := c.take(kindExec, first); ok {
		t.Error("token outlived its time")
	}
	if _, err := c.insert(kindExec, 1, 1); err != nil {
		t.Errorf("after expiry: %v", err)
	}
	if len(c.index) != 1 || c.order.Len() != 1 {
		t.Errorf("%d in the index, %d in the list, want 1", len(c.index), c.order.Len())
	}
}

// Row S-02: requests that nobody redeems, with commands as long as a message
// may be. Many times what is kept is asked for; a million would be the same.
func TestOutstandingTokensAreBounded(t *testing.T) {
	s := New(Config{}, &fakeBackend{})
	if err := s.Listen(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close(t.Context()) }()
	long := strings.Repeat("x", 15<<20)
	for _, tt := range []struct {
		name   string
		times  int
		fits   int
		handle func() (string, error)
	}{
		{"long commands", 100, 2, func() (string, error) {
			return s.ExecURL(Command{ContainerID: "c", Cmd: []string{strings.Clone(long)}, Stdout: true})
		}},
		{"many words", 100, 1, func() (string, error) {
			return s.ExecURL(Command{ContainerID: "c", Cmd: make([]string, 1<<20), Stdout: true})
		}},
		{"many ports", 100, 1, func() (string, error) { return s.PortForwardURL(Forward{PodID: "p", Ports: make([]uint16, 7<<20)}) }},
		{"short ones", 200_000, 1000, func() (string, error) {
			return s.ExecURL(Command{ContainerID: "c", Cmd: []string{"true"}, Stdout: true})
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s.tokens = newTokenCache(s.cfg.MaxTokens, s.cfg.TokenTTL, time.Now)
			made := 0
			for range tt.times {
				_, err := tt.handle()
				if err == nil {
					made++
				} else if !errs.Is(err, errs.ResourceExhausted) {
					t.Fatal(err)
				}
			}
			if made < tt.fits || made > 2*tt.fits {
				t.Errorf("%d URLs of %d were handed out, about %d fit", made, tt.times, tt.fits)
			}
			goruntime.GC()
			var m goruntime.MemStats
			goruntime.ReadMemStats(&m)
			if m.HeapAlloc > 96<<20 {
				t.Errorf("%d MiB are held", m.HeapAlloc>>20)
			}
		})
	}
	s.tokens.now = func() time.Time { return time.Now().Add(61 * time.Second) }
	if _, err := s.ExecURL(Command{ContainerID: "c", Cmd: []string{long}, Stdout: true}); err != nil {
		t.Errorf("after 61 s: %v", err)
	}
	if len(s.tokens.index) != 1 || s.tokens.held > 16<<20 {
		t.Errorf("%d tokens, %d bytes are still held", len(s.tokens.index), s.tokens.held)
	}
}

// Row S-02: a URL over the wire: twice at once, again, after 61 s, and as another
// kind.
func TestURLOverTheWire(t *testing.T) {
	var late atomic.Int64
	s := start(t, &fakeBackend{}, Config{})
	s.tokens.now = func() time.Time { return time.Now().Add(time.Duration(late.Load())) }
	get := func(url string) int {
		resp, err := http.Get(url) //nolint:noctx,gosec // a test's own server
		if err != nil {
			t.Error(err)
			return 0
		}
		_ = resp.Body.Close()
		return resp.StatusCode
	}
	fresh := func() string {
		u, err := s.ExecURL(Command{ContainerID: "c", Cmd: []string{"echo"}, Stdout: true})
		return must(t, u, err)
	}
	for range 20 {
		u := fresh()
		var good atomic.Int32
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				if get(u) != http.StatusNotFound { // no upgrade: a bad request, but known
					good.Add(1)
				}
			})
		}
		wg.Wait()
		if good.Load() != 1 || get(u) != http.StatusNotFound {
			t.Errorf("a URL was good %d times", good.Load())
		}
	}
	for _, k := range []string{"/attach/", "/portforward/", "/EXEC/", "/exec/x/", "/"} {
		u := fresh()
		if code := get(strings.Replace(u, "/exec/", k, 1)); code != http.StatusNotFound {
			t.Errorf("%s: %d", k, code)
		}
	}
	u := fresh()
	late.Store(int64(61 * time.Second))
	if code := get(u); code != http.StatusNotFound {
		t.Errorf("after 61 s: %d", code)
	}
}
