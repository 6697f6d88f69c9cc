package etcfiles

import (
	"bytes"
	"net/netip"
	"strings"
	"testing"

	"github.com/naru-project/naru/internal/errs"
)

func TestHostname(t *testing.T) {
	for _, h := range []string{"", "a", "web-0", "A.b_c-9", strings.Repeat("a", 64)} {
		if err := CheckHostname(h); err != nil {
			t.Errorf("%q: %v", h, err)
		}
	}
	for _, h := range []string{strings.Repeat("a", 65), "a b", "a\nb", "-a", ".a", "a\x00", "ü", "a;b", "a/b", "a\tb"} {
		if err := CheckHostname(h); !errs.Is(err, errs.InvalidArgument) {
			t.Errorf("%q: %v", h, err)
		}
	}
}

func TestHosts(t *testing.T) {
	got := string(Hosts("web", []netip.Addr{netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::2")}))
	for _, want := range []string{"127.0.0.1\tlocalhost\n", "::1\tlocalhost", "10.0.0.2\tweb\n", "fd00::2\tweb\n"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in %q", want, got)
		}
	}
}

func TestResolvVerbatim(t *testing.T) {
	got := string(Resolv([]string{"10.96.0.10", "127.0.0.1"}, []string{"a.svc", "b"}, []string{"ndots:5", "edns0"}))
	want := "search a.svc b\nnameserver 10.96.0.10\nnameserver 127.0.0.1\noptions ndots:5 edns0\n"
	if got != want {
		t.Errorf("got %q", got)
	}
	for _, bad := range []string{"10.0.0.1\nnameserver 6.6.6.6", "a b", "", "a\x00", "a\rb", strings.Repeat("a", 1025), "\xff"} {
		for i := range 3 {
			var v [3][]string
			v[i] = []string{bad}
			if err := CheckDNS(v[0], v[1], v[2]); !errs.Is(err, errs.InvalidArgument) {
				t.Errorf("%q as %d: %v", bad, i, err)
			}
		}
	}
}

// Row W-17: a name server on the host's loopback does not reach a pod.
func TestW17WithoutLoopback(t *testing.T) {
	in := "# comment\nnameserver 127.0.0.53\nnameserver ::1\nnameserver 10.0.0.1\nnameserver 127.1\nnameserver ::ffff:127.0.0.1\nnameserver 0.0.0.0\nsearch x\noptions edns0"
	out, n := WithoutLoopback([]byte(in))
	if want := "# comment\nnameserver 10.0.0.1\nsearch x\noptions edns0\n"; string(out) != want || n != 1 {
		t.Errorf("got %q, %d", out, n)
	}
}

func FuzzWithoutLoopback(f *testing.F) {
	f.Add([]byte("nameserver 127.0.0.53\nnameserver 10.0.0.1"))
	f.Add([]byte("nameserver\t::1 \r\n\n\n"))
	f.Fuzz(func(t *testing.T, in []byte) {
		out, n := WithoutLoopback(in)
		seen := 0
		for line := range bytes.Lines(out) {
			w := strings.Fields(string(line))
			if len(w) >= 2 && w[0] == "nameserver" {
				seen++
				if a, err := netip.ParseAddr(w[1]); err == nil && a.IsLoopback() {
					t.Fatalf("kept %q", line)
				}
			}
		}
		if seen != n {
			t.Fatalf("told %d, has %d", n, seen)
		}
		again, m := WithoutLoopback(out)
		if m != n || !bytes.Equal(again, out) {
			t.Fatalf("not stable: %q then %q", out, again)
		}
	})
}
